package otlp

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
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
