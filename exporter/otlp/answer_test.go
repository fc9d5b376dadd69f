package otlp

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
	want := map[codes.Code]Verdict{
		codes.Canceled: Transient, codes.Unknown: Doubtful, codes.InvalidArgument: Suspect, codes.DeadlineExceeded: Transient,
		codes.NotFound: Misconfigured, codes.AlreadyExists: Misconfigured, codes.PermissionDenied: Misconfigured,
		codes.ResourceExhausted: Transient, codes.FailedPrecondition: Misconfigured, codes.Aborted: Transient,
		codes.OutOfRange: Transient, codes.Unimplemented: Misconfigured, codes.Internal: Doubtful,
		codes.Unavailable: Transient, codes.DataLoss: Transient, codes.Unauthenticated: Misconfigured, codes.Code(99): Misconfigured,
	}
	for code, v := range want {
		a := GRPCAnswer(status.New(code, "why"))
		if a.Verdict != v || a.Err == nil || a.Kind == "" || a.After != 0 {
			t.Errorf("%v: %+v, want %v", code, a, v)
		}
		asked, err := status.New(code, "why").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(7 * time.Second)})
		if err != nil {
			t.Fatal(err)
		}
		if a := GRPCAnswer(asked); a.Verdict != v || a.After != 7*time.Second {
			t.Errorf("%v with RetryInfo: %+v, want %v", code, a, v)
		}
	}
}

// The first is grpc-go's, the second Envoy's.
func TestGRPCSizes(t *testing.T) {
	for text, want := range map[string]Verdict{
		"grpc: received message larger than max (5242880 vs. 4194304)": TooLarge,
		"message too large": TooLarge, "ingestion rate limit exceeded": Transient, "quota": Transient,
	} {
		if a := GRPCAnswer(status.New(codes.ResourceExhausted, text)); a.Verdict != want {
			t.Errorf("%s: %v, want %v", text, a.Verdict, want)
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
	c, err := Open(t.Context(), to("http://"+ln.Addr().String(), Config{}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	var server *grpc.Server
	server = grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		go server.GracefulStop()
		c.caller.(*grpcCaller).conn.WaitForStateChange(stream.Context(), connectivity.Ready)
		return status.Error(codes.Unavailable, "going away")
	}))
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ln) }()
	if a := c.Send(t.Context(), c.empty); a.Verdict != Transient || a.Kind != codes.Unavailable.String() || !a.says("going away") {
		t.Errorf("%v, %s: %v", a.Verdict, a.Kind, a.Err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// What grpc-go 1.83 makes of nginx's answer to a message above client_max_body_size.
func TestGRPCThroughAProxy(t *testing.T) {
	for text, want := range map[string]Verdict{
		`unexpected HTTP status code received from server: 413 (Request Entity Too Large); transport: received unexpected content-type "text/html"`: TooLarge,
		`unexpected HTTP status code received from server: 500 (Internal Server Error); transport: received unexpected content-type "text/html"`:    Misconfigured,
	} {
		if a := GRPCAnswer(status.New(codes.Unknown, text)); a.Verdict != want {
			t.Errorf("%s: %+v", text, a)
		}
	}
	// It makes Unavailable of 429, 502, 503 and 504.
	if a := GRPCAnswer(status.New(codes.Unavailable, "unexpected HTTP status code received from server: 502 (Bad Gateway)")); a.Verdict != Transient {
		t.Errorf("502: %+v", a)
	}
}

func TestHTTPAnswers(t *testing.T) {
	want := map[int]Verdict{
		200: Accepted, 202: Accepted, 204: Accepted, 301: Misconfigured, 302: Misconfigured, 307: Misconfigured,
		400: Suspect, 408: Transient, 413: TooLarge, 422: Suspect, 425: Transient, 429: Transient, 501: Misconfigured,
		500: Doubtful, 502: Transient, 503: Transient, 504: Transient, 505: Transient, 520: Transient, 530: Transient,
	}
	for _, door := range []int{401, 402, 403, 404, 405, 406, 407, 410, 411, 415, 421, 423, 426, 428, 431, 451, 464} {
		want[door] = Misconfigured
	}
	for code, v := range want {
		resp := &http.Response{StatusCode: code, Status: http.StatusText(code), Header: http.Header{"Content-Type": {"text/plain"}, "Retry-After": {"9"}}}
		a := HTTPAnswer(resp, []byte("why"), time.Now())
		if a.Verdict != v {
			t.Errorf("%d: %+v, want %v", code, a, v)
		}
		if v != Accepted && (a.After != 9*time.Second || !strings.Contains(a.Err.Error(), "why")) {
			t.Errorf("%d: %+v", code, a)
		}
	}
}

// Some answers of 400 are not about the data. These are the words of a Collector
// 0.155, of Go's TLS server, and of nginx.
func TestBadRequests(t *testing.T) {
	for text, want := range map[string]Verdict{
		"http: request body too large":                                                            TooLarge,
		"Client sent an HTTP request to an HTTPS server.\n":                                       Misconfigured,
		"<html>\r\n<head><title>400 The plain HTTP request was sent to HTTPS port</title></head>": Misconfigured,
		"<html>\r\n<head><title>400 No required SSL certificate was sent</title></head>":          Misconfigured,
		"<html>\r\n<head><title>400 Request Header Or Cookie Too Large</title></head>":            Misconfigured,
		"out of bounds": Suspect,
	} {
		resp := &http.Response{StatusCode: 400, Status: "400 Bad Request", Header: http.Header{}}
		if a := HTTPAnswer(resp, []byte(text), time.Now()); a.Verdict != want {
			t.Errorf("%s: %v, want %v", text, a.Verdict, want)
		}
	}
}

// Points that are too new are taken later, so the request is not to blame. The words
// are those of Prometheus 3.16 (the first two), Mimir and Cortex.
func TestPointsOfATimeToCome(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		text  string
		ahead time.Duration // of the receiver's clock; no Date without
		want  Verdict
		hint  string
	}{
		{"out of bounds: timestamp is too far in the future", 2 * time.Hour, Doubtful, "this host (timedatectl), which is 2h0m0s ahead"},
		{"out of bounds", 2 * time.Hour, Doubtful, "2h0m0s ahead"},
		{"out of bounds", time.Second, Suspect, "out_of_order_time_window"},
		{"out of bounds", -time.Hour, Suspect, "out_of_order_time_window"},
		{"out of bounds", 0, Suspect, "out_of_order_time_window"},
		{"received a sample whose timestamp is too far in the future (err-mimir-too-far-in-future)", 0, Doubtful, "compare the clocks"},
		{"timestamp too new: 1795435200000", 0, Doubtful, "compare the clocks"},
		{"invalid label name", 2 * time.Hour, Suspect, "the receiver's log"},
	} {
		resp := &http.Response{StatusCode: 400, Status: "400 Bad Request", Header: http.Header{}}
		if test.ahead != 0 {
			resp.Header.Set("Date", now.Add(-test.ahead).Format(http.TimeFormat))
		}
		a := HTTPAnswer(resp, []byte(test.text), now)
		if a.Verdict != test.want || !strings.Contains(a.Hint(), test.hint) {
			t.Errorf("%s, %v ahead: %v, want %v; %s", test.text, test.ahead, a.Verdict, test.want, a.Hint())
		}
		if test.ahead != 0 {
			continue
		}
		if a := GRPCAnswer(status.New(codes.InvalidArgument, test.text)); a.Verdict != test.want {
			t.Errorf("gRPC, %s: %v, want %v", test.text, a.Verdict, test.want)
		}
	}
}

// A login portal, or a web application, has a page for every path.
func TestSuccess(t *testing.T) {
	for name, test := range map[string]struct {
		contentType, body string
		verdict           Verdict
		rejected          int64
	}{
		"empty":        {"", "", Accepted, 0},
		"JSON":         {"application/json", `{"partialSuccess":{"rejectedDataPoints":"3","errorMessage":"old"},"x":1}`, Accepted, 3},
		"plain":        {"text/plain", "OK", Accepted, 0},
		"page":         {"text/html; charset=utf-8", "<!doctype html><title>Log in</title>", Misconfigured, 0},
		"nameless":     {"", "\n<html>", Misconfigured, 0},
		"page no body": {"text/html", "", Misconfigured, 0},
	} {
		resp := &http.Response{StatusCode: 200, Status: "200 OK", Header: http.Header{"Content-Type": {test.contentType}}}
		if a := HTTPAnswer(resp, []byte(test.body), time.Now()); a.Verdict != test.verdict || a.Rejected != test.rejected || (a.Err == nil) != (a.Verdict == Accepted) {
			t.Errorf("%s: %+v", name, a)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "0": 0, "7": 7 * time.Second, "-7": 0, "7.5": 0, "soon": 0, "99999999999999999999": 0,
		"9000000000000000000":           MaxAsked,
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
		a := Answer{Verdict: Unreachable, Err: errorString(text)}
		if !strings.Contains(a.Hint(), want) {
			t.Errorf("hint for %q: %s", text, a.Hint())
		}
	}
	if h := (Answer{Verdict: Suspect, Kind: "HTTP 413", Err: errorString("413 Request Entity Too Large")}).Hint(); !strings.Contains(h, "limit") {
		t.Errorf("hint for a limit: %s", h)
	}
	if h := (Answer{Verdict: Misconfigured, Err: errorString("401")}).Hint(); !strings.Contains(h, "OTEL_EXPORTER_OTLP_HEADERS") {
		t.Errorf("hint for a refused client: %s", h)
	}
	for _, text := range []string{"HTTP 400: out of bounds", "out of order sample", "too old sample"} { // Prometheus 3.16
		if h := (Answer{Verdict: Suspect, Err: errorString(text)}).Hint(); !strings.Contains(h, "out_of_order_time_window") {
			t.Errorf("hint for points that are too old: %s", h)
		}
	}
}

type errorString string

func (e errorString) Error() string { return string(e) }
