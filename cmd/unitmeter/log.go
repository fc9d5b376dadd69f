package main

import (
	"bytes"
	"io"
	"log/slog"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/config"
)

// newLogger makes the logger that OTEL_LOG_LEVEL and UNITMETER_LOG_FORMAT ask
// for. It bounds each text: an error may have the message of a Collector in it.
func newLogger(w io.Writer, cfg config.Config) *slog.Logger {
	options := &slog.HandlerOptions{ReplaceAttr: bounded}
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
		options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{} // the journal has it
			}
			return bounded(groups, a)
		}
		return slog.New(slog.NewTextHandler(journal{w}, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// bounded cuts texts and errors. The handlers escape control characters.
func bounded(_ []string, a slog.Attr) slog.Attr {
	switch v := a.Value.Resolve(); v.Kind() {
	case slog.KindString:
		a.Value = slog.StringValue(tty.Cut(v.String()))
	case slog.KindAny:
		if err, ok := v.Any().(error); ok {
			a.Value = slog.StringValue(tty.Cut(err.Error()))
		}
	}
	return a
}

// journal replaces the level, with which a line of the text handler begins, by the
// priority that journald takes off (sd-daemon(3)).
type journal struct{ w io.Writer }

// Write gets one whole line.
func (j journal) Write(line []byte) (int, error) {
	level, rest, _ := bytes.Cut(line, []byte(" "))
	priority := "<6>"
	switch string(level) {
	case "level=ERROR":
		priority = "<3>"
	case "level=WARN":
		priority = "<4>"
	case "level=DEBUG":
		priority = "<7>"
	}
	_, err := j.w.Write(append([]byte(priority), rest...))
	return len(line), err
}
