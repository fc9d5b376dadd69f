package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// unitState is one unit in the output of "units".
type unitState struct {
	Unit string `json:"unit"`
	// State is metered, excluded, or why there are no numbers: off, lost,
	// no-data, failed, unknown.
	State string `json:"state"`
	// Reason says why, Fix what to do about it; empty where nothing is to be done.
	Reason string `json:"reason"`
	Fix    string `json:"fix,omitempty"`
	// EBPF is metered where a loaded program counts the unit, possible where one could,
	// and empty where none can or nobody may ask.
	EBPF string `json:"ebpf,omitempty"`
	// Series is the systemd.unit.name under which the unit is sent, empty where
	// it is not.
	Series string `json:"series,omitempty"`
	Slice  string `json:"slice,omitempty"`
}

// units prints every unit that could be metered, and what becomes of it.
func units(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	asJSON := flags.Bool("json", false, "print a JSON array with one object for each unit")
	patterns, err := parsePatterns(t, flags)
	if err != nil {
		return err
	}
	cfg, err := loadUnits(ctx, t)
	if err != nil {
		return err
	}
	selection, err := accounting.Selection(ctx, cfg)
	if err != nil {
		return err
	}
	// All units that could be metered, so that it can be said why they are not.
	everything := cfg
	everything.Include, everything.Exclude, everything.Types = nil, nil, accounting.Types()
	source, err := accounting.Open(ctx, everything, receiver.DBus, systemd.Patterns{})
	if err != nil {
		return err
	}
	defer source.Close()
	sweep := source.Read(ctx)
	if err := sweep.Err(); err != nil {
		return err
	}
	everything.Types = nil
	counting, byEBPF, refused := countedByEBPF(ctx, everything)
	list := make([]accounting.Reading, 0, len(sweep.Units))
	for _, u := range sweep.Units {
		list = append(list, accounting.Reading{Unit: u})
	}
	for name, u := range byEBPF {
		if !slices.ContainsFunc(sweep.Units, func(v systemd.Unit) bool { return v.Name == name }) {
			u.Accounting = "none"
			list = append(list, accounting.Reading{Unit: u})
		}
	}
	slices.SortFunc(list, func(a, b accounting.Reading) int { return strings.Compare(a.Name, b.Name) })
	if list, err = accounting.Choose(ctx, everything, receiver.DBus, list, patterns); err != nil {
		return err
	}
	states := make([]unitState, 0, len(list))
	for _, r := range list {
		s := stateOf(selection, r)
		if _, ok := byEBPF[r.Name]; ok && s.State != "excluded" {
			s.EBPF = counting
		}
		states = append(states, s)
	}
	if *asJSON {
		return tty.WriteJSON(t.stdout, states)
	}
	return printStates(t.stdout, states, patterns.Len() > 0, counting, refused)
}

// countedByEBPF returns the units that an eBPF program counts, with "metered", or
// could count, with "possible". refused is why there are none.
func countedByEBPF(ctx context.Context, cfg receiver.Config) (counting string, units map[string]systemd.Unit, refused error) {
	source, err := accounting.Open(ctx, cfg, receiver.EBPF, systemd.Patterns{})
	if err != nil {
		return "", nil, err
	}
	defer source.Close()
	sweep := source.Read(ctx)
	if err := sweep.Err(); err != nil {
		return "", nil, err
	}
	units = make(map[string]systemd.Unit, len(sweep.Units))
	for _, u := range sweep.Units {
		if u.Accounting == "on" && u.Name != receiver.Unattributed {
			units[u.Name] = u
		}
	}
	if source.Own {
		return "possible", units, nil
	}
	return "metered", units, nil
}

// stateOf says what becomes of a unit under a configuration.
func stateOf(selection receiver.Selection, r accounting.Reading) unitState {
	s := unitState{Unit: r.Name, State: strings.ReplaceAll(r.Accounting, "_", "-"), Slice: r.Slice}
	if why := whyExcluded(selection, r.Name); why != "" {
		s.State, s.Reason = "excluded", why
		return s
	}
	if r.Accounting != "on" {
		s.Reason, s.Fix = withoutNumbers(r)
		return s
	}
	s.State, s.Series, s.Reason = "metered", r.Name, "in a series of its own"
	if fold := selection.Fold.Match(r.Name); fold != "" {
		s.Series, s.Reason = fold, "folded into "+fold
	}
	return s
}

// withoutNumbers says why a unit has no numbers, and the command that helps; "" if
// nothing is to be done.
func withoutNumbers(r accounting.Reading) (reason, fix string) {
	name := tty.ShellWord(r.Name)
	switch r.Accounting {
	case "off":
		if !accounting.CarriesTraffic(r.Name) {
			return "off; a mount has traffic only if a program serves it", ""
		}
		reason, fix = "IP accounting is off", "unitmeter enable "+name
	case "lost":
		reason, fix = "systemd lost its counters", "unitmeter enable --runtime "+name
	case "no_data":
		return "it has no processes or IP sockets that systemd could count", ""
	case "none":
		return "systemd does not count it", ""
	case "failed":
		return "systemd's answer is not valid", "report a bug with the output of: systemctl show " + name
	default:
		return "it could not be read", "unitmeter units " + name
	}
	if r.Masked {
		return reason + "; systemd changes no settings of a masked unit", ""
	}
	return reason, fix
}

// whyExcluded says which setting keeps a unit from being metered, or "".
func whyExcluded(s receiver.Selection, name string) string {
	kind := systemd.TypeOf(name)
	switch pattern := s.Exclude.Match(name); {
	case s.Metered(name):
		return ""
	case pattern != "":
		return "UNITMETER_EXCLUDE has " + pattern
	case len(s.Types) == 0 || slices.Contains(s.Types, kind):
		return "no pattern of UNITMETER_INCLUDE matches"
	case kind == "slice":
		return "a slice has the traffic of the units in it; UNITMETER_UNIT_TYPES leaves it out"
	}
	return "UNITMETER_UNIT_TYPES has no " + kind
}

// printStates prints the metered units first, then the others by what is the
// matter with them. Excluded units are only counted, unless asked for.
func printStates(w io.Writer, states []unitState, all bool, counting string, refused error) error {
	order := []string{"metered", "lost", "failed", "unknown", "off", "no-data", "none", "excluded"}
	slices.SortStableFunc(states, func(a, b unitState) int {
		return slices.Index(order, a.State) - slices.Index(order, b.State)
	})
	header := []string{"SYSTEMD", "EBPF", "UNIT", "REASON", "FIX"}
	if counting == "" {
		header = slices.Delete(header, 1, 2)
	}
	tab := tty.NewTable(w, false, header...)
	tab.Drop([]string{"FIX"}, []string{"REASON"})
	counts := map[string]int{}
	for _, s := range states {
		counts[s.State]++
		if s.State == "excluded" && !all {
			continue
		}
		row := []string{s.State, cmp.Or(s.EBPF, "-"), s.Unit, s.Reason, s.Fix}
		if counting == "" {
			row = slices.Delete(row, 1, 2)
		}
		tab.Row(row...)
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	var parts []string
	for _, state := range order {
		if n := counts[state]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, state))
		}
	}
	text := fmt.Sprintf("%d units: %s.", len(states), strings.Join(parts, ", "))
	switch {
	case counting == "possible":
		text += "\nTo count all of them without IP accounting: unitmeter enable --ebpf"
	case counting == "metered":
		text += "\nAn eBPF program counts all of them but those with a -."
	case os.Geteuid() != 0:
		text += "\nAs root, it also shows what eBPF can count."
	case refused != nil:
		text += "\n" + tty.Wrap("eBPF cannot count here: "+tty.Line(refused), 0, 79)
	}
	_, err := fmt.Fprintf(w, "\n%s\n", text)
	return err
}
