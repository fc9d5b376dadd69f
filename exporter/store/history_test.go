package store

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/history"
)

// commitSamples commits one cycle with the given samples and nothing else.
func commitSamples(t testing.TB, s *Store, at time.Time, samples ...history.Sample) {
	t.Helper()
	if err := s.Commit(t.Context(), Cycle{Time: at, Samples: samples}); err != nil {
		t.Fatal(err)
	}
}

func ask(t testing.TB, dir string, q history.Query) history.Usage {
	t.Helper()
	r, err := OpenReader(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	u, err := r.History(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// every has n periods of the same length.
func every(step time.Duration, start time.Time, n int) []time.Time {
	var periods []time.Time
	for i := range n {
		periods = append(periods, start.Add(time.Duration(i)*step))
	}
	return periods
}

// Six hours of cycles every 10 s, with an agent that was away for a while,
// against sums made here; at each step the same, before and after the roll-up.
func TestHistorySums(t *testing.T) {
	inMemory(t)
	r := rand.New(rand.NewPCG(9, 10))
	dir := filepath.Join(t.TempDir(), "state")
	start := time.Date(2026, 11, 1, 21, 0, 0, 0, time.UTC)
	now := start
	s := openTest(t, Config{Dir: dir, Now: func() time.Time { return now }})
	type key struct {
		unit string
		at   time.Time
	}
	type sum struct {
		total    [4]uint64
		measured time.Duration
	}
	const step = 10 * time.Minute
	want := map[key]sum{}
	commits := 0
	units := []string{"a.service", `dev-disk\x2d1.mount`, "idle.socket"}
	last := map[string]time.Time{}
	for now.Before(start.Add(6 * time.Hour)) {
		now = now.Add(10*time.Second + time.Duration(r.IntN(20))*time.Millisecond)
		if now.Hour() == 23 && now.Minute() == 20 {
			now = now.Add(25 * time.Minute) // the agent was away
			s.Close()
			s = openTest(t, Config{Dir: dir, Now: func() time.Time { return now }})
		}
		var samples []history.Sample
		for i, unit := range units {
			sample := history.Sample{Unit: unit, Time: now.Add(-time.Duration(i) * 50 * time.Millisecond)}
			if i < 2 {
				sample.Delta = [4]uint64{r.Uint64N(1e6), r.Uint64N(1e3), r.Uint64N(1e6), r.Uint64N(1e3)}
			}
			if l, ok := last[unit]; ok {
				sample.Interval = sample.Time.Sub(l)
			}
			last[unit] = sample.Time
			samples = append(samples, sample)
			// Not within 200 ms of the edge of a step, where rounding decides.
			k := key{unit, start.Add((sample.Time.Sub(start) - 1) / step * step)}
			w := want[k]
			w.total, w.measured = add(w.total, sample.Delta), w.measured+sample.Interval
			want[k] = w
		}
		if edge := now.Sub(start) % step; edge < 300*time.Millisecond || edge > step-300*time.Millisecond {
			for i := range samples { // take it back, and come again a second later
				k := key{samples[i].Unit, start.Add((samples[i].Time.Sub(start) - 1) / step * step)}
				w := want[k]
				w.total, w.measured = sub(w.total, samples[i].Delta), w.measured-samples[i].Interval
				want[k] = w
				if w == (sum{}) {
					delete(want, k)
				}
				last[samples[i].Unit] = samples[i].Time.Add(-samples[i].Interval)
			}
			continue
		}
		commitSamples(t, s, now, samples...)
		commits++
		if commits%11 != 0 {
			continue
		}
		// At any moment, also in the middle of a roll-up, and after a crash.
		if commits%33 == 0 {
			s.Close()
			s = openTest(t, Config{Dir: dir, Now: func() time.Time { return now }})
		}
		var total, wanted [4]uint64
		for k, w := range want {
			if k.unit == "a.service" {
				wanted = add(wanted, w.total)
			}
		}
		if u := ask(t, dir, history.Query{Units: []string{"a.service"}}); len(u.Units) == 1 {
			total = u.Units[0].Steps[0].Total
		}
		if total != wanted {
			t.Fatalf("at %v the history adds up to %v, want %v", now, total, wanted)
		}
	}
	var hours, recent int
	if err := s.db.Row("SELECT (SELECT count(DISTINCT hour) FROM hour), (SELECT count(DISTINCT hour) FROM recent)", nil, &hours, &recent); err != nil {
		t.Fatal(err)
	}
	if hours != 5 && hours != 6 || recent > 2 {
		t.Fatalf("%d hours are rolled up and %d are not", hours, recent)
	}
	got := ask(t, dir, history.Query{Periods: every(step, start, 37)})
	if got.Damaged != 0 || len(got.Units) != len(units) {
		t.Fatalf("%d units, %d damaged", len(got.Units), got.Damaged)
	}
	found := 0
	for _, u := range got.Units {
		for _, g := range u.Steps {
			found++
			w, ok := want[key{u.Unit, g.Time}]
			if !ok || g.Total != w.total || (g.Measured-w.measured).Abs() > 200*time.Millisecond {
				t.Errorf("%s %v: %v in %v, want %v in %v", u.Unit, g.Time, g.Total, g.Measured, w.total, w.measured)
			}
		}
	}
	if found != len(want) {
		t.Errorf("%d steps, want %d", found, len(want))
	}
	// A period of all units has the sums of each, and the time of the one that was
	// measured longest: all were measured together.
	for _, all := range got.All {
		var total [4]uint64
		var longest time.Duration
		for _, u := range got.Units {
			for _, s := range u.Steps {
				if s.Time.Equal(all.Time) {
					total, longest = add(total, s.Total), max(longest, s.Measured)
				}
			}
		}
		if all.Total != total || (all.Measured-longest).Abs() > time.Second {
			t.Errorf("%v: all units have %v in %v, want %v in %v", all.Time, all.Total, all.Measured, total, longest)
		}
	}
	if begin := got.Begin.Sub(start); begin < 9*time.Second || begin > 11*time.Second {
		t.Errorf("the first sample begins %v after the start", begin)
	}
	// The same numbers whatever the question.
	all := ask(t, dir, history.Query{})
	for i, u := range got.Units {
		var total [4]uint64
		for _, step := range u.Steps {
			total = add(total, step.Total)
		}
		if all.Units[i].Unit != u.Unit || len(all.Units[i].Steps) != 1 || all.Units[i].Steps[0].Total != total {
			t.Errorf("%s: %v in one, %v in steps", u.Unit, all.Units[i].Steps, total)
		}
		one := ask(t, dir, history.Query{Units: []string{u.Unit}, Periods: every(step, start, 37)})
		if len(one.Units) != 1 || !reflect.DeepEqual(one.Units[0], u) {
			t.Errorf("%s asked alone has %d units", u.Unit, len(one.Units))
		}
	}
	var names []string
	for _, u := range ask(t, dir, history.Query{Units: []string{"*.s[eo]*", "nothing.*", "a.*"}}).Units {
		names = append(names, u.Unit)
	}
	if fmt.Sprint(names) != "[a.service idle.socket]" {
		t.Errorf("globs found %q", names)
	}
	// Halves add up to the whole.
	mid := start.Add(2*time.Hour + 37*time.Minute + 17*time.Second)
	first, second := ask(t, dir, history.Query{Units: []string{"a.service"}, Until: mid}), ask(t, dir, history.Query{Units: []string{"a.service"}, Since: mid})
	if sum := add(first.Units[0].Steps[0].Total, second.Units[0].Steps[0].Total); sum != all.Units[0].Steps[0].Total {
		t.Errorf("halves add up to %v, want %v", sum, all.Units[0].Steps[0].Total)
	}
}

// Clocks that are set back, and hours that come twice.
func TestHistoryClockSteps(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	now := time.Date(2026, 11, 1, 0, 30, 0, 0, time.UTC)
	s := openTest(t, Config{Dir: dir, Now: func() time.Time { return now }})
	n := uint64(0)
	for _, jump := range []time.Duration{0, -2 * time.Hour, 3 * time.Hour, -30 * time.Minute, 24 * time.Hour, -24 * time.Hour, time.Hour} {
		now = now.Add(jump)
		for range 100 {
			now = now.Add(time.Minute)
			n++
			// A reply whose time is far from its cycle's counts at the cycle's.
			commitSamples(t, s, now, history.Sample{Unit: "a", Time: now.Add(-time.Duration(n%2) * 30 * time.Hour), Delta: [4]uint64{1, 2, 3, n}, Interval: time.Minute})
		}
	}
	got := ask(t, dir, history.Query{Units: []string{"a"}, Periods: every(time.Hour, time.Date(2026, 10, 30, 0, 0, 0, 0, time.UTC), 120)})
	var total [4]uint64
	var measured time.Duration
	for i, step := range got.Units[0].Steps {
		total, measured = add(total, step.Total), measured+step.Measured
		if i > 0 && !step.Time.After(got.Units[0].Steps[i-1].Time) {
			t.Errorf("step %v comes after %v", step.Time, got.Units[0].Steps[i-1].Time)
		}
	}
	if total != [4]uint64{n, 2 * n, 3 * n, n * (n + 1) / 2} || measured != time.Duration(n)*time.Minute {
		t.Errorf("%v in %v after %d minutes", total, measured, n)
	}
}

// The series of a fold has the name of its pattern.
func TestHistoryOfAPattern(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := openTest(t, Config{Dir: dir})
	now := time.Now()
	commitSamples(t, s, now, history.Sample{Unit: "build-[0-9]*.service", Time: now, Interval: time.Minute})
	if got := ask(t, dir, history.Query{Units: []string{"build-[0-9]*.service"}}); len(got.Units) != 1 {
		t.Errorf("got %+v", got)
	}
}

func TestHistoryExpires(t *testing.T) {
	inMemory(t)
	dir := filepath.Join(t.TempDir(), "state")
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	cfg := Config{Dir: dir, History: 12 * time.Hour, Now: func() time.Time { return now }}
	s := openTest(t, cfg)
	for i := range 40 * 30 {
		now = now.Add(2 * time.Minute)
		unit := "always"
		if i < 50 {
			unit = "early"
		}
		commitSamples(t, s, now, history.Sample{Unit: unit, Time: now, Delta: [4]uint64{1}, Interval: time.Minute})
	}
	got := ask(t, dir, history.Query{Periods: every(time.Hour, now.Add(-40*time.Hour), 41)})
	if len(got.Units) != 1 || got.Units[0].Unit != "always" {
		t.Fatalf("%d units", len(got.Units))
	}
	if n := len(got.Units[0].Steps); n < 12 || n > 14 {
		t.Errorf("%d hours are kept, want about 13", n)
	}
	var names int
	if err := s.db.Row("SELECT count(*) FROM unit", nil, &names); err != nil || names != 1 {
		t.Errorf("%d names are kept, want 1 (%v)", names, err)
	}
	// Off: what was there goes, an hour with each cycle.
	s.Close()
	cfg.History = -1
	s = openTest(t, cfg)
	for range 20 {
		now = now.Add(time.Minute)
		commitSamples(t, s, now, history.Sample{Unit: "always", Time: now, Delta: [4]uint64{1}, Interval: time.Minute})
	}
	if got := ask(t, dir, history.Query{}); len(got.Units) != 0 {
		t.Errorf("with the history off: %+v", got)
	}
}

// A damaged hour is left out and counted; a wrong number is never told.
func TestHistoryDamage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	s := openTest(t, Config{Dir: dir, Now: func() time.Time { return now }})
	for range 180 {
		now = now.Add(time.Minute)
		commitSamples(t, s, now, history.Sample{Unit: "a", Time: now, Delta: [4]uint64{1}, Interval: time.Minute})
	}
	if _, err := s.db.Exec("UPDATE hour SET minutes = substr(minutes, 1, 3) || x'55' || substr(minutes, 5) WHERE hour = (SELECT min(hour) FROM hour)"); err != nil {
		t.Fatal(err)
	}
	got := ask(t, dir, history.Query{})
	if got.Damaged != 1 || got.Units[0].Steps[0].Total[0] != 121 { // 59 minutes are in the first hour
		t.Errorf("%+v", got)
	}
}

func TestReaderErrors(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if _, err := OpenReader(t.Context(), dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, fileName)
	for content, want := range map[string]string{"": "shorter than 100 bytes", strings.Repeat("not a database ", 100): "is not a store"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenReader(t.Context(), dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v", content, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	openTest(t, Config{Dir: dir})
	r, err := OpenReader(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if u, err := r.History(t.Context(), history.Query{}); err != nil || len(u.Units) != 0 {
		t.Errorf("empty history: %v %v", u, err)
	}
	for _, q := range []history.Query{
		{Periods: []time.Time{time.Unix(2, 0), time.Unix(1, 0)}}, {Since: time.Unix(2, 0), Until: time.Unix(1, 0)}, {Since: time.Date(9000, 1, 1, 0, 0, 0, 0, time.UTC)},
	} {
		if _, err := r.History(t.Context(), q); err == nil {
			t.Errorf("%+v: no error", q)
		}
	}
}

// The one line that the documentation promises, with the real sqlite3, while
// the store is open.
func TestTopTalkersWithSqlite3(t *testing.T) {
	inMemory(t)
	tool, err := exec.LookPath("sqlite3")
	if err != nil {
		skip(t, "sqlite3 is not installed: apt-get install sqlite3")
	}
	dir := filepath.Join(t.TempDir(), "state")
	// Yesterday 18:00 to today 10:00, whenever this runs.
	today := time.Now().Truncate(time.Hour)
	today = time.Date(today.Year(), today.Month(), today.Day(), 0, 0, 0, 0, time.Local)
	now := today.Add(-6 * time.Hour)
	s := openTest(t, Config{Dir: dir, Now: func() time.Time { return now }})
	for now.Before(today.Add(10 * time.Hour)) {
		now = now.Add(time.Minute)
		night := now.Add(-time.Second).Hour() >= 22 || now.Add(-time.Second).Hour() < 6
		busy, quiet := uint64(100), uint64(1)
		if !night {
			busy, quiet = 1, 1e6
		}
		commitSamples(t, s, now.Add(-time.Second),
			history.Sample{Unit: "backup.service", Time: now.Add(-time.Second), Delta: [4]uint64{busy, 1, busy, 1}, Interval: time.Minute},
			history.Sample{Unit: "web.service", Time: now.Add(-time.Second), Delta: [4]uint64{quiet, 1, quiet, 1}, Interval: time.Minute})
	}
	out, err := exec.Command(tool, "-readonly", filepath.Join(dir, fileName), "SELECT unit, bytes, seconds FROM top_talkers_last_night LIMIT 10").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if want := "backup.service|96000|28800.0\nweb.service|960|28800.0\n"; string(out) != want {
		t.Errorf("sqlite3 says\n%swant\n%s", out, want)
	}
}
