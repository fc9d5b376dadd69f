package receiver

import (
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

	"github.com/unitmeter/unitmeter/receiver/ledger"
	"github.com/unitmeter/unitmeter/receiver/systemd/journal"
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
	cfg.journalctl = append(wrapper, "nsenter", "-t", strconv.Itoa(rig.PID()), "-a", "--", "journalctl")
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
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
	if err := r.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	systemdtest.Eventually(t, "the journal is read", func() bool { return r.position() != ledger.Position{} })
	return r, stop
}

// readTo runs a unit and waits until the receiver has its record, and so all
// before it. It returns a sweep after that.
func readTo(t *testing.T, rig *systemdtest.Rig, r *Receiver, unit string) *Sweep {
	t.Helper()
	sends(t, rig, unit)
	last := parseRecord(t, rig.Run(t, "journalctl", "--system", "--lines=1", "--output=json", "MESSAGE_ID=ae8f7b866b0347b9af31fe1c80b127c0", "_PID=1"))
	if last.Unit != unit+".service" {
		t.Fatalf("the last record is of %q", last.Unit)
	}
	var seen string
	systemdtest.Eventually(t, "the record of "+unit+" is read", func() bool {
		at := r.position().Cursor
		if at == last.Cursor || at == seen {
			return at == last.Cursor
		}
		seen = at // it may be past that record: the ends of other units have some too
		return strings.Contains(rig.Run(t, "journalctl", "--system", "--cursor="+last.Cursor, "--output=json", "_PID=1"), `"`+at+`"`)
	})
	return r.Sweep(t.Context())
}

// TestRigEarlierBoot: what a unit sent between the last sweep and the shutdown is
// in the journal of that boot only, and is counted once however often and
// wherever the agent is killed after it.
func TestRigEarlierBoot(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	include := []string{"*-boot.service"}
	var state ledger.State
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
	var states []ledger.State
	for i, unit := range []string{"killed-boot", "again-boot"} { // the first leaves no state
		r, stop := journaled(t, rig, Config{Include: include, State: state})
		s := readTo(t, rig, r, unit)
		check(s)
		if h := r.systemd.Health(); r.journal.Bad() != 0 || r.ledger.Missed() != 0 {
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
	state := ledger.State{
		Time: began, Source: DBus, Journal: ledger.Position{Cursor: "c0", Boot: earlier},
		Series: []ledger.Series{
			{ID: unitID("a.service"), Total: ledgerAll(5), Start: began.Add(-time.Hour), Time: began},
			{ID: unitID("b.service"), Total: ledgerAll(50), Start: began.Add(-time.Hour), Time: began},
		},
		Runs: []ledger.Run{
			{Unit: "a.service", Series: "a.service", Epoch: a, Boot: earlierBootID, Last: ledgerAll(5), Time: began},
			{Unit: "b.service", Series: "b.service", Epoch: b, Boot: earlierBootID, Last: ledgerAll(50), Time: began},
		},
	}
	records := []*journal.Record{
		{Unit: "a.service", Epoch: a, Boot: earlier, Counted: true, Counters: all(7), Time: began.Add(time.Second), Ended: began},
		{Unit: "b.service", Epoch: b, Boot: earlier, Counted: true, Counters: all(60), Time: began.Add(time.Second), Ended: began},
	}
	take := func(r *Receiver, records []*journal.Record) *Sweep {
		for i, record := range records {
			r.takeRecord(journal.Position{Cursor: strconv.Itoa(i), Boot: earlier}, record)
		}
		return r.finish(time.Now(), false)
	}
	for killedAfter := range records {
		r, err := New(Config{HostName: "host", State: state})
		if err != nil {
			t.Fatal(err)
		}
		between := take(r, records[:killedAfter+1])
		if r, err = New(Config{HostName: "host", State: between.State}); err != nil {
			t.Fatal(err)
		}
		s := take(r, records[killedAfter+1:])
		if got := totals(s.State); len(got) != 2 || got["a.service"] != all(7) || got["b.service"] != all(60) {
			t.Errorf("killed after %d: %+v", killedAfter, got)
		}
		for _, point := range append(between.State.Series, s.State.Series...) {
			if point.Observed && time.Since(point.Time) > 5*time.Minute {
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
	cfg.journalctl = []string{"sh", "-c", `sleep 1; exec "$@"`, "sh", "nsenter", "-t", strconv.Itoa(rig.PID()), "-a", "--", "journalctl"}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
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
	var state ledger.State
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

// position is how far the stop records have been taken.
func (r *Receiver) position() ledger.Position {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ledger.Journal()
}

// A printed record is a line of journalctl.
type printed struct {
	Cursor string `json:"__CURSOR"`
	Unit   string `json:"UNIT"`
}

func parseRecord(t *testing.T, line string) (rec printed) {
	t.Helper()
	if err := json.Unmarshal([]byte(line), &rec); err != nil {
		t.Fatal(err)
	}
	return rec
}

func unitID(name string) ledger.ID { return ledger.ID{Kind: ledger.Unit, Name: name} }

func ledgerAll(n uint64) ledger.Counters { return countersOf(all(n)) }
