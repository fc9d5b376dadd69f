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
	_ "time/tzdata"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/exporter/store/history"
)

// runHistory runs the command on a store.
func runHistory(t *testing.T, dir string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	return runCommand(t, []string{"UNITMETER_STATE_DIR=" + dir}, append([]string{"history"}, args...)...)
}

// octoberStore has samples around the end of summer time in Berlin, which is the local
// time of the test: each ten minutes from October 24, 22:00, until October 26, 02:00.
// web sends and receives all the time, backup only on the 25th, and idle never.
func octoberStore(t *testing.T) (dir string) {
	t.Helper()
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	local := time.Local
	time.Local = berlin
	t.Cleanup(func() { time.Local = local })
	dir = t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 10, 24, 22, 0, 0, 0, berlin)
	s, err := store.Open(t.Context(), store.Config{Dir: dir, History: 21 * 24 * time.Hour, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	for now.Before(time.Date(2026, 10, 26, 2, 0, 0, 0, berlin)) {
		now = now.Add(10 * time.Minute)
		sample := func(unit string, delta ...uint64) history.Sample {
			return history.Sample{Unit: unit, Time: now, Interval: 10 * time.Minute, Delta: [4]uint64(delta)}
		}
		samples := []history.Sample{sample("web.service", 6000, 6, 600_000, 12), sample("idle.service", 0, 0, 0, 0)}
		if now.Add(-1).Day() == 25 {
			samples = append(samples, sample("backup.service", 0, 0, 60_000_000, 40_000))
		}
		if err := s.Commit(t.Context(), store.Cycle{Time: now, Samples: samples}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestHistoryTables(t *testing.T) {
	dir := octoberStore(t)
	for _, test := range []struct {
		args string
		want string
	}{
		// 12, 150 and 12 times ten minutes: the 25th has 25 hours.
		{"--daily --since 2026-10-24 --until 2026-10-27", `
TIME RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
2026-10-24 22:00 72.0 kB 7.20 MB 7.27 MB 10 B/s 1.00 kB/s 72 144 all units
Sun 2026-10-25 900 kB 9.09 GB 9.09 GB 10 B/s 101 kB/s 900 6,001,800 all units
Mon 2026-10-26 72.0 kB 7.20 MB 7.27 MB 10 B/s 1.00 kB/s 72 144 all units
1.04 MB 9.10 GB 9.11 GB 10 B/s 87.2 kB/s 1,044 6,002,088 total of 3 units
nothing is recorded before 2026-10-24 22:00
`},
		{"--daily --since 2026-10-25 --until 2026-10-27 -n 1 --bits", `
TIME RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
Sun 2026-10-25 0 B 9.00 GB 9.00 GB 0 bit/s 800 kbit/s 0 6,000,000 backup.service
972 kB 9.10 GB 9.10 GB 80 bit/s 749 kbit/s 972 6,001,944 total of 3 units
`},
		{"--daily --since 2026-10-25 --until 2026-10-27 --bytes web backup", `
TIME RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
Sun 2026-10-25 0 B 9,000,000,000 B 9,000,000,000 B 0 B/s 100,000 B/s 0 6,000,000 backup.service
Sun 2026-10-25 900,000 B 90,000,000 B 90,900,000 B 10 B/s 1,000 B/s 900 1,800 web.service
Mon 2026-10-26 72,000 B 7,200,000 B 7,272,000 B 10 B/s 1,000 B/s 72 144 web.service
972,000 B 9,097,200,000 B 9,098,172,000 B 10 B/s 93,593 B/s 972 6,001,944 total of 2 units
`},
		{"--hourly --since 2026-10-25T01:00 --until 2026-10-25T04:00 --bits --bytes web", `
TIME RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
2026-10-25 01:00 CEST 36,000 B 3,600,000 B 3,636,000 B 80 bit/s 8,000 bit/s 36 72 web.service
2026-10-25 02:00 CEST 36,000 B 3,600,000 B 3,636,000 B 80 bit/s 8,000 bit/s 36 72 web.service
2026-10-25 02:00 CET 36,000 B 3,600,000 B 3,636,000 B 80 bit/s 8,000 bit/s 36 72 web.service
2026-10-25 03:00 CET 36,000 B 3,600,000 B 3,636,000 B 80 bit/s 8,000 bit/s 36 72 web.service
144,000 B 14,400,000 B 14,544,000 B 80 bit/s 8,000 bit/s 144 288 total of 1 unit
`},
		{"--weekly --since 2026-10-19 --until 2026-10-27", `
TIME RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
2026-10-24 22:00 972 kB 9.10 GB 9.10 GB 10 B/s 93.6 kB/s 972 6,001,944 all units
2026-10-26 72.0 kB 7.20 MB 7.27 MB 10 B/s 1.00 kB/s 72 144 all units
1.04 MB 9.10 GB 9.11 GB 10 B/s 87.2 kB/s 1,044 6,002,088 total of 3 units
nothing is recorded before 2026-10-24 22:00
the agent keeps three weeks, or as UNITMETER_HISTORY says
`},
		{"--monthly --since 2026-10-01 --until 2026-11-05", `
TIME RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
2026-10-24 22:00 1.04 MB 9.10 GB 9.11 GB 10 B/s 87.2 kB/s 1,044 6,002,088 all units
nothing is recorded before 2026-10-24 22:00
the agent keeps three weeks, or as UNITMETER_HISTORY says
`},
		{"--since 2026-10-25 --until 2026-10-26", `
RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
0 B 9.00 GB 9.00 GB 0 B/s 100 kB/s 0 6,000,000 backup.service
900 kB 90.0 MB 90.9 MB 10 B/s 1.00 kB/s 900 1,800 web.service
900 kB 9.09 GB 9.09 GB 10 B/s 101 kB/s 900 6,001,800 total of 3 units
1 idle unit; --all shows idle units as well
`},
		{"--since 2026-10-25 --until 2026-10-26 --all", `
RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
0 B 9.00 GB 9.00 GB 0 B/s 100 kB/s 0 6,000,000 backup.service
900 kB 90.0 MB 90.9 MB 10 B/s 1.00 kB/s 900 1,800 web.service
0 B 0 B 0 B 0 B/s 0 B/s 0 0 idle.service
900 kB 9.09 GB 9.09 GB 10 B/s 101 kB/s 900 6,001,800 total of 3 units
`},
		{"--since 2026-10-25 --until 2026-10-26 idle", `
RECEIVED SENT TOTAL RECEIVED/s SENT/s RECEIVED pkt SENT pkt UNIT
0 B 0 B 0 B 0 B/s 0 B/s 0 0 idle.service
`},
	} {
		code, stdout, stderr := runHistory(t, dir, strings.Fields(test.args)...)
		got := "\n"
		for line := range strings.Lines(stdout) {
			got += strings.Join(strings.Fields(line), " ") + "\n"
		}
		if code != 0 || stderr != "" || got != test.want {
			t.Errorf("history %s: code %d, %s%s\nwant:%s", test.args, code, stderr, stdout, test.want)
		}
	}
}

func TestHistoryForPrograms(t *testing.T) {
	dir := octoberStore(t)
	args := []string{"--daily", "--since", "2026-10-25", "--until", "2026-10-27"}
	_, stdout, stderr := runHistory(t, dir, append(args, "--json")...)
	var rows []historyRow
	if err := json.Unmarshal([]byte(stdout), &rows); err != nil {
		t.Fatal(err, stderr)
	}
	if len(rows) != 5 || rows[0].Unit != "backup.service" || rows[0].TransmitBytes != 9e9 || *rows[0].TransmitBytesPerSec != 1e5 || rows[0].MeasuredSeconds != 90_000 {
		t.Errorf("JSON has %s", stdout)
	}
	for _, want := range []string{`"time": "2026-10-25T00:00:00+02:00"`, `"time": "2026-10-26T00:00:00+01:00"`, `"receive_packets_per_second": 0.01`} {
		if !strings.Contains(stdout, want) {
			t.Errorf("JSON has no %s: %s", want, stdout)
		}
	}
	_, stdout, stderr = runHistory(t, dir, append(args, "--csv", "-n", "2")...)
	records, err := csv.NewReader(strings.NewReader(stdout)).ReadAll()
	if err != nil || len(records) != 4 || records[2][0] != "web.service" || records[2][4] != "90000000" || records[2][8] != "1000.000" {
		t.Errorf("CSV has %v, %v, %s", records, err, stderr)
	}
	// A speed that is not known is no zero.
	var out bytes.Buffer
	rows = historyRows([]history.UnitUsage{{Unit: "new.service", Steps: []history.Step{{Time: time.Now(), Total: [4]uint64{1, 1, 1, 1}}}}})
	if err := tty.WriteJSON(&out, rows); err != nil || !strings.Contains(out.String(), `"receive_bytes_per_second": null`) {
		t.Errorf("JSON without a measured time: %v, %s", err, &out)
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
		{[]string{"--since", "2199-01-01"}, "give an earlier --since"},
		{[]string{"--since", "last week"}, `--since "last week" is not a time; use one such as yesterday, 12:00`},
		{[]string{"--since", ""}, `--since "" is not a time; use one such as`},
		{[]string{"--daily=false"}, "it takes no value"},
		{[]string{"--until", "5"}, `--until "5" is not a time; use one such as`},
		{[]string{"--daily", "--hourly"}, "--daily and --hourly exclude each other"},
		{[]string{"--minutely", "--since", "1980-01-01"}, "use longer ones, or less time"},
		{[]string{"-n", "0"}, "use one from 1 on"},
		{[]string{"-n", "ten"}, "see \"unitmeter help history\""},
		{[]string{"--json", "--bits"}, "are for tables"},
		{[]string{"--step", "1h"}, "there is no flag --step"},
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
