package ledger

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	// keepEnded is the least for Config.KeepEnded.
	keepEnded = 2 * time.Minute
	// keepRestored is how long a run of an earlier State is remembered that no
	// sweep has shown yet.
	keepRestored = time.Hour
	// lateRecord is the age from which a point that a stop record moves gets the
	// time of the sweep: backends refuse old points.
	lateRecord = 5 * time.Minute
)

// Config says which series there are. Fold and Metered are called during the
// calls of a Ledger, and must not call it.
type Config struct {
	// MaxSeries bounds the number of series of units and folds, above 0. The
	// series of balances and the overflow series do not count.
	MaxSeries int
	// KeepEnded is how long the last point of a unit that has gone is repeated.
	// Default, and the least: 2 minutes.
	KeepEnded time.Duration
	// Fold returns the pattern that a unit is folded by, if any. Nil: none.
	Fold func(unit string) (pattern string, ok bool)
	// Patterns are all that Fold can return.
	Patterns []string
	// Metered reports whether a unit is metered. A run of an earlier State whose
	// unit is not is kept, since the settings may change again. Nil: all are.
	Metered func(unit string) bool
	// Boot is the id of this boot.
	Boot string
	// Began is the time from which the caller watches units.
	Began time.Time
	// Measure is the measure of all readings. All series have it in their ID.
	Measure Measure
	// Source is who counts.
	Source string
	// State is the State of an earlier Ledger with the same Measure. If another source
	// has counted it, its runs are left out, and no traffic is added twice. So the first
	// reading of a run that began before State adds nothing to a series of State. It adds
	// nothing to a series with an Owner or a Measure other than Total either, since a
	// series without may have that traffic already.
	State State
}

// Reading is the counters of one run at one time.
type Reading struct {
	Unit  string
	Owner Owner
	Epoch string
	// Slice is the slice of the unit; empty while nobody knows.
	Slice    string
	Counters Counters
	// Slices have series too, with the growth of all that is in them.
	Slices []string
	// Start is the moment from which Counters count.
	Start time.Time
	// Asked and Time are the moments between which the counters were read.
	Asked, Time time.Time
	// Final says that the run was over by then.
	Final bool
	// Young says that the caller has watched the unit from its start: all that a
	// first reading has was counted since the sweep before.
	Young bool
	// Unmetered says that the unit has no series: a top-level slice that is read
	// for its balance only.
	Unmetered bool
	// Unattributed says that Counters are traffic of which nobody knows the unit.
	// Unit is then the slice that it was in, as far as known.
	Unattributed bool
}

// Record is a stop record of one run.
type Record struct {
	Unit  string
	Epoch string
	// Boot is the id of the boot that the run was of; empty for this one.
	Boot string
	// Counted says that the record has Counters. Another one of the same run may have.
	Counted  bool
	Counters Counters
	// Time is the moment at which the record was written, and Ended the moment
	// at which the run ended, by the monotonic clock.
	Time, Ended time.Time
}

// Ledger has the totals of all units. It is not safe for concurrent use.
type Ledger struct {
	cfg      Config
	series   map[ID]*series
	order    []*series // those of series, in the order of their creation
	overflow *series   // nil while there is none
	runs     map[string]*run
	balances map[string]*balance // by top-level slice
	// unplaced is the growth of units whose slice is not known.
	unplaced Counters
	journal  Position
	swept    time.Time // end of the last sweep, of the earlier State at first
	switched time.Time // end of the last sweep of another source; zero for none
	// forgotten is the latest end of the runs that were dropped.
	forgotten time.Time
	resets    int64
	missed    int64
}

// series is the working state of a Series.
type series struct {
	ID
	slice       string
	total       Counters
	start, time time.Time
	shown       time.Time // time as of the last sweep
	shared      bool      // by several units: a fold, or the overflow series
	restored    bool      // of an earlier State
	fresh       bool      // made since the last sweep
	observed    bool      // by the sweep
	moved       bool      // since the last sweep
	loaded      bool      // its unit is, as of the last Load
}

// run is the working state of a Run.
type run struct {
	unit, epoch string
	owner       Owner
	boot        string    // that of the run, if not this one
	series      *series   // nil before the first reading, and for unmetered units
	slices      []*series // of Reading.Slices; nil before the first reading
	slice       string    // empty while not known
	last        Counters
	time        time.Time // of last; zero before the first reading
	closed      time.Time // when the run was found to be gone; zero while it can be read
	marked      bool      // since the last Finish, see Mark
	reading     bool      // it is still being read
	restored    bool      // of an earlier State, and no Mark has come since
	final       bool      // read after the end, or recorded
}

// New returns a Ledger that continues cfg.State. Its series with an impossible total, or
// with the name of another, are left out.
func New(cfg Config) *Ledger {
	cfg.KeepEnded = max(cfg.KeepEnded, keepEnded)
	if cfg.Fold == nil {
		cfg.Fold = func(string) (string, bool) { return "", false }
	}
	if cfg.Metered == nil {
		cfg.Metered = func(string) bool { return true }
	}
	l := &Ledger{
		cfg: cfg, series: map[ID]*series{}, runs: map[string]*run{}, balances: map[string]*balance{},
		journal: cfg.State.Journal, swept: cfg.State.Time,
	}
	if cfg.State.Source != cfg.Source && !cfg.State.Time.IsZero() {
		l.switched = cfg.State.Time
		cfg.State.Runs = nil
	}
	l.restore(cfg.State)
	l.cfg.State = State{} // it may be large
	return l
}

// restore takes over the series, balances and runs of an earlier Ledger. The run
// of an earlier boot can never be read again, but the journal may have its end.
//
// A time after Began is one of a clock that was set back since. It becomes
// Began: else no reading would count until the clock is there again.
func (l *Ledger) restore(state State) {
	past := func(t time.Time) time.Time {
		if t.After(l.cfg.Began) {
			return l.cfg.Began
		}
		return t
	}
	take := func(s *series, saved Series) {
		s.total, s.start, s.time, s.fresh, s.restored = saved.Total, saved.Start, past(saved.Time), false, true
		s.shown = s.time // by the earlier Ledger
	}
	for _, saved := range state.Series {
		if _, ok := l.series[saved.ID]; !ok && saved.Total.Valid() {
			take(l.newSeries(saved.Name, saved.Owner, "", saved.Start), saved)
		}
	}
	if o := state.Overflow; o != nil && o.Total.Valid() {
		l.overflow = l.newOverflow(o.Start)
		take(l.overflow, *o)
	}
	for _, saved := range state.Balances {
		if !saved.Unattributed.Total.Valid() || !saved.Ahead.Valid() || !saved.Waiting.Valid() {
			continue
		}
		b := l.balanceOf(saved.Slice)
		b.unattributed = &series{ID: ID{Kind: Unattributed, Name: saved.Slice, Measure: l.cfg.Measure}}
		take(b.unattributed, saved.Unattributed)
		b.ahead, b.waiting = saved.Ahead, saved.Waiting
		b.turned, b.read = l.cfg.Began, l.cfg.Began // the journal has yet to be read
	}
	for _, saved := range state.Runs {
		restored := &run{
			unit: saved.Unit, owner: saved.Owner, epoch: saved.Epoch, closed: l.cfg.Began, restored: true,
			last: saved.Last, time: past(saved.Time),
		}
		if saved.Boot != l.cfg.Boot {
			restored.boot = saved.Boot
		}
		// Without its series, which may be forgotten or have had no name, a new one
		// begins with what the run grows by from here.
		if id, ok := saved.SeriesID(l.cfg.Measure); ok {
			restored.series = l.series[id]
		}
		if saved.Overflow {
			restored.series = l.overflow
		}
		l.runs[saved.Epoch] = restored
	}
}

// Known reports whether a reading of a run is in the totals.
func (l *Ledger) Known(epoch string) bool {
	r, ok := l.runs[epoch]
	return ok && !r.time.IsZero()
}

// Journal returns the position up to which stop records are in the totals.
func (l *Ledger) Journal() Position { return l.journal }

// SetJournal says that the stop records up to a position need not be taken.
func (l *Ledger) SetJournal(at Position) { l.journal = at }

// Size returns how many series there are, the overflow series and those of
// balances included.
func (l *Ledger) Size() int {
	n := len(l.order)
	if l.overflow != nil {
		n++
	}
	for _, b := range l.balances {
		if b.unattributed != nil {
			n++
		}
	}
	return n
}

// Resets returns how often counters fell within one run, since New.
func (l *Ledger) Resets() int64 { return l.resets }

// Missed returns how many runs ended without a last reading and without a
// record of their end, since New: they may have had traffic that is in no total.
func (l *Ledger) Missed() int64 { return l.missed }

// runOf returns the run of an epoch, and makes it where it is new.
func (l *Ledger) runOf(unit, epoch string) *run {
	r, ok := l.runs[epoch]
	if !ok {
		r = &run{unit: unit, epoch: epoch}
		l.runs[epoch] = r
	}
	return r
}

// Begin begins a sweep: from here no series has a point.
func (l *Ledger) Begin() {
	for s := range l.all() {
		s.observed, s.loaded = false, false
	}
}

// Load notes that a unit is loaded, so that its series is not evicted. It is called for
// each loaded unit between Begin and the first Credit.
func (l *Ledger) Load(unit string) {
	if s, ok := l.series[l.unitID(unit, Owner{})]; ok {
		s.loaded = true
	}
}

// Mark notes that a run is not gone, and whether it is still being read. It is called
// for each such run between the last Credit and Finish.
func (l *Ledger) Mark(epoch string, reading bool) {
	if r, ok := l.runs[epoch]; ok {
		r.closed, r.marked, r.restored, r.reading = time.Time{}, true, false, reading
	}
}

// Place notes that a run is counted, and its slice, before its first reading. The stop
// record of a short-lived run has neither.
func (l *Ledger) Place(unit, epoch, slice string) {
	l.runOf(unit, epoch).slice = slice
}

// Restart says that the counters of a run begin again at 0 at a moment, though
// they may not be seen to fall. A reading since then has them already.
func (l *Ledger) Restart(epoch string, at time.Time) {
	if r, ok := l.runs[epoch]; ok && !r.time.IsZero() && !r.time.After(at) {
		r.last, r.time = Counters{}, at
	}
}

// Credit adds the growth of a run since its last reading to the totals. If any of the
// four counters fell, all four have restarted from 0, and fell is true. A reading that
// was asked for before the last one arrived adds nothing.
func (l *Ledger) Credit(reading Reading) (fell bool) {
	r := l.runOf(reading.Unit, reading.Epoch)
	if r.time.After(reading.Asked) {
		r.observe()
		return false
	}
	if r.unit != reading.Unit || r.owner != reading.Owner { // settings have changed which
		r.unit, r.owner, r.series = reading.Unit, reading.Owner, nil
	}
	first, start := r.time.IsZero(), reading.Start
	if r.time.After(start) {
		start = r.time // the series is new, the run is not
	}
	if reading.Slice != "" {
		r.slice = reading.Slice
	}
	r.final = r.final || reading.Final
	delta, fell := r.advance(reading.Counters, reading.Time)
	if fell {
		l.resets++
	}
	overlaps := first && !reading.Young && reading.Start.Before(l.switched)
	if overlaps && l.cfg.Measure != Total {
		start = reading.Time
	}
	if r.slices == nil {
		r.slices = l.slicesOf(reading.Slices, start)
	}
	for _, s := range r.slices {
		if !overlaps || !s.restored && l.cfg.Measure == Total {
			s.grow(start, delta, reading.Time)
		}
	}
	if reading.Unattributed {
		if overlaps {
			delta = Counters{}
		}
		l.unattribute(reading, start, delta)
		r.observe()
		return fell
	}
	apart := reading.Owner != Owner{} || l.cfg.Measure != Total
	if overlaps && apart {
		start = reading.Time
	}
	if r.series == nil && !reading.Unmetered {
		r.series = l.seriesOf(r.unit, r.owner, r.slice, start)
	}
	if overlaps && r.series != nil && (r.series.restored || apart) {
		delta = Counters{}
	}
	if TopSlice(reading.Unit) {
		l.sliceGrew(reading, start, delta, first && !reading.Young)
	} else {
		l.unitGrew(r.slice, delta)
	}
	if reading.Unmetered {
		return fell
	}
	l.add(r, start, delta, reading.Time)
	r.observe()
	return fell
}

// observe gives the series of a run a point in this sweep.
func (r *run) observe() {
	if r.series != nil {
		r.series.observed = true
	}
	for _, s := range r.slices {
		s.observed = true
	}
}

// advance takes a reading and returns what it adds to the total.
func (r *run) advance(counters Counters, at time.Time) (delta Counters, fell bool) {
	if delta, fell = counters.Minus(r.last); fell {
		delta = counters
	}
	r.last, r.time = counters, at
	return delta, fell
}

// add adds to the series of a run, which begins at start where it is new.
func (l *Ledger) add(r *run, start time.Time, delta Counters, at time.Time) {
	s := r.series
	if !s.shared {
		s.slice = cmp.Or(r.slice, s.slice)
	}
	s.grow(start, delta, at)
}

// grow adds what a member has grown by since start.
func (s *series) grow(start time.Time, delta Counters, at time.Time) {
	if s.fresh && start.Before(s.start) {
		s.start = start // a new fold begins with the earliest of its members
	}
	s.add(delta, at)
}

// Take adds the growth of a stop record over the last reading of its run. It returns
// false for a run that was dropped, since the totals may have it already. now is the
// present time.
func (l *Ledger) Take(record Record, now time.Time) bool {
	if !l.cfg.Metered(record.Unit) {
		return true
	}
	r, ok := l.runs[record.Epoch]
	if !ok && record.Ended.After(l.cfg.Began) && !record.Ended.After(l.forgotten) {
		if record.Counters != (Counters{}) {
			l.missed++
		}
		return false
	}
	if !record.Counted {
		r = l.runOf(record.Unit, record.Epoch) // Place may yet come
		r.final, r.boot = true, cmp.Or(r.boot, record.Boot)
		return true
	}
	at := record.Time
	if at.After(now) {
		at = now // of a clock that was set back since
	}
	if !ok {
		r = l.runOf(record.Unit, record.Epoch)
		r.closed = now
	}
	if !r.closed.IsZero() {
		r.closed = now // its last point is shown for as long as those of others
	}
	r.boot = cmp.Or(r.boot, record.Boot)
	r.final = true
	start := at
	if !l.swept.IsZero() && l.swept.Before(at) {
		start = l.swept // nobody read it: it began after the last sweep
	}
	if r.time.After(start) {
		start = r.time
	}
	if at.Before(r.time) {
		at = r.time
	}
	// Before the first sweep nobody knows whether the run is older than that.
	overlaps := r.time.IsZero() && !l.switched.IsZero() && l.swept.Equal(l.switched)
	delta, _ := r.advance(record.Counters.Max(r.last), at)
	if r.series == nil && delta == (Counters{}) {
		return true // a run that had no traffic makes no series
	}
	if r.series == nil {
		r.series = l.seriesOf(r.unit, r.owner, r.slice, start)
	}
	if overlaps && r.series.restored {
		delta = Counters{}
	}
	l.add(r, start, delta, at)
	if r.boot == "" {
		l.unitGrew(r.slice, delta)
		return true
	}
	// The slices of this boot have not counted it, but what waits may be of it.
	for _, b := range l.balances {
		delta = b.take(delta)
	}
	return true
}

// add adds to a total. One that would no longer fit begins again, as a reset
// with its own start time.
func (s *series) add(delta Counters, at time.Time) {
	sum := s.total.Plus(delta)
	if !sum.Valid() {
		sum, s.start = delta, s.time
	}
	s.total = sum
	if at.After(s.time) { // members of a fold and stop records come in any order
		s.time = at
	}
	s.moved = s.moved || delta != Counters{}
}

// seriesOf returns the series that a unit belongs to, and makes it where it is
// new. Over the limit, the series that has been without a unit for longest makes
// room; where all have one, the unit goes to the overflow series.
func (l *Ledger) seriesOf(unit string, owner Owner, slice string, start time.Time) *series {
	name := unit
	if pattern, ok := l.cfg.Fold(unit); ok {
		name = pattern
	}
	if s, ok := l.series[l.unitID(name, owner)]; ok {
		return s
	}
	if len(l.order) < l.cfg.MaxSeries || l.evict() {
		return l.newSeries(name, owner, slice, start)
	}
	if l.overflow == nil {
		l.overflow = l.newOverflow(start)
	}
	return l.overflow
}

// slicesOf returns the series of slices, and makes those that are new, also over the
// limit: a sum without some of its members would be wrong, and the overflow series
// has the units already.
func (l *Ledger) slicesOf(names []string, start time.Time) []*series {
	found := make([]*series, 0, len(names))
	for _, name := range names {
		s, ok := l.series[l.unitID(name, Owner{})]
		if !ok {
			if len(l.order) >= l.cfg.MaxSeries {
				l.evict()
			}
			s = l.newSeries(name, Owner{}, "", start)
		}
		s.loaded = true // nothing shows yet that the run adds to it
		found = append(found, s)
	}
	return found
}

func (l *Ledger) unitID(name string, owner Owner) ID { return ID{Unit, name, owner, l.cfg.Measure} }

func (l *Ledger) newSeries(name string, owner Owner, slice string, start time.Time) *series {
	s := &series{ID: l.unitID(name, owner), start: start, fresh: true, shared: slices.Contains(l.cfg.Patterns, name)}
	if !s.shared {
		s.slice = slice
	}
	l.series[s.ID] = s
	l.order = append(l.order, s)
	return s
}

func (l *Ledger) newOverflow(start time.Time) *series {
	return &series{ID: ID{Kind: Overflow, Measure: l.cfg.Measure}, start: start, fresh: true, shared: true}
}

// evict drops the series whose last growth is the oldest, among those without a run. A
// unit that comes back under its name begins a new series.
func (l *Ledger) evict() bool {
	used := make(map[*series]bool, len(l.runs))
	for _, r := range l.runs {
		used[r.series] = true
		for _, s := range r.slices {
			used[s] = true
		}
	}
	oldest := -1
	for i, s := range l.order {
		if !s.shared && !s.loaded && !s.observed && !s.moved && !used[s] && (oldest < 0 || s.time.Before(l.order[oldest].time)) {
			oldest = i
		}
	}
	if oldest < 0 {
		return false
	}
	delete(l.series, l.order[oldest].ID)
	l.order = slices.Delete(l.order, oldest, oldest+1)
	return true
}

// all yields every series, including the overflow and the balances.
func (l *Ledger) all() func(yield func(*series) bool) {
	return func(yield func(*series) bool) {
		for _, s := range l.order {
			if !yield(s) {
				return
			}
		}
		if l.overflow != nil && !yield(l.overflow) {
			return
		}
		for _, b := range l.balances {
			if b.unattributed != nil && !yield(b.unattributed) {
				return
			}
		}
	}
}

// Finish ends a sweep and returns the State. listed says that the caller knows
// all units that are loaded, so that a run without a Mark is over; partial, that
// the sweep did not reach them all.
func (l *Ledger) Finish(now time.Time, listed, partial bool) State {
	l.close(now, listed)
	gone, live := map[*series]bool{}, map[*series]bool{}
	for _, r := range l.runs {
		to := live
		if ended := r.ended(); !ended.IsZero() {
			if to = gone; now.Sub(ended) > l.cfg.KeepEnded || r.restored && !r.final {
				to = nil // an earlier Ledger has shown what it had
			}
		} else if !r.reading {
			to = nil
		}
		if to != nil {
			to[r.series] = true
			for _, s := range r.slices {
				to[s] = true
			}
		}
		r.marked = false
	}
	for s := range l.all() {
		s.show(now, gone[s] && !live[s], s.shared && !live[s] && !partial)
	}
	l.swept = now
	return l.state(now)
}

// ended returns when a run ended, zero before that. One that was read after its end
// ended with the last thing that it had to say, though it may be there still.
func (r *run) ended() time.Time {
	if r.closed.IsZero() && r.final && !r.reading {
		return r.time
	}
	return r.closed
}

// close finds the runs that are over, and forgets those that have been for long
// enough.
func (l *Ledger) close(now time.Time, listed bool) {
	maps.DeleteFunc(l.runs, func(_ string, r *run) bool {
		if listed && !r.marked && r.closed.IsZero() {
			r.closed = now
		}
		keep := l.cfg.KeepEnded
		if r.restored {
			keep = keepRestored
		}
		// Before the first list, nobody knows which of the restored runs are over.
		over := listed && !r.closed.IsZero() && now.Sub(r.closed) > keep
		// No list shows what the settings leave out, and they may change again.
		over = over && (!r.restored || r.boot != "" || TopSlice(r.unit) || l.cfg.Metered(r.unit))
		if over && !r.final && r.boot == "" && !TopSlice(r.unit) { // slices lose nothing: their units have it
			l.missed++
		}
		if over && r.closed.After(l.forgotten) {
			l.forgotten = r.closed
		}
		return over
	})
}

// show decides on the point of a series. gone says that its unit has gone and is
// remembered; empty, that it is a fold without members, of which the sum is known.
func (s *series) show(now time.Time, gone, empty bool) {
	// The last point of a unit that has gone is repeated while its run is
	// remembered, so that each of several readers gets it.
	s.observed = s.observed || s.moved || gone
	// Prometheus refuses a request with a point that is an hour old.
	if !s.observed && empty && !s.time.IsZero() {
		s.observed, s.time = true, now
	}
	// What comes late, from the journal or of a member of a fold, must not
	// change a point that has been shown; a delta needs an interval; and
	// backends refuse old points.
	if s.moved && (!s.time.After(s.shown) || !s.time.After(s.start) || now.Sub(s.time) > lateRecord) {
		s.time = now
	}
	s.shown = s.time
	s.moved, s.fresh = false, false
}

// state takes a State.
func (l *Ledger) state(now time.Time) State {
	state := State{
		Time: now, Source: l.cfg.Source, Measure: l.cfg.Measure, Journal: l.journal,
		Series: make([]Series, len(l.order)), Runs: make([]Run, 0, len(l.runs)),
	}
	for i, s := range l.order {
		state.Series[i] = s.public()
	}
	if l.overflow != nil {
		overflow := l.overflow.public()
		state.Overflow = &overflow
	}
	for slice, b := range l.balances {
		if b.unattributed != nil {
			state.Balances = append(state.Balances, Balance{
				Slice: slice, Unattributed: b.unattributed.public(), Ahead: b.ahead, Waiting: b.waiting.Plus(b.recent),
			})
		}
	}
	slices.SortFunc(state.Balances, func(a, b Balance) int { return strings.Compare(a.Slice, b.Slice) })
	for _, r := range l.runs {
		if r.time.IsZero() {
			continue
		}
		saved := Run{Unit: r.unit, Owner: r.owner, Epoch: r.epoch, Boot: cmp.Or(r.boot, l.cfg.Boot), Last: r.last, Time: r.time}
		if r.series != nil {
			saved.Series, saved.Overflow = r.series.Name, r.series == l.overflow
		}
		state.Runs = append(state.Runs, saved)
	}
	return state
}

func (s *series) public() Series {
	return Series{ID: s.ID, Slice: s.slice, Total: s.total, Start: s.start, Time: s.time, Observed: s.observed}
}
