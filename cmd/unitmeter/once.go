package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
)

func once(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	asJSON := flags.Bool("json", false, "print a JSON array with one object for each unit")
	var interval time.Duration
	durationFlag(flags, &interval, "interval", 0, "read twice with this interval (5, 500ms, 1m), and print the speeds; 1s where the counting begins with this command")
	var source string
	sourceFlag(flags, &source)
	patterns, err := parsePatterns(t, flags)
	if err != nil {
		return err
	}
	if interval < 0 {
		return usageError{fmt.Errorf("--interval %s is negative; use seconds, or a duration such as 1m", interval)}
	}
	cfg, err := loadUnits(ctx, t)
	if err != nil {
		return err
	}
	readings, err := accounting.Read(ctx, cfg, source, patterns, interval)
	if err != nil {
		return err
	}
	if *asJSON {
		return printJSON(t.stdout, readings)
	}
	return printTable(t.stdout, readings, patterns.Len() > 0)
}

// unitJSON is one unit in the output of --json. Counters are null where there
// is no data.
type unitJSON struct {
	Unit                 string     `json:"unit"`
	State                string     `json:"state"`
	Source               string     `json:"source"`
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

func printJSON(w io.Writer, readings *accounting.Readings) error {
	out := make([]unitJSON, 0, len(readings.Units))
	for _, u := range readings.Units {
		j := unitJSON{Unit: u.Name, State: strings.ReplaceAll(u.Accounting, "_", "-"), Source: readings.Source, Invocation: u.Invocation}
		if accounting.Counted(u.Unit) {
			c := u.Counters
			start, read := u.Start.UTC(), u.Time.UTC()
			j.IngressBytes, j.IngressPackets, j.EgressBytes, j.EgressPackets = &c.IngressBytes, &c.IngressPackets, &c.EgressBytes, &c.EgressPackets
			j.Start, j.Time = &start, &read
		}
		if s := u.Speed; s != nil {
			j.IngressBytesPerSec, j.IngressPacketsPerSec, j.EgressBytesPerSec, j.EgressPacketsPerSec = &s[0], &s[1], &s[2], &s[3]
		}
		out = append(out, j)
	}
	return tty.WriteJSON(w, out)
}

// printTable prints the units with numbers, the busiest first, and the commands
// that give numbers to the others. With all, it prints the others too.
func printTable(w io.Writer, readings *accounting.Readings, all bool) error {
	units, speeds := readings.Units, readings.Speeds
	slices.SortStableFunc(units, func(a, b accounting.Reading) int {
		return cmp.Compare(b.Counters.IngressBytes+b.Counters.EgressBytes, a.Counters.IngressBytes+a.Counters.EgressBytes)
	})
	header := []string{"IN BYTES", "IN PACKETS", "OUT BYTES", "OUT PACKETS"}
	if speeds {
		header = append(header, "IN B/S", "IN P/S", "OUT B/S", "OUT P/S")
	}
	numbers := len(header)
	tab := tty.NewTable(w, true, append(header, "SINCE", "UNIT")...)
	narrow := [][]string{{"SINCE"}, {"IN P/S", "OUT P/S"}, {"IN PACKETS", "OUT PACKETS"}}
	if speeds {
		narrow = append(narrow, []string{"IN BYTES", "OUT BYTES"})
	}
	tab.Drop(narrow...)
	lost := 0
	var off []string
	for _, u := range units {
		cells := make([]string, 0, numbers+2)
		switch {
		case accounting.Counted(u.Unit):
			for _, v := range accounting.Values(u.Counters) {
				cells = append(cells, strconv.FormatUint(v, 10))
			}
			if speeds && u.Speed != nil {
				for _, v := range u.Speed {
					cells = append(cells, strconv.FormatFloat(v, 'f', 0, 64))
				}
			}
			cells = append(cells, slices.Repeat([]string{"-"}, numbers-len(cells))...)
			tab.Row(append(cells, u.Start.Local().Format(time.DateTime), u.Name)...)
			continue
		case u.Accounting == "lost":
			lost++
		case u.Accounting == "off" && (all || accounting.CarriesTraffic(u.Name)):
			off = append(off, u.Name)
		}
		if all {
			reason, _ := withoutNumbers(u)
			tab.Row(append(slices.Repeat([]string{"-"}, numbers+1), u.Name+" ("+reason+")")...)
		}
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	enable := accounting.EnableAll
	if all {
		enable = accounting.EnableCommand(off)
	}
	return accounting.WriteHints(w, readings.Origin, len(off), lost, enable)
}
