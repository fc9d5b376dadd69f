package receiver

import (
	"context"
	"fmt"
	"testing"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// BenchmarkSweep reads 10, 100 and 1,000 idle units of a real systemd over
// dbus-daemon. Only the cost of this process is in the CPU and allocation
// figures; the time includes that of systemd and dbus-daemon.
func BenchmarkSweep(b *testing.B) {
	rig := theRig(b)
	thousand(b, rig)
	for _, bench := range []struct {
		units   int
		include []string
	}{
		{10, []string{"thousand@[0-9].service"}},
		{100, []string{"thousand@[0-9].service", "thousand@[0-9][0-9].service"}},
		{1000, []string{"thousand@*.service"}},
	} {
		b.Run(fmt.Sprintf("units=%d", bench.units), func(b *testing.B) {
			r, _ := start(b, Config{Bus: rig.SystemBus(), Include: bench.include})
			for range 3 { // the first sweeps learn, and find out who is idle
				r.Sweep(b.Context())
			}
			b.ReportAllocs()
			for b.Loop() {
				s := r.Sweep(b.Context())
				if s.Partial || len(s.State.Runs) < bench.units {
					b.Fatalf("a sweep of %d runs, partial: %v", len(s.State.Runs), s.Partial)
				}
			}
			b.ReportMetric(float64(bench.units), "units")
		})
	}
}

// BenchmarkObserve is what a collection costs beyond the reading: a sweep that
// reads nothing, the observation of all points, and the SDK's own aggregation.
func BenchmarkObserve(b *testing.B) {
	for _, series := range []int{10, 1000} {
		b.Run(fmt.Sprintf("series=%d", series), func(b *testing.B) {
			now := time.Now()
			state := ledger.State{Time: now, Source: DBus}
			for i := range series {
				name := thousandName(i)
				state.Series = append(state.Series, ledger.Series{ID: unitID(name), Total: ledgerAll(5), Start: now, Time: now})
				state.Runs = append(state.Runs, ledger.Run{Unit: name, Series: name, Epoch: fmt.Sprintf("%032x", i), Boot: "boot", Last: ledgerAll(5), Time: now})
			}
			r, err := New(Config{State: state, BootID: "boot", HostName: "host"})
			if err != nil {
				b.Fatal(err)
			}
			// Units that have just gone: a sweep shows their last points.
			for _, run := range state.Runs {
				r.ledger.Mark(run.Epoch, false)
			}
			r.ledger.Finish(now, true, false)
			r.ledger.Finish(now, true, false)
			reader := sdkmetric.NewManualReader()
			provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithCardinalityLimit(0))
			if err := r.Register(provider.Meter("bench")); err != nil {
				b.Fatal(err)
			}
			r.Sweep(b.Context()) // which makes the attributes, once
			var collected metricdata.ResourceMetrics
			points := 0
			b.ReportAllocs()
			for b.Loop() {
				if err := reader.Collect(context.Background(), &collected); err != nil {
					b.Fatal(err)
				}
				points = 0
				for _, m := range collected.ScopeMetrics[0].Metrics {
					if sum, ok := m.Data.(metricdata.Sum[int64]); ok && (m.Name == IOName || m.Name == PacketCountName) {
						points += len(sum.DataPoints)
					}
				}
			}
			if points != 4*series {
				b.Fatalf("%d points of %d series", points, series)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(points), "ns/point")
		})
	}
}
