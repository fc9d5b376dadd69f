package exporter

import (
	"maps"
	"math"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// unitMetric is the metric of a unit instrument. Its points are made from the sweep, so
// that start, time and value come from one place. The SDK's own points start when the
// SDK does, which makes a long-lived counter look like a burst. They also have another
// order each time, in which the outbox compresses worse.
type unitMetric struct {
	name      string
	collected int // points that the SDK had
}

// takeUnitMetrics empties the metrics of the unit instruments in rm and returns
// them, each name once. An instrument that was not collected is not among them,
// and so has no points.
func takeUnitMetrics(rm *metricdata.ResourceMetrics) (taken []unitMetric) {
	eachSum(rm, func(name string, sum *metricdata.Sum[int64]) (keep bool) {
		if !receiver.OfSeries(name) {
			return true
		}
		if slices.ContainsFunc(taken, func(other unitMetric) bool { return other.name == name }) {
			return false
		}
		taken = append(taken, unitMetric{name, len(sum.DataPoints)})
		sum.DataPoints = nil
		return true
	})
	return taken
}

// A span is what the points of one series say. Times are in ns since 1970, of
// the wall clock, as OTLP has them.
type span struct {
	start, end int64
	values     amounts
	valid      [len(amounts{})]bool // there is a point of this value
}

// cumulative returns the totals of a series.
func cumulative(s *ledger.Series) span {
	r := span{start: s.Start.UnixNano(), end: s.Time.UnixNano(), values: amountsOf(s.Total)}
	for i := range r.valid {
		r.valid[i] = true
	}
	return r
}

// dropped counts points that cannot be sent.
type dropped struct{ unknown, huge, early int }

// eachPoint calls f with each point of the metrics, in the order of the sweep,
// which is nil before the first one.
func eachPoint(metrics []unitMetric, sweep *receiver.Sweep, read func(*ledger.Series) span, f func(m *unitMetric, attributes attribute.Set, start, end, value int64)) (d dropped) {
	if sweep == nil {
		for _, m := range metrics {
			d.unknown += m.collected
		}
		return d
	}
	for s, attrs := range sweep.All() {
		if !s.Observed {
			continue
		}
		r := read(s)
		for i := range metrics {
			m, at := &metrics[i], 0
			switch m.name {
			case attrs.Bytes:
			case attrs.Packets:
				at = 1
			default:
				continue
			}
			for _, attributes := range [...]attribute.Set{attrs.Receive, attrs.Transmit} {
				switch {
				case !r.valid[at]:
				case r.values[at] > math.MaxInt64: // OTLP cannot carry it
					d.huge++
				case r.start > r.end:
					// That is what a wall clock gives that was ahead when the unit
					// started and has been set back since. Neither time can be
					// changed: another start would be a reset to whoever reads it,
					// and count the total twice.
					d.early++
				default:
					f(m, attributes, r.start, r.end, int64(r.values[at]))
				}
				at += len(r.values) / 2
			}
		}
	}
	return d
}

// fill puts the points of the metrics into rm, as the SDK would have them, and
// removes sums without points.
func fill(rm *metricdata.ResourceMetrics, metrics []unitMetric, sweep *receiver.Sweep, read func(*ledger.Series) span) dropped {
	points := map[string][]metricdata.DataPoint[int64]{}
	d := eachPoint(metrics, sweep, read, func(m *unitMetric, attributes attribute.Set, start, end, value int64) {
		points[m.name] = append(points[m.name], metricdata.DataPoint[int64]{
			Attributes: attributes, StartTime: time.Unix(0, start).UTC(), Time: time.Unix(0, end).UTC(), Value: value,
		})
	})
	eachSum(rm, func(name string, sum *metricdata.Sum[int64]) (keep bool) {
		sum.DataPoints = append(sum.DataPoints, points[name]...)
		return len(sum.DataPoints) > 0
	})
	return d
}

// leaveOutEarly removes the cumulative points that end before they start (see
// eachPoint), and returns how many.
func leaveOutEarly(rm *metricdata.ResourceMetrics) (removed int) {
	eachSum(rm, func(_ string, sum *metricdata.Sum[int64]) (keep bool) {
		all := len(sum.DataPoints)
		if sum.Temporality == metricdata.CumulativeTemporality {
			sum.DataPoints = slices.DeleteFunc(sum.DataPoints, func(p metricdata.DataPoint[int64]) bool { return p.StartTime.After(p.Time) })
		}
		removed += all - len(sum.DataPoints)
		return true
	})
	return removed
}

// eachSum calls f for each integer sum and removes those that f does not keep.
func eachSum(rm *metricdata.ResourceMetrics, f func(name string, sum *metricdata.Sum[int64]) (keep bool)) {
	for i := range rm.ScopeMetrics {
		scope := &rm.ScopeMetrics[i]
		kept := scope.Metrics[:0]
		for _, m := range scope.Metrics {
			if sum, ok := m.Data.(metricdata.Sum[int64]); ok {
				if !f(m.Name, &sum) {
					continue
				}
				m.Data = sum
			}
			kept = append(kept, m)
		}
		scope.Metrics = kept
	}
}

// deltas turns totals into deltas from those that were last handed over. It is
// not safe for concurrent use.
type deltas struct {
	series map[ledger.ID]mark // the ledger keeps these over restarts
	own    map[ownKey]mark    // the agent's own counters
	next   struct {           // what becomes of both once the cycle is handed over
		series map[ledger.ID]mark
		own    map[ownKey]mark
	}
}

type ownKey struct {
	metric     string
	attributes attribute.Distinct
}

// mark is the end of the last delta of a series. A counter of the agent's own has
// the first value only.
type mark struct {
	start, end int64 // of the series, and of the delta
	values     amounts
}

func newDeltas(state ledger.State) *deltas {
	d := &deltas{series: make(map[ledger.ID]mark, len(state.Series)), own: map[ownKey]mark{}}
	for s := range state.All() {
		d.series[s.ID] = mark{s.Start.UnixNano(), s.Time.UnixNano(), amountsOf(s.Total)}
	}
	d.begin()
	return d
}

// begin begins a cycle.
func (d *deltas) begin() {
	d.next.series, d.next.own = make(map[ledger.ID]mark, len(d.series)), map[ownKey]mark{}
}

// read returns the deltas of a series.
func (d *deltas) read(s *ledger.Series) span {
	r := cumulative(s)
	prev, known := d.series[s.ID]
	d.next.series[s.ID] = since(prev, known, &r)
	return r
}

// since makes deltas of the totals in r, and returns where the next ones begin.
func since(prev mark, known bool, r *span) mark {
	// A series with another start was given up over the limit of series, and
	// began anew under its name.
	if !known || prev.start != r.start {
		prev = mark{start: r.start, end: r.start}
	}
	next := mark{r.start, r.end, r.values}
	for i, total := range r.values {
		// Without an interval there is nowhere to put the bytes: the clock was
		// stepped back, or the sweep is the one of the last cycle. And a total may
		// have fallen, which a ledger's does not. The point is left out; the next
		// one starts here and has its bytes, from whichever of the two totals is
		// the higher one, so that none counts twice.
		if r.valid[i] = r.end > prev.end && total >= prev.values[i]; r.valid[i] {
			r.values[i] = total - prev.values[i]
		} else {
			next.values[i] = prev.values[i]
		}
	}
	r.start = prev.end
	return next
}

// convert rewrites the agent's own monotonic cumulative integer sums as deltas, and
// says so of those whose points were taken.
func (d *deltas) convert(rm *metricdata.ResourceMetrics) {
	eachSum(rm, func(name string, sum *metricdata.Sum[int64]) (keep bool) {
		if !sum.IsMonotonic || sum.Temporality != metricdata.CumulativeTemporality {
			return true
		}
		sum.Temporality = metricdata.DeltaTemporality
		kept := sum.DataPoints[:0]
		for _, p := range sum.DataPoints {
			key := ownKey{name, p.Attributes.Equivalent()}
			r := span{start: p.StartTime.UnixNano(), end: p.Time.UnixNano(), values: amounts{uint64(p.Value)}}
			prev, known := d.own[key]
			d.next.own[key] = since(prev, known, &r)
			if r.valid[0] {
				p.StartTime, p.Value = time.Unix(0, r.start), int64(r.values[0])
				kept = append(kept, p)
			}
		}
		sum.DataPoints = kept
		return true
	})
}

// advance makes the end of this cycle the base of the deltas to come.
func (d *deltas) advance(sweep *receiver.Sweep) {
	maps.Copy(d.series, d.next.series)
	maps.Copy(d.own, d.next.own)
	if sweep != nil {
		forget(d.series, &sweep.State)
	}
}

// behind returns the series whose totals are not in the deltas up to the end of this
// cycle, with what these have in place of the total: a kill must not lose the rest.
func (d *deltas) behind(state *ledger.State) (list []ledger.Series) {
	for s := range state.All() {
		m, ok := d.next.series[s.ID]
		if !ok {
			m, ok = d.series[s.ID]
		}
		if !ok {
			m.start, m.end = s.Start.UnixNano(), s.Start.UnixNano()
		}
		if m.values != amountsOf(s.Total) {
			list = append(list, ledger.Series{ID: s.ID, Start: time.Unix(0, m.start), Time: time.Unix(0, m.end), Total: m.values.counters()})
		}
	}
	return list
}

// forget keeps a map in step with the ledger, now and then: a series that it does
// not have any more can only come back as a new one.
func forget[V any](byID map[ledger.ID]V, state *ledger.State) {
	if len(byID) <= 2*len(state.Series)+256 {
		return
	}
	alive := make(map[ledger.ID]bool, len(state.Series))
	for s := range state.All() {
		alive[s.ID] = true
	}
	maps.DeleteFunc(byID, func(id ledger.ID, _ V) bool { return !alive[id] })
}

// amounts are counters as the store has them: bytes and packets received, then
// sent.
type amounts [4]uint64

func amountsOf(c ledger.Counters) amounts {
	return amounts{c.Received.Bytes, c.Received.Packets, c.Sent.Bytes, c.Sent.Packets}
}

func (v amounts) minus(w amounts) amounts {
	for i := range v {
		v[i] -= w[i]
	}
	return v
}

func (v amounts) counters() ledger.Counters {
	return ledger.Counters{Received: ledger.Traffic{Bytes: v[0], Packets: v[1]}, Sent: ledger.Traffic{Bytes: v[2], Packets: v[3]}}
}
