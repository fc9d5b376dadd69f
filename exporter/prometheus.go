package exporter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
)

// PrometheusConfig tells a Prometheus where to listen.
type PrometheusConfig struct {
	// Address is host:port, from OTEL_EXPORTER_PROMETHEUS_HOST and _PORT. An IPv4
	// address such as 0.0.0.0 is IPv4 only.
	Address string
	// Logger gets the end of the server, if nobody asked for it. Default:
	// none.
	Logger *slog.Logger
}

// Prometheus is a reader whose metrics are pulled over HTTP, at /metrics. Each
// scrape makes a collection; Prometheus' text format has no start times.
type Prometheus struct {
	reader sdkmetric.Reader
	ln     net.Listener
	server *http.Server
	done   chan struct{} // closed when serve has ended
}

// NewPrometheus opens the port and starts to serve, in a goroutine that Shutdown
// ends. A scrape before the reader is part of a MeterProvider is empty.
func NewPrometheus(ctx context.Context, cfg PrometheusConfig) (*Prometheus, error) {
	// A registry of its own: the default one has the Go runtime's metrics, and
	// is open to every package.
	registry := prometheus.NewRegistry()
	reader, err := otelprom.New(otelprom.WithRegisterer(registry), otelprom.WithoutScopeInfo())
	if err != nil {
		return nil, fmt.Errorf("make Prometheus exporter: %w", err)
	}
	ln, err := listen(ctx, cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("listen for Prometheus on %s: %w; set OTEL_EXPORTER_PROMETHEUS_HOST and OTEL_EXPORTER_PROMETHEUS_PORT to a free address", cfg.Address, err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		// One unit that cannot be told in Prometheus' terms must not hide the
		// others.
		ErrorHandling: promhttp.ContinueOnError,
		// Each scrape may be a sweep of the host.
		MaxRequestsInFlight: 4,
	}))
	p := &Prometheus{
		reader: reader, ln: ln, done: make(chan struct{}),
		server: &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second},
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p.server.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelWarn)
	go func() {
		defer close(p.done)
		if err := p.server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the Prometheus endpoint has ended", "err", err, "address", cfg.Address, "next", "restart unitmeter")
		}
	}()
	return p, nil
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

// Reader is for metric.WithReader. The MeterProvider shuts it down.
func (p *Prometheus) Reader() sdkmetric.Reader { return p.reader }

// Addr is the address it listens on.
func (p *Prometheus) Addr() net.Addr { return p.ln.Addr() }

// Shutdown closes the port and waits for scrapes that have begun, until ctx
// ends. Call it at once after the MeterProvider's, which takes some time in which
// scrapes are still answered; after it they are empty.
func (p *Prometheus) Shutdown(ctx context.Context) error {
	err := p.server.Shutdown(ctx)
	if err != nil {
		err = errors.Join(fmt.Errorf("close the Prometheus endpoint: %w", err), p.server.Close())
	}
	<-p.done
	return err
}
