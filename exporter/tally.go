package exporter

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
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
	t.delivery.failed(level, a.cause(), "cannot deliver metrics; "+kept, a.err, "endpoint", t.target, "next", a.hint())
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
	t.leaveOut(points, why, "if it goes on, report it with the log")
}

// early counts points that wait for the wall clock to pass their start.
func (t *tally) early(points int) {
	t.leaveOut(points, "the wall clock is before their start, since it was set back; their bytes are in the totals that follow",
		"check the clock with \"timedatectl\"; if it is right, they come again once it has passed their start")
}

func (t *tally) leaveOut(points int, why, next string) {
	if points > 0 {
		t.dropped.Add(int64(points))
		t.hourly(slog.LevelWarn, "points are left out: "+why, "points", points, "next", next)
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
