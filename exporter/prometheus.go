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
	"log/slog"
	"math"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/resource"

	"github.com/unitmeter/unitmeter/receiver"
)

// Sweeper makes the sweep of a scrape.
type Sweeper interface {
	// Sweep reads all units until ctx ends. Calls that come together share a sweep.
	Sweep(ctx context.Context) *receiver.Sweep
}

// PrometheusConfig tells a Prometheus where to listen, and what to serve.
type PrometheusConfig struct {
	// Address is host:port, from OTEL_EXPORTER_PROMETHEUS_HOST and _PORT. An IPv4
	// address such as 0.0.0.0 is IPv4 only.
	Address string
	// WebConfig is the path of a web configuration file of Prometheus' exporters, for
	// TLS and passwords. It is read again at each connection. "" is neither.
	WebConfig string
	// Source makes the sweeps. The callbacks of the MeterProvider observe the one of
	// receiver.OfSweep.
	Source Sweeper
	// Resource is what the metrics are about.
	Resource *resource.Resource
	// Version is the agent's, for unitmeter_build_info.
	Version string
	// Logger gets the end of the server, if nobody asked for it. Default:
	// none.
	Logger *slog.Logger
}

const (
	// maxConnections is many times what a few servers with a person beside them
	// need. With more, the one that is idle for longest is closed for the new one.
	maxConnections = 64
	// writeTimeout is how long a client may take to read an answer.
	writeTimeout = 30 * time.Second
	// closingGrace is how long scrapes that have begun may go on at the end.
	closingGrace = time.Second
)

// Prometheus is a reader whose metrics are pulled over HTTP, at /metrics. Each
// scrape makes a collection; Prometheus' text format has no start times.
type Prometheus struct {
	cfg    PrometheusConfig
	reader *sdkmetric.ManualReader
	ln     net.Listener
	server *http.Server
	conns  connections
	done   chan struct{} // closed when serving has ended; nil: it has not begun

	mu sync.Mutex // held for arithmetic: a collection of a sweep, and its encoding
	// collected is what translate takes: the metrics of the SDK, in the
	// exporter of OpenTelemetry that gives them the names of Prometheus.
	collected []metricdata.ScopeMetrics
	translate http.Handler
	last      *answer
}

// NewPrometheus opens the port. Connections wait until Serve is called. The
// caller calls Shutdown in any case.
func NewPrometheus(ctx context.Context, cfg PrometheusConfig) (*Prometheus, error) {
	p := &Prometheus{cfg: cfg, reader: sdkmetric.NewManualReader()}
	if p.cfg.Logger == nil {
		p.cfg.Logger = slog.New(slog.DiscardHandler)
	}
	// A registry of its own: the default one is open to every package.
	registry := prometheus.NewRegistry()
	names, err := otelprom.New(otelprom.WithRegisterer(registry), otelprom.WithoutScopeInfo(), otelprom.WithProducer(p))
	if err != nil {
		return nil, fmt.Errorf("make Prometheus exporter: %w", err)
	}
	// The exporter collects without a context, so that it cannot be told how long a
	// scrape may take. Here it only translates what reader has collected.
	sdkmetric.NewMeterProvider(sdkmetric.WithReader(names), sdkmetric.WithResource(cfg.Resource))
	registry.MustRegister(buildInfo(cfg.Version), collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	p.translate = promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		// One unit that cannot be told in Prometheus' terms must not hide the
		// others.
		ErrorHandling: promhttp.ContinueOnError,
	})
	if p.ln, err = listen(ctx, cfg.Address); err != nil {
		return nil, fmt.Errorf("listen for Prometheus on %s: %w; set OTEL_EXPORTER_PROMETHEUS_HOST and OTEL_EXPORTER_PROMETHEUS_PORT to a free address", cfg.Address, err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", p.scrape)
	mux.HandleFunc("GET /{$}", p.land)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true) // HTTP/2 has many scrapes in a connection, and bounds of its own
	p.server = &http.Server{
		Handler: mux, Protocols: protocols, ConnState: p.conns.follow,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: writeTimeout,
		MaxHeaderBytes: 16 << 10,
		// What clients do wrong is not the agent's trouble.
		ErrorLog: slog.NewLogLogger(p.cfg.Logger.Handler(), slog.LevelDebug),
	}
	return p, nil
}

// Serve begins to answer, in a goroutine that Shutdown ends. Call it once, when the
// units can be read: a scrape before that would have none.
func (p *Prometheus) Serve() {
	p.done = make(chan struct{})
	log := p.cfg.Logger
	go func() {
		defer close(p.done)
		err := web.Serve(p.ln, p.server, &web.FlagConfig{WebConfigFile: &p.cfg.WebConfig}, slog.New(warnings{log.Handler()}))
		if !errors.Is(err, http.ErrServerClosed) {
			log.Error("the Prometheus endpoint has ended", "err", err, "address", p.cfg.Address, "next", "restart unitmeter")
		}
	}()
}

// warnings drops what the web package says of its address: the agent has said it.
type warnings struct{ slog.Handler }

// Enabled implements slog.Handler.
func (w warnings) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && w.Handler.Enabled(ctx, level)
}

// buildInfo is the metric that exporters of Prometheus have by custom.
func buildInfo(version string) prometheus.Collector {
	revision := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				revision = s.Value
			}
		}
	}
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "unitmeter_build_info", Help: "The version of unitmeter and of what it was built with; always 1.",
		ConstLabels: prometheus.Labels{"version": version, "revision": revision, "goversion": runtime.Version(), "goos": runtime.GOOS, "goarch": runtime.GOARCH},
	}, func() float64 { return 1 })
}

// listen opens address, which is host:port. Without a word about IPv4, Go takes
// 0.0.0.0 for every IPv6 address as well.
func listen(ctx context.Context, address string) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	network := "tcp"
	if net.ParseIP(host).To4() != nil {
		network = "tcp4"
	}
	return new(net.ListenConfig).Listen(ctx, network, address)
}

// land is the page that a browser shows.
func (p *Prometheus) land(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = io.WriteString(w, `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>unitmeter</title></head>
<body><h1>unitmeter</h1>
<p>The network traffic of every systemd unit of this host.</p>
<p><a href="metrics">Metrics</a> for Prometheus to scrape.</p></body></html>
`)
}

// scrape answers with all metrics. The time that Prometheus allows bounds the
// sweep, so that the agent's own metrics arrive when systemd does not answer.
func (p *Prometheus) scrape(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	const header = "X-Prometheus-Scrape-Timeout-Seconds"
	if text := r.Header.Get(header); text != "" {
		seconds, err := strconv.ParseFloat(text, 64)
		if err != nil || math.IsNaN(seconds) || seconds <= 0 {
			http.Error(w, fmt.Sprintf("%s is %q: it must be a number above 0", header, text), http.StatusBadRequest)
			return
		}
		allowed := time.Duration(min(seconds, time.Hour.Seconds()) * float64(time.Second))
		var cancel context.CancelFunc
		// The rest is for the answer.
		ctx, cancel = context.WithTimeout(ctx, allowed-min(allowed/4, time.Second))
		defer cancel()
	}
	a, err := p.answer(p.cfg.Source.Sweep(ctx), r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	// The sweep may have taken most of the time that there is for an answer.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	a.write(w, r)
}

// answer is what all scrapes of one sweep get, compressed: a slow client must not
// hold megabytes.
type answer struct {
	sweep  time.Time // of the sweep
	accept string    // of the request
	header http.Header
	code   int
	body   bytes.Buffer // gzip
}

// answer collects the metrics of a sweep and encodes them.
func (p *Prometheus) answer(sweep *receiver.Sweep, r *http.Request) (*answer, error) {
	accept := r.Header.Get("Accept")
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last != nil && p.last.sweep.Equal(sweep.Time) && p.last.accept == accept {
		return p.last, nil
	}
	var metrics metricdata.ResourceMetrics
	if err := p.reader.Collect(receiver.OfSweep(r.Context(), sweep), &metrics); err != nil {
		return nil, fmt.Errorf("collect metrics: %w", err)
	}
	p.collected = metrics.ScopeMetrics
	defer func() { p.collected = nil }()
	a := &answer{sweep: sweep.Time, accept: accept, header: http.Header{}}
	ask := r.Clone(r.Context())
	ask.Header.Set("Accept-Encoding", "gzip")
	p.translate.ServeHTTP(a, ask)
	p.last = a
	return a, nil
}

// Produce implements metric.Producer for the exporter that translates.
func (p *Prometheus) Produce(context.Context) ([]metricdata.ScopeMetrics, error) {
	return p.collected, nil
}

// Header, WriteHeader and Write implement http.ResponseWriter.
func (a *answer) Header() http.Header { return a.header }

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(code int) { a.code = cmp.Or(a.code, code) }

// Write implements http.ResponseWriter.
func (a *answer) Write(b []byte) (int, error) { return a.body.Write(b) }

// write sends the answer as the client can read it. It does not change a.
func (a *answer) write(w http.ResponseWriter, r *http.Request) {
	for name, values := range a.header {
		w.Header()[name] = values
	}
	body := io.Reader(bytes.NewReader(a.body.Bytes()))
	switch packed := a.header.Get("Content-Encoding") == "gzip"; {
	case packed && !accepted(r.Header.Values("Accept-Encoding")):
		w.Header().Del("Content-Encoding")
		plain, err := gzip.NewReader(body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		body = plain
	default:
		w.Header().Set("Content-Length", strconv.Itoa(a.body.Len()))
	}
	w.WriteHeader(cmp.Or(a.code, http.StatusOK))
	_, _ = io.Copy(w, body) // the client may go at any time
}

// accepted says whether a client that sent these Accept-Encoding headers can read
// gzip.
func accepted(values []string) bool {
	for encoding := range strings.SplitSeq(strings.Join(values, ","), ",") {
		name, parameters, _ := strings.Cut(encoding, ";")
		weight, found := strings.CutPrefix(strings.TrimSpace(parameters), "q=")
		refused := found && strings.Trim(weight, "0.") == ""
		if strings.TrimSpace(name) == "gzip" && !refused {
			return true
		}
	}
	return false
}

// connections are those of the server, which it bounds. The zero value is ready.
type connections struct {
	mu   sync.Mutex
	idle []net.Conn // without a request, the oldest first
	busy []net.Conn // with one, the oldest first
}

// follow is an http.Server's ConnState.
func (c *connections) follow(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle, c.busy = without(c.idle, conn), without(c.busy, conn)
	switch state {
	case http.StateNew, http.StateIdle:
		c.idle = append(c.idle, conn)
	case http.StateActive:
		c.busy = append(c.busy, conn)
	}
	if len(c.idle)+len(c.busy) <= maxConnections {
		return
	}
	if len(c.idle) > 1 {
		closeNow(c.idle[0])
		c.idle = c.idle[1:]
	} else {
		closeNow(c.busy[0])
		c.busy = c.busy[1:]
	}
}

// without returns list without conn, in place.
func without(list []net.Conn, conn net.Conn) []net.Conn {
	return slices.DeleteFunc(list, func(c net.Conn) bool { return c == conn })
}

// closeNow closes a connection without a word to the other side, for which TLS
// would wait.
func closeNow(conn net.Conn) {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	_ = conn.Close()
}

// Reader is for metric.WithReader. The MeterProvider shuts it down.
func (p *Prometheus) Reader() sdkmetric.Reader { return p.reader }

// Addr is the address it listens on.
func (p *Prometheus) Addr() net.Addr { return p.ln.Addr() }

// Shutdown closes the port and waits for scrapes that have begun, for a short time
// and until ctx ends; then it closes their connections. Call it at once after the
// MeterProvider's, which takes some time in which scrapes are still answered; after
// it they get an error.
func (p *Prometheus) Shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closingGrace)
	defer cancel()
	if p.server.Shutdown(ctx) != nil {
		// A client that does not read its answer is no trouble of the agent's.
		_ = p.server.Close()
	}
	err := p.ln.Close()
	if errors.Is(err, net.ErrClosed) { // by the server
		err = nil
	}
	if p.done != nil {
		<-p.done
	}
	return err
}
