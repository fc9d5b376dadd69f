package exporter

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// grpcWire sends over the connection of an otlpmetricgrpc exporter, with the
// headers that it would send.
type grpcWire struct {
	conn    *grpc.ClientConn
	method  string
	headers metadata.MD // the official exporter's
	own     *renewed[map[string]string]
	timeout time.Duration
}

// newGRPC makes the official gRPC exporter with a connection that stops requests
// made under withCapture.
func newGRPC(ctx context.Context, cfg Config) (sdkmetric.Exporter, error) {
	// gRPC's default is up to 120 s between attempts to connect: too long
	// after an outage that ended.
	dial := grpcbackoff.DefaultConfig
	dial.MaxDelay = 15 * time.Second
	opts := []otlpmetricgrpc.Option{
		otlpmetricgrpc.WithEndpoint(cfg.Endpoint),
		otlpmetricgrpc.WithRetry(otlpmetricgrpc.RetryConfig{Enabled: false}),
		otlpmetricgrpc.WithDialOption(
			grpc.WithChainUnaryInterceptor(captureUnary(newRenewed("headers", cfg.Headers, cfg.Logger))),
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
	if cfg.Insecure {
		opts = append(opts, otlpmetricgrpc.WithInsecure())
	} else {
		opts = append(opts, otlpmetricgrpc.WithTLSCredentials(newRenewedCredentials(newRenewed("TLS files", cfg.TLS, cfg.Logger))))
	}
	if cfg.Gzip {
		opts = append(opts, otlpmetricgrpc.WithCompressor("gzip"))
	}
	return otlpmetricgrpc.New(ctx, opts...)
}

// captureUnary is the interceptor on the official exporter's connection.
func captureUnary(own *renewed[map[string]string]) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		c := captureFrom(ctx)
		if c == nil {
			return invoke(ctx, method, req, reply, cc, opts...)
		}
		m, ok := req.(*colmetricpb.ExportMetricsServiceRequest)
		if !ok {
			return fmt.Errorf("capture request: %T is no metrics", req)
		}
		body, err := c.bulk.complete(m)
		if err != nil {
			return fmt.Errorf("capture request: %w", err)
		}
		md, _ := metadata.FromOutgoingContext(ctx)
		c.request = body
		c.wire = func(timeout time.Duration) wire {
			return &grpcWire{conn: cc, method: method, headers: md.Copy(), own: own, timeout: timeout}
		}
		c.target = cc.CanonicalTarget()
		return nil // the empty reply is a full success
	}
}

func (w *grpcWire) send(ctx context.Context, request []byte) answer {
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	headers := w.headers.Copy()
	for name, value := range w.own.get() {
		headers.Set(name, value)
	}
	ctx = metadata.NewOutgoingContext(ctx, headers)
	var reply colmetricpb.ExportMetricsServiceResponse
	var trailer metadata.MD
	err := w.conn.Invoke(ctx, w.method, request, &reply, grpc.ForceCodecV2(rawCodec{}), grpc.Trailer(&trailer))
	if err != nil {
		a := grpcAnswer(status.Convert(err))
		// What came with a trailer is the server's own answer. The state alone does
		// not tell: gRPC may set it to ready after the first call has come back.
		if a.verdict == transient && len(trailer) == 0 && w.conn.GetState() != connectivity.Ready {
			a.verdict, a.kind = unreachable, "connection"
		}
		// The server knows our deadline too and may be the first to end the
		// call, so that ctx does not tell.
		if status.Code(err) == codes.DeadlineExceeded && time.Since(begin) > w.timeout*9/10 {
			a.slow = true
			a.err = fmt.Errorf("%w (%w)", err, errRequestTimeout)
		}
		return a
	}
	partial := reply.GetPartialSuccess()
	return answer{verdict: accepted, rejected: partial.GetRejectedDataPoints(), message: partial.GetErrorMessage()}
}

// grpcAnswer sorts the status codes. Where the specification says only "not
// retryable" the data is not thrown away at once: a collector answers
// Unauthenticated for a wrong token and Internal for a backend's hiccup.
func grpcAnswer(s *status.Status) answer {
	a := answer{kind: s.Code().String(), err: s.Err()}
	asked := false
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			asked = true
			a.after = max(info.GetRetryDelay().AsDuration(), 0)
		}
	}
	switch s.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Aborted, codes.OutOfRange, codes.DataLoss:
		a.verdict = transient
	case codes.ResourceExhausted:
		// With RetryInfo it is a throttle, without it is the message limit of
		// the server (grpc-go answers so itself).
		a.verdict = tooLarge
		if asked {
			a.verdict = transient
		}
	case codes.Unauthenticated, codes.PermissionDenied, codes.Unimplemented, codes.NotFound:
		a.verdict = misconfigured
	case codes.InvalidArgument:
		a.verdict, a.tries = suspect, dataTries
	default: // Internal, Unknown, FailedPrecondition, AlreadyExists
		a.verdict, a.tries = suspect, doubtTries
		// A proxy in front has a limit of its own, nginx of 1 MiB. grpc-go has
		// only a text for that.
		if a.says("HTTP status code received from server: 413") {
			a.verdict, a.tries = tooLarge, 0
		}
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
