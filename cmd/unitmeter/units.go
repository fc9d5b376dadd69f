package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"path"
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
	cfg, err := loadConfig(t)
	if err != nil {
		return err
	}
	// All units that could be metered, so that it can be said why they are not.
	everything := cfg.Receiver
	everything.Include, everything.Exclude, everything.Types = nil, nil, accounting.Types()
	readings, err := accounting.Read(ctx, everything, patterns, 0)
	if err != nil {
		return err
	}
	states := make([]unitState, 0, len(readings))
	for _, r := range readings {
		states = append(states, stateOf(cfg.Receiver, r.Unit))
	}
	if *asJSON {
		return tty.WriteJSON(t.stdout, states)
	}
	return printStates(t.stdout, states, len(patterns) > 0)
}

// stateOf says what becomes of a unit under a configuration.
func stateOf(cfg receiver.Config, u systemd.Unit) unitState {
	s := unitState{Unit: u.Name, State: strings.ReplaceAll(u.Accounting, "_", "-"), Slice: u.Slice}
	if why := whyExcluded(cfg, u.Name); why != "" {
		s.State, s.Reason = "excluded", why
		return s
	}
	if u.Accounting != "on" {
		s.Reason, s.Fix = withoutNumbers(u)
		return s
	}
	s.State, s.Series, s.Reason = "metered", u.Name, "in a series of its own"
	if fold := accounting.Match(cfg.Fold, u.Name); fold != "" {
		s.Series, s.Reason = fold, "folded into "+fold
	}
	return s
}

// withoutNumbers says why a unit has no numbers, and the command that helps; "" if
// nothing is to be done.
func withoutNumbers(u systemd.Unit) (reason, fix string) {
	name := tty.ShellWord(u.Name)
	switch u.Accounting {
	case "off":
		if !accounting.CarriesTraffic(u.Name) {
			return "IP accounting is off; a mount has traffic only if a program serves it", ""
		}
		return "IP accounting is off", "unitmeter enable " + name
	case "lost":
		return "systemd lost its counters", "unitmeter enable --runtime " + name
	case "no_data":
		return "it has no processes or IP sockets that systemd could count", ""
	case "failed":
		return "systemd's answer is not valid", "report a bug with the output of: systemctl show " + name
	}
	return "it could not be read", "unitmeter units " + name
}

// whyExcluded says which setting keeps a unit from being metered, or "".
func whyExcluded(cfg receiver.Config, name string) string {
	kind := strings.TrimPrefix(path.Ext(name), ".")
	switch pattern := accounting.Match(cfg.Exclude, name); {
	case len(cfg.Types) > 0 && !slices.Contains(cfg.Types, kind) && kind == "slice":
		return "a slice has the traffic of the units in it; UNITMETER_UNIT_TYPES leaves it out"
	case len(cfg.Types) > 0 && !slices.Contains(cfg.Types, kind):
		return "UNITMETER_UNIT_TYPES has no " + kind
	case len(cfg.Include) > 0 && accounting.Match(cfg.Include, name) == "":
		return "no pattern of UNITMETER_INCLUDE matches"
	case pattern != "":
		return "UNITMETER_EXCLUDE has " + pattern
	}
	return ""
}

// printStates prints the metered units first, then the others by what is the
// matter with them. Excluded units are only counted, unless asked for.
func printStates(w io.Writer, states []unitState, all bool) error {
	order := []string{"metered", "lost", "failed", "unknown", "off", "no-data", "excluded"}
	slices.SortStableFunc(states, func(a, b unitState) int {
		return slices.Index(order, a.State) - slices.Index(order, b.State)
	})
	tab := tty.NewTable(w, false, "STATE", "UNIT", "REASON", "FIX")
	counts := map[string]int{}
	for _, s := range states {
		counts[s.State]++
		if s.State == "excluded" && !all {
			continue
		}
		tab.Row(s.State, s.Unit, s.Reason, s.Fix)
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
	_, err := fmt.Fprintf(w, "\n%d units: %s\n", len(states), strings.Join(parts, ", "))
	return err
}
