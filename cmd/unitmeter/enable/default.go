package enable

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

const (
	defaultFile = "system.conf.d/50-unitmeter.conf"
	defaultText = "# Written by \"unitmeter enable --default\"; \"unitmeter disable --default\" removes it.\n[Manager]\nDefaultIPAccounting=yes\n"
)

// setDefault writes or removes the drop-in of systemd's own configuration, and
// reloads systemd.
func (w *switcher) setDefault(ctx context.Context) error {
	dir := "/etc/systemd"
	if w.Runtime {
		dir = "/run/systemd"
	}
	file := filepath.Join(dir, defaultFile)
	present, err := os.ReadFile(file)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read %s: %w", file, err)
	case err == nil && !strings.HasPrefix(string(present), "# Written by \"unitmeter"):
		return fmt.Errorf("change %s: it was not written by unitmeter; check it and remove it by hand", file)
	case err != nil && !w.On:
		fmt.Fprintf(w.Out, "nothing to do: there is no %s\n", file)
		return w.checkDefault(ctx)
	}
	fmt.Fprint(w.Out, w.explainDefault(ctx, file))
	if w.DryRun {
		return nil
	}
	before, err := w.m.Loaded(ctx, []string{"active"}, "*")
	if err != nil {
		return err
	}
	if err := w.writeDefault(file); err != nil {
		return err
	}
	began := time.Now()
	err = w.m.Reload(ctx, func(since time.Duration) {
		fmt.Fprintf(w.Out, "systemd has been reloading for %s; Ctrl-C ends the wait, and not the reload\n", since.Round(time.Second))
	})
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("wait for the reload of systemd: %w; systemd goes on with it, and \"unitmeter doctor\" shows the result", ctx.Err())
	case err != nil:
		return fmt.Errorf("reload systemd as uid %d: %w; run \"systemctl daemon-reload\" as root", os.Geteuid(), err)
	}
	fmt.Fprintf(w.Out, "the reload took %s\n", time.Since(began).Round(10*time.Millisecond))
	return w.verifyDefault(ctx, before)
}

// explainDefault says what setDefault does next.
func (w *switcher) explainDefault(ctx context.Context, file string) string {
	would := ""
	if w.DryRun {
		would = "would "
	}
	text := fmt.Sprintf("%sremove %s\n", would, file)
	if w.On {
		text = fmt.Sprintf("%swrite %s:\n  %s\n", would, file, strings.ReplaceAll(strings.TrimSpace(defaultText), "\n", "\n  "))
	}
	text += fmt.Sprintf("%scall %s.Reload(), the same as: systemctl daemon-reload\n", would, bus.ManagerInterface) +
		"No unit is restarted. While it reloads, systemd counts nothing: about 0.1 s, and as long as its generators take.\n"
	if w.reloadLoses(ctx) {
		text += "This systemd loses the counters of running units at a reload; unitmeter restores them at once.\n"
	}
	return text
}

// writeDefault writes or removes the drop-in.
func (w *switcher) writeDefault(file string) error {
	err := os.Remove(file)
	if w.On {
		err = writeWhole(file, defaultText)
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("change systemd's configuration: %w; run \"sudo unitmeter %s --default\"", err, w.verb())
	case err != nil:
		return fmt.Errorf("change systemd's configuration: %w", err)
	}
	return nil
}

// reloadLoses reports whether a reload of this systemd loses counters.
func (w *switcher) reloadLoses(ctx context.Context) bool {
	v, err := w.m.Version(ctx)
	return err == nil && v.LosesAtReload()
}

// verifyDefault restores the counters that the reload has lost, and reports the
// effect of the new default on units that ran before.
func (w *switcher) verifyDefault(ctx context.Context, before []accounting.Unit) error {
	arm := *w
	arm.On = true
	loses := w.reloadLoses(ctx)
	changed, on := 0, 0
	for _, u := range before {
		now, err := w.m.Unit(ctx, u.Name, u.Path)
		switch {
		case err != nil:
			continue // it ended meanwhile
		case now.On:
			on++
		}
		if now.On != u.On {
			changed++
		}
		if loses && now.Lost() {
			if err := arm.setUnit(ctx, now); err != nil {
				return err
			}
		}
	}
	fmt.Fprintf(w.Out, "IP accounting is on for %d running units; it changed for %d\n", on, changed)
	return w.checkDefault(ctx)
}

// checkDefault returns an error if systemd has another default.
func (w *switcher) checkDefault(ctx context.Context) error {
	now, err := w.m.Default(ctx)
	if err != nil {
		return fmt.Errorf("check systemd's default: %w", err)
	}
	if now != w.On {
		return fmt.Errorf("set DefaultIPAccounting: systemd still has %s because of another file; see \"systemd-analyze cat-config systemd/system.conf\"", yesNo(now))
	}
	return nil
}
