package exporter

import (
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestGRPCAnswers(t *testing.T) {
	want := map[codes.Code]verdict{
		codes.Canceled: transient, codes.Unknown: suspect, codes.InvalidArgument: suspect, codes.DeadlineExceeded: transient,
		codes.NotFound: misconfigured, codes.AlreadyExists: suspect, codes.PermissionDenied: misconfigured,
		codes.ResourceExhausted: tooLarge, codes.FailedPrecondition: suspect, codes.Aborted: transient,
		codes.OutOfRange: transient, codes.Unimplemented: misconfigured, codes.Internal: suspect,
		codes.Unavailable: transient, codes.DataLoss: transient, codes.Unauthenticated: misconfigured, codes.Code(99): suspect,
	}
	for code, v := range want {
		a := grpcAnswer(status.New(code, "why"))
		if a.verdict != v || a.err == nil || a.kind == "" || a.after != 0 || (v == suspect) != (a.tries > 0) {
			t.Errorf("%v: %+v, want %v", code, a, v)
		}
		asked, err := status.New(code, "why").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(7 * time.Second)})
		if err != nil {
			t.Fatal(err)
		}
		if v == tooLarge {
			v = transient // a throttle
		}
		if a := grpcAnswer(asked); a.verdict != v || a.after != 7*time.Second {
			t.Errorf("%v with RetryInfo: %+v, want %v", code, a, v)
		}
	}
}

// Unavailable is the server's own answer, whatever state gRPC has the connection
// in when the answer comes.
func TestGRPCAnswerOnAnEndingConnection(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := open(t.Context(), to("http://"+ln.Addr().String(), Config{}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.close(t.Context())
	var server *grpc.Server
	server = grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		go server.GracefulStop()
		c.wire.(*grpcWire).conn.WaitForStateChange(stream.Context(), connectivity.Ready)
		return status.Error(codes.Unavailable, "going away")
	}))
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ln) }()
	if a := c.wire.send(t.Context(), c.empty); a.verdict != transient || a.kind != codes.Unavailable.String() || !a.says("going away") {
		t.Errorf("%v, %s: %v", a.verdict, a.kind, a.err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// What grpc-go 1.83 makes of nginx's answer to a message above client_max_body_size.
func TestGRPCThroughAProxy(t *testing.T) {
	for text, want := range map[string]verdict{
		`unexpected HTTP status code received from server: 413 (Request Entity Too Large); transport: received unexpected content-type "text/html"`: tooLarge,
		`unexpected HTTP status code received from server: 500 (Internal Server Error); transport: received unexpected content-type "text/html"`:    suspect,
	} {
		if a := grpcAnswer(status.New(codes.Unknown, text)); a.verdict != want || (want == suspect) != (a.tries > 0) {
			t.Errorf("%s: %+v", text, a)
		}
	}
}

func TestHTTPAnswers(t *testing.T) {
	want := map[int]verdict{
		200: accepted, 202: accepted, 204: accepted, 301: misconfigured, 302: misconfigured, 307: misconfigured,
		400: suspect, 401: misconfigured, 403: misconfigured, 404: misconfigured, 405: misconfigured, 407: misconfigured, 408: transient,
		413: tooLarge, 415: misconfigured, 422: suspect, 429: transient, 500: suspect, 501: misconfigured, 502: transient, 503: transient, 504: transient, 505: suspect,
	}
	for code, v := range want {
		resp := &http.Response{StatusCode: code, Status: http.StatusText(code), Header: http.Header{"Content-Type": {"text/plain"}, "Retry-After": {"9"}}}
		a := httpAnswer(resp, []byte("why"), time.Now())
		if a.verdict != v || (v == suspect) != (a.tries > 0) {
			t.Errorf("%d: %+v, want %v", code, a, v)
		}
		if v != accepted && (a.after != 9*time.Second || !strings.Contains(a.err.Error(), "why")) {
			t.Errorf("%d: %+v", code, a)
		}
	}
}

// Some answers of 400 are not about the data. These are the words of a Collector
// 0.155, of Go's TLS server, and of nginx.
func TestBadRequests(t *testing.T) {
	for text, want := range map[string]verdict{
		"http: request body too large":                                                            tooLarge,
		"Client sent an HTTP request to an HTTPS server.\n":                                       misconfigured,
		"<html>\r\n<head><title>400 The plain HTTP request was sent to HTTPS port</title></head>": misconfigured,
		"out of bounds": suspect,
	} {
		resp := &http.Response{StatusCode: 400, Status: "400 Bad Request", Header: http.Header{}}
		if a := httpAnswer(resp, []byte(text), time.Now()); a.verdict != want {
			t.Errorf("%s: %v, want %v", text, a.verdict, want)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "0": 0, "7": 7 * time.Second, "-7": 0, "7.5": 0, "soon": 0, "99999999999999999999": 0,
		"9000000000000000000":           maxAsked,
		"Mon, 23 Nov 2026 12:00:30 GMT": 30 * time.Second,
		"Mon, 23 Nov 2026 11:00:00 GMT": 0,
	} {
		if got := retryAfter(value, now); got != want {
			t.Errorf("Retry-After: %q is %v, want %v", value, got, want)
		}
	}
}

func TestHintsNameTheVariable(t *testing.T) {
	for text, want := range map[string]string{
		"x509: certificate signed by unknown authority": "OTEL_EXPORTER_OTLP_CERTIFICATE",
		"connection refused":                            "OTEL_EXPORTER_OTLP_ENDPOINT",
		// What the receiver without TLS is called by gRPC, and by net/http.
		"authentication handshake failed: tls: first record does not look like a TLS handshake": "write http:// in front of OTEL_EXPORTER_OTLP_ENDPOINT",
		"http: server gave HTTP response to HTTPS client":                                       "write http:// in front of OTEL_EXPORTER_OTLP_ENDPOINT",
	} {
		a := answer{verdict: unreachable, err: errorString(text)}
		if !strings.Contains(a.hint(), want) {
			t.Errorf("hint for %q: %s", text, a.hint())
		}
	}
	if h := (answer{verdict: misconfigured, err: errorString("401")}).hint(); !strings.Contains(h, "OTEL_EXPORTER_OTLP_HEADERS") {
		t.Errorf("hint for a refused client: %s", h)
	}
	for _, text := range []string{"HTTP 400: out of bounds", "out of order sample", "too old sample"} { // Prometheus 3.16
		if h := (answer{verdict: suspect, err: errorString(text)}).hint(); !strings.Contains(h, "out_of_order_time_window") {
			t.Errorf("hint for points that are too old: %s", h)
		}
	}
}

type errorString string

func (e errorString) Error() string { return string(e) }
