package otlp

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
)

// protocols runs a test over both.
func protocols(t *testing.T, f func(t *testing.T, protocol string, server otlptest.Config)) {
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(protocol, func(t *testing.T) {
			f(t, protocol, otlptest.Config{HTTP: protocol != "grpc"})
		})
	}
}

// to completes cfg with an endpoint, which is a URL, as package config would.
func to(endpoint string, cfg Config) Config {
	if cfg.Protocol == "http/protobuf" {
		cfg.Endpoint = endpoint + "/v1/metrics"
		return cfg
	}
	scheme, address, _ := strings.Cut(endpoint, "://")
	cfg.Endpoint, cfg.Insecure = address, scheme != "https"
	return cfg
}

// TestProbe asks receivers that answer in all ways, as an Exporter would.
func TestProbe(t *testing.T) {
	protocols(t, func(t *testing.T, protocol string, cfg otlptest.Config) {
		server := otlptest.Start(t, cfg)
		probe := to(server.URL(), Config{Protocol: protocol, Headers: func() (map[string]string, error) { return map[string]string{"tenant": "t"}, nil }, Gzip: true, Timeout: 5 * time.Second})
		if err := Probe(t.Context(), probe); err != nil {
			t.Fatal(err)
		}
		if r := server.Requests(); len(r) != 1 || r[0].Header["tenant"] != "t" || r[0].Encoding != "gzip" || len(server.Points()) > 0 {
			t.Errorf("the server has %+v", r)
		}
		cfg.Script = []otlptest.Answer{{Code: codes.Unauthenticated, Message: "who are you"}}
		err := Probe(t.Context(), to(otlptest.Start(t, cfg).URL(), Config{Protocol: protocol}))
		var http *StatusError
		switch {
		case err == nil || !strings.Contains(err.Error(), "who are you"):
			t.Errorf("a refusal: %v", err)
		case protocol == "grpc" && status.Code(err) != codes.Unauthenticated:
			t.Errorf("the code is %v", status.Code(err))
		case protocol != "grpc" && (!errors.As(err, &http) || http.Code != 401):
			t.Errorf("the status is %+v", http)
		}
		server.Stop()
		if err := Probe(t.Context(), probe); err == nil || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("without a server: %v", err)
		}
	})
}

// An endpoint without the s of https is a setting to mend, and no fault of the data.
func TestPlainTextToTLSIsHeld(t *testing.T) {
	server := otlptest.Start(t, otlptest.Config{HTTP: true, TLS: otlptest.NewCA(t).Server(t, false)})
	c, err := Open(t.Context(), to("http://"+server.Address(), Config{Protocol: "http/protobuf"}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	if a := c.Send(t.Context(), c.empty); a.Verdict != Misconfigured || !strings.Contains(a.Hint(), "OTEL_EXPORTER_OTLP_ENDPOINT") {
		t.Errorf("%v: %v", a.Verdict, a.Err)
	}
}

func TestHintsNameTheVariableThatDecides(t *testing.T) {
	c, err := Open(t.Context(), to("http://localhost:1", Config{Specific: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"}}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	hint := c.Hint(Answer{Verdict: Misconfigured, Err: errorString("404")})
	if !strings.Contains(hint, "check OTEL_EXPORTER_OTLP_METRICS_ENDPOINT (") || !strings.Contains(hint, " OTEL_EXPORTER_OTLP_HEADERS") {
		t.Errorf("hint: %s", hint)
	}
}

func TestHintsNameTheProxy(t *testing.T) {
	c, err := Open(t.Context(), to("http://localhost:1", Config{ProxyVariable: "https_proxy"}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	if hint := c.Hint(Answer{Verdict: Unreachable, Err: errorString("refused")}); !strings.Contains(hint, "proxy in https_proxy") || !strings.Contains(hint, "NO_PROXY") {
		t.Errorf("hint: %s", hint)
	}
}

// counting is a listener that counts the connections.
type counting struct {
	net.Listener
	n atomic.Int64
}

func (l *counting) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return conn, err
}

func (o *openConns) empty() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.conns) == 0
}

// The name of the endpoint may have another address by now, and who refuses may be
// what is left at the old one. Only a new connection has the name looked up.
func TestRefusalsMakeANewConnection(t *testing.T) {
	ca := otlptest.NewCA(t)
	for _, secure := range []bool{false, true} {
		protocols(t, func(t *testing.T, protocol string, server otlptest.Config) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			listener := &counting{Listener: ln}
			server.Listener = listener
			roots := x509.NewCertPool()
			if secure {
				server.TLS = ca.Server(t, false)
				pem, err := os.ReadFile(ca.File)
				if err != nil || !roots.AppendCertsFromPEM(pem) {
					t.Fatalf("read the authority: %v", err)
				}
			}
			s := otlptest.Start(t, server)
			settings := &tls.Config{RootCAs: roots}
			c, err := Open(t.Context(), to(s.URL(), Config{Protocol: protocol, TLS: func() (*tls.Config, error) { return settings, nil }}))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close(t.Context())
			gone, large := otlptest.Answer{Code: codes.Unimplemented}, otlptest.Answer{Code: codes.InvalidArgument, Message: "request too large"}
			for i, step := range []struct {
				answer otlptest.Answer
				conns  int64
			}{
				{gone, 1}, {gone, 1}, {otlptest.Answer{}, 1}, // only those in a row
				{gone, 1}, {gone, 1}, {large, 1}, {gone, 1}, {gone, 1}, {gone, 1},
				{gone, 2}, {gone, 2}, {gone, 2},
				{otlptest.Answer{}, 3}, {otlptest.Answer{}, 3},
			} {
				s.Answer(step.answer)
				if a := c.Send(t.Context(), c.empty); a.Verdict == Unreachable || (a.Verdict == Accepted) != (step.answer.Code == codes.OK) {
					t.Fatalf("call %d: %v, %v", i, a.Verdict, a.Err)
				}
				// gRPC learns of the end of a connection a moment later.
				if g, ok := c.caller.(*grpcCaller); ok && g.open.empty() && g.conn.GetState() == connectivity.Ready {
					g.conn.WaitForStateChange(t.Context(), connectivity.Ready)
				}
				if n := listener.n.Load(); n != step.conns {
					t.Errorf("call %d over connection %d, want %d", i, n, step.conns)
				}
			}
		})
	}
}
