package otlp

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"sync"

	"google.golang.org/grpc/credentials"
)

// renewed asks for a setting each time it is needed, since it comes from files
// that may be renewed under a running agent.
type renewed[T any] struct {
	ask  func() (T, error)
	what string // in the log
	log  *slog.Logger

	mu     sync.Mutex
	failed bool // the last time
}

// newRenewed returns nil where there is nothing to ask.
func newRenewed[T any](what string, ask func() (T, error), log *slog.Logger) *renewed[T] {
	if ask == nil {
		return nil
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &renewed[T]{ask: ask, what: what, log: log}
}

// get returns the setting; the zero value where there is none.
func (r *renewed[T]) get() (value T) {
	if r == nil {
		return value
	}
	value, err := r.ask()
	r.mu.Lock()
	changed := r.failed != (err != nil)
	r.failed = err != nil
	r.mu.Unlock()
	switch {
	case !changed:
	case err != nil:
		r.log.Warn("cannot read the "+r.what+" again; what was read before stays in use", "err", err)
	default:
		r.log.Info("the " + r.what + " can be read again")
	}
	return value
}

// renewedCredentials are those of gRPC. Each handshake has the settings of now.
type renewedCredentials struct {
	credentials.TransportCredentials
	settings *renewed[*tls.Config]
}

func newRenewedCredentials(settings *renewed[*tls.Config]) credentials.TransportCredentials {
	return renewedCredentials{credentials.NewTLS(nil), settings}
}

// ClientHandshake implements credentials.TransportCredentials.
func (c renewedCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return credentials.NewTLS(c.settings.get()).ClientHandshake(ctx, authority, conn)
}

// Clone implements credentials.TransportCredentials.
func (c renewedCredentials) Clone() credentials.TransportCredentials { return c }

// renewedTransport is that of HTTP. A http.Transport keeps the TLS settings of
// its start, so new settings make a new one.
type renewedTransport struct {
	settings *renewed[*tls.Config]
	open     func(*tls.Config) *http.Transport

	mu      sync.Mutex
	of      *tls.Config // the settings of current
	current *http.Transport
}

// RoundTrip implements http.RoundTripper.
func (t *renewedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	return t.transport().RoundTrip(req)
}

func (t *renewedTransport) transport() *http.Transport {
	t.mu.Lock()
	defer t.mu.Unlock()
	if settings := t.settings.get(); t.current == nil || settings != t.of {
		if t.current != nil {
			t.current.CloseIdleConnections()
		}
		t.of, t.current = settings, t.open(settings)
	}
	return t.current
}

// CloseIdleConnections is what http.Client looks for.
func (t *renewedTransport) CloseIdleConnections() { t.transport().CloseIdleConnections() }
