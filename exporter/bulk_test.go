package exporter

import (
	"bytes"
	"context"
	"math"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/protobuf/proto"

	"github.com/unitmeter/unitmeter/receiver"
)

// The request must say what the official exporter would have said.
func TestBulk(t *testing.T) {
	plain := unitAttrs("a.service", "receive")
	odd := map[string]metricdata.DataPoint[int64]{
		"no attributes":     {},
		"no times":          {Attributes: plain, Value: 1},
		"before 1970":       {Attributes: plain, StartTime: time.Unix(-5, 0), Time: at(1), Value: 1},
		"negative":          {Attributes: plain, StartTime: at(0), Time: at(1), Value: -1},
		"largest":           {Attributes: plain, StartTime: at(0), Time: at(1), Value: math.MaxInt64},
		"empty text":        {Attributes: attribute.NewSet(attribute.String("k", "")), StartTime: at(0), Time: at(1)},
		"long text":         {Attributes: attribute.NewSet(attribute.String("k", string(make([]byte, 300)))), StartTime: at(0), Time: at(1)},
		"number":            {Attributes: attribute.NewSet(attribute.String("a", "ü"), attribute.Int("k", 5)), StartTime: at(0), Time: at(1)},
		"exemplars":         {Attributes: plain, StartTime: at(0), Time: at(1), Exemplars: []metricdata.Exemplar[int64]{{Time: at(1), Value: 2}}},
		"attribute no text": {Attributes: attribute.NewSet(attribute.Bool("", true)), StartTime: at(0), Time: at(1)},
	}
	made := func(extra ...metricdata.DataPoint[int64]) *metricdata.ResourceMetrics {
		rm := collected(unit("a.service", at(0), at(100), 5), unit("b@ü.service", at(50), at(101), 7))
		metrics := &rm.ScopeMetrics[0].Metrics
		sum := (*metrics)[0].Data.(metricdata.Sum[int64])
		sum.DataPoints = append(sum.DataPoints, extra...)
		(*metrics)[0].Data = sum
		*metrics = append(*metrics,
			metricdata.Metrics{Name: "unitmeter.other", Data: metricdata.Gauge[float64]{DataPoints: []metricdata.DataPoint[float64]{{Value: 1.5}}}},
			metricdata.Metrics{Name: receiver.IOName, Data: sum}) // a second one of the same name
		return rm
	}
	for protocol, endpoint := range map[string]string{"grpc": "localhost:1", "http/protobuf": "http://localhost:1/v1/metrics"} {
		c, err := open(t.Context(), Config{Protocol: protocol, Endpoint: endpoint, Insecure: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.close(context.Background()) })
		compare := func(name string, extra ...metricdata.DataPoint[int64]) {
			t.Run(protocol+"/"+name, func(t *testing.T) {
				reference := &capture{}
				if err := c.official.Export(context.WithValue(t.Context(), captureKey{}, reference), made(extra...)); err != nil {
					t.Fatal(err)
				}
				got, err := c.encode(t.Context(), made(extra...))
				if err != nil {
					t.Fatal(err)
				}
				var is, want colmetricpb.ExportMetricsServiceRequest
				if err := proto.Unmarshal(reference.request, &want); err != nil {
					t.Fatal(err)
				}
				if err := proto.Unmarshal(got.request, &is); err != nil {
					t.Fatal(err)
				}
				if !proto.Equal(&is, &want) || len(got.request) != len(reference.request) || pointsIn(&is) < 12 {
					t.Errorf("request of %d bytes:\n%v\nthe official one, of %d bytes:\n%v", len(got.request), &is, len(reference.request), &want)
				}
				// Byte for byte, since the order of fields decides how well the outbox compresses.
				for _, m := range want.ResourceMetrics[0].ScopeMetrics[0].Metrics {
					for _, p := range m.GetSum().GetDataPoints() {
						if point, err := proto.Marshal(p); err != nil || !bytes.Contains(got.request, point) {
							t.Errorf("the request has not the bytes of the point %v (%v)", p, err)
						}
					}
				}
				if len(got.bulk) == 0 {
					t.Error("no points were taken")
				}
			})
		}
		compare("plain")
		for name, p := range odd {
			compare(name, p)
		}
	}
}

// Text that OTLP cannot carry must not reach the request by the back door.
func TestBulkLeavesInvalidText(t *testing.T) {
	rm := collected(unit("a\xff.service", at(0), at(100), 5))
	if taken := new(encoder).takeBulk(rm); len(taken) != 0 || len(sums(rm, receiver.IOName)) != 2 {
		t.Errorf("took %v", taken)
	}
}

// A request without a metric whose points were taken must not go out.
func TestBulkMissesItsMetric(t *testing.T) {
	taken := new(encoder).takeBulk(collected(unit("a.service", at(0), at(100), 5)))
	if body, err := taken.complete(&colmetricpb.ExportMetricsServiceRequest{}); err == nil {
		t.Errorf("completed a request without metrics: %d bytes", len(body))
	}
}
