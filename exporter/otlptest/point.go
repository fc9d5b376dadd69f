package otlptest

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricpb "go.opentelemetry.io/proto/otlp/metrics/v1"
)

// Point is one integer point of a sum or gauge, without its surroundings.
type Point struct {
	Metric string
	Attrs  map[string]string
	Start  time.Time // UTC; zero if not set
	Time   time.Time // UTC
	Value  int64
	// Delta says that Value is a change since Start.
	Delta bool
}

// Series is the metric and the attributes in one line, sorted: a key for maps
// and a text for failed tests.
func (p Point) Series() string {
	pairs := make([]string, 0, len(p.Attrs))
	for _, k := range slices.Sorted(maps.Keys(p.Attrs)) {
		pairs = append(pairs, k+"="+p.Attrs[k])
	}
	return p.Metric + "{" + strings.Join(pairs, ",") + "}"
}

// String shows the point in failed tests.
func (p Point) String() string {
	kind := "total"
	if p.Delta {
		kind = "delta"
	}
	return fmt.Sprintf("%s %s %d (%s .. %s)", p.Series(), kind, p.Value, p.Start.Format(time.RFC3339Nano), p.Time.Format(time.RFC3339Nano))
}

// Flatten returns the integer points of sums and gauges, in their order.
func Flatten(r *colmetricpb.ExportMetricsServiceRequest) []Point {
	var points []Point
	for _, rm := range r.GetResourceMetrics() {
		for _, sm := range rm.GetScopeMetrics() {
			for _, m := range sm.GetMetrics() {
				data := m.GetGauge().GetDataPoints()
				if m.GetSum() != nil {
					data = m.GetSum().GetDataPoints()
				}
				delta := m.GetSum().GetAggregationTemporality() == metricpb.AggregationTemporality_AGGREGATION_TEMPORALITY_DELTA
				for _, p := range data {
					if _, ok := p.Value.(*metricpb.NumberDataPoint_AsInt); !ok {
						continue
					}
					attrs := make(map[string]string, len(p.Attributes))
					for _, kv := range p.Attributes {
						switch v := kv.GetValue().GetValue().(type) {
						case *commonpb.AnyValue_StringValue:
							attrs[kv.Key] = v.StringValue
						case *commonpb.AnyValue_BoolValue:
							attrs[kv.Key] = strconv.FormatBool(v.BoolValue)
						default:
							attrs[kv.Key] = strings.TrimSpace(kv.GetValue().String())
						}
					}
					points = append(points, Point{
						Metric: m.Name, Attrs: attrs, Start: stamp(p.StartTimeUnixNano), Time: stamp(p.TimeUnixNano),
						Value: p.GetAsInt(), Delta: delta,
					})
				}
			}
		}
	}
	return points
}

func stamp(ns uint64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(ns)).UTC()
}
