package config

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
)

// install puts files in the places of others, as programs do that renew them.
func install(t *testing.T, fromTo ...string) {
	t.Helper()
	for i := 0; i < len(fromTo); i += 2 {
		content, err := os.ReadFile(fromTo[i])
		if err != nil {
			t.Fatal(err)
		}
		replace(t, fromTo[i+1], string(content))
	}
}

// replace renames a new file over a path.
func replace(t *testing.T, path, content string) {
	t.Helper()
	next := path + ".new"
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
}

// Certificate, key, authority and headers are those of the files at the time of a
// connection, which is checked as strictly as before.
func TestRenewedFiles(t *testing.T) {
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(protocol, func(t *testing.T) {
			dir := t.TempDir()
			ca, cert, key, headers := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "headers")
			renew := func(from *otlptest.CA, name string) {
				t.Helper()
				certFrom, keyFrom := from.Client(t, name)
				install(t, from.File, ca, certFrom, cert, keyFrom, key)
				replace(t, headers, "tenant="+name)
			}
			start := func(of *otlptest.CA, address string) *otlptest.Server {
				t.Helper()
				return otlptest.Start(t, otlptest.Config{HTTP: protocol != "grpc", TLS: of.Server(t, true), Address: address})
			}
			first, second := otlptest.NewCA(t), otlptest.NewCA(t)
			renew(first, "one")
			server := start(first, "")
			cfg := load(t, []string{
				"HOME=/h", "OTEL_EXPORTER_OTLP_PROTOCOL=" + protocol, "OTEL_EXPORTER_OTLP_ENDPOINT=" + server.URL(), "OTEL_EXPORTER_OTLP_CERTIFICATE=" + ca,
				"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=" + cert, "OTEL_EXPORTER_OTLP_CLIENT_KEY=" + key, "UNITMETER_OTLP_HEADERS_FILE=" + headers,
			})
			if before, _ := cfg.OTLP.TLS(); before == nil {
				t.Fatal("there are no settings for TLS")
			} else if again, _ := cfg.OTLP.TLS(); again != before {
				t.Error("nothing has changed, and yet the settings are others")
			}
			arrives := func(server *otlptest.Server, name string) {
				t.Helper()
				if err := otlp.Probe(t.Context(), cfg.OTLP); err != nil {
					t.Fatal(err)
				}
				requests := server.Requests()
				if r := requests[len(requests)-1]; r.ClientCert != name || r.Header["tenant"] != name {
					t.Errorf("it came from %q with the header %q, want %q", r.ClientCert, r.Header["tenant"], name)
				}
			}
			refused := func(want string) {
				t.Helper()
				if err := otlp.Probe(t.Context(), cfg.OTLP); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want an error with %q", err, want)
				}
			}
			arrives(server, "one")
			server.Stop()
			server = start(second, server.Address())
			refused("signed by unknown authority")
			renew(second, "two")
			arrives(server, "two")

			// What is damaged does not count, until it is mended.
			replace(t, key, "not a key")
			replace(t, headers, "not a header")
			arrives(server, "two")
			if _, err := cfg.OTLP.TLS(); err == nil || !strings.Contains(err.Error(), "OTEL_EXPORTER_OTLP_CLIENT_KEY") {
				t.Errorf("the damaged key: %v", err)
			}
			if _, err := cfg.OTLP.Headers(); err == nil || !strings.Contains(err.Error(), "UNITMETER_OTLP_HEADERS_FILE") {
				t.Errorf("the damaged headers: %v", err)
			}
			renew(second, "three")
			arrives(server, "three")

			// The name of the server is checked with the new authority too.
			other := start(second, "127.0.0.2:0")
			cfg.OTLP.Endpoint = strings.Replace(cfg.OTLP.Endpoint, server.Address(), other.Address(), 1)
			refused("127.0.0.2")
		})
	}
}

// Files are renewed in place, by renaming, and by turning a link, as Kubernetes does.
func TestWaysOfRenewing(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		replace(t, filepath.Join(dir, name, "headers"), "name="+name)
		// Not even the time need differ.
		if err := os.Chtimes(filepath.Join(dir, name, "headers"), time.Time{}, expired); err != nil {
			t.Fatal(err)
		}
	}
	link, file := filepath.Join(dir, "link"), filepath.Join(dir, "link", "headers")
	turn := func(to string) {
		t.Helper()
		if err := os.Symlink(to, link+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(link+".new", link); err != nil {
			t.Fatal(err)
		}
	}
	turn("a")
	cfg := load(t, []string{"HOME=/h", "UNITMETER_OTLP_HEADERS_FILE=" + file})
	want := func(name string) {
		t.Helper()
		if got := headersOf(t, cfg)["name"]; got != name {
			t.Errorf("the header is %q, want %q", got, name)
		}
	}
	want("a")
	turn("b")
	want("b")
	if err := os.WriteFile(file, []byte("name=in place"), 0o600); err != nil {
		t.Fatal(err)
	}
	want("in place")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if headers, err := cfg.OTLP.Headers(); err == nil || headers["name"] != "in place" {
		t.Errorf("without the file: %q, %v", headers, err)
	}
	replace(t, file, "name=back")
	want("back")
}

// The zone of an address arrives where it belongs, over both protocols.
func TestZone(t *testing.T) {
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		server := otlptest.Start(t, otlptest.Config{HTTP: protocol != "grpc", Address: "[::1]:0"})
		_, port, err := net.SplitHostPort(server.Address())
		if err != nil {
			t.Fatal(err)
		}
		cfg := load(t, []string{"HOME=/h", "OTEL_EXPORTER_OTLP_PROTOCOL=" + protocol, "OTEL_EXPORTER_OTLP_ENDPOINT=http://[::1%25lo]:" + port})
		if err := otlp.Probe(t.Context(), cfg.OTLP); err != nil {
			t.Errorf("%s to %s: %v", protocol, cfg.OTLP.Endpoint, err)
		}
	}
}
