package exporter

import (
	"maps"
	"math"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/receiver"
)

// isUnitMetric says that the points of a metric belong to series of the sweep.
func isUnitMetric(name string) bool {
	return name == receiver.IOName || name == receiver.PacketCountName || name == receiver.UnattributedName
}

// stamp makes the points of the unit instruments say what their series says:
// start, time and total come from one place, so that a point can never carry one
// sweep's value with another's time. (A second reader may cause a newer sweep
// between the SDK's collection and this call.) It returns how many points it had
// to drop: those without a series, and totals that OTLP cannot carry. A wrong
// start time would make a long-lived counter look like a burst.
func stamp(rm *metricdata.ResourceMetrics, sweep *receiver.Sweep) (dropped int) {
	if sweep == nil {
		sweep = &receiver.Sweep{}
	}
	// By series and direction: 1 + the index of the point, 0 without one.
	places := make([]int32, 2*len(sweep.State.Series))
	eachSum(rm, func(m *metricdata.Metrics, sum *metricdata.Sum[int64]) {
		if !isUnitMetric(m.Name) {
			return
		}
		clear(places)
		points := sum.DataPoints[:0]
		for i := range sum.DataPoints {
			p := &sum.DataPoints[i]
			at, transmit, ok := sweep.Find(p.Attributes)
			if !ok {
				dropped++
				continue
			}
			series := &sweep.State.Series[at]
			total := totalOf(m.Name, transmit, series.Total)
			place := 2 * at
			if transmit {
				place++
			}
			if total > math.MaxInt64 || places[place] != 0 {
				dropped++
				continue
			}
			p.StartTime, p.Time, p.Value = series.Start, series.Time, int64(total)
			if len(points) < i {
				points = append(points, *p)
			} else {
				points = points[:i+1]
			}
			places[place] = int32(len(points))
		}
		// The SDK has them in another order each time. In one order, requests
		// are much alike, and the outbox needs a third of the room.
		reorder(points, places)
		sum.DataPoints = points
	})
	return dropped
}

// leaveOutEarly removes the cumulative points that end before they start, and
// returns how many. That is what a wall clock gives that was ahead when the unit
// started and has been set back since. Neither time can be changed: another
// start would be a reset to whoever reads it, and count the total twice.
func leaveOutEarly(rm *metricdata.ResourceMetrics) (removed int) {
	eachSum(rm, func(_ *metricdata.Metrics, sum *metricdata.Sum[int64]) {
		if sum.Temporality != metricdata.CumulativeTemporality {
			return
		}
		all := len(sum.DataPoints)
		sum.DataPoints = slices.DeleteFunc(sum.DataPoints, func(p metricdata.DataPoint[int64]) bool { return p.StartTime.After(p.Time) })
		removed += all - len(sum.DataPoints)
	})
	return removed
}

// reorder puts the points in the order of places, without a copy of them all.
// Those that are not 0 have each 1 + the index of a point; it uses them up.
func reorder(points []metricdata.DataPoint[int64], places []int32) {
	order := places[:0]
	for _, at := range places {
		if at > 0 {
			order = append(order, at-1)
		}
	}
	for i := range order {
		// Follow the ring of points that take each other's places.
		first, to := points[i], i
		for int(order[to]) != i {
			from := int(order[to])
			points[to], order[to] = points[from], int32(to)
			to = from
		}
		points[to], order[to] = first, int32(to)
	}
}

// eachSum calls f for each integer sum and removes metrics that f left without
// points.
func eachSum(rm *metricdata.ResourceMetrics, f func(*metricdata.Metrics, *metricdata.Sum[int64])) {
	for i := range rm.ScopeMetrics {
		scope := &rm.ScopeMetrics[i]
		kept := scope.Metrics[:0]
		for _, m := range scope.Metrics {
			if sum, ok := m.Data.(metricdata.Sum[int64]); ok {
				f(&m, &sum)
				if len(sum.DataPoints) == 0 {
					continue
				}
				m.Data = sum
			}
			kept = append(kept, m)
		}
		scope.Metrics = kept
	}
}

func totalOf(metric string, transmit bool, c receiver.Counters) uint64 {
	switch packets := metric == receiver.PacketCountName; {
	case packets && transmit:
		return c.EgressPackets
	case packets:
		return c.IngressPackets
	case transmit:
		return c.EgressBytes
	}
	return c.IngressBytes
}

// countPoints counts the data points of all metrics.
func countPoints(rm *metricdata.ResourceMetrics) (n int) {
	for _, scope := range rm.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				n += len(d.DataPoints)
			case metricdata.Sum[float64]:
				n += len(d.DataPoints)
			case metricdata.Gauge[int64]:
				n += len(d.DataPoints)
			case metricdata.Gauge[float64]:
				n += len(d.DataPoints)
			case metricdata.Histogram[int64]:
				n += len(d.DataPoints)
			case metricdata.Histogram[float64]:
				n += len(d.DataPoints)
			case metricdata.ExponentialHistogram[int64]:
				n += len(d.DataPoints)
			case metricdata.ExponentialHistogram[float64]:
				n += len(d.DataPoints)
			case metricdata.Summary:
				n += len(d.DataPoints)
			}
		}
	}
	return n
}

// deltas turns cumulative points into deltas from the totals that were last
// handed over. It is not safe for concurrent use.
type deltas struct {
	base   map[pointKey]mark
	ledger map[string]receiver.Series // what base begins with, by name
}

// pointKey names one series of points over cycles. A point of a unit instrument
// goes by the name of its series, which the ledger keeps over restarts; others
// go by their attributes.
type pointKey struct {
	metric   string
	series   string
	transmit bool
	attrs    attribute.Distinct
}

// mark is the end of the last delta of a series of points.
type mark struct {
	total int64
	time  time.Time // without monotonic reading: OTLP carries wall clock time
	start time.Time // of the series
}

func newDeltas(ledger receiver.State) *deltas {
	d := &deltas{base: make(map[pointKey]mark), ledger: make(map[string]receiver.Series, len(ledger.Series))}
	for _, s := range ledger.Series {
		d.ledger[s.Name] = s
	}
	return d
}

// last returns the end of the last delta of p, which has the given key.
func (d *deltas) last(key pointKey, p metricdata.DataPoint[int64]) mark {
	// A series with another start was given up over the limit of series, and
	// began anew under its name.
	if m, ok := d.base[key]; ok {
		if m.start.Equal(p.StartTime) {
			return m
		}
	} else if s, ok := d.ledger[key.series]; ok && isUnitMetric(key.metric) && s.Start.Equal(p.StartTime) {
		total := min(totalOf(key.metric, key.transmit, s.Total), math.MaxInt64)
		return mark{int64(total), s.Time.Round(0), p.StartTime}
	}
	return mark{0, p.StartTime.Round(0), p.StartTime}
}

// convert rewrites all monotonic cumulative integer sums of rm as deltas. It
// returns the marks to pass to advance once the cycle is handed over.
func (d *deltas) convert(rm *metricdata.ResourceMetrics, sweep *receiver.Sweep) map[pointKey]mark {
	next := make(map[pointKey]mark, len(d.base))
	eachSum(rm, func(m *metricdata.Metrics, sum *metricdata.Sum[int64]) {
		if !sum.IsMonotonic || sum.Temporality != metricdata.CumulativeTemporality {
			return
		}
		kept := sum.DataPoints[:0]
		for _, p := range sum.DataPoints {
			key := pointKey{metric: m.Name}
			if isUnitMetric(m.Name) { // stamp has found it already
				at, transmit, _ := sweep.Find(p.Attributes)
				key.series, key.transmit = sweep.State.Series[at].Name, transmit
			} else {
				key.attrs = p.Attributes.Equivalent()
			}
			prev := d.last(key, p)
			now := mark{p.Value, p.Time.Round(0), p.StartTime}
			if !now.time.After(prev.time) || now.total < prev.total {
				// No interval to put the bytes in (the clock was stepped back,
				// or the sweep is the one of the last cycle), or a total that
				// fell, which a ledger's does not. The point is left out; the
				// next one starts here and has its bytes, from whichever of
				// the two totals is the higher one, so that none counts twice.
				next[key] = mark{prev.total, now.time, p.StartTime}
				continue
			}
			next[key] = now
			p.StartTime, p.Time, p.Value = prev.time, now.time, now.total-prev.total
			kept = append(kept, p)
		}
		sum.DataPoints = kept
		sum.Temporality = metricdata.DeltaTemporality
	})
	return next
}

// advance makes next the base of the deltas to come.
func (d *deltas) advance(next map[pointKey]mark, sweep *receiver.Sweep) {
	for key, m := range next {
		d.base[key] = m
	}
	if sweep == nil || len(d.base)+len(d.ledger) <= 2*(4*len(sweep.State.Series)+256) {
		return
	}
	// Keep the memory in step with the ledger: what it has forgotten can only
	// come back as a new series.
	alive := make(map[string]bool, len(sweep.State.Series))
	for _, s := range sweep.State.Series {
		alive[s.Name] = true
	}
	maps.DeleteFunc(d.base, func(key pointKey, _ mark) bool { return isUnitMetric(key.metric) && !alive[key.series] })
	maps.DeleteFunc(d.ledger, func(name string, _ receiver.Series) bool { return !alive[name] })
}
