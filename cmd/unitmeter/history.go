package main

import (
	"cmp"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/exporter/store"
)

func history(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	since := flags.String("since", "24h", "from when: a duration ago (90m, 24h, 7d), a day (2026-11-23) or a time (2026-11-23T14:00)")
	until := flags.String("until", "0s", "until when, in the same forms")
	step := flags.String("step", "", "one row for each step of this length (1m, 1h, 1d); without it one row for each unit")
	asJSON := flags.Bool("json", false, "print JSON")
	asCSV := flags.Bool("csv", false, "print comma-separated values")
	quarantined := flags.Bool("quarantined", false, "list the requests that the Collector refused, instead")
	units, err := parse(t, flags, -1)
	if err != nil {
		return err
	}
	if *asJSON && *asCSV {
		return usageError{errors.New("--json and --csv exclude each other; give one of them")}
	}
	if *quarantined && (flags.NFlag() > 1 || len(units) > 0) {
		return usageError{errors.New("--quarantined lists all that there is; give it alone")}
	}
	now := time.Now()
	query := store.Query{}
	if query.Since, err = parseMoment("since", *since, now); err != nil {
		return err
	}
	if query.Until, err = parseMoment("until", *until, now); err != nil {
		return err
	}
	if !query.Since.Before(query.Until) {
		return usageError{fmt.Errorf("--since %s is not before --until %s; give an earlier --since", *since, *until)}
	}
	if *step != "" {
		if query.Step, err = parseLength("step", *step); err != nil {
			return err
		}
		if query.Step <= 0 {
			return usageError{fmt.Errorf("--step %s is not above zero; use a length such as 1h", *step)}
		}
	}
	for _, u := range units {
		query.Units = append(query.Units, fullName(u))
	}
	cfg, err := loadConfig(t)
	if err != nil {
		return err
	}
	if cfg.Store.Dir == "" {
		return usageError{errors.New("there is no state directory, and so no history; set UNITMETER_STATE_DIR to the one of the agent, as in /var/lib/unitmeter")}
	}
	reader, err := store.OpenReader(ctx, historyDir(cfg))
	if err != nil {
		return fmt.Errorf("%w; set UNITMETER_STATE_DIR to the agent's directory if it is another", err)
	}
	defer reader.Close()
	if *quarantined {
		return printQuarantined(ctx, t.stdout, reader)
	}
	usage, err := reader.History(ctx, query)
	if err != nil {
		return err
	}
	if usage.Damaged > 0 {
		fmt.Fprintf(t.stderr, "unitmeter history: %d pieces of the history are damaged and left out\n", usage.Damaged)
	}
	none := fmt.Sprintf("nothing was recorded between %s and %s; see \"unitmeter once\" for what is metered now",
		query.Since.Format(time.DateTime), query.Until.Format(time.DateTime))
	missing := slices.DeleteFunc(slices.Clone(query.Units), func(name string) bool {
		return strings.ContainsAny(name, "*?[") || slices.ContainsFunc(usage.Units, func(u store.UnitUsage) bool { return u.Unit == name })
	})
	switch {
	case len(usage.Units) == 0 && len(units) > 0:
		return fmt.Errorf("find %s in the history: %s", strings.Join(units, " "), none)
	case len(usage.Units) == 0:
		fmt.Fprintf(t.stderr, "unitmeter history: %s\n", none)
	case len(missing) > 0:
		fmt.Fprintf(t.stderr, "unitmeter history: of %s, %s\n", strings.Join(missing, ", "), none)
	}
	switch {
	case *asJSON:
		return historyJSON(t.stdout, usage)
	case *asCSV:
		return historyCSV(t.stdout, usage)
	case query.Step > 0:
		return historyCharts(t.stdout, usage, query)
	}
	return historyTable(t.stdout, usage)
}

// historyDir is the state directory to read: where none is named, that of the
// packaged service, if there is one. A person's own is that of an agent tried by
// hand.
func historyDir(cfg config.Config) string {
	const service = "/var/lib/unitmeter"
	if cfg.StateDirFrom == "UNITMETER_STATE_DIR" || cfg.StateDirFrom == "STATE_DIRECTORY" {
		return cfg.Store.Dir
	}
	has := func(dir string) error {
		_, err := os.Stat(filepath.Join(dir, "unitmeter.db"))
		return err
	}
	// Who may not read the one may have the other.
	if err := has(service); err == nil || errors.Is(err, fs.ErrPermission) && has(cfg.Store.Dir) != nil {
		return service
	}
	return cfg.Store.Dir
}

// fullName completes a name without a type, as systemctl does.
func fullName(unit string) string {
	if strings.ContainsAny(unit, ".*?[(") { // "(overflow)" has no type
		return unit
	}
	return unit + ".service"
}

// parseMoment reads a flag that is a moment, or a length of time before now.
func parseMoment(name, text string, now time.Time) (time.Time, error) {
	for _, layout := range []string{time.DateOnly, "2006-01-02T15:04", "2006-01-02 15:04", "2006-01-02T15:04:05", time.DateTime} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, nil
		}
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return t, nil
	}
	ago, err := parseLength(name, text)
	if err != nil {
		return now, usageError{fmt.Errorf("--%s %q is no time; use one such as 90m or 7d (ago), 2026-11-23 or 2026-11-23T14:00", name, text)}
	}
	return now.Add(-ago), nil
}

// parseLength reads a flag that is a duration, in Go's form or in days.
func parseLength(name, text string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(text, "d"); ok {
		if n, err := strconv.ParseFloat(days, 64); err == nil && n >= 0 && n < 36500 {
			return time.Duration(n * float64(24*time.Hour)), nil
		}
	} else if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return d, nil
	}
	return 0, usageError{fmt.Errorf("--%s %q is no length of time; use one such as 90m, 24h or 7d", name, text)}
}

// historyRow is one unit, or one step of a unit. The names of the eight numbers
// are those of pg_netstat's columns, with systemd's words for the directions.
type historyRow struct {
	Unit                 string    `json:"unit"`
	Time                 time.Time `json:"time"`
	IngressBytes         uint64    `json:"ingress_bytes"`
	IngressPackets       uint64    `json:"ingress_packets"`
	EgressBytes          uint64    `json:"egress_bytes"`
	EgressPackets        uint64    `json:"egress_packets"`
	IngressBytesPerSec   float64   `json:"ingress_bytes_per_second"`
	IngressPacketsPerSec float64   `json:"ingress_packets_per_second"`
	EgressBytesPerSec    float64   `json:"egress_bytes_per_second"`
	EgressPacketsPerSec  float64   `json:"egress_packets_per_second"`
	MeasuredSeconds      float64   `json:"measured_seconds"`
}

// historyRows lists all steps of all units.
func historyRows(usage store.Usage) []historyRow {
	rows := []historyRow{}
	for _, u := range usage.Units {
		for _, s := range u.Steps {
			row := historyRow{
				Unit: u.Unit, Time: s.Time, MeasuredSeconds: s.Measured.Seconds(),
				IngressBytes: s.Total[0], IngressPackets: s.Total[1], EgressBytes: s.Total[2], EgressPackets: s.Total[3],
			}
			if seconds := row.MeasuredSeconds; seconds > 0 {
				row.IngressBytesPerSec, row.IngressPacketsPerSec = float64(s.Total[0])/seconds, float64(s.Total[1])/seconds
				row.EgressBytesPerSec, row.EgressPacketsPerSec = float64(s.Total[2])/seconds, float64(s.Total[3])/seconds
			}
			rows = append(rows, row)
		}
	}
	return rows
}

func historyJSON(w io.Writer, usage store.Usage) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(historyRows(usage))
}

func historyCSV(w io.Writer, usage store.Usage) error {
	out := csv.NewWriter(w)
	_ = out.Write([]string{"unit", "time", "ingress_bytes", "ingress_packets", "egress_bytes", "egress_packets",
		"ingress_bytes_per_second", "ingress_packets_per_second", "egress_bytes_per_second", "egress_packets_per_second", "measured_seconds"})
	decimal := func(v float64) string { return strconv.FormatFloat(v, 'f', 3, 64) }
	for _, r := range historyRows(usage) {
		_ = out.Write([]string{r.Unit, r.Time.Format(time.RFC3339),
			strconv.FormatUint(r.IngressBytes, 10), strconv.FormatUint(r.IngressPackets, 10),
			strconv.FormatUint(r.EgressBytes, 10), strconv.FormatUint(r.EgressPackets, 10),
			decimal(r.IngressBytesPerSec), decimal(r.IngressPacketsPerSec), decimal(r.EgressBytesPerSec), decimal(r.EgressPacketsPerSec),
			decimal(r.MeasuredSeconds)})
	}
	out.Flush()
	return out.Error() // of all the writes
}

// historyTable prints one row for each unit, the busiest first.
func historyTable(w io.Writer, usage store.Usage) error {
	rows := historyRows(usage)
	slices.SortStableFunc(rows, func(a, b historyRow) int {
		return cmp.Compare(b.IngressBytes+b.EgressBytes, a.IngressBytes+a.EgressBytes)
	})
	tab := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tab, "\tIN BYTES\tIN PACKETS\tOUT BYTES\tOUT PACKETS\tIN B/S\tIN P/S\tOUT B/S\tOUT P/S\t UNIT")
	for _, r := range rows {
		fmt.Fprintf(tab, "\t%d\t%d\t%d\t%d\t%.0f\t%.1f\t%.0f\t%.1f\t %s\n", r.IngressBytes, r.IngressPackets, r.EgressBytes, r.EgressPackets,
			r.IngressBytesPerSec, r.IngressPacketsPerSec, r.EgressBytesPerSec, r.EgressPacketsPerSec, r.Unit)
	}
	return tab.Flush()
}

// chartWidth is what fits behind the numbers in 80 columns.
const chartWidth = 19

// historyCharts prints, for each unit, a row for each step with a bar for the
// bytes of both directions. Steps without a sample are gaps, not zeros, even where
// the next sample covers the time.
func historyCharts(w io.Writer, usage store.Usage, query store.Query) error {
	for i, u := range usage.Units {
		if i > 0 {
			fmt.Fprintln(w)
		}
		var most float64
		rows := historyRows(store.Usage{Units: []store.UnitUsage{u}})
		for _, r := range rows {
			most = max(most, r.IngressBytesPerSec+r.EgressBytesPerSec)
		}
		fmt.Fprintf(w, "%s, a step of %s\n", u.Unit, query.Step)
		fmt.Fprintf(w, "%-16s %11s %11s %9s %9s\n", "TIME", "IN B/S", "OUT B/S", "IN P/S", "OUT P/S")
		layout, last := "2006-01-02 15:04", time.Time{}
		if query.Step < time.Minute {
			layout = "01-02 15:04:05"
		}
		for _, r := range rows {
			if missing := r.Time.Sub(last) - query.Step; !last.IsZero() && missing > 0 {
				what := "no data"
				if r.MeasuredSeconds >= missing.Seconds() {
					what = "in the next"
				}
				fmt.Fprintf(w, "%-16s %11s\n", "...", what)
			}
			last = r.Time
			_, err := fmt.Fprintf(w, "%-16s %11.0f %11.0f %9.1f %9.1f %s\n", r.Time.Local().Format(layout),
				r.IngressBytesPerSec, r.EgressBytesPerSec, r.IngressPacketsPerSec, r.EgressPacketsPerSec,
				bar(r.IngressBytesPerSec, r.EgressBytesPerSec, most))
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// bar draws both directions: received in front, sent behind.
func bar(in, out, most float64) string {
	if most <= 0 {
		return ""
	}
	scaled := func(v float64) int { return int(v/most*chartWidth + 0.5) }
	return strings.Repeat("▒", scaled(in)) + strings.Repeat("█", scaled(in+out)-scaled(in))
}

func printQuarantined(ctx context.Context, w io.Writer, reader *store.Reader) error {
	all, err := reader.Quarantined(ctx)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "No request is in quarantine.")
		return err
	}
	tab := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tab, "REQUEST\tOF\tPOINTS\tREASON")
	for _, q := range all {
		fmt.Fprintf(tab, "%d\t%s\t%d\t%s\n", q.ID, q.Time.Local().Format(time.DateTime), q.Points, oneLine(errors.New(q.Reason)))
	}
	return tab.Flush()
}
