package doctor

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"time"
)

// What an endpoint turns out to speak. It is found out only after a request has
// failed: a Collector that works sees no more than that one request.
const (
	unknownPeer = "unknown"
	peerTLS     = "TLS"
	peerPlain   = "no TLS"
	peerHTTP1   = "HTTP/1"
	peerHTTP2   = "HTTP/2"
)

// speaks finds out what an endpoint speaks, with TLS where the settings have
// it. HTTP/2 without HTTP/1 is taken for gRPC.
func speaks(ctx context.Context, ep endpoint) string {
	tlsWorks, alpn := handshakes(ctx, ep)
	switch {
	case ep.plain && tlsWorks:
		return peerTLS
	case !ep.plain && !tlsWorks:
		return peerPlain
	case !ep.plain && alpn == "http/1.1":
		return peerHTTP1
	case !ep.plain && alpn == "h2":
		return peerHTTP2
	case !ep.plain:
		return unknownPeer
	}
	return greet(ctx, ep)
}

// handshakes tries TLS, whatever the certificate. ALPN says what is behind.
func handshakes(ctx context.Context, ep endpoint) (ok bool, alpn string) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	// Nothing is sent over this connection, so nobody needs to be trusted.
	cfg := &tls.Config{InsecureSkipVerify: true, ServerName: ep.host, NextProtos: []string{"h2", "http/1.1"}}
	if !ep.grpc {
		cfg.NextProtos = []string{"http/1.1", "h2"}
	}
	conn, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, ep.network, ep.address)
	if err != nil {
		// A server that refuses our protocols or certificate does speak TLS.
		return isAlert(err), ""
	}
	defer conn.Close()
	return true, conn.(*tls.Conn).ConnectionState().NegotiatedProtocol
}

// greet begins HTTP/2 with prior knowledge, as gRPC does. A gRPC server answers
// with its settings; one that only knows HTTP/1 complains in HTTP/1.
func greet(ctx context.Context, ep endpoint) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, ep.network, ep.address)
	if err != nil {
		return unknownPeer
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	// A peer that waits for more than this must not hold up the doctor.
	if conn.SetDeadline(deadline) != nil {
		return unknownPeer
	}
	const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00" // an empty SETTINGS frame
	if _, err := io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+settings); err != nil {
		return unknownPeer
	}
	// The header of one frame, which is long enough for "HTTP/1.1 " as well.
	answer := make([]byte, 9)
	if _, err := io.ReadFull(conn, answer); err != nil {
		return unknownPeer
	}
	switch {
	case answer[3] == 4: // the type of the frame: SETTINGS
		return peerHTTP2
	// "HTTP/1.1 400 Bad Request" to the preface, mostly.
	case bytes.HasPrefix(answer, []byte("HTTP/1")):
		return peerHTTP1
	}
	return unknownPeer
}
