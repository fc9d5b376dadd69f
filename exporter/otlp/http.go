package otlp

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// httpCaller posts to the URL of an otlpmetrichttp exporter, with the headers that
// it would send.
type httpCaller struct {
	client  *http.Client
	url     string
	header  http.Header // the official exporter's
	own     *renewed[map[string]string]
	gzip    bool
	timeout time.Duration
}

// newHTTP makes the official HTTP exporter with a client that stops the
// requests of Client.capture. An exporter that is given a client leaves TLS, proxy
// and time limits to it, so they are set here. Compression is left to send:
// the caller wants the plain bytes.
func newHTTP(ctx context.Context, cfg Config) (sdkmetric.Exporter, *http.Client, error) {
	// As in otlpmetrichttp, which does not use the changeable
	// http.DefaultTransport either.
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
			HTTP2: &http.HTTP2Config{SendPingTimeout: 3 * cfg.Timeout, PingTimeout: cfg.Timeout, WriteByteTimeout: cfg.Timeout},
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
		otlpmetrichttp.WithHTTPClient(&http.Client{Transport: captureTripper{
			client: client, own: newRenewed("headers", cfg.Headers, cfg.Logger), gzip: cfg.Gzip, timeout: cfg.Timeout,
		}}),
	}
	if cfg.Headers != nil {
		opts = append(opts, otlpmetrichttp.WithHeaders(map[string]string{})) // the caller adds them
	}
	exp, err := otlpmetrichttp.New(ctx, opts...)
	return exp, client, err
}

// captureTripper stands where the official exporter has its transport. It never
// reaches the network: all sending is done by httpCaller.
type captureTripper struct {
	client  *http.Client
	own     *renewed[map[string]string]
	gzip    bool
	timeout time.Duration
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
	if err := c.complete(&m); err != nil {
		return nil, fmt.Errorf("capture request: %w", err)
	}
	c.target = req.URL.Redacted()
	c.caller = &httpCaller{client: t.client, url: req.URL.String(), header: req.Header.Clone(), own: t.own, gzip: t.gzip, timeout: t.timeout}
	return &http.Response{
		StatusCode: http.StatusOK, Status: "200 OK", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{}, Body: http.NoBody, Request: req,
	}, nil
}

func (c *httpCaller) send(ctx context.Context, request []byte) Answer {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, ErrTimeout)
	defer cancel()
	body := request
	if c.gzip {
		var buf bytes.Buffer
		zw := gzip.NewWriter(&buf)
		zw.Write(request) // a bytes.Buffer does not fail
		zw.Close()
		body = buf.Bytes()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return Answer{Verdict: Misconfigured, Kind: "request", Err: fmt.Errorf("make request: %w", err)}
	}
	req.Header = c.header.Clone()
	for name, value := range c.own.get() {
		req.Header.Set(name, value)
	}
	if c.gzip {
		req.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := c.client.Do(req)
	if err != nil {
		a := Answer{Verdict: Unreachable, Kind: "connection", Err: err}
		if a.Slow = errors.Is(context.Cause(ctx), ErrTimeout); a.Slow {
			a.Err = fmt.Errorf("%w (%w)", err, ErrTimeout)
		}
		return a
	}
	defer resp.Body.Close()
	// The status line has decided. A body that breaks off only costs its text.
	const maxBody = 4 << 20
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	return HTTPAnswer(resp, text, time.Now())
}

// reconnect implements caller.
func (c *httpCaller) reconnect() { c.client.CloseIdleConnections() }

// StatusError is an answer over HTTP that is no success.
type StatusError struct {
	Code int // the status, such as 503
	text string
}

// Error implements error.
func (e *StatusError) Error() string { return e.text }

// HTTPAnswer sorts the status codes of a response whose body is text. Only 400 and
// 422 can blame the data, and not when a proxy says so in HTML: all other codes
// come from what stands before the receiver, or from a receiver in trouble.
func HTTPAnswer(resp *http.Response, text []byte, now time.Time) Answer {
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	isProto := mediaType == "application/x-protobuf"
	isPage := mediaType == "text/html" || bytes.HasPrefix(bytes.TrimSpace(text), []byte("<"))
	code := resp.StatusCode
	success := code >= 200 && code <= 299
	if success && !isPage {
		a := Answer{Verdict: Accepted}
		var reply colmetricpb.ExportMetricsServiceResponse
		if isProto && proto.Unmarshal(text, &reply) == nil ||
			mediaType == "application/json" && (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, &reply) == nil {
			a.Rejected = reply.GetPartialSuccess().GetRejectedDataPoints()
			a.Message = reply.GetPartialSuccess().GetErrorMessage()
		}
		return a
	}
	message := strings.TrimSpace(string(text[:min(len(text), 512)]))
	var detail spb.Status
	if isProto && proto.Unmarshal(text, &detail) == nil {
		message = detail.GetMessage()
	}
	a := Answer{Kind: "HTTP " + strconv.Itoa(code), After: retryAfter(resp.Header.Get("Retry-After"), now), Verdict: Misconfigured}
	a.Err = &StatusError{Code: code, text: fmt.Sprintf("receiver answered %s: %q", resp.Status, message)}
	switch {
	case success: // a login portal, or a web application that answers every path
		a.Kind = "web page"
	case code == http.StatusRequestEntityTooLarge:
		a.Verdict = TooLarge
	case code == http.StatusBadRequest, code == http.StatusUnprocessableEntity:
		a.Ahead = ahead(resp.Header.Get("Date"), now)
		switch {
		case isPage || wantsTLS(message): // "Request Header Or Cookie Too Large" as well
		case a.aboutSize():
			a.Verdict = TooLarge
		case a.tooNew():
			a.Verdict = Doubtful
		default:
			a.Verdict = Suspect
		}
	case code == http.StatusInternalServerError:
		a.Verdict = Doubtful
	case code == http.StatusTooManyRequests, code == http.StatusRequestTimeout, code == http.StatusTooEarly,
		code >= 500 && code != http.StatusNotImplemented:
		a.Verdict = Transient
	}
	return a
}

// ahead returns by how much now is ahead of the Date header of an answer.
func ahead(value string, now time.Time) time.Duration {
	date, err := http.ParseTime(value)
	if err != nil || now.Sub(date) < time.Minute { // an answer may take that long
		return 0
	}
	return now.Sub(date)
}

// wantsTLS says that a TLS server was spoken to without, in the words of Go's
// server.
func wantsTLS(message string) bool { return strings.Contains(message, "to an HTTPS server") }

// retryAfter reads the Retry-After header (RFC 9110, section 10.2.3): seconds or
// a date. It is 0 for anything else, and for a date in the past.
func retryAfter(value string, now time.Time) time.Duration {
	if s, err := strconv.ParseUint(value, 10, 63); err == nil {
		return time.Duration(min(s, uint64(MaxAsked/time.Second))) * time.Second
	}
	if date, err := http.ParseTime(value); err == nil {
		return max(date.Sub(now), 0)
	}
	return 0
}
