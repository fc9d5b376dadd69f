package config

import (
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
)

const headersFile = "UNITMETER_OTLP_HEADERS_FILE"

// headers are names, in lower case, with values, which are secrets.
type headers map[string]string

// parseHeaders reads the list of a variable as the official exporters do
// (internal/envconfig, stringToHeader), and refuses what they log or drop.
// Nothing of an item that is not understood is shown: it may be the rest of a
// secret that had a comma in it.
func parseHeaders(text string, bad report) headers {
	out := make(headers)
	for i, item := range strings.Split(text, ",") {
		out.add(item, fmt.Sprintf("item %d", i+1), bad)
	}
	return out
}

// finishHeaders puts the headers of the file over those of the variable, now and
// whenever the file is renewed.
func (l *loader) finishHeaders() {
	if _, ok := l.given[headersFile]; !ok {
		if own := l.headers; len(own) > 0 {
			l.checkHeaderNames(own)
			l.cfg.OTLP.Headers = func() (map[string]string, error) { return own, nil }
		}
		return
	}
	if path := l.credential(l.given[headersFile]); path != "" {
		l.cfg.OTLP.Headers = newRenewed(l, func(l *loader) map[string]string { return l.readHeaders(path) }, path).get
	}
}

// credential returns where a file is that may be a credential of systemd's, or ""
// if it has reported a problem.
func (l *loader) credential(s setting) string {
	credentials := l.env["CREDENTIALS_DIRECTORY"]
	switch {
	case filepath.IsAbs(s.text):
		return s.text
	case !filepath.IsAbs(credentials):
		l.bad(s, "not an absolute path, and there is no CREDENTIALS_DIRECTORY", "write the whole path, or use LoadCredential= in the agent's unit")
	case !filepath.IsLocal(s.text):
		l.bad(s, "leads out of CREDENTIALS_DIRECTORY", "use the name of the credential alone")
	default:
		return filepath.Join(credentials, s.text)
	}
	return ""
}

// readHeaders returns the headers of the variable, with those of the file on top.
func (l *loader) readHeaders(path string) headers {
	s := l.given[headersFile]
	content, mode, reason := readFile(path)
	if reason != "" {
		l.bad(s, reason, hintFile)
		return nil
	}
	if mode&readableByOthers != 0 {
		l.warn(fmt.Sprintf("%s: every user can read %s; take the right away with chmod o-r", headersFile, shorten(path)))
	}
	all := make(headers)
	maps.Copy(all, l.headers)
	maps.Copy(all, parseHeadersFile(string(content), func(reason, hint string) { l.bad(s, reason, hint) }))
	l.checkHeaderNames(all)
	return all
}

// parseHeadersFile reads a file: each line is such a list.
func parseHeadersFile(content string, bad report) headers {
	out := make(headers)
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

func (h headers) add(item, where string, bad report) {
	name, value, found := strings.Cut(item, "=")
	name = strings.ToLower(strings.TrimSpace(name))
	leftover, leftoverHint := itemLeftover(strings.TrimSpace(value))
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
	case leftover != "":
		bad(fmt.Sprintf("%s, header %s: the value %s", where, shorten(name), leftover), leftoverHint)
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
func (l *loader) checkHeaderNames(all headers) {
	reserved := []string{"connection", "content-encoding", "content-length", "content-type", "host", "te", "trailer", "transfer-encoding", "upgrade"}
	grpc := l.cfg.OTLP.Protocol == "grpc"
	for _, name := range sortedKeys(all) {
		if slices.Contains(reserved, name) || grpc && (name == "user-agent" || strings.HasPrefix(name, "grpc-")) {
			s := l.given[headersFile]
			if _, ok := l.headers[name]; ok {
				s = l.given["OTEL_EXPORTER_OTLP_HEADERS"]
			}
			l.bad(s, "the header "+shorten(name)+" is set by the transport itself", "remove it")
		}
	}
}
