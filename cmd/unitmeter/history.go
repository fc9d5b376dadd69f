package main

import (
	"cmp"
	"context"
	"encoding/csv"
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
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/exporter/store/history"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

func showHistory(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	since := flags.String("since", "24h", "begin: a duration ago (90m, 24h, 7d), a day (2026-11-23) or a time (2026-11-23T14:00)")
	until := flags.String("until", "0s", "end, in the same forms")
	step := flags.String("step", "", "one row for each step of this length (1m, 1h, 1d); default: one row for each unit")
	asJSON := flags.Bool("json", false, "print JSON")
	asCSV := flags.Bool("csv", false, "print comma-separated values")
	quarantined := flags.Bool("quarantined", false, "list the requests that the Collector refused")
	retry := flags.Bool("retry", false, "with --quarantined: have the agent send those requests again")
	units, err := parse(t, flags, -1)
	if err != nil {
		return err
	}
	if *asJSON && *asCSV {
		return usageError{errors.New("--json and --csv exclude each other; give one of them")}
	}
	if *retry && !*quarantined {
		return usageError{errors.New("--retry is for refused requests; give it with --quarantined")}
	}
	if others := flags.NFlag() > 1 && !*retry || flags.NFlag() > 2; *quarantined && (others || len(units) > 0) {
		return usageError{errors.New("--quarantined takes no other argument than --retry; give it alone")}
	}
	query, err := parseQuery(*since, *until, *step, units)
	if err != nil {
		return err
	}
	cfg, err := loadConfig(t)
	if err != nil {
		return err
	}
	if cfg.Store.Dir == "" {
		return usageError{errors.New("there is no state directory and so no history; set UNITMETER_STATE_DIR to the agent's, such as /var/lib/unitmeter")}
	}
	if *retry {
		return retryQuarantined(ctx, t.stdout, historyDir(cfg))
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
	if err := explainGaps(t.stderr, query, usage); err != nil {
		return err
	}
	switch {
	case *asJSON:
		return tty.WriteJSON(t.stdout, historyRows(usage))
	case *asCSV:
		return historyCSV(t.stdout, usage)
	case query.Step > 0:
		return historyCharts(t.stdout, usage, query)
	}
	return historyTable(t.stdout, usage)
}

// parseQuery checks the flags that say what to read.
func parseQuery(since, until, step string, units []string) (query history.Query, err error) {
	now := time.Now()
	if query.Since, err = parseMoment("since", since, now); err != nil {
		return query, err
	}
	if query.Until, err = parseMoment("until", until, now); err != nil {
		return query, err
	}
	if !query.Since.Before(query.Until) {
		return query, usageError{fmt.Errorf("--since %s is not before --until %s; give an earlier --since", since, until)}
	}
	if step != "" {
		if query.Step, err = parseLength("step", step); err != nil {
			return query, err
		}
		if query.Step <= 0 {
			return query, usageError{fmt.Errorf("--step %s is not above zero; use a length such as 1h", step)}
		}
	}
	for _, u := range units {
		if !strings.HasPrefix(u, "(") { // "(overflow)" has no type
			u = systemd.FullName(u)
		}
		// SQLite negates with ^.
		query.Units = append(query.Units, strings.ReplaceAll(u, "[!", "[^"))
	}
	return query, nil
}

// explainGaps writes what is missing in the answer. It is an error if that is all of
// the units that were asked for.
func explainGaps(w io.Writer, query history.Query, usage history.Usage) error {
	if usage.Damaged > 0 {
		fmt.Fprintf(w, "unitmeter history: %d parts of the history are damaged and left out\n", usage.Damaged)
	}
	none := fmt.Sprintf("nothing was recorded between %s and %s; see \"unitmeter once\" for what is metered now",
		query.Since.Format(time.DateTime), query.Until.Format(time.DateTime))
	missing := slices.DeleteFunc(slices.Clone(query.Units), func(name string) bool {
		return systemd.IsPattern(name) || slices.ContainsFunc(usage.Units, func(u history.UnitUsage) bool { return u.Unit == name })
	})
	switch {
	case len(usage.Units) == 0 && len(query.Units) > 0:
		return fmt.Errorf("find %s in the history: %s", strings.Join(query.Units, " "), none)
	case len(usage.Units) == 0:
		fmt.Fprintf(w, "unitmeter history: %s\n", none)
	case len(missing) > 0:
		fmt.Fprintf(w, "unitmeter history: of %s, %s\n", strings.Join(missing, ", "), none)
	}
	return nil
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
		return now, usageError{fmt.Errorf("--%s %q is not a time; use one such as 90m or 7d (ago), 2026-11-23 or 2026-11-23T14:00", name, text)}
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
	return 0, usageError{fmt.Errorf("--%s %q is not a duration; use one such as 90m, 24h or 7d", name, text)}
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
func historyRows(usage history.Usage) []historyRow {
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

func historyCSV(w io.Writer, usage history.Usage) error {
	out := csv.NewWriter(w)
	_ = out.Write([]string{"unit", "time", "ingress_bytes", "ingress_packets", "egress_bytes", "egress_packets",
		"ingress_bytes_per_second", "ingress_packets_per_second", "egress_bytes_per_second", "egress_packets_per_second", "measured_seconds"})
	decimal := func(v float64) string { return strconv.FormatFloat(v, 'f', 3, 64) }
	for _, r := range historyRows(usage) {
		_ = out.Write([]string{tty.Clean(r.Unit), r.Time.Format(time.RFC3339),
			strconv.FormatUint(r.IngressBytes, 10), strconv.FormatUint(r.IngressPackets, 10),
			strconv.FormatUint(r.EgressBytes, 10), strconv.FormatUint(r.EgressPackets, 10),
			decimal(r.IngressBytesPerSec), decimal(r.IngressPacketsPerSec), decimal(r.EgressBytesPerSec), decimal(r.EgressPacketsPerSec),
			decimal(r.MeasuredSeconds)})
	}
	out.Flush()
	return out.Error() // of all the writes
}

// historyTable prints one row for each unit, the busiest first.
func historyTable(w io.Writer, usage history.Usage) error {
	rows := historyRows(usage)
	slices.SortStableFunc(rows, func(a, b historyRow) int {
		return cmp.Compare(b.IngressBytes+b.EgressBytes, a.IngressBytes+a.EgressBytes)
	})
	tab := tty.NewTable(w, true, "IN BYTES", "IN PACKETS", "OUT BYTES", "OUT PACKETS", "IN B/S", "IN P/S", "OUT B/S", "OUT P/S", "UNIT")
	for _, r := range rows {
		count := func(n uint64) string { return strconv.FormatUint(n, 10) }
		rate := func(v float64, decimals int) string { return strconv.FormatFloat(v, 'f', decimals, 64) }
		tab.Row(count(r.IngressBytes), count(r.IngressPackets), count(r.EgressBytes), count(r.EgressPackets),
			rate(r.IngressBytesPerSec, 0), rate(r.IngressPacketsPerSec, 1), rate(r.EgressBytesPerSec, 0), rate(r.EgressPacketsPerSec, 1), r.Unit)
	}
	return tab.Flush()
}

// chartWidth is what fits behind the numbers in 80 columns.
const chartWidth = 19

// historyCharts prints, for each unit, a row for each step with a bar for the
// bytes of both directions. Steps without a sample are gaps, not zeros, even where
// the next sample covers the time.
func historyCharts(w io.Writer, usage history.Usage, query history.Query) error {
	for i, u := range usage.Units {
		if i > 0 {
			fmt.Fprintln(w)
		}
		var most float64
		rows := historyRows(history.Usage{Units: []history.UnitUsage{u}})
		for _, r := range rows {
			most = max(most, r.IngressBytesPerSec+r.EgressBytesPerSec)
		}
		fmt.Fprintf(w, "%s, a step of %s\n", tty.Clean(u.Unit), query.Step)
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

func retryQuarantined(ctx context.Context, w io.Writer, dir string) error {
	n, err := store.Retry(ctx, dir)
	switch {
	case err != nil:
		return fmt.Errorf("%w; set UNITMETER_STATE_DIR to the agent's directory if it is another", err)
	case n == 0:
		_, err = fmt.Fprintln(w, "No request is in quarantine.")
	default:
		_, err = fmt.Fprintf(w, "The agent sends %d quarantined requests again after its next cycle, or after its next start.\n", n)
	}
	return err
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
	tab := tty.NewTable(w, false, "REQUEST", "OF", "POINTS", "REASON")
	for _, q := range all {
		tab.Row(fmt.Sprint(q.ID), q.Time.Local().Format(time.DateTime), fmt.Sprint(q.Points), q.Reason)
	}
	return tab.Flush()
}
