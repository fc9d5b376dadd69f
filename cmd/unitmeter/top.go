package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/top"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
)

// showSpeeds is the command "top".
func showSpeeds(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	cfg := top.Config{Out: t.stdout, Environ: t.environ}
	flags.BoolVar(&cfg.Once, "once", false, "read twice, print one table, and end")
	durationFlag(flags, &cfg.Interval, "interval", time.Second, fmt.Sprintf("time between two readings, %s or more", top.ShortestInterval))
	flags.BoolVar(&cfg.Exact, "bytes", false, "exact numbers: bytes per second instead of kB/s and MB/s")
	sourceFlag(flags, &cfg.Source)
	var err error
	if cfg.Patterns, err = parsePatterns(t, flags); err != nil {
		return err
	}
	if cfg.Interval < top.ShortestInterval {
		return usageError{fmt.Errorf("--interval %s is too short; use %s or more", cfg.Interval, top.ShortestInterval)}
	}
	// Better an error with the way out than control sequences in a file.
	screen, ok := t.stdout.(*os.File)
	if !cfg.Once && !(ok && tty.IsTerminal(screen)) {
		return usageError{errors.New("standard output is no terminal; use --once for one table")}
	}
	if !cfg.Once && slices.Contains(t.environ, "TERM=dumb") {
		return usageError{errors.New("this terminal (TERM=dumb) has no screen to draw on; use --once for one table")}
	}
	if cfg.Receiver, err = loadUnits(ctx, t); err != nil {
		return err
	}
	return top.Run(ctx, cfg)
}
