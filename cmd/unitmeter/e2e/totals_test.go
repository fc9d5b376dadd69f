package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// These tests run the real binary beside a real systemd, and read what a real
// Collector received.

// host is a rig with a Collector and an agent in it.
type host struct {
	*systemdtest.Rig
	t       *testing.T
	records string // the Collector's file, as seen from outside
	mu      sync.Mutex
	parsed  []point
	offset  int64
}

// point is one data point that the Collector received.
type point struct {
	metric, unit, direction string
	start, time             time.Time
	value                   int64
	delta                   bool
}

const collectorFile = "/run/otelcol/metrics.json"

// newHost boots a rig and starts a Collector with the configuration of
// examples/otel-collector that config names.
func newHost(t *testing.T, config string, env ...string) *host {
	t.Helper()
	rig := systemdtest.Start(t)
	text, err := os.ReadFile("../../../examples/otel-collector/" + config)
	if err != nil {
		t.Fatal(err)
	}
	rig.WriteFile(t, "/etc/otelcol/config.yaml", string(text))
	rig.Run(t, "mkdir", "-p", filepath.Dir(collectorFile))
	h := &host{Rig: rig, t: t, records: rig.Path(collectorFile)}
	h.start("otelcol", append([]string{"OTELCOL_FILE=" + collectorFile}, env...), tool(t, "otelcol"), "--config=/etc/otelcol/config.yaml")
	eventually(h.t, "the Collector listens", func() bool {
		return rig.Command(context.Background(), "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/4317").Run() == nil
	})
	return h
}

// start runs a command as a transient service of the rig.
func (h *host) start(unit string, env []string, command ...string) {
	h.t.Helper()
	args := []string{"--quiet", "--collect", "--unit=" + unit}
	for _, e := range env {
		args = append(args, "--setenv="+e)
	}
	h.Run(h.t, "systemd-run", append(args, command...)...)
}

// startAgent starts the agent with an export each 500 ms, to where it sends when
// nothing else is set.
func (h *host) startAgent(env ...string) {
	h.t.Helper()
	binary, err := agentBinary()
	if err != nil {
		h.t.Fatal(err)
	}
	h.start("unitmeter", append([]string{
		"OTEL_METRIC_EXPORT_INTERVAL=500", "OTEL_METRIC_EXPORT_TIMEOUT=20000",
		"UNITMETER_STATE_DIR=/var/lib/unitmeter",
	}, env...), binary, "run")
	h.t.Cleanup(func() {
		if h.t.Failed() {
			log, _ := h.Command(context.Background(), "journalctl", "--no-pager", "-u", "unitmeter", "-n", "60").CombinedOutput()
			h.t.Logf("the agent's log:\n%s", log)
		}
	})
}

// points returns all points that the Collector received so far, in order.
func (h *host) points() []point {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	more, n, err := readPoints(h.records, h.offset)
	if err != nil {
		h.t.Fatal(err)
	}
	h.parsed, h.offset = append(h.parsed, more...), n
	return h.parsed
}

// readPoints reads whole lines of the file exporter from offset on.
func readPoints(path string, offset int64) (points []point, end int64, err error) {
	file, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil, offset, nil
	}
	if err != nil {
		return nil, offset, err
	}
	defer file.Close()
	if _, err := file.Seek(offset, 0); err != nil {
		return nil, offset, err
	}
	lines := bufio.NewReader(file)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return points, offset, nil // the rest of the line is still to come
		}
		offset += int64(len(line))
		var data metricspb.MetricsData
		if err := protojson.Unmarshal(line, &data); err != nil {
			return nil, offset, fmt.Errorf("parse the Collector's file: %w", err)
		}
		for _, resource := range data.ResourceMetrics {
			for _, scope := range resource.ScopeMetrics {
				for _, m := range scope.Metrics {
					for _, p := range m.GetSum().GetDataPoints() {
						q := point{
							metric: m.Name, value: p.GetAsInt(),
							start: time.Unix(0, int64(p.StartTimeUnixNano)), time: time.Unix(0, int64(p.TimeUnixNano)),
							delta: m.GetSum().AggregationTemporality == metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_DELTA,
						}
						for _, a := range p.Attributes {
							switch a.Key {
							case "systemd.unit.name":
								q.unit = a.Value.GetStringValue()
							case "network.io.direction":
								q.direction = a.Value.GetStringValue()
							}
						}
						points = append(points, q)
					}
				}
			}
		}
	}
}

// received returns the last totals of a unit that the Collector received.
func (h *host) received(unit string) (c systemd.Counters) {
	h.t.Helper()
	for _, p := range h.points() {
		if p.unit == unit {
			*counterOf(&c, p) = uint64(p.value)
		}
	}
	return c
}

// counterOf returns the counter that a point is of.
func counterOf(c *systemd.Counters, p point) *uint64 {
	switch {
	case p.metric == receiver.IOName && p.direction == "receive":
		return &c.IngressBytes
	case p.metric == receiver.IOName:
		return &c.EgressBytes
	case p.direction == "receive":
		return &c.IngressPackets
	}
	return &c.EgressPackets
}

// shown returns what systemctl show says.
func (h *host) shown(unit string) systemd.Counters {
	h.t.Helper()
	a := h.Show(h.t, unit)
	return systemd.Counters{IngressBytes: a.IngressBytes, IngressPackets: a.IngressPackets, EgressBytes: a.EgressBytes, EgressPackets: a.EgressPackets}
}

// checkSteps checks what must hold for each cumulative series: points come in
// order, no value falls while the start time stands, and the start time never
// goes back or beyond the point.
func checkSteps(t *testing.T, points []point) {
	t.Helper()
	last := map[string]point{}
	for _, p := range points {
		if p.unit == "" || p.delta {
			continue
		}
		key := p.metric + " " + p.unit + " " + p.direction
		before, ok := last[key]
		last[key] = p
		switch {
		case p.start.After(p.time):
			t.Errorf("%s: start %s is after time %s", key, p.start, p.time)
		case !ok:
		case p.time.Before(before.time):
			t.Errorf("%s: time went back from %s to %s", key, before.time, p.time)
		case !p.start.Equal(before.start):
			t.Errorf("%s: start moved from %s to %s", key, before.start, p.start)
		case p.value < before.value:
			t.Errorf("%s: fell from %d to %d", key, before.value, p.value)
		}
	}
}

// TestTotalsEqualSystemd loads a NATS server and a PostgreSQL, and compares
// what the Collector received with systemctl show once they are quiet.
func TestTotalsEqualSystemd(t *testing.T) {
	t.Parallel()
	h := newHost(t, "test-file.yaml")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	h.startAgent()
	// DynamicUser= hides /tmp and /var/tmp, and a checkout that is there.
	const nats = "/usr/local/bin/nats"
	h.Run(t, "install", tool(t, "nats"), tool(t, "nats-server"), filepath.Dir(nats))
	h.Run(t, "systemd-run", "--quiet", "--unit=e2e-nats", "-p", "IPAccounting=yes", "-p", "PrivateNetwork=yes", "-p", "DynamicUser=yes",
		nats+"-server", "-a", "127.0.0.1", "-m", "8222")
	bin, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bin) == 0 {
		t.Fatalf("find PostgreSQL in /usr/lib/postgresql: %v; run \"make tools\"", err)
	}
	postgres := slices.Max(bin)
	h.Run(t, "install", "-d", "-o", "postgres", "/var/lib/e2e-pg")
	h.Run(t, "setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", postgres+"/initdb", "-D", "/var/lib/e2e-pg", "-A", "trust")
	h.Run(t, "systemd-run", "--quiet", "--unit=e2e-pg", "-p", "IPAccounting=yes", "-p", "User=postgres",
		postgres+"/postgres", "-D", "/var/lib/e2e-pg", "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
	pgbench := func(args ...string) *exec.Cmd {
		return h.Command(ctx, postgres+"/pgbench", append([]string{"-h", "127.0.0.1", "-U", "postgres"}, append(args, "postgres")...)...)
	}
	eventually(h.t, "PostgreSQL is initialised", func() bool { return pgbench("-i", "-q").Run() == nil })

	inNamespace := []string{"--quiet", "--wait", "--collect", "-p", "PrivateNetwork=yes", "-p", "JoinsNamespaceOf=e2e-nats.service"}
	eventually(h.t, "NATS answers", func() bool {
		return h.Command(ctx, "systemd-run", append(inNamespace, nats, "rtt")...).Run() == nil
	})
	var load sync.WaitGroup
	run := func(cmd *exec.Cmd) {
		load.Go(func() {
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", cmd, err, out)
			}
		})
	}
	run(h.Command(ctx, "systemd-run", append(inNamespace, "timeout", "300", "bash", "-c",
		nats+" bench sub benchsubject --clients 10 --msgs 20000 --no-progress & "+
			// What nobody has subscribed to yet is lost.
			`until exec 3<>/dev/tcp/127.0.0.1/8222; printf 'GET /subsz?subs=1&test=benchsubject HTTP/1.0\r\n\r\n' >&3; [ "$(grep -c '"subject": "benchsubject"' <&3)" = 10 ]; do sleep .1; done; `+
			nats+" bench pub benchsubject --clients 1 --msgs 20000 --size 128 --no-progress && wait $!")...))
	run(pgbench("-c", "4", "-t", "500"))
	load.Wait()

	for _, unit := range []string{"e2e-nats.service", "e2e-pg.service"} {
		var got, want systemd.Counters
		within(patience, func() bool { got, want = h.received(unit), h.shown(unit); return got == want })
		if got != want || want.EgressBytes < 1<<20 {
			t.Errorf("%s: the Collector has %+v, systemctl show says %+v", unit, got, want)
		}
	}
	checkSteps(t, h.points())

	// The third way of the article: one call, one object.
	binary, _ := agentBinary()
	var units []struct {
		State          string
		EgressBytes    uint64 `json:"egress_bytes"`
		IngressPackets uint64 `json:"ingress_packets"`
	}
	if err := json.Unmarshal([]byte(h.Run(t, binary, "once", "e2e-nats", "--json")), &units); err != nil {
		t.Fatal(err)
	}
	want := h.shown("e2e-nats.service")
	if len(units) != 1 || units[0].State != "on" || units[0].EgressBytes != want.EgressBytes || units[0].IngressPackets != want.IngressPackets {
		t.Errorf("once --json says %+v, systemctl show says %+v", units, want)
	}
}

// talker is a service that sends datagrams of 128 B, IP header included, when
// it is told to.
type talker struct {
	*host
	unit string
	sent uint64 // packets while accounting was on
}

const packetBytes = 128

func newTalker(h *host, properties ...string) *talker {
	h.t.Helper()
	h.start("e2e-sink", nil, h.Traffic(), "udp-sink", "127.0.0.1:9999")
	h.WriteFile(h.t, "/usr/local/bin/talk", "#!/bin/bash\nmkfifo /run/talk; exec 3<>/run/talk\n"+
		"while read -u 3 n; do "+h.Traffic()+" udp-send 127.0.0.1:9999 -bytes 100 -count $n && echo $n >>/run/talked; done\n")
	h.WriteFile(h.t, "/etc/systemd/system/e2e-talker.service",
		"[Service]\nExecStart=/usr/local/bin/talk\nExecStopPost=rm -f /run/talk\n"+strings.Join(properties, "\n")+"\n")
	h.Run(h.t, "systemctl", "daemon-reload")
	h.Run(h.t, "systemctl", "start", "e2e-talker")
	return &talker{host: h, unit: "e2e-talker.service"}
}

// send makes the service send n datagrams, returns when it has, and notes how
// many of them systemd counted. After a reload that may be fewer: systemd
// attaches its new counters a moment after it has said that it is done.
func (k *talker) send(n int) {
	k.t.Helper()
	eventually(k.t, "the talker listens", func() bool { _, err := os.Stat(k.Path("/run/talk")); return err == nil })
	counted, before := k.shown(k.unit).EgressPackets, k.talked()
	k.Run(k.t, "bash", "-c", "echo "+strconv.Itoa(n)+" > /run/talk")
	eventually(k.t, "the talker has sent", func() bool { return len(k.talked()) > len(before) })
	k.sent += k.shown(k.unit).EgressPackets - counted
}

func (k *talker) talked() string {
	text, _ := os.ReadFile(k.Path("/run/talked"))
	return string(text)
}

// arrive waits until the Collector has the exact total.
func (k *talker) arrive(after string) {
	k.t.Helper()
	var got systemd.Counters
	want := systemd.Counters{EgressPackets: k.sent, EgressBytes: k.sent * packetBytes}
	if within(patience, func() bool { got = k.received(k.unit); return got == want }) {
		return
	}
	k.t.Fatalf("after %s: the Collector has %+v, sent were %+v", after, got, want)
}

// disturb takes the talker through all that happens to units, the bus and
// systemd, with traffic of exactly known size between. Traffic during a reload
// is left out: systemd itself loses some of it.
func (k *talker) disturb() {
	k.send(100)
	k.arrive("start")
	for _, step := range []struct {
		name string
		do   [][]string
	}{
		{"restart of the unit", [][]string{{"systemctl", "restart", k.unit}}},
		{"kill of the unit", [][]string{{"systemctl", "kill", "-s", "KILL", k.unit}, {"bash", "-c", "until systemctl start " + k.unit + "; do sleep .1; done"}}},
		{"daemon-reload", [][]string{{"systemctl", "daemon-reload"}}},
		{"daemon-reexec", [][]string{{"systemctl", "daemon-reexec"}}},
		{"restart of dbus", [][]string{{"systemctl", "restart", "dbus"}}},
		{"two reloads in a row", [][]string{{"systemctl", "daemon-reload"}, {"systemctl", "daemon-reload"}}},
	} {
		for _, command := range step.do {
			k.Run(k.t, command[0], command[1:]...)
		}
		before := k.sent
		k.send(50)
		if lost := before + 50 - k.sent; lost > 0 {
			k.t.Logf("after %s: systemd itself did not count %d packets", step.name, lost)
		}
		k.arrive(step.name)
	}
	k.Run(k.t, "systemctl", "set-property", "--runtime", k.unit, "IPAccounting=no")
	eventually(k.t, "accounting is off", func() bool { return !k.Show(k.t, k.unit).OK })
	k.send(10) // nobody counts them
	k.Run(k.t, "systemctl", "set-property", "--runtime", k.unit, "IPAccounting=yes")
	k.send(200) // more than before, so that the counter does not fall
	k.arrive("accounting off and on")
}

// TestDisturbances checks the totals through restarts, reloads and toggles at
// the Collector, also as deltas that the Collector makes by our start times.
func TestDisturbances(t *testing.T) {
	t.Parallel()
	for _, bus := range []string{"system", "private"} {
		t.Run(bus, func(t *testing.T) {
			t.Parallel()
			const deltaFile = "/run/otelcol/delta.json"
			h := newHost(t, "test-delta.yaml", "OTELCOL_DELTA_FILE="+deltaFile)
			h.startAgent("UNITMETER_BUS=" + bus)
			k := newTalker(h, "IPAccounting=yes")
			k.disturb()
			checkSteps(t, h.points())
			eventually(h.t, "the Collector's deltas add up to what was sent", func() bool {
				deltas, _, err := readPoints(h.Path(deltaFile), 0)
				if err != nil {
					t.Fatal(err)
				}
				var sum systemd.Counters
				for _, p := range deltas {
					if p.unit == k.unit {
						if p.value < 0 || !p.delta {
							t.Fatalf("not a delta, or a negative one: %+v", p)
						}
						*counterOf(&sum, p) += uint64(p.value)
					}
				}
				return sum == systemd.Counters{EgressPackets: k.sent, EgressBytes: k.sent * packetBytes}
			})
		})
	}
}

// TestDeltaTemporality checks the deltas that the agent makes itself.
func TestDeltaTemporality(t *testing.T) {
	t.Parallel()
	h := newHost(t, "test-file.yaml")
	k := newTalker(h, "IPAccounting=yes")
	k.send(70) // before the agent is there
	h.startAgent("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta")
	k.send(100)
	k.Run(t, "systemctl", "restart", k.unit)
	k.send(30)
	var sum systemd.Counters
	eventually(h.t, "the deltas add up to what was sent", func() bool {
		sum = systemd.Counters{}
		for _, p := range h.points() {
			if p.unit == k.unit {
				if !p.delta || p.value < 0 || !p.start.Before(p.time) {
					t.Fatalf("no good delta: %+v", p)
				}
				*counterOf(&sum, p) += uint64(p.value)
			}
		}
		return sum == systemd.Counters{EgressPackets: k.sent, EgressBytes: k.sent * packetBytes}
	})
}

// TestPrometheus checks what a real Prometheus 3 makes of our start times, with
// a unit that had traffic long before the agent came.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	prometheus := "http://127.0.0.1:9090"
	h := newHost(t, "test-prometheus.yaml", "OTELCOL_PROMETHEUS_URL="+prometheus)
	config, err := os.ReadFile("../../../examples/otel-collector/prometheus.yaml")
	if err != nil {
		t.Fatal(err)
	}
	h.WriteFile(t, "/etc/prometheus.yaml", string(config))
	h.start("prometheus", nil, tool(t, "prometheus"), "--config.file=/etc/prometheus.yaml", "--web.enable-otlp-receiver",
		"--web.listen-address=127.0.0.1:9090", "--storage.tsdb.path=/run/prometheus",
		"--enable-feature=created-timestamp-zero-ingestion,promql-extended-range-selectors")
	query := func(expression string) (value float64, ok bool) {
		out, err := h.Command(context.Background(), "bash", "-c",
			`exec 3<>/dev/tcp/127.0.0.1/9090; printf 'GET /api/v1/query?query=%s HTTP/1.0\r\n\r\n' "$0" >&3; cat <&3`, url.QueryEscape(expression)).Output()
		if err != nil {
			return 0, false
		}
		_, body, _ := bytes.Cut(out, []byte("\r\n\r\n"))
		var answer struct {
			Data struct {
				Result []struct{ Value [2]any }
			}
		}
		if err := json.Unmarshal(body, &answer); err != nil || len(answer.Data.Result) != 1 {
			return 0, false
		}
		text, _ := answer.Data.Result[0].Value[1].(string)
		value, err = strconv.ParseFloat(text, 64)
		return value, err == nil
	}
	k := newTalker(h, "IPAccounting=yes")
	k.send(1000)
	h.startAgent()
	selector := `systemd_unit_network_io_bytes_total{systemd_unit_name="e2e-talker.service",network_io_direction="transmit"}`
	expect := func(what, expression string, want float64) {
		t.Helper()
		var got float64
		eventually(h.t, fmt.Sprintf("%s: %s is %g (last: %g)", what, expression, want, got), func() bool {
			value, ok := query(expression)
			got = value
			return ok && value == want
		})
	}
	expect("the total", selector, 1000*packetBytes)
	for range 3 {
		k.Run(t, "systemctl", "restart", k.unit)
		k.send(10)
		expect("the total after a restart", selector, float64(k.sent*packetBytes))
	}
	expect("no reset", "resets("+selector+"[10m])", 0)
	// The unit's start is a sample of 0: all of its traffic is an increase,
	// and none of it is in the minute of the agent's start alone.
	expect("the increase since the unit's start", "increase("+selector+"[10m] anchored)", float64(k.sent*packetBytes))
}
