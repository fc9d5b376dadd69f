package store

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// Series is the ledger's row for one exported series.
type Series struct {
	Kind  uint8     // tells apart series with the same key
	Key   string    // unique in the ledger among its kind
	Total [4]uint64 // any values, including those above 1<<63
	Start time.Time // from when Total counts; years 1678 to 2262, or zero
	Seen  time.Time // when Total was last read
}

// Run is the ledger's row for one live run of one unit.
type Run struct {
	Key  string // identifies the run; unique in the ledger
	Unit string
	Boot string // identifies the boot under which Last was read
	// SeriesKind and Series are those of the series that the run is added to. They
	// may name none.
	SeriesKind uint8
	Series     string
	Last       [4]uint64
	Seen       time.Time // when Last was read
}

// Ledger is the state that continues over restarts. Times come back in UTC, to
// the nanosecond.
type Ledger struct {
	Time   time.Time // of the cycle that wrote it; zero on the first day
	Series []Series
	Runs   []Run
	// Position is how far another source has been taken into the totals, in words
	// of that.
	Position [2]string
	// Source is who counted, in the caller's words.
	Source string
}

// marks are the texts of a ledger as a record has them.
type marks [3]string

func (l *Ledger) marks() marks { return marks{l.Source, l.Position[0], l.Position[1]} }

// ledgerState is the ledger in memory. On disk it is a chain of records: one
// with every row, and after it one for each cycle with the rows that differ.
// Replaying the chain gives the ledger. Rows as rows of SQLite would cost several
// times the CPU and twenty times the bytes, since nearly all change each cycle.
type ledgerState struct {
	seq    int64 // of the last record
	time   time.Time
	marks  marks
	series map[seriesKey]*seriesRow
	runs   map[string]*runRow
	nextID uint64 // rows are named by small numbers in the records
	base   int    // bytes of the record with every row; 0 = none yet
	chain  int    // bytes of the records after it
	gen    uint64 // counts records, to tell which rows a record has touched

	// Only while replaying.
	seriesByID map[uint64]*seriesRow
	runsByID   map[uint64]*runRow
}

type seriesKey struct {
	kind uint8
	key  string
}

func (s Series) ref() seriesKey { return seriesKey{s.Kind, s.Key} }

func (r Run) ref() seriesKey { return seriesKey{r.SeriesKind, r.Series} }

type seriesRow struct {
	Series
	id    uint64
	gen   uint64
	delta [4]uint64 // what record gen added to Total
}

type runRow struct {
	Run
	id  uint64
	gen uint64
}

// rowChange is what a record says about one row.
type rowChange struct {
	id    uint64
	kind  uint64
	start int64     // nanoseconds minus the row's former ones; unused for runs
	seen  int64     // nanoseconds; for runs minus those of its series
	add   [4]uint64 // to Total or Last; for runs minus what the series got
	of    uint64    // of new rows: Kind or SeriesKind
	texts [4]string // of new rows: Key and, for runs, Series, Unit, Boot
}

const (
	rowChanged = 0
	rowNew     = 1 // all numbers count from zero
	rowGone    = 2
)

func newLedgerState() *ledgerState {
	return &ledgerState{series: map[seriesKey]*seriesRow{}, runs: map[string]*runRow{}}
}

// ledger returns the rows in the order in which they came.
func (l *ledgerState) ledger() Ledger {
	out := Ledger{Time: l.time, Source: l.marks[0], Position: [2]string(l.marks[1:])}
	for _, row := range sortedByID(l.series, func(r *seriesRow) uint64 { return r.id }) {
		out.Series = append(out.Series, row.Series)
	}
	for _, row := range sortedByID(l.runs, func(r *runRow) uint64 { return r.id }) {
		out.Runs = append(out.Runs, row.Run)
	}
	return out
}

func sortedByID[K comparable, R any](rows map[K]R, id func(R) uint64) []R {
	out := slices.Collect(maps.Values(rows))
	slices.SortFunc(out, func(a, b R) int { return cmp.Compare(id(a), id(b)) })
	return out
}

// advance takes over the rows of next and returns the record that leads there
// from the present rows. base says that the record holds every row and replaces
// all earlier ones. After an error the state must be loaded again.
func (l *ledgerState) advance(next Ledger) (body []byte, base bool, err error) {
	if base = l.base == 0 || l.chain > 4*l.base+64<<10; base {
		clear(l.series)
		clear(l.runs)
		l.nextID = 0
	}
	var changed *marks // nil: as they were
	if now := next.marks(); base || now != l.marks {
		changed, l.marks = &now, now
	}
	l.gen++
	l.time = next.Time

	series := make([]rowChange, 0, len(next.Series))
	for _, s := range next.Series {
		row, known := l.series[s.ref()]
		if !known {
			row = &seriesRow{id: l.nextID}
			l.nextID++
			l.series[s.ref()] = row
		} else if row.gen == l.gen {
			return nil, false, fmt.Errorf("write ledger: series %q is given twice", s.Key)
		}
		row.gen = l.gen
		row.delta = sub(s.Total, row.Total)
		if known && row.delta == [4]uint64{} && s.Start.Equal(row.Start) && s.Seen.Equal(row.Seen) {
			continue
		}
		if !record.InRange(s.Start) || !record.InRange(s.Seen) {
			return nil, false, fmt.Errorf("write ledger: series %q: a time is outside the years 1678 to 2262", s.Key)
		}
		c := rowChange{id: row.id, start: record.Nanos(s.Start), seen: record.Nanos(s.Seen), add: row.delta}
		if known {
			c.start -= record.Nanos(row.Start)
		} else {
			c.kind, c.of, c.texts[0] = rowNew, uint64(s.Kind), s.Key
		}
		row.Series = s
		series = append(series, c)
	}
	for key, row := range l.series {
		if row.gen != l.gen {
			series = append(series, rowChange{id: row.id, kind: rowGone})
			delete(l.series, key)
		}
	}

	runs := make([]rowChange, 0, len(next.Runs))
	for _, r := range next.Runs {
		row, known := l.runs[r.Key]
		if !known {
			row = &runRow{id: l.nextID}
			l.nextID++
			l.runs[r.Key] = row
		} else if row.gen == l.gen {
			return nil, false, fmt.Errorf("write ledger: run %q is given twice", r.Key)
		}
		row.gen = l.gen
		if known && r.Last == row.Last && r.Seen.Equal(row.Seen) && sameTexts(r, row.Run) {
			continue
		}
		if !record.InRange(r.Seen) {
			return nil, false, fmt.Errorf("write ledger: run %q: time %v is outside the years 1678 to 2262", r.Key, r.Seen)
		}
		c := rowChange{id: row.id}
		if !known || !sameTexts(r, row.Run) {
			c.kind, c.of, c.texts = rowNew, uint64(r.SeriesKind), [4]string{r.Key, r.Series, r.Unit, r.Boot}
			row.Last = [4]uint64{}
		}
		// In most cases the run adds to its series just what it grew itself.
		delta, seen := l.expect(r.ref())
		c.add = sub(sub(r.Last, row.Last), delta)
		c.seen = record.Nanos(r.Seen) - seen
		if known {
			r.Key = row.Key // which the map holds anyway
		}
		row.Run = r
		runs = append(runs, c)
	}
	for key, row := range l.runs {
		if row.gen != l.gen {
			runs = append(runs, rowChange{id: row.id, kind: rowGone})
			delete(l.runs, key)
		}
	}

	body = encodeRecord(l.time, changed, series, runs)
	l.grew(len(body), base)
	return body, base, nil
}

func (l *ledgerState) grew(size int, base bool) {
	if base {
		l.base, l.chain = size, 0
	} else {
		l.chain += size
	}
}

// expect returns what the current record added to the series, and when it was
// seen: the same at writing and at replaying, since series come before runs.
func (l *ledgerState) expect(series seriesKey) (delta [4]uint64, seen int64) {
	row := l.series[series]
	if row == nil {
		return delta, 0
	}
	if row.gen == l.gen {
		delta = row.delta
	}
	return delta, record.Nanos(row.Seen)
}

// replay takes over one record of the chain; base says that it is the first.
func (l *ledgerState) replay(body []byte, base bool) error {
	at, changed, series, runs, err := decodeRecord(body)
	if err != nil {
		return err
	}
	if base {
		l.seriesByID, l.runsByID = map[uint64]*seriesRow{}, map[uint64]*runRow{}
	}
	l.gen++
	l.time = at
	if changed != nil {
		l.marks = *changed
	}
	for _, c := range series {
		row := l.seriesByID[c.id]
		switch {
		case c.kind == rowNew:
			row = &seriesRow{Series: Series{Kind: uint8(c.of), Key: c.texts[0]}, id: c.id}
			l.series[row.ref()], l.seriesByID[c.id] = row, row
		case row == nil:
			return fmt.Errorf("series %d is not known: %w", c.id, record.ErrDamaged)
		case c.kind == rowGone:
			delete(l.series, row.ref())
			delete(l.seriesByID, c.id)
			continue
		default:
			c.start += record.Nanos(row.Start)
		}
		row.gen, row.delta = l.gen, c.add
		row.Total = add(row.Total, c.add)
		row.Start, row.Seen = record.FromNanos(c.start), record.FromNanos(c.seen)
		l.nextID = max(l.nextID, c.id+1)
	}
	for _, c := range runs {
		row := l.runsByID[c.id]
		switch {
		case c.kind == rowNew:
			row = &runRow{Run: Run{Key: c.texts[0], SeriesKind: uint8(c.of), Series: c.texts[1], Unit: c.texts[2], Boot: c.texts[3]}, id: c.id}
			l.runs[row.Key], l.runsByID[c.id] = row, row
		case row == nil:
			return fmt.Errorf("run %d is not known: %w", c.id, record.ErrDamaged)
		case c.kind == rowGone:
			delete(l.runs, row.Key)
			delete(l.runsByID, c.id)
			continue
		}
		delta, seen := l.expect(row.ref())
		row.gen = l.gen
		row.Last = add(add(row.Last, c.add), delta)
		row.Seen = record.FromNanos(c.seen + seen)
		l.nextID = max(l.nextID, c.id+1)
	}
	l.grew(len(body), base)
	return nil
}

// endReplay drops what only replay needs.
func (l *ledgerState) endReplay() { l.seriesByID, l.runsByID = nil, nil }

func sameTexts(a, b Run) bool {
	return a.ref() == b.ref() && a.Unit == b.Unit && a.Boot == b.Boot
}

// Sums and differences wrap, so that every pair of values has a difference.
func sub(a, b [4]uint64) [4]uint64 {
	return [4]uint64{a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]}
}

func add(a, b [4]uint64) [4]uint64 {
	return [4]uint64{a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]}
}

// A record is: the time, the marks (0 for as they were, or 1 and the texts), then a
// table of series and one of runs, then CRC-32C of all that. A table is: the number
// of changes, the columns, and the compressed texts of the new rows.
func encodeRecord(at time.Time, changed *marks, series, runs []rowChange) []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(record.Nanos(at)))
	if changed == nil {
		b = append(b, 0)
	} else {
		b = append(b, 1)
		for _, text := range changed {
			b = record.AppendBytes(b, []byte(text))
		}
	}
	var column []uint64
	for _, table := range [][]rowChange{series, runs} {
		b = binary.AppendUvarint(b, uint64(len(table)))
		for n := range changeColumns {
			column = column[:0]
			for i := range table {
				column = append(column, table[i].get(n))
			}
			b = record.AppendColumn(b, column)
		}
		var texts []byte
		for _, c := range table {
			if c.kind == rowNew {
				for _, t := range c.texts {
					texts = append(binary.AppendUvarint(texts, uint64(len(t))), t...)
				}
			}
		}
		b = record.AppendBytes(b, record.Compress(texts))
	}
	return record.AppendSum(b)
}

const changeColumns = 9

func (c *rowChange) get(column int) uint64 {
	switch column {
	case 0:
		return c.id
	case 1:
		return c.kind
	case 2:
		return record.Zigzag(c.start)
	case 3:
		return record.Zigzag(c.seen)
	case 4:
		return c.of
	default:
		return record.Zigzag(int64(c.add[column-5]))
	}
}

func (c *rowChange) set(column int, v uint64) {
	switch column {
	case 0:
		c.id = v
	case 1:
		c.kind = v
	case 2:
		c.start = record.Unzigzag(v)
	case 3:
		c.seen = record.Unzigzag(v)
	case 4:
		c.of = v
	default:
		c.add[column-5] = uint64(record.Unzigzag(v))
	}
}

func decodeRecord(b []byte) (at time.Time, changed *marks, series, runs []rowChange, err error) {
	b, err = record.CheckSum(b)
	if err == nil && (len(b) < 9 || b[8] > 1) {
		err = record.ErrDamaged
	}
	if err != nil {
		return at, nil, nil, nil, err
	}
	at = record.FromNanos(int64(binary.BigEndian.Uint64(b)))
	given := b[8] == 1
	b = b[9:]
	if given {
		changed = new(marks)
		for i := range changed {
			var text []byte
			if text, b, err = record.TakeBytes(b); err != nil {
				return at, nil, nil, nil, err
			}
			changed[i] = string(text)
		}
	}
	for _, table := range []*[]rowChange{&series, &runs} {
		if *table, b, err = decodeTable(b); err != nil {
			return at, nil, nil, nil, err
		}
	}
	return at, changed, series, runs, nil
}

func decodeTable(b []byte) (table []rowChange, rest []byte, err error) {
	count, b, err := record.TakeCount(b)
	if err != nil {
		return nil, nil, err
	}
	table = make([]rowChange, count)
	column := make([]uint64, count)
	for n := range changeColumns {
		if b, err = record.ReadColumn(b, column); err != nil {
			return nil, nil, err
		}
		for i, v := range column {
			table[i].set(n, v)
		}
	}
	texts, rest, err := record.TakeBytes(b)
	if err != nil {
		return nil, nil, err
	}
	if texts, err = record.Decompress(texts); err != nil {
		return nil, nil, err
	}
	for i := range table {
		if table[i].kind != rowNew {
			continue
		}
		for n := range table[i].texts {
			var t []byte
			if t, texts, err = record.TakeBytes(texts); err != nil {
				return nil, nil, err
			}
			table[i].texts[n] = string(t)
		}
	}
	return table, rest, nil
}
