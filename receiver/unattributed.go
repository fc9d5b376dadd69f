package receiver

import (
	"maps"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
)

// UnattributedName is the instrument for what a top-level slice counted and no
// series has.
const UnattributedName = "unitmeter.unattributed"

// The ledger keeps unattributed traffic as series too, under names that no
// unit can have.
const (
	unattributedPrefix = "unattributed/"
	aheadPrefix        = "ahead/"
	waitingPrefix      = "waiting/"
)

// settleTime is how long the stop record of a unit may take through the journal.
const settleTime = 10 * time.Second

// balance compares one top-level slice with the units in it. What the slice
// counted and no unit did is the traffic of units that are not metered, or
// that ended before anyone could read them.
type balance struct {
	series *series // what was unattributed so far; nil before the first reading
	// waiting and recent are what the slice counted and no unit has shown yet.
	// They become unattributed at a reading of the slice at least settleTime
	// later: until then the last readings and stop records of units that have
	// ended are still coming in.
	waiting, recent Counters
	turned          time.Time // when recent began
	read            time.Time // when the slice was read last
	// ahead is how far the units are in front of the slice, which is read
	// before them.
	ahead Counters
}

// topSlice reports whether a unit is a child of the root slice. The name of a
// slice spells its place: a-b.slice is in a.slice.
func topSlice(unit string) bool {
	name, ok := strings.CutSuffix(unit, ".slice")
	return ok && name != "" && !strings.Contains(name, "-")
}

// topOf returns the top-level slice that a slice is in, "" for the root slice.
func topOf(slice string) string {
	name, _, nested := strings.Cut(strings.TrimSuffix(slice, ".slice"), "-")
	switch {
	case name == "":
		return ""
	case !nested && name != slice:
		return slice // as it is: this is asked for each unit in each sweep
	}
	return name + ".slice"
}

// balanceOf returns the balance of a top-level slice. The caller holds mu.
func (r *Receiver) balanceOf(top string) *balance {
	b, ok := r.balances[top]
	if !ok {
		b = &balance{}
		r.balances[top] = b
	}
	return b
}

// sliceGrew puts a reading of a top-level slice on its balance. first says
// that nothing is known of what it counted before. The caller holds mu.
func (r *Receiver) sliceGrew(t *target, delta Counters, first bool) {
	b := r.balanceOf(t.unit.name)
	if b.series == nil {
		b.series = r.newUnattributed(t.unit.name)
		b.series.start = t.time
		if !first {
			b.series.start = t.run.start
		}
	}
	if first {
		delta, b.ahead, b.waiting, b.recent = Counters{}, Counters{}, Counters{}, Counters{}
	}
	b.series.observed = true
	b.series.add(b.settled(t.time), t.time)
	delta, b.ahead = delta.settle(b.ahead)
	delta, r.unplaced = delta.settle(r.unplaced)
	b.recent, _ = b.recent.plus(delta)
}

// settled takes out what has waited for long enough at a reading of the slice.
func (b *balance) settled(at time.Time) (old Counters) {
	switch {
	case at.Sub(b.read) >= settleTime:
		old, _ = b.waiting.plus(b.recent)
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
	b.recent, delta = b.recent.settle(delta)
	b.waiting, delta = b.waiting.settle(delta)
	return delta
}

// unitGrew puts what a unit grew by on the balance of its top-level slice. The
// slice of a unit that was gone too soon is not known; then its growth goes
// where something is missing. The caller holds mu.
func (r *Receiver) unitGrew(slice string, delta Counters) {
	if top := topOf(slice); top != "" {
		b := r.balanceOf(top)
		b.ahead, _ = b.ahead.plus(b.take(delta))
		return
	}
	if slice != "" || delta == (Counters{}) {
		return // the root slice has no balance
	}
	for _, top := range slices.Sorted(maps.Keys(r.balances)) {
		delta = r.balances[top].take(delta)
	}
	r.unplaced, _ = r.unplaced.plus(delta)
}

// settle takes from each counter as much of ahead as it has, and returns what
// is left of both.
func (c Counters) settle(ahead Counters) (left, still Counters) {
	one := func(c, ahead uint64) (uint64, uint64) { n := min(c, ahead); return c - n, ahead - n }
	left.IngressBytes, still.IngressBytes = one(c.IngressBytes, ahead.IngressBytes)
	left.IngressPackets, still.IngressPackets = one(c.IngressPackets, ahead.IngressPackets)
	left.EgressBytes, still.EgressBytes = one(c.EgressBytes, ahead.EgressBytes)
	left.EgressPackets, still.EgressPackets = one(c.EgressPackets, ahead.EgressPackets)
	return left, still
}

func (r *Receiver) newUnattributed(slice string) *series {
	if s, ok := r.series[unattributedPrefix+slice]; ok {
		return s // restored
	}
	s := &series{name: unattributedPrefix + slice}
	s.setAttributes(attribute.String("host.name", r.cfg.HostName), attribute.String("systemd.unit.slice", slice))
	r.keep(s)
	return s
}
