package exporter

import (
	"crypto/tls"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
)

// always is a setting that is never renewed.
func always[T any](value T) func() (T, error) {
	return func() (T, error) { return value, nil }
}

// Headers count from the next request on, certificates and authorities from the
// next connection on. What cannot be read again is what it was.
func TestRenewedSettings(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		var headers atomic.Pointer[map[string]string]
		var settings atomic.Pointer[tls.Config]
		var broken atomic.Pointer[error]
		problem := func() error {
			if p := broken.Load(); p != nil {
				return *p
			}
			return nil
		}
		renew := func(token string, ca *otlptest.CA, client string) {
			pair, err := tls.LoadX509KeyPair(ca.Client(t, client))
			if err != nil {
				t.Fatal(err)
			}
			now := trusting(t, ca)
			now.Certificates = []tls.Certificate{pair}
			headers.Store(&map[string]string{"tenant": token})
			settings.Store(now)
		}
		first, second := otlptest.NewCA(t), otlptest.NewCA(t)
		renew("first", first, "one")
		cfg.TLS = first.Server(t, true)
		server := otlptest.Start(t, cfg)
		a := newAgent(t, server.URL(), Config{
			Outbox: &memory{},
			OTLP: &otlp.Config{
				Protocol: protocol,
				TLS:      func() (*tls.Config, error) { return settings.Load(), problem() },
				Headers:  func() (map[string]string, error) { return *headers.Load(), problem() },
			},
		})
		arrived := 0
		cycle := func(tenant, client string) {
			t.Helper()
			arrived++
			_ = a.cycle(unit("a.service", at(0), at(float64(100+arrived)), 5)) // an error is one try
			server.WaitAccepted(t, arrived)
			if r := server.Requests()[arrived-1]; r.Header["tenant"] != tenant || r.ClientCert != client {
				t.Errorf("tenant %q from %q, want %q from %q", r.Header["tenant"], r.ClientCert, tenant, client)
			}
		}
		cycle("first", "one")
		server.Stop()
		renew("second", second, "two")
		cfg.TLS, cfg.Address = second.Server(t, true), server.Address()
		server, arrived = otlptest.Start(t, cfg), 0
		cycle("second", "two")
		reason := errors.New("no such file")
		broken.Store(&reason)
		cycle("second", "two")
		cycle("second", "two")
		a.log.want(t, "cannot read the headers again", 1)
		broken.Store(nil)
		cycle("second", "two")
		a.log.want(t, "the headers can be read again", 1)
	})
}
