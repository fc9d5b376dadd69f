package receiver

import (
	"math"
	"time"
)

// maxTotal is the largest total that an OTLP integer point can hold.
const maxTotal = math.MaxInt64

// odometer remembers the last raw reading of one run, so that each byte that
// systemd accounted is added to a total once. The zero value has read nothing:
// its first reading counts in full, since systemd counts a run from 0.
type odometer struct {
	last Counters
	time time.Time // of the last reading; zero before the first
}

// advance takes a raw reading and returns what it adds to the total. A fall of
// any of the four counters is a reset of all four (accounting switched off and
// on, or lost in a reload): they count from 0 again since the last reading.
func (o *odometer) advance(raw Counters, at time.Time) (delta Counters, reset bool) {
	delta, fell := raw.minus(o.last)
	if fell {
		delta = raw
	}
	o.last, o.time = raw, at
	return delta, fell
}

// minus returns c - d, and whether any of the four differences is negative.
func (c Counters) minus(d Counters) (diff Counters, negative bool) {
	return Counters{
			IngressBytes:   c.IngressBytes - d.IngressBytes,
			IngressPackets: c.IngressPackets - d.IngressPackets,
			EgressBytes:    c.EgressBytes - d.EgressBytes,
			EgressPackets:  c.EgressPackets - d.EgressPackets,
		}, c.IngressBytes < d.IngressBytes || c.IngressPackets < d.IngressPackets ||
			c.EgressBytes < d.EgressBytes || c.EgressPackets < d.EgressPackets
}

// plus returns c + d, and whether any of the four sums is more than maxTotal.
// Both must be at most maxTotal.
func (c Counters) plus(d Counters) (sum Counters, overflow bool) {
	sum = Counters{
		IngressBytes:   c.IngressBytes + d.IngressBytes,
		IngressPackets: c.IngressPackets + d.IngressPackets,
		EgressBytes:    c.EgressBytes + d.EgressBytes,
		EgressPackets:  c.EgressPackets + d.EgressPackets,
	}
	return sum, !sum.valid()
}

// valid reports whether all four counters fit into an OTLP integer.
func (c Counters) valid() bool {
	return c.IngressBytes <= maxTotal && c.IngressPackets <= maxTotal &&
		c.EgressBytes <= maxTotal && c.EgressPackets <= maxTotal
}

// add puts a delta on the series' total. A total that would no longer fit
// begins again, as a reset with its own start time.
func (s *series) add(delta Counters, at time.Time) {
	sum, overflow := s.total.plus(delta)
	if overflow {
		sum, s.start = delta, s.time
	}
	s.total = sum
	if at.After(s.time) { // members of a fold and stop records come in any order
		s.time = at
	}
	s.moved = s.moved || delta != Counters{}
}

// max returns the larger of each counter.
func (c Counters) max(d Counters) Counters {
	return Counters{
		IngressBytes:   max(c.IngressBytes, d.IngressBytes),
		IngressPackets: max(c.IngressPackets, d.IngressPackets),
		EgressBytes:    max(c.EgressBytes, d.EgressBytes),
		EgressPackets:  max(c.EgressPackets, d.EgressPackets),
	}
}
