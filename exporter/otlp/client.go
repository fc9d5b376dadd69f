package otlp

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/protobuf/proto"
)

// Config tells a Client where to send and how. The caller has read
// OTEL_EXPORTER_OTLP_*: the client takes nothing from there but the form of
// histograms, and the headers where Headers is nil.
type Config struct {
	// Protocol is "grpc" or "http/protobuf". Default: DefaultProtocol.
	Protocol string
	// Endpoint is a gRPC target ("host:port", "unix:/path") or, for HTTP, the
	// whole URL. Needed.
	Endpoint string
	// Insecure says that the connection to Endpoint has no TLS. HTTP has it in
	// the URL.
	Insecure bool
	// TLS returns the roots to trust and the client's certificate. It is asked
	// before each connection, and answers with the same pointer as long as nothing
	// has changed. With an error come the settings of before. It must be safe for
	// concurrent use. Default: the system's roots, and no client certificate.
	TLS func() (*tls.Config, error)
	// Gzip compresses requests.
	Gzip bool
	// Timeout bounds one call. Default: DefaultTimeout.
	Timeout time.Duration
	// Headers returns the headers of the next request, instead of those of
	// OTEL_EXPORTER_OTLP_HEADERS. With an error come those of before. It must be
	// safe for concurrent use. Default: those of the variable.
	Headers func() (map[string]string, error)
	// Specific has the variables for metrics only that are set, by the names of the
	// general ones, which do not count then. Default: none.
	Specific map[string]string
	// ProxyVariable names the variable with the proxy that requests go through. Default:
	// none. It is for hints: net/http and gRPC read the variable themselves.
	ProxyVariable string
	// Logger gets changes of state. Default: none.
	Logger *slog.Logger
}

// Deciding returns a hint with the names of the variables that decide.
func (cfg Config) Deciding(hint string) string {
	for general, specific := range cfg.Specific {
		hint = strings.ReplaceAll(hint, general, specific)
	}
	if hint != "" && cfg.ProxyVariable != "" {
		hint += fmt.Sprintf("; requests go through the proxy in %s: check it as well, or add the endpoint's host to NO_PROXY", cfg.ProxyVariable)
	}
	return hint
}

// Fields of a Config that are empty mean these, which are the specification's.
const (
	DefaultProtocol = "grpc"
	DefaultTimeout  = 10 * time.Second
)

// Client encodes and delivers requests. Encode takes one call at a time; Send is
// safe for concurrent use.
type Client struct {
	official sdkmetric.Exporter
	http     *http.Client // nil with gRPC
	caller   caller
	target   string // for logs; without secrets
	deciding func(hint string) string
	empty    []byte       // a request without metrics
	refusals atomic.Int64 // in a row
}

// reconnectAfter is how many refusals in a row make a new connection, and that often
// again. A name that has another address by now is not looked up before.
const reconnectAfter = 3

// caller makes single calls. It is safe for concurrent use.
type caller interface {
	send(ctx context.Context, request []byte) Answer
	// reconnect closes the connection, so that the next call makes another one.
	reconnect()
}

// Open makes the client that cfg describes. It does not wait for anybody to
// answer.
func Open(ctx context.Context, cfg Config) (*Client, error) {
	if cfg.Endpoint == "" {
		return nil, errors.New("make OTLP exporter: it has no endpoint; set OTEL_EXPORTER_OTLP_ENDPOINT")
	}
	cfg.Timeout = cmp.Or(cfg.Timeout, DefaultTimeout)
	c := &Client{deciding: cfg.Deciding}
	var err error
	switch cmp.Or(cfg.Protocol, DefaultProtocol) {
	case "grpc":
		c.official, err = newGRPC(ctx, cfg)
	case "http/protobuf":
		c.official, c.http, err = newHTTP(ctx, cfg)
	default:
		return nil, fmt.Errorf("make exporter: unknown protocol %q; set OTEL_EXPORTER_OTLP_PROTOCOL to grpc or http/protobuf", cfg.Protocol)
	}
	if err != nil {
		return nil, fmt.Errorf("make OTLP exporter: %w; check OTEL_EXPORTER_OTLP_ENDPOINT=%q and the TLS settings beside it", err, cfg.Endpoint)
	}
	// An empty request brings the connection and the headers out before the
	// first cycle, so that a backlog need not wait for it.
	first, err := c.capture(ctx, &metricdata.ResourceMetrics{}, nil)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make OTLP exporter: %w", err), c.Close(ctx))
	}
	c.caller, c.target, c.empty = first.caller, first.target, first.request
	return c, nil
}

// Probe sends one request without metrics, as a Client with cfg would send its
// own: over a connection with the same settings, in one attempt. A receiver
// answers it as it would any other, and stores nothing.
//
// An error that is the receiver's answer wraps a gRPC status
// (google.golang.org/grpc/status) or a [*StatusError].
func Probe(ctx context.Context, cfg Config) error {
	c, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	return errors.Join(c.Send(ctx, c.empty).Err, c.Close(ctx))
}

// Send makes one attempt to deliver a request and returns when it is answered,
// failed, or timed out. Refusals in a row make a new connection, which may end
// another call in progress.
func (c *Client) Send(ctx context.Context, request []byte) Answer {
	a := c.caller.send(ctx, request)
	switch {
	case a.Verdict == Accepted, a.Verdict == TooLarge: // the right receiver
		c.refusals.Store(0)
	case c.refusals.Add(1)%reconnectAfter == 0:
		c.caller.reconnect()
	}
	return a
}

// Target is where requests go, for logs.
func (c *Client) Target() string { return c.target }

// Hint is the next step after an answer, for a person who reads the log.
func (c *Client) Hint(a Answer) string { return c.deciding(a.Hint()) }

// Aggregation is that of the official exporter: it follows
// OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION.
func (c *Client) Aggregation(kind sdkmetric.InstrumentKind) sdkmetric.Aggregation {
	return c.official.Aggregation(kind)
}

// Close closes the connection, also when ctx has ended.
func (c *Client) Close(ctx context.Context) error {
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
	if err := c.official.Shutdown(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("close OTLP exporter: %w", err)
	}
	return nil
}

// Encode has the official exporter build the request for rm, and takes it before the
// network. It adds points to metrics of their name without any. It returns the number
// of data points in the request. An error may come with a request, which then has the
// metrics that could be encoded.
func (c *Client) Encode(ctx context.Context, rm *metricdata.ResourceMetrics, points map[string]*Points) (request []byte, n int, err error) {
	made, err := c.capture(ctx, rm, points)
	return made.request, made.points, err
}

// capture receives a request that an official exporter was about to send.
type capture struct {
	bulk    map[string]*Points // to be put into the request
	request []byte
	points  int    // in request
	target  string // where it would have gone
	caller  caller // sends as the exporter would have done
}

type captureKey struct{}

func captureFrom(ctx context.Context) *capture {
	c, _ := ctx.Value(captureKey{}).(*capture)
	return c
}

func (c *Client) capture(ctx context.Context, rm *metricdata.ResourceMetrics, bulk map[string]*Points) (*capture, error) {
	// The exporter gives up on a context that has ended, though there is
	// nothing to wait for: a cycle that was collected must not be lost so late.
	ctx = context.WithoutCancel(ctx)
	made := &capture{bulk: bulk}
	err := c.official.Export(context.WithValue(ctx, captureKey{}, made), rm)
	if err == nil && made.caller == nil {
		err = errors.New("the official exporter sent nothing")
	}
	return made, err
}

// complete serializes the request, with the points in it. They are nearly all of
// it, and the official exporter makes ten objects for each, so that it builds the
// request without them. TestPoints compares the result with its own.
func (c *capture) complete(request *colmetricpb.ExportMetricsServiceRequest) (err error) {
	c.points = pointsIn(request)
	left := len(c.bulk)
	for _, rm := range request.ResourceMetrics {
		for _, sm := range rm.ScopeMetrics {
			for _, m := range sm.Metrics {
				if p := c.bulk[m.Name]; p != nil && m.GetSum() != nil && len(m.GetSum().DataPoints) == 0 {
					// What a message does not know it writes as it is, behind its
					// own fields. A reader finds a field that it knows.
					m.GetSum().ProtoReflect().SetUnknown(p.encoded)
					c.points += p.n
					left--
				}
			}
		}
	}
	if left != 0 {
		return errors.New("put the points into the request: the official exporter left out their metric")
	}
	c.request, err = proto.Marshal(request)
	return err
}
