package exporter

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"sync"

	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// Source knows the sweep behind the metrics that are being exported.
type Source interface {
	// Last returns the latest sweep; nil before the first one.
	Last() *receiver.Sweep
}

// DefaultTemporality applies where Config.Temporality is empty.
const DefaultTemporality = "cumulative"

// Config tells an Exporter what to send and how.
type Config struct {
	// OTLP says where requests go. Nil for an exporter that sends nothing and
	// only commits the ledger.
	OTLP *otlp.Config
	// Temporality is "cumulative", "delta" or "lowmemory", as in
	// OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE. Default:
	// DefaultTemporality.
	Temporality string
	// Source has the sweep of each cycle. Without one, points of the unit
	// instruments are dropped: their start times are not known.
	Source Source
	// Sent is the state that the Source started from, with the totals up to which
	// deltas were handed over. Deltas go on from them.
	Sent ledger.State
	// Outbox makes cycles durable. Default: none, requests wait in memory.
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
	source   Source
	outbox   Outbox
	selector sdkmetric.TemporalitySelector
	counts   *counts
	client   *otlp.Client       // nil: it sends nothing
	sender   *sender            // nil without client
	stop     context.CancelFunc // ends the sender at once

	mu         sync.Mutex // held for the length of an Export
	deltas     *deltas    // nil: cumulative
	attributes map[attribute.Distinct]otlp.Attributes
	closed     bool
	encoding   episode
}

// New makes an Exporter and starts its sender, which Shutdown ends. The context
// bounds New only. It fails for unknown settings, not for a receiver that cannot
// be reached.
func New(ctx context.Context, cfg Config) (*Exporter, error) {
	e := &Exporter{source: cfg.Source, outbox: cfg.Outbox, stop: func() {}, attributes: map[attribute.Distinct]otlp.Attributes{}}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	e.counts, e.encoding = newCounts(log), episode{logger: log}
	switch cmp.Or(cfg.Temporality, DefaultTemporality) {
	case "cumulative":
		e.selector = sdkmetric.CumulativeTemporalitySelector
	case "delta":
		e.selector = sdkmetric.DeltaTemporalitySelector
		e.deltas = newDeltas(cfg.Sent)
	case "lowmemory":
		e.selector = sdkmetric.LowMemoryTemporalitySelector
	default:
		return nil, fmt.Errorf("make exporter: unknown temporality %q; set OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE to cumulative, delta or lowmemory", cfg.Temporality)
	}
	if cfg.OTLP == nil {
		return e, nil
	}
	to := *cfg.OTLP
	to.Logger = cmp.Or(to.Logger, log)
	var err error
	if e.client, err = otlp.Open(ctx, to); err != nil {
		return nil, err
	}
	e.counts.target, e.counts.hint = e.client.Target(), e.client.Hint
	// The sender outlives New's context by design.
	var running context.Context
	running, e.stop = context.WithCancel(context.WithoutCancel(ctx))
	e.sender = newSender(e.outbox, e.counts, log, e.client.Send)
	go e.sender.run(running)
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
	if e.client == nil {
		return sdkmetric.DefaultAggregationSelector(kind)
	}
	return e.client.Aggregation(kind)
}

// Export hands one cycle over. It changes rm in place.
//
// It returns when the cycle is durable or, if the outbox fails and without one, in
// memory, even if ctx has ended meanwhile. The sender delivers it later. A cycle that
// was not handed over gives no error here. The first such failure and their end are
// logged, and the next cycle's totals and deltas include its bytes. Health has the
// present state.
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
	cycle := Cycle{Sweep: sweep}
	if e.client != nil {
		cycle.Request, cycle.Points = e.request(ctx, rm, sweep)
		if e.deltas != nil && sweep != nil {
			cycle.Behind = e.deltas.behind(&sweep.State)
		}
	}
	if e.handOver(ctx, cycle) && e.deltas != nil {
		e.deltas.advance(sweep)
	}
	return nil
}

// request makes the request of a cycle, nil if there is nothing to send.
func (e *Exporter) request(ctx context.Context, rm *metricdata.ResourceMetrics, sweep *receiver.Sweep) (request []byte, points int) {
	read := cumulative
	metrics := takeUnitMetrics(rm)
	if e.deltas != nil {
		e.deltas.begin()
		e.deltas.convert(rm)
		read = e.deltas.read
	}
	made := make(map[string]*otlp.Points, len(metrics))
	left := eachPoint(metrics, sweep, read, func(m *unitMetric, attributes attribute.Set, start, end, value int64) {
		p := made[m.name]
		if p == nil {
			p = &otlp.Points{}
			made[m.name] = p
		}
		p.Add(e.encoded(attributes), start, end, value, m.collected)
	})
	if sweep != nil && len(e.attributes) > 2*len(sweep.State.Series)+1000 { // half are of no use
		clear(e.attributes)
	}
	e.counts.drop(left.unknown+left.huge, "there is no sweep behind them, or they are more than OTLP can count")
	e.counts.early(left.early + leaveOutEarly(rm))
	eachSum(rm, func(name string, sum *metricdata.Sum[int64]) (keep bool) {
		return len(sum.DataPoints) > 0 || made[name] != nil
	})

	request, points, err := e.client.Encode(ctx, rm, made)
	if err != nil {
		e.encoding.failed(slog.LevelError, "encode", "cannot encode some metrics; the cycle goes on with the others", err,
			"next", "report this as a bug, with the log")
	} else {
		e.encoding.over("all metrics are encoded again")
	}
	if points == 0 {
		return nil, 0
	}
	return request, points
}

// encoded returns a set as a point has it. Sets stay the same over cycles.
func (e *Exporter) encoded(set attribute.Set) otlp.Attributes {
	fields, ok := e.attributes[set.Equivalent()]
	if !ok {
		fields = otlp.EncodeAttributes(set)
		e.attributes[set.Equivalent()] = fields
	}
	return fields
}

// handOver commits the cycle or, where that cannot be, keeps its request in memory. It
// returns false if the next cycle must cover this one.
func (e *Exporter) handOver(ctx context.Context, cycle Cycle) bool {
	durable := e.outbox != nil
	if durable {
		err := e.outbox.Commit(context.WithoutCancel(ctx), cycle)
		if durable = err == nil; durable {
			e.counts.commit.over("cycles are committed to the outbox again")
		} else {
			e.counts.commit.failed(slog.LevelError, "commit", "cannot commit to the outbox; metrics wait in memory, and are lost if the agent ends", err,
				"next", "check the space, the rights and the health of the disk under the state directory")
			if e.sender == nil || e.sender.behind() {
				return false // points must not overtake older ones of their series
			}
		}
	}
	if e.sender == nil || cycle.Request == nil {
		return true
	}
	if !durable && !e.sender.queue.add(cycle) {
		return false
	}
	e.sender.kick()
	return true
}

// Health returns how delivery goes.
func (e *Exporter) Health() Health { return e.counts.health() }

// ForceFlush implements metric.Exporter: it waits until all is delivered. It
// returns the reason if entries are being held, and ctx's error when that ends.
func (e *Exporter) ForceFlush(ctx context.Context) error {
	if e.sender == nil {
		return ctx.Err()
	}
	if err := e.sender.flush(ctx); err != nil {
		return fmt.Errorf("deliver all metrics: %w", err)
	}
	return nil
}

// Shutdown implements metric.Exporter. It delivers until nothing is left or ctx ends,
// stops the sender, and closes the connection. What remains in the outbox is no error:
// it is sent after the next start. What remains in memory is lost, and counted.
func (e *Exporter) Shutdown(ctx context.Context) error {
	e.mu.Lock()
	closed := e.closed
	e.closed = true
	e.mu.Unlock()
	if closed {
		return sdkmetric.ErrExporterShutdown
	}
	if e.client == nil {
		return nil
	}
	close(e.sender.drain)
	select {
	case <-e.sender.done:
	case <-ctx.Done():
	}
	e.stop()
	<-e.sender.done // ends at once: its calls and waits have its context
	e.counts.drop(e.sender.queue.drop(), "the agent ends before the receiver took them, and no state could keep them")
	return e.client.Close(ctx)
}
