package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"
	"golang.org/x/sys/unix"

	"github.com/unitmeter/unitmeter/receiver"
)

// shortestInterval keeps top from being the load that it shows.
const shortestInterval = 200 * time.Millisecond

// top shows speeds: full-screen on a terminal, or once for a pipe.
func top(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	single := flags.Bool("once", false, "read twice, print one table, and end")
	interval := flags.Duration("interval", time.Second, "time between two readings, 200ms or more")
	exact := flags.Bool("bytes", false, "exact numbers: bytes per second instead of kB/s and MB/s")
	patterns, err := parse(t, flags, -1)
	if err != nil {
		return err
	}
	if *interval < shortestInterval {
		return usageError{fmt.Errorf("--interval %s is too short; use %s or more", *interval, shortestInterval)}
	}
	wanted, err := unitPatterns(patterns)
	if err != nil {
		return err
	}
	// Better an error with the way out than control sequences in a file.
	screen, ok := t.stdout.(*os.File)
	if !*single && !(ok && isTerminal(screen)) {
		return usageError{errors.New("standard output is no terminal; use --once for one table")}
	}
	if !*single && slices.Contains(t.environ, "TERM=dumb") {
		return usageError{errors.New("this terminal (TERM=dumb) has no screen to draw on; use --once for one table")}
	}
	cfg, err := loadConfig(t)
	if err != nil {
		return err
	}
	cfg.Receiver.StopRecords = "off" // it only looks
	rcv, err := receiver.New(cfg.Receiver)
	if err != nil {
		return usageError{err}
	}
	// Deferred calls run from the last: the receiver is told to end before it is
	// waited for.
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() { _ = rcv.Run(ctx) }) // it ends with ctx and nothing else

	wanted = realNames(ctx, cfg.Receiver, wanted)
	// Before the screen is taken over: an error can still be read there.
	ready, stop := context.WithTimeout(ctx, connectTimeout)
	defer stop()
	if err := rcv.Ready(ready); err != nil {
		return fmt.Errorf("%w; see \"unitmeter doctor\"", err)
	}
	// One goroutine at a time uses the board: this one, or that of Bubble Tea.
	b := newBoard(wanted, *interval)
	if *single {
		return topOnce(ctx, t, rcv, b, *exact)
	}
	// Signals end ctx in main already; a second handler would race with that.
	program := tea.NewProgram(newTopModel(b, *exact), tea.WithContext(ctx), tea.WithOutput(screen),
		tea.WithEnvironment(t.environ), tea.WithoutSignalHandler())
	running.Go(func() { feed(ctx, rcv, *interval, program.Send) })
	_, err = program.Run()
	if errors.Is(err, tea.ErrProgramKilled) && ctx.Err() != nil {
		return nil // a signal is a way to end it
	}
	return err
}

// unitPatterns completes names without a type, as in "once".
func unitPatterns(args []string) ([]string, error) {
	var patterns []string
	for _, arg := range args {
		arg = fullName(arg)
		if _, err := path.Match(strings.ReplaceAll(arg, `\`, `\\`), ""); err != nil {
			return nil, usageError{fmt.Errorf("%q is no unit name and no pattern; use a name such as nats.service or a pattern such as nats*", arg)}
		}
		patterns = append(patterns, arg)
	}
	return patterns, nil
}

// isTerminal tells a terminal from a pipe or a file: only a terminal has a mode.
func isTerminal(f *os.File) bool {
	// The character devices that are no terminals, such as /dev/null, have none.
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// topOnce prints the speeds over one interval. It is an error if there is nothing
// to show of the units that were asked for, so that scripts notice.
func topOnce(ctx context.Context, t *terminal, rcv *receiver.Receiver, b *board, exact bool) error {
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
	if len(b.wanted) > 0 && len(b.rows) == 0 {
		return fmt.Errorf("find unit %q: it is not running, or not among the metered units; see \"unitmeter units\"", strings.Join(b.wanted, " "))
	}
	return printTop(t.stdout, b, exact)
}

// sweepMsg is sent to the screen after each sweep.
type sweepMsg struct {
	at      time.Time
	units   []receiver.Unit
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
