//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	payloadBytes  = 100
	datagramBytes = payloadBytes + 28 // with the headers of IPv4 and UDP
)

// helperEnv makes the test binary another program: see runHelper.
const helperEnv = "UNITMETER_EBPF_HELPER"

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		if err := runHelper(mode, os.Args[1], os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runHelper attaches to a root and waits to be killed, or reads pins.
func runHelper(mode, root, dir string) error {
	switch mode {
	case "attach":
		if _, err := Attach(context.Background(), Config{Root: root}); err != nil {
			return err
		}
		fmt.Println("attached")
		select {}
	case "read":
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return err
		}
		if !strings.Contains(string(status), "CapEff:\t0000000000000000\n") {
			return fmt.Errorf("this process has capabilities:\n%s", status)
		}
		r, err := Open(Config{Root: root, Dir: dir, Quiet: 1})
		if err != nil {
			return err
		}
		var last Sweep
		for range 2 { // the second deletes
			if last, err = r.Read(); err != nil {
				return err
			}
			if last.Deletion != nil {
				return last.Deletion
			}
		}
		return json.NewEncoder(os.Stdout).Encode(last.Meters)
	}
	return fmt.Errorf("helper %q is not known", mode)
}

// helper returns a command that runs this binary as a helper. The binary is copied
// to where every user may execute it.
func helper(t *testing.T, mode, root, dir string) *exec.Cmd {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(t.TempDir(), "helper")
	for dir := filepath.Dir(exe); dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, root, dir)
	cmd.Env = append(os.Environ(), helperEnv+"="+mode)
	cmd.Stderr = os.Stderr
	return cmd
}

// tree makes a cgroup for a test. It skips the test where that is impossible.
func tree(t testing.TB) string {
	t.Helper()
	mount, err := findRoot("")
	if err == nil && os.Geteuid() != 0 {
		err = fmt.Errorf("uid %d is not root", os.Geteuid())
	}
	if err != nil {
		if os.Getenv("UNITMETER_TEST_NO_SKIP") != "" {
			t.Fatal(err)
		}
		t.Skipf("eBPF needs root and cgroup v2: %v", err)
	}
	dir, err := os.MkdirTemp(mount, "unitmeter-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeAll(t, dir) })
	return dir
}

func removeAll(t testing.TB, dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			removeAll(t, filepath.Join(dir, e.Name()))
		}
	}
	remove(t, dir)
}

func mkdir(t testing.TB, dir string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func remove(t testing.TB, dir string) {
	t.Helper()
	if err := unix.Rmdir(strings.TrimSuffix(dir, "/")); err != nil {
		t.Errorf("remove %s: %v", dir, err)
	}
}

// within runs f with this process in a cgroup: a socket that f makes belongs to it.
func within(t testing.TB, dir string, f func()) {
	t.Helper()
	home, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	mount, err := findRoot("")
	if err != nil {
		t.Fatal(err)
	}
	_, path, _ := strings.Cut("\n"+string(home), "\n0::")
	path, _, _ = strings.Cut(path, "\n")
	join(t, dir)
	defer join(t, mount+path)
	f()
}

func join(t testing.TB, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0); err != nil {
		t.Fatal(err)
	}
}

// sink receives datagrams for a test, outside of its tree.
func sink(t testing.TB, network, address string) net.Addr {
	t.Helper()
	c, err := net.ListenPacket(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.LocalAddr()
}

// socketIn returns a socket that belongs to a cgroup, connected to an address.
func socketIn(t testing.TB, dir string, to net.Addr) net.Conn {
	t.Helper()
	var c net.Conn
	within(t, dir, func() {
		var err error
		if c, err = net.Dial(to.Network(), to.String()); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { c.Close() })
	return c
}

func talk(t testing.TB, c net.Conn, n int) {
	t.Helper()
	for range n {
		if _, err := c.Write(make([]byte, payloadBytes)); err != nil {
			t.Fatal(err)
		}
	}
}

// pinDir mounts a BPF file system for a test and returns a directory to be in it.
func pinDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "unitmeter")
}

func attach(t testing.TB, cfg Config) *Reader {
	t.Helper()
	r, err := Attach(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if r.Naming() != nil {
		t.Fatal(r.Naming())
	}
	return r
}

func mustLoad(t testing.TB, cfg LoadConfig) Loaded {
	t.Helper()
	loaded, err := Load(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if loaded.Naming != nil {
		t.Fatal(loaded.Naming)
	}
	return loaded
}

func open(t testing.TB, cfg Config) *Reader {
	t.Helper()
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func read(t testing.TB, r *Reader) Sweep {
	t.Helper()
	s, err := r.Read()
	if err != nil {
		t.Fatal(err)
	}
	if s.Deletion != nil {
		t.Fatal(s.Deletion)
	}
	return s
}

// at returns the meter of a path, or one without an Identity.
func at(s Sweep, path string) Meter {
	for _, m := range s.Meters {
		if m.Identity.Path == path {
			return m
		}
	}
	return Meter{}
}

// wantSent wants n datagrams to be counted as sent, all over loopback.
func wantSent(t testing.TB, what string, c Counters, n int) {
	t.Helper()
	all := Traffic{uint64(n) * datagramBytes, uint64(n), uint64(n) * datagramBytes, uint64(n)}
	if want := (Counters{Traffic: all, Loopback: all}); c != want {
		t.Errorf("%s sent %+v, want %+v", what, c, want)
	}
}
