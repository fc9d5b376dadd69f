// Package top shows the speeds of this host's units: full-screen on a terminal,
// or as one table.
//
//   - reading: all units with their counters at one time.
//   - speed: bytes or packets per second between two readings.
//   - board: the units and slices with their speeds, totals and history.
//   - session: what was counted since top began, over all runs of a unit.
//
// Run starts Bubble Tea's goroutines, of which one at a time has the board, feed, which
// reads, and a receiver's. All end before Run returns.
package top

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// ShortestInterval is the lower bound for Config.Interval: top must not be the load
// that it shows.
const ShortestInterval = 200 * time.Millisecond

// Config is what Run needs. All fields but Patterns, Exact and Once are required.
type Config struct {
	Receiver receiver.Config
	Source   string           // one of accounting.Sources
	Patterns systemd.Patterns // for the names of units, as accounting.Patterns makes them; none: all units
	Interval time.Duration    // between two readings
	Exact    bool             // exact numbers: bytes per second instead of kB/s and MB/s
	Once     bool             // read twice, write one table, and end
	// Out is where the table is written, or the terminal with the screen.
	Out     io.Writer
	Environ []string // of the terminal: TERM, NO_COLOR
}

// Run shows speeds until the user or ctx ends it, or once. Without a systemd to
// read from, and without any unit that Patterns match, it returns an error.
func Run(ctx context.Context, cfg Config) error {
	// Before the screen is taken over: an error can still be read there.
	source, err := accounting.Open(ctx, cfg.Receiver, cfg.Source, cfg.Patterns)
	if err != nil {
		return fmt.Errorf("%w; see \"unitmeter doctor\"", err)
	}
	defer source.Close()
	// Deferred calls run from the last: feed gets its end before it is waited for.
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	wanted, err := accounting.Resolve(ctx, cfg.Receiver, cfg.Patterns)
	if err != nil && source.Source != receiver.EBPF { // which needs no systemd
		return err
	}
	b := newBoard(wanted, cfg.Interval)
	if cfg.Once {
		return once(ctx, cfg, source, b)
	}
	// Signals end ctx in main already; a second handler would race with that.
	program := tea.NewProgram(newTopModel(b, source.Origin, cfg.Exact), tea.WithContext(ctx), tea.WithOutput(cfg.Out),
		tea.WithEnvironment(cfg.Environ), tea.WithoutSignalHandler())
	running.Go(func() { feed(ctx, source, cfg.Interval, program.Send) })
	_, err = program.Run()
	if errors.Is(err, tea.ErrProgramKilled) && ctx.Err() != nil {
		return nil // a signal is a way to end it
	}
	return err
}

// once prints the speeds over one interval. It is an error if there is nothing
// to show of the units that were asked for, so that scripts notice.
func once(ctx context.Context, cfg Config, source *accounting.Source, b *board) error {
	// A speed needs two readings: nobody knows over which time systemd counted
	// what was there at the first.
	for i := range 2 {
		if i > 0 {
			select {
			case <-time.After(b.interval):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		sweep := source.Read(ctx)
		// A table that is read by a program must be whole, or not be at all.
		if err := sweep.Err(); err != nil {
			return err
		}
		b.take(sweep.Time, sweep.Units)
	}
	if b.wanted.Len() > 0 && len(b.rows) == 0 {
		return fmt.Errorf("find unit %q: it is not running, or not among the metered units; see \"unitmeter units\"", strings.Join(b.wanted.Texts(), " "))
	}
	return printTop(cfg.Out, b, source.Origin, cfg.Exact)
}

// feed reads all units at each tick until ctx ends.
func feed(ctx context.Context, source *accounting.Source, interval time.Duration, send func(tea.Msg)) {
	// A ticker drops ticks that nobody waits for, so that slow sweeps do not
	// queue up behind each other.
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		sweep := source.Read(ctx)
		if ctx.Err() != nil {
			return
		}
		send(sweep)
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}
