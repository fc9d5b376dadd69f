package receiver

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	managerPath   = "/org/freedesktop/systemd1"
	relistEvery   = 5 * time.Minute
	reloadTimeout = 10 * time.Second // Reloading(false) never came (systemd#43200)
	callTimeout   = 25 * time.Second // one call that is not part of a sweep
	newUnitPause  = 250 * time.Millisecond
	lateTraffic   = 2 * time.Minute // reads after the end of a run
	keepClosed    = 2 * time.Minute // a run's memory after its unit has gone, at least
	keepRestored  = time.Hour       // the same, of a run that no list has shown yet
	// recheckEvery is after how many sweeps a unit without accounting is asked
	// again: systemd tells nobody of a set-property IPAccounting=yes.
	recheckEvery         = 6
	noUnitForInvocation  = "org.freedesktop.systemd1.NoUnitForInvocationID"
	noSuchUnit           = "org.freedesktop.systemd1.NoSuchUnit"
	unknownObject        = "org.freedesktop.DBus.Error.UnknownObject"
	noReply              = "org.freedesktop.DBus.Error.NoReply" // systemd re-executes itself
	nameHasNoOwner       = "org.freedesktop.DBus.Error.NameHasNoOwner"
	serviceUnknown       = "org.freedesktop.DBus.Error.ServiceUnknown"
	limitsExceeded       = "org.freedesktop.DBus.Error.LimitsExceeded"
	propertiesChangedSig = propertiesInterface + ".PropertiesChanged"
	nameOwnerChangedSig  = "org.freedesktop.DBus.NameOwnerChanged"
)

// bus is one connection to systemd: over a message bus, or to PID 1 directly.
type bus struct {
	wire    *wire
	conn    *dbus.Conn
	signals chan *dbus.Signal
	private bool
}

// unit is one loaded unit of a metered type.
type unit struct {
	name  string
	iface string // of its counters
	// hidden units have no series: top-level slices, read for their balance.
	hidden bool
	// young units came up after the first list, so that nothing of them was
	// counted before.
	young bool
	run   *run   // the run that systemd counts now; nil before the first
	slice string // "" before the first reading
	state accounting
	// skipped counts the sweeps that did not ask for a unit without accounting.
	skipped int
	// noData is when the counters of the present run were last found to be
	// without data; zero if they never were.
	noData time.Time
	status status
}

// accounting is what is known of a unit's counters.
type accounting int

const (
	accountingUnknown accounting = iota // to be read by the next sweep
	accountingOn                        // the counters have values
	accountingOff                       // IPAccounting=no
	accountingNone                      // IPAccounting=yes, but the unit never had a cgroup to count
	accountingLost                      // had values, or has processes, and now there is no data
	accountingFailed                    // reading made no sense
)

// run is one invocation of a unit.
type run struct {
	unit  string
	epoch string // invocation id; the boot id for units that have none
	// earlier is the id of the boot that the run was of, if not of this one.
	earlier string
	path    string
	series  *series   // nil before the first reading, and for hidden units
	slice   string    // "" while not known
	start   time.Time // when systemd began to count, as of the first reading
	odometer
	// quiet says of each direction that its packet counter stood still over the
	// last full reading: then its bytes need no reading until that moves.
	quiet  [2]bool
	ended  time.Time // when the unit was seen to be inactive; zero while it runs
	closed time.Time // when the run was found to be gone; zero while it can be read
	// restored says that the run is of an earlier Receiver, and that no list has
	// shown it so far.
	restored bool
	// final says that the counters were read after the end, or recorded.
	final bool
	// parted says that the last reading is of a service that has exited and goes on
	// without a cgroup (RemainAfterExit=). From systemd 256 on the next one of the
	// same run, for ExecStop= or ExecReload=, counts from 0.
	parted bool
	// unbegun says that systemd has named the run and announced nothing else of
	// it: its counters may still be those of the run before.
	unbegun bool
}

// status is the part of a unit's state that the inventory follows. Times are
// systemd's wall-clock timestamps.
type status struct {
	active, sub                           string
	invocation                            string // 32 hex digits, empty for none
	inactiveExit, activeEnter, activeExit time.Time
	inactiveEnter                         time.Time
}

func (s status) running() bool {
	return s.active != "" && s.active != "inactive" && s.active != "failed"
}

// restarting reports whether a run has ended and the next has not begun. With
// RestartMode=direct (systemd 254) nothing else tells of the end: the unit is
// not inactive in between, and the journal gets no record of the run.
func (s status) restarting() bool { return strings.HasPrefix(s.sub, "auto-restart") }

// over reports whether this is the state of a run that began and ended. A unit
// is also inactive before its first start.
func (s status) over() bool {
	return s.active != "" && !s.running() && s.invocation != "" &&
		!s.inactiveEnter.IsZero() && !s.inactiveEnter.Before(s.inactiveExit)
}

// connect opens the first connection that can be had. The error is that of the
// last address.
func (r *Receiver) connect(ctx context.Context) (b *bus, err error) {
	for _, address := range r.cfg.Addresses() {
		if b, err = open(ctx, address, private(address)); err == nil {
			return b, nil
		}
	}
	return nil, fmt.Errorf("%w; is D-Bus running there, and may uid %d use it? set UNITMETER_BUS", err, os.Geteuid())
}

// open connects to one address and asks for the signals of the inventory.
func open(ctx context.Context, address string, private bool) (*bus, error) {
	return openFor(ctx, address, private, true)
}

// openFor is open. Without signals, nobody need read them: what is not read
// would pile up without a bound.
func openFor(ctx context.Context, address string, private, signals bool) (*bus, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	w, err := dial(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("connect to systemd at %s: %w", address, err)
	}
	w.bus = !private
	if private {
		w.window = maxInFlightPrivate
	}
	conn, err := dbus.NewConn(w, dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to systemd at %s: %w", address, err), w.Close())
	}
	b := &bus{wire: w, conn: conn, signals: make(chan *dbus.Signal, 64), private: private}
	if signals {
		conn.Signal(b.signals)
	}
	if err = b.hello(ctx); err == nil && signals {
		err = b.subscribe(ctx)
	}
	if err != nil {
		if errors.Is(err, dbus.ErrClosed) {
			err = w.failure() // which says why
		}
		return nil, errors.Join(fmt.Errorf("subscribe to systemd's signals at %s: %w", address, err), conn.Close())
	}
	return b, nil
}

// hello makes the connection one that calls can be made on.
func (b *bus) hello(ctx context.Context) error {
	if err := b.conn.Auth([]dbus.Auth{external{}}); err != nil || b.private {
		return err
	}
	var name string
	return b.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.Hello", 0).Store(&name)
}

// subscribe asks for signals. PID 1 sends them to each client of its private
// socket, unasked and unfiltered.
func (b *bus) subscribe(ctx context.Context) error {
	if b.private {
		return nil
	}
	// Before any signal of systemd's: who that is, and who it comes to be.
	const ownerRule = "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg0='" + systemdName + "'"
	if err := b.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.AddMatch", 0, ownerRule).Err; err != nil {
		return err
	}
	var owner string
	if err := b.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, systemdName).Store(&owner); err != nil {
		return err
	}
	b.wire.found(owner)
	const fromSystemd = "type='signal',sender='" + systemdName + "',"
	for _, rule := range []string{
		fromSystemd + "interface='" + managerInterface + "',member='UnitNew'",
		fromSystemd + "interface='" + managerInterface + "',member='UnitRemoved'",
		fromSystemd + "interface='" + managerInterface + "',member='Reloading'",
		fromSystemd + "interface='" + propertiesInterface + "',member='PropertiesChanged',arg0='" + unitInterface + "'",
	} {
		if err := b.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.AddMatch", 0, rule).Err; err != nil {
			return err
		}
	}
	return b.conn.Object(systemdName, managerPath).CallWithContext(ctx, managerInterface+".Subscribe", 0).Err
}

// listed is one row of ListUnitsByPatterns.
type listed struct {
	Name, Description, Load, Active, Sub, Followed string
	Path                                           dbus.ObjectPath
	JobID                                          uint32
	JobType                                        string
	JobPath                                        dbus.ObjectPath
}

// list returns the loaded units that match any of the patterns and are not
// inactive. It loads nothing.
func (b *bus) list(ctx context.Context, patterns []string) ([]listed, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	states := []string{"active", "reloading", "refreshing", "activating", "deactivating", "maintenance"}
	var rows []listed
	err := b.conn.Object(systemdName, managerPath).
		CallWithContext(ctx, managerInterface+".ListUnitsByPatterns", 0, states, patterns).Store(&rows)
	if err != nil {
		return nil, fmt.Errorf("list systemd's units: %w", err)
	}
	return rows, nil
}

// version returns the major version of systemd, or 0 if it does not say.
func (b *bus) version(ctx context.Context) (version int, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = b.wire.gets(ctx, 1, func(int) property {
		return property{managerPath, managerInterface, "Version"} // "252.39-1~deb12u2"
	}, func(_ int, reply reply) {
		text, _ := reply.string()
		end := strings.IndexFunc(text, func(c rune) bool { return c < '0' || c > '9' })
		version, _ = strconv.Atoi(text[:max(end, 0)])
	})
	if err != nil {
		return 0, fmt.Errorf("read the version of systemd: %w", err)
	}
	return version, nil
}

// follow connects, lists the units, and follows their signals until the
// connection or ctx ends. connected says that it got as far as a list.
func (r *Receiver) follow(ctx context.Context) (connected bool, err error) {
	b, err := r.connect(ctx)
	if err != nil {
		return false, err
	}
	defer func() {
		r.mu.Lock()
		r.bus = nil
		r.health.refused += b.wire.refused.Load()
		r.mu.Unlock()
		_ = b.conn.Close() // the reason is in err already
	}()
	stop := context.AfterFunc(ctx, func() { _ = b.conn.Close() })
	defer stop()

	if err := r.relist(ctx, b, true); err != nil {
		return false, err
	}
	r.mu.Lock()
	r.bus, r.listed, r.reloadBegan = b, true, time.Now()
	recovered := r.broken != nil
	r.broken = nil
	select {
	case <-r.ready:
	default:
		close(r.ready)
	}
	units := len(r.units)
	r.mu.Unlock()
	if recovered {
		r.log.Info("found systemd again", "units", units)
	}

	ended := make(chan []*unit)
	reading, stopReading := context.WithCancel(ctx)
	var reader sync.WaitGroup
	reader.Go(func() { r.readEnded(reading, b, ended) })
	defer reader.Wait()
	defer stopReading()
	f := follower{Receiver: r, bus: b, fresh: map[string]bool{}, placing: placing{places: make(chan *dbus.Call, maxAsked)}}
	relist := time.NewTicker(relistEvery)
	defer relist.Stop()
	for {
		more := ended
		if len(f.ended) == 0 {
			more = nil
		}
		select {
		case signal, ok := <-b.signals:
			if !ok {
				if f.reloading && b.private { // which does not survive a reexec
					f.reloaded(func(h *health) { h.reexecs++ })
				}
				return true, b.wire.failure()
			}
			err = f.handle(ctx, signal)
		case more <- f.ended:
			f.ended = nil
		case call := <-f.places:
			f.placed(call)
		case <-f.freshTimer:
			f.freshTimer = nil
			if names := slices.Collect(maps.Keys(f.fresh)); len(names) > 0 && f.thaw == nil {
				clear(f.fresh)
				_, err = r.refresh(ctx, b, names)
			}
		case <-f.thaw:
			f.reloaded(func(h *health) { h.reloads++ })
			err = r.relist(ctx, b, true)
		case <-relist.C:
			if f.thaw == nil {
				err = r.relist(ctx, b, false)
			}
		}
		if err != nil {
			return true, err
		}
	}
}

// follower is the state of following the signals of one connection.
type follower struct {
	*Receiver
	bus *bus
	// fresh are the units of UnitNew signals that no PropertiesChanged has
	// followed yet.
	fresh      map[string]bool
	freshTimer <-chan time.Time
	// thaw is not nil during a reload or reexec: UnitRemoved arrives for each
	// unit then, and means nothing. It fires when the end is overdue.
	thaw      <-chan time.Time
	reloading bool // Reloading(true) came, and what it leads to is not known yet
	// ended are units that have ended and wait for their last reading.
	ended []*unit
	placing
}

func (f *follower) handle(ctx context.Context, signal *dbus.Signal) error {
	if !wellFormed(signal) {
		f.count(func(h *health) { h.dbusErrors++ })
		return nil
	}
	switch signal.Name {
	case propertiesChangedSig:
		if name := unitOfPath(string(signal.Path)); name != "" {
			properties, _ := argument[map[string]dbus.Variant](signal, 1)
			delete(f.fresh, name)
			return f.changed(ctx, name, properties)
		}
	case managerInterface + ".UnitNew":
		if name, ok := argument[string](signal, 0); ok && f.thaw == nil && f.follows(name) {
			f.noteFresh(name)
		}
	case managerInterface + ".UnitRemoved":
		if name, ok := argument[string](signal, 0); ok && f.thaw == nil {
			delete(f.fresh, name)
			f.removed(name)
		}
	case managerInterface + ".Reloading":
		if began, ok := argument[bool](signal, 0); ok && began {
			f.thaw, f.reloading = time.After(reloadTimeout), true
			f.mu.Lock()
			f.reloadBegan = time.Now()
			f.mu.Unlock()
		} else if ok {
			f.reloaded(func(h *health) { h.reloads++ })
			return f.relist(ctx, f.bus, true)
		}
	case nameOwnerChangedSig:
		if owner, ok := argument[string](signal, 2); ok && owner == "" {
			f.thaw = time.After(reloadTimeout)
		} else if ok {
			f.reloading = true // systemd 261 may leave out the signal
			f.reloaded(func(h *health) { h.reexecs++ })
			// Before systemd 258, one that has lost the bus forgets its
			// subscribers; one that has not answers with an error.
			f.bus.conn.Object(systemdName, managerPath).Go(managerInterface+".Subscribe", dbus.FlagNoReplyExpected, nil)
			return f.relist(ctx, f.bus, true)
		}
	}
	return nil
}

// noteFresh has a unit looked at in a moment.
func (f *follower) noteFresh(name string) {
	f.fresh[name] = true
	if f.freshTimer == nil {
		f.freshTimer = time.After(newUnitPause)
	}
}

// reloaded ends the freeze. The first that tells the end of a reload tells
// which kind it was.
func (f *follower) reloaded(count func(*health)) {
	f.thaw = nil
	if f.reloading {
		f.reloading = false
		f.count(count)
	}
}

// wellFormed reports whether the argument that handle takes has its type.
func wellFormed(signal *dbus.Signal) (ok bool) {
	switch signal.Name {
	case propertiesChangedSig:
		_, ok = argument[map[string]dbus.Variant](signal, 1)
	case managerInterface + ".Reloading":
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

func (r *Receiver) count(f func(*health)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.health)
}

// follows reports whether the inventory has a use for a unit: it is metered, or
// a top-level slice.
func (r *Receiver) follows(name string) bool {
	return topSlice(name) && validUnitName(name) || r.metered(name)
}

// metered reports whether the configuration asks for a unit of this name.
// Names that no unit can have are counted and skipped.
func (r *Receiver) metered(name string) bool {
	if !validUnitName(name) {
		r.count(func(h *health) { h.badNames++ })
		return false
	}
	return r.exports(name)
}

// exports reports whether a unit has a series, and is not followed only for the
// balance of its slice.
func (r *Receiver) exports(name string) bool {
	return slices.Contains(r.cfg.Types, typeOf(name)) && r.include.index(name) >= 0 && r.exclude.index(name) < 0
}

// relist brings the inventory in line with what systemd has loaded. Without all, it
// is for what signals may have missed: units that are in the same state as before are
// not asked. If one was restarted, its run shows to be over where it is read.
func (r *Receiver) relist(ctx context.Context, b *bus, all bool) error {
	patterns := make([]string, len(r.cfg.Types))
	for i, t := range r.cfg.Types {
		patterns[i] = "*." + t
	}
	patterns = append(patterns, "*.slice")
	rows, err := b.list(ctx, patterns)
	if err != nil {
		return err
	}
	here := make(map[string]listed, len(rows))
	version, err := b.version(ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		// Followed units are devices' other names; the name in the path is the
		// unit's own, whatever alias the row may carry.
		if name := unitOfPath(string(row.Path)); r.follows(name) {
			here[name] = row
		}
	}
	r.mu.Lock()
	r.version = cmp.Or(version, r.version)
	names := make([]string, 0, len(here))
	for name, row := range here {
		if u := r.units[name]; all || u == nil || u.run == nil || u.run.unbegun || u.status.active != row.Active || u.status.sub != row.Sub {
			names = append(names, name)
		}
	}
	for name, u := range r.units {
		_, loaded := here[name]
		switch {
		case loaded:
			if u.state == accountingOff || u.state == accountingNone {
				u.state = accountingUnknown // ask again whether it counts now
			}
		case u.run == nil || u.run.ended.IsZero():
			// It ended while nobody looked. Its counters can still be read
			// until systemd unloads it.
			r.end(u)
		}
	}
	r.mu.Unlock()
	return r.learn(ctx, b, names)
}

// refresh asks systemd for the state of some units, without loading those that
// have gone: to read a unit by its name loads it, and announces that as new. It
// returns the names of those that are there and not inactive.
func (r *Receiver) refresh(ctx context.Context, b *bus, names []string) (loaded []string, err error) {
	patterns := make([]string, len(names))
	for i, name := range names {
		patterns[i] = strings.ReplaceAll(name, `\`, `\\`) // fnmatch(3)
	}
	rows, err := b.list(ctx, patterns)
	if err != nil {
		return nil, err
	}
	for _, row := range rows {
		if name := unitOfPath(string(row.Path)); r.follows(name) {
			loaded = append(loaded, name)
		}
	}
	return loaded, r.learn(ctx, b, loaded)
}

// learn reads the state of units that have just been listed.
func (r *Receiver) learn(ctx context.Context, b *bus, names []string) error {
	properties := []string{"InvocationID", "ActiveState", "SubState", "InactiveExitTimestamp", "ActiveEnterTimestamp", "ActiveExitTimestamp", "InactiveEnterTimestamp"}
	n := len(properties)
	found := make([]status, len(names))
	failed := make([]error, len(names))
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = unitPath(name)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := b.wire.gets(ctx, n*len(names), func(i int) property {
		return property{paths[i/n], unitInterface, properties[i%n]}
	}, func(i int, reply reply) {
		if err := found[i/n].set(properties[i%n], reply); err != nil {
			failed[i/n] = err
		}
	})
	if err != nil {
		return fmt.Errorf("read the state of %d units: %w", len(names), err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, name := range names {
		if failed[i] != nil {
			r.health.dbusErrors++
			r.log.Debug("skipped a unit", "unit", name, "err", failed[i])
			continue
		}
		r.update(name, found[i])
	}
	return nil
}

// set takes one property from a reply.
func (s *status) set(name string, reply reply) (err error) {
	var usec uint64
	switch name {
	case "ActiveState":
		s.active, err = reply.string()
	case "SubState":
		s.sub, err = reply.string()
	case "InvocationID":
		var id []byte
		if id, err = reply.bytes(); err == nil {
			err = s.setInvocation(id)
		}
	default:
		if usec, err = reply.uint64(); err == nil {
			s.setTime(name, usec)
		}
	}
	return err
}

func (s *status) setInvocation(id []byte) error {
	if len(id) != 0 && len(id) != 16 {
		return fmt.Errorf("systemd answered an InvocationID of %d bytes, not 16", len(id))
	}
	s.invocation = hex.EncodeToString(id)
	return nil
}

// setTime takes a timestamp property, in microseconds since the epoch.
func (s *status) setTime(name string, usec uint64) {
	var t time.Time
	if usec != 0 && usec <= maxTotal {
		t = time.UnixMicro(int64(usec))
	}
	switch name {
	case "InactiveExitTimestamp":
		s.inactiveExit = t
	case "ActiveEnterTimestamp":
		s.activeEnter = t
	case "ActiveExitTimestamp":
		s.activeExit = t
	case "InactiveEnterTimestamp":
		s.inactiveEnter = t
	}
}

// changed takes a PropertiesChanged signal of the Unit interface.
func (f *follower) changed(ctx context.Context, name string, properties map[string]dbus.Variant) error {
	r := f.Receiver
	if !r.follows(name) {
		return nil
	}
	if _, ok := properties["InvocationID"]; !ok { // systemd before 243
		_, err := r.refresh(ctx, f.bus, []string{name})
		return err
	}
	r.mu.Lock()
	var next status
	if u, ok := r.units[name]; ok {
		next = u.status
	}
	r.mu.Unlock()
	for property, value := range properties {
		if err := next.change(property, value.Value()); err != nil {
			r.count(func(h *health) { h.dbusErrors++ })
			return nil
		}
	}
	r.mu.Lock()
	r.update(name, next)
	u := r.units[name]
	unbegun := u != nil && u.run.unbegun
	unplaced := u != nil && u.slice == ""
	exited := r.version >= 256 && next.sub == "exited" // see run.parted
	r.mu.Unlock()
	switch {
	case u == nil:
	case !next.running() || next.restarting() || exited:
		if !unbegun {
			f.ended = append(f.ended, u)
		}
	case unplaced && next.invocation != "":
		f.place(u)
	}
	return nil
}

// change takes one property of a signal.
func (s *status) change(property string, value any) error {
	var ok bool
	switch property {
	case "ActiveState":
		s.active, ok = kept(value)
	case "SubState":
		s.sub, ok = kept(value)
	case "InactiveExitTimestamp", "ActiveEnterTimestamp", "ActiveExitTimestamp", "InactiveEnterTimestamp":
		var usec uint64
		usec, ok = value.(uint64)
		s.setTime(property, usec)
	case "InvocationID":
		var id []byte
		if id, ok = value.([]byte); ok {
			return s.setInvocation(id)
		}
	default:
		return nil
	}
	if !ok {
		return fmt.Errorf("systemd signalled %s as a %T", property, value)
	}
	return nil
}

// kept returns a string of a D-Bus message as a copy: the strings of godbus keep
// the 4 KiB alive in which all those of their message are.
func kept(value any) (text string, ok bool) {
	text, ok = value.(string)
	return strings.Clone(text), ok
}

// update takes the state of one unit. The caller holds mu.
func (r *Receiver) update(name string, next status) {
	u, ok := r.units[name]
	if ok && next.invocation == "" && !next.running() {
		r.drop(u) // it was unloaded, and loaded again by the question
		return
	}
	if !ok {
		if !next.running() && !next.over() {
			return
		}
		u = &unit{
			name: name, iface: CounterInterface(typeOf(name)), young: r.listed,
			hidden: !r.exports(name),
		}
		r.units[name] = u
	}
	begun := next.running() || ok && !next.inactiveExit.Equal(u.status.inactiveExit)
	u.status = next
	epoch, path := next.invocation, invocationPath(next.invocation)
	if epoch == "" {
		epoch, path = r.cfg.BootID, unitPath(name)
	}
	if u.run == nil || u.run.epoch != epoch {
		if u.run != nil && u.run.closed.IsZero() {
			u.run.closed = time.Now()
		}
		key := r.runKey(name, epoch)
		current, ok := r.runs[key]
		if !ok {
			current = &run{unit: name, epoch: epoch, slice: u.slice, unbegun: true}
			r.runs[key] = current
		}
		current.path, current.closed, current.restored = path, time.Time{}, false
		u.run, u.noData = current, time.Time{}
		u.state = accountingUnknown
	}
	if u.state == accountingOff || u.state == accountingNone {
		u.state = accountingUnknown // a set-property signals a change too
	}
	u.run.quiet = [2]bool{}
	u.run.unbegun = u.run.unbegun && !begun
	if u.run.parted && next.running() && next.sub != "exited" {
		// Systemd runs a command, in a new cgroup. What is being read is of before.
		u.run.parted, u.run.last, u.run.time = false, Counters{}, time.Now()
	}
	if next.running() {
		u.run.ended = time.Time{}
	} else {
		r.end(u)
	}
}

// end marks the present run of a unit as over. Its sockets may go on for a
// while, and systemd counts them for as long as the unit stays loaded.
func (r *Receiver) end(u *unit) {
	if u.run != nil && u.run.ended.IsZero() {
		u.run.ended = time.Now()
	}
}

// removed forgets a unit that systemd unloaded. Its run is kept for a while,
// so that it is not counted again should the same run come back in a list.
func (r *Receiver) removed(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if u, ok := r.units[name]; ok {
		r.drop(u)
	}
}

// drop forgets a unit that cannot be read any more. The caller holds mu.
func (r *Receiver) drop(u *unit) {
	if r.units[u.name] == u { // else it has been loaded again meanwhile
		delete(r.units, u.name)
	}
	if u.run != nil && u.run.closed.IsZero() {
		u.run.closed = time.Now()
	}
}
