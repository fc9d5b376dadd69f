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

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

const (
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
	ebpf, rearm, follow, reset         bool
}

// enable switches IP accounting on. It needs root, or polkit's manage-units.
func enable(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	return switchAccounting(ctx, t, flags, true)
}

// disable switches IP accounting off.
func disable(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	return switchAccounting(ctx, t, flags, false)
}

// switchAccounting finds all units before it changes the first: with a wrong name,
// nothing is changed.
func switchAccounting(ctx context.Context, t *terminal, flags *flag.FlagSet, on bool) error {
	s, err := parseSelection(t, flags, on)
	if err != nil {
		return err
	}
	if s.ebpf && s.dry {
		return switchSource(ctx, t, on, s.dry)
	}
	cfg, err := loadUnits(ctx, t)
	if err != nil {
		return err
	}
	connect := accounting.Connect
	if s.follow {
		connect = accounting.Follow
	}
	m, err := connect(ctx, cfg.Addresses()...)
	if err != nil {
		return fmt.Errorf("%w; see \"unitmeter doctor\"", accounting.Explain(err))
	}
	defer m.Close()
	w := &switcher{m: m, out: t.stdout, verb: flags.Name(), on: on, selection: s}
	if !s.dry && m.Outside() {
		return fmt.Errorf("change the settings of the host from a container: the files to write are not here; run this on the host: %s", w.onHost())
	}
	switch {
	case s.ebpf:
		return switchSource(ctx, t, on, s.dry)
	case s.rearm:
		return switchRearm(ctx, t, on, s.dry)
	case s.reset:
		return reset(ctx, t, s.dry)
	case s.follow:
		return w.follow(ctx, cfg)
	case s.byDefault:
		return w.setDefault(ctx)
	}
	units, err := w.choose(ctx, cfg)
	if err != nil {
		return err
	}
	return w.setUnits(ctx, units)
}

// parseSelection reads the command line.
func parseSelection(t *terminal, flags *flag.FlagSet, on bool) (s selection, err error) {
	choices := "names of units, or one of --all, --default, --ebpf, --rearm and --reset"
	if on {
		choices = "names of units, or one of --all, --lost, --default, --ebpf and --rearm"
		flags.BoolVar(&s.all, "all", false, "all metered and running units with IP accounting off, and lost ones")
		flags.BoolVar(&s.lost, "lost", false, "the units whose counters systemd has lost")
		flags.BoolVar(&s.byDefault, "default", false, "all units, future ones too: set DefaultIPAccounting=yes and reload systemd")
		flags.BoolVar(&s.follow, "follow", false, "with --lost: now and after each reload of systemd, until stopped")
		flags.BoolVar(&s.rearm, "rearm", false, "no unit: let unitmeter-rearm.service do what --lost --follow does")
		flags.BoolVar(&s.ebpf, "ebpf", false, "no unit: let unitmeter.service count all units by its own eBPF program, and restart it")
	} else {
		flags.BoolVar(&s.all, "all", false, "all metered and running units with IP accounting on")
		flags.BoolVar(&s.byDefault, "default", false, "undo \"enable --default\", and reload systemd")
		flags.BoolVar(&s.rearm, "rearm", false, "undo \"enable --rearm\"")
		flags.BoolVar(&s.reset, "reset", false, "undo all that enable and systemctl set-property IPAccounting= ever switched, and reload systemd")
		flags.BoolVar(&s.ebpf, "ebpf", false, "undo \"enable --ebpf\", and restart unitmeter.service")
	}
	flags.BoolVar(&s.runtime, "runtime", false, "until the next boot only")
	flags.BoolVar(&s.dry, "dry-run", false, "print the changes, and make none")
	patterns, err := parsePatterns(t, flags)
	if err != nil {
		return s, err
	}
	s.names = patterns.Texts()
	for _, arg := range t.args {
		if flags.Lookup(arg) != nil {
			return s, usageError{fmt.Errorf("%q is a flag: write \"unitmeter %s --%s\"; for a unit of that name write %s.service", arg, flags.Name(), arg, arg)}
		}
	}
	ways := 0
	for _, given := range []bool{len(s.names) > 0, s.all, s.lost, s.byDefault, s.ebpf, s.rearm, s.reset} {
		if given {
			ways++
		}
	}
	if (s.ebpf || s.rearm || s.reset) && s.runtime {
		return s, usageError{errors.New("--runtime does not go with --ebpf, --rearm and --reset, which are for good")}
	}
	if s.follow && (!s.lost || s.dry) {
		return s, usageError{errors.New("--follow goes with --lost only")}
	}
	if ways != 1 {
		return s, usageError{fmt.Errorf("want %s; see \"unitmeter help %s\"", choices, flags.Name())}
	}
	return s, nil
}

// switcher turns accounting on or off.
type switcher struct {
	m    *accounting.Manager
	out  io.Writer
	verb string // enable or disable
	on   bool
	selection
}

// onHost returns a command that does the same without this program, where there is one.
func (w *switcher) onHost() string {
	switch {
	case w.byDefault && w.on:
		return fmt.Sprintf("mkdir -p /etc/systemd/system.conf.d && printf '[Manager]\\nDefaultIPAccounting=yes\\n' >/etc/systemd/%s && systemctl daemon-reload", defaultFile)
	case w.byDefault:
		return "rm /etc/systemd/" + defaultFile + " && systemctl daemon-reload"
	case w.ebpf:
		return "unitmeter " + w.verb + " --ebpf"
	case w.rearm:
		return "unitmeter " + w.verb + " --rearm"
	case w.reset:
		return "unitmeter disable --reset"
	case w.lost:
		return "unitmeter enable --lost"
	case len(w.names) == 0:
		return "unitmeter " + w.verb + " --all"
	}
	var commands []string
	for _, name := range w.names {
		commands = append(commands, "systemctl set-property "+tty.ShellWord(name)+" IPAccounting="+yesNo(w.on))
	}
	return strings.Join(commands, " && ")
}

// choose finds the units that the command line names.
func (w *switcher) choose(ctx context.Context, cfg receiver.Config) ([]accounting.Unit, error) {
	if w.all || w.lost {
		selection, err := accounting.Selection(ctx, cfg)
		if err != nil {
			return nil, err
		}
		units, err := w.m.Loaded(ctx, []string{"active", "reloading", "refreshing", "activating", "deactivating", "maintenance"}, "*")
		if err != nil {
			return nil, err
		}
		return slices.DeleteFunc(units, func(u accounting.Unit) bool {
			if !selection.Metered(u.Name) || !accounting.CarriesTraffic(u.Name) && (!u.Active || w.on && !w.m.HasProcesses(ctx, u.Name)) {
				return true
			}
			if w.lost {
				return !u.Lost()
			}
			return u.On == w.on && !(w.on && u.Lost()) && !w.keeps(u)
		}), nil
	}
	var units []accounting.Unit
	for _, name := range w.names {
		found, err := w.named(ctx, name)
		if err != nil {
			return nil, err
		}
		for _, u := range found {
			if !slices.ContainsFunc(units, func(v accounting.Unit) bool { return v.Name == u.Name }) {
				units = append(units, u)
			}
		}
	}
	return units, nil
}

// keeps reports whether a unit has the wanted setting, but until the next boot only.
func (w *switcher) keeps(u accounting.Unit) bool {
	return u.On == w.on && u.Runtime && !u.Persistent && !w.runtime
}

// named finds the units of one argument: a name, which is loaded if it is not,
// or a pattern of loaded units.
func (w *switcher) named(ctx context.Context, name string) ([]accounting.Unit, error) {
	if systemd.IsPattern(name) {
		units, err := w.m.Loaded(ctx, []string{}, name)
		if err == nil && len(units) == 0 {
			err = fmt.Errorf("find units %q: no loaded unit with IP counters matches; see \"systemctl list-units --all '%s'\"", name, name)
		}
		return units, err
	}
	if !accounting.Possible(name) {
		return nil, fmt.Errorf("find unit %q: units of this type have no IP accounting; the types %s have", name, strings.Join(accounting.Types(), ", "))
	}
	p, state, err := w.m.Load(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("find unit %q: %w; see \"systemctl list-units\" for names", name, err)
	}
	if state != "loaded" {
		return nil, fmt.Errorf("find unit %q: its state is %q; see \"systemctl status %s\", and \"systemctl list-units\" for names", name, state, name)
	}
	u, err := w.m.Unit(ctx, name, p)
	return []accounting.Unit{u}, err
}

// setUnits changes the units one after the other, and goes on after a failure.
func (w *switcher) setUnits(ctx context.Context, units []accounting.Unit) error {
	if len(units) == 0 {
		why := "no metered and running unit has IP accounting on"
		if w.lost {
			why = "no running unit has lost its counters"
		} else if w.on {
			why = "no running unit with traffic to count has IP accounting off"
		}
		fmt.Fprintln(w.out, "nothing to do: "+why)
		return nil
	}
	var errs []error
	for _, u := range units {
		err := w.setUnit(ctx, u)
		if accounting.Denied(err) { // as it would be for all others
			which := u.Name
			if w.all {
				which = "--all"
			} else if w.lost {
				which = "--lost"
			}
			return fmt.Errorf("set IPAccounting of %s: systemd refused uid %d: %w; run \"sudo unitmeter %s %s\"", u.Name, os.Geteuid(), err, w.verb, tty.ShellWord(which))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// setUnit changes one unit, and prints what systemd shows after that.
func (w *switcher) setUnit(ctx context.Context, u accounting.Unit) error {
	rearm := w.on && u.On && u.Active && !u.HasData
	if u.On == w.on && !rearm && !w.keeps(u) {
		fmt.Fprintf(w.out, "%s: IP accounting is already %s\n", u.Name, onOff(w.on))
		return nil
	}
	if w.runtime && u.On != w.on && u.Persistent {
		return fmt.Errorf("set IPAccounting of %s until the next boot: %s/%s.d/%s says %s, which would win at the next daemon-reload; use \"unitmeter %s %s\"",
			u.Name, accounting.PersistentDir, u.Name, accounting.SettingFile, yesNo(u.On), w.verb, tty.ShellWord(u.Name))
	}
	// The files of a transient unit would outlive it, and a lost unit needs no file.
	runtime := w.runtime || u.Transient || rearm
	if w.dry {
		w.describe(u, runtime, rearm)
		return nil
	}
	type property struct {
		Name  string
		Value dbus.Variant
	}
	change := []property{{"IPAccounting", dbus.MakeVariant(w.on)}}
	if err := w.m.Call(ctx, "SetUnitProperties", u.Name, runtime, change).Err; err != nil {
		if accounting.Denied(err) {
			return err
		}
		return fmt.Errorf("set IPAccounting of %s: %w; see \"journalctl -b _PID=1 -n 20\"", u.Name, err)
	}
	now, err := w.settled(ctx, u)
	if err != nil {
		return err
	}
	// systemd reports success even if it could not write the file, and the next
	// daemon-reload would undo the change.
	if !runtime && !now.Persistent {
		err := w.m.Call(ctx, "SetUnitProperties", u.Name, true, change).Err
		return errors.Join(fmt.Errorf("keep IPAccounting of %s: systemd could not write %s/%s.d/%s, so it is %s until the next boot only; make /etc writable and try again",
			u.Name, accounting.PersistentDir, u.Name, accounting.SettingFile, onOff(now.On)), err)
	}
	fmt.Fprintf(w.out, "%s: %s\n", u.Name, outcome(u, now, runtime, rearm))
	return nil
}

// settled reads the unit until it shows the change.
func (w *switcher) settled(ctx context.Context, u accounting.Unit) (accounting.Unit, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		now, err := w.m.Unit(ctx, u.Name, u.Path)
		// A socket without IP never has counters; anything else with a cgroup has
		// them as soon as the programs are attached.
		waits := w.on && now.Active && path.Ext(u.Name) != ".socket" && !now.HasData
		if err == nil && now.On == w.on && !waits {
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
		case now.On != w.on:
			return now, fmt.Errorf("set IPAccounting of %s: systemd accepted it, and still has it %s; see \"systemctl cat %s\" for what overrides it", u.Name, onOff(now.On), u.Name)
		}
		return now, fmt.Errorf("switch on IP accounting of %s: systemd has no counters for it, because it cannot use BPF here; see \"unitmeter doctor\"", u.Name)
	}
}

// outcome says what has changed.
func outcome(before, now accounting.Unit, runtime, rearm bool) string {
	until := "from now on"
	if runtime {
		until = "until the next boot"
	}
	if rearm && now.HasData {
		return "counting again"
	}
	if before.Transient {
		until = "until the unit ends, because it is transient"
	}
	switch {
	case before.On == now.On:
		return "IP accounting stays " + onOff(now.On) + ", also after the next boot"
	case !now.On:
		return "IP accounting is off " + until
	case now.HasData:
		return "IP accounting is on " + until + "; counting from 0"
	case now.Active:
		return "IP accounting is on " + until + "; the unit has no IP sockets yet"
	}
	return "IP accounting is on " + until + "; counting begins when the unit starts"
}

// describe is the dry run of setUnit.
func (w *switcher) describe(u accounting.Unit, runtime, rearm bool) {
	dir, option, why := accounting.PersistentDir, "", ""
	if runtime {
		dir, option = accounting.RuntimeDir, "--runtime "
	}
	switch {
	case u.Transient:
		dir = "/run/systemd/transient"
		why = " (it is a transient unit)"
	case rearm:
		why = " (its counters are lost)"
	}
	fmt.Fprintf(w.out, "%s%s:\n", u.Name, why)
	fmt.Fprintf(w.out, "  call             %s.SetUnitProperties(%q, %t, [IPAccounting=%t])\n", bus.ManagerInterface, u.Name, runtime, w.on)
	fmt.Fprintf(w.out, "  file             %s/%s.d/%s\n", dir, u.Name, accounting.SettingFile)
	if strings.HasPrefix(u.Name, "-") {
		option += "-- "
	}
	fmt.Fprintf(w.out, "  the same as      systemctl set-property %s%s IPAccounting=%s\n", option, tty.ShellWord(u.Name), yesNo(w.on))
}

// setDefault writes or removes the drop-in of systemd's own configuration, and
// reloads systemd.
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
		return fmt.Errorf("change %s: it was not written by unitmeter; check it and remove it by hand", file)
	case err != nil && !w.on:
		fmt.Fprintf(w.out, "nothing to do: there is no %s\n", file)
		return w.checkDefault(ctx)
	}
	fmt.Fprint(w.out, w.explainDefault(ctx, file))
	if w.dry {
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
	if err := w.m.Call(ctx, "Reload").Err; err != nil {
		return fmt.Errorf("reload systemd as uid %d: %w; run \"systemctl daemon-reload\" as root", os.Geteuid(), err)
	}
	fmt.Fprintf(w.out, "the reload took %s\n", time.Since(began).Round(10*time.Millisecond))
	return w.verifyDefault(ctx, before)
}

// explainDefault says what setDefault does next.
func (w *switcher) explainDefault(ctx context.Context, file string) string {
	would := ""
	if w.dry {
		would = "would "
	}
	text := fmt.Sprintf("%sremove %s\n", would, file)
	if w.on {
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
	if w.on {
		err = writeWhole(file, defaultText)
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("change systemd's configuration: %w; run \"sudo unitmeter %s --default\"", err, w.verb)
	case err != nil:
		return fmt.Errorf("change systemd's configuration: %w", err)
	}
	return nil
}

// writeWhole writes a file and its directory. The file is whole or, after a failure,
// as it was before: a full disk must not leave an empty drop-in.
func writeWhole(file, text string) (err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	// systemd reads only names that end in .conf.
	f, err := os.CreateTemp(filepath.Dir(file), ".unitmeter-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
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
	arm.on = true
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
	fmt.Fprintf(w.out, "IP accounting is on for %d running units; it changed for %d\n", on, changed)
	return w.checkDefault(ctx)
}

// checkDefault returns an error if systemd has another default.
func (w *switcher) checkDefault(ctx context.Context) error {
	now, err := w.m.Default(ctx)
	if err != nil {
		return fmt.Errorf("check systemd's default: %w", err)
	}
	if now != w.on {
		return fmt.Errorf("set DefaultIPAccounting: systemd still has %s because of another file; see \"systemd-analyze cat-config systemd/system.conf\"", yesNo(now))
	}
	return nil
}

func onOff(on bool) string { return map[bool]string{true: "on", false: "off"}[on] }

func yesNo(on bool) string { return map[bool]string{true: "yes", false: "no"}[on] }
