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
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/calendar"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/exporter/store/history"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// historyView is what to print of the history.
type historyView struct {
	query       history.Query
	period      calendar.Period // 0: one sum
	most        int             // units, by bytes; 0: all
	all         bool            // idle units as well
	exact, bits bool
}

func showHistory(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	var view historyView
	since := flags.String("since", "", "begin, such as "+calendar.Forms+"; without it, 24 hours ago, or as the kind of rows says")
	until := flags.String("until", "now", "end, in the same forms")
	var periods []string
	for _, p := range []struct {
		name   string
		period calendar.Period
		what   string
	}{
		{"minutely", calendar.Minute, "minute, for the last hour"}, {"hourly", calendar.Hour, "hour, for the last day"},
		{"daily", calendar.Day, "day, for 30 days"}, {"weekly", calendar.Week, "week from Monday, for 13 weeks"},
		{"monthly", calendar.Month, "month, for a year"},
	} {
		flags.BoolFunc(p.name, "one row for each "+p.what+", or since --since", func(value string) error {
			if value != "true" {
				return errors.New("it takes no value; leave it out for one sum")
			}
			view.period, periods = p.period, append(periods, "--"+p.name)
			return nil
		})
	}
	flags.IntVar(&view.most, "n", 0, "only so many units, those with the most bytes")
	flags.BoolVar(&view.all, "all", false, "idle units as well")
	flags.BoolVar(&view.exact, "bytes", false, "exact numbers instead of kB and MB")
	flags.BoolVar(&view.bits, "bits", false, "speeds in bits per second")
	asJSON := flags.Bool("json", false, "print JSON")
	asCSV := flags.Bool("csv", false, "print comma-separated values")
	quarantined := flags.Bool("quarantined", false, "list the requests that the Collector refused")
	retry := flags.Bool("retry", false, "with --quarantined: have the agent send those requests again")
	units, err := parse(t, flags, -1)
	if err != nil {
		return err
	}
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	switch {
	case *asJSON && *asCSV:
		return usageError{errors.New("--json and --csv exclude each other; give one of them")}
	case (*asJSON || *asCSV) && (view.all || view.exact || view.bits):
		return usageError{errors.New("--all, --bytes and --bits are for tables; leave them out with --json and --csv, which have all units and bytes")}
	case *retry && !*quarantined:
		return usageError{errors.New("--retry is for refused requests; give it with --quarantined")}
	case *quarantined && (flags.NFlag() > 1 && !*retry || flags.NFlag() > 2 || len(units) > 0):
		return usageError{errors.New("--quarantined takes no other argument than --retry; give it alone")}
	case len(periods) > 1:
		return usageError{fmt.Errorf("%s exclude each other; give one of them", strings.Join(periods, " and "))}
	case given["n"] && view.most < 1:
		return usageError{fmt.Errorf("-n %d is no number of units; use one from 1 on", view.most)}
	}
	now := time.Now()
	if !given["since"] {
		*since = view.defaultSince(now).Format(time.RFC3339Nano)
	}
	if err := view.ask(*since, *until, units, now); err != nil {
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
	usage, err := reader.History(ctx, view.query)
	if err != nil {
		return err
	}
	if err := explainGaps(t.stderr, view.query, usage); err != nil {
		return err
	}
	switch {
	case *asJSON:
		return tty.WriteJSON(t.stdout, historyRows(view.busiest(usage.Units)))
	case *asCSV:
		return historyCSV(t.stdout, view.busiest(usage.Units))
	}
	return view.table(t.stdout, usage)
}

// ask fills in the query.
func (v *historyView) ask(since, until string, units []string, now time.Time) error {
	var err error
	moment := func(name, text string) time.Time {
		t, problem := calendar.Parse(text, now)
		if problem != nil && err == nil {
			err = usageError{fmt.Errorf("--%s %q is %w", name, text, problem)}
		}
		return t
	}
	v.query.Since, v.query.Until = moment("since", since), moment("until", until)
	if err != nil {
		return err
	}
	if !v.query.Since.Before(v.query.Until) {
		return usageError{fmt.Errorf("the begin, %s, is not before the end, %s; give an earlier --since",
			v.query.Since.Format(time.DateTime), v.query.Until.Format(time.DateTime))}
	}
	if v.period != 0 {
		if v.query.Periods, err = v.period.Divide(v.query.Since, v.query.Until); err != nil {
			return usageError{err}
		}
	}
	for _, u := range units {
		if !strings.HasPrefix(u, "(") { // "(overflow)" has no type
			u = systemd.FullName(u)
		}
		// SQLite negates with ^.
		v.query.Units = append(v.query.Units, strings.ReplaceAll(u, "[!", "[^"))
	}
	return nil
}

// defaultSince is the begin of a period.
func (v *historyView) defaultSince(now time.Time) time.Time {
	since := now.Add(-24 * time.Hour)
	switch v.period {
	case 0:
		return since
	case calendar.Minute:
		since = now.Add(-time.Hour)
	case calendar.Day:
		since = now.AddDate(0, 0, -29)
	case calendar.Week:
		since = now.AddDate(0, 0, -12*7)
	case calendar.Month:
		since = v.period.Begin(now).AddDate(0, -11, 0)
	}
	return v.period.Begin(since)
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

// historyRow is one unit, or one period of a unit. Speeds are null where no time was
// measured.
type historyRow struct {
	Unit                  string    `json:"unit"`
	Time                  time.Time `json:"time"` // begin
	ReceiveBytes          uint64    `json:"receive_bytes"`
	ReceivePackets        uint64    `json:"receive_packets"`
	TransmitBytes         uint64    `json:"transmit_bytes"`
	TransmitPackets       uint64    `json:"transmit_packets"`
	ReceiveBytesPerSec    *float64  `json:"receive_bytes_per_second"`
	ReceivePacketsPerSec  *float64  `json:"receive_packets_per_second"`
	TransmitBytesPerSec   *float64  `json:"transmit_bytes_per_second"`
	TransmitPacketsPerSec *float64  `json:"transmit_packets_per_second"`
	MeasuredSeconds       float64   `json:"measured_seconds"`
}

// busiest sorts units by their bytes, and returns as many as are wanted.
func (v *historyView) busiest(units []history.UnitUsage) []history.UnitUsage {
	slices.SortStableFunc(units, func(a, b history.UnitUsage) int { return cmp.Compare(bytesOf(sum(b.Steps)), bytesOf(sum(a.Steps))) })
	if v.most > 0 {
		units = units[:min(v.most, len(units))]
	}
	return units
}

func bytesOf(s history.Step) float64 { return float64(s.Total[0]) + float64(s.Total[2]) }

// speedOf returns false where no time was measured.
func speedOf(s history.Step, kind int) (perSecond float64, known bool) {
	if s.Measured <= 0 {
		return 0, false
	}
	return float64(s.Total[kind]) / s.Measured.Seconds(), true
}

// sum adds up steps. Its numbers stop at 2^64-1.
func sum(steps []history.Step) (all history.Step) {
	for _, s := range steps {
		all.Measured += s.Measured
		for kind, n := range s.Total {
			all.Total[kind] += min(n, math.MaxUint64-all.Total[kind])
		}
	}
	return all
}

// historyRows lists all periods of all units.
func historyRows(units []history.UnitUsage) []historyRow {
	rows := []historyRow{}
	for _, u := range units {
		for _, s := range u.Steps {
			speed := func(kind int) *float64 {
				if v, known := speedOf(s, kind); known {
					return &v
				}
				return nil
			}
			rows = append(rows, historyRow{
				Unit: u.Unit, Time: s.Time.Local(), MeasuredSeconds: s.Measured.Seconds(),
				ReceiveBytes: s.Total[0], ReceivePackets: s.Total[1], TransmitBytes: s.Total[2], TransmitPackets: s.Total[3],
				ReceiveBytesPerSec: speed(0), ReceivePacketsPerSec: speed(1), TransmitBytesPerSec: speed(2), TransmitPacketsPerSec: speed(3),
			})
		}
	}
	return rows
}

func historyCSV(w io.Writer, units []history.UnitUsage) error {
	out := csv.NewWriter(w)
	_ = out.Write([]string{"unit", "time", "receive_bytes", "receive_packets", "transmit_bytes", "transmit_packets",
		"receive_bytes_per_second", "receive_packets_per_second", "transmit_bytes_per_second", "transmit_packets_per_second", "measured_seconds"})
	decimal := func(v *float64) string {
		if v == nil {
			return ""
		}
		return strconv.FormatFloat(*v, 'f', 3, 64)
	}
	for _, r := range historyRows(units) {
		_ = out.Write([]string{tty.Clean(r.Unit), r.Time.Format(time.RFC3339),
			strconv.FormatUint(r.ReceiveBytes, 10), strconv.FormatUint(r.ReceivePackets, 10),
			strconv.FormatUint(r.TransmitBytes, 10), strconv.FormatUint(r.TransmitPackets, 10),
			decimal(r.ReceiveBytesPerSec), decimal(r.ReceivePacketsPerSec), decimal(r.TransmitBytesPerSec), decimal(r.TransmitPacketsPerSec),
			decimal(&r.MeasuredSeconds)})
	}
	out.Flush()
	return out.Error() // of all the writes
}

// table prints a row for each unit, the busiest first; with periods, a row for each
// period, and for each unit in it where units are asked for.
func (v *historyView) table(w io.Writer, usage history.Usage) error {
	header := []string{"RECEIVED", "SENT", "TOTAL", "RECEIVED/s", "SENT/s", "RECEIVED pkt", "SENT pkt", "UNIT"}
	if v.period != 0 {
		header = slices.Insert(header, 0, "TIME")
	}
	tab := tty.NewTable(w, true, header...)
	tab.Drop([]string{"RECEIVED pkt", "SENT pkt"}, []string{"TOTAL"}, []string{"RECEIVED/s", "SENT/s"})
	row := func(when string, s history.Step, name string) {
		cells := []string{v.volume(s.Total[0]), v.volume(s.Total[2]), v.volume(s.Total[0] + min(s.Total[2], math.MaxUint64-s.Total[0])),
			v.speed(s, 0), v.speed(s, 2), tty.Grouped(s.Total[1]), tty.Grouped(s.Total[3]), name}
		if v.period != 0 {
			cells = slices.Insert(cells, 0, when)
		}
		tab.Row(cells...)
	}
	count := len(usage.Units)
	idle := 0
	if !v.all && (len(v.query.Units) == 0 || slices.ContainsFunc(v.query.Units, systemd.IsPattern)) {
		usage.Units = slices.DeleteFunc(usage.Units, func(u history.UnitUsage) bool { return sum(u.Steps).Total == [4]uint64{} })
		idle = count - len(usage.Units)
	}
	units := v.busiest(usage.Units)
	if v.period != 0 && v.most == 0 && len(v.query.Units) == 0 {
		units = []history.UnitUsage{{Unit: "all units", Steps: usage.All}}
	}
	type line struct {
		unit string
		history.Step
	}
	var lines []line
	for _, u := range units {
		for _, s := range u.Steps {
			lines = append(lines, line{u.Unit, s})
		}
	}
	slices.SortStableFunc(lines, func(a, b line) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(bytesOf(b.Step), bytesOf(a.Step)))
	})
	for _, l := range lines {
		row(v.label(l.Time, usage.Begin), l.Step, l.unit)
	}
	if len(lines) > 1 || v.most > 0 && v.most < count {
		row("", sum(usage.All), "total of "+countUnits(count, "unit"))
	}
	var notes string
	if idle > 0 && v.period == 0 {
		notes += countUnits(idle, "idle unit") + "; --all shows idle units as well\n"
	}
	if !usage.Begin.IsZero() && v.query.Since.Before(usage.Begin) {
		notes += "nothing is recorded before " + usage.Begin.Local().Format("2006-01-02 15:04") + "\n"
		if v.period > calendar.Day {
			notes += "the agent keeps three weeks, or as UNITMETER_HISTORY says\n"
		}
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	_, err := io.WriteString(w, notes)
	return err
}

func countUnits(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// label is the name of a period. The first one may have begun before the first sample.
func (v *historyView) label(begin, first time.Time) string {
	if v.period == 0 {
		return ""
	}
	if first.After(begin) {
		begin = first
	}
	text := v.period.Format(begin.Local())
	// An hour that clocks show twice has two names.
	_, before := v.query.Since.Local().Zone()
	if _, after := v.query.Until.Local().Zone(); v.period <= calendar.Hour && before != after {
		text += begin.Local().Format(" MST")
	}
	return text
}

func (v *historyView) volume(n uint64) string {
	if v.exact {
		return tty.Grouped(n) + " B"
	}
	return tty.Bytes(float64(n))
}

func (v *historyView) speed(s history.Step, kind int) string {
	perSecond, known := speedOf(s, kind)
	switch {
	case !known:
		return "-"
	case v.bits && v.exact:
		return tty.Grouped(uint64(math.Round(8*perSecond))) + " bit/s"
	case v.bits:
		return tty.Bits(8*perSecond) + "/s"
	case v.exact:
		return tty.Grouped(uint64(math.Round(perSecond))) + " B/s"
	}
	return tty.Bytes(perSecond) + "/s"
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
