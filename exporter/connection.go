package exporter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// Fields of a Config that are empty mean these, which are the specification's.
const (
	DefaultProtocol    = "grpc"
	DefaultTemporality = "cumulative"
	DefaultTimeout     = 10 * time.Second
)

// connection is one official exporter, which encodes, and the wire over which
// its requests go.
type connection struct {
	encoder
	client *http.Client // nil with gRPC
	wire   wire
	target string // for logs; without secrets
	empty  []byte // a request without metrics
}

// open makes the connection that cfg describes. It does not wait for anybody to
// answer.
func open(ctx context.Context, cfg Config) (*connection, error) {
	var c connection
	var err error
	if cfg.Endpoint == "" {
		return nil, errors.New("make OTLP exporter: it has no endpoint; set OTEL_EXPORTER_OTLP_ENDPOINT")
	}
	switch cmp.Or(cfg.Protocol, DefaultProtocol) {
	case "grpc":
		c.official, err = newGRPC(ctx, cfg)
	case "http/protobuf":
		c.official, c.client, err = newHTTP(ctx, cfg)
	default:
		return nil, fmt.Errorf("make exporter: unknown protocol %q; set OTEL_EXPORTER_OTLP_PROTOCOL to grpc or http/protobuf", cfg.Protocol)
	}
	if err != nil {
		return nil, fmt.Errorf("make OTLP exporter: %w; check OTEL_EXPORTER_OTLP_ENDPOINT=%q and the TLS settings beside it", err, cfg.Endpoint)
	}
	// An empty request brings the connection and the headers out before the
	// first cycle, so that a backlog need not wait for it.
	first, err := c.encode(ctx, &metricdata.ResourceMetrics{})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make OTLP exporter: %w", err), c.close(ctx))
	}
	c.wire, c.target, c.empty = first.wire(cmp.Or(cfg.Timeout, DefaultTimeout)), first.target, first.request
	return &c, nil
}

// close closes the connection, also when ctx has ended.
func (c *connection) close(ctx context.Context) error {
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	if err := c.official.Shutdown(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("close OTLP exporter: %w", err)
	}
	return nil
}

// Probe sends one request without metrics, as an Exporter with cfg would send
// its own: over a connection with the same settings, in one attempt. A receiver
// answers it as it would any other, and stores nothing. The source, the ledger
// and the outbox of cfg are not used.
//
// An error that is the receiver's answer wraps a gRPC status
// (google.golang.org/grpc/status) or a [*StatusError].
func Probe(ctx context.Context, cfg Config) error {
	c, err := open(ctx, cfg)
	if err != nil {
		return err
	}
	a := c.wire.send(ctx, c.empty)
	return errors.Join(a.err, c.close(ctx))
}
