package top

import (
	"bytes"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

func byDBus() accounting.Origin {
	return accounting.Origin{Counting: receiver.Counting{Source: receiver.DBus}}
}

// at is the time of reading n of the tests, one second apart.
func at(n int) time.Time {
	return time.Date(2026, 11, 23, 12, 0, 0, 0, time.Local).Add(time.Duration(n) * time.Second)
}

// counted is a unit with so many bytes in and out, and a tenth of packets.
func counted(name, invocation string, start, read int, in, out uint64) systemd.Unit {
	return systemd.Unit{
		Name: name, Accounting: "on", Invocation: invocation, Slice: "system.slice", Start: at(start), Time: at(read),
		Counters: systemd.Counters{IngressBytes: in, IngressPackets: in / 10, EgressBytes: out, EgressPackets: out / 10},
	}
}

func TestBoardSpeeds(t *testing.T) {
	unknown := speeds{}
	type step struct {
		unit systemd.Unit
		want speeds
	}
	for _, test := range []struct {
		name    string
		steps   []step
		session uint64 // bytes received
	}{
		{"growth", []step{
			{counted("a.service", "1", -100, 0, 5000, 50), unknown}, // what was before is no speed
			{counted("a.service", "1", -100, 1, 5500, 50), speeds{[kinds]float64{500, 50, 0, 0}, true}},
			{counted("a.service", "1", -100, 3, 5600, 70), speeds{[kinds]float64{50, 5, 10, 1}, true}},
		}, 600},
		{"not read", []step{
			{counted("a.service", "1", -100, 0, 5000, 50), unknown},
			{counted("a.service", "1", -100, 0, 5000, 50), unknown},
			{counted("a.service", "1", -100, 2, 6000, 50), speeds{[kinds]float64{500, 50, 0, 0}, true}},
		}, 1000},
		{"restart", []step{
			{counted("a.service", "1", -100, 0, 5000, 50), unknown},
			{counted("a.service", "2", 0, 1, 70, 10), speeds{[kinds]float64{70, 7, 10, 1}, true}},
		}, 70},
		{"a restart before the last reading", []step{ // it was read under the old run since
			{counted("a.service", "1", -100, 0, 5000, 50), unknown},
			{counted("a.service", "2", -1, 1, 70, 10), unknown},
		}, 0},
		{"fall", []step{
			{counted("a.service", "1", -100, 0, 5000, 50), unknown},
			{counted("a.service", "1", -100, 1, 70, 60), unknown},
			{counted("a.service", "1", -100, 2, 80, 60), speeds{[kinds]float64{10, 1, 0, 0}, true}},
		}, 10},
		{"lost", []step{
			{counted("a.service", "1", -100, 0, 5000, 50), unknown},
			{systemd.Unit{Name: "a.service", Accounting: "lost", Invocation: "1"}, unknown},
			{counted("a.service", "1", -100, 2, 6000, 50), unknown}, // what came meanwhile cannot be told
			{counted("a.service", "1", -100, 3, 6010, 50), speeds{[kinds]float64{10, 1, 0, 0}, true}},
		}, 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBoard(systemd.Patterns{}, time.Second)
			for i, s := range test.steps {
				b.take(at(i), []systemd.Unit{s.unit})
				if got := b.rows["a.service"].now; got != s.want {
					t.Errorf("after reading %d: %+v, want %+v", i, got, s.want)
				}
			}
			if got := b.rows["a.service"].session[bytesIn]; got != test.session {
				t.Errorf("received since the start: %d, want %d", got, test.session)
			}
		})
	}
}

func TestBoardUnits(t *testing.T) {
	b := newBoard(only(t, "a*.service"), time.Second)
	b.take(at(0), []systemd.Unit{counted("a.service", "1", -9, 0, 100, 0), counted("b.service", "2", -9, 0, 100, 0), {Name: "aoff.service", Accounting: "off"}})
	// A unit that came up since the last reading: all of it is of this interval.
	b.take(at(1), []systemd.Unit{counted("a.service", "1", -9, 1, 150, 0), counted("a2.service", "3", 0, 1, 30, 0)})
	if len(b.rows) != 2 || b.rows["b.service"] != nil || b.others["off"] != 0 {
		t.Errorf("rows %v, others %v", b.rows, b.others)
	}
	if got := b.rows["a2.service"].now.of[bytesIn]; got != 30 {
		t.Errorf("speed of the new unit = %v, want 30", got)
	}
	if got := b.sums(); got != (speeds{[kinds]float64{80, 8, 0, 0}, true}) {
		t.Errorf("sums = %+v", got)
	}
	// An ended unit stays for a minute, at 0.
	b.take(at(2), nil)
	if r := b.rows["a.service"]; r == nil || r.ended.IsZero() || r.now != (speeds{known: true}) {
		t.Errorf("after its end: %+v", r)
	}
	b.take(at(62), nil)
	if b.rows["a.service"] == nil {
		t.Error("gone after 60 s, want it kept for as long")
	}
	b.take(at(63), nil)
	if b.rows["a.service"] != nil {
		t.Error("still there after 61 s")
	}
}

func TestBoardKeepsBounded(t *testing.T) {
	b := newBoard(systemd.Patterns{}, time.Second)
	for i := range 700 {
		b.take(at(i), []systemd.Unit{counted("a.service", "1", -9, i, uint64(i)*100, 0)})
	}
	r := b.rows["a.service"]
	if len(r.history) != 600 {
		t.Errorf("%d speeds kept, want 600", len(r.history))
	}
	if m := r.mean(60); m.of[bytesIn] != 100 || r.peak.of[bytesIn] != 100 {
		t.Errorf("mean %v, peak %v, want 100", m.of[bytesIn], r.peak.of[bytesIn])
	}
}

func TestSlicesAbove(t *testing.T) {
	for name, want := range map[string]string{
		"":                    "",
		"-.slice":             "-.slice",
		"system.slice":        "system.slice -.slice",
		"a-b-c.slice":         "a-b-c.slice a-b.slice a.slice -.slice",
		"system-getty.slice":  "system-getty.slice system.slice -.slice",
		"user-1000.slice":     "user-1000.slice user.slice -.slice",
		`a\x2db-c.slice`:      `a\x2db-c.slice a\x2db.slice -.slice`,
		"-bad.slice":          "-bad.slice -.slice", // no slice has such a name
		"machine.slice.slice": "machine.slice.slice -.slice",
	} {
		if got := strings.Join(slicesAbove(name), " "); got != want {
			t.Errorf("slicesAbove(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestBoardBySlice(t *testing.T) {
	b := newBoard(systemd.Patterns{}, time.Second)
	in := func(u systemd.Unit, slice string) systemd.Unit { u.Slice = slice; return u }
	for i := range 3 {
		n := uint64(i)
		units := []systemd.Unit{
			in(counted("a.service", "1", -9, i, 1000*n, 0), "x-y.slice"),
			in(counted("b.service", "2", -9, i, 100*n, 10*n), "x.slice"),
			in(counted("x.slice", "3", -9, i, 1100*n, 10*n), "-.slice"), // must not be counted twice
		}
		if i == 2 { // it has less history than the others
			units = append(units, in(counted("c.service", "4", 1, i, 5, 5), "x.slice"))
		}
		b.take(at(i), units)
	}
	got := map[string]topRow{}
	for _, r := range b.bySlice() {
		got[r.name] = *r
	}
	for name, want := range map[string]topRow{
		"x-y.slice": {units: 1, now: speeds{[kinds]float64{1000, 100, 0, 0}, true}, total: totals{2000, 200, 0, 0}},
		"x.slice":   {units: 3, now: speeds{[kinds]float64{1105, 110, 15, 1}, true}, total: totals{2205, 220, 25, 2}},
		"-.slice":   {units: 3, now: speeds{[kinds]float64{1105, 110, 15, 1}, true}, total: totals{2205, 220, 25, 2}},
	} {
		if g := got[name]; g.units != want.units || g.now != want.now || g.total != want.total {
			t.Errorf("%s = %d units, %+v, %+v; want %+v", name, g.units, g.now, g.total, want)
		}
	}
	if h := got["x.slice"].history; len(h) != 3 || h[1].of[bytesIn] != 1100 || h[2].of[bytesIn] != 1105 {
		t.Errorf("history of x.slice = %v", h)
	}
	if len(got) != 3 {
		t.Errorf("slices: %v", got)
	}
}

func TestBoardSorted(t *testing.T) {
	b := newBoard(systemd.Patterns{}, time.Second)
	rows := []*topRow{
		{name: "c", now: speeds{of: [kinds]float64{1, 5, 9, 1}}, total: totals{3, 0, 0, 0}, history: []speeds{{of: [kinds]float64{1}, known: true}}},
		{name: "a", now: speeds{of: [kinds]float64{2, 5, 8, 3}}, total: totals{0, 0, 9, 0}, history: []speeds{{of: [kinds]float64{1}, known: true}, {of: [kinds]float64{3}, known: true}}},
		{name: "b", now: speeds{of: [kinds]float64{3, 6, 7, 2}}, total: totals{4, 0, 1, 0}, history: []speeds{{of: [kinds]float64{3}, known: true}, {}}},
	}
	for by, want := range map[column][2]string{
		byName: {"abc", "cba"}, byIn: {"bac", "cab"}, byOut: {"cab", "bac"}, byTotal: {"abc", "cba"}, byRecent: {"bac", "cab"},
		byPacketsIn: {"bac", "acb"}, byPacketsOut: {"abc", "cba"}, // equal ones are in the order of their names
	} {
		for i, reverse := range []bool{false, true} {
			got := ""
			for _, r := range b.sorted(rows, by, reverse) {
				got += r.name
			}
			if got != want[i] {
				t.Errorf("by column %d, reverse %t: %s, want %s", by, reverse, got, want[i])
			}
		}
	}
}

func TestSparkline(t *testing.T) {
	known := func(values ...float64) []speeds {
		var h []speeds
		for _, v := range values {
			h = append(h, speeds{of: [kinds]float64{v}, known: v >= 0}) // -1 stands for a gap
		}
		return h
	}
	for _, test := range []struct {
		history  []speeds
		n, width int
		want     string
	}{
		{nil, 4, 4, "    "},
		{known(0, 0, 0, 0), 4, 4, "    "},
		{known(8, 4, 0, 1), 4, 4, "█▄ ▁"},
		{known(8), 4, 4, "   █"},
		{known(1, 2, 4, 8), 2, 2, "▄█"},              // the last two
		{known(8, 1, 1, 1), 4, 2, "█▁"},              // a peak survives
		{known(8, -1, 8), 3, 3, "█ █"},               // a gap
		{known(0.0001, 8), 2, 2, "▁█"},               // a little is seen
		{known(8, 4), 2, 4, "██▄▄"},                  // fewer values than columns
		{known(math.MaxFloat64, 1), 2, 2, "█▁"},      // no overflow
		{known(1, 1, 1, 1, 1, 1, 1), 7, 0, ""},       // no room
		{known(make([]float64, 900)...), 60, 1, " "}, // more values than asked for
	} {
		if got := sparkline(test.history, test.n, test.width); got != test.want {
			t.Errorf("sparkline(%v, %d, %d) = %q, want %q", test.history, test.n, test.width, got, test.want)
		}
	}
	if got := strings.Join(chart([]float64{1, 2, 4}, 4, 2), "|"); got != "  █|▄██" {
		t.Errorf("chart = %q", got)
	}
}

var escapes = regexp.MustCompile("\x1b\\[[0-9;]*m")

// shown is the screen as text.
func shown(m *topModel) string {
	return escapes.ReplaceAllString(m.View().Content, "")
}

// demoModel is a screen with a few units after some seconds.
func demoModel(t testing.TB) *topModel {
	t.Helper()
	m := newTopModel(newBoard(systemd.Patterns{}, time.Second), byDBus(), false)
	for i := range 30 {
		n := uint64(i)
		m.Update(accounting.Sweep{Time: at(i), Units: []systemd.Unit{
			counted("nats.service", "1", -100, i, 5_000_000*n, 2_000_000*n),
			counted("postgresql.service", "2", -100, i, 10_000*n, 90_000*n),
			counted("a-unit-with-a-very-long-name-that-does-not-fit-on-any-screen-of-a-usual-width@instance.service", "3", -100, i, 10*n, 10*n),
			{Name: "off.service", Accounting: "off"}, {Name: "lost.service", Accounting: "lost"},
		}})
	}
	return m
}

// press sends keys: a name such as "enter", or a character.
func press(m *topModel, keys ...string) (quit bool) {
	codes := map[string]rune{"enter": tea.KeyEnter, "esc": tea.KeyEscape, "up": tea.KeyUp, "down": tea.KeyDown, "left": tea.KeyLeft, "right": tea.KeyRight,
		"home": tea.KeyHome, "end": tea.KeyEnd, "pgdown": tea.KeyPgDown, "pgup": tea.KeyPgUp, "backspace": tea.KeyBackspace, "tab": tea.KeyTab}
	for _, k := range keys {
		msg := tea.KeyPressMsg{Code: codes[k]}
		switch {
		case k == "space":
			msg = tea.KeyPressMsg{Code: tea.KeySpace, Text: " "}
		case k == "ctrl+c":
			msg = tea.KeyPressMsg{Code: 'c', Mod: tea.ModCtrl}
		case msg.Code == 0:
			r, _ := utf8.DecodeRuneInString(k)
			msg = tea.KeyPressMsg{Code: r, Text: k}
		}
		if _, cmd := m.Update(msg); cmd != nil {
			quit = true
		}
	}
	return quit
}

func TestTopScreen(t *testing.T) {
	m := demoModel(t)
	lines := strings.Split(shown(m), "\n")
	if len(lines) != 24 {
		t.Fatalf("%d lines, want 24", len(lines))
	}
	for i, want := range map[int]string{
		0: "unitmeter top   in 5.01 MB/s   out 2.09 MB/s                            12:00:29",
		1: "3 units by systemd; 1 with accounting off (unitmeter enable --default)          ",
		2: "UNIT                               IN/s       OUT/s       TOTAL LAST MINUTE▼    ",
		3: "nats.service                  5.00 MB/s   2.00 MB/s      203 MB         ████████",
		4: "postgresql.service            10.0 kB/s   90.0 kB/s     2.90 MB         ████████",
		5: "a-unit-with-a-very-long-na…      10 B/s      10 B/s       580 B         ████████",
		6: "",
	} {
		if lines[i] != want {
			t.Errorf("line %d:\n%q, want\n%q", i, lines[i], want)
		}
	}
}

func TestTopKeys(t *testing.T) {
	order := func(m *topModel) string {
		var names []string
		for _, r := range m.rows {
			names = append(names, r.name[:1])
		}
		return strings.Join(names, "")
	}
	for _, test := range []struct {
		keys  string
		want  string // on the screen
		order string // first letters of the rows
	}{
		{"", "LAST MINUTE▼", "npa"},
		{"n", "UNIT▲", "anp"},
		{"n n", "UNIT▼", "pna"},
		{"r", "LAST MINUTE▲", "apn"},
		{"i", "IN/s▼", "npa"},
		{"o r", "OUT/s▲", "apn"},
		{"t", "TOTAL▼", "npa"},
		{"right", "UNIT▲", "anp"},
		{"left", "TOTAL▼", "npa"},
		{"/ P o s t", "filter: Post_", "p"},
		{"/ p o s t enter", `1 of 3 with "post"`, "p"},
		{"/ p o s x backspace enter", `1 of 3 with "pos"`, "p"},
		{"/ z z enter", "no unit has zz in its name", ""},
		{"/ z z esc", "3 units", "npa"},
		{"/ z enter esc", "3 units", "npa"},
		{"/ q", "filter: q_", "p"},
		{"down enter", "postgresql.service", ""},
		{"enter", "since 2026-11-23", ""},
		{"enter b", "5,000,000 B/s", ""},
		{"enter esc", "LAST MINUTE▼", "npa"},
		{"enter q", "LAST MINUTE▼", "npa"},
		{"b", "203,000,000 B", "npa"},
		{"s", "SLICE", "-s"},
		{"tab enter", "units      3", ""},
		{"s s", "UNIT", "npa"},
		{"?", "keys", ""},
		{"? esc", "LAST MINUTE▼", "npa"},
		{"space", "paused at", "npa"},
		{"end down enter", "a-unit-with-a-very-long-name", ""},
		{"end home enter", "nats.service", ""},
		{"j j k enter", "postgresql.service", ""},
		{"pgdown pgup pgdown enter", "a-unit-with-a-very-long-name", ""},
	} {
		t.Run(test.keys, func(t *testing.T) {
			m := demoModel(t)
			m.Update(tea.WindowSizeMsg{Width: 100, Height: 24})
			if press(m, strings.Fields(test.keys)...) {
				t.Fatal("it ended")
			}
			if screen := shown(m); !strings.Contains(screen, test.want) {
				t.Errorf("want %q on the screen:\n%s", test.want, screen)
			}
			if got := order(m); test.order != "" && got != test.order {
				t.Errorf("rows %q, want %q", got, test.order)
			}
		})
	}
	for _, keys := range []string{"q", "ctrl+c", "/ a ctrl+c", "enter q q", "? ctrl+c"} {
		if !press(demoModel(t), strings.Fields(keys)...) {
			t.Errorf("%q does not end it", keys)
		}
	}
}

func TestTopCursorStays(t *testing.T) {
	m := demoModel(t)
	press(m, "down")
	if m.cursor != "postgresql.service" {
		t.Fatalf("cursor on %q", m.cursor)
	}
	// It becomes the busiest and moves up; the cursor goes with it.
	for i := 30; i < 90; i++ {
		m.Update(accounting.Sweep{Time: at(i), Units: []systemd.Unit{
			counted("nats.service", "1", -100, i, 150_000_000, 60_000_000),
			counted("postgresql.service", "2", -100, i, 1e9*uint64(i), 1e9*uint64(i)),
		}})
	}
	if m.rows[0].name != "postgresql.service" || m.selected() != m.rows[0] {
		t.Errorf("rows %s first, cursor on %q", m.rows[0].name, m.cursor)
	}
	// The unit under the cursor goes: the cursor is on the first row again.
	m.Update(accounting.Sweep{Time: at(90)})
	m.Update(accounting.Sweep{Time: at(200), Units: []systemd.Unit{counted("nats.service", "1", -100, 200, 150_000_000, 60_000_000)}})
	if r := m.selected(); r == nil || r.name != "nats.service" {
		t.Errorf("cursor on %+v", r)
	}
}

func TestTopPausedAndPartial(t *testing.T) {
	m := demoModel(t)
	press(m, "p")
	before := shown(m)
	m.Update(accounting.Sweep{Time: at(31)})
	if shown(m) != before {
		t.Error("a stopped screen moved")
	}
	press(m, "p")
	m.Update(accounting.Sweep{Time: at(32), Partial: true})
	if !strings.Contains(shown(m), "not all units could be read") {
		t.Errorf("a partial sweep is not told:\n%s", shown(m))
	}
}

// TestTopNoData shows what there is before the first reading and without units.
func TestTopNoData(t *testing.T) {
	m := newTopModel(newBoard(only(t, "nats.service"), time.Second), byDBus(), false)
	if !strings.Contains(shown(m), "reading all units") {
		t.Errorf("before the first reading:\n%s", shown(m))
	}
	press(m, "enter", "down", "up", "end", "s", "enter", "esc", "s")
	m.Update(accounting.Sweep{Time: at(0)})
	if !strings.Contains(shown(m), "no metered unit matches nats.service yet") {
		t.Errorf("without units:\n%s", shown(m))
	}
}

// FuzzTop presses any keys at any size: no line may be wider than the screen,
// and there are never more than it has.
func FuzzTop(f *testing.F) {
	f.Add(uint16(80), uint16(24), "jj\rb?q/abc\x1bsr<>nitom")
	f.Add(uint16(1), uint16(1), "\r")
	f.Add(uint16(0), uint16(0), "s\r")
	f.Add(uint16(250), uint16(70), "b/")
	f.Add(uint16(33), uint16(9), "\rb")
	f.Fuzz(func(t *testing.T, width, height uint16, keys string) {
		m := demoModel(t)
		m.Update(tea.WindowSizeMsg{Width: int(width % 400), Height: int(height % 200)})
		for _, k := range keys {
			press(m, map[rune]string{'\r': "enter", '\x1b': "esc", ' ': "space"}[k]+strings.Trim(string(k), "\r\x1b "))
			lines := strings.Split(shown(m), "\n")
			if len(lines) > max(1, m.height) {
				t.Fatalf("%d lines on a screen of %d", len(lines), m.height)
			}
			for _, l := range lines {
				if n := utf8.RuneCountInString(l); n > max(m.width, 0) && m.width > 0 {
					t.Fatalf("a line of %d on a screen of %d: %q", n, m.width, l)
				}
			}
		}
	})
}

// TestBoardEnded: a program of ours has counters of units without a cgroup too. Those
// that grow have a row.
func TestBoardEnded(t *testing.T) {
	b := newBoard(systemd.Patterns{}, time.Second)
	take := func(second int, in uint64, state string) *topRow {
		u := counted("job.service", "", -9, second, in, 0)
		u.Accounting = state
		b.take(at(second), []systemd.Unit{u})
		return b.rows["job.service"]
	}
	if r := take(0, 500, "ended"); r != nil {
		t.Errorf("a unit that had ended before has the row %+v", r)
	}
	for second := 1; second < 300; second += 100 {
		r := take(second, 500+uint64(second), "ended") // it came and went
		if r == nil || !r.ended.IsZero() || r.now.of[bytesIn] == 0 || r.session[bytesIn] != r.total[bytesIn]-500 && second == 1 {
			t.Fatalf("second %d: a unit that came and went has the row %+v", second, r)
		}
		if r = take(second+1, 500+uint64(second), "ended"); r == nil || r.ended.IsZero() || r.now.of[bytesIn] != 0 {
			t.Errorf("second %d: then it has the row %+v", second, r)
		}
		if r = take(second+98, 500+uint64(second), "ended"); r != nil {
			t.Errorf("second %d: it keeps the row %+v", second, r)
		}
	}
	// The interval begins at the last reading, not at that of the last row.
	take(399, 1000, "ended")
	if r := take(400, 1700, "on"); r == nil || r.now.of[bytesIn] != 700 {
		t.Errorf("a unit that is back has the row %+v", r)
	}
}

func TestPrintTop(t *testing.T) {
	b := newBoard(systemd.Patterns{}, time.Second)
	for i := range 2 {
		n := uint64(i)
		b.take(at(i), []systemd.Unit{
			counted("idle.service", "1", -9, i, 70, 70), counted("busy.service", "2", -9, i, 1234*n, 5_000_000*n),
			{Name: "off.service", Accounting: "off"}, {Name: "boot.mount", Accounting: "off"},
		})
	}
	for exact, want := range map[bool][]string{
		false: {"busy.service", "1.23 kB/s", "5.00 MB/s", "500000", "idle.service", "0 B/s", "IP accounting off: 1"},
		true:  {"busy.service", "1,234 B/s", "5,000,000 B/s", "idle.service"},
	} {
		var out bytes.Buffer
		if err := printTop(&out, b, byDBus(), exact); err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !strings.Contains(out.String(), w) {
				t.Errorf("exact %t: no %q in\n%s", exact, w, &out)
			}
		}
		if strings.Index(out.String(), "busy") > strings.Index(out.String(), "idle") {
			t.Errorf("the busiest is not first:\n%s", &out)
		}
	}
}

func TestColumnsByWidth(t *testing.T) {
	m := demoModel(t)
	for width, want := range map[int]string{
		40: "[0 1 2]", 64: "[0 1 2 5]", 66: "[0 1 2 6]", 80: "[0 1 2 5 6]", 120: "[0 1 2 3 4 5 6]",
	} {
		m.Update(tea.WindowSizeMsg{Width: width, Height: 24})
		var got []column
		for _, c := range m.columns() {
			got = append(got, c.column)
		}
		sum := 0
		for _, c := range m.columns() {
			sum += c.width + 1
		}
		if sum > width+1 || !slices.IsSorted(got[:len(got)-1]) || strings.TrimSpace(fmt.Sprint(got)) != want {
			t.Errorf("%d wide: columns %v (%d wide), want %s", width, got, sum, want)
		}
		// A number that is cut would be a wrong one.
		if line := strings.Split(shown(m), "\n")[3]; !strings.HasPrefix(line, "nats.service") || strings.Contains(line, "…") {
			t.Errorf("%d wide: the row is %q", width, line)
		}
	}
}

// only are patterns for a board.
func only(t *testing.T, patterns ...string) systemd.Patterns {
	t.Helper()
	p, err := accounting.Patterns(patterns)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
