package exporter

import (
	"context"
	"fmt"
	"testing"

	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// The cost of a cycle of 1,000 units (4,000 points) from the SDK's points to the
// finished request, without commit and network.
func BenchmarkExport4000Points(b *testing.B) {
	for _, temporality := range []string{"cumulative", "delta"} {
		b.Run(temporality, func(b *testing.B) {
			h := &host{}
			// Nothing is ever delivered, and so nobody connects.
			exp, err := New(b.Context(), Config{OTLP: &otlp.Config{Endpoint: "http://localhost:4317"}, Source: h, Outbox: discard{&memory{}}, Temporality: temporality})
			if err != nil {
				b.Fatal(err)
			}
			cycle := func(i int) *metricdata.ResourceMetrics {
				var list []ledger.Series
				for j := range 1000 {
					list = append(list, unit(fmt.Sprintf("unit-%d.service", j), at(0), at(float64(100+i)), uint64(i*1000+j)))
				}
				h.see(list...)
				return collected(list...)
			}
			export := func(rm *metricdata.ResourceMetrics) {
				if err := exp.Export(b.Context(), rm); err != nil {
					b.Fatal(err)
				}
			}
			export(cycle(0)) // encodes the attributes, once
			b.ReportAllocs()
			for i := 1; b.Loop(); i++ {
				b.StopTimer()
				rm := cycle(i)
				b.StartTimer()
				export(rm)
			}
			if err := exp.Shutdown(b.Context()); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// discard is an Outbox that has nothing to deliver.
type discard struct{ *memory }

func (discard) Commit(context.Context, Cycle) error { return nil }
