package ledger

import (
	"iter"
	"time"
)

// State is everything that a Ledger must be given back to go on where it stood.
// It is immutable.
type State struct {
	Time   time.Time // when it was taken; zero for none
	Source string    // Config.Source of the Ledger that it is of
	Series []Series  // in the order of their creation
	// Overflow has what the units over Config.MaxSeries transferred; nil while
	// there were none.
	Overflow *Series
	Balances []Balance // in the order of the slices' names
	Runs     []Run     // those that were read
	// Journal is the position up to which stop records are in Series and Runs.
	Journal Position
}

// All yields each series: those of units and folds, of the overflow, and of what is
// unattributed.
func (s *State) All() iter.Seq[*Series] {
	return func(yield func(*Series) bool) {
		for i := range s.Series {
			if !yield(&s.Series[i]) {
				return
			}
		}
		if s.Overflow != nil && !yield(s.Overflow) {
			return
		}
		for i := range s.Balances {
			if !yield(&s.Balances[i].Unattributed) {
				return
			}
		}
	}
}

// Kind says what a series is of.
type Kind uint8

const (
	Unit         Kind = iota // a unit or a fold; Name is the unit's name or the pattern
	Overflow                 // the units over the limit; no Name
	Unattributed             // a balance; Name is the slice's
)

// ID names a series.
type ID struct {
	Kind Kind
	Name string
}

// Series is the total of one unit name or fold, of the units over the limit, or
// of what is unattributed in one slice.
type Series struct {
	ID
	// Slice is the slice of the unit, as far as this Ledger has been told; empty
	// for a fold. It is not restored.
	Slice string
	// Total never goes down.
	Total Counters
	// Start is the moment from which Total counts.
	Start time.Time
	// Time is the moment of the last reading in Total.
	Time time.Time
	// Observed says that the sweep has a point for the series. A series whose
	// unit has gone, or whose counters could not be read, is kept without a point.
	// It is not restored.
	Observed bool
}

// Balance compares one top-level slice with the units in it.
type Balance struct {
	Slice string
	// Unattributed is what the slice counted and no unit did.
	Unattributed Series
	// Ahead is how far the units are in front of the slice, which is read before
	// them.
	Ahead Counters
	// Waiting is what the slice counted and no unit has shown yet.
	Waiting Counters
}

// Run is what must be remembered of one run to add its next reading once.
type Run struct {
	Unit  string
	Epoch string
	Boot  string // id of the boot in which Last was read
	// Series is the name of the series that the run adds to. It is empty for one
	// that has none: its unit is over the limit, or only balanced.
	Series   string
	Overflow bool      // the run adds to the overflow series
	Last     Counters  // last reading
	Time     time.Time // of Last
}

// SeriesID returns the series that the run adds to, if it has one.
func (r *Run) SeriesID() (id ID, ok bool) {
	if r.Overflow {
		return ID{Kind: Overflow}, true
	}
	return ID{Unit, r.Series}, r.Series != ""
}

// Position is a place in the journal: after the last stop record that is in the
// totals. It is not a time: a clock may be set back.
type Position struct {
	Cursor string // of that record; empty while the journal had none
	Boot   string // boot id of that record, else of the reader, without dashes; empty before the first look
}
