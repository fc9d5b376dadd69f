package ledger

import (
	"cmp"
	"iter"
	"strings"
	"time"
	"unique"
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
	// Measure is what the totals are of, and Others are the States of Ledgers with
	// another one.
	Measure Measure
	Others  []State
}

// All yields each series: those of units and folds, of the overflow, of what is
// unattributed, and then those of Others.
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
		for i := range s.Others {
			for series := range s.Others[i].All() {
				if !yield(series) {
					return
				}
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

// Measure says which part of the traffic a series counts, and at which layer.
type Measure uint8

const (
	Total        Measure = iota // at the socket, before segmentation
	Remote                      // Total without Loopback
	Loopback                    // over the loopback device
	Wire                        // after segmentation
	WireRemote                  // Wire without WireLoopback
	WireLoopback                // Wire over the loopback device
)

// ID names a series.
type ID struct {
	Kind    Kind
	Name    string
	Owner   Owner
	Measure Measure
}

// Owner is whose a unit is. Owners with equal Labels are equal. The zero Owner is
// that of what the name alone tells apart.
type Owner struct{ labels unique.Handle[Labels] }

// Labels tell units of one name apart, and members of one fold. An absent label is
// empty.
type Labels struct {
	User          string // number of the user whose manager has the unit
	Runtime       string // of the container, as the others below
	ContainerID   string
	ContainerName string
	Pod           string
	Namespace     string // of the pod
}

// Text is the name for people: UID/NAME for a unit of a user's manager, with the
// container behind it.
func (id ID) Text() string {
	l, text := id.Owner.Labels(), id.Name
	if l.User != "" {
		text = l.User + "/" + text
	}
	container := cmp.Or(l.ContainerName, l.ContainerID)
	if l.Pod != "" {
		container = l.Namespace + "/" + l.Pod + "/" + container
	}
	if !strings.Contains(id.Name, container) {
		text += " " + container
	}
	return text
}

// OwnerOf returns the Owner with labels.
func OwnerOf(labels Labels) Owner {
	if labels == (Labels{}) {
		return Owner{}
	}
	return Owner{unique.Make(labels)}
}

// Labels returns the labels of o.
func (o Owner) Labels() Labels {
	if o == (Owner{}) {
		return Labels{}
	}
	return o.labels.Value()
}

// Series is the total of one unit name or fold, of the units over the limit, or
// of the unattributed traffic of one slice.
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
	Owner Owner
	Epoch string
	Boot  string // id of the boot in which Last was read
	// Series is the name of the series that the run adds to. It is empty for one
	// that has none: its unit is over the limit, or only balanced.
	Series   string
	Overflow bool      // the run adds to the overflow series
	Last     Counters  // last reading
	Time     time.Time // of Last
}

// SeriesID returns the series that a run of the given Measure adds to, if it has one.
func (r *Run) SeriesID(of Measure) (id ID, ok bool) {
	if r.Overflow {
		return ID{Kind: Overflow, Measure: of}, true
	}
	return ID{Unit, r.Series, r.Owner, of}, r.Series != ""
}

// Position is a place in the journal: after the last stop record that is in the
// totals. It is not a time: a clock may be set back.
type Position struct {
	Cursor string // of that record; empty while the journal had none
	Boot   string // boot id of that record, else of the reader, without dashes; empty before the first look
}
