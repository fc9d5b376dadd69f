package systemd

import (
	"context"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// maxAsked is how many questions for a slice may wait for an answer. With
// maxInFlight that stays below dbus-daemon's limit of 128; and the answers fit into
// their channel, so that they never hold up the goroutine that reads the
// connection, for which the follower itself may wait.
const maxAsked = 24

// finalRead bounds the reading of the units that have ended since the last one.
const finalRead = time.Second

// readEnded reads units soon after their end, for as long as systemd has them
// loaded, until ctx ends. It has a goroutine of its own, so that signals are
// answered meanwhile; under a burst of ends it reads many in one go. Where a unit
// is unloaded already, the journal has its last counters.
func (s *Source) readEnded(ctx context.Context, b *bus.Conn, ended <-chan []*unit) {
	for {
		select {
		case units := <-ended:
			s.readFinal(ctx, b, units)
		case <-ctx.Done():
			return
		}
	}
}

// readFinal reads units that have ended. What it does not reach, the next sweep
// reads.
func (s *Source) readFinal(ctx context.Context, b *bus.Conn, units []*unit) {
	ctx, cancel := context.WithTimeout(ctx, finalRead)
	defer cancel()
	now := time.Now()
	targets := make([]target, 0, len(units))
	s.mu.Lock()
	for _, u := range units {
		targets = append(targets, s.target(u, now))
	}
	s.mu.Unlock()
	_ = s.collect(ctx, b, targets)
}

// placing is the asking for the slices of units.
type placing struct {
	places  chan *dbus.Call // answers
	unasked []*unit         // units that wait for their turn
	asked   map[dbus.ObjectPath]*run
}

func newPlacing() placing {
	return placing{places: make(chan *dbus.Call, maxAsked), asked: map[dbus.ObjectPath]*run{}}
}

// place asks for the slice of a unit while there is still time: a stop record
// of a run that no sweep has seen does not have it.
func (f *follower) place(u *unit) {
	if len(f.unasked) < maxWaiting {
		f.unasked = append(f.unasked, u)
	}
	f.askPlaces()
}

// askPlaces makes the calls that there is room for.
func (f *follower) askPlaces() {
	for len(f.asked) < maxAsked && len(f.unasked) > 0 {
		u := f.unasked[0]
		f.unasked = f.unasked[1:]
		f.mu.Lock()
		r := u.run
		f.mu.Unlock()
		path := dbus.ObjectPath(r.path)
		if _, ok := f.asked[path]; ok {
			continue
		}
		f.asked[path] = r
		f.bus.Object(path).
			Go(bus.PropertiesInterface+".Get", dbus.FlagNoAutoStart, f.places, u.iface, "Slice")
	}
}

// placed takes the answer. A unit that has gone meanwhile has none.
func (f *follower) placed(call *dbus.Call) {
	r := f.asked[call.Path]
	delete(f.asked, call.Path)
	defer f.askPlaces()
	var v dbus.Variant
	if call.Err != nil || call.Store(&v) != nil {
		return
	}
	name, _ := kept(v.Value())
	f.mu.Lock()
	defer f.mu.Unlock()
	r.slice = name
	f.cfg.Sink.Place(r.unit, r.epoch, name)
	if u, ok := f.units[r.unit]; ok {
		u.slice = name
	}
}
