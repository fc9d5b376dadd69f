package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
)

// stateRetry is the pause between tries to read a state that is unavailable.
const stateRetry = 10 * time.Second

// state is what survives the process: ledger, outbox and history.
type state struct {
	store   *store.Store      // nil: none is wanted
	durable *exporter.Durable // nil: there is none, or it cannot be read now
}

// openState opens the state directory. A disk that is full or failing is no
// error: then the agent sends directly, and unavailable is true.
func openState(ctx context.Context, cfg config.Config, log *slog.Logger) (*state, error) {
	s := &state{}
	if cfg.Store.Dir == "" {
		return s, nil
	}
	cfg.Store.Merge, cfg.Store.Logger = exporter.Merge, log
	var err error
	if s.store, err = store.Open(ctx, cfg.Store); err != nil {
		return nil, fmt.Errorf("%w; UNITMETER_STATE_DIR can name another", err)
	}
	s.durable, err = exporter.NewDurable(ctx, s.store)
	if err != nil && !errors.Is(err, store.ErrUnavailable) {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// unavailable reports that there is a state and it could not be read.
func (s *state) unavailable() bool { return s.store != nil && s.durable == nil }

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

// restored is what the receiver goes on from.
func (s *state) restored() receiver.State {
	if s.durable == nil {
		return receiver.State{}
	}
	return s.durable.State()
}

// outbox is nil where there is none.
func (s *state) outbox() exporter.Outbox {
	if s.durable == nil {
		return nil
	}
	return s.durable
}

// register makes the instruments of the outbox, where there is one.
func (s *state) register(meter metric.Meter, hostName string) error {
	if s.durable == nil {
		return nil
	}
	return s.durable.Register(meter, hostName)
}

func (s *state) close() error {
	if s.store == nil {
		return nil
	}
	return s.store.Close()
}
