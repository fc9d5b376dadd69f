package exporter

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/protobuf/proto"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// collected is what the SDK would hand to Export for the observed series: right
// values, and its own times.
func collected(list ...ledger.Series) *metricdata.ResourceMetrics {
	var metrics []metricdata.Metrics
	for _, name := range []string{receiver.IOName, receiver.PacketCountName} {
		sum := metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, IsMonotonic: true}
		for s, attrs := range sweepOf(list...).All() {
			if !s.Observed || s.Kind == ledger.Unattributed {
				continue
			}
			for _, set := range []attribute.Set{attrs.Receive, attrs.Transmit} {
				sum.DataPoints = append(sum.DataPoints, metricdata.DataPoint[int64]{
					Attributes: set, StartTime: at(1e6), Time: at(1e6 + 1),
					Value: 12345,
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

func sweepOf(list ...ledger.Series) *receiver.Sweep {
	return sweepAt(at(1000), state(list...))
}

// filled puts the points of the sweep in place of the SDK's.
func filled(rm *metricdata.ResourceMetrics, sweep *receiver.Sweep) dropped {
	return fill(rm, takeUnitMetrics(rm), sweep, cumulative)
}

// delta is the same with deltas.
func (d *deltas) delta(rm *metricdata.ResourceMetrics, sweep *receiver.Sweep) dropped {
	metrics := takeUnitMetrics(rm)
	d.begin()
	d.convert(rm)
	return fill(rm, metrics, sweep, d.read)
}

func TestPointsAreTheSweeps(t *testing.T) {
	a, b, rest := unit("a.service", at(0), at(100), 5), unit("b.service", at(50), at(101), 7), overflow(at(10), at(102), 9)
	rm := collected(a, b, rest)
	// A second reader made a newer sweep before Export got to run.
	a.Total.Received.Bytes, a.Time = 6, at(103)
	if left := filled(rm, sweepOf(a, b, rest)); left != (dropped{}) {
		t.Errorf("dropped %+v points of known series", left)
	}
	for _, want := range []struct {
		metric string
		index  int
		s      ledger.Series
		value  int64
	}{
		// In the order of the ledger.
		{receiver.IOName, 0, a, 6}, {receiver.IOName, 1, a, 10},
		{receiver.IOName, 2, b, 7}, {receiver.IOName, 3, b, 14},
		{receiver.IOName, 4, rest, 9}, {receiver.IOName, 5, rest, 18},
		{receiver.PacketCountName, 0, a, 15}, {receiver.PacketCountName, 1, a, 20},
		{receiver.PacketCountName, 2, b, 21}, {receiver.PacketCountName, 3, b, 28},
	} {
		p := sums(rm, want.metric)[want.index]
		if !p.StartTime.Equal(want.s.Start) || !p.Time.Equal(want.s.Time) || p.Value != want.value {
			t.Errorf("%s of %q: %d (%v .. %v), want %d (%v .. %v)", want.metric, want.s.Name, p.Value, p.StartTime, p.Time, want.value, want.s.Start, want.s.Time)
		}
	}
}

func TestPointsThatCannotBeSent(t *testing.T) {
	known, early := unit("a.service", at(0), at(100), 5), unit("early.service", at(200), at(100), 5)
	huge := unit("huge.service", at(0), at(100), 1)
	huge.Total.Sent.Bytes = math.MaxInt64 + 1
	away := unit("away.service", at(0), at(50), 1)
	away.Observed = false
	for name, test := range map[string]struct {
		sweep   *receiver.Sweep
		dropped dropped
		left    int // points of the units
	}{
		"no sweep yet": {nil, dropped{unknown: 12}, 0},
		"no good ones": {sweepOf(early, away), dropped{early: 4}, 0},
		"some good":    {sweepOf(known, early, huge, away), dropped{early: 4, huge: 1}, 7},
	} {
		t.Run(name, func(t *testing.T) {
			rm := collected(known, early, huge)
			rm.ScopeMetrics[0].Metrics = append(rm.ScopeMetrics[0].Metrics, metricdata.Metrics{
				Name: "unitmeter.units", Data: metricdata.Gauge[int64]{DataPoints: []metricdata.DataPoint[int64]{{Value: 3, Time: at(7)}}}})
			if got := filled(rm, test.sweep); got != test.dropped {
				t.Errorf("dropped %+v, want %+v", got, test.dropped)
			}
			if left := len(sums(rm, receiver.IOName)) + len(sums(rm, receiver.PacketCountName)); left != test.left {
				t.Errorf("%d points left, want %d", left, test.left)
			}
			metrics := 1
			if test.left > 0 {
				metrics = 3
			}
			if n := len(rm.ScopeMetrics[0].Metrics); n != metrics {
				t.Errorf("%d metrics left, want %d", n, metrics)
			}
		})
	}
}

// An instrument that the SDK did not collect, since its callback did not run or a
// view drops it, has no points; and one that was collected twice has them once.
func TestOnlyWhatWasCollectedHasPoints(t *testing.T) {
	slice := unattributed("system.slice", at(0), at(100), 9)
	list := []ledger.Series{unit("a.service", at(0), at(100), 5), slice}
	rm := collected(list...)
	scope := &rm.ScopeMetrics[0]
	scope.Metrics = []metricdata.Metrics{scope.Metrics[0], scope.Metrics[0]}
	filled(rm, sweepOf(list...))
	if a, b, c := len(sums(rm, receiver.IOName)), len(sums(rm, receiver.PacketCountName)), len(sums(rm, receiver.UnattributedName)); a != 2 || b != 0 || c != 0 {
		t.Errorf("%d points of bytes, %d of packets, %d unattributed", a, b, c)
	}
	rm = collected(list...)
	rm.ScopeMetrics[0].Metrics[0].Name = receiver.UnattributedName
	filled(rm, sweepOf(list...))
	p := sums(rm, receiver.UnattributedName)
	if len(p) != 2 || p[0].Value != 9 || p[1].Value != 18 {
		t.Fatalf("unattributed are %v", p)
	}
	if name, ok := p[0].Attributes.Value("systemd.unit.slice"); !ok || name.AsString() != "system.slice" || p[0].Attributes.HasValue("systemd.unit.name") {
		t.Errorf("unattributed are of %v", p[0].Attributes)
	}
	if p := sums(rm, receiver.PacketCountName); len(p) != 2 || p[0].Value != 15 {
		t.Errorf("packets are %v", p)
	}
}

func TestOtherMetricsAreLeftAlone(t *testing.T) {
	p := metricdata.DataPoint[int64]{Attributes: attribute.NewSet(attribute.String("systemd.unit.name", "a.service"), attribute.String("network.io.direction", "receive")), StartTime: at(1), Time: at(2), Value: 3}
	rm := &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: []metricdata.Metrics{
		{Name: "unitmeter.units", Data: metricdata.Sum[int64]{DataPoints: []metricdata.DataPoint[int64]{p}}}}}}}
	if left := filled(rm, sweepOf(unit("a.service", at(0), at(100), 5))); left != (dropped{}) {
		t.Errorf("dropped %+v", left)
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
}

func TestDeltas(t *testing.T) {
	type step struct {
		n      uint64 // total of the unit; 0: no point this time
		time   float64
		start  float64
		failed bool   // the cycle was not handed over
		want   string // value (start..time) of the receive direction's bytes
	}
	known := state(unit("a.service", at(0), at(90), 400))
	for name, test := range map[string]struct {
		ledger ledger.State
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
		"a series that was given up, and began anew": {ledger: known, steps: []step{
			{n: 410, time: 100, want: "10 (90..100)"}, {time: 110}, {n: 30, start: 112, time: 120, want: "30 (112..120)"},
			{n: 50, start: 112, time: 130, want: "20 (120..130)"}, {n: 60, start: 135, time: 140, want: "60 (135..140)"}}},
		"a series that the ledger has, and that began anew": {ledger: known, steps: []step{
			{n: 500, start: 95, time: 100, want: "500 (95..100)"}, {n: 510, start: 95, time: 110, want: "10 (100..110)"}}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDeltas(test.ledger)
			for i, step := range test.steps {
				var list []ledger.Series
				if step.n > 0 {
					list = append(list, unit("a.service", at(step.start), at(step.time), step.n))
				}
				rm, sweep := collected(list...), sweepOf(list...)
				d.delta(rm, sweep)
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
					d.advance(sweep)
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
		names := []string{"a.service", "b.socket", ""} // the last one is the overflow
		total, sum := map[string]uint64{}, map[string]int64{}
		d, now := newDeltas(ledger.State{}), 1000.0
		for cycle := range 60 {
			last := cycle >= 58 // two quiet cycles to catch up
			now += 1 + rnd.Float64()*10
			if !last && rnd.IntN(12) == 0 {
				now -= rnd.Float64() * 500
			}
			var list []ledger.Series
			for _, name := range names {
				total[name] += rnd.Uint64N(1000)
				s := unit(name, at(0), at(now), total[name])
				if name == "" {
					s = overflow(at(0), at(now), total[name])
				}
				s.Observed = last || rnd.IntN(3) > 0
				list = append(list, s)
			}
			rm, sweep := collected(list...), sweepOf(list...)
			if left := d.delta(rm, sweep); left != (dropped{}) {
				t.Fatalf("seed %d: dropped %+v", seed, left)
			}
			if !last && rnd.IntN(3) == 0 {
				continue // not handed over
			}
			for _, p := range sums(rm, receiver.IOName) {
				if p.Value < 0 || !p.StartTime.Before(p.Time) {
					t.Fatalf("seed %d: delta %d (%v .. %v)", seed, p.Value, p.StartTime, p.Time)
				}
				if direction, _ := p.Attributes.Value("network.io.direction"); direction.AsString() == "receive" {
					name, _ := p.Attributes.Value("systemd.unit.name")
					sum[name.AsString()] += p.Value
				}
			}
			d.advance(sweep)
		}
		for _, name := range names {
			if sum[name] != int64(total[name]) {
				t.Errorf("seed %d: the deltas of %q sum up to %d, want %d", seed, name, sum[name], total[name])
			}
		}
	}
}

func TestDeltasForgetWithTheLedger(t *testing.T) {
	d := newDeltas(ledger.State{})
	for i := range 5000 {
		s := unit(fmt.Sprintf("run-%d.service", i), at(0), at(float64(i+1)), 1)
		rm, sweep := collected(s), sweepOf(s) // a ledger that forgets all others
		d.delta(rm, sweep)
		d.advance(sweep)
	}
	if len(d.series) > 1000 {
		t.Errorf("remembers %d points of one live series", len(d.series))
	}
}

func TestDeltasOfTheAgentsOwnCounters(t *testing.T) {
	d := newDeltas(ledger.State{})
	sum := func(value int64, now time.Time) *metricdata.ResourceMetrics {
		p := metricdata.DataPoint[int64]{StartTime: at(0), Time: now, Value: value}
		return &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: []metricdata.Metrics{
			{Name: "unitmeter.export.sent", Data: metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, IsMonotonic: true, DataPoints: []metricdata.DataPoint[int64]{p}}},
			{Name: "unitmeter.units", Data: metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, DataPoints: []metricdata.DataPoint[int64]{p}}},
		}}}}
	}
	for i, want := range []int64{10, 5} {
		rm := sum(int64(10+5*i), at(float64(10+10*i)))
		d.delta(rm, nil)
		d.advance(nil)
		if got := sums(rm, "unitmeter.export.sent")[0].Value; got != want {
			t.Errorf("cycle %d: delta %d, want %d", i, got, want)
		}
		if got := sums(rm, "unitmeter.units")[0].Value; got != int64(10+5*i) {
			t.Errorf("cycle %d: a sum that may fall is now %d", i, got)
		}
	}
}

// The deltas of merged requests sum up to those of their parts, in whatever order
// and number requests are merged.
func TestMergedDeltas(t *testing.T) {
	h, box := &host{}, &memory{}
	exp, err := New(t.Context(), Config{OTLP: &otlp.Config{Endpoint: "localhost:1"}, Source: h, Outbox: kept{box}, Temporality: "delta"})
	if err != nil {
		t.Fatal(err)
	}
	var requests [][]byte
	for i := range uint64(8) {
		now := at(float64(100 + 10*i))
		list := []ledger.Series{unit("a.service", at(0), now, 100+10*i)}
		if i%3 > 0 {
			list = append(list, unit("b.service", at(0), now, 7*i))
		}
		h.see(list...)
		if err := exp.Export(t.Context(), collected(list...)); err != nil {
			t.Fatal(err)
		}
		requests = append(requests, box.cycles[i].Request)
	}
	if err := exp.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	merge := func(a, b []byte) []byte {
		m, _, err := otlp.Merge(a, b)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	all := requests[0]
	for _, r := range requests[1:] {
		all = merge(all, r)
	}
	pairs := merge(merge(merge(requests[0], requests[1]), merge(requests[2], requests[3])), merge(merge(requests[4], requests[5]), merge(requests[6], requests[7])))
	for name, merged := range map[string][]byte{"one by one": all, "in pairs": pairs} {
		var request colmetricpb.ExportMetricsServiceRequest
		if err := proto.Unmarshal(merged, &request); err != nil {
			t.Fatal(err)
		}
		points := otlptest.Flatten(&request)
		if len(points) != 8 {
			t.Errorf("%s: %d points, want one for each series", name, len(points))
		}
		if a, b := values(points, receiver.IOName, "a.service", "receive"), values(points, receiver.IOName, "b.service", "transmit"); fmt.Sprint(a, b) != "[170] [98]" {
			t.Errorf("%s: sums %v and %v, want 170 and 98", name, a, b)
		}
		for _, p := range points {
			if !p.Delta || !p.Start.Equal(at(0)) {
				t.Errorf("%s: %v", name, p)
			}
		}
	}
}

// kept is an Outbox that gives nothing out.
type kept struct{ *memory }

func (kept) Next(context.Context, int64, int) ([]Entry, error) { return nil, nil }
