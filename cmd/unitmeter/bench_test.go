package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// BenchmarkHost measures what one collection costs a host: the CPU time of the
// agent, of PID 1 and of dbus-daemon together, beside systemd_exporter on the
// same units in the same run. Everything is included: reading, encoding, commit
// and sending. Each operation is one collection of the agent or one scrape of
// systemd_exporter.
//
//	make bench BENCH=BenchmarkHost PKG=./cmd/unitmeter
//
// active says which part of the units has traffic between two collections.
func BenchmarkHost(b *testing.B) {
	for _, units := range []int{10, 100, 1000, 4000} {
		for _, active := range []int{0, 10, 100} {
			if units != 1000 && active != 10 {
				continue
			}
			b.Run(fmt.Sprintf("units=%d/active=%d%%", units, active), func(b *testing.B) { benchmarkHost(b, units, active) })
		}
	}
}

func benchmarkHost(b *testing.B, units, active int) {
	rig := systemdtest.Start(b)
	startLoad(b, rig, units, active)
	binary, err := agentBinary()
	if err != nil {
		b.Fatal(err)
	}
	exporter, err := filepath.EvalSymlinks("../../.tools/bin/systemd_exporter")
	if err != nil {
		b.Fatalf("find systemd_exporter: %v; run \".ci/tools bench\"", err)
	}
	// The same unit types and nothing else, so that both do the same work.
	peer := []string{exporter, "--systemd.collector.enable-ip-accounting", "--web.disable-exporter-metrics",
		"--web.listen-address=127.0.0.1:9558", `--systemd.collector.unit-include=load-.*\.service`}
	own := []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317", "OTEL_METRIC_EXPORT_INTERVAL=1000", "OTEL_METRIC_EXPORT_TIMEOUT=20000", "UNITMETER_INCLUDE=load-*.service"}
	// Cold start, JIT of caches and the kernel's noise: the first is not counted.
	ratio := map[string]float64{}
	for _, c := range []struct {
		name    string
		measure func(b *testing.B)
	}{
		{"systemd_exporter-bus", func(b *testing.B) {
			ratio["bus"] = measurePeer(b, rig, units, "nobody", peer...)
		}},
		{"unitmeter-bus", func(b *testing.B) {
			measureAgent(b, rig, units, "nobody", ratio["bus"], binary, append(own, "UNITMETER_BUS=system")...)
		}},
		{"systemd_exporter-private", func(b *testing.B) {
			ratio["private"] = measurePeer(b, rig, units, "root", append(peer, "--systemd.collector.private")...)
		}},
		{"unitmeter-private", func(b *testing.B) {
			measureAgent(b, rig, units, "root", ratio["private"], binary, append(own, "UNITMETER_BUS=private")...)
		}},
	} {
		b.Run(c.name, c.measure)
	}
}

// startLoad starts the units. The active ones send a datagram each half second,
// without a new process each time.
func startLoad(b *testing.B, rig *systemdtest.Rig, units, active int) {
	rig.WriteFile(b, "/usr/local/bin/load", "#!/bin/bash\n"+
		"[ $1 -lt "+strconv.Itoa(units*active/100)+" ] || exec sleep infinity\n"+
		"mkfifo /run/load.$1; exec 3<>/run/load.$1 4>/dev/udp/127.0.0.1/9\nwhile :; do read -t .5 -u 3; echo x >&4; done 2>/dev/null\n")
	rig.WriteFile(b, "/etc/systemd/system/load-@.service", "[Service]\nExecStart=/usr/local/bin/load %i\nIPAccounting=yes\nStandardError=null\n")
	rig.Run(b, "systemctl", "daemon-reload")
	rig.Run(b, "bash", "-c", fmt.Sprintf(`for i in $(seq 0 100 %d); do systemctl start $(seq -f load-@%%.0f.service $i $((i+99 < %d ? i+99 : %d))); done`, units-1, units-1, units-1))
	if n := strings.Count(rig.Run(b, "systemctl", "list-units", "--state=active", "--no-legend", "--plain", "load-*"), "\n"); n != units {
		b.Fatalf("%d of %d units are up", n, units)
	}
}

// cpu returns the CPU time that PID 1, dbus-daemon and a unit have used, in
// microseconds (cpu.stat of their cgroups).
func cpu(b *testing.B, rig *systemdtest.Rig, unit string) float64 {
	var sum float64
	for _, group := range []string{"init.scope", "system.slice/dbus.service", "system.slice/" + unit} {
		text, err := os.ReadFile(rig.Path("/sys/fs/cgroup/" + group + "/cpu.stat"))
		if err != nil {
			b.Fatal(err)
		}
		usage := regexp.MustCompile(`usage_usec (\d+)`).FindSubmatch(text)
		n, err := strconv.ParseFloat(string(usage[1]), 64)
		if err != nil {
			b.Fatal(err)
		}
		sum += n
	}
	return sum
}

// rss returns the resident memory of a unit's main process in MiB.
func rss(b *testing.B, rig *systemdtest.Rig, unit string) float64 {
	pid := strings.TrimSpace(rig.Run(b, "systemctl", "show", "--value", "-p", "MainPID", unit))
	text, err := os.ReadFile(rig.Path("/proc/" + pid + "/status"))
	if err != nil {
		b.Fatal(err)
	}
	kb, err := strconv.ParseFloat(string(regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(text)[1]), 64)
	if err != nil {
		b.Fatal(err)
	}
	return kb / 1024
}

// launch starts a command as a unit named bench, and stops it at the end.
func launch(b *testing.B, rig *systemdtest.Rig, user string, env []string, command ...string) {
	args := []string{"--quiet", "--collect", "--unit=bench", "--property=User=" + user, "--property=StateDirectory=bench"}
	for _, e := range env {
		args = append(args, "--setenv="+e)
	}
	rig.Run(b, "systemd-run", append(args, command...)...)
	b.Cleanup(func() {
		rig.Run(b, "systemctl", "stop", "bench")
		rig.Run(b, "rm", "-rf", "/var/lib/bench")
	})
}

// measurePeer scrapes systemd_exporter b.N times, each a second apart, and
// returns the CPU time of one scrape in microseconds.
func measurePeer(b *testing.B, rig *systemdtest.Rig, units int, user string, command ...string) float64 {
	launch(b, rig, user, nil, command...)
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return rig.Dial(ctx, network, addr)
	}}}
	lost := 0
	scrape := func() {
		var body []byte
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			answer, err := client.Get("http://127.0.0.1:9558/metrics")
			if err == nil {
				body, err = io.ReadAll(answer.Body)
				_ = answer.Body.Close()
			}
			if err == nil && answer.StatusCode == http.StatusOK {
				break
			}
			if time.Now().After(end) {
				b.Fatalf("scrape systemd_exporter: %v", err)
			}
		}
		lost += units - strings.Count(string(body), "\nsystemd_unit_ip_egress_packets_total{") - strings.Count(string(body), "\nsystemd_service_ip_egress_packets_total{")
	}
	scrape()
	lost = 0
	b.ResetTimer()
	before := cpu(b, rig, "bench.service")
	for range b.N {
		scrape()
		time.Sleep(time.Second)
	}
	each := (cpu(b, rig, "bench.service") - before) / float64(b.N)
	b.ReportMetric(each/1000, "cpu-ms/op")
	b.ReportMetric(float64(lost)/float64(b.N), "lost/op")
	b.ReportMetric(rss(b, rig, "bench.service"), "rss-MiB")
	return each
}

// measureAgent runs the agent until it has made b.N collections.
func measureAgent(b *testing.B, rig *systemdtest.Rig, units int, user string, peer float64, binary string, env ...string) {
	listener, err := rig.Listen(b.Context(), "tcp", "127.0.0.1:4317")
	if err != nil {
		b.Fatal(err)
	}
	server := otlptest.Start(b, otlptest.Config{Listener: listener})
	launch(b, rig, user, append(env, "UNITMETER_STATE_DIR=/var/lib/bench/state"), binary, "run")
	wait := func(n int) {
		for end := time.Now().Add(time.Minute + 2*time.Second*time.Duration(n)); len(server.Requests()) < n; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				b.Fatalf("the agent made %d of %d collections", len(server.Requests()), n)
			}
		}
	}
	wait(3)
	b.ResetTimer()
	began, before := len(server.Requests()), cpu(b, rig, "bench.service")
	wait(began + b.N)
	each := (cpu(b, rig, "bench.service") - before) / float64(len(server.Requests())-began)
	lost := 0
	for _, request := range server.Requests()[began:] {
		seen := map[string]bool{}
		for _, p := range otlptest.Flatten(request.Metrics) {
			seen[p.Attrs["systemd.unit.name"]] = true
		}
		delete(seen, "")
		lost += units - len(seen)
	}
	b.ReportMetric(each/1000, "cpu-ms/op")
	b.ReportMetric(float64(lost)/float64(b.N), "lost/op")
	b.ReportMetric(rss(b, rig, "bench.service"), "rss-MiB")
	if peer > 0 {
		b.ReportMetric(peer/each, "times-less-cpu")
	}
}
