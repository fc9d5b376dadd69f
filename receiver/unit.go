package receiver

import (
	"slices"
	"strings"
	"time"
)

// Unit is what is known of one loaded unit of a metered type.
type Unit struct {
	Name string
	// Accounting is on, off (IPAccounting=no), no_data (nothing to count),
	// lost (systemd lost the counters), failed (reading made no sense) or
	// unknown (not read yet).
	Accounting string
	// Counters are systemd's own, as read last at Time; they count from Start.
	// All three are zero unless Accounting is on.
	Counters    Counters
	Start, Time time.Time
	// Invocation is the id of the run that is counted, empty for the few units
	// that have none.
	Invocation string
	// Slice is the slice that the unit is in, empty before its first reading.
	Slice string
}

// Units returns the loaded units of the metered types as the last sweep left
// them, in the order of their names.
func (r *Receiver) Units() []Unit {
	r.mu.Lock()
	defer r.mu.Unlock()
	units := make([]Unit, 0, len(r.units))
	for _, u := range r.units {
		if u.hidden {
			continue
		}
		info := Unit{Name: u.name, Accounting: u.state.String(), Invocation: u.status.invocation, Slice: u.slice}
		if u.state == accountingOn {
			info.Counters, info.Start, info.Time = u.run.last, u.run.start, u.run.time
		}
		units = append(units, info)
	}
	slices.SortFunc(units, func(a, b Unit) int { return strings.Compare(a.Name, b.Name) })
	return units
}
