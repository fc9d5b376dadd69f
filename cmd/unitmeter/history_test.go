package main

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/exporter/store/history"
)

func TestParseMoment(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.Local)
	for text, want := range map[string]time.Time{
		"90m":                  now.Add(-90 * time.Minute),
		"7d":                   now.Add(-7 * 24 * time.Hour),
		"0.5d":                 now.Add(-12 * time.Hour),
		"0s":                   now,
		"2026-11-20":           time.Date(2026, 11, 20, 0, 0, 0, 0, time.Local),
		"2026-11-20T14:30":     time.Date(2026, 11, 20, 14, 30, 0, 0, time.Local),
		"2026-11-20 14:30:05":  time.Date(2026, 11, 20, 14, 30, 5, 0, time.Local),
		"2026-11-20T14:30:05Z": time.Date(2026, 11, 20, 14, 30, 5, 0, time.UTC),
	} {
		got, err := parseMoment("since", text, now)
		if err != nil || !got.Equal(want) {
			t.Errorf("%s: got %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "yesterday", "-1h", "-1d", "NaNd", "1e9d", "2026-13-01", "5"} {
		_, err := parseMoment("since", text, now)
		if !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), `--since "`+text+`" is not a time; use one such as`) {
			t.Errorf("%q: got error %v", text, err)
		}
	}
}

func someUsage() history.Usage {
	at := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	step := func(minute int, n uint64) history.Step {
		return history.Step{Time: at.Add(time.Duration(minute) * time.Minute), Total: [4]uint64{n, 2, 3 * n, 4}, Measured: 30 * time.Second}
	}
	return history.Usage{Units: []history.UnitUsage{
		{Unit: "quiet.service", Steps: []history.Step{{Time: at, Measured: 0}}},
		{Unit: "busy.service", Steps: []history.Step{step(0, 300), step(1, 600), step(5, 1200)}},
	}}
}

func TestHistoryOutputs(t *testing.T) {
	var out bytes.Buffer
	if err := tty.WriteJSON(&out, historyRows(someUsage())); err != nil {
		t.Fatal(err)
	}
	var rows []historyRow
	if err := json.Unmarshal(out.Bytes(), &rows); err != nil {
		t.Fatal(err)
	}
	if len(rows) != 4 || rows[1].IngressBytesPerSec != 10 || rows[1].EgressBytesPerSec != 30 || rows[1].MeasuredSeconds != 30 {
		t.Errorf("JSON has %+v", rows)
	}
	if rows[0].IngressBytesPerSec != 0 {
		t.Error("a step that covers no time has no speed")
	}

	out.Reset()
	if err := historyCSV(&out, someUsage()); err != nil {
		t.Fatal(err)
	}
	records, err := csv.NewReader(&out).ReadAll()
	if err != nil || len(records) != 5 || records[4][2] != "1200" || records[4][8] != "120.000" {
		t.Errorf("CSV has %v, %v", records, err)
	}

	out.Reset()
	if err := historyTable(&out, someUsage()); err != nil {
		t.Fatal(err)
	}
	if busy, quiet := strings.Index(out.String(), "busy"), strings.Index(out.String(), "quiet"); busy < 0 || quiet < busy {
		t.Errorf("the busiest unit comes first:\n%s", &out)
	}

	out.Reset()
	if err := historyCharts(&out, someUsage(), history.Query{Step: time.Minute}); err != nil {
		t.Fatal(err)
	}
	if strings.Count(out.String(), "no data") != 1 {
		t.Errorf("a gap must show as one:\n%s", &out)
	}
	if strings.Contains(out.String(), "in the next") {
		t.Errorf("the sample behind the gap does not cover it:\n%s", &out)
	}
	for line := range strings.Lines(out.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 || strings.Contains(line, "█") && strings.Contains(line, "1200") && n != 80 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	if !strings.Contains(out.String(), strings.Repeat("▒", 5)+strings.Repeat("█", 14)) {
		t.Errorf("the largest step fills the width:\n%s", &out)
	}

	// Samples of half a minute are further apart than steps of 20 s.
	out.Reset()
	usage := history.Usage{Units: []history.UnitUsage{{Unit: "busy.service", Steps: []history.Step{
		{Time: time.Date(2026, 11, 23, 12, 0, 0, 0, time.Local), Measured: 30 * time.Second},
		{Time: time.Date(2026, 11, 23, 12, 0, 40, 0, time.Local), Measured: 30 * time.Second}}}}}
	if err := historyCharts(&out, usage, history.Query{Step: 20 * time.Second}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), "no data") || strings.Count(out.String(), "in the next") != 1 || !strings.Contains(out.String(), "11-23 12:00:40") {
		t.Errorf("the second sample covers the step in between:\n%s", &out)
	}
}

func TestHistoryMistakes(t *testing.T) {
	state := "UNITMETER_STATE_DIR=" + t.TempDir()
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"--quarantined", "--json"}, "give it alone"},
		{[]string{"--quarantined", "nats"}, "give it alone"},
		{[]string{"--quarantined", "--retry", "--json"}, "give it alone"},
		{[]string{"--retry"}, "with --quarantined"},
		{[]string{"--since", "2999-01-01"}, "give an earlier --since"},
		{[]string{"--json", "--csv"}, "exclude each other"},
	} {
		code, _, stderr := runCommand(t, []string{state}, append([]string{"history"}, test.args...)...)
		if code != 2 || !strings.Contains(stderr, test.want) {
			t.Errorf("%v: code %d: %s", test.args, code, stderr)
		}
	}
	if code, _, stderr := runCommand(t, []string{state}, "history"); code != 1 || !strings.Contains(stderr, "set UNITMETER_STATE_DIR to the agent's directory") {
		t.Errorf("without a history: code %d: %s", code, stderr)
	}
}

func TestHistoryRetry(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	retry := func(want string) {
		t.Helper()
		code, stdout, stderr := runCommand(t, []string{"UNITMETER_STATE_DIR=" + dir}, "history", "--quarantined", "--retry")
		if code != 0 || stdout != want {
			t.Errorf("code %d: %q, want %q; %s", code, stdout, want, stderr)
		}
	}
	retry("No request is in quarantine.\n")
	if err := s.Commit(t.Context(), store.Cycle{Time: time.Now(), Request: []byte("refused")}); err != nil {
		t.Fatal(err)
	}
	entries, err := s.Next(t.Context(), 1)
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	if err := s.Quarantine(t.Context(), entries[0], "HTTP 400"); err != nil {
		t.Fatal(err)
	}
	retry("The agent sends 1 quarantined requests again after its next cycle, or after its next start.\n")
	if err := s.Commit(t.Context(), store.Cycle{Time: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if entries, err = s.Next(t.Context(), 1); err != nil || len(entries) != 1 || string(entries[0].Request) != "refused" {
		t.Errorf("waiting: %v, %v", entries, err)
	}
	retry("No request is in quarantine.\n")
}

// A name that is not in the history is not passed over, beside others neither.
func TestHistoryNamesWhatIsMissing(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Config{Dir: dir, History: 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	err = s.Commit(t.Context(), store.Cycle{Time: now, Samples: []history.Sample{
		{Unit: "here.service", Time: now, Delta: [4]uint64{1, 1, 1, 1}, Interval: time.Second}}})
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args     []string
		code     int
		says, is string // on standard error and output
	}{
		{[]string{"here", "gone", "also.socket"}, 0, "of gone.service, also.socket, nothing was recorded between", "here.service"},
		{[]string{"here", "*.socket"}, 0, "", "here.service"},
		{[]string{"gone", "*.socket"}, 1, "find gone.service *.socket in the history: nothing was recorded between", ""},
		{[]string{"--until", "12h"}, 0, "unitmeter history: nothing was recorded between", "UNIT"},
	} {
		code, stdout, stderr := runCommand(t, []string{"UNITMETER_STATE_DIR=" + dir}, append([]string{"history"}, test.args...)...)
		if code != test.code || !strings.Contains(stderr, test.says) || test.says == "" && stderr != "" || !strings.Contains(stdout, test.is) {
			t.Errorf("history %v: code %d, %q, %q", test.args, code, stdout, stderr)
		}
	}
}
