package exporter

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
)

// httpWire posts to the URL of an otlpmetrichttp exporter, with the headers that
// it would send.
type httpWire struct {
	client  *http.Client
	url     *url.URL
	header  http.Header // the official exporter's
	own     *renewed[map[string]string]
	gzip    bool
	timeout time.Duration
}

// newHTTP makes the official HTTP exporter with a client that stops requests
// made under withCapture. An exporter that is given a client leaves TLS, proxy
// and time limits to it, so they are set here. Compression is left to the wire:
// the outbox wants the plain bytes.
func newHTTP(ctx context.Context, cfg Config) (sdkmetric.Exporter, *http.Client, error) {
	// As in otlpmetrichttp, which does not use the changeable
	// http.DefaultTransport either.
	timeout := cmp.Or(cfg.Timeout, DefaultTimeout)
	open := func(settings *tls.Config) *http.Transport {
		return &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			ForceAttemptHTTP2:     true,
			MaxIdleConns:          2,
			IdleConnTimeout:       90 * time.Second,
			TLSHandshakeTimeout:   10 * time.Second,
			ExpectContinueTimeout: time.Second,
			TLSClientConfig:       settings.Clone(), // it adds to them
			// HTTP/1 makes a new connection after a call that took too long. HTTP/2
			// would go on with one on which nothing comes through, for as long as TCP
			// tries, which is a quarter of an hour; so it asks now and then.
			HTTP2: &http.HTTP2Config{SendPingTimeout: 3 * timeout, PingTimeout: timeout, WriteByteTimeout: timeout},
		}
	}
	client := &http.Client{
		Transport: &renewedTransport{settings: newRenewed("TLS files", cfg.TLS, cfg.Logger), open: open},
		// A redirect of a POST may turn into a GET, whose 200 would look like
		// success. It is an answer of its own: a wrong endpoint.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	opts := []otlpmetrichttp.Option{
		otlpmetrichttp.WithEndpointURL(cfg.Endpoint),
		otlpmetrichttp.WithRetry(otlpmetrichttp.RetryConfig{Enabled: false}),
		otlpmetrichttp.WithCompression(otlpmetrichttp.NoCompression),
		otlpmetrichttp.WithHTTPClient(&http.Client{Transport: captureTripper{client: client, own: newRenewed("headers", cfg.Headers, cfg.Logger), gzip: cfg.Gzip}}),
	}
	if cfg.Headers != nil {
		opts = append(opts, otlpmetrichttp.WithHeaders(map[string]string{})) // the wire adds them
	}
	exp, err := otlpmetrichttp.New(ctx, opts...)
	return exp, client, err
}

// captureTripper stands where the official exporter has its transport. It never
// reaches the network: all sending is done by httpWire.
type captureTripper struct {
	client *http.Client
	own    *renewed[map[string]string]
	gzip   bool
}

func (t captureTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	c := captureFrom(req.Context())
	if c == nil {
		return nil, errors.New("send request: only the exporter may send")
	}
	defer req.Body.Close()
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, fmt.Errorf("capture request: %w", err)
	}
	var m colmetricpb.ExportMetricsServiceRequest
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, fmt.Errorf("capture request: %w", err)
	}
	if body, err = c.bulk.complete(&m); err != nil {
		return nil, fmt.Errorf("capture request: %w", err)
	}
	target, header := *req.URL, req.Header.Clone()
	c.request = body
	c.target = target.Redacted()
	c.wire = func(timeout time.Duration) wire {
		return &httpWire{client: t.client, url: &target, header: header, own: t.own, gzip: t.gzip, timeout: timeout}
	}
	return &http.Response{
		StatusCode: http.StatusOK, Status: "200 OK", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{}, Body: http.NoBody, Request: req,
	}, nil
}

func (w *httpWire) send(ctx context.Context, request []byte) answer {
	ctx, cancel := context.WithTimeoutCause(ctx, w.timeout, errRequestTimeout)
	defer cancel()
	body := request
	if w.gzip {
		var buf bytes.Buffer
		zw := gzip.NewWriter(&buf)
		zw.Write(request) // a bytes.Buffer does not fail
		zw.Close()
		body = buf.Bytes()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url.String(), bytes.NewReader(body))
	if err != nil {
		return answer{verdict: misconfigured, kind: "request", err: fmt.Errorf("make request: %w", err)}
	}
	req.Header = w.header.Clone()
	for name, value := range w.own.get() {
		req.Header.Set(name, value)
	}
	if w.gzip {
		req.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := w.client.Do(req)
	if err != nil {
		a := answer{verdict: unreachable, kind: "connection", err: err}
		if a.slow = errors.Is(context.Cause(ctx), errRequestTimeout); a.slow {
			a.err = fmt.Errorf("%w (%w)", err, errRequestTimeout)
		}
		return a
	}
	defer resp.Body.Close()
	// The status line has decided. A body that breaks off only costs its text.
	const maxBody = 4 << 20
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	return httpAnswer(resp, text, time.Now())
}

// StatusError is an answer over HTTP that is no success.
type StatusError struct {
	Code int // the status, such as 503
	text string
}

// Error implements error.
func (e *StatusError) Error() string { return e.text }

// httpAnswer sorts the status codes of a response whose body is text.
func httpAnswer(resp *http.Response, text []byte, now time.Time) answer {
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	isProto := mediaType == "application/x-protobuf"
	code := resp.StatusCode
	if code >= 200 && code <= 299 {
		a := answer{verdict: accepted}
		var reply colmetricpb.ExportMetricsServiceResponse
		if isProto && proto.Unmarshal(text, &reply) == nil {
			a.rejected = reply.GetPartialSuccess().GetRejectedDataPoints()
			a.message = reply.GetPartialSuccess().GetErrorMessage()
		}
		return a
	}
	message := strings.TrimSpace(string(text[:min(len(text), 512)]))
	var detail spb.Status
	if isProto && proto.Unmarshal(text, &detail) == nil {
		message = detail.GetMessage()
	}
	a := answer{kind: "HTTP " + strconv.Itoa(code), after: retryAfter(resp.Header.Get("Retry-After"), now)}
	a.err = &StatusError{Code: code, text: fmt.Sprintf("receiver answered %s: %q", resp.Status, message)}
	switch {
	case code == http.StatusTooManyRequests, code == http.StatusBadGateway, code == http.StatusServiceUnavailable,
		code == http.StatusGatewayTimeout, code == http.StatusRequestTimeout:
		a.verdict = transient
	case code == http.StatusRequestEntityTooLarge, code == http.StatusBadRequest && strings.Contains(message, "request body too large"):
		a.verdict = tooLarge // the second is how a Collector says it
	case code < 400, code == http.StatusUnauthorized, code == http.StatusForbidden, code == http.StatusNotFound,
		code == http.StatusMethodNotAllowed, code == http.StatusProxyAuthRequired, code == http.StatusNotImplemented,
		code == http.StatusUnsupportedMediaType, // all requests are of one type
		code == http.StatusBadRequest && wantsTLS(message):
		// 1xx to 3xx never come from an OTLP receiver.
		a.verdict = misconfigured
	case code < 500:
		a.verdict, a.tries = suspect, dataTries
	default:
		a.verdict, a.tries = suspect, doubtTries
	}
	return a
}

// wantsTLS says that a TLS server was spoken to without: in the words of Go's
// server and of nginx.
func wantsTLS(message string) bool {
	return strings.Contains(message, "to an HTTPS server") || strings.Contains(message, "to HTTPS port")
}

// retryAfter reads the Retry-After header (RFC 9110, section 10.2.3): seconds or
// a date. It is 0 for anything else, and for a date in the past.
func retryAfter(value string, now time.Time) time.Duration {
	if s, err := strconv.ParseUint(value, 10, 63); err == nil {
		return time.Duration(min(s, uint64(maxAsked/time.Second))) * time.Second
	}
	if date, err := http.ParseTime(value); err == nil {
		return max(date.Sub(now), 0)
	}
	return 0
}
