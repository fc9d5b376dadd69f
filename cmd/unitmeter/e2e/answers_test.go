package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
)

const faultsDoc = "../../../docs/faults.md"

// answered is one answer of a real program that is in the way of the agent, or is the
// receiver.
type answered struct {
	program, setting string
	grpc             bool
	port             string // where the program listens
	path             string // of the endpoint
	answer           string // a part of the error in the log, without ports and versions
	or               string // another one, where the client can notice either first
	env              []string
	tls              bool // the program speaks TLS
}

// title is what its row begins with.
func (a answered) title() string {
	over := "HTTP"
	if a.grpc {
		over = "gRPC"
	}
	return fmt.Sprintf("| %s | %s | %s | `%s` |", a.program, a.setting, over, a.answer)
}

// TestRealAnswers puts real programs with real settings between the agent and a
// Collector, or has them be the receiver, and then takes them away. What was committed
// meanwhile must arrive once. docs/faults.md has what was answered and logged.
func TestRealAnswers(t *testing.T) {
	t.Parallel()
	w := newWitness()
	behind, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, behind, w)
	r := newRoad(t, behind.Addr().String())
	var held []*holding
	for _, a := range r.answers() {
		held = append(held, r.hold(a))
	}
	var rows []string
	for _, h := range held {
		rows = append(rows, h.answered.title()+" "+h.next()+" |")
	}
	for _, h := range held {
		h.way.turn(h.good)
		h.end()
	}
	for _, h := range held {
		h.arrived(w)
	}
	for _, p := range w.problems {
		t.Error(p)
	}
	if t.Failed() {
		return
	}
	slices.Sort(rows)
	const begin, end = "<!-- Written by \"go test ./cmd/unitmeter/e2e -run TestRealAnswers -update=faults\"; do not edit. -->\n", "<!-- end -->\n"
	doc, err := os.ReadFile(faultsDoc)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(doc), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", faultsDoc)
	}
	want := before + begin + "| program | setting | over | answer | the log's next step |\n| --- | --- | --- | --- | --- |\n" + strings.Join(rows, "\n") + "\n" + end + after
	switch {
	case *update == "faults":
		err = os.WriteFile(faultsDoc, []byte(want), 0o644)
	case string(doc) != want:
		err = fmt.Errorf("%s is not current; run: go test ./cmd/unitmeter/e2e -run TestRealAnswers -update=faults\n%s", faultsDoc, strings.Join(rows, "\n"))
	}
	if err != nil {
		t.Error(err)
	}
}

// road is what is between the agents and the witness.
type road struct {
	t        *testing.T
	dir      string
	ports    map[string]string // addresses, by name
	ca       *otlptest.CA
	starting []string
}

func (r *road) at(name string) string {
	if r.ports[name] == "" {
		r.ports[name] = otlptest.FreeAddress(r.t)
	}
	return r.ports[name]
}

// expand puts addresses and files into a configuration: {at NAME}, {dir}.
func (r *road) expand(text string) string {
	for {
		before, rest, ok := strings.Cut(text, "{at ")
		if !ok {
			return strings.ReplaceAll(text, "{dir}", r.dir)
		}
		name, after, _ := strings.Cut(rest, "}")
		text = before + r.at(name) + after
	}
}

func (r *road) write(name, text string) string {
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path, []byte(r.expand(text)), 0o644); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// start runs a program until the test ends. await waits until it listens.
func (r *road) start(listens string, program string, args ...string) {
	r.starting = append(r.starting, listens)
	var log bytes.Buffer
	cmd, end := lifeline(r.t, program, args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		r.t.Fatalf("%v; run \"make tools\"", err)
	}
	r.t.Cleanup(func() {
		end()
		_ = cmd.Wait() // the log has what it tells
		if r.t.Failed() {
			text := log.String()
			r.t.Logf("%s %q:\n%s", program, args, text[max(0, len(text)-3000):])
		}
	})
}

// lifeline is a program that is asked to end when the function is called, or this
// process ends. A death signal would come with the end of a mere thread.
func lifeline(t *testing.T, program string, args ...string) (cmd *exec.Cmd, end func()) {
	cmd = exec.Command("sh", append([]string{"-c", `"$@" & child=$!; read -r _; kill $child; wait $child`, "sh", program}, args...)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	return cmd, func() { stdin.Close() }
}

// await waits until all programs listen.
func (r *road) await() {
	for _, name := range r.starting {
		eventually(r.t, name+" listens", func() bool {
			conn, err := net.Dial("tcp", r.at(name))
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
}

// newRoad starts all programs.
func newRoad(t *testing.T, witness string) *road {
	t.Helper()
	r := &road{t: t, dir: t.TempDir(), ports: map[string]string{}, ca: otlptest.NewCA(t)}
	// The unprivileged workers of nginx must reach its files.
	for dir := r.dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		_ = os.Chmod(dir, 0o755)
	}
	cert, key := r.ca.ServerFiles(t, net.IPv4(127, 0, 0, 1))
	collector := func(name, listens, receivers, extensions, more string) {
		config := r.write(name+".yaml", "receivers:\n  otlp:\n    protocols:\n"+receivers+extensions+`
exporters:
  otlp_grpc:
    endpoint: `+witness+`
    tls: {insecure: true}
    sending_queue: {enabled: false}
    retry_on_failure: {enabled: false}
`+more)
		r.start(listens, tool(t, "otelcol"), "--config="+config)
	}
	const pipeline = `
  pipelines:
    metrics: {receivers: [otlp], exporters: [otlp_grpc]}
  telemetry:
    metrics: {level: none}
`
	collector("good", "good", "      grpc: {endpoint: \"{at good-grpc}\"}\n      http: {endpoint: \"{at good}\"}\n", "  otlp/tls:\n    protocols:\n      grpc: {endpoint: \"{at good-grpcs}\", tls: {cert_file: "+cert+", key_file: "+key+"}}\n      http: {endpoint: \"{at good-https}\", tls: {cert_file: "+cert+", key_file: "+key+"}}\n", "service:"+strings.Replace(pipeline, "[otlp]", "[otlp, otlp/tls]", 1))
	collector("strict", "basic", `      grpc: {endpoint: "{at token}", auth: {authenticator: bearertokenauth}}
      http: {endpoint: "{at basic}", auth: {authenticator: basicauth}}
  otlp/small:
    protocols:
      grpc: {endpoint: "{at throttled-grpc}", middlewares: [{id: memory_limiter}]}
      http: {endpoint: "{at small}", max_request_body_size: 50}
  otlp/throttled:
    protocols:
      http: {endpoint: "{at throttled}", middlewares: [{id: memory_limiter}]}
`, `
extensions:
  bearertokenauth: {token: secret}
  basicauth: {htpasswd: {inline: "user:secret"}}
  memory_limiter: {check_interval: 100ms, limit_mib: 1, spike_limit_mib: 0}
`, "service:\n  extensions: [bearertokenauth, basicauth, memory_limiter]"+strings.Replace(pipeline, "[otlp]", "[otlp, otlp/small, otlp/throttled]", 1))
	collector("full", "full", "      grpc: {endpoint: \"{at full-grpc}\"}\n      http: {endpoint: \"{at full}\"}\n", "processors:\n  memory_limiter: {check_interval: 100ms, limit_mib: 1, spike_limit_mib: 0}\n",
		"service:"+strings.Replace(pipeline, "exporters:", "processors: [memory_limiter], exporters:", 1))
	collector("lonely", "lonely", "      grpc: {endpoint: \"{at lonely-grpc}\"}\n      http: {endpoint: \"{at lonely}\"}\n", "", "  otlp_grpc/nobody:\n    endpoint: \"{at nobody}\"\n    timeout: 500ms\n    tls: {insecure: true}\n    sending_queue: {enabled: false}\n    retry_on_failure: {enabled: false}\nservice:"+strings.Replace(pipeline, "[otlp_grpc]", "[otlp_grpc/nobody]", 1))

	silent, err := net.Listen("tcp", r.at("silent")) // takes connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	if err := os.MkdirAll(filepath.Join(r.dir, "site", "v1"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.write("site/v1/metrics", "metrics are the measure of things\n")
	r.write("site/index.html", "<!doctype html><title>Log in</title>\n")
	r.write("passwords", "user:{PLAIN}secret\n")
	r.start("nginx-401", "nginx", "-p", r.dir, "-e", "stderr", "-c", r.write("nginx.conf", `daemon off; pid {dir}/nginx.pid; error_log stderr error;
events {}
http {
  access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  limit_req_zone $server_port zone=slow:1m rate=1r/m;
  default_type text/plain;
  server { listen {at nginx-401}; auth_basic "metrics"; auth_basic_user_file {dir}/passwords; location / { proxy_pass http://{at good}; } }
  server { listen {at nginx-403}; location / { deny all; } }
  server { listen {at nginx-404}; location / { return 404; } location /otlp/ { proxy_pass http://{at good}/; } }
  server { listen {at nginx-405}; root {dir}/site; }
  server { listen {at nginx-413}; client_max_body_size 20; location / { proxy_pass http://{at good}; } }
  server { listen {at nginx-429}; limit_req zone=slow; limit_req_status 429; location / { proxy_pass http://{at good}; } }
  server { listen {at nginx-503}; limit_req zone=slow; location / { proxy_pass http://{at good}; } }
  server { listen {at nginx-502}; location / { proxy_pass http://{at nobody}; } }
  server { listen {at nginx-504}; location / { proxy_pass http://{at silent}; proxy_read_timeout 1s; } }
  server { listen {at nginx-301}; return 301 https://$host$request_uri; }
  server { listen {at nginx-444}; return 444; }
  server { listen {at nginx-login}; root {dir}/site; error_page 404 405 =200 /index.html; }
  server { listen {at nginx-tls} ssl; ssl_certificate `+cert+`; ssl_certificate_key `+key+`; }
  server { listen {at nginx-mtls} ssl; ssl_certificate `+cert+`; ssl_certificate_key `+key+`; ssl_verify_client on; ssl_client_certificate `+r.ca.File+`; }
  server { listen {at nginx-headers}; large_client_header_buffers 4 1k; location / { proxy_pass http://{at good}; } }
  server { listen {at nginx-g401} http2; auth_basic "metrics"; auth_basic_user_file {dir}/passwords; location / { grpc_pass grpc://{at good-grpc}; } }
  server { listen {at nginx-g403} http2; location / { deny all; } }
  server { listen {at nginx-g404} http2; location / { return 404; } }
  server { listen {at nginx-g405} http2; root {dir}/site; error_page 404 =405 /index.html; }
  server { listen {at nginx-g413} http2; client_max_body_size 20; location / { grpc_pass grpc://{at good-grpc}; } }
  server { listen {at nginx-g502} http2; location / { grpc_pass grpc://{at nobody}; } }
  server { listen {at nginx-g503} http2; limit_req zone=slow; location / { grpc_pass grpc://{at good-grpc}; } }
  server { listen {at nginx-g504} http2; location / { grpc_pass grpc://{at silent}; grpc_read_timeout 1s; } }
  server { listen {at nginx-glogin} http2; root {dir}/site; error_page 404 405 =200 /index.html; }
}
`))
	r.start("haproxy-403", "haproxy", "-db", "-f", r.write("haproxy.cfg", `defaults
  mode http
  timeout connect 1s
  timeout client 10s
  timeout server 1s
  timeout tarpit 500ms
frontend forbidden
  bind {at haproxy-403}
  http-request deny
frontend counted
  bind {at haproxy-429}
  http-request deny deny_status 429
frontend teergrube
  bind {at haproxy-500}
  http-request tarpit
frontend mute
  bind {at haproxy-reject}
  http-request reject
frontend portal
  bind {at haproxy-login}
  http-request return status 200 content-type text/html string "<html><title>Welcome to the guest network</title></html>"
frontend known
  bind {at haproxy-401}
  http-request auth realm metrics
frontend none
  bind {at haproxy-503}
  default_backend dead
backend dead
  server one {at nobody} check
frontend late
  bind {at haproxy-504}
  default_backend silent
backend silent
  server one {at silent}
frontend nothing
  bind {at haproxy-g503} proto h2
  default_backend dead
frontend refused
  bind {at haproxy-g403} proto h2
  http-request deny
`))
	r.write("web.yml", "basic_auth_users: {user: \"$2y$05$qE8Nqqzwy8RrfKUUVNwPDu4j6zm6Li3cFVLAvgzqg5mWXSqFrG/Tm\"}\n")
	r.write("prometheus.yaml", "global: {}\n")
	for name, args := range map[string][]string{
		"prometheus-off": nil, "prometheus-auth": {"--web.enable-otlp-receiver", "--web.config.file=" + r.dir + "/web.yml"}, "prometheus": {"--web.enable-otlp-receiver"},
	} {
		r.start(name, tool(t, "prometheus"), append(args, "--config.file="+r.dir+"/prometheus.yaml", "--storage.tsdb.path="+r.dir+"/"+name, "--web.listen-address="+r.at(name), "--log.level=warn")...)
	}
	r.await()
	return r
}

func (r *road) answers() []answered {
	trust := []string{"OTEL_EXPORTER_OTLP_CERTIFICATE=" + r.ca.File}
	return []answered{
		{program: "nginx", setting: "`auth_basic`", port: "nginx-401", answer: "401 Unauthorized"},
		{program: "nginx", setting: "`deny all`", port: "nginx-403", answer: "403 Forbidden"},
		{program: "nginx", setting: "another path", port: "nginx-404", answer: "404 Not Found"},
		{program: "nginx", setting: "a web site", port: "nginx-405", answer: "405 Not Allowed"},
		{program: "nginx", setting: "`client_max_body_size` below each point", port: "nginx-413", answer: "413 Request Entity Too Large"},
		{program: "nginx", setting: "`limit_req`, `limit_req_status 429`", port: "nginx-429", answer: "429 Too Many Requests"},
		{program: "nginx", setting: "`limit_req`", port: "nginx-503", answer: "503 Service Temporarily Unavailable"},
		{program: "nginx", setting: "nobody behind it", port: "nginx-502", answer: "502 Bad Gateway"},
		{program: "nginx", setting: "no answer behind it", port: "nginx-504", answer: "504 Gateway Time-out"},
		{program: "nginx", setting: "`return 301 https://...`", port: "nginx-301", answer: "301 Moved Permanently"},
		{program: "nginx", setting: "`return 444`", port: "nginx-444", answer: "EOF", or: "write tcp"},
		{program: "nginx", setting: "a web application, `error_page 405 =200`", port: "nginx-login", answer: "<title>Log in</title>"},
		{program: "nginx", setting: "TLS, spoken to without", port: "nginx-tls", answer: "400 The plain HTTP request was sent to HTTPS port"},
		{program: "nginx", setting: "`ssl_verify_client on`", port: "nginx-mtls", answer: "400 No required SSL certificate was sent", tls: true, env: trust},
		{program: "nginx", setting: "`large_client_header_buffers`, and a long token", port: "nginx-headers", answer: "400 Request Header Or Cookie Too Large", env: []string{"OTEL_EXPORTER_OTLP_HEADERS=authorization=" + strings.Repeat("x", 5000)}},
		{program: "nginx", setting: "`auth_basic`", grpc: true, port: "nginx-g401", answer: "401 (Unauthorized)"},
		{program: "nginx", setting: "`deny all`", grpc: true, port: "nginx-g403", answer: "403 (Forbidden)"},
		{program: "nginx", setting: "another path", grpc: true, port: "nginx-g404", answer: "404 (Not Found)"},
		{program: "nginx", setting: "a web site", grpc: true, port: "nginx-g405", answer: "405 (Method Not Allowed)"},
		{program: "nginx", setting: "`client_max_body_size` below each point", grpc: true, port: "nginx-g413", answer: "413 (Request Entity Too Large)"},
		{program: "nginx", setting: "nobody behind it", grpc: true, port: "nginx-g502", answer: "502 (Bad Gateway)"},
		{program: "nginx", setting: "`limit_req`", grpc: true, port: "nginx-g503", answer: "503 (Service Unavailable)"},
		{program: "nginx", setting: "no answer behind it", grpc: true, port: "nginx-g504", answer: "504 (Gateway Timeout)"},
		{program: "nginx", setting: "a web application, `error_page 405 =200`", grpc: true, port: "nginx-glogin", answer: "unexpected content-type \"text/html\""},
		{program: "nginx", setting: "HTTP/1 only", grpc: true, port: "nginx-404", answer: "error reading server preface"},
		{program: "HAProxy", setting: "`http-request deny`", port: "haproxy-403", answer: "403 Forbidden"},
		{program: "HAProxy", setting: "`deny_status 429`", port: "haproxy-429", answer: "429 Too Many Requests"},
		{program: "HAProxy", setting: "`http-request tarpit`", port: "haproxy-500", answer: "500 Internal Server Error"},
		{program: "HAProxy", setting: "`http-request reject`", port: "haproxy-reject", answer: "EOF", or: "write tcp"},
		{program: "HAProxy", setting: "a page for all, as a guest network has it", port: "haproxy-login", answer: "Welcome to the guest network"},
		{program: "HAProxy", setting: "`http-request auth`", port: "haproxy-401", answer: "401 Unauthorized"},
		{program: "HAProxy", setting: "no server is up", port: "haproxy-503", answer: "503 Service Unavailable"},
		{program: "HAProxy", setting: "`timeout server`", port: "haproxy-504", answer: "504 Gateway Time-out"},
		{program: "HAProxy", setting: "no server is up", grpc: true, port: "haproxy-g503", answer: "503 (Service Unavailable)"},
		{program: "HAProxy", setting: "`http-request deny`", grpc: true, port: "haproxy-g403", answer: "403 (Forbidden)"},
		{program: "Collector", setting: "`basicauth`", port: "basic", answer: "401 Unauthorized"},
		{program: "Collector", setting: "`bearertokenauth`", grpc: true, port: "token", answer: "Unauthenticated"},
		{program: "Collector", setting: "`max_request_body_size` below each point", port: "small", answer: "request body too large"},
		{program: "Collector", setting: "`memory_limiter` as a processor", port: "full", answer: "503 Service Unavailable"},
		{program: "Collector", setting: "`memory_limiter` as a processor", grpc: true, port: "full-grpc", answer: "Unavailable"},
		{program: "Collector", setting: "`memory_limiter` as a middleware", port: "throttled", answer: "429 Too Many Requests"},
		{program: "Collector", setting: "`memory_limiter` as a middleware", grpc: true, port: "throttled-grpc", answer: "ResourceExhausted"},
		{program: "Collector", setting: "nobody behind it", port: "lonely", answer: "503 Service Unavailable"},
		{program: "Collector", setting: "nobody behind it", grpc: true, port: "lonely-grpc", answer: "Unavailable"},
		{program: "Collector", setting: "another path", port: "good", path: "/otlp", answer: "404 Not Found"},
		{program: "Collector", setting: "gRPC, spoken to over HTTP/1", port: "good-grpc", answer: "malformed HTTP response", or: "write tcp"},
		{program: "Collector", setting: "HTTP, spoken to over gRPC", grpc: true, port: "good", answer: "error reading server preface"},
		{program: "Prometheus", setting: "no `--web.enable-otlp-receiver`", port: "prometheus-off", path: "/api/v1/otlp", answer: "404 Not Found"},
		{program: "Prometheus", setting: "basic authentication", port: "prometheus-auth", path: "/api/v1/otlp", answer: "401 Unauthorized"},
		{program: "Prometheus", setting: "another path", port: "prometheus", path: "", answer: "404 Not Found"},
		{program: "Prometheus", setting: "deltas", port: "prometheus", path: "/api/v1/otlp", answer: "invalid temporality", env: []string{"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta"}},
	}
}

// turnout forwards connections to one address, and later to another.
type turnout struct {
	mu    sync.Mutex
	to    string
	conns []net.Conn
}

func (s *turnout) serve(l net.Listener) {
	var forwarding sync.WaitGroup
	defer forwarding.Wait()
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		out, err := net.Dial("tcp", s.to)
		if err != nil {
			in.Close()
			s.mu.Unlock()
			continue
		}
		s.conns = append(s.conns, in, out)
		s.mu.Unlock()
		for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
			forwarding.Go(func() {
				_, _ = io.Copy(pair[0], pair[1])
				pair[0].Close()
				pair[1].Close()
			})
		}
	}
}

func (s *turnout) turn(to string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.to = to
	for _, c := range s.conns {
		c.Close()
	}
}

// holding is an agent whose requests are not taken.
type holding struct {
	t        *testing.T
	answered answered
	name     string // its host name
	dir      string
	endpoint string
	env      []string
	way      *turnout
	good     string // the Collector that will take them
	agent    *exec.Cmd
	end      func() // of the agent, which delivers what it can before
}

// hold starts an agent that sends to the program.
func (r *road) hold(a answered) *holding {
	t := r.t
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &holding{t: t, answered: a, name: a.port, dir: t.TempDir(), way: &turnout{to: r.at(a.port)}, good: "good"}
	if a.path != "" || a.grpc {
		h.name += "." + strings.ReplaceAll(fmt.Sprint(a.grpc, len(a.env), a.path), "/", ".")
	}
	var serving sync.WaitGroup
	serving.Go(func() { h.way.serve(l) })
	t.Cleanup(func() { l.Close(); h.way.turn(""); serving.Wait() })
	scheme, protocol := "http://", "http/protobuf"
	if a.tls {
		scheme, h.good = "https://", "good-https"
	}
	if a.grpc {
		protocol, h.good = "grpc", "good-grpc"
	}
	h.good, h.endpoint = r.at(h.good), scheme+l.Addr().String()
	h.env = []string{
		"UNITMETER_STATE_DIR=" + h.dir + "/state", "UNITMETER_BUS=unix:path=" + h.dir + "/nobody", "UNITMETER_LOG_FORMAT=json", "UNITMETER_STOP_RECORDS=off",
		"OTEL_METRIC_EXPORT_INTERVAL=1001", "OTEL_EXPORTER_OTLP_TIMEOUT=3000", "OTEL_EXPORTER_OTLP_PROTOCOL=" + protocol,
		"OTEL_RESOURCE_ATTRIBUTES=host.name=" + h.name,
	}
	h.start(append(slices.Clone(a.env), "OTEL_EXPORTER_OTLP_ENDPOINT="+h.endpoint+a.path)...)
	return h
}

func (h *holding) start(env ...string) {
	binary, err := agentBinary()
	if err != nil {
		h.t.Fatal(err)
	}
	log, err := os.OpenFile(h.dir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	agent, end := lifeline(h.t, binary, "run")
	agent.Env, agent.Stderr = slices.Concat(h.env, env), log
	if err := agent.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.agent, h.end = agent, end
	h.t.Cleanup(func() { end(); _ = agent.Wait() })
}

func (h *holding) log() string {
	text, err := os.ReadFile(h.dir + "/log")
	if err != nil {
		h.t.Fatal(err)
	}
	return string(text)
}

// query asks the agent's store for one number.
func (h *holding) query(sql string) (n int) {
	out, err := exec.Command("sqlite3", "-readonly", "-cmd", ".timeout 60000", h.dir+"/state/unitmeter.db", sql).Output()
	if _, scanned := fmt.Sscan(string(out), &n); err != nil || scanned != nil {
		h.t.Fatalf("ask the agent's store: %v, %v: %q", err, scanned, out)
	}
	return n
}

const waiting = "SELECT count(*) FROM outbox"

// next waits for the answer and for some requests that are held, and returns the next
// step that is in the log.
func (h *holding) next() (next string) {
	if !within(patience, func() bool {
		for line := range strings.Lines(h.log()) {
			var entry struct{ Msg, Err, Next string }
			if json.Unmarshal([]byte(line), &entry) == nil && strings.HasPrefix(entry.Msg, "cannot deliver metrics") && (strings.Contains(entry.Err, h.answered.answer) || h.answered.or != "" && strings.Contains(entry.Err, h.answered.or)) {
				next = entry.Next
			}
		}
		return next != "" && h.query(waiting) > 2
	}) {
		h.t.Fatalf("%s the log does not have the answer, or nothing waits\n%s", h.answered.title(), h.log())
	}
	return next
}

// arrived checks that all that was committed has arrived once, at the latest after
// another start.
func (h *holding) arrived(w *witness) {
	if err := h.agent.Wait(); err != nil {
		h.t.Errorf("%s: %v\n%s", h.answered.title(), err, h.log())
	}
	if h.query(waiting) > 0 { // the time for it was too short, or a setting of the agent is wrong
		h.start(append(slices.DeleteFunc(slices.Clone(h.answered.env), func(e string) bool { return !strings.HasPrefix(e, "OTEL_EXPORTER_OTLP_CERTIFICATE") }), "OTEL_EXPORTER_OTLP_ENDPOINT="+h.endpoint)...)
		eventually(h.t, h.answered.title()+" all is delivered", func() bool { return h.query(waiting) == 0 })
		h.end()
		if err := h.agent.Wait(); err != nil {
			h.t.Errorf("%s: %v\n%s", h.answered.title(), err, h.log())
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	arrived := 0
	for _, s := range w.find(pulse, "") {
		if s.last.Attrs["host.name"] == h.name {
			arrived += len(s.times)
		}
	}
	if committed, aside := h.query("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'"), h.query("SELECT count(*) FROM quarantine"); arrived != committed || aside > 0 {
		h.t.Errorf("%s %d of %d requests have arrived, and %d are in quarantine\n%s", h.answered.title(), arrived, committed, aside, h.log())
	}
}
