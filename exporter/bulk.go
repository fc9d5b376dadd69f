package exporter

import (
	"errors"
	"unicode/utf8"

	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// bulk are the points of the unit instruments as the bytes of their Sum, by the
// name of the metric. They are nearly all of a request, and the official exporter
// makes ten objects for each of them. So it builds the request without them, and
// they are put in last; TestBulk compares the result with what it would have made.
type bulk map[string][]byte

// encoder has an official exporter build requests, one at a time.
type encoder struct {
	official sdkmetric.Exporter
	// attributes are those of the points, as fields of a point: they stay the same
	// over cycles.
	attributes map[attribute.Distinct]string
}

// takeBulk moves the points out of rm that are simple enough. All others stay.
func (e *encoder) takeBulk(rm *metricdata.ResourceMetrics) bulk {
	taken, all := bulk{}, 0
	for _, scope := range rm.ScopeMetrics {
		for i, m := range scope.Metrics {
			sum, ok := m.Data.(metricdata.Sum[int64])
			if _, twice := taken[m.Name]; !ok || twice || !isUnitMetric(m.Name) || len(sum.DataPoints) == 0 {
				continue
			}
			if body := e.encodePoints(sum.DataPoints); body != nil {
				taken[m.Name] = body
				all += len(sum.DataPoints)
				sum.DataPoints = sum.DataPoints[:0]
				scope.Metrics[i].Data = sum
			}
		}
	}
	if len(e.attributes) > all+1000 { // each set is on two metrics, so that half are of no use
		clear(e.attributes)
	}
	return taken
}

// complete returns the serialized request with the points in it.
func (b bulk) complete(request *colmetricpb.ExportMetricsServiceRequest) ([]byte, error) {
	left := len(b)
	for _, rm := range request.ResourceMetrics {
		for _, sm := range rm.ScopeMetrics {
			for _, m := range sm.Metrics {
				if body := b[m.Name]; body != nil && m.GetSum() != nil && len(m.GetSum().DataPoints) == 0 {
					// What a message does not know it writes as it is, behind its
					// own fields. A reader finds a field that it knows.
					m.GetSum().ProtoReflect().SetUnknown(body)
					left--
				}
			}
		}
	}
	if left != 0 {
		return nil, errors.New("put the points into the request: the official exporter left out their metric")
	}
	return proto.Marshal(request)
}

// Field numbers of opentelemetry/proto/metrics/v1/metrics.proto and
// opentelemetry/proto/common/v1/common.proto.
const (
	sumDataPoints   = 1
	pointStart      = 2
	pointTime       = 3
	pointAsInt      = 6
	pointAttributes = 7
	keyValueKey     = 1
	keyValueValue   = 2
	anyValueString  = 1
)

// encodePoints returns points as the repeated field of a Sum, or nil if any of them
// has exemplars or attributes that are no text.
func (e *encoder) encodePoints(points []metricdata.DataPoint[int64]) []byte {
	var b []byte
	for i := range points { // a copy of each would be an allocation
		p := &points[i]
		attributes, ok := e.attributesOf(p.Attributes)
		if !ok || len(p.Exemplars) > 0 {
			return nil
		}
		times := [...]int64{pointStart: p.StartTime.UnixNano(), pointTime: p.Time.UnixNano()}
		const fixed = 1 + 8 // tag and value
		size := fixed + len(attributes)
		for _, at := range times {
			if at > 0 { // as the official exporter has it
				size += fixed
			}
		}
		if b == nil { // most points are about as long as the first
			b = make([]byte, 0, (size+8)*len(points))
		}
		b = appendHead(b, sumDataPoints, size)
		for number, at := range times {
			if at > 0 {
				b = protowire.AppendTag(b, protowire.Number(number), protowire.Fixed64Type)
				b = protowire.AppendFixed64(b, uint64(at))
			}
		}
		b = append(b, attributes...)
		// Last, as the official exporter has it: behind the times, where more
		// bytes in a row would change, the outbox takes a third more.
		b = protowire.AppendTag(b, pointAsInt, protowire.Fixed64Type)
		b = protowire.AppendFixed64(b, uint64(p.Value))
	}
	return b
}

// attributesOf returns attributes as fields of a point.
func (e *encoder) attributesOf(set attribute.Set) (fields string, ok bool) {
	if fields, ok = e.attributes[set.Equivalent()]; ok {
		return fields, true
	}
	var b []byte
	for attributes := set.Iter(); attributes.Next(); {
		kv := attributes.Attribute()
		text := kv.Value.AsString()
		// An empty key would have no field.
		if kv.Value.Type() != attribute.STRING || kv.Key == "" || !utf8.ValidString(string(kv.Key)) || !utf8.ValidString(text) {
			return "", false
		}
		whole, value := attributeSize(string(kv.Key), text)
		b = appendHead(b, pointAttributes, whole)
		b = append(appendHead(b, keyValueKey, len(kv.Key)), kv.Key...)
		b = appendHead(b, keyValueValue, value)
		b = append(appendHead(b, anyValueString, len(text)), text...)
	}
	if e.attributes == nil {
		e.attributes = map[attribute.Distinct]string{}
	}
	e.attributes[set.Equivalent()] = string(b)
	return string(b), true
}

// attributeSize returns how many bytes a KeyValue takes, and the AnyValue in it,
// without their own heads.
func attributeSize(key, text string) (whole, value int) {
	value = fieldSize(anyValueString, len(text))
	return fieldSize(keyValueKey, len(key)) + fieldSize(keyValueValue, value), value
}

// fieldSize is that of a field with a length, its head included.
func fieldSize(number protowire.Number, size int) int {
	return protowire.SizeTag(number) + protowire.SizeBytes(size)
}

func appendHead(b []byte, number protowire.Number, size int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.BytesType), uint64(size))
}
