package history

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/database"
	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// Query says what to read of the history.
type Query struct {
	// Units are names or SQLite globs (* ? [a-z]; a backslash is an ordinary
	// character, as unit names have it). A name may look like a glob, as those
	// of folds do. None = all.
	Units []string
	// Since and Until bound the samples by the end of their interval: after
	// Since, up to and with Until. Zero = no bound.
	Since, Until time.Time
	// Periods are the begins of the periods to sum, ascending. Each goes on to the
	// next, the last one to Until. What is before the first is left out. None = one
	// sum of everything after Since.
	Periods []time.Time
}

// Usage is the answer to a Query.
type Usage struct {
	Units []UnitUsage // by name
	// All sums up the units. Its Measured is the time that a sample of any of them
	// covers.
	All []Step
	// Begin is when the oldest sample begins; zero without samples.
	Begin time.Time
	// Damaged is how many hours of a unit, or cycles, could not be decoded and
	// are missing.
	Damaged int
}

// UnitUsage is what one unit transferred.
type UnitUsage struct {
	Unit  string
	Steps []Step // by time; only those with a sample, so a gap is a gap
}

// Step is a sum over one period. The speed is Total divided by Measured.
type Step struct {
	Time  time.Time // begin of the period, UTC
	Total [4]uint64 // as in Sample.Delta
	// Measured is how much time the samples cover. It is less than the
	// period where samples are missing, and it may be more: an interval counts where
	// it ends, so after the agent has been away one period covers all that time.
	Measured time.Duration
}

// maxSteps bounds the memory that a query can need, to some 500 MB.
const maxSteps = 8 << 20

// Read answers q from one consistent state of the history.
func Read(ctx context.Context, db *database.DB, q Query) (Usage, error) {
	ordered := slices.IsSortedFunc(q.Periods, time.Time.Compare) && (len(q.Periods) == 0 || record.InRange(q.Periods[0]) && record.InRange(q.Periods[len(q.Periods)-1]))
	if !ordered || !q.Until.IsZero() && q.Until.Before(q.Since) || !record.InRange(q.Since) || !record.InRange(q.Until) {
		return Usage{}, fmt.Errorf("since %v, until %v, %d periods: until must come after since, and each period after the one before", q.Since, q.Until, len(q.Periods))
	}
	if _, err := db.Exec("BEGIN"); err != nil { // one snapshot for all queries
		return Usage{}, err
	}
	defer func() { _, _ = db.Exec("ROLLBACK") }()

	c, err := collect(db, q)
	if err != nil {
		return Usage{}, err
	}
	// A sample may be in the hour before or after its own: its cycle's.
	from, to := c.since/3600_000-2, floorDiv(c.until, 3600_000)+2
	read := func(hour, unit int64, body []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		spans, err := decodeHour(hour, unit, body)
		if err != nil {
			return c.damaged(err)
		}
		for _, s := range spans {
			if err := c.add(unit, span{hour*3600_000 + s.begin*tick, hour*3600_000 + s.end*tick, s.delta}); err != nil {
				return err
			}
		}
		return nil
	}
	if len(q.Units) > 0 {
		// One range for each unit: without an index, but with one jump an hour.
		for _, unit := range c.order {
			err = db.Each("WITH RECURSIVE h(hour) AS (SELECT max(?1, (SELECT min(hour) FROM hour)) UNION ALL SELECT hour + 1 FROM h WHERE hour < min(?2, (SELECT max(hour) FROM hour))) SELECT hour.hour, minutes FROM h CROSS JOIN hour ON hour.hour = h.hour AND unit = ?3",
				[]any{from, to, unit}, func(scan func(...any) error) error {
					var hour int64
					var body []byte
					if err := scan(&hour, &body); err != nil {
						return c.damaged(err)
					}
					return read(hour, unit, body)
				})
			if err != nil {
				return Usage{}, err
			}
		}
	} else {
		err = db.Each("SELECT hour, unit, minutes FROM hour WHERE hour BETWEEN ? AND ? ORDER BY hour, unit", []any{from, to},
			func(scan func(...any) error) error {
				var hour, unit int64
				var body []byte
				if err := scan(&hour, &unit, &body); err != nil {
					return c.damaged(err)
				}
				return read(hour, unit, body)
			})
		if err != nil {
			return Usage{}, err
		}
	}
	var lost int
	if err := db.Row("SELECT coalesce(sum(rows), 0) FROM damaged WHERE hour BETWEEN ? AND ?", []any{from, to}, &lost); err != nil {
		return Usage{}, err
	}
	c.usage.Damaged += lost
	// While an hour is rolled up, some of its units are in both tables.
	last, gone, err := rolling(db)
	if err != nil {
		return Usage{}, err
	}
	err = db.Each("SELECT id, hour, body FROM recent WHERE hour BETWEEN ? AND ? ORDER BY id", []any{from, to}, func(scan func(...any) error) error {
		var id, hour int64
		var body []byte
		if err := scan(&id, &hour, &body); err != nil {
			return c.damaged(err)
		}
		units, spans, err := decodeCycle(hour, body)
		if err != nil {
			return c.damaged(err)
		}
		for i, s := range spans {
			if id <= last && units[i] <= gone {
				continue
			}
			if err := c.add(units[i], span{hour*3600_000 + s.begin, hour*3600_000 + s.end, s.delta}); err != nil {
				return err
			}
		}
		return ctx.Err()
	})
	if err != nil {
		return Usage{}, err
	}
	for i, covered := range c.covered {
		if first := time.UnixMilli(covered[0].begin).UTC(); i == 0 || first.Before(c.usage.Begin) {
			c.usage.Begin = first
		}
		for _, s := range covered {
			c.usage.All[i].Measured += time.Duration(s.end-s.begin) * time.Millisecond
		}
	}
	for _, u := range c.units {
		if len(u.Steps) > 0 {
			c.usage.Units = append(c.usage.Units, *u)
		}
	}
	slices.SortFunc(c.usage.Units, func(a, b UnitUsage) int { return strings.Compare(a.Unit, b.Unit) })
	return c.usage, nil
}

// collector sums spans into steps. Times are unix milliseconds.
type collector struct {
	since, until int64
	periods      []int64
	all          bool                 // units are wanted
	units        map[int64]*UnitUsage // by id
	order        []int64
	covered      [][]span // for each of usage.All: what its samples cover, by time, without overlaps
	steps        int
	usage        Usage
}

func collect(db *database.DB, q Query) (*collector, error) {
	c := &collector{all: len(q.Units) == 0, units: map[int64]*UnitUsage{}}
	for _, begin := range q.Periods {
		c.periods = append(c.periods, begin.UnixMilli())
	}
	if q.Since.IsZero() && len(q.Periods) > 0 {
		c.since = c.periods[0]
	} else if q.Since.IsZero() {
		var first int64
		err := db.Row("SELECT coalesce(min(h), 0) FROM (SELECT min(hour) AS h FROM hour UNION ALL SELECT min(hour) FROM recent)", nil, &first)
		if err != nil {
			return nil, err
		}
		c.since = max(0, first-1) * 3600_000
	} else {
		c.since = q.Since.UnixMilli()
	}
	c.until = math.MaxInt64 / int64(time.Millisecond)
	if !q.Until.IsZero() {
		c.until = q.Until.UnixMilli()
	}
	wanted, args := "TRUE", []any{}
	for i, glob := range q.Units {
		wanted = [...]string{"", wanted + " OR "}[min(i, 1)] + "name = ? OR name GLOB ?"
		args = append(args, glob, glob)
	}
	err := db.Each("SELECT id, name, sum, "+wanted+" FROM unit ORDER BY id", args, func(scan func(...any) error) error {
		var id int64
		var name string
		var sum uint32
		var wanted bool
		err := scan(&id, &name, &sum, &wanted)
		if err == nil && sum != unitSum(id, name) {
			err = record.ErrDamaged
		}
		if err != nil {
			return c.damaged(err)
		}
		if !wanted {
			return nil
		}
		c.units[id] = &UnitUsage{Unit: name}
		c.order = append(c.order, id)
		return nil
	})
	return c, err
}

// damaged counts a row that is left out. It returns any other error than that.
func (c *collector) damaged(err error) error {
	if !errors.Is(err, record.ErrDamaged) {
		return err
	}
	c.usage.Damaged++
	return nil
}

func (c *collector) add(unit int64, s span) error {
	u := c.units[unit]
	if s.end <= c.since || s.end > c.until {
		return nil
	}
	if u == nil {
		if c.all {
			c.usage.Damaged++ // its unit is not there, or damaged
		}
		return nil
	}
	at := c.since
	if len(c.periods) > 0 {
		i, _ := slices.BinarySearch(c.periods, s.end) // the first that begins at the end or later
		if i == 0 {
			return nil
		}
		at = c.periods[i-1]
	}
	begin := time.UnixMilli(at).UTC()
	i, found := find(u.Steps, begin)
	if !found {
		if c.steps++; c.steps > maxSteps {
			return fmt.Errorf("the answer has more than %d sums: ask for longer periods, fewer units or less time", maxSteps)
		}
		u.Steps = slices.Insert(u.Steps, i, Step{Time: begin})
	}
	u.Steps[i].Measured += time.Duration(s.end-s.begin) * time.Millisecond
	u.Steps[i].add(s.delta)
	if i, found = find(c.usage.All, begin); !found {
		c.usage.All = slices.Insert(c.usage.All, i, Step{Time: begin})
		c.covered = slices.Insert(c.covered, i, nil)
	}
	c.usage.All[i].add(s.delta)
	c.covered[i] = cover(c.covered[i], s)
	return nil
}

// find is where the step with that begin is, or belongs.
func find(steps []Step, begin time.Time) (int, bool) {
	// Nearly always the last one.
	if n := len(steps) - 1; n >= 0 && steps[n].Time.Equal(begin) {
		return n, true
	}
	return slices.BinarySearchFunc(steps, begin, func(s Step, t time.Time) int { return s.Time.Compare(t) })
}

func (s *Step) add(delta [4]uint64) {
	for k := range s.Total {
		s.Total[k] = addSaturated(s.Total[k], delta[k])
	}
}

// cover adds a span to spans without overlaps.
func cover(covered []span, s span) []span {
	if n := len(covered) - 1; n >= 0 && covered[n].begin <= s.begin && s.end <= covered[n].end {
		return covered // nearly always, as units are measured together
	}
	from, _ := slices.BinarySearchFunc(covered, s.begin, func(c span, begin int64) int { return cmp.Compare(c.end, begin) })
	to := from
	for ; to < len(covered) && covered[to].begin <= s.end; to++ {
		s.begin, s.end = min(s.begin, covered[to].begin), max(s.end, covered[to].end)
	}
	return slices.Replace(covered, from, to, span{begin: s.begin, end: s.end})
}
