package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// page returns the code blocks of a page of docs whose first line is given, without
// that line.
func page(t *testing.T, name string) func(first string) string {
	t.Helper()
	text, err := os.ReadFile("../../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return func(first string) string {
		t.Helper()
		match := regexp.MustCompile("(?s)\n```[a-z]*\n" + regexp.QuoteMeta(first) + "\n(.*?)\n```\n").FindSubmatch(text)
		if match == nil {
			t.Fatalf("%s has no code block that begins with %q", name, first)
		}
		return string(match[1]) + "\n"
	}
}

// inside asks a server in a rig.
func inside(rig *systemdtest.Rig) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       rig.Dial,
	}}
}

// install puts the packaged agent into a rig, with the files of its configuration.
func install(t *testing.T, rig *systemdtest.Rig) {
	t.Helper()
	binary, err := agentBinary()
	if err != nil {
		t.Fatal(err)
	}
	rig.Run(t, "install", "-m", "755", binary, "/usr/bin/unitmeter")
	for from, to := range map[string]string{"unitmeter.service": "/etc/systemd/system/unitmeter.service", "unitmeter.sysusers": "/etc/sysusers.d/unitmeter.conf"} {
		text, err := os.ReadFile("../../../packaging/" + from)
		if err != nil {
			t.Fatal(err)
		}
		rig.WriteFile(t, to, string(text))
	}
	rig.Run(t, "systemd-sysusers", "unitmeter.conf")
	rig.Run(t, "mkdir", "-p", "/etc/unitmeter")
	rig.Run(t, "systemctl", "daemon-reload")
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := rig.Command(context.Background(), "journalctl", "--no-pager", "-n", "60").CombinedOutput()
			t.Logf("the journal:\n%s", log)
		}
	})
}

// ask sends a GET request with pairs of header names and values.
func ask(t *testing.T, client *http.Client, address string, headers ...string) (code int, body string, err error) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	resp, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// prometheusHost boots a host with the package and an accounted talker.service, and
// returns the blocks of docs/prometheus.md as well.
func prometheusHost(t *testing.T) (block func(string) string, rig *systemdtest.Rig) {
	t.Helper()
	block = page(t, "prometheus.md")
	rig = systemdtest.Start(t)
	install(t, rig)
	rig.WriteFile(t, "/etc/systemd/system/talker.service", "[Service]\nIPAccounting=yes\nExecStart=/bin/sleep infinity\n")
	rig.Run(t, "systemctl", "start", "talker.service")
	return block, rig
}

// TestScrapes is docs/prometheus.md from the package to a graph's query, with a real
// systemd and a real Prometheus; and then a systemd that hangs, and clients that do.
func TestScrapes(t *testing.T) {
	t.Parallel()
	block, rig := prometheusHost(t)

	rig.WriteFile(t, "/etc/unitmeter/unitmeter.env", block("# /etc/unitmeter/unitmeter.env"))
	rig.Run(t, "systemctl", "start", "--no-block", "unitmeter")
	client := inside(rig)
	const plain = "http://127.0.0.1:9464/metrics"
	var first string
	eventually(t, "a first scrape is answered", func() bool {
		code, body, err := ask(t, client, plain)
		first = body
		return err == nil && code == http.StatusOK
	})
	for _, want := range []string{`systemd_unit_network_io_bytes_total{.*systemd_unit_name="talker.service"`, `unitmeter_sweep_partial_total\{.*} 0\n`, `unitmeter_build_info\{`, `process_start_time_seconds `, `go_goroutines `} {
		if !regexp.MustCompile(want).MatchString(first) {
			t.Errorf("the first scrape has no %s:\n%s", want, first)
		}
	}

	// The metrics of the agent arrive although systemd hangs.
	if err := syscall.Kill(rig.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	goOn := func() { _ = syscall.Kill(rig.PID(), syscall.SIGCONT) }
	t.Cleanup(goOn)
	for range 2 {
		code, body, err := ask(t, client, plain, "X-Prometheus-Scrape-Timeout-Seconds", "2")
		if err != nil || code != http.StatusOK || !strings.Contains(body, "\nunitmeter_series{") || strings.Contains(body, "systemd_unit_network_io_bytes_total{") {
			t.Errorf("while systemd hangs: %v, status %d:\n%s", err, code, body)
		}
		// Without the bound of the scrape, a reading lasts for 10 s here.
		took := regexp.MustCompile(`unitmeter_sweep_duration_seconds\{.*} (\S+)`).FindStringSubmatch(body)
		if took == nil {
			t.Fatalf("no duration of a sweep: %s", body)
		}
		if seconds, err := strconv.ParseFloat(took[1], 64); err != nil || seconds > 9 {
			t.Errorf("a scrape that has 2 s waited for %s s", took[1])
		}
	}
	goOn()
	eventually(t, "units are there again", func() bool {
		_, body, _ := ask(t, client, plain)
		return strings.Contains(body, `systemd_unit_name="talker.service"`)
	})

	// TLS and passwords.
	rig.Run(t, "bash", "-euc", block("# a certificate and a password"))
	rig.WriteFile(t, "/etc/unitmeter/web.yml", block("# /etc/unitmeter/web.yml"))
	rig.WriteFile(t, "/etc/unitmeter/unitmeter.env", block("# /etc/unitmeter/unitmeter.env")+block("# also in /etc/unitmeter/unitmeter.env"))
	rig.Run(t, "systemctl", "restart", "unitmeter")
	rig.Run(t, "mkdir", "-p", "/etc/prometheus")
	rig.Run(t, "cp", "/etc/unitmeter/web.crt", "/etc/prometheus/unitmeter.crt")
	rig.WriteFile(t, "/etc/prometheus/unitmeter.password", "change-me\n")
	rig.WriteFile(t, "/etc/prometheus/prometheus.yml", strings.ReplaceAll(block("# prometheus.yml"), "scrape_configs:", "global: {scrape_interval: 1s}\nscrape_configs:"))
	rig.Run(t, "systemd-run", "--quiet", "--unit=prometheus", tool(t, "prometheus"), "--config.file=/etc/prometheus/prometheus.yml",
		"--web.listen-address=127.0.0.1:9090", "--storage.tsdb.path=/run/prometheus")
	eventually(t, "Prometheus has scraped with TLS and a password", func() bool {
		return value(t, client, `up{job="unitmeter"}`) == "1"
	})
	if got := value(t, client, `count(systemd_unit_network_io_bytes_total{systemd_unit_name="talker.service"})`); got != "2" {
		t.Errorf("Prometheus has %q series of the unit", got)
	}
	if got := value(t, client, "unitmeter_sweep_partial_total"); got != "0" {
		t.Errorf("%s sweeps were partial since the restart", got)
	}
	eventually(t, "the page's query has an answer", func() bool {
		return value(t, client, strings.TrimSpace(block("# received by each unit"))) != ""
	})
	if code, body, err := ask(t, client, plain); err != nil || code != http.StatusBadRequest {
		t.Errorf("without TLS: %v, status %d, %q", err, code, body)
	}

	// Clients that ask and never read do not keep the agent from ending well.
	rig.WriteFile(t, "/etc/unitmeter/unitmeter.env", block("# /etc/unitmeter/unitmeter.env"))
	rig.Run(t, "systemctl", "restart", "unitmeter")
	eventually(t, "it is scraped", func() bool {
		code, _, err := ask(t, client, plain)
		return err == nil && code == http.StatusOK
	})
	for range 20 {
		conn, err := rig.Dial(t.Context(), "tcp", "127.0.0.1:9464")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.(*net.TCPConn).SetReadBuffer(2048)
		if _, err := io.WriteString(conn, strings.Repeat("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 100)); err != nil {
			t.Fatal(err)
		}
	}
	if code, _, err := ask(t, client, plain); err != nil || code != http.StatusOK {
		t.Errorf("beside clients that hang: %v, status %d", err, code)
	}
	rig.Run(t, "systemctl", "stop", "unitmeter")
	if got := rig.Run(t, "systemctl", "show", "unitmeter", "-p", "Result", "--value"); strings.TrimSpace(got) != "success" {
		t.Errorf("it ended with %q", got)
	}
}

// TestStraightToPrometheus is the second half of docs/prometheus.md.
func TestStraightToPrometheus(t *testing.T) {
	t.Parallel()
	block, rig := prometheusHost(t)
	rig.WriteFile(t, "/etc/prometheus/prometheus.yml", block("# prometheus-otlp.yml"))
	rig.Run(t, "systemd-run", "--quiet", "--unit=prometheus", tool(t, "prometheus"), "--config.file=/etc/prometheus/prometheus.yml",
		"--web.enable-otlp-receiver", "--web.listen-address=127.0.0.1:9090", "--storage.tsdb.path=/run/prometheus")
	rig.WriteFile(t, "/etc/unitmeter/unitmeter.env", block("# /etc/unitmeter/unitmeter.env for OTLP"))
	rig.Run(t, "systemctl", "start", "unitmeter")
	client := inside(rig)
	eventually(t, "Prometheus has the unit", func() bool {
		return value(t, client, `count(systemd_unit_network_io_bytes_total{systemd_unit_name="talker.service"})`) == "2"
	})
}

// value asks Prometheus for the one value of an expression; "" is none, or more.
func value(t *testing.T, client *http.Client, expression string) string {
	t.Helper()
	_, body, err := ask(t, client, "http://127.0.0.1:9090/api/v1/query?query="+url.QueryEscape(expression))
	var answer struct {
		Data struct{ Result []struct{ Value [2]any } }
	}
	if err != nil || json.Unmarshal([]byte(body), &answer) != nil || len(answer.Data.Result) == 0 {
		return ""
	}
	text, _ := answer.Data.Result[0].Value[1].(string)
	return text
}

// TestIdleConnections: idle connections, and requests that never end, cost the agent
// next to nothing, and keep nobody out.
func TestIdleConnections(t *testing.T) {
	t.Parallel()
	limit := syscall.Rlimit{}
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	agent, log := runAgent(t, "OTEL_METRICS_EXPORTER=prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT=0", "OTEL_EXPORTER_PROMETHEUS_HOST=0.0.0.0")
	lines := scan(t, log, "listening for Prometheus")
	go drain(log)
	match := regexp.MustCompile(`address=\S*:(\d+)`).FindStringSubmatch(lines[len(lines)-1])
	if match == nil {
		t.Fatal(lines)
	}
	port := match[1]
	scrape := func() (int, string, error) {
		return ask(t, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, "http://127.0.0.1:"+port+"/metrics")
	}
	if _, _, err := scrape(); err != nil { // it begins to serve
		t.Fatal(err)
	}
	const connections = 14000
	for i := range min(connections, int(limit.Cur)-1000) {
		conn, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, []string{"GET /none HTTP/1.1\r\nHost: x\r\n\r\n", "GET /metrics HTTP/1.1\r\nHost: x\r\nX-A: ", ""}[i%3])
	}
	code, body, err := scrape()
	if err != nil || code != http.StatusOK || !strings.Contains(body, "\nunitmeter_series{") {
		t.Errorf("a scrape beside them: %v, status %d: %s", err, code, body)
	}
	status := filepath.Join("/proc", strconv.Itoa(agent.Process.Pid), "status")
	if peak := memory(t, status, "VmHWM"); peak > 100 { // the packaged MemoryMax= is 256
		t.Errorf("the agent had %.0f MiB", peak)
	} else {
		t.Logf("the agent had %.0f MiB", peak)
	}
	if conn, err := net.Dial("tcp", "[::1]:"+port); err == nil {
		conn.Close()
		t.Error("0.0.0.0 is IPv6 too")
	}
}

// drain reads a log that nobody looks at.
func drain(log *bufio.Scanner) {
	for log.Scan() {
	}
}
