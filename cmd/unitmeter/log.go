package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"sync"

	"github.com/unitmeter/unitmeter/config"
)

// newLogger makes the logger that OTEL_LOG_LEVEL and UNITMETER_LOG_FORMAT ask
// for.
func newLogger(w io.Writer, cfg config.Config) *slog.Logger {
	options := &slog.HandlerOptions{}
	switch cfg.LogLevel {
	case "none":
		return slog.New(slog.DiscardHandler)
	case "debug":
		options.Level = slog.LevelDebug
	case "warn":
		options.Level = slog.LevelWarn
	case "error":
		options.Level = slog.LevelError
	}
	switch cfg.LogFormat {
	case "json":
		return slog.New(slog.NewJSONHandler(w, options))
	case "journal":
		return slog.New(newJournalHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// journalHandler writes one text line for each record, with the priority in
// front that journald takes off (sd-daemon(3)). The journal has the time.
type journalHandler struct {
	slog.Handler
	lines *lines
}

// lines puts a prefix before the line that the text handler writes.
type lines struct {
	mu     sync.Mutex
	w      io.Writer
	prefix string
}

func (l *lines) Write(p []byte) (int, error) {
	_, err := l.w.Write(bytes.Join([][]byte{[]byte(l.prefix), p}, nil))
	return len(p), err
}

func newJournalHandler(w io.Writer, options *slog.HandlerOptions) slog.Handler {
	options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}
	l := &lines{w: w}
	return journalHandler{slog.NewTextHandler(l, options), l}
}

// Handle implements slog.Handler.
func (h journalHandler) Handle(ctx context.Context, record slog.Record) error {
	h.lines.mu.Lock()
	defer h.lines.mu.Unlock()
	switch {
	case record.Level >= slog.LevelError:
		h.lines.prefix = "<3>"
	case record.Level >= slog.LevelWarn:
		h.lines.prefix = "<4>"
	case record.Level >= slog.LevelInfo:
		h.lines.prefix = "<6>"
	default:
		h.lines.prefix = "<7>"
	}
	return h.Handler.Handle(ctx, record)
}

// WithAttrs implements slog.Handler.
func (h journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return journalHandler{h.Handler.WithAttrs(attrs), h.lines}
}

// WithGroup implements slog.Handler.
func (h journalHandler) WithGroup(name string) slog.Handler {
	return journalHandler{h.Handler.WithGroup(name), h.lines}
}
