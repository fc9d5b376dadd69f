package config

import (
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
)

// Headers are names, in lower case, with values. The values are secrets: they
// are not shown when Headers, or what contains them, are printed, logged or
// encoded.
type Headers map[string]string

// String lists the names.
func (h Headers) String() string {
	names := sortedKeys(h)
	for i, name := range names {
		names[i] = name + ":***"
	}
	return "map[" + strings.Join(names, " ") + "]"
}

// Format is String for every verb, %#v too.
func (h Headers) Format(f fmt.State, _ rune) { fmt.Fprint(f, h.String()) }

// MarshalText is String for encoders, that of slog among them.
func (h Headers) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// parseHeaders reads the list of a variable as the official exporters do
// (internal/envconfig, stringToHeader), and refuses what they log or drop.
// Nothing of an item that is not understood is shown: it may be the rest of a
// secret that had a comma in it.
func parseHeaders(text string, bad report) Headers {
	out := make(Headers)
	for i, item := range strings.Split(text, ",") {
		out.add(item, fmt.Sprintf("item %d", i+1), bad)
	}
	return out
}

// addHeadersFile merges the headers of a file over those of the environment.
func (l *loader) addHeadersFile(file string, bad report) {
	if !filepath.IsAbs(file) {
		credentials := l.env["CREDENTIALS_DIRECTORY"]
		switch {
		case !filepath.IsAbs(credentials):
			bad("not an absolute path, and there is no CREDENTIALS_DIRECTORY", "write the whole path, or use LoadCredential= in the agent's unit")
			return
		case !filepath.IsLocal(file):
			bad("leads out of CREDENTIALS_DIRECTORY", "use the name of the credential alone")
			return
		}
		file = filepath.Join(credentials, file)
	}
	content, mode, reason := readFile(file)
	if reason != "" {
		bad(reason, hintFile)
		return
	}
	if mode&readableByOthers != 0 {
		l.warn(fmt.Sprintf("UNITMETER_OTLP_HEADERS_FILE: every user can read %s; take the right away with chmod o-r", shorten(file)))
	}
	headers := parseHeadersFile(string(content), bad)
	if l.cfg.OTLP.Headers == nil {
		l.cfg.OTLP.Headers = headers
		return
	}
	maps.Copy(l.cfg.OTLP.Headers, headers)
}

// parseHeadersFile reads a file: each line is such a list.
func parseHeadersFile(content string, bad report) Headers {
	out := make(Headers)
	if strings.Contains(content, "\r") {
		bad("its lines end as on Windows (CR LF)", "convert it, for instance with dos2unix")
		return nil
	}
	n, read := 0, 0
	for line := range strings.Lines(strings.TrimPrefix(content, "\ufeff")) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		read++
		items := strings.Split(line, ",")
		for i, item := range items {
			where := fmt.Sprintf("line %d", n)
			if len(items) > 1 {
				where += fmt.Sprintf(", item %d", i+1)
			}
			out.add(item, where, bad)
		}
	}
	if read == 0 {
		bad("holds no header", "write one name=value on each line")
	}
	return out
}

func (h Headers) add(item, where string, bad report) {
	name, value, found := strings.Cut(item, "=")
	name = strings.ToLower(strings.TrimSpace(name))
	value, err := url.PathUnescape(value)
	value = strings.TrimSpace(value)
	_, dup := h[name]
	switch {
	case strings.TrimSpace(item) == "":
		bad(where+" is empty", "remove the extra comma")
	case !found:
		bad(where+" has no '='", "write name=value, not 'name: value', and a comma in a value as %2C")
	case name == "":
		bad(where+" has no name before '='", "write name=value")
	case strings.ContainsFunc(name, func(r rune) bool { return !isToken(r) }):
		bad(where+" has a name with a character that header names cannot have", "use letters, digits and '-', and write a comma in a value as %2C")
	case err != nil:
		bad(fmt.Sprintf("%s, header %s: a '%%' is not followed by two hexadecimal digits", where, shorten(name)), "write '%' as %25")
	case strings.Trim(value, "=") == "":
		// This may be a token in base64 and no name, so it is not shown either.
		bad(where+" has no value after its first '='", "write name=value, or remove it")
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }):
		bad(fmt.Sprintf("%s, header %s: the value has a line break or another character that is not plain ASCII", where, shorten(name)), "use plain ASCII")
	case dup:
		bad(fmt.Sprintf("%s, header %s: it is there twice", where, shorten(name)), "keep one of them")
	default:
		h[name] = value
	}
}

// isToken is the alphabet of header names (RFC 9110, "Tokens").
func isToken(r rune) bool { return isAlnum(r) || strings.ContainsRune("!#$%&'*+-.^_`|~", r) }

// checkHeaderNames refuses names that the transport sets itself. gRPC drops
// them without a word (isReservedHeader), HTTP would send a broken request.
func (l *loader) checkHeaderNames() {
	reserved := []string{"connection", "content-encoding", "content-length", "content-type", "host", "te", "trailer", "transfer-encoding", "upgrade"}
	grpc := l.cfg.OTLP.Protocol == "grpc"
	for _, name := range sortedKeys(l.cfg.OTLP.Headers) {
		if slices.Contains(reserved, name) || grpc && (name == "user-agent" || strings.HasPrefix(name, "grpc-")) {
			s, ok := l.given["OTEL_EXPORTER_OTLP_HEADERS"]
			if file, fromFile := l.given["UNITMETER_OTLP_HEADERS_FILE"]; !ok || fromFile && parseHeaders(s.text, func(string, string) {})[name] == "" {
				s = file
			}
			l.bad(s, "the header "+shorten(name)+" is set by the transport itself", "remove it")
		}
	}
}
