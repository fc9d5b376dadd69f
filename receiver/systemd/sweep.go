package systemd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// The properties of a target, in the order in which they are read. Packets
// come first. A packet that is counted between two reads then makes the packet counter
// move in the next sweep, which reads the bytes again.
//
// The packets of a direction have its number, the bytes have it with
// ingressBytes added.
const (
	ingressPackets = iota
	egressPackets
	ingressBytes
	egressBytes
	ipAccounting
	execMainStart
	slice
	controlGroup
	subState
	properties // how many there are
)

func propertyName(i int) string {
	return [properties]string{"IPIngressPackets", "IPEgressPackets", "IPIngressBytes", "IPEgressBytes", "IPAccounting", "ExecMainStartTimestampMonotonic", "Slice", "ControlGroup", "SubState"}[i]
}

// target is one run that a sweep reads, with the answers.
type target struct {
	unit *unit
	run  *run

	// The state at the start of the sweep. Signals change the unit meanwhile.
	asked        time.Time
	path, iface  string
	last         Counters
	quiet        [2]bool // by direction: read the packets first, and the bytes only if they moved
	asks         bool    // ask whether there are counters first
	lost         bool    // had no data at the last reading
	mayBeUnreset bool    // see executedNothing
	needSlice    bool
	exited       bool // see run.parted
	counted      int  // 1 if it has counters, as far as is known
	waited       int  // since when it was read last; longest first
	ended        bool // see run.left

	value  [properties]uint64
	got    [properties]bool
	slice  string
	cgroup string
	sub    string // asked after all counters
	noData bool
	gone   bool // the run is over and can no longer be read
	missed bool // the bus, not systemd, answered; the next sweep has a better chance
	fell   bool // a counter was lower than before; this is so after the second reading too
	err    error
	time   time.Time // of the last reply
}

// Read reads the counters of all metered units, until ctx ends at the latest. An error
// means that some were not reached. Their counters come with the next reading.
func (s *Source) Read(ctx context.Context) error {
	s.mu.Lock()
	b, private, targets := s.bus, s.private, s.targets()
	s.mu.Unlock()
	err := errNotConnected
	if b != nil {
		err = s.readOver(ctx, b, private, targets)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noteLate(err)
	for message, n := range s.said {
		if n > sayAtMost {
			s.log.Info("the same of more units: "+message, "units", n-sayAtMost)
		}
	}
	clear(s.said)
	return err
}

// readOver reads the targets over the private socket, if that pays, and else over the
// bus.
func (s *Source) readOver(ctx context.Context, b *bus.Conn, private string, targets []target) error {
	if private == "" || len(targets) < s.cfg.PrivateFrom {
		return s.readAll(ctx, b, b, targets)
	}
	line, err := bus.DialPrivate(ctx, private)
	if err != nil { // PID 1 re-executes itself, or its limit of connections is reached
		return s.readAll(ctx, b, b, targets)
	}
	defer line.Close()
	return s.readAll(ctx, b, beside{line, b}, targets)
}

// late is the error of a sweep whose deadline came before all units were read.
type late struct {
	reached, units int
	silent         bool // systemd has answered nothing
}

func (l late) Error() string {
	return fmt.Sprintf("read %d units: only %d were reached before the deadline", l.units, l.reached)
}

// noteLate logs that sweeps have become late, and that they are in time again. The
// caller holds mu.
func (s *Source) noteLate(err error) {
	var l late
	switch isLate := errors.As(err, &l); {
	case isLate && !s.late && l.silent:
		s.log.Warn("the reading of all units ended at its deadline; systemd did not answer", "units", l.units,
			"next", "see whether \"systemctl list-units\" answers; the readings go on")
	case isLate && !s.late:
		s.log.Warn("the reading of all units ended at its deadline; the next one starts with the units that were not reached",
			"units", l.units, "reached", l.reached, "next", "raise UNITMETER_SWEEP_TIMEOUT, or leave units out with UNITMETER_EXCLUDE")
	case err == nil && s.late:
		s.log.Info("all units are read in time again")
	}
	s.late = errors.As(err, &l) || s.late && err != nil
}

// readAll reads and applies the targets in the order that keeps the balances of
// slices from ever showing too much: a slice is read before the units in it,
// and, when it is first seen, after them.
func (s *Source) readAll(ctx context.Context, b *bus.Conn, from getter, targets []target) error {
	var before, after []target
	units := targets[:0] // in place: they are nearly all
	for _, t := range targets {
		switch {
		case !s.cfg.Balanced(t.unit.name):
			units = append(units, t)
		case !t.run.read() && !t.unit.young:
			after = append(after, t)
		default:
			before = append(before, t)
		}
	}
	var missed error
	reached := 0
	for _, part := range [][]target{before, units, after} {
		n, err := s.inBatches(ctx, from, part)
		reached += n
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) ||
			err != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
			return late{reached, len(targets), reached == 0 && !slices.ContainsFunc(part, func(t target) bool { return !t.time.IsZero() })}
		} else if err != nil {
			return err
		}
		if slices.ContainsFunc(part, func(t target) bool { return t.missed }) {
			missed = errNotAnswered
		}
	}
	return cmp.Or(s.again(ctx, b, from, units), missed)
}

// A sweep reads in batches, so that the batches before its deadline are complete. Each
// batch should take a quarter of the time that is left.
const largestBatch, smallestBatch = 1024, 16

// inBatches reads targets, those first that have waited longest, until ctx ends. It
// returns how many were reached.
func (s *Source) inBatches(ctx context.Context, from getter, targets []target) (reached int, err error) {
	deadline, limited := ctx.Deadline()
	if limited && time.Duration(len(targets))*s.pace > time.Until(deadline)/2 {
		putInTurn(targets)
	}
	for reached < len(targets) {
		began, size := time.Now(), largestBatch
		if limited {
			left := deadline.Sub(began)
			if reached > 0 && left < smallestBatch*s.pace { // it would not be finished
				return reached, context.DeadlineExceeded
			}
			size = min(max(int(left/4/s.pace), smallestBatch), largestBatch)
		}
		batch := targets[reached:min(reached+size, len(targets))]
		if err := s.collect(ctx, from, batch); err != nil {
			s.pace = min(4*s.pace, slowestPace)
			return reached, err
		}
		reached += len(batch)
		if len(batch) >= smallestBatch {
			s.pace = max(time.Since(began)/time.Duration(len(batch)), time.Microsecond)
		}
	}
	return reached, nil
}

// usualPace is the first estimate of the time for a unit, and slowestPace the estimate
// for a systemd that did not answer in time.
const usualPace, slowestPace = 500 * time.Microsecond, time.Second

// putInTurn sorts targets by how long they have waited. Units with counters alternate
// with others, so that each kind is read.
func putInTurn(targets []target) {
	slices.SortStableFunc(targets, func(a, b target) int {
		return cmp.Or(cmp.Compare(b.counted, a.counted), cmp.Compare(b.waited, a.waited))
	})
	counted := 0
	for counted < len(targets) && targets[counted].counted > 0 {
		counted++
	}
	ordered := make([]target, 0, len(targets))
	for i := range max(counted, len(targets)-counted) {
		if i < counted {
			ordered = append(ordered, targets[i])
		}
		if counted+i < len(targets) {
			ordered = append(ordered, targets[counted+i])
		}
	}
	copy(targets, ordered)
}

var (
	errNotConnected = errors.New("not connected to systemd")
	errNotAnswered  = errors.New("systemd did not answer some calls")
)

// targets lists what a sweep has to read. The caller holds mu.
func (s *Source) targets() []target {
	now := time.Now()
	targets := make([]target, 0, len(s.units))
	for _, u := range s.units {
		if u.run == nil || !u.run.beingRead(now) {
			continue
		}
		t := s.target(u, now)
		u.skipped++
		t.waited = u.skipped
		switch u.state {
		case accountingOff, accountingNone:
			if u.skipped < recheckEvery {
				continue
			}
		case accountingUnknown:
			if u.status.sub != "exited" { // it has no process, and nothing to count
				t.waited *= recheckEvery
			}
		default:
			t.counted = 1
		}
		targets = append(targets, t)
	}
	return targets
}

// target returns what is to be read of a unit with a run. The caller holds mu.
func (s *Source) target(u *unit, now time.Time) target {
	quiet := u.run.quiet
	switch u.state {
	case accountingLost, accountingNone:
		quiet = [2]bool{true, true}
	}
	// Most units of a large host have no counters. One that ends soon has no time.
	asks := u.state == accountingOff || u.state == accountingUnknown && !u.young && u.run.ended.IsZero()
	return target{
		unit: u, run: u.run, asked: now, path: u.run.path, iface: u.iface, last: u.run.last,
		quiet: quiet, asks: asks, lost: u.state == accountingLost,
		mayBeUnreset: !u.run.read() && TypeOf(u.name) == "service" && (u.status.sub == "exited" || u.run.unbegun),
		needSlice:    u.slice == "",
		ended:        !u.run.ended.IsZero(),
		exited:       s.version >= 256 && TypeOf(u.name) == "service" && u.status.sub == "exited",
	}
}

// read fills in the targets.
func (s *Source) read(ctx context.Context, from getter, targets []target) error {
	type call struct{ target, property int }
	calls := make([]call, 0, 4*len(targets))
	for i, t := range targets {
		if t.asks {
			calls = append(calls, call{i, ipAccounting})
			continue
		}
		calls = append(calls, call{i, ingressPackets}, call{i, egressPackets})
		for direction, quiet := range t.quiet {
			if !quiet {
				calls = append(calls, call{i, ingressBytes + direction})
			}
		}
	}
	get := func() error {
		return from.Gets(ctx, len(calls), func(i int) bus.Property {
			t, name := &targets[calls[i].target], propertyName(calls[i].property)
			if calls[i].property == subState {
				return bus.Property{Path: t.path, Interface: bus.UnitInterface, Name: name}
			}
			return bus.Property{Path: t.path, Interface: t.iface, Name: name}
		}, func(i int, reply bus.Reply) {
			targets[calls[i].target].take(calls[i].property, reply)
		})
	}
	if err := get(); err != nil {
		return err
	}
	// The second round asks what the first one raised.
	calls = calls[:0]
	for i := range targets {
		t := &targets[i]
		switch {
		case t.gone || t.missed || t.err != nil:
		case t.asks && t.got[ipAccounting] && t.value[ipAccounting] == 0:
			t.noData = true
		case t.asks:
			calls = append(calls, call{i, ingressPackets}, call{i, egressPackets}, call{i, ingressBytes}, call{i, egressBytes}, call{i, controlGroup})
		case t.noData:
			calls = append(calls, call{i, ipAccounting}, call{i, controlGroup})
		default:
			for direction, quiet := range t.quiet {
				if quiet && (t.moved(direction) || t.lost) {
					calls = append(calls, call{i, ingressBytes + direction})
				}
			}
		}
		if t.mayBeUnreset {
			calls = append(calls, call{i, execMainStart})
		}
		if t.needSlice && !t.noData {
			calls = append(calls, call{i, slice})
		}
		if t.ended && !t.noData {
			calls = append(calls, call{i, controlGroup})
		}
		if t.exited && !t.noData {
			calls = append(calls, call{i, controlGroup}, call{i, subState})
		}
	}
	return get()
}

// take is the handler of one reply.
func (t *target) take(property int, reply bus.Reply) {
	t.time = time.Now()
	switch string(reply.ErrorName) {
	case noUnitForInvocation, noSuchUnit, unknownObject:
		t.gone = true
		return
	case noReply, nameHasNoOwner, serviceUnknown, limitsExceeded:
		t.missed = true
		return
	}
	var v uint64
	var err error
	switch property {
	case ipAccounting:
		var on bool
		if on, err = reply.Bool(); on {
			v = 1
		}
	case slice:
		t.slice, err = reply.Text()
	case controlGroup:
		t.cgroup, err = reply.Text()
	case subState:
		t.sub, err = reply.Text()
	default:
		v, err = reply.Uint64()
	}
	switch {
	case err != nil:
		t.err = err
	case property < ipAccounting && v == noData:
		t.noData = true
	case property < ipAccounting && v > math.MaxInt64:
		t.err = fmt.Errorf("systemd answered an impossible value of %s, %d", propertyName(property), v)
	default:
		t.value[property], t.got[property] = v, true
	}
}

// moved reports whether the packet counter of a direction differs from the last
// reading.
func (t *target) moved(direction int) bool {
	return t.value[direction] != [2]uint64{t.last.IngressPackets, t.last.EgressPackets}[direction]
}

// counters returns the reading, if it is whole. The bytes of a direction that were
// not read are those of the last reading, if no packet has moved since.
func (t *target) counters() (c Counters, ok bool) {
	if t.gone || t.missed || t.noData || t.err != nil || !t.got[ingressPackets] || !t.got[egressPackets] {
		return c, false
	}
	bytes := [2]uint64{t.last.IngressBytes, t.last.EgressBytes}
	for direction := range bytes {
		if t.got[ingressBytes+direction] {
			bytes[direction] = t.value[ingressBytes+direction]
		} else if !t.assumed(direction) {
			return c, false
		}
	}
	return Counters{
		IngressPackets: t.value[ingressPackets], EgressPackets: t.value[egressPackets],
		IngressBytes: bytes[0], EgressBytes: bytes[1],
	}, true
}

// assumed reports whether the bytes of a direction need no reading.
func (t *target) assumed(direction int) bool {
	return t.quiet[direction] && !t.moved(direction) && !t.lost
}

// collect reads targets and puts the readings on the odometers. What fell is read
// once more: accounting that is switched off and on between the four replies
// leaves packets of before and bytes of after.
func (s *Source) collect(ctx context.Context, from getter, targets []target) error {
	err := s.read(ctx, from, targets)
	if fell := s.apply(targets); err == nil && len(fell) > 0 {
		err = s.read(ctx, from, fell)
		s.apply(fell)
	}
	return err
}

// apply puts the readings on the odometers. It returns the targets that are to be
// read again, since a counter fell.
func (s *Source) apply(targets []target) (fell []target) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range targets {
		t := &targets[i]
		if s.applyOne(t); t.fell {
			again := s.target(t.unit, time.Now())
			again.quiet, again.asks, again.fell = [2]bool{}, false, true
			fell = append(fell, again)
		}
	}
	return fell
}

// applyOne takes one reading. The caller holds mu.
func (s *Source) applyOne(t *target) {
	u, current := t.unit, t.unit.run == t.run
	if t.gone || t.missed || t.noData || t.got[ingressPackets] {
		u.skipped = 0
	}
	raw, ok := t.counters()
	lower := raw.lower(t.run.last)
	switch {
	case t.gone:
		if current && !t.run.ended.IsZero() {
			s.drop(u)
		}
		return
	case t.missed:
		s.health.Errors++
		return
	case t.err != nil:
		s.health.Errors++
		if current && u.state != accountingFailed {
			u.state = accountingFailed
			s.say(slog.LevelWarn, "cannot read the counters of a unit; it has no points until this ends", "unit", u.name, "err", t.err)
		}
		return
	case t.noData:
		if current {
			s.withoutData(u, t)
		}
		return
	case !ok || t.needSlice && !t.got[slice] || t.mayBeUnreset && !t.got[execMainStart] || t.executedNothing(),
		t.exited && t.sub != "exited":
		return // not reached before the deadline, or not this run's counters
	case t.run.time.After(t.asked):
		return // the run ended meanwhile, and a later reading has been taken
	case lower && current && !t.fell:
		t.fell = true
		return
	case lower && (t.assumed(0) || t.assumed(1)):
		// All four counters began again, so that bytes of the last reading are of
		// no use, even if just as many packets came since.
		return
	}
	if current && (u.state == accountingFailed || u.state == accountingLost) {
		s.say(slog.LevelInfo, "the counters of a unit can be read again", "unit", u.name)
	}
	if t.run.start.IsZero() {
		t.run.start = t.startOf()
	}
	if t.needSlice {
		u.slice, t.run.slice = t.slice, t.slice
	}
	if t.ended && t.got[controlGroup] {
		t.run.left = t.cgroup != ""
	}
	if t.ended && raw != t.run.last {
		t.run.grew = t.time
	}
	t.run.parted = t.exited && t.cgroup == ""
	before := t.run.time
	t.run.quiet = [2]bool{!before.IsZero() && !t.moved(0), !before.IsZero() && !t.moved(1)}
	t.run.last, t.run.time = raw, t.time
	fell := s.cfg.Sink.Credit(Reading{
		Unit: u.name, Epoch: t.run.epoch, Slice: t.run.slice, Counters: raw, Start: t.run.start,
		Asked: t.asked, Time: t.time, Final: !t.run.ended.IsZero(), Young: u.young, Unmetered: u.unmetered,
	})
	if fell {
		t.run.start = before
		s.say(slog.LevelInfo, "systemd's counters of a unit fell; counting on from there", "unit", u.name)
	}
	if current {
		u.state = accountingOn
	}
}

// noData is what systemd answers for a counter that it does not have.
const noData = math.MaxUint64

// sayAtMost is how many lines with one message a sweep logs. A reload of
// systemd 257 loses the counters of all units at once.
const sayAtMost = 5

// say logs a change of one unit. The end of the sweep counts what is over
// sayAtMost. The caller holds mu.
func (s *Source) say(level slog.Level, message string, args ...any) {
	s.said[message]++
	if s.said[message] <= sayAtMost {
		s.log.Log(context.Background(), level, message, args...)
	}
}

// executedNothing reports the one case in which a new invocation still shows
// the counters of the one before: a oneshot service whose start runs no
// command (ExecStop= only). They are reset when ExecStop runs.
func (t *target) executedNothing() bool {
	return t.got[execMainStart] && t.value[execMainStart] == 0
}

// withoutData sorts out why a unit has no data. The caller holds mu.
func (s *Source) withoutData(u *unit, t *target) {
	u.noData = t.time
	had := t.run.read()
	was := u.state
	kind := TypeOf(u.name)
	switch {
	case !t.got[ipAccounting]:
		return
	case t.value[ipAccounting] == 0:
		u.state = accountingOff
		t.run.start = time.Time{}
		// When it is switched on again it counts from 0, if other units of its
		// slice use BPF: always in system.slice, where journald does. Else
		// systemd has kept the counters; that they fall is then the only sign. So
		// it has over a reload, on 256 and 257.
		if t.run.slice == "system.slice" && t.run.time.After(s.reloadBegan) {
			s.restart(t.run)
		}
	case !t.got[controlGroup]:
		return
	case t.cgroup != "" && !t.ended && (had || u.status.active == "active" && (kind == "service" && u.status.sub == "running" || kind == "scope")):
		u.state = accountingLost
		if was != accountingLost {
			s.say(slog.LevelWarn, "systemd lost the counters of a unit (systemd 256 and 257 do so at a reload); it has no points until they are back",
				"unit", u.name, "next", "unitmeter enable --lost; or unitmeter enable --rearm, for each reload from now on")
		}
	default:
		u.state = accountingNone
	}
}

// startOf returns the moment from which a run's counters count.
func (t *target) startOf() time.Time {
	var start time.Time
	status := t.unit.status
	switch {
	case t.unit.noData.After(t.run.time):
		start = t.unit.noData // accounting was switched on later
	case !t.run.time.IsZero():
		start = t.run.time // the series is new, the run is not
	case status.restarting():
		// InactiveExit has moved already; the counters are still the old run's.
		start = earliest(status.inactiveExit, status.activeEnter)
	case status.activeExit.After(status.inactiveExit) && status.activeExit.Before(status.activeEnter):
		start = status.activeExit // RestartMode=direct
	default:
		start = status.inactiveExit
	}
	if start.IsZero() {
		start = bootTime()
	}
	start = later(start, t.unit.since)
	if start.After(t.time) {
		start = t.time
	}
	return start
}

func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// bootTime is the start time of units that were never started. PID 1's own scope and
// the root slices have no timestamps (proc(5), btime).
func bootTime() time.Time {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Time{}
	}
	for line := range strings.SplitSeq(string(stat), "\n") {
		if rest, ok := strings.CutPrefix(line, "btime "); ok {
			if seconds, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64); err == nil {
				return time.Unix(seconds, 0)
			}
		}
	}
	return time.Time{}
}

// again reads units once more whose run was over while the inventory had it as
// running: they have just been restarted.
func (s *Source) again(ctx context.Context, b *bus.Conn, from getter, targets []target) error {
	var names []string
	s.mu.Lock()
	for i := range targets {
		if t := &targets[i]; t.gone && t.run.ended.IsZero() {
			names = append(names, t.unit.name)
		}
	}
	s.mu.Unlock()
	if len(names) == 0 {
		return nil
	}
	loaded, err := s.refresh(ctx, b, names)
	if err != nil {
		return err
	}
	s.mu.Lock()
	restarted := targets[:0]
	for _, name := range names {
		switch u := s.units[name]; {
		case u == nil:
		case !slices.Contains(loaded, name):
			s.drop(u) // its signal is on the way or was lost
		case u.run.time.IsZero():
			restarted = append(restarted, s.target(u, time.Now()))
		}
	}
	s.mu.Unlock()
	return s.collect(ctx, from, restarted)
}
