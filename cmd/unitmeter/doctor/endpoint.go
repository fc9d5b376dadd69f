package doctor

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/exporter/otlp"
)

// endpoint is where the requests go, as the net package has it.
type endpoint struct {
	network, address string
	host             string // of a tcp address, without the port
	path             string // that a URL needs in the variable that decides
	url              string // for a proxy to judge
	plain            bool   // no TLS
	grpc             bool
}

// parseEndpoint takes apart what config.Load has checked.
func parseEndpoint(o otlp.Config) (endpoint, error) {
	ep := endpoint{network: "tcp", plain: o.Insecure, grpc: o.Protocol != "http/protobuf"}
	// HTTP has a URL with a scheme, of which the port follows where it has none.
	if !ep.grpc {
		u, err := url.Parse(o.Endpoint)
		if err != nil {
			return ep, err
		}
		port := cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
		ep.host, ep.address, ep.url = u.Hostname(), net.JoinHostPort(u.Hostname(), port), o.Endpoint
		if o.Specific["OTEL_EXPORTER_OTLP_ENDPOINT"] != "" { // to the other the exporter adds it
			ep.path = "/v1/metrics"
		}
		return ep, nil
	}
	target := o.Endpoint
	// What gRPC takes besides host:port (gRPC's naming.md).
	switch scheme, rest, _ := strings.Cut(target, ":"); scheme {
	case "unix":
		return endpoint{network: "unix", address: rest, plain: o.Insecure, grpc: true}, nil
	case "unix-abstract":
		return endpoint{network: "unix", address: "@" + rest, plain: o.Insecure, grpc: true}, nil
	case "dns":
		target = rest[strings.LastIndexByte(rest, '/')+1:]
	}
	// gRPC asks for the proxy of an https URL, with and without TLS.
	u, err := url.Parse("https://" + target)
	if err != nil {
		return ep, err
	}
	if u.Port() == "" {
		return ep, fmt.Errorf("%q has no port", target)
	}
	ep.host, ep.address, ep.url = u.Hostname(), u.Host, "https://"+target
	return ep, nil
}

// scheme is what the endpoint variable should begin with.
func (ep endpoint) scheme() string {
	if ep.plain {
		return "http://"
	}
	return "https://"
}

// at is the endpoint as a URL, with another scheme or address.
func (ep endpoint) at(scheme, address string) string { return scheme + address + ep.path }

// proxy returns the proxy for an endpoint, or nil.
func (ep endpoint) proxy() *url.URL {
	if ep.network != "tcp" {
		return nil
	}
	// The rules of NO_PROXY are many; the standard library has them.
	req, err := http.NewRequest(http.MethodPost, ep.url, nil)
	if err != nil {
		return nil
	}
	p, err := http.ProxyFromEnvironment(req)
	if err != nil {
		return nil
	}
	return p
}

// checkEndpointName, checkConnection, checkTLS and checkCollector go up one
// layer each, so that the first to fail names the setting that is wrong.
func (d *doctor) checkEndpointName(ctx context.Context, ep endpoint) finding {
	switch {
	case ep.network == "unix":
		return skipped("a Unix socket needs no name")
	// Behind a proxy the name need not be known here.
	case ep.proxy() != nil:
		return skipped("the proxy %s resolves the name", ep.proxy().Redacted())
	case net.ParseIP(strings.Trim(ep.host, "[]")) != nil:
		return good("%s is an address", ep.host)
	}
	// The resolver of this program, not that of getent: they may disagree, and
	// the agent uses this one.
	addresses, err := net.DefaultResolver.LookupHost(ctx, ep.host)
	if err != nil {
		d.nameless = true
		if ep.host == "localhost" { // in a container made from nothing
			return failure("set OTEL_EXPORTER_OTLP_ENDPOINT="+ep.at(ep.scheme(), strings.Replace(ep.address, "localhost", "127.0.0.1", 1)), "%v: /etc/hosts does not have it", err)
		}
		return failure("set OTEL_EXPORTER_OTLP_ENDPOINT to a name that exists (getent hosts "+ep.host+")", "%v", err)
	}
	return good("%s is %s", ep.host, strings.Join(addresses, ", "))
}

func (d *doctor) checkConnection(ctx context.Context, ep endpoint) finding {
	if d.nameless {
		return skipped("there is no address")
	}
	// The first hop: a proxy that is down looks like a Collector that is down.
	address, what := ep.address, ep.address
	if p := ep.proxy(); p != nil {
		address, what = net.JoinHostPort(p.Hostname(), cmp.Or(p.Port(), "80")), "the proxy "+p.Redacted()
	}
	// Leave time for the checks behind it: a firewall that drops is slow.
	ctx, cancel := context.WithTimeout(ctx, checkTimeout/2)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, ep.network, address)
	if err == nil {
		d.reachable = true
		_ = conn.Close()
		return good("%s accepts connections", what)
	}
	switch {
	// The host has answered: nobody is at this port, or at this path.
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return failure("start the Collector, or set OTEL_EXPORTER_OTLP_ENDPOINT to where it listens ("+usualEndpoint(ep)+")",
			"nothing listens at %s: %v", what, err)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return failure("open the firewall for "+address+", or set OTEL_EXPORTER_OTLP_ENDPOINT", "no answer from %s within %s", what, checkTimeout/2)
	}
	return failure("set OTEL_EXPORTER_OTLP_ENDPOINT to an address that this host can reach", "%v", err)
}

// usualEndpoint is what Collectors have for a protocol in their own examples; it
// is a hint for those who have mixed up the two ports.
func usualEndpoint(ep endpoint) string {
	if ep.grpc {
		return "usually port 4317 for grpc"
	}
	return "usually port 4318 for http/protobuf"
}

// checkTLS makes a handshake of its own: gRPC and HTTP wrap its errors until
// they say little. It uses the settings that the exporter gets, with nothing
// skipped.
func (d *doctor) checkTLS(ctx context.Context, ep endpoint) finding {
	switch {
	// Headers are there to carry secrets.
	case ep.plain && ep.network == "tcp" && !loopback(ep.host) && headerCount(d.cfg.OTLP) > 0:
		return warning("set OTEL_EXPORTER_OTLP_ENDPOINT="+ep.at("https://", ep.address), "TLS is off, and the headers cross the network in clear text")
	case ep.plain:
		return good("TLS is off, as the endpoint asks")
	case ep.proxy() != nil:
		return skipped("the connection goes through the proxy %s", ep.proxy().Redacted())
	case !d.reachable:
		return skipped("there is no connection")
	}
	return tlsFinding(ctx, ep, d.cfg)
}

// loopback reports whether an endpoint is on this host: nobody listens in.
func loopback(host string) bool {
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// tlsFinding shakes hands and judges the certificates of both sides.
func tlsFinding(ctx context.Context, ep endpoint, settings config.Config) finding {
	cfg := &tls.Config{}
	if settings.OTLP.TLS != nil {
		if read, err := settings.OTLP.TLS(); err == nil { // the check of the environment has read them
			cfg = read.Clone()
		}
	}
	cfg.NextProtos = []string{"h2", "http/1.1"}
	if ep.grpc {
		cfg.NextProtos = []string{"h2"}
	}
	// Only where the server asks for a client certificate is there a verdict on
	// it that is worth waiting for.
	asked := false
	pair := cfg.Certificates
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		asked = true
		if len(pair) > 0 {
			return &pair[0], nil
		}
		return new(tls.Certificate), nil // none, as without this function
	}
	conn, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, ep.network, ep.address)
	if err != nil {
		return tlsFailure(err, ep, settings.Files)
	}
	defer conn.Close() // nothing was written
	state := conn.(*tls.Conn).ConnectionState()
	if asked {
		// In TLS 1.3 the server judges the client's certificate after the
		// client's side of the handshake is done.
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := conn.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return tlsFailure(err, ep, settings.Files)
		}
	}
	found := fmt.Sprintf("%s, certificate of %s", tls.VersionName(state.Version), certName(state.PeerCertificates[0]))
	if asked && len(pair) > 0 {
		found += ", client certificate accepted"
	}
	// Some certificates live for an hour, and are renewed in time.
	leaf := state.PeerCertificates[0]
	if left := time.Until(leaf.NotAfter); left < 7*24*time.Hour && left < leaf.NotAfter.Sub(leaf.NotBefore)/10 {
		return warning("renew the certificate of the Collector", "%s; it expires on %s", found, leaf.NotAfter.UTC().Format(time.DateTime))
	}
	return good("%s", found)
}

func certName(c *x509.Certificate) string {
	return cmp.Or(c.Subject.CommonName, strings.Join(c.DNSNames, " "), c.Subject.String())
}

// tlsFailure names the setting that is wrong.
func tlsFailure(err error, ep endpoint, files config.Files) finding {
	var plain tls.RecordHeaderError
	var alert tls.AlertError
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &plain):
		return failure("set OTEL_EXPORTER_OTLP_ENDPOINT="+ep.at("http://", ep.address), "%s does not speak TLS, and the settings require it", ep.address)
	case errors.As(err, &name):
		names := slices.Clone(name.Certificate.DNSNames)
		for _, ip := range name.Certificate.IPAddresses {
			names = append(names, ip.String())
		}
		if len(names) == 0 {
			return failure("renew the certificate of the Collector with the name in it (subjectAltName)",
				"the certificate of %s has no names: its common name has not counted as one for years", certName(name.Certificate))
		}
		return failure("set OTEL_EXPORTER_OTLP_ENDPOINT to one of the names in the certificate: "+strings.Join(names, ", "),
			"the certificate is not for %s", ep.host)
	case errors.As(err, &unknown):
		issuer := "its authority"
		if unknown.Cert != nil {
			issuer = fmt.Sprintf("%q", unknown.Cert.Issuer.String())
		}
		found := "no authority that this system trusts signed the certificate"
		if files.Certificate != "" {
			found = files.Certificate + " is not the authority that signed the certificate"
		}
		return failure("set OTEL_EXPORTER_OTLP_CERTIFICATE to the PEM file of "+issuer, "%s: %v", found, err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return failure("renew the certificate of the Collector, or correct the clock", "%v", err)
	// An alert is what a server sends that wants a client certificate, or another
	// one than it got.
	case errors.As(err, &alert), isAlert(err):
		if files.ClientCertificate == "" {
			return failure("set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY", "the Collector requires a client certificate, and none is set: %v", err)
		}
		return failure("set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE to a certificate of an authority that the Collector trusts",
			"the Collector rejects the client certificate %s: %v", files.ClientCertificate, err)
	// Servers that read a TLS handshake as something else hang up.
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return failure("set OTEL_EXPORTER_OTLP_ENDPOINT="+ep.at("http://", ep.address), "%s closes the connection during the TLS handshake: it may not speak TLS", ep.address)
	}
	return failure(lookAtLog, "%v", err)
}

// lookAtLog is the fix for what only the Collector knows.
const lookAtLog = "look at the log of the Collector"

// isAlert finds the alerts that crypto/tls has in a type of its own.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// headerCount is how many headers each request has.
func headerCount(o otlp.Config) int {
	if o.Headers == nil {
		return 0
	}
	headers, _ := o.Headers() // the check of the environment has read them
	return len(headers)
}

// checkCollector sends an empty request. Where it fails, the endpoint is asked
// what it speaks, since the errors of a wrong protocol do not say.
func (d *doctor) checkCollector(ctx context.Context, ep endpoint) finding {
	if !d.reachable {
		return skipped("there is no connection")
	}
	// Half of the time is for finding out why it failed.
	attempt, cancel := context.WithTimeout(ctx, checkTimeout/2)
	err := otlp.Probe(attempt, d.cfg.OTLP)
	cancel()
	if err == nil {
		names := "no headers"
		if n := headerCount(d.cfg.OTLP); n > 0 {
			names = fmt.Sprintf("%d headers", n)
		}
		return good("it accepts a request (%s, %s)", d.cfg.OTLP.Protocol, names)
	}
	// Through a proxy the peer cannot be talked to in another way than the
	// settings' own.
	peer := unknownPeer
	if ep.proxy() == nil {
		peer = speaks(ctx, ep)
	}
	return collectorFailure(err, peer, ep, d.cfg.OTLP)
}

// collectorFailure names the setting behind an answer. What the server itself
// said of our credentials comes first: nothing else can be wrong if it got that
// far. Then comes what it turns out to speak, since the libraries' errors for the
// wrong protocol name frames and bytes, and no setting.
func collectorFailure(err error, peer string, ep endpoint, o otlp.Config) finding {
	// The answer itself, where there is one: its code is the most that is known.
	code := codes.OK // of an answer over gRPC
	if s, ok := grpcstatus.FromError(err); ok {
		code = s.Code()
	}
	web := 0 // the status of an answer over HTTP
	if answer := (*otlp.StatusError)(nil); errors.As(err, &answer) {
		web = answer.Code
	}
	header := "set the header that the Collector requires in UNITMETER_OTLP_HEADERS_FILE or OTEL_EXPORTER_OTLP_HEADERS"
	switch {
	case code == codes.Unauthenticated, web == http.StatusUnauthorized:
		return failure(header, "the Collector rejects the credentials (%d headers are set): %s", headerCount(o), err)
	case code == codes.PermissionDenied, web == http.StatusForbidden:
		return failure(header, "the credentials do not allow sending metrics (%d headers are set): %s", headerCount(o), err)
	case peer == peerTLS && ep.plain:
		return failure("set OTEL_EXPORTER_OTLP_ENDPOINT="+ep.at("https://", ep.address), "%s speaks TLS, and the settings have it off: %s", ep.address, err)
	case peer == peerPlain && !ep.plain:
		return failure("set OTEL_EXPORTER_OTLP_ENDPOINT="+ep.at("http://", ep.address), "%s does not speak TLS: %s", ep.address, err)
	case peer == peerHTTP1 && ep.grpc:
		return failure("set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or the endpoint to the port for grpc (4317)",
			"%s speaks HTTP/1 and not gRPC: %s", ep.address, err)
	case peer == peerHTTP2 && !ep.grpc && (web == 0 || web == http.StatusUnsupportedMediaType):
		return failure("set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or the endpoint to the port for HTTP (4318)",
			"%s speaks gRPC: %s", ep.address, err)
	case web == http.StatusNotFound, web == http.StatusMethodNotAllowed, web >= 300 && web < 400:
		return failure("set OTEL_EXPORTER_OTLP_ENDPOINT to the Collector's OTLP/HTTP address, such as "+ep.at(ep.scheme(), net.JoinHostPort(cmp.Or(ep.host, "localhost"), "4318")),
			"a web server answers that does not accept OTLP metrics: %s", err)
	// A Collector without a metrics pipeline has no such service.
	case code == codes.Unimplemented:
		return failure("add the otlp receiver to a metrics pipeline of the Collector", "it speaks gRPC and does not accept metrics: %s", err)
	case code == codes.ResourceExhausted, web == http.StatusTooManyRequests, web == http.StatusServiceUnavailable:
		return failure("look at the log of the Collector: it is overloaded", "%s", err)
	case web != 0:
		return failure(lookAtLog, "%s", err)
	case peer == unknownPeer:
		return failure("set OTEL_EXPORTER_OTLP_ENDPOINT to an OTLP receiver ("+usualEndpoint(ep)+")", "the server at %s does not speak OTLP: %s", ep.address, err)
	}
	return failure(lookAtLog, "%s", err)
}
