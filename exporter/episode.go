package exporter

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// episode logs a lasting failure when it begins, when it takes a new form, and
// when it is over; not each time it is met. It is safe for concurrent use.
type episode struct {
	logger *slog.Logger

	mu    sync.Mutex
	since time.Time
	count int
	err   error
	kinds map[string]bool // forms that are already logged
}

// failed records one failure of the given kind, and logs it if the kind is new
// in this episode.
func (e *episode) failed(level slog.Level, kind, msg string, err error, args ...any) {
	e.mu.Lock()
	if e.kinds == nil {
		e.kinds, e.since = make(map[string]bool), time.Now()
	}
	e.count++
	e.err = err
	first := !e.kinds[kind]
	e.kinds[kind] = true
	e.mu.Unlock()
	if first {
		e.logger.Log(context.Background(), level, msg, append([]any{"err", err}, args...)...)
	}
}

// over ends the episode, and logs msg if there was one.
func (e *episode) over(msg string, args ...any) {
	e.mu.Lock()
	failing, since, count := e.kinds != nil, e.since, e.count
	e.kinds, e.err, e.count = nil, nil, 0
	e.mu.Unlock()
	if failing {
		e.logger.Info(msg, append([]any{"after", time.Since(since).Round(time.Millisecond), "failures", count}, args...)...)
	}
}

// current returns since when there are failures, and the latest; nil outside an
// episode.
func (e *episode) current() (since time.Time, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.since, e.err
}
