package systemdtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// TestMain is this package's tests or, in a process that a test has started, the
// owner of a rig; see helper.
func TestMain(m *testing.M) {
	if os.Getenv("SYSTEMDTEST_HELPER") == "" {
		os.Exit(m.Run())
	}
	if err := ownRig(); err != nil {
		fmt.Printf("unsupported=%v %v\n", errors.Is(err, errors.ErrUnsupported), err)
	}
}

func ownRig() error {
	ctx := context.Background()
	rig, err := Boot(ctx, Config{NoTraffic: true, Root: os.Getenv("SYSTEMDTEST_ROOT"), Binds: strings.Fields(os.Getenv("SYSTEMDTEST_BINDS"))})
	if err != nil {
		return err
	}
	fmt.Println("booted", rig.PID(), rig.supervisor.Process.Pid)
	out, err := rig.Command(ctx, "sh", "-c", "cat /proc/1/comm\n"+os.Getenv("SYSTEMDTEST_RUN")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	fmt.Printf("%s", out)
	if os.Getenv("SYSTEMDTEST_HANG") != "" {
		io.Copy(io.Discard, os.Stdin)
	}
	if err := rig.Close(); err != nil {
		return err
	}
	fmt.Println("closed, directory left:", exists(filepath.Join("/var/tmp", strings.Split(rig.commands, "/")[7])))
	return nil
}

// closed is what the helper says after a whole life of a rig.
const closed = "closed, directory left: false\n"

// helper is this test binary as another process that boots a rig.
func helper(env ...string) (argv, environ []string) {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return []string{exe}, append([]string{"SYSTEMDTEST_HELPER=1"}, env...)
}

// needRig skips where no rig can be: the tests that boot in another process
// cannot do it with Start.
func needRig(t *testing.T) {
	t.Helper()
	if err := check("/"); err != nil {
		if os.Getenv("UNITMETER_TEST_NO_SKIP") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

func TestCountsExactly(t *testing.T) {
	t.Parallel()
	r := Start(t)
	r.WriteFile(t, "/etc/systemd/system/sink.service",
		"[Service]\nType=notify\nIPAccounting=yes\nExecStart="+r.Traffic()+" udp-sink 127.0.0.1:9\n")
	r.Run(t, "systemctl", "start", "sink.service")
	before := r.Show(t, "sink.service")
	if want := (Accounting{OK: true, InvocationID: before.InvocationID}); before != want || len(before.InvocationID) != 32 {
		t.Fatalf("fresh unit: got %+v, want %+v", before, want)
	}
	// A slice keeps the counters of units that are gone.
	r.Run(t, "systemctl", "set-property", "--runtime", "talk.slice", "IPAccounting=yes")
	r.Run(t, "systemd-run", "--wait", "--slice=talk.slice", "-p", "IPAccounting=yes",
		r.Traffic(), "udp-send", "127.0.0.1:9", "-bytes", "100", "-count", "1000", "-rate", "20000")
	const bytes, packets = 128_000, 1000
	sink, talk := r.Show(t, "sink.service"), r.Show(t, "talk.slice")
	if sink.IngressBytes != bytes || sink.IngressPackets != packets || sink.EgressBytes != 0 {
		t.Errorf("receiver: got %+v, want %d bytes in %d packets", sink, bytes, packets)
	}
	if talk.EgressBytes != bytes || talk.EgressPackets != packets || talk.IngressBytes != 0 {
		t.Errorf("sender: got %+v, want %d bytes in %d packets", talk, bytes, packets)
	}
	if a := r.Show(t, "tmp.mount"); a.OK || a.IngressBytes != 0 {
		t.Errorf("unit without accounting: got %+v, want not OK", a)
	}
}

func TestTrafficTCP(t *testing.T) {
	t.Parallel()
	r := Start(t)
	r.WriteFile(t, "/etc/systemd/system/sact.socket", "[Socket]\nListenStream=127.0.0.1:8001\nIPAccounting=yes\n")
	r.WriteFile(t, "/etc/systemd/system/sact.service", "[Service]\nExecStart="+r.Traffic()+" tcp-sink - -conns 2\n")
	r.WriteFile(t, "/etc/systemd/system/each.socket", "[Socket]\nListenStream=127.0.0.1:8002\nAccept=yes\nIPAccounting=yes\n")
	r.WriteFile(t, "/etc/systemd/system/each@.service", "[Service]\nExecStart="+r.Traffic()+" tcp-sink -\n")
	r.WriteFile(t, "/etc/systemd/system/source.service", "[Service]\nType=notify\nIPAccounting=yes\nExecStart="+r.Traffic()+" tcp-source 127.0.0.1:8003 -bytes 50000\n")
	r.Run(t, "systemctl", "start", "sact.socket", "each.socket", "source.service")
	for range 2 {
		r.Run(t, r.Traffic(), "tcp-send", "127.0.0.1:8001", "-bytes", "100000")
	}
	r.Run(t, r.Traffic(), "tcp-send", "127.0.0.1:8002", "-bytes", "100000")
	r.Run(t, r.Traffic(), "tcp-fetch", "127.0.0.1:8003")
	for unit, payload := range map[string]uint64{"sact.socket": 200_000, "each.socket": 100_000} {
		if a := r.Show(t, unit); a.IngressBytes <= payload || a.IngressBytes > payload*11/10 {
			t.Errorf("%s: got %+v, want %d bytes and headers", unit, a, payload)
		}
	}
	if a := r.Show(t, "source.service"); a.EgressBytes <= 50_000 || a.EgressBytes > 55_000 {
		t.Errorf("source.service: got %+v, want 50000 bytes and headers", a)
	}
	for _, args := range [][]string{{"udp-send"}, {"nonsense", "x"}, {"tcp-send", "127.0.0.1:1"}, {"udp-send", "127.0.0.1:9", "-bytes", "70000"}, {"tcp-sink", "-"}} {
		if out, err := r.Command(t.Context(), r.Traffic(), args...).CombinedOutput(); err == nil {
			t.Errorf("traffic %v: got no error and %q", args, out)
		}
	}
}

func TestReachable(t *testing.T) {
	t.Parallel()
	r := Start(t)
	ctx := t.Context()

	bus, err := dbus.Connect(r.SystemBus())
	if err != nil {
		t.Fatal(err)
	}
	defer bus.Close()
	var units []struct {
		Name, Description, Load, Active, Sub, Following string
		Path                                            dbus.ObjectPath
		Job                                             uint32
		JobType                                         string
		JobPath                                         dbus.ObjectPath
	}
	if err := bus.Object(busName, managerPath).CallWithContext(ctx, managerInterface+".ListUnits", 0).Store(&units); err != nil {
		t.Fatal(err)
	}
	if len(units) < 20 {
		t.Errorf("system bus: got %d units, want a booted system's", len(units))
	}
	if c, err := net.Dial("unix", strings.TrimPrefix(r.PrivateBus(), "unix:path=")); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}

	l, err := r.Listen(ctx, "tcp", "127.0.0.1:8004")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1) // the client waits for Close only
	go func() {                   // ends with l
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, err = io.Copy(io.Discard, c)
			c.Close()
			served <- err
		}
	}()
	defer l.Close()
	r.Run(t, r.Traffic(), "tcp-send", "127.0.0.1:8004", "-bytes", "10")
	if err := <-served; err != nil {
		t.Error(err)
	}
	c, err := r.Dial(ctx, "tcp", "127.0.0.1:8004")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}

	// A scope is made of a process that PID 1 must be able to move.
	if out := r.Run(t, "systemd-run", "--scope", "--unit=mine", "cat", "/proc/self/cgroup"); !strings.Contains(out, "/mine.scope") {
		t.Errorf("scope: got cgroup %q", out)
	}
	if out := r.Run(t, "cat", "/proc/self/cgroup"); !strings.Contains(out, "0::/rig-commands\n") {
		t.Errorf("command: got cgroup %q, want the one outside of units", out)
	}
	if out := r.Run(t, "systemctl", "list-units", "--failed", "--no-legend"); out != "" {
		t.Errorf("failed units:\n%s", out)
	}
	if out := r.Run(t, "systemd-run", "--wait", "--pipe", "-p", "DynamicUser=yes", "-p", "PrivateNetwork=yes", "id", "-u"); strings.TrimSpace(out) == "0" {
		t.Errorf("dynamic user: got uid %q", out)
	}
}

func TestChangesNothingOutside(t *testing.T) {
	t.Parallel()
	r := Start(t)
	for _, script := range []string{
		"v=$(cat /proc/sys/kernel/panic) && echo $v >/proc/sys/kernel/panic",
		"echo change >/sys/class/net/lo/uevent",
		"touch " + filepath.Dir(mustExecutable(t)) + "/x",
	} {
		if out, err := r.Command(t.Context(), "sh", "-c", script).CombinedOutput(); err == nil {
			t.Errorf("%s: succeeded: %s", script, out)
		}
	}
	var set uint64 // of what PID 1 starts
	if _, err := fmt.Sscanf(r.Run(t, "systemd-run", "--wait", "--pipe", "--quiet", "sed", "-n", "s/CapBnd://p", "/proc/self/status"), "%x", &set); err != nil {
		t.Fatal(err)
	}
	if hosts := uint64(1)<<16 | 1<<25; set == 0 || set&hosts != 0 { // CAP_SYS_MODULE, CAP_SYS_TIME
		t.Errorf("units have capabilities %x, with modules or the clock", set)
	}
	r.Run(t, "sysctl", "-w", "net.ipv4.ip_forward=1") // the rig's own
	r.Run(t, "mkdir", "/dev/rig")
	r.WriteFile(t, "/var/rig/new", "x")
	for _, p := range []string{"/dev/rig", "/var/rig"} {
		if _, err := os.Stat(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is visible on the host: %v", p, err)
		}
	}
	inside := strings.TrimSpace(r.Run(t, "cat", "/etc/machine-id"))
	if host, err := os.ReadFile("/etc/machine-id"); err == nil && inside == strings.TrimSpace(string(host)) {
		t.Error("the rig has the host's machine id")
	}
	// An absolute link inside would lead to the host's file.
	r.Run(t, "ln", "-s", "/var", "/lnk")
	if err := r.writeFile("/lnk/escape", nil, 0o644); err == nil {
		t.Error("wrote through an absolute link")
	}
}

func mustExecutable(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func TestCommandEndsWithContext(t *testing.T) {
	t.Parallel()
	r := Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cmd := r.Command(ctx, "sh", "-c", "echo $$; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("cancelled command: got no error")
	}
	eventually(t, "the cancelled command to have ended", func() bool {
		// A zombie has ended: its reaper is the host's PID 1, when it likes.
		status, err := os.ReadFile(r.Path("/proc/" + strings.TrimSpace(line) + "/status"))
		return err != nil || strings.Contains(string(status), "State:\tZ")
	})
}

// eventually waits for what happens in other processes, which nothing here can
// be told of.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still waiting for %s", what)
		}
	}
}

// traces finds what a rig is made of on the host.
type traces struct {
	name       string // of directory and cgroup
	supervisor int
}

func ns(t *testing.T, pid int, kind string) string {
	t.Helper()
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func tracesOf(t *testing.T, pid1, supervisor int) traces {
	t.Helper()
	for _, kind := range []string{"mnt", "pid", "net", "uts", "ipc", "cgroup"} {
		if link := ns(t, pid1, kind); link == ns(t, os.Getpid(), kind) {
			t.Fatalf("PID 1 (%d) is in the host's %s namespace", pid1, kind)
		}
	}
	cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid1))
	if err != nil {
		t.Fatal(err)
	}
	_, path, _ := strings.Cut(string(cgroup), "0::/")
	tr := traces{supervisor: supervisor}
	tr.name, _, _ = strings.Cut(path, "/")
	if !strings.HasPrefix(tr.name, "unitmeter-rig-") {
		t.Fatalf("cgroup of PID 1: got %q", cgroup)
	}
	// systemd, journald, dbus-daemon, unshare; supervisor, cgroup, directory. (Not
	// all of them: what the boot has run may still be ending.)
	if left := tr.left(t); len(left) < 7 || len(tr.processes()) < 4 {
		t.Fatalf("a running rig shows too little: %q", left)
	}
	return tr
}

// processes lists those in the rig's cgroup: all but the supervisor. The name
// stays in /proc even when the cgroup is removed. (Namespaces would not do:
// their numbers are used again.)
func (tr traces) processes() []int {
	var pids []int
	entries, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, e := range entries {
		cgroup, _ := os.ReadFile(e) // fails for a process that has just gone
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(e)))
		if err == nil && strings.Contains(string(cgroup), "/"+tr.name) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// left lists what there still is.
func (tr traces) left(t *testing.T) []string {
	t.Helper()
	var left []string
	for _, pid := range tr.processes() {
		left = append(left, "process "+strconv.Itoa(pid))
	}
	if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", tr.supervisor)); err == nil && strings.Contains(string(cmdline), "supervise") {
		left = append(left, fmt.Sprintf("supervisor %d", tr.supervisor))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, tr.name) {
			left = append(left, "mount "+line)
		}
		fields := strings.Fields(line)
		if strings.Contains(line, " - cgroup") { // v1 and v2
			if dir := filepath.Join(fields[4], tr.name); exists(dir) {
				left = append(left, "cgroup "+dir)
			}
		}
	}
	if dir := filepath.Join("/var/tmp", tr.name); exists(dir) {
		left = append(left, "directory "+dir)
	}
	return left
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestCloseLeavesNothing(t *testing.T) {
	dev := listing(t, "/dev")
	r := Start(t)
	tr := tracesOf(t, r.PID(), r.supervisor.Process.Pid)
	r.Run(t, "systemd-run", "--unit=orphans", "sh", "-c", "sleep 1000 & sleep 1000")
	r.Run(t, "mount", "-t", "tmpfs", "tmpfs", "/mnt")
	hanging := r.Command(context.Background(), "sleep", "1000")
	if err := hanging.Start(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if err := hanging.Wait(); err == nil {
		t.Error("a command outlived its rig")
	}
	if left := tr.left(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if now := listing(t, "/dev"); now != dev {
		t.Errorf("/dev has changed: got %s, want %s", now, dev)
	}
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	// Tests of other packages may need one more loop device at any time.
	entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "loop") })
	return fmt.Sprint(entries)
}

// startHelper runs the helper until its rig is up.
func startHelper(t *testing.T) (cmd *exec.Cmd, pid1, supervisor int) {
	t.Helper()
	argv, env := helper("SYSTEMDTEST_HANG=1")
	cmd = exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var said strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		fmt.Fprintln(&said, lines.Text())
		if n, _ := fmt.Sscanf(lines.Text(), "booted %d %d", &pid1, &supervisor); n == 2 {
			return cmd, pid1, supervisor
		}
	}
	t.Fatalf("helper did not boot:\n%s", &said)
	return nil, 0, 0
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func TestKilledOwnerLeavesNothing(t *testing.T) {
	needRig(t)
	cmd, pid1, supervisor := startHelper(t)
	tr := tracesOf(t, pid1, supervisor)
	kill(t, cmd.Process.Pid)
	cmd.Wait() // the error is the kill
	eventually(t, "everything to be gone", func() bool { return len(tr.left(t)) == 0 })
}

// The worst case: nobody is left to clean up, so PID 1 must die by itself and
// the next Boot must find the rest.
func TestKilledSupervisorIsSweptLater(t *testing.T) {
	needRig(t)
	other := Start(t) // a living rig is not stale
	var tr traces
	for range 10 {
		cmd, pid1, supervisor := startHelper(t)
		tr = tracesOf(t, pid1, supervisor)
		kill(t, supervisor)
		kill(t, cmd.Process.Pid)
		cmd.Wait()
		eventually(t, "the processes to be gone", func() bool { return len(tr.processes()) == 0 })
		if len(tr.left(t)) >= 2 {
			break // else the Boot of another test has been here first
		}
	}
	if left := tr.left(t); len(left) < 2 {
		t.Fatalf("cgroup and directory should have been left, got %q: this test shows nothing", left)
	}
	next := Start(t)
	if left := tr.left(t); len(left) > 0 {
		t.Errorf("the next boot left %q", left)
	}
	other.Run(t, "systemctl", "daemon-reload")
	next.Run(t, "systemctl", "daemon-reload")
}

func TestCancelledBootLeavesNothing(t *testing.T) {
	needRig(t)
	for _, after := range []time.Duration{0, 20 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond} {
		dir := filepath.Join("/var/tmp", "unitmeter-test-"+t.Name()+"-"+after.String())
		ctx, cancel := context.WithTimeout(t.Context(), after)
		rig, err := Boot(ctx, Config{Dir: dir, NoTraffic: true})
		cancel()
		if err == nil { // a fast machine
			err = rig.Close()
			if err != nil {
				t.Error(err)
			}
		} else if !errors.Is(err, context.DeadlineExceeded) && !strings.Contains(err.Error(), "killed") {
			t.Errorf("after %v: got error %v, want the deadline", after, err)
		}
		if exists(dir) {
			t.Errorf("after %v: %s is left", after, dir)
		}
		environments, err := filepath.Glob("/proc/[0-9]*/environ")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range environments {
			environment, _ := os.ReadFile(e) // fails for a process that has just gone
			if strings.Contains(string(environment), "DIR="+dir+"\x00") {
				t.Errorf("after %v: %s is left", after, filepath.Dir(e))
			}
		}
	}
}

func TestSeveralAtOnce(t *testing.T) {
	var wg sync.WaitGroup
	rigs := make([]*Rig, 3)
	needRig(t)
	for i := range rigs {
		wg.Go(func() {
			rig, err := Boot(t.Context(), Config{Logf: t.Logf})
			if err != nil {
				t.Error(err)
				return
			}
			rigs[i] = rig
		})
	}
	wg.Wait()
	ids := map[string]bool{}
	for _, rig := range rigs {
		if rig == nil {
			continue
		}
		ids[rig.Run(t, "cat", "/etc/machine-id")] = true
		if err := rig.Close(); err != nil {
			t.Error(err)
		}
	}
	if len(ids) != len(rigs) {
		t.Errorf("got machine ids %v, want %d of them", ids, len(rigs))
	}
}

// runHelper runs the helper behind a command such as unshare and returns what
// it said.
func runHelper(t *testing.T, cmd *exec.Cmd, env ...string) string {
	t.Helper()
	argv, environ := helper(env...)
	cmd.Args = append(cmd.Args, argv...)
	cmd.Env = append(append(cmd.Environ(), environ...), "UNITMETER_TEST_NO_SKIP=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// The first rig is a host that runs systemd and has cgroup v2 at /sys/fs/cgroup.
func TestInsideSystemdHost(t *testing.T) {
	t.Parallel()
	r := Start(t)
	r.Run(t, "systemctl", "start", "dbus.service")
	// As a service, where a test on a real host would run.
	outer := r.Command(t.Context(), "systemd-run", "--wait", "--pipe", "--setenv=SYSTEMDTEST_HELPER=1", "--")
	out := runHelper(t, outer)
	if !strings.Contains(out, "\nsystemd\n") || !strings.Contains(out, closed) {
		t.Errorf("got %s", out)
	}
	if out := r.Run(t, "find", "/sys/fs/cgroup", "-name", "unitmeter*"); out != "" {
		t.Errorf("left behind: %s", out)
	}
}

func TestOddHosts(t *testing.T) {
	needRig(t)
	tests := []struct {
		name, host string // shell, run in a private mount namespace
		env        []string
		want       string
	}{
		{"no cgroup v2 mounted", "umount -R /sys/fs/cgroup", nil, closed},
		{"opt is a mount", "mount -t tmpfs tmpfs /opt && echo seen >/opt/x", []string{"SYSTEMDTEST_RUN=cat /opt/x"}, "\nseen\n"},
		{"bind of another file system", "mount -t tmpfs tmpfs /media && echo bound >/media/x",
			[]string{"SYSTEMDTEST_BINDS=/media", "SYSTEMDTEST_RUN=cat /media/x"}, "\nbound\n"},
		{"another root tree", "mount --bind / /srv && mount -t tmpfs tmpfs /srv/opt && echo other >/srv/opt/x",
			[]string{"SYSTEMDTEST_ROOT=/srv", "SYSTEMDTEST_RUN=cat /opt/x"}, "\nother\n"},
		{"not root", "", []string{"uid=65534"}, "unsupported=true boot rig: uid 65534 cannot"},
		{"root without capabilities", "", []string{"bounding=-all"}, "unsupported=true boot rig: "},
		{"no systemd", "mount -t tmpfs tmpfs /usr/lib/systemd", nil, "unsupported=true boot rig: there is no systemd in /"},
		{"no dbus-daemon", "mount -t tmpfs tmpfs /opt && mkdir /opt/u /opt/w && mount -t overlay overlay -o lowerdir=/usr/bin,upperdir=/opt/u,workdir=/opt/w /usr/bin && rm /usr/bin/dbus-daemon",
			nil, "unsupported=true boot rig: there is no dbus-daemon in /"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			script := tt.host + "\n" + `exec setpriv --reuid "${uid:-0}" --bounding-set "${bounding:-+all}" "$@"`
			cmd := exec.Command("unshare", "--mount", "sh", "-c", script, "host")
			for _, e := range tt.env {
				cmd.Env = append(cmd.Environ(), e)
			}
			if out := runHelper(t, cmd, tt.env...); !strings.Contains(out, tt.want) {
				t.Errorf("got %s, want %q", out, tt.want)
			}
		})
	}
}

// A machine that cannot run a rig skips, and says why, unless that is forbidden.
func TestStartSkips(t *testing.T) {
	t.Parallel()
	needRig(t) // root, to become somebody else
	for env, want := range map[string]string{"": "--- SKIP: TestCountsExactly", "1": "--- FAIL: TestCountsExactly"} {
		cmd := exec.Command("setpriv", "--reuid", "65534", mustExecutable(t), "-test.run=^TestCountsExactly$", "-test.v")
		cmd.Env = append(os.Environ(), "UNITMETER_TEST_NO_SKIP="+env)
		out, err := cmd.CombinedOutput()
		if !strings.Contains(string(out), want) || !strings.Contains(string(out), "uid 65534 cannot make namespaces and mounts; run as root") {
			t.Errorf("UNITMETER_TEST_NO_SKIP=%q: got %v\n%s", env, err, out)
		}
	}
}

func TestBootRefuses(t *testing.T) {
	needRig(t)
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name        string
		cfg         Config
		want        string
		unsupported bool
	}{
		{"empty root", Config{Root: t.TempDir()}, "there is no systemd in", true},
		{"no root", Config{Root: "/does/not/exist"}, "there is no systemd in", true},
		{"root with a colon", Config{Root: "/var/a:b"}, `root "/var/a:b" has a character`, false},
		{"directory in use", Config{Dir: full, NoTraffic: true}, "is not empty", false},
		{"bind of nothing", Config{Binds: []string{"/does/not/exist"}}, `bind "/does/not/exist"`, false},
		{"bind of a file", Config{Binds: []string{filepath.Join(full, "x")}}, "not an absolute path of a directory", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rig, err := Boot(t.Context(), tt.cfg)
			if err == nil {
				rig.Close()
				t.Fatal("booted")
			}
			if !strings.Contains(err.Error(), tt.want) || errors.Is(err, errors.ErrUnsupported) != tt.unsupported {
				t.Errorf("got %v, want %q, unsupported %v", err, tt.want, tt.unsupported)
			}
		})
	}
	if !exists(filepath.Join(full, "x")) {
		t.Error("a refused directory was emptied")
	}
}

func TestParseShow(t *testing.T) {
	t.Parallel()
	const good = "IPIngressBytes=1\nIPIngressPackets=2\nIPEgressBytes=3\nIPEgressPackets=4\n"
	tests := []struct {
		name, in string
		want     Accounting
		wantErr  bool
	}{
		{"all", good + "InvocationID=ab\n", Accounting{1, 2, 3, 4, true, "ab"}, false},
		{"no data", "IPIngressBytes=[no data]\nInvocationID=ab\n", Accounting{InvocationID: "ab"}, false},
		{"one without data", strings.Replace(good, "=4", "=[no data]", 1), Accounting{}, false},
		{"old systemd", strings.Replace(good, "=4", "=18446744073709551615", 1), Accounting{}, false},
		{"no such property", "InvocationID=\n", Accounting{}, false},
		{"garbage", "IPIngressBytes=many\n", Accounting{}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseShow(tt.in)
			if got != tt.want || (err != nil) != tt.wantErr {
				t.Errorf("got %+v, %v, want %+v, error %v", got, err, tt.want, tt.wantErr)
			}
		})
	}
}
