package exporter

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/unitmeter/unitmeter/receiver"
)

// Health is how the delivery of metrics goes.
type Health struct {
	// Sent, Rejected and Dropped count data points since the start. Sent ones
	// were accepted by a receiver; rejected ones were refused by it for good (a
	// partial success or a poison request); dropped ones were not fit to be
	// sent: they had no series and so no right start time.
	Sent, Rejected, Dropped int64
	// Err is the latest failure to deliver or to commit; nil if the last
	// attempt went well.
	Err error
	// Since is when the failures began; zero without Err.
	Since time.Time
}

// tally counts points, and logs changes in their delivery. It is safe for
// concurrent use.
type tally struct {
	sent, rejected, dropped atomic.Int64

	log      *slog.Logger
	delivery episode // requests do not get through
	commit   episode // cycles cannot be made durable

	mu     sync.Mutex
	target string
	logged map[string]time.Time // by message: when it was logged last
}

func newTally(log *slog.Logger) *tally {
	return &tally{
		log: log, delivery: episode{logger: log}, commit: episode{logger: log},
		logged: make(map[string]time.Time),
	}
}

// accepted counts a request of so many points that the receiver took.
func (t *tally) accepted(points int, a answer) {
	rejected := min(max(a.rejected, 0), int64(points))
	t.sent.Add(int64(points) - rejected)
	t.rejected.Add(rejected)
	t.delivery.over("metrics are delivered again", "endpoint", t.target)
	switch {
	case rejected > 0:
		t.hourly(slog.LevelWarn, "the receiver refused some points (partial success); they are counted and not sent again",
			"rejected", rejected, "message", a.message, "endpoint", t.target, "next", "look at the receiver's log")
	case a.message != "":
		t.hourly(slog.LevelWarn, "the receiver took all points and gives a warning", "message", a.message, "endpoint", t.target)
	}
}

// failed logs a failed call; kept says what becomes of the data.
func (t *tally) failed(a answer, kept string) {
	level := slog.LevelWarn
	if a.verdict == misconfigured {
		level = slog.LevelError
	}
	t.delivery.failed(level, a.kind, "cannot deliver metrics; "+kept, a.err, "endpoint", t.target, "next", a.hint())
}

// poisoned counts the points of a request that is given up; fate says what
// becomes of it.
func (t *tally) poisoned(points int, a answer, fate string) {
	t.rejected.Add(int64(points))
	t.log.Error("the receiver refuses a request again and again; "+fate,
		"points", points, "error", a.err, "endpoint", t.target, "next", a.hint())
}

// drop counts points that are not sent at all.
func (t *tally) drop(points int, why string) {
	if points > 0 {
		t.dropped.Add(int64(points))
		t.hourly(slog.LevelWarn, "points are left out: "+why, "points", points, "next", "if it goes on, report it with the log")
	}
}

// hourly logs a message that may come with each cycle at most once an hour. The
// counters have every one of them.
func (t *tally) hourly(level slog.Level, msg string, args ...any) {
	t.mu.Lock()
	last, seen := t.logged[msg]
	now := time.Now()
	due := !seen || now.Sub(last) >= time.Hour
	if due {
		t.logged[msg] = now
	}
	t.mu.Unlock()
	if due {
		t.log.Log(context.Background(), level, msg, args...)
	}
}

func (t *tally) health() Health {
	h := Health{Sent: t.sent.Load(), Rejected: t.rejected.Load(), Dropped: t.dropped.Load()}
	if h.Since, h.Err = t.delivery.current(); h.Err == nil {
		h.Since, h.Err = t.commit.current()
	}
	return h
}

// Instruments lists the instruments of Exporter.Register and Durable.Register.
func Instruments() []receiver.Instrument {
	list := deliveryInstruments()
	for _, i := range outboxInstruments() {
		list = append(list, i.Instrument)
	}
	return list
}

func deliveryInstruments() []receiver.Instrument {
	instrument := func(name, description string) receiver.Instrument {
		return receiver.Instrument{Name: name, Kind: "observable counter", Unit: "{data_point}", Description: description}
	}
	return []receiver.Instrument{
		instrument("unitmeter.export.sent", "Data points that the receiver of the metrics accepted."),
		instrument("unitmeter.export.rejected", "Data points that the receiver of the metrics refused for good: partial successes and quarantined requests."),
		instrument("unitmeter.export.dropped", "Data points that were not fit to be sent, because they had no series in the sweep."),
	}
}

// Register makes the exporter's own instruments on the meter (see Health).
func (e *Exporter) Register(meter metric.Meter) error {
	values := []*atomic.Int64{&e.tally.sent, &e.tally.rejected, &e.tally.dropped}
	for i, instrument := range deliveryInstruments() {
		_, err := meter.Int64ObservableCounter(instrument.Name, metric.WithUnit(instrument.Unit), metric.WithDescription(instrument.Description),
			metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
				o.Observe(values[i].Load())
				return nil
			}))
		if err != nil {
			return fmt.Errorf("register instrument %s: %w", instrument.Name, err)
		}
	}
	return nil
}
