package exporter

import (
	"maps"
	"math"
	"slices"
	"strings"
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
	eachSum(rm, func(m *metricdata.Metrics, sum *metricdata.Sum[int64]) {
		if !isUnitMetric(m.Name) {
			return
		}
		names := make([]named, 0, len(sum.DataPoints))
		points := sum.DataPoints[:0]
		for _, p := range sum.DataPoints {
			series, transmit, ok := find(sweep, p.Attributes)
			total := totalOf(m.Name, transmit, series.Total)
			if !ok || total > math.MaxInt64 {
				dropped++
				continue
			}
			p.StartTime, p.Time, p.Value = series.Start, series.Time, int64(total)
			names = append(names, named{series.Name, transmit, int32(len(points))})
			points = append(points, p)
		}
		// The SDK has them in another order each time. In one order, requests
		// are much alike, and the outbox needs a third of the room.
		slices.SortFunc(names, named.compare)
		reorder(points, names)
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

// named is what a point is sorted by.
type named struct {
	series   string
	transmit bool
	at       int32 // index of the point
}

// reorder puts the points in the order of names, without a copy of them all. It
// uses up the indexes in names.
func reorder(points []metricdata.DataPoint[int64], names []named) {
	for i := range names {
		// Follow the ring of points that take each other's places.
		first, to := points[i], i
		for int(names[to].at) != i {
			from := int(names[to].at)
			points[to], names[to].at = points[from], int32(to)
			to = from
		}
		points[to], names[to].at = first, int32(to)
	}
}

func (a named) compare(b named) int {
	switch c := strings.Compare(a.series, b.series); {
	case c != 0 || a.transmit == b.transmit:
		return c
	case b.transmit:
		return -1
	}
	return 1
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

// find returns the series of a point and which of its two directions it is.
func find(sweep *receiver.Sweep, attrs attribute.Set) (series receiver.Series, transmit, ok bool) {
	if sweep == nil {
		return series, false, false
	}
	series, ok = sweep.Find(attrs)
	return series, ok && attrs.Equivalent() == series.Transmit.Equivalent(), ok
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
	// start is when the series began: one that made room for others begins anew,
	// at zero, when its unit comes back.
	start time.Time
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
	if m, ok := d.base[key]; ok && m.start.Equal(p.StartTime) {
		return m
	}
	if s, ok := d.ledger[key.series]; ok && isUnitMetric(key.metric) && s.Start.Equal(p.StartTime) {
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
			if isUnitMetric(m.Name) {
				series, transmit, _ := find(sweep, p.Attributes)
				key.series, key.transmit = series.Name, transmit
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
				next[key] = mark{prev.total, now.time, prev.start}
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
