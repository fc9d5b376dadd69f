package receiver

import (
	"fmt"
	"testing"
	"time"
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
		eventually(t, "the unit is unloaded", func() bool {
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
		t.Helper()
		r.takeRecord(parseRecord(t, fmt.Sprintf(`{"__CURSOR":"c%d","UNIT":"a.service","INVOCATION_ID":"%032d","__REALTIME_TIMESTAMP":"%d","IP_METRIC_EGRESS_BYTES":"128","IP_METRIC_EGRESS_PACKETS":"1"}`, i, i, ended.UnixMicro())))
	}
	var before Series
	for i := range 4 {
		recorded(i) // all of them ended in the same moment
		s := r.snapshot(time.Now(), time.Now(), false)
		got := want(t, s, "a.service", Counters{EgressBytes: 128 * uint64(i+1), EgressPackets: uint64(i + 1)})
		if !got.Time.After(before.Time) || !got.Time.After(got.Start) {
			t.Errorf("point %d is at %v, the one before at %v, the start at %v", i, got.Time, before.Time, got.Start)
		}
		before = got
	}
}

// TestSettled: what a slice has more than its units waits for as long as their
// stop records may take, however short the interval is.
func TestSettled(t *testing.T) {
	t.Parallel()
	for _, every := range []time.Duration{300 * time.Millisecond, 9 * time.Second, time.Minute} {
		t.Run(every.String(), func(t *testing.T) {
			now := time.Unix(1e9, 0)
			b := balance{turned: now, read: now, recent: all(7)}
			waited := time.Duration(0)
			for b.settled(now.Add(waited)) == (Counters{}) {
				if waited += every; waited > time.Hour {
					t.Fatal("it never settles")
				}
			}
			if waited < settleTime || waited > 2*(settleTime+every) {
				t.Errorf("it settled after %v", waited)
			}
			if left := b.take(all(1)); left != all(1) {
				t.Errorf("something is left: took %v", left)
			}
		})
	}
}

// TestSettledOnBusySlice: what no unit shows becomes unattributed although the
// units of the slice go on growing by far more, and to the byte.
func TestSettledOnBusySlice(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	b := balance{turned: now, read: now}
	var settled, missing Counters
	for i := range 60 {
		old := b.settled(now.Add(time.Duration(i) * time.Second))
		settled, _ = settled.plus(old)
		b.recent, _ = b.recent.plus(all(1010)) // the slice
		if rest := b.take(all(1000)); rest != (Counters{}) {
			t.Fatalf("the units are ahead by %v", rest)
		}
		missing, _ = missing.plus(all(10))
	}
	waiting, _ := b.waiting.plus(b.recent)
	if sum, _ := settled.plus(waiting); sum != missing {
		t.Errorf("settled %v and waiting %v, missing are %v", settled, waiting, missing)
	}
	if settled.EgressBytes < missing.EgressBytes/2 {
		t.Errorf("after a minute only %v of %v are settled", settled, missing)
	}
}

// TestIdleFold: the total of a fold without members is known, so that its point
// is of the sweep. One with the time of the last member would soon be older than
// what a backend takes: Prometheus refuses the whole request for it.
func TestIdleFold(t *testing.T) {
	long := time.Now().Add(-3 * time.Hour)
	const fold = "run-*.service"
	r, err := New(Config{HostName: "host", State: State{Time: long, Series: []Series{
		{Name: fold, Total: all(7), Start: long.Add(-time.Hour), Time: long},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	// Nobody knows of members that systemd could not be asked for.
	now := time.Now()
	s := r.snapshot(now, now, true)
	if got, ok := s.seriesOf(fold); ok {
		t.Errorf("a sweep that was cut short has the point %+v", got)
	}
	s = r.snapshot(now, now, false)
	if got := want(t, s, fold, all(7)); !got.Time.Equal(now) || !got.Start.Equal(long.Add(-time.Hour)) {
		t.Errorf("its point is at %v from %v, the sweep at %v", got.Time, got.Start, now)
	}
}
