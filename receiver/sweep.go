package receiver

import (
	"context"
	"iter"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// Sweep is the result of one reading of all units. It is immutable.
type Sweep struct {
	// Time is the end of the sweep.
	Time time.Time
	// Duration is how long the sweep took.
	Duration time.Duration
	// Partial says that the deadline or an error cut the sweep short: the
	// series that were not reached have Observed false.
	Partial bool
	// Units are the loaded units of the metered types, Accounted those of them
	// that have counters. With EBPF both are the units that have had traffic.
	Units, Accounted int
	// State is the ledger after this sweep.
	State ledger.State
	// attributes are those of the series in State, in the order of All.
	attributes []*Attributes
}

// Attributes are those of the points of one series.
type Attributes struct {
	// Receive and Transmit are the sets of the two directions.
	Receive, Transmit attribute.Set
	// Bytes and Packets are the names of the instruments that have the points; empty
	// for none.
	Bytes, Packets string
	slice          string
	// The options of the points, made once, since they are passed with "...".
	receive, transmit []metric.ObserveOption
}

// NewSweep makes a sweep for tests of code that consumes sweeps. It ended at the given
// moment with the given state, and has the attributes that this configuration gives.
func NewSweep(at time.Time, cfg Config, state ledger.State) *Sweep {
	r := &Receiver{cfg: cfg, attributes: map[ledger.ID]*Attributes{}}
	return &Sweep{Time: at, State: state, attributes: r.attributesOf(&state)}
}

// All yields each series of the sweep with the attributes of its points: units, folds,
// the overflow, and unattributed traffic.
func (s *Sweep) All() iter.Seq2[*ledger.Series, *Attributes] {
	return func(yield func(*ledger.Series, *Attributes) bool) {
		i := 0
		for series := range s.State.All() {
			if !yield(series, s.attributes[i]) {
				return
			}
			i++
		}
	}
}

// shared is a sweep under way and the calls of Sweep that wait for it.
type shared struct {
	began time.Time
	done  chan struct{} // closed when result is set
	// result is the sweep, once done is closed.
	result *Sweep
	// waiting counts the calls; the last to give up calls stop, with why. The Receiver's
	// sweeping guards both.
	waiting int
	stop    context.CancelCauseFunc
}

// Sweep reads the counters of all metered units and returns the result. It takes no
// longer than Config.SweepTimeout, and less if ctx ends before. Units that were not
// read by then have no point in this sweep, and all of their bytes in the next one.
//
// Calls at the same time share one sweep, which goes on while any of them waits for it.
// A call whose ctx ends before the others' gets a sweep without series.
func (r *Receiver) Sweep(ctx context.Context) *Sweep {
	began := time.Now()
	for {
		s, joined := r.join(ctx)
		if joined {
			return r.wait(ctx, s)
		}
		// It is being cut short: this call wants a whole one.
		select {
		case <-s.done:
		case <-ctx.Done():
			return unread(began)
		}
	}
}

// unread is the sweep of a call whose ctx ended before the sweep.
func unread(began time.Time) *Sweep {
	now := time.Now()
	return &Sweep{Time: now, Duration: now.Sub(began), Partial: true}
}

// join returns the sweep under way, or begins one. Where that is being cut short,
// joined is false.
func (r *Receiver) join(ctx context.Context) (s *shared, joined bool) {
	r.sweeping.Lock()
	defer r.sweeping.Unlock()
	if s := r.shared; s != nil {
		if s.waiting == 0 {
			return s, false
		}
		s.waiting++
		return s, true
	}
	running, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	s = &shared{began: time.Now(), done: make(chan struct{}), waiting: 1, stop: stop}
	r.shared = s
	go func() { // until SweepTimeout at the latest; the last call that waits sees its end
		defer stop(nil)
		timed, end := context.WithTimeout(running, r.cfg.SweepTimeout)
		defer end()
		result := r.sweep(timed, s.began)
		r.sweeping.Lock()
		s.result, r.shared = result, nil
		r.sweeping.Unlock()
		close(s.done)
	}()
	return s, true
}

// wait returns the result of s, or less if ctx ends before.
func (r *Receiver) wait(ctx context.Context, s *shared) *Sweep {
	select {
	case <-s.done:
		return s.result
	case <-ctx.Done():
	}
	r.sweeping.Lock()
	s.waiting--
	last := s.waiting == 0
	r.sweeping.Unlock()
	if !last {
		return unread(s.began)
	}
	s.stop(ctx.Err()) // a deadline is one to the source too
	<-s.done
	return s.result
}

// sweep reads all units. Only one is under way at a time.
func (r *Receiver) sweep(ctx context.Context, began time.Time) *Sweep {
	if r.journal != nil && r.systemd.Listed() {
		r.journal.Located(ctx)
	}
	r.mu.Lock()
	for l := range r.ledgers() {
		l.Begin()
	}
	r.mu.Unlock()
	r.source.Each(func(unit, _ string, _ bool) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for l := range r.ledgers() {
			l.Load(unit)
		}
	})
	err := r.source.Read(ctx)
	r.source.Each(func(_, epoch string, reading bool) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for l := range r.ledgers() {
			l.Mark(epoch, reading)
		}
	})
	sweep := r.finish(began, err != nil)
	r.last.Store(sweep)
	return sweep
}

// sweepKey is the key of OfSweep.
type sweepKey struct{}

// OfSweep returns a context for a collection that observes a given sweep. Without it,
// each collection makes its own sweep.
func OfSweep(ctx context.Context, s *Sweep) context.Context {
	return context.WithValue(ctx, sweepKey{}, s)
}

// finish ends a sweep and returns the result.
func (r *Receiver) finish(began time.Time, partial bool) *Sweep {
	units, accounted, listed := r.present(partial)
	r.mu.Lock()
	defer r.mu.Unlock()
	if partial {
		r.partial++
	}
	now := time.Now()
	state := r.ledger.Finish(now, listed, partial)
	for _, o := range r.others {
		state.Others = append(state.Others, o.ledger.Finish(now, listed, partial))
	}
	return &Sweep{
		Time: now, Duration: now.Sub(began), Partial: partial, Units: units, Accounted: accounted,
		State: state, attributes: r.attributesOf(&state),
	}
}

// present returns how many units there are and how many of them have counters, and
// whether all of them are known.
func (r *Receiver) present(partial bool) (units, accounted int, listed bool) {
	if r.systemd != nil {
		units, accounted = r.systemd.Accounted()
		return units, accounted, r.systemd.Listed()
	}
	units = r.meter.units()
	return units, units, !partial
}

// attributesOf returns the attributes of the series of a state, which it makes for
// each series once. The caller holds mu.
func (r *Receiver) attributesOf(state *ledger.State) []*Attributes {
	list := make([]*Attributes, 0, (1+len(state.Others))*(len(state.Series)+1+len(state.Balances)))
	for s := range state.All() {
		a, ok := r.attributes[s.ID]
		if !ok || r.cfg.UnitSlice && a.slice != s.Slice {
			a = r.describe(s)
			r.attributes[s.ID] = a
		}
		list = append(list, a)
	}
	if len(r.attributes) > 2*len(list)+64 { // most are of series that are gone
		clear(r.attributes)
		return r.attributesOf(state)
	}
	return list
}

// describe makes the attributes of a series.
func (r *Receiver) describe(s *ledger.Series) *Attributes {
	attrs := []attribute.KeyValue{attribute.String("host.name", r.cfg.HostName)}
	switch s.Kind {
	case ledger.Overflow:
		attrs = append(attrs, attribute.Bool("otel.metric.overflow", true))
	case ledger.Unattributed:
		attrs = append(attrs, attribute.String("systemd.unit.slice", s.Name))
	default:
		attrs = append(attrs, attribute.String("systemd.unit.name", s.Name))
		if r.cfg.UnitType {
			attrs = append(attrs, attribute.String("systemd.unit.type", typeOf(s.Name)))
		}
		if r.cfg.UnitSlice && s.Slice != "" {
			attrs = append(attrs, attribute.String("systemd.unit.slice", s.Slice))
		}
		owner := s.Owner.Labels()
		for _, label := range []struct{ key, value string }{
			{"user.id", owner.User}, {"container.runtime", owner.Runtime},
			{"container.id", owner.ContainerID}, {"container.name", owner.ContainerName},
			{"k8s.pod.name", owner.Pod}, {"k8s.namespace.name", owner.Namespace},
		} {
			if label.value != "" {
				attrs = append(attrs, attribute.String(label.key, label.value))
			}
		}
	}
	switch s.Measure {
	case ledger.Loopback, ledger.WireLoopback:
		attrs = append(attrs, attribute.Bool("unitmeter.loopback", true))
	case ledger.Remote, ledger.WireRemote:
		attrs = append(attrs, attribute.Bool("unitmeter.loopback", false))
	}
	direction := attribute.Key("network.io.direction")
	a := &Attributes{
		Receive:  attribute.NewSet(append(slices.Clone(attrs), direction.String("receive"))...),
		Transmit: attribute.NewSet(append(slices.Clone(attrs), direction.String("transmit"))...),
		slice:    s.Slice,
	}
	a.Bytes, a.Packets = r.instrumentsOf(s.ID)
	a.receive = []metric.ObserveOption{metric.WithAttributeSet(a.Receive)}
	a.transmit = []metric.ObserveOption{metric.WithAttributeSet(a.Transmit)}
	return a
}

// instrumentsOf returns the instruments with the points of a series.
func (r *Receiver) instrumentsOf(id ledger.ID) (bytes, packets string) {
	switch {
	case id.Kind == ledger.Unattributed && id.Measure == ledger.Total:
		return UnattributedName, ""
	case id.Kind == ledger.Unattributed, id.Measure == ledger.Total && r.cfg.Loopback:
		return "", ""
	case id.Measure >= ledger.Wire:
		return WireIOName, WirePacketCountName
	}
	return IOName, PacketCountName
}
