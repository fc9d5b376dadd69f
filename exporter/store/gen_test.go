package store

import (
	"fmt"
	"math/rand/v2"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/protobuf/proto"

	"github.com/unitmeter/unitmeter/exporter/store/history"
)

// host makes the OTLP requests, ledgers and samples of one host, cycle after
// cycle, as the exporter would hand them to Commit.
type host struct {
	rand     *rand.Rand
	units    []string
	active   int // units with traffic in each cycle
	shuffle  bool
	now      time.Time
	interval time.Duration
	total    [][4]uint64
	start    []time.Time
	rate     []float64
	request  *collectorpb.ExportMetricsServiceRequest
	points   [2][]*metricspb.NumberDataPoint // by instrument; two directions for each unit
}

func newHost(units, active int, interval time.Duration) *host {
	h := &host{
		rand: rand.New(rand.NewPCG(1, 2)), active: active, interval: interval,
		now: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
	}
	text := func(k, v string) *commonpb.KeyValue {
		return &commonpb.KeyValue{Key: k, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: v}}}
	}
	kinds := []string{"postgresql@%d-main.service", "worker-%d.service", "docker-%08x.scope", "nats-%d.socket", "backup-job-%d.service"}
	for i := range units {
		h.units = append(h.units, fmt.Sprintf(kinds[i%len(kinds)], i))
		h.start = append(h.start, h.now.Add(-time.Duration(h.rand.Int64N(int64(30*24*time.Hour)))))
		h.total = append(h.total, [4]uint64{h.rand.Uint64N(1e11), h.rand.Uint64N(1e8), h.rand.Uint64N(1e11), h.rand.Uint64N(1e8)})
		h.rate = append(h.rate, 10*pow10(h.rand.Float64()*4)) // bytes/s: 10 to 100,000
	}
	var metrics []*metricspb.Metric
	for n, name := range []string{"systemd.unit.network.io", "systemd.unit.network.packet.count"} {
		for i, unit := range h.units {
			for _, dir := range []string{"receive", "transmit"} {
				h.points[n] = append(h.points[n], &metricspb.NumberDataPoint{
					Attributes:        []*commonpb.KeyValue{text("host.name", "db-17.example.net"), text("network.io.direction", dir), text("systemd.unit.name", unit)},
					StartTimeUnixNano: uint64(h.start[i].UnixNano()),
				})
			}
		}
		metrics = append(metrics, &metricspb.Metric{Name: name, Unit: "By", Data: &metricspb.Metric_Sum{Sum: &metricspb.Sum{
			AggregationTemporality: metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE, IsMonotonic: true, DataPoints: h.points[n],
		}}})
	}
	h.request = &collectorpb.ExportMetricsServiceRequest{ResourceMetrics: []*metricspb.ResourceMetrics{{
		Resource:     &resourcepb.Resource{Attributes: []*commonpb.KeyValue{text("service.name", "unitmeter"), text("host.name", "db-17.example.net")}},
		ScopeMetrics: []*metricspb.ScopeMetrics{{Scope: &commonpb.InstrumentationScope{Name: "github.com/unitmeter/unitmeter"}, Metrics: metrics}},
	}}}
	return h
}

func pow10(x float64) float64 {
	r := 1.0
	for ; x >= 1; x-- {
		r *= 10
	}
	return r * (1 + 9*x)
}

// step lets one interval pass and returns the marshalled request.
func (h *host) step() []byte {
	h.now = h.now.Add(h.interval + time.Duration(h.rand.Int64N(int64(4*time.Millisecond))))
	for range h.active {
		h.traffic(h.rand.IntN(len(h.units)))
	}
	for n, points := range h.points {
		at := uint64(h.now.Add(time.Duration(n) * 130 * time.Microsecond).UnixNano())
		for j, p := range points {
			p.TimeUnixNano = at
			p.Value = &metricspb.NumberDataPoint_AsInt{AsInt: int64(h.total[j/2][j%2*2+n])}
		}
		if h.shuffle {
			h.rand.Shuffle(len(points), func(a, b int) { points[a], points[b] = points[b], points[a] })
		}
	}
	b, err := proto.Marshal(h.request)
	if err != nil {
		panic(err)
	}
	return b
}

func (h *host) traffic(i int) [4]uint64 {
	packets := 1 + uint64(h.rate[i]*h.interval.Seconds()*(0.5+h.rand.Float64())/600)
	d := [4]uint64{packets * (60 + h.rand.Uint64N(1000)), packets, packets * (60 + h.rand.Uint64N(400)), packets - packets/5}
	for k := range d {
		h.total[i][k] += d[k]
	}
	return d
}

// cycle lets one interval pass and returns what the exporter would commit.
func (h *host) cycle() Cycle {
	before := append([][4]uint64(nil), h.total...)
	request := h.step()
	c := Cycle{Time: h.now, Request: request, Points: 4 * len(h.units)}
	for i, unit := range h.units {
		seen := h.now.Add(-time.Duration(len(h.units)-i) * 110 * time.Microsecond)
		c.Ledger.Series = append(c.Ledger.Series, Series{Kind: 1, Key: unit, Total: h.total[i], Start: h.start[i], Seen: seen})
		c.Ledger.Runs = append(c.Ledger.Runs, Run{
			Key: fmt.Sprintf("%032x", i*7919), Unit: unit, SeriesKind: 1, Series: unit, Boot: "b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0",
			Last: h.total[i], Seen: seen,
		})
		c.Samples = append(c.Samples, history.Sample{Unit: unit, Time: seen, Delta: sub(h.total[i], before[i]), Interval: h.interval})
	}
	return c
}
