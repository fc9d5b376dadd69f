package main

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// gcPercent keeps a cycle of 1,000 units below 64 MiB of resident memory also
// while a backlog is sent; Go's own 100 does not (BenchmarkOutage).
const gcPercent = 75

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

// frugal gives what a cycle has used back to the kernel once it is delivered:
// most of the time the agent waits for the next one. Without it the heap would
// stay as large as it was at its largest (docs/decisions/weight.md). GOGC= switches
// it off.
type frugal struct {
	sdkmetric.Exporter
	patience  time.Duration // for the delivery
	allocated uint64        // bytes by the last time
}

// worthwhile is how many bytes are gathered over the cycles of a small host,
// rather than collect garbage in each.
const worthwhile = 1 << 20

// Export implements metric.Exporter. The reader makes one call at a time.
func (f *frugal) Export(ctx context.Context, rm *metricdata.ResourceMetrics) error {
	if os.Getenv("GOGC") != "" {
		return f.Exporter.Export(ctx, rm)
	}
	caughtUp := f.delivered(ctx, 0)
	err := f.Exporter.Export(ctx, rm)
	if allocatedBytes() > f.allocated+worthwhile {
		// With nothing else to deliver, the request is about to be garbage too. A
		// backlog takes as long as it takes.
		if caughtUp {
			f.delivered(ctx, f.patience)
		}
		*rm = metricdata.ResourceMetrics{} // the reader would hold the points for the next time
		debug.FreeOSMemory()
		f.allocated = allocatedBytes()
	}
	return err
}

// delivered says whether all cycles are delivered, at the latest after d.
func (f *frugal) delivered(ctx context.Context, d time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return f.Exporter.ForceFlush(ctx) == nil
}

// allocatedBytes is how much has been allocated on the heap since the start.
func allocatedBytes() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
