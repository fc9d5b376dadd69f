//go:build linux && !386 && !arm && !mips && !mipsle

package e2e

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// programs is the number of programs that see what the units of a rig send.
func (w *ward) programs() int {
	w.t.Helper()
	dir, err := os.Open(w.Path("/sys/fs/cgroup"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer dir.Close()
	found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: ebpf.AttachCGroupInetEgress})
	if err != nil {
		w.t.Fatal(err)
	}
	return len(found.Programs)
}

// TestNothingSwitchedOn: as root, once, top and units count every unit, though
// nothing is loaded and no unit has IP accounting. Nothing stays behind, by SIGKILL
// neither.
func TestNothingSwitchedOn(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.sh("systemd-run --quiet --service-type=notify --unit=sink -p IPAccounting=no " + w.Traffic() + " udp-sink 127.0.0.1:9000")
	send := "systemd-run --quiet --wait --unit=brief -p IPAccounting=no " + w.Traffic() + " udp-send 127.0.0.1:9000 -bytes 100 -count 7"
	once := func(command string) (units map[string]onceUnit) {
		t.Helper()
		var list []onceUnit
		if err := json.Unmarshal([]byte(w.sh(command)), &list); err != nil {
			t.Fatal(err)
		}
		units = map[string]onceUnit{}
		for _, u := range list {
			units[u.Unit] = u
		}
		return units
	}
	// A unit of a user's manager, and a container, are by themselves.
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	const browser = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/browser.service"
	w.sh("mkdir -p " + browser)
	w.sh("systemd-run --quiet --scope --unit=docker-" + id + " sh -c 'sleep infinity >/dev/null 2>&1 &'")
	units := once("unitmeter once --json --interval 100ms")
	for _, name := range []string{"sink.service", "init.scope", "dbus.service", "kernel", "1000/browser.service", "docker-" + id + ".scope"} {
		if u := units[name]; u.Source != "ebpf" || u.State != "on" || u.EgressBytes == nil || u.EgressPerSecond == nil {
			t.Errorf("%s is %+v", name, u)
		}
	}
	if out := w.sh("unitmeter units sink dbus.socket 'kernel*'"); !strings.Contains(out, "off      possible  sink.service") || !strings.Contains(out, "off      -         dbus.socket") ||
		!strings.Contains(out, "none     possible  kernel") || !strings.Contains(out, "unitmeter enable --ebpf") {
		t.Errorf("units:\n%s", out)
	}
	if u := once("unitmeter once --json --interval 100ms browser 'docker-*'"); len(u) != 2 {
		t.Errorf("by the names of the units: %+v", u)
	}
	if n := w.programs(); n != 0 {
		t.Errorf("%d programs stay behind", n)
	}

	top := w.watch("unitmeter top --bytes")
	top.wait("sink.service", "by eBPF since ", "init.scope", "1000/browser.service")
	w.sh(send)
	top.wait("brief.service", "896 B") // 7 datagrams of 128 bytes, by a unit that is gone
	w.sh("echo $$ >" + browser + "/cgroup.procs; " + w.Traffic() + " udp-send 127.0.0.1:9000 -bytes 201 -count 5")
	top.wait("1,145") // 5 datagrams of 229 bytes; the screen writes what changes
	if n := w.programs(); n != 1 {
		t.Errorf("%d programs count while top runs", n)
	}
	w.sh("pkill -KILL -x unitmeter")
	eventually(t, "the programs end with top", func() bool { return w.programs() == 0 })

	// Those without a privilege see what they saw before, and how to see more.
	out := w.sh(asNobody + "unitmeter once; " + asNobody + "unitmeter top --once --interval 200ms; " + asNobody + "unitmeter units")
	if strings.Count(out, "Counted by systemd. As root, every unit is shown") != 2 || !strings.Contains(out, "As root, it also shows what eBPF can count") {
		t.Errorf("as nobody:\n%s", out)
	}
	cmd := w.Command(t.Context(), "sh", "-c", asNobody+"unitmeter once --source ebpf")
	if text, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(text), "run as root with CAP_BPF and CAP_NET_ADMIN") {
		t.Errorf("as nobody, with eBPF: %v\n%s", err, text)
	}

	// Where systemd counts most units, or those that are asked for, it counts.
	w.sh("unitmeter enable sink --runtime >&2")
	for names, source := range map[string]string{"sink": "dbus", "sink dbus.service": "ebpf", "'s[hi]nk*'": "dbus", "sink browser": "ebpf"} {
		if u := once("unitmeter once --json " + names)["sink.service"]; u.Source != source {
			t.Errorf("asked for %s, sink.service is %+v, want source %s", names, u, source)
		}
	}
	w.sh("unitmeter enable --all >&2")
	if u := once("unitmeter once --json sink")["sink.service"]; u.Source != "dbus" || u.State != "on" {
		t.Errorf("with accounting on, sink.service is %+v", u)
	}

	// A loaded program is used, and no other attached. Nobody has mounted a BPF file
	// system: the loader does.
	w.sh("unitmeter meter load; " + send)
	u := once("unitmeter once --json sink")["sink.service"]
	if u.Source != "ebpf" || u.IngressBytes == nil || *u.IngressBytes != 7*128 || u.EgressPerSecond != nil {
		t.Errorf("with a loaded program, sink.service is %+v", u)
	}
	out = w.sh("unitmeter once; unitmeter top --once --interval 200ms; unitmeter units")
	if strings.Count(out, "Counted by eBPF since 20") != 2 || strings.Contains(out, "brief.service") || !strings.Contains(out, "metered  metered  sink.service") {
		t.Errorf("with a loaded program:\n%s", out)
	}
	if n := w.programs(); n != 1 {
		t.Errorf("%d programs count", n)
	}
	w.sh("unitmeter meter unload; ! test -e /sys/fs/bpf/unitmeter")
	eventually(t, "nothing is attached after unload", func() bool { return w.programs() == 0 })
}

// TestDoctorMeter plants faults of the eBPF source. The doctor must name the fix, and
// that must help.
func TestDoctorMeter(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	doctor := func(source string) map[string]finding { return w.doctor("UNITMETER_SOURCE=" + source) }
	check := func(when string, findings map[string]finding, name, status, text string) {
		t.Helper()
		if f := findings[name]; f.Status != status || !strings.Contains(f.Found+"\n"+f.Fix, text) {
			t.Errorf("%s: the check %s is %+v, want %s with %q", when, name, f, status, text)
		}
	}
	check("by systemd", doctor("dbus"), "ebpf-pins", "", "")
	now := doctor("ebpf")
	check("nothing is loaded", now, "ebpf-host", "ok", "lets an eBPF program count and name")
	check("nothing is loaded", now, "own-traffic", "skip", "cannot be read")

	// A program that wants the cgroup for itself.
	detach := w.foreignProgram()
	check("foreign program", doctor("ebpf"), "ebpf-host", "fail", "BPF_F_ALLOW_MULTI")
	now = doctor("auto")
	check("foreign program", now, "ebpf-host", "warn", "BPF_F_ALLOW_MULTI")
	check("foreign program", now, "ebpf-host", "warn", "(somebody_else)")
	if out := w.sh("unitmeter once 2>&1"); !strings.Contains(out, "Counted by systemd. Every unit would be shown, but eBPF cannot count here") {
		t.Errorf("once beside a foreign program:\n%s", out)
	}
	detach()

	// Who may not mount says who must.
	if out := w.sh("setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin unitmeter meter load 2>&1 || :"); !strings.Contains(out, "run: mount -t bpf -o mode=700 bpf /sys/fs/bpf") {
		t.Errorf("load without a BPF file system and the right to mount one:\n%s", out)
	}
	w.sh("unitmeter meter load")
	check("nobody reads", doctor("dbus"), "ebpf-pins", "warn", "unitmeter meter unload")
	now = doctor("ebpf")
	check("loaded", now, "ebpf-pins", "ok", "of this version")
	check("loaded", now, "ebpf", "ok", "counts since")
	check("loaded", now, "own-traffic", "ok", "a datagram to this host")
	check("nothing to compare", now, "ebpf-systemd", "skip", "no unit with IP accounting")

	// Both count.
	w.sh("systemd-run --quiet --service-type=notify --unit=sink -p IPAccounting=yes " + w.Traffic() + " udp-sink 127.0.0.1:9000")
	send := w.Traffic() + " udp-send 127.0.0.1:9000 -bytes 100 -count 9; "
	w.sh("systemd-run --quiet --unit=both -p IPAccounting=yes -p RemainAfterExit=yes sh -c '" + send + "sleep infinity'")
	w.sh("systemd-run --quiet --unit=filtered -p IPAccounting=yes -p IPAddressDeny=192.0.2.0/24 sh -c '" + send + "sleep infinity'")
	eventually(t, "both units have sent", func() bool {
		return strings.Count(w.sh("systemctl show -p IPEgressPackets --value both filtered"), "9\n") == 2
	})
	now = doctor("ebpf")
	check("both count", now, "ebpf-systemd", "ok", "the same bytes and packets for the 3 units")
	check("a filter", now, "ebpf-filters", "ok", "filtered.service")

	w.sh("mkdir /sys/fs/bpf/unitmeter/v0; rm /sys/fs/bpf/unitmeter/v1/egress")
	now = doctor("ebpf")
	check("an old version", now, "ebpf-pins", "warn", "/sys/fs/bpf/unitmeter/v0")
	check("detached", now, "own-traffic", "fail", "not attached")
	w.sh("unitmeter meter unload; unitmeter meter load") // as the fixes say, where there is no service
	now = doctor("ebpf")
	check("loaded again", now, "ebpf-pins", "ok", "")
	check("loaded again", now, "own-traffic", "ok", "")
	w.sh("unitmeter meter unload")
}

// foreignProgram attaches a program to the root of the rig that allows no other, and
// returns what detaches it.
func (w *ward) foreignProgram() (detach func()) {
	w.t.Helper()
	dir, err := os.Open(w.Path("/sys/fs/cgroup"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { dir.Close() })
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "somebody_else", Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { program.Close() })
	target := int(dir.Fd())
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: target, Program: program, Attach: ebpf.AttachCGroupInetEgress}); err != nil {
		w.t.Fatal(err)
	}
	return func() {
		if err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: target, Program: program, Attach: ebpf.AttachCGroupInetEgress}); err != nil {
			w.t.Error(err)
		}
	}
}

// onceUnit is one unit of once --json.
type onceUnit struct {
	Unit, State, Source string
	IngressBytes        *uint64  `json:"ingress_bytes"`
	EgressBytes         *uint64  `json:"egress_bytes"`
	EgressPerSecond     *float64 `json:"egress_bytes_per_second"`
}

// screen is what a command writes to its terminal.
type screen struct {
	t    *testing.T
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

// wait waits until all texts have been on the screen.
func (s *screen) wait(texts ...string) {
	s.t.Helper()
	for _, text := range texts {
		eventually(s.t, "the screen shows "+text, func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return strings.Contains(s.text.String(), text)
		})
	}
}

// watch starts a command on a terminal. It ends with the test.
func (w *ward) watch(command string) *screen {
	w.t.Helper()
	s := &screen{t: w.t}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := w.Command(ctx, "script", "-qefc", "stty cols 120 rows 40; "+command, "/dev/null")
	cmd.Env = append(cmd.Env, "TERM=xterm-256color")
	cmd.Stdout = s
	keys, err := cmd.StdinPipe() // open, or script would end
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		cancel()
		keys.Close()
		_ = cmd.Wait() // it was killed
	})
	return s
}
