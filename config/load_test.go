package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
)

// load fails the test if environ is refused or gives other warnings than want.
func load(t *testing.T, environ []string, want ...string) Config {
	t.Helper()
	cfg, err := Load(environ)
	if err != nil {
		t.Fatalf("%q: %v", environ, err)
	}
	if !slices.Equal(cfg.Warnings, want) {
		t.Errorf("%q\n got warnings %q\nwant warnings %q", environ, cfg.Warnings, want)
	}
	return cfg
}

func TestNoConfigurationNeeded(t *testing.T) {
	want := Config{
		LogLevel: "info", LogFormat: "text",
		Exporters: []string{"otlp"}, Interval: time.Minute, ExportTimeout: 30 * time.Second,
		OTLP:        otlp.Config{Protocol: "grpc", Endpoint: "localhost:4317", Insecure: true, Timeout: 10 * time.Second},
		Temporality: "cumulative",
		Prometheus:  exporter.PrometheusConfig{Address: "localhost:9464"},
		Receiver: receiver.Config{
			Source: "dbus", Bus: "auto", StopRecords: "auto", SweepTimeout: 10 * time.Second, MaxSeries: 5000,
			Fold:  receiver.DefaultFold(),
			Types: []string{"service", "scope", "socket", "mount", "swap"},
		},
		Store:        store.Config{Dir: "/home/u/.local/state/unitmeter", OutboxMaxBytes: 256 << 20, OutboxMaxAge: 168 * time.Hour, History: 21 * day},
		StateDirFrom: "HOME",
	}
	if got := load(t, []string{"HOME=/home/u"}); !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}

// Empty and blank values are the same as none, also for lists and files.
func TestEmptyIsUnset(t *testing.T) {
	want := load(t, []string{"HOME=/home/u"})
	environ := []string{"HOME=/home/u"}
	for _, v := range Variables() {
		if v.Name != "HOME" {
			environ = append(environ, v.Name+"=", v.Specific+"= \n")
		}
	}
	if got := load(t, environ); !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}

func TestGoodInput(t *testing.T) {
	dir := writeFiles(t)
	for _, tt := range []struct {
		environ string // one variable on each line; TMP is the directory of files
		want    string // the fields of Config that it sets, as field=value
	}{
		{"OTEL_SDK_DISABLED=TRUE", "Disabled=true"},
		{"OTEL_SDK_DISABLED=False", "Disabled=false"},
		{"OTEL_LOG_LEVEL=WARN", "LogLevel=warn"},
		{"JOURNAL_STREAM=9:12345", "LogFormat=journal"},
		{"JOURNAL_STREAM=9:12345\nUNITMETER_LOG_FORMAT=json", "LogFormat=json"},
		// What looks like a mistake and is written so that it can only be meant.
		{"OTEL_RESOURCE_ATTRIBUTES=a=%22x%22,b=%23 1,c=%24{d},e=n#1", "ResourceAttributes=map[a:\"x\" b:# 1 c:${d} e:n#1]"},
		{"OTEL_SERVICE_NAME=c#", "ResourceAttributes=map[service.name:c#]"},
		// A proxy that gRPC could not use, and does not.
		{"HTTPS_PROXY=socks5://proxy:1080\nNO_PROXY=.example.com\nOTEL_EXPORTER_OTLP_ENDPOINT=https://c.example.com:4317", "OTLP.Endpoint=c.example.com:4317"},
		{"HTTPS_PROXY=socks5://proxy:1080\nOTEL_EXPORTER_OTLP_ENDPOINT=unix:/run/otel.sock", "OTLP.Endpoint=unix:/run/otel.sock"},
		{"https_proxy=socks5://proxy:1080", "OTLP.Endpoint=localhost:4317"},
		{"https_proxy=http://proxy:1080\nOTEL_EXPORTER_OTLP_ENDPOINT=http://c:4317", "OTLP.ProxyVariable=https_proxy"},
		{"HTTP_PROXY=http://proxy:1080\nHTTPS_PROXY=http://p:1\nOTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf\nOTEL_EXPORTER_OTLP_ENDPOINT=http://c:4318", "OTLP.ProxyVariable=HTTP_PROXY"},
		{"HTTPS_PROXY=http://proxy:1080\nNO_PROXY=.example.com\nOTEL_EXPORTER_OTLP_ENDPOINT=https://c.example.com:4317", "OTLP.ProxyVariable="},
		{"HTTP_PROXY=https://proxy:3128\nOTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf\nOTEL_EXPORTER_OTLP_ENDPOINT=http://c:4318", "OTLP.Endpoint=http://c:4318/v1/metrics"},
		{"OTEL_SERVICE_NAME=  a b  ", "ResourceAttributes=map[service.name:a b]"},
		{"OTEL_RESOURCE_ATTRIBUTES= a = 1%2C2 ,b=,c=x%3Dy=z", "ResourceAttributes=map[a:1,2 b: c:x=y=z]"},
		{"OTEL_RESOURCE_ATTRIBUTES=service.name=attr,a=1\nOTEL_SERVICE_NAME=own", "ResourceAttributes=map[a:1 service.name:own]"},
		{"OTEL_RESOURCE_ATTRIBUTES=service.name=attr", "ResourceAttributes=map[service.name:attr]"},

		{"OTEL_METRICS_EXPORTER=Console, prometheus,console", "Exporters=[console prometheus]"},
		{"OTEL_METRICS_EXPORTER=none", "Exporters=[]"},
		{"OTEL_METRIC_EXPORT_INTERVAL=2000\nOTEL_METRIC_EXPORT_TIMEOUT=1000", "Interval=2s ExportTimeout=1s Receiver.SweepTimeout=500ms"},
		{"OTEL_METRIC_EXPORT_INTERVAL=1000", "Interval=1s Receiver.SweepTimeout=900ms"},
		{"OTEL_METRIC_EXPORT_INTERVAL=1000\nUNITMETER_SWEEP_TIMEOUT=5s", "Interval=1s Receiver.SweepTimeout=5s"},
		{"OTEL_METRIC_EXPORT_TIMEOUT=1000\nUNITMETER_SWEEP_TIMEOUT=999ms", "Receiver.SweepTimeout=999ms"},
		{"OTEL_METRIC_EXPORT_INTERVAL=2147483647", "Interval=596h31m23.647s"},
		// What only the SDK reads.
		{"OTEL_METRICS_EXEMPLAR_FILTER=always_off\nOTEL_GO_X_OBSERVABILITY=true\nOTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION=base2_exponential_bucket_histogram", "Exporters=[otlp]"},
		{"OTEL_EXPORTER_PROMETHEUS_HOST=[::1]\nOTEL_EXPORTER_PROMETHEUS_PORT=0", "Prometheus.Address=[::1]:0"},
		{"OTEL_EXPORTER_PROMETHEUS_HOST=0.0.0.0", "Prometheus.Address=0.0.0.0:9464"},

		// Nothing of the OTLP group counts where no OTLP is sent.
		{"OTEL_METRICS_EXPORTER=console\nOTEL_EXPORTER_OTLP_PROTOCOL=http/json\nOTEL_EXPORTER_OTLP_CERTIFICATE=/nowhere", "OTLP.Protocol= OTLP.Endpoint= Files.Certificate="},
		// The general variable is not looked at where the other is set.
		{"OTEL_EXPORTER_OTLP_PROTOCOL=http/json\nOTEL_EXPORTER_OTLP_METRICS_PROTOCOL=http/protobuf", "OTLP.Protocol=http/protobuf OTLP.Endpoint=http://localhost:4318/v1/metrics OTLP.Insecure=true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://a:1\nOTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://b:2", "OTLP.Endpoint=b:2"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=HTTP://collector:4317/", "OTLP.Endpoint=collector:4317 OTLP.Insecure=true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=https://api.example.com", "OTLP.Endpoint=api.example.com:443 OTLP.Insecure=false"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=collector_1:4317", "OTLP.Endpoint=collector_1:4317 OTLP.Insecure=false"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=10.0.0.1:4317\nOTEL_EXPORTER_OTLP_INSECURE=true", "OTLP.Endpoint=10.0.0.1:4317 OTLP.Insecure=true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=[::1]:4317", "OTLP.Endpoint=[::1]:4317 OTLP.Insecure=false"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://[::1]:4317\nOTEL_EXPORTER_OTLP_INSECURE=true", "OTLP.Endpoint=[::1]:4317 OTLP.Insecure=true"},
		// gRPC reads the zone of an address in the form that it has in a URL.
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://[fe80::1%25lo]:4317", "OTLP.Endpoint=[fe80::1%25lo]:4317"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=[fe80::1%lo]:4317", "OTLP.Endpoint=[fe80::1%25lo]:4317"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=[fe80::1%25lo]:4317", "OTLP.Endpoint=[fe80::1%25lo]:4317"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=dns:///[fe80::1%lo]:4317", "OTLP.Endpoint=dns:///[fe80::1%25lo]:4317"},
		{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf\nOTEL_EXPORTER_OTLP_ENDPOINT=http://[fe80::1%25lo]:4318", "OTLP.Endpoint=http://[fe80::1%25lo]:4318/v1/metrics"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=unix:///run/otel.sock", "OTLP.Endpoint=unix:/run/otel.sock OTLP.Insecure=true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=unix:/run/otel.sock", "OTLP.Endpoint=unix:/run/otel.sock OTLP.Insecure=true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=unix-abstract:otel", "OTLP.Endpoint=unix-abstract:otel OTLP.Insecure=true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=dns:///collector:4317", "OTLP.Endpoint=dns:///collector:4317 OTLP.Insecure=false"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=dns:collector:4317", "OTLP.Endpoint=dns:collector:4317"},
		{"OTEL_EXPORTER_OTLP_PROTOCOL=HTTP/protobuf\nOTEL_EXPORTER_OTLP_ENDPOINT=https://x/otlp/", "OTLP.Endpoint=https://x/otlp/v1/metrics OTLP.Insecure=false"},
		{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf\nOTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://x/a/", "OTLP.Endpoint=http://x/a/"},
		// A setting that speaks of TLS turns the default endpoint to TLS.
		{"OTEL_EXPORTER_OTLP_INSECURE=false", "OTLP.Endpoint=localhost:4317 OTLP.Insecure=false"},
		{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/bundle.pem\nOTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTLP.Endpoint=https://localhost:4318/v1/metrics Files.Certificate=TMP/bundle.pem"},
		{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/cert.pem\nOTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/key.pem", "Files.ClientCertificate=TMP/cert.pem Files.ClientKey=TMP/key.pem OTLP.Insecure=false"},
		{"OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE=TMP/cert.pem\nOTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY=TMP/curvekey.pem\nOTEL_EXPORTER_OTLP_CLIENT_KEY=/nowhere", "Files.ClientKey=TMP/curvekey.pem"},
		{"OTEL_EXPORTER_OTLP_COMPRESSION=GZIP\nOTEL_EXPORTER_OTLP_TIMEOUT=1500", "OTLP.Gzip=true OTLP.Timeout=1.5s"},
		{"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=Delta", "Temporality=delta"},

		{"UNITMETER_SOURCE=EBPF", "Receiver.Source=ebpf"},
		{"UNITMETER_BUS=Private", "Receiver.Bus=private"},
		{"UNITMETER_BUS=unix:path=/tmp/bus,guid=00;tcp:host=localhost,port=1", "Receiver.Bus=unix:path=/tmp/bus,guid=00;tcp:host=localhost,port=1"},
		{"DBUS_SYSTEM_BUS_ADDRESS=unix:abstract=bus", "Receiver.SystemBus=unix:abstract=bus Receiver.Bus=auto"},
		{"UNITMETER_INCLUDE=nginx.service, ssh*,*.s[eo]*,*service,user@1000.service\nUNITMETER_EXCLUDE=dev-disk-by\\x2duuid.swap,?.service,[^a]*.mount",
			"Receiver.Include=[nginx.service ssh* *.s[eo]* *service user@1000.service] Receiver.Exclude=[dev-disk-by\\x2duuid.swap ?.service [^a]*.mount]"},
		{"UNITMETER_FOLD=None", "Receiver.Fold=[]"},
		{"UNITMETER_FOLD=job-*.service,job-*.service", "Receiver.Fold=[job-*.service]"},
		{"UNITMETER_UNIT_TYPES=slice, Service,service", "Receiver.Types=[slice service]"},
		{"UNITMETER_ATTRIBUTES=systemd.unit.slice", "Receiver.UnitSlice=true Receiver.UnitType=false"},
		{"UNITMETER_SOURCE=ebpf\nUNITMETER_USER_UNITS=Yes\nUNITMETER_CONTAINERS=yes\nUNITMETER_WIRE=no\nUNITMETER_ATTRIBUTES=unitmeter.loopback",
			"Receiver.UserUnits=true Receiver.Containers=true Receiver.Wire=false Receiver.Loopback=true Receiver.UnitType=false"},
		{"UNITMETER_MAX_UNITS=1000000", "Receiver.MaxSeries=1000000"},
		{"UNITMETER_STOP_RECORDS=Off", "Receiver.StopRecords=off"},

		{"UNITMETER_STATE_DIR=/srv//state/", "Store.Dir=/srv/state StateDirFrom=UNITMETER_STATE_DIR"},
		{"UNITMETER_STATE_DIR=None", "Store.Dir= StateDirFrom=UNITMETER_STATE_DIR"},
		{"STATE_DIRECTORY=/var/lib/a:/var/lib/b\nXDG_STATE_HOME=/x", "Store.Dir=/var/lib/a StateDirFrom=STATE_DIRECTORY"},
		{"XDG_STATE_HOME=/x", "Store.Dir=/x/unitmeter StateDirFrom=XDG_STATE_HOME"},
		{"UNITMETER_OUTBOX_MAX_BYTES=1 gib", "Store.OutboxMaxBytes=1073741824"},
		{"UNITMETER_OUTBOX_MAX_BYTES=1048576", "Store.OutboxMaxBytes=1048576"},
		{"UNITMETER_OUTBOX_MAX_AGE=1d12h", "Store.OutboxMaxAge=36h0m0s"},
		{"UNITMETER_HISTORY=NONE", "Store.History=-1ns"},
		{"UNITMETER_HISTORY=3650d", "Store.History=87600h0m0s"},
		// The first of duplicates counts, as for os.Getenv.
		{"UNITMETER_MAX_UNITS=1\nUNITMETER_MAX_UNITS=2", "Receiver.MaxSeries=1"},

		// What other programs put into a shared environment is left alone.
		{"OTEL_TRACES_EXPORTER=zipkin\nOTEL_BSP_SCHEDULE_DELAY=x\nOTEL_BLRP_SCHEDULE_DELAY=x\nOTEL_PROPAGATORS=b3\nOTEL_LOGS_EXPORTER=x\n" +
			"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=?\nOTEL_EXPORTER_OTLP_LOGS_HEADERS=?\nOTEL_EXPORTER_OTLP_TRACES_CERTIFICATE=/nowhere\n" +
			"OTEL_TRACES_SAMPLER=x\nOTEL_ATTRIBUTE_COUNT_LIMIT=x\nOTEL_PYTHON_LOG_LEVEL=x\nOTEL_SPAN_EVENT_COUNT_LIMIT=x\nOTEL_SERVICE_VERSION=x", "Exporters=[otlp]"},
		// So is what Kubernetes sets for services named unitmeter, unitmeter-x.
		{"UNITMETER_SERVICE_HOST=10.0.0.1\nUNITMETER_SERVICE_PORT=9464\nUNITMETER_SERVICE_PORT_HTTP=9464\nUNITMETER_PORT=tcp://10.0.0.1:9464\n" +
			"UNITMETER_PORT_9464_TCP=tcp://10.0.0.1:9464\nUNITMETER_PORT_9464_TCP_ADDR=10.0.0.1\nUNITMETER_X_SERVICE_HOST=10.0.0.1\nUNITMETER_X_PORT=tcp://10.0.0.1:1", "Exporters=[otlp]"},
	} {
		environ := strings.Split(strings.ReplaceAll(tt.environ, "TMP", dir), "\n")
		cfg := load(t, append(environ, "HOME=/home/u"))
		for _, want := range splitFields(strings.ReplaceAll(tt.want, "TMP", dir)) {
			path, value, _ := strings.Cut(want, "=")
			field := reflect.ValueOf(cfg)
			for name := range strings.SplitSeq(path, ".") {
				field = field.FieldByName(name)
			}
			if got := fmt.Sprint(field.Interface()); got != value {
				t.Errorf("%q: %s is %s, want %s", tt.environ, path, got, value)
			}
		}
	}
}

// splitFields cuts "A=1 B=[x y]" at the spaces that a field follows.
func splitFields(text string) []string {
	var out []string
	for word := range strings.SplitSeq(text, " ") {
		if len(out) == 0 || word[0] >= 'A' && word[0] <= 'Z' && strings.Contains(word, "=") {
			out = append(out, word)
		} else {
			out[len(out)-1] += " " + word
		}
	}
	return out
}

func TestFoldNoneIsNotNil(t *testing.T) {
	if cfg := load(t, []string{"HOME=/h", "UNITMETER_FOLD=none"}); cfg.Receiver.Fold == nil {
		t.Error("Fold is nil, which would mean the default")
	}
}

func TestSpecificVariables(t *testing.T) {
	got := load(t, []string{"HOME=/home/u", "OTEL_EXPORTER_OTLP_ENDPOINT=http://a:1", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://b:1",
		"OTEL_EXPORTER_OTLP_TIMEOUT=1000", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT=", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta"}).OTLP.Specific
	if want := map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"}; !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestHeadersFile(t *testing.T) {
	dir := writeFiles(t)
	cfg := load(t, []string{
		"HOME=/h", "CREDENTIALS_DIRECTORY=" + dir, "UNITMETER_OTLP_HEADERS_FILE=headers",
		"OTEL_EXPORTER_OTLP_HEADERS=Env=kept,API-KEY=replaced",
	})
	want := map[string]string{"env": "kept", "x-tenant": "blue,green", "api-key": secret, "a": "1", "b": "2"}
	if got := headersOf(t, cfg); !maps.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// headersOf returns the headers of the next request.
func headersOf(t *testing.T, cfg Config) map[string]string {
	t.Helper()
	if cfg.OTLP.Headers == nil {
		return nil
	}
	got, err := cfg.OTLP.Headers()
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestWarnings(t *testing.T) {
	dir := writeFiles(t)
	soon := time.Now().Add(3 * day).UTC().Format(time.DateOnly)
	for _, tt := range []struct {
		environ []string
		want    []string
	}{
		{[]string{"OTEL_EXPORTER_OTLP_METRICS_ENDPONT=x"}, []string{"OTEL_EXPORTER_OTLP_METRICS_ENDPONT is set and not read: did you mean OTEL_EXPORTER_OTLP_METRICS_ENDPOINT?"}},
		{[]string{"OTEL_EXPORTER_OTLP_METRIC_INSECURE=true"}, []string{"OTEL_EXPORTER_OTLP_METRIC_INSECURE is set and not read: did you mean OTEL_EXPORTER_OTLP_METRICS_INSECURE?"}},
		{[]string{"OTEL_METRIC_INTERVAL=x", "OTEL_METRICS_EXPORTERS=x"}, []string{
			"OTEL_METRICS_EXPORTERS is set and not read: did you mean OTEL_METRICS_EXPORTER?",
			"OTEL_METRIC_INTERVAL is set and not read: this agent knows no such variable"}},
		{[]string{"OTEL_EXPORTER_OTLP_ENDPIONT=x"}, []string{"OTEL_EXPORTER_OTLP_ENDPIONT is set and not read: did you mean OTEL_EXPORTER_OTLP_ENDPOINT?"}},
		{[]string{"OTEL_SERVICE_NAMES=x"}, []string{"OTEL_SERVICE_NAMES is set and not read: did you mean OTEL_SERVICE_NAME?"}},
		{[]string{"OTEL_SERVICE_NAMES="}, nil},
		{[]string{"OTEL_GO_X_CARDINALITY_LIMIT=10"}, []string{"OTEL_GO_X_CARDINALITY_LIMIT has no effect: UNITMETER_MAX_UNITS bounds the number of series"}},
		{[]string{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT=http://c:4318/v1/metrics/"}, []string{
			"OTEL_EXPORTER_OTLP_ENDPOINT ends in /v1/metrics, and /v1/metrics is added to that: remove it, or set OTEL_EXPORTER_OTLP_METRICS_ENDPOINT to the whole URL"}},
		{[]string{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT=http://c:4318/x/v1/traces"}, []string{
			"OTEL_EXPORTER_OTLP_ENDPOINT ends in /v1/traces, and /v1/metrics is added to that: remove it, or set OTEL_EXPORTER_OTLP_METRICS_ENDPOINT to the whole URL"}},
		{[]string{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://c:4318"}, []string{
			"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT has no path, and is used as it is: add /v1/metrics, or set OTEL_EXPORTER_OTLP_ENDPOINT"}},
		{[]string{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://c:4318/v1/logs"}, []string{
			"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT ends in /v1/logs, which is not for metrics: write /v1/metrics"}},
		{[]string{"OTEL_METRIC_EXPORT_INTERVAL=60", "OTEL_METRIC_EXPORT_TIMEOUT=30", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT=10"}, []string{
			"OTEL_METRIC_EXPORT_INTERVAL is in milliseconds, and 60 is 60ms: for 60 seconds write 60000",
			"OTEL_METRIC_EXPORT_TIMEOUT is in milliseconds, and 30 is 30ms: for 30 seconds write 30000",
			"OTEL_EXPORTER_OTLP_METRICS_TIMEOUT is in milliseconds, and 10 is 10ms: for 10 seconds write 10000"}},
		{[]string{"OTEL_SERVICE_NAME=host-meter# shown in the backend"}, []string{
			"OTEL_SERVICE_NAME has a comment behind it, which is part of the value here: put the comment on a line of its own"}},
		{[]string{"OTEL_RESOURCE_ATTRIBUTES=host.name=$HOSTNAME"}, []string{
			"OTEL_RESOURCE_ATTRIBUTES contains $NAME, which nothing expands here: write the value itself"}},
		{[]string{"OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer $TOKEN,a=" + secret + "$a"}, []string{
			"OTEL_EXPORTER_OTLP_HEADERS contains $NAME, which nothing expands here: write the value itself"}},
		{[]string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://c:4318"}, []string{"OTEL_EXPORTER_OTLP_ENDPOINT has port 4318, which is that of HTTP by default, and the protocol is grpc"}},
		{[]string{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://c:4317/v1/metrics"}, []string{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT has port 4317, which is that of grpc by default, and the protocol is http/protobuf"}},
		{[]string{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/soon.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/openkey.pem"}, []string{
			"the certificate of OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE expires on " + soon,
			"OTEL_EXPORTER_OTLP_CLIENT_KEY: every user can read TMP/openkey.pem; take the right away with chmod o-r"}},
		{[]string{"HTTPS_PROXY=http://user:" + secret + "%@proxy:3128", "https_proxy=proxy:3128", "http_proxy=http://[::1]:3128"}, []string{
			"HTTPS_PROXY is no URL, so that no proxy is used: write it as http://host:port"}},
		{[]string{"OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE=TMP/cut.pem"}, []string{
			"OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE: 1 of the 2 certificates in TMP/cut.pem cannot be read, and only the others are trusted: remove or replace them"}},
		{[]string{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/odd.pem"}, []string{
			"OTEL_EXPORTER_OTLP_CERTIFICATE: 1 of the 2 certificates in TMP/odd.pem cannot be read, and only the others are trusted: remove or replace them"}},
		{[]string{"UNITMETER_OTLP_HEADERS_FILE=TMP/open"}, []string{"UNITMETER_OTLP_HEADERS_FILE: every user can read TMP/open; take the right away with chmod o-r"}},
		{[]string{"UNITMETER_INCLUDE=*.slice,a.service", "UNITMETER_EXCLUDE=a.service"}, []string{
			"UNITMETER_INCLUDE has *.slice, and UNITMETER_UNIT_TYPES does not have slice",
			"UNITMETER_INCLUDE has a.service, and so does UNITMETER_EXCLUDE, which wins"}},
		{[]string{"UNITMETER_USER_UNITS=yes", "UNITMETER_WIRE=no", "UNITMETER_ATTRIBUTES=unitmeter.loopback"}, []string{
			"UNITMETER_USER_UNITS=yes has no effect: systemd does not count units of users' managers; set UNITMETER_SOURCE=ebpf, or remove it",
			"UNITMETER_ATTRIBUTES=unitmeter.loopback has no effect: systemd does not count unitmeter.loopback; set UNITMETER_SOURCE=ebpf, or remove it"}},
		{[]string{"UNITMETER_SOURCE=ebpf", "UNITMETER_USER_UNITS=yes"}, nil},
		{[]string{"UNITMETER_STATE_DIR=none", "UNITMETER_HISTORY=1d", "UNITMETER_OUTBOX_MAX_AGE=1d"}, []string{
			"UNITMETER_OUTBOX_MAX_AGE has no effect with UNITMETER_STATE_DIR=none",
			"UNITMETER_HISTORY has no effect with UNITMETER_STATE_DIR=none"}},
		{[]string{"UNITMETER_STATE_DIR=none", "UNITMETER_HISTORY=none"}, nil},
		{[]string{"HOME=", "XDG_STATE_HOME=x"}, []string{
			"XDG_STATE_HOME is not an absolute path, and is ignored for the state directory",
			"there is no state directory, so each start of the agent starts every series anew: set StateDirectory=unitmeter in its unit, or UNITMETER_STATE_DIR"}},
	} {
		environ, want := slices.Clone(tt.environ), slices.Clone(tt.want)
		for _, list := range [][]string{environ, want} {
			for i := range list {
				list[i] = strings.ReplaceAll(list[i], "TMP", dir)
			}
		}
		load(t, append(environ, "HOME=/home/u"), want...)
	}
}

// However a Config is printed, the values of headers are not in it.
func TestSecretsStaySecret(t *testing.T) {
	cfg := load(t, []string{"HOME=/h", "OTEL_EXPORTER_OTLP_HEADERS=api-key=" + secret})
	if headersOf(t, cfg)["api-key"] != secret {
		t.Fatal("the header is missing; the test sees nothing")
	}
	var out bytes.Buffer
	for _, v := range []any{cfg, &cfg, cfg.OTLP} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		_ = json.NewEncoder(&out).Encode(v) // it has no form for functions
		slog.New(slog.NewTextHandler(&out, nil)).Info("x", "config", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "config", v)
	}
	hex := fmt.Sprintf("%x", secret)
	if text := out.String(); strings.Contains(text, secret) || strings.Contains(text, hex) || !strings.Contains(text, "localhost:4317") {
		t.Errorf("the output shows the secret, or nothing at all:\n%s", text)
	}
}

// FuzzLoad looks for input that makes Load panic, answer differently the second
// time, or give an error that is not plain text.
func FuzzLoad(f *testing.F) {
	for _, environ := range badInputs {
		f.Add(strings.Join(environ, "\x01"))
	}
	for _, v := range Variables() {
		f.Add(v.Name + "=" + v.Default)
		f.Add(v.Specific + "=a,b=c,%41=%zz,*.service")
	}
	f.Fuzz(func(t *testing.T, text string) {
		environ := strings.Split(text, "\x01")
		for _, kv := range environ {
			// A fuzzer must not wander through the files of its host.
			if name, value, _ := strings.Cut(kv, "="); strings.Contains(value, "/") &&
				(strings.HasSuffix(name, "_FILE") || strings.HasSuffix(name, "CERTIFICATE") || strings.HasSuffix(name, "_KEY")) {
				t.Skip("names a file")
			}
		}
		one, err := Load(environ)
		two, err2 := Load(environ)
		if fmt.Sprint(err) != fmt.Sprint(err2) || !reflect.DeepEqual(withoutFunctions(one), withoutFunctions(two)) {
			t.Fatalf("two answers: %+v, %v; %+v, %v", one, err, two, err2)
		}
		if err != nil {
			if strings.ContainsFunc(strings.ReplaceAll(err.Error(), "\n", ""), isControl) {
				t.Errorf("control characters in %q", err)
			}
			return
		}
		if one.Interval <= 0 || one.Receiver.SweepTimeout <= 0 || one.Receiver.SweepTimeout >= one.ExportTimeout || one.Receiver.MaxSeries < 1 || len(one.Receiver.Types) == 0 {
			t.Errorf("accepted, and not usable: %+v", one)
		}
		if slices.Contains(one.Exporters, "otlp") && (one.OTLP.Endpoint == "" || one.OTLP.Timeout <= 0) {
			t.Errorf("accepted, and there is nowhere to send to: %+v", one.OTLP)
		}
	})
}

// withoutFunctions is for a comparison, since functions are never equal.
func withoutFunctions(cfg Config) Config {
	cfg.OTLP.Headers, cfg.OTLP.TLS = nil, nil
	return cfg
}

// BenchmarkLoad is the cost at start of the environment that the tests run in.
func BenchmarkLoad(b *testing.B) {
	environ := append(os.Environ(), "OTEL_EXPORTER_OTLP_ENDPOINT=https://c:4317")
	for b.Loop() {
		_, _ = Load(environ)
	}
}
