package systemdtest

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

//go:embed supervise.sh
var superviseScript string

//go:embed boot.sh
var bootScript string

const (
	// bootTimeout ends a boot that hangs. A boot takes about a second; a loaded
	// machine may need ten.
	bootTimeout = 3 * time.Minute
	trafficPath = "/usr/local/bin/traffic"
	searchPath  = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// Config says how to boot a Rig. The zero value boots the machine's own systemd,
// or that of UNITMETER_TEST_ROOT.
type Config struct {
	// Dir is where the rig keeps its files: a new or an empty directory, which
	// Close removes. "" is a fresh one in /var/tmp.
	Dir string
	// Root is the tree to boot from, "" is the one that the environment variable
	// UNITMETER_TEST_ROOT names, or else "/". The tree itself is not changed.
	// From "/", the local configuration in /etc/systemd/system* is left out, so
	// no unit that the host has enabled is started.
	Root string
	// Binds are directories to make visible inside at the same path. A directory
	// that the overlay of Root shows anyway is copy-on-write inside; any other is
	// bound read-only. The directory of the running executable and the
	// repository's .tools/bin are always among them.
	Binds []string
	// NoTraffic leaves out the traffic generator, which needs the go command.
	NoTraffic bool
	// Logf receives progress and the names of failed units; nil discards them.
	Logf func(format string, args ...any)
}

// Rig is a booted systemd. Any number of rigs can run at the same time.
type Rig struct {
	pid        int
	supervisor *exec.Cmd
	lifeline   io.Closer     // its end is the supervisor's signal to clean up
	complaints *bytes.Buffer // of the supervisor; read it after Wait only
	commands   string        // cgroup.procs of the cgroup that Command runs in
	tools      string        // directory of the repository's tools, or ""
	logf       func(string, ...any)
	close      func() error
}

// unsupported is the error of a machine that cannot run a rig.
type unsupported string

func (u unsupported) Error() string        { return string(u) }
func (u unsupported) Is(target error) bool { return target == errors.ErrUnsupported }

// Boot boots systemd to basic.target with dbus.service up. ctx bounds the boot,
// not the life of the rig; without a deadline three minutes are allowed. The rig
// ends with Close or with this process, however that dies.
//
// An error for which errors.Is(err, [errors.ErrUnsupported]) holds says what the
// machine lacks; any other is a fault.
func Boot(ctx context.Context, cfg Config) (*Rig, error) {
	rig, err := boot(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("boot rig: %w", err)
	}
	return rig, nil
}

func boot(ctx context.Context, cfg Config) (*Rig, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	if cfg.Root == "" {
		cfg.Root = cmp.Or(os.Getenv("UNITMETER_TEST_ROOT"), "/")
	}
	id := "unitmeter-rig-" + strings.ToLower(rand.Text()[:10])
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join("/var/tmp", id)
	}
	for _, p := range []*string{&cfg.Dir, &cfg.Root} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return nil, err
		}
		*p = abs
	}
	if err := check(cfg.Root); err != nil {
		return nil, err
	}
	tools := findTools()
	binds, err := hidden(cfg, tools)
	if err != nil {
		return nil, err
	}

	began := time.Now()
	rig, err := supervise(ctx, cfg, id, binds)
	if err != nil {
		return nil, err
	}
	rig.tools = tools
	var program []byte
	var buildErr error
	var builder sync.WaitGroup
	if !cfg.NoTraffic {
		builder.Go(func() { program, buildErr = build(cfg.Dir, "traffic", trafficSource) })
	}
	if err = rig.awaitBus(ctx); err != nil {
		log, _ := os.ReadFile(filepath.Join(cfg.Dir, "boot.log")) // a help only
		err = fmt.Errorf("%w\n%s", err, log)
	}
	builder.Wait() // also after an error: Close removes the directory it works in
	if err = errors.Join(err, buildErr); err == nil && !cfg.NoTraffic {
		err = rig.writeFile(trafficPath, program, 0o755)
	}
	if err != nil {
		return nil, errors.Join(err, rig.Close())
	}
	cfg.Logf("systemd is up as pid %d in %s after %v", rig.pid, cfg.Dir, time.Since(began).Round(time.Millisecond))
	return rig, nil
}

// check finds what can be known to be missing before anything is started. The
// scripts report the rest.
func check(root string) error {
	if runtime.GOOS != "linux" {
		return unsupported("this is " + runtime.GOOS + ", and systemd needs Linux; run the tests in a Linux virtual machine")
	}
	if os.Geteuid() != 0 {
		return unsupported(fmt.Sprintf("uid %d cannot make namespaces and mounts; run as root", os.Geteuid()))
	}
	for _, tool := range []string{"sh", "mount", "mountpoint", "unshare", "nsenter", "setpriv", "flock", "pivot_root"} {
		if _, err := exec.LookPath(tool); err != nil {
			return unsupported(fmt.Sprintf("the command %s is missing; install util-linux and a shell", tool))
		}
	}
	if strings.ContainsAny(root, ":,\\\n") {
		return fmt.Errorf("root %q has a character that overlayfs options cannot carry; rename it", root)
	}
	if !anyExists(root, "lib/systemd/systemd", "usr/lib/systemd/systemd") {
		return unsupported(fmt.Sprintf("there is no systemd in %s (lib/systemd/systemd, usr/lib/systemd/systemd); install systemd", root))
	}
	if !anyExists(root, "usr/bin/dbus-daemon", "bin/dbus-daemon") {
		return unsupported(fmt.Sprintf("there is no dbus-daemon in %s (usr/bin/dbus-daemon); install dbus", root))
	}
	return nil
}

func anyExists(root string, paths ...string) bool {
	for _, p := range paths {
		if _, err := os.Stat(filepath.Join(root, p)); err == nil {
			return true
		}
	}
	return false
}

// hidden returns the directories that a caller needs and the overlay does not
// show.
func hidden(cfg Config, tools string) ([]string, error) {
	wanted := append([]string{}, cfg.Binds...)
	if exe, err := os.Executable(); err == nil && anyExists("/", exe) { // go run may have removed it
		wanted = append(wanted, filepath.Dir(exe))
	}
	if tools != "" {
		wanted = append(wanted, tools)
	}
	var rootStat syscall.Stat_t
	if err := syscall.Stat(cfg.Root, &rootStat); err != nil {
		return nil, fmt.Errorf("read root %q: %w", cfg.Root, err)
	}
	var binds []string
	for _, dir := range wanted {
		var st syscall.Stat_t
		if err := syscall.Stat(dir, &st); err != nil {
			return nil, fmt.Errorf("bind %q: %w; name a directory that exists", dir, err)
		}
		if !filepath.IsAbs(dir) || st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
			return nil, fmt.Errorf("bind %q: not an absolute path of a directory; name one", dir)
		}
		dir = filepath.Clean(dir)
		fresh := false // inside, these are file systems of the rig's own
		for _, top := range []string{"/tmp/", "/run/", "/dev/", "/proc/", "/sys/"} {
			fresh = fresh || strings.HasPrefix(dir+"/", top)
		}
		if fresh || cfg.Root != "/" || st.Dev != rootStat.Dev {
			binds = append(binds, dir)
		}
	}
	return binds, nil
}

// findTools returns the .tools/bin beside the go.mod above the working
// directory, or "".
func findTools() string {
	dir, err := os.Getwd()
	if err != nil {
		return ""
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil || dir == filepath.Dir(dir) {
			break
		}
	}
	tools := filepath.Join(dir, ".tools", "bin")
	if st, err := os.Stat(tools); err != nil || !st.IsDir() {
		return ""
	}
	return tools
}

// supervise starts the supervisor and returns when PID 1 has become systemd.
func supervise(ctx context.Context, cfg Config, name string, binds []string) (*Rig, error) {
	args := []string{"--mount", "sh", "-c", superviseScript, "supervise"}
	cmd := exec.Command("unshare", append(args, binds...)...)
	cmd.Env = []string{"PATH=" + searchPath, "LC_ALL=C", "DIR=" + cfg.Dir, "NAME=" + name, "ROOT=" + cfg.Root, "BOOT=" + bootScript}
	// A session of its own: what interrupts the owner must not interrupt the
	// cleaning up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	complaints := new(bytes.Buffer)
	cmd.WaitDelay = time.Second // if a killed supervisor leaves a child with this descriptor
	cmd.Stderr = complaints
	lifeline, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	status, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	rig := &Rig{supervisor: cmd, lifeline: lifeline, complaints: complaints, logf: cfg.Logf}
	rig.close = sync.OnceValue(rig.end)
	rig.commands = fmt.Sprintf("/proc/%d/root/sys/fs/cgroup/%s/rig-commands/cgroup.procs", cmd.Process.Pid, name)

	stop := context.AfterFunc(ctx, func() { lifeline.Close() })
	up, failure := rig.readStatus(status)
	log, _ := os.ReadFile(filepath.Join(cfg.Dir, "boot.log")) // absent when it did not come to that
	if !stop() {
		return nil, errors.Join(fmt.Errorf("boot of %s: %w", cfg.Root, context.Cause(ctx)), rig.Close())
	}
	if up && rig.pid > 0 {
		return rig, nil
	}
	closeErr := rig.Close()
	if failure == nil {
		failure = errors.Join(errors.New("PID 1 ended before systemd began"), closeErr)
		if rig.pid == 0 { // unshare itself was refused
			failure = unsupported("no namespaces for PID 1; run as root outside of an unprivileged container")
		}
	}
	return nil, fmt.Errorf("%w\n%s%s", failure, log, complaints)
}

// readStatus reads what the scripts report, until systemd takes over or they
// end.
func (r *Rig) readStatus(status io.Reader) (up bool, failure error) {
	for lines := bufio.NewScanner(status); lines.Scan(); {
		word, rest, _ := strings.Cut(lines.Text(), " ")
		switch word {
		case "pid":
			r.pid, _ = strconv.Atoi(rest) // the caller refuses 0
		case "up":
			return true, nil
		case "error":
			if reason, ok := strings.CutPrefix(rest, "unsupported "); ok {
				return false, unsupported(reason)
			}
			return false, errors.New(rest)
		}
	}
	return false, nil
}

// awaitBus returns when basic.target is reached and dbus.service runs.
func (r *Rig) awaitBus(ctx context.Context) error {
	// The socket is there a moment before systemd listens on it.
	for private := r.Path("/run/systemd/private"); ; {
		if conn, err := net.Dial("unix", private); err == nil {
			conn.Close()
			break
		}
		if _, err := os.Stat(r.Path("/")); err != nil {
			return fmt.Errorf("systemd (pid %d) ended while booting", r.pid)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for systemd (pid %d) to listen: %w", r.pid, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
	// dbus.service is ordered behind basic.target, so this waits for both.
	if out, err := r.Command(ctx, "systemctl", "start", "dbus.service").CombinedOutput(); err != nil {
		journal, _ := r.Command(ctx, "journalctl", "-n", "50", "--no-pager").CombinedOutput() // a help only
		return fmt.Errorf("start dbus.service: %w\n%s%s", err, out, journal)
	}
	failed, err := r.Command(ctx, "systemctl", "list-units", "--failed", "--no-legend", "--plain").Output()
	if err != nil {
		return fmt.Errorf("list failed units: %w", err)
	}
	for line := range strings.Lines(string(failed)) {
		r.logf("failed unit: %s", strings.TrimSpace(line))
	}
	return nil
}

// Start boots a rig from the default root, see [Config], and closes it when the
// test ends. On a machine that cannot, it skips the test with the reason, or
// fails it when UNITMETER_TEST_NO_SKIP is not empty.
func Start(t testing.TB) *Rig {
	t.Helper()
	return StartRoot(t, "")
}

// StartRoot is Start for another root tree.
func StartRoot(t testing.TB, root string) *Rig {
	t.Helper()
	rig, err := Boot(context.Background(), Config{Root: root, Logf: t.Logf})
	if errors.Is(err, errors.ErrUnsupported) && os.Getenv("UNITMETER_TEST_NO_SKIP") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rig.Close(); err != nil {
			t.Errorf("close rig: %v", err)
		}
	})
	return rig
}

// Close kills the rig and removes its processes, mounts, cgroups and directory.
// It returns when all of them are gone. A second call returns the same error.
func (r *Rig) Close() error { return r.close() }

func (r *Rig) end() error {
	r.lifeline.Close() // the supervisor may be dead: Wait tells
	if err := r.supervisor.Wait(); err != nil {
		return fmt.Errorf("clean up rig: %w: %s; the next Boot tries again", err, bytes.TrimSpace(r.complaints.Bytes()))
	}
	return nil
}

// Command returns a command that runs inside, as root, in all namespaces of the
// rig, in a cgroup that belongs to no unit. Environment: PATH (the repository's
// tools first), HOME, LANG; append to Env for more.
//
// The end of ctx kills the command and its children. Signal it through its
// process group, syscall.Kill(-cmd.Process.Pid, sig): the process itself is
// nsenter, which does not pass signals on.
func (r *Rig) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := []string{"-c", `echo $$ >"$1" && shift && exec "$@"`, "enter", r.commands,
		"nsenter", "-t", strconv.Itoa(r.pid), "-a", "--", name}
	cmd := exec.CommandContext(ctx, "sh", append(enter, args...)...)
	path := searchPath
	if r.tools != "" {
		path = r.tools + ":" + path
	}
	cmd.Env = []string{"PATH=" + path, "HOME=/root", "LANG=C.UTF-8", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second // for a grandchild that keeps a pipe open
	return cmd
}

// Run runs a command inside and returns its standard output. A command that
// fails, fails the test with all its output.
func (r *Rig) Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := r.Command(context.Background(), name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("in the rig: %s: %v\n%s%s", strings.Join(append([]string{name}, args...), " "), err, &stdout, &stderr)
	}
	return stdout.String()
}

// WriteFile writes a file inside, with the directories above it. The mode is
// 0755 when content begins with "#!", else 0644.
func (r *Rig) WriteFile(t testing.TB, path, content string) {
	t.Helper()
	mode := os.FileMode(0o644)
	if strings.HasPrefix(content, "#!") {
		mode = 0o755
	}
	if err := r.writeFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

// writeFile goes through an os.Root: an absolute link inside the rig must not
// lead to a file of the host.
func (r *Rig) writeFile(path string, content []byte, mode os.FileMode) error {
	root, err := os.OpenRoot(r.Path("/"))
	if err != nil {
		return fmt.Errorf("open the rig's root: %w", err)
	}
	defer root.Close()
	path = strings.TrimLeft(filepath.Clean("/"+path), "/")
	if err := root.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make directory of %q in the rig: %w", path, err)
	}
	if err := root.WriteFile(path, content, mode); err != nil {
		return fmt.Errorf("write %q in the rig: %w", path, err)
	}
	return nil
}

// Path returns the path by which the host sees a path inside, valid while the
// rig lives. Absolute symbolic links inside lead out of the rig.
func (r *Rig) Path(p string) string {
	return fmt.Sprintf("/proc/%d/root%s", r.pid, filepath.Clean("/"+p))
}

// PID returns the number that the rig's PID 1 has on the host.
func (r *Rig) PID() int { return r.pid }

// SystemBus returns the D-Bus address of the rig's system bus, usable from the
// host and, by path, without any namespace.
func (r *Rig) SystemBus() string { return "unix:path=" + r.Path("/run/dbus/system_bus_socket") }

// PrivateBus returns the D-Bus address of PID 1's own socket. There is no bus
// behind it: do not say Hello.
func (r *Rig) PrivateBus() string { return "unix:path=" + r.Path("/run/systemd/private") }

// Traffic returns the path inside of the traffic generator (see the traffic
// directory of this package). It is absent with Config.NoTraffic.
func (r *Rig) Traffic() string { return trafficPath }

// Accounting is what systemctl show says of a unit.
type Accounting struct {
	// Bytes count whole IP packets: a UDP payload of 100 B is 128 B.
	IngressBytes, IngressPackets uint64
	EgressBytes, EgressPackets   uint64
	// OK is false when any counter reads "no data"; then all four are 0.
	OK bool
	// InvocationID is 32 hex digits, or "" for a unit without one.
	InvocationID string
}

// Show reads a unit's counters with systemctl show.
func (r *Rig) Show(t testing.TB, unit string) Accounting {
	t.Helper()
	out := r.Run(t, "systemctl", "show", unit, "-p", "IPIngressBytes,IPIngressPackets,IPEgressBytes,IPEgressPackets,InvocationID")
	a, err := parseShow(out)
	if err != nil {
		t.Fatalf("systemctl show %s: %v", unit, err)
	}
	return a
}

func parseShow(out string) (Accounting, error) {
	var a Accounting
	counters := map[string]*uint64{
		"IPIngressBytes": &a.IngressBytes, "IPIngressPackets": &a.IngressPackets,
		"IPEgressBytes": &a.EgressBytes, "IPEgressPackets": &a.EgressPackets,
	}
	got := 0
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		counter, isCounter := counters[key]
		switch {
		case key == "InvocationID":
			a.InvocationID = value
		case !isCounter || value == "[no data]" || value == "[not set]":
		default:
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				return Accounting{}, fmt.Errorf("%s=%q is not a number", key, value)
			}
			if n != math.MaxUint64 { // how old versions print "no data"
				*counter, got = n, got+1
			}
		}
	}
	if got < len(counters) {
		return Accounting{InvocationID: a.InvocationID}, nil
	}
	a.OK = true
	return a, nil
}
