package accounting

import (
	"context"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// Types are the types of unit that have IP counters.
func Types() []string { return append(receiver.DefaultTypes(), "slice") }

// Possible reports whether units of this unit's type have IP accounting.
func Possible(unit string) bool { return counterInterface(unit) != "" }

// counterInterface is the D-Bus interface with IPAccounting and the counters of a
// unit, or "" for a type without.
func counterInterface(unit string) string {
	return systemd.CounterInterface(strings.TrimPrefix(path.Ext(unit), "."))
}

// CarriesTraffic is false for the types of unit that hardly ever have anything
// to count: the kernel itself serves most mounts and swaps, outside of any unit.
func CarriesTraffic(unit string) bool {
	kind := path.Ext(unit)
	return kind != ".mount" && kind != ".swap"
}

// FullName completes a name without a type, as systemctl does.
func FullName(unit string) string {
	if IsPattern(unit) || strings.ContainsAny(unit, ".(") { // "(overflow)" has no type
		return unit
	}
	return unit + ".service"
}

// IsPattern reports whether a name has wildcards.
func IsPattern(name string) bool { return strings.ContainsAny(name, "*?[") }

// literal makes the backslash of a pattern an ordinary character, as it is in the
// names of units: for path.Match and fnmatch(3) it is an escape.
func literal(pattern string) string { return strings.ReplaceAll(pattern, `\`, `\\`) }

// Patterns completes names of units and checks patterns of names.
func Patterns(args []string) ([]string, error) {
	var patterns []string
	for _, arg := range args {
		arg = FullName(arg)
		if _, err := path.Match(literal(arg), ""); err != nil {
			return nil, fmt.Errorf("%q is no unit name and no pattern; use a name such as nats.service or a pattern such as nats*", arg)
		}
		patterns = append(patterns, arg)
	}
	return patterns, nil
}

// Match returns the first pattern that matches a unit, or "".
func Match(patterns []string, unit string) string {
	for _, p := range patterns {
		if ok, _ := path.Match(literal(p), unit); ok {
			return p
		}
	}
	return ""
}

// Resolve replaces aliases by the names of the units that have them. Patterns and
// names of units that are not loaded stay.
func Resolve(ctx context.Context, cfg receiver.Config, names []string) []string {
	if len(names) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	m, err := Connect(ctx, cfg.Addresses()...)
	if err != nil {
		return names // the reading of the units reports it
	}
	defer m.Close()
	resolved := make([]string, len(names))
	for i, name := range names {
		var p dbus.ObjectPath
		resolved[i] = name
		if !IsPattern(name) && m.Call(ctx, "GetUnit", name).Store(&p) == nil {
			_ = m.Get(ctx, p, bus.UnitInterface, "Id", &resolved[i])
		}
	}
	return resolved
}

// EnableCommand switches on units that are off. It names a few units and not
// "--all": the rest may be off on purpose.
func EnableCommand(off []string) string {
	const few = 3
	if len(off) > few {
		return "unitmeter enable --all"
	}
	command := "unitmeter enable"
	for _, name := range off {
		command += " " + tty.ShellWord(name)
	}
	return command
}

// WriteHints writes how to get numbers for units without: how many are off, with
// the command for them, and how many are lost.
func WriteHints(w io.Writer, off, lost int, enable string) error {
	var err error
	if off > 0 {
		_, err = fmt.Fprintf(w, "\nUnits with IP accounting off: %d. To switch it on: %s\n", off, tty.Clean(enable))
	}
	if lost > 0 && err == nil {
		_, err = fmt.Fprintf(w, "\nUnits whose counters systemd has lost: %d. To count again: unitmeter enable --lost\n", lost)
	}
	return err
}

// connectTimeout is the upper bound for reaching systemd.
const connectTimeout = 10 * time.Second
