package exporter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// A wire makes single delivery attempts. It is safe for concurrent use, but the
// exporter makes one call at a time to keep requests in order.
type wire interface {
	// send makes one attempt to deliver a serialized request and returns when
	// it is answered, failed, or timed out.
	send(ctx context.Context, request []byte) answer
}

// verdict is what an answer means for the request (OTLP specification, "OTLP/gRPC
// response" and "OTLP/HTTP response"; the specification leaves open what to do
// with data that is refused, see the comments).
type verdict int

const (
	// accepted: the receiver has it, though it may have rejected some points.
	accepted verdict = iota
	// transient: try again later.
	transient
	// unreachable: nobody answered. Like transient, but tried more often, since
	// a try costs the receiver nothing.
	unreachable
	// misconfigured: the receiver, or its door, refuses us rather than the
	// data. The data is good, so it is held until somebody mends the setting.
	misconfigured
	// tooLarge: the request must be split.
	tooLarge
	// suspect: the receiver may refuse this very data. Tried a few times, then
	// set aside, so that one request cannot block all others for ever.
	suspect
)

// answer is the outcome of one delivery attempt.
type answer struct {
	verdict verdict
	// kind names the answer in logs ("Unavailable", "HTTP 503", "connection").
	kind string
	// err is nil when accepted.
	err error
	// after is the delay that the receiver asked for; 0 when it did not.
	after time.Duration
	// rejected and message are a partial success's.
	rejected int64
	message  string
	// tries is how often a suspect request is tried in all.
	tries int
	// slow says that our own deadline ended the attempt.
	slow bool
}

const (
	// dataTries is for answers that blame the data and would hardly change.
	dataTries = 3
	// doubtTries is for answers that may as well blame the server: with the
	// delays of backoff they span minutes.
	doubtTries = 8
	// maxAsked caps the delay that a receiver may ask for, so that a bad value
	// cannot silence the agent.
	maxAsked = 5 * time.Minute
)

// errRequestTimeout is the cause of an attempt that our own deadline ended.
var errRequestTimeout = errors.New("no answer within the time of OTEL_EXPORTER_OTLP_TIMEOUT")

// aboutTLS says that the two sides do not agree on their certificates. gRPC has
// only the text of that error.
func (a answer) aboutTLS() bool { return a.says("x509:", "tls:", "certificate") }

// tooOld says that Prometheus refuses points from before what it has. There is
// only the text of that error (storage.ErrOutOfBounds and others).
func (a answer) tooOld() bool {
	return a.says("out of bounds", "out of order sample", "too old sample")
}

// says reports whether the text of the error has any of the parts.
func (a answer) says(parts ...string) bool {
	return a.err != nil && slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(a.err.Error(), part) })
}

// cause names what the log tells from what it said last.
func (a answer) cause() string {
	if a.aboutTLS() {
		return "TLS"
	}
	return a.kind
}

// hint is the next step for a person who reads the log.
func (a answer) hint() string {
	switch {
	case a.says("does not look like a TLS handshake", "HTTP response to HTTPS client"):
		return "the receiver has no TLS: write http:// in front of OTEL_EXPORTER_OTLP_ENDPOINT"
	case a.aboutTLS():
		return "check OTEL_EXPORTER_OTLP_CERTIFICATE, _CLIENT_CERTIFICATE and _CLIENT_KEY against the receiver's certificate"
	case a.verdict == unreachable:
		return "check OTEL_EXPORTER_OTLP_ENDPOINT and that the receiver runs there"
	case a.verdict == misconfigured:
		return "check OTEL_EXPORTER_OTLP_ENDPOINT (protocol and path) and the credentials in OTEL_EXPORTER_OTLP_HEADERS"
	case a.tooOld():
		return "the receiver takes no points that are as old as the outage was long: in Prometheus, set storage.tsdb.out_of_order_time_window to more than that"
	case a.verdict == suspect, a.verdict == tooLarge:
		return "look at the receiver's log for why it refuses the request"
	}
	return "no action needed if the receiver recovers; otherwise look at its log"
}

// backoff is the delay before the next try after the given number of failures in
// a row (1 or more): a random part of 1 s, 2 s, 4 s ... ("full jitter"), so that
// many agents do not come back in step, and never less than the receiver asked
// for.
func (a answer) backoff(failures int, most time.Duration) time.Duration {
	const floor = 100 * time.Millisecond // a draw near 0 would be a busy loop
	if a.verdict == unreachable {
		most = min(most, 15*time.Second)
	}
	ceiling := most
	if shift := failures - 1; shift < 6 {
		ceiling = min(most, time.Second<<shift)
	}
	wait := floor + rand.N(max(ceiling-floor, 1))
	if a.verdict == misconfigured {
		// Nothing mends itself here: do not knock more than needed.
		wait = max(wait, most/4)
	}
	return max(wait, min(a.after, maxAsked))
}

func (v verdict) String() string {
	switch v {
	case accepted:
		return "accepted"
	case transient:
		return "transient"
	case unreachable:
		return "unreachable"
	case misconfigured:
		return "misconfigured"
	case tooLarge:
		return "too large"
	case suspect:
		return "suspect"
	}
	return fmt.Sprintf("verdict %d", int(v))
}
