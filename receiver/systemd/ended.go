package systemd

import (
	"context"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// maxAsked is how many units may wait for the answers to two questions each. With
// maxInFlight that stays below dbus-daemon's limit of 128. The answers fit into their
// channel, so they never block the goroutine that reads the connection. Otherwise the
// follower and that goroutine could wait for each other.
const maxAsked = 24

// finalRead bounds the reading of the units that have ended since the last one.
const finalRead = time.Second

// readEnded reads units soon after their end, for as long as systemd has them
// loaded, until ctx ends. It has a goroutine of its own, so that signals are
// answered meanwhile; under a burst of ends it reads many in one go. Where a unit
// is unloaded already, the journal has its last counters.
//
// Left-over processes are read often: the next start of the unit resets the counters,
// and there may be no time for a reading between its signal and the reset.
func (s *Source) readEnded(ctx context.Context, b *bus.Conn, ended <-chan []*unit) {
	for {
		left := s.left()
		pause := lookForLeft
		if len(left) > 0 {
			pause = max(leftPause, time.Duration(len(left))*leftPause/10)
		}
		select {
		case units := <-ended:
			s.readFinal(ctx, b, units)
		case <-time.After(pause):
			s.readFinal(ctx, b, left)
		case <-ctx.Done():
			return
		}
	}
}

const (
	leftPause   = 100 * time.Millisecond // between readings of ten units or less
	lookForLeft = 10 * time.Second
)

// left returns the units that have ended and whose processes go on.
func (s *Source) left() (units []*unit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.units {
		if u.run != nil && u.run.left && !u.run.ended.IsZero() {
			units = append(units, u)
		}
	}
	return units
}

// readFinal reads units that have ended. The next sweep reads those that it does not
// reach.
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

// placing asks for the slice and the IP accounting of runs that no sweep has seen. A
// stop record has neither, and a run without IP accounting has no stop record.
type placing struct {
	places  chan *dbus.Call // answers
	unasked []*unit         // units that wait for their turn
	asked   map[dbus.ObjectPath]*place
}

// place has the answers about one run so far.
type place struct {
	run       *run
	slice     string
	accounted bool
	waiting   int // the number of answers still to come
}

func newPlacing() placing {
	return placing{places: make(chan *dbus.Call, 2*maxAsked), asked: map[dbus.ObjectPath]*place{}}
}

// place asks about the run of a unit while there is still time.
func (f *follower) place(u *unit) {
	if len(f.unasked) < maxWaiting {
		f.unasked = append(f.unasked, u)
	}
	f.askPlaces()
}

// askPlaces asks about further units, as many as maxAsked allows.
func (f *follower) askPlaces() {
	for len(f.asked) < maxAsked && len(f.unasked) > 0 {
		u := f.unasked[0]
		f.unasked = f.unasked[1:]
		f.mu.Lock()
		p := &place{run: u.run, slice: u.slice, accounted: u.state == accountingOn}
		f.mu.Unlock()
		path := dbus.ObjectPath(p.run.path)
		if _, ok := f.asked[path]; ok {
			continue
		}
		ask := func(property string) {
			p.waiting++
			f.bus.Object(path).Go(bus.PropertiesInterface+".Get", dbus.FlagNoAutoStart, f.places, u.iface, property)
		}
		if p.slice == "" {
			ask("Slice")
		}
		if !p.accounted {
			ask("IPAccounting")
		}
		if p.waiting == 0 {
			f.settle(p)
			continue
		}
		f.asked[path] = p
	}
}

// placed handles one answer. It is an error for a unit that is gone meanwhile.
func (f *follower) placed(call *dbus.Call) {
	p := f.asked[call.Path]
	var v dbus.Variant
	if call.Err == nil && call.Store(&v) == nil {
		if on, ok := v.Value().(bool); ok {
			p.accounted = on
		} else {
			p.slice, _ = kept(v.Value())
		}
	}
	if p.waiting--; p.waiting == 0 {
		delete(f.asked, call.Path)
		f.settle(p)
		f.askPlaces()
	}
}

// settle passes the answers about a run to the Sink.
func (f *follower) settle(p *place) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p.run.slice = p.slice
	if p.accounted {
		f.cfg.Sink.Place(p.run.unit, p.run.epoch, p.slice)
	}
	if u, ok := f.units[p.run.unit]; ok {
		u.slice = p.slice
	}
}
