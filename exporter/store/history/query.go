package history

import (
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
	// Step is the resolution: sums are made of that length, counted from Since,
	// or from the first hour that is there. Less than a minute makes sense only
	// for the hour that is not over. 0 = one sum of everything.
	Step time.Duration
}

// Usage is the answer to a Query.
type Usage struct {
	Units []UnitUsage // by name
	// Damaged is how many hours of a unit, or cycles, could not be decoded and
	// are missing.
	Damaged int
}

// UnitUsage is what one unit transferred.
type UnitUsage struct {
	Unit  string
	Steps []Step // by time; only those with a sample, so a gap is a gap
}

// Step is a sum over one step. The speed is Total divided by Measured.
type Step struct {
	Time  time.Time // begin of the step, UTC
	Total [4]uint64 // as in Sample.Delta
	// Measured is how much time the samples cover. It is less than the step
	// where samples are missing, and it may be more: an interval counts where
	// it ends, so after the agent has been away one step covers all that time.
	Measured time.Duration
}

// maxSteps bounds the memory that a query can need, to some 500 MB.
const maxSteps = 8 << 20

// Read answers q from one consistent state of the history.
func Read(ctx context.Context, db *database.DB, q Query) (Usage, error) {
	if q.Step < 0 || !q.Until.IsZero() && q.Until.Before(q.Since) || !record.InRange(q.Since) || !record.InRange(q.Until) {
		return Usage{}, fmt.Errorf("since %v, until %v, step %v: until must come after since, and step must not be negative", q.Since, q.Until, q.Step)
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
	since, until, step int64
	all                bool                 // units are wanted
	units              map[int64]*UnitUsage // by id
	order              []int64
	steps              int
	usage              Usage
}

func collect(db *database.DB, q Query) (*collector, error) {
	c := &collector{all: len(q.Units) == 0, units: map[int64]*UnitUsage{}, step: q.Step.Milliseconds()}
	if q.Step > 0 && c.step == 0 {
		c.step = 1
	}
	if q.Since.IsZero() {
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
	if c.step > 0 {
		at += (s.end - c.since - 1) / c.step * c.step
	}
	begin := time.UnixMilli(at).UTC()
	n := len(u.Steps)
	i := n - 1
	if n == 0 || !u.Steps[i].Time.Equal(begin) {
		// Nearly always the next step; not so where the clock was set back.
		var found bool
		i, found = slices.BinarySearchFunc(u.Steps, begin, func(s Step, t time.Time) int { return s.Time.Compare(t) })
		if !found {
			if c.steps++; c.steps > maxSteps {
				return fmt.Errorf("the answer has more than %d steps: ask for a larger step, fewer units or less time", maxSteps)
			}
			u.Steps = slices.Insert(u.Steps, i, Step{Time: begin})
		}
	}
	step := &u.Steps[i]
	step.Measured += time.Duration(s.end-s.begin) * time.Millisecond
	for k := range step.Total {
		step.Total[k] = addSaturated(step.Total[k], s.delta[k])
	}
	return nil
}
