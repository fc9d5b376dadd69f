package receiver

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

const (
	bootIDPath    = "/proc/sys/kernel/random/boot_id"
	earlierBootID = "11111111-2222-4333-8444-555555555555"
)

// earlierBoot has the rig's journald take what f logs for an earlier boot's.
func earlierBoot(t *testing.T, rig *systemdtest.Rig, f func()) {
	t.Helper()
	restart := func() {
		rig.Run(t, "journalctl", "--sync")
		rig.Run(t, "systemctl", "reset-failed", "systemd-journald.service")
		rig.Run(t, "systemctl", "restart", "systemd-journald.service")
	}
	rig.WriteFile(t, "/etc/earlier-boot", earlierBootID+"\n")
	rig.Run(t, "mount", "--bind", "/etc/earlier-boot", bootIDPath)
	restart()
	f()
	rig.Run(t, "umount", bootIDPath)
	restart()
}

// sends runs a unit that sends 5 datagrams and ends. The journal has its record.
func sends(t *testing.T, rig *systemdtest.Rig, unit string) {
	t.Helper()
	rig.Run(t, "systemd-run", "--wait", "--unit="+unit, "-p", "IPAccounting=yes", rig.Traffic(), "udp-send", sinkAddress, "-count", "5")
	rig.Run(t, "journalctl", "--sync")
}

// journaled runs a receiver with the rig's journal until stop is called.
func journaled(t *testing.T, rig *systemdtest.Rig, cfg Config, wrapper ...string) (r *Receiver, stop func()) {
	t.Helper()
	cfg.Bus, cfg.SystemBus, cfg.HostName, cfg.StopRecords = rig.SystemBus(), rig.SystemBus(), "host", "on"
	l := &logs{}
	cfg.Logger = newLogger(l)
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.journalctl = append(wrapper, "nsenter", "-t", strconv.Itoa(rig.PID()), "-a", "--", "journalctl")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("the receiver logged:\n%s", l)
		}
	})
	eventually(t, "the journal is read", func() bool { return r.position() != Position{} })
	return r, stop
}

// readTo runs a unit and waits until the receiver has its record, and so all
// before it. It returns a sweep after that.
func readTo(t *testing.T, rig *systemdtest.Rig, r *Receiver, unit string) *Sweep {
	t.Helper()
	sends(t, rig, unit)
	last := parseRecord(t, rig.Run(t, "journalctl", "--system", "--lines=1", "--output=json", "MESSAGE_ID="+stopRecord, "_PID=1"))
	if last.Unit != unit+".service" {
		t.Fatalf("the last record is of %q", last.Unit)
	}
	eventually(t, "the record of "+unit+" is read", func() bool { return r.position().Cursor == last.Cursor })
	return r.Sweep(t.Context())
}

// TestRigEarlierBoot: what a unit sent between the last sweep and the shutdown is
// in the journal of that boot only, and is counted once however often and
// wherever the agent is killed after it.
func TestRigEarlierBoot(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	include := []string{"*-boot.service"}
	var state State
	earlierBoot(t, rig, func() {
		sends(t, rig, "before-boot") // before the agent: nobody's
		talker(t, rig, "tail-boot.service")
		talk(t, rig, "tail-boot.service", 5)
		r, stop := journaled(t, rig, Config{BootID: earlierBootID, Include: include})
		want(t, readTo(t, rig, r, "early-boot"), "tail-boot.service", sent(5))
		state = r.Sweep(t.Context()).State
		stop()
		talk(t, rig, "tail-boot.service", 3)
		rig.Run(t, "systemctl", "stop", "tail-boot.service")
		sends(t, rig, "unseen-boot")
	})
	check := func(s *Sweep) {
		t.Helper()
		for unit, total := range map[string]Counters{
			"early-boot": sent(5), "tail-boot": sent(8), "unseen-boot": sent(5),
		} {
			got, _ := s.seriesOf(unit + ".service")
			if got.Total != total {
				t.Errorf("%s has %+v, want %+v", unit, got.Total, total)
			}
			if got.Time.After(s.Time) || !got.Time.After(got.Start) {
				t.Errorf("%s has a point at %v from %v", unit, got.Time, got.Start)
			}
		}
		if got, ok := s.seriesOf("before-boot.service"); ok {
			t.Errorf("a unit that ended before the first agent has %+v", got.Total)
		}
	}
	var states []State
	for i, unit := range []string{"killed-boot", "again-boot"} { // the first leaves no state
		r, stop := journaled(t, rig, Config{Include: include, State: state})
		s := readTo(t, rig, r, unit)
		check(s)
		if h := r.healthNow(); h.badRecords != 0 || h.missed != 0 {
			t.Errorf("try %d: %+v", i, h)
		}
		states = append(states, s.State)
		stop()
	}
	for i, unit := range []string{"third-boot", "fourth-boot"} {
		r, stop := journaled(t, rig, Config{Include: include, State: states[i]})
		check(r.Sweep(t.Context()))
		s := readTo(t, rig, r, unit)
		check(s)
		wantFive(t, s, "killed-boot")
		stop()
	}
}

// TestEarlierBootInParts: an agent that is killed while it takes the records of an
// earlier boot knows afterwards which it has taken, and what it had of the others.
func TestEarlierBootInParts(t *testing.T) {
	began := time.Now().Add(-time.Hour)
	earlier := strings.ReplaceAll(earlierBootID, "-", "")
	a, b := strings.Repeat("a", 32), strings.Repeat("b", 32)
	state := State{
		Time: began, Journal: Position{"c0", earlier},
		Series: []Series{
			{Name: "a.service", Total: all(5), Start: began.Add(-time.Hour), Time: began},
			{Name: "b.service", Total: all(50), Start: began.Add(-time.Hour), Time: began},
		},
		Runs: []Run{
			{Unit: "a.service", Series: "a.service", Epoch: a, Boot: earlierBootID, Last: all(5), Time: began},
			{Unit: "b.service", Series: "b.service", Epoch: b, Boot: earlierBootID, Last: all(50), Time: began},
			{Unit: "init.scope", Series: "init.scope", Epoch: earlierBootID, Boot: earlierBootID, Last: all(5), Time: began},
		},
	}
	recordOf := func(cursor, unit, invocation, value string) record {
		return record{
			Cursor: cursor, Boot: earlier, Unit: unit, Invocation: invocation,
			Realtime:     strconv.FormatInt(began.Add(time.Second).UnixMicro(), 10),
			IngressBytes: value, IngressPackets: value, EgressBytes: value, EgressPackets: value,
		}
	}
	records := []record{
		recordOf("c0", "z.service", strings.Repeat("f", 32), "9"), // taken before
		recordOf("c1", "a.service", a, "7"), recordOf("c2", "b.service", b, "60"),
	}
	for killedAfter := range records {
		r, err := New(Config{HostName: "host", State: state})
		if err != nil {
			t.Fatal(err)
		}
		for _, rec := range records[:killedAfter+1] {
			r.takeRecord(rec)
		}
		now := time.Now()
		between := r.snapshot(now, now, false)
		if r, err = New(Config{HostName: "host", State: between.State}); err != nil {
			t.Fatal(err)
		}
		for _, rec := range records[killedAfter:] { // journalctl begins with the one of the cursor
			r.takeRecord(rec)
		}
		now = time.Now()
		s := r.snapshot(now, now, false)
		if got := totals(s.State); len(got) != 2 || got["a.service"] != all(7) || got["b.service"] != all(60) {
			t.Errorf("killed after %d: %+v", killedAfter, got)
		}
		for _, point := range append(between.State.Series, s.State.Series...) {
			if point.Observed && now.Sub(point.Time) > lateRecord {
				t.Errorf("killed after %d: the point of %s is at %v; backends refuse what is old", killedAfter, point.Name, point.Time)
			}
		}
	}
}

// wantFive wants the services to have the total of one run of sends, whether or
// not they have a point in the sweep.
func wantFive(t *testing.T, s *Sweep, services ...string) {
	t.Helper()
	for _, name := range services {
		if got, _ := s.seriesOf(name + ".service"); got.Total != sent(5) {
			t.Errorf("%s has %+v", name, got.Total)
		}
	}
}

// TestRigJournalPlaceFirst: the first sweep has the place in the journal, however
// long journalctl takes to say it. The next receiver goes on from there.
func TestRigJournalPlaceFirst(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	sends(t, rig, "place-before.service")
	cfg := Config{Bus: rig.SystemBus(), SystemBus: rig.SystemBus(), HostName: "host", StopRecords: "on", Include: []string{"place-*"}}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.journalctl = []string{"sh", "-c", `sleep 1; exec "$@"`, "sh", "nsenter", "-t", strconv.Itoa(rig.PID()), "-a", "--", "journalctl"}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	if err := r.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	state := r.Sweep(t.Context()).State
	cancel() // as if killed, before it has read any record
	<-done
	sends(t, rig, "place-between.service")
	cfg.State = state
	next, _ := journaled(t, rig, cfg)
	s := readTo(t, rig, next, "place-last")
	want(t, s, "place-between.service", sent(5))
	if _, ok := s.seriesOf("place-before.service"); ok {
		t.Error("what nobody was there to count is counted")
	}
}

// TestRigJournalctlKilled: the records that journalctl had not printed when it
// died are printed by the next one.
func TestRigJournalctlKilled(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	pidFile := filepath.Join(t.TempDir(), "pid")
	r, _ := journaled(t, rig, Config{Include: []string{"*-killed.service"}}, "sh", "-c", `echo $$ >"$0" && exec "$@"`, pidFile)
	want(t, readTo(t, rig, r, "first-killed"), "first-killed.service", sent(5))
	text, err := os.ReadFile(pidFile)
	pid, err2 := strconv.Atoi(strings.TrimSpace(string(text)))
	if err = errors.Join(err, err2, syscall.Kill(-pid, syscall.SIGSTOP)); err != nil {
		t.Fatal(err)
	}
	sends(t, rig, "second-killed")
	if err := syscall.Kill(-pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s := readTo(t, rig, r, "third-killed")
	wantFive(t, s, "first-killed", "second-killed")
}

// TestRigClockSetBack: the records of a clock that is behind the one of the state
// are taken, and those of before are not taken again.
func TestRigClockSetBack(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	include := []string{"*-back.service"}
	r, stop := journaled(t, rig, Config{Include: include})
	state := readTo(t, rig, r, "before-back").State
	stop()
	sends(t, rig, "away-back")
	state.Time = state.Time.Add(time.Hour)
	for i := range state.Series {
		state.Series[i].Time = state.Series[i].Time.Add(time.Hour)
	}
	state.Runs = nil // those before have been forgotten meanwhile
	again, _ := journaled(t, rig, Config{Include: include, State: state})
	s := readTo(t, rig, again, "after-back")
	wantFive(t, s, "before-back", "away-back")
}

// TestRigLostCursor: where the record of the position has been vacuumed, all that
// the journal has of later is taken.
func TestRigLostCursor(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	include := []string{"*-vacuumed.service"}
	var state State
	earlierBoot(t, rig, func() {
		r, stop := journaled(t, rig, Config{BootID: earlierBootID, Include: include})
		state = readTo(t, rig, r, "old-vacuumed").State
		stop()
	})
	sends(t, rig, "first-vacuumed")
	for _, file := range []string{"s=" + strings.Repeat("1", 32), ""} {
		// As from a journal that is gone; one that was never there has no cursor.
		state := state
		if _, rest, ok := strings.Cut(state.Journal.Cursor, ";"); ok && file != "" {
			state.Journal.Cursor = file + ";" + strings.Replace(rest, "b="+state.Journal.Boot, "b="+strings.Repeat("2", 32), 1)
			state.Journal.Boot = strings.Repeat("2", 32)
		}
		r, stop := journaled(t, rig, Config{Include: include, State: state})
		s := sweepUntil(t, r, "the record is read", func(s *Sweep) bool {
			got, _ := s.seriesOf("first-vacuumed.service")
			return got.Total == sent(5)
		})
		wantFive(t, s, "old-vacuumed") // what was taken before is not taken again
		stop()
	}
}

// TestLongRecord: a line that no stop record can be ends the following with an
// error, which is logged, and does not leave it waiting for ever.
func TestLongRecord(t *testing.T) {
	r, err := New(Config{HostName: "host"})
	if err != nil {
		t.Fatal(err)
	}
	r.journalctl = []string{"sh", "-c", "exec tr '\\0' x </dev/zero"}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := r.readJournal(ctx, func() {}); !errors.Is(err, bufio.ErrTooLong) || ctx.Err() != nil {
		t.Errorf("it returned %v; context: %v", err, ctx.Err())
	}
}

// parseRecord is a line of journalctl.
func parseRecord(t *testing.T, line string) (rec record) {
	t.Helper()
	if err := json.Unmarshal([]byte(line), &rec); err != nil {
		t.Fatal(err)
	}
	return rec
}

// TestLateRecord: where journald hangs, a record may come when its run has been
// counted and forgotten, and must not be taken for that of a run nobody saw.
func TestLateRecord(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	r, _ := start(t, Config{Bus: fake.Address()})
	want(t, r.Sweep(t.Context()), "a.service", all(100))
	ended := time.Now()
	fake.Remove("a.service")
	fake.EmitUnitRemoved("a.service")
	eventually(t, "the end is known", func() bool { return r.unitNamed("a.service").Accounting == "" })
	recordOf := func(n int, ended time.Time) record {
		return record{
			Cursor: id(n), Unit: "a.service", Invocation: id(n), Boot: r.journalBoot(),
			Source: strconv.FormatInt(ended.UnixMicro(), 10), Realtime: strconv.FormatInt(time.Now().UnixMicro(), 10),
			IngressBytes: "100", IngressPackets: "100", EgressBytes: "100", EgressPackets: "100",
		}
	}
	r.takeRecord(recordOf(1, ended))
	want(t, r.Sweep(t.Context()), "a.service", all(100))
	r.takeRecord(recordOf(2, ended)) // of a run that nobody saw
	want(t, r.Sweep(t.Context()), "a.service", all(200))
	r.mu.Lock()
	shift := keepClosed + time.Minute // what three minutes do
	for _, run := range r.runs {
		run.closed = run.closed.Add(-shift)
	}
	r.began = r.began.Add(-shift)
	r.mu.Unlock()
	if s := r.Sweep(t.Context()); len(s.State.Runs) != 0 {
		t.Fatalf("it remembers %+v", s.State.Runs)
	}
	r.takeRecord(recordOf(1, ended.Add(-shift)))
	r.takeRecord(recordOf(3, time.Now()))
	want(t, r.Sweep(t.Context()), "a.service", all(300))
	if h := r.healthNow(); h.missed != 1 {
		t.Errorf("%d runs were missed, want 1", h.missed)
	}
}
