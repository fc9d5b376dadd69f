package store

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/history"
)

var full = flag.Bool("full", false, "run the size tests over their whole time: a day of outage, three weeks of history")

// A day of a Collector's absence at 10 s and 1,000 units, one in ten active,
// must fit in 400 MB. Without -full half an hour is extrapolated.
func TestOutageSize(t *testing.T) {
	inMemory(t)
	const day = 24 * 360
	cycles := day / 48
	if *full {
		cycles = day
	} else if raceEnabled {
		cycles = 20
	}
	h := newHost(1000, 100, 10*time.Second)
	dir := filepath.Join(t.TempDir(), "state")
	s := openTest(t, Config{Dir: dir, OutboxMaxBytes: 1 << 40, Now: func() time.Time { return h.now }})
	for range cycles {
		if err := s.Commit(t.Context(), h.cycle()); err != nil {
			t.Fatal(err)
		}
	}
	st, file := s.Stats(), sizesOf(t, s)
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	perDay := file.all * day / int64(cycles)
	t.Logf("%d cycles: outbox %d bytes, file %d, history %d, a day %d MB; heap in use %d MB",
		cycles, st.OutboxBytes, file.all, file.history, perDay>>20, m.HeapInuse>>20)
	if perDay > 400e6 && !raceEnabled {
		t.Errorf("a day of outage needs %d bytes on disk, want at most 400 MB", perDay)
	}
	// A start with all that in the outbox finds the same sums.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	opening := time.Now()
	s = openTest(t, Config{Dir: dir, OutboxMaxBytes: 1 << 40, Now: func() time.Time { return h.now }})
	t.Logf("opened in %v", time.Since(opening).Round(time.Millisecond))
	if again := s.Stats(); again.OutboxBytes != st.OutboxBytes || again.OutboxEntries != st.OutboxEntries {
		t.Errorf("after a start %+v, before %+v", again, st)
	}
	// Drained in pieces of the size that a server takes; then the file shrinks.
	began, points := time.Now(), 0
	for {
		entries, err := s.Next(t.Context(), 3<<20)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			points += e.Points
		}
		if err := s.Ack(t.Context(), entries[len(entries)-1].ID); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("drained %d points in %v", points, time.Since(began).Round(time.Millisecond))
	if points != cycles*4000 {
		t.Errorf("%d points came out of %d cycles", points, cycles)
	}
	for range 60 {
		c := h.cycle()
		c.Request = nil
		if err := s.Commit(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	file = sizesOf(t, s)
	t.Logf("after the drain: file %d bytes, of that free %d, history %d", info.Size(), file.free, file.history)
	if !*full && file.free > 6<<20 {
		t.Errorf("%d bytes of the file are still free", file.free)
	}
}

// An outbox that is full stays within its bound on disk, also the file itself.
func TestFullOutboxOnDisk(t *testing.T) {
	inMemory(t)
	h := newHost(100, 100, 10*time.Second)
	dir := filepath.Join(t.TempDir(), "state")
	const bound = 512 << 10
	s := openTest(t, Config{Dir: dir, OutboxMaxBytes: bound, History: -1, Now: func() time.Time { return h.now }})
	cycles := 800
	if raceEnabled {
		cycles = 400
	}
	for range cycles {
		if err := s.Commit(t.Context(), h.cycle()); err != nil {
			t.Fatal(err)
		}
	}
	st, file := s.Stats(), sizesOf(t, s)
	if st.OutboxBytes > bound+64<<10 || file.all > bound+6<<20 || st.Thinned == 0 || st.Dropped != 0 {
		t.Errorf("%+v, file %+v", st, file)
	}
	wal, err := os.Stat(filepath.Join(dir, fileName+"-wal"))
	if err != nil || wal.Size() > 8<<20 {
		t.Errorf("log has %d bytes, %v", wal.Size(), err)
	}
	t.Logf("%+v, file %+v, log %d bytes", st, file, wal.Size())
}

// Three weeks of minutes of 1,000 units. Without -full a day is extrapolated.
func TestHistorySize(t *testing.T) {
	for _, test := range []struct {
		active int
		want   int64
	}{{1000, 300e6}, {100, 60e6}} {
		t.Run(fmt.Sprint("active=", test.active), func(t *testing.T) {
			hours := 24
			if *full {
				hours = 21 * 24
			} else if raceEnabled {
				hours = 3
			}
			_, s, took := historyOf(t, hours, test.active)
			history := sizesOf(t, s).history
			size := history * 21 * 24 / int64(hours)
			slices.Sort(took)
			t.Logf("%d hours: %d bytes, three weeks %d MB; append p50 %v p99 %v max %v", hours, history, size/1e6,
				took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
			if size > test.want && !raceEnabled {
				t.Errorf("three weeks need %d bytes, want at most %d", size, test.want)
			}
		})
	}
}

// historyOf makes a store with hours of minutes of 1,000 units, of which the
// given number, always the same, have traffic.
func historyOf(t testing.TB, hours, active int) (dir string, s *Store, took []time.Duration) {
	inMemory(t)
	h := newHost(1000, 0, time.Minute)
	dir = filepath.Join(t.TempDir(), "state")
	s = openTest(t, Config{Dir: dir, Now: func() time.Time { return h.now }})
	last := make([]time.Time, len(h.units))
	samples := make([]history.Sample, len(h.units))
	for range hours * 60 {
		// A sweep begins within some ms of its time and takes 110 ms.
		h.now = h.now.Add(time.Minute)
		begin := h.now.Add(time.Duration(h.rand.Int64N(int64(8 * time.Millisecond))))
		for i, unit := range h.units {
			at := begin.Add(time.Duration(i) * 110 * time.Microsecond)
			samples[i] = history.Sample{Unit: unit, Time: at, Interval: time.Minute}
			if !last[i].IsZero() {
				samples[i].Interval = at.Sub(last[i])
			}
			last[i] = at
			if i < active {
				samples[i].Delta = h.traffic(i)
			}
		}
		began := time.Now()
		commitSamples(t, s, h.now, samples...)
		took = append(took, time.Since(began))
	}
	return dir, s, took
}

func BenchmarkHistoryAppend(b *testing.B) {
	// Each op is a day, so that roll-ups are in it.
	for b.Loop() {
		_, _, took := historyOf(b, 24, 1000)
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "max-ms")
	}
}

func BenchmarkHistoryQuery(b *testing.B) {
	dir, _, _ := historyOf(b, 72, 1000)
	r, err := OpenReader(b.Context(), dir)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	start := newHost(1, 0, time.Minute).now
	for name, q := range map[string]history.Query{
		"unit,minutes": {Units: []string{"worker-1.service"}, Periods: every(time.Minute, start, 72*60)},
		"all,one sum":  {},
		"all,hours":    {Periods: every(time.Hour, start, 72)},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if u, err := r.History(b.Context(), q); err != nil || len(u.Units) == 0 {
					b.Fatal(len(u.Units), err)
				}
			}
		})
	}
}

// sizes are bytes of the file without its log.
type sizes struct{ all, free, history int64 }

// sizesOf counts what the ledger and the quarantine need, which is little, to the
// history.
func sizesOf(t *testing.T, s *Store) sizes {
	t.Helper()
	pages, free, size, err := s.db.Pages()
	if err != nil {
		t.Fatal(err)
	}
	all := pages * size
	free *= size
	return sizes{all, free, max(0, all-free-s.outbox.bytes)}
}
