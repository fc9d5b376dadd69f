package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ebpf"
)

// follow restores lost counters now and after each reload of systemd, until ctx or
// the connection ends. It is what unitmeter-rearm.service runs.
func (w *switcher) follow(ctx context.Context, cfg receiver.Config) error {
	for {
		units, err := w.choose(ctx, cfg)
		if err == nil && len(units) > 0 {
			err = w.setUnits(ctx, units)
		}
		if accounting.Denied(err) || ctx.Err() != nil {
			return err
		}
		if err != nil {
			fmt.Fprintln(w.out, indent(err)) // of one unit: the others are restored
		}
		if err := w.m.Reloaded(ctx); err != nil {
			return err
		}
	}
}

// switchRearm has systemd run unitmeter-rearm.service, or not any more.
func switchRearm(ctx context.Context, t *terminal, on, dry bool) error {
	verb := map[bool]string{true: "enable", false: "disable"}[on]
	return takeSteps(t.stdout, dry, []step{systemctl(ctx, verb, "--now", accounting.RearmUnit)})
}

// reset takes back all that enable has ever switched, and what systemctl set-property
// IPAccounting= has: systemd keeps both in the same files.
func reset(ctx context.Context, t *terminal, dry bool) error {
	var files []string
	for _, pattern := range []string{
		accounting.PersistentDir + "/*.d/" + accounting.SettingFile, accounting.RuntimeDir + "/*.d/" + accounting.SettingFile,
		"/run/systemd/transient/*.d/" + accounting.SettingFile,
		"/etc/systemd/" + defaultFile, "/run/systemd/" + defaultFile, ebpfFile,
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		files = append(files, found...)
	}
	var steps []step
	for _, unit := range []string{accounting.RearmUnit, meterUnit} {
		if systemctl(ctx, "is-enabled", "--quiet", unit).do() == nil {
			steps = append(steps, systemctl(ctx, "disable", "--now", unit))
		}
	}
	restart := false
	for _, file := range files {
		if text, err := os.ReadFile(file); filepath.Base(file) != accounting.SettingFile && (err != nil || !strings.HasPrefix(string(text), "# Written by \"unitmeter")) {
			fmt.Fprintf(t.stdout, "%s stays: it was not written by unitmeter\n", file)
			continue
		}
		restart = restart || file == ebpfFile
		steps = append(steps, step{what: "remove " + file, do: func() error {
			if err := os.Remove(file); err != nil {
				return fmt.Errorf("%w; run \"sudo unitmeter disable --reset\"", err)
			}
			// Other files may be in its directory.
			if err := os.Remove(filepath.Dir(file)); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			return nil
		}})
	}
	if len(steps) == 0 {
		fmt.Fprintln(t.stdout, "nothing to do: no unit's IP accounting was switched")
		return nil
	}
	steps = append(steps, systemctl(ctx, "daemon-reload"))
	if restart {
		steps = append(steps, systemctl(ctx, "try-restart", agentUnit), step{"unitmeter meter unload", func() error { return ebpf.Unload("") }, nil})
	}
	return takeSteps(t.stdout, dry, steps)
}
