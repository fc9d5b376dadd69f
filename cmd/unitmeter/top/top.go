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
	rcv, stop, err := accounting.Open(ctx, cfg.Receiver)
	if err != nil {
		return fmt.Errorf("%w; see \"unitmeter doctor\"", err)
	}
	defer stop()
	// Deferred calls run from the last: feed gets its end before it is waited for.
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	wanted, err := accounting.Resolve(ctx, cfg.Receiver, cfg.Patterns)
	if err != nil {
		return err
	}
	b := newBoard(wanted, cfg.Interval)
	if cfg.Once {
		return once(ctx, cfg, rcv, b)
	}
	// Signals end ctx in main already; a second handler would race with that.
	program := tea.NewProgram(newTopModel(b, cfg.Exact), tea.WithContext(ctx), tea.WithOutput(cfg.Out),
		tea.WithEnvironment(cfg.Environ), tea.WithoutSignalHandler())
	running.Go(func() { feed(ctx, rcv, cfg.Interval, program.Send) })
	_, err = program.Run()
	if errors.Is(err, tea.ErrProgramKilled) && ctx.Err() != nil {
		return nil // a signal is a way to end it
	}
	return err
}

// once prints the speeds over one interval. It is an error if there is nothing
// to show of the units that were asked for, so that scripts notice.
func once(ctx context.Context, cfg Config, rcv *receiver.Receiver, b *board) error {
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
		s := rcv.Sweep(ctx)
		// A table that is read by a program must be whole, or not be at all.
		if s.Partial {
			return errors.New("read all units: systemd did not answer for all of them in time; raise UNITMETER_SWEEP_TIMEOUT, or try again")
		}
		b.take(s.Time, rcv.Units())
	}
	if b.wanted.Len() > 0 && len(b.rows) == 0 {
		return fmt.Errorf("find unit %q: it is not running, or not among the metered units; see \"unitmeter units\"", strings.Join(b.wanted.Texts(), " "))
	}
	return printTop(cfg.Out, b, cfg.Exact)
}

// sweepMsg is sent to the screen after each sweep.
type sweepMsg struct {
	at      time.Time
	units   []systemd.Unit
	partial bool
}

// feed reads all units at each tick until ctx ends.
func feed(ctx context.Context, rcv *receiver.Receiver, interval time.Duration, send func(tea.Msg)) {
	// A ticker drops ticks that nobody waits for, so that slow sweeps do not
	// queue up behind each other.
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		s := rcv.Sweep(ctx)
		if ctx.Err() != nil {
			return
		}
		send(sweepMsg{s.Time, rcv.Units(), s.Partial})
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}
