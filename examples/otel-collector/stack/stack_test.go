// Package stack_test runs what the example stack is made of: real Collectors
// with these files, real Prometheus servers with these rules, and the queries of
// the dashboard, fed by the agent in a real systemd.
package stack_test

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

var pictures = flag.Duration("pictures", 0, "record for so long, then draw docs/pictures with a headless Chromium")

// tool returns the path of a program that .ci/tools builds.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../../../.tools/bin", name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v; run: .ci/tools %s", err, name)
	}
	return path
}

// The Collector accepts each file. All of their components are in the Collector
// that builder.yaml describes.
func TestCollectorFilesAreValid(t *testing.T) {
	files, err := filepath.Glob("*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, file := range files {
		text := read(t, file)
		if !strings.Contains(text, "\nservice:\n  ") || strings.HasPrefix(file, "compose") {
			continue
		}
		n++
		cmd := exec.Command(tool(t, "otelcol"), "validate", "--config", file)
		cmd.Env = append(os.Environ(), "VENDOR_API_KEY=secret")
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
	if n < 5 {
		t.Errorf("%d Collector files were found, want at least 5", n)
	}
}

// promtool runs the unit tests of the rules.
func TestRules(t *testing.T) {
	for _, args := range [][]string{
		{"check", "rules", "unitmeter.rules.yaml", "systemd_exporter.rules.yaml"},
		{"check", "config", "prometheus.yaml"},
		{"test", "rules", "unitmeter.test.yaml", "systemd_exporter.test.yaml"},
	} {
		cmd := exec.Command(tool(t, "promtool"), args...)
		cmd.Dir = "../prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func write(t *testing.T, file, text string) string {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// lifeline runs a program until its standard input ends, which it does with the
// test process, however that dies.
const lifeline = `"$@" & child=$!; read -r _; kill $child || exit 9; wait $child`

// start runs a program until the test ends, and shows its log if that fails.
func start(t *testing.T, env []string, program string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", append([]string{"-c", lifeline, "sh", program}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait() // the state has what it tells
		if cmd.ProcessState.ExitCode() == 9 {
			t.Errorf("%s has ended early", filepath.Base(program))
		}
		log.Close()
		text, _ := os.ReadFile(log.Name()) // a help only
		trouble := slices.DeleteFunc(slices.Collect(strings.Lines(string(text))), func(line string) bool { return strings.Contains(line, "\tinfo\t") })
		if t.Failed() && len(trouble) > 0 {
			t.Logf("%s %s:\n%s", filepath.Base(program), strings.Join(args, " "), strings.Join(trouble[max(0, len(trouble)-10):], ""))
		}
	})
}

// eventually waits for what other processes do in their own time.
func eventually(t *testing.T, what string, done func() error) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		err := done()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not come true that %s: %v", what, err)
		}
	}
}

// listening waits for a server.
func listening(t *testing.T, address string) {
	t.Helper()
	eventually(t, address+" listens", func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// collector starts a Collector and returns the address at which it takes OTLP.
func collector(t *testing.T, file string, env ...string) string {
	t.Helper()
	at := otlptest.FreeAddress(t)
	start(t, append(env, "OTELCOL_GRPC="+at), tool(t, "otelcol"), "--config", file)
	listening(t, at)
	return at
}

// prometheus is a running server.
type prometheus struct{ url string }

// newPrometheus starts one with ../prometheus/prometheus.yaml, its rules, and
// another translation strategy.
func newPrometheus(t *testing.T, strategy, extra string) prometheus {
	t.Helper()
	dir := t.TempDir()
	text := read(t, "../prometheus/prometheus.yaml")
	for old, now := range map[string]string{
		"UnderscoreEscapingWithSuffixes\n": strategy + "\n",
		"  # - systemd_exporter":           "  - systemd_exporter",
	} {
		if !strings.Contains(text, old) {
			t.Fatalf("prometheus.yaml has no %q", old)
		}
		text = strings.Replace(text, old, now, 1)
	}
	text += "global:\n  evaluation_interval: 1s\n  scrape_interval: 1s\n" + extra
	for _, file := range []string{"unitmeter.rules.yaml", "systemd_exporter.rules.yaml"} {
		write(t, filepath.Join(dir, file), read(t, filepath.Join("../prometheus", file)))
	}
	config := write(t, filepath.Join(dir, "prometheus.yaml"), text)
	at := otlptest.FreeAddress(t)
	start(t, nil, tool(t, "prometheus"), "--config.file="+config, "--web.enable-otlp-receiver", "--web.enable-remote-write-receiver",
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+at, "--log.level=warn")
	p := prometheus{"http://" + at}
	eventually(t, "Prometheus is ready", func() error { return p.get("/-/ready", nil, nil) })
	return p
}

// get asks the HTTP API, and puts the field data of the answer into out.
func (p prometheus) get(path string, query url.Values, out any) error {
	resp, err := http.Get(p.url + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", query.Get("query"), resp.Status, body)
	}
	if out == nil {
		return nil
	}
	answer := struct{ Data any }{out}
	return json.Unmarshal(body, &answer)
}

// sample is one element of a vector or a matrix.
type sample struct {
	Metric map[string]string
	Value  [2]any
	Values [][2]any
}

func (p prometheus) query(expr string) ([]sample, error) {
	var data struct{ Result []sample }
	err := p.get("/api/v1/query", url.Values{"query": {expr}}, &data)
	if err == nil && len(data.Result) == 0 {
		err = fmt.Errorf("no sample for %s", expr)
	}
	return data.Result, err
}

// becomes waits until an expression has one sample, of the value. There may be
// one before, of a cycle in the midst of the unit's traffic.
func (p prometheus) becomes(t *testing.T, expr, value string) {
	t.Helper()
	eventually(t, expr+" is "+value, func() error {
		got, err := p.query(expr)
		if err == nil && (len(got) != 1 || got[0].Value[1] != value) {
			err = fmt.Errorf("it is %v", got)
		}
		return err
	})
}

// forward hands connections to an address inside the rig to one outside.
func forward(t *testing.T, rig *systemdtest.Rig, inside, outside string) {
	t.Helper()
	l, err := rig.Listen(context.Background(), "tcp", inside)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() { // ends with the listener
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // ends when both sides have
				defer in.Close()
				out, err := net.Dial("tcp", outside)
				if err != nil {
					return
				}
				defer out.Close()
				go func() { defer out.Close(); _, _ = io.Copy(out, in) }()
				_, _ = io.Copy(in, out)
			}()
		}
	}()
}

// gatewayCertificate writes the files of a TLS server.
func gatewayCertificate(t *testing.T) (env []string) {
	t.Helper()
	ca := otlptest.NewCA(t)
	cert := ca.Server(t, false).Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	return []string{
		"GATEWAY_CA=" + ca.File,
		"GATEWAY_CERT=" + write(t, filepath.Join(dir, "cert.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}))),
		"GATEWAY_KEY=" + write(t, filepath.Join(dir, "key.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))),
	}
}

// backend is one way from the agent to a Prometheus.
type backend struct {
	name string
	prometheus
	dot   string // what stands in labels where OpenTelemetry has a dot
	rules bool   // whether names are those that the rules expect
}

// backends starts every way of the example stack, and returns the address of a
// Collector that sends along all of them.
func backends(t *testing.T) (string, []backend) {
	t.Helper()
	scraped := otlptest.FreeAddress(t)
	scrape := strings.Replace(read(t, "../prometheus/systemd_exporter.scrape.yaml"), "localhost:9464", scraped, 1)
	scrape = "scrape_configs:\n" + regexp.MustCompile(`(?m)^`).ReplaceAllString(scrape, "  ")
	all := []backend{
		{"agent, gateway, OTLP", newPrometheus(t, "UnderscoreEscapingWithSuffixes", ""), "_", true},
		{"remote write", newPrometheus(t, "UnderscoreEscapingWithSuffixes", scrape), "_", true},
		{"OTLP, UTF-8 names", newPrometheus(t, "NoUTF8EscapingWithSuffixes", ""), ".", false},
		{"OTLP, untranslated names", newPrometheus(t, "NoTranslation", ""), ".", false},
	}
	tls := gatewayCertificate(t)
	gateway := collector(t, "gateway.yaml", append(tls, "PROMETHEUS_URL="+all[0].url)...)
	_, port, err := net.SplitHostPort(gateway)
	if err != nil {
		t.Fatal(err)
	}
	targets := []string{
		collector(t, "agent.yaml", append(tls, "GATEWAY=localhost:"+port, "OTELCOL_STATE="+filepath.Join(t.TempDir(), "queue"))...),
		collector(t, "prometheus-remote-write.yaml", "PROMETHEUS_URL="+all[1].url),
		collector(t, "prometheus-otlp.yaml", "PROMETHEUS_URL="+all[2].url),
		collector(t, "prometheus-otlp.yaml", "PROMETHEUS_URL="+all[3].url),
	}
	var exporters strings.Builder
	var names []string
	for i, target := range targets {
		fmt.Fprintf(&exporters, "  otlp_grpc/%d: {endpoint: '%s', tls: {insecure: true}, sending_queue: {num_consumers: 1}}\n", i, target)
		names = append(names, fmt.Sprintf("otlp_grpc/%d", i))
	}
	fan := write(t, filepath.Join(t.TempDir(), "fan.yaml"), `
receivers: {otlp: {protocols: {grpc: {endpoint: '${env:OTELCOL_GRPC}'}}}}
exporters:
  prometheus: {endpoint: '`+scraped+`'}
`+exporters.String()+`
service:
  pipelines: {metrics: {receivers: [otlp], exporters: [prometheus, `+strings.Join(names, ", ")+`]}}
  telemetry: {metrics: {level: none}}
`)
	return collector(t, fan), all
}

// install builds unitmeter and puts it into a new rig.
func install(t *testing.T) *systemdtest.Rig {
	t.Helper()
	program := filepath.Join(t.TempDir(), "unitmeter")
	build := exec.Command("go", "build", "-o", program, "../../../cmd/unitmeter")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build unitmeter: %v\n%s", err, out)
	}
	rig := systemdtest.Start(t)
	rig.WriteFile(t, "/usr/bin/unitmeter", read(t, program))
	rig.Run(t, "chmod", "0755", "/usr/bin/unitmeter")
	return rig
}

// The Collector of unitmeter-sidecar.service lives as long as the packaged
// unitmeter.service does, and gets its metrics.
func TestSidecar(t *testing.T) {
	rig := install(t)
	rig.WriteFile(t, "/usr/local/bin/otelcol", read(t, tool(t, "otelcol")))
	rig.Run(t, "chmod", "0755", "/usr/local/bin/otelcol")
	rig.WriteFile(t, "/etc/otelcol/config.yaml", read(t, "agent.yaml"))
	rig.WriteFile(t, "/etc/otelcol/ca.pem", read(t, otlptest.NewCA(t).File))
	rig.WriteFile(t, "/etc/systemd/system/unitmeter-sidecar.service", read(t, "unitmeter-sidecar.service"))
	rig.WriteFile(t, "/usr/lib/systemd/system/unitmeter.service", read(t, "../../../packaging/unitmeter.service"))
	rig.WriteFile(t, "/usr/lib/sysusers.d/unitmeter.conf", read(t, "../../../packaging/unitmeter.sysusers"))
	rig.WriteFile(t, "/etc/unitmeter/unitmeter.env", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317\nOTEL_METRIC_EXPORT_INTERVAL=1000\n")
	rig.Run(t, "systemd-sysusers")
	if out, err := rig.Command(context.Background(), "systemd-analyze", "verify", "/etc/systemd/system/unitmeter-sidecar.service").CombinedOutput(); err != nil || strings.Contains(string(out), "sidecar.service:") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	rig.Run(t, "systemctl", "daemon-reload")
	rig.Run(t, "systemctl", "enable", "unitmeter-sidecar.service")
	is := func(state string) error {
		out := strings.TrimSpace(rig.Run(t, "systemctl", "show", "--value", "-p", "ActiveState", "unitmeter-sidecar.service"))
		if out != state {
			return fmt.Errorf("it is %s", out)
		}
		return nil
	}
	rig.Run(t, "systemctl", "start", "unitmeter.service")
	eventually(t, "the Collector runs", func() error { return is("active") })
	eventually(t, "it has got something", func() error {
		if got := rig.Show(t, "unitmeter-sidecar.service"); got.IngressBytes < 10_000 {
			return fmt.Errorf("only %+v", got)
		}
		return nil
	})
	rig.Run(t, "systemctl", "stop", "unitmeter.service")
	eventually(t, "the Collector is stopped", func() error { return is("inactive") })
}

// agent runs unitmeter in a rig, with units that make traffic for it.
func agent(t *testing.T, collector string) *systemdtest.Rig {
	t.Helper()
	rig := install(t)
	rig.Run(t, "hostname", "example")
	forward(t, rig, "127.0.0.1:4317", collector)
	// A slice that counts, with a unit in it that does not: unattributed.
	rig.Run(t, "systemctl", "set-property", "--runtime", "system.slice", "IPAccounting=yes")
	rig.Run(t, "systemd-run", "--quiet", "--unit=unitmeter", "-p", "IPAccounting=yes",
		"--setenv=OTEL_METRIC_EXPORT_INTERVAL=1000", "--setenv=OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317",
		"--setenv=UNITMETER_STATE_DIR=/var/lib/unitmeter", "/usr/bin/unitmeter")
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(rig.Run(t, "journalctl", "-u", "unitmeter", "--no-pager", "-n", "30"))
		}
	})
	unit := func(name, accounting string, args ...string) {
		rig.Run(t, "systemd-run", append([]string{"--quiet", "--unit=" + name, "-p", "IPAccounting=" + accounting, rig.Traffic()}, args...)...)
	}
	for i, name := range []string{"nats-main", "orders-db", "web-front"} {
		at := fmt.Sprintf("127.0.0.1:%d", 7000+i)
		unit(name, "yes", "udp-sink", at)
		unit(name+"-client", "yes", "udp-send", at, "-bytes", strconv.Itoa(1200>>i), "-count", "1000000", "-rate", strconv.Itoa(300>>i))
	}
	unit("unmetered", "no", "udp-send", "127.0.0.1:7000", "-bytes", "200", "-count", "1000000", "-rate", "20")
	rig.Run(t, "systemd-run", "--quiet", "--unit=known", "-p", "IPAccounting=yes", "-p", "Type=oneshot", "-p", "RemainAfterExit=yes",
		rig.Traffic(), "udp-send", "127.0.0.1:7000", "-bytes", "100", "-count", "10")
	return rig
}

func TestStack(t *testing.T) {
	if testing.Short() {
		t.Skip("starts four Prometheus servers; run without -short")
	}
	at, all := backends(t)
	rig := agent(t, at)
	known := rig.Show(t, "known.service")
	if !known.OK || known.EgressBytes != 1280 {
		t.Fatalf("the unit with known traffic sent %+v, want 1280 bytes", known)
	}
	board := loadDashboard(t)
	for _, b := range all {
		t.Run(b.name, func(t *testing.T) {
			// What Prometheus has is what systemd counted.
			expr := fmt.Sprintf(`{__name__=~"systemd.unit.network.io(_bytes_total)?", "systemd%[1]sunit%[1]sname"="known.service", "network%[1]sio%[1]sdirection"="transmit"}`, b.dot)
			b.becomes(t, expr, "1280")
			board.test(t, b)
			if b.rules {
				b.testRules(t)
			}
		})
	}
	t.Run("what no unit's series has is still to be seen", func(t *testing.T) {
		expr := `unitmeter_unattributed_bytes_total{systemd_unit_slice="system.slice", network_io_direction="transmit"} > 0`
		eventually(t, "the traffic of the unmetered unit is unattributed", func() error { _, err := all[0].query(expr); return err })
	})
	t.Run("systemd_exporter's names by scraping", func(t *testing.T) {
		expr := `systemd_service_ip_egress_bytes{job="systemd_exporter", name="known.service", systemd_unit_name!=""}`
		all[1].becomes(t, expr, "1280")
	})
	if *pictures > 0 {
		draw(t, rig, all[0], board)
	}
}

// testRules waits until every rule has been evaluated without an error and
// every recording rule has recorded something.
func (p prometheus) testRules(t *testing.T) {
	t.Helper()
	var data struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError, Type string }
		}
	}
	n := 0
	eventually(t, "all rules have results", func() error {
		n = 0
		if err := p.get("/api/v1/rules", nil, &data); err != nil {
			return err
		}
		for _, group := range data.Groups {
			for _, rule := range group.Rules {
				n++
				if rule.Health != "ok" {
					return fmt.Errorf("rule %s is %s: %s", rule.Name, rule.Health, rule.LastError)
				}
				if rule.Type == "recording" {
					if _, err := p.query(rule.Name); err != nil {
						return err
					}
				}
			}
		}
		return nil
	})
	if n < 19 {
		t.Errorf("Prometheus has %d rules, want at least 19", n)
	}
	p.becomes(t, `systemd_service_ip_egress_bytes{name="known.service", instance="example", systemd_unit_name=""}`, "1280")
}

// dashboard is the part of Grafana's JSON that has queries in it.
type dashboard struct {
	Panels []struct {
		ID          int
		Type        string
		Title       string
		Targets     []struct{ RefID, Expr, LegendFormat string }
		GridPos     struct{ Y, W int }
		FieldConfig struct {
			Defaults struct {
				Unit   string
				Custom struct{ Stacking struct{ Mode string } }
			}
		}
	}
	Templating struct {
		List []struct {
			Name, Type, Regex, AllValue string
			Query                       any
		}
	}
}

func loadDashboard(t *testing.T) dashboard {
	t.Helper()
	var d dashboard
	if err := json.Unmarshal([]byte(read(t, "../grafana/unitmeter.json")), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// fill puts the values of variables into a query, as Grafana does.
func fill(query string, values map[string]string) string {
	for name, value := range values {
		query = strings.NewReplacer("${"+name+"}", value, "$"+name, value).Replace(query)
	}
	return query
}

// variables asks for the values of the dashboard's variables in their order, as
// each may need the ones before it.
func (d dashboard) variables(t *testing.T, b backend) map[string]string {
	t.Helper()
	values := map[string]string{"__rate_interval": "15s", "__range": "5m"}
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		query, _ := v.Query.(map[string]any)["query"].(string)
		inner, ok := strings.CutPrefix(query, "query_result(")
		inner, ok2 := strings.CutSuffix(inner, ")")
		pattern, err := regexp.Compile(strings.Trim(v.Regex, "/"))
		if !ok || !ok2 || err != nil {
			t.Fatalf("variable %s is not understood: %s, %s", v.Name, query, v.Regex)
		}
		var got []string
		eventually(t, "variable "+v.Name+" has values", func() error {
			samples, err := b.query(fill(inner, values))
			got = nil
			for _, s := range samples {
				m := pattern.FindStringSubmatch(asGrafana(s))
				if m == nil {
					return fmt.Errorf("%s does not match %s", asGrafana(s), pattern)
				}
				got = append(got, m[1])
			}
			return err
		})
		want := map[string]string{"dot": b.dot, "host": "example", "unit": "nats-main.service"}[v.Name]
		if !slices.Contains(got, want) {
			t.Errorf("variable %s offers %q, want %q among them", v.Name, got, want)
		}
		values[v.Name] = cmp.Or(v.AllValue, want)
	}
	return values
}

// asGrafana is how query_result() shows a sample to a variable's regex.
func asGrafana(s sample) string {
	var labels []string
	for k, v := range s.Metric {
		if k != "__name__" {
			labels = append(labels, fmt.Sprintf(`%s="%s"`, k, v))
		}
	}
	slices.Sort(labels)
	return fmt.Sprintf("%s{%s} %v %v", s.Metric["__name__"], strings.Join(labels, ","), s.Value[1], s.Value[0])
}

// test runs the query of every panel. All of them must have something to show.
func (d dashboard) test(t *testing.T, b backend) {
	t.Helper()
	values := d.variables(t, b)
	queries := 0
	for _, panel := range d.Panels {
		for _, target := range panel.Targets {
			queries++
			expr := fill(target.Expr, values)
			if strings.Contains(expr, "$") {
				t.Errorf("panel %q: a variable is not known in %s", panel.Title, expr)
			}
			var samples []sample
			eventually(t, "panel "+panel.Title+" has data", func() (err error) {
				samples, err = b.query(expr)
				for _, s := range samples {
					if s.Value[1] == "NaN" {
						err = errors.New("NaN for " + expr)
					}
				}
				return err
			})
			if label := regexp.MustCompile(`{{(\w+)}}`).FindStringSubmatch(target.LegendFormat); label != nil {
				for _, s := range samples {
					if s.Metric[label[1]] == "" {
						t.Errorf("panel %q: the legend needs %s, and a sample has %v", panel.Title, label[1], s.Metric)
					}
				}
			}
		}
	}
	if queries < 25 {
		t.Errorf("the dashboard has %d queries, want at least 25", queries)
	}
}
