package config

import (
	"fmt"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/unitmeter/unitmeter/exporter/otlp"
)

// finishOTLP brings together what depends on more than one variable.
func (l *loader) finishOTLP() {
	o := &l.cfg.OTLP
	if !slices.Contains(l.cfg.Exporters, "otlp") {
		*o = otlp.Config{}
		return
	}
	o.Specific = l.specific()
	l.finishTLS()
	l.finishHeaders()
	if o.Protocol == "" { // refused
		return
	}
	at, ok := l.endpoint()
	if !ok {
		return
	}
	o.Endpoint = at.address
	l.checkProxies(o.Endpoint)
	insecure, set := l.given["OTEL_EXPORTER_OTLP_INSECURE"]
	switch at.scheme {
	case "https":
		// The Go exporter would send in clear text, against the specification.
		if l.insecure {
			l.bad(insecure, "contradicts the https endpoint", "unset it, or write the endpoint with http://")
		}
	case "":
		o.Insecure = l.insecure
	default:
		// The Go exporter would speak TLS to it.
		if set && !l.insecure {
			l.bad(insecure, "contradicts the endpoint, which has no TLS", "unset it, or write the endpoint with https://")
		}
		o.Insecure = true
	}
	if !o.Insecure {
		return
	}
	for _, name := range []string{"CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"} {
		if s, ok := l.given["OTEL_EXPORTER_OTLP_"+name]; ok {
			l.bad(s, "the endpoint has no TLS, so that this has no effect", "write the endpoint with https://, or unset this")
		}
	}
}

// specific returns the variables for metrics only that are set, by the names of the
// general ones.
func (l *loader) specific() map[string]string {
	var names map[string]string
	for general, s := range l.given {
		if s.name == general {
			continue
		}
		if names == nil {
			names = map[string]string{}
		}
		names[general] = s.name
	}
	return names
}

// A target is an endpoint that was understood.
type target struct {
	address string // as in OTLP.Endpoint
	scheme  string // http, https, unix, or "" for a gRPC target that leaves TLS open
}

// endpoint returns where to send. It is false if the variable was bad.
func (l *loader) endpoint() (target, bool) {
	const name = "OTEL_EXPORTER_OTLP_ENDPOINT"
	grpc := l.cfg.OTLP.Protocol == "grpc"
	s, set := l.given[name]
	if !set {
		for _, p := range l.problems {
			if strings.HasSuffix(p.Variable, "_ENDPOINT") {
				return target{}, false
			}
		}
		return l.defaultEndpoint(grpc), true
	}
	before := len(l.problems)
	bad := func(reason, hint string) { l.bad(s, reason, hint) }
	var at target
	if reason, hint := checkEndpoint(s.text); reason != "" {
		bad(reason, hint)
	} else if lower := strings.ToLower(s.text); strings.HasPrefix(lower, "http://") || strings.HasPrefix(lower, "https://") {
		at = l.urlEndpoint(s, grpc, s.name == name, bad)
	} else if grpc {
		at = grpcTarget(s.text, bad)
	} else if strings.HasPrefix(lower, "unix") {
		bad("OTLP over HTTP cannot use a unix socket", "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use a URL")
	} else {
		bad("not a URL, which OTLP over HTTP needs", "write http://host:4318 or https://host:4318")
	}
	return at, len(l.problems) == before
}

// defaultEndpoint is that of the specification. (The Go exporters have https as
// their default, which no Collector on the same host has.)
func (l *loader) defaultEndpoint(grpc bool) target {
	scheme := "http"
	if !l.insecure {
		for _, name := range []string{"INSECURE", "CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"} {
			if _, set := l.given["OTEL_EXPORTER_OTLP_"+name]; set {
				scheme = "https"
			}
		}
	}
	if grpc {
		return target{"localhost:4317", scheme}
	}
	return target{scheme + "://localhost:4318/v1/metrics", scheme}
}

// checkEndpoint finds what no form of endpoint may have.
func checkEndpoint(text string) (reason, hint string) {
	if strings.ContainsFunc(text, unicode.IsSpace) {
		return "contains white space", "remove it"
	}
	switch {
	// Anywhere: a password may have a slash in it.
	case strings.Contains(text, "@"):
		return "contains a user name or password (or an @), which OTLP does not send", "put credentials into UNITMETER_OTLP_HEADERS_FILE; write an @ in a path as %40"
	case strings.ContainsAny(text, "?#"):
		return "contains a query or fragment, which OTLP does not send", "end it after the path; put tokens into UNITMETER_OTLP_HEADERS_FILE"
	}
	return "", ""
}

// urlEndpoint reads a http or https URL. base says that the path of the signal
// is to be added (OTLP exporter specification, "Endpoint URLs for OTLP/HTTP").
func (l *loader) urlEndpoint(s setting, grpc, base bool, bad report) target {
	scheme, rest, _ := strings.Cut(s.text, "://")
	scheme = strings.ToLower(scheme)
	authority, _, _ := strings.Cut(rest, "/")
	port, ok := checkAuthority(authority, bad)
	if !ok {
		return target{}
	}
	u, err := url.Parse(s.text)
	if err != nil { // what is left is the path
		bad("not a URL: its path has a bad % escape or character", "write it as http://host:port/path")
		return target{}
	}
	if grpc {
		switch {
		case u.Path != "" && u.Path != "/":
			bad("has a path, and the protocol is grpc, which has none", "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or remove the path")
		case port == "" && scheme == "http":
			bad("has no port", "write http://"+shorten(authority)+":4317")
		case port == "4318":
			l.warn(s.name + " has port 4318, which is that of HTTP by default, and the protocol is grpc")
		}
		if port == "" {
			return target{escapeZone(u.Host) + ":443", scheme} // as gRPC does by itself
		}
		return target{escapeZone(u.Host), scheme}
	}
	if port == "4317" {
		l.warn(s.name + " has port 4317, which is that of grpc by default, and the protocol is http/protobuf")
	}
	l.checkPath(s, base, u.Path)
	u.Scheme = scheme
	// path.Join is what the exporter does too: it mends double slashes.
	if u.RawPath = ""; base {
		u.Path = path.Join(u.Path, "/v1/metrics")
	}
	u.Path = "/" + strings.TrimPrefix(u.Path, "/")
	return target{u.String(), scheme}
}

// checkAuthority checks "host" or "host:port" and returns the port.
func checkAuthority(authority string, bad report) (port string, ok bool) {
	host := authority
	if i := strings.LastIndexByte(authority, ':'); i >= 0 && !strings.HasSuffix(authority, "]") {
		host, port = authority[:i], authority[i+1:]
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 || port[0] == '+' {
			bad(fmt.Sprintf("the port %q is not a number from 1 to 65535", shorten(port)), "write host:port, such as localhost:4317")
			return "", false
		}
	}
	inner, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		inner, bracketed = strings.CutSuffix(inner, "]")
	}
	inner = strings.Replace(inner, "%25", "%", 1) // the zone of a URL, RFC 6874
	switch {
	case host == "":
		bad("has no host", "write host:port, such as localhost:4317")
	case strings.Contains(host, ":") && !bracketed:
		bad("an IPv6 address needs brackets", "write it as [::1]:4317")
	case !validHost(inner) || bracketed != strings.Contains(inner, ":"):
		bad(fmt.Sprintf("%q is not a host name or address", shorten(host)), "write host:port, such as localhost:4317")
	default:
		return port, true
	}
	return "", false
}

// grpcTarget reads what gRPC takes besides URLs (gRPC's naming.md).
func grpcTarget(text string, bad report) target {
	scheme, rest, found := strings.Cut(text, ":")
	switch {
	case strings.EqualFold(scheme, "unix"):
		socket := rest
		if after, ok := strings.CutPrefix(rest, "//"); ok {
			socket = after
		}
		// gRPC undoes escapes, and unix(7) has the limit.
		name, err := url.PathUnescape(socket)
		const longest = 107
		switch {
		case err != nil:
			bad("has a '%' that is not followed by two hexadecimal digits", "write '%' as %25")
		case !strings.HasPrefix(socket, "/") || socket == "/":
			bad("not an absolute path of a socket", "write unix:/run/otelcol.sock")
		case len(name) > longest:
			bad(fmt.Sprintf("the path is longer than that of a socket can be (%d)", longest), "use a shorter one, such as unix:/run/otelcol.sock")
		}
		return target{"unix:" + socket, "unix"}
	case strings.EqualFold(scheme, "unix-abstract"):
		if rest == "" || strings.HasPrefix(rest, "/") {
			bad("not the name of an abstract socket", "write unix-abstract:otelcol")
		}
		return target{"unix-abstract:" + rest, "unix"}
	case strings.EqualFold(scheme, "dns"):
		// dns:host:port, dns:///host:port, or dns://resolver/host:port
		name := rest
		if after, ok := strings.CutPrefix(rest, "//"); ok {
			_, name, _ = strings.Cut(after, "/")
		}
		if port, ok := checkAuthority(name, bad); ok && port == "" {
			bad("has no port", "write dns:///host:port, such as dns:///collector:4317")
		}
		return target{"dns:" + escapeZone(rest), ""}
	case strings.HasPrefix(rest, "//"):
		bad(fmt.Sprintf("the scheme %q is not known", shorten(scheme)), "write http://host:port for no TLS, https://host:port for TLS")
		return target{}
	case !found:
		bad("has no port", "write host:port, such as http://localhost:4317")
		return target{}
	case strings.Contains(text, "/"):
		bad("not host:port", "write host:port, such as http://localhost:4317")
		return target{}
	}
	if port, ok := checkAuthority(text, bad); ok && port == "" {
		bad("has no port", "write host:port, such as http://localhost:4317")
	}
	return target{escapeZone(text), ""}
}

// escapeZone writes the zone of an IPv6 address as gRPC wants it, which reads every
// target as a URL (RFC 6874).
func escapeZone(address string) string {
	return strings.Replace(strings.Replace(address, "%25", "%", 1), "%", "%25", 1)
}
