package accounting

import (
	"context"
	"errors"
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
	// Masked says that systemd changes no settings of the unit.
	Masked bool
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
	ready, end := context.WithTimeout(ctx, connectTimeout)
	defer end()
	if err := r.Ready(ready); err != nil {
		stop()
		return nil, nil, err
	}
	return r, stop, nil
}

// Read reads the units that match any of the patterns, and all units without
// patterns. With an interval above zero it reads twice and computes speeds.
func Read(ctx context.Context, cfg receiver.Config, patterns systemd.Patterns, interval time.Duration) ([]Reading, error) {
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
	return complete(ctx, cfg, readings, patterns)
}

// complete asks the manager what the receiver does not know, and keeps the units
// that match.
func complete(ctx context.Context, cfg receiver.Config, readings []Reading, patterns systemd.Patterns) ([]Reading, error) {
	m, err := Connect(ctx, cfg.Addresses()...)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	masked, err := m.rows(ctx, []string{"masked"}, "*")
	if err != nil {
		return nil, err
	}
	for i := range readings {
		readings[i].Masked = slices.ContainsFunc(masked, func(r row) bool { return r.Name == readings[i].Name })
	}
	return choose(readings, patterns.Named(m.own(ctx, patterns.Texts())))
}

// sweep reads all units once. It is an error if a unit could not be read in time.
func sweep(ctx context.Context, r *receiver.Receiver) ([]systemd.Unit, error) {
	if r.Sweep(ctx).Partial {
		return nil, errors.New("read all units: systemd did not answer for all of them in time; raise UNITMETER_SWEEP_TIMEOUT, or try again")
	}
	return r.Units(), nil
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
func choose(units []Reading, patterns systemd.Patterns) ([]Reading, error) {
	used := make([]bool, patterns.Len())
	chosen := slices.DeleteFunc(units, func(u Reading) bool {
		all := patterns.All(u.Name)
		for _, i := range all {
			used[i] = true
		}
		return patterns.Len() > 0 && len(all) == 0
	})
	for i, p := range patterns.Texts() {
		if !used[i] {
			return nil, fmt.Errorf("find unit %q: it is not running, or not among the metered units; see \"systemctl status %s\", UNITMETER_INCLUDE and UNITMETER_UNIT_TYPES", p, p)
		}
	}
	return chosen, nil
}
