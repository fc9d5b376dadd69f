package receiver

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The properties of a target, in the order in which they are read. Packets
// come first: a packet that is counted between two reads then moves the packet
// counter past what was read, so that the next sweep reads the bytes again.
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

// target is one run that a sweep reads, and what was read.
type target struct {
	unit *unit
	run  *run

	// What the sweep knew when it began. Signals change the unit meanwhile.
	asked        time.Time
	path, iface  string
	last         Counters
	quiet        [2]bool // by direction: read the packets first, and the bytes only if they moved
	lost         bool    // had no data at the last reading
	mayBeUnreset bool    // see executedNothing
	needSlice    bool
	exited       bool // see run.parted

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

	tally  *tally    // the maps that are read, or compared; nil for none
	held   Counters  // their value
	before Counters  // their value before systemd was asked
	maps   [2]uint32 // ids of the maps that had it: others may have replaced them since
	// compared says that held is from after systemd was asked.
	compared bool
	waits    bool // for systemd, which is replacing the maps
	// restarted says that the cgroup is another run's by now.
	restarted bool
}

// Sweep reads the counters of all metered units and returns the result. It
// takes at most Config.SweepTimeout, and less if ctx ends before: what was not
// read by then has no point in this sweep, and is complete in the next one.
// A call during a sweep waits for it and returns its result.
func (r *Receiver) Sweep(ctx context.Context) *Sweep {
	before := r.last.Load()
	r.sweeping.Lock()
	defer r.sweeping.Unlock()
	if last := r.last.Load(); last != before {
		return last
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.SweepTimeout)
	defer cancel()
	began := time.Now()

	r.mu.Lock()
	b := r.bus
	r.mu.Unlock()
	if b != nil {
		r.awaitJournal(ctx)
	}
	r.mu.Lock()
	targets := r.targets()
	for _, s := range r.order {
		s.observed = false
	}
	r.mu.Unlock()

	err := errNotConnected
	if b != nil {
		err = r.readAll(ctx, b, targets)
	}
	r.readRests()
	sweep := r.finish(began, err)
	r.last.Store(sweep)
	return sweep
}

// readAll reads and applies the targets in the order that keeps the balances of
// slices from ever showing too much: a slice is read before the units in it,
// and, when it is first seen, after them.
func (r *Receiver) readAll(ctx context.Context, b *bus, targets []target) error {
	var before, after []target
	units := targets[:0] // in place: they are nearly all
	for _, t := range targets {
		switch {
		case !topSlice(t.unit.name):
			units = append(units, t)
		case t.run.time.IsZero() && !t.unit.young:
			after = append(after, t)
		default:
			before = append(before, t)
		}
	}
	var missed error
	for _, part := range [][]target{before, units, after} {
		if err := r.collect(ctx, b, part); err != nil {
			return err
		}
		if slices.ContainsFunc(part, func(t target) bool { return t.missed }) {
			missed = errNotAnswered
		}
	}
	return cmp.Or(r.again(ctx, b, units), missed)
}

var (
	errNotConnected = errors.New("not connected to systemd")
	errNotAnswered  = errors.New("systemd did not answer some calls")
)

// targets lists what a sweep has to read. The caller holds mu.
func (r *Receiver) targets() []target {
	now := time.Now()
	targets := make([]target, 0, len(r.units))
	for _, u := range r.units {
		if u.run == nil || !u.run.ended.IsZero() && now.Sub(u.run.ended) > lateTraffic {
			continue
		}
		if u.state == accountingOff || u.state == accountingNone {
			if u.skipped++; u.skipped < recheckEvery {
				continue
			}
			u.skipped = 0
		}
		targets = append(targets, r.target(u, now))
	}
	return targets
}

// target returns what is to be read of a unit with a run. The caller holds mu.
func (r *Receiver) target(u *unit, now time.Time) target {
	quiet := u.run.quiet
	if u.state == accountingLost || u.state == accountingOff || u.state == accountingNone {
		quiet = [2]bool{true, true}
	}
	return target{
		unit: u, run: u.run, asked: now, path: u.run.path, iface: u.iface, last: u.run.last,
		quiet: quiet, lost: u.state == accountingLost,
		mayBeUnreset: u.run.time.IsZero() && typeOf(u.name) == "service" && (u.status.sub == "exited" || u.run.unbegun),
		needSlice:    u.slice == "",
		exited:       r.version >= 256 && typeOf(u.name) == "service" && u.status.sub == "exited",
	}
}

// readBus fills in the targets over D-Bus.
func (r *Receiver) readBus(ctx context.Context, b *bus, targets []target) error {
	type call struct{ target, property int }
	calls := make([]call, 0, 4*len(targets))
	for i, t := range targets {
		calls = append(calls, call{i, ingressPackets}, call{i, egressPackets})
		for direction, quiet := range t.quiet {
			if !quiet {
				calls = append(calls, call{i, ingressBytes + direction})
			}
		}
	}
	get := func() error {
		return b.wire.gets(ctx, len(calls), func(i int) property {
			t, name := &targets[calls[i].target], propertyName(calls[i].property)
			if calls[i].property == subState {
				return property{t.path, unitInterface, name}
			}
			return property{t.path, t.iface, name}
		}, func(i int, reply reply) {
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
		if t.exited && !t.noData {
			calls = append(calls, call{i, controlGroup}, call{i, subState})
		}
	}
	return get()
}

// take is the handler of one reply.
func (t *target) take(property int, reply reply) {
	t.time = time.Now()
	switch string(reply.errorName) {
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
		if on, err = reply.bool(); on {
			v = 1
		}
	case slice:
		t.slice, err = reply.string()
	case controlGroup:
		t.cgroup, err = reply.string()
	case subState:
		t.sub, err = reply.string()
	default:
		v, err = reply.uint64()
	}
	switch {
	case err != nil:
		t.err = err
	case property < ipAccounting && v == noData:
		t.noData = true
	case property < ipAccounting && v > maxTotal:
		t.err = replyError{"an impossible value of " + propertyName(property) + ", " + strconv.FormatUint(v, 10)}
	default:
		t.value[property], t.got[property] = v, true
	}
}

// moved reports whether the packet counter of a direction is another than in the
// last reading.
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
func (r *Receiver) collect(ctx context.Context, b *bus, targets []target) error {
	err := r.read(ctx, b, targets)
	if fell := r.apply(targets); err == nil && len(fell) > 0 {
		err = r.read(ctx, b, fell)
		r.apply(fell)
	}
	return err
}

// apply puts the readings on the odometers. It returns the targets that are to be
// read again, since a counter fell.
func (r *Receiver) apply(targets []target) (fell []target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range targets {
		t := &targets[i]
		if r.applyOne(t); t.fell {
			again := r.target(t.unit, time.Now())
			again.quiet, again.fell = [2]bool{}, true
			fell = append(fell, again)
		}
	}
	return fell
}

// applyOne takes one reading. The caller holds mu.
func (r *Receiver) applyOne(t *target) {
	u, current := t.unit, t.unit.run == t.run
	raw, ok := t.counters()
	_, lower := raw.minus(t.run.last)
	switch {
	case t.gone:
		if current && !t.run.ended.IsZero() {
			r.drop(u)
		}
		return
	case t.missed:
		r.health.dbusErrors++
		return
	case t.err != nil:
		r.health.dbusErrors++
		if current && u.state != accountingFailed {
			u.state = accountingFailed
			r.say(slog.LevelWarn, "cannot read the counters of a unit; it has no points until this ends", "unit", u.name, "err", t.err)
		}
		return
	case t.noData:
		if current {
			r.withoutData(u, t)
		}
		return
	case !ok || t.needSlice && !t.got[slice] || t.mayBeUnreset && !t.got[execMainStart] || t.executedNothing(),
		t.exited && t.sub != "exited":
		return // not reached before the deadline, or not this run's counters
	case t.run.time.After(t.asked):
		// The run ended meanwhile, and a later reading is on the odometer.
		if t.run.series != nil {
			t.run.series.observed = true
		}
		return
	case lower && current && !t.fell:
		t.fell = true
		return
	case lower && (t.assumed(0) || t.assumed(1)):
		// All four counters began again, so that bytes of the last reading are of
		// no use, even if just as many packets came since.
		return
	}
	if current && (u.state == accountingFailed || u.state == accountingLost) {
		r.say(slog.LevelInfo, "the counters of a unit can be read again", "unit", u.name)
	}
	start := t.startOf()
	if t.run.start.IsZero() {
		t.run.start = start
	}
	if t.needSlice {
		u.slice, t.run.slice = t.slice, t.slice
	}
	t.run.parted = t.exited && t.cgroup == ""
	before := t.run.time
	t.run.quiet = [2]bool{!before.IsZero() && !t.moved(0), !before.IsZero() && !t.moved(1)}
	delta, reset := r.advance(t, raw)
	if reset {
		r.health.resets++
		t.run.start = before
		r.say(slog.LevelInfo, "systemd's counters of a unit fell; counting on from there", "unit", u.name)
	}
	if !t.run.ended.IsZero() {
		t.run.final = true
	}
	if current {
		u.state = accountingOn
	}
	if topSlice(u.name) {
		r.sliceGrew(t, delta, before.IsZero() && !u.young)
	} else {
		r.unitGrew(t.run.slice, delta)
	}
	if u.hidden {
		return
	}
	if t.run.series == nil {
		t.run.series = r.seriesOf(u.name, u.slice, start)
	}
	s := t.run.series
	if r.cfg.UnitSlice && !s.shared && s.slice != u.slice {
		r.describe(s, u.slice) // the ledger does not keep it
	}
	if s.fresh && start.Before(s.start) {
		s.start = start // a new fold begins with the earliest of its members
	}
	s.add(delta, t.time)
	s.observed = true
}

// sayAtMost is how many lines with one message a sweep logs. A reload of
// systemd 257 loses the counters of all units at once.
const sayAtMost = 5

// say logs a change of one unit. The end of the sweep counts what is over
// sayAtMost. The caller holds mu.
func (r *Receiver) say(level slog.Level, message string, args ...any) {
	r.said[message]++
	if r.said[message] <= sayAtMost {
		r.log.Log(context.Background(), level, message, args...)
	}
}

// executedNothing reports the one case in which a new invocation still shows
// the counters of the one before: a oneshot service whose start runs no
// command (ExecStop= only). They are reset when ExecStop runs.
func (t *target) executedNothing() bool {
	return t.got[execMainStart] && t.value[execMainStart] == 0
}

// withoutData sorts out why a unit has no data. The caller holds mu.
func (r *Receiver) withoutData(u *unit, t *target) {
	u.noData = t.time
	had := !t.run.time.IsZero()
	was := u.state
	kind := typeOf(u.name)
	switch {
	case !t.got[ipAccounting] || !t.got[controlGroup]:
		return
	case t.value[ipAccounting] == 0:
		u.state = accountingOff
		t.run.start = time.Time{}
		// When it is switched on again it counts from 0, if other units of its
		// slice use BPF: always in system.slice, where journald does. Else
		// systemd has kept the counters; that they fall is then the only sign. So
		// it has over a reload, on 256 and 257.
		if t.run.slice == "system.slice" && t.run.time.After(r.reloadBegan) {
			t.run.last = Counters{}
		}
	case t.cgroup != "" && (had || u.status.active == "active" && (kind == "service" && u.status.sub == "running" || kind == "scope")):
		u.state = accountingLost
		if was != accountingLost {
			r.say(slog.LevelWarn, "systemd lost the counters of a unit (known of systemd 256 and 257 after a reload); it has no points until they are back",
				"unit", u.name, "next", "systemctl set-property --runtime "+u.name+" IPAccounting=yes")
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

// bootTime is when units that were never started began: PID 1's own scope and
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

// again reads once more the units whose run was over although, as far as the
// inventory knew, it was going on: they were restarted a moment ago.
func (r *Receiver) again(ctx context.Context, b *bus, targets []target) error {
	var names []string
	r.mu.Lock()
	for i := range targets {
		if t := &targets[i]; t.gone && (t.run.ended.IsZero() || t.restarted) {
			names = append(names, t.unit.name)
		}
	}
	r.mu.Unlock()
	if len(names) == 0 {
		return nil
	}
	loaded, err := r.refresh(ctx, b, names)
	if err != nil {
		return err
	}
	r.mu.Lock()
	restarted := targets[:0]
	for _, name := range names {
		switch u := r.units[name]; {
		case u == nil:
		case !slices.Contains(loaded, name):
			r.drop(u) // its signal is on the way or was lost
		case u.run.time.IsZero():
			restarted = append(restarted, r.target(u, time.Now()))
		}
	}
	r.mu.Unlock()
	return r.collect(ctx, b, restarted)
}

// finish adds up the sweep, forgets what has been over for long enough, and
// returns the result.
func (r *Receiver) finish(began time.Time, err error) *Sweep {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.health.partial++
	}
	for message, n := range r.said {
		if n > sayAtMost {
			r.log.Info("the same of more units: "+message, "units", n-sayAtMost)
		}
	}
	clear(r.said)
	r.kernel.state(r.log, &r.health)
	now := time.Now()
	maps.DeleteFunc(r.runs, func(_ string, run *run) bool {
		keep := r.cfg.KeepEnded
		if run.restored {
			keep = keepRestored
		}
		// Before the first list, nobody knows which of the restored runs are over.
		over := r.listed && !run.closed.IsZero() && now.Sub(run.closed) > keep
		// No list shows what the settings leave out, and they may change again.
		over = over && (!run.restored || run.earlier != "" || topSlice(run.unit) || r.exports(run.unit))
		if over && !run.final && !run.time.IsZero() && run.earlier == "" {
			r.health.missed++
		}
		if over && run.closed.After(r.forgotten) {
			r.forgotten = run.closed
		}
		return over
	})
	return r.snapshot(began, now, err != nil)
}

// snapshot makes the result of a sweep. The caller holds mu.
func (r *Receiver) snapshot(began, now time.Time, partial bool) *Sweep {
	sweep := &Sweep{
		Time: now, Duration: now.Sub(began), Partial: partial,
		State: State{Time: now, Series: make([]Series, len(r.order)), Runs: make([]Run, 0, len(r.runs)), Journal: r.journal},
	}
	over, live := map[*series]bool{}, map[*series]bool{}
	for _, run := range r.runs {
		if run.closed.IsZero() {
			// One that ended long ago, of a unit that is still loaded, is not read.
			live[run.series] = live[run.series] || run.ended.IsZero() || now.Sub(run.ended) <= lateTraffic
		} else if now.Sub(run.closed) <= r.cfg.KeepEnded && (!run.restored || run.final) {
			over[run.series] = true // an earlier Receiver has shown what else it had
		}
	}
	for i, s := range r.order {
		// The last point of a unit that has gone is repeated while its run is
		// remembered, so that each of several readers gets it.
		s.observed = s.observed || s.moved || over[s] && !live[s]
		// The sum of a fold without members is known, and of now: Prometheus
		// refuses a request with a point that is an hour old.
		if !s.observed && s.shared && !live[s] && !partial && !s.time.IsZero() {
			s.observed, s.time = true, now
		}
		// What comes late, from the journal or of a member of a fold, must not
		// change a point that has been shown; a delta needs an interval; and
		// backends refuse what is old.
		if s.moved && (!s.time.After(s.shown) || !s.time.After(s.start) || now.Sub(s.time) > lateRecord) {
			s.time = now
		}
		s.shown = s.time
		s.moved, s.fresh = false, false
		sweep.State.Series[i] = Series{
			Name: s.name, Total: s.total, Start: s.start, Time: s.time, Observed: s.observed,
			Receive: s.receive, Transmit: s.transmit, options: s.options,
		}
	}
	for _, run := range r.runs {
		if !run.time.IsZero() {
			var name string
			if run.series != nil {
				name = run.series.name
			} else {
				name = unattributedPrefix + run.unit
			}
			sweep.State.Runs = append(sweep.State.Runs, Run{
				Unit: run.unit, Series: name, Epoch: run.epoch, Boot: cmp.Or(run.earlier, r.cfg.BootID),
				Last: run.last, Time: run.time,
			})
		}
	}
	for top, b := range r.balances {
		if b.series == nil {
			continue
		}
		waiting, _ := b.waiting.plus(b.recent)
		sweep.State.Series = append(sweep.State.Series,
			Series{Name: aheadPrefix + top, Total: b.ahead, Time: now},
			Series{Name: waitingPrefix + top, Total: waiting, Time: now})
	}
	for state, n := range r.countStates() {
		sweep.Units += int(n)
		if accounting(state) == accountingOn {
			sweep.Accounted = int(n)
		}
	}
	return sweep
}
