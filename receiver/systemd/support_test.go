package systemd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// sums is a Sink that adds up what a Source reads, by unit, as simply as can be.
type sums struct {
	mu     sync.Mutex
	last   map[string]Counters // by epoch
	asked  map[string]time.Time
	totals map[string]Counters // by unit
	falls  int
}

// Credit implements Sink.
func (s *sums) Credit(r Reading) (fell bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked[r.Epoch].After(r.Asked) {
		return false
	}
	last := s.last[r.Epoch]
	if fell = r.Counters.lower(last); fell {
		last = Counters{}
		s.falls++
	}
	total := s.totals[r.Unit]
	total.IngressBytes += r.Counters.IngressBytes - last.IngressBytes
	total.IngressPackets += r.Counters.IngressPackets - last.IngressPackets
	total.EgressBytes += r.Counters.EgressBytes - last.EgressBytes
	total.EgressPackets += r.Counters.EgressPackets - last.EgressPackets
	s.totals[r.Unit], s.last[r.Epoch] = total, r.Counters
	return fell
}

// Restart implements Sink.
func (s *sums) Restart(epoch string, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last[epoch], s.asked[epoch] = Counters{}, at
}

// Place implements Sink.
func (s *sums) Place(string, string, string) {}

func (s *sums) of(unit string) Counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.totals[unit]
}

// start starts a Source of all services, and waits until it has listed the units. It
// ends with the test.
func start(t testing.TB, bus string) (*Source, *sums) {
	t.Helper()
	return startWith(t, Config{Bus: bus})
}

// startWith is start with more of a configuration.
func startWith(t testing.TB, cfg Config, units ...string) (*Source, *sums) {
	t.Helper()
	sink := &sums{last: map[string]Counters{}, asked: map[string]time.Time{}, totals: map[string]Counters{}}
	cfg.Types, cfg.BootID, cfg.Sink = []string{"service"}, "boot", sink
	cfg.Metered = func(unit string) bool {
		return strings.HasSuffix(unit, ".service") && (len(units) == 0 || slices.Contains(units, unit))
	}
	cfg.Balanced = func(string) bool { return false }
	s := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
	ready, stop := context.WithTimeout(t.Context(), systemdtest.Patience)
	defer stop()
	if err := s.Ready(ready); err != nil {
		t.Fatal(err)
	}
	return s, sink
}

// accounted is a running unit with counters, in which every number is n.
func accounted(name string, invocation int, n uint64) systemdtest.Unit {
	return systemdtest.Unit{
		Name: name, InvocationID: fmt.Sprintf("%032x", invocation), Accounting: true, Started: time.Now().Add(-time.Minute),
		IngressBytes: n, IngressPackets: n, EgressBytes: n, EgressPackets: n,
	}
}

// all are counters in which every number is n.
func all(n uint64) Counters { return Counters{n, n, n, n} }
