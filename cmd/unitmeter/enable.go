package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver"
)

const (
	// managerTimeout bounds one command's talk with systemd.
	managerTimeout = 30 * time.Second
	// settleTimeout is how long systemd may take to attach the counting
	// programs after the setting has changed.
	settleTimeout = 3 * time.Second
	defaultFile   = "system.conf.d/50-unitmeter.conf"
	defaultText   = "# Written by \"unitmeter enable --default\"; \"unitmeter disable --default\" removes it.\n[Manager]\nDefaultIPAccounting=yes\n"
)

// selection says which units a change is for.
type selection struct {
	names                              []string
	all, lost, byDefault, runtime, dry bool
}

// enable switches IP accounting on. It needs root, or polkit's manage-units.
func enable(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	return switchAccounting(ctx, t, flags, true)
}

// disable switches IP accounting off.
func disable(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	return switchAccounting(ctx, t, flags, false)
}

// switchAccounting finds all units before it changes the first: a name that is
// wrong must not leave half of the work done.
func switchAccounting(ctx context.Context, t *terminal, flags *flag.FlagSet, on bool) error {
	s, err := parseSelection(t, flags, on)
	if err != nil {
		return err
	}
	cfg, err := loadConfig(t)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, managerTimeout)
	defer cancel()
	m, err := openManager(ctx, cfg.Receiver.Addresses()...)
	if err != nil {
		return fmt.Errorf("%w; see \"unitmeter doctor\"", err)
	}
	defer m.close()
	w := &switcher{m: m, out: t.stdout, on: on, selection: s}
	if s.byDefault {
		return w.setDefault(ctx)
	}
	units, err := w.choose(ctx, cfg.Receiver)
	if err != nil {
		return err
	}
	return w.setUnits(ctx, units)
}

// parseSelection reads the command line.
func parseSelection(t *terminal, flags *flag.FlagSet, on bool) (s selection, err error) {
	choices := "names of units, or one of --all and --default"
	if on {
		choices = "names of units, or one of --all, --lost and --default"
		flags.BoolVar(&s.all, "all", false, "all running units that are metered and have IP accounting off, and lost ones")
		flags.BoolVar(&s.lost, "lost", false, "the units whose counters systemd has lost")
		flags.BoolVar(&s.byDefault, "default", false, "all units, those to come too: set DefaultIPAccounting=yes and reload systemd")
	} else {
		flags.BoolVar(&s.all, "all", false, "all running units that are metered and have IP accounting on")
		flags.BoolVar(&s.byDefault, "default", false, "take back what \"enable --default\" did, and reload systemd")
	}
	flags.BoolVar(&s.runtime, "runtime", false, "until the next boot only")
	flags.BoolVar(&s.dry, "dry-run", false, "print what would be done, and do nothing")
	if s.names, err = parse(t, flags, -1); err != nil {
		return s, err
	}
	ways := 0
	for _, given := range []bool{len(s.names) > 0, s.all, s.lost, s.byDefault} {
		ways += count(given)
	}
	if ways != 1 {
		return s, usageError{fmt.Errorf("want %s; see \"unitmeter help %s\"", choices, flags.Name())}
	}
	return s, nil
}

// switcher turns accounting on or off.
type switcher struct {
	m   *manager
	out io.Writer
	on  bool
	selection
}

func (w *switcher) verb() string {
	if w.on {
		return "enable"
	}
	return "disable"
}

// choose finds the units that the command line names.
func (w *switcher) choose(ctx context.Context, cfg receiver.Config) ([]accountedUnit, error) {
	if w.all || w.lost {
		units, err := w.m.loaded(ctx, []string{"active", "reloading", "refreshing", "activating", "deactivating", "maintenance"}, "*")
		if err != nil {
			return nil, err
		}
		return slices.DeleteFunc(units, func(u accountedUnit) bool {
			if whyExcluded(cfg, u.name) != "" || !carriesTraffic(u.name) && (!u.active || w.on && !w.m.hasProcesses(ctx, u.name)) {
				return true
			}
			if w.lost {
				return !u.lost()
			}
			return u.on == w.on && !(w.on && u.lost()) && !w.keeps(u)
		}), nil
	}
	var units []accountedUnit
	for _, name := range w.names {
		found, err := w.named(ctx, name)
		if err != nil {
			return nil, err
		}
		for _, u := range found {
			if !slices.ContainsFunc(units, func(v accountedUnit) bool { return v.name == u.name }) {
				units = append(units, u)
			}
		}
	}
	return units, nil
}

// keeps reports whether a unit has what is asked for, but until the next boot only.
func (w *switcher) keeps(u accountedUnit) bool {
	return u.on == w.on && u.runtime && !u.persistent && !w.runtime
}

// named finds the units of one argument: a name, which is loaded if it is not,
// or a pattern of loaded units.
func (w *switcher) named(ctx context.Context, name string) ([]accountedUnit, error) {
	full := fullName(name)
	if strings.ContainsAny(name, "*?[") {
		if _, err := path.Match(strings.ReplaceAll(name, `\`, `\\`), ""); err != nil {
			return nil, usageError{fmt.Errorf("%q is no pattern; use *, ? and [a-z], as in nginx*.service", name)}
		}
		units, err := w.m.loaded(ctx, []string{}, name)
		if err == nil && len(units) == 0 {
			err = fmt.Errorf("find units %q: no loaded unit with IP counters matches; see \"systemctl list-units --all '%s'\"", name, name)
		}
		return units, err
	}
	iface := counterInterface(full)
	if iface == "" {
		return nil, fmt.Errorf("find unit %q: units of this type have no IP accounting; those of the types %s have", full, strings.Join(accountable(), ", "))
	}
	var p dbus.ObjectPath
	if err := w.m.call(ctx, "LoadUnit", full).Store(&p); err != nil {
		return nil, fmt.Errorf("find unit %q: %w; see \"systemctl list-units\" for names", full, err)
	}
	var load string
	if err := w.m.get(ctx, p, unitInterface, "LoadState", &load); err != nil {
		return nil, fmt.Errorf("find unit %q: %w", full, err)
	}
	if load != "loaded" {
		return nil, fmt.Errorf("find unit %q: systemd says %q; see \"systemctl status %s\", and \"systemctl list-units\" for names", full, load, full)
	}
	u, err := w.m.unit(ctx, full, p)
	return []accountedUnit{u}, err
}

// setUnits changes the units one after the other, and goes on after a failure.
func (w *switcher) setUnits(ctx context.Context, units []accountedUnit) error {
	if len(units) == 0 {
		why := "no running unit that is metered has IP accounting on"
		if w.lost {
			why = "no running unit has lost its counters"
		} else if w.on {
			why = "no running unit that has anything to count has IP accounting off"
		}
		fmt.Fprintln(w.out, "nothing to do: "+why)
		return nil
	}
	var errs []error
	for _, u := range units {
		err := w.setUnit(ctx, u)
		if denied(err) { // as it would be for all others
			which := u.name
			if w.all {
				which = "--all"
			} else if w.lost {
				which = "--lost"
			}
			return fmt.Errorf("set IPAccounting of %s: systemd refused uid %d: %w; run it as root, as in \"sudo unitmeter %s %s\"", u.name, os.Geteuid(), err, w.verb(), shellWord(which))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// setUnit changes one unit, and prints what systemd shows after that.
func (w *switcher) setUnit(ctx context.Context, u accountedUnit) error {
	rearm := w.on && u.on && u.active && !u.hasData
	if u.on == w.on && !rearm && !w.keeps(u) {
		fmt.Fprintf(w.out, "%s: IP accounting is %s already\n", u.name, onOff(w.on))
		return nil
	}
	if w.runtime && u.on != w.on && u.persistent {
		return fmt.Errorf("set IPAccounting of %s until the next boot: %s/%s.d/%s says %s, and would win at the next daemon-reload; use \"unitmeter %s %s\"",
			u.name, persistentDir, u.name, settingFile, yesNo(u.on), w.verb(), shellWord(u.name))
	}
	// The files of a transient unit would outlive it. And to touch the setting
	// is all that a lost unit needs.
	runtime := w.runtime || u.transient || rearm
	if w.dry {
		w.describe(u, runtime, rearm)
		return nil
	}
	type property struct {
		Name  string
		Value dbus.Variant
	}
	change := []property{{"IPAccounting", dbus.MakeVariant(w.on)}}
	if err := w.m.call(ctx, "SetUnitProperties", u.name, runtime, change).Err; err != nil {
		if denied(err) {
			return err
		}
		return fmt.Errorf("set IPAccounting of %s: %w; see \"journalctl -b _PID=1 -n 20\"", u.name, err)
	}
	now, err := w.settled(ctx, u)
	if err != nil {
		return err
	}
	// systemd calls it a success that it could not write the file, and the next
	// daemon-reload would take the change back.
	if !runtime && !now.persistent {
		err := w.m.call(ctx, "SetUnitProperties", u.name, true, change).Err
		return errors.Join(fmt.Errorf("keep IPAccounting of %s: systemd could not write %s/%s.d/%s, so it is %s until the next boot only; make /etc writable, and run it again",
			u.name, persistentDir, u.name, settingFile, onOff(now.on)), err)
	}
	fmt.Fprintf(w.out, "%s: %s\n", u.name, outcome(u, now, runtime, rearm))
	return nil
}

// settled reads the unit until it shows the change.
func (w *switcher) settled(ctx context.Context, u accountedUnit) (accountedUnit, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		now, err := w.m.unit(ctx, u.name, u.path)
		// A socket without IP never has counters; anything else with a cgroup has
		// them as soon as the programs are attached.
		waits := w.on && now.active && path.Ext(u.name) != ".socket" && !now.hasData
		if err == nil && now.on == w.on && !waits {
			return now, nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
			continue
		case <-ctx.Done():
		}
		switch {
		case err != nil:
			return now, err
		case now.on != w.on:
			return now, fmt.Errorf("set IPAccounting of %s: systemd took it, and still shows %s; see \"systemctl cat %s\" for what overrides it", u.name, onOff(now.on), u.name)
		}
		return now, fmt.Errorf("switch on IP accounting of %s: it is set, and systemd has no counters for it: it cannot use BPF here; see \"unitmeter doctor\"", u.name)
	}
}

// outcome tells what has changed.
func outcome(before, now accountedUnit, runtime, rearm bool) string {
	until := "from now on"
	if runtime {
		until = "until the next boot"
	}
	if rearm && now.hasData {
		return "counting again"
	}
	if before.transient {
		until = "until it ends, since it is a transient unit"
	}
	switch {
	case before.on == now.on:
		return "IP accounting stays " + onOff(now.on) + ", after the next boot too"
	case !now.on:
		return "IP accounting is off " + until
	case now.hasData:
		return "IP accounting is on " + until + "; counting from 0"
	case now.active:
		return "IP accounting is on " + until + "; it has no IP sockets to count yet"
	}
	return "IP accounting is on " + until + "; it counts when the unit starts"
}

// describe is the dry run of setUnit.
func (w *switcher) describe(u accountedUnit, runtime, rearm bool) {
	dir, flag, why := persistentDir, "", ""
	if runtime {
		dir, flag = runtimeDir, "--runtime "
	}
	switch {
	case u.transient:
		dir = "/run/systemd/transient"
		why = " (it is a transient unit)"
	case rearm:
		why = " (its counters are lost)"
	}
	fmt.Fprintf(w.out, "%s%s:\n", u.name, why)
	fmt.Fprintf(w.out, "  would call  %s.SetUnitProperties(%q, %t, [IPAccounting=%t])\n", managerInterface, u.name, runtime, w.on)
	fmt.Fprintf(w.out, "  systemd writes  %s/%s.d/%s\n", dir, u.name, settingFile)
	if strings.HasPrefix(u.name, "-") {
		flag += "-- "
	}
	fmt.Fprintf(w.out, "  the same as  systemctl set-property %s%s IPAccounting=%s\n", flag, shellWord(u.name), yesNo(w.on))
}

// setDefault writes or removes the drop-in of systemd's own configuration and
// has systemd read it.
func (w *switcher) setDefault(ctx context.Context) error {
	dir := "/etc/systemd"
	if w.runtime {
		dir = "/run/systemd"
	}
	file := filepath.Join(dir, defaultFile)
	present, err := os.ReadFile(file)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read %s: %w", file, err)
	case err == nil && !strings.HasPrefix(string(present), "# Written by \"unitmeter"):
		return fmt.Errorf("change %s: it was not written by unitmeter; look at it, and remove it by hand", file)
	case err != nil && !w.on:
		fmt.Fprintf(w.out, "nothing to do: there is no %s\n", file)
		return w.checkDefault(ctx)
	}
	fmt.Fprint(w.out, w.explainDefault(ctx, file))
	if w.dry {
		return nil
	}
	before, err := w.m.loaded(ctx, []string{"active"}, "*")
	if err != nil {
		return err
	}
	if err := w.writeDefault(file); err != nil {
		return err
	}
	if err := w.m.call(ctx, "Reload").Err; err != nil {
		if denied(err) {
			return fmt.Errorf("reload systemd: it refused uid %d: %w; run \"systemctl daemon-reload\" as root", os.Geteuid(), err)
		}
		return fmt.Errorf("reload systemd: %w; run \"systemctl daemon-reload\"", err)
	}
	if err := w.restoreLost(ctx, before); err != nil {
		return err
	}
	return w.verifyDefault(ctx, before)
}

// explainDefault tells what is about to be done.
func (w *switcher) explainDefault(ctx context.Context, file string) string {
	would := ""
	if w.dry {
		would = "would "
	}
	var b strings.Builder
	if w.on {
		fmt.Fprintf(&b, "%swrite %s:\n", would, file)
		for line := range strings.Lines(defaultText) {
			b.WriteString("  " + line)
		}
	} else {
		fmt.Fprintf(&b, "%sremove %s\n", would, file)
	}
	fmt.Fprintf(&b, "%scall %s.Reload(), the same as: systemctl daemon-reload\n", would, managerInterface)
	b.WriteString("No unit is restarted. A reload costs the units that are counted about 0.1 s of counting.\n")
	if w.reloadLoses(ctx) {
		b.WriteString("This systemd loses the counters of running units at a reload; they are made to count again at once.\n")
	}
	return b.String()
}

// writeDefault writes or removes the drop-in.
func (w *switcher) writeDefault(file string) error {
	err := os.MkdirAll(filepath.Dir(file), 0o755)
	if w.on && err == nil {
		err = os.WriteFile(file, []byte(defaultText), 0o644)
	} else if err == nil {
		err = os.Remove(file)
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("change systemd's configuration: %w; run it as root, as in \"sudo unitmeter %s --default\"", err, w.verb())
	}
	if err != nil {
		return fmt.Errorf("change systemd's configuration: %w", err)
	}
	return nil
}

// reloadLoses reports whether this systemd makes units lose their counters at a
// reload, and leaves units without that get accounting by it (systemd#38112).
func (w *switcher) reloadLoses(ctx context.Context) bool {
	v, err := w.m.version(ctx)
	return err == nil && !v.before(256, 0) && v.before(258, 0)
}

// restoreLost makes what the reload has lost count again.
func (w *switcher) restoreLost(ctx context.Context, units []accountedUnit) error {
	if !w.reloadLoses(ctx) {
		return nil
	}
	arm := *w
	arm.on = true
	var errs []error
	for _, u := range units {
		if now, err := w.m.unit(ctx, u.name, u.path); err == nil && now.lost() {
			errs = append(errs, arm.setUnit(ctx, now))
		}
	}
	return errors.Join(errs...)
}

// verifyDefault asks systemd what it has made of it.
func (w *switcher) verifyDefault(ctx context.Context, before []accountedUnit) error {
	changed, on := 0, 0
	for _, u := range before {
		now, err := w.m.unit(ctx, u.name, u.path)
		if err != nil {
			continue // it ended meanwhile
		}
		changed += count(now.on != u.on)
		on += count(now.on)
	}
	fmt.Fprintf(w.out, "%d running units have IP accounting on; it changed for %d\n", on, changed)
	return w.checkDefault(ctx)
}

// checkDefault tells if systemd's default is not what was asked for.
func (w *switcher) checkDefault(ctx context.Context) error {
	now, err := w.m.defaultAccounting(ctx)
	if err != nil {
		return fmt.Errorf("check systemd's default: %w", err)
	}
	if now != w.on {
		return fmt.Errorf("set DefaultIPAccounting: systemd still has %s; another file decides it: see \"systemd-analyze cat-config systemd/system.conf\"", yesNo(now))
	}
	return nil
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func yesNo(on bool) string {
	if on {
		return "yes"
	}
	return "no"
}
