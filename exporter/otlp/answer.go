package otlp

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Verdict is what an answer means for the request (OTLP specification, "OTLP/gRPC
// response" and "OTLP/HTTP response"; the specification leaves open what to do
// with data that is refused, see the comments).
type Verdict int

const (
	// Accepted: the receiver has it, though it may have rejected some points.
	Accepted Verdict = iota
	// Transient: try again later.
	Transient
	// Unreachable: nobody answered. Like Transient, but tried more often, since
	// a try costs the receiver nothing.
	Unreachable
	// Misconfigured: the receiver, or its door, refuses us rather than the
	// data. The data is good, so it is held until somebody corrects the setting.
	Misconfigured
	// TooLarge: the request must be split.
	TooLarge
	// Doubtful: the receiver is in trouble, perhaps over this very data, or takes it
	// only later. It is held, and others are tried meanwhile.
	Doubtful
	// Suspect: the receiver may refuse this very data. It does if, since then, it
	// has accepted other data.
	Suspect
)

// Answer is the outcome of one call.
type Answer struct {
	Verdict Verdict
	// Kind names the answer in logs ("Unavailable", "HTTP 503", "connection").
	Kind string
	// Err is nil when accepted.
	Err error
	// After is the delay that the receiver asked for; 0 when it did not.
	After time.Duration
	// Rejected and Message are a partial success's.
	Rejected int64
	Message  string
	// Slow says that our own deadline ended the call.
	Slow bool
	// Ahead is by how much our clock is ahead of the receiver's; 0 where that is
	// less than a minute, or not known.
	Ahead time.Duration
}

// MaxAsked caps the delay that a receiver may ask for, so that a bad value cannot
// silence the agent.
const MaxAsked = 5 * time.Minute

// ErrTimeout is the cause of a call that our own deadline ended.
var ErrTimeout = errors.New("no answer within the time of OTEL_EXPORTER_OTLP_TIMEOUT")

// aboutTLS says that the two sides do not agree on their certificates. gRPC has
// only the text of that error.
func (a Answer) aboutTLS() bool { return a.says("x509:", "tls:", "certificate") }

// tooOld says that Prometheus refuses points from before what it has. There is
// only the text of that error (storage.ErrOutOfBounds and others).
func (a Answer) tooOld() bool {
	return a.says("out of bounds", "out of order sample", "too old sample")
}

// tooNew says that the receiver refuses points of a time that is still to come, in
// the words of Prometheus, Mimir or Cortex. Prometheus has words that it also uses
// for points of the past. Then only the clocks tell.
func (a Answer) tooNew() bool {
	return a.says("in the future", "in-future", "too new") || a.Ahead > 0 && a.says("out of bounds", "timestamp")
}

// says reports whether the text of the error, or of a partial success, has any of
// the parts.
func (a Answer) says(parts ...string) bool {
	text := a.Message
	if a.Err != nil {
		text = a.Err.Error()
	}
	text = strings.ToLower(text)
	return slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(text, strings.ToLower(part)) })
}

// aboutSize says that the request is too large, however the receiver puts it. The
// words of a rate or a quota are not among them.
func (a Answer) aboutSize() bool {
	return a.says("too large", "too big", "larger than", "max size", "maximum size", "size limit", "message size", "body size")
}

// Cause names what the log tells from what it said last.
func (a Answer) Cause() string {
	if a.aboutTLS() {
		return "TLS"
	}
	return a.Kind
}

// Hint is the next step for a person who reads the log.
func (a Answer) Hint() string {
	switch {
	case a.says("does not look like a TLS handshake", "HTTP response to HTTPS client"):
		return "the receiver has no TLS: write http:// in front of OTEL_EXPORTER_OTLP_ENDPOINT"
	case a.aboutTLS():
		return "check OTEL_EXPORTER_OTLP_CERTIFICATE, _CLIENT_CERTIFICATE and _CLIENT_KEY against the receiver's certificate"
	case a.tooNew() && a.Ahead > 0:
		return fmt.Sprintf("correct the clock of this host (timedatectl), which is %v ahead of the receiver's; until its clock passes the points' times, they wait", a.Ahead.Round(time.Second))
	case a.tooNew():
		return "compare the clocks of this host and of the receiver (timedatectl); until the receiver's clock passes the points' times, they wait"
	case a.Verdict == Accepted && a.says("cumulative") && !a.says("delta"):
		return "the receiver may accept deltas only: set OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta"
	case a.says("temporality", "delta"):
		return "the receiver may not accept deltas: set OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=cumulative"
	case a.Verdict == Unreachable:
		return "check OTEL_EXPORTER_OTLP_ENDPOINT and that the receiver runs there"
	case a.Verdict == Misconfigured:
		return "check OTEL_EXPORTER_OTLP_ENDPOINT (protocol and path) and the credentials in OTEL_EXPORTER_OTLP_HEADERS"
	case a.tooOld():
		return "the receiver refuses points as old as the outage: in Prometheus, set storage.tsdb.out_of_order_time_window to more than its length"
	case a.Verdict != Accepted && (a.aboutSize() || a.Kind == "HTTP 413" || a.says("received from server: 413")):
		return "raise the limit for the size of a request, at the receiver or at the proxy before it: a single point exceeds it"
	case a.Verdict == Accepted:
		return "look at the receiver's log for why it refuses the points"
	case a.Verdict == Suspect, a.Verdict == TooLarge:
		return "look at the receiver's log for why it refuses the request"
	}
	return "no action needed if the receiver recovers; otherwise look at its log"
}

// Backoff is the delay before the next try after the given number of failures in
// a row (1 or more): a random part of 1 s, 2 s, 4 s ... ("full jitter"), so that
// many agents do not come back in step, and never less than the receiver asked
// for.
func (a Answer) Backoff(failures int, most time.Duration) time.Duration {
	const floor = 100 * time.Millisecond // a draw near 0 would be a busy loop
	if a.Verdict == Unreachable {
		most = min(most, 15*time.Second)
	}
	ceiling := most
	if shift := failures - 1; shift < 6 {
		ceiling = min(most, time.Second<<shift)
	}
	wait := floor + rand.N(max(ceiling-floor, 1))
	if a.Verdict == Misconfigured {
		// Nothing recovers by itself here: do not knock more than needed.
		wait = max(wait, most/4)
	}
	return max(wait, min(a.After, MaxAsked))
}

// String returns the verdict in words.
func (v Verdict) String() string {
	return [...]string{"accepted", "transient", "unreachable", "misconfigured", "too large", "doubtful", "suspect"}[v]
}
