package exporter

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"sync"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/receiver"
)

// Source knows the sweep behind the metrics that are being exported.
type Source interface {
	// Last returns the latest sweep; nil before the first one.
	Last() *receiver.Sweep
}

// Config tells an Exporter what to send and how. The caller has read
// OTEL_EXPORTER_OTLP_*: the exporter takes nothing from there but the form of
// histograms, and the headers where Headers is nil.
type Config struct {
	// Protocol is "grpc", "http/protobuf", or "none" for an exporter that
	// sends nothing and only commits the ledger. Default: DefaultProtocol.
	Protocol string
	// Endpoint is a gRPC target ("host:port", "unix:/path") or, for HTTP, the
	// whole URL. Needed unless Protocol is "none".
	Endpoint string
	// Insecure says that the connection to Endpoint has no TLS. HTTP has it in
	// the URL.
	Insecure bool
	// TLS returns the roots to trust and the client's certificate. It is asked
	// before each connection, and answers with the same pointer as long as nothing
	// has changed. With an error come the settings of before. It must be safe for
	// concurrent use. Default: the system's roots, and no client certificate.
	TLS func() (*tls.Config, error)
	// Gzip compresses requests.
	Gzip bool
	// Timeout bounds one call. Default: DefaultTimeout.
	Timeout time.Duration
	// Headers returns the headers of the next request, instead of those of
	// OTEL_EXPORTER_OTLP_HEADERS. With an error come those of before. It must be
	// safe for concurrent use. Default: those of the variable.
	Headers func() (map[string]string, error)
	// Temporality is "cumulative", "delta" or "lowmemory", as in
	// OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE. Default:
	// DefaultTemporality.
	Temporality string
	// Source has the sweep of each cycle. Without one, points of the unit
	// instruments are dropped: their start times are not known.
	Source Source
	// Ledger is the state that the Source started from. Deltas go on from its
	// totals.
	Ledger receiver.State
	// Outbox makes cycles durable. Default: none, requests are sent directly.
	Outbox Outbox
	// Logger gets changes of state: a failure when it begins and when it is
	// over. Default: none.
	Logger *slog.Logger
}

// Exporter is the metric.Exporter of the one reader that commits cycles. A
// second reader beside it (console, Prometheus) must have an exporter of its
// own. All methods are safe for concurrent use.
//
// The order at the end: the MeterProvider's Shutdown makes a last cycle, Export
// commits it, Shutdown drains the outbox until its context ends, then closes the
// connection. The caller closes the outbox after that.
type Exporter struct {
	source      Source
	outbox      Outbox
	selector    sdkmetric.TemporalitySelector
	tally       *tally
	*connection                    // nil: protocol "none"
	sender      *sender            // nil without outbox or connection
	stop        context.CancelFunc // ends the sender at once
	timeout     time.Duration      // of one call

	calling sync.Mutex // held for the length of a call: one at a time keeps the order

	mu     sync.Mutex // held for the length of an Export
	deltas *deltas    // nil: cumulative
	owed   [][]byte   // the rest of a request of which a part is accepted
	closed bool
	encode episode
}

// New makes an Exporter and starts its sender, which Shutdown ends. The context
// bounds New only. It fails for unknown settings, not for a receiver that cannot
// be reached.
func New(ctx context.Context, cfg Config) (*Exporter, error) {
	e := &Exporter{source: cfg.Source, outbox: cfg.Outbox, stop: func() {}, timeout: cmp.Or(cfg.Timeout, DefaultTimeout)}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	e.tally, e.encode = newTally(log), episode{logger: log}
	switch cmp.Or(cfg.Temporality, DefaultTemporality) {
	case "cumulative":
		e.selector = sdkmetric.CumulativeTemporalitySelector
	case "delta":
		e.selector = sdkmetric.DeltaTemporalitySelector
		e.deltas = newDeltas(cfg.Ledger)
	case "lowmemory":
		e.selector = sdkmetric.LowMemoryTemporalitySelector
	default:
		return nil, fmt.Errorf("make exporter: unknown temporality %q; set OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE to cumulative, delta or lowmemory", cfg.Temporality)
	}
	if cfg.Protocol == "none" {
		return e, nil
	}
	c, err := open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	e.connection, e.tally.target = c, c.target
	if e.outbox != nil {
		// The sender outlives New's context by design.
		var running context.Context
		running, e.stop = context.WithCancel(context.WithoutCancel(ctx))
		e.sender = newSender(e.outbox, e.tally, log, e.call)
		go e.sender.run(running)
	}
	return e, nil
}

// Temporality implements metric.Exporter. Observable counters are always asked
// for as cumulative: Export makes their deltas, since the SDK's begin with the
// whole counter, after a gap as well.
func (e *Exporter) Temporality(kind sdkmetric.InstrumentKind) metricdata.Temporality {
	if kind == sdkmetric.InstrumentKindObservableCounter {
		return metricdata.CumulativeTemporality
	}
	return e.selector(kind)
}

// Aggregation implements metric.Exporter.
func (e *Exporter) Aggregation(kind sdkmetric.InstrumentKind) sdkmetric.Aggregation {
	if e.connection == nil {
		return sdkmetric.DefaultAggregationSelector(kind)
	}
	return e.official.Aggregation(kind) // follows OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION
}

// Export hands one cycle over. It changes rm in place.
//
// With an outbox it returns when the cycle is durable, whether or not ctx has
// ended meanwhile: delivery is the sender's. If the outbox fails, and without
// one, it sends directly and returns when the request is answered or given up.
// A cycle that was not handed over is no error here: it is logged when the
// failures begin and when they are over, and the next cycle's totals and deltas
// include its bytes. Health tells the present state.
func (e *Exporter) Export(ctx context.Context, rm *metricdata.ResourceMetrics) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return sdkmetric.ErrExporterShutdown
	}
	var sweep *receiver.Sweep
	if e.source != nil {
		sweep = e.source.Last()
	}
	e.tally.drop(stamp(rm, sweep), "they have no series in the sweep, or more than OTLP can count")
	var next map[pointKey]mark
	if e.deltas != nil {
		next = e.deltas.convert(rm, sweep)
	}
	e.tally.early(leaveOutEarly(rm))
	cycle := Cycle{Sweep: sweep}
	if points := countPoints(rm); points > 0 && e.connection != nil {
		c, err := e.connection.encode(ctx, rm)
		if err != nil {
			e.encode.failed(slog.LevelError, "encode", "cannot encode some metrics; the cycle goes on with the others", err,
				"next", "report this as a bug, with the log")
		} else {
			e.encode.over("all metrics are encoded again")
		}
		if c.request != nil {
			cycle.Request, cycle.Points = c.request, points
		}
	}
	if e.handOver(ctx, cycle) && e.deltas != nil {
		e.deltas.advance(next, sweep)
	}
	return nil
}

// handOver commits the cycle or, where that cannot be, sends its request.
func (e *Exporter) handOver(ctx context.Context, cycle Cycle) bool {
	if e.outbox != nil {
		err := e.outbox.Commit(context.WithoutCancel(ctx), cycle)
		if err == nil {
			e.tally.commit.over("cycles are committed to the outbox again")
			if e.sender != nil && cycle.Request != nil {
				e.sender.kick()
			}
			return true
		}
		e.tally.commit.failed(slog.LevelError, "commit", "cannot commit to the outbox; metrics are sent directly and are lost while the receiver is away", err,
			"next", "check the space, the rights and the health of the disk under the state directory")
		if e.sender != nil && e.sender.behind() {
			// Points must not overtake older ones of their series. The next
			// cycle covers this one.
			return false
		}
	}
	if e.connection == nil {
		return e.outbox == nil
	}
	return e.direct(ctx, cycle)
}

// directTries bounds the calls for one request without an outbox. The next
// cycle says the same and more, so that waiting long for this one buys little.
const directTries = 3

// direct sends what is owed and then the request of the cycle, within the time
// of one call. It returns false if the next cycle must cover this one.
func (e *Exporter) direct(ctx context.Context, cycle Cycle) bool {
	ctx, cancel := context.WithTimeoutCause(ctx, e.timeout, errRequestTimeout)
	defer cancel()
	if len(e.owed) > 0 {
		left, _, last := e.deliver(ctx, e.owed)
		if len(left) > 0 && (last.verdict == suspect || last.verdict == tooLarge) {
			e.tally.poisoned(countRequest(left[0]), last, "it is dropped")
			left = left[1:]
		}
		if e.owed = left; len(left) > 0 {
			return false
		}
	}
	if cycle.Request == nil {
		return true
	}
	left, some, _ := e.deliver(ctx, [][]byte{cycle.Request})
	if !some {
		return false
	}
	// A delta must not cover again what was accepted, so the rest of a request
	// that was split is kept as it is.
	e.owed = left
	return true
}

// deliver sends requests in order and splits what is too large. It returns those
// that were not accepted, whether any was, and the last answer.
func (e *Exporter) deliver(ctx context.Context, requests [][]byte) (left [][]byte, some bool, last answer) {
	left = requests
	for failures := 0; len(left) > 0; {
		last = e.call(ctx, left[0])
		if last.verdict == accepted {
			e.tally.accepted(countRequest(left[0]), last)
			left, some, failures = left[1:], true, 0
			continue
		}
		if last.verdict == tooLarge {
			if head, tail, err := split(left[0]); err == nil && tail != nil {
				left = append([][]byte{head, tail}, left[1:]...)
				continue
			}
		}
		if context.Cause(ctx) == context.Canceled {
			break // our own end, not the receiver's answer
		}
		failures++
		e.tally.failed(last, "the next cycle covers this one")
		again := last.verdict == transient || last.verdict == unreachable
		if !again || failures == directTries || !pause(ctx, last.backoff(failures, e.timeout)) {
			break
		}
	}
	if !some {
		left = requests // not their halves
	}
	return left, some, last
}

// pause waits for d. It returns false at once if ctx ends before that.
func pause(ctx context.Context, d time.Duration) bool {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= d {
		return false
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// call makes one attempt at a time.
func (e *Exporter) call(ctx context.Context, request []byte) answer {
	e.calling.Lock()
	defer e.calling.Unlock()
	return e.wire.send(ctx, request)
}

// Health returns how delivery goes.
func (e *Exporter) Health() Health { return e.tally.health() }

// ForceFlush implements metric.Exporter: it waits until the outbox is empty. It
// returns the reason if entries are being held, and ctx's error when that ends.
func (e *Exporter) ForceFlush(ctx context.Context) error {
	if e.sender == nil {
		return ctx.Err()
	}
	if err := e.sender.flush(ctx); err != nil {
		return fmt.Errorf("flush the outbox: %w", err)
	}
	return nil
}

// Shutdown implements metric.Exporter. It drains the outbox until it is empty or
// ctx ends, stops the sender, and closes the connection. What remains in the
// outbox is no error: it is sent after the next start.
func (e *Exporter) Shutdown(ctx context.Context) error {
	e.mu.Lock()
	closed := e.closed
	e.closed = true
	for _, request := range e.owed {
		e.tally.drop(countRequest(request), "the agent ends before the receiver took all parts of a request")
	}
	e.owed = nil
	e.mu.Unlock()
	if closed {
		return sdkmetric.ErrExporterShutdown
	}
	if e.sender != nil {
		close(e.sender.drain)
		select {
		case <-e.sender.done:
		case <-ctx.Done():
		}
		e.stop()
		<-e.sender.done // ends at once: its calls and waits have its context
	}
	if e.connection == nil {
		return nil
	}
	return e.connection.close(ctx)
}
