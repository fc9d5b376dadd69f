package exporter

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// t0 is when the units of the tests started to count, long before the agent.
var t0 = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func at(s float64) time.Time { return t0.Add(time.Duration(s * float64(time.Second))) }

// series has four totals, n, 2n, 3n and 4n: no two are alike, so that a mix-up
// shows.
func series(id ledger.ID, start, now time.Time, n uint64) ledger.Series {
	return ledger.Series{ID: id, Start: start, Time: now, Observed: true, Total: counters(n)}
}

func counters(n uint64) ledger.Counters {
	return ledger.Counters{Received: ledger.Traffic{Bytes: n, Packets: 3 * n}, Sent: ledger.Traffic{Bytes: 2 * n, Packets: 4 * n}}
}

func unit(name string, start, now time.Time, n uint64) ledger.Series {
	return series(ledger.ID{Kind: ledger.Unit, Name: name}, start, now, n)
}

func overflow(start, now time.Time, n uint64) ledger.Series {
	return series(ledger.ID{Kind: ledger.Overflow}, start, now, n)
}

func unattributed(slice string, start, now time.Time, n uint64) ledger.Series {
	return series(ledger.ID{Kind: ledger.Unattributed, Name: slice}, start, now, n)
}

// state has each series in the room of its kind.
func state(list ...ledger.Series) (state ledger.State) {
	for _, s := range list {
		switch s.Kind {
		case ledger.Overflow:
			state.Overflow = &s
		case ledger.Unattributed:
			state.Balances = append(state.Balances, ledger.Balance{Slice: s.Name, Unattributed: s})
		default:
			state.Series = append(state.Series, s)
		}
	}
	return state
}

// sweepAt is a sweep of the host "h".
func sweepAt(now time.Time, state ledger.State) *receiver.Sweep {
	return receiver.NewSweep(now, receiver.Config{HostName: "h"}, state)
}

// host plays the receiver: it observes its current sweep with the real SDK.
type host struct {
	sweep    atomic.Pointer[receiver.Sweep]
	provider *sdkmetric.MeterProvider
}

func (h *host) Last() *receiver.Sweep { return h.sweep.Load() }

// Sweep is the current one, of which no two scrapes are.
func (h *host) Sweep(context.Context) *receiver.Sweep { return h.Last() }

// meter makes the agent's pipeline with an hour between cycles, so that only
// cycle makes any.
func (h *host) meter(t testing.TB, exp sdkmetric.Exporter, readers ...sdkmetric.Reader) {
	t.Helper()
	opts := []sdkmetric.Option{
		sdkmetric.WithResource(resource.NewSchemaless(attribute.String("service.name", "unitmeter"))),
		sdkmetric.WithCardinalityLimit(0),
		sdkmetric.WithReader(sdkmetric.NewPeriodicReader(exp, sdkmetric.WithInterval(time.Hour))),
	}
	for _, r := range readers {
		opts = append(opts, sdkmetric.WithReader(r))
	}
	h.provider = sdkmetric.NewMeterProvider(opts...)
	meter := h.provider.Meter("receiver")
	io, err := meter.Int64ObservableCounter(receiver.IOName, metric.WithUnit("By"))
	if err != nil {
		t.Fatal(err)
	}
	packets, err := meter.Int64ObservableCounter(receiver.PacketCountName, metric.WithUnit("{packet}"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		sweep := h.Last()
		if sweep == nil {
			return nil
		}
		for s, attrs := range sweep.All() {
			if s.Observed {
				in, out := metric.WithAttributeSet(attrs.Receive), metric.WithAttributeSet(attrs.Transmit)
				o.ObserveInt64(io, int64(s.Total.Received.Bytes), in)
				o.ObserveInt64(io, int64(s.Total.Sent.Bytes), out)
				o.ObserveInt64(packets, int64(s.Total.Received.Packets), in)
				o.ObserveInt64(packets, int64(s.Total.Sent.Packets), out)
			}
		}
		return nil
	}, io, packets)
	if err != nil {
		t.Fatal(err)
	}
}

// see sets the sweep of the next cycle.
func (h *host) see(list ...ledger.Series) {
	var last time.Time
	for _, s := range list {
		if s.Time.After(last) {
			last = s.Time
		}
	}
	h.sweep.Store(sweepAt(last, state(list...)))
}

// cycle makes a cycle with the given series and returns what ForceFlush does.
func (h *host) cycle(list ...ledger.Series) error {
	h.see(list...)
	return h.provider.ForceFlush(context.Background())
}

// memory is an Outbox in memory.
type memory struct {
	mu      sync.Mutex
	lastID  int64
	entries []Entry
	cycles  []Cycle
	poison  map[int64]string
	partial Partial // of the last entry that is done
	// fail makes a method fail.
	failCommit, failNext, failDone error
}

func (m *memory) Commit(ctx context.Context, c Cycle) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if m.failCommit != nil {
		return m.failCommit
	}
	m.cycles = append(m.cycles, c)
	if c.Request != nil {
		m.add(c.Points, c.Request)
	}
	return nil
}

func (m *memory) add(points int, request []byte) {
	m.lastID++
	m.entries = append(m.entries, Entry{ID: m.lastID, Points: points, Request: request})
}

func (m *memory) Next(_ context.Context, after int64, maxBytes int) ([]Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failNext != nil {
		return nil, m.failNext
	}
	entries := slices.DeleteFunc(slices.Clone(m.entries), func(e Entry) bool { return e.ID <= after })
	n, size := 0, 0
	for n < len(entries) && (n == 0 || size+len(entries[n].Request) <= maxBytes) {
		size += len(entries[n].Request)
		n++
	}
	return entries[:n], nil
}

func (m *memory) Done(_ context.Context, outcomes ...Outcome) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failDone != nil {
		return m.failDone
	}
	for _, o := range outcomes {
		if len(m.entries) == 0 || m.entries[0].ID != o.ID {
			return fmt.Errorf("outcome for %d is not for the first entry", o.ID)
		}
		m.entries, m.partial = m.entries[1:], o.Partial
		if o.Poison != "" {
			if m.poison == nil {
				m.poison = make(map[int64]string)
			}
			m.poison[o.ID] = o.Poison
		}
	}
	return nil
}

func (m *memory) set(f func(*memory)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(m)
}

func (m *memory) pending() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.entries)
}

// logged keeps log lines.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// lines returns the lines that contain text.
func (l *logged) lines(text string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []string
	for line := range strings.Lines(l.buf.String()) {
		if strings.Contains(line, text) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

func (l *logged) want(t testing.TB, text string, n int) {
	t.Helper()
	if got := l.lines(text); len(got) != n {
		t.Errorf("%d log lines with %q, want %d; the log:\n%s", len(got), text, n, strings.Join(l.lines(""), "\n"))
	}
}
