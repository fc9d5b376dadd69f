package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricpb "go.opentelemetry.io/proto/otlp/metrics/v1"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// A contender is an agent that is one line of the comparison.
type contender struct {
	name    string // in tables and the picture
	reads   string // what it reads of each unit, and how
	lacks   string // what the comparison is about and it does not read, or ""
	against string // whose CPU time its own is compared with; "" for none
	user    string
	command []string
	config  string // what /etc/bench.conf has
	env     map[string]string
	// How to see its collections: scrape is a URL that is asked for them at each
	// interval; without it, the agent pushes OTLP/gRPC to 127.0.0.1:4317. A unit is
	// in a collection when metric, a regular expression, has a point with the
	// unit's name as label.
	scrape        string
	interval      time.Duration
	metric, label string
	// rounds says that the times of its points are rounded to the second, so that
	// a wall time cannot be told.
	rounds bool
}

const (
	peerBus     = "systemd_exporter, system bus"
	peerPrivate = "systemd_exporter, private socket"
	statesOnly  = "unit states only"
)

// ourContenders are the agent on either socket, and with the meter of its own.
func ourContenders(b *testing.B, interval time.Duration) []contender {
	own := func(name, against, user, variable, value string) contender {
		binary, err := agentBinary()
		if err != nil {
			b.Fatal(err)
		}
		return contender{
			name: "unitmeter, " + name, against: against, user: user, command: []string{binary, "run"},
			reads: "the four IP counters, but bytes only where packets moved since: two calls for an idle unit, three for one that only sends, as these do; commits to disk",
			env: map[string]string{
				"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_METRIC_EXPORT_INTERVAL": strconv.FormatInt(interval.Milliseconds(), 10),
				"UNITMETER_INCLUDE": "load-*.service", "UNITMETER_STATE_DIR": "/var/lib/bench/state", variable: value,
			},
			interval: interval, metric: `^systemd\.unit\.network\.packet\.count$`, label: "systemd.unit.name",
		}
	}
	meter := own("eBPF", peerBus, "nobody", "UNITMETER_SOURCE", "ebpf")
	meter.reads = "the maps of its own program, all units at once; commits to disk"
	return []contender{
		own("system bus", peerBus, "nobody", "UNITMETER_BUS", "system"),
		own("private socket", peerPrivate, "root", "UNITMETER_BUS", "private"),
		meter,
	}
}

// contenders is the table of what is measured. Each is restricted to the units that
// are there for the measurement, and has its defaults otherwise, but for what the
// comparison is about.
func contenders(b *testing.B, units int, interval time.Duration) []contender {
	scraped := func(name, user, lacks, reads, metric, program string, flags ...string) contender {
		return contender{
			name: name, user: user, lacks: lacks, reads: reads, command: append([]string{tool(b, program), "--web.disable-exporter-metrics", "--web.listen-address=127.0.0.1:9558"}, flags...),
			scrape: "http://127.0.0.1:9558/metrics", interval: interval, metric: metric, label: "name",
		}
	}
	systemdExporter := func(name, user string, flags ...string) contender {
		return scraped(name, user, "",
			"the four IP counters, and state, type, five timestamps and two task counts, which cannot be left out: 12 calls, those of all units at once",
			`^systemd_service_ip_egress_packets_total$`,
			"systemd_exporter", append(flags, "--systemd.collector.enable-ip-accounting", `--systemd.collector.unit-include=load-.*\.service`)...)
	}
	telegraf := func(name, lacks, reads string, details bool) contender {
		return contender{
			name: name, user: "nobody", command: []string{tool(b, "telegraf"), "--config", "/etc/bench.conf"},
			lacks: lacks, reads: reads, interval: interval, metric: `^systemd_units_active_code$`, label: "name", rounds: true,
			// A batch of as many metrics as there are units is sent when the last
			// one is there, in one request for each second of it.
			config: fmt.Sprintf(`[agent]
interval = "%s"
round_interval = false
flush_interval = "1h"
metric_batch_size = %d
metric_buffer_limit = %d
omit_hostname = true
quiet = true
[[inputs.systemd_units]]
pattern = "load-*"
details = %v
timeout = "5m"
[[outputs.opentelemetry]]
service_address = "127.0.0.1:4317"
`, interval, units, 10*units, details),
		}
	}
	return append(ourContenders(b, interval),
		systemdExporter(peerBus, "nobody"),
		systemdExporter(peerPrivate, "root", "--systemd.collector.private"),
		scraped("node_exporter", "nobody", statesOnly, "state and service type: 1 call, one unit after the other",
			"^node_systemd_unit_state$", "node_exporter",
			"--collector.disable-defaults", "--collector.systemd", `--collector.systemd.unit-include=load-.*\.service`),
		contender{
			name: "Collector, systemdreceiver", lacks: "states and CPU time only", user: "nobody", command: []string{tool(b, "otelcol-systemd"), "--config", "/etc/bench.conf"},
			reads:    "state and, from the cgroup's files, CPU time: 1 call, one unit after the other",
			interval: interval, metric: `^systemd\.unit\.state$`, label: "systemd.unit.name",
			config: fmt.Sprintf(`receivers: {systemd: {collection_interval: %s, units: ["load-*.service"]}}
exporters: {otlp: {endpoint: "127.0.0.1:4317", tls: {insecure: true}}}
service: {telemetry: {metrics: {level: none}}, pipelines: {metrics: {receivers: [systemd], exporters: [otlp]}}}
`, interval),
		},
		telegraf("telegraf", statesOnly, "state: one ListUnits for all", false),
		telegraf("telegraf, details", "no IP counters", "state, memory, restarts and more, picked out of all of a unit's properties: 2 GetAll, one unit after the other", true),
	)
}

// title is the name with what one must know to compare it.
func (a contender) title() string {
	if a.lacks == "" {
		return a.name
	}
	return a.name + " (" + a.lacks + ")"
}

func (a contender) ours() bool { return strings.HasPrefix(a.name, "unitmeter") }

// slug is the name of a sub-benchmark.
func (a contender) slug() string { return strings.NewReplacer(", ", "-", " ", "-").Replace(a.name) }

// start starts the agent, and returns a function that returns the next collection
// when it is complete. Both end with the benchmark.
func (a contender) start(b *testing.B, rig *systemdtest.Rig, units int) (next func() collection) {
	rig.WriteFile(b, "/etc/bench.conf", a.config)
	names := regexp.MustCompile(a.metric)
	if a.scrape != "" {
		launch(b, rig, a)
		return a.scraped(b, rig, names)
	}
	listener, err := rig.Listen(b.Context(), "tcp", "127.0.0.1:4317")
	if err != nil {
		b.Fatal(err)
	}
	arrived := make(chan collection, 1000)
	// One collection may come in several requests, in which no unit is twice. It
	// is complete with all units or, if some were lost, when the next begins.
	seen, current, began := map[string]bool{}, collection{}, time.Time{}
	finish := func() {
		current.seen = len(seen)
		arrived <- current
		seen, current = map[string]bool{}, collection{}
	}
	// The Collector sends 4,000 units in more than the default of 4 MiB.
	otlptest.Start(b, otlptest.Config{Listener: listener, MaxBytes: 64 << 20, Decide: func(r otlptest.Request) otlptest.Answer {
		arrival := time.Now()
		cpu, err := readCPU(rig)
		got, first, sweep := a.read(names, r)
		if slices.ContainsFunc(got, func(unit string) bool { return seen[unit] }) {
			finish()
		}
		if len(seen) == 0 {
			began = first.Add(-sweep)
		}
		for _, unit := range got {
			seen[unit] = true
		}
		current.cpu, current.err, current.wall = cpu, err, arrival.Sub(began)
		if len(seen) == units || err != nil {
			finish()
		}
		return otlptest.Answer{}
	}})
	launch(b, rig, a)
	return func() collection {
		select {
		case c := <-arrived:
			return c
		case <-time.After(a.interval + 2*time.Minute):
			b.Logf("%s", rig.Run(b, "journalctl", "--no-pager", "-n", "30", "-u", "bench"))
			return collection{err: errors.New(a.name + " sends nothing")}
		}
	}
}

// read returns the units of the points in a request, in any order and each once
// or more, the time of the first point, and the length of the sweep before it: the
// points of unitmeter have the time of the sweep's end, and so tell it.
func (a contender) read(names *regexp.Regexp, r otlptest.Request) (units []string, first time.Time, sweep time.Duration) {
	first = time.Now()
	for _, rm := range r.Metrics.ResourceMetrics {
		for _, sm := range rm.ScopeMetrics {
			for _, m := range sm.Metrics {
				points := append(m.GetSum().GetDataPoints(), m.GetGauge().GetDataPoints()...)
				if m.Name == "unitmeter.sweep.duration" {
					sweep = time.Duration(points[0].GetAsDouble() * float64(time.Second))
				}
				if !names.MatchString(m.Name) {
					continue
				}
				for _, p := range points {
					if unit := a.unit(rm.Resource.GetAttributes(), p); unit != "" {
						units = append(units, unit)
					}
					if at := time.Unix(0, int64(p.TimeUnixNano)); at.Before(first) {
						first = at
					}
				}
			}
		}
	}
	return units, first, sweep
}

// unit returns the name of the unit that a point is of, or "".
func (a contender) unit(resource []*commonpb.KeyValue, p *metricpb.NumberDataPoint) string {
	for _, attributes := range [][]*commonpb.KeyValue{p.Attributes, resource} {
		for _, kv := range attributes {
			if name := kv.GetValue().GetStringValue(); kv.Key == a.label && strings.HasPrefix(name, "load-@") {
				return name
			}
		}
	}
	return ""
}

// scraped returns a function that waits for the interval and scrapes.
func (a contender) scraped(b *testing.B, rig *systemdtest.Rig, names *regexp.Regexp) func() collection {
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return rig.Dial(ctx, network, addr)
	}}}
	b.Cleanup(client.CloseIdleConnections)
	series := regexp.MustCompile(`^(\w+)\{(?:.*,)?` + a.label + `="(load-@[^"]*)"`)
	var began time.Time
	get := func() (collection, error) {
		began = time.Now()
		answer, err := client.Get(a.scrape)
		if err != nil {
			return collection{}, err
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err == nil && answer.StatusCode != http.StatusOK {
			err = fmt.Errorf("scrape %s: %s", a.name, answer.Status)
		}
		if err != nil {
			return collection{}, err
		}
		c := collection{wall: time.Since(began)}
		c.cpu, err = readCPU(rig)
		seen := map[string]bool{}
		for line := range strings.Lines(string(body)) {
			if match := series.FindStringSubmatch(line); match != nil && names.MatchString(match[1]) {
				seen[match[2]] = true
			}
		}
		c.seen = len(seen)
		return c, err
	}
	up := false
	return func() collection {
		for end := time.Now().Add(time.Minute); !up; time.Sleep(20 * time.Millisecond) {
			c, err := get()
			if up = err == nil; up || time.Now().After(end) {
				c.err = err
				return c
			}
		}
		time.Sleep(time.Until(began.Add(a.interval)))
		c, err := get()
		c.err = err
		return c
	}
}
