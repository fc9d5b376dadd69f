package receiver

import (
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Counters are the four IP accounting counters of one unit, under systemd's
// names (IPIngressBytes, IPIngressPackets, IPEgressBytes, IPEgressPackets).
// Bytes are counted at the IP layer, headers included; packets are counted
// before segmentation offload splits them, so they are not wire packets.
type Counters struct {
	IngressBytes   uint64
	IngressPackets uint64
	EgressBytes    uint64
	EgressPackets  uint64
}

// Series is the state of one exported time series group (one unit, one fold,
// or the overflow series) at the end of a sweep: one instrument point for each
// direction of each of the two instruments.
type Series struct {
	// Name is the systemd.unit.name attribute: a unit name or a fold pattern.
	// It is empty for the overflow series.
	Name string
	// Total never goes down and never restarts while the ledger lives.
	Total Counters
	// Start is the moment from which Total counts (start time of each point).
	Start time.Time
	// Time is the moment at which the last reply behind Total arrived.
	Time time.Time
	// Observed says that this sweep has points for the series. A series whose
	// unit has gone, or whose counters could not be read, is kept in the ledger
	// but has no point: a gap is exported as a gap.
	Observed bool
	// Receive and Transmit are the attribute sets of the two directions, as
	// they were given to the instruments.
	Receive, Transmit attribute.Set
	options           *options
}

// options are what the points of a series are observed with. They are made once,
// since they are passed with "...".
type options struct{ receive, transmit []metric.ObserveOption }

// Run is the state of one invocation of one unit: what the odometer must
// remember to add the next reading exactly once.
type Run struct {
	Unit   string    // unit name
	Series string    // Name of the series that the deltas are added to
	Epoch  string    // invocation id (32 hex digits), or the boot id for units without one
	Boot   string    // boot id under which Last was read
	Last   Counters  // last raw reading
	Time   time.Time // when Last arrived
}

// State is everything that a Receiver must be given back after a restart to
// continue each series where it stood. Sweep.State returns it; Config.State
// takes it.
type State struct {
	Time    time.Time // when it was taken; zero for none
	Series  []Series  // Receive, Transmit and Observed are not part of the state
	Runs    []Run
	Journal Position // the stop records up to here are in Series and Runs
}

// Sweep is the result of one reading of all units. It is immutable.
type Sweep struct {
	// Time is the end of the sweep.
	Time time.Time
	// Duration is how long the sweep took.
	Duration time.Duration
	// Partial says that the deadline or an error cut the sweep short: the
	// series that were not reached have Observed false.
	Partial bool
	// Units are the loaded units of the metered types, Accounted those of them
	// that have counters.
	Units, Accounted int
	// State is the ledger after this sweep.
	State State
}

// NewSweep returns the sweep that ended at the given moment with the given
// state. Receivers make their own; this is for code that consumes sweeps.
func NewSweep(at time.Time, state State) *Sweep {
	return &Sweep{Time: at, State: state}
}
