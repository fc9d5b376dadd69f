package accounting

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// Reading is one unit with its counters and, over an interval, their speeds.
type Reading struct {
	systemd.Unit
	// Speed is in bytes or packets per second, in the order of Values; nil where
	// it is not known.
	Speed *[4]float64
}

// Values are the counters of a unit: bytes and packets received, bytes and
// packets sent.
func Values(c systemd.Counters) [4]uint64 {
	return [4]uint64{c.IngressBytes, c.IngressPackets, c.EgressBytes, c.EgressPackets}
}

// Open starts a receiver that only looks, and waits until it can read. The caller
// calls stop, which waits for the receiver's end.
func Open(ctx context.Context, cfg receiver.Config) (r *receiver.Receiver, stop func(), err error) {
	cfg.Source = receiver.DBus // the commands are about what systemd says
	cfg.StopRecords = "off"    // nothing is left running behind
	if r, err = receiver.New(cfg); err != nil {
		return nil, nil, err
	}
	running, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() { _ = r.Run(running) }) // it ends with running and nothing else
	stop = func() { cancel(); done.Wait() }
	for {
		before := r.Progress()
		ready, end := context.WithTimeout(ctx, connectTimeout)
		err := r.Ready(ready)
		end()
		switch {
		case err == nil:
			return r, stop, nil
		case ctx.Err() != nil || r.Progress() == before: // else there are many units
			stop()
			return nil, nil, err
		}
	}
}

// Read reads the units that match any of the patterns, and all units without
// patterns. With an interval above zero it reads twice and computes speeds.
func Read(ctx context.Context, cfg receiver.Config, patterns []string, interval time.Duration) ([]Reading, error) {
	r, stop, err := Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer stop()
	units, err := sweep(ctx, r)
	if err != nil {
		return nil, err
	}
	var before map[string]systemd.Unit
	if interval > 0 {
		before = make(map[string]systemd.Unit, len(units))
		for _, u := range units {
			before[u.Name+u.Invocation] = u
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if units, err = sweep(ctx, r); err != nil {
			return nil, err
		}
	}
	readings := make([]Reading, len(units))
	for i, u := range units {
		readings[i].Unit = u
		if old, ok := before[u.Name+u.Invocation]; ok && u.Accounting == "on" && old.Accounting == "on" {
			readings[i].Speed = speed(old, u)
		}
	}
	return choose(readings, Resolve(ctx, cfg, patterns))
}

// sweep reads all units once, in as many parts as it takes. It is an error if one part
// has nothing new.
func sweep(ctx context.Context, r *receiver.Receiver) ([]systemd.Unit, error) {
	began := time.Now()
	for before := -1; ; {
		partial := r.Sweep(ctx).Partial
		units := r.Units()
		missing := 0
		for _, u := range units {
			if u.Accounting == "unknown" || u.Accounting == "on" && u.Time.Before(began) {
				missing++
			}
		}
		switch {
		case !partial:
			return units, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case missing == before:
			return nil, fmt.Errorf("read all units: systemd did not answer for %d of %d in time; raise UNITMETER_SWEEP_TIMEOUT, or try again", missing, len(units))
		}
		before = missing
	}
}

// Growth is by how much the counters of a unit have grown between two readings;
// ok is false where one of them fell.
func Growth(old, now systemd.Counters) (growth [4]uint64, ok bool) {
	a, b := Values(old), Values(now)
	for i := range growth {
		if b[i] < a[i] {
			return growth, false
		}
		growth[i] = b[i] - a[i]
	}
	return growth, true
}

// speed is nil where the counters fell or no time passed.
func speed(old, now systemd.Unit) *[4]float64 {
	seconds := now.Time.Sub(old.Time).Seconds()
	growth, ok := Growth(old.Counters, now.Counters)
	if !ok || seconds <= 0 {
		return nil
	}
	var s [4]float64
	for i, n := range growth {
		s[i] = float64(n) / seconds
	}
	return &s
}

// choose keeps the units that match any of the patterns. A pattern without a unit
// is an error.
func choose(units []Reading, patterns []string) ([]Reading, error) {
	for _, p := range patterns {
		if !slices.ContainsFunc(units, func(u Reading) bool { return Match([]string{p}, u.Name) != "" }) {
			return nil, fmt.Errorf("find unit %q: it is not running, or not among the metered units; see \"systemctl status %s\", UNITMETER_INCLUDE and UNITMETER_UNIT_TYPES", p, p)
		}
	}
	return slices.DeleteFunc(units, func(u Reading) bool {
		return len(patterns) > 0 && Match(patterns, u.Name) == ""
	}), nil
}
