package exporter

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/receiver"
)

// collected is what the SDK would hand to Export for the observed series: right
// values, and its own times.
func collected(series ...receiver.Series) *metricdata.ResourceMetrics {
	var metrics []metricdata.Metrics
	for _, name := range []string{receiver.IOName, receiver.PacketCountName} {
		sum := metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, IsMonotonic: true}
		for _, s := range series {
			if !s.Observed {
				continue
			}
			for _, attrs := range []attribute.Set{s.Receive, s.Transmit} {
				sum.DataPoints = append(sum.DataPoints, metricdata.DataPoint[int64]{
					Attributes: attrs, StartTime: at(1e6), Time: at(1e6 + 1),
					Value: int64(totalOf(name, attrs.Equals(&s.Transmit), s.Total)),
				})
			}
		}
		if len(sum.DataPoints) > 0 {
			metrics = append(metrics, metricdata.Metrics{Name: name, Data: sum})
		}
	}
	return &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: metrics}}}
}

func sums(rm *metricdata.ResourceMetrics, name string) []metricdata.DataPoint[int64] {
	var points []metricdata.DataPoint[int64]
	for _, scope := range rm.ScopeMetrics {
		for _, m := range scope.Metrics {
			if sum, ok := m.Data.(metricdata.Sum[int64]); ok && m.Name == name {
				points = append(points, sum.DataPoints...)
			}
		}
	}
	return points
}

func sweepOf(series ...receiver.Series) *receiver.Sweep {
	return receiver.NewSweep(at(1000), receiver.State{Series: series})
}

func TestStampTakesStartTimeAndTotalFromTheSweep(t *testing.T) {
	a, b, rest := unit("a.service", at(0), at(100), 5), unit("b.service", at(50), at(101), 7), unit("", at(10), at(102), 9)
	rm := collected(a, b, rest)
	// A second reader made a newer sweep before Export got to run.
	a.Total.IngressBytes, a.Time = 6, at(103)
	if dropped := stamp(rm, sweepOf(a, b, rest)); dropped != 0 {
		t.Errorf("dropped %d points of known series", dropped)
	}
	for _, want := range []struct {
		metric string
		index  int
		s      receiver.Series
		value  int64
	}{
		// Sorted by name: the overflow series has none.
		{receiver.IOName, 0, rest, 9}, {receiver.IOName, 1, rest, 18},
		{receiver.IOName, 2, a, 6}, {receiver.IOName, 3, a, 10},
		{receiver.IOName, 4, b, 7}, {receiver.IOName, 5, b, 14},
		{receiver.PacketCountName, 0, rest, 27}, {receiver.PacketCountName, 1, rest, 36},
		{receiver.PacketCountName, 2, a, 15}, {receiver.PacketCountName, 3, a, 20},
	} {
		p := sums(rm, want.metric)[want.index]
		if !p.StartTime.Equal(want.s.Start) || !p.Time.Equal(want.s.Time) || p.Value != want.value {
			t.Errorf("%s of %q: %d (%v .. %v), want %d (%v .. %v)", want.metric, want.s.Name, p.Value, p.StartTime, p.Time, want.value, want.s.Start, want.s.Time)
		}
	}
}

func TestStampDropsWhatHasNoRightStart(t *testing.T) {
	known, gone := unit("a.service", at(0), at(100), 5), unit("gone.service", at(0), at(100), 5)
	huge := unit("huge.service", at(0), at(100), 1)
	huge.Total.EgressBytes = math.MaxInt64 + 1
	for name, test := range map[string]struct {
		sweep         *receiver.Sweep
		dropped, left int
	}{
		"no sweep yet":           {nil, 12, 0},
		"series without a point": {sweepOf(known, huge), 4 + 1, 7},
	} {
		t.Run(name, func(t *testing.T) {
			rm := collected(known, gone, huge)
			rm.ScopeMetrics[0].Metrics = append(rm.ScopeMetrics[0].Metrics, metricdata.Metrics{
				Name: "unitmeter.units", Data: metricdata.Gauge[int64]{DataPoints: []metricdata.DataPoint[int64]{{Value: 3, Time: at(7)}}}})
			if dropped := stamp(rm, test.sweep); dropped != test.dropped {
				t.Errorf("dropped %d points, want %d", dropped, test.dropped)
			}
			if left := countPoints(rm); left != test.left+1 {
				t.Errorf("%d points left, want %d and the agent's own", left, test.left)
			}
			for _, m := range rm.ScopeMetrics[0].Metrics {
				if sum, ok := m.Data.(metricdata.Sum[int64]); ok && len(sum.DataPoints) == 0 {
					t.Errorf("%s is left without points", m.Name)
				}
			}
		})
	}
}

func TestStampLeavesOtherMetricsAlone(t *testing.T) {
	p := metricdata.DataPoint[int64]{Attributes: unitAttrs("a.service", "receive"), StartTime: at(1), Time: at(2), Value: 3}
	rm := &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: []metricdata.Metrics{
		{Name: "unitmeter.units", Data: metricdata.Sum[int64]{DataPoints: []metricdata.DataPoint[int64]{p}}}}}}}
	if dropped := stamp(rm, sweepOf(unit("a.service", at(0), at(100), 5))); dropped != 0 {
		t.Errorf("dropped %d", dropped)
	}
	if got := sums(rm, "unitmeter.units")[0]; got.StartTime != p.StartTime || got.Time != p.Time || got.Value != 3 {
		t.Errorf("got %+v, want the SDK's own point", got)
	}
}

func TestPointsThatEndBeforeTheyStartAreLeftOut(t *testing.T) {
	points := func(times ...float64) []metricdata.DataPoint[int64] {
		var list []metricdata.DataPoint[int64]
		for _, end := range times {
			list = append(list, metricdata.DataPoint[int64]{StartTime: at(100), Time: at(end), Value: 1})
		}
		return list
	}
	rm := &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: []metricdata.Metrics{
		{Name: "totals", Data: metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, DataPoints: points(40, 101, 99)}},
		{Name: "early", Data: metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, DataPoints: points(40)}},
		{Name: "gauge", Data: metricdata.Gauge[int64]{DataPoints: points(40)}},
	}}}}
	if n := leaveOutEarly(rm); n != 3 {
		t.Errorf("removed %d points, want 3", n)
	}
	if got := sums(rm, "totals"); len(got) != 1 || !got[0].Time.Equal(at(101)) {
		t.Errorf("left are %+v, want the one that ends after it starts", got)
	}
	if n := len(rm.ScopeMetrics[0].Metrics); n != 2 {
		t.Errorf("%d metrics are left, want the totals and the gauge", n)
	}
}

func TestDeltas(t *testing.T) {
	type step struct {
		n      uint64 // total of the unit; 0: no point this time
		time   float64
		failed bool // the cycle was not handed over
		start  float64
		want   string // value (start..time) of the receive direction's bytes
	}
	known := receiver.State{Series: []receiver.Series{unit("a.service", at(0), at(90), 400)}}
	for name, test := range map[string]struct {
		ledger receiver.State
		steps  []step
	}{
		"first sight begins at the series' start": {steps: []step{
			{n: 500, time: 100, want: "500 (0..100)"}, {n: 530, time: 110, want: "30 (100..110)"}}},
		"restart goes on from the ledger": {ledger: known, steps: []step{
			{n: 500, time: 100, want: "100 (90..100)"}, {n: 500, time: 110, want: "0 (100..110)"}}},
		"a failure is covered by the next one": {steps: []step{
			{n: 500, time: 100, want: "500 (0..100)"}, {n: 510, time: 110, failed: true, want: "10 (100..110)"},
			{n: 530, time: 120, failed: true, want: "30 (100..120)"}, {n: 600, time: 130, want: "100 (100..130)"}}},
		"a failed first sight": {steps: []step{
			{n: 500, time: 100, failed: true, want: "500 (0..100)"}, {n: 600, time: 110, want: "600 (0..110)"}}},
		"a gap is spanned": {steps: []step{
			{n: 500, time: 100, want: "500 (0..100)"}, {time: 110}, {time: 120}, {n: 700, time: 130, want: "200 (100..130)"}}},
		"the same sweep twice": {steps: []step{
			{n: 500, time: 100, want: "500 (0..100)"}, {n: 500, time: 100}, {n: 600, time: 110, want: "100 (100..110)"}}},
		"the clock is stepped back": {steps: []step{
			{n: 500, time: 100, want: "500 (0..100)"}, {n: 510, time: 40}, {n: 540, time: 50, want: "40 (40..50)"}, {n: 550, time: 60, want: "10 (50..60)"}}},
		"the clock is behind the ledger's": {ledger: known, steps: []step{
			{n: 500, time: 20}, {n: 600, time: 30, want: "200 (20..30)"}}},
		"a step back in a cycle that failed": {steps: []step{
			{n: 500, time: 100, want: "500 (0..100)"}, {n: 510, time: 40, failed: true}, {n: 540, time: 50}, {n: 550, time: 60, want: "50 (50..60)"}}},
		"a start that is not known": {steps: []step{
			{n: 500, time: 0}, {n: 600, time: 10, want: "600 (0..10)"}}},
		"a total that falls": {ledger: known, steps: []step{
			{n: 300, time: 100}, {n: 350, time: 110}, {n: 410, time: 120, want: "10 (110..120)"}}},
		"a series that begins anew": {steps: []step{
			{n: 500, time: 100, want: "500 (0..100)"}, {time: 110}, {n: 30, start: 115, time: 120, want: "30 (115..120)"}, {n: 40, start: 115, time: 130, want: "10 (120..130)"}}},
		"a series that begins anew, which the ledger does not know": {ledger: known, steps: []step{
			{time: 100}, {n: 700, start: 115, time: 120, want: "700 (115..120)"}}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDeltas(test.ledger)
			for i, step := range test.steps {
				var series []receiver.Series
				if step.n > 0 {
					series = append(series, unit("a.service", at(step.start), at(step.time), step.n))
				}
				rm, sweep := collected(series...), sweepOf(series...)
				stamp(rm, sweep)
				next := d.convert(rm, sweep)
				got := ""
				if points := sums(rm, receiver.IOName); len(points) > 0 {
					p := points[0]
					got = fmt.Sprintf("%d (%v..%v)", p.Value, p.StartTime.Sub(t0).Seconds(), p.Time.Sub(t0).Seconds())
					if sent := sums(rm, receiver.PacketCountName)[1].Value; sent != 4*p.Value {
						t.Errorf("cycle %d: %d packets sent for %d bytes received", i, sent, p.Value)
					}
				}
				if got != step.want {
					t.Errorf("cycle %d: delta %q, want %q", i, got, step.want)
				}
				if !step.failed {
					d.advance(next, sweep)
				}
			}
		})
	}
}

// Whatever happens, the deltas that were handed over sum up to the total, none
// is negative, and each interval has a length.
func TestDeltasSumUp(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		names := []string{"a.service", "b.socket", ""}
		total, sum := map[string]uint64{}, map[string]int64{}
		var ledger receiver.State
		d, now := newDeltas(ledger), 1000.0
		for cycle := range 60 {
			last := cycle >= 58 // two quiet cycles to catch up
			now += 1 + rnd.Float64()*10
			if !last && rnd.IntN(12) == 0 {
				now -= rnd.Float64() * 500
			}
			var series []receiver.Series
			for _, name := range names {
				total[name] += rnd.Uint64N(1000)
				s := unit(name, at(0), at(now), total[name])
				s.Observed = last || rnd.IntN(3) > 0
				series = append(series, s)
			}
			rm, sweep := collected(series...), sweepOf(series...)
			if dropped := stamp(rm, sweep); dropped != 0 {
				t.Fatalf("seed %d: dropped %d", seed, dropped)
			}
			next := d.convert(rm, sweep)
			if !last && rnd.IntN(3) == 0 {
				continue // not handed over
			}
			for _, p := range sums(rm, receiver.IOName) {
				if p.Value < 0 || !p.StartTime.Before(p.Time) {
					t.Fatalf("seed %d: delta %d (%v .. %v)", seed, p.Value, p.StartTime, p.Time)
				}
				series, transmit, _ := find(sweep, p.Attributes)
				if !transmit {
					sum[series.Name] += p.Value
				}
			}
			d.advance(next, sweep)
		}
		for _, name := range names {
			if sum[name] != int64(total[name]) {
				t.Errorf("seed %d: the deltas of %q sum up to %d, want %d", seed, name, sum[name], total[name])
			}
		}
	}
}

func TestDeltasForgetWithTheLedger(t *testing.T) {
	d := newDeltas(receiver.State{})
	for i := range 5000 {
		s := unit(fmt.Sprintf("run-%d.service", i), at(0), at(float64(i+1)), 1)
		rm, sweep := collected(s), sweepOf(s) // a ledger that forgets all others
		stamp(rm, sweep)
		d.advance(d.convert(rm, sweep), sweep)
	}
	if len(d.base) > 1000 {
		t.Errorf("remembers %d points of one live series", len(d.base))
	}
}

func TestDeltasOfTheAgentsOwnCounters(t *testing.T) {
	d := newDeltas(receiver.State{})
	sum := func(value int64, now time.Time) *metricdata.ResourceMetrics {
		p := metricdata.DataPoint[int64]{StartTime: at(0), Time: now, Value: value}
		return &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: []metricdata.Metrics{
			{Name: "unitmeter.export.sent", Data: metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, IsMonotonic: true, DataPoints: []metricdata.DataPoint[int64]{p}}},
			{Name: "unitmeter.units", Data: metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, DataPoints: []metricdata.DataPoint[int64]{p}}},
		}}}}
	}
	for i, want := range []int64{10, 5} {
		rm := sum(int64(10+5*i), at(float64(10+10*i)))
		d.advance(d.convert(rm, nil), nil)
		if got := sums(rm, "unitmeter.export.sent")[0].Value; got != want {
			t.Errorf("cycle %d: delta %d, want %d", i, got, want)
		}
		if got := sums(rm, "unitmeter.units")[0].Value; got != int64(10+5*i) {
			t.Errorf("cycle %d: a sum that may fall is now %d", i, got)
		}
	}
}

// The order is that of the names, whatever it was: each point is where its name is.
func TestReorder(t *testing.T) {
	for range 100 {
		n := rand.IntN(50)
		points, names := make([]metricdata.DataPoint[int64], n), make([]named, n)
		for i, at := range rand.Perm(n) {
			points[i].Value = int64(i)
			names[i].at = int32(at)
		}
		want := make([]int64, n)
		for i, name := range names {
			want[i] = int64(name.at)
		}
		reorder(points, names)
		for i, p := range points {
			if p.Value != want[i] {
				t.Fatalf("point %d of %d is %d, want %d", i, n, p.Value, want[i])
			}
		}
	}
}
