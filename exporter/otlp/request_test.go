package otlp

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/resource"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	metricpb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/protobuf/proto"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
)

func decoded(t testing.TB, request []byte) *colmetricpb.ExportMetricsServiceRequest {
	t.Helper()
	var r colmetricpb.ExportMetricsServiceRequest
	if err := proto.Unmarshal(request, &r); err != nil {
		t.Fatal(err)
	}
	return &r
}

// everyKind has points of each kind that OTLP knows.
func everyKind(t testing.TB) []byte {
	point := metricdata.DataPoint[int64]{Attributes: unitAttrs("a.service", "receive"), StartTime: at(0), Time: at(9), Value: 1}
	real := metricdata.DataPoint[float64]{StartTime: at(0), Time: at(9), Value: 1.5}
	rm := &metricdata.ResourceMetrics{
		Resource: resource.NewSchemaless(attribute.String("host.name", "h")),
		ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: []metricdata.Metrics{
			{Name: "empty", Data: metricdata.Gauge[int64]{}},
			{Name: "gauge", Data: metricdata.Gauge[int64]{DataPoints: []metricdata.DataPoint[int64]{point, point}}},
			{Name: "real", Data: metricdata.Sum[float64]{Temporality: metricdata.DeltaTemporality, DataPoints: []metricdata.DataPoint[float64]{real}}},
			{Name: "histogram", Data: metricdata.Histogram[int64]{Temporality: metricdata.CumulativeTemporality, DataPoints: []metricdata.HistogramDataPoint[int64]{{Count: 3}, {Count: 4}}}},
		}}, {Metrics: []metricdata.Metrics{
			{Name: "exponential", Data: metricdata.ExponentialHistogram[int64]{Temporality: metricdata.CumulativeTemporality, DataPoints: []metricdata.ExponentialHistogramDataPoint[int64]{{Count: 3}}}},
			{Name: "summary", Data: metricdata.Summary{DataPoints: []metricdata.SummaryDataPoint{{Count: 3}}}},
			{Name: "sum", Data: metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, IsMonotonic: true, DataPoints: []metricdata.DataPoint[int64]{point, point, point}}},
		}}},
	}
	return encoded(t, rm)
}

func TestSplitKeepsEveryPoint(t *testing.T) {
	whole := everyKind(t)
	if n := Count(whole); n != 10 {
		t.Fatalf("counted %d points, want 10", n)
	}
	// Split until nothing can be split, then lay the pieces side by side.
	var pieces []*colmetricpb.ExportMetricsServiceRequest
	queue := [][]byte{whole}
	for len(queue) > 0 {
		head, tail, err := Split(queue[0])
		if err != nil {
			t.Fatal(err)
		}
		if tail == nil {
			pieces = append(pieces, decoded(t, queue[0]))
			queue = queue[1:]
			continue
		}
		if a, b := Count(head), Count(tail); a+b != Count(queue[0]) || b-a > 1 || a > b {
			t.Errorf("halves of %d points have %d and %d", Count(queue[0]), a, b)
		}
		queue = append([][]byte{head, tail}, queue[1:]...)
	}
	if len(pieces) != 10 {
		t.Fatalf("%d pieces, want 10", len(pieces))
	}
	var got []string
	for _, p := range pieces {
		if len(p.ResourceMetrics) != 1 || !proto.Equal(p.ResourceMetrics[0].Resource, decoded(t, whole).ResourceMetrics[0].Resource) {
			t.Errorf("a piece has lost the resource: %v", p)
		}
		for _, m := range p.ResourceMetrics[0].ScopeMetrics[0].Metrics {
			got = append(got, m.Name)
		}
	}
	want := []string{"gauge", "gauge", "real", "histogram", "histogram", "exponential", "summary", "sum", "sum", "sum"}
	if !slices.Equal(got, want) {
		t.Errorf("points of %v, want %v", got, want)
	}
	if all := window(decoded(t, whole), 0, 10); proto.Size(all) >= len(whole) || pointsIn(all) != 10 {
		t.Errorf("the whole window is %v", all)
	}
}

func TestSplitOfJunk(t *testing.T) {
	if _, _, err := Split([]byte("junk")); err == nil {
		t.Error("no error")
	}
	if head, tail, err := Split(nil); head != nil || tail != nil || err != nil {
		t.Errorf("split of nothing: %v %v %v", head, tail, err)
	}
	if n := Count([]byte("junk")); n != 0 {
		t.Errorf("junk has %d points", n)
	}
}

func TestMergeCumulative(t *testing.T) {
	restarted := unit("b.service", at(15), at(20), 3) // its series began anew
	older := encoded(t, collected(unit("a.service", at(0), at(10), 100), unit("b.service", at(0), at(10), 50), unit("gone.service", at(0), at(10), 70)))
	newer := encoded(t, collected(unit("a.service", at(0), at(20), 130), restarted, unit("new.service", at(12), at(20), 5)))
	merged, points, err := Merge(older, newer)
	if err != nil {
		t.Fatal(err)
	}
	if len(merged) >= len(older)+len(newer) {
		t.Error("it has not become smaller")
	}
	if n := Count(merged); points != n || n != 5*4 {
		t.Errorf("it has %d points and says %d, want 20", n, points)
	}
	var got []string
	for _, p := range otlptest.Flatten(decoded(t, merged)) {
		if p.Metric == packetsName && p.Attrs["network.io.direction"] == "transmit" {
			got = append(got, fmt.Sprintf("%s %d (%v..%v)", p.Attrs["systemd.unit.name"], p.Value/4, p.Start.Sub(t0).Seconds(), p.Time.Sub(t0).Seconds()))
		}
	}
	want := []string{
		"b.service 50 (0..10)", "gone.service 70 (0..10)", // last words
		"a.service 130 (0..20)", "b.service 3 (15..20)", "new.service 5 (12..20)",
	}
	if !slices.Equal(got, want) {
		t.Errorf("merged into %v, want %v", got, want)
	}
	if n := len(decoded(t, merged).ResourceMetrics); n != 1 {
		t.Errorf("the same resource %d times", n)
	}
}

func TestMergeKeepsWhatItCannotAdd(t *testing.T) {
	whole := everyKind(t)
	merged, _, err := Merge(whole, whole)
	if err != nil {
		t.Fatal(err)
	}
	// Two gauges and three sums are in the newer one; histograms, the
	// exponential one and the summary stay twice; the double delta is added.
	if n := Count(merged); n != 10+4 {
		t.Errorf("%d points, want 14: %v", n, decoded(t, merged))
	}
	huge := func(v int64) []byte {
		return encoded(t, &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: []metricdata.Metrics{
			{Name: "huge", Data: metricdata.Sum[int64]{Temporality: metricdata.DeltaTemporality, DataPoints: []metricdata.DataPoint[int64]{{Value: v, StartTime: at(0), Time: at(1)}}}}}}}})
	}
	if merged, _, err = Merge(huge(math.MaxInt64), huge(1)); err != nil {
		t.Fatal(err)
	}
	if got := otlptest.Flatten(decoded(t, merged)); len(got) != 2 || got[0].Value != math.MaxInt64 || got[1].Value != 1 {
		t.Errorf("merged into %v", got)
	}
	for _, pair := range [][2][]byte{{[]byte("junk"), whole}, {whole, []byte("junk")}} {
		if _, _, err := Merge(pair[0], pair[1]); err == nil {
			t.Error("no error for junk")
		}
	}
}

// Any two byte strings may come out of a damaged outbox.
func FuzzMergeAndSplit(f *testing.F) {
	whole := everyKind(f)
	f.Add(whole, whole)
	f.Add(encoded(f, collected(unit("a.service", at(0), at(10), 100))), whole)
	f.Add([]byte("junk"), []byte{})
	f.Fuzz(func(t *testing.T, older, newer []byte) {
		merged, points, err := Merge(older, newer)
		if n := Count(merged); err == nil && (n > Count(older)+Count(newer) || n != points) {
			t.Errorf("%d and %d points became %d, and Merge says %d", Count(older), Count(newer), n, points)
		}
		head, tail, err := Split(older)
		if err == nil && tail != nil && Count(head)+Count(tail) != Count(older) {
			t.Errorf("%d points became %d and %d", Count(older), Count(head), Count(tail))
		}
	})
}

func TestRequestIsWhatThePointsSay(t *testing.T) {
	r := decoded(t, encoded(t, collected(unit("a.service", at(1), at(10), 5))))
	sum := r.ResourceMetrics[0].ScopeMetrics[0].Metrics[0].GetSum()
	if !sum.IsMonotonic || sum.AggregationTemporality != metricpb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE {
		t.Errorf("sum %v", sum)
	}
	got := otlptest.Flatten(r)[0]
	want := otlptest.Point{Metric: bytesName, Start: at(1), Time: at(10), Value: 5,
		Attrs: map[string]string{"systemd.unit.name": "a.service", "network.io.direction": "receive", "host.name": "h"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
