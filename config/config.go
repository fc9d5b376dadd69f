// Package config turns environment variables into the settings of the agent.
//
// Two things are needed of it: [Load], which gives a [Config] or all problems at once;
// and [Variables], the table behind it.
//
// The table has each variable with its accepted values and its default. Load reads
// through it; the reference documentation and the command line's help are written
// from it.
//
// The OTEL_* variables follow the OpenTelemetry environment variable
// specification, with one difference: where the specification says to warn and
// go on with the default, Load answers with an error that names the variable.
// A variable that is set and not used is named too, except those of other
// signals (traces, logs), which share an environment file with this agent.
//
// A setting is the text of one variable. A [Problem] keeps the agent from
// starting. A warning is about a valid setting that may be a mistake. A file is
// renewed when it gets new content while the agent runs.
package config

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/exporter-toolkit/web"

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
)

// Config is what the environment says: to the agent itself, and, in their own
// terms, to the packages that do the work. Load fills every field that a variable
// decides, and leaves the others of Receiver, OTLP, Prometheus and Store to the
// caller. What the SDK reads in the environment by itself is checked, and is not
// here: OTEL_METRICS_EXEMPLAR_FILTER, OTEL_GO_X_OBSERVABILITY, and
// OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION.
type Config struct {
	// Disabled is OTEL_SDK_DISABLED: the agent should collect and send nothing.
	Disabled bool
	// LogLevel is "debug", "info", "warn", "error" or "none".
	LogLevel string
	// LogFormat is "text", "json", or "journal": text lines with a <N> priority
	// prefix (sd-daemon(3)).
	LogFormat string

	// ResourceAttributes go on top of the detected resource. service.name is
	// among them if OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES sets it.
	ResourceAttributes map[string]string
	// Exporters are "otlp", "console" and "prometheus", without duplicates.
	// Empty means that nothing is exported (OTEL_METRICS_EXPORTER=none).
	Exporters []string
	// Interval is the time between the starts of two collections, above 0.
	Interval time.Duration
	// ExportTimeout bounds a collection with its export, above 0.
	ExportTimeout time.Duration

	// Receiver is which units are read, and how. Its SweepTimeout is below
	// ExportTimeout, so that what a slow sweep did read is still exported.
	Receiver receiver.Config
	// OTLP is where and how metrics are sent; the zero value unless Exporters has
	// "otlp". It holds everything that OTEL_EXPORTER_OTLP_* says: the official Go
	// exporters only log what they cannot read in these variables, and go on
	// without it.
	OTLP otlp.Config
	// Temporality is "cumulative", "delta" or "lowmemory".
	Temporality string
	// Files are those that OTLP is made from.
	Files Files
	// Prometheus is where the Prometheus exporter listens.
	Prometheus exporter.PrometheusConfig
	// Store is where the ledger, outbox and history live. An empty Dir means no
	// state on disk; otherwise it is absolute.
	Store store.Config
	// StateDirFrom is the variable that said so: UNITMETER_STATE_DIR,
	// STATE_DIRECTORY, or XDG_STATE_HOME or HOME, below which it then is; "" for
	// none of them.
	StateDirFrom string

	// Warnings are sentences about settings that are legal and probably not
	// meant. The caller logs each once.
	Warnings []string
}

// Files are paths of PEM files, "" for those that are not set. ClientCertificate
// and ClientKey are the pair for mutual TLS: both are set or neither is.
type Files struct {
	Certificate, ClientCertificate, ClientKey string
}

// Load reads the variables in environ, which has the form of os.Environ. It
// reads the certificate and header files that they name, and nothing else;
// Config's OTLP.TLS and OTLP.Headers read them again when they have changed.
//
// The error joins one *Problem for each thing that is wrong, in a stable order;
// Config is then the zero value. Load keeps no state and may be called from
// several goroutines at the same time.
func Load(environ []string) (Config, error) {
	l := &loader{
		env:   parseEnviron(environ),
		given: make(map[string]setting),
		now:   time.Now(),
	}
	table := l.table()
	for _, e := range table {
		l.read(e)
	}
	l.finishOTLP()
	l.finishPrometheus()
	l.finishService()
	l.finishState()
	l.finishReceiver()
	l.finishTimeouts()
	l.checkSeconds()
	l.finishUnits()
	l.finishLog()
	l.checkNames(table)
	if err := l.err(); err != nil {
		return Config{}, err
	}
	return l.cfg, nil
}

// A setting has the text of a variable, the name under which it was set, and the part
// of the text that an error may show.
type setting struct{ name, text, shown string }

// A loader is one run of Load.
type loader struct {
	env      map[string]string
	cfg      Config
	given    map[string]setting // set and well-formed, by the name in the table
	service  string             // OTEL_SERVICE_NAME
	headers  headers            // OTEL_EXPORTER_OTLP_HEADERS
	insecure bool               // OTEL_EXPORTER_OTLP_INSECURE
	host     string             // OTEL_EXPORTER_PROMETHEUS_HOST
	port     int                // OTEL_EXPORTER_PROMETHEUS_PORT
	problems []*Problem
	now      time.Time // for certificates
}

// again returns a loader that reads files once more, for their new content.
func (l *loader) again() *loader {
	return &loader{env: l.env, given: l.given, headers: l.headers, now: time.Now(),
		cfg: Config{OTLP: otlp.Config{Protocol: l.cfg.OTLP.Protocol}}}
}

// parseEnviron keeps the first of duplicates, as os.Getenv does.
func parseEnviron(environ []string) map[string]string {
	env := make(map[string]string, len(environ))
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		if _, dup := env[name]; !dup {
			env[name] = value
		}
	}
	return env
}

// lookup returns the variable that counts for e: the one for metrics only, if
// it is set. An empty value is the same as none (specification, "Parsing empty
// value").
func (l *loader) lookup(e entry) setting {
	s := setting{name: e.Specific, text: strings.TrimSpace(l.env[e.Specific])}
	if e.Specific == "" || s.text == "" {
		s = setting{name: e.Name, text: strings.TrimSpace(l.env[e.Name])}
	}
	s.shown = s.text
	if e.show != nil {
		s.shown = e.show(s.text)
	}
	return s
}

// read applies one row of the table: the variable where it is set, else the
// default.
func (l *loader) read(e entry) {
	s := l.lookup(e)
	// A shared file may hold OTLP settings that mean nothing to an agent that
	// does not send OTLP; they must not keep it from starting.
	unused := e.Group == groupOTLP && !slices.Contains(l.cfg.Exporters, "otlp")
	switch {
	case unused || e.Group == groupSystem && e.parse == nil: // checked where it is used
	case s.text != "":
		bad := func(reason, hint string) { l.bad(s, reason, hint) }
		if reason, hint := malformed(s.text); reason != "" {
			bad(reason, hint)
			return
		}
		if reason, hint := leftover(s.text); reason != "" && !e.anything {
			bad(reason, hint)
			return
		} else if reason != "" {
			l.warn(fmt.Sprintf("%s %s: %s", s.name, reason, hint))
		} else if hasName(s.text) {
			l.warn(fmt.Sprintf("%s contains $NAME, which nothing expands here: write the value itself", s.name))
		}
		before := len(l.problems)
		if e.parse != nil {
			e.parse(s.text, bad)
		}
		if len(l.problems) == before {
			l.given[e.Name] = s
		}
	case e.parse != nil && e.Default != "" && !e.derived:
		e.parse(e.Default, func(reason, hint string) {
			panic("config: the default of " + e.Name + " is wrong: " + reason)
		})
	}
}

// finishService puts the service name into the resource, where it wins over
// OTEL_RESOURCE_ATTRIBUTES (specification, "General SDK Configuration").
func (l *loader) finishService() {
	if l.service == "" {
		return
	}
	if l.cfg.ResourceAttributes == nil {
		l.cfg.ResourceAttributes = make(map[string]string)
	}
	l.cfg.ResourceAttributes["service.name"] = l.service
}

// finishPrometheus joins host and port, and checks the web configuration file
// where there is a server for it.
func (l *loader) finishPrometheus() {
	l.cfg.Prometheus.Address = net.JoinHostPort(l.host, strconv.Itoa(l.port))
	s, set := l.given["UNITMETER_PROMETHEUS_WEB_CONFIG"]
	if !set {
		return
	}
	if !slices.Contains(l.cfg.Exporters, "prometheus") {
		l.warn(s.name + " has no effect without prometheus in OTEL_METRICS_EXPORTER")
		return
	}
	path := l.credential(s)
	if path == "" {
		return
	}
	hint := hintFile
	_, _, reason := readFile(path)
	if reason == "" {
		if err := web.Validate(path); err != nil {
			reason = strings.ReplaceAll(err.Error(), "\n", " ")
			hint = "write it as https://prometheus.io/docs/prometheus/latest/configuration/https/ says, and name files that the agent's user can read"
		}
	}
	if reason != "" {
		l.bad(s, reason, hint)
	}
	l.cfg.Prometheus.WebConfig = path
}

// finishReceiver gives the receiver what is said of other parts of the agent too.
func (l *loader) finishReceiver() {
	r := &l.cfg.Receiver
	r.HostName = l.cfg.ResourceAttributes["host.name"]
	if len(l.cfg.Exporters) > 1 {
		r.KeepEnded = 2 * l.cfg.Interval
	}
}

// finishTimeouts keeps the sweep inside the time that the SDK's reader gives to
// a whole collection, and a default one inside the interval: where systemd hangs, each
// cycle still has the agent's own metrics.
func (l *loader) finishTimeouts() {
	_, given := l.given["UNITMETER_SWEEP_TIMEOUT"]
	if within := l.cfg.Interval / 10 * 9; !given && within > 0 {
		l.cfg.Receiver.SweepTimeout = min(l.cfg.Receiver.SweepTimeout, within)
	}
	if l.cfg.ExportTimeout == 0 || l.cfg.Receiver.SweepTimeout < l.cfg.ExportTimeout { // 0: it was refused
		return
	}
	if s, ok := l.given["UNITMETER_SWEEP_TIMEOUT"]; ok {
		l.bad(s, "not below the export timeout of "+l.cfg.ExportTimeout.String()+", so that a slow sweep would be lost",
			"lower it, or raise OTEL_METRIC_EXPORT_TIMEOUT")
		return
	}
	l.cfg.Receiver.SweepTimeout = l.cfg.ExportTimeout / 2
}

// finishLog resolves "auto".
func (l *loader) finishLog() {
	if l.cfg.LogFormat != "auto" {
		return
	}
	l.cfg.LogFormat = "text"
	if l.env["JOURNAL_STREAM"] != "" {
		l.cfg.LogFormat = "journal"
	}
}

// warn adds a warning.
func (l *loader) warn(text string) { l.cfg.Warnings = append(l.cfg.Warnings, text) }
