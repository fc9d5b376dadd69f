package main

import (
	"context"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/exporter/store"
)

// A cycle that is delivered at once is garbage when Export returns, and nothing
// waits for a Collector that is away.
func TestFrugal(t *testing.T) {
	t.Setenv("GOGC", "")
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(t.TempDir(), "state")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	durable, err := exporter.NewDurable(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	server := otlptest.Start(t, otlptest.Config{})
	exp, err := exporter.New(t.Context(), exporter.Config{OTLP: &otlp.Config{Endpoint: server.Address(), Insecure: true}, Outbox: durable})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ended, end := context.WithCancel(context.Background())
		end() // nobody is there to take the rest
		_ = exp.Shutdown(ended)
	})
	f := &frugal{Exporter: exp, patience: time.Hour}
	export := func() {
		t.Helper()
		rm := &metricdata.ResourceMetrics{ScopeMetrics: []metricdata.ScopeMetrics{{Metrics: []metricdata.Metrics{
			{Name: "g", Data: metricdata.Gauge[int64]{DataPoints: []metricdata.DataPoint[int64]{{Time: time.Now(), Value: 1}}}},
		}}}}
		runtime.KeepAlive(make([]byte, 2*worthwhile))
		if err := f.Export(t.Context(), rm); err != nil {
			t.Fatal(err)
		}
		if rm.ScopeMetrics != nil {
			t.Error("the points are still held")
		}
	}
	// The sender has seen that there is nothing from an earlier run.
	if err := exp.ForceFlush(t.Context()); err != nil {
		t.Fatal(err)
	}
	export()
	if n := len(server.Requests()); n != 1 {
		t.Errorf("%d requests are delivered when Export returns, want 1", n)
	}
	server.Stop()
	export()
	export()
}
