// Package history keeps the traffic of each unit for some weeks back.
//
// Two things are needed of it: a [Writer], whose Append adds the samples of a cycle in
// the caller's transaction; and [Read], which answers a [Query], also from another
// process.
//
//   - sample: the traffic of one unit in one interval. It belongs to the hour of its
//     cycle, in which the interval ends.
//   - cycle: one row of the table recent, with times to the millisecond.
//   - hour: one row of the table hour for each unit, in minutes, with times to a tenth
//     of a second. Its sums are also plain columns, for people with sqlite3.
//   - roll-up: writing the rows of an hour that is over, and deleting its cycles. The
//     table rolling has the units in between.
//
// Rounding errors of times do not accumulate, since each interval ends where the next
// begins. Each row has a checksum. A damaged row is left out and counted. A transaction
// that failed needs Load before the next Append.
package history

import (
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/database"
	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// Schema makes the tables, and views of them. The views are for the sqlite3 of any
// supported distribution, down to 3.34, which has no unixepoch(); strftime() makes
// text, which is a number once one is added.
const Schema = `
CREATE TABLE unit (
  id   INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  seen INTEGER NOT NULL,             -- newest hour with a sample, in hours since 1970; exact to a day
  sum  INTEGER NOT NULL              -- CRC-32C of id and name
);
CREATE TABLE recent (                -- cycles of the hours that are not in hour yet
  id   INTEGER PRIMARY KEY AUTOINCREMENT,
  hour INTEGER NOT NULL,
  body BLOB NOT NULL
);
CREATE TABLE rolling (               -- one row while the oldest cycles of recent go to hour:
  last INTEGER NOT NULL,             -- of those up to this id
  unit INTEGER NOT NULL,             -- the units up to this id have gone
  sum  INTEGER NOT NULL              -- CRC-32C of both
);
CREATE TABLE hour (
  hour             INTEGER NOT NULL, -- hours since 1970
  unit             INTEGER NOT NULL,
  receive_bytes    INTEGER NOT NULL,
  receive_packets  INTEGER NOT NULL,
  transmit_bytes   INTEGER NOT NULL,
  transmit_packets INTEGER NOT NULL,
  seconds          REAL NOT NULL,    -- how much of the hour was measured
  minutes          BLOB NOT NULL,    -- the same in minutes
  PRIMARY KEY (hour, unit)
) WITHOUT ROWID;
CREATE TABLE damaged (               -- what a roll-up found damaged and left out
  hour INTEGER PRIMARY KEY,
  rows INTEGER NOT NULL              -- cycles, or former rows of a unit
);
CREATE VIEW traffic AS
  SELECT datetime(hour * 3600, 'unixepoch', 'localtime') AS time, hour * 3600 AS epoch, name AS unit,
         receive_bytes, receive_packets, transmit_bytes, transmit_packets, seconds
  FROM hour JOIN unit ON unit.id = hour.unit;
CREATE VIEW top_talkers AS            -- of the last 24 hours
  SELECT unit, sum(receive_bytes + transmit_bytes) AS bytes, sum(receive_bytes) AS receive_bytes,
         sum(transmit_bytes) AS transmit_bytes, sum(receive_packets) AS receive_packets,
         sum(transmit_packets) AS transmit_packets, sum(seconds) AS seconds
  FROM traffic WHERE epoch >= strftime('%s', 'now') - 86400
  GROUP BY unit ORDER BY bytes DESC;
CREATE VIEW top_talkers_last_night AS -- from 22:00 to 06:00 local time
  SELECT unit, sum(receive_bytes + transmit_bytes) AS bytes, sum(receive_bytes) AS receive_bytes,
         sum(transmit_bytes) AS transmit_bytes, sum(receive_packets) AS receive_packets,
         sum(transmit_packets) AS transmit_packets, sum(seconds) AS seconds
  FROM traffic
  WHERE epoch >= 0 + strftime('%s', 'now', 'localtime', 'start of day', '-2 hours', 'utc')
    AND epoch <  0 + strftime('%s', 'now', 'localtime', 'start of day', '+6 hours', 'utc')
  GROUP BY unit ORDER BY bytes DESC;
`

// Sample is what one unit transferred in one interval.
type Sample struct {
	Unit string
	// Time is the end of the interval: when the reply arrived. Within an hour
	// of its cycle's time, else that is taken for it.
	Time time.Time
	// Delta counts bytes received, packets received, bytes transmitted and
	// packets transmitted in the interval.
	Delta [4]uint64
	// Interval is how long that took: from the reply before to this one. A
	// negative one counts as zero.
	Interval time.Duration
}

// Writer writes the history. It is not safe for concurrent use.
type Writer struct {
	ids    map[string]unitRow // of the units seen since the last roll-up
	lastID int64              // of a unit
	oldest int64              // hour of the oldest row of recent
	newest int64              // hour of the newest
	any    bool               // recent has rows

	roll *rollUp // nil = none under way
}

type unitRow struct {
	id   int64
	seen int64 // hour
	used bool  // since the last roll-up
}

// tick is the resolution of times in hour.
const (
	tick         = 100 // milliseconds
	ticksPerHour = int64(time.Hour/time.Millisecond) / tick
	ticksPerMin  = ticksPerHour / 60
)

// span is a stretch of traffic of one unit: begin and end in milliseconds, or in
// ticks, since the start of its hour.
type span struct {
	begin, end int64
	delta      [4]uint64
}

func hourOf(t time.Time) int64 { return floorDiv(t.UnixMilli(), int64(time.Hour/time.Millisecond)) }

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}

// Load reads what Append needs, at the start and after a transaction that failed.
func (h *Writer) Load(db *database.DB) error {
	h.ids = map[string]unitRow{}
	var oldest, newest sql.NullInt64
	err := db.Row("SELECT (SELECT hour FROM recent ORDER BY id LIMIT 1), (SELECT hour FROM recent ORDER BY id DESC LIMIT 1), (SELECT coalesce(max(id), 0) FROM unit)",
		nil, &oldest, &newest, &h.lastID)
	if err == nil {
		_, err = db.Sequence("recent", "id")
	}
	h.oldest, h.newest, h.any = oldest.Int64, newest.Int64, oldest.Valid
	h.roll = nil
	return err
}

// Append writes the samples of the cycle at the given time, in a transaction of
// the caller.
func (h *Writer) Append(db *database.DB, at time.Time, samples []Sample) error {
	if len(samples) == 0 {
		return nil
	}
	hour := hourOf(at)
	units, spans := make([]int64, len(samples)), make([]span, len(samples))
	for i, sample := range samples {
		var err error
		if units[i], err = h.unit(db, sample.Unit, hour); err != nil {
			return err
		}
		end := sample.Time
		if d := at.Sub(end); d > time.Hour || d < -time.Hour {
			end = at
		}
		// Both ends are rounded, not the interval: so they meet the next ones.
		spans[i] = span{
			begin: end.Add(-max(0, sample.Interval)).UnixMilli() - hour*3600_000,
			end:   end.UnixMilli() - hour*3600_000,
			delta: sample.Delta,
		}
	}
	if _, err := db.Exec("INSERT INTO recent(hour, body) VALUES(?, ?)", hour, encodeCycle(hour, units, spans)); err != nil {
		return err
	}
	if !h.any {
		h.oldest, h.any = hour, true
	}
	h.newest = hour
	return nil
}

func unitSum(id int64, name string) uint32 { return record.Sum([]byte(name), id) }

// unit returns the id of a unit, and makes one for a new unit.
func (h *Writer) unit(db *database.DB, name string, hour int64) (int64, error) {
	row, known := h.ids[name]
	if !known {
		var err error
		if row, err = h.lookUp(db, name, hour); err != nil {
			return 0, err
		}
	}
	// A write for each unit and day, not for each cycle.
	if hour >= row.seen+24 {
		row.seen = hour
		if _, err := db.Exec("UPDATE unit SET seen = ? WHERE id = ?", hour, row.id); err != nil {
			return 0, err
		}
	}
	row.used = true
	h.ids[name] = row
	return row.id, nil
}

// lookUp finds or makes the row of a unit. It is apart from unit, where the row would
// be an allocation for each unit and cycle.
func (h *Writer) lookUp(db *database.DB, name string, hour int64) (row unitRow, err error) {
	var sum uint32
	err = db.Row("SELECT id, seen, sum FROM unit WHERE name = ?", []any{name}, &row.id, &row.seen, &sum)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		h.lastID++
		row.id, row.seen = h.lastID, hour
		_, err = db.Exec("INSERT INTO unit(id, name, seen, sum) VALUES(?, ?, ?, ?)", row.id, name, hour, unitSum(row.id, name))
	case err == nil && sum != unitSum(row.id, name):
		err = fmt.Errorf("unit %d of the history %w", row.id, record.ErrDamaged)
	}
	return row, err
}

// rollUp is the work of turning the cycles of an hour into a row for each unit.
// It takes eight Commits or so, since all at once it would hold up one of them
// for 40 ms with 1,000 units: first the cycles are read, then units are written.
type rollUp struct {
	hour    int64
	next    int64 // id of the next cycle to read
	last    int64 // id of the last cycle of the hour
	cycles  int64 // to read for each Commit
	minutes map[int64][]span
	units   []int64 // to write, in ascending order; nil while cycles are read
	after   int64   // units up to this id were written before a restart
	merge   bool    // the hour has rows from before the clock was set back
	damaged int     // cycles that are left out
}

// Advance does a step of the roll-up of the oldest hour, once a cycle of another
// hour has come. If two hours wait, cycles are rare, and it does one wholly.
func (h *Writer) Advance(db *database.DB) error {
	for h.any && h.oldest != h.newest {
		if err := h.step(db); err != nil {
			return err
		}
		if h.newest-h.oldest < 2 && h.newest > h.oldest {
			break
		}
	}
	return nil
}

const minSteps = 4 // for each of the two parts of a roll-up

func (h *Writer) step(db *database.DB) error {
	r := h.roll
	switch {
	case r == nil:
		r = &rollUp{hour: h.oldest, minutes: map[int64][]span{}}
		// After the clock was set back the same hour may come again later.
		err := db.Row("SELECT min(id), max(id) FROM recent WHERE id < (SELECT min(id) FROM recent WHERE hour <> ?)", []any{r.hour}, &r.next, &r.last)
		if err != nil {
			return err
		}
		r.cycles = max(4, (r.last-r.next)/minSteps+1)
		last, after, err := rolling(db)
		if err != nil {
			return err
		}
		if last == r.last {
			r.after = after
		}
		if err := db.Row("SELECT EXISTS (SELECT 1 FROM hour WHERE hour = ? AND unit > ?)", []any{r.hour, r.after}, &r.merge); err != nil {
			return err
		}
		h.roll = r
		fallthrough
	case r.units == nil:
		return r.read(db)
	case len(r.units) > 0:
		return r.write(db)
	}
	return h.finish(db)
}

// rolling returns how far the last roll-up has come, or zeros if none is under way:
// of the cycles up to last, those of the units up to unit are in hour.
func rolling(db *database.DB) (last, unit int64, err error) {
	var sum uint32
	err = db.Row("SELECT last, unit, sum FROM rolling", nil, &last, &unit, &sum)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, 0, nil
	}
	if err == nil && sum != record.Sum(nil, last, unit) {
		err = fmt.Errorf("the note on the roll-up of the history %w", record.ErrDamaged)
	}
	return last, unit, err
}

// read takes some cycles into memory.
func (r *rollUp) read(db *database.DB) error {
	to := min(r.last, r.next+r.cycles-1)
	err := db.Each("SELECT body FROM recent WHERE id BETWEEN ? AND ? ORDER BY id", []any{r.next, to}, func(scan func(...any) error) error {
		var body []byte
		if err := scan(&body); err != nil {
			return err
		}
		units, spans, err := decodeCycle(r.hour, body)
		if err != nil {
			r.damaged++
			return nil
		}
		for i, s := range spans {
			if unit := units[i]; unit > r.after {
				s.begin, s.end = floorDiv(s.begin+tick/2, tick), floorDiv(s.end+tick/2, tick)
				r.minutes[unit] = addMinute(r.minutes[unit], s)
			}
		}
		return nil
	})
	if r.next = to + 1; r.next > r.last {
		r.units = append([]int64{}, slices.Sorted(maps.Keys(r.minutes))...)
	}
	return err
}

// write writes the rows of some units, and notes up to where.
func (r *rollUp) write(db *database.DB) error {
	n := min(len(r.units), max(64, len(r.minutes)/minSteps+1))
	err := db.Tx(func() error {
		for _, unit := range r.units[:n] {
			spans := r.minutes[unit]
			if r.merge {
				var err error
				if spans, err = mergeHour(db, r.hour, unit, spans); err != nil {
					return err
				}
			}
			if err := writeHour(db, r.hour, unit, spans); err != nil {
				return err
			}
		}
		if _, err := db.Exec("DELETE FROM rolling"); err != nil {
			return err
		}
		_, err := db.Exec("INSERT INTO rolling(last, unit, sum) VALUES(?, ?, ?)", r.last, r.units[n-1], record.Sum(nil, r.last, r.units[n-1]))
		return err
	})
	r.units = r.units[n:]
	return err
}

// finish deletes the cycles that are in hour by now.
func (h *Writer) finish(db *database.DB) error {
	err := db.Tx(func() error {
		if err := noteDamaged(db, h.roll.hour, h.roll.damaged); err != nil {
			return err
		}
		if _, err := db.Exec("DELETE FROM recent WHERE id <= ?", h.roll.last); err != nil {
			return err
		}
		_, err := db.Exec("DELETE FROM rolling")
		return err
	})
	if err != nil {
		return err
	}
	h.roll = nil
	for name, row := range h.ids {
		if !row.used {
			delete(h.ids, name)
			continue
		}
		row.used = false
		h.ids[name] = row
	}
	return db.Row("SELECT coalesce((SELECT hour FROM recent ORDER BY id LIMIT 1), 0)", nil, &h.oldest)
}

// noteDamaged has Read count rows that are no longer there to be met.
func noteDamaged(db *database.DB, hour int64, rows int) error {
	if rows == 0 {
		return nil
	}
	_, err := db.Exec("INSERT INTO damaged(hour, rows) VALUES(?, ?) ON CONFLICT (hour) DO UPDATE SET rows = rows + excluded.rows", hour, rows)
	return err
}

// addMinute adds s to spans, within the minute in which it ends.
func addMinute(spans []span, s span) []span {
	n := len(spans)
	if n == 0 || floorDiv(spans[n-1].end, ticksPerMin) != floorDiv(s.end, ticksPerMin) {
		return append(spans, s)
	}
	l := &spans[n-1]
	measured := (l.end - l.begin) + (s.end - s.begin)
	l.end = max(l.end, s.end)
	l.begin = l.end - measured
	for i := range l.delta {
		l.delta[i] = addSaturated(l.delta[i], s.delta[i])
	}
	return spans
}

func addSaturated(a, b uint64) uint64 {
	if sum := a + b; sum >= a {
		return sum
	}
	return math.MaxUint64
}

func mergeHour(db *database.DB, hour, unit int64, spans []span) ([]span, error) {
	var body []byte
	err := db.Row("SELECT minutes FROM hour WHERE hour = ? AND unit = ?", []any{hour, unit}, &body)
	if errors.Is(err, sql.ErrNoRows) {
		return spans, nil
	}
	if err != nil {
		return nil, err
	}
	earlier, err := decodeHour(hour, unit, body)
	if err != nil {
		return spans, noteDamaged(db, hour, 1)
	}
	both := append(earlier, spans...)
	slices.SortStableFunc(both, func(a, b span) int { return int(a.end - b.end) })
	merged := both[:0]
	for _, s := range both {
		merged = addMinute(merged, s)
	}
	return merged, nil
}

func writeHour(db *database.DB, hour, unit int64, spans []span) error {
	var sum [4]uint64
	var ticks int64
	for _, s := range spans {
		ticks += s.end - s.begin
		for i := range sum {
			sum[i] = addSaturated(sum[i], s.delta[i])
		}
	}
	plain := func(i int) int64 { return int64(min(sum[i], math.MaxInt64)) }
	_, err := db.Exec(`INSERT OR REPLACE INTO hour(hour, unit, receive_bytes, receive_packets, transmit_bytes, transmit_packets, seconds, minutes)
		VALUES(?, ?, ?, ?, ?, ?, ?, ?)`,
		hour, unit, plain(0), plain(1), plain(2), plain(3), float64(ticks)*tick/1000, encodeHour(hour, unit, spans))
	return err
}

// Expire removes the oldest hour if it is older than keep, and the units that
// nothing mentions any more. One hour for each Commit keeps up, and a clock that
// jumps for a moment costs little.
func (h *Writer) Expire(db *database.DB, now time.Time, keep time.Duration) error {
	if keep <= 0 && h.any { // no cycle will come that would roll these up
		err := db.Tx(func() error {
			_, err := db.Exec("DELETE FROM recent")
			if err == nil {
				_, err = db.Exec("DELETE FROM rolling")
			}
			return err
		})
		if err != nil {
			return err
		}
		h.any, h.roll = false, nil
	}
	var oldest sql.NullInt64
	if err := db.Row("SELECT min(hour) FROM hour", nil, &oldest); err != nil {
		return err
	}
	if !oldest.Valid || oldest.Int64 >= hourOf(now.Add(-keep)) {
		return nil
	}
	return db.Tx(func() error {
		if _, err := db.Exec("DELETE FROM hour WHERE hour = ?", oldest.Int64); err != nil {
			return err
		}
		if _, err := db.Exec("DELETE FROM damaged WHERE hour <= ?", oldest.Int64); err != nil {
			return err
		}
		// seen may be a day behind.
		var gone []int64
		err := db.Each("SELECT id FROM unit WHERE seen < ?", []any{oldest.Int64 - 24}, func(scan func(...any) error) error {
			var id int64
			err := scan(&id)
			gone = append(gone, id)
			return err
		})
		if err != nil {
			return err
		}
		alive := make(map[int64]bool, len(h.ids))
		for _, row := range h.ids {
			alive[row.id] = true
		}
		for _, id := range gone {
			if alive[id] {
				continue
			}
			if _, err := db.Exec("DELETE FROM unit WHERE id = ?", id); err != nil {
				return err
			}
		}
		return nil
	})
}

// encodeCycle makes a body of recent: the count and then columns.
func encodeCycle(hour int64, units []int64, spans []span) []byte {
	b := binary.AppendUvarint(nil, uint64(len(spans)))
	column := make([]uint64, len(spans))
	for n := range 7 {
		for i, s := range spans {
			switch n {
			case 0:
				column[i] = uint64(units[i])
			case 1:
				column[i] = record.Zigzag(s.end)
			case 2:
				column[i] = uint64(s.end - s.begin)
			default:
				column[i] = s.delta[n-3]
			}
		}
		b = record.AppendColumn(b, column)
	}
	return record.AppendSum(b, hour)
}

func decodeCycle(hour int64, b []byte) (units []int64, spans []span, err error) {
	b, err = record.CheckSum(b, hour)
	if err != nil {
		return nil, nil, err
	}
	count, b, err := record.TakeCount(b)
	if err != nil {
		return nil, nil, err
	}
	units, spans = make([]int64, count), make([]span, count)
	column := make([]uint64, count)
	for n := range 7 {
		if b, err = record.ReadColumn(b, column); err != nil {
			return nil, nil, err
		}
		for i, v := range column {
			switch n {
			case 0:
				units[i] = int64(v)
			case 1:
				spans[i].end = record.Unzigzag(v)
			case 2:
				spans[i].begin = spans[i].end - int64(v)
			default:
				spans[i].delta[n-3] = v
			}
		}
	}
	return units, spans, nil
}

// encodeHour makes a body of hour. It is: the count, the begin of the first
// span, which columns follow, and those columns: the ends of the spans always,
// the others if they are not all zero. Spans mostly begin where the one before
// ended, so the column of gaps is mostly absent, and for an idle unit so are
// those of the counters.
func encodeHour(hour, unit int64, spans []span) []byte {
	b := binary.AppendUvarint(nil, uint64(len(spans)))
	if len(spans) == 0 {
		return record.AppendSum(b, hour, unit)
	}
	b = binary.AppendVarint(b, spans[0].begin)
	var columns [6][]uint64
	last := spans[0].begin
	for _, s := range spans {
		columns[0] = append(columns[0], record.Zigzag(s.end-last))
		columns[1] = append(columns[1], record.Zigzag(s.begin-last))
		for i, v := range s.delta {
			columns[2+i] = append(columns[2+i], v)
		}
		last = s.end
	}
	mask := len(b)
	b = append(b, 0)
	for n, column := range columns {
		if n == 0 || slices.ContainsFunc(column, func(v uint64) bool { return v != 0 }) {
			b[mask] |= 1 << n
			b = record.AppendColumn(b, column)
		}
	}
	return record.AppendSum(b, hour, unit)
}

func decodeHour(hour, unit int64, b []byte) ([]span, error) {
	b, err := record.CheckSum(b, hour, unit)
	if err != nil {
		return nil, err
	}
	count, b, err := record.TakeCount(b)
	if err != nil || count == 0 {
		return nil, err
	}
	last, n := binary.Varint(b)
	if n <= 0 || len(b) == n {
		return nil, record.ErrDamaged
	}
	mask, b := b[n], b[n+1:]
	spans, column := make([]span, count), make([]uint64, count)
	for n := range 6 {
		if mask&(1<<n) == 0 {
			clear(column)
		} else if b, err = record.ReadColumn(b, column); err != nil {
			return nil, err
		}
		end := last
		for i, v := range column {
			switch n {
			case 0:
				end += record.Unzigzag(v)
				spans[i].end = end
			case 1:
				spans[i].begin = end + record.Unzigzag(v)
				end = spans[i].end
			default:
				spans[i].delta[n-2] = v
			}
		}
	}
	return spans, nil
}
