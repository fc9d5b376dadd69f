// Package config turns environment variables into the settings of the agent.
//
// One table (see Variables) says which variables there are, what they accept
// and what they default to. Load reads through it, and the reference
// documentation and the command line's help are written from it.
//
// The OTEL_* variables follow the OpenTelemetry environment variable
// specification, with one difference: where the specification says to warn and
// go on with the default, Load answers with an error that names the variable.
// A variable that is set and not used is named too, except those of other
// signals (traces, logs), which share an environment file with this agent.
package config

import (
	"crypto/tls"
	"slices"
	"strings"
	"time"
)

// Config is what the environment says. Load fills every field; the comments
// name what the zero value means to a reader of the struct. What the SDK reads in
// the environment by itself is checked, and is not here:
// OTEL_METRICS_EXEMPLAR_FILTER, OTEL_GO_X_OBSERVABILITY, and
// OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION.
type Config struct {
	// Disabled is OTEL_SDK_DISABLED: the agent should collect and send nothing.
	Disabled bool
	// LogLevel is "debug", "info", "warn", "error" or "none". "" is "info".
	LogLevel string
	// LogFormat is "text", "json", or "journal": text lines with a <N> priority
	// prefix (sd-daemon(3)). "" is "text".
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
	// OTLP is the zero value unless Exporters has "otlp".
	OTLP OTLP
	// PrometheusHost is the host name or address to listen on, IPv6 without
	// brackets.
	PrometheusHost string
	// PrometheusPort is 0 to 65535; 0 asks the kernel for a free port.
	PrometheusPort int

	// Bus is "auto", "system", "private", or a D-Bus address.
	Bus string
	// SystemBusAddress is the D-Bus address behind Bus "auto" and "system", from
	// DBUS_SYSTEM_BUS_ADDRESS. "" means the usual socket.
	SystemBusAddress string
	// StopRecords says whether PID 1's stop records are read in the journal: "auto",
	// "on" or "off".
	StopRecords string
	// SweepTimeout bounds one reading of all units. It is above 0 and below
	// ExportTimeout, so that what a slow sweep did read is still exported.
	SweepTimeout time.Duration
	// Include and Exclude are patterns of unit names (path.Match, with the
	// backslash as an ordinary character). A unit is metered if Include is empty
	// or one of it matches, and none of Exclude does.
	Include, Exclude []string
	// Fold are patterns of units that share one series each. Empty and not nil
	// means no folding.
	Fold []string
	// Attributes are the opt-in attributes on each point: "systemd.unit.type",
	// "systemd.unit.slice".
	Attributes []string
	// UnitTypes are the types to meter, such as "service". Never empty.
	UnitTypes []string
	// MaxUnits is how many units get a series of their own, 1 to 1000000.
	MaxUnits int

	// StateDir is where the ledger, outbox and history live: an absolute path,
	// or "" for no state on disk.
	StateDir string
	// StateDirFrom is the variable that said so: UNITMETER_STATE_DIR,
	// STATE_DIRECTORY, or XDG_STATE_HOME or HOME, below which it then is; "" for
	// none of them.
	StateDirFrom string
	// OutboxMaxBytes bounds what waits for the Collector, in bytes on disk.
	OutboxMaxBytes int64
	// OutboxMaxAge bounds how long it waits.
	OutboxMaxAge time.Duration
	// History is how far back samples are kept; 0 keeps none.
	History time.Duration

	// Warnings are sentences about settings that are legal and probably not
	// meant. The caller logs each once.
	Warnings []string
}

// OTLP says where and how metrics are sent. It holds everything that
// OTEL_EXPORTER_OTLP_* says, so that an exporter can be given explicit options:
// the official Go exporters only log what they cannot read in these variables,
// and then go on without it.
type OTLP struct {
	// Protocol is "grpc" or "http/protobuf".
	Protocol string
	// Endpoint is a gRPC target ("host:port", "unix:/path", "dns:///host:port")
	// or, for HTTP, the full URL with its path.
	Endpoint string
	// Insecure says that the connection has no TLS.
	Insecure bool
	// CertificateFile holds the roots to trust, as PEM. "" means the system's.
	CertificateFile string
	// ClientCertificateFile and ClientKeyFile are the pair for mutual TLS, as
	// PEM. Both are "" or neither is.
	ClientCertificateFile, ClientKeyFile string
	// TLS has what was read from these files. Nil means the system's roots and
	// no client certificate, as for a connection without TLS.
	TLS *tls.Config
	// Headers go with each request: those of the environment, with those of
	// UNITMETER_OTLP_HEADERS_FILE on top. Names are in lower case.
	Headers Headers
	// Compression is "gzip" or "none".
	Compression string
	// Timeout bounds one request, above 0.
	Timeout time.Duration
	// Temporality is "cumulative", "delta" or "lowmemory".
	Temporality string
}

// Load reads the variables in environ, which has the form of os.Environ. It
// reads the certificate and header files that they name, and nothing else.
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
	l.finishService()
	l.finishState()
	l.finishTimeouts()
	l.finishUnits()
	l.finishLog()
	l.checkNames(table)
	if err := l.err(); err != nil {
		return Config{}, err
	}
	return l.cfg, nil
}

// A setting is the text of a variable, the name under which it was set, and as
// much of the text as may be shown in an error.
type setting struct{ name, text, shown string }

// A loader is one run of Load.
type loader struct {
	env      map[string]string
	cfg      Config
	given    map[string]setting // set and well-formed, by the name in the table
	service  string             // OTEL_SERVICE_NAME
	insecure bool               // OTEL_EXPORTER_OTLP_INSECURE
	problems []*Problem
	now      time.Time // for certificates
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

// finishTimeouts keeps the sweep inside the time that the SDK's reader gives to
// a whole collection.
func (l *loader) finishTimeouts() {
	if l.cfg.ExportTimeout == 0 || l.cfg.SweepTimeout < l.cfg.ExportTimeout { // 0: it was refused
		return
	}
	if s, ok := l.given["UNITMETER_SWEEP_TIMEOUT"]; ok {
		l.bad(s, "not below the export timeout of "+l.cfg.ExportTimeout.String()+", so that a slow sweep would be lost",
			"lower it, or raise OTEL_METRIC_EXPORT_TIMEOUT")
		return
	}
	l.cfg.SweepTimeout = l.cfg.ExportTimeout / 2
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
