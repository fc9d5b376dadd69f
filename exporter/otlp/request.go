package otlp

import (
	"bytes"
	"fmt"

	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricpb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Join makes one request of several. It appends them, since resource metrics are a
// repeated field, of which concatenated messages keep all elements (Protocol Buffers
// encoding, "Last One Wins").
func Join(requests ...[]byte) []byte {
	if len(requests) == 1 {
		return requests[0]
	}
	return bytes.Join(requests, nil)
}

// Split cuts a serialized request into two with half of the points each, in
// order. Both are nil if there are fewer than two points.
func Split(request []byte) (head, tail []byte, err error) {
	var whole colmetricpb.ExportMetricsServiceRequest
	if err := proto.Unmarshal(request, &whole); err != nil {
		return nil, nil, fmt.Errorf("split request: %w", err)
	}
	n := pointsIn(&whole)
	if n < 2 {
		return nil, nil, nil
	}
	if head, err = proto.Marshal(window(&whole, 0, n/2)); err == nil {
		tail, err = proto.Marshal(window(&whole, n/2, n))
	}
	if err != nil {
		return nil, nil, fmt.Errorf("split request: %w", err)
	}
	return head, tail, nil
}

// Count counts the data points of a serialized request; 0 if it is none.
func Count(request []byte) int {
	var r colmetricpb.ExportMetricsServiceRequest
	if proto.Unmarshal(request, &r) != nil {
		return 0
	}
	return pointsIn(&r)
}

// window returns a request with the points from index lo up to hi of r, counted
// over all metrics. It shares them with r.
func window(r *colmetricpb.ExportMetricsServiceRequest, lo, hi int) *colmetricpb.ExportMetricsServiceRequest {
	out, at := &colmetricpb.ExportMetricsServiceRequest{}, 0
	for _, resource := range r.ResourceMetrics {
		rm := &metricpb.ResourceMetrics{Resource: resource.Resource, SchemaUrl: resource.SchemaUrl}
		for _, scope := range resource.ScopeMetrics {
			sm := &metricpb.ScopeMetrics{Scope: scope.Scope, SchemaUrl: scope.SchemaUrl}
			for _, m := range scope.Metrics {
				n := pointsOf(m)
				from, to := max(lo-at, 0), min(hi-at, n)
				at += n
				if from < to {
					sm.Metrics = append(sm.Metrics, slicePoints(m, from, to))
				}
			}
			if len(sm.Metrics) > 0 {
				rm.ScopeMetrics = append(rm.ScopeMetrics, sm)
			}
		}
		if len(rm.ScopeMetrics) > 0 {
			out.ResourceMetrics = append(out.ResourceMetrics, rm)
		}
	}
	return out
}

// slicePoints returns m with only its points from index from up to to.
func slicePoints(m *metricpb.Metric, from, to int) *metricpb.Metric {
	kind, data, field := dataOf(m)
	part, all := data.New(), data.Get(field).List()
	points := part.NewField(field).List()
	for i := from; i < to; i++ {
		points.Append(all.Get(i))
	}
	copyFields(part, data)
	part.Set(field, protoreflect.ValueOfList(points))
	out := &metricpb.Metric{}
	copyFields(out.ProtoReflect(), m.ProtoReflect())
	out.ProtoReflect().Set(kind, protoreflect.ValueOfMessage(part))
	return out
}

// copyFields makes to share the fields of from.
func copyFields(to, from protoreflect.Message) {
	from.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		to.Set(field, v)
		return true
	})
}

// dataOf returns the data of m, which of its fields that is, and which field of
// the data has the points. Without data the kind is nil.
func dataOf(m *metricpb.Metric) (kind protoreflect.FieldDescriptor, data protoreflect.Message, points protoreflect.FieldDescriptor) {
	r := m.ProtoReflect()
	if kind = r.WhichOneof(r.Descriptor().Oneofs().ByName("data")); kind == nil {
		return nil, nil, nil
	}
	data = r.Get(kind).Message()
	return kind, data, data.Descriptor().Fields().ByName("data_points")
}

func pointsOf(m *metricpb.Metric) int {
	kind, data, points := dataOf(m)
	if kind == nil {
		return 0
	}
	return data.Get(points).List().Len()
}

func pointsIn(r *colmetricpb.ExportMetricsServiceRequest) (n int) {
	for _, rm := range r.ResourceMetrics {
		for _, sm := range rm.ScopeMetrics {
			for _, m := range sm.Metrics {
				n += pointsOf(m)
			}
		}
	}
	return n
}

// Merge makes one serialized request of two that follow one another, for an
// outbox that must get smaller. What the receiver can compute from both stays
// exact, only the resolution is lost:
//
//   - a cumulative sum keeps the newer point. The older one is kept as well if
//     the newer request has no point of its series, or one with another start
//     time: it is then the last word of its run;
//   - a delta sum gets the older value added and the older start time;
//   - a gauge keeps the newer value;
//   - histograms and summaries keep both points.
//
// It returns how many points the result has, and fails if one of the two is not
// an ExportMetricsServiceRequest.
func Merge(older, newer []byte) (merged []byte, points int, err error) {
	var a, b colmetricpb.ExportMetricsServiceRequest
	if err := proto.Unmarshal(older, &a); err != nil {
		return nil, 0, fmt.Errorf("merge requests: read the older one: %w", err)
	}
	if err := proto.Unmarshal(newer, &b); err != nil {
		return nil, 0, fmt.Errorf("merge requests: read the newer one: %w", err)
	}
	index := make(map[string]*metricpb.NumberDataPoint)
	eachNumberPoint(&b, func(key string, _ *metricpb.Metric, p *metricpb.NumberDataPoint) bool {
		if _, ok := index[key]; !ok {
			index[key] = p // the oldest of several, so that intervals stay in order
		}
		return true
	})
	eachNumberPoint(&a, func(key string, m *metricpb.Metric, p *metricpb.NumberDataPoint) bool {
		q := index[key]
		return q == nil || !absorb(m, p, q)
	})
	kept := window(&a, 0, pointsIn(&a)) // without what is now empty
	kept.ResourceMetrics = append(kept.ResourceMetrics, b.ResourceMetrics...)
	joinResources(kept)
	if merged, err = proto.Marshal(kept); err != nil {
		return nil, 0, fmt.Errorf("merge requests: %w", err)
	}
	return merged, pointsIn(kept), nil
}

// absorb puts the older point p into the newer point q of the same series and
// returns true, or returns false if p must stay.
func absorb(m *metricpb.Metric, p, q *metricpb.NumberDataPoint) bool {
	sum := m.GetSum()
	switch {
	case sum == nil: // gauge
		return true
	case sum.AggregationTemporality == metricpb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE:
		return p.StartTimeUnixNano == q.StartTimeUnixNano
	case sum.AggregationTemporality != metricpb.AggregationTemporality_AGGREGATION_TEMPORALITY_DELTA:
		return false
	}
	switch v := p.Value.(type) {
	case *metricpb.NumberDataPoint_AsInt:
		w, ok := q.Value.(*metricpb.NumberDataPoint_AsInt)
		if !ok || v.AsInt+w.AsInt < w.AsInt && v.AsInt > 0 { // another type, or too much for one point
			return false
		}
		q.Value = &metricpb.NumberDataPoint_AsInt{AsInt: v.AsInt + w.AsInt}
	case *metricpb.NumberDataPoint_AsDouble:
		w, ok := q.Value.(*metricpb.NumberDataPoint_AsDouble)
		if !ok {
			return false
		}
		q.Value = &metricpb.NumberDataPoint_AsDouble{AsDouble: v.AsDouble + w.AsDouble}
	default:
		return false
	}
	q.StartTimeUnixNano = min(p.StartTimeUnixNano, q.StartTimeUnixNano)
	return true
}

// eachNumberPoint calls f with the identity of each point of sums and gauges,
// and removes the points for which f returns false.
func eachNumberPoint(r *colmetricpb.ExportMetricsServiceRequest, f func(key string, m *metricpb.Metric, p *metricpb.NumberDataPoint) bool) {
	for _, rm := range r.ResourceMetrics {
		resource := identity("", rm.GetResource().GetAttributes())
		for _, sm := range rm.ScopeMetrics {
			scope := identity(resource+"\x00"+sm.GetScope().GetName()+"\x00"+sm.GetScope().GetVersion(), sm.GetScope().GetAttributes())
			for _, m := range sm.Metrics {
				var points *[]*metricpb.NumberDataPoint
				kind := "gauge"
				switch d := m.Data.(type) {
				case *metricpb.Metric_Sum:
					points, kind = &d.Sum.DataPoints, fmt.Sprint("sum", d.Sum.AggregationTemporality, d.Sum.IsMonotonic)
				case *metricpb.Metric_Gauge:
					points = &d.Gauge.DataPoints
				default:
					continue
				}
				metric := scope + "\x00" + m.Name + "\x00" + m.Unit + "\x00" + kind
				kept := (*points)[:0]
				for _, p := range *points {
					if f(identity(metric, p.Attributes), m, p) {
						kept = append(kept, p)
					}
				}
				*points = kept
			}
		}
	}
}

// identity appends attributes to a key. The SDK writes an attribute set always
// in the same order; a set in another order would only not be merged.
func identity(prefix string, attrs []*commonpb.KeyValue) string {
	key := append([]byte(prefix), 0)
	for _, kv := range attrs {
		// A failed append would leave a shorter key that could match a wrong
		// series; the only cause is text that is not UTF-8, which Unmarshal
		// has refused already.
		key, _ = proto.MarshalOptions{Deterministic: true}.MarshalAppend(key, kv)
		key = append(key, 0)
	}
	return string(key)
}

// joinResources makes one ResourceMetrics of neighbours with the same resource,
// which most of a merged request would otherwise repeat.
func joinResources(r *colmetricpb.ExportMetricsServiceRequest) {
	var out []*metricpb.ResourceMetrics
	for _, rm := range r.ResourceMetrics {
		if n := len(out); n > 0 && out[n-1].SchemaUrl == rm.SchemaUrl && proto.Equal(out[n-1].Resource, rm.Resource) {
			out[n-1].ScopeMetrics = append(out[n-1].ScopeMetrics, rm.ScopeMetrics...)
			continue
		}
		out = append(out, rm)
	}
	r.ResourceMetrics = out
}
