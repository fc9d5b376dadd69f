package config

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
)

// A Variable is one row of the reference.
type Variable struct {
	// Name is the variable.
	Name string
	// Specific is the variable for metrics only, which wins over Name. "" if
	// there is none.
	Specific string
	// Group is the heading under which the variable is listed.
	Group string
	// Values says what is accepted.
	Values string
	// Default is the value that an unset variable stands for. "" means none.
	Default string
	// Meaning is one or more sentences.
	Meaning string
}

// The headings, in the order of the reference.
const (
	groupGeneral = "General"
	groupExport  = "Export"
	groupOTLP    = "OTLP"
	GroupUnits   = "Units"
	groupState   = "State"
	groupSystem  = "Read from the system"
)

// An entry is a Variable with the code that reads it.
type entry struct {
	Variable
	// show gives what an error may show of the value; nil shows all of it.
	show func(text string) string
	// anything says that a value may look like a mistake and be meant.
	anything bool
	// derived says that Default is a description and not a value.
	derived bool
	// parse stores the value, or reports what is wrong with it. It is also given
	// Default where the variable is not set. If it is nil, a finish method of the
	// loader does the work.
	parse func(text string, bad report)
}

// Variables returns the table: each variable that Load reads, grouped.
func Variables() []Variable {
	table := new(loader).table()
	vars := make([]Variable, len(table))
	for i, e := range table {
		vars[i] = e.Variable
	}
	return vars
}

// WriteMarkdown writes the reference as docs/configuration.md.
func WriteMarkdown(w io.Writer) error {
	var b strings.Builder
	b.WriteString(intro)
	group := ""
	for _, v := range Variables() {
		if v.Group != group {
			group = v.Group
			fmt.Fprintf(&b, "\n## %s\n\n| Variable | Values | Default | Meaning |\n| --- | --- | --- | --- |\n", group)
		}
		name := "`" + v.Name + "`"
		if v.Specific != "" {
			name += "<br>`" + v.Specific + "`"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", name, cell(v.Values), cell(v.Default), cell(v.Meaning))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cell escapes what Markdown would not show as it is.
func cell(text string) string {
	return strings.NewReplacer("|", `\|`, "*", `\*`, "<", "&lt;", "~", `\~`).Replace(text)
}

const intro = `# Configuration

<!-- Written by config.WriteMarkdown; "go test ./config -update" renews it. -->

unitmeter needs no configuration. It is configured by environment variables
only: those of the [OpenTelemetry specification][spec] that apply to a metrics
agent, and some of its own. ` + "`unitmeter help environment`" + ` prints this list.

- An empty value is the same as none. White space around a value is ignored.
  Names from a list may be in either case.
- A bad value, and a ` + "`UNITMETER_`" + ` variable that does not exist, keep the agent from
  starting. Each is named, with what to do about it. Values of headers are never
  shown.
- A comment behind a value, quotes and ${NAME} are part of the value in systemd's
  EnvironmentFile= and docker's ` + "`--env-file`" + `, and are refused here. In headers and
  attributes, write a #, $ or quote that is meant as %23, %24 or %22.
- Where two names are given, the one for metrics only wins, and the other is not
  looked at. Headers of the two are not merged.
- Variables for traces, logs and other languages are ignored. A variable that
  looks like a misspelled one for metrics gives a warning.
- The OTLP exporters also go through the proxy of ` + "`HTTPS_PROXY`, `HTTP_PROXY`" + ` and
  ` + "`NO_PROXY`" + `, as all Go programs do; with grpc it must be one with http:// in front.

[spec]: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
`

// table is the one list of variables. Its rows store into l.cfg; their order is
// the order of the reference and of problems. OTEL_METRICS_EXPORTER comes
// before the OTLP rows, which are read only if it asks for OTLP.
func (l *loader) table() []entry {
	c := &l.cfg
	return slices.Concat(
		in(groupGeneral, l.general(c)),
		in(groupExport, l.export(c)),
		in(groupOTLP, l.otlp(&c.OTLP)),
		in(GroupUnits, l.units(c)),
		in(groupState, l.state(c)),
		in(groupSystem, l.system(c)),
	)
}

// derived is for a row in which unset is not quite the same as Default.
func derived(e entry) entry {
	e.derived = true
	return e
}

func in(group string, rows []entry) []entry {
	for i := range rows {
		rows[i].Group = group
	}
	return rows
}

func (l *loader) general(c *Config) []entry {
	return []entry{
		boolean(Variable{
			Name:    "OTEL_SDK_DISABLED",
			Meaning: "Collect and send nothing.",
		}, &c.Disabled),
		{Variable: Variable{
			Name:    "OTEL_SERVICE_NAME",
			Values:  "text",
			Default: "unitmeter",
			Meaning: "The resource attribute service.name. It wins over one in OTEL_RESOURCE_ATTRIBUTES.",
		}, anything: true, derived: true, parse: func(text string, _ report) { l.service = text }},
		{Variable: Variable{
			Name:    "OTEL_RESOURCE_ATTRIBUTES",
			Values:  "key=value,key=value; comma, = and % in a value are written as %2C, %3D and %25",
			Meaning: "Attributes of the resource, on top of the detected ones.",
		}, parse: func(text string, bad report) { c.ResourceAttributes = l.parseAttributes(text, bad) }},
		enum(Variable{
			Name:    "OTEL_LOG_LEVEL",
			Default: "info",
			Meaning: "What the agent itself logs, on standard error.",
		}, &c.LogLevel, "debug", "info", "warn", "error", "none"),
		enum(Variable{
			Name:    "UNITMETER_LOG_FORMAT",
			Default: "auto",
			Meaning: "auto is text, with priorities for the journal if JOURNAL_STREAM is set.",
		}, &c.LogFormat, "auto", "text", "json"),
		{Variable: Variable{
			Name:    "OTEL_CONFIG_FILE",
			Values:  "must be empty",
			Meaning: "Declarative configuration files are refused, since they would replace every other variable.",
		}, parse: noFile},
		{Variable: Variable{
			Name:    "OTEL_EXPERIMENTAL_CONFIG_FILE",
			Values:  "must be empty",
			Meaning: "The former name of OTEL_CONFIG_FILE.",
		}, parse: noFile},
	}
}

func noFile(_ string, bad report) {
	bad("declarative configuration files are not supported", "unset it for this agent and use the variables of 'unitmeter help environment'")
}

func (l *loader) export(c *Config) []entry {
	return []entry{
		{Variable: Variable{
			Name:    "OTEL_METRICS_EXPORTER",
			Values:  "a comma list of otlp, console, prometheus; or none",
			Default: "otlp",
			Meaning: "Where metrics go: sent as OTLP, printed on standard output, served for Prometheus to scrape, or nowhere.",
		}, parse: func(text string, bad report) { c.Exporters = parseExporters(text, bad) }},
		milliseconds(Variable{
			Name:    "OTEL_METRIC_EXPORT_INTERVAL",
			Default: "60000",
			Meaning: "The time between two collections.",
		}, &c.Interval),
		milliseconds(Variable{
			Name:    "OTEL_METRIC_EXPORT_TIMEOUT",
			Default: "30000",
			Meaning: "Upper bound of the time for one collection, with its export.",
		}, &c.ExportTimeout),
		enum(Variable{
			Name:    "OTEL_METRICS_EXEMPLAR_FILTER",
			Default: "trace_based",
			Meaning: "Which measurements can become exemplars. The traffic of a unit has no trace, so the default gives none.",
		}, new(string), "always_on", "always_off", "trace_based"),
		{Variable: Variable{
			Name:    "OTEL_EXPORTER_PROMETHEUS_HOST",
			Values:  "a host name or address, without a port",
			Default: "localhost",
			Meaning: "Where the Prometheus exporter listens. 0.0.0.0 is every IPv4 address, :: every address.",
		}, parse: func(text string, bad report) { l.host = parseListenHost(text, bad) }},
		whole(Variable{
			Name:    "OTEL_EXPORTER_PROMETHEUS_PORT",
			Default: "9464",
			Meaning: "The port of the Prometheus exporter. 0 is any free port.",
		}, &l.port, 0, 65535),
		{Variable: Variable{
			Name:    "UNITMETER_PROMETHEUS_WEB_CONFIG",
			Values:  "a path; a relative one is below CREDENTIALS_DIRECTORY",
			Meaning: "TLS and passwords of the Prometheus exporter: the web configuration file of all Prometheus exporters. The agent reads it, the certificate and the key again at each connection.",
		}},
		boolean(Variable{
			Name:    "OTEL_GO_X_OBSERVABILITY",
			Meaning: "Experimental in the SDK: its metrics about itself (otel.sdk.*).",
		}, new(bool)),
		{Variable: Variable{
			Name:    "OTEL_GO_X_CARDINALITY_LIMIT",
			Values:  "anything",
			Meaning: "Experimental in the SDK, and of no effect here: UNITMETER_MAX_UNITS is the limit.",
		}, parse: func(string, report) {
			l.warn("OTEL_GO_X_CARDINALITY_LIMIT has no effect: UNITMETER_MAX_UNITS bounds the number of series")
		}},
	}
}

func (l *loader) otlp(o *otlp.Config) []entry {
	return []entry{
		{Variable: Variable{
			Name:     "OTEL_EXPORTER_OTLP_PROTOCOL",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
			Values:   "grpc, http/protobuf",
			Default:  otlp.DefaultProtocol,
			Meaning:  "How requests are sent.",
		}, parse: func(text string, bad report) {
			if strings.EqualFold(text, "http/json") {
				bad("OTLP as JSON is not supported", "use http/protobuf, which is received on the same port, or grpc")
				return
			}
			o.Protocol = choose(text, []string{"grpc", "http/protobuf"}, bad)
		}},
		{Variable: Variable{
			Name:     "OTEL_EXPORTER_OTLP_ENDPOINT",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
			Values:   "http://host:port or https://host:port; with grpc also host:port, unix:/path, unix-abstract:name, dns:///host:port",
			Default:  "http://localhost:4317 with grpc, http://localhost:4318 with http/protobuf; https if a certificate is given or OTEL_EXPORTER_OTLP_INSECURE is set to false",
			Meaning:  "The receiver. https is TLS, http is not. With http/protobuf, /v1/metrics is added to the path of the first name, and the second is used as it is.",
		}, derived: true, show: redactURL},
		derived(boolean(Variable{
			Name:     "OTEL_EXPORTER_OTLP_INSECURE",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_INSECURE",
			Meaning:  "No TLS to a grpc endpoint without http:// or https:// in front. It must not contradict an endpoint with one of these.",
		}, &l.insecure)),
		{Variable: Variable{
			Name:     "OTEL_EXPORTER_OTLP_CERTIFICATE",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE",
			Values:   "a PEM file",
			Default:  "the system's roots",
			Meaning:  "The certificates to trust. They are checked at start, as are the next two. All three may be renewed while the agent runs.",
		}, derived: true},
		{Variable: Variable{
			Name:     "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE",
			Values:   "a PEM file",
			Meaning:  "The agent's own certificate, for mutual TLS.",
		}},
		{Variable: Variable{
			Name:     "OTEL_EXPORTER_OTLP_CLIENT_KEY",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY",
			Values:   "a PEM file, not encrypted",
			Meaning:  "The key of that certificate.",
		}},
		{Variable: Variable{
			Name:     "OTEL_EXPORTER_OTLP_HEADERS",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
			Values:   "name=value,name=value; a comma in a value is written as %2C, % as %25",
			Meaning:  "Headers of each request. Secrets are better kept in UNITMETER_OTLP_HEADERS_FILE.",
		}, show: hide, parse: func(text string, bad report) { l.headers = parseHeaders(text, bad) }},
		{Variable: Variable{
			Name:    "UNITMETER_OTLP_HEADERS_FILE",
			Values:  "a path; a relative one is below CREDENTIALS_DIRECTORY",
			Meaning: "More headers, on top of those above: one name=value on each line, in the same form. Lines that begin with # are comments. The file may be renewed while the agent runs. Made for LoadCredential= of systemd.",
		}},
		{Variable: Variable{
			Name:     "OTEL_EXPORTER_OTLP_COMPRESSION",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION",
			Values:   "gzip, none",
			Default:  "none",
			Meaning:  "How requests are compressed.",
		}, parse: func(text string, bad report) { o.Gzip = choose(text, []string{"gzip", "none"}, bad) == "gzip" }},
		milliseconds(Variable{
			Name:     "OTEL_EXPORTER_OTLP_TIMEOUT",
			Specific: "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT",
			Default:  inMilliseconds(otlp.DefaultTimeout),
			Meaning:  "Upper bound of the time for one request.",
		}, &o.Timeout),
		enum(Variable{
			Name:    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
			Default: exporter.DefaultTemporality,
			Meaning: "Whether points carry totals or changes. lowmemory is cumulative for observable instruments, such as the traffic of units.",
		}, &l.cfg.Temporality, "cumulative", "delta", "lowmemory"),
		enum(Variable{
			Name:    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
			Default: "explicit_bucket_histogram",
			Meaning: "The form of histograms. Only metrics of the agent and the SDK about themselves are histograms.",
		}, new(string), "explicit_bucket_histogram", "base2_exponential_bucket_histogram"),
	}
}

func (l *loader) units(c *Config) []entry {
	const patterns = "a comma list of unit names; *, ? and [a-z] stand for other characters"
	return []entry{
		enum(Variable{
			Name:    "UNITMETER_SOURCE",
			Default: receiver.DefaultSource,
			Meaning: "Who counts. dbus is systemd, which counts units that have IP accounting on. ebpf is unitmeter's own eBPF program, which counts every unit without asking systemd; see 'unitmeter enable --ebpf'. auto is ebpf if the program is loaded and can be read when the agent starts, and dbus otherwise.",
		}, &c.Receiver.Source, receiver.DBus, receiver.EBPF, receiver.Auto),
		{Variable: Variable{
			Name:    "UNITMETER_BUS",
			Values:  "auto, system, private, or a D-Bus address such as unix:path=/run/dbus/system_bus_socket",
			Default: receiver.DefaultBus,
			Meaning: "How to reach systemd. system is the system bus. private is PID 1's own socket, for root only; PID 1 then needs more and more memory while the agent is stopped by a signal. auto is the system bus, with the private socket for large readings where it can be opened.",
		}, parse: func(text string, bad report) { c.Receiver.Bus = parseBus(text, bad) }},
		{Variable: Variable{
			Name:    "UNITMETER_INCLUDE",
			Values:  patterns,
			Default: "all units",
			Meaning: "The units to meter.",
		}, derived: true, parse: func(text string, bad report) { c.Receiver.Include = parseGlobs(text, bad) }},
		{Variable: Variable{
			Name:    "UNITMETER_EXCLUDE",
			Values:  patterns,
			Meaning: "Units not to meter, also if UNITMETER_INCLUDE has them.",
		}, parse: func(text string, bad report) { c.Receiver.Exclude = parseGlobs(text, bad) }},
		{Variable: Variable{
			Name:    "UNITMETER_FOLD",
			Values:  patterns + "; or none",
			Default: strings.Join(receiver.DefaultFold(), ", "),
			Meaning: "Units that share one series for each pattern, because they never come back under the same name. The series continues when one of them ends. A list here replaces the default.",
		}, parse: func(text string, bad report) {
			if strings.EqualFold(text, "none") {
				c.Receiver.Fold = []string{}
				return
			}
			if slices.ContainsFunc(strings.Split(text, ","), func(item string) bool { return strings.EqualFold(strings.TrimSpace(item), "none") }) {
				bad("none does not go with patterns", "use none alone, or remove it")
				return
			}
			c.Receiver.Fold = parseGlobs(text, bad)
		}},
		{Variable: Variable{
			Name:    "UNITMETER_UNIT_TYPES",
			Values:  "a comma list of " + strings.Join(unitTypes(), ", "),
			Default: strings.Join(receiver.DefaultTypes(), ", "),
			Meaning: "The types of units to meter. A slice holds the traffic of the units in it: with slice in the list, sums over units count it twice.",
		}, parse: func(text string, bad report) { c.Receiver.Types = parseChoices(text, unitTypes(), bad) }},
		yesNo(Variable{
			Name:    "UNITMETER_USER_UNITS",
			Meaning: "Meter the units of users' managers, each with the attribute user.id. user@UID.service then has the rest. Needs UNITMETER_SOURCE=ebpf.",
		}, &c.Receiver.UserUnits),
		yesNo(Variable{
			Name:    "UNITMETER_CONTAINERS",
			Meaning: "Give each container its own series, with container.runtime and container.name or container.id, and in Kubernetes k8s.pod.name and k8s.namespace.name. Needs UNITMETER_SOURCE=ebpf.",
		}, &c.Receiver.Containers),
		yesNo(Variable{
			Name:    "UNITMETER_WIRE",
			Meaning: "Also send the counters after segmentation, systemd.unit.network.wire.*. Needs UNITMETER_SOURCE=ebpf.",
		}, &c.Receiver.Wire),
		{Variable: Variable{
			Name:    "UNITMETER_ATTRIBUTES",
			Values:  "a comma list of systemd.unit.type, systemd.unit.slice, unitmeter.loopback",
			Meaning: "Attributes to add to each point. unitmeter.loopback splits each series into traffic over the loopback device (true) and the rest (false); it needs UNITMETER_SOURCE=ebpf.",
		}, parse: func(text string, bad report) {
			attributes := parseChoices(text, []string{"systemd.unit.type", "systemd.unit.slice", "unitmeter.loopback"}, bad)
			c.Receiver.UnitType = slices.Contains(attributes, "systemd.unit.type")
			c.Receiver.UnitSlice = slices.Contains(attributes, "systemd.unit.slice")
			c.Receiver.Loopback = slices.Contains(attributes, "unitmeter.loopback")
		}},
		whole(Variable{
			Name:    "UNITMETER_MAX_UNITS",
			Default: strconv.Itoa(receiver.DefaultMaxSeries),
			Meaning: "Upper bound of the number of units with their own series. The traffic of all others is in one series with otel.metric.overflow=true.",
		}, &c.Receiver.MaxSeries, 1, 1_000_000),
		duration(Variable{
			Name:    "UNITMETER_SWEEP_TIMEOUT",
			Default: receiver.DefaultSweepTimeout.String(),
			Meaning: "Upper bound of the time for one reading of all units. It must be below OTEL_METRIC_EXPORT_TIMEOUT. The default is lowered where needed, to half of that and to nine tenths of OTEL_METRIC_EXPORT_INTERVAL. Units that are not reached in time come first in the next reading.",
		}, &c.Receiver.SweepTimeout, 100*time.Millisecond, 10*time.Minute, false),
		enum(Variable{
			Name:    "UNITMETER_STOP_RECORDS",
			Default: receiver.DefaultStopRecords,
			Meaning: "Whether to read systemd's stop records in the journal: the last counters of each unit that stops. Without them, the bytes between the last reading and the end of a unit are missed. Root and the systemd-journal group may read them. auto reads them if the agent may; with on, the doctor reports a fault if it may not.",
		}, &c.Receiver.StopRecords, "auto", "on", "off"),
	}
}

func (l *loader) state(c *Config) []entry {
	return []entry{
		{Variable: Variable{
			Name:    "UNITMETER_STATE_DIR",
			Values:  "an absolute path, or none",
			Default: "$STATE_DIRECTORY, else $XDG_STATE_HOME/unitmeter, else ~/.local/state/unitmeter",
			Meaning: "Directory for totals, unsent requests and history. With none, every series starts anew with the agent, and requests that cannot be sent at once are lost.",
		}, derived: true, parse: func(text string, bad report) { c.Store.Dir = parseStateDir(text, bad) }},
		{Variable: Variable{
			Name:    "UNITMETER_OUTBOX_MAX_BYTES",
			Values:  "a number with B, KiB, MiB, GiB or TiB, at least 1MiB",
			Default: strconv.Itoa(store.DefaultOutboxMaxBytes>>20) + "MiB",
			Meaning: "Upper bound of the unsent requests on disk.",
		}, parse: func(text string, bad report) { c.Store.OutboxMaxBytes = parseSize(text, 1<<20, bad) }},
		duration(Variable{
			Name:    "UNITMETER_OUTBOX_MAX_AGE",
			Default: showTime(store.DefaultOutboxMaxAge),
			Meaning: "Upper bound of the age of unsent requests; older ones are dropped.",
		}, &c.Store.OutboxMaxAge, time.Minute, 3650*day, false),
		duration(Variable{
			Name:    "UNITMETER_HISTORY",
			Default: showTime(store.DefaultHistory),
			Meaning: "How far back 'unitmeter history' can look.",
		}, &c.Store.History, time.Hour, 3650*day, true),
	}
}

func (l *loader) system(c *Config) []entry {
	return []entry{
		{Variable: Variable{
			Name:    "DBUS_SYSTEM_BUS_ADDRESS",
			Values:  "a D-Bus address",
			Meaning: "The system bus, if it is not at its usual place.",
		}, parse: func(text string, bad report) { c.Receiver.SystemBus = parseBusAddress(text, bad) }},
		{Variable: Variable{
			Name:    "STATE_DIRECTORY",
			Values:  "set by systemd for StateDirectory=; the first of a colon list",
			Meaning: "See UNITMETER_STATE_DIR.",
		}},
		{Variable: Variable{
			Name:    "XDG_STATE_HOME",
			Values:  "an absolute path",
			Meaning: "See UNITMETER_STATE_DIR.",
		}},
		{Variable: Variable{
			Name:    "HOME",
			Values:  "an absolute path",
			Meaning: "See UNITMETER_STATE_DIR.",
		}},
		{Variable: Variable{
			Name:    "CREDENTIALS_DIRECTORY",
			Values:  "set by systemd for LoadCredential= and the like",
			Meaning: "See UNITMETER_OTLP_HEADERS_FILE and UNITMETER_PROMETHEUS_WEB_CONFIG.",
		}},
		{Variable: Variable{
			Name:    "JOURNAL_STREAM",
			Values:  "set by systemd",
			Meaning: "See UNITMETER_LOG_FORMAT.",
		}},
	}
}
