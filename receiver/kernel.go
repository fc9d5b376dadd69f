package receiver

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxEnded is how many cgroups that are gone are still read.
	maxEnded = 4096
	// maxProbes is how often one sweep compares a busy unit's map with systemd's
	// own value to find out the difference exactly; maxCompared is how often that
	// is done before the unit stays on D-Bus until its maps are replaced.
	maxProbes   = 8
	maxCompared = 64
	// maxReplaced is how many maps that were replaced are held for each unit until
	// it is known again what systemd adds to those that replaced them.
	maxReplaced = 16
	// maxSwitching is how many sweeps a unit waits for that counts in two maps.
	maxSwitching = 3
	// settling is for how long after any program was loaded into the kernel the
	// cgroups are asked at each sweep which programs they have. systemd attaches
	// what it has loaded at once.
	settling = 2 * time.Second
)

// kernelSource reads the counters where systemd's programs count, in BPF maps
// (docs/decisions/kernel-mode.md). Everything that it reads of a run is brought
// to what systemd would show, so that the odometer can go from one source to
// the other at any reading; what systemd loses over a reload it adds to that.
//
// Its fields are guarded by Receiver.mu, except for those set once.
type kernelSource struct {
	cgroups string // directory of systemd's root cgroup
	// units is open on the directory where systemd names the invocation of each
	// unit, in symbolic links: /run/systemd/units.
	units   int
	calls   *bpfCalls
	watch   *watch
	tallies map[string]*tally // of the cgroups that are there, by unit
	ended   []*tally          // of cgroups that are gone, oldest first
	reload  reloadWatch
	// newest is the largest program id that was seen, and appeared when it was
	// seen first; see fresh.
	newest   uint32
	appeared time.Time
	// open and uncertain are the units of which something was left out since the
	// last sweep, and what at most; see tally.bridge.
	open      int
	uncertain Counters
}

// tally is the counting of one unit in one cgroup.
type tally struct {
	unit, slice string
	path        string // below the root
	link        []byte // of the invocation, for bpfCalls.invocation
	dir         int    // descriptor of the directory
	epoch       string // invocation id, empty for units without one
	// born says that the cgroup was made under our eyes: whatever the first
	// maps count is of this run.
	born bool
	// confirmed says that systemd has named the invocation. Until then the name
	// of the run before may be there.
	confirmed bool
	opened    time.Time
	gone      time.Time
	run       *run // nil until an inventory or the end of the cgroup tells

	attached programs
	now      counterMaps
	// latest is the last reading of now that is known to be from before other
	// programs were attached.
	latest    Counters
	dead      bool // nothing is attached any more
	switching int  // sweeps in a row that found programs of two maps attached
	active    bool // something was counted since the sweep before
	looks     int  // of sweeps

	// extra is what systemd adds to the value of now: the total that it carried
	// over its last reload. Systemd's own values count until it is known.
	extra Counters
	known bool
	// low and high bound extra, once compared says that they do.
	low, high [4]int64
	compared  bool
	probes    int
	reading   *reading
	polled    bool // by the watch of reloads, which is to tell when others replace now
	gap       *gap // from the replacement of known maps until extra is known again
}

// reading is a value that systemd has shown and that was put on the odometer, and
// what the maps had just before and after. It is nil as soon as it is not the last
// one, or the maps are not known to be those that it is about.
type reading struct{ before, shown, after Counters }

// gap is what has to be made up for when systemd has replaced a unit's maps:
// what the old ones counted, and systemd has not carried over.
//
// systemd attaches a new program before it detaches the old one, so packets in
// between are in both maps. Only the old map's readings from before that are
// counted, so never one packet twice; what the old map has beyond that is
// stated as uncertain.
type gap struct {
	owed    Counters // of the old maps, at least, and on no odometer when they were replaced
	counted Counters // of owed and the new map, by systemd's values meanwhile
	last    Counters // of the odometer, when counted was brought up to date
	base    Counters // of the new map, when the gap began
	old     []replaced
	unclear Counters // what may have been counted beyond owed, but for what old tells
}

type replaced struct {
	maps   counterMaps
	latest Counters
}

// openKernel prepares the kernel source, if it is allowed.
func openKernel(cfg Config) (*kernelSource, error) {
	if err := mayReadMaps(); err != nil {
		return nil, err
	}
	k := &kernelSource{cgroups: cfg.cgroups, calls: newCalls(), tallies: map[string]*tally{}}
	if k.cgroups == "" {
		var err error
		if k.cgroups, err = findCgroups(); err != nil {
			return nil, err
		}
	}
	root, err := openCgroup(k.cgroups)
	if err == nil {
		_, err = k.calls.attached(root)
		_ = unix.Close(root)
	}
	if err != nil {
		return nil, fmt.Errorf("read counters from the kernel: query the programs on %s: %w; give unitmeter a view of the host's cgroups, or set UNITMETER_SOURCE=dbus", k.cgroups, err)
	}
	units := cfg.invocations
	if units == "" {
		units = "/run/systemd/units"
	}
	if k.units, err = openCgroup(units); err != nil {
		return nil, fmt.Errorf("read counters from the kernel: open %s, where systemd names the runs of units: %w; set UNITMETER_SOURCE=dbus", units, err)
	}
	return k, nil
}

// CheckKernel reports why the counters cannot be read from the kernel by this
// process, or nil if they can.
func CheckKernel() error {
	k, err := openKernel(Config{})
	if err == nil {
		k.close()
	}
	return err
}

// chooseSource opens the kernel source where the configuration asks for it.
func (r *Receiver) chooseSource() (err error) {
	switch r.cfg.Source {
	case "", "dbus":
		return nil
	case "kernel", "auto":
	default:
		return fmt.Errorf("read counters from %q: there is no such source; use dbus, kernel or auto", r.cfg.Source)
	}
	r.kernel, err = openKernel(r.cfg)
	switch {
	case err == nil:
		return nil
	case r.cfg.Source == "auto":
		r.log.Info("reading all counters over D-Bus", "reason", err)
		return nil
	}
	return fmt.Errorf("UNITMETER_SOURCE=kernel: %w", err)
}

// invocation returns what systemd says is the unit's invocation. The link
// changes after systemd has set a unit's counters to zero for a new run; units
// without processes of their own have none. It is valid until the next call.
func (k *kernelSource) invocation(s *tally) []byte {
	return k.calls.invocation(k.units, s.link, s.dir)
}

func newTally(unit, path string, dir int) *tally {
	return &tally{
		unit: unit, path: path, dir: dir, slice: sliceOfCgroup(path),
		link: []byte("invocation:" + unit + "\x00"), opened: time.Now(),
	}
}

// begin opens the maps of a new tally. It reports false if nothing counts yet.
func (s *tally) begin(c *bpfCalls) bool {
	attached, err := c.attached(s.dir)
	if err != nil {
		return false
	}
	now, several, ok := c.openMaps(&attached)
	if !ok || several {
		now.close()
		return false
	}
	s.attached, s.now = attached, now
	return true
}

// openTally starts a tally for the unit in the cgroup at path, unless there is
// nothing that counts.
func (k *kernelSource) openTally(unit, path string) *tally {
	dir, err := openCgroup(k.cgroups + path)
	if err != nil {
		return nil
	}
	s := newTally(unit, path, dir)
	if !s.begin(k.calls) {
		_ = unix.Close(dir)
		return nil
	}
	s.epoch, s.confirmed = string(k.invocation(s)), true
	k.tallies[unit] = s
	return s
}

// find returns the tally of a unit that is in the cgroup tree now.
func (k *kernelSource) find(unit, slice string) *tally {
	if s := k.tallies[unit]; s != nil {
		return s
	}
	path := cgroupOfSlice(unit)
	if typeOf(unit) != "slice" {
		if slice == "" {
			return nil
		}
		path = filepath.Join(cgroupOfSlice(slice), unit)
	}
	return k.openTally(unit, path)
}

// sighting is what became of the cgroup of a tally.
type sighting int

const (
	unchanged sighting = iota
	waiting            // systemd is replacing the maps
	renewed            // systemd counts in new maps since a reload
	detached           // nothing is counted any more
	left               // the cgroup is gone, or is another run's
)

// look finds out what became of the cgroup, and takes new maps. Values that
// were read before are of this tally's run unless a later tally shares the
// maps.
func (k *kernelSource) look(s *tally) sighting { return k.lookAs(s, true) }

// lookAs is look. Without query, nothing was attached since the last look.
func (k *kernelSource) lookAs(s *tally, query bool) sighting {
	if s.dir < 0 {
		return left
	}
	attached, err := s.attached, error(nil)
	if query {
		attached, err = k.calls.attached(s.dir)
	}
	if named := string(k.invocation(s)) == s.epoch; named && (!s.born || s.epoch != "") {
		s.confirmed = true
	} else if !named && s.confirmed {
		return left
	}
	switch {
	case err == unix.ENOSPC:
		return detached
	case err != nil:
		return left
	case attached == s.attached:
		s.switching = 0
		return unchanged
	case s.polled:
		return waiting
	}
	next, several, ok := k.calls.openMaps(&attached)
	switch {
	case s.switching < maxSwitching && switching(s.now, next, &attached, several, ok):
		next.close()
		s.switching++
		return waiting
	case !ok:
		return detached
	case next.ids == s.now.ids:
		next.close()
		s.attached, s.dead = attached, false
		return unchanged
	}
	s.switching = 0
	s.replace(k.calls, k.calls.onlyIn(s.now, next), attached, next)
	return renewed
}

// replace takes the maps in which systemd counts from now on. only is what is in the
// old ones and not in them, at least.
func (s *tally) replace(c *bpfCalls, only Counters, attached programs, next counterMaps) {
	latest := s.latest.max(only)
	s.active = s.active || latest != s.latest
	s.latest = latest
	if s.gap == nil && (s.known || s.reading != nil && s.reading.shown == s.run.last) {
		s.startGap()
	}
	if s.gap != nil {
		s.gap.owed, _ = s.gap.owed.plus(s.latest.less(s.gap.base))
		// What is on the odometer beyond that, of a cgroup that is gone, may be in both.
		s.gap.counted, _ = s.gap.counted.plus(s.gap.base.less(s.latest))
		s.gap.old = append(s.gap.old, replaced{s.now, s.latest})
		s.gap.base = Counters{}
		if len(s.gap.old) > maxReplaced {
			s.gap.forget(c)
		}
	} else {
		s.now.close() // systemd's values were counted so far, and carry on
		s.born = false
	}
	s.attached, s.now, s.latest, s.dead = attached, next, Counters{}, false
	s.doubt()
}

// forget gives up the oldest maps.
func (g *gap) forget(c *bpfCalls) {
	old := &g.old[0]
	if final, err := c.read(old.maps); err == nil {
		g.unclear, _ = g.unclear.plus(final.less(old.latest))
	}
	old.maps.close()
	g.old = g.old[1:]
}

// startGap begins a gap at the last reading on the odometer.
func (s *tally) startGap() {
	s.gap = &gap{}
	switch {
	case s.run == nil:
	case s.known:
		s.gap.last, s.gap.base = s.run.last, s.run.last.less(s.extra)
	default:
		s.gap.last, s.gap.base = s.run.last, s.reading.after
		s.gap.unclear = s.reading.after.less(s.reading.before)
	}
}

// doubt makes systemd's value decide until extra is known again.
func (s *tally) doubt() { s.known, s.compared, s.reading, s.probes = false, false, nil, 0 }

// compare takes what systemd showed between two readings of the map.
func (s *tally) compare(before, shown, after Counters) {
	b, d, a := before.values(), shown.values(), after.values()
	if !s.compared {
		s.low, s.high = [4]int64{}, [4]int64{maxTotal, maxTotal, maxTotal, maxTotal}
	}
	s.compared = true
	for i := range d {
		s.low[i] = max(s.low[i], int64(d[i]-a[i]))
		s.high[i] = min(s.high[i], int64(d[i]-b[i]))
		if s.low[i] > s.high[i] {
			s.compared = false // the one is not the other's; or it was reset meanwhile
		}
	}
}

// exact reports whether extra can be one value only.
func (s *tally) exact() bool { return s.compared && s.low == s.high }

func (s *tally) least() Counters {
	return Counters{uint64(s.low[0]), uint64(s.low[1]), uint64(s.low[2]), uint64(s.low[3])}
}

func (c Counters) values() [4]uint64 {
	return [4]uint64{c.IngressBytes, c.IngressPackets, c.EgressBytes, c.EgressPackets}
}

// less returns c - d, with 0 where d is larger.
func (c Counters) less(d Counters) Counters {
	left, _ := c.settle(d)
	return left
}

// retire puts aside a tally whose cgroup is gone, and opens the one that has
// its place now, if any. It reports false if the maps count for that one.
func (r *Receiver) retire(s *tally) bool {
	k := r.kernel
	delete(k.tallies, s.unit)
	next := k.openTally(s.unit, s.path)
	s.gone = time.Now()
	_ = unix.Close(s.dir)
	s.dir = -1
	if next != nil && next.now.shares(s.now) {
		r.closeGap(s, s.latest)
		s.close()
		return false
	}
	k.ended = append(k.ended, s)
	if s.run != nil {
		s.run.rest = s
	}
	if len(k.ended) > maxEnded {
		k.ended[0].close()
		k.ended = k.ended[1:]
	}
	return true
}

func (s *tally) close() {
	if s.dir >= 0 {
		_ = unix.Close(s.dir)
		s.dir = -1
	}
	if s.run != nil && s.run.rest == s {
		s.run.rest = nil
	}
	s.now.close()
	s.endGap()
}

// giveUp ends the reading of maps whose run counts in others by now.
func (s *tally) giveUp() {
	if s != nil {
		s.endGap()
		s.doubt()
	}
}

// endGap gives up the maps of a gap, and the gap.
func (s *tally) endGap() {
	if s.gap != nil {
		for i := range s.gap.old {
			s.gap.old[i].maps.close()
		}
	}
	s.gap = nil
}

// close gives up all descriptors.
func (k *kernelSource) close() {
	for _, s := range k.tallies {
		s.close()
	}
	for _, s := range k.ended {
		s.close()
	}
	clear(k.tallies)
	k.ended = nil
	if k.units >= 0 {
		_ = unix.Close(k.units)
		k.units = -1
	}
}

// belongs reports whether the tally counts this run.
func (r *Receiver) belongs(s *tally, run *run) bool {
	return s.epoch == run.epoch || s.epoch == "" && run.epoch == r.cfg.BootID
}

// read fills in the targets: from the kernel where their maps are held and it is
// known what systemd adds to them, and else from systemd.
func (r *Receiver) read(ctx context.Context, b *bus, targets []target) error {
	if r.kernel == nil {
		return r.readBus(ctx, b, targets)
	}
	r.awaitReload(ctx)
	var rest []int
	r.mu.Lock()
	for i := range targets {
		r.readMaps(&targets[i])
	}
	fresh := r.kernel.fresh() // after the readings: what follows is on them
	for i := range targets {
		t := &targets[i]
		r.lookAt(t, fresh)
		switch {
		case t.waits:
		case t.tally == nil:
			rest = append(rest, i)
		// Of an ended run, systemd may have more: if its last maps came and went
		// unseen.
		case !t.tally.known, t.tally.dir < 0:
			t.quiet = [2]bool{}
			rest = append(rest, i)
		default:
			t.fill()
		}
	}
	r.mu.Unlock()
	if len(rest) == 0 {
		return nil
	}
	asked := make([]target, len(rest))
	for i, at := range rest {
		asked[i] = targets[at]
	}
	err := r.readBus(ctx, b, asked)
	r.compareAll(asked)
	for i := range asked {
		if err == nil && asked[i].tally != nil {
			err = r.probe(ctx, b, &asked[i])
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, at := range rest {
		if asked[i].tally != nil {
			asked[i].calibrate()
		}
		targets[at] = asked[i]
	}
	return err
}

// fresh reports whether a program may have been attached anywhere since it was
// called before. Programs have rising ids, so one call tells for all units.
func (k *kernelSource) fresh() bool {
	now := time.Now()
	for id := range k.calls.programsAfter(k.newest) {
		k.newest, k.appeared = id, now
	}
	return now.Sub(k.appeared) < settling
}

// readMaps reads the maps of a target, if they are held. Bytes of a unit whose
// packet counters stand still were read when they had stood still already.
func (r *Receiver) readMaps(t *target) {
	k := r.kernel
	s := k.find(t.unit.name, t.unit.slice)
	if s == nil {
		return
	}
	if !s.active && s.known && k.calls.still(s.now, s.latest) {
		t.hold(s, s.latest)
		return
	}
	held, err := k.calls.read(s.now)
	if err != nil {
		r.log.Warn("cannot read a unit's counters from the kernel; asking systemd", "unit", s.unit, "err", err)
		delete(k.tallies, s.unit)
		s.close()
		return
	}
	t.hold(s, held)
}

// hold takes what the maps of a tally had. The caller holds mu.
func (t *target) hold(s *tally, value Counters) {
	t.tally, t.held, t.maps, t.compared = s, value, s.now.ids, false
}

// current reports whether systemd still counts in the maps that were read. The
// caller holds mu.
func (t *target) current() bool { return t.maps == t.tally.now.ids }

// lookAt looks whether what was read of a target counts its run, and clears its
// tally if not. The caller holds mu.
func (r *Receiver) lookAt(t *target, fresh bool) {
	k, s, value := r.kernel, t.tally, t.held
	t.tally = nil
	if s == nil {
		r.lookAtEnded(t)
		return
	}
	var err error
	s.looks++
	query := fresh || k.watch == nil || !s.known || s.dead || s.switching > 0 || s.looks%recheckEvery == 0
	if !query && !s.active && value == s.latest && s.confirmed && s.run == t.run && t.run.ended.IsZero() {
		t.hold(s, value) // nothing to count, whichever run's it is by now
		return
	}
	switch k.lookAs(s, query) {
	case left:
		if r.retire(s) && s.run == t.run && (s.known || s.gap != nil) {
			t.hold(s, value)
			return
		}
		if s = k.tallies[t.unit.name]; s == nil {
			return
		}
		if value, err = k.calls.read(s.now); err != nil {
			return
		}
	case waiting:
		t.waits = true
		return
	case detached:
		if value, err = k.calls.read(s.now); err == nil && !s.dead && s.run == t.run && s.known {
			r.takeRest(s, value)
			s.startGap()
			s.gap.base, s.latest = value, value
		}
		s.dead = true
		s.doubt()
		return
	case renewed:
		if value, err = k.calls.read(s.now); err != nil {
			return
		}
	case unchanged:
		if _, fell := value.minus(s.latest); fell { // set to zero for the next run
			r.closeGap(s, s.latest)
			s.doubt()
		}
		s.active = value != s.latest
		s.latest = value
	}
	if !r.belongs(s, t.run) {
		t.restarted = s.confirmed
		return
	}
	if s.run != t.run {
		switch {
		case s.run != nil:
			s.endGap()
			s.doubt()
		case !t.run.time.IsZero():
			// A second cgroup of the run: systemd may have carried over what was before.
			s.doubt()
		}
		s.run = t.run
	}
	t.hold(s, value)
}

// lookAtEnded is lookAt for a run whose cgroup is gone. The caller holds mu.
func (r *Receiver) lookAtEnded(t *target) {
	s := t.run.rest
	if s == nil || !s.known && s.gap == nil {
		return
	}
	held, err := r.kernel.calls.read(s.now)
	if err != nil {
		return
	}
	if next := r.kernel.find(s.unit, s.slice); next == nil || !next.now.shares(s.now) {
		t.hold(s, held)
	}
}

// compareAll compares the maps of targets with what systemd has just shown.
func (r *Receiver) compareAll(targets []target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range targets {
		t := &targets[i]
		if t.tally == nil || !t.current() {
			continue
		}
		before := t.held
		t.before = before
		after, err := r.kernel.calls.read(t.tally.now)
		if shown, ok := t.counters(); ok && err == nil && r.counting(t.tally) {
			t.held, t.compared = after, true
			t.tally.compare(before, shown, after)
			if latest := t.tally.latest.max(after); t.tally.dir >= 0 && latest != t.tally.latest {
				t.tally.latest, t.tally.active = latest, true // no other program was attached until then
			}
		}
	}
}

// counting reports whether nothing has replaced the maps since the last look.
// Maps that stand still would agree with anything.
func (r *Receiver) counting(s *tally) bool {
	if s.dir < 0 {
		return true // they are those of the end
	}
	attached, err := r.kernel.calls.attached(s.dir)
	return err == nil && attached == s.attached
}

// probe asks systemd for the counters of one busy unit until it is known what
// systemd adds to those in the map.
func (r *Receiver) probe(ctx context.Context, b *bus, t *target) error {
	for range maxProbes {
		if _, ok := t.counters(); !ok {
			return nil // nothing to compare with
		}
		r.mu.Lock()
		s := t.tally
		done := s.known || s.exact() || s.probes >= maxCompared
		s.probes++
		held, err := r.kernel.calls.read(s.now)
		one := []target{{unit: t.unit, run: t.run, path: t.path, iface: t.iface}}
		one[0].hold(s, held)
		r.mu.Unlock()
		if done || err != nil {
			return nil
		}
		if err := r.readBus(ctx, b, one); err != nil {
			return err
		}
		r.compareAll(one)
		if _, ok := one[0].counters(); ok {
			t.held, t.before, t.maps, t.compared, t.time = one[0].held, one[0].before, one[0].maps, one[0].compared, one[0].time
			copy(t.value[:ipAccounting], one[0].value[:ipAccounting])
		}
	}
	return nil
}

// calibrate draws the conclusion from the comparisons. Where there is none,
// systemd's own value stands. The caller holds Receiver.mu.
func (t *target) calibrate() {
	s := t.tally
	shown, whole := t.counters()
	switch {
	case !t.current(): // extra is not of the maps that were read
	case s.dir < 0 && s.known:
		held, _ := s.extra.plus(t.held)
		if more, less := shown.minus(held); whole && !less && more != (Counters{}) {
			t.tally = nil
			return
		}
		t.fill()
	case !whole, t.mayBeUnreset && (!t.got[execMainStart] || t.executedNothing()):
		t.tally = nil
	case s.known: // by another reading meanwhile
		t.fill()
	case s.exact():
		s.extra, s.known = s.least(), true
		t.fill()
	}
}

// fill puts the value of the maps into the target, as systemd would show it.
// The caller holds mu.
func (t *target) fill() {
	c, _ := t.tally.extra.plus(t.held)
	t.value[ingressBytes], t.value[ingressPackets] = c.IngressBytes, c.IngressPackets
	t.value[egressBytes], t.value[egressPackets] = c.EgressBytes, c.EgressPackets
	t.got[ingressBytes], t.got[ingressPackets], t.got[egressBytes], t.got[egressPackets] = true, true, true, true
	t.slice, t.got[slice] = t.tally.slice, true
	t.exited = t.exited && t.tally.dir < 0 // else it has a cgroup
	t.quiet, t.mayBeUnreset, t.noData, t.gone, t.missed, t.lost, t.err = [2]bool{}, false, false, false, false, false, nil
	t.time = time.Now()
}

// advance puts a reading on the odometer of the run. The caller holds mu.
func (r *Receiver) advance(t *target, raw Counters) (delta Counters, reset bool) {
	s := t.tally
	if s == nil || s.run != t.run {
		return t.run.advance(raw, t.time)
	}
	compared := t.compared && t.current()
	switch {
	case s.gap == nil:
		delta, reset = t.run.advance(raw, t.time)
	case !t.current(): // what was read is in the gap, as owed by maps of before
		delta, reset = r.bridge(s, raw, s.gap.base, t.time)
	case s.known:
		delta, reset = r.bridge(s, raw, t.held, t.time)
		r.closeGap(s, t.held)
	default: // what came after systemd's value will be in the next one
		delta, reset = r.bridge(s, raw, t.before, t.time)
		if compared && s.probes >= maxCompared { // extra will not be known
			r.closeGap(s, t.held)
		}
	}
	s.reading = nil
	if s.gap == nil && !s.known && s.compared && compared {
		s.reading = &reading{t.before, t.run.last, t.held}
	}
	return delta, reset
}

// bridge is advance for a tally with a gap. It adds the larger of what systemd
// says and what the maps prove: each is no more than what there was. held must not
// be from later than raw, or the next raw would have that once more. The caller
// holds mu.
func (r *Receiver) bridge(s *tally, raw, held Counters, at time.Time) (delta Counters, fell bool) {
	g := s.gap
	g.follow(s.run.last)
	delta, fell = s.run.advance(raw, at)
	proved := g.proved(held)
	if fell {
		delta = proved // systemd has begun again; the maps have not
	} else {
		delta = delta.max(proved)
	}
	g.counted, _ = g.counted.plus(delta)
	g.last = s.run.last
	return delta, fell
}

// follow counts what others have put on the odometer: a stop record.
func (g *gap) follow(last Counters) {
	if more, fell := last.minus(g.last); !fell {
		g.counted, _ = g.counted.plus(more)
	}
	g.last = last
}

// proved is what the maps show beyond what was counted.
func (g *gap) proved(held Counters) Counters {
	all, _ := g.owed.plus(held.less(g.base))
	return all.less(g.counted)
}

// closeGap states what may have been left out, at most, and ends the gap, if there is
// one. The caller holds mu.
func (r *Receiver) closeGap(s *tally, held Counters) {
	if s.gap == nil {
		return
	}
	for len(s.gap.old) > 0 {
		s.gap.forget(r.kernel.calls)
	}
	most, _ := s.gap.owed.plus(held.less(s.gap.base))
	most, _ = most.plus(s.gap.unclear)
	if open := most.less(s.gap.counted); open != (Counters{}) {
		r.kernel.open++
		r.kernel.uncertain, _ = r.kernel.uncertain.plus(open)
		r.log.Debug("over a reload, systemd counted in two maps", "unit", s.unit, "uncertain_bytes", open.IngressBytes+open.EgressBytes, "uncertain_packets", open.IngressPackets+open.EgressPackets)
	}
	s.endGap()
}

// state logs what the reloads since the last sweep have left uncertain. The
// caller holds mu.
func (k *kernelSource) state(log *slog.Logger, h *health) {
	if k == nil || k.open == 0 {
		return
	}
	u := k.uncertain
	log.Info("systemd counted in two places for a moment, while it was reloaded; what may be in both was left out",
		"units", k.open, "bytes_at_most", u.IngressBytes+u.EgressBytes, "packets_at_most", u.IngressPackets+u.EgressPackets)
	h.uncertain, _ = h.uncertain.plus(u)
	k.open, k.uncertain = 0, Counters{}
}

// takeRest puts the last value of maps on the series of their run, outside of
// the sweep's targets. The caller holds mu.
func (r *Receiver) takeRest(s *tally, held Counters) {
	run, now := s.run, time.Now()
	first, before := run.time.IsZero(), run.last
	var delta Counters
	if s.gap != nil {
		// Systemd shows the run no more: what the maps prove is all there will be.
		s.gap.follow(run.last)
		delta = s.gap.proved(held)
		s.gap.counted, _ = s.gap.counted.plus(delta)
		run.last, _ = run.last.plus(delta)
		s.gap.last, run.time = run.last, now
	} else {
		raw, _ := s.extra.plus(held)
		if _, fell := raw.minus(run.last); fell {
			return // a stop record has more
		}
		delta, _ = run.advance(raw, now)
	}
	run.final = run.final || !s.gone.IsZero()
	if run.start.IsZero() {
		run.start = s.opened
	}
	if run.slice == "" {
		run.slice = s.slice
	}
	if delta == (Counters{}) && before == run.last && !first {
		return
	}
	if topSlice(run.unit) {
		r.sliceGrew(&target{unit: &unit{name: run.unit}, run: run, time: now}, delta, first && !s.born)
	} else {
		r.unitGrew(run.slice, delta)
	}
	if !r.exports(run.unit) {
		return
	}
	if run.series == nil {
		run.series = r.seriesOf(run.unit, run.slice, run.start)
	}
	run.series.add(delta, now)
}

// readRests reads the maps of cgroups that are gone: their last bytes, and
// those of sockets that outlived them.
func (r *Receiver) readRests() {
	if r.kernel == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	r.kernel.ended = slices.DeleteFunc(r.kernel.ended, func(s *tally) bool {
		over := !r.readRest(s) || now.Sub(s.gone) > lateTraffic
		if over {
			r.closeGap(s, r.final(s))
			s.close()
		}
		return over
	})
}

// final is the last that is known of the maps of a cgroup that is gone: up to systemd
// 255, the next run counts in the same ones. The caller holds mu.
func (r *Receiver) final(s *tally) Counters {
	held, err := r.kernel.calls.read(s.now)
	if next := r.kernel.find(s.unit, s.slice); err != nil || next != nil && next.now.shares(s.now) {
		return s.latest
	}
	return held
}

// readRest reads the maps of one cgroup that is gone. It reports false when
// there is nothing more to be read. The caller holds mu.
func (r *Receiver) readRest(s *tally) bool {
	held, err := r.kernel.calls.read(s.now)
	if err != nil {
		return false
	}
	// Up to systemd 255, the next run counts in the same maps; and one that goes
	// on in another cgroup must not be counted by two.
	if next := r.kernel.find(s.unit, s.slice); next != nil && (next.now.shares(s.now) || s.run != nil && next.run == s.run) {
		return false
	}
	if s.run == nil {
		if s.run = r.runOf(s); s.run == nil {
			return true
		}
		s.run.rest = s
	}
	u := r.units[s.unit]
	switch {
	case s.known:
	case s.gap != nil:
		if u != nil && u.run == s.run {
			return true // systemd still shows it: the next sweep compares
		}
	case s.born && s.run.time.IsZero():
		s.extra, s.known = Counters{}, true
	default:
		return false // systemd's last value stands
	}
	r.takeRest(s, held)
	return true
}

// runOf returns the run that a cgroup belonged to which was gone before any
// sweep. The caller holds mu.
func (r *Receiver) runOf(s *tally) *run {
	if s.epoch == "" {
		// Without a name in the cgroup: the one run of the unit without a reading.
		var found *run
		for _, run := range r.runs {
			if run.unit == s.unit && run.time.IsZero() {
				if found != nil {
					return nil
				}
				found = run
			}
		}
		return found
	}
	key := r.runKey(s.unit, s.epoch)
	if run, ok := r.runs[key]; ok {
		return run
	}
	if !s.born {
		return nil
	}
	run := &run{unit: s.unit, epoch: s.epoch, path: invocationPath(s.epoch), slice: s.slice, closed: s.gone}
	r.runs[key] = run
	return run
}

// leave ends the tally of a unit if its cgroup is gone, and takes its last
// value at once. The caller holds mu.
func (r *Receiver) leave(unit string) {
	s := r.kernel.tallies[unit]
	if s == nil {
		return
	}
	// Read before the look: up to systemd 255, what is read after the run has
	// changed may be the next one's.
	held, err := r.kernel.calls.read(s.now)
	if r.kernel.look(s) != left {
		return
	}
	// The next run counts from when programs are on its cgroup; until then
	// retire finds none, and what was read before is still the old run's.
	if r.retire(s) && err == nil && s.run != nil && s.known {
		if _, fell := held.minus(s.latest); !fell {
			r.takeRest(s, held)
		}
	}
}

// renew takes new maps after a reload, before they can be replaced again. It
// reports whether systemd is still at it. The caller holds mu.
func (r *Receiver) renew() (more bool) {
	for _, s := range r.kernel.tallies {
		switch r.kernel.look(s) {
		case left:
			r.leave(s.unit)
		case waiting:
			more = true
		}
	}
	r.scan("/")
	return more
}

// scan opens the tallies of the units in a slice and in the slices below. The
// caller holds mu.
func (r *Receiver) scan(path string) {
	k := r.kernel
	k.watch.add(path)
	entries, err := os.ReadDir(k.cgroups + path)
	if err != nil {
		return // gone again
	}
	for _, entry := range entries {
		name := unitOfCgroup(entry.Name())
		if !entry.IsDir() || name == "" {
			continue
		}
		below := filepath.Join(path, entry.Name())
		if typeOf(name) == "slice" {
			r.scan(below)
		}
		if k.tallies[name] == nil && r.followsCgroup(name) {
			k.openTally(name, below)
		}
	}
}
