package receiver

import (
	"strconv"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/ledger"
	"github.com/unitmeter/unitmeter/receiver/systemd/journal"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestRigClockStepped restores the state of a Receiver as it would look had the
// wall clock been stepped in between: each reading counts at once, and once.
func TestRigClockStepped(t *testing.T) {
	rig := theRig(t)
	for _, step := range []time.Duration{time.Hour, -time.Hour} {
		t.Run(step.String(), func(t *testing.T) {
			talker(t, rig, "stepped.service")
			talk(t, rig, "stepped.service", 5)
			r, _ := start(t, Config{Bus: rig.SystemBus()})
			state := r.Sweep(t.Context()).State
			state.Time = state.Time.Add(step)
			for i := range state.Series {
				state.Series[i].Time = state.Series[i].Time.Add(step)
			}
			for i := range state.Runs {
				state.Runs[i].Time = state.Runs[i].Time.Add(step)
			}
			again, _ := start(t, Config{Bus: rig.SystemBus(), State: state})
			want(t, again.Sweep(t.Context()), "stepped.service", sent(5))
			talk(t, rig, "stepped.service", 7)
			s := want(t, again.Sweep(t.Context()), "stepped.service", sent(12))
			if s.Time.After(time.Now()) {
				t.Errorf("the point's time is %v, which is yet to come", s.Time)
			}
		})
	}
}

// TestRigExecStopOnly: a start that executes nothing leaves the counters of the
// run before under the new invocation id.
func TestRigExecStopOnly(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	rig.WriteFile(t, "/etc/systemd/system/stoponly.service", `[Unit]
StartLimitIntervalSec=0
[Service]
IPAccounting=yes
Type=oneshot
RemainAfterExit=yes
ExecStop=`+rig.Traffic()+" udp-send "+sinkAddress+" -count 5\n")
	rig.Run(t, "systemctl", "daemon-reload")
	r, _ := journaled(t, rig, Config{})
	total := 0
	for range 6 {
		rig.Run(t, "systemctl", "start", "stoponly.service")
		r.Sweep(t.Context())
		rig.Run(t, "systemctl", "stop", "stoponly.service")
		total += 5
		s := sweepUntil(t, r, "the run is counted", func(s *Sweep) bool {
			got, _ := s.seriesOf("stoponly.service")
			return got.Total.EgressPackets >= uint64(total)
		})
		want(t, s, "stoponly.service", sent(total))
		systemdtest.Eventually(t, "the unit is unloaded", func() bool {
			return rig.Run(t, "systemctl", "list-units", "--all", "--no-legend", "stoponly.service") == ""
		})
	}
}

// TestLateGrowth: what a stop record adds comes with a time of its own, after
// that of the point before and after the start.
func TestLateGrowth(t *testing.T) {
	r, err := New(Config{HostName: "host"})
	if err != nil {
		t.Fatal(err)
	}
	ended := time.Now().Add(-time.Second)
	recorded := func(i int) {
		r.takeRecord(journal.Position{Cursor: strconv.Itoa(i)}, &journal.Record{
			Unit: "a.service", Epoch: id(i), Counted: true, Counters: Counters{EgressBytes: 128, EgressPackets: 1}, Time: ended, Ended: ended,
		})
	}
	before := Series{Series: &ledger.Series{}}
	for i := range 4 {
		recorded(i) // all of them ended in the same moment
		s := r.finish(time.Now(), false)
		got := want(t, s, "a.service", Counters{EgressBytes: 128 * uint64(i+1), EgressPackets: uint64(i + 1)})
		if !got.Time.After(before.Time) || !got.Time.After(got.Start) {
			t.Errorf("point %d is at %v, the one before at %v, the start at %v", i, got.Time, before.Time, got.Start)
		}
		before = got
	}
}

// TestIdleFold: the total of a fold without members is known, so that its point
// is of the sweep. One with the time of the last member would soon be older than
// what a backend takes: Prometheus refuses the whole request for it.
func TestIdleFold(t *testing.T) {
	long := time.Now().Add(-3 * time.Hour)
	const fold = "run-*.service"
	r, err := New(Config{HostName: "host", State: ledger.State{Time: long, Source: DBus, Series: []ledger.Series{
		{ID: unitID(fold), Total: ledgerAll(7), Start: long.Add(-time.Hour), Time: long},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	// Nobody knows of members that systemd could not be asked for.
	now := time.Now()
	s := r.finish(now, true)
	if got, ok := s.seriesOf(fold); ok {
		t.Errorf("a sweep that was cut short has the point %+v", got)
	}
	s = r.finish(now, false)
	if got := want(t, s, fold, all(7)); !got.Time.Equal(s.Time) || !got.Start.Equal(long.Add(-time.Hour)) {
		t.Errorf("its point is at %v from %v, the sweep at %v", got.Time, got.Start, s.Time)
	}
}
