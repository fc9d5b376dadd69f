package systemd

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

const (
	lateTraffic = 2 * time.Minute // reads after the end of a run, or its last growth
	// recheckEvery is after how many sweeps a unit without accounting is asked
	// again: systemd tells nobody of a set-property IPAccounting=yes.
	recheckEvery = 6
)

// unit is one loaded unit of a metered type.
type unit struct {
	name  string
	iface string // of its counters
	// unmetered units are top-level slices, read for what they count beside the
	// units in them.
	unmetered bool
	// young units came up after the first list, so that nothing of them was
	// counted before.
	young bool
	// since is when accounting was switched on at the earliest; zero if not known.
	since time.Time
	run   *run   // the run that systemd counts now; nil before the first
	slice string // "" before the first reading
	state accounting
	// skipped counts the sweeps since the unit was last asked for.
	skipped int
	// noData is when the counters of the present run were last found to be
	// without data; zero if they never were.
	noData time.Time
	status status
}

// accounting is the state of a unit's counters.
type accounting int

const (
	accountingUnknown accounting = iota // to be read by the next sweep
	accountingOn                        // the counters have values
	accountingOff                       // IPAccounting=no
	accountingNone                      // IPAccounting=yes, but the unit never had a cgroup to count
	accountingLost                      // had values, or has processes, and now there is no data
	accountingFailed                    // reading made no sense
	accountingCount                     // how many there are
)

// String returns the state as Unit.Accounting has it.
func (a accounting) String() string { return AccountingStates()[a] }

// AccountingStates returns the values of Unit.Accounting.
func AccountingStates() [accountingCount]string {
	return [...]string{"unknown", "on", "off", "no_data", "lost", "failed"}
}

// run is one invocation of a unit.
type run struct {
	unit  string
	epoch string // see Reading.Epoch
	path  string
	slice string    // empty while not known
	start time.Time // when systemd began to count, as of the first reading
	last  Counters  // as of the last reading
	time  time.Time // of the last reading; zero before the first
	// known says that an earlier Source has read the run.
	known bool
	// quiet says of each direction that its packet counter stood still over the
	// last full reading: then its bytes need no reading until that moves.
	quiet [2]bool
	ended time.Time // when the unit was seen to be inactive; zero while it runs
	// grew is the time of the last reading after the end that had more. left means that
	// processes have outlived the unit in its cgroup (KillMode=process).
	grew time.Time
	left bool
	// parted says that the last reading is of a service that has exited and goes on
	// without a cgroup (RemainAfterExit=). From systemd 256 on the next one of the
	// same run, for ExecStop= or ExecReload=, counts from 0.
	parted bool
	// unbegun means that systemd has announced only the id of the run. Its counters may
	// still belong to the run before.
	unbegun bool
	placed  bool // the slice and the accounting have been asked for
}

// beingRead reports whether sweeps read a run: it goes on, has left processes
// behind, or has ended or grown not long ago, so that its sockets may still be at work.
func (r *run) beingRead(now time.Time) bool {
	return r.ended.IsZero() || r.left || now.Sub(r.ended) <= lateTraffic || now.Sub(r.grew) <= lateTraffic
}

// read reports whether any reading of the run is in the totals.
func (r *run) read() bool { return r.known || !r.time.IsZero() }

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

// follows reports whether the inventory has a use for a unit: it is metered, or
// a top-level slice.
func (s *Source) follows(name string) bool {
	return s.cfg.Balanced(name) && ValidUnitName(name) || s.metered(name)
}

// metered reports whether the configuration asks for a unit of this name.
// Names that no unit can have are counted and skipped.
func (s *Source) metered(name string) bool {
	if !ValidUnitName(name) {
		s.count(func(h *Health) { h.BadNames++ })
		return false
	}
	return s.cfg.Metered(name)
}

// relist brings the inventory in line with what systemd has loaded. Without all, it
// is for what signals may have missed: units that are in the same state as before are
// not asked. If one was restarted, its run shows to be over where it is read.
func (s *Source) relist(ctx context.Context, b *bus.Conn, all bool) error {
	patterns := make([]string, len(s.cfg.Types))
	for i, t := range s.cfg.Types {
		patterns[i] = "*." + t
	}
	patterns = append(patterns, "*.slice")
	if all && s.cfg.Named != nil {
		s.cfg.Named(ownNames(ctx, b, s.cfg.Names))
	}
	states := runningStates()
	if all {
		states = append(states, "inactive", "failed")
	}
	rows, err := s.list(ctx, b, states, patterns)
	if err != nil {
		return err
	}
	here := make(map[string]Listed, len(rows))
	version, err := versionOf(ctx, b)
	if err != nil {
		return err
	}
	var ended []Listed
	for _, row := range rows {
		if row.Active == "inactive" || row.Active == "failed" {
			ended = append(ended, row)
			continue
		}
		// Followed units are devices' other names; the name in the path is the
		// unit's own, whatever alias the row may carry.
		if name := unitOfPath(string(row.Path)); s.follows(name) {
			here[name] = row
		}
	}
	left, err := s.leftOver(ctx, b, ended)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.version = cmp.Or(version, s.version)
	names := make([]string, 0, len(here))
	for name, row := range here {
		if u := s.units[name]; all || u == nil || u.run == nil || u.run.unbegun || u.status.active != row.Active || u.status.sub != row.Sub {
			names = append(names, name)
		}
	}
	for name, u := range s.units {
		_, loaded := here[name]
		switch {
		case loaded:
			if u.state == accountingOff || u.state == accountingNone {
				u.state = accountingUnknown // ask again whether it counts now
			}
		case u.run == nil || u.run.ended.IsZero():
			// It ended while nobody looked. Its counters can still be read
			// until systemd unloads it.
			s.end(u)
		}
	}
	s.mu.Unlock()
	return s.learn(ctx, b, append(names, left...))
}

// leftOver returns which units that have ended have left processes behind
// (KillMode=process). Those that the inventory has are left out.
func (s *Source) leftOver(ctx context.Context, b *bus.Conn, rows []Listed) (left []string, err error) {
	var ended []string
	s.mu.Lock()
	for _, row := range rows {
		name := unitOfPath(string(row.Path))
		if u := s.units[name]; row.Load == "loaded" && (u == nil || u.run == nil) && ValidUnitName(name) && s.cfg.Metered(name) {
			ended = append(ended, name)
		}
	}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, bus.CallTimeout)
	defer cancel()
	err = b.Gets(ctx, len(ended), func(i int) bus.Property {
		return bus.Property{Path: unitPath(ended[i]), Interface: CounterInterface(TypeOf(ended[i])), Name: propertyName(controlGroup)}
	}, func(i int, reply bus.Reply) {
		if cgroup, err := reply.Text(); err == nil && cgroup != "" {
			left = append(left, ended[i])
		}
	})
	return left, err
}

// ownNames returns the units' own names of those names that are second ones
// (Alias=). systemd lists units by their own. To ask loads a unit for a moment.
func ownNames(ctx context.Context, b *bus.Conn, names []string) map[string]string {
	own := map[string]string{}
	for _, name := range names {
		var path dbus.ObjectPath
		call := b.Manager().CallWithContext(ctx, bus.ManagerInterface+".LoadUnit", 0, name)
		if call.Store(&path) != nil {
			continue // a name that no unit can have: nothing has it
		}
		if id := unitOfPath(string(path)); id != "" && id != name {
			own[name] = id
		}
	}
	return own
}

// refresh asks systemd for the state of some units, without loading those that
// have gone: to read a unit by its name loads it, and announces that as new. It
// returns the names of those that are there and not inactive.
func (s *Source) refresh(ctx context.Context, b *bus.Conn, names []string) (loaded []string, err error) {
	rows, err := s.list(ctx, b, runningStates(), names) // in a pattern, a backslash stands for itself (FNM_NOESCAPE)
	if err != nil {
		return nil, err
	}
	for _, row := range rows {
		if name := unitOfPath(string(row.Path)); s.follows(name) {
			loaded = append(loaded, name)
		}
	}
	return loaded, s.learn(ctx, b, loaded)
}

// learn reads the state of units that have just been listed, however many they are: the
// time limit is for each batch. It logs how far it is where that takes long.
func (s *Source) learn(ctx context.Context, b *bus.Conn, names []string) error {
	const batch, patience = 500, 10 * time.Second
	said := time.Now()
	for done := 0; done < len(names); done += batch {
		if time.Since(said) > patience {
			said = time.Now()
			s.log.Info("reading the state of all units", "done", done, "units", len(names))
		}
		limited, cancel := context.WithTimeout(ctx, bus.CallTimeout)
		err := s.learnSome(limited, b, names[done:min(done+batch, len(names))])
		cancel()
		if err != nil {
			return err
		}
		s.learned.Add(1)
	}
	return nil
}

func (s *Source) learnSome(ctx context.Context, b *bus.Conn, names []string) error {
	properties := []string{"InvocationID", "ActiveState", "SubState", "InactiveExitTimestamp", "ActiveEnterTimestamp", "ActiveExitTimestamp", "InactiveEnterTimestamp"}
	n := len(properties)
	found := make([]status, len(names))
	failed := make([]error, len(names))
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = unitPath(name)
	}
	err := b.Gets(ctx, n*len(names), func(i int) bus.Property {
		return bus.Property{Path: paths[i/n], Interface: bus.UnitInterface, Name: properties[i%n]}
	}, func(i int, reply bus.Reply) {
		if err := found[i/n].set(properties[i%n], reply); err != nil {
			failed[i/n] = err
		}
	})
	if err != nil {
		return fmt.Errorf("read the state of %d units: %w", len(names), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, name := range names {
		if failed[i] != nil {
			s.health.Errors++
			s.log.Debug("skipped a unit", "unit", name, "err", failed[i])
			continue
		}
		s.update(name, found[i])
	}
	return nil
}

// set takes one property from a reply.
func (s *status) set(name string, reply bus.Reply) (err error) {
	var usec uint64
	switch name {
	case "ActiveState":
		s.active, err = reply.Text()
	case "SubState":
		s.sub, err = reply.Text()
	case "InvocationID":
		var id []byte
		if id, err = reply.Bytes(); err == nil {
			err = s.setInvocation(id)
		}
	default:
		if usec, err = reply.Uint64(); err == nil {
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
	if usec != 0 && usec <= math.MaxInt64 {
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
func (s *Source) update(name string, next status) {
	u, ok := s.units[name]
	if ok && next.invocation == "" && !next.running() {
		s.drop(u) // it was unloaded, and loaded again by the question
		return
	}
	if !ok {
		if !next.running() && !next.over() {
			return
		}
		u = &unit{
			name: name, iface: CounterInterface(TypeOf(name)), young: s.listed,
			unmetered: !s.cfg.Metered(name),
		}
		s.units[name] = u
	}
	begun := next.running() || ok && !next.inactiveExit.Equal(u.status.inactiveExit)
	u.status = next
	epoch, path := next.invocation, invocationPath(next.invocation)
	if epoch == "" {
		epoch, path = s.cfg.BootID+"/"+name, unitPath(name)
	}
	if u.run == nil || u.run.epoch != epoch {
		u.run = &run{unit: name, epoch: epoch, path: path, slice: u.slice, known: s.cfg.Known(epoch), unbegun: true}
		u.noData, u.state = time.Time{}, accountingUnknown
	}
	if u.state == accountingOff || u.state == accountingNone {
		u.state = accountingUnknown // a set-property signals a change too
	}
	u.run.quiet = [2]bool{}
	u.run.unbegun = u.run.unbegun && !begun
	if u.run.parted && next.running() && next.sub != "exited" {
		// Systemd runs a command, in a new cgroup. What is being read is of before.
		u.run.parted = false
		s.restart(u.run)
	}
	if next.running() {
		u.run.ended = time.Time{}
	} else {
		s.end(u)
	}
}

// end marks the present run of a unit as over. Its sockets may go on for a
// while, and systemd counts them for as long as the unit stays loaded.
func (s *Source) end(u *unit) {
	if u.run != nil && u.run.ended.IsZero() {
		u.run.ended = time.Now()
	}
}

// restart says that the counters of a run begin again. What is being read is of
// before. The caller holds mu.
func (s *Source) restart(r *run) {
	r.last, r.time = Counters{}, time.Now()
	s.cfg.Sink.Restart(r.epoch, r.time)
}

// removed forgets a unit that systemd unloaded.
func (s *Source) removed(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u, ok := s.units[name]; ok {
		s.drop(u)
	}
}

// drop forgets a unit that cannot be read any more. The caller holds mu.
func (s *Source) drop(u *unit) {
	if s.units[u.name] == u { // else it has been loaded again meanwhile
		delete(s.units, u.name)
	}
}
