package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTest opens a store that ends with the test.
func openTest(t testing.TB, cfg Config) *Store {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(t.TempDir(), "state")
	}
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// inMemory has TempDir in memory from now on, where the machine offers that. It is for
// tests of many commits in which what a disk loses is not the point.
func inMemory(t testing.TB) {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		t.Setenv("TMPDIR", "/dev/shm")
	}
}

func TestSeriesAreForgotten(t *testing.T) {
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	s := openTest(t, Config{SeriesMax: 4, SeriesMaxAge: time.Hour})
	// Alive is a series whose kind and key a run names; the last run has none.
	l := Ledger{Runs: []Run{{Key: "r", SeriesKind: 1, Series: "old but alive"}, {Key: "s"}}}
	for key, age := range map[string]time.Duration{
		"old": 61 * time.Minute, "old but alive": 62 * time.Minute, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5,
	} {
		l.Series = append(l.Series, Series{Kind: 1, Key: key, Seen: now.Add(-age)})
	}
	l.Series = append(l.Series,
		Series{Kind: 2, Key: "old but alive", Seen: now.Add(-62 * time.Minute)}, Series{Kind: 2, Key: "", Seen: now.Add(-62 * time.Minute)})
	if err := s.Commit(t.Context(), Cycle{Time: now, Ledger: l}); err != nil {
		t.Fatal(err)
	}
	got, err := s.Ledger(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, s := range got.Series {
		keys = append(keys, fmt.Sprintf("%d %s", s.Kind, s.Key))
	}
	slices.Sort(keys)
	if want := []string{"1 a", "1 b", "1 c", "1 old but alive"}; !slices.Equal(keys, want) {
		t.Errorf("kept %q, want %q", keys, want)
	}
	if len(l.Series) != 9 {
		t.Error("the caller's slice was changed")
	}
}

func BenchmarkCommit4000Points(b *testing.B) {
	for _, active := range []int{100, 1000} {
		b.Run(map[int]string{100: "active=10%", 1000: "active=100%"}[active], func(b *testing.B) {
			h := newHost(1000, active, 10*time.Second)
			s := openTest(b, Config{Now: func() time.Time { return h.now }})
			var took []time.Duration
			var cpu time.Duration
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				c := h.cycle()
				b.StartTimer()
				began, used := time.Now(), cpuTime(b)
				if err := s.Commit(b.Context(), c); err != nil {
					b.Fatal(err)
				}
				took, cpu = append(took, time.Since(began)), cpu+cpuTime(b)-used
				b.StopTimer()
				// The Collector is up: each request is delivered at once.
				entries, err := s.Next(b.Context(), 4<<20)
				if err != nil || len(entries) != 1 {
					b.Fatal(len(entries), err)
				}
				if err := s.Ack(b.Context(), entries[0].ID); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
			b.ReportMetric(cpu.Seconds()*1000/float64(len(took)), "cpu-ms/commit")
		})
	}
}

func testLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, nil))
}

// cpuTime returns the CPU time that the process has used.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A copy of the disk on another machine neither goes on with the series nor sends
// the requests. A machine with a new id gets its state back as the log says.
func TestStateOfAnotherMachine(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	var log bytes.Buffer
	entries := func(machine string, requests ...string) {
		t.Helper()
		s, err := Open(t.Context(), Config{Dir: dir, Machine: machine, Logger: slog.New(slog.NewJSONHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		waiting, err := s.Next(t.Context(), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range waiting {
			got = append(got, string(e.Request))
		}
		if !slices.Equal(got, requests) {
			t.Errorf("on %q: %q, want %q", machine, got, requests)
		}
		l, err := s.Ledger(t.Context())
		if err != nil || (len(l.Series) > 0) != (len(requests) > 0) {
			t.Errorf("on %q: %d series, %v", machine, len(l.Series), err)
		}
	}
	commit := func(machine, request string) {
		t.Helper()
		s, err := Open(t.Context(), Config{Dir: dir, Machine: machine})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		l := Ledger{Series: []Series{{Key: "a.service", Total: [4]uint64{1, 2, 3, 4}, Seen: time.Now()}}}
		if err := s.Commit(t.Context(), Cycle{Time: time.Now(), Ledger: l, Request: []byte(request), Points: 1}); err != nil {
			t.Fatal(err)
		}
	}
	commit("", "of before") // a version that knows no machines
	entries("one", "of before")
	entries("one", "of before")
	entries("", "of before")
	if log.Len() > 0 {
		t.Errorf("the log: %s", &log)
	}
	entries("two")
	entries("two")
	commit("two", "of two")
	var line struct{ Next string }
	if err := json.NewDecoder(&log).Decode(&line); err != nil || log.Len() > 0 {
		t.Fatalf("%v; the log goes on: %s", err, &log)
	}
	_, command, _ := strings.Cut(line.Next, "run ")
	command, _, _ = strings.Cut(command, ", and start")
	if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v, %s", command, err, out)
	}
	entries("two", "of before")
	if log.Len() > 0 {
		t.Errorf("the log: %s", &log)
	}
}
