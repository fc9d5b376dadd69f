package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	sqlite3 "modernc.org/sqlite/lib"
)

// Reader reads a store beside the agent that writes it, or after it has ended.
// It takes no lock that would hinder the agent, and writes nothing. It is safe
// for concurrent use; calls take turns.
type Reader struct {
	mu sync.Mutex
	db *database
}

// OpenReader opens the store in dir for reading. The error satisfies
// errors.Is(err, fs.ErrNotExist) if there is none yet.
func OpenReader(ctx context.Context, dir string) (*Reader, error) {
	path := filepath.Join(dir, fileName)
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	// SQLite's own words for these are less clear.
	f, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("open history: %w: has the agent run with this state directory?", err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("open history: %w: run as root or as the agent's user", err)
	case err != nil:
		return nil, fmt.Errorf("open history: %w", err)
	case f.Size() == 0:
		return nil, fmt.Errorf("open history: %s: %w: it is empty, the agent has not committed a cycle yet", path, fs.ErrNotExist)
	}
	db, err := connect(path, "mode=ro")
	if err == nil {
		if err = db.prepareReader(); err != nil {
			db.close()
		}
	}
	switch code := sqliteCode(err); {
	case code == sqlite3.SQLITE_CANTOPEN || code == sqlite3.SQLITE_READONLY || code == sqlite3.SQLITE_PERM || code == sqlite3.SQLITE_AUTH:
		return nil, fmt.Errorf("open history: %s or its -wal and -shm cannot be read by uid %d (%w): run as root or as the agent's user", path, os.Geteuid(), err)
	case err != nil:
		return nil, fmt.Errorf("open history: %w", err)
	}
	return &Reader{db: db}, nil
}

func (db *database) prepareReader() error {
	for _, pragma := range []string{"PRAGMA busy_timeout = 2000", "PRAGMA trusted_schema = OFF", "PRAGMA query_only = ON"} {
		if err := db.run(pragma); err != nil {
			return err
		}
	}
	empty, err := db.identify()
	if err == nil && empty {
		err = fmt.Errorf("%s: %w: it is empty, the agent has not committed a cycle yet", db.path, fs.ErrNotExist)
	}
	return err
}

// Close ends the use of the file.
func (r *Reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.db.close()
}

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

// History reads one consistent state of the history.
func (r *Reader) History(ctx context.Context, q Query) (Usage, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	usage, err := r.history(ctx, q)
	if err != nil {
		return Usage{}, fmt.Errorf("read history: %w", err)
	}
	return usage, nil
}

func (r *Reader) history(ctx context.Context, q Query) (Usage, error) {
	if q.Step < 0 || !q.Until.IsZero() && q.Until.Before(q.Since) || !inRange(q.Since) || !inRange(q.Until) {
		return Usage{}, fmt.Errorf("since %v, until %v, step %v: until must come after since, and step must not be negative", q.Since, q.Until, q.Step)
	}
	if _, err := r.db.exec("BEGIN"); err != nil { // one snapshot for all queries
		return Usage{}, err
	}
	defer func() { _, _ = r.db.exec("ROLLBACK") }()

	c, err := r.collect(q)
	if err != nil {
		return Usage{}, err
	}
	// A sample may be in the hour before or after its own: its cycle's.
	from, to := c.since/3600_000-2, floorDiv(c.until, 3600_000)+2
	read := func(hour, unit int64, body []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		spans, err := decodeHour(body)
		if err != nil {
			c.usage.Damaged++
			return nil
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
			err = r.db.each("WITH RECURSIVE h(hour) AS (SELECT max(?1, (SELECT min(hour) FROM hour)) UNION ALL SELECT hour + 1 FROM h WHERE hour < min(?2, (SELECT max(hour) FROM hour))) SELECT hour.hour, minutes FROM h CROSS JOIN hour ON hour.hour = h.hour AND unit = ?3",
				[]any{from, to, unit}, func(scan func(...any) error) error {
					var hour int64
					var body []byte
					if err := scan(&hour, &body); err != nil {
						return err
					}
					return read(hour, unit, body)
				})
			if err != nil {
				return Usage{}, err
			}
		}
	} else {
		err = r.db.each("SELECT hour, unit, minutes FROM hour WHERE hour BETWEEN ? AND ? ORDER BY hour, unit", []any{from, to},
			func(scan func(...any) error) error {
				var hour, unit int64
				var body []byte
				if err := scan(&hour, &unit, &body); err != nil {
					return err
				}
				return read(hour, unit, body)
			})
		if err != nil {
			return Usage{}, err
		}
	}
	// While an hour is rolled up, some of its units are in both tables.
	var rolling, gone int64
	if err := r.db.row("SELECT coalesce(max(last), 0), coalesce(max(unit), 0) FROM rolling", nil, &rolling, &gone); err != nil {
		return Usage{}, err
	}
	err = r.db.each("SELECT id, hour, body FROM recent WHERE hour BETWEEN ? AND ? ORDER BY id", []any{from, to}, func(scan func(...any) error) error {
		var id, hour int64
		var body []byte
		if err := scan(&id, &hour, &body); err != nil {
			return err
		}
		units, spans, err := decodeCycle(body)
		if err != nil {
			c.usage.Damaged++
			return ctx.Err()
		}
		for i, s := range spans {
			if id <= rolling && units[i] <= gone {
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
	units              map[int64]*UnitUsage // by id
	order              []int64
	steps              int
	usage              Usage
}

func (r *Reader) collect(q Query) (*collector, error) {
	c := &collector{units: map[int64]*UnitUsage{}, step: q.Step.Milliseconds()}
	if q.Step > 0 && c.step == 0 {
		c.step = 1
	}
	if q.Since.IsZero() {
		var first int64
		err := r.db.row("SELECT coalesce(min(h), 0) FROM (SELECT min(hour) AS h FROM hour UNION ALL SELECT min(hour) FROM recent)", nil, &first)
		if err != nil {
			return nil, err
		}
		c.since = (first - 1) * 3600_000
	} else {
		c.since = q.Since.UnixMilli()
	}
	c.until = int64(1) << 53
	if !q.Until.IsZero() {
		c.until = q.Until.UnixMilli()
	}
	where, args := "", []any{}
	for i, glob := range q.Units {
		where += [...]string{" WHERE", " OR"}[min(i, 1)] + " name = ? OR name GLOB ?"
		args = append(args, glob, glob)
	}
	err := r.db.each("SELECT id, name FROM unit"+where+" ORDER BY id", args, func(scan func(...any) error) error {
		var id int64
		var name string
		if err := scan(&id, &name); err != nil {
			return err
		}
		c.units[id] = &UnitUsage{Unit: name}
		c.order = append(c.order, id)
		return nil
	})
	return c, err
}

func (c *collector) add(unit int64, s span) error {
	u := c.units[unit]
	if u == nil || s.end <= c.since || s.end > c.until {
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

// Quarantined is a request that was taken out of the outbox.
type Quarantined struct {
	ID     int64
	Time   time.Time // of its cycle
	At     time.Time // when it was quarantined
	Points int
	Bytes  int // compressed
	Reason string
}

// Quarantined lists the quarantine, oldest first.
func (r *Reader) Quarantined(ctx context.Context) ([]Quarantined, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []Quarantined
	err := ctx.Err()
	if err == nil {
		err = r.db.each("SELECT id, time, at, points, length(body), reason FROM quarantine ORDER BY id", nil, func(scan func(...any) error) error {
			var q Quarantined
			var t, at int64
			err := scan(&q.ID, &t, &at, &q.Points, &q.Bytes, &q.Reason)
			q.Time, q.At = fromNanos(t), fromNanos(at)
			out = append(out, q)
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("list quarantine: %w", err)
	}
	return out, nil
}

// Partial returns what the server said to the newest delivered request, and since
// when it says so; the zero Partial if it took all points.
func (r *Reader) Partial(ctx context.Context) (p Partial, since time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var at, there int64
	if err = ctx.Err(); err == nil {
		err = r.db.row("SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'partial'", nil, &there)
	}
	if err == nil && there > 0 { // an older version has made the file, and none newer has opened it
		err = r.db.row("SELECT since, points, rejected, message FROM partial", nil, &at, &p.Points, &p.Rejected, &p.Message)
	}
	if errors.Is(err, sql.ErrNoRows) || err == nil && at == 0 {
		return Partial{}, time.Time{}, nil
	}
	if err != nil {
		return Partial{}, time.Time{}, fmt.Errorf("read refused points: %w", err)
	}
	return p, fromNanos(at), nil
}

// Backlog is the outbox as it stands in the file.
type Backlog struct {
	Requests int
	Bytes    int64     // on disk, compressed
	Oldest   time.Time // of the cycle of the oldest request; zero if there is none
}

// Backlog returns how much no server has taken yet. What an agent delivered
// while its disk failed still counts until the next cycle is committed.
func (r *Reader) Backlog(ctx context.Context) (Backlog, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b Backlog
	err := ctx.Err()
	if err == nil {
		var oldest sql.NullInt64
		// A frame is part of the requests that need it; one is kept for the next
		// request when there is none.
		err = r.db.row(`SELECT count(*),
			coalesce(sum(length(body)) + count(*) * ?1, 0) +
			(SELECT coalesce(sum(length(body) + ?1), 0) FROM frame WHERE id IN (SELECT frame FROM outbox)),
			(SELECT time FROM outbox ORDER BY id LIMIT 1) FROM outbox`, []any{rowOverhead}, &b.Requests, &b.Bytes, &oldest)
		if oldest.Valid {
			b.Oldest = fromNanos(oldest.Int64)
		}
	}
	if err != nil {
		return Backlog{}, fmt.Errorf("read backlog: %w", err)
	}
	return b, nil
}
