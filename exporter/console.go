package exporter

import (
	"context"
	"fmt"
	"io"

	"go.opentelemetry.io/otel/exporters/stdout/stdoutmetric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// NewConsole returns an exporter that writes each collection to w as one line of
// JSON, with the points of source's series, cumulative. It commits nothing,
// so it can stand beside an Exporter. Points without a series are left out; the
// Exporter counts them.
func NewConsole(w io.Writer, source Source) (sdkmetric.Exporter, error) {
	inner, err := stdoutmetric.New(stdoutmetric.WithWriter(w))
	if err != nil {
		return nil, fmt.Errorf("make console exporter: %w", err)
	}
	return console{inner, source}, nil
}

type console struct {
	sdkmetric.Exporter
	source Source
}

func (c console) Export(ctx context.Context, rm *metricdata.ResourceMetrics) error {
	fill(rm, takeUnitMetrics(rm), c.source.Last(), cumulative)
	leaveOutEarly(rm)
	return c.Exporter.Export(ctx, rm)
}
