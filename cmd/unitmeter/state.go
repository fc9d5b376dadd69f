package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/store"
)

// stateRetry is the pause between tries to read a state that is unavailable.
const stateRetry = 10 * time.Second

// state is what survives the process: ledger, outbox and history.
type state struct {
	store   *store.Store      // nil: none is wanted
	durable *exporter.Durable // nil: there is none, or it cannot be read now
}

// openState opens the state directory. A full or failing disk is no error: then
// the agent works without, and there is a store without durable.
func openState(ctx context.Context, cfg config.Config, log *slog.Logger) (*state, error) {
	s := &state{}
	if cfg.Store.Dir == "" {
		return s, nil
	}
	cfg.Store.Machine, cfg.Store.Merge, cfg.Store.Logger = exporter.Machine(), otlp.Merge, log
	var err error
	s.store, err = store.Open(ctx, cfg.Store)
	if err != nil {
		return nil, fmt.Errorf("%w; UNITMETER_STATE_DIR can name another", err)
	}
	s.durable, err = exporter.NewDurable(ctx, s.store)
	if err != nil && !errors.Is(err, store.ErrUnavailable) {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// await waits until the state can be read, or ctx ends.
func (s *state) await(ctx context.Context) bool {
	for {
		select {
		case <-time.After(stateRetry):
		case <-ctx.Done():
			return false
		}
		if _, err := s.store.Ledger(ctx); err == nil {
			return true
		}
	}
}

func (s *state) close() error {
	if s.store == nil {
		return nil
	}
	return s.store.Close()
}
