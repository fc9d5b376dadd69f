package ledger

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// settleTime is how long the stop record of a unit may take through the journal.
const settleTime = 10 * time.Second

// balance is the working state of a Balance. The difference between a slice and its
// units is the traffic of units that are not metered, or that ended before they were
// read.
type balance struct {
	unattributed *series // nil before the first reading
	// waiting and recent are traffic that the slice counted and no unit has shown yet.
	// They become unattributed at a reading of the slice at least settleTime
	// later: until then the last readings and stop records of units that have
	// ended are still coming in.
	waiting, recent Counters
	turned          time.Time // when recent began
	read            time.Time // when the slice was read last
	ahead           Counters
}

// TopSlice reports whether a unit is a child of the root slice. The name of a
// slice spells its place: a-b.slice is in a.slice.
func TopSlice(unit string) bool {
	name, ok := strings.CutSuffix(unit, ".slice")
	return ok && name != "" && !strings.Contains(name, "-")
}

// topOf returns the top-level slice that a slice is in; false for the root slice.
func topOf(slice string) (top string, ok bool) {
	name, _, nested := strings.Cut(strings.TrimSuffix(slice, ".slice"), "-")
	switch {
	case name == "":
		return "", false
	case !nested && name != slice:
		return slice, true // as it is: this is asked for each unit in each sweep
	}
	return name + ".slice", true
}

// balanceOf returns the balance of a top-level slice.
func (l *Ledger) balanceOf(top string) *balance {
	b, ok := l.balances[top]
	if !ok {
		b = &balance{}
		l.balances[top] = b
	}
	return b
}

// sliceGrew puts a reading of a top-level slice on its balance. first says that
// nothing is known of what it counted before.
func (l *Ledger) sliceGrew(reading Reading, start time.Time, delta Counters, first bool) {
	b := l.balanceOf(reading.Unit)
	if b.unattributed == nil {
		if first {
			start = reading.Time
		}
		b.unattributed = &series{ID: ID{Kind: Unattributed, Name: reading.Unit, Measure: l.cfg.Measure}, start: start}
	}
	if first {
		delta, b.ahead, b.waiting, b.recent = Counters{}, Counters{}, Counters{}, Counters{}
	}
	b.unattributed.observed = true
	b.unattributed.add(b.settled(reading.Time), reading.Time)
	delta, b.ahead = delta.cancel(b.ahead)
	delta, l.unplaced = delta.cancel(l.unplaced)
	b.recent = b.recent.Plus(delta)
}

// unattribute adds unattributed traffic to a slice that has no balance.
func (l *Ledger) unattribute(reading Reading, start time.Time, delta Counters) {
	b := l.balanceOf(reading.Unit)
	if b.unattributed == nil {
		b.unattributed = &series{ID: ID{Kind: Unattributed, Name: reading.Unit, Measure: l.cfg.Measure}, start: start}
	}
	b.unattributed.observed = true
	b.unattributed.add(delta, reading.Time)
}

// settled takes out the traffic that has waited long enough at a reading of the slice.
func (b *balance) settled(at time.Time) (old Counters) {
	switch {
	case at.Sub(b.read) >= settleTime:
		old = b.waiting.Plus(b.recent)
		b.waiting, b.recent, b.turned = Counters{}, Counters{}, at
	case at.Sub(b.turned) >= settleTime:
		old, b.waiting, b.recent, b.turned = b.waiting, b.recent, Counters{}, at
	}
	b.read = at
	return old
}

// take takes from what waits as much of delta as there is, and returns the rest.
// The most recent comes first: on a busy slice each sweep takes more than what
// has waited for long, and that would never become unattributed.
func (b *balance) take(delta Counters) (rest Counters) {
	b.recent, delta = b.recent.cancel(delta)
	b.waiting, delta = b.waiting.cancel(delta)
	return delta
}

// unitGrew puts what a unit grew by on the balance of its top-level slice. The
// slice of a unit that was gone too soon is not known; then its growth goes
// where something is missing.
func (l *Ledger) unitGrew(slice string, delta Counters) {
	if delta == (Counters{}) {
		return
	}
	if slice != "" {
		if top, ok := topOf(slice); ok { // the root slice has no balance
			b := l.balanceOf(top)
			b.ahead = b.ahead.Plus(b.take(delta))
		}
		return
	}
	for _, top := range slices.Sorted(maps.Keys(l.balances)) {
		delta = l.balances[top].take(delta)
	}
	l.unplaced = l.unplaced.Plus(delta)
}
