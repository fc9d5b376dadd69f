package receiver

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

// maxAsked is how many calls of one kind may wait for an answer outside of
// sweeps. Twice that and maxInFlight stay below dbus-daemon's limit of 128; and
// the answers fit into their channel, so that they never hold up the goroutine
// that reads the connection, for which the follower itself may wait.
const maxAsked = 24

// maxHeld is how many references are held at most. PID 1 needs one match rule
// for each, dbus-daemon allows it 512 (max_match_rules_per_connection), and with
// one more PID 1 loses its connection for good: the 511th reference did it, see
// docs/decisions/receiver-wire.md. The others that hold references need room too.
const maxHeld = 128

// refsPause is after what time a lost connection for references is opened again:
// dbus takes about as long to restart.
const refsPause = 2 * time.Second

// finalRead bounds the reading of one unit at its end. Nobody can start a
// transient unit of the same name before it is over.
const finalRead = time.Second

// references holds systemd references on running services. systemd unloads a
// unit without other ties in the same instant in which it ends, before any
// client can read its last bytes; a reference keeps it. But as long as it is
// kept, nobody can start a transient unit of that name, so the reference goes
// as soon as the counters are read. Scopes are never referenced: container
// engines start them again under the same name at once.
type references struct {
	refs       *dbus.Conn // on the system bus: PID 1's own socket refuses references
	lost       <-chan struct{}
	retry      <-chan time.Time
	refReplies chan *dbus.Call
	held       map[string]bool // true: held; false: asked for
	wanted     []string        // of those asked for, the ones that wait for their turn
	asked      int             // calls without an answer
	// suppressed are names that were gone before the reference came. Asking
	// loads such a name, which announces it as new, which would ask again.
	suppressed map[string]bool
	// any says that the operator wants references on all services. Otherwise
	// only names that systemd-run makes up are referenced: nobody starts such a
	// unit again, and under load the reference on another does get in the way
	// of that (6 of 100 tries). The journal has the end of the others.
	any bool
}

// holdReferences prepares for references, where they are wanted and allowed.
func (f *follower) holdReferences(ctx context.Context) {
	mode := f.cfg.StopEdge
	if mode != "ref" && (mode != "" && mode != "auto" || os.Geteuid() != 0) {
		return
	}
	conn := f.bus.conn
	var lost <-chan struct{}
	if f.bus.private {
		b, err := openFor(ctx, f.cfg.SystemBus, false, false)
		if err != nil {
			if !f.unreferenced {
				f.warnNoReferences(err)
			}
			f.unreferenced = true
			f.references = references{retry: time.After(refsPause)}
			return
		}
		conn, lost = b.conn, b.conn.Context().Done()
		if f.unreferenced {
			f.unreferenced = false
			f.log.Info("references on running services can be had again")
		}
	}
	f.references = references{
		refs: conn, lost: lost, refReplies: make(chan *dbus.Call, maxAsked),
		held: map[string]bool{}, suppressed: map[string]bool{}, any: mode == "ref",
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for name := range f.units {
		if len(f.held) < maxHeld/2 { // units that come up are likelier to end soon
			f.reference(name)
		}
	}
}

func (f *follower) warnNoReferences(err error) {
	f.log.Warn("no references on services; the last bytes of short ones come from the journal, where that is read", "err", err,
		"next", "allow RefUnit in polkit, or set UNITMETER_STOP_EDGE=auto")
}

// releaseReferences ends the connection that holds them, and so all of them.
func (f *follower) releaseReferences() {
	if f.refs != nil && f.refs != f.bus.conn {
		_ = f.refs.Close() // nothing is left to be done on it
	}
}

// reference asks for a reference on a service that has just come up.
func (f *follower) reference(name string) {
	if f.refs == nil || f.suppressed[name] || typeOf(name) != "service" || !f.any && !madeUp(name) {
		return
	}
	if _, ok := f.held[name]; ok || len(f.held) >= maxHeld {
		return
	}
	f.held[name] = false
	f.wanted = append(f.wanted, name)
	f.askReferences()
}

// madeUp reports whether a service has a name as systemd-run makes them up:
// run-u123, run-r5a0... and, from systemd 256 on, run-p123-i456.
func madeUp(service string) bool {
	id, ok := strings.CutPrefix(strings.TrimSuffix(service, ".service"), "run-")
	return ok && len(id) > 1 && strings.ContainsRune("urp", rune(id[0])) &&
		strings.Trim(id[1:], "0123456789abcdef-i") == "" && strings.ContainsAny(id, "0123456789")
}

// askReferences makes the calls that there is room for.
func (f *follower) askReferences() {
	for f.asked < maxAsked && len(f.wanted) > 0 {
		name := f.wanted[0]
		f.wanted = f.wanted[1:]
		f.asked++
		f.refs.Object(systemdName, managerPath).Go(managerInterface+".RefUnit", 0, f.refReplies, name)
	}
}

// referenced takes the answer to RefUnit.
func (f *follower) referenced(call *dbus.Call) {
	f.asked--
	defer f.askReferences()
	name, ok := call.Args[0].(string)
	if !ok {
		return
	}
	if call.Err == nil {
		f.held[name] = true
		f.releaseEnded(name) // it may have ended before the reference came
		return
	}
	delete(f.held, name)
	var refused dbus.Error
	if !errors.As(call.Err, &refused) {
		return // the connection ended
	}
	switch refused.Name {
	case noSuchUnit, unknownObject:
		f.suppressed[name] = true
	case noReply, nameHasNoOwner, serviceUnknown, limitsExceeded:
		// The bus answered for systemd, which re-executes itself.
	default:
		f.warnNoReferences(call.Err)
		f.releaseReferences()
		f.references = references{}
	}
}

// release gives a reference back.
func (f *follower) release(name string) {
	if !f.held[name] {
		return
	}
	delete(f.held, name)
	f.refs.Object(systemdName, managerPath).Go(managerInterface+".UnrefUnit", dbus.FlagNoReplyExpected, nil, name)
}

// releaseEnded gives the reference on a unit back, unless it runs or is about to:
// what ended may have been the run before the one that is referenced.
func (f *follower) releaseEnded(name string) {
	f.mu.Lock()
	u := f.units[name]
	over := u != nil && !u.status.running() && !u.run.unbegun
	f.mu.Unlock()
	switch {
	case over:
		f.release(name)
	case u == nil && f.held[name]:
		f.noteFresh(name) // it has yet to start, or has gone
	}
}

// releaseAbsent gives back the references on names that are not among the loaded
// ones.
func (f *follower) releaseAbsent(names, loaded []string) {
	for _, name := range names {
		if !slices.Contains(loaded, name) {
			f.release(name)
		}
	}
}

// unloaded takes that systemd has unloaded a name. PID 1 counts references: while
// a call is under way, another would leave one too many, for good.
func (f *follower) unloaded(name string) {
	delete(f.suppressed, name)
	if i := slices.Index(f.wanted, name); i >= 0 {
		f.wanted = slices.Delete(f.wanted, i, i+1)
		delete(f.held, name)
	} else if f.held[name] {
		f.noteFresh(name) // it came after all, and has loaded the name again
	}
}

// ending is the reading of units that have ended. It has a goroutine of its
// own, so that signals are answered meanwhile; under a burst of ends it reads
// many in one go.
type ending struct {
	more chan []*unit // units that have ended, from the follower
	read chan []*unit // the same, read, back to it
	end  context.CancelFunc
}

// startEnding starts the goroutine; stopEnding ends it and waits for it.
func (f *follower) startEnding(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	f.ending = ending{more: make(chan []*unit), read: make(chan []*unit, 1), end: cancel}
	go func() {
		defer close(f.ending.read)
		for {
			select {
			case units := <-f.ending.more:
				f.readEnded(ctx, units)
				select {
				case f.ending.read <- units:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
}

func (f *follower) stopEnding() {
	f.ending.end()
	for range f.ending.read { // until the goroutine closes it
	}
}

// readEnded reads units that have ended. Where one is unloaded already, the
// journal has its last counters.
func (f *follower) readEnded(ctx context.Context, units []*unit) {
	ctx, cancel := context.WithTimeout(ctx, finalRead)
	defer cancel()
	now := time.Now()
	targets := make([]target, 0, len(units))
	f.mu.Lock()
	for _, u := range units {
		targets = append(targets, f.target(u, now))
	}
	f.mu.Unlock()
	_ = f.collect(ctx, f.bus, targets) // what was not reached, the next sweep reads
}

// placing is the asking for the slices of units.
type placing struct {
	places  chan *dbus.Call // answers
	unasked []*unit         // units that wait for their turn
	asking  int             // calls without an answer
}

// place asks for the slice of a unit while there is still time: a stop record
// of a run that no sweep has seen does not have it.
func (f *follower) place(u *unit) {
	f.unasked = append(f.unasked, u)
	f.askPlaces()
}

// askPlaces makes the calls that there is room for.
func (f *follower) askPlaces() {
	for f.asking < maxAsked && len(f.unasked) > 0 {
		u := f.unasked[0]
		f.unasked = f.unasked[1:]
		f.mu.Lock()
		path := u.run.path
		f.mu.Unlock()
		f.asking++
		f.bus.conn.Object(systemdName, dbus.ObjectPath(path)).
			Go(propertiesInterface+".Get", dbus.FlagNoAutoStart, f.places, u.iface, "Slice")
	}
}

// placed takes the answer. A unit that has gone meanwhile has none.
func (f *follower) placed(call *dbus.Call) {
	f.asking--
	defer f.askPlaces()
	var v dbus.Variant
	if call.Err != nil || call.Store(&v) != nil {
		return
	}
	name, _ := kept(v.Value())
	f.mu.Lock()
	defer f.mu.Unlock()
	if run, ok := f.runs[strings.TrimPrefix(string(call.Path), unitPathPrefix)]; ok {
		run.slice = name
		if u, ok := f.units[run.unit]; ok {
			u.slice = name
		}
	}
}
