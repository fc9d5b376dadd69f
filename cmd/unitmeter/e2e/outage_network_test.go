package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
)

// fault is something that befalls the way from the agent to the Collector. It
// lasts until fix.
type fault struct {
	name       string
	begin, fix func(s *site)
	loses      bool // it makes a backlog
}

// cut is a rule of nftables in the agent's network, for all that it sends.
func cut(verdict string) fault {
	return fault{
		name: "nft " + verdict, loses: true,
		begin: func(s *site) {
			s.in("ip netns exec far nft 'table ip cut { chain out { type filter hook output priority 0; tcp dport { 4317, 4318 } " + verdict + "; }; }'")
		},
		fix: func(s *site) { s.in("ip netns exec far nft delete table ip cut") },
	}
}

// toxic is a toxic of toxiproxy on all connections, in one direction: upstream is
// to the Collector.
func toxic(kind, stream string, loses bool, attributes map[string]int) fault {
	name := kind + " " + stream
	return fault{
		name: name, loses: loses,
		begin: func(s *site) {
			s.toxiproxy("POST", "/proxies/collector/toxics", map[string]any{"name": "t", "type": kind, "stream": stream, "attributes": attributes})
		},
		fix: func(s *site) { s.toxiproxy("DELETE", "/proxies/collector/toxics/t", nil) },
	}
}

// toxiproxy makes one call of its API.
func (s *site) toxiproxy(method, path string, body any) {
	s.t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		s.t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return s.Dial(ctx, network, addr)
	}}}
	request, err := http.NewRequestWithContext(s.t.Context(), method, "http://127.0.0.1:8474"+path, bytes.NewReader(text))
	if err != nil {
		s.t.Fatal(err)
	}
	var answer *http.Response
	eventually(s.t, "toxiproxy answers", func() bool {
		answer, err = client.Do(request.Clone(s.t.Context()))
		request.Body = io.NopCloser(bytes.NewReader(text))
		return err == nil
	})
	defer answer.Body.Close()
	if answer.StatusCode >= 300 {
		said, _ := io.ReadAll(answer.Body)
		s.t.Fatalf("toxiproxy %s %s %s: %s %s", method, path, text, answer.Status, said)
	}
}

// TestNetworkFaults breaks the network between the agent and a real Collector in
// every way that is at hand. The agent must get through again by itself and lose
// nothing.
func TestNetworkFaults(t *testing.T) {
	t.Parallel()
	faults := []fault{
		cut("drop"), cut("reject with tcp reset"), cut("reject with icmp type admin-prohibited"),
		{
			name: "link down", loses: true,
			begin: func(s *site) { s.in("ip link set near down") },
			fix:   func(s *site) { s.in("ip link set near up") },
		},
		toxic("timeout", "upstream", true, map[string]int{"timeout": 0}),
		toxic("timeout", "downstream", true, map[string]int{"timeout": 300}),
		toxic("reset_peer", "upstream", true, map[string]int{"timeout": 0}),
		toxic("reset_peer", "downstream", true, map[string]int{"timeout": 100}),
		toxic("bandwidth", "upstream", true, map[string]int{"rate": 8}),
		toxic("latency", "downstream", false, map[string]int{"latency": 700, "jitter": 300}),
		toxic("slicer", "upstream", false, map[string]int{"average_size": 64, "size_variation": 32, "delay": 20}),
		// The Collector has the request, and its answer breaks off.
		toxic("limit_data", "downstream", false, map[string]int{"bytes": 150}),
		toxic("limit_data", "upstream", true, map[string]int{"bytes": 9000}),
	}
	for protocol, port := range map[string]string{"grpc": "4317", "http/protobuf": "4318"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, collectorConfig("      grpc: {endpoint: \"127.0.0.1:4317\"}\n      http: {endpoint: \"127.0.0.1:4318\"}"))
			s.start("toxiproxy", []string{"LOG_LEVEL=error"}, tool(t, "toxiproxy"), "-host", "127.0.0.1")
			s.toxiproxy("POST", "/proxies", map[string]any{
				"name": "collector", "listen": "10.99.0.1:" + port, "upstream": "127.0.0.1:" + port, "enabled": true})
			s.startAgent("OTEL_EXPORTER_OTLP_PROTOCOL="+protocol, "OTEL_EXPORTER_OTLP_ENDPOINT=http://10.99.0.1:"+port)
			for i, f := range faults {
				if protocol != "grpc" && i%2 == 1 && !long() {
					continue
				}
				before, began := s.tally(), time.Now()
				f.begin(s)
				if f.loses {
					eventually(s.t, f.name+": a backlog comes about", func() bool { return s.backlog() > times(10, 100) })
				} else {
					time.Sleep(time.Duration(times(1, 30)) * time.Second) // time for it to do harm
				}
				f.fix(s)
				fixed := time.Now()
				s.caughtUp()
				after := s.tally()
				t.Logf("%s for %v: caught up after %v; %d calls repeated", f.name, fixed.Sub(began).Round(100*time.Millisecond),
					time.Since(fixed).Round(100*time.Millisecond), after-before)
			}
			if n := strings.TrimSpace(s.in("systemctl show -p NRestarts --value unitmeter")); n != "0" {
				t.Errorf("the agent has restarted %s times", n)
			}
			cycles, repeats, points := s.settle()
			t.Logf("%d cycles committed, all arrived; %d calls repeated with %d points", cycles, repeats, points)
		})
	}
}

// TestCollectorAnswersAndDies kills the Collector just after the last of it has
// the request, so that some answers arrive and some do not.
func TestCollectorAnswersAndDies(t *testing.T) {
	t.Parallel()
	s := newSite(t, collectorConfig(plainReceivers))
	var armed atomic.Bool
	s.answered = func() { // holds up the answer to the Collector until it is dying, or gives it a start
		if !armed.CompareAndSwap(true, false) {
			return
		}
		kill := func() {
			_ = s.Command(context.Background(), "systemctl", "kill", "-s", "KILL", "collector").Run()
		}
		if rand.IntN(2) == 0 {
			kill()
		} else {
			go kill()
		}
	}
	s.startAgent(patientCalls)
	n := 0
	for ; n < times(4, 50) || s.tally() == 0 && n < 100; n++ { // an answer must be lost
		armed.Store(true)
		eventually(s.t, "the Collector is killed", func() bool { return !armed.Load() })
		s.caughtUp()
	}
	cycles, repeats, points := s.settle()
	if repeats == 0 || repeats > n {
		t.Errorf("%d calls came twice after %d kills", repeats, n)
	}
	t.Logf("%d kills: %d cycles committed, all arrived; %d calls repeated with %d points", n, cycles, repeats, points)
}

// TestTLSBroken gives the Collector a certificate of another authority while the
// agent runs, and then the right one again.
func TestTLSBroken(t *testing.T) {
	t.Parallel()
	for protocol, port := range map[string]string{"grpc": "4317", "http/protobuf": "4318"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			const keys = "{cert_file: /etc/otelcol/cert.pem, key_file: /etc/otelcol/key.pem}"
			s := newSite(t, collectorConfig("      grpc: {endpoint: \"0.0.0.0:4317\", tls: "+keys+"}\n      http: {endpoint: \"0.0.0.0:4318\", tls: "+keys+"}"))
			right, wrong := otlptest.NewCA(t), otlptest.NewCA(t)
			use := func(ca *otlptest.CA) {
				cert, key := ca.ServerFiles(t, net.IPv4(10, 99, 0, 1))
				for from, to := range map[string]string{cert: "cert.pem", key: "key.pem"} {
					text, err := os.ReadFile(from)
					if err != nil {
						t.Fatal(err)
					}
					s.WriteFile(t, "/etc/otelcol/"+to, string(text))
				}
				s.in("systemctl restart collector")
			}
			use(right)
			text, err := os.ReadFile(right.File)
			if err != nil {
				t.Fatal(err)
			}
			s.WriteFile(t, "/etc/unitmeter/ca.pem", string(text))
			s.startAgent("OTEL_EXPORTER_OTLP_PROTOCOL="+protocol, "OTEL_EXPORTER_OTLP_ENDPOINT=https://10.99.0.1:"+port,
				"OTEL_EXPORTER_OTLP_CERTIFICATE=/etc/unitmeter/ca.pem")
			use(wrong)
			eventually(s.t, "a backlog comes about", func() bool { return s.backlog() > 10 })
			eventually(s.t, "the log says what to look at", func() bool {
				return strings.Contains(s.in("journalctl -o cat --no-pager -u unitmeter"), "check OTEL_EXPORTER_OTLP_CERTIFICATE")
			})
			use(right)
			s.caughtUp()
			cycles, repeats, points := s.settle()
			t.Logf("%d cycles committed, all arrived; %d calls repeated with %d points", cycles, repeats, points)
		})
	}
}

// TestMessageLimits has a real Collector, with its limit for a message as it is
// by default (4 MiB over gRPC) and smaller, take a backlog of requests that are small and
// of requests that are larger than that each. The agent is the real one.
func TestMessageLimits(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		receiver string
		protocol string
		units    int // 580 B each on the wire
		cycles   int
	}{
		{"requests that are to be joined", `grpc: {endpoint: "0.0.0.0:4317"}`, "grpc", 300, 40},
		{"requests that are to be split", `grpc: {endpoint: "0.0.0.0:4317"}`, "grpc", 8000, 1},
		{"requests that are to be split for a smaller limit", `grpc: {endpoint: "0.0.0.0:4317", max_recv_msg_size_mib: 1}`, "grpc", 2000, 2},
		{"the same over HTTP", `http: {endpoint: "0.0.0.0:4317", max_request_body_size: 1048576}`, "http/protobuf", 2000, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, collectorConfig("      "+c.receiver))
			o := outage{dir: filepath.Join(t.TempDir(), "state"), endpoint: otlptest.FreeAddress(t), units: c.units, cycles: c.cycles}
			o.begin = time.Now().Add(-time.Hour)
			o.fill(t)
			s.in("mkdir -m 700 " + siteState)
			for _, name := range []string{"unitmeter.db", "unitmeter.db-wal"} {
				text, err := os.ReadFile(filepath.Join(o.dir, name))
				if err != nil {
					t.Fatal(err)
				}
				s.WriteFile(t, siteState+"/"+name, string(text))
			}
			s.in("chmod 600 " + siteState + "/*")
			s.startAgent("OTEL_EXPORTER_OTLP_TIMEOUT=20000", "UNITMETER_MAX_UNITS=20000", "OTEL_EXPORTER_OTLP_PROTOCOL="+c.protocol)
			s.caughtUp()
			cycles, _, _ := s.settle()
			compareFleet(t, s.witness, o)
			t.Logf("%d cycles of %d units and %d others arrived in %d calls", c.cycles, c.units, cycles-c.cycles, s.calls())
		})
	}
}

// compareFleet wants every point of the outage to have arrived.
func compareFleet(t *testing.T, w *witness, o outage) {
	t.Helper()
	times := map[string][]int64{}
	for f, cycle := o.fleet(), 0; cycle < o.cycles; cycle++ {
		o.pass(f, cycle)
		for _, s := range f.series {
			times[s.Name] = append(times[s.Name], s.Time.UnixNano())
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	series := 0
	for _, h := range w.series {
		want, ok := times[h.last.Attrs["systemd.unit.name"]]
		if !ok {
			continue
		}
		series++
		if fmt.Sprint(h.times) != fmt.Sprint(want) {
			t.Errorf("%s has points at %v, want %v", h.last.Series(), h.times, want)
			return
		}
	}
	if series != 4*o.units {
		t.Errorf("%d series have arrived, want %d", series, 4*o.units)
	}
}
