package accounting

import (
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
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

// Patterns completes names of units and checks patterns of names.
func Patterns(args []string) (systemd.Patterns, error) {
	full := make([]string, len(args))
	for i, arg := range args {
		full[i] = systemd.FullName(arg)
	}
	return systemd.ParsePatterns(full)
}

// UnitName is the unit in a name as eBPF gives it: without the user before it and the
// container behind it.
func UnitName(text string) string {
	name, _, _ := strings.Cut(text, " ")
	return name[strings.IndexByte(name, '/')+1:]
}

// Resolve replaces aliases by the names of the units that have them. Patterns and
// names of units that are not loaded stay.
func Resolve(ctx context.Context, cfg receiver.Config, patterns systemd.Patterns) (systemd.Patterns, error) {
	own, err := ownNames(ctx, cfg, patterns.Texts())
	return patterns.Named(own), err
}

// Selection returns what a configuration meters, by the units' own names.
func Selection(ctx context.Context, cfg receiver.Config) (receiver.Selection, error) {
	s, err := cfg.Selection()
	if err != nil {
		return s, err
	}
	own, err := ownNames(ctx, cfg, s.Names())
	return s.Named(own), err
}

// ownNames asks systemd for the units' own names.
func ownNames(ctx context.Context, cfg receiver.Config, names []string) (map[string]string, error) {
	if !slices.ContainsFunc(names, func(name string) bool { return !systemd.IsPattern(name) }) {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	m, err := Connect(ctx, cfg.Addresses()...)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	return m.own(ctx, names), nil
}

// The units of the packages: the agent, the loader of its eBPF program, and what restores
// lost counters after each reload of systemd (see "enable --rearm").
const (
	AgentUnit = "unitmeter.service"
	MeterUnit = "unitmeter-meter.service"
	RearmUnit = "unitmeter-rearm.service"
)

// EnableAll is the command that gives counters to all units. All commands recommend it.
const EnableAll = "unitmeter enable --default"

// EnableCommand switches on units that are off. It names a few units and not all:
// the rest may be off on purpose.
func EnableCommand(off []string) string {
	const few = 3
	if len(off) > few {
		return EnableAll
	}
	command := "unitmeter enable"
	for _, name := range off {
		command += " " + tty.ShellWord(name)
	}
	return command
}

// WriteHints writes, below a table, who counted the units, and how to get numbers for
// units without: how many are off, with the command for them, and how many are lost.
func WriteHints(w io.Writer, o Origin, off, lost int, enable string) error {
	text := "\nCounted " + o.String() + "."
	if hint := o.Hint(); hint != "" {
		text = "\n" + tty.Wrap(text+" "+strings.ToUpper(hint[:1])+hint[1:], 0, 79)
	}
	if off > 0 {
		text += fmt.Sprintf("\nUnits with IP accounting off: %d. To switch it on: %s", off, tty.Clean(enable))
	}
	if lost > 0 {
		text += fmt.Sprintf("\nUnits whose counters systemd has lost: %d. To count again: unitmeter enable --lost", lost)
	}
	_, err := fmt.Fprintln(w, text)
	return err
}

// connectTimeout is the upper bound for reaching systemd.
const connectTimeout = 10 * time.Second
