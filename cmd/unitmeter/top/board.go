package top

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

const (
	// keepHistory is how far back the speeds of a unit are kept.
	keepHistory = 10 * time.Minute
	// recent is the span of the sparklines.
	recent = time.Minute
	// keepEnded is how long a unit is shown after its end.
	keepEnded = time.Minute
)

// What is counted, in the order of accounting.Values.
const (
	bytesIn = iota
	packetsIn
	bytesOut
	packetsOut
	kinds
)

// totals are counters of one unit or the sum of several.
type totals [kinds]uint64

func (t *totals) add(u [kinds]uint64) {
	for i, n := range u {
		t[i] += n
	}
}

// bytes are those of both directions.
func (t totals) bytes() uint64 { return t[bytesIn] + t[bytesOut] }

// speeds are those over one interval, per second. known is false for an interval
// of which nothing can be said: a gap is shown as a gap.
type speeds struct {
	of    [kinds]float64
	known bool
}

// bytes are those of both directions, by which rows are ranked.
func (s speeds) bytes() float64 { return s.of[bytesIn] + s.of[bytesOut] }

// plus adds speeds. A sum without a part that is not known is still the best that
// can be said of a slice.
func (s speeds) plus(t speeds) speeds {
	for i, v := range t.of {
		s.of[i] += v
	}
	s.known = s.known || t.known
	return s
}

// highest has the larger of each speed.
func (s speeds) highest(t speeds) speeds {
	for i, v := range t.of {
		s.of[i] = max(s.of[i], v)
	}
	return s
}

// topRow is one unit, or one slice, on the board.
type topRow struct {
	name  string
	units int // in a slice; 0 for a unit
	unit  systemd.Unit
	// total is what systemd has counted for the present run.
	total totals
	// session is what was counted since top began, over all runs.
	session totals
	now     speeds
	peak    speeds
	history []speeds // one for each interval, the newest last
	ended   time.Time
}

// mean is the mean speed over the last n intervals of which something is known.
func (r *topRow) mean(n int) (m speeds) {
	known := 0.0
	for _, s := range r.history[max(0, len(r.history)-n):] {
		if s.known {
			m = m.plus(s)
			known++
		}
	}
	for i := range m.of {
		m.of[i] /= max(known, 1)
	}
	return m
}

// board has what was read of all units since top began. It is not safe for
// concurrent use.
type board struct {
	wanted   systemd.Patterns // none: all units
	interval time.Duration
	began    time.Time
	last     time.Time
	rows     map[string]*topRow
	// known has the last reading of each unit, shown or not.
	known map[string]systemd.Unit
	// others counts the units without numbers, by what is the matter.
	others map[string]int
}

// newBoard makes an empty board. wanted are patterns of unit names, as the
// receiver takes them.
func newBoard(wanted systemd.Patterns, interval time.Duration) *board {
	return &board{wanted: wanted, interval: interval, rows: map[string]*topRow{}, known: map[string]systemd.Unit{}, others: map[string]int{}}
}

// intervals is how many readings make up a span of time.
func (b *board) intervals(span time.Duration) int { return max(1, int(span/b.interval)) }

// take adds one reading.
func (b *board) take(at time.Time, units []systemd.Unit) {
	if b.began.IsZero() {
		b.began = at
	}
	// The others are counted again at each reading: a unit that was switched on is
	// none of them any more.
	clear(b.others)
	here := make(map[string]bool, len(units))
	known := make(map[string]systemd.Unit, len(units))
	for _, u := range units {
		if b.wanted.Len() > 0 && b.wanted.Index(accounting.UnitName(u.Name)) < 0 {
			continue
		}
		growth, from, ok := accounting.Growth(b.known[u.Name], u, b.last)
		known[u.Name] = u
		if !accounting.Shown(u, growth) {
			continue
		}
		r := b.rows[u.Name]
		// A unit without numbers has no row, unless it had numbers before: then a
		// row that vanished would look like the end of the unit.
		if !accounting.Counted(u) {
			if u.Accounting != "off" || accounting.CarriesTraffic(u.Name) {
				b.others[u.Accounting]++
			}
			if r == nil {
				continue
			}
		}
		if r == nil {
			r = &topRow{name: u.Name}
			b.rows[u.Name] = r
		}
		here[u.Name] = true
		r.ended = time.Time{}
		// The time of the unit's own reading, not that of the sweep: a sweep over
		// thousands of units takes a noticeable part of an interval.
		var now speeds
		if seconds := u.Time.Sub(from).Seconds(); ok && seconds > 0 {
			now.known = true
			for i, n := range growth {
				now.of[i] = float64(n) / seconds
			}
			r.session.add(growth)
		}
		r.unit, r.total = u, accounting.Values(u.Counters)
		r.add(now, b.intervals(keepHistory))
	}
	for name, r := range b.rows {
		if here[name] {
			continue
		}
		if r.ended.IsZero() {
			r.ended = at
		}
		// What ended a moment ago is often what one is looking for.
		if at.Sub(r.ended) > keepEnded {
			delete(b.rows, name)
			continue
		}
		r.add(speeds{known: true}, b.intervals(keepHistory)) // what has ended sends nothing
		if _, listed := known[name]; !listed {
			known[name] = r.unit
		}
	}
	b.last, b.known = at, known
}

// add appends to the history.
func (r *topRow) add(now speeds, keep int) {
	r.now = now
	r.peak = r.peak.highest(now)
	r.history = append(r.history, now)
	if over := len(r.history) - keep; over > 0 {
		r.history = slices.Delete(r.history, 0, over)
	}
}

// bySlice adds the units up by slice. As in systemd a slice has what is in the
// slices below it too.
func (b *board) bySlice() []*topRow {
	byName := map[string]*topRow{}
	for _, r := range b.rows {
		if strings.HasSuffix(r.name, ".slice") {
			continue // it has its units already
		}
		for _, name := range slicesAbove(r.unit.Slice) {
			s := byName[name]
			if s == nil {
				s = &topRow{name: name}
				byName[name] = s
			}
			s.join(r)
		}
	}
	var rows []*topRow
	// The peak of a slice is that of the sum: the peaks of its units need not
	// have been at the same time.
	for _, s := range byName {
		for _, h := range s.history {
			s.peak = s.peak.highest(h)
		}
		rows = append(rows, s)
	}
	return rows
}

// join adds a unit to the row of a slice.
func (r *topRow) join(u *topRow) {
	if u.ended.IsZero() {
		r.units++
	}
	r.total.add(u.total)
	r.session.add(u.session)
	r.now = r.now.plus(u.now)
	// Histories are of different lengths, and have their newest value last: they
	// are lined up at that end.
	if missing := len(u.history) - len(r.history); missing > 0 {
		r.history = append(make([]speeds, missing), r.history...)
	}
	offset := len(r.history) - len(u.history)
	for i, s := range u.history {
		r.history[offset+i] = r.history[offset+i].plus(s)
	}
}

// slicesAbove lists a slice and those that it is in: the dashes of its name are
// the path (systemd.slice(5)).
func slicesAbove(name string) []string {
	if name == "" {
		return nil
	}
	all := []string{name}
	stem := strings.TrimSuffix(name, ".slice")
	for stem != "-" && stem != "" {
		i := strings.LastIndexByte(stem, '-')
		if i <= 0 {
			return append(all, "-.slice")
		}
		stem = stem[:i]
		all = append(all, stem+".slice")
	}
	return all
}

// column is what rows can be sorted by.
type column int

const (
	byName column = iota
	byIn
	byOut
	byPacketsIn
	byPacketsOut
	byTotal
	byRecent
	columns
)

// sorted returns rows in order: text from a to z, numbers the largest first;
// reverse turns it around. Rows that are equal are in the order of their names.
func (b *board) sorted(rows []*topRow, by column, reverse bool) []*topRow {
	n := b.intervals(recent)
	value := func(r *topRow) float64 {
		switch by {
		case byIn:
			return r.now.of[bytesIn]
		case byOut:
			return r.now.of[bytesOut]
		case byPacketsIn:
			return r.now.of[packetsIn]
		case byPacketsOut:
			return r.now.of[packetsOut]
		case byTotal:
			return float64(r.total.bytes())
		case byRecent:
			return r.mean(n).bytes()
		}
		return 0
	}
	// Once for each row, and not for each comparison: a mean goes through a
	// minute of history.
	values := make(map[*topRow]float64, len(rows))
	for _, r := range rows {
		values[r] = value(r)
	}
	rows = slices.Clone(rows)
	slices.SortFunc(rows, func(x, y *topRow) int {
		order := cmp.Compare(values[y], values[x])
		if by == byName {
			order = strings.Compare(x.name, y.name)
		}
		if reverse {
			order = -order
		}
		return cmp.Or(order, strings.Compare(x.name, y.name))
	})
	return rows
}

// all returns the rows of the units, in no order.
func (b *board) all() []*topRow { return slices.Collect(maps.Values(b.rows)) }

// sums adds up all rows of units. Slices are left out: they have their units'
// traffic.
func (b *board) sums() speeds {
	var s speeds
	for _, r := range b.rows {
		if !strings.HasSuffix(r.name, ".slice") {
			s = s.plus(r.now)
		}
	}
	return s
}
