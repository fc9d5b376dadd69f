package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// secret must not be in any message.
const secret = "s3cr3t"

// badInputs are settings of which each must be refused. TMP stands for the
// directory that writeFiles fills. testdata/bad.golden has the messages.
var badInputs = [][]string{
	// General
	{"OTEL_SDK_DISABLED=yes"},
	{"OTEL_SDK_DISABLED=1"},
	{`OTEL_SERVICE_NAME="quoted"`},
	{"OTEL_SERVICE_NAME=two\nlines"},
	{"OTEL_SERVICE_NAME=\xff\xfe"},
	{"OTEL_RESOURCE_ATTRIBUTES=deployment"},
	{"OTEL_RESOURCE_ATTRIBUTES=a=1,=2"},
	{"OTEL_RESOURCE_ATTRIBUTES=a=1,b=50%"},
	{"OTEL_RESOURCE_ATTRIBUTES=a=%ff"},
	{"OTEL_RESOURCE_ATTRIBUTES=a=1,"},
	{"OTEL_RESOURCE_ATTRIBUTES=a=1,a=2"},
	{"OTEL_RESOURCE_ATTRIBUTES=a b=1,c%2C=2"},
	{"OTEL_RESOURCE_ATTRIBUTES=deployment.environment.name=production # or staging"},
	{"OTEL_RESOURCE_ATTRIBUTES=host.name=${HOSTNAME}"},
	{"OTEL_RESOURCE_ATTRIBUTES=host.name=$(hostname)"},
	{`OTEL_RESOURCE_ATTRIBUTES=a="b",c='d'`},
	{`OTEL_RESOURCE_ATTRIBUTES=a="b,c",d=e`},
	{"OTEL_LOG_LEVEL=warning"},
	{"OTEL_LOG_LEVEL=warn # not info"},
	{"OTEL_LOG_LEVEL=loud"},
	{"UNITMETER_LOG_FORMAT=jsn"},
	{"OTEL_CONFIG_FILE=/etc/otel.yaml"},
	{"OTEL_EXPERIMENTAL_CONFIG_FILE=/etc/otel.yaml"},
	// Export
	{"OTEL_METRICS_EXPORTER=otpl"},
	{"OTEL_METRICS_EXPORTER=otlp,none"},
	{"OTEL_METRICS_EXPORTER=logging"},
	{"OTEL_METRICS_EXPORTER=otlp,,console"},
	{"OTEL_METRIC_EXPORT_INTERVAL=10s"},
	{"OTEL_METRIC_EXPORT_INTERVAL=0"},
	{"OTEL_METRIC_EXPORT_INTERVAL=-5"},
	{"OTEL_METRIC_EXPORT_INTERVAL=99999999999999999999"},
	{"OTEL_METRIC_EXPORT_INTERVAL=1e3"},
	{"OTEL_METRIC_EXPORT_TIMEOUT=0"},
	{"OTEL_METRICS_EXEMPLAR_FILTER=always"},
	{"OTEL_EXPORTER_PROMETHEUS_HOST=localhost:9464"},
	{"OTEL_EXPORTER_PROMETHEUS_HOST=http://localhost"},
	{"OTEL_EXPORTER_PROMETHEUS_HOST=10.0.0.300"},
	{"OTEL_EXPORTER_PROMETHEUS_PORT=65536"},
	{"OTEL_EXPORTER_PROMETHEUS_PORT=http"},
	// OTLP: protocol and endpoint
	{"OTEL_EXPORTER_OTLP_PROTOCOL=http/json"},
	{"OTEL_EXPORTER_OTLP_PROTOCOL=http"},
	{"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL=gprc", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=localhost"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:70000"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318/v1/metrics"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http:/collector:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://::1:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=::1:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=[::1]"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://[collector]:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=https://user:" + secret + "@collector:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=https://user:" + secret + "/x@collector:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=user:" + secret + "@collector:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=https://collector:4317?key=" + secret},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=https://collector:4317#" + secret},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector :4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://coll\x00ector:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=grpc://collector:4317"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=unix:run/otel.sock"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=unix://run/otel.sock"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=unix-abstract:"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=unix:/run/otel" + strings.Repeat("l", 100)},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=unix:/run/otel%.sock"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=dns:///collector:x"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=dns:///collector"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=dns://10.0.0.1/"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=collector:4317/v1"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT='http://collector:4317'"},
	{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT=collector:4318"},
	{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT=unix:/run/otel.sock"},
	{"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=https://collector/%zz"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317 # the gateway"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT=http://${COLLECTOR}:4317"},
	// OTLP: proxies
	{"HTTPS_PROXY=socks5://user:" + secret + "@proxy:1080", "OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317"},
	{"https_proxy=https://proxy:3128", "OTEL_EXPORTER_OTLP_ENDPOINT=https://collector:4317"},
	{"HTTP_PROXY=socks4://proxy:1080", "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318"},
	// OTLP: TLS
	{"OTEL_EXPORTER_OTLP_INSECURE=1"},
	{"OTEL_EXPORTER_OTLP_INSECURE=true", "OTEL_EXPORTER_OTLP_ENDPOINT=https://collector:4317"},
	{"OTEL_EXPORTER_OTLP_INSECURE=false", "OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317"},
	{"OTEL_EXPORTER_OTLP_INSECURE=true", "OTEL_EXPORTER_OTLP_ENDPOINT=collector:4317", "OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/ca.pem"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/ca.pem", "OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/missing.pem"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/key.pem"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/text"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/damaged.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/cut.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/key.pem"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/expired.pem"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/future.pem"},
	{"OTEL_EXPORTER_OTLP_CERTIFICATE=TMP/huge"},
	{"OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/key.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/cert.pem"},
	{"OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE=TMP/cert.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/key.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/cert.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/otherkey.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/expired.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/key.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/cert.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/cert.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/cert.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/encrypted.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/cert.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/lockedkey.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/text", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/missing.pem"},
	{"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/missing.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY=TMP/key.pem"},
	{"OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY=TMP/key.pem", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=TMP/cert.pem"},
	// OTLP: headers
	{"OTEL_EXPORTER_OTLP_HEADERS=" + secret},
	{"OTEL_EXPORTER_OTLP_HEADERS=authorization: Bearer " + secret},
	{"OTEL_EXPORTER_OTLP_HEADERS=authorization=Basic " + secret + "      # Base64 of user:password"},
	{"OTEL_EXPORTER_OTLP_HEADERS=api-key=${API_KEY}"},
	{`OTEL_EXPORTER_OTLP_HEADERS=authorization="Bearer ` + secret + `"`},
	{"UNITMETER_OTLP_HEADERS_FILE=TMP/leftovers"},
	{"OTEL_EXPORTER_OTLP_HEADERS=a=1,b c=" + secret},
	{"OTEL_EXPORTER_OTLP_HEADERS=a=1,,b=" + secret},
	{"OTEL_EXPORTER_OTLP_HEADERS==" + secret},
	{"OTEL_EXPORTER_OTLP_HEADERS=api-key=" + secret + "%"},
	{"OTEL_EXPORTER_OTLP_HEADERS=api-key=" + secret + "%0d%0aX-Evil:1"},
	{"OTEL_EXPORTER_OTLP_HEADERS=api-key=" + secret + "é"},
	{"OTEL_EXPORTER_OTLP_HEADERS=api-key=" + secret + ",Api-Key=2"},
	{"OTEL_EXPORTER_OTLP_HEADERS=api-key="},
	{"OTEL_EXPORTER_OTLP_HEADERS=a=1," + secret + "=="},
	{"OTEL_EXPORTER_OTLP_HEADERS=api-key=" + secret + "\nother"},
	{"OTEL_EXPORTER_OTLP_METRICS_HEADERS=content-type=" + secret},
	{"OTEL_EXPORTER_OTLP_HEADERS=user-agent=" + secret},
	{"UNITMETER_OTLP_HEADERS_FILE=otlp"},
	{"UNITMETER_OTLP_HEADERS_FILE=../otlp", "CREDENTIALS_DIRECTORY=TMP"},
	{"UNITMETER_OTLP_HEADERS_FILE=missing", "CREDENTIALS_DIRECTORY=TMP"},
	{"UNITMETER_OTLP_HEADERS_FILE=TMP/fifo"},
	{"UNITMETER_OTLP_HEADERS_FILE=TMP/comments"},
	{"UNITMETER_OTLP_HEADERS_FILE=TMP/crlf"},
	{"UNITMETER_OTLP_HEADERS_FILE=TMP/badlines"},
	{"UNITMETER_OTLP_HEADERS_FILE=TMP/reserved", "OTEL_EXPORTER_OTLP_HEADERS=api-key=" + secret},
	// OTLP: the rest
	{"OTEL_EXPORTER_OTLP_COMPRESSION=zstd"},
	{"OTEL_EXPORTER_OTLP_TIMEOUT=0"},
	{"OTEL_EXPORTER_OTLP_METRICS_TIMEOUT=10s"},
	{"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=Cumulativ"},
	{"OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION=exponential"},
	// Units
	{"UNITMETER_BUS=sytem"},
	{"UNITMETER_BUS=/run/dbus/system_bus_socket"},
	{"UNITMETER_BUS=session"},
	{"UNITMETER_BUS=unix:"},
	{"UNITMETER_BUS=unixexec:path=/bin/sh"},
	{"UNITMETER_BUS=tcp:host=localhost,port=1"},
	{"UNITMETER_BUS=unix:path=bus"},
	{"UNITMETER_BUS=unix:path=/run/bus%2"},
	{"DBUS_SYSTEM_BUS_ADDRESS=autolaunch:"},
	{"UNITMETER_INCLUDE=nginx.sevice"},
	{"UNITMETER_INCLUDE=nginx.timer"},
	{"UNITMETER_INCLUDE=.service"},
	{"UNITMETER_INCLUDE=nginx*.conf"},
	{"UNITMETER_INCLUDE=a.service b.service"},
	{"UNITMETER_INCLUDE=a.service,,b.service"},
	{"UNITMETER_EXCLUDE=[a-.service"},
	{"UNITMETER_EXCLUDE=/home"},
	{"UNITMETER_EXCLUDE=ünit.service"},
	{`UNITMETER_EXCLUDE=dev-disk\\x2d1.swap`},
	{"UNITMETER_EXCLUDE=" + strings.Repeat("a", 300) + ".service"},
	{"UNITMETER_FOLD=none,run-*.service"},
	{"UNITMETER_UNIT_TYPES=services"},
	{"UNITMETER_UNIT_TYPES=service,timer"},
	{"UNITMETER_ATTRIBUTES=systemd.unit.typ"},
	{"UNITMETER_MAX_UNITS=0"},
	{"UNITMETER_MAX_UNITS=1000001"},
	{"UNITMETER_MAX_UNITS=many"},
	{"UNITMETER_SWEEP_TIMEOUT=10"},
	{"UNITMETER_SWEEP_TIMEOUT=-1s"},
	{"UNITMETER_SWEEP_TIMEOUT=1h"},
	{"UNITMETER_SWEEP_TIMEOUT=30s"},
	{"UNITMETER_STOP_RECORDS=journal"},
	{"UNITMETER_SOURCE=bpf"},
	{"UNITMETER_SOURCE=ebpf", "UNITMETER_WIRE=true"},
	// State
	{"UNITMETER_STATE_DIR=state"},
	{"UNITMETER_STATE_DIR=~/state"},
	{"UNITMETER_STATE_DIR=/var/lib/unitmeter# the default"},
	{"UNITMETER_STATE_DIR=/var/lib/${USER}"},
	{"UNITMETER_STATE_DIR=/var/.."},
	{"UNITMETER_OUTBOX_MAX_BYTES=256M"},
	{"UNITMETER_OUTBOX_MAX_BYTES=256MB"},
	{"UNITMETER_OUTBOX_MAX_BYTES=1.5GiB"},
	{"UNITMETER_OUTBOX_MAX_BYTES=1000"},
	{"UNITMETER_OUTBOX_MAX_BYTES=9999999999TiB"},
	{"UNITMETER_OUTBOX_MAX_BYTES=-1MiB"},
	{"UNITMETER_OUTBOX_MAX_AGE=7 days"},
	{"UNITMETER_OUTBOX_MAX_AGE=none"},
	{"UNITMETER_OUTBOX_MAX_AGE=99999d"},
	{"UNITMETER_HISTORY=3w"},
	{"UNITMETER_HISTORY=1d-5h"},
	// Names
	{"UNITMETER_INCLUDES=a.service"},
	{"UNITMETER_OUTBOX_BYTES=1GiB"},
	{"UNITMETER_LOG_LEVEL=debug"},
	{"UNITMETER_TYPES=service"},
	{"UNITMETER_PASSWORD=" + secret},
	{"UNITMETER_\x1b[31mRED=1"},
	{"UNITMETER_="},
	// More than one
	{"UNITMETER_MAX_UNITS=x", "OTEL_LOG_LEVEL=y", "UNITMETER_Z=z", "OTEL_EXPORTER_OTLP_HEADERS=" + secret + ",=" + secret},
}

func TestBadInput(t *testing.T) {
	dir := writeFiles(t)
	var messages strings.Builder
	for _, environ := range badInputs {
		real := slices.Clone(environ)
		for i := range real {
			real[i] = strings.ReplaceAll(real[i], "TMP", dir)
		}
		cfg, err := Load(append(real, "HOME=/home/u"))
		fmt.Fprintf(&messages, "%q\n", environ)
		if err == nil {
			t.Errorf("%q was accepted", environ)
			continue
		}
		if cfg.Exporters != nil || cfg.Warnings != nil {
			t.Errorf("%q: a Config came with the error", environ)
		}
		for _, err := range err.(interface{ Unwrap() []error }).Unwrap() {
			var p *Problem
			if !errors.As(err, &p) {
				t.Fatalf("%q: %v is a %T", environ, err, err)
			}
			text := strings.ReplaceAll(p.Error(), dir, "TMP")
			if strings.Contains(text, secret) {
				t.Errorf("%q: the message shows the secret: %s", environ, text)
			}
			if p.Reason == "" || p.Hint == "" || strings.ContainsFunc(text, isControl) {
				t.Errorf("%q: the message is not complete, or not plain: %q", environ, text)
			}
			fmt.Fprintf(&messages, "\t%s\n", text)
		}
	}
	golden(t, "testdata/bad.golden", messages.String())
	if len(badInputs) < 60 {
		t.Errorf("%d bad inputs, want at least 60", len(badInputs))
	}
}
