package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/receiver"
)

// connectTimeout is how long a command that a person waits for tries to reach
// systemd.
const connectTimeout = 10 * time.Second

func once(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	asJSON := flags.Bool("json", false, "print a JSON array with one object for each unit")
	interval := flags.Duration("interval", 0, "read twice, this far apart (2s, 1m), and print the speeds between")
	patterns, err := parse(t, flags, -1)
	if err != nil {
		return err
	}
	if *interval < 0 {
		return usageError{fmt.Errorf("--interval %s is negative; use a duration such as 2s", *interval)}
	}
	cfg, err := loadConfig(t)
	if err != nil {
		return err
	}
	units, err := readOnce(ctx, cfg.Receiver, *interval)
	if err != nil {
		return err
	}
	if units, err = selectUnits(units, realNames(ctx, cfg.Receiver, patterns)); err != nil {
		return err
	}
	if *asJSON {
		return printJSON(t.stdout, units)
	}
	return printTable(t.stdout, units, len(patterns) > 0, *interval > 0)
}

// loadConfig reads the environment.
func loadConfig(t *terminal) (config.Config, error) {
	cfg, err := config.Load(t.environ)
	if err != nil {
		return cfg, usageError{err}
	}
	return cfg, nil
}

// reading is one unit with its counters and, over an interval, their speeds in
// bytes and packets per second.
type reading struct {
	receiver.Unit
	speed *[4]float64
}

// readOnce connects, reads all units, and disconnects.
func readOnce(ctx context.Context, cfg receiver.Config, interval time.Duration) ([]reading, error) {
	cfg.StopRecords = "off" // nothing is left running behind
	r, err := receiver.New(cfg)
	if err != nil {
		return nil, usageError{err}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	defer func() { cancel(); <-done }()

	ready, stop := context.WithTimeout(ctx, connectTimeout)
	defer stop()
	if err := r.Ready(ready); err != nil {
		return nil, err
	}
	units, err := sweep(ctx, r)
	if err != nil || interval == 0 {
		return units, err
	}
	select {
	case <-time.After(interval):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	before := map[string]receiver.Unit{}
	for _, u := range units {
		before[u.Name+u.Invocation] = u.Unit
	}
	if units, err = sweep(ctx, r); err != nil {
		return nil, err
	}
	for i, u := range units {
		if old, ok := before[u.Name+u.Invocation]; ok && u.Accounting == "on" && old.Accounting == "on" {
			units[i].speed = speed(old, u.Unit)
		}
	}
	return units, nil
}

func sweep(ctx context.Context, r *receiver.Receiver) ([]reading, error) {
	if s := r.Sweep(ctx); s.Partial {
		return nil, errors.New("read all units: systemd did not answer for all of them in time; raise UNITMETER_SWEEP_TIMEOUT, or try again")
	}
	var units []reading
	for _, u := range r.Units() {
		units = append(units, reading{Unit: u})
	}
	return units, nil
}

// speed is nil where the counters fell or no time passed.
func speed(old, now receiver.Unit) *[4]float64 {
	seconds := now.Time.Sub(old.Time).Seconds()
	a, b := values(old.Counters), values(now.Counters)
	var s [4]float64
	for i := range s {
		if b[i] < a[i] || seconds <= 0 {
			return nil
		}
		s[i] = float64(b[i]-a[i]) / seconds
	}
	return &s
}

func values(c receiver.Counters) [4]uint64 {
	return [4]uint64{c.IngressBytes, c.IngressPackets, c.EgressBytes, c.EgressPackets}
}

// selectUnits keeps the units that match any of the patterns, which may be
// names without their ".service".
func selectUnits(units []reading, patterns []string) ([]reading, error) {
	if len(patterns) == 0 {
		return units, nil
	}
	keep := map[string]bool{}
	for _, pattern := range patterns {
		full := fullName(pattern)
		found := false
		for _, u := range units {
			ok, err := path.Match(strings.ReplaceAll(full, `\`, `\\`), u.Name)
			if err != nil {
				return nil, usageError{fmt.Errorf("%q is no unit name and no pattern; use a name such as nats.service or a pattern such as nats*", pattern)}
			}
			if ok {
				keep[u.Name], found = true, true
			}
		}
		if !found {
			return nil, fmt.Errorf("find unit %q: it is not running, or not among the metered units; see \"systemctl status %s\", UNITMETER_INCLUDE and UNITMETER_UNIT_TYPES", pattern, full)
		}
	}
	return slices.DeleteFunc(units, func(u reading) bool { return !keep[u.Name] }), nil
}

// unitJSON is one unit in the output of --json. Counters are null where there
// is no data.
type unitJSON struct {
	Unit                 string     `json:"unit"`
	State                string     `json:"state"`
	IngressBytes         *uint64    `json:"ingress_bytes"`
	IngressPackets       *uint64    `json:"ingress_packets"`
	EgressBytes          *uint64    `json:"egress_bytes"`
	EgressPackets        *uint64    `json:"egress_packets"`
	IngressBytesPerSec   *float64   `json:"ingress_bytes_per_second,omitempty"`
	IngressPacketsPerSec *float64   `json:"ingress_packets_per_second,omitempty"`
	EgressBytesPerSec    *float64   `json:"egress_bytes_per_second,omitempty"`
	EgressPacketsPerSec  *float64   `json:"egress_packets_per_second,omitempty"`
	Start                *time.Time `json:"start"`
	Time                 *time.Time `json:"time"`
	Invocation           string     `json:"invocation_id,omitempty"`
}

func printJSON(w io.Writer, units []reading) error {
	out := make([]unitJSON, 0, len(units))
	for _, u := range units {
		j := unitJSON{Unit: u.Name, State: strings.ReplaceAll(u.Accounting, "_", "-"), Invocation: u.Invocation}
		if u.Accounting == "on" {
			c := u.Counters
			start, read := u.Start.UTC(), u.Time.UTC()
			j.IngressBytes, j.IngressPackets, j.EgressBytes, j.EgressPackets = &c.IngressBytes, &c.IngressPackets, &c.EgressBytes, &c.EgressPackets
			j.Start, j.Time = &start, &read
		}
		if s := u.speed; s != nil {
			j.IngressBytesPerSec, j.IngressPacketsPerSec, j.EgressBytesPerSec, j.EgressPacketsPerSec = &s[0], &s[1], &s[2], &s[3]
		}
		out = append(out, j)
	}
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(out)
}

// printTable prints the units with numbers, the busiest first, and says what
// to do about the others. With all, the others are printed too.
func printTable(w io.Writer, units []reading, all, speeds bool) error {
	slices.SortStableFunc(units, func(a, b reading) int {
		return cmp.Compare(b.Counters.IngressBytes+b.Counters.EgressBytes, a.Counters.IngressBytes+a.Counters.EgressBytes)
	})
	tab := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	header := "\tIN BYTES\tIN PACKETS\tOUT BYTES\tOUT PACKETS\t"
	if speeds {
		header += "IN B/S\tIN P/S\tOUT B/S\tOUT P/S\t"
	}
	fmt.Fprintln(tab, header+"SINCE\t UNIT")
	lost := 0
	var off []string
	for _, u := range units {
		if u.Accounting != "on" {
			lost += count(u.Accounting == "lost")
			if u.Accounting == "off" && (all || carriesTraffic(u.Name)) {
				off = append(off, u.Name)
			}
			if all {
				fmt.Fprintf(tab, "\t-\t-\t-\t-\t%s%s\t %s (%s)\n", strings.Repeat("-\t", 4*count(speeds)), "-", u.Name, explain(u.Accounting))
			}
			continue
		}
		fmt.Fprint(tab, "\t")
		for _, v := range values(u.Counters) {
			fmt.Fprintf(tab, "%d\t", v)
		}
		for i := range 4 * count(speeds) {
			if u.speed == nil {
				fmt.Fprint(tab, "-\t")
			} else {
				fmt.Fprintf(tab, "%.0f\t", u.speed[i])
			}
		}
		fmt.Fprintf(tab, "%s\t %s\n", u.Start.Local().Format("2006-01-02 15:04:05"), u.Name)
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	enable := "unitmeter enable --all"
	if all {
		enable = enableCommand(off)
	}
	return printHints(w, len(off), lost, enable)
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}

// printHints says how to turn units without numbers into units with.
func printHints(w io.Writer, off, lost int, enable string) error {
	var err error
	if off > 0 {
		_, err = fmt.Fprintf(w, "\nUnits with IP accounting off: %d. To switch it on: %s\n", off, enable)
	}
	if lost > 0 && err == nil {
		_, err = fmt.Fprintf(w, "\nUnits whose counters systemd has lost: %d. To count again: unitmeter enable --lost\n", lost)
	}
	return err
}

func explain(state string) string {
	switch state {
	case "off":
		return "IP accounting is off"
	case "no_data":
		return "systemd has nothing to count for it"
	case "lost":
		return "systemd lost its counters"
	case "failed":
		return "systemd's answer made no sense"
	}
	return "not read"
}
