package exporter

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/sdk/resource"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// serving returns a Prometheus of a host with n units, and the host.
func serving(t *testing.T, source func(*host) Sweeper, n int) (*Prometheus, *host) {
	t.Helper()
	h := &host{}
	p, err := NewPrometheus(t.Context(), PrometheusConfig{Address: "127.0.0.1:0", Source: source(h), Resource: resource.Empty()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Shutdown(context.Background()) })
	exp, err := New(t.Context(), Config{Source: h})
	if err != nil {
		t.Fatal(err)
	}
	h.meter(t, exp, p.Reader())
	units := make([]ledger.Series, n)
	for i := range units {
		units[i] = unit(fmt.Sprintf("unit-%d.service", i), at(0), at(100), 5)
	}
	h.see(units...)
	p.Serve()
	return p, h
}

// get makes one request over a connection of its own.
func get(t *testing.T, p *Prometheus, path string, headers ...string) (*http.Response, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+p.Addr().String()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	resp, err := transport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

func itself(h *host) Sweeper { return h }

// TestStuckScrapers: clients that ask and never read hold nobody up, however many
// they are, nor the end of the agent.
func TestStuckScrapers(t *testing.T) {
	p, h := serving(t, itself, 1000)
	for range 3 * maxConnections {
		conn, err := net.Dial("tcp", p.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.(*net.TCPConn).SetReadBuffer(2048)
		if _, err := io.WriteString(conn, strings.Repeat("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 4)); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if resp, body := get(t, p, "/metrics"); resp.StatusCode != http.StatusOK || strings.Count(body, "systemd_unit_network_io_bytes_total{") != 2*1000 {
			t.Errorf("status %d, %d bytes", resp.StatusCode, len(body))
		}
	}
	p.conns.mu.Lock()
	open := len(p.conns.busy) + len(p.conns.idle)
	p.conns.mu.Unlock()
	if open > maxConnections {
		t.Errorf("%d connections are open", open)
	}
	if err := h.provider.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	h.see(unit("late.service", at(0), at(200), 5))
	if resp, body := get(t, p, "/metrics"); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a scrape after the end of the metrics has status %d and %q", resp.StatusCode, body)
	}
	if err := p.Shutdown(t.Context()); err != nil {
		t.Errorf("the end: %v", err)
	}
}

// slowHost is a host whose sweeps come when the test lets them.
type slowHost struct {
	*host
	mu    sync.Mutex
	calls []context.Context
	gate  chan struct{}
}

func (s *slowHost) Sweep(ctx context.Context) *receiver.Sweep {
	s.mu.Lock()
	s.calls = append(s.calls, ctx)
	s.mu.Unlock()
	select {
	case <-s.gate:
		return s.Last()
	case <-ctx.Done():
		return &receiver.Sweep{Time: time.Now(), Partial: true}
	}
}

// TestScrapeTimeout: the time that Prometheus allows is for sweep and answer.
func TestScrapeTimeout(t *testing.T) {
	slow := &slowHost{gate: make(chan struct{})}
	p, _ := serving(t, func(h *host) Sweeper { slow.host = h; return slow }, 1)
	const header = "X-Prometheus-Scrape-Timeout-Seconds"
	// systemd hangs: the answer comes nevertheless, and has all that needs no systemd.
	if resp, body := get(t, p, "/metrics", header, "0.4"); resp.StatusCode != http.StatusOK || !strings.Contains(body, "\nunitmeter_build_info{") {
		t.Errorf("status %d: %s", resp.StatusCode, body)
	}
	close(slow.gate)
	for text, want := range map[string]time.Duration{"0.4": 300 * time.Millisecond, "3": 2250 * time.Millisecond, "10": 9 * time.Second, "1e300": time.Hour - time.Second, "": -1} {
		before := time.Now()
		if resp, _ := get(t, p, "/metrics", header, text); resp.StatusCode != http.StatusOK {
			t.Errorf("%q: status %d", text, resp.StatusCode)
		}
		end, bounded := slow.calls[len(slow.calls)-1].Deadline()
		if bounded != (want > 0) {
			t.Errorf("%q: bounded %v", text, bounded)
		}
		if got := end.Sub(before); bounded && (got < want || got > want+time.Since(before)) {
			t.Errorf("%q: the sweep has %v, want %v", text, got, want)
		}
	}
	for _, text := range []string{"0", "-1", "NaN", "ten"} {
		resp, body := get(t, p, "/metrics", header, text)
		if resp.StatusCode != http.StatusBadRequest || !strings.Contains(body, header) || !strings.Contains(body, text) {
			t.Errorf("%q: status %d, %q", text, resp.StatusCode, body)
		}
	}
}

// TestScrapesShare: scrapes of one sweep share its answer, and only those with the
// same format.
func TestScrapesShare(t *testing.T) {
	p, h := serving(t, itself, 1)
	_, first := get(t, p, "/metrics")
	_, same := get(t, p, "/metrics")
	if first != same {
		t.Error("two scrapes of one sweep differ")
	}
	resp, _ := get(t, p, "/metrics", "Accept", "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited")
	if got := resp.Header.Get("Content-Type"); !strings.HasPrefix(got, "application/vnd.google.protobuf") {
		t.Errorf("who wants protobuf gets %s", got)
	}
	h.see(unit("b.service", at(0), at(200), 7))
	if _, next := get(t, p, "/metrics"); !strings.Contains(next, "b.service") {
		t.Error("the next sweep is not in the answer")
	}
}

func TestScrapeCompressed(t *testing.T) {
	p, _ := serving(t, itself, 1)
	for accept, packed := range map[string]bool{"gzip": true, "deflate, gzip;q=0.8": true, "": false, "identity": false, "gzip;q=0": false, "gzip;q=0.000, br": false} {
		resp, body := get(t, p, "/metrics", "Accept-Encoding", accept)
		if got := resp.Header.Get("Content-Encoding") == "gzip"; got != packed || got == strings.Contains(body, "unitmeter_build_info") {
			t.Errorf("%q: compressed %v", accept, got)
		}
	}
}

func TestLandingPage(t *testing.T) {
	p, _ := serving(t, itself, 1)
	if resp, body := get(t, p, "/"); resp.StatusCode != http.StatusOK || !strings.Contains(body, `href="metrics"`) {
		t.Errorf("status %d: %s", resp.StatusCode, body)
	}
	if resp, _ := get(t, p, "/debug/pprof/"); resp.StatusCode != http.StatusNotFound {
		t.Errorf("another path has status %d", resp.StatusCode)
	}
}
