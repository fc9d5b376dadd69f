package ledger

import "math"

// maxTotal is the largest total that an OTLP integer point can hold.
const maxTotal = math.MaxInt64

// Traffic is what went one way.
type Traffic struct {
	Bytes   uint64 // at the IP layer, headers included
	Packets uint64 // before segmentation offload splits them
}

// Counters are the counters of one run, or a total of several.
type Counters struct{ Received, Sent Traffic }

// each applies f to the four pairs of counters.
func (c Counters) each(d Counters, f func(a, b uint64) uint64) Counters {
	return Counters{
		Received: Traffic{f(c.Received.Bytes, d.Received.Bytes), f(c.Received.Packets, d.Received.Packets)},
		Sent:     Traffic{f(c.Sent.Bytes, d.Sent.Bytes), f(c.Sent.Packets, d.Sent.Packets)},
	}
}

// Plus returns c + d. The caller sees to it that no counter wraps around: two
// that are Valid do not.
func (c Counters) Plus(d Counters) Counters {
	return c.each(d, func(a, b uint64) uint64 { return a + b })
}

// Minus returns c - d, and whether any of the four counters is lower in c than
// in d. Then the difference has no meaning.
func (c Counters) Minus(d Counters) (difference Counters, fell bool) {
	difference = c.each(d, func(a, b uint64) uint64 {
		fell = fell || a < b
		return a - b
	})
	return difference, fell
}

// Max returns the larger one of each pair of counters.
func (c Counters) Max(d Counters) Counters {
	return c.each(d, func(a, b uint64) uint64 { return max(a, b) })
}

// Valid reports whether all four counters fit into an OTLP integer, 2^63-1.
func (c Counters) Valid() bool {
	return max(c.Received.Bytes, c.Received.Packets, c.Sent.Bytes, c.Sent.Packets) <= maxTotal
}

// cancel takes from each of a pair of counters the lower one of the two, and
// returns what is left of both.
func (c Counters) cancel(d Counters) (left, still Counters) {
	common := c.each(d, func(a, b uint64) uint64 { return min(a, b) })
	left, _ = c.Minus(common)
	still, _ = d.Minus(common)
	return left, still
}
