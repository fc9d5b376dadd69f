package calendar

import (
	"slices"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"
)

func zone(t testing.TB, name string) *time.Location {
	t.Helper()
	loc, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return loc
}

func TestParse(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	now := time.Date(2026, 11, 23, 12, 30, 15, 5, berlin)
	at := func(year int, month time.Month, day, hour, minute, second int) time.Time {
		return time.Date(year, month, day, hour, minute, second, 0, berlin)
	}
	for text, want := range map[string]time.Time{
		"now":                       now,
		"today":                     at(2026, 11, 23, 0, 0, 0),
		"yesterday":                 at(2026, 11, 22, 0, 0, 0),
		"tomorrow":                  at(2026, 11, 24, 0, 0, 0),
		"-1h":                       now.Add(-time.Hour),
		"1 hour ago":                now.Add(-time.Hour),
		" 1  hour  ago ":            now.Add(-time.Hour),
		"90m":                       now.Add(-90 * time.Minute),
		"1h30m":                     now.Add(-90 * time.Minute),
		"-1h 30min":                 now.Add(-90 * time.Minute),
		"1.5 hours ago":             now.Add(-90 * time.Minute),
		"+5min":                     now.Add(5 * time.Minute),
		"30s":                       now.Add(-30 * time.Second),
		"7d":                        now.AddDate(0, 0, -7),
		"2 weeks ago":               now.AddDate(0, 0, -14),
		"1 month ago":               now.AddDate(0, -1, 0).In(berlin),
		"1y":                        now.AddDate(-1, 0, 0),
		"@1764500000":               time.Unix(1764500000, 0),
		"@1764500000.5":             time.Unix(1764500000, 5e8),
		"12:00":                     at(2026, 11, 23, 12, 0, 0),
		"23:59:58":                  at(2026, 11, 23, 23, 59, 58),
		"2026-11-20":                at(2026, 11, 20, 0, 0, 0),
		"2026-11-20 14:30":          at(2026, 11, 20, 14, 30, 0),
		"2026-11-20T14:30":          at(2026, 11, 20, 14, 30, 0),
		"2026-11-20 14:30:05":       at(2026, 11, 20, 14, 30, 5),
		"2026-11-20T14:30:05":       at(2026, 11, 20, 14, 30, 5),
		"2026-11-20 14:30 UTC":      time.Date(2026, 11, 20, 14, 30, 0, 0, time.UTC),
		"2026-11-20T14:30:05Z":      time.Date(2026, 11, 20, 14, 30, 5, 0, time.UTC),
		"2026-11-20T14:30:05+05:30": time.Date(2026, 11, 20, 9, 0, 5, 0, time.UTC),
	} {
		got, err := Parse(text, now)
		if err != nil || !got.Equal(want) || got.Location() != berlin {
			t.Errorf("%s: got %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "5", "-", "-5", "--1h", "-1h ago", "+1h ago", "ago", "1 fortnight ago", "NaNd", "1e9d", "0.5d", "99999999h",
		"2026-13-01", "2026-02-30", "25:00", "@", "@-1", "@1e300", "@NaN", "1970-01-01", "9999-01-01", "1h1", "yesterday 12:00"} {
		if got, err := Parse(text, now); err == nil || !strings.Contains(err.Error(), "use one such as yesterday") {
			t.Errorf("%q: got %v, %v", text, got, err)
		}
	}
	// A day has 25 hours here, and a month may have no 31st.
	if got, err := Parse("1 day ago", at(2026, 10, 25, 12, 0, 0)); err != nil || !got.Equal(at(2026, 10, 24, 12, 0, 0)) {
		t.Errorf("a day before the end of summer time: %v, %v", got, err)
	}
	if got, err := Parse("1 month ago", at(2026, 3, 31, 12, 0, 0)); err != nil || !got.Equal(at(2026, 2, 28, 12, 0, 0)) {
		t.Errorf("a month before March 31: %v, %v", got, err)
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{"yesterday", "-1h 30min", "2 weeks ago", "@1764500000.5", "12:00", "2026-11-23 14:00 UTC", "100000y100000y", "9999999d"} {
		f.Add(text)
	}
	now := time.Date(2026, 11, 23, 12, 30, 15, 5, zone(f, "Europe/Berlin"))
	f.Fuzz(func(t *testing.T, text string) {
		got, err := Parse(text, now)
		if err != nil {
			return
		}
		if got.Year() < firstYear || got.Year() > lastYear {
			t.Errorf("%q is %v", text, got)
		}
		// What is printed is read again.
		again, err := Parse(got.UTC().Format(time.DateTime)+" UTC", now)
		if err != nil || !again.Equal(got.Truncate(time.Second)) {
			t.Errorf("%q: %v becomes %v, %v", text, got, again, err)
		}
	})
}

// Days of 23, 24 and 25 hours, and days whose midnight is skipped or comes twice.
func TestDivideDays(t *testing.T) {
	for _, test := range []struct {
		zone, since, until string
		hours              []float64
	}{
		{"Europe/Berlin", "2026-03-28", "2026-03-31", []float64{24, 23, 24}},
		{"Europe/Berlin", "2026-10-24", "2026-10-27", []float64{24, 25, 24}},
		{"America/Santiago", "2026-09-05", "2026-09-08", []float64{24, 23, 24}}, // 00:00 is skipped
		{"Asia/Beirut", "2026-03-28", "2026-03-31", []float64{24, 23, 24}},      // the same, east of Greenwich
		{"Asia/Amman", "2021-10-28", "2021-10-31", []float64{24, 25, 24}},       // 01:00 becomes 00:00
		{"America/Havana", "2026-10-31", "2026-11-03", []float64{24, 25, 24}},   // the same, in the west
		{"Pacific/Apia", "2011-12-28", "2012-01-01", []float64{24, 24, 24}},     // there was no December 30
		{"Australia/Lord_Howe", "2026-04-04", "2026-04-07", []float64{24, 24.5, 24}},
		{"Asia/Kolkata", "2026-04-04", "2026-04-06", []float64{24, 24}},
	} {
		loc := zone(t, test.zone)
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, loc)
		since, err1 := Parse(test.since, now)
		until, err2 := Parse(test.until, now)
		days, err := Day.Divide(since, until)
		if err1 != nil || err2 != nil || err != nil {
			t.Fatal(err1, err2, err)
		}
		var hours []float64
		for i, end := range append(days[1:], until) {
			hours = append(hours, end.Sub(days[i]).Hours())
			// The first moment of the day, and no other.
			if !Day.Begin(days[i]).Equal(days[i]) || days[i].Add(-time.Second).Day() == days[i].Day() || !Day.Begin(end.Add(-1)).Equal(days[i]) {
				t.Errorf("%s: a day begins at %v", test.zone, days[i])
			}
		}
		if !slices.Equal(hours, test.hours) {
			t.Errorf("%s has days of %v hours, want %v", test.zone, hours, test.hours)
		}
	}
}

func TestDivide(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	for _, test := range []struct {
		period       Period
		since, until string
		want         string
	}{
		{Hour, "2026-10-25 01:20", "2026-10-25 04:00", "2026-10-25 01:20, 2026-10-25 02:00, 2026-10-25 02:00, 2026-10-25 03:00"},
		{Hour, "2026-03-29 01:00", "2026-03-29 04:00", "2026-03-29 01:00, 2026-03-29 03:00"},
		{Day, "2026-11-21 09:00", "2026-11-23", "2026-11-21 09:00, Sun 2026-11-22"},
		{Week, "2026-11-20", "2026-12-01", "2026-11-20 00:00, 2026-11-23, 2026-11-30"},
		{Month, "2026-11-30", "2027-01-02", "2026-11-30 00:00, 2026-12, 2027-01"},
		{Minute, "2026-11-30 12:00:30", "2026-11-30 12:02", "2026-11-30 12:00, 2026-11-30 12:01"},
	} {
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, berlin)
		since, err1 := Parse(test.since, now)
		until, err2 := Parse(test.until, now)
		begins, err := test.period.Divide(since, until)
		if err1 != nil || err2 != nil || err != nil {
			t.Fatal(err1, err2, err)
		}
		var got []string
		for _, begin := range begins {
			got = append(got, test.period.Format(begin))
		}
		if text := strings.Join(got, ", "); text != test.want {
			t.Errorf("from %s until %s: got %s, want %s", test.since, test.until, text, test.want)
		}
	}
	if _, err := Minute.Divide(time.Unix(0, 0), time.Date(2026, 1, 1, 0, 0, 0, 0, berlin)); err == nil || !strings.Contains(err.Error(), "use longer ones") {
		t.Errorf("56 years of minutes: %v", err)
	}
}
