package otlp

import (
	"bytes"
	"math"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/protobuf/proto"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
)

const bytesName, packetsName = "systemd.unit.network.io", "systemd.unit.network.packet.count"

func at(s float64) time.Time { return t0.Add(time.Duration(s * float64(time.Second))) }

var t0 = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

// series has the totals n, 2n, 3n and 4n: no two are alike, so that a mix-up
// shows.
type series struct {
	name       string
	start, end time.Time
	n          int64
}

func unit(name string, start, end time.Time, n int64) series { return series{name, start, end, n} }

func unitAttrs(name, direction string) attribute.Set {
	return attribute.NewSet(attribute.String("systemd.unit.name", name), attribute.String("network.io.direction", direction), attribute.String("host.name", "h"))
}

// collected has the points of the series as the SDK would have them.
func collected(list ...series) *metricdata.ResourceMetrics {
	metrics := make([]metricdata.Metrics, 2)
	for i, name := range []string{bytesName, packetsName} {
		sum := metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, IsMonotonic: true}
		for _, s := range list {
			for j, direction := range []string{"receive", "transmit"} {
				sum.DataPoints = append(sum.DataPoints, metricdata.DataPoint[int64]{
					Attributes: unitAttrs(s.name, direction), StartTime: s.start, Time: s.end, Value: int64(1+2*i+j) * s.n})
			}
		}
		metrics[i] = metricdata.Metrics{Name: name, Data: sum}
	}
	return &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: metrics}}}
}

func client(t testing.TB, cfg Config) *Client {
	t.Helper()
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return c
}

// encoded is the official exporter's request for rm.
func encoded(t testing.TB, rm *metricdata.ResourceMetrics) []byte {
	t.Helper()
	request, n, err := client(t, Config{Endpoint: "localhost:1"}).Encode(t.Context(), rm, nil)
	if err != nil || n != Count(request) {
		t.Fatalf("%d points, %v", n, err)
	}
	return request
}

// The request must say what the official exporter would have said.
func TestPoints(t *testing.T) {
	plain := unitAttrs("a.service", "receive")
	odd := map[string]metricdata.DataPoint[int64]{
		"no attributes": {},
		"no times":      {Attributes: plain, Value: 1},
		"before 1970":   {Attributes: plain, StartTime: time.Unix(-5, 0), Time: at(1), Value: 1},
		"negative":      {Attributes: plain, StartTime: at(0), Time: at(1), Value: -1},
		"largest":       {Attributes: plain, StartTime: at(0), Time: at(1), Value: math.MaxInt64},
		"empty text":    {Attributes: attribute.NewSet(attribute.String("k", "")), StartTime: at(0), Time: at(1)},
		"long text":     {Attributes: attribute.NewSet(attribute.String("k", string(make([]byte, 300)))), StartTime: at(0), Time: at(1)},
		"no text":       {Attributes: attribute.NewSet(attribute.String("a", "ü"), attribute.Int("k", 5), attribute.Bool("otel.metric.overflow", true)), StartTime: at(0), Time: at(1)},
	}
	made := func(extra ...metricdata.DataPoint[int64]) *metricdata.ResourceMetrics {
		rm := collected(unit("a.service", at(0), at(100), 5), unit("b@ü.service", at(50), at(101), 7))
		metrics := &rm.ScopeMetrics[0].Metrics
		sum := (*metrics)[0].Data.(metricdata.Sum[int64])
		sum.DataPoints = append(sum.DataPoints, extra...)
		(*metrics)[0].Data = sum
		*metrics = append(*metrics,
			metricdata.Metrics{Name: "unitmeter.other", Data: metricdata.Gauge[float64]{DataPoints: []metricdata.DataPoint[float64]{{Value: 1.5}}}})
		return rm
	}
	protocols(t, func(t *testing.T, protocol string, _ otlptest.Config) {
		c := client(t, to("http://localhost:1", Config{Protocol: protocol}))
		compare := func(name string, extra ...metricdata.DataPoint[int64]) {
			t.Run(name, func(t *testing.T) {
				reference, n, err := c.Encode(t.Context(), made(extra...), nil)
				if err != nil {
					t.Fatal(err)
				}
				rm, points := made(extra...), map[string]*Points{}
				for i := range rm.ScopeMetrics[0].Metrics[:2] {
					m := &rm.ScopeMetrics[0].Metrics[i]
					sum := m.Data.(metricdata.Sum[int64])
					points[m.Name] = &Points{}
					for _, p := range sum.DataPoints {
						points[m.Name].Add(EncodeAttributes(p.Attributes), p.StartTime.UnixNano(), p.Time.UnixNano(), p.Value, len(sum.DataPoints))
					}
					sum.DataPoints = nil
					m.Data = sum
				}
				request, k, err := c.Encode(t.Context(), rm, points)
				if err != nil {
					t.Fatal(err)
				}
				var is, want colmetricpb.ExportMetricsServiceRequest
				if err := proto.Unmarshal(reference, &want); err != nil {
					t.Fatal(err)
				}
				if err := proto.Unmarshal(request, &is); err != nil {
					t.Fatal(err)
				}
				if !proto.Equal(&is, &want) || len(request) != len(reference) || k != n || n != 9+len(extra) || Count(request) != n {
					t.Errorf("request of %d points and %d bytes:\n%v\nthe official one, of %d points and %d bytes:\n%v", k, len(request), &is, n, len(reference), &want)
				}
				// Byte for byte, since the order of fields decides how well the outbox compresses.
				for _, m := range want.ResourceMetrics[0].ScopeMetrics[0].Metrics {
					for _, p := range m.GetSum().GetDataPoints() {
						if point, err := proto.Marshal(p); err != nil || !bytes.Contains(request, point) {
							t.Errorf("the request has not the bytes of the point %v (%v)", p, err)
						}
					}
				}
			})
		}
		compare("plain")
		for name, p := range odd {
			compare(name, p)
		}
	})
}

// Text that OTLP cannot carry must not make a request that nobody can read.
func TestInvalidText(t *testing.T) {
	rm := collected(unit("", at(0), at(1), 1))
	rm.ScopeMetrics[0].Metrics = rm.ScopeMetrics[0].Metrics[:1]
	rm.ScopeMetrics[0].Metrics[0].Data = metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality}
	var p Points
	p.Add(EncodeAttributes(attribute.NewSet(attribute.String("k\xff", "a\xff.service"))), 1, 2, 3, 1)
	request, n, err := client(t, Config{Endpoint: "localhost:1"}).Encode(t.Context(), rm, map[string]*Points{bytesName: &p})
	if err != nil || n != 1 {
		t.Fatalf("%d points, %v", n, err)
	}
	if got := otlptest.Flatten(decoded(t, request)); len(got) != 1 || got[0].Attrs["k\uFFFD"] != "a\uFFFD.service" {
		t.Errorf("got %v", got)
	}
}

// A request without a metric whose points were taken must not go out.
func TestPointsMissTheirMetric(t *testing.T) {
	c := client(t, Config{Endpoint: "localhost:1"})
	if request, _, err := c.Encode(t.Context(), &metricdata.ResourceMetrics{}, map[string]*Points{bytesName: {}}); err == nil || request != nil {
		t.Errorf("completed a request without metrics: %d bytes", len(request))
	}
}
