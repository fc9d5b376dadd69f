package receiver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"

	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// A datagram of payloadBytes counts as datagramBytes: IPv4 and UDP headers are
// 28 bytes.
const (
	payloadBytes  = 100
	datagramBytes = payloadBytes + 28
	sinkAddress   = "127.0.0.1:9000"
	// thousandBytes is what each of the thousand units sends: one byte.
	thousandBytes = 1 + 28
)

// sink starts the receiver of all datagrams, once for all tests. It is not
// accounted.
func sink(t testing.TB, rig *systemdtest.Rig) {
	t.Helper()
	if strings.TrimSpace(rig.Run(t, "sh", "-c", "systemctl is-active sink.service || true")) == "active" {
		return
	}
	rig.WriteFile(t, "/etc/systemd/system/sink.service", `[Service]
Type=notify
ExecStart=`+rig.Traffic()+` udp-sink `+sinkAddress+`
`)
	rig.Run(t, "systemctl", "start", "sink.service")
}

// talker starts a service that sends datagrams when it is told to. It is
// stopped at the end of the test. settings are more lines of its [Service].
// systemd finds a new unit file without a reload, which takes seconds with a
// thousand units and loses their counters on systemd 257.
func talker(t testing.TB, rig *systemdtest.Rig, name string, settings ...string) {
	t.Helper()
	sink(t, rig)
	rig.WriteFile(t, "/usr/local/bin/talker", `#!/bin/sh
while read -r n <"/run/$1.in"; do
	`+rig.Traffic()+` udp-send `+sinkAddress+` -bytes `+strconv.Itoa(payloadBytes)+` -count "$n" && echo done >"/run/$1.out"
done
`)
	rig.WriteFile(t, "/etc/systemd/system/"+name, `[Service]
IPAccounting=yes
ExecStart=/usr/local/bin/talker `+name+`
`+strings.Join(settings, "\n")+"\n")
	rig.Run(t, "sh", "-c", `for f in in out; do [ -p /run/$1.$f ] || mkfifo /run/$1.$f; done`, "sh", name)
	rig.Run(t, "systemctl", "start", name)
	t.Cleanup(func() {
		rig.Run(t, "systemctl", "stop", name)
		rig.Run(t, "rm", "-f", "/etc/systemd/system/"+name, "/run/"+name+".in", "/run/"+name+".out")
	})
}

// talk has a talker send n datagrams. They are counted when it returns.
func talk(t testing.TB, rig *systemdtest.Rig, name string, n int) {
	t.Helper()
	rig.Run(t, "timeout", "120", "sh", "-c", `echo "$2" >"/run/$1.in" && read -r x <"/run/$1.out"`, "sh", name, strconv.Itoa(n))
}

// sent is what n datagrams add to the sender's counters.
func sent(n int) Counters {
	return Counters{EgressBytes: uint64(n) * datagramBytes, EgressPackets: uint64(n)}
}

// shown is what systemctl show says of a unit.
func shown(t testing.TB, rig *systemdtest.Rig, name string) Counters {
	t.Helper()
	a := rig.Show(t, name)
	if !a.OK {
		t.Fatalf("systemctl show has no data of %s", name)
	}
	return counted(a.IngressBytes, a.IngressPackets, a.EgressBytes, a.EgressPackets)
}

// want wants a series to be observed with the given total.
func want(t testing.TB, s *Sweep, name string, total Counters) Series {
	t.Helper()
	got, ok := s.seriesOf(name)
	if !ok {
		t.Fatalf("%s has no point (partial: %v)", name, s.Partial)
	}
	if got.Total != total {
		t.Fatalf("%s has the total %+v, want %+v", name, got.Total, total)
	}
	return got
}

// timestamp returns a timestamp property of a unit.
func timestamp(t testing.TB, rig *systemdtest.Rig, unit, property string) time.Time {
	t.Helper()
	out := strings.Fields(rig.Run(t, "busctl", "get-property", systemdName, unitPath(unit), unitInterface, property))
	usec, err := strconv.ParseInt(out[len(out)-1], 10, 64)
	if err != nil || usec == 0 {
		t.Fatalf("%s of %s is %q", property, unit, out)
	}
	return time.UnixMicro(usec)
}

func systemdVersion(t testing.TB, rig *systemdtest.Rig) int {
	t.Helper()
	fields := strings.Fields(rig.Run(t, "systemctl", "--version"))
	v, err := strconv.Atoi(fields[1])
	if err != nil {
		t.Fatalf("version %q", fields[1])
	}
	return v
}

func TestRigTotals(t *testing.T) { buses(t, rigTotals) }

// TestRigPrivateSocketAlone: the same and more with nothing but PID 1's own socket.
func TestRigPrivateSocketAlone(t *testing.T) {
	rig := theRig(t)
	at := Config{Bus: privateSocket(t, rig)}
	t.Run("totals", func(t *testing.T) { rigTotals(t, rig, at) })
	t.Run("reload and re-execution", func(t *testing.T) { rigReloadAndReexec(t, rig, at) })
}

func rigTotals(t *testing.T, rig *systemdtest.Rig, at Config) {
	talker(t, rig, "totals.service")
	talk(t, rig, "totals.service", 7)
	r, _ := start(t, at)
	want(t, r.Sweep(t.Context()), "totals.service", sent(7))
	talk(t, rig, "totals.service", 20)
	s := want(t, r.Sweep(t.Context()), "totals.service", sent(27))
	if s.Total != shown(t, rig, "totals.service") {
		t.Errorf("systemctl show says %+v", shown(t, rig, "totals.service"))
	}
	for range 4 { // idle, and then not
		want(t, r.Sweep(t.Context()), "totals.service", sent(27))
	}
	talk(t, rig, "totals.service", 1)
	want(t, r.Sweep(t.Context()), "totals.service", sent(28))
	if h := r.systemd.Health(); h != (systemd.Health{}) {
		t.Errorf("something went wrong: %+v", h)
	}
}

func TestRigRestart(t *testing.T) { buses(t, rigRestart) }

func rigRestart(t *testing.T, rig *systemdtest.Rig, at Config) {
	talker(t, rig, "restart.service")
	r, _ := start(t, at)
	total := 0
	var first time.Time
	for i := range 4 {
		talk(t, rig, "restart.service", 3+i)
		total += 3 + i
		s := want(t, r.Sweep(t.Context()), "restart.service", sent(total))
		if i == 0 {
			first = s.Start
		} else if !s.Start.Equal(first) {
			t.Errorf("after restart %d the series starts at %v, not at %v", i, s.Start, first)
		}
		rig.Run(t, "systemctl", "restart", "restart.service")
		if i%2 == 0 { // a sweep right away, before any signal need have been seen
			want(t, r.Sweep(t.Context()), "restart.service", sent(total))
		}
	}
	if h := r.systemd.Health(); r.ledger.Resets() != 0 || h.Errors != 0 {
		t.Errorf("a restart is no reset and no error: %+v", h)
	}
}

// TestRigAutoRestart: in auto-restart the old counters stay under the old
// invocation id, while the timestamps have moved already.
func TestRigAutoRestart(t *testing.T) { buses(t, rigAutoRestart) }

func rigAutoRestart(t *testing.T, rig *systemdtest.Rig, at Config) {
	talker(t, rig, "auto.service", "Restart=always", "RestartSec=5s", "StartLimitIntervalSec=0")
	r, _ := start(t, at)
	total := 0
	var first time.Time
	for i := range 3 {
		talk(t, rig, "auto.service", 5)
		total += 5
		invocation := rig.Show(t, "auto.service").InvocationID
		if i != 1 { // once the run is read for the first time in auto-restart
			first = want(t, r.Sweep(t.Context()), "auto.service", sent(total)).Start
		}
		rig.Run(t, "systemctl", "kill", "--signal=KILL", "auto.service")
		systemdtest.Eventually(t, "auto-restart", func() bool {
			return strings.TrimSpace(rig.Run(t, "systemctl", "show", "auto.service", "-p", "SubState", "--value")) == "auto-restart"
		})
		if now := rig.Show(t, "auto.service").InvocationID; now != invocation {
			t.Logf("the run was over before the sweep; this version changes the invocation early")
		}
		for range 3 {
			s := want(t, r.Sweep(t.Context()), "auto.service", sent(total))
			if !s.Start.Equal(first) {
				t.Errorf("in auto-restart the series starts at %v, not at %v", s.Start, first)
			}
		}
		systemdtest.Eventually(t, "the next run", func() bool { return rig.Show(t, "auto.service").InvocationID != invocation })
		want(t, r.Sweep(t.Context()), "auto.service", sent(total))
	}
	if h := r.systemd.Health(); r.ledger.Resets() != 0 {
		t.Errorf("a restart is no reset: %+v", h)
	}
}

// TestRigFirstSeenInAutoRestart: the run that is over, but still counted, has
// begun before all of its traffic.
func TestRigFirstSeenInAutoRestart(t *testing.T) {
	rig := theRig(t)
	before := time.Now()
	talker(t, rig, "late.service", "Restart=always", "RestartSec=1h", "StartLimitIntervalSec=0")
	started := time.Now()
	talk(t, rig, "late.service", 5)
	rig.Run(t, "systemctl", "kill", "--signal=KILL", "late.service")
	systemdtest.Eventually(t, "auto-restart", func() bool {
		return strings.TrimSpace(rig.Run(t, "systemctl", "show", "late.service", "-p", "SubState", "--value")) == "auto-restart"
	})
	r, _ := start(t, Config{Bus: rig.SystemBus()})
	s := want(t, r.Sweep(t.Context()), "late.service", sent(5))
	if s.Start.Before(before) || s.Start.After(started) {
		t.Errorf("the series starts at %v, the run did between %v and %v", s.Start, before, started)
	}
}

func TestRigRestartModeDirect(t *testing.T) { buses(t, rigRestartModeDirect) }

func rigRestartModeDirect(t *testing.T, rig *systemdtest.Rig, at Config) {
	if v := systemdVersion(t, rig); v < 254 {
		t.Skipf("RestartMode=direct came with systemd 254; this is %d", v)
	}
	talker(t, rig, "direct.service", "Restart=always", "RestartMode=direct", "RestartSec=100ms", "StartLimitIntervalSec=0")
	r, _ := start(t, at)
	total := 0
	var first time.Time
	for range 3 {
		talk(t, rig, "direct.service", 5)
		total += 5
		s := want(t, r.Sweep(t.Context()), "direct.service", sent(total))
		if first.IsZero() {
			first = s.Start
		}
		if !s.Start.Equal(first) {
			t.Errorf("the series starts at %v, not at %v", s.Start, first)
		}
		invocation := rig.Show(t, "direct.service").InvocationID
		rig.Run(t, "systemctl", "kill", "--signal=KILL", "direct.service")
		systemdtest.Eventually(t, "the next run", func() bool { return rig.Show(t, "direct.service").InvocationID != invocation })
	}
	// Seen for the first time now, the run begins after the one before.
	again := time.Now()
	talk(t, rig, "direct.service", 1)
	late, _ := start(t, at)
	s := want(t, late.Sweep(t.Context()), "direct.service", sent(1))
	if s.Start.After(again) || !s.Start.After(first) {
		t.Errorf("the fourth run starts at %v; the first did at %v, and the fourth sent after %v", s.Start, first, again)
	}
}

func TestRigAccountingSwitched(t *testing.T) { buses(t, rigAccountingSwitched) }

func rigAccountingSwitched(t *testing.T, rig *systemdtest.Rig, at Config) {
	talker(t, rig, "switched.service")
	r, _ := start(t, at)
	set := func(value string) {
		t.Helper()
		rig.Run(t, "systemctl", "set-property", "--runtime", "switched.service", "IPAccounting="+value)
	}
	state := func(want string) func(*Sweep) bool {
		return func(*Sweep) bool { return r.unitNamed("switched.service").Accounting == want }
	}
	talk(t, rig, "switched.service", 9)
	first := want(t, r.Sweep(t.Context()), "switched.service", sent(9))

	set("no")
	s := sweepUntil(t, r, "accounting is off", state("off"))
	if _, ok := s.seriesOf("switched.service"); ok {
		t.Error("a unit without accounting has a point")
	}
	if u := r.unitNamed("switched.service"); u.Counters != (Counters{}) || !u.Start.IsZero() {
		t.Errorf("a unit without accounting is shown as %+v", u)
	}
	talk(t, rig, "switched.service", 100) // nobody counts these

	set("yes")
	on := time.Now()
	sweepUntil(t, r, "accounting is on", state("on"))
	talk(t, rig, "switched.service", 20) // more than before: no fall gives the reset away
	last := want(t, r.Sweep(t.Context()), "switched.service", sent(29))
	if !last.Start.Equal(first.Start) {
		t.Errorf("the series starts at %v, not at %v", last.Start, first.Start)
	}
	u := r.unitNamed("switched.service")
	if u.Counters != sent(20) {
		t.Errorf("the unit has the counters %+v, want %+v", u.Counters, sent(20))
	}
	if u.Start.Before(first.Time) || u.Start.After(on) {
		t.Errorf("the unit's counters count from %v, accounting was on at %v", u.Start, on)
	}
	if h := r.systemd.Health(); h.Errors != 0 {
		t.Errorf("%+v", h)
	}
}

// TestRigSwitchedOverReload: accounting that a unit file switches off counts on
// from 0 when it is switched on again, but on systemd 256 and 257 from before.
func TestRigSwitchedOverReload(t *testing.T) {
	rig := theRig(t)
	talker(t, rig, "reloaded.service")
	talk(t, rig, "reloaded.service", 9)
	r, _ := start(t, Config{Bus: rig.SystemBus()})
	want(t, r.Sweep(t.Context()), "reloaded.service", sent(9))
	const file = "/etc/systemd/system/reloaded.service"
	rig.WriteFile(t, file, strings.Replace(rig.Run(t, "cat", file), "IPAccounting=yes", "IPAccounting=no", 1))
	rig.Run(t, "systemctl", "daemon-reload")
	sweepUntil(t, r, "accounting is off", func(*Sweep) bool { return r.unitNamed("reloaded.service").Accounting == "off" })
	rig.Run(t, "systemctl", "set-property", "--runtime", "reloaded.service", "IPAccounting=yes")
	talk(t, rig, "reloaded.service", 4)
	s := sweepUntil(t, r, "accounting is on", func(*Sweep) bool { return r.unitNamed("reloaded.service").Accounting == "on" })
	want(t, s, "reloaded.service", sent(13))
}

// TestRigStartTimes: a series begins when systemd began to count, not when it
// was first read, and not when the unit was up.
func TestRigStartTimes(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	send := rig.Traffic() + " udp-send " + sinkAddress + " -count "

	t.Run("normal", func(t *testing.T) {
		before := time.Now()
		talker(t, rig, "begun.service")
		after := time.Now()
		talk(t, rig, "begun.service", 3)
		time.Sleep(50 * time.Millisecond)
		r, _ := start(t, Config{Bus: rig.SystemBus()})
		s := want(t, r.Sweep(t.Context()), "begun.service", sent(3))
		if s.Start.Before(before) || s.Start.After(after) {
			t.Errorf("the series starts at %v, the unit did between %v and %v", s.Start, before, after)
		}
	})
	t.Run("ExecStartPre", func(t *testing.T) {
		rig.WriteFile(t, "/etc/systemd/system/pre.service", `[Service]
IPAccounting=yes
ExecStartPre=/bin/sh -c 'date +%%s%%N >/run/pre.began; exec `+send+`4'
ExecStartPre=/bin/sleep 0.2
ExecStart=/bin/sleep infinity
`)
		before := time.Now()
		rig.Run(t, "systemctl", "start", "pre.service")
		t.Cleanup(func() { rig.Run(t, "systemctl", "stop", "pre.service") })
		nsec, err := strconv.ParseInt(strings.TrimSpace(rig.Run(t, "cat", "/run/pre.began")), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		r, _ := start(t, Config{Bus: rig.SystemBus()})
		s := want(t, r.Sweep(t.Context()), "pre.service", sent(4))
		if traffic := time.Unix(0, nsec); s.Start.Before(before) || s.Start.After(traffic) {
			t.Errorf("the series starts at %v; the unit did after %v, and its first command ran at %v", s.Start, before, traffic)
		}
		if active := timestamp(t, rig, "pre.service", "ActiveEnterTimestamp"); !s.Start.Before(active) {
			t.Errorf("the series starts at %v, when ExecStartPre was over (%v)", s.Start, active)
		}
	})
	t.Run("accounting switched on later", func(t *testing.T) {
		talker(t, rig, "later.service", "IPAccounting=no")
		talk(t, rig, "later.service", 50)
		off := time.Now()
		r, _ := start(t, Config{Bus: rig.SystemBus()})
		s := r.Sweep(t.Context())
		if _, ok := s.seriesOf("later.service"); ok {
			t.Error("a unit without accounting has a series")
		}
		if u := r.unitNamed("later.service"); u.Accounting != "off" {
			t.Errorf("accounting is %q", u.Accounting)
		}
		rig.Run(t, "systemctl", "set-property", "--runtime", "later.service", "IPAccounting=yes")
		on := time.Now()
		sweepUntil(t, r, "accounting is on", func(*Sweep) bool { return r.unitNamed("later.service").Accounting == "on" })
		talk(t, rig, "later.service", 2)
		got := want(t, r.Sweep(t.Context()), "later.service", sent(2))
		if began := timestamp(t, rig, "later.service", "InactiveExitTimestamp"); !got.Start.After(began) {
			t.Errorf("the series starts at %v, with the unit (%v)", got.Start, began)
		}
		if got.Start.After(on) {
			t.Errorf("the series starts at %v, after accounting was switched on (%v)", got.Start, on)
		}
		if got.Start.Before(off) {
			t.Errorf("the series starts at %v, before accounting was seen to be off (%v)", got.Start, off)
		}
	})
	t.Run("perpetual", func(t *testing.T) {
		rig.Run(t, "systemctl", "set-property", "--runtime", "init.scope", "IPAccounting=yes")
		if id := rig.Show(t, "init.scope").InvocationID; id != "" {
			t.Fatalf("init.scope has the invocation id %s: it is not perpetual here", id)
		}
		r, _ := start(t, Config{Bus: rig.SystemBus(), Include: []string{"init.scope"}})
		s := want(t, r.Sweep(t.Context()), "init.scope", shown(t, rig, "init.scope"))
		if s.Start.After(time.Now()) || s.Start.IsZero() || s.Start.Unix() == 0 {
			t.Errorf("init.scope starts at %v", s.Start)
		}
		runs := r.Sweep(t.Context()).State.Runs
		if len(runs) != 1 || runs[0].Epoch != r.cfg.BootID+"/init.scope" || runs[0].Unit != "init.scope" {
			t.Errorf("the runs are %+v", runs)
		}
	})
}

func TestRigUnitTypes(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	r, _ := start(t, Config{Bus: rig.SystemBus(), Types: append(DefaultTypes(), "slice"), UnitType: true, UnitSlice: true, Fold: []string{}})

	t.Run("socket", func(t *testing.T) {
		// The traffic of a socket-activated connection belongs to the socket.
		rig.WriteFile(t, "/etc/systemd/system/act.socket", "[Socket]\nListenStream=127.0.0.1:9100\nIPAccounting=yes\n")
		rig.WriteFile(t, "/etc/systemd/system/act.service", "[Service]\nIPAccounting=yes\nExecStart="+rig.Traffic()+" tcp-sink -\n")
		rig.Run(t, "systemctl", "start", "act.socket")
		t.Cleanup(func() { rig.Run(t, "systemctl", "stop", "act.socket", "act.service") })
		rig.Run(t, rig.Traffic(), "tcp-send", "127.0.0.1:9100", "-bytes", "50000")
		s := sweepUntil(t, r, "the socket is read", func(s *Sweep) bool { _, ok := s.seriesOf("act.socket"); return ok })
		got := want(t, s, "act.socket", shown(t, rig, "act.socket"))
		if got.Total.IngressBytes < 50000 {
			t.Errorf("the socket got %+v, less than was sent", got.Total)
		}
		if s, ok := r.Sweep(t.Context()).seriesOf("act.service"); ok && s.Total != (Counters{}) {
			t.Errorf("the service has the socket's traffic too: %+v", s.Total)
		}
	})
	t.Run("scope in a slice", func(t *testing.T) {
		cmd := rig.Command(context.Background(), "systemd-run", "--scope", "--unit=mine.scope", "--slice=deep-er.slice", "-p", "IPAccounting=yes",
			"sh", "-c", rig.Traffic()+" udp-send "+sinkAddress+" -count 6; sleep 600")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			rig.Run(t, "systemctl", "stop", "mine.scope")
			_ = cmd.Wait() // it was killed
		})
		s := sweepUntil(t, r, "the scope has sent all", func(s *Sweep) bool { got, _ := s.seriesOf("mine.scope"); return got.Total == sent(6) })
		got := want(t, s, "mine.scope", sent(6))
		for key, value := range map[string]string{
			"systemd.unit.name": "mine.scope", "systemd.unit.type": "scope", "systemd.unit.slice": "deep-er.slice",
			"network.io.direction": "transmit", "host.name": "host",
		} {
			if v, _ := got.Transmit.Value(attribute.Key(key)); v.AsString() != value {
				t.Errorf("attribute %s is %q, want %q", key, v.AsString(), value)
			}
		}
		if got.Transmit.Len() != 5 || got.Receive.Len() != 5 {
			t.Errorf("the attributes are %v", got.Transmit.ToSlice())
		}
	})
	t.Run("slice", func(t *testing.T) {
		rig.Run(t, "systemctl", "set-property", "--runtime", "system.slice", "IPAccounting=yes")
		s := sweepUntil(t, r, "the slice is read", func(s *Sweep) bool { _, ok := s.seriesOf("system.slice"); return ok })
		got, _ := s.seriesOf("system.slice")
		if now := shown(t, rig, "system.slice"); got.Total.EgressBytes > now.EgressBytes || got.Total.IngressBytes > now.IngressBytes {
			t.Errorf("system.slice has the total %+v, systemctl show says %+v", got.Total, now)
		}
	})
	t.Run("mount without data", func(t *testing.T) {
		rig.WriteFile(t, "/etc/systemd/system/mnt-nothing.mount", "[Mount]\nWhat=tmpfs\nWhere=/mnt/nothing\nType=tmpfs\nIPAccounting=yes\n")
		rig.Run(t, "systemctl", "start", "mnt-nothing.mount")
		t.Cleanup(func() { rig.Run(t, "systemctl", "stop", "mnt-nothing.mount") })
		rig.Run(t, "systemctl", "set-property", "--runtime", "tmp.mount", "IPAccounting=yes")
		for _, name := range []string{"tmp.mount", "mnt-nothing.mount"} {
			state := "no_data"
			if rig.Show(t, name).OK {
				state = "on"
			}
			s := sweepUntil(t, r, name+" is "+state, func(*Sweep) bool { return r.unitNamed(name).Accounting == state })
			if got, observed := s.seriesOf(name); observed != (state == "on") {
				t.Errorf("%s is %s, point: %v, %+v", name, state, observed, got)
			}
		}
	})
	for _, s := range r.Sweep(t.Context()).State.Series {
		if !s.Total.Valid() {
			t.Errorf("%s has the total %+v", s.Name, s.Total)
		}
	}
}

func TestRigReloadAndReexec(t *testing.T) { buses(t, rigReloadAndReexec) }

func rigReloadAndReexec(t *testing.T, rig *systemdtest.Rig, at Config) {
	talker(t, rig, "calm.service")
	talker(t, rig, "idle.service")
	r, l := start(t, at)
	v := systemdVersion(t, rig)
	forgetful := v == 256 || v == 257 // systemd#38112
	talk(t, rig, "idle.service", 3)
	total := 0
	for i, operation := range []string{"daemon-reload", "daemon-reexec", "daemon-reload", "daemon-reexec"} {
		talk(t, rig, "calm.service", 10)
		total += 10
		first := want(t, r.Sweep(t.Context()), "calm.service", sent(total))
		// Sweep all through it: nothing may fall, jump or double.
		done := make(chan error, 1)
		go func() { done <- rig.Command(t.Context(), "systemctl", operation).Run() }()
		for over := false; !over; {
			select {
			case err := <-done:
				if err != nil {
					t.Fatalf("systemctl %s: %v", operation, err)
				}
				over = true
			default:
			}
			if s, ok := r.Sweep(t.Context()).seriesOf("calm.service"); ok && s.Total != sent(total) {
				t.Fatalf("during %s the total is %+v, want %+v", operation, s.Total, sent(total))
			}
		}
		systemdtest.Eventually(t, operation+" has been noticed", func() bool {
			h := r.systemd.Health()
			return h.Reloads+h.Reexecs > int64(i)
		})
		if forgetful {
			// The gap is a gap, and setting the property again ends it.
			s := sweepUntil(t, r, "the loss is noticed", func(*Sweep) bool {
				return r.unitNamed("calm.service").Accounting == "lost" && r.unitNamed("idle.service").Accounting == "lost"
			})
			none(t, s, "calm.service")
			rig.Run(t, "systemctl", "set-property", "--runtime", "calm.service", "IPAccounting=yes")
			rig.Run(t, "systemctl", "set-property", "--runtime", "idle.service", "IPAccounting=yes")
		}
		s := sweepUntil(t, r, "all is read again", func(s *Sweep) bool {
			_, calm := s.seriesOf("calm.service")
			_, idle := s.seriesOf("idle.service")
			return calm && idle
		})
		// systemd itself loses nothing here, since nothing is sent meanwhile.
		got := want(t, s, "calm.service", sent(total))
		if !got.Start.Equal(first.Start) {
			t.Errorf("after %s the series starts at %v, not at %v", operation, got.Start, first.Start)
		}
		want(t, s, "idle.service", sent(3))
		if got.Total != shown(t, rig, "calm.service") {
			t.Errorf("after %s, systemctl show says %+v", operation, shown(t, rig, "calm.service"))
		}
	}
	h := r.systemd.Health()
	if h.Reloads != 2 || h.Reexecs != 2 || r.ledger.Resets() != 0 {
		t.Errorf("2 reloads, 2 reexecs and no resets make %+v", h)
	}
	// No unit is at fault for what systemd does.
	l.only(t, 0, "cannot read the counters")
}

func TestRigBusRestart(t *testing.T) {
	rig := theRig(t)
	talker(t, rig, "bus.service")
	r, l := start(t, Config{Bus: rig.SystemBus()})
	talk(t, rig, "bus.service", 4)
	first := want(t, r.Sweep(t.Context()), "bus.service", sent(4))
	rig.Run(t, "systemctl", "restart", "dbus.service")
	talk(t, rig, "bus.service", 4)
	s := sweepUntil(t, r, "the unit is read again", func(s *Sweep) bool {
		_, ok := s.seriesOf("bus.service")
		return ok && !s.Partial
	})
	if got := want(t, s, "bus.service", sent(8)); !got.Start.Equal(first.Start) {
		t.Errorf("the series starts at %v, not at %v", got.Start, first.Start)
	}
	l.only(t, 1, "lost the connection to systemd")
	l.only(t, 1, "connected to systemd again")
	// Signals come again too.
	talker(t, rig, "after.service")
	talk(t, rig, "after.service", 2)
	s = sweepUntil(t, r, "a new unit is noticed", func(s *Sweep) bool { _, ok := s.seriesOf("after.service"); return ok })
	want(t, s, "after.service", sent(2))
}

func TestRigPrivateSocket(t *testing.T) {
	rig := theRig(t)
	report := inside(t, rig, "private")
	if report.Connections != 500 || report.Answered != 500 {
		t.Errorf("of %d connections, %d got an answer; want 500 of 500", report.Connections, report.Answered)
	}
}

// thousand starts a thousand units that have sent one datagram each. They stay
// for the benchmarks.
func thousand(t testing.TB, rig *systemdtest.Rig) {
	t.Helper()
	sink(t, rig)
	const last = "thousand@999.service"
	if strings.TrimSpace(rig.Run(t, "sh", "-c", "systemctl is-active "+last+" || true")) == "active" {
		return
	}
	rig.WriteFile(t, "/etc/systemd/system/thousand.slice", "[Slice]\nIPAccounting=yes\n")
	rig.WriteFile(t, "/etc/systemd/system/thousand@.service", fmt.Sprintf(`[Unit]
DefaultDependencies=no
[Service]
IPAccounting=yes
Slice=thousand.slice
ExecStart=/bin/bash -c 'printf x >/dev/udp/%s; exec sleep infinity'
`, strings.Replace(sinkAddress, ":", "/", 1)))
	rig.Run(t, "bash", "-c", fmt.Sprintf("systemctl start thousand@{0..%d}.service", thousandUnits-1))
	systemdtest.Eventually(t, "all have sent", func() bool { return shown(t, rig, "thousand.slice").EgressPackets == thousandUnits })
}

// TestRigThousandUnits: as nobody, over dbus-daemon with its default limits,
// every unit is read in every sweep, and every point comes out of the SDK.
func TestRigThousandUnits(t *testing.T) {
	rig := theRig(t)
	thousand(t, rig)
	report := inside(t, rig, "thousand", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
	if len(report.MissingByName) > 0 || report.Partial > 0 || report.Sweeps != 5 {
		t.Errorf("in %d sweeps (%d partial) %d units were missing: %v", report.Sweeps, report.Partial, len(report.MissingByName), report.MissingByName)
	}
	if len(report.WrongByName) > 0 {
		t.Errorf("units with other bytes than %d: %v", thousandBytes, report.WrongByName)
	}
	if wantHealth := fmt.Sprintf("%+v", systemd.Health{}); report.Health != wantHealth {
		t.Errorf("health is %s", report.Health)
	}
	if report.IOPoints != 2*thousandUnits || report.PackPoints != 2*thousandUnits {
		t.Errorf("the SDK has %d + %d points, want %d of each", report.IOPoints, report.PackPoints, 2*thousandUnits)
	}
	if strings.Contains(report.Logs, "WARN") || strings.Contains(report.Logs, "ERROR") {
		t.Errorf("it logged:\n%s", report.Logs)
	}
}

// TestRigBusComesLater: an agent of root that began without a bus takes it as soon as
// it can be had, so that PID 1 keeps no signals for it.
func TestRigBusComesLater(t *testing.T) {
	rig := theRig(t)
	talker(t, rig, "later.service")
	address := filepath.Join(t.TempDir(), "bus")
	metered := func(unit string) bool { return unit == "later.service" }
	l := &logs{}
	source := systemd.New(systemd.Config{
		Bus: "auto", SystemBus: "unix:path=" + address, PrivateSocket: privateSocket(t, rig), PrivateFrom: 1,
		Types: []string{"service"}, Metered: metered, Balanced: func(string) bool { return false },
		RelistEvery: 50 * time.Millisecond, Sink: discard{}, Logger: newLogger(l),
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = source.Run(ctx) }()
	defer func() { cancel(); <-done }()
	if err := source.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(strings.TrimPrefix(rig.SystemBus(), "unix:path="), address); err != nil {
		t.Fatal(err)
	}
	systemdtest.Eventually(t, "it has moved to the bus", func() bool { return strings.Contains(l.String(), "connected to systemd again") })
	if err := source.Read(ctx); err != nil {
		t.Error(err)
	}
	if n := source.Health().Reconnects; n != 1 {
		t.Errorf("%d connections were lost", n)
	}
}

// discard is a Sink that takes nothing.
type discard struct{}

func (discard) Credit(systemd.Reading) bool  { return false }
func (discard) Restart(string, time.Time)    {}
func (discard) Place(string, string, string) {}
