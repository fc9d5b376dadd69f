package exporter

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// capture receives a request that an official exporter was about to send.
type capture struct {
	bulk    bulk // to be put into the request
	request []byte
	target  string // where it would have gone, for logs; without secrets
	// wire makes the wire that sends as the exporter would have done.
	wire func(timeout time.Duration) wire
}

type captureKey struct{}

func captureFrom(ctx context.Context) *capture {
	c, _ := ctx.Value(captureKey{}).(*capture)
	return c
}

// encode has the official exporter build the request for rm, and stops it before
// the network. It takes the points of the unit instruments out of rm. The error
// may come with a request: some metrics could not be encoded, and the request has
// the others.
func (e *encoder) encode(ctx context.Context, rm *metricdata.ResourceMetrics) (*capture, error) {
	// The exporter gives up on a context that has ended, though there is
	// nothing to wait for: a cycle that was collected must not be lost so late.
	ctx = context.WithoutCancel(ctx)
	c := &capture{bulk: e.takeBulk(rm)}
	err := e.official.Export(context.WithValue(ctx, captureKey{}, c), rm)
	if err == nil && c.wire == nil {
		err = errors.New("the official exporter sent nothing")
	}
	return c, err
}
