package e2e

import (
	"slices"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// BenchmarkBystander measures how long another client of systemd waits for an
// answer on the system bus, while an agent reads 1,000 busy units each second, and
// without one.
//
//	make bench PKG=./cmd/unitmeter/e2e BENCH=BenchmarkBystander
func BenchmarkBystander(b *testing.B) {
	rig := startLoad(b, 1000, 100)
	measureCalls := func(b *testing.B) {
		conn, err := bus.Open(b.Context(), bus.Config{Address: rig.SystemBus()})
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		manager := conn.Manager()
		var waits []time.Duration
		for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(3 * time.Millisecond) {
			asked := time.Now()
			if err := manager.Call("org.freedesktop.systemd1.Manager.GetUnit", 0, "load-@5.service").Err; err != nil {
				b.Fatal(err)
			}
			waits = append(waits, time.Since(asked))
		}
		slices.Sort(waits)
		b.ReportMetric(0, "ns/op") // of no meaning
		for name, at := range map[string]int{"p50-ms": len(waits) / 2, "p99-ms": len(waits) * 99 / 100, "max-ms": len(waits) - 1} {
			b.ReportMetric(float64(waits[at].Microseconds())/1000, name)
		}
	}
	b.Run("no-agent", measureCalls)
	listener, err := rig.Listen(b.Context(), "tcp", "127.0.0.1:4317")
	if err != nil {
		b.Fatal(err)
	}
	otlptest.Start(b, otlptest.Config{Listener: listener})
	for _, a := range contenders(b, 1000, time.Second) {
		if !a.ours() {
			continue
		}
		b.Run(a.slug(), func(b *testing.B) {
			launch(b, rig, a)
			time.Sleep(4 * time.Second) // it learns, in the first readings
			measureCalls(b)
		})
	}
}
