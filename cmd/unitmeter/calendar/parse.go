package calendar

import (
	"errors"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Forms has an example for each kind of time that Parse reads.
const Forms = `yesterday, 12:00, "2026-11-23 14:00", -90m, "2 days ago" or @1764500000`

var errForm = errors.New("not a time; use one such as " + Forms)

// The range of years in which time.Duration and the history can count.
const firstYear, lastYear = 1971, 2200

// Parse reads a time in the forms of systemd.time(7) that journalctl's --since takes:
//
//   - now, today, yesterday, tomorrow;
//   - -1h, "1 hour ago", +5min, and "1h 30min" without a sign, which is ago as well;
//   - @1764500000, seconds since 1970;
//   - 12:00 and 12:00:30, today;
//   - 2026-11-23, "2026-11-23 14:00" and 2026-11-23T14:00:05, each also with UTC
//     behind it; RFC 3339.
//
// The time zone is that of now. Unlike systemd's, days, weeks, months and years go by
// the calendar: "1 day ago" is the same time of the day before.
func Parse(text string, now time.Time) (time.Time, error) {
	text = strings.Join(strings.Fields(text), " ")
	t, ok := parse(text, now)
	if !ok || t.Year() < firstYear || t.Year() > lastYear {
		return time.Time{}, errForm
	}
	return t.In(now.Location()), nil
}

func parse(text string, now time.Time) (time.Time, bool) {
	year, month, day := now.Date()
	switch text {
	case "now":
		return now, true
	case "today":
		return midnight(year, month, day, now.Location()), true
	case "yesterday":
		return midnight(year, month, day-1, now.Location()), true
	case "tomorrow":
		return midnight(year, month, day+1, now.Location()), true
	}
	if seconds, ok := strings.CutPrefix(text, "@"); ok {
		n, err := strconv.ParseFloat(seconds, 64)
		if err != nil || !(n >= 0 && n < 1e11) {
			return now, false
		}
		whole, fraction := math.Modf(n)
		return time.Unix(int64(whole), int64(fraction*1e9)), true
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return t, true
	}
	zone, local := now.Location(), text
	if utc, ok := strings.CutSuffix(text, " UTC"); ok {
		zone, local = time.UTC, utc
	}
	for _, layout := range []string{time.DateOnly, "2006-01-02 15:04", time.DateTime, "2006-01-02T15:04", "2006-01-02T15:04:05", "15:04", time.TimeOnly} {
		t, err := time.Parse(layout, local)
		if err != nil {
			continue
		}
		year, month, day := t.Date()
		if year == 0 { // a time alone
			year, month, day = now.In(zone).Date()
		}
		return wall(year, month, day, t.Hour(), t.Minute(), t.Second(), zone), true
	}
	return relative(text, now)
}

var (
	part  = regexp.MustCompile(`^(\d{1,12}(?:\.\d{1,9})?) ?([A-Za-z]+) ?`)
	exact = map[string]time.Duration{
		"s": time.Second, "sec": time.Second, "second": time.Second, "seconds": time.Second,
		"m": time.Minute, "min": time.Minute, "minute": time.Minute, "minutes": time.Minute,
		"h": time.Hour, "hr": time.Hour, "hour": time.Hour, "hours": time.Hour,
	}
	dates = map[string][3]int{ // years, months, days
		"d": {0, 0, 1}, "day": {0, 0, 1}, "days": {0, 0, 1}, "w": {0, 0, 7}, "week": {0, 0, 7}, "weeks": {0, 0, 7},
		"M": {0, 1, 0}, "month": {0, 1, 0}, "months": {0, 1, 0}, "y": {1, 0, 0}, "year": {1, 0, 0}, "years": {1, 0, 0},
	}
)

// relative reads a time before or after now.
func relative(text string, now time.Time) (time.Time, bool) {
	sign := -1
	rest, ago := strings.CutSuffix(text, " ago")
	if after, ok := strings.CutPrefix(rest, "+"); ok && !ago {
		sign, rest = 1, after
	} else if before, ok := strings.CutPrefix(rest, "-"); ok && !ago {
		rest = before
	}
	var date [3]int
	var clock float64 // nanoseconds
	if rest == "" {
		return now, false
	}
	for rest != "" {
		found := part.FindStringSubmatch(rest)
		if found == nil {
			return now, false
		}
		rest = rest[len(found[0]):]
		n, err := strconv.ParseFloat(found[1], 64)
		if err != nil {
			return now, false
		}
		if unit, ok := exact[found[2]]; ok {
			clock += n * float64(unit)
			continue
		}
		unit, ok := dates[found[2]]
		if !ok || n != math.Trunc(n) || n > 1e5 {
			return now, false
		}
		for i := range date {
			date[i] += sign * int(n) * unit[i]
			if max(date[i], -date[i]) > 1e6 {
				return now, false
			}
		}
	}
	if clock > math.MaxInt64/2 {
		return now, false
	}
	t := now
	if date != [3]int{} {
		// A month ago from the 31st is the last day of a shorter month.
		year, month, day := now.Date()
		first := time.Date(year+date[0], month+time.Month(date[1]), 1, 0, 0, 0, 0, time.UTC)
		day = min(day, first.AddDate(0, 1, -1).Day()) + date[2]
		t = wall(first.Year(), first.Month(), day, now.Hour(), now.Minute(), now.Second(), now.Location()).Add(time.Duration(now.Nanosecond()))
	}
	return t.Add(time.Duration(sign) * time.Duration(clock)), true
}
