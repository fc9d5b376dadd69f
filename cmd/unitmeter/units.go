package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/unitmeter/unitmeter/receiver"
)

// unitState is one unit in the output of "units".
type unitState struct {
	Unit string `json:"unit"`
	// State is metered, excluded, or why there are no numbers: off, lost,
	// no-data, failed, unknown.
	State string `json:"state"`
	// Reason says why, Mend what to do about it; empty where nothing is to be
	// done.
	Reason string `json:"reason"`
	Mend   string `json:"mend,omitempty"`
	// Series is the systemd.unit.name under which the unit is sent, empty where
	// it is not.
	Series string `json:"series,omitempty"`
	Slice  string `json:"slice,omitempty"`
}

// units prints every unit that could be metered, and what becomes of it.
func units(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	asJSON := flags.Bool("json", false, "print a JSON array with one object for each unit")
	patterns, err := parse(t, flags, -1)
	if err != nil {
		return err
	}
	cfg, err := loadConfig(t)
	if err != nil {
		return err
	}
	// All units that could be metered, so that it can be said why they are not.
	everything := cfg.Receiver
	everything.Include, everything.Exclude, everything.Types = nil, nil, accountable()
	readings, err := readOnce(ctx, everything, 0)
	if err != nil {
		return err
	}
	if readings, err = selectUnits(readings, realNames(ctx, cfg.Receiver, patterns)); err != nil {
		return err
	}
	states := make([]unitState, 0, len(readings))
	for _, r := range readings {
		states = append(states, stateOf(cfg.Receiver, r.Unit))
	}
	if *asJSON {
		encoder := json.NewEncoder(t.stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(states)
	}
	return printStates(t.stdout, states, len(patterns) > 0)
}

// stateOf says what becomes of a unit under a configuration.
func stateOf(cfg receiver.Config, u receiver.Unit) unitState {
	s := unitState{Unit: u.Name, State: strings.ReplaceAll(u.Accounting, "_", "-"), Slice: u.Slice}
	if why := whyExcluded(cfg, u.Name); why != "" {
		s.State, s.Reason = "excluded", why
		return s
	}
	switch u.Accounting {
	case "on":
		s.State, s.Series, s.Reason = "metered", u.Name, "in a series of its own"
		if fold := matching(cfg.Fold, u.Name); fold != "" {
			s.Series, s.Reason = fold, "folded into "+fold
		}
	case "off":
		s.Reason, s.Mend = "IPAccounting=no", enableCommand([]string{u.Name})
		if !carriesTraffic(u.Name) {
			s.Reason, s.Mend = "IPAccounting=no; a mount has traffic only where a program serves it", ""
		}
	case "lost":
		s.Reason, s.Mend = "systemd has no counters for it although it runs", "unitmeter enable --runtime "+shellWord(u.Name)
	case "no_data":
		s.Reason = "it has no processes or IP sockets that systemd could count"
	case "failed":
		s.Reason, s.Mend = "systemd's answer made no sense", "report it, with the output of: systemctl show "+shellWord(u.Name)
	default:
		s.Reason, s.Mend = "it has not been read", "unitmeter units "+shellWord(u.Name)
	}
	return s
}

// carriesTraffic is false for the types of unit that hardly ever have anything
// to count: most mounts and swaps are served by the kernel, which is not.
func carriesTraffic(name string) bool {
	kind := path.Ext(name)
	return kind != ".mount" && kind != ".swap"
}

// whyExcluded says which setting keeps a unit from being metered, or "".
func whyExcluded(cfg receiver.Config, name string) string {
	kind := strings.TrimPrefix(path.Ext(name), ".")
	switch pattern := matching(cfg.Exclude, name); {
	case len(cfg.Types) > 0 && !slices.Contains(cfg.Types, kind) && kind == "slice":
		return "a slice has the traffic of the units in it; UNITMETER_UNIT_TYPES leaves it out"
	case len(cfg.Types) > 0 && !slices.Contains(cfg.Types, kind):
		return "UNITMETER_UNIT_TYPES has no " + kind
	case len(cfg.Include) > 0 && matching(cfg.Include, name) == "":
		return "no pattern of UNITMETER_INCLUDE matches"
	case pattern != "":
		return "UNITMETER_EXCLUDE has " + pattern
	}
	return ""
}

// matching returns the first pattern that matches a unit, or "". The backslash
// is an ordinary character, as in the receiver.
func matching(patterns []string, name string) string {
	for _, p := range patterns {
		if ok, _ := path.Match(strings.ReplaceAll(p, `\`, `\\`), name); ok {
			return p
		}
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
	tab := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tab, "STATE\tUNIT\tREASON\tMEND")
	counts := map[string]int{}
	for _, s := range states {
		counts[s.State]++
		if s.State == "excluded" && !all {
			continue
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\t%s\n", s.State, s.Unit, s.Reason, s.Mend)
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
