package exporter

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc/codes"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

func openStore(t *testing.T, dir string) (*store.Store, *Durable) {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: dir, Merge: otlp.Merge, OutboxMaxAge: 100 * 365 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	d, err := NewDurable(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return s, d
}

// saved is a state with everything that the store keeps. It has nothing that is
// not restored.
func saved() ledger.State {
	huge := unit("huge.service", at(5), at(100), 1)
	huge.Total.Sent.Bytes = math.MaxUint64
	s := state(
		unit("a.service", at(0), at(99), 7), huge, unit("docker-*.scope", at(3), at(98), 4),
		unit("system.slice", at(4), at(97), 6), // units of slices are metered, and balanced as well
		overflow(at(1), at(100), 8),
		unattributed("machine.slice", at(6), at(95), 11), unattributed("system.slice", at(2), at(100), 9))
	for i := range s.Series {
		s.Series[i].Observed = false
	}
	s.Overflow.Observed = false
	for i := range s.Balances {
		s.Balances[i].Unattributed.Observed = false
	}
	s.Balances[0].Waiting = counters(12)
	s.Balances[1].Ahead = ledger.Counters{Received: ledger.Traffic{Bytes: 1, Packets: 2}, Sent: ledger.Traffic{Bytes: 3, Packets: math.MaxUint64}}
	s.Balances[1].Waiting = counters(13)
	s.Runs = []ledger.Run{
		{Unit: "a.service", Series: "a.service", Epoch: "0123456789abcdef0123456789abcdef", Boot: "b", Last: ledger.Counters{Received: ledger.Traffic{Bytes: 1, Packets: 2}, Sent: ledger.Traffic{Bytes: 3, Packets: math.MaxUint64}}, Time: at(99)},
		{Unit: "a.service", Series: "a.service", Epoch: "ffffffffffffffffffffffffffffffff", Boot: "b", Time: at(98)},
		{Unit: "docker-1.scope", Series: "docker-*.scope", Epoch: "b/docker-1.scope", Boot: "b", Last: counters(4), Time: at(98)},
		{Unit: "init.scope", Overflow: true, Epoch: "b/init.scope", Boot: "b", Last: counters(5), Time: at(97)},
		{Unit: "system.slice", Epoch: "b/system.slice", Boot: "b", Last: counters(6), Time: at(97)}, // only balanced
		{Unit: `odd-\x20name.mount`, Overflow: true, Epoch: "", Boot: "", Time: at(97)},
	}
	s.Time, s.Source, s.Journal = at(100), "ebpf", ledger.Position{Cursor: "s=1;i=2;b=3", Boot: "b"}
	return s
}

// apart is a state with owners and other measures.
func apart() ledger.State {
	labels := ledger.Labels{User: "1000", Runtime: "podman", ContainerID: "0a", ContainerName: "web", Pod: "p-1", Namespace: "shop"}
	of := func(measure ledger.Measure) ledger.State {
		user := ledger.ID{Name: "a.service", Owner: ledger.OwnerOf(ledger.Labels{User: "1000"}), Measure: measure}
		pod := ledger.ID{Name: "run-*.scope", Owner: ledger.OwnerOf(labels), Measure: measure}
		n := uint64(measure) + 1
		s := state(series(ledger.ID{Name: "a.service", Measure: measure}, at(0), at(99), n), series(user, at(1), at(98), 2*n), series(pod, at(2), at(97), 3*n),
			series(ledger.ID{Kind: ledger.Overflow, Measure: measure}, at(3), at(96), 4*n),
			series(ledger.ID{Kind: ledger.Unattributed, Name: "-.slice", Measure: measure}, at(4), at(95), 5*n))
		for series := range s.All() {
			series.Observed = false
		}
		s.Time, s.Measure = at(100), measure
		s.Runs = []ledger.Run{
			{Unit: "a.service", Series: "a.service", Owner: user.Owner, Epoch: "b/cgroup/1/2", Boot: "b", Last: counters(n), Time: at(98)},
			{Unit: "run-1.scope", Series: "run-*.scope", Owner: pod.Owner, Epoch: "b/cgroup/2/3", Boot: "b", Last: counters(n), Time: at(97)},
			{Unit: "b.service", Overflow: true, Epoch: "b/cgroup/3/4", Boot: "b", Last: counters(n), Time: at(96)},
			{Unit: "-.slice", Epoch: "b/cgroup/lost/5", Boot: "b", Last: counters(n), Time: at(95)},
		}
		return s
	}
	s := of(ledger.Total)
	s.Others = []ledger.State{of(ledger.Loopback), of(ledger.WireLoopback)}
	return s
}

func TestStateOfUndoesLedgerOf(t *testing.T) {
	all := saved()
	for name, want := range map[string]ledger.State{
		"nothing":        {},
		"all":            all,
		"overflow":       {Time: at(100), Overflow: all.Overflow},
		"balances":       {Time: at(100), Balances: all.Balances},
		"one balance":    {Time: at(100), Balances: all.Balances[1:]},
		"runs":           {Time: at(100), Runs: all.Runs},
		"source":         {Time: at(100), Source: all.Source},
		"position":       {Journal: all.Journal},
		"no stop so far": {Journal: ledger.Position{Boot: "b"}},
		"apart":          apart(),
	} {
		if got := stateOf(ledgerOf(want)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: came back as %+v, want %+v", name, got, want)
		}
	}
}

func TestDurableKeepsTheLedger(t *testing.T) {
	t.Run("units", func(t *testing.T) { keepsTheLedger(t, saved()) })
	t.Run("apart", func(t *testing.T) { keepsTheLedger(t, apart()) })
}

func keepsTheLedger(t *testing.T, want ledger.State) {
	dir := filepath.Join(t.TempDir(), "state")
	s, d := openStore(t, dir)
	if got := d.State(); !reflect.DeepEqual(got, ledger.State{}) {
		t.Errorf("the first day begins with %+v", got)
	}
	if err := d.Commit(t.Context(), Cycle{Sweep: sweepAt(at(100), want)}); err != nil {
		t.Fatal(err)
	}
	// A cycle without a sweep does not touch the ledger.
	if err := d.Commit(t.Context(), Cycle{Request: requestOf(t, 0, 1), Points: 1}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, d = openStore(t, dir)
	got := d.State()
	want.Time = got.Time // of the second commit
	for i := range want.Others {
		want.Others[i].Time = got.Time
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("came back as\n%+v, want\n%+v", got, want)
	}
}

// A slice that was not read for longer than the store keeps a series loses all of
// its balance: the rest of it says nothing without the total.
func TestDurableGivesUpWholeBalances(t *testing.T) {
	for name, cfg := range map[string]store.Config{
		"by age":    {SeriesMaxAge: 3 * time.Second},
		"by number": {SeriesMax: 8}, // of 5 series, and 3 rows for each balance
		"in part":   {SeriesMax: 10},
	} {
		t.Run(name, func(t *testing.T) {
			cfg.Dir = filepath.Join(t.TempDir(), "state")
			s, err := store.Open(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			d, err := NewDurable(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Commit(t.Context(), Cycle{Sweep: sweepAt(at(100), saved())}); err != nil {
				t.Fatal(err)
			}
			if d, err = NewDurable(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			if got, want := d.State().Balances, saved().Balances[1:]; !reflect.DeepEqual(got, want) {
				t.Errorf("balances %+v, want %+v", got, want)
			}
		})
	}
}

func TestDurableSamples(t *testing.T) {
	type sample struct {
		unit     string
		bytes    uint64
		interval time.Duration
	}
	hidden := unit("hidden.service", at(0), at(110), 90)
	hidden.Observed = false
	gone := unit("gone.service", at(171), at(175), 5000)
	gone.Observed = false
	run := func(epoch string, now float64) ledger.Run {
		return ledger.Run{Unit: "a.service", Series: "a.service", Epoch: epoch, Boot: "b", Time: at(now)}
	}
	over := ledger.Run{Unit: "b.service", Overflow: true, Epoch: "three", Boot: "b", Time: at(259)}
	slice := ledger.Run{Unit: "system.slice", Epoch: "b/system.slice", Boot: "b", Time: at(259)} // of no series
	_, d := openStore(t, filepath.Join(t.TempDir(), "state"))
	for _, cycle := range []struct {
		what   string
		now    float64
		series []ledger.Series
		runs   []ledger.Run
		want   []sample
	}{
		{"the first cycle: nobody knows when", 100,
			[]ledger.Series{unit("a.service", at(0), at(100), 500), overflow(at(0), at(100), 3)}, nil, nil},
		{"growth, a new unit, an older one, one without a point, what is unattributed", 110,
			[]ledger.Series{unit("a.service", at(0), at(110), 530), overflow(at(0), at(110), 3), unit("new.service", at(105), at(110), 40),
				unit("old.service", at(50), at(110), 999), hidden, unattributed("system.slice", at(105), at(110), 1)}, nil,
			[]sample{{"a.service", 30, 10 * time.Second}, {"new.service", 40, 5 * time.Second}, {"(overflow)", 0, 10 * time.Second}}},
		{"no new reading of one", 130,
			[]ledger.Series{unit("a.service", at(0), at(110), 530), unit("old.service", at(50), at(130), 1001)}, nil,
			[]sample{{"old.service", 2, 20 * time.Second}}},
		{"one long interval over a gap", 170,
			[]ledger.Series{unit("a.service", at(0), at(170), 590)}, []ledger.Run{run("one", 170)},
			[]sample{{"a.service", 60, time.Minute}}},
		{"all away, and a new unit", 180,
			[]ledger.Series{unit("gone.service", at(171), at(175), 5000)}, []ledger.Run{run("one", 170)},
			[]sample{{"gone.service", 5000, 4 * time.Second}}},
		{"the same run can be read again", 190,
			[]ledger.Series{unit("a.service", at(0), at(190), 600), gone}, []ledger.Run{run("one", 190)},
			[]sample{{"a.service", 10, 20 * time.Second}}},
		{"nothing", 250, nil, []ledger.Run{run("one", 190)}, nil},
		{"another run, since the last cycle", 260,
			[]ledger.Series{unit("a.service", at(0), at(259), 640), overflow(at(0), at(259), 5)},
			[]ledger.Run{run("one", 190), run("two", 259), over, slice},
			[]sample{{"a.service", 40, 10 * time.Second}, {"(overflow)", 2, 10 * time.Second}}},
		{"a series that was given up, and began anew", 270,
			[]ledger.Series{unit("gone.service", at(262), at(270), 7)}, nil,
			[]sample{{"gone.service", 7, 8 * time.Second}}},
		{"the same, but it began before the last cycle", 280,
			[]ledger.Series{unit("old.service", at(265), at(280), 8)}, nil, nil},
		{"a unit that began during the last sweep", 290,
			[]ledger.Series{unit("during.service", at(279.5), at(290), 9)}, nil,
			[]sample{{"during.service", 9, 10500 * time.Millisecond}}},
	} {
		now := state(cycle.series...)
		now.Runs = cycle.runs
		sweep := sweepAt(at(cycle.now), now)
		sweep.Duration = time.Second
		var got []sample
		for _, s := range d.samples(sweep.State) {
			if want := [4]uint64{s.Delta[0], 3 * s.Delta[0], 2 * s.Delta[0], 4 * s.Delta[0]}; s.Delta != want {
				t.Errorf("%s: sample of %s has %v", cycle.what, s.Unit, s.Delta)
			}
			got = append(got, sample{s.Unit, s.Delta[0], s.Interval})
		}
		if !reflect.DeepEqual(got, cycle.want) {
			t.Errorf("%s: samples %v, want %v", cycle.what, got, cycle.want)
		}
		if err := d.Commit(t.Context(), Cycle{Sweep: sweep}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDurableOutcomes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, d := openStore(t, dir)
	var ids []int64
	for i := range int64(6) {
		if err := d.Commit(t.Context(), Cycle{Request: requestOf(t, 0, i), Points: 1}); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := d.Next(t.Context(), 0, 1<<20)
	if err != nil || len(entries) != 6 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	for i, e := range entries {
		if !bytes.Equal(e.Request, requestOf(t, 0, int64(i))) || e.Points != 1 {
			t.Errorf("entry %d is %+v", i, e)
		}
		ids = append(ids, e.ID)
	}
	outcomes := []Outcome{{ID: ids[0]}, {ID: ids[1]}, {ID: ids[2], Poison: "bad", Refused: requestOf(t, 0, 0)}, {ID: ids[3], Poison: "bad", Refused: requestOf(t, 0, 0)}, {ID: ids[4]}}
	for range 2 { // the second time there is nothing left to do
		if err := d.Done(t.Context(), outcomes...); err != nil {
			t.Fatal(err)
		}
	}
	if entries, err = d.Next(t.Context(), 0, 1<<20); err != nil || len(entries) != 1 || entries[0].ID != ids[5] {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := d.Commit(t.Context(), Cycle{Request: requestOf(t, 0, 6), Points: 1}); err != nil {
		t.Fatal(err)
	}
	entries, err = d.Next(t.Context(), 0, 1<<20)
	if err != nil || len(entries) != 2 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	partial := Partial{Points: 1, Rejected: 1, Message: "old"}
	if err := d.Done(t.Context(), Outcome{ID: entries[0].ID, Partial: partial}); err != nil {
		t.Fatal(err)
	}
	r, err := store.OpenReader(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if p, _, err := r.Partial(t.Context()); err != nil || Partial(p) != partial {
		t.Errorf("the store knows of %+v, %v, want %+v", p, err, partial)
	}
	if err := d.Done(t.Context(), Outcome{ID: entries[0].ID}, Outcome{ID: entries[1].ID, Poison: "bad", Refused: requestOf(t, 0, 0)}); err != nil {
		t.Fatal(err)
	}
	if stats := s.Stats(); stats.Quarantined != 3 || stats.OutboxEntries != 0 {
		t.Errorf("%d requests in quarantine, want 3; %d left, want 0", stats.Quarantined, stats.OutboxEntries)
	}
}

// The points of a request that are refused are set aside, and not those that the
// receiver has taken: sent again, each delta arrives once.
func TestRefusedPointsArriveOnceWhenSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "state")
		s, d := openStore(t, dir)
		var log logged
		var repaired atomic.Bool
		l := &line{t: t, answer: func(values []int64, _ int) otlp.Answer {
			if !repaired.Load() && (slices.Contains(values, 3) || slices.Contains(values, 6)) {
				return refuse(otlp.Suspect, "HTTP 400")
			}
			return otlp.Answer{}
		}}
		sender := l.start(d, &log)
		commit := func(values ...int64) {
			t.Helper()
			if err := d.Commit(t.Context(), Cycle{Request: requestOf(t, 0, values...), Points: len(values)}); err != nil {
				t.Fatal(err)
			}
			sender.kick()
			settle(time.Hour)
		}
		commit(1, 2, 3, 4, 5, 6, 7, 8)
		commit(9)
		if got := slices.Sorted(slices.Values(l.got)); !slices.Equal(got, []int64{1, 2, 4, 5, 7, 8, 9}) {
			t.Errorf("the receiver has %v", got)
		}
		r, err := store.OpenReader(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if q, err := r.Quarantined(t.Context()); err != nil || len(q) != 1 || q[0].Points != 2 {
			t.Errorf("in quarantine: %+v, %v; want one request of two points", q, err)
		}
		repaired.Store(true)
		if n, err := store.Retry(t.Context(), dir); err != nil || n != 1 {
			t.Fatalf("%d requests to send again, %v", n, err)
		}
		commit(10)
		if got := slices.Sorted(slices.Values(l.got)); !slices.Equal(got, []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}) {
			t.Errorf("the receiver has %v, want each once", got)
		}
		if got := s.Stats(); got.Quarantined != 0 || got.OutboxEntries != 0 {
			t.Errorf("%d requests are in quarantine, %d wait", got.Quarantined, got.OutboxEntries)
		}
	})
}

// agentEnv makes the test binary an agent that cycles until it is killed.
const agentEnv = "UNITMETER_TEST_AGENT"

// A real agent process with a real store is killed at any moment, while the
// receiver comes and goes. What arrives must be each committed cycle once and in
// order, but for repeats of the one call in flight at each kill.
func TestKilledAgentLosesNothing(t *testing.T) {
	if dir := os.Getenv(agentEnv); dir != "" {
		runAgent(t, dir)
		return
	}
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		dir := filepath.Join(t.TempDir(), "state")
		cfg.Decide = func(r otlptest.Request) otlptest.Answer {
			if time.Now().UnixMilli()/150%2 == 0 {
				return otlptest.Answer{Code: codes.Unavailable}
			}
			return otlptest.Answer{}
		}
		server := otlptest.Start(t, cfg)
		for i := range 6 {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledAgentLosesNothing$")
			cmd.Env = append(os.Environ(), agentEnv+"="+dir, "OTEL_EXPORTER_OTLP_ENDPOINT="+server.URL(), "PROTOCOL="+protocol)
			var out bytes.Buffer
			cmd.Stderr = &out
			said, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(said)
			for committed := 0; committed < 3; committed++ {
				if !lines.Scan() {
					t.Fatalf("the agent has ended by itself: %v\n%s", cmd.Wait(), out.String())
				}
			}
			time.Sleep(time.Duration(200+37*i) * time.Millisecond)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatalf("the agent has ended by itself: %v\n%s", err, out.String())
			}
			cmd.Wait()
		}
		s, d := openStore(t, dir)
		var last int64 // what the ledger says was committed
		for _, series := range d.State().Series {
			last = int64(series.Total.Received.Bytes)
		}
		exp, err := New(t.Context(), Config{OTLP: to(server.URL(), otlp.Config{Protocol: protocol}), Outbox: d})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := exp.Shutdown(ctx); err != nil {
			t.Fatal(err)
		}
		if left := s.Stats().OutboxEntries; left != 0 {
			t.Fatalf("%d requests are left", left)
		}
		next, repeats, longest := int64(1), 0, int64(0)
		for _, v := range values(server.Points(), receiver.IOName, "a.service", "receive") {
			switch {
			case v == next:
				next++
			case v < next: // a call that was answered but not recorded
				repeats++
				longest = max(longest, next-v)
				next = v + 1
			default:
				t.Fatalf("%d after %d: cycles are missing", v, next-1)
			}
		}
		if next-1 != last || last < 10 {
			t.Errorf("the last cycle that arrived is %d, that of the ledger %d", next-1, last)
		}
		if repeats > 6 {
			t.Errorf("%d repeats in 6 kills", repeats)
		}
		t.Logf("%d cycles, %d calls repeated, the longest with %d cycles", last, repeats, longest)
	})
}

// runAgent is the child: it says each cycle that is committed, until it is killed.
func runAgent(t *testing.T, dir string) {
	_, d := openStore(t, dir)
	a := newAgent(t, os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT"), Config{OTLP: &otlp.Config{Protocol: os.Getenv("PROTOCOL")}, Outbox: d, Sent: d.Sent()})
	n := uint64(0)
	for _, s := range d.State().Series {
		n = s.Total.Received.Bytes
	}
	for {
		n++
		a.see(unit("a.service", at(0), at(float64(n)), n))
		if err := a.Export(t.Context(), collected(a.Last().State.Series...)); err != nil {
			t.Fatal(err)
		}
		fmt.Println("committed", n)
		time.Sleep(3 * time.Millisecond)
	}
}

// An empty outbox has no size, though the frame of the next request is in the file.
func TestOutboxValues(t *testing.T) {
	s, d := openStore(t, filepath.Join(t.TempDir(), "state"))
	request := bytes.Repeat([]byte("request"), 1000)
	for range 2 {
		if err := d.Commit(t.Context(), Cycle{Request: request, Points: 1}); err != nil {
			t.Fatal(err)
		}
	}
	if v := outboxValues(s.Stats()); v[0] == 0 || v[1] != 2 {
		t.Errorf("with two requests: %v", v)
	}
	if err := d.Done(t.Context(), Outcome{ID: 1}, Outcome{ID: 2}); err != nil {
		t.Fatal(err)
	}
	if v := outboxValues(s.Stats()); s.Stats().OutboxBytes == 0 || v[0] != 0 || v[1] != 0 {
		t.Errorf("with none: %v of %+v", v, s.Stats())
	}
}

// After the clock was set back, a delta waits for the next cycle. It arrives even where
// the agent is killed before that, or makes a cycle without a sweep.
func TestWaitingDeltaOutlivesTheAgent(t *testing.T) {
	server := otlptest.Start(t, otlptest.Config{})
	dir := filepath.Join(t.TempDir(), "state")
	owned := ledger.ID{Name: "b.service", Owner: ledger.OwnerOf(ledger.Labels{User: "1000"})}
	fresh := unit("fresh.service", at(0), at(0), 7) // has no interval yet
	fresh.Observed = false
	run := func(f func(a *agent, see func(n uint64, now float64))) {
		t.Helper()
		s, d := openStore(t, dir)
		a := newAgent(t, server.URL(), Config{Outbox: d, Sent: d.Sent(), Temporality: "delta"})
		f(a, func(n uint64, now float64) {
			t.Helper()
			if err := a.cycle(unit("a.service", at(0), at(now), n), series(owned, at(0), at(now), n), overflow(at(0), at(now), n),
				unattributed("system.slice", at(0), at(now), n), fresh); err != nil {
				t.Fatal(err)
			}
		})
		if err := errors.Join(a.Exporter.Shutdown(t.Context()), s.Close()); err != nil {
			t.Fatal(err)
		}
	}
	run(func(_ *agent, see func(uint64, float64)) { see(100, 100); see(130, 40) })
	run(func(a *agent, _ func(uint64, float64)) { // it is killed before its first sweep
		if err := a.Export(t.Context(), &metricdata.ResourceMetrics{}); err != nil {
			t.Fatal(err)
		}
	})
	run(func(_ *agent, see func(uint64, float64)) {
		see(150, 50)
		fresh.Observed, fresh.Time = true, at(60)
		see(160, 60)
	})
	want := map[string]string{"a.service": "[100 50 10]", "fresh.service": "[7]"}
	for unit, want := range want {
		if got := fmt.Sprint(values(server.Points(), receiver.IOName, unit, "receive")); got != want {
			t.Errorf("deltas of %s are %s, want %s", unit, got, want)
		}
	}
	sums := map[string]int64{}
	for _, p := range server.Points() {
		if p.Metric == receiver.IOName && p.Attrs["network.io.direction"] == "receive" {
			sums[p.Series()] += p.Value
		}
	}
	total := int64(0)
	for _, sum := range sums {
		total += sum
	}
	if total != 3*160+7 { // the unattributed are another metric
		t.Errorf("the deltas sum up to %d: %v", total, sums)
	}
}

func TestDeltaGoesOnAfterARestart(t *testing.T) {
	server := otlptest.Start(t, otlptest.Config{})
	dir := filepath.Join(t.TempDir(), "state")
	for run := range uint64(3) {
		s, d := openStore(t, dir)
		a := newAgent(t, server.URL(), Config{Outbox: d, Sent: d.Sent(), Temporality: "delta"})
		if err := d.Register(a.provider.Meter("outbox"), "h"); err != nil {
			t.Fatal(err)
		}
		for i := range uint64(2) {
			n := 2*run + i
			if err := a.cycle(unit("a.service", at(0), at(float64(100+10*n)), 100+10*n), overflow(at(0), at(float64(100+10*n)), 100+n), unattributed("system.slice", at(0), at(float64(100+10*n)), 100+n)); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.Exporter.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := fmt.Sprint(values(server.Points(), receiver.IOName, "a.service", "receive")); got != "[100 10 10 10 10 10]" {
		t.Errorf("deltas %s", got)
	}
	names := map[string]bool{}
	for _, p := range server.Points() {
		names[p.Metric] = true
		if !p.Start.Before(p.Time) && !p.Start.IsZero() {
			t.Errorf("no interval: %v", p)
		}
	}
	for _, name := range []string{"unitmeter.outbox.bytes", "unitmeter.outbox.requests", "unitmeter.outbox.age", "unitmeter.outbox.thinned", "unitmeter.outbox.dropped", "unitmeter.state.replaced"} {
		if !names[name] {
			t.Errorf("%s did not arrive", name)
		}
	}
}
