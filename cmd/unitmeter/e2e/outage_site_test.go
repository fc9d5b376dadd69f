package e2e

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	_ "google.golang.org/grpc/encoding/gzip" // the server takes gzip, as a Collector does

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// site is a rig with a unit under steady traffic, the agent, a Collector without
// a queue of its own, and behind it a witness: what the Collector has answered
// for, the witness has.
//
//	agent (namespace "far", 10.99.0.2) -- 10.99.0.1 -- Collector 10.99.0.1:4317 -- witness 127.0.0.1:4327
type site struct {
	*host
	*witness
}

const (
	siteState   = "/var/lib/unitmeter"
	siteUnit    = "steady.service"
	siteSteady  = 400 // datagrams a second
	siteWitness = "127.0.0.1:4327"
)

// collectorConfig makes the Collector answer when, and only when, the witness
// has. receivers is the YAML under "protocols:".
func collectorConfig(receivers string) string {
	return `receivers:
  otlp:
    protocols:
` + receivers + `
exporters:
  otlp_grpc:
    endpoint: ` + siteWitness + `
    timeout: 60s
    tls: {insecure: true}
    sending_queue: {enabled: false}
    retry_on_failure: {enabled: false}
service:
  pipelines:
    metrics: {receivers: [otlp], exporters: [otlp_grpc]}
  telemetry:
    metrics: {level: none}
`
}

const plainReceivers = `      grpc: {endpoint: "0.0.0.0:4317"}
      http: {endpoint: "0.0.0.0:4318"}`

// newSite boots the rig and starts all but the agent.
func newSite(t *testing.T, collector string) *site {
	t.Helper()
	s := &site{host: &host{Rig: systemdtest.Start(t), t: t}, witness: newWitness()}
	l, err := s.Listen(t.Context(), "tcp", siteWitness)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, s.witness)
	s.WriteFile(t, "/etc/otelcol/config.yaml", collector)
	s.WriteFile(t, "/etc/systemd/system/collector.service", "[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestart=always\nRestartSec=10ms\nExecStart="+
		tool(t, "otelcol")+" --config=/etc/otelcol/config.yaml\n")
	s.WriteFile(t, "/etc/systemd/system/sink.service", "[Service]\nType=notify\nExecStart="+s.Traffic()+" udp-sink "+udpSink+"\n")
	s.WriteFile(t, "/etc/systemd/system/"+siteUnit, fmt.Sprintf("[Service]\nIPAccounting=yes\nExecStart=%s udp-send %s -count 100000000 -rate %d\n", s.Traffic(), udpSink, siteSteady))
	s.in(`ip netns add far
ip link add near type veth peer name far netns far
ip addr add 10.99.0.1/24 dev near; ip link set near up
ip -n far addr add 10.99.0.2/24 dev far; ip -n far link set far up; ip -n far link set lo up
systemctl daemon-reload; systemctl start sink; systemctl start collector ` + siteUnit)
	return s
}

// in runs a script inside.
func (s *site) in(script string) string {
	s.t.Helper()
	return s.Run(s.t, "bash", "-euc", script)
}

// patientCalls is a setting for startAgent with which a call comes twice only
// because of what was killed, and not because the machine is slow.
const patientCalls = "OTEL_EXPORTER_OTLP_TIMEOUT=20000"

// startAgent starts the agent in its own network, with an export each 200 ms, and
// returns when its first points have arrived.
func (s *site) startAgent(env ...string) {
	s.t.Helper()
	binary, err := agentBinary()
	if err != nil {
		s.t.Fatal(err)
	}
	unit := "[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestart=always\nRestartSec=10ms\nNetworkNamespacePath=/run/netns/far\n" +
		"StateDirectory=unitmeter\nStateDirectoryMode=0700\nExecStart=" + binary + " run\n"
	for _, e := range append([]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT=http://10.99.0.1:4317", "OTEL_METRIC_EXPORT_INTERVAL=200", "OTEL_METRIC_EXPORT_TIMEOUT=20000",
		"OTEL_EXPORTER_OTLP_TIMEOUT=2000",
	}, env...) {
		unit += "Environment=" + e + "\n"
	}
	s.WriteFile(s.t, "/etc/systemd/system/unitmeter.service", unit)
	s.in("systemctl daemon-reload; systemctl start unitmeter")
	s.t.Cleanup(func() {
		if s.t.Failed() {
			log, _ := s.Command(context.Background(), "journalctl", "--no-pager", "-o", "short-precise", "-u", "unitmeter", "-n", "60").CombinedOutput()
			s.t.Logf("the logs:\n%s", log)
		}
	})
	eventually(s.t, "the first points have arrived", func() bool { return s.cycles() > 0 })
}

// backlog is how many requests wait in the agent's outbox.
func (s *site) backlog() int { return s.query("SELECT count(*) FROM outbox") }

// committed is how many requests the agent ever committed.
func (s *site) committed() int {
	return s.query("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'")
}

// query asks the agent's store for one number. SQLite cannot follow the paths of
// the rig from outside.
func (s *site) query(sql string) int {
	s.t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(s.Run(s.t, "sqlite3", "-readonly", "-cmd", ".timeout 60000", siteState+"/unitmeter.db", sql)))
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// caughtUp waits until a cycle that is committed from now on has arrived.
func (s *site) caughtUp() {
	s.t.Helper()
	now := time.Now()
	eventually(s.t, "the agent has caught up", func() bool { return s.newest().After(now) })
}

// exact ends the traffic, and checks that the totals are systemd's and that
// nothing was out of order.
func (s *site) exact() {
	s.t.Helper()
	s.in("systemctl kill -s STOP " + siteUnit)
	var want, got systemd.Counters
	if !within(patience, func() bool { want, got = s.shown(siteUnit), s.total(siteUnit); return got == want }) || want.EgressPackets == 0 {
		s.t.Errorf("%s: arrived are %+v, systemd says %+v", siteUnit, got, want)
	}
	s.witness.mu.Lock()
	defer s.witness.mu.Unlock()
	for i, p := range s.problems {
		if i == 5 {
			s.t.Errorf("and %d problems more", len(s.problems)-i)
			break
		}
		s.t.Error(p)
	}
}

// settle is exact, ends the agent, and checks that each request that it ever
// committed has arrived. It returns how many requests and points came again.
func (s *site) settle() (cycles, repeats, points int) {
	s.t.Helper()
	s.exact()
	s.in("systemctl stop unitmeter")
	if left := s.backlog(); left > 0 {
		s.t.Errorf("%d requests are left", left)
	}
	committed := s.committed()
	cycles, repeats, points = s.check(s.t, siteUnit, committed)
	return cycles, repeats, points
}

// witness is an OTLP/gRPC receiver that knows of each series what must come
// next. It is safe for concurrent use.
type witness struct {
	colmetricpb.UnimplementedMetricsServiceServer
	answered func() // if set, is called when a request has been taken

	mu       sync.Mutex
	series   map[string]*heard
	inFlight map[string]map[int64]int64 // of the last request with something new: value by time for each series
	requests int                        // that had something
	repeats  int                        // requests that had points that came before
	repeated int                        // those points
	problems []string
}

// heard is what a witness knows of one series.
type heard struct {
	last  otlptest.Point
	times []int64 // of all points, once each
}

func newWitness() *witness { return &witness{series: map[string]*heard{}} }

// pulse is a gauge that every cycle has just once.
const pulse = "unitmeter.outbox.requests"

// Export implements the OTLP service.
func (w *witness) Export(_ context.Context, request *colmetricpb.ExportMetricsServiceRequest) (*colmetricpb.ExportMetricsServiceResponse, error) {
	points := otlptest.Flatten(request)
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(points) == 0 {
		return &colmetricpb.ExportMetricsServiceResponse{}, nil
	}
	w.requests++
	content, news, repeated := map[string]map[int64]int64{}, false, 0
	for _, p := range points {
		key, at := p.Series(), p.Time.UnixNano()
		s, ok := w.series[key]
		if !ok {
			s = &heard{}
			w.series[key] = s
		}
		problem := func(format string, args ...any) {
			w.problems = append(w.problems, fmt.Sprintf(format, args...)+fmt.Sprintf("\n\tbefore: %s\n\tnow:    %s", s.last, p))
		}
		if content[key] == nil {
			content[key] = map[int64]int64{}
		}
		content[key][at] = p.Value
		if ok && !p.Time.After(s.last.Time) {
			repeated++
			if value, was := w.inFlight[key][at]; !was || value != p.Value {
				problem("a point comes late, or again though it was not in the last call")
			}
			continue
		}
		news = true
		switch {
		case !p.Start.IsZero() && p.Start.After(p.Time):
			problem("a point starts after its time")
		case ok && p.Attrs["systemd.unit.name"] != "" && !p.Start.Equal(s.last.Start):
			problem("a start has moved")
		case ok && p.Attrs["systemd.unit.name"] != "" && p.Value < s.last.Value:
			problem("a total has fallen")
		}
		s.last = p
		s.times = append(s.times, at)
	}
	if news {
		w.inFlight = content
	}
	if repeated > 0 {
		w.repeats++
		w.repeated += repeated
	}
	if w.answered != nil {
		w.answered()
	}
	return &colmetricpb.ExportMetricsServiceResponse{}, nil
}

// find returns the series of a metric of a unit; "" is for the agent's own. The
// caller holds mu.
func (w *witness) find(metric, unit string) (found []*heard) {
	for _, s := range w.series {
		if s.last.Metric == metric && s.last.Attrs["systemd.unit.name"] == unit {
			found = append(found, s)
		}
	}
	return found
}

// cycles is how many cycles have arrived.
func (w *witness) cycles() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, s := range w.find(pulse, "") {
		n += len(s.times)
	}
	return n
}

// newest is when the newest cycle was collected.
func (w *witness) newest() (at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.find("unitmeter.export.sent", "") { // which is there without a state as well
		if s.last.Time.After(at) {
			at = s.last.Time
		}
	}
	return at
}

// tally is how many calls repeated something.
func (w *witness) tally() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.repeats
}

// calls is how many requests brought something.
func (w *witness) calls() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.requests
}

// total is what a unit has in its series.
func (w *witness) total(unit string) (c systemd.Counters) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, metric := range []string{receiver.IOName, receiver.PacketCountName} {
		for _, s := range w.find(metric, unit) {
			*counterOf(&c, point{metric: metric, direction: s.last.Attrs["network.io.direction"]}) = uint64(s.last.Value)
		}
	}
	return c
}

// check wants every one of the cycles that were committed to have arrived whole.
func (w *witness) check(t *testing.T, unit string, committed int) (cycles, repeats, repeated int) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, metric := range []string{pulse, "unitmeter.outbox.bytes", "unitmeter.export.sent"} {
		n := 0
		for _, s := range w.find(metric, "") {
			n += len(s.times)
		}
		if n != committed {
			t.Errorf("%d cycles were committed, %d points of %s have arrived", committed, n, metric)
		}
	}
	all := append(w.find(receiver.IOName, unit), w.find(receiver.PacketCountName, unit)...)
	for _, s := range all {
		// All four come from one reading; in parts of a request that was split
		// they may come apart.
		if !slices.Equal(s.times, all[0].times) {
			t.Errorf("%s has %d points, %s has %d", s.last.Series(), len(s.times), all[0].last.Series(), len(all[0].times))
		}
	}
	if len(all) != 4 || len(all[0].times) == 0 {
		t.Errorf("%s has %d series with %d points in %d cycles", unit, len(all), len(all[0].times), committed)
	}
	return committed, w.repeats, w.repeated
}
