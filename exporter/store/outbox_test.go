package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/history"
)

// numbered returns a request that names the given cycles and is hard to
// record.Compress.
func numbered(r *rand.Rand, size int, cycles ...int) []byte {
	var b bytes.Buffer
	for _, c := range cycles {
		fmt.Fprintf(&b, "%d ", c)
	}
	b.WriteByte('\n')
	for range size {
		b.WriteByte(byte(r.Uint32()))
	}
	return b.Bytes()
}

// cyclesOf returns which cycles a request names.
func cyclesOf(t testing.TB, request []byte) (out []int) {
	t.Helper()
	head, _, _ := bytes.Cut(request, []byte("\n"))
	for _, word := range strings.Fields(string(head)) {
		n, err := strconv.Atoi(word)
		if err != nil {
			t.Fatalf("request begins with %q", head)
		}
		out = append(out, n)
	}
	return out
}

// mergeNumbered names the cycles of both and keeps the newer content. It says
// that one point of each cycle but the newest is left beside its seven.
func mergeNumbered(older, newer []byte) ([]byte, int, error) {
	head, _, _ := bytes.Cut(older, []byte("\n"))
	merged := append(append([]byte(nil), head...), newer...)
	cycles, _, _ := bytes.Cut(merged, []byte("\n"))
	return merged, 6 + len(bytes.Fields(cycles)), nil
}

// A random walk over all calls, with restarts, against what must hold: each
// cycle is delivered once and in order, or is counted as dropped or in
// quarantine; and the ledger and the history are what was committed.
func TestRandomCalls(t *testing.T) {
	inMemory(t)
	for _, seed := range []uint64{1, 2, 3} {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { randomCalls(t, seed) })
	}
}

func randomCalls(t *testing.T, seed uint64) {
	ctx, r := t.Context(), rand.New(rand.NewPCG(seed, 0))
	now := time.Date(2026, 11, 1, 22, 0, 0, 0, time.UTC)
	cfg := Config{
		Dir: filepath.Join(t.TempDir(), "state"), OutboxMaxBytes: 40 << 10, OutboxMaxAge: 20 * time.Hour,
		Merge: mergeNumbered, Now: func() time.Time { return now }, SeriesMaxAge: 100 * 365 * 24 * time.Hour,
	}
	switch seed % 3 {
	case 1:
		cfg.Merge = nil // the older cycle is given up, and counted as thinned
	case 2:
		cfg.OutboxMaxBytes = 1 << 30
	}
	s := openTest(t, cfg)
	var ledger Ledger
	var leased []Entry
	var stats Stats // of the stores that were closed
	cycle, last, delivered, quarantined := 0, 0, 0, 0
	usage := [4]uint64{}
	deliver := func(e Entry) {
		for _, n := range cyclesOf(t, e.Request) {
			if n <= last {
				t.Fatalf("cycle %d comes after cycle %d", n, last)
			}
			last = n
			delivered++
		}
	}
	for range 500 {
		now = now.Add(time.Duration(r.IntN(120)) * time.Second)
		switch r.IntN(12) {
		default:
			cycle++
			ledger = randomLedger(r, ledger, now)
			c := Cycle{Time: now, Ledger: ledger, Request: numbered(r, 200+r.IntN(2500), cycle), Points: 10}
			for i := range r.IntN(4) {
				sample := history.Sample{Unit: fmt.Sprintf("u%d.service", i), Time: now, Delta: [4]uint64{r.Uint64N(1e9), 1, 2, 3}, Interval: time.Second}
				usage = add(usage, sample.Delta)
				c.Samples = append(c.Samples, sample)
			}
			if err := s.Commit(ctx, c); err != nil {
				t.Fatal(err)
			}
		case 0:
			var err error
			if leased, err = s.Next(ctx, r.IntN(20_000)); err != nil {
				t.Fatal(err)
			}
		case 1, 2:
			if len(leased) == 0 {
				continue
			}
			n := r.IntN(len(leased)) + 1
			for _, e := range leased[:n] {
				deliver(e)
			}
			if err := s.Ack(ctx, leased[n-1].ID); err != nil {
				t.Fatal(err)
			}
			leased = leased[n:]
		case 3:
			if len(leased) == 0 || r.IntN(4) != 0 {
				continue
			}
			// By age it may have been dropped already.
			err := s.Quarantine(ctx, leased[0], "refused")
			if err == nil {
				quarantined += len(cyclesOf(t, leased[0].Request))
			} else if !strings.Contains(err.Error(), "not in the outbox") {
				t.Fatal(err)
			}
			leased = leased[1:]
		case 4:
			if r.IntN(5) != 0 {
				continue
			}
			st := s.Stats()
			stats.Thinned, stats.Dropped = stats.Thinned+st.Thinned, stats.Dropped+st.Dropped
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			leased = nil
			s = openTest(t, cfg)
			if again := s.Stats(); again.OutboxBytes != st.OutboxBytes || again.OutboxEntries != st.OutboxEntries || !again.OldestTime.Equal(st.OldestTime) || again.Quarantined != st.Quarantined {
				t.Fatalf("after opening again %+v, before %+v", again, st)
			}
		}
		got, err := s.Ledger(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := sameLedger(got, ledger); err != nil {
			t.Fatal(err)
		}
		// One request and its frame more than the bound.
		if st := s.Stats(); st.OutboxBytes > cfg.OutboxMaxBytes*5/4+6000 {
			t.Fatalf("outbox has %d bytes, the bound is %d", st.OutboxBytes, cfg.OutboxMaxBytes)
		}
	}
	for {
		entries, err := s.Next(ctx, 10_000)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			deliver(e)
		}
		if err := s.Ack(ctx, entries[len(entries)-1].ID); err != nil {
			t.Fatal(err)
		}
	}
	st := s.Stats()
	gone := int(stats.Dropped + st.Dropped)
	if cfg.Merge == nil {
		gone += int(stats.Thinned + st.Thinned)
	}
	if delivered+quarantined+gone != cycle {
		t.Errorf("of %d cycles %d were delivered, %d quarantined, %d dropped or thinned: %d are missing",
			cycle, delivered, quarantined, gone, cycle-delivered-quarantined-gone)
	}
	if full := cfg.OutboxMaxBytes < 1<<20; full != (stats.Thinned+st.Thinned > 0) {
		t.Errorf("thinned %d cycles with a bound of %d bytes", stats.Thinned+st.Thinned, cfg.OutboxMaxBytes)
	}
	if st.OutboxEntries != 0 || !st.OldestTime.IsZero() {
		t.Errorf("drained outbox: %+v", st)
	}
	t.Logf("cycles %d, delivered %d, quarantined %d, thinned %d, dropped %d", cycle, delivered, quarantined, stats.Thinned+st.Thinned, stats.Dropped+st.Dropped)

	reader, err := OpenReader(ctx, cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	answer, err := reader.History(ctx, history.Query{})
	if err != nil || answer.Damaged != 0 {
		t.Fatal(answer.Damaged, err)
	}
	got := [4]uint64{}
	for _, u := range answer.Units {
		got = add(got, u.Steps[0].Total)
	}
	if got != usage {
		t.Errorf("history adds up to %v, want %v", got, usage)
	}
}

// A Collector that is up must not make each request a frame of its own.
func TestFrameOutlivesDelivery(t *testing.T) {
	h := newHost(50, 5, 10*time.Second)
	s := openTest(t, Config{Now: func() time.Time { return h.now }})
	for i := range frameMaxUses {
		if err := s.Commit(t.Context(), h.cycle()); err != nil {
			t.Fatal(err)
		}
		entries, err := s.Next(t.Context(), 1<<20)
		if err != nil || len(entries) != 1 {
			t.Fatal(len(entries), err)
		}
		if err := s.Ack(t.Context(), entries[0].ID); err != nil {
			t.Fatal(err)
		}
		if s.outbox.lastFrame != 1 || len(s.outbox.frames) > 2 {
			t.Fatalf("cycle %d: frame %d, %d frames kept", i, s.outbox.lastFrame, len(s.outbox.frames))
		}
	}
	if err := s.Commit(t.Context(), h.cycle()); err != nil {
		t.Fatal(err)
	}
	var frames int
	if err := s.db.Row("SELECT count(*) FROM frame", nil, &frames); err != nil || frames != 1 || s.outbox.lastFrame != 2 {
		t.Fatalf("%d frames, newest %d, %v; want only the second", frames, s.outbox.lastFrame, err)
	}
}

// What the sender holds must not be merged into something it would send again.
func TestThinningLeavesLeasedAlone(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	s := openTest(t, Config{OutboxMaxBytes: 30 << 10, Merge: mergeNumbered, Now: func() time.Time { return now }})
	commit := func(n int) {
		now = now.Add(time.Second)
		if err := s.Commit(t.Context(), Cycle{Time: now, Request: numbered(r, 500, n)}); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 10 {
		commit(n)
	}
	leased, err := s.Next(t.Context(), 3000)
	if err != nil || len(leased) < 3 {
		t.Fatal(len(leased), err)
	}
	for n := range 100 {
		commit(10 + n)
	}
	if s.Stats().Thinned == 0 {
		t.Fatal("nothing was thinned")
	}
	again, err := s.Next(t.Context(), 3000)
	if err != nil || len(again) != len(leased) {
		t.Fatalf("%d entries, then %d, %v", len(leased), len(again), err)
	}
	for i := range leased {
		if again[i].ID != leased[i].ID || !bytes.Equal(again[i].Request, leased[i].Request) {
			t.Errorf("entry %d was %d and is %d", i, leased[i].ID, again[i].ID)
		}
	}
}

func TestThinningKeepsResolutionOfTheNewest(t *testing.T) {
	inMemory(t)
	r := rand.New(rand.NewPCG(1, 2))
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	s := openTest(t, Config{OutboxMaxBytes: 100 << 10, Merge: mergeNumbered, Now: func() time.Time { return now }})
	const cycles = 260
	for n := range cycles {
		now = now.Add(10 * time.Second)
		if err := s.Commit(t.Context(), Cycle{Time: now, Request: numbered(r, 500, n), Points: 7}); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := s.Next(t.Context(), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	next, points := 0, int64(0)
	var sizes []int
	for _, e := range entries {
		names := cyclesOf(t, e.Request)
		if points += int64(e.Points); e.Points != 6+len(names) {
			t.Errorf("entry of %d cycles has %d points", len(names), e.Points)
		}
		sizes = append(sizes, len(names))
		for _, n := range names {
			if n != next {
				t.Fatalf("cycle %d, want %d", n, next)
			}
			next++
		}
		if want := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(next) * 10 * time.Second); !e.Time.Equal(want) {
			t.Errorf("entry that ends with cycle %d has time %v, want %v", next-1, e.Time, want)
		}
	}
	st := s.Stats()
	if next != cycles || st.Dropped != 0 || st.Thinned != int64(cycles-len(entries)) || points+st.ThinnedPoints != 7*cycles {
		t.Errorf("%d cycles of %d, %d entries, %+v", next, cycles, len(entries), st)
	}
	if sizes[0] < 2 || sizes[len(sizes)-1] != 1 {
		t.Errorf("cycles merged, oldest first: %v", sizes)
	}
}

func TestMergeThatFailsDropsInstead(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 3))
	var log bytes.Buffer
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	s := openTest(t, Config{
		OutboxMaxBytes: 20 << 10, Now: func() time.Time { return now }, Logger: slog.New(slog.NewTextHandler(&log, nil)),
		Merge: func(older, newer []byte) ([]byte, int, error) { return nil, 0, errors.New("not a request") },
	})
	for n := range 100 {
		now = now.Add(time.Second)
		if err := s.Commit(t.Context(), Cycle{Time: now, Request: numbered(r, 500, n), Points: 3}); err != nil {
			t.Fatal(err)
		}
	}
	st := s.Stats()
	if st.Thinned != 0 || st.Dropped == 0 || st.DroppedPoints != 3*st.Dropped || st.Dropped+st.OutboxEntries != 100 || st.OutboxBytes > 22<<10 {
		t.Errorf("%+v", st)
	}
	if n := strings.Count(log.String(), "cycles cannot be merged"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
	if n := strings.Count(log.String(), "msg=\"outbox is full: dropping"); n != 1 {
		t.Errorf("dropping logged %d times:\n%s", n, log.String())
	}
}

func TestAge(t *testing.T) {
	inMemory(t)
	r := rand.New(rand.NewPCG(1, 4))
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	s := openTest(t, Config{OutboxMaxAge: time.Hour, Now: func() time.Time { return now }})
	commit := func() {
		if err := s.Commit(t.Context(), Cycle{Time: now, Request: numbered(r, 500, 1)}); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		now = now.Add(10 * time.Second)
		commit()
	}
	real := now
	now = now.AddDate(10, 0, 0) // a clock that jumps for one cycle
	commit()
	now = real
	for range 10 {
		now = now.Add(10 * time.Second)
		commit()
	}
	if st := s.Stats(); st.Dropped != dropSteps {
		t.Errorf("a jump of the clock dropped %d cycles, want %d", st.Dropped, dropSteps)
	}
	for range 400 {
		now = now.Add(10 * time.Second)
		commit()
	}
	// An hour of cycles, and the one from the future.
	if st := s.Stats(); st.OutboxEntries < 360 || st.OutboxEntries > 362 {
		t.Errorf("%d entries after an hour of 360 and more", st.OutboxEntries)
	}
}

func TestQuarantine(t *testing.T) {
	inMemory(t)
	r := rand.New(rand.NewPCG(1, 5))
	dir := filepath.Join(t.TempDir(), "state")
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	var log bytes.Buffer
	s := openTest(t, Config{Dir: dir, Now: func() time.Time { return now }, Logger: testLogger(&log)})
	for n := range quarantineMax + 5 {
		now = now.Add(time.Second)
		if err := s.Commit(t.Context(), Cycle{Time: now, Request: numbered(r, 2000, n), Points: 9}); err != nil {
			t.Fatal(err)
		}
		entries, err := s.Next(t.Context(), 0)
		if err != nil || len(entries) != 1 || cyclesOf(t, entries[0].Request)[0] != n {
			t.Fatal(entries, err)
		}
		if err := s.Quarantine(t.Context(), entries[0], strings.Repeat("bad \xff", 1000)); err != nil {
			t.Fatal(err)
		}
		if err := s.Quarantine(t.Context(), entries[0], "again"); err == nil {
			t.Fatal("quarantined twice")
		}
	}
	if st := s.Stats(); st.Quarantined != quarantineMax || st.OutboxEntries != 0 {
		t.Errorf("%+v", st)
	}
	reader, err := OpenReader(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	list, err := reader.Quarantined(t.Context())
	if err != nil || len(list) != quarantineMax {
		t.Fatal(len(list), err)
	}
	if !strings.Contains(log.String(), "quarantine is full") {
		t.Errorf("the log:\n%s", &log)
	}
	if q := list[quarantineMax-1]; !q.At.Equal(now) || !q.Time.Equal(now) || q.Points != 9 || !strings.HasPrefix(q.Reason, "bad ?") || len(q.Reason) > quarantineReason || q.Bytes < 2000 {
		t.Errorf("%+v", q)
	}
}

// A request whose bytes rotted on disk must not block those after it.
// Requests that a person wants to be sent again come after those that wait, with
// the next cycle or after the next start. They are neither merged nor too old.
func TestRetry(t *testing.T) {
	inMemory(t)
	dir := filepath.Join(t.TempDir(), "state")
	now := clock()
	cfg := Config{Dir: dir, Now: func() time.Time { return now }}
	s := openTest(t, cfg)
	r := rand.New(rand.NewPCG(1, 6))
	commit := func(n int) {
		t.Helper()
		now = now.Add(10 * time.Second)
		if err := s.Commit(t.Context(), Cycle{Time: now, Request: numbered(r, 2000, n), Points: n}); err != nil {
			t.Fatal(err)
		}
	}
	waiting := func(want ...int) []Entry {
		t.Helper()
		entries, err := s.Next(t.Context(), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		var got []int
		for _, e := range entries {
			got = append(got, cyclesOf(t, e.Request)...)
		}
		if !slices.Equal(got, want) {
			t.Errorf("waiting %v, want %v", got, want)
		}
		return entries
	}
	retry := func(want int) {
		t.Helper()
		if n, err := Retry(t.Context(), dir); err != nil || n != want {
			t.Errorf("%d requests, %v; want %d", n, err, want)
		}
	}
	retry(0)
	for n := 1; n <= 3; n++ {
		commit(n)
		if err := s.Quarantine(t.Context(), waiting(n)[0], "refused"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.db.Exec("UPDATE quarantine SET body = substr(body, 1, 100) WHERE points = 2"); err != nil {
		t.Fatal(err)
	}
	retry(3)
	waiting()
	now = now.Add(30 * 24 * time.Hour)
	commit(4)
	waiting(4, 1, 3)
	if got := s.Stats(); got.Quarantined != 1 || got.Dropped != 0 {
		t.Errorf("%+v", got)
	}
	s.Close()
	s = openTest(t, cfg) // nothing is lent to the sender now, and the outbox is full
	s.cfg.OutboxMaxBytes = s.outbox.bytes + 1000
	commit(5)
	entries := waiting(1, 3, 5)
	if got := s.Stats(); got.Thinned != 1 || got.Dropped != 0 {
		t.Errorf("%+v", got)
	}
	// Refused again, and again sent.
	if err := errors.Join(s.Ack(t.Context(), entries[0].ID), s.Quarantine(t.Context(), entries[1], "refused")); err != nil {
		t.Fatal(err)
	}
	retry(2)
	s.Close()
	s = openTest(t, cfg)
	commit(6)
	waiting(5, 6, 3)
}

func TestDamagedRequest(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 6))
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	s := openTest(t, Config{Now: func() time.Time { return now }})
	for n := range 5 {
		if err := s.Commit(t.Context(), Cycle{Time: now, Request: numbered(r, 2000, n)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.db.Exec("UPDATE outbox SET body = substr(body, 1, 40) || x'00' || substr(body, 42) WHERE id = 2"); err != nil {
		t.Fatal(err)
	}
	entries, err := s.Next(t.Context(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	for _, e := range entries {
		got = append(got, cyclesOf(t, e.Request)...)
	}
	if fmt.Sprint(got) != "[0 2 3 4]" || s.Stats().Quarantined != 1 {
		t.Errorf("delivered %v, %+v", got, s.Stats())
	}
}

func TestAckOfUnknown(t *testing.T) {
	s := openTest(t, Config{})
	if err := s.Ack(t.Context(), 1); err == nil {
		t.Error("an id that was never handed out was acknowledged")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Commit(ctx, Cycle{Time: time.Now()}); !errors.Is(err, context.Canceled) {
		t.Errorf("commit with a context that is done: %v", err)
	}
	s.Close()
	if err := s.Commit(t.Context(), Cycle{Time: time.Now()}); !errors.Is(err, ErrClosed) {
		t.Errorf("commit after close: %v", err)
	}
}

func TestBacklog(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := openTest(t, Config{Dir: dir, Now: clock})
	backlog := func() Backlog {
		r, err := OpenReader(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		b, err := r.Backlog(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for n := range 5 {
		commitNumbered(t, s, n+1)
	}
	st := s.Stats()
	if got, want := backlog(), (Backlog{Requests: 5, Bytes: st.OutboxBytes, Oldest: numberedCycle(1).Time}); got.Requests != want.Requests || got.Bytes != want.Bytes || !got.Oldest.Equal(want.Oldest) {
		t.Errorf("backlog %+v, want %+v", got, want)
	}
	entries, err := s.Next(t.Context(), 1<<20)
	if err != nil || len(entries) != 5 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	if err := s.Ack(t.Context(), entries[1].ID); err != nil {
		t.Fatal(err)
	}
	if got := backlog(); got.Requests != 3 || !got.Oldest.Equal(numberedCycle(3).Time) {
		t.Errorf("after two deliveries: backlog %+v", got)
	}
	if err := s.Ack(t.Context(), entries[4].ID); err != nil {
		t.Fatal(err)
	}
	if got := backlog(); got != (Backlog{}) {
		t.Errorf("after all deliveries: backlog %+v", got)
	}
}

func TestPartial(t *testing.T) {
	dir, t0 := filepath.Join(t.TempDir(), "state"), time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	now := t0
	s, err := Open(t.Context(), Config{Dir: dir, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	want := func(want Partial, since time.Time) {
		t.Helper()
		r, err := OpenReader(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if p, at, err := r.Partial(t.Context()); err != nil || p != want || !at.Equal(since) {
			t.Errorf("%+v since %v, %v; want %+v since %v", p, at, err, want, since)
		}
	}
	note := func(p Partial) {
		t.Helper()
		if err := s.NotePartial(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		now = now.Add(time.Hour)
	}
	want(Partial{}, time.Time{})
	note(Partial{Points: 3, Rejected: 2, Message: "no"})
	note(Partial{Points: 4, Rejected: 4, Message: "no"})
	want(Partial{Points: 4, Rejected: 4, Message: "no"}, t0)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(t.Context(), Config{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	note(Partial{})
	want(Partial{}, time.Time{})
}
