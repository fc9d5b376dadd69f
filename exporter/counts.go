package exporter

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/unitmeter/unitmeter/exporter/otlp"
)

// Health is the state of the delivery of metrics.
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

// counts counts points, and logs changes in their delivery. It is safe for
// concurrent use.
type counts struct {
	sent, rejected, dropped atomic.Int64

	log      *slog.Logger
	delivery episode // requests do not get through
	commit   episode // cycles cannot be made durable

	mu     sync.Mutex
	target string
	hint   func(otlp.Answer) string
	logged map[string]time.Time // by message: when it was logged last
}

func newCounts(log *slog.Logger) *counts {
	return &counts{
		log: log, delivery: episode{logger: log}, commit: episode{logger: log},
		hint: otlp.Answer.Hint, logged: make(map[string]time.Time),
	}
}

// accepted counts a request of so many points that the receiver took.
func (c *counts) accepted(points int, a otlp.Answer) {
	rejected := min(max(a.Rejected, 0), int64(points))
	c.sent.Add(int64(points) - rejected)
	c.rejected.Add(rejected)
	c.delivery.over("metrics are delivered again", "endpoint", c.target)
	switch {
	case rejected > 0:
		c.hourly(slog.LevelWarn, "the receiver refused some points (partial success); they are counted and not sent again",
			"rejected", rejected, "message", a.Message, "endpoint", c.target, "next", c.hint(a))
	case a.Message != "":
		c.hourly(slog.LevelWarn, "the receiver accepted all points, with a warning", "message", a.Message, "endpoint", c.target)
	}
}

// failed logs a failed call; kept says what becomes of the data.
func (c *counts) failed(a otlp.Answer, kept string) {
	level := slog.LevelWarn
	if a.Verdict == otlp.Misconfigured {
		level = slog.LevelError
	}
	c.delivery.failed(level, a.Cause(), "cannot deliver metrics; "+kept, a.Err, "endpoint", c.target, "next", c.hint(a))
}

// poisoned counts the points of a request that are given up; fate says what
// becomes of it.
func (c *counts) poisoned(points int, a otlp.Answer, fate string) {
	c.rejected.Add(int64(points))
	c.log.Error("the receiver refuses points repeatedly; "+fate,
		"points", points, "err", a.Err, "endpoint", c.target, "next", c.hint(a))
}

// drop counts points that are not sent at all.
func (c *counts) drop(points int, why string) {
	c.leaveOut(points, why, "if it goes on, report it with the log")
}

// early counts points that wait for the wall clock to pass their start.
func (c *counts) early(points int) {
	c.leaveOut(points, "the wall clock is before their start, since it was set back; their bytes are in the totals that follow",
		"check the clock with \"timedatectl\"; if it is right, they are sent again once it has passed their start")
}

func (c *counts) leaveOut(points int, why, next string) {
	if points > 0 {
		c.dropped.Add(int64(points))
		c.hourly(slog.LevelWarn, "points are left out: "+why, "points", points, "next", next)
	}
}

// hourly logs a message that may come with each cycle, but only once an hour. The
// counters include each of them.
func (c *counts) hourly(level slog.Level, msg string, args ...any) {
	c.mu.Lock()
	last, seen := c.logged[msg]
	now := time.Now()
	due := !seen || now.Sub(last) >= time.Hour
	if due {
		c.logged[msg] = now
	}
	c.mu.Unlock()
	if due {
		c.log.Log(context.Background(), level, msg, args...)
	}
}

func (c *counts) health() Health {
	h := Health{Sent: c.sent.Load(), Rejected: c.rejected.Load(), Dropped: c.dropped.Load()}
	if h.Since, h.Err = c.delivery.current(); h.Err == nil {
		h.Since, h.Err = c.commit.current()
	}
	return h
}
