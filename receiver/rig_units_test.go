package receiver

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestRigPatterns compares what patterns match with what systemctl takes them for.
func TestRigPatterns(t *testing.T) {
	rig := theRig(t)
	names := []string{`pat\x2da.service`, `pat-b.service`, "patc.service", "pat7@x.service", "pat-.slice", "pat!.service"}
	names = slices.DeleteFunc(names, func(name string) bool { return !systemd.ValidUnitName(name) || strings.HasSuffix(name, ".slice") })
	for _, name := range names {
		rig.Run(t, "systemd-run", "--unit="+name, "sleep", "1000")
		t.Cleanup(func() { rig.Run(t, "systemctl", "stop", name) })
	}
	for _, pattern := range []string{
		"pat*", `pat\x2d*`, `pat\\x2d*`, `pat\*`, "pat[!-]*", "pat[^-]*", "pat[-c]*", "pat[c-]*", "pat[]c]*", "pat[!]c]*", `pat[\]*`, "pat[[:digit:]]*", "pat[0-9]@?.service", "pat?a*", "PAT*",
	} {
		patterns, err := systemd.ParsePatterns([]string{pattern})
		if err != nil {
			t.Errorf("%s: %v", pattern, err)
			continue
		}
		listed := strings.Fields(rig.Run(t, "systemctl", "list-units", "--plain", "--no-legend", "--", pattern))
		for _, name := range names {
			if got, want := patterns.Index(name) >= 0, slices.Contains(listed, name); got != want {
				t.Errorf("%s matches %s: %v, to systemctl: %v", pattern, name, got, want)
			}
		}
	}
}

// TestRigAliases: a second name in the settings means the unit that has it, whether
// that runs already or not.
func TestRigAliases(t *testing.T) {
	rig := theRig(t)
	// Without a reload, in which systemd 257 would lose the counters.
	rig.Run(t, "ln", "-s", "own-name.service", "/etc/systemd/system/second-name.service")
	talker(t, rig, "own-name.service")
	t.Cleanup(func() { rig.Run(t, "rm", "-f", "/etc/systemd/system/second-name.service") })
	talk(t, rig, "own-name.service", 3)
	for _, stopped := range []bool{false, true} {
		if stopped {
			rig.Run(t, "systemctl", "stop", "own-name.service")
		}
		only, _ := start(t, Config{Bus: rig.SystemBus(), Include: []string{"second-name.service"}})
		without, _ := start(t, Config{Bus: rig.SystemBus(), Exclude: []string{"second-name.service"}})
		if stopped {
			rig.Run(t, "systemctl", "start", "own-name.service")
			talk(t, rig, "own-name.service", 3)
			sweepUntil(t, only, "it is read", func(s *Sweep) bool { _, ok := s.seriesOf("own-name.service"); return ok })
		}
		s := only.Sweep(t.Context())
		want(t, s, "own-name.service", sent(3))
		if n := len(only.Units()); n != 1 {
			t.Errorf("%d units are metered, want the one", n)
		}
		if _, ok := without.Sweep(t.Context()).seriesOf("own-name.service"); ok {
			t.Error("the unit that is excluded by its second name is metered")
		}
	}
}

// TestRigLeftBehind: what outlives its unit (KillMode=process) is counted, by an agent
// that was there and by one that comes later.
func TestRigLeftBehind(t *testing.T) {
	rig := theRig(t)
	const unit = "leaver.service"
	sink(t, rig)
	rig.WriteFile(t, "/usr/local/bin/leaver", `#!/bin/sh
[ -p /run/leaver.in ] || mkfifo /run/leaver.in /run/leaver.out
setsid sh -c 'while read -r n </run/leaver.in; do `+rig.Traffic()+` udp-send `+sinkAddress+` -bytes `+strconv.Itoa(payloadBytes)+` -count "$n" && echo done >/run/leaver.out; done' &
exec sleep 1000
`)
	// A target that is up keeps the unit loaded.
	rig.WriteFile(t, "/etc/systemd/system/"+unit, "[Service]\nIPAccounting=yes\nKillMode=process\nExecStart=/usr/local/bin/leaver\n[Install]\nWantedBy=basic.target\n")
	rig.Run(t, "systemctl", "enable", unit)
	rig.Run(t, "systemctl", "daemon-reload")
	rig.Run(t, "systemctl", "start", unit)
	leaver := func(n int) {
		t.Helper()
		rig.Run(t, "timeout", "120", "sh", "-c", `echo "$1" >/run/leaver.in && read -r x </run/leaver.out`, "sh", strconv.Itoa(n))
	}
	t.Cleanup(func() {
		rig.Run(t, "sh", "-c", "systemctl kill --signal=KILL "+unit+"; systemctl disable "+unit+"; rm -f /etc/systemd/system/"+unit+" /run/leaver.*")
	})
	rig.Run(t, "sh", "-c", "until [ -p /run/leaver.out ]; do sleep .01; done")
	leaver(3)
	watched, _ := start(t, Config{Bus: rig.SystemBus(), Include: []string{unit}})
	want(t, watched.Sweep(t.Context()), unit, sent(3))
	rig.Run(t, "systemctl", "stop", unit)
	leaver(4)
	want(t, watched.Sweep(t.Context()), unit, sent(7))
	late, _ := start(t, Config{Bus: rig.SystemBus(), Include: []string{unit}, State: watched.Last().State})
	leaver(5)
	want(t, late.Sweep(t.Context()), unit, sent(12))
	want(t, watched.Sweep(t.Context()), unit, sent(12))
}

// missedLater is how many runs count as missed once all that have ended are forgotten.
func missedLater(r *Receiver) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ledger.Finish(time.Now(), true, false) // all that has no Mark is over
	r.ledger.Finish(time.Now().Add(time.Hour), true, false)
	return r.ledger.Missed()
}

// TestRigSilentRecords: runs that end between two sweeps are missed where PID 1 writes
// no records, and counted as such. Those that had no traffic have none either, and are
// not missed.
func TestRigSilentRecords(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	run := func(r *Receiver, name, command string) { // of which systemd keeps nothing
		rig.WriteFile(t, "/etc/systemd/system/"+name+".service",
			"[Service]\nType=oneshot\nIPAccounting=yes\nExecStart=sh -c 'until [ -e /run/%p.go ]; do sleep .02; done'\nExecStart="+command+"\n")
		rig.Run(t, "systemctl", "start", "--no-block", name)
		systemdtest.Eventually(t, "it is known that "+name+" is accounted", func() bool {
			return slices.ContainsFunc(r.Units(), func(u systemd.Unit) bool { return u.Name == name+".service" && u.Slice != "" })
		})
		rig.WriteFile(t, "/run/"+name+".go", "")
		systemdtest.Eventually(t, name+" is gone", func() bool { return len(r.Units()) == 0 })
	}
	include := []string{"*-silent.service"}
	r, stop := journaled(t, rig, Config{Include: include})
	r.Sweep(t.Context())
	run(r, "idle-silent", "true")
	s := readTo(t, rig, r, "sends-silent")
	want(t, s, "sends-silent.service", sent(5))
	if n := missedLater(r); n != 0 {
		t.Errorf("%d runs are missed, and all were read", n)
	}
	stop()

	r, _ = journaled(t, rig, Config{Include: include})
	r.Sweep(t.Context())
	rig.Run(t, "systemd-analyze", "log-level", "notice")
	t.Cleanup(func() { rig.Run(t, "systemd-analyze", "log-level", "info") })
	for i := range 3 {
		run(r, "quiet"+strconv.Itoa(i)+"-silent", rig.Traffic()+" udp-send "+sinkAddress+" -count 5")
	}
	if n := missedLater(r); n != 3 {
		t.Errorf("%d runs are missed, want 3", n)
	}
}

// TestRigJournalctlSilent: a journalctl that is alive and prints nothing while units
// end is replaced.
func TestRigJournalctlSilent(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	pidFile := filepath.Join(t.TempDir(), "pid")
	r, _ := journaled(t, rig, Config{Include: []string{"*-stuck.service"}, journalProbe: 100 * time.Millisecond}, "sh", "-c",
		`case "$*" in *--follow*) echo $$ >"$0";; esac; exec "$@"`, pidFile)
	want(t, readTo(t, rig, r, "first-stuck"), "first-stuck.service", sent(5))
	text, err := os.ReadFile(pidFile)
	pid, err2 := strconv.Atoi(strings.TrimSpace(string(text)))
	if err = errors.Join(err, err2, syscall.Kill(-pid, syscall.SIGSTOP)); err != nil {
		t.Fatal(err)
	}
	sends(t, rig, "second-stuck")
	stuck := r.position()
	systemdtest.Eventually(t, "another journalctl prints", func() bool {
		sends(t, rig, "more-stuck")
		return r.position() != stuck
	})
	wantFive(t, readTo(t, rig, r, "third-stuck"), "first-stuck", "second-stuck", "third-stuck")
}

// TestRigSlowReload: the time of a reload is stated, generators included.
func TestRigSlowReload(t *testing.T) {
	rig := theRig(t)
	r, _ := start(t, Config{Bus: rig.SystemBus(), Include: []string{"init.scope"}})
	const slow = "/etc/systemd/system-generators/slow"
	rig.WriteFile(t, slow, "#!/bin/sh\nsleep 0.7\n")
	rig.Run(t, "systemctl", "daemon-reload")
	rig.Run(t, "rm", slow)
	systemdtest.Eventually(t, "the reload is over", func() bool { return r.systemd.Health().Reloads == 1 })
	if took := r.systemd.Health().Reloading; took < 700*time.Millisecond {
		t.Errorf("the reload took %v, and a generator alone 0.7 s", took)
	}
}

// TestRigSwitchedOnBefore: a series does not start before accounting was switched on,
// also if the agent came after that.
func TestRigSwitchedOnBefore(t *testing.T) {
	rig := theRig(t)
	const conf = "/etc/systemd/system.conf.d/accounting.conf"
	for _, test := range []struct {
		name   string
		turnOn func(unit string)
	}{
		{"set-property", func(unit string) { rig.Run(t, "systemctl", "set-property", "--runtime", unit, "IPAccounting=yes") }},
		{"drop-in", func(unit string) {
			rig.WriteFile(t, "/etc/systemd/system/"+unit+".d/a.conf", "[Service]\nIPAccounting=yes\n")
			rig.Run(t, "systemctl", "daemon-reload")
		}},
		{"default", func(unit string) {
			rig.WriteFile(t, conf, "[Manager]\nDefaultIPAccounting=yes\n")
			rig.Run(t, "systemctl", "daemon-reload")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			unit := "since-" + test.name + ".service"
			rig.WriteFile(t, "/etc/systemd/system/"+unit, "[Service]\nExecStart=sleep 1000\n")
			rig.Run(t, "systemctl", "start", unit)
			t.Cleanup(func() {
				rig.Run(t, "sh", "-c", "systemctl stop "+unit+"; rm -rf "+conf+" /etc/systemd/system/"+unit+"*; systemctl daemon-reload")
			})
			began := timestamp(t, rig, unit, "InactiveExitTimestamp")
			time.Sleep(100 * time.Millisecond)
			before := time.Now()
			test.turnOn(unit)
			rig.Run(t, "systemctl", "set-property", "--runtime", unit, "CPUWeight=101") // systemd 257 would not count
			report := inside(t, rig, "starts", "env", "UNIT="+unit)
			if start := report.Start; start.Before(before.Add(-20*time.Millisecond)) || start.After(time.Now()) {
				t.Errorf("it starts at %v; the unit began at %v, and accounting not before %v", start, began, before)
			}
		})
	}
}
