package otlp

import (
	"strings"

	"go.opentelemetry.io/otel/attribute"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Field numbers of opentelemetry/proto/metrics/v1/metrics.proto.
const (
	sumDataPoints   = 1
	pointStart      = 2
	pointTime       = 3
	pointAsInt      = 6
	pointAttributes = 7
)

// Points are data points of an integer sum, encoded. The zero value has none.
type Points struct {
	encoded []byte
	n       int
}

// Len is the number of points.
func (p *Points) Len() int { return p.n }

// Add adds a point with its times in ns since 1970; those of 0 or less are left
// out. most is how many points there will be, to make room at the first.
func (p *Points) Add(attributes Attributes, start, end, value int64, most int) {
	const fixed = 1 + 8 // tag and value
	size := fixed + len(attributes)
	for _, at := range [...]int64{start, end} {
		if at > 0 {
			size += fixed
		}
	}
	if p.encoded == nil { // most points are about as long as the first
		p.encoded = make([]byte, 0, (size+8)*most)
	}
	b := protowire.AppendVarint(protowire.AppendTag(p.encoded, sumDataPoints, protowire.BytesType), uint64(size))
	if start > 0 {
		b = protowire.AppendFixed64(protowire.AppendTag(b, pointStart, protowire.Fixed64Type), uint64(start))
	}
	if end > 0 {
		b = protowire.AppendFixed64(protowire.AppendTag(b, pointTime, protowire.Fixed64Type), uint64(end))
	}
	b = append(b, attributes...)
	// Last, as the official exporter has it: behind the times, where more
	// bytes in a row would change, the outbox takes a third more.
	p.encoded = protowire.AppendFixed64(protowire.AppendTag(b, pointAsInt, protowire.Fixed64Type), uint64(value))
	p.n++
}

// Attributes are an attribute set as fields of a point. It is worth keeping.
type Attributes string

// EncodeAttributes encodes a set. What is no UTF-8, which OTLP cannot carry, gets
// replacement characters.
func EncodeAttributes(set attribute.Set) Attributes {
	var b []byte
	for attributes := set.Iter(); attributes.Next(); {
		kv := attributes.Attribute()
		field, err := proto.Marshal(&commonpb.KeyValue{Key: valid(string(kv.Key)), Value: valueOf(kv.Value)})
		if err != nil {
			continue // there is no other cause than text that is no UTF-8
		}
		b = protowire.AppendBytes(protowire.AppendTag(b, pointAttributes, protowire.BytesType), field)
	}
	return Attributes(b)
}

func valueOf(v attribute.Value) *commonpb.AnyValue {
	switch v.Type() {
	case attribute.BOOL:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_BoolValue{BoolValue: v.AsBool()}}
	case attribute.INT64:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: v.AsInt64()}}
	}
	return &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: valid(v.String())}}
}

func valid(text string) string { return strings.ToValidUTF8(text, "\uFFFD") }
