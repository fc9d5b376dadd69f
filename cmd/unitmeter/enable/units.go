package enable

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// settleTimeout is how long systemd may take to attach the counting programs after
// the setting has changed.
const settleTimeout = 3 * time.Second

// follow restores lost counters now and after each reload of systemd, until ctx or
// the connection ends. It is what unitmeter-rearm.service runs.
func (w *switcher) follow(ctx context.Context) error {
	for {
		units, err := w.choose(ctx)
		if err == nil && len(units) > 0 {
			err = w.setUnits(ctx, units)
		}
		if accounting.Denied(err) || ctx.Err() != nil {
			return err
		}
		if err != nil {
			fmt.Fprintln(w.Out, tty.Line(err)) // of one unit: the others are restored
		}
		if err := w.m.Reloaded(ctx); err != nil {
			return err
		}
	}
}

// choose finds the units that the command line names.
func (w *switcher) choose(ctx context.Context) ([]accounting.Unit, error) {
	if w.Subject == All || w.Subject == Lost {
		selection, err := accounting.Selection(ctx, w.Receiver)
		if err != nil {
			return nil, err
		}
		units, err := w.m.Loaded(ctx, []string{"active", "reloading", "refreshing", "activating", "deactivating", "maintenance"}, "*")
		if err != nil {
			return nil, err
		}
		return slices.DeleteFunc(units, func(u accounting.Unit) bool {
			if !selection.Metered(u.Name) || !accounting.CarriesTraffic(u.Name) && (!u.Active || w.On && !w.m.HasProcesses(ctx, u.Name)) {
				return true
			}
			if w.Subject == Lost {
				return !u.Lost()
			}
			return u.On == w.On && !(w.On && u.Lost()) && !w.keeps(u)
		}), nil
	}
	var units []accounting.Unit
	for _, name := range w.Names {
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
	return u.On == w.On && u.Runtime && !u.Persistent && !w.Runtime
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
		if w.Subject == Lost {
			why = "no running unit has lost its counters"
		} else if w.On {
			why = "no running unit with traffic to count has IP accounting off"
		}
		fmt.Fprintln(w.Out, "nothing to do: "+why)
		return nil
	}
	var errs []error
	for _, u := range units {
		err := w.setUnit(ctx, u)
		if accounting.Denied(err) { // as it would be for all others
			which := u.Name
			if w.Subject == All {
				which = "--all"
			} else if w.Subject == Lost {
				which = "--lost"
			}
			return fmt.Errorf("set IPAccounting of %s: systemd refused uid %d: %w; run \"sudo unitmeter %s %s\"", u.Name, os.Geteuid(), err, w.verb(), tty.ShellWord(which))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// setUnit changes one unit, and prints what systemd shows after that.
func (w *switcher) setUnit(ctx context.Context, u accounting.Unit) error {
	rearm := w.On && u.On && u.Active && !u.HasData
	if u.On == w.On && !rearm && !w.keeps(u) {
		fmt.Fprintf(w.Out, "%s: IP accounting is already %s\n", u.Name, onOff(w.On))
		return nil
	}
	if w.Runtime && u.On != w.On && u.Persistent {
		return fmt.Errorf("set IPAccounting of %s until the next boot: %s/%s.d/%s says %s, which would win at the next daemon-reload; use \"unitmeter %s %s\"",
			u.Name, accounting.PersistentDir, u.Name, accounting.SettingFile, yesNo(u.On), w.verb(), tty.ShellWord(u.Name))
	}
	// The files of a transient unit would outlive it, and a lost unit needs no file.
	runtime := w.Runtime || u.Transient || rearm
	if w.DryRun {
		w.describe(u, runtime, rearm)
		return nil
	}
	type property struct {
		Name  string
		Value dbus.Variant
	}
	change := []property{{"IPAccounting", dbus.MakeVariant(w.On)}}
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
	fmt.Fprintf(w.Out, "%s: %s\n", u.Name, outcome(u, now, runtime, rearm))
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
		waits := w.On && now.Active && path.Ext(u.Name) != ".socket" && !now.HasData
		if err == nil && now.On == w.On && !waits {
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
		case now.On != w.On:
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
	fmt.Fprintf(w.Out, "%s%s:\n", u.Name, why)
	fmt.Fprintf(w.Out, "  call             %s.SetUnitProperties(%q, %t, [IPAccounting=%t])\n", bus.ManagerInterface, u.Name, runtime, w.On)
	fmt.Fprintf(w.Out, "  file             %s/%s.d/%s\n", dir, u.Name, accounting.SettingFile)
	if strings.HasPrefix(u.Name, "-") {
		option += "-- "
	}
	fmt.Fprintf(w.Out, "  the same as      systemctl set-property %s%s IPAccounting=%s\n", option, tty.ShellWord(u.Name), yesNo(w.On))
}
