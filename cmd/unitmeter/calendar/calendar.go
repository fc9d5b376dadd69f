// Package calendar reads times as people write them, and divides time into the
// hours, days, weeks and months of a time zone.
//
// All functions are pure and may be called concurrently.
package calendar

import (
	"errors"
	"fmt"
	"time"
)

// Period is a kind of period.
type Period int

// The periods of a calendar. Weeks begin on Monday.
const (
	Minute Period = iota + 1
	Hour
	Day
	Week
	Month
)

// Begin is the begin of the period with t in it, in the time zone of t. A day begins
// with the first moment of its date, where clocks skip midnight or show it twice too.
func (p Period) Begin(t time.Time) time.Time {
	year, month, day := t.Date()
	switch p {
	case Minute, Hour:
		length := map[Period]time.Duration{Minute: time.Minute, Hour: time.Hour}[p]
		begin := t.Add(-(time.Duration(t.Minute())*time.Minute + time.Duration(t.Second())*time.Second + time.Duration(t.Nanosecond())) % length)
		// Lord Howe changes its clocks by half an hour.
		if change, _ := t.ZoneBounds(); begin.Before(change) {
			return change
		}
		return begin
	case Week:
		return midnight(year, month, day-(int(t.Weekday())+6)%7, t.Location())
	case Month:
		return midnight(year, month, 1, t.Location())
	default:
		return midnight(year, month, day, t.Location())
	}
}

// next is the begin of the period after that with t in it.
func (p Period) next(t time.Time) time.Time {
	year, month, day := t.Date()
	var next time.Time
	switch p {
	case Minute, Hour:
		next = p.Begin(t).Add(map[Period]time.Duration{Minute: time.Minute, Hour: time.Hour}[p])
		if _, change := t.ZoneBounds(); !change.IsZero() && next.After(change) {
			next = change
		}
	case Week:
		next = midnight(year, month, day-(int(t.Weekday())+6)%7+7, t.Location())
	case Month:
		next = midnight(year, month+1, 1, t.Location())
	default:
		next = midnight(year, month, day+1, t.Location())
	}
	return next
}

// MaxPeriods is the upper bound for the length of what Divide returns.
const MaxPeriods = 1 << 20

// Divide lists the begins of the periods from since until until. The first one is
// since itself. The error satisfies errors.Is(err, ErrTooMany).
func (p Period) Divide(since, until time.Time) ([]time.Time, error) {
	var begins []time.Time
	for t := since; t.Before(until); t = p.next(t) {
		if len(begins) == MaxPeriods {
			return nil, fmt.Errorf("divide %s to %s: %w", since.Format(time.DateTime), until.Format(time.DateTime), ErrTooMany)
		}
		begins = append(begins, t)
	}
	return begins, nil
}

// ErrTooMany says that there are more than MaxPeriods.
var ErrTooMany = errors.New("these are too many periods; use longer ones, or less time")

// Format writes the name of a period that begins at t. A begin that is not that of the
// calendar is written in full.
func (p Period) Format(t time.Time) string {
	layout := "2006-01-02 15:04"
	if p.Begin(t).Equal(t) {
		layout = map[Period]string{Minute: layout, Hour: layout, Day: "Mon 2006-01-02", Week: "2006-01-02", Month: "2006-01"}[p]
	}
	return t.Format(layout)
}

// midnight is the first moment of a date.
func midnight(year int, month time.Month, day int, zone *time.Location) time.Time {
	return wall(year, month, day, 0, 0, 0, zone)
}

// wall is the first moment at which the clocks of a zone show a time or, if they skip
// it, a later one. time.Date promises neither.
func wall(year int, month time.Month, day, hour, minute, second int, zone *time.Location) time.Time {
	want := time.Date(year, month, day, hour, minute, second, 0, time.UTC)
	shows := func(t time.Time) time.Time {
		_, offset := t.Zone()
		return t.UTC().Add(time.Duration(offset) * time.Second)
	}
	t := time.Date(year, month, day, hour, minute, second, 0, zone)
	begin, end := t.ZoneBounds()
	switch difference := shows(t).Compare(want); {
	case difference < 0: // skipped, and t is before the change
		return end
	case difference > 0: // skipped, and t is after it
		return begin
	case begin.IsZero():
		return t
	}
	// Shown twice, if the clocks before the change showed it too.
	before := begin.Add(-time.Second)
	if first := before.Add(want.Sub(shows(before))); first.Before(begin) {
		return first
	}
	return t
}
