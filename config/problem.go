package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// A Problem is one thing that is wrong with one variable.
type Problem struct {
	// Variable is the name under which it was set.
	Variable string
	// Value is what it was set to. It is empty for variables that hold secrets,
	// and has user names, passwords and queries cut out of URLs.
	Value string
	// Reason says what is wrong with the value.
	Reason string
	// Hint is what to do about it.
	Hint string
}

// Error gives the problem as one line, without secrets.
func (p *Problem) Error() string {
	if p.Value == "" {
		return fmt.Sprintf("read %s: %s: %s", p.Variable, p.Reason, p.Hint)
	}
	return fmt.Sprintf("read %s=%q: %s: %s", p.Variable, shorten(p.Value), p.Reason, p.Hint)
}

// A report tells of one problem of the value that is being parsed.
type report func(reason, hint string)

func (l *loader) bad(s setting, reason, hint string) {
	l.problems = append(l.problems, &Problem{Variable: s.name, Value: s.shown, Reason: reason, Hint: hint})
}

func (l *loader) err() error {
	errs := make([]error, len(l.problems))
	for i, p := range l.problems {
		errs[i] = p
	}
	return errors.Join(errs...)
}

// malformed finds what is wrong with any value, whatever the variable.
func malformed(text string) (reason, hint string) {
	if !utf8.ValidString(text) {
		return "not valid UTF-8", "write it again in plain characters"
	}
	if i := strings.IndexFunc(text, isControl); i >= 0 {
		return "contains a control character (a line break, a tab or the like)", "write it on one line in plain characters"
	}
	if n := len(text); n > 1 && (text[0] == '"' || text[0] == '\'') && text[n-1] == text[0] {
		return "the quotes are part of the value", "remove them; docker's --env-file, for one, keeps quotes"
	}
	return "", ""
}

func isControl(r rune) bool { return r < 0x20 || r >= 0x7f && r < 0xa0 }

// hide shows nothing of a secret.
func hide(string) string { return "" }

// redactURL cuts the user part and the query from a URL, also from one that
// cannot be parsed.
func redactURL(text string) string {
	if i := strings.IndexAny(text, "?#"); i >= 0 {
		text = text[:i+1] + "***"
	}
	if i := strings.LastIndexByte(text, '@'); i >= 0 {
		scheme, _, found := strings.Cut(text[:i], "://")
		if !found {
			return "***" + text[i:]
		}
		text = scheme + "://***" + text[i:]
	}
	return text
}

// shorten keeps one bad value from filling the log.
func shorten(text string) string {
	const limit = 120
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + "..."
}

// Nearest returns the one of known that name was probably meant to be, or "": the
// one with the smallest edit distance that is not above limit.
func Nearest(name string, known []string, limit int) string {
	best, found := limit+1, ""
	for _, k := range known {
		if d := distance(name, k); d < best {
			best, found = d, k
		}
	}
	return found
}

// distance is the Levenshtein distance.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, diagonal+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// oneOf is the hint for a value from a list, with a guess if one is close.
func oneOf(text string, choices []string) string {
	list := strings.Join(choices, ", ")
	guess := Nearest(text, choices, 2)
	for _, c := range choices {
		if guess == "" && len(text) > 2 && (strings.HasPrefix(text, c) || strings.HasPrefix(c, text)) {
			guess = c
		}
	}
	switch {
	case len(choices) == 1:
		return "use " + list
	case guess == "":
		return "use one of " + list
	}
	return fmt.Sprintf("did you mean %s? The choices are %s", guess, list)
}

// checkNames looks for variables that were meant for this agent and are not
// read by it. One of the agent's own is an error. One of OpenTelemetry's is a
// warning, since other programs share the file and may know it.
func (l *loader) checkNames(table []entry) {
	var known []string
	for _, e := range table {
		known = append(known, e.Name)
		if e.Specific != "" {
			known = append(known, e.Specific)
		}
	}
	for _, name := range sortedKeys(l.env) {
		if slices.Contains(known, name) {
			continue
		}
		value, shown := strings.TrimSpace(l.env[name]), shorten(printable(name))
		rest, own := strings.CutPrefix(shown, "UNITMETER_")
		switch {
		case own && isServiceLink(rest, value):
		case own:
			hint := "remove it; 'unitmeter help environment' lists what there is"
			if guess := guessOwn(rest, known); guess != "" {
				hint = "did you mean " + guess
				if strings.HasPrefix(guess, "OTEL_METRIC_EXPORT_") || strings.HasSuffix(guess, "_OTLP_TIMEOUT") {
					hint += " (in milliseconds)"
				}
				hint += "?"
			}
			// The value may be a secret that was meant for another variable.
			l.bad(setting{name: shown}, "there is no such variable", hint)
		case value != "" && strings.HasPrefix(name, "OTEL_"):
			l.warnUnread(shown, known)
		}
	}
}

// guessOwn finds the variable that UNITMETER_rest was meant to be: the same name
// under OTEL_, a longer name with the same end, one with the same subject, or a
// similar one.
func guessOwn(rest string, known []string) string {
	if slices.Contains(known, "OTEL_"+rest) {
		return "OTEL_" + rest
	}
	for _, prefix := range []string{"UNITMETER_PROMETHEUS_", "UNITMETER_OUTBOX_", "UNITMETER_OTLP_", "OTEL_METRIC_EXPORT_", "OTEL_METRIC_", "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_", "OTEL_METRICS_", "OTEL_EXPORTER_PROMETHEUS_", "UNITMETER_STOP_"} {
		if slices.Contains(known, prefix+rest) {
			return prefix + rest
		}
	}
	if guess := Nearest("UNITMETER_"+rest, known, 2); guess != "" {
		return guess
	}
	// What other agents call it. The first of these words that begins a part
	// of the name decides.
	for _, other := range []struct{ words, variable string }{
		{"INTERVAL PERIOD FREQUENCY", "OTEL_METRIC_EXPORT_INTERVAL"},
		{"TOKEN AUTH API_KEY APIKEY PASSWORD SECRET BEARER", "UNITMETER_OTLP_HEADERS_FILE"},
		{"CA_CERT CAFILE CA_FILE TLS_CA CERT", "OTEL_EXPORTER_OTLP_CERTIFICATE"},
		{"ENDPOINT URL COLLECTOR SERVER TARGET", "OTEL_EXPORTER_OTLP_ENDPOINT"},
		{"LISTEN ADDRESS BIND", "OTEL_EXPORTER_PROMETHEUS_HOST"},
		{"PORT", "OTEL_EXPORTER_PROMETHEUS_PORT"},
		{"EXPORTER OUTPUT", "OTEL_METRICS_EXPORTER"},
		{"LOGLEVEL LOG_LVL DEBUG VERBOSE QUIET", "OTEL_LOG_LEVEL"},
		{"LABEL TAG HOSTNAME HOST_NAME RESOURCE", "OTEL_RESOURCE_ATTRIBUTES"},
		{"TEMPORALITY DELTA", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"},
		{"EXCLUDE IGNORE BLACKLIST BLOCKLIST DENY SKIP", "UNITMETER_EXCLUDE"},
		{"MAX_", "UNITMETER_MAX_UNITS"},
		{"TYPE", "UNITMETER_UNIT_TYPES"},
		{"INCLUDE UNITS ALLOW WHITELIST FILTER", "UNITMETER_INCLUDE"},
		{"EBPF BPF MODE BACKEND", "UNITMETER_SOURCE"},
		{"RETENTION", "UNITMETER_HISTORY"},
		{"STATE DATA_DIR DATADIR STORAGE", "UNITMETER_STATE_DIR"},
	} {
		for word := range strings.FieldsSeq(other.words) {
			if strings.Contains("_"+rest, "_"+word) && slices.Contains(known, other.variable) {
				return other.variable
			}
		}
	}
	return Nearest("UNITMETER_"+rest, known, max(2, len(rest)/2))
}

// warnUnread warns of an OTEL_ variable that looks like one of ours.
func (l *loader) warnUnread(name string, known []string) {
	for _, prefix := range []string{"OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_LOGS_", "OTEL_EXPORTER_OTLP_PROFILES_"} {
		if strings.HasPrefix(name, prefix) {
			return
		}
	}
	ours := false
	for _, prefix := range []string{"OTEL_METRIC", "OTEL_EXPORTER_OTLP_METRIC", "OTEL_EXPORTER_PROMETHEUS_"} {
		ours = ours || strings.HasPrefix(name, prefix)
	}
	limit := 2
	if ours {
		limit = 4
	}
	guess := Nearest(name, known, limit)
	switch {
	case guess != "":
		l.warn(name + " is set and not read: did you mean " + guess + "?")
	case ours:
		l.warn(name + " is set and not read: this agent knows no such variable")
	}
}

// isServiceLink recognizes what Kubernetes and docker links put into the
// environment for a service whose name is or begins with unitmeter. The prefix
// is removed from rest.
func isServiceLink(rest, value string) bool {
	return strings.HasSuffix(rest, "SERVICE_HOST") || strings.HasSuffix(rest, "SERVICE_PORT") ||
		strings.Contains(rest, "SERVICE_PORT_") ||
		// All the others are about an address such as tcp://10.0.0.1:9464.
		strings.HasSuffix(rest, "PORT") && strings.Contains(value, "://") ||
		strings.Contains(rest, "PORT_") && (strings.Contains(rest, "_TCP") || strings.Contains(rest, "_UDP") || strings.Contains(rest, "_SCTP"))
}

// printable keeps a name from writing control characters to a terminal.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if isControl(r) || r == utf8.RuneError {
			return '?'
		}
		return r
	}, name)
}
