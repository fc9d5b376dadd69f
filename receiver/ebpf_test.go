//go:build linux && !386 && !arm && !mips && !mipsle

package receiver

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/ledger"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// withMeter runs a test once with a program that a Receiver attaches, and once with
// a pinned one. The cgroups of the rig are metered.
func withMeter(t *testing.T, test func(t *testing.T, rig *systemdtest.Rig, cfg Config)) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	t.Run("attached", func(t *testing.T) {
		test(t, rig, Config{Source: EBPF, meterDirs: []string{t.TempDir()}, meterRoot: root})
	})
	t.Run("pinned", func(t *testing.T) {
		test(t, rig, Config{Source: EBPF, meterDirs: []string{pins(t, root)}, meterRoot: root})
	})
}

// pins loads a meter for a test and returns the directory of its pins.
func pins(t *testing.T, root string) string {
	t.Helper()
	bpffs := t.TempDir()
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=0755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(bpffs, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(bpffs, "unitmeter")
	if loaded, err := ebpf.Load(t.Context(), ebpf.LoadConfig{Dir: dir, Root: root}); err != nil || loaded.Naming != nil {
		t.Fatal(err, loaded.Naming)
	}
	return dir
}

// run starts a receiver and returns what ends it.
func run(t *testing.T, cfg Config) (r *Receiver, stop func()) {
	t.Helper()
	l := &logs{}
	cfg.Logger, cfg.HostName = newLogger(l), "host"
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = func() {
		if cancel(); !errors.Is(<-done, context.Canceled) {
			t.Error("Run did not end with its context")
		}
		done <- context.Canceled // for the next call
		if t.Failed() {
			t.Logf("the receiver logged:\n%s", l)
		}
	}
	t.Cleanup(stop)
	ready, end := context.WithTimeout(t.Context(), systemdtest.Patience)
	defer end()
	if err := r.Ready(ready); err != nil {
		t.Fatal(err)
	}
	return r, stop
}

// total returns the total of a series, zero for one that does not exist.
func (s *Sweep) total(name string) Counters {
	got, _ := s.seriesOf(name)
	return got.Total
}

// TestMeter: every unit is counted without IP accounting, whatever happens to it.
func TestMeter(t *testing.T) {
	withMeter(t, func(t *testing.T, rig *systemdtest.Rig, cfg Config) {
		const unit = "metered.service"
		talker(t, rig, unit, "IPAccounting=no")
		r, stop := run(t, cfg)
		sum := r.Sweep(t.Context()).total(unit) // of the case before: the rig is shared, the pins are not
		if sum != (Counters{}) {
			t.Fatalf("%s begins with %+v", unit, sum)
		}
		total := 0
		more := func(n int) Series {
			t.Helper()
			talk(t, rig, unit, n)
			total += n
			return want(t, r.Sweep(t.Context()), unit, sent(total))
		}
		first := more(7)
		for range 3 {
			rig.Run(t, "systemctl", "restart", unit)
			more(5)
			rig.Run(t, "systemctl", "daemon-reload")
			more(1)
		}
		rig.Run(t, "systemctl", "daemon-reexec")
		if last := more(2); !last.Start.Equal(first.Start) {
			t.Errorf("the series starts at %v, at first at %v", last.Start, first.Start)
		}

		// Once more, from the state of the first.
		cfg.State = r.Sweep(t.Context()).State
		stop()
		pinned := len(cfg.meterDirs) > 0 && strings.HasSuffix(cfg.meterDirs[0], "/unitmeter")
		if pinned { // counted while nobody reads
			talk(t, rig, unit, 4)
			total += 4
		}
		r, _ = run(t, cfg)
		if pinned {
			want(t, r.Sweep(t.Context()), unit, sent(total))
		}
		more(3)
		if h := r.Last(); h.Partial || h.Units == 0 || h.Units != h.Accounted {
			t.Errorf("the sweep is %+v", h)
		}
	})
}

// TestMeterShortUnits: units that end long before the next sweep.
func TestMeterShortUnits(t *testing.T) {
	withMeter(t, func(t *testing.T, rig *systemdtest.Rig, cfg Config) {
		sink(t, rig)
		rig.WriteFile(t, "/etc/systemd/system/brief@.service", "[Service]\nType=oneshot\nExecStart=/bin/bash -c 'echo x >/dev/udp/127.0.0.1/9000'\n")
		rig.WriteFile(t, "/etc/systemd/system/brief-left@.service", "[Service]\nType=oneshot\nExecStart=/bin/bash -c 'echo x >/dev/udp/127.0.0.1/9000'\n")
		cfg.Exclude, cfg.Fold = []string{"brief-left@*"}, []string{"brief@1*.service"}
		r, _ := run(t, cfg)
		names := []string{"brief-left@1.service"}
		for i := range 100 {
			names = append(names, fmt.Sprintf("brief@%d.service", i))
		}
		rig.Run(t, "systemctl", append([]string{"start"}, names...)...)
		s := r.Sweep(t.Context())
		one := counted(0, 0, 2+28, 1)
		folded := counted(0, 0, 11*(2+28), 11)
		want(t, s, "brief@1*.service", folded)
		for _, name := range names[1:] {
			if !strings.HasPrefix(name, "brief@1") {
				want(t, s, name, one)
			}
		}
		if got, ok := s.seriesOf("brief-left@1.service"); ok {
			t.Errorf("a unit that is left out has %+v", got.Total)
		}
		// Their points are repeated, and nothing is added.
		want(t, r.Sweep(t.Context()), "brief@1*.service", folded)
	})
}

// TestMeterWhole: traffic of no unit has a series too.
func TestMeterWhole(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	sink(t, rig)
	r, _ := run(t, Config{Source: EBPF, UnitType: true, meterDirs: []string{pins(t, root)}, meterRoot: root})
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, cgroup := range []string{"actions_job/job", "docker/" + id, "lonely.slice"} {
		rig.Run(t, "bash", "-c", `mkdir -p /sys/fs/cgroup/$0 && echo $$ >/sys/fs/cgroup/$0/cgroup.procs && echo x >/dev/udp/127.0.0.1/9000`, cgroup)
	}
	s := r.Sweep(t.Context())
	for _, name := range []string{"actions_job", "docker"} {
		got := want(t, s, name, counted(0, 0, 30, 1))
		if kind, _ := got.Transmit.Value("systemd.unit.type"); kind.AsString() != "cgroup" {
			t.Errorf("%s is of type %q", name, kind.AsString())
		}
	}
	if got, ok := s.seriesWith(ledger.ID{Kind: ledger.Unattributed, Name: "lonely.slice"}); !ok || got.Total != counted(0, 0, 30, 1) {
		t.Errorf("%+v is unattributed in lonely.slice, want one packet of 30 B", got.Total)
	}
	rig.Run(t, "bash", "-c", "rmdir /sys/fs/cgroup/{actions_job/job,actions_job,docker/"+id+",docker,lonely.slice}")
}

// TestMeterLost: what finds no room is unattributed, over a restart too.
func TestMeterLost(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	sink(t, rig)
	bpffs := filepath.Dir(pins(t, root)) // one that is loaded with the usual room
	dir := filepath.Join(bpffs, "small")
	if _, err := ebpf.Load(t.Context(), ebpf.LoadConfig{Dir: dir, Root: root, MaxEntries: 1}); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Source: EBPF, meterDirs: []string{dir}, meterRoot: root}
	lost := func(s *Sweep) ledger.Counters {
		got, _ := s.seriesWith(ledger.ID{Kind: ledger.Unattributed, Name: rootSlice})
		return got.Series.Total
	}
	r, stop := run(t, cfg)
	send := func(n int) {
		for i := range n {
			rig.Run(t, "bash", "-c", `mkdir /sys/fs/cgroup/room-$0 && echo $$ >/sys/fs/cgroup/room-$0/cgroup.procs && echo x >/dev/udp/127.0.0.1/9000
				echo $$ >/sys/fs/cgroup/cgroup.procs; rmdir /sys/fs/cgroup/room-$0`, fmt.Sprint(i))
		}
	}
	send(9)
	first := lost(r.Sweep(t.Context()))
	if first.Sent.Packets < 8 { // one may have had the room
		t.Fatalf("%+v is unattributed, want 8 packets sent", first)
	}
	cfg.State = r.Last().State
	stop()
	send(3)
	r, _ = run(t, cfg)
	second := lost(r.Sweep(t.Context()))
	if second.Sent.Packets != first.Sent.Packets+3 || second.Sent.Bytes != first.Sent.Bytes+90 {
		t.Errorf("%+v is unattributed after three more packets of 30 B, before it was %+v", second, first)
	}
}

// TestSwitchSource: totals go on when another source counts, and nothing is added
// that the first has counted.
func TestSwitchSource(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	dir := pins(t, root) // it counts all the time, and so does systemd
	const unit, plain = "switching.service", "plain.service"
	talker(t, rig, unit, "StartLimitInterval=0")
	talker(t, rig, plain, "IPAccounting=no")
	sources := map[string]Config{
		DBus: {Bus: rig.SystemBus(), StopRecords: "off"},
		EBPF: {Source: EBPF, meterDirs: []string{dir}, meterRoot: root},
	}
	var state ledger.State
	total := 0
	for i, source := range []string{DBus, EBPF, EBPF, DBus, DBus, EBPF} {
		cfg := sources[source]
		cfg.State = state
		r, stop := run(t, cfg)
		want(t, r.Sweep(t.Context()), unit, sent(total))
		talk(t, rig, unit, 5+i)
		talk(t, rig, plain, 1)
		total += 5 + i
		want(t, r.Sweep(t.Context()), unit, sent(total))
		rig.Run(t, "systemctl", "restart", unit)
		talk(t, rig, unit, 2)
		total += 2
		var s *Sweep
		systemdtest.Eventually(t, "the run after the restart is read", func() bool { // systemd may announce it after the restart
			s = r.Sweep(t.Context())
			got, _ := s.seriesOf(unit)
			return got.Total.EgressPackets >= uint64(total)
		})
		want(t, s, unit, sent(total))
		switch i { // what only one source counts is complete while that counts
		case 1:
			want(t, s, plain, sent(2))
		case 2:
			want(t, s, plain, sent(3))
		case 5: // and has no step after
			want(t, s, plain, sent(4))
		}
		state = s.State
		stop()
	}
}

func TestAuto(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	r, l := start(t, Config{Source: Auto, Bus: rig.SystemBus(), meterDirs: []string{t.TempDir()}, meterRoot: root})
	if r.systemd == nil {
		t.Error("without pins, the source is not systemd")
	}
	l.only(t, 1, "over D-Bus", "meter load")
	if r, _ := start(t, Config{Source: Auto, meterDirs: []string{t.TempDir(), pins(t, root)}, meterRoot: root}); r.systemd != nil {
		t.Error("with pins, the source is systemd")
	}
}

// TestUnloaded: a sweep without the meter says so, and the next meter is found.
func TestUnloaded(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	dir := pins(t, root)
	talker(t, rig, "unloaded.service", "IPAccounting=no")
	r, l := start(t, Config{Source: EBPF, meterDirs: []string{dir}, meterRoot: root})
	talk(t, rig, "unloaded.service", 3)
	want(t, r.Sweep(t.Context()), "unloaded.service", sent(3))
	talk(t, rig, "unloaded.service", 1)
	if err := ebpf.Unload(dir); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if s := r.Sweep(t.Context()); !s.Partial {
			t.Error("a sweep without the meter is complete")
		}
	}
	l.only(t, 1, "WARN", "unloaded")
	l.only(t, 1, "WARN")
	if _, err := ebpf.Load(t.Context(), ebpf.LoadConfig{Dir: dir, Root: root}); err != nil {
		t.Fatal(err)
	}
	talk(t, rig, "unloaded.service", 2)
	want(t, r.Sweep(t.Context()), "unloaded.service", sent(6)) // the fourth was in the old maps
	l.only(t, 1, "read again")
}

func TestMeterName(t *testing.T) {
	for path, want := range map[string]string{
		"/system.slice/nginx.service":                                 "nginx.service",
		"/system.slice/nginx.service/a/b":                             "nginx.service",
		"/user.slice/user-1.slice/user@1.service/app.slice/x.service": "user@1.service",
		"/lxc.payload.web/system.slice/ssh.service":                   "lxc.payload.web",
		"/foo.slice/foo-bar.slice/notaunit/x":                         "notaunit",
		"/foo.slice":                                                  "",
	} {
		if got := cgroupName(&ebpf.Identity{Path: path, Cgroup: ebpf.ParseCgroup(path)}); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
}

func TestMeterRefuses(t *testing.T) {
	for want, cfg := range map[string]Config{
		"use dbus, ebpf or auto": {Source: "bpf"},
		"not a cgroup v2 directory; boot with systemd.unified_cgroup_hierarchy=1; or set UNITMETER_SOURCE=dbus": {
			Source: EBPF, meterDirs: []string{t.TempDir()}, meterRoot: t.TempDir()},
	} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
