package systemd

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

const (
	reloadTimeout = 10 * time.Second // Reloading(false) never came (systemd#43200)
	newUnitPause  = 250 * time.Millisecond
	// maxFresh is how many units are listed by name. A list of all costs systemd less
	// than one of more names: it compares each name with each unit.
	maxFresh = 64
	// maxWaiting is how many units may wait to be read at their end, or to be asked for
	// their slice; the next sweep reads the others.
	maxWaiting = 4096
	// floodPause is how long a flood of signals is left alone before the units are
	// listed again.
	floodPause           = 5 * time.Second
	propertiesChangedSig = bus.PropertiesInterface + ".PropertiesChanged"
	nameOwnerChangedSig  = "org.freedesktop.DBus.NameOwnerChanged"
)

// errBetterBus ends the connection to PID 1's own socket.
var errBetterBus = errors.New("the system bus can be had again")

// follow connects, lists the units, and follows their signals until the
// connection or ctx ends. connected says that it got as far as a list.
func (s *Source) follow(ctx context.Context) (connected bool, err error) {
	b, err := s.connect(ctx)
	if err != nil {
		return false, err
	}
	defer func() {
		s.mu.Lock()
		s.bus = nil
		s.health.Refused += b.Refused()
		s.health.Dropped += b.Dropped()
		s.mu.Unlock()
		_ = b.Close() // the reason is in err already
	}()
	stop := context.AfterFunc(ctx, func() { _ = b.Close() })
	defer stop()

	if err := s.relist(ctx, b, true); err != nil {
		return false, err
	}
	s.since(ctx, b)
	private := s.shortcut(ctx, b)
	s.mu.Lock()
	s.private = private
	s.bus, s.listed, s.reloadBegan = b, true, time.Now()
	recovered := s.broken != nil
	s.broken = nil
	select {
	case <-s.ready:
	default:
		close(s.ready)
	}
	units := len(s.units)
	s.mu.Unlock()
	if recovered {
		s.log.Info("connected to systemd again", "units", units)
	}

	ended := make(chan []*unit)
	reading, stopReading := context.WithCancel(ctx)
	var reader sync.WaitGroup
	reader.Go(func() { s.readEnded(reading, b, ended) })
	defer reader.Wait()
	defer stopReading()
	f := follower{Source: s, bus: b, fresh: map[string]bool{}, placing: newPlacing()}
	relist := time.NewTicker(s.cfg.RelistEvery)
	defer relist.Stop()
	for {
		more := ended
		if len(f.ended) == 0 {
			more = nil
		}
		select {
		case signal, ok := <-b.Signals():
			if !ok {
				if f.reloading && b.Private() { // which does not survive a reexec
					f.reloaded(func(h *Health) { h.Reexecs++ })
				}
				return true, b.Err()
			}
			err = f.handle(ctx, signal)
		case more <- f.ended:
			f.ended = nil
		case call := <-f.places:
			f.placed(call)
		case <-f.freshTimer:
			f.freshTimer = nil
			err = f.lookAtFresh(ctx)
		case <-b.Flooded():
			f.drained = time.After(floodPause)
			if time.Since(f.flooded) > time.Minute {
				s.log.Warn("systemd sends more signals than can be taken; its units are listed again instead",
					"next", "see \"busctl monitor org.freedesktop.systemd1\" for who asks it for units that do not exist")
			}
			f.flooded = time.Now()
		case <-f.drained:
			f.drained = nil
			f.mu.Lock()
			f.reloadBegan = time.Now() // the same may have gone unseen as while nobody was connected
			f.mu.Unlock()
			b.Resume() // first: what comes during the list is worked in after it
			err = s.relist(ctx, b, false)
		case <-f.thaw:
			// Its generators may take minutes, in which systemd does not answer.
			if err = s.relist(ctx, b, true); errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
				f.thaw, err = time.After(reloadTimeout), nil
			} else {
				f.reloaded(func(h *Health) { h.Reloads++ })
			}
		case <-relist.C:
			if s.betterBus(ctx, b) {
				return true, errBetterBus
			}
			if f.thaw == nil {
				err = s.relist(ctx, b, false)
			}
		}
		if err != nil {
			return true, err
		}
	}
}

// follower is the state of following the signals of one connection.
type follower struct {
	*Source
	bus *bus.Conn
	// fresh are the units of UnitNew signals that no PropertiesChanged has
	// followed yet.
	fresh      map[string]bool
	freshTimer <-chan time.Time
	freshPause time.Duration    // before the next list of these; it grows with what lists cost
	flooded    time.Time        // when signals were last dropped
	drained    <-chan time.Time // fires when the units are to be listed after a flood
	// thaw is not nil during a reload or reexec: UnitRemoved arrives for each
	// unit then, and means nothing. It fires when the end is overdue.
	thaw      <-chan time.Time
	reloading bool      // Reloading(true) came, and what it leads to is not known yet
	began     time.Time // when it came; zero if what it led to is known
	// ended are units that have ended and wait for their last reading.
	ended []*unit
	placing
}

func (f *follower) handle(ctx context.Context, signal *dbus.Signal) error {
	if !wellFormed(signal) {
		f.count(func(h *Health) { h.Errors++ })
		return nil
	}
	switch signal.Name {
	case propertiesChangedSig:
		if name := unitOfPath(string(signal.Path)); name != "" {
			properties, _ := argument[map[string]dbus.Variant](signal, 1)
			delete(f.fresh, name)
			return f.changed(ctx, name, properties)
		}
	case bus.ManagerInterface + ".UnitNew":
		if name, ok := argument[string](signal, 0); ok && f.thaw == nil && f.follows(name) {
			f.noteFresh(name)
		}
	case bus.ManagerInterface + ".UnitRemoved":
		if name, ok := argument[string](signal, 0); ok && f.thaw == nil {
			delete(f.fresh, name)
			f.removed(name)
		}
	case bus.ManagerInterface + ".Reloading":
		if began, ok := argument[bool](signal, 0); ok && began {
			f.thaw, f.reloading = time.After(reloadTimeout), true
			f.began = time.Now()
			f.mu.Lock()
			f.reloadBegan = f.began
			f.mu.Unlock()
		} else if ok {
			f.reloaded(func(h *Health) { h.Reloads++ })
			return f.relist(ctx, f.bus, true)
		}
	case nameOwnerChangedSig:
		if owner, ok := argument[string](signal, 2); ok && owner == "" {
			f.thaw = time.After(reloadTimeout)
		} else if ok {
			f.reloading = true // systemd 261 may leave out the signal
			f.reloaded(func(h *Health) { h.Reexecs++ })
			// Before systemd 258, one that has lost the bus forgets its
			// subscribers; one that has not answers with an error.
			f.bus.Manager().Go(bus.ManagerInterface+".Subscribe", dbus.FlagNoReplyExpected, nil)
			return f.relist(ctx, f.bus, true)
		}
	}
	return nil
}

// noteFresh has a unit looked at in a moment.
func (f *follower) noteFresh(name string) {
	f.fresh[name] = true
	if f.freshTimer == nil {
		f.freshTimer = time.After(max(newUnitPause, f.freshPause))
	}
}

// lookAtFresh asks for the units that have been announced. It takes a small part of
// systemd's time, however many they are.
func (f *follower) lookAtFresh(ctx context.Context) (err error) {
	names := slices.Collect(maps.Keys(f.fresh))
	if len(names) == 0 || f.thaw != nil {
		return nil
	}
	f.fresh = map[string]bool{} // a new one, since clear keeps the memory
	began := time.Now()
	if len(names) <= maxFresh {
		_, err = f.refresh(ctx, f.bus, names)
	} else {
		err = f.relist(ctx, f.bus, false)
	}
	f.freshPause = min(20*time.Since(began), floodPause)
	return err
}

// reloaded ends the freeze. The first sign of the end of a reload shows its kind.
func (f *follower) reloaded(count func(*Health)) {
	f.thaw = nil
	if f.reloading {
		f.reloading = false
		f.count(count)
	}
	if !f.began.IsZero() {
		f.count(func(h *Health) { h.Reloading += time.Since(f.began) })
		f.began = time.Time{}
	}
}

// wellFormed reports whether the argument that handle takes has its type.
func wellFormed(signal *dbus.Signal) (ok bool) {
	switch signal.Name {
	case propertiesChangedSig:
		_, ok = argument[map[string]dbus.Variant](signal, 1)
	case bus.ManagerInterface + ".Reloading":
		_, ok = argument[bool](signal, 0)
	case nameOwnerChangedSig:
		_, ok = argument[string](signal, 2)
	default:
		_, ok = argument[string](signal, 0)
	}
	return ok
}

// argument returns argument i of a signal if it has the type T.
func argument[T any](signal *dbus.Signal, i int) (v T, ok bool) {
	if i < len(signal.Body) {
		v, ok = signal.Body[i].(T)
	}
	return v, ok
}

// changed takes a PropertiesChanged signal of the Unit interface.
func (f *follower) changed(ctx context.Context, name string, properties map[string]dbus.Variant) error {
	s := f.Source
	if !s.follows(name) {
		return nil
	}
	if _, ok := properties["InvocationID"]; !ok { // systemd before 243
		_, err := s.refresh(ctx, f.bus, []string{name})
		return err
	}
	s.mu.Lock()
	var next status
	if u, ok := s.units[name]; ok {
		next = u.status
	}
	s.mu.Unlock()
	for property, value := range properties {
		if err := next.change(property, value.Value()); err != nil {
			s.count(func(h *Health) { h.Errors++ })
			return nil
		}
	}
	s.mu.Lock()
	s.update(name, next)
	u := s.units[name]
	unbegun := u != nil && u.run.unbegun
	exited := s.version >= 256 && next.sub == "exited" // see run.parted
	over := !next.running() || next.restarting() || exited
	unplaced := u != nil && !u.unmetered && next.invocation != "" && !over && !u.run.placed
	if unplaced {
		u.run.placed = true
	}
	s.mu.Unlock()
	if u != nil && next.over() {
		s.ends.Add(1)
	}
	switch {
	case u == nil:
	case over:
		if !unbegun && len(f.ended) < maxWaiting {
			f.ended = append(f.ended, u)
		}
	case unplaced:
		f.place(u)
	}
	return nil
}
