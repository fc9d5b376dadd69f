package exporter

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
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

func TestDurableKeepsTheLedger(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	huge := unit("huge.service", at(5), at(100), 1)
	huge.Total.EgressBytes = math.MaxUint64
	want := receiver.State{
		Series: []receiver.Series{unit("a.service", at(0), at(99), 7), unit("", at(1), at(100), 8), huge, unit("unattributed/system.slice", at(2), at(100), 9)},
		Runs: []receiver.Run{
			{Unit: "a.service", Series: "a.service", Epoch: "0123456789abcdef0123456789abcdef", Boot: "b", Last: receiver.Counters{IngressBytes: 1, IngressPackets: 2, EgressBytes: 3, EgressPackets: math.MaxUint64}, Time: at(99)},
			{Unit: "a.service", Series: "a.service", Epoch: "ffffffffffffffffffffffffffffffff", Boot: "b", Time: at(98)},
			{Unit: "init.scope", Series: "", Epoch: "b", Boot: "b", Time: at(97)},
			{Unit: "system.slice", Series: "system.slice", Epoch: "b", Boot: "b", Time: at(97)},
			{Unit: `odd-\x20name.mount`, Series: "", Epoch: "", Boot: "b", Time: at(97)},
		},
		Journal: receiver.Position{Cursor: "s=1;i=2;b=3", Boot: "b"},
	}
	s, d := openStore(t, dir)
	if got := d.State(); len(got.Series)+len(got.Runs) > 0 || !got.Time.IsZero() {
		t.Errorf("the first day begins with %+v", got)
	}
	if err := d.Commit(t.Context(), Cycle{Sweep: receiver.NewSweep(at(100), want)}); err != nil {
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
	byName := map[string]receiver.Series{}
	for _, s := range got.Series {
		byName[s.Name] = s
	}
	for _, s := range want.Series {
		g := byName[s.Name]
		if g.Total != s.Total || !g.Start.Equal(s.Start) || !g.Time.Equal(s.Time) {
			t.Errorf("series %q came back as %+v", s.Name, g)
		}
	}
	byRun := map[string]receiver.Run{}
	for _, r := range got.Runs {
		byRun[r.Unit+"|"+r.Epoch] = r
	}
	for _, r := range want.Runs {
		g := byRun[r.Unit+"|"+r.Epoch]
		if r.Time, g.Time = r.Time.UTC(), g.Time.UTC(); !reflect.DeepEqual(g, r) {
			t.Errorf("run of %q came back as %+v, want %+v", r.Unit, g, r)
		}
	}
	if len(got.Series) != len(want.Series) || len(got.Runs) != len(want.Runs) {
		t.Errorf("%d series and %d runs came back", len(got.Series), len(got.Runs))
	}
	if got.Journal != want.Journal {
		t.Errorf("the position in the journal came back as %+v", got.Journal)
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
	run := func(epoch string, now float64) receiver.Run {
		return receiver.Run{Unit: "a.service", Series: "a.service", Epoch: epoch, Boot: "b", Time: at(now)}
	}
	_, d := openStore(t, filepath.Join(t.TempDir(), "state"))
	for _, cycle := range []struct {
		what   string
		now    float64
		series []receiver.Series
		runs   []receiver.Run
		want   []sample
	}{
		{"the first cycle: nobody knows when", 100,
			[]receiver.Series{unit("a.service", at(0), at(100), 500), unit("", at(0), at(100), 3)}, nil, nil},
		{"growth, a new unit, an older one, one without a point, an account of the receiver", 110,
			[]receiver.Series{unit("a.service", at(0), at(110), 530), unit("", at(0), at(110), 3), unit("new.service", at(105), at(110), 40),
				unit("old.service", at(50), at(110), 999), hidden, unit("ahead/system.slice", at(105), at(110), 1)}, nil,
			[]sample{{"a.service", 30, 10 * time.Second}, {"(overflow)", 0, 10 * time.Second}, {"new.service", 40, 5 * time.Second}}},
		{"no new reading of one", 130,
			[]receiver.Series{unit("a.service", at(0), at(110), 530), unit("old.service", at(50), at(130), 1001)}, nil,
			[]sample{{"old.service", 2, 20 * time.Second}}},
		{"one long interval over a gap", 170,
			[]receiver.Series{unit("a.service", at(0), at(170), 590)}, []receiver.Run{run("one", 170)},
			[]sample{{"a.service", 60, time.Minute}}},
		{"all away, and a new unit", 180,
			[]receiver.Series{unit("gone.service", at(171), at(175), 5000)}, []receiver.Run{run("one", 170)},
			[]sample{{"gone.service", 5000, 4 * time.Second}}},
		{"the same run can be read again", 190,
			[]receiver.Series{unit("a.service", at(0), at(190), 600), gone}, []receiver.Run{run("one", 190)},
			[]sample{{"a.service", 10, 20 * time.Second}}},
		{"nothing", 250, nil, []receiver.Run{run("one", 190)}, nil},
		{"another run, since the last cycle", 260,
			[]receiver.Series{unit("a.service", at(0), at(259), 640)}, []receiver.Run{run("one", 190), run("two", 259)},
			[]sample{{"a.service", 40, 10 * time.Second}}},
		{"a series that was given up, and began anew", 270,
			[]receiver.Series{unit("gone.service", at(262), at(270), 7)}, nil,
			[]sample{{"gone.service", 7, 8 * time.Second}}},
		{"the same, but it began before the last cycle", 280,
			[]receiver.Series{unit("old.service", at(265), at(280), 8)}, nil, nil},
		{"a unit that began during the last sweep", 290,
			[]receiver.Series{unit("during.service", at(279.5), at(290), 9)}, nil,
			[]sample{{"during.service", 9, 10500 * time.Millisecond}}},
	} {
		sweep := receiver.NewSweep(at(cycle.now), receiver.State{Series: cycle.series, Runs: cycle.runs})
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
	s, d := openStore(t, filepath.Join(t.TempDir(), "state"))
	var ids []int64
	for i := range int64(6) {
		if err := d.Commit(t.Context(), Cycle{Request: requestOf(t, 0, i), Points: 1}); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := d.Next(t.Context(), 1<<20)
	if err != nil || len(entries) != 6 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	for i, e := range entries {
		if !bytes.Equal(e.Request, requestOf(t, 0, int64(i))) || e.Points != 1 {
			t.Errorf("entry %d is %+v", i, e)
		}
		ids = append(ids, e.ID)
	}
	outcomes := []Outcome{{ID: ids[0]}, {ID: ids[1]}, {ID: ids[2], Poison: "bad"}, {ID: ids[3], Poison: "bad"}, {ID: ids[4]}}
	for range 2 { // the second time there is nothing left to do
		if err := d.Done(t.Context(), outcomes...); err != nil {
			t.Fatal(err)
		}
	}
	if entries, err = d.Next(t.Context(), 1<<20); err != nil || len(entries) != 1 || entries[0].ID != ids[5] {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := d.Commit(t.Context(), Cycle{Request: requestOf(t, 0, 6), Points: 1}); err != nil {
		t.Fatal(err)
	}
	entries, err = d.Next(t.Context(), 1<<20)
	if err != nil || len(entries) != 2 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	if err := d.Done(t.Context(), Outcome{ID: entries[0].ID}, Outcome{ID: entries[1].ID, Poison: "bad"}); err != nil {
		t.Fatal(err)
	}
	if stats := s.Stats(); stats.Quarantined != 3 || stats.OutboxEntries != 0 {
		t.Errorf("%d requests in quarantine, want 3; %d left, want 0", stats.Quarantined, stats.OutboxEntries)
	}
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
			last = int64(series.Total.IngressBytes)
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
	a := newAgent(t, os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT"), Config{OTLP: &otlp.Config{Protocol: os.Getenv("PROTOCOL")}, Outbox: d, Ledger: d.State()})
	n := uint64(0)
	for _, s := range d.State().Series {
		n = s.Total.IngressBytes
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

func TestDeltaGoesOnAfterARestart(t *testing.T) {
	server := otlptest.Start(t, otlptest.Config{})
	dir := filepath.Join(t.TempDir(), "state")
	for run := range uint64(3) {
		s, d := openStore(t, dir)
		a := newAgent(t, server.URL(), Config{Outbox: d, Ledger: d.State(), Temporality: "delta"})
		if err := d.Register(a.provider.Meter("outbox"), "h"); err != nil {
			t.Fatal(err)
		}
		for i := range uint64(2) {
			n := 2*run + i
			if err := a.cycle(unit("a.service", at(0), at(float64(100+10*n)), 100+10*n), unit("", at(0), at(float64(100+10*n)), 100+n)); err != nil {
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
	for _, name := range []string{"unitmeter.outbox.bytes", "unitmeter.outbox.requests", "unitmeter.outbox.age", "unitmeter.outbox.thinned", "unitmeter.outbox.dropped"} {
		if !names[name] {
			t.Errorf("%s did not arrive", name)
		}
	}
}
