package receiver

import (
	"slices"
	"sync"
	"testing"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestReadersAtOnce: two readers that collect at the same time both get every
// unit's points, though each collection is a sweep that begins with none.
func TestReadersAtOnce(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(1)))
	r, _ := start(t, Config{Bus: fake.Address()})
	readers := []*sdkmetric.ManualReader{sdkmetric.NewManualReader(), sdkmetric.NewManualReader()}
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(readers[0]), sdkmetric.WithReader(readers[1]))
	if err := r.Register(provider.Meter("test")); err != nil {
		t.Fatal(err)
	}
	var collecting sync.WaitGroup
	for _, reader := range readers {
		collecting.Go(func() {
			for i := range 500 {
				var collected metricdata.ResourceMetrics
				if err := reader.Collect(t.Context(), &collected); err != nil {
					t.Error(err)
					return
				}
				if !slices.ContainsFunc(collected.ScopeMetrics[0].Metrics, func(m metricdata.Metrics) bool { return m.Name == IOName }) {
					t.Errorf("collection %d has no points of units", i)
					return
				}
			}
		})
	}
	collecting.Wait()
}
