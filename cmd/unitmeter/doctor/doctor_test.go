package doctor

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// examined makes all checks in this process, with nothing in the environment
// but the given variables.
func examined(t *testing.T, environ ...string) map[string]finding {
	t.Helper()
	if !slices.ContainsFunc(environ, func(kv string) bool { return strings.HasPrefix(kv, "UNITMETER_STATE_DIR=") }) {
		environ = append(environ, "UNITMETER_STATE_DIR="+filepath.Join(t.TempDir(), "state"))
	}
	findings := map[string]finding{}
	for _, f := range examine(t.Context(), environ, func(finding) {}) {
		findings[f.Name] = f
	}
	return findings
}

// want fails unless a check has a status and its fix has a text.
func want(t *testing.T, findings map[string]finding, name, status, fix string) {
	t.Helper()
	f, ok := findings[name]
	if !ok || f.Status != status || !strings.Contains(f.Fix, fix) || (f.Fix == "") != (fix == "") {
		t.Errorf("check %q = %+v, want status %q and a fix with %q", name, f, status, fix)
	}
}

// noSystemd keeps these tests away from the systemd of the machine.
const noSystemd = "UNITMETER_BUS=unix:path=/nonexistent/bus"

func TestDoctorEndpoint(t *testing.T) {
	ca, other := otlptest.NewCA(t), otlptest.NewCA(t)
	cert, key := ca.Client(t, "agent")
	wrongCert, wrongKey := other.Client(t, "stranger")
	plain := otlptest.Start(t, otlptest.Config{})
	secure := otlptest.Start(t, otlptest.Config{TLS: ca.Server(t, false)})
	mutual := otlptest.Start(t, otlptest.Config{TLS: ca.Server(t, true)})
	misnamed := otlptest.Start(t, otlptest.Config{TLS: ca.Server(t, false), Address: "127.0.0.2:0"})
	nameless := otlptest.Start(t, otlptest.Config{TLS: namelessServer(t, ca)})
	plainHTTP := otlptest.Start(t, otlptest.Config{HTTP: true})
	secureHTTP := otlptest.Start(t, otlptest.Config{HTTP: true, TLS: ca.Server(t, false)})
	mutualHTTP := otlptest.Start(t, otlptest.Config{HTTP: true, TLS: ca.Server(t, true)})
	token := func(r otlptest.Request) otlptest.Answer {
		if r.Header["authorization"] == "Bearer right" {
			return otlptest.Answer{}
		}
		return otlptest.Answer{Code: codes.Unauthenticated, Message: "who are you?"}
	}
	guarded := otlptest.Start(t, otlptest.Config{Decide: token})
	guardedHTTP := otlptest.Start(t, otlptest.Config{HTTP: true, Decide: token})
	forbidding := otlptest.Start(t, otlptest.Config{Decide: func(otlptest.Request) otlptest.Answer { return otlptest.Answer{Code: codes.PermissionDenied} }})
	overloaded := otlptest.Start(t, otlptest.Config{HTTP: true, Decide: func(otlptest.Request) otlptest.Answer { return otlptest.Answer{Code: codes.Unavailable} }})
	web := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(web.Close)
	redirect := httptest.NewServer(http.RedirectHandler("/elsewhere", http.StatusFound))
	t.Cleanup(redirect.Close)
	noMetrics := listenAndServe(t, func(l net.Listener) { _ = grpc.NewServer().Serve(l) })
	echo := listenAndServe(t, func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	})
	closed := otlptest.FreeAddress(t)

	const (
		endpoint = "OTEL_EXPORTER_OTLP_ENDPOINT="
		protocol = "OTEL_EXPORTER_OTLP_PROTOCOL="
		roots    = "OTEL_EXPORTER_OTLP_CERTIFICATE="
		headers  = "OTEL_EXPORTER_OTLP_HEADERS="
	)
	client := func(cert, key string) []string {
		return []string{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=" + cert, "OTEL_EXPORTER_OTLP_CLIENT_KEY=" + key}
	}
	for _, test := range []struct {
		name  string
		env   []string
		check string // which finds it
		fix   string // what its fix must say
		fixed []string
	}{
		{"nobody listens", []string{endpoint + "http://" + closed}, "endpoint-connection", "set OTEL_EXPORTER_OTLP_ENDPOINT",
			[]string{endpoint + plain.URL()}},
		{"no such name", []string{endpoint + "http://nosuch.invalid:4317"}, "endpoint-name", "set OTEL_EXPORTER_OTLP_ENDPOINT",
			[]string{endpoint + plain.URL()}},
		{"no socket", []string{endpoint + "unix:/nonexistent/otel.sock"}, "endpoint-connection", "set OTEL_EXPORTER_OTLP_ENDPOINT",
			[]string{endpoint + plain.URL()}},
		{"no authority", []string{endpoint + secure.URL()}, "endpoint-tls", "set OTEL_EXPORTER_OTLP_CERTIFICATE",
			[]string{endpoint + secure.URL(), roots + ca.File}},
		{"wrong authority", []string{endpoint + secure.URL(), roots + other.File}, "endpoint-tls", "set OTEL_EXPORTER_OTLP_CERTIFICATE",
			[]string{endpoint + secure.URL(), roots + ca.File}},
		{"wrong name", []string{endpoint + misnamed.URL(), roots + ca.File}, "endpoint-tls", "localhost, 127.0.0.1",
			[]string{endpoint + secure.URL(), roots + ca.File}},
		{"no client certificate", []string{endpoint + mutual.URL(), roots + ca.File}, "endpoint-tls", "set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
			append(client(cert, key), endpoint+mutual.URL(), roots+ca.File)},
		{"no client certificate, HTTP", []string{endpoint + mutualHTTP.URL(), protocol + "http/protobuf", roots + ca.File}, "endpoint-tls", "set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
			append(client(cert, key), endpoint+mutualHTTP.URL(), protocol+"http/protobuf", roots+ca.File)},
		{"strange client certificate", append(client(wrongCert, wrongKey), endpoint+mutual.URL(), roots+ca.File), "endpoint-tls", "an authority that the Collector trusts",
			append(client(cert, key), endpoint+mutual.URL(), roots+ca.File)},
		{"TLS to a plain server", []string{endpoint + "https://" + plain.Address(), roots + ca.File}, "endpoint-tls", "set OTEL_EXPORTER_OTLP_ENDPOINT=http://" + plain.Address(),
			[]string{endpoint + "http://" + plain.Address()}},
		{"TLS to a plain web server", []string{endpoint + "https://" + plainHTTP.Address(), roots + ca.File}, "endpoint-tls", "set OTEL_EXPORTER_OTLP_ENDPOINT=http://" + plainHTTP.Address(),
			[]string{endpoint + "http://" + plainHTTP.Address(), protocol + "http/protobuf"}},
		{"no TLS to a TLS server", []string{endpoint + "http://" + secure.Address()}, "collector", "set OTEL_EXPORTER_OTLP_ENDPOINT=https://" + secure.Address(),
			[]string{endpoint + "https://" + secure.Address(), roots + ca.File}},
		{"no TLS to a TLS server, HTTP", []string{endpoint + "http://" + secureHTTP.Address(), protocol + "http/protobuf"}, "collector", "set OTEL_EXPORTER_OTLP_ENDPOINT=https://" + secureHTTP.Address(),
			[]string{endpoint + "https://" + secureHTTP.Address(), protocol + "http/protobuf", roots + ca.File}},
		{"gRPC to HTTP", []string{endpoint + plainHTTP.URL()}, "collector", "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
			[]string{endpoint + plainHTTP.URL(), protocol + "http/protobuf"}},
		{"HTTP to gRPC", []string{endpoint + plain.URL(), protocol + "http/protobuf"}, "collector", "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
			[]string{endpoint + plain.URL(), protocol + "grpc"}},
		{"HTTP to gRPC, TLS", []string{endpoint + secure.URL(), protocol + "http/protobuf", roots + ca.File}, "collector", "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
			[]string{endpoint + secure.URL(), protocol + "grpc", roots + ca.File}},
		{"no header", []string{endpoint + guarded.URL()}, "collector", "UNITMETER_OTLP_HEADERS_FILE or OTEL_EXPORTER_OTLP_HEADERS",
			[]string{endpoint + guarded.URL(), headers + "authorization=Bearer right"}},
		{"wrong header, HTTP", []string{endpoint + guardedHTTP.URL(), protocol + "http/protobuf", headers + "authorization=Bearer wrong"}, "collector", "UNITMETER_OTLP_HEADERS_FILE or OTEL_EXPORTER_OTLP_HEADERS",
			[]string{endpoint + guardedHTTP.URL(), protocol + "http/protobuf", headers + "authorization=Bearer right"}},
		{"no permission", []string{endpoint + forbidding.URL()}, "collector", "UNITMETER_OTLP_HEADERS_FILE", []string{endpoint + plain.URL()}},
		{"overloaded", []string{endpoint + overloaded.URL(), protocol + "http/protobuf"}, "collector", "look at the log of the Collector", []string{endpoint + plain.URL()}},
		{"wrong path", []string{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=" + plainHTTP.URL() + "/v2/metrics", protocol + "http/protobuf"}, "collector", "set OTEL_EXPORTER_OTLP_METRICS_ENDPOINT to the Collector's OTLP/HTTP address, such as http://127.0.0.1:4318/v1/metrics",
			[]string{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=" + plainHTTP.URL() + "/v1/metrics", protocol + "http/protobuf"}},
		{"no path", []string{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=" + plainHTTP.URL(), endpoint + "http://unused.invalid", protocol + "http/protobuf"}, "collector", "set OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
			[]string{endpoint + plainHTTP.URL(), protocol + "http/protobuf"}},
		{"no TLS, for metrics only", []string{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://" + secureHTTP.Address() + "/v1/metrics", protocol + "http/protobuf"}, "collector", "set OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=https://" + secureHTTP.Address() + "/v1/metrics",
			[]string{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=https://" + secureHTTP.Address() + "/v1/metrics", protocol + "http/protobuf", roots + ca.File}},
		{"wrong authority, for metrics only", []string{endpoint + secure.URL(), "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE=" + other.File, roots + ca.File}, "endpoint-tls", "set OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE",
			[]string{endpoint + secure.URL(), "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE=" + ca.File}},
		{"a certificate without names", []string{endpoint + nameless.URL(), roots + ca.File}, "endpoint-tls", "renew the certificate of the Collector with the name in it",
			[]string{endpoint + secure.URL(), roots + ca.File}},
		{"a web server", []string{endpoint + web.URL, protocol + "http/protobuf"}, "collector", "set OTEL_EXPORTER_OTLP_ENDPOINT", []string{endpoint + plain.URL()}},
		{"a redirect", []string{endpoint + redirect.URL, protocol + "http/protobuf"}, "collector", "set OTEL_EXPORTER_OTLP_ENDPOINT", []string{endpoint + plain.URL()}},
		{"gRPC without metrics", []string{endpoint + "http://" + noMetrics}, "collector", "add the otlp receiver", []string{endpoint + plain.URL()}},
		{"neither", []string{endpoint + "http://" + echo}, "collector", "set OTEL_EXPORTER_OTLP_ENDPOINT", []string{endpoint + plain.URL()}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			findings := examined(t, append(test.env, noSystemd)...)
			want(t, findings, test.check, statusFail, test.fix)
			for name, f := range findings {
				// No other check may cry before it: the first fix is the right one.
				if f.Status == statusFail && name != test.check && strings.HasPrefix(name, "endpoint") {
					t.Errorf("check %q fails too: %+v", name, f)
				}
			}
			findings = examined(t, append(test.fixed, noSystemd)...)
			for _, name := range []string{"endpoint-name", "endpoint-connection", "endpoint-tls", "collector"} {
				want(t, findings, name, statusOK, "")
			}
		})
	}
}

// namelessServer is the configuration of a server whose certificate has no names but a
// common one.
func namelessServer(t *testing.T, ca *otlptest.CA) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(ca.ServerFiles(t))
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}}
}

// listenAndServe returns the address of a listener that ends with the test.
func listenAndServe(t *testing.T, serve func(net.Listener)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); serve(l) }()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

func TestDoctorEnvironment(t *testing.T) {
	for _, test := range []struct {
		name, env, fix, fixed string
		status                string
	}{
		{"bad value", "OTEL_METRIC_EXPORT_INTERVAL=soon", "OTEL_METRIC_EXPORT_INTERVAL: ", "OTEL_METRIC_EXPORT_INTERVAL=5000", statusFail},
		{"unknown variable", "UNITMETER_INCLUDES=a*", "UNITMETER_INCLUDES: did you mean UNITMETER_INCLUDE?", "UNITMETER_INCLUDE=a*", statusFail},
		{"disabled", "OTEL_SDK_DISABLED=true", "unset OTEL_SDK_DISABLED", "OTEL_SDK_DISABLED=false", statusFail},
		{"nothing exported", "OTEL_METRICS_EXPORTER=none", "unset OTEL_METRICS_EXPORTER", "OTEL_METRICS_EXPORTER=otlp", statusFail},
		{"not read", "OTEL_EXPORTER_OTLP_METRICS_ENDPONT=x", "unitmeter help environment", "OTEL_TRACES_EXPORTER=none", statusWarn},
	} {
		t.Run(test.name, func(t *testing.T) {
			want(t, examined(t, test.env, noSystemd), "environment", test.status, test.fix)
			want(t, examined(t, test.fixed, noSystemd), "environment", statusOK, "")
		})
	}
	// A secret must not get into a report that people post.
	f := examined(t, "OTEL_EXPORTER_OTLP_HEADERS=authorization=sesame", "OTEL_METRIC_EXPORT_INTERVAL=soon", noSystemd)
	if text := fmt.Sprint(f); strings.Contains(text, "sesame") {
		t.Errorf("the report has the secret: %s", text)
	}
}

func TestDoctorState(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make directories of other users; run as root")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name  string
		setUp func(dir string) error
		fix   string // a shell command with DIR for the directory
	}{
		{"wrong owner", func(dir string) error { return os.Chown(dir, 65534, 65534) }, "chown -R 0 DIR"},
		{"writable by others", func(dir string) error { return os.Chmod(dir, 0o777) }, "chmod 0700 DIR"},
		{"a file", func(dir string) error { return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600)) },
			"mv DIR DIR.old"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := test.setUp(dir); err != nil {
				t.Fatal(err)
			}
			fix := strings.ReplaceAll(test.fix, "DIR", dir)
			want(t, examined(t, noSystemd, "UNITMETER_STATE_DIR="+dir), "state-directory", statusFail, fix)
			if out, err := exec.Command("sh", "-c", fix).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", fix, err, out)
			}
			want(t, examined(t, noSystemd, "UNITMETER_STATE_DIR="+dir), "state-directory", statusOK, "")
		})
	}
	want(t, examined(t, noSystemd, "UNITMETER_STATE_DIR=none"), "state-directory", statusWarn, "set UNITMETER_STATE_DIR=")

	// What looks must not disturb: the directory is as empty as before.
	dir := t.TempDir()
	want(t, examined(t, noSystemd, "UNITMETER_STATE_DIR="+dir), "state-directory", statusOK, "")
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("the doctor left %v, %v", left, err)
	}
	want(t, map[string]finding{"state-directory": stateFinding(dir, 1<<62)}, "state-directory", statusWarn, "set UNITMETER_OUTBOX_MAX_BYTES")
}

// TestDoctorOutbox plants a request that a Collector refused, in a real store.
func TestDoctorOutbox(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, err := store.Open(t.Context(), store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	env := []string{noSystemd, "UNITMETER_STATE_DIR=" + dir}
	commit := func(at time.Time) {
		t.Helper()
		if err := s.Commit(t.Context(), store.Cycle{Time: at, Request: []byte("request"), Points: 1}); err != nil {
			t.Fatal(err)
		}
	}
	commit(time.Now())
	findings := examined(t, env...)
	want(t, findings, "outbox", statusOK, "")
	if found := findings["state-directory"].Found; !strings.Contains(found, "in use by process") {
		t.Errorf("the lock is not seen: %s", found)
	}
	entries, err := s.Next(t.Context(), 1<<20)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	if err := s.Quarantine(t.Context(), entries[0], "HTTP 400"); err != nil {
		t.Fatal(err)
	}
	findings = examined(t, env...)
	want(t, findings, "outbox", statusWarn, "unitmeter history --quarantined")
	if found := findings["outbox"].Found; !strings.Contains(found, "refused 1 requests for good") || !strings.Contains(found, "HTTP 400") {
		t.Errorf("outbox: %s", found)
	}
	want(t, examined(t, noSystemd), "outbox", statusSkip, "")

	// What waits for longer than two cycles is told, with what is in its way.
	commit(time.Now().Add(-time.Hour))
	endpoint := "OTEL_EXPORTER_OTLP_ENDPOINT="
	findings = examined(t, append(env, endpoint+"http://"+otlptest.FreeAddress(t))...)
	want(t, findings, "outbox", statusWarn, findings["endpoint-connection"].Fix)
	if found := findings["outbox"].Found; !strings.Contains(found, "1 requests (") || !strings.Contains(found, "the oldest for 1h0m") {
		t.Errorf("outbox: %s", found)
	}
	env = append(env, endpoint+otlptest.Start(t, otlptest.Config{}).URL())
	want(t, examined(t, env...), "outbox", statusWarn, "unitmeter run")
	if entries, err = s.Next(t.Context(), 1<<20); err != nil || len(entries) != 1 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	if err := s.Ack(t.Context(), entries[0].ID); err != nil {
		t.Fatal(err)
	}
	want(t, examined(t, env...), "outbox", statusWarn, "unitmeter history --quarantined")
}

// A receiver that takes each request and refuses its points is not all right.
func TestDoctorPartialSuccess(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, err := store.Open(t.Context(), store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Commit(t.Context(), store.Cycle{Time: time.Now()}); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		partial     store.Partial
		status, fix string
	}{
		{store.Partial{Points: 26, Rejected: 26, Message: "UNSUPPORTED_METRIC_TYPE_MONOTONIC_CUMULATIVE_SUM"}, statusFail, "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta"},
		{store.Partial{Points: 26, Rejected: 2, Message: "delta temporality is not supported"}, statusWarn, "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=cumulative"},
		{store.Partial{Points: 26, Rejected: 1, Message: "too old"}, statusWarn, "the receiver's log"},
		{store.Partial{}, statusOK, ""},
	} {
		if err := s.NotePartial(t.Context(), test.partial); err != nil {
			t.Fatal(err)
		}
		want(t, examined(t, noSystemd, "UNITMETER_STATE_DIR="+dir), "outbox", test.status, test.fix)
	}
}

func TestVersionFinding(t *testing.T) {
	for _, test := range []struct{ version, status, fix string }{
		{"219", statusFail, "upgrade to systemd 249"},
		{"247.3-7+deb11u4", statusWarn, "upgrade to systemd 249"},
		{"249.11", statusOK, ""},
		{"252.38-1~deb12u1", statusOK, ""},
		{"255.4-1ubuntu8", statusOK, ""},
		{"256.2", statusWarn, "unitmeter enable --ebpf"},
		{"256.9", statusOK, ""}, // the check of the counters has the fix
		{"257.13-1~deb13u1", statusOK, ""},
		{"258", statusWarn, "upgrade to systemd 258.1"},
		{"258.1", statusOK, ""},
		{"262", statusOK, ""},
	} {
		v, err := accounting.ParseVersion(test.version)
		if err != nil {
			t.Fatal(err)
		}
		want(t, map[string]finding{test.version: versionFinding(v)}, test.version, test.status, test.fix)
	}
}

func TestBusFailure(t *testing.T) {
	at := func(address string, err error) error {
		return errors.Join(&accounting.BusError{Address: address, Err: err})
	}
	missing, refused, forbidden := fs.ErrNotExist, syscall.ECONNREFUSED, fs.ErrPermission
	for _, test := range []struct {
		name              string
		err               error
		booted            bool
		container, aaprof string
		fix               string
	}{
		{"not systemd", at(systemd.UsualSystemBus, missing), false, "", "", "a host whose init is systemd"},
		{"no dbus", at(systemd.UsualSystemBus, missing), true, "", "", "systemctl start dbus.socket dbus.service"},
		{"dead dbus", at(systemd.UsualSystemBus, refused), true, "", "", "systemctl start dbus.socket dbus.service"},
		{"docker", at(systemd.UsualSystemBus, missing), false, "docker", "", "-v /run/dbus/system_bus_socket:/run/dbus/system_bus_socket"},
		{"kubernetes", at(systemd.UsualSystemBus, missing), false, "kubernetes", "", "a hostPath volume of /run/dbus/system_bus_socket"},
		{"wrong address", at("unix:path=/x", missing), true, "", "", "unset UNITMETER_BUS and DBUS_SYSTEM_BUS_ADDRESS"},
		{"socket mode", at(systemd.UsualSystemBus, forbidden), true, "", "", "chmod 0666 /run/dbus/system_bus_socket"},
		{"socket AppArmor", at(systemd.UsualSystemBus, forbidden), false, "docker", "docker-default (enforce)", "--security-opt apparmor=unconfined"},
		{"message AppArmor", at(systemd.UsualSystemBus, dbus.Error{Name: "org.freedesktop.DBus.Error.AccessDenied", Body: []any{"An AppArmor policy prevents this sender from sending"}}),
			false, "docker", "docker-default (enforce)", "--security-opt apparmor=unconfined"},
		{"dynamic user", at(systemd.UsualSystemBus, errors.New(`authenticate to D-Bus: the bus answered "REJECTED EXTERNAL"`)), true, "", "", "use a static user"},
		{"silence", at(systemd.UsualSystemBus, context.DeadlineExceeded), true, "", "", "systemctl restart dbus.service"},
		{"session bus", at("unix:path=/run/user/1000/bus", dbus.Error{Name: "org.freedesktop.DBus.Error.ServiceUnknown"}), true, "", "", "set DBUS_SYSTEM_BUS_ADDRESS"},
		{"the last of two counts", errors.Join(&accounting.BusError{Address: bus.PrivateSocket, Err: missing}, &accounting.BusError{Address: systemd.UsualSystemBus, Err: forbidden}), true, "", "", "chmod 0666 /run/dbus"},
		{"anything", at(systemd.UsualSystemBus, io.ErrUnexpectedEOF), true, "", "", "set UNITMETER_BUS=auto"},
	} {
		want(t, map[string]finding{test.name: busFailure(test.err, test.booted, test.container, test.aaprof)}, test.name, statusFail, test.fix)
	}
}

func TestCountersFinding(t *testing.T) {
	one, two := []string{"a"}, []string{"a", "b"}
	v252, v257 := accounting.Version{Major: 252}, accounting.Version{Major: 257, Minor: 13}
	for _, test := range []struct {
		name        string
		counters    counters
		status, fix string
	}{
		{"all well", counters{on: one, version: v252}, statusOK, ""},
		{"nothing on", counters{version: v252}, statusSkip, ""},
		{"one lost", counters{on: one, lost: one, version: v252, packaged: true}, statusWarn, "unitmeter enable --lost"},
		{"all lost after a reload", counters{lost: two, version: v257}, statusWarn, "unitmeter enable --lost"},
		{"all lost, packaged", counters{lost: two, version: v257, packaged: true}, statusWarn, "unitmeter enable --rearm"},
		{"some lost, packaged", counters{on: one, lost: two, version: v257, packaged: true}, statusWarn, "unitmeter enable --rearm"},
		{"to be lost", counters{on: one, version: v257, packaged: true}, statusWarn, "unitmeter enable --rearm"},
		{"to be lost, by hand", counters{on: one, version: v257}, statusOK, ""},
		{"rearmed", counters{on: one, version: v257, packaged: true, rearmed: true}, statusOK, ""},
		{"no BPF", counters{lost: two, version: v252}, statusFail, "CONFIG_CGROUP_BPF"},
		{"no BPF on 257", counters{lost: two, version: v257, never: true}, statusFail, "CONFIG_CGROUP_BPF"},
		{"no BPF in a container", counters{lost: one, virtualization: "lxc", version: accounting.Version{Major: 255, Minor: 4}}, statusFail, "on the host of this container"},
		{"no BPF in a container of 257", counters{lost: one, virtualization: "lxc", version: v257, never: true, packaged: true}, statusFail, "on the host of this container"},
		{"nonsense", counters{on: one, failed: []string{"x.service"}, version: v252}, statusWarn, "systemctl show x.service"},
	} {
		want(t, map[string]finding{test.name: countersFinding(test.counters)}, test.name, test.status, test.fix)
	}
}

func TestSilenceFinding(t *testing.T) {
	none := map[string]string{}
	for _, test := range []struct {
		name          string
		level, target string
		journald      map[string]string
		quiet         []string
		status, fix   string
	}{
		{"as it comes", "info", "journal-or-kmsg", none, nil, statusOK, ""},
		{"verbose", "debug", "journal", map[string]string{"MaxLevelStore": "debug", "Storage": "auto"}, nil, statusOK, ""},
		{"level", "notice", "journal", none, nil, statusWarn, "systemd-analyze log-level info"},
		{"target", "info", "kmsg", none, nil, statusWarn, "systemd-analyze log-target journal"},
		{"syslog", "info", "syslog-or-kmsg", none, nil, statusWarn, "systemd-analyze log-target journal"},
		{"stored level", "info", "auto", map[string]string{"MaxLevelStore": "5"}, nil, statusWarn, "MaxLevelStore=info"},
		{"no storage", "info", "auto", map[string]string{"Storage": "none"}, nil, statusWarn, "Storage=none"},
		{"unit", "info", "auto", none, []string{"job.service"}, statusWarn, "systemctl edit job.service"},
	} {
		want(t, map[string]finding{test.name: silenceFinding(test.level, test.target, test.journald, test.quiet)}, test.name, test.status, test.fix)
	}
}

func TestStopRecordsFinding(t *testing.T) {
	no := errors.New("no")
	for _, test := range []struct {
		mode         string
		err          error
		status, next string
	}{
		{"auto", nil, statusOK, ""},
		{"auto", no, statusWarn, "usermod -aG systemd-journal"},
		{"auto", exec.ErrNotFound, statusWarn, "journalctl"},
		{"on", nil, statusOK, ""},
		{"on", no, statusFail, "usermod -aG systemd-journal"},
	} {
		f := stopRecordsFinding(test.mode, test.err)
		want(t, map[string]finding{test.mode: f}, test.mode, test.status, test.next)
	}
}

func TestMeterFinding(t *testing.T) {
	none, refused := fmt.Errorf("open: %w", ebpf.ErrNotLoaded), fmt.Errorf("open: %w", ebpf.ErrPermission)
	well := ebpf.Sweep{Entries: 10, MaxEntries: 100, Naming: true}
	detached, full, lost, nameless := well, well, well, well
	detached.Detached, full.Entries, lost.Lost.Sent.Bytes, nameless.Naming = true, 76, 1, false
	for name, test := range map[string]struct {
		f            finding
		status, next string
	}{
		"not loaded":          {meterFailure(receiver.EBPF, false, true, none), statusFail, "unitmeter enable --ebpf"},
		"not loaded, as root": {meterFailure(receiver.EBPF, true, true, none), statusWarn, "unitmeter meter load"},
		"not loaded, auto":    {meterFailure(receiver.Auto, true, true, none), statusWarn, "unitmeter enable --ebpf"},
		"refused":             {meterFailure(receiver.EBPF, true, true, refused), statusFail, "unitmeter enable --ebpf"},
		"refused before 5.19": {meterFailure(receiver.EBPF, true, false, refused), statusFail, "AmbientCapabilities=CAP_BPF"},
		"well":                {meterFinding(well), statusOK, ""},
		"detached":            {meterFinding(detached), statusFail, "unitmeter-meter.service"},
		"nearly full":         {meterFinding(full), statusWarn, "start the agent"},
		"lost":                {meterFinding(lost), statusWarn, "meter unload"},
		"no names":            {meterFinding(nameless), statusWarn, "ebpf-host"},
	} {
		want(t, map[string]finding{name: test.f}, name, test.status, test.next)
	}
}

// The first is tried with a real program, in e2e.
func TestAttachFailure(t *testing.T) {
	for err, fix := range map[error]string{
		ebpf.ErrForeignProgram: "BPF_F_ALLOW_MULTI", ebpf.ErrMemlock: "LimitMEMLOCK=infinity", ebpf.ErrPermission: "--cap-add=BPF",
		ebpf.ErrNotCgroup2: "systemd.unified_cgroup_hierarchy=1", errors.ErrUnsupported: "UNITMETER_SOURCE=dbus", errors.New("EINVAL"): "version 5.8",
	} {
		f := attachFailure(receiver.EBPF, fmt.Errorf("attach: %w", err))
		want(t, map[string]finding{"ebpf-host": f}, "ebpf-host", statusFail, fix)
	}
	for err, fix := range map[error]string{ebpf.ErrNoBTF: "CONFIG_DEBUG_INFO_BTF", ebpf.ErrPermission: "CAP_PERFMON", errors.New("EINVAL"): "lockdown"} {
		f := namingFailure(fmt.Errorf("name cgroups: %w", err))
		want(t, map[string]finding{"ebpf-host": f}, "ebpf-host", statusWarn, fix)
	}
}

func TestNetController(t *testing.T) {
	used, unused := t.TempDir(), t.TempDir()
	if err := os.Mkdir(used+"/tenant", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(used+"/tenant/cgroup.procs", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for mounts, want := range map[string]string{
		"cgroup2 " + used + " cgroup2 rw 0 0\n":                       "",
		"cgroup " + used + " cgroup rw,cpu,cpuacct 0 0\n":             "",
		"cgroup " + unused + " cgroup rw,net_cls,net_prio 0 0\n":      "",
		"x\ncgroup " + used + " cgroup rw,net_cls,net_prio 0 0\n":     "net_cls",
		"cgroup " + used + " cgroup rw,nosuid,net_prio 0 0\nproc /\n": "net_prio",
	} {
		if got := netController(mounts); got != want {
			t.Errorf("%s: %q is in use, want %q", mounts, got, want)
		}
	}
}

// TestBothFinding: only runs that both sources counted from the start are compared.
func TestBothFinding(t *testing.T) {
	made := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	unit := func(start time.Time, total uint64) []systemd.Unit {
		return []systemd.Unit{{Name: "a.service", Accounting: "on", Invocation: "1", Start: start, Counters: systemd.Counters{EgressBytes: total}}}
	}
	meter := func(path string, made time.Time, total uint64) ebpf.Meter {
		who := &ebpf.Identity{Path: path, Cgroup: ebpf.ParseCgroup(path), Made: made}
		return ebpf.Meter{Identity: who, Sent: ebpf.Counters{Traffic: ebpf.Traffic{Bytes: total}}}
	}
	sweep := ebpf.Sweep{Meters: []ebpf.Meter{
		meter("/system.slice/a.service", made.Add(-time.Hour), 1000), // an earlier run
		meter("/system.slice/a.service", made, 70), meter("/system.slice/a.service/below", made.Add(time.Hour), 30),
		meter("/system.slice/b.service", made, 7),
	}}
	sweep.Meters[0].Gone = true
	for name, test := range map[string]struct {
		before, after []systemd.Unit
		status, text  string
	}{
		"equal":                  {unit(made, 100), unit(made, 100), statusOK, "the 1 units"},
		"sent meanwhile":         {unit(made, 90), unit(made, 110), statusOK, "the 1 units"},
		"eBPF has less":          {unit(made, 101), unit(made, 110), statusFail, "less than systemd for a.service"},
		"systemd has less":       {unit(made, 80), unit(made, 90), statusOK, "systemd has less for a.service"},
		"switched on later":      {unit(made.Add(time.Minute), 5), unit(made.Add(time.Minute), 5), statusSkip, ""},
		"began in the meantime":  {nil, unit(made, 100), statusSkip, ""},
		"older than the program": {unit(made.Add(-2*time.Hour), 100), unit(made.Add(-2*time.Hour), 100), statusSkip, ""},
	} {
		if f := bothFinding(test.before, test.after, sweep); f.Status != test.status || !strings.Contains(f.Found, test.text) {
			t.Errorf("%s: %+v, want %s with %q", name, f, test.status, test.text)
		}
	}
}

func TestTLSFailureExpired(t *testing.T) {
	err := fmt.Errorf("tls: %w", x509.CertificateInvalidError{Reason: x509.Expired})
	f := tlsFailure(err, endpoint{address: "c:4317"}, config.Files{})
	want(t, map[string]finding{"tls": f}, "tls", statusFail, "renew the certificate")
}

func TestParseEndpoint(t *testing.T) {
	for _, test := range []struct{ protocol, text, network, address, host string }{
		{"grpc", "localhost:4317", "tcp", "localhost:4317", "localhost"},
		{"grpc", "[::1]:4317", "tcp", "[::1]:4317", "::1"},
		{"grpc", "[fe80::1%25eth0]:4317", "tcp", "[fe80::1%eth0]:4317", "fe80::1%eth0"},
		{"grpc", "dns:///c.example:4317", "tcp", "c.example:4317", "c.example"},
		{"grpc", "dns://1.1.1.1/c.example:4317", "tcp", "c.example:4317", "c.example"},
		{"grpc", "dns:c.example:4317", "tcp", "c.example:4317", "c.example"},
		{"grpc", "unix:/run/otel.sock", "unix", "/run/otel.sock", ""},
		{"grpc", "unix-abstract:otel", "unix", "@otel", ""},
		{"http/protobuf", "http://c.example:4318/v1/metrics", "tcp", "c.example:4318", "c.example"},
		{"http/protobuf", "https://c.example/v1/metrics", "tcp", "c.example:443", "c.example"},
		{"http/protobuf", "http://[::1]/v1/metrics", "tcp", "[::1]:80", "::1"},
	} {
		got, err := parseEndpoint(otlp.Config{Protocol: test.protocol, Endpoint: test.text})
		if err != nil || got.network != test.network || got.address != test.address || got.host != test.host {
			t.Errorf("parseEndpoint(%q) = %+v, %v, want %+v", test.text, got, err, test)
		}
	}
	if got, err := parseEndpoint(otlp.Config{Protocol: "grpc", Endpoint: "nothing"}); err == nil {
		t.Errorf("an endpoint without a port is taken: %+v", got)
	}
}

// TestDoctorBadBus plants peers that are no D-Bus at all.
func TestDoctorBadBus(t *testing.T) {
	t.Parallel()
	for name, first := range map[string][]byte{
		"rejects": []byte("REJECTED EXTERNAL\r\n"),
		"garbage": bytes.Repeat([]byte{0xff}, 64),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := examined(t, "UNITMETER_BUS="+systemdtest.StartGarbage(t, first))["bus"]
			if f.Status != statusFail || f.Fix == "" {
				t.Errorf("bus = %+v, want a failure with a fix", f)
			}
		})
	}
}

func TestDoctorOutput(t *testing.T) {
	env := []string{noSystemd, "UNITMETER_STATE_DIR=none", "OTEL_METRICS_EXPORTER=console"}
	var text, object, notes bytes.Buffer
	err := Run(t.Context(), Config{Environ: env, Here: true, Out: &text, Notes: &notes})
	if err == nil || !strings.Contains(err.Error(), "checks failed") || notes.Len() > 0 {
		t.Errorf("doctor = %v, %q, want an error for a bus that is not there", err, &notes)
	}
	for line := range strings.Lines(text.String()) {
		if !strings.HasPrefix(line, "      fix: ") && len(line) > 80 {
			t.Errorf("a line of %d characters: %q", len(line)-1, line)
		}
	}
	if err := Run(t.Context(), Config{Environ: env, Here: true, JSON: true, Out: &object, Notes: &notes}); err == nil {
		t.Error("with JSON a failed check is no error")
	}
	var r report
	if err := json.Unmarshal(object.Bytes(), &r); err != nil {
		t.Fatalf("%v:\n%s", err, &object)
	}
	if r.Worst != statusFail || len(r.Checks) != strings.Count("\n"+text.String(), "\nok ")+strings.Count(text.String(), "\nwarn ")+strings.Count(text.String(), "\nfail ")+strings.Count(text.String(), "\nskip ") {
		t.Errorf("report = %+v", r)
	}
	for _, f := range r.Checks {
		if f.Name == "" || f.Found == "" || (f.Status == statusWarn || f.Status == statusFail) && f.Fix == "" {
			t.Errorf("incomplete: %+v", f)
		}
	}
}

func TestWorst(t *testing.T) {
	for _, test := range []struct{ statuses, want string }{
		{"", statusOK}, {"ok ok", statusOK}, {"ok skip", statusOK}, {"skip warn ok", statusWarn}, {"ok fail warn", statusFail},
	} {
		var findings []finding
		for _, s := range strings.Fields(test.statuses) {
			findings = append(findings, finding{Status: s})
		}
		if got := worst(findings); got != test.want {
			t.Errorf("worst(%s) = %s, want %s", test.statuses, got, test.want)
		}
	}
}
