package otlp

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// grpcCaller sends over the connection of an otlpmetricgrpc exporter, with the
// headers that it would send.
type grpcCaller struct {
	conn    *grpc.ClientConn
	open    *openConns
	method  string
	headers metadata.MD // the official exporter's
	own     *renewed[map[string]string]
	timeout time.Duration
}

// newGRPC makes the official gRPC exporter with a connection that stops the
// requests of Client.capture.
func newGRPC(ctx context.Context, cfg Config) (sdkmetric.Exporter, error) {
	// gRPC's default is up to 120 s between attempts to connect: too long
	// after an outage that ended.
	dial := grpcbackoff.DefaultConfig
	dial.MaxDelay = 15 * time.Second
	security, open := insecure.NewCredentials(), &openConns{}
	if !cfg.Insecure {
		security = newRenewedCredentials(newRenewed("TLS files", cfg.TLS, cfg.Logger))
	}
	opts := []otlpmetricgrpc.Option{
		otlpmetricgrpc.WithEndpoint(cfg.Endpoint),
		otlpmetricgrpc.WithRetry(otlpmetricgrpc.RetryConfig{Enabled: false}),
		otlpmetricgrpc.WithTLSCredentials(trackedCredentials{security, open}),
		otlpmetricgrpc.WithDialOption(
			grpc.WithChainUnaryInterceptor(captureUnary(cfg.Timeout, newRenewed("headers", cfg.Headers, cfg.Logger), open)),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: dial, MinConnectTimeout: 20 * time.Second}),
			// Timeout is TCP_USER_TIMEOUT: a connection on which nothing comes
			// through is made anew. Otherwise TCP would try again after up to
			// two minutes when a link is back. No pings are wanted, which many
			// servers punish; Time is longer than any call.
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Hour, Timeout: 20 * time.Second}),
		),
	}
	if cfg.Headers != nil {
		opts = append(opts, otlpmetricgrpc.WithHeaders(map[string]string{})) // the wire adds them
	}
	if cfg.Gzip {
		opts = append(opts, otlpmetricgrpc.WithCompressor("gzip"))
	}
	return otlpmetricgrpc.New(ctx, opts...)
}

// captureUnary is the interceptor on the official exporter's connection.
func captureUnary(timeout time.Duration, own *renewed[map[string]string], open *openConns) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		c := captureFrom(ctx)
		if c == nil {
			return invoke(ctx, method, req, reply, cc, opts...)
		}
		m, ok := req.(*colmetricpb.ExportMetricsServiceRequest)
		if !ok {
			return fmt.Errorf("capture request: %T is no metrics", req)
		}
		if err := c.complete(m); err != nil {
			return fmt.Errorf("capture request: %w", err)
		}
		md, _ := metadata.FromOutgoingContext(ctx)
		c.target = cc.CanonicalTarget()
		c.caller = &grpcCaller{conn: cc, open: open, method: method, headers: md.Copy(), own: own, timeout: timeout}
		return nil // the empty reply is a full success
	}
}

func (c *grpcCaller) send(ctx context.Context, request []byte) Answer {
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	headers := c.headers.Copy()
	for name, value := range c.own.get() {
		headers.Set(name, value)
	}
	ctx = metadata.NewOutgoingContext(ctx, headers)
	var reply colmetricpb.ExportMetricsServiceResponse
	var trailer metadata.MD
	err := c.conn.Invoke(ctx, c.method, request, &reply, grpc.ForceCodecV2(rawCodec{}), grpc.Trailer(&trailer))
	if err != nil {
		a := GRPCAnswer(status.Convert(err))
		// What came with a trailer is the server's own answer. The state alone does
		// not tell: gRPC may set it to ready after the first call has come back.
		if a.Verdict == Transient && len(trailer) == 0 && c.conn.GetState() != connectivity.Ready {
			a.Verdict, a.Kind = Unreachable, "connection"
		}
		// The server knows our deadline too and may be the first to end the
		// call, so that ctx does not tell.
		if status.Code(err) == codes.DeadlineExceeded && time.Since(begin) > c.timeout*9/10 {
			a.Slow = true
			a.Err = fmt.Errorf("%w (%w)", err, ErrTimeout)
		}
		return a
	}
	partial := reply.GetPartialSuccess()
	return Answer{Verdict: Accepted, Rejected: partial.GetRejectedDataPoints(), Message: partial.GetErrorMessage()}
}

// reconnect implements caller. A ClientConn that loses its connection looks the name
// up again, at most every 30 s.
func (c *grpcCaller) reconnect() { c.open.close() }

// openConns are the open connections of a ClientConn, which closes none by itself.
// It is safe for concurrent use.
type openConns struct {
	mu    sync.Mutex
	conns map[*trackedConn]struct{}
}

func (o *openConns) add(conn net.Conn) net.Conn {
	c := &trackedConn{conn, o}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.conns == nil {
		o.conns = map[*trackedConn]struct{}{}
	}
	o.conns[c] = struct{}{}
	return c
}

func (o *openConns) close() {
	o.mu.Lock()
	conns := slices.Collect(maps.Keys(o.conns))
	o.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// trackedConn leaves openConns when it is closed.
type trackedConn struct {
	net.Conn
	open *openConns
}

func (c *trackedConn) Close() error {
	c.open.mu.Lock()
	delete(c.open.conns, c)
	c.open.mu.Unlock()
	return c.Conn.Close()
}

// trackedCredentials see each connection of gRPC, which has no other place for
// that: a dialer of our own would leave out the proxy.
type trackedCredentials struct {
	credentials.TransportCredentials
	open *openConns
}

// ClientHandshake implements credentials.TransportCredentials.
func (t trackedCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return conn, info, err
	}
	return t.open.add(conn), info, nil
}

// Clone implements credentials.TransportCredentials.
func (t trackedCredentials) Clone() credentials.TransportCredentials {
	return trackedCredentials{t.TransportCredentials.Clone(), t.open}
}

// GRPCAnswer classifies the status codes. Only InvalidArgument can blame the data. All
// other codes also come from proxies before the receiver, from a receiver whose backend
// fails (Internal), or from one that does not know the token (Unauthenticated). grpc-go
// turns a proxy's answer in HTML into Unknown.
func GRPCAnswer(s *status.Status) Answer {
	a := Answer{Kind: s.Code().String(), Err: s.Err(), Verdict: Misconfigured}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			a.After = max(info.GetRetryDelay().AsDuration(), 0)
		}
	}
	switch s.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Aborted, codes.OutOfRange, codes.DataLoss:
		a.Verdict = Transient
	case codes.Internal, codes.Unknown:
		a.Verdict = Doubtful
	case codes.ResourceExhausted: // throttling, or the message limit of the server
		a.Verdict = Transient
		if a.aboutSize() {
			a.Verdict = TooLarge
		}
	case codes.InvalidArgument:
		switch {
		case a.aboutSize():
			a.Verdict = TooLarge
		case a.tooNew():
			a.Verdict = Doubtful
		default:
			a.Verdict = Suspect
		}
	}
	// A proxy in front has a limit of its own, nginx of 1 MiB. grpc-go has only a
	// text for that.
	switch {
	case a.says("HTTP status code received from server: 413"):
		a.Verdict = TooLarge
	case a.Verdict != Transient && a.says("HTTP status code received from server"):
		a.Verdict = Misconfigured
	}
	return a
}

// rawCodec sends bytes that are already serialized. Its name is that of the
// protobuf codec, so that the call looks the same on the wire.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("marshal request: %T is not serialized", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("unmarshal response: %T is no protobuf message", v)
	}
	return proto.Unmarshal(data.Materialize(), m)
}
