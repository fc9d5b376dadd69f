package exporter

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
)

func TestConsole(t *testing.T) {
	var out bytes.Buffer
	h := &host{}
	exp, err := NewConsole(&out, h)
	if err != nil {
		t.Fatal(err)
	}
	h.meter(t, exp)
	if err := h.cycle(unit("a.service", at(7), at(100), 5)); err != nil {
		t.Fatal(err)
	}
	if err := h.provider.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 { // the cycle and the one of the shutdown
		t.Fatalf("%d lines", len(lines))
	}
	if !json.Valid([]byte(lines[0])) || !strings.Contains(lines[0], `"StartTime":"2026-11-01T12:00:07Z","Time":"2026-11-01T12:01:40Z","Value":5}`) {
		t.Errorf("wrote %s", lines[0])
	}
}

func scrape(t *testing.T, p *Prometheus) (int, string) {
	t.Helper()
	resp, err := http.Get("http://" + p.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestPrometheusBesideTheExporter(t *testing.T) {
	var log logged
	h := &host{}
	p, err := NewPrometheus(t.Context(), PrometheusConfig{
		Address: "127.0.0.1:0", Source: h, Resource: resource.NewSchemaless(attribute.String("service.name", "unitmeter")),
		Version: "1.2.3", Logger: log.logger(),
	})
	if err != nil {
		t.Fatal(err)
	}
	p.Serve()
	box := &memory{}
	exp, err := New(t.Context(), Config{Source: h, Outbox: box})
	if err != nil {
		t.Fatal(err)
	}
	h.meter(t, exp, p.Reader())
	h.see(unit("a.service", at(0), at(100), 5))
	code, text := scrape(t, p)
	for _, want := range []string{
		`(?m)^# TYPE systemd_unit_network_io_bytes_total counter$`,
		`(?m)^systemd_unit_network_io_bytes_total\{[^}]*network_io_direction="transmit"[^}]*systemd_unit_name="a.service"[^}]*\} 10$`,
		`(?m)^systemd_unit_network_packet_count_total\{[^}]*network_io_direction="receive"[^}]*\} 15$`,
		`(?m)^target_info\{[^}]*service_name="unitmeter"`,
		`(?m)^unitmeter_build_info\{[^}]*goversion="go1\.[^}]*version="1.2.3"\} 1$`,
		`(?m)^process_resident_memory_bytes [1-9]`,
		`(?m)^go_goroutines [1-9]`,
	} {
		if !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("status %d, no match for %s in\n%s", code, want, text)
		}
	}
	if len(box.cycles) != 0 {
		t.Error("a scrape has committed a cycle")
	}
	if err := p.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := http.Get("http://" + p.Addr().String() + "/metrics"); err == nil {
		t.Error("the port is open after Shutdown")
	}
	if err := h.provider.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	log.want(t, "", 0)
}

func TestPrometheusOverIPv4Only(t *testing.T) {
	p, err := NewPrometheus(t.Context(), PrometheusConfig{Address: "0.0.0.0:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Shutdown(t.Context())
	_, port, err := net.SplitHostPort(p.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]bool{"127.0.0.1": true, "::1": false} {
		conn, err := net.Dial("tcp", net.JoinHostPort(host, port))
		if (err == nil) != want {
			t.Errorf("it listens on %s: %v, want %v", host, err == nil, want)
		}
		if err == nil {
			conn.Close()
		}
	}
}

func TestPrometheusPortInUse(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, address := range []string{ln.Addr().String(), "127.0.0.1:99999", "no port"} {
		p, err := NewPrometheus(t.Context(), PrometheusConfig{Address: address})
		if err == nil {
			p.Shutdown(t.Context())
			t.Fatalf("listens on %s", address)
		}
		if !strings.Contains(err.Error(), address) || !strings.Contains(err.Error(), "OTEL_EXPORTER_PROMETHEUS_PORT") {
			t.Errorf("error %q", err)
		}
	}
}

func TestResource(t *testing.T) {
	const machine = "0123456789abcdef0123456789abcdef"
	get := func(env map[string]string, host, machine string) map[string]string {
		t.Helper()
		for k, v := range env {
			t.Setenv(k, v)
		}
		res, err := describe(context.Background(), "1.2.3", host, machine)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, kv := range res.Attributes() {
			got[string(kv.Key)] = kv.Value.String()
		}
		return got
	}
	got := get(nil, "web1", machine)
	want := map[string]string{
		"service.name": "unitmeter", "service.version": "1.2.3", "host.name": "web1", "host.id": machine, "os.type": "linux",
		// uuidgen --sha1 --namespace 4d63009a-8d0f-11ee-aad7-4c796ed8e320 --name 0123456789abcdef0123456789abcdef
		"service.instance.id": "2f1423a8-dc20-5c0e-839d-70474f2dc393",
		"telemetry.sdk.name":  "opentelemetry", "telemetry.sdk.language": "go", "telemetry.sdk.version": got["telemetry.sdk.version"],
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s=%q, want %q", k, got[k], v)
		}
	}
	if len(got) != len(want) {
		t.Errorf("attributes %v: more or less than wanted", got)
	}
	plain := get(nil, "web1", "")
	if _, ok := plain["host.id"]; ok || plain["service.instance.id"] == "" || plain["service.instance.id"] == got["service.instance.id"] {
		t.Errorf("without a machine id: %v", plain)
	}
	env := get(map[string]string{
		"OTEL_RESOURCE_ATTRIBUTES": "host.name=other,deployment.environment.name=a%2Cb,service.instance.id=mine", "OTEL_SERVICE_NAME": "meter",
	}, "web1", machine)
	if env["host.name"] != "other" || env["deployment.environment.name"] != "a,b" || env["service.instance.id"] != "mine" || env["service.name"] != "meter" || env["host.id"] != machine {
		t.Errorf("the variables do not win: %v", env)
	}
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "no equals sign")
	if _, err := Resource(context.Background(), "1"); err == nil || !strings.Contains(err.Error(), "OTEL_RESOURCE_ATTRIBUTES") || !strings.Contains(err.Error(), "no equals sign") {
		t.Errorf("error %v", err)
	}
}

func TestResourceIsStable(t *testing.T) {
	a, err := Resource(t.Context(), "1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := Resource(t.Context(), "1")
	if err != nil {
		t.Fatal(err)
	}
	if !a.Equal(b) {
		t.Errorf("%v and %v", a, b)
	}
	for _, key := range []attribute.Key{"process.pid", "os.description", "container.id", "process.executable.name"} {
		if _, ok := a.Set().Value(key); ok {
			t.Errorf("%s is there, which changes and begins every series anew", key)
		}
	}
}

// A machine id is confidential (machine-id(5)), and a state keeps what it is told.
func TestMachineIsAHash(t *testing.T) {
	one, two := hashed("0123456789abcdef0123456789abcdef"), hashed("0123456789abcdef0123456789abcdee")
	if len(one) != 32 || one == two || strings.Contains(one, "0123456789abcdef") || hashed("") != "" {
		t.Errorf("%q and %q, and %q of none", one, two, hashed(""))
	}
}

func TestMachineID(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good", "0123456789abcdef0123456789abcdef\n")
	for _, bad := range []string{filepath.Join(dir, "none"), file("empty", ""), file("boot", "uninitialized\n"), file("short", "0123\n"), file("text", strings.Repeat("g", 32))} {
		if got := machineID(bad); got != "" {
			t.Errorf("%s: %q", bad, got)
		}
		if got := machineID(bad, good); got != "0123456789abcdef0123456789abcdef" {
			t.Errorf("%s and a good file: %q", bad, got)
		}
	}
}
