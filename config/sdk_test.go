package config

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/resource"
	collector "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
)

// loadAndSet sets the variables for the SDK, which reads the process's own
// environment, and loads the same ones.
func loadAndSet(t *testing.T, environ []string) Config {
	t.Helper()
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
	cfg, err := Load(append([]string{"HOME=/home/u"}, environ...))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

var emptyMetrics = &metricdata.ResourceMetrics{Resource: resource.Empty()}

// The official HTTP exporter, which reads the variables itself, must send to
// where Load says, with the headers that Load says.
func TestHTTPExporterAgrees(t *testing.T) {
	dir := writeFiles(t)
	var got *http.Request
	handler := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r })
	plain := httptest.NewServer(handler)
	defer plain.Close()
	secure := httptest.NewUnstartedServer(handler)
	secure.TLS = serverTLS(t, dir)
	secure.StartTLS()
	defer secure.Close()
	plainURL := plain.URL
	secureURL := "https://localhost:" + portOf(t, secure.Listener)

	for name, environ := range map[string][]string{
		"base":          {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL},
		"base slash":    {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL + "/"},
		"base path":     {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL + "/otlp//x/"},
		"base escaped":  {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL + "/a%20b"},
		"own":           {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=" + plainURL},
		"own path":      {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=" + plainURL + "/a/b/"},
		"own wins":      {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=" + plainURL + "/own", "OTEL_EXPORTER_OTLP_ENDPOINT=http://192.0.2.1:1"},
		"insecure":      {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL, "OTEL_EXPORTER_OTLP_INSECURE=true"},
		"headers":       {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL, "OTEL_EXPORTER_OTLP_HEADERS= Api-Key = a%20b%2Cc ,X=a=b+c"},
		"headers win":   {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL, "OTEL_EXPORTER_OTLP_HEADERS=x=1,y=2", "OTEL_EXPORTER_OTLP_METRICS_HEADERS=x=3"},
		"gzip":          {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL, "OTEL_EXPORTER_OTLP_COMPRESSION=gzip"},
		"tls":           {"OTEL_EXPORTER_OTLP_ENDPOINT=" + secureURL, "OTEL_EXPORTER_OTLP_CERTIFICATE=" + dir + "/ca.pem"},
		"tls bundle":    {"OTEL_EXPORTER_OTLP_ENDPOINT=" + secureURL, "OTEL_EXPORTER_OTLP_CERTIFICATE=" + dir + "/bundle.pem"},
		"user agent":    {"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainURL, "OTEL_EXPORTER_OTLP_HEADERS=user-agent=mine"},
		"white space":   {"OTEL_EXPORTER_OTLP_ENDPOINT=  " + plainURL + "\t"},
		"mutual tls":    {"OTEL_EXPORTER_OTLP_ENDPOINT=" + secureURL, "OTEL_EXPORTER_OTLP_CERTIFICATE=" + dir + "/ca.pem", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=" + dir + "/cert.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=" + dir + "/key.pem"},
		"upper case":    {"OTEL_EXPORTER_OTLP_ENDPOINT=" + strings.Replace(plainURL, "http", "HTTP", 1)},
		"only the host": {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=" + plainURL + "/"},
	} {
		t.Run(name, func(t *testing.T) {
			got = nil
			cfg := loadAndSet(t, append(environ, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL=http/protobuf"))
			exp, err := otlpmetrichttp.New(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := exp.Export(t.Context(), emptyMetrics); err != nil {
				t.Fatalf("the exporter could not send: %v", err)
			}
			if err := exp.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			want, err := url.Parse(cfg.OTLP.Endpoint)
			if err != nil {
				t.Fatal(err)
			}
			if got.Host != want.Host || got.URL.Path != want.Path || (got.TLS == nil) != cfg.OTLP.Insecure || (want.Scheme == "http") != cfg.OTLP.Insecure {
				t.Errorf("the exporter sent to %s%s, TLS %v; Config has %+v", got.Host, got.URL.Path, got.TLS != nil, cfg.OTLP)
			}
			for name, value := range headersOf(t, cfg) {
				if got.Header.Get(name) != value {
					t.Errorf("header %s: the exporter sent %q, Config has %q", name, got.Header.Get(name), value)
				}
			}
			if _, y := got.Header["Y"]; y {
				t.Error("the general headers were merged")
			}
			if (got.Header.Get("Content-Encoding") == "gzip") != (cfg.OTLP.Gzip) {
				t.Errorf("the exporter's encoding is %q, Config has %v", got.Header.Get("Content-Encoding"), cfg.OTLP.Gzip)
			}
			if mutual := cfg.Files.ClientKey != ""; mutual != (got.TLS != nil && len(got.TLS.PeerCertificates) > 0) {
				t.Errorf("client certificate: Config %v, connection otherwise", mutual)
			}
		})
	}
}

// metricsServer keeps the metadata of the last request.
type metricsServer struct {
	collector.UnimplementedMetricsServiceServer
	md metadata.MD
}

func (s *metricsServer) Export(ctx context.Context, _ *collector.ExportMetricsServiceRequest) (*collector.ExportMetricsServiceResponse, error) {
	s.md, _ = metadata.FromIncomingContext(ctx)
	return &collector.ExportMetricsServiceResponse{}, nil
}

// Likewise the gRPC exporter. The connection itself says whether it has TLS.
func TestGRPCExporterAgrees(t *testing.T) {
	dir := writeFiles(t)
	serve := func(listener net.Listener, options ...grpc.ServerOption) *metricsServer {
		service, server := new(metricsServer), grpc.NewServer(options...)
		collector.RegisterMetricsServiceServer(server, service)
		go server.Serve(listener) // ends with Stop
		t.Cleanup(server.Stop)
		return service
	}
	listen := func(network, address string) net.Listener {
		listener, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		return listener
	}
	plainAt, secureAt, socket := listen("tcp", "localhost:0"), listen("tcp", "localhost:0"), filepath.Join(dir, "otlp.sock")
	plain, local := serve(plainAt), serve(listen("unix", socket))
	secure := serve(secureAt, grpc.Creds(credentials.NewTLS(serverTLS(t, dir))))
	plainHost, secureHost := "localhost:"+portOf(t, plainAt), "localhost:"+portOf(t, secureAt)

	for name, tt := range map[string]struct {
		server  *metricsServer
		environ []string
	}{
		"url":         {plain, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + plainHost}},
		"url slash":   {plain, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + plainHost + "/"}},
		"host":        {plain, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=" + plainHost, "OTEL_EXPORTER_OTLP_INSECURE=True"}},
		"dns":         {plain, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=dns:///" + plainHost, "OTEL_EXPORTER_OTLP_METRICS_INSECURE=true"}},
		"unix":        {local, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=unix:" + socket}},
		"unix url":    {local, []string{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=unix://" + socket}},
		"tls":         {secure, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=https://" + secureHost, "OTEL_EXPORTER_OTLP_CERTIFICATE=" + dir + "/ca.pem"}},
		"tls host":    {secure, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=" + secureHost, "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE=" + dir + "/ca.pem"}},
		"headers":     {plain, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + plainHost, "OTEL_EXPORTER_OTLP_HEADERS= Api-Key = a%20b%2Cc ,X=a=b+c"}},
		"headers win": {plain, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + plainHost, "OTEL_EXPORTER_OTLP_HEADERS=x=1,y=2", "OTEL_EXPORTER_OTLP_METRICS_HEADERS=x=3"}},
		"gzip":        {plain, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + plainHost, "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION=gzip"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := loadAndSet(t, tt.environ)
			if secured := tt.server == secure; secured == cfg.OTLP.Insecure {
				t.Errorf("Config has Insecure %v for a server with TLS %v", cfg.OTLP.Insecure, secured)
			}
			// Once as the SDK reads the environment, once with what Load says
			// and an environment that says nothing.
			for _, explicit := range []bool{false, true} {
				tt.server.md = nil
				var options []otlpmetricgrpc.Option
				if explicit {
					for _, kv := range tt.environ {
						name, _, _ := strings.Cut(kv, "=")
						t.Setenv(name, "")
					}
					options = explicitOptions(t, cfg)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				defer cancel()
				exp, err := otlpmetricgrpc.New(ctx, options...)
				if err != nil {
					t.Fatal(err)
				}
				if err := exp.Export(ctx, emptyMetrics); err != nil {
					t.Fatalf("explicit %v: the exporter could not send: %v", explicit, err)
				}
				if err := exp.Shutdown(ctx); err != nil {
					t.Error(err)
				}
				for name, value := range headersOf(t, cfg) {
					if got := tt.server.md.Get(name); len(got) != 1 || got[0] != value {
						t.Errorf("explicit %v: header %s: the exporter sent %q, Config has %q", explicit, name, got, value)
					}
				}
				if len(tt.server.md.Get("y")) > 0 {
					t.Error("the general headers were merged")
				}
			}
		})
	}
}

// explicitOptions is what an exporter makes of OTLP.
func explicitOptions(t *testing.T, cfg Config) []otlpmetricgrpc.Option {
	t.Helper()
	o := cfg.OTLP
	options := []otlpmetricgrpc.Option{otlpmetricgrpc.WithEndpoint(o.Endpoint), otlpmetricgrpc.WithHeaders(headersOf(t, cfg)), otlpmetricgrpc.WithTimeout(o.Timeout)}
	if o.Insecure {
		options = append(options, otlpmetricgrpc.WithInsecure())
	}
	if o.TLS != nil {
		settings, err := o.TLS()
		if err != nil {
			t.Fatal(err)
		}
		options = append(options, otlpmetricgrpc.WithTLSCredentials(credentials.NewTLS(settings)))
	}
	if o.Gzip {
		options = append(options, otlpmetricgrpc.WithCompressor("gzip"))
	}
	return options
}

// The SDK's resource from the environment must be the one that Load says.
func TestResourceAgrees(t *testing.T) {
	for _, environ := range [][]string{
		{"OTEL_RESOURCE_ATTRIBUTES= a = 1%2C2 ,b=,c=x%3Dy=z"},
		{"OTEL_RESOURCE_ATTRIBUTES=service.name=attr,a=1", "OTEL_SERVICE_NAME= own "},
		{"OTEL_SERVICE_NAME=own"},
	} {
		t.Run(environ[0], func(t *testing.T) {
			cfg := loadAndSet(t, environ)
			res, err := resource.New(t.Context(), resource.WithFromEnv())
			if err != nil {
				t.Fatal(err)
			}
			if res.Len() != len(cfg.ResourceAttributes) {
				t.Errorf("the SDK has %v, Config %v", res, cfg.ResourceAttributes)
			}
			for _, kv := range res.Attributes() {
				if got := cfg.ResourceAttributes[string(kv.Key)]; got != kv.Value.AsString() {
					t.Errorf("%s: the SDK has %q, Config %q", kv.Key, kv.Value.AsString(), got)
				}
			}
		})
	}
}

func serverTLS(t *testing.T, dir string) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
}

func portOf(t *testing.T, listener net.Listener) string {
	t.Helper()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func TestMain(m *testing.M) {
	// The SDK reads this process's environment, which must not decide a test.
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "OTEL_") || strings.HasPrefix(strings.ToUpper(name), "HTTP") {
			os.Unsetenv(name)
		}
	}
	os.Exit(m.Run())
}
