package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/enable"
)

// switchOn is the command "enable".
func switchOn(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	return switchAccounting(ctx, t, flags, true)
}

// switchOff is the command "disable".
func switchOff(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	return switchAccounting(ctx, t, flags, false)
}

func switchAccounting(ctx context.Context, t *terminal, flags *flag.FlagSet, on bool) error {
	cfg, err := parseEnable(t, flags, on)
	if err != nil {
		return err
	}
	if cfg.Receiver, err = loadUnits(ctx, t); err != nil {
		return err
	}
	return enable.Run(ctx, cfg)
}

// parseEnable reads the command line.
func parseEnable(t *terminal, flags *flag.FlagSet, on bool) (cfg enable.Config, err error) {
	cfg = enable.Config{Out: t.stdout, On: on}
	given := map[enable.Subject]*bool{}
	subject := func(s enable.Subject, name, usage string) { given[s] = flags.Bool(name, false, usage) }
	choices := "names of units, or one of --all, --default, --ebpf, --rearm and --reset"
	if on {
		choices = "names of units, or one of --all, --lost, --default, --ebpf and --rearm"
		subject(enable.All, "all", "all metered and running units with IP accounting off, and lost ones")
		subject(enable.Lost, "lost", "the units whose counters systemd has lost")
		subject(enable.Default, "default", "all units, future ones too: set DefaultIPAccounting=yes and reload systemd")
		flags.BoolVar(&cfg.Follow, "follow", false, "with --lost: now and after each reload of systemd, until stopped")
		subject(enable.Rearm, "rearm", "no unit: let unitmeter-rearm.service do what --lost --follow does")
		subject(enable.EBPF, "ebpf", "no unit: let unitmeter.service count all units by its own eBPF program, and restart it")
	} else {
		subject(enable.All, "all", "all metered and running units with IP accounting on")
		subject(enable.Default, "default", "undo \"enable --default\", and reload systemd")
		subject(enable.Rearm, "rearm", "undo \"enable --rearm\"")
		subject(enable.Reset, "reset", "undo all that enable and systemctl set-property IPAccounting= ever switched, and reload systemd")
		subject(enable.EBPF, "ebpf", "undo \"enable --ebpf\", and restart unitmeter.service")
	}
	flags.BoolVar(&cfg.Runtime, "runtime", false, "until the next boot only")
	flags.BoolVar(&cfg.DryRun, "dry-run", false, "print the changes, and make none")
	patterns, err := parsePatterns(t, flags)
	if err != nil {
		return cfg, err
	}
	cfg.Names = patterns.Texts()
	for _, arg := range t.args {
		if flags.Lookup(arg) != nil {
			return cfg, usageError{fmt.Errorf("%q is a flag: write \"unitmeter %s --%s\"; for a unit of that name write %s.service", arg, flags.Name(), arg, arg)}
		}
	}
	var subjects []enable.Subject
	if len(cfg.Names) > 0 {
		subjects = append(subjects, enable.Units)
	}
	for s, chosen := range given {
		if *chosen {
			subjects = append(subjects, s)
		}
	}
	if len(subjects) != 1 {
		return cfg, usageError{fmt.Errorf("want %s; see \"unitmeter help %s\"", choices, flags.Name())}
	}
	cfg.Subject = subjects[0]
	if cfg.Runtime && slices.Contains([]enable.Subject{enable.EBPF, enable.Rearm, enable.Reset}, cfg.Subject) {
		return cfg, usageError{errors.New("--runtime does not go with --ebpf, --rearm and --reset, which are for good")}
	}
	if cfg.Follow && (cfg.Subject != enable.Lost || cfg.DryRun) {
		return cfg, usageError{errors.New("--follow goes with --lost only")}
	}
	return cfg, nil
}
