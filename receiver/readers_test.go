package receiver

import (
	"slices"
	"sync"
	"testing"
	"time"

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

// TestKeepEnded: the last point of a unit that has gone is repeated for as long as
// the slower one of two readers needs to get it.
func TestKeepEnded(t *testing.T) {
	for keep, want := range map[time.Duration]bool{0: false, 10 * time.Minute: true} {
		fake := systemdtest.StartFake(t)
		fake.SetUnit(accounted("a.service", 1, all(5)))
		r, _ := start(t, Config{Bus: fake.Address(), KeepEnded: keep})
		r.Sweep(t.Context())
		fake.Remove("a.service")
		fake.EmitUnitRemoved("a.service")
		eventually(t, "the end is noticed", func() bool { return len(r.Units()) == 0 })
		if s, ok := r.Sweep(t.Context()).seriesOf("a.service"); !ok || s.Total != all(5) {
			t.Errorf("at the end: %+v", s)
		}
		r.mu.Lock()
		for _, run := range r.runs {
			run.closed = run.closed.Add(-5 * time.Minute) // what five minutes do
		}
		r.mu.Unlock()
		if s, ok := r.Sweep(t.Context()).seriesOf("a.service"); ok != want {
			t.Errorf("five minutes after the end, KeepEnded %v: %+v, %v", keep, s, ok)
		}
	}
}
