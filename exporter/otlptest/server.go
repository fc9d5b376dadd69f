// Package otlptest is test support: an OTLP metrics receiver on localhost, over
// gRPC or HTTP, that answers as it is told and keeps what it got.
package otlptest

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/encoding/gzip" // the server takes gzip, as a Collector does
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Answer is what the server does with one request. The zero value accepts it.
type Answer struct {
	// Code is the gRPC status. Over HTTP it becomes the status of the OTLP
	// specification for it, unless HTTPStatus is set.
	Code codes.Code
	// HTTPStatus is the status over HTTP; 0 means by Code.
	HTTPStatus int
	// Header is added to the answer over HTTP.
	Header map[string]string
	// Message is the error's text, or the partial success's.
	Message string
	// RetryAfter asks the client to wait: RetryInfo, or Retry-After in whole
	// seconds. 0 means that nothing is asked.
	RetryAfter time.Duration
	// Rejected makes an accepted request a partial success.
	Rejected int64
	// Delay is how long the answer takes. There is none if the client gives
	// up before that.
	Delay time.Duration
	// Hangup closes the client's connection in place of an answer.
	Hangup bool
}

// Request is one request that the server has read.
type Request struct {
	Metrics *colmetricpb.ExportMetricsServiceRequest
	// Header has the metadata or header fields, with names in lower case.
	Header map[string]string
	// Encoding is the compression on the wire: "gzip" or "".
	Encoding string
	// Size is the number of bytes of the serialized request.
	Size int
	// Answer is what it was answered with.
	Answer Answer
	// GaveUp says that the client did not wait for the answer.
	GaveUp bool
	// ClientCert is the common name of the client's certificate.
	ClientCert string
}

// Accepted says whether the client was told that the request arrived.
func (r Request) Accepted() bool {
	return r.Answer.Code == codes.OK && (r.Answer.HTTPStatus == 0 || r.Answer.HTTPStatus == http.StatusOK) && !r.Answer.Hangup && !r.GaveUp
}

// Config tells Start which receiver to be. The zero value is gRPC without TLS on
// a free port that accepts all requests.
type Config struct {
	// HTTP makes it OTLP/HTTP with protobuf bodies.
	HTTP bool
	// Address is where to listen. Default: a free port of 127.0.0.1.
	Address string
	// Listener is used instead of Address; it may be of another network
	// namespace.
	Listener net.Listener
	// TLS makes it a TLS server; see CA.Server.
	TLS *tls.Config
	// MaxBytes refuses larger requests, as a server's message limit does.
	// Default: none over HTTP, 4 MiB over gRPC.
	MaxBytes int
	// Script has the answers to the first requests, in order. Later ones are
	// accepted.
	Script []Answer
	// Decide answers requests that the script does not. It is called with one
	// request at a time. Default: accept.
	Decide func(Request) Answer
}

// Server is a running receiver. Its methods are safe for concurrent use.
type Server struct {
	cfg     Config
	address string
	ln      net.Listener
	stop    func()
	wg      sync.WaitGroup // the goroutine of the server, ended by Stop

	mu       sync.Mutex
	changed  chan struct{}
	script   []Answer
	requests []Request
	conns    map[string]net.Conn // open ones, by the client's address
}

// Start starts a server and stops it at the end of the test.
func Start(tb testing.TB, cfg Config) *Server {
	tb.Helper()
	ln := cfg.Listener
	if ln == nil {
		if cfg.Address == "" {
			cfg.Address = FreeAddress(tb)
		}
		var err error
		if ln, err = net.Listen("tcp", cfg.Address); err != nil {
			tb.Fatalf("start OTLP server: %v", err)
		}
	}
	s := &Server{
		cfg: cfg, ln: ln, address: ln.Addr().String(), script: slices.Clone(cfg.Script),
		changed: make(chan struct{}), conns: make(map[string]net.Conn),
	}
	if cfg.HTTP {
		s.serveHTTP(tb)
	} else {
		s.serveGRPC(tb)
	}
	tb.Cleanup(s.Stop)
	return s
}

// Stop closes the port and all connections, and waits for their end. Further
// calls do nothing.
func (s *Server) Stop() {
	s.stop()
	s.wg.Wait()
}

// Address is the host and port of the server. Another one can be started there
// after Stop.
func (s *Server) Address() string { return s.address }

// URL is the value for OTEL_EXPORTER_OTLP_ENDPOINT.
func (s *Server) URL() string {
	if s.cfg.TLS != nil {
		return "https://" + s.address
	}
	return "http://" + s.address
}

// Answer adds answers to the script.
func (s *Server) Answer(answers ...Answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.script = append(s.script, answers...)
}

// Requests returns all requests so far, in the order of their arrival.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Points returns the points of all accepted requests, in the order of their
// arrival.
func (s *Server) Points() []Point {
	var points []Point
	for _, r := range s.Requests() {
		if r.Accepted() {
			points = append(points, Flatten(r.Metrics)...)
		}
	}
	return points
}

// Wait returns when ok returns true for the requests so far. The test fails if
// that takes longer than two minutes.
func (s *Server) Wait(tb testing.TB, ok func([]Request) bool) {
	tb.Helper()
	timeout := time.After(2 * time.Minute)
	for {
		s.mu.Lock()
		requests, changed := slices.Clone(s.requests), s.changed
		s.mu.Unlock()
		if ok(requests) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			tb.Fatalf("wait for requests: not within two minutes; got %d", len(requests))
		}
	}
}

// WaitAccepted returns when at least n requests were accepted.
func (s *Server) WaitAccepted(tb testing.TB, n int) {
	tb.Helper()
	s.Wait(tb, func(requests []Request) bool {
		for _, r := range requests {
			if r.Accepted() {
				n--
			}
		}
		return n <= 0
	})
}

// take records a request and finds its answer. When the answer is due it returns,
// with false if the client has given up.
func (s *Server) take(ctx context.Context, r Request) (Answer, bool) {
	a, index := s.record(r)
	if a.Delay == 0 {
		return a, true
	}
	select {
	case <-time.After(a.Delay):
		return a, true
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		s.requests[index].GaveUp = true
		return a, false
	}
}

func (s *Server) record(r Request) (a Answer, index int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.cfg.HTTP && s.cfg.MaxBytes > 0 && r.Size > s.cfg.MaxBytes:
		r.Answer = Answer{HTTPStatus: http.StatusRequestEntityTooLarge, Message: "request too large"}
	case len(s.script) > 0:
		r.Answer, s.script = s.script[0], s.script[1:]
	case s.cfg.Decide != nil:
		r.Answer = s.cfg.Decide(r)
	}
	s.requests = append(s.requests, r)
	close(s.changed)
	s.changed = make(chan struct{})
	return r.Answer, len(s.requests) - 1
}

// ---- gRPC ----

type grpcServer struct {
	colmetricpb.UnimplementedMetricsServiceServer
	*Server
}

func (s *Server) serveGRPC(tb testing.TB) {
	opts := []grpc.ServerOption{grpc.StatsHandler(encodings{})}
	if s.cfg.TLS != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(s.cfg.TLS)))
	}
	if s.cfg.MaxBytes > 0 {
		opts = append(opts, grpc.MaxRecvMsgSize(s.cfg.MaxBytes))
	}
	server := grpc.NewServer(opts...)
	colmetricpb.RegisterMetricsServiceServer(server, grpcServer{Server: s})
	s.stop = server.Stop
	s.wg.Go(func() {
		// Stop may come before Serve has begun.
		if err := server.Serve(tracked{s.ln, s}); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			tb.Errorf("serve OTLP/gRPC: %v", err)
		}
	})
}

func (s grpcServer) Export(ctx context.Context, req *colmetricpb.ExportMetricsServiceRequest) (*colmetricpb.ExportMetricsServiceResponse, error) {
	r := Request{Metrics: req, Header: map[string]string{}, Size: proto.Size(req)}
	md, _ := metadata.FromIncomingContext(ctx)
	for name, values := range md {
		r.Header[name] = strings.Join(values, ",")
	}
	r.Encoding = ctx.Value(encodingKey{}).(*encoding).name
	client, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "no peer")
	}
	if info, ok := client.AuthInfo.(credentials.TLSInfo); ok {
		r.ClientCert = commonName(&info.State)
	}
	a, due := s.take(ctx, r)
	if !due {
		// The deadline may pass here before it does at the client, which must
		// not see a success then.
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if a.Hangup {
		s.hangup(client.Addr.String())
		return nil, status.Error(codes.Unavailable, "hang up")
	}
	if a.Code != codes.OK {
		st := status.New(a.Code, a.Message)
		if a.RetryAfter > 0 {
			var err error
			if st, err = st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(a.RetryAfter)}); err != nil {
				return nil, err
			}
		}
		return nil, st.Err()
	}
	return response(a), nil
}

func response(a Answer) *colmetricpb.ExportMetricsServiceResponse {
	if a.Rejected == 0 && a.Message == "" {
		return &colmetricpb.ExportMetricsServiceResponse{}
	}
	return &colmetricpb.ExportMetricsServiceResponse{PartialSuccess: &colmetricpb.ExportMetricsPartialSuccess{
		RejectedDataPoints: a.Rejected, ErrorMessage: a.Message}}
}

// encodings is the stats handler that finds out the compression of a call, which
// the method is not told.
type encodings struct{}

type encodingKey struct{}

type encoding struct{ name string }

func (encodings) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, encodingKey{}, &encoding{})
}

func (encodings) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if h, ok := s.(*stats.InHeader); ok && h.Compression != "identity" {
		ctx.Value(encodingKey{}).(*encoding).name = h.Compression
	}
}

func (encodings) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (encodings) HandleConn(context.Context, stats.ConnStats)                       {}

// ---- HTTP ----

func (s *Server) serveHTTP(tb testing.TB) {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/metrics", s.post)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	ln := net.Listener(tracked{s.ln, s})
	if s.cfg.TLS != nil {
		ln = tls.NewListener(ln, s.cfg.TLS)
	}
	s.stop = func() { server.Close() }
	s.wg.Go(func() {
		if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			tb.Errorf("serve OTLP/HTTP: %v", err)
		}
	})
}

func (s *Server) post(w http.ResponseWriter, req *http.Request) {
	r := Request{Header: map[string]string{}, Encoding: req.Header.Get("Content-Encoding"), Metrics: &colmetricpb.ExportMetricsServiceRequest{}}
	for name, values := range req.Header {
		r.Header[strings.ToLower(name)] = strings.Join(values, ",")
	}
	if req.TLS != nil {
		r.ClientCert = commonName(req.TLS)
	}
	body, err := readBody(req)
	if err == nil {
		err = proto.Unmarshal(body, r.Metrics)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r.Size = len(body)
	a, due := s.take(req.Context(), r)
	if a.Hangup || !due {
		panic(http.ErrAbortHandler) // net/http's way to close the connection
	}
	if a.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(a.RetryAfter/time.Second)))
	}
	for name, value := range a.Header {
		w.Header().Set(name, value)
	}
	code := a.HTTPStatus
	if code == 0 {
		code = httpStatus(a.Code)
	}
	message := proto.Message(response(a))
	if code != http.StatusOK {
		message = status.New(a.Code, a.Message).Proto()
	}
	answer, err := proto.Marshal(message)
	if err != nil {
		code, answer = http.StatusInternalServerError, []byte(err.Error())
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
	w.WriteHeader(code)
	w.Write(answer) // a client that has gone is the client's affair
}

func readBody(req *http.Request) ([]byte, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil || req.Header.Get("Content-Encoding") != "gzip" {
		return body, err
	}
	zr, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(zr)
}

// httpStatus is the Collector's mapping.
func httpStatus(code codes.Code) int {
	switch code {
	case codes.OK:
		return http.StatusOK
	case codes.InvalidArgument:
		return http.StatusBadRequest
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.NotFound, codes.Unimplemented:
		return http.StatusNotFound
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	case codes.Unavailable, codes.Canceled, codes.Aborted, codes.OutOfRange, codes.DataLoss:
		return http.StatusServiceUnavailable
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

// ---- connections ----

// tracked is a listener that keeps the open connections, so that one can be cut.
type tracked struct {
	net.Listener
	s *Server
}

func (l tracked) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.s.mu.Lock()
	l.s.conns[conn.RemoteAddr().String()] = conn
	l.s.mu.Unlock()
	return &trackedConn{conn, l.s}, nil
}

type trackedConn struct {
	net.Conn
	s *Server
}

func (c *trackedConn) Close() error {
	c.s.mu.Lock()
	delete(c.s.conns, c.RemoteAddr().String())
	c.s.mu.Unlock()
	return c.Conn.Close()
}

// hangup cuts the connection of a client.
func (s *Server) hangup(client string) {
	s.mu.Lock()
	conn := s.conns[client]
	s.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}

func commonName(state *tls.ConnectionState) string {
	if len(state.PeerCertificates) == 0 {
		return ""
	}
	return state.PeerCertificates[0].Subject.CommonName
}
