package main

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// gcPercent has the garbage collector run when the heap is half as large again
// as what is in use, not twice as large, so that a cycle of 1,000 units stays
// below 64 MiB of resident memory also while a backlog is sent (BenchmarkOutage).
const gcPercent = 50

// trimMemory sets gcPercent and leaves two processors to the agent, since the
// runtime has caches and workers for each: with one, the thread that waits for
// D-Bus would hold up all others for some milliseconds. GOGC= and GOMAXPROCS= win.
func trimMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0)))
	}
}

// frugal gives what a cycle has used back to the kernel after it: most of the
// time the agent waits for the next one. Without it the heap would stay as large
// as it was at its largest (docs/decisions/weight.md). GOGC= switches it off.
type frugal struct {
	sdkmetric.Exporter
	allocated uint64 // bytes by the last time
}

// worthwhile is how many bytes are gathered over the cycles of a small host,
// rather than collect garbage in each.
const worthwhile = 1 << 20

// Export implements metric.Exporter. The reader makes one call at a time.
func (f *frugal) Export(ctx context.Context, rm *metricdata.ResourceMetrics) error {
	if os.Getenv("GOGC") != "" {
		return f.Exporter.Export(ctx, rm)
	}
	// A collection in the middle, a moment before the one at the end, would be
	// for nothing.
	debug.SetGCPercent(2 * gcPercent)
	defer debug.SetGCPercent(gcPercent)
	err := f.Exporter.Export(ctx, rm)
	if allocatedBytes() > f.allocated+worthwhile {
		debug.FreeOSMemory()
		f.allocated = allocatedBytes()
	}
	return err
}

// allocatedBytes is how much has been allocated on the heap since the start.
func allocatedBytes() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
