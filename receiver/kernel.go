package receiver

import (
	"context"
	"fmt"
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
	// own value to find out the difference exactly.
	maxProbes = 8
)

// kernelSource reads the counters where systemd's programs count, in BPF maps
// (docs/decisions/kernel-mode.md). Everything that it reads of a run is brought
// to what systemd would show, so that the odometer can go from one source to
// the other at any reading; what systemd loses over a reload it adds to that.
//
// Its fields are guarded by Receiver.mu, except for those set once.
type kernelSource struct {
	cgroups string // directory of systemd's root cgroup
	// invocations is where systemd names the invocation of each unit, in
	// symbolic links: /run/systemd/units.
	invocations string
	watch       *watch
	streams     map[string]*stream // of the cgroups that are there, by unit
	ended       []*stream          // of cgroups that are gone, oldest first
}

// stream is the counting of one unit in one cgroup.
type stream struct {
	unit  string
	path  string // below the root
	dir   int    // descriptor of the directory
	epoch string // invocation id, empty for units without one
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
	now      *counterMaps
	older    []*counterMaps // from before a reload

	// extra is what systemd adds to the value of now: the total that it carried
	// over its last reload.
	extra Counters
	state calibration
	// low and high bound extra, once compared says that they do.
	low, high [4]int64
	compared  bool
	probes    int // how often systemd was asked for that alone
	// renewed says that now has replaced maps which were on the odometer.
	renewed bool
}

type calibration int

const (
	uncalibrated calibration = iota // systemd's values count
	// provisional: the map counts; extra is the least that it can be, since
	// the unit was too busy for an exact comparison.
	provisional
	calibrated
)

// openKernel prepares the kernel source, if cfg asks for it and it is allowed.
func openKernel(cfg Config) (*kernelSource, error) {
	if err := mayReadMaps(); err != nil {
		return nil, err
	}
	k := &kernelSource{cgroups: cfg.cgroups, invocations: cfg.invocations, streams: map[string]*stream{}}
	if k.invocations == "" {
		k.invocations = "/run/systemd/units"
	}
	if k.cgroups == "" {
		var err error
		if k.cgroups, err = findCgroups(); err != nil {
			return nil, err
		}
	}
	root, err := openCgroup(k.cgroups)
	if err == nil {
		_, err = attachedTo(root)
		_ = unix.Close(root)
	}
	if err != nil {
		return nil, fmt.Errorf("read counters from the kernel: query the programs on %s: %w; give unitmeter a view of the host's cgroups, or set UNITMETER_SOURCE=dbus", k.cgroups, err)
	}
	return k, nil
}

// invocation returns what systemd says is the unit's invocation. The link
// changes after systemd has set a unit's counters to zero for a new run; units
// without processes of their own have none.
func (k *kernelSource) invocation(unit string, dir int) string {
	if id, err := os.Readlink(filepath.Join(k.invocations, "invocation:"+unit)); err == nil {
		return id
	}
	return invocationOfCgroup(dir)
}

// open starts a stream for the unit in the cgroup at path, unless there is
// nothing that counts.
func (k *kernelSource) open(unit, path string) *stream {
	dir, err := openCgroup(k.cgroups + path)
	if err != nil {
		return nil
	}
	attached, err := attachedTo(dir)
	now := openMaps(attached) // none after an error
	if err != nil || now == nil {
		_ = unix.Close(dir)
		return nil
	}
	s := &stream{
		unit: unit, path: path, dir: dir, attached: attached, now: now, opened: time.Now(),
		epoch: k.invocation(unit, dir), confirmed: true,
	}
	k.streams[unit] = s
	return s
}

// find returns the stream of a unit that is in the cgroup tree now.
func (k *kernelSource) find(unit, slice string) *stream {
	if s := k.streams[unit]; s != nil {
		return s
	}
	path := cgroupOfSlice(unit)
	if typeOf(unit) != "slice" {
		if slice == "" {
			return nil
		}
		path = filepath.Join(cgroupOfSlice(slice), unit)
	}
	return k.open(unit, path)
}

// sighting is what became of the cgroup of a stream.
type sighting int

const (
	unchanged sighting = iota
	replaced           // systemd counts in new maps since a reload
	detached           // nothing is counted any more
	left               // the cgroup is gone, or is another run's
)

// look finds out what became of the cgroup, and takes new maps. Values that
// were read before are of this stream's run unless a later stream shares the
// maps.
func (k *kernelSource) look(s *stream) sighting {
	if s.dir < 0 {
		return left
	}
	attached, err := attachedTo(s.dir)
	if named := k.invocation(s.unit, s.dir) == s.epoch; named && (!s.born || s.epoch != "") {
		s.confirmed = true
	} else if !named && s.confirmed {
		return left
	}
	switch {
	case err != nil:
		return left
	case attached.equal(s.attached):
		return unchanged
	}
	next := openMaps(attached)
	switch {
	case next == nil:
		return detached
	case next.shares(s.now):
		if next.ids == s.now.ids {
			s.attached = attached
		} // else systemd is at it
		next.close()
		return unchanged
	}
	if s.state != uncalibrated || s.renewed {
		s.now.replaced = time.Now()
		s.older = append(s.older, s.now)
		s.renewed = true
	} else {
		s.now.close() // systemd's values were counted so far, and carry on
		s.born = false
	}
	s.attached, s.now = attached, next
	s.doubt()
	return replaced
}

// counting reports whether nothing has replaced the maps since the last look.
// Maps that stand still would agree with anything.
func (s *stream) counting() bool {
	if s.dir < 0 {
		return true // they are those of the end
	}
	attached, err := attachedTo(s.dir)
	return err == nil && attached.equal(s.attached)
}

// doubt makes systemd's value decide until extra is known again.
func (s *stream) doubt() { s.state, s.compared, s.probes = uncalibrated, false, 0 }

// compare takes what systemd showed between two readings of the map.
func (s *stream) compare(before, shown, after Counters) {
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
func (s *stream) exact() bool { return s.compared && s.low == s.high }

func (s *stream) least() Counters {
	return Counters{uint64(s.low[0]), uint64(s.low[1]), uint64(s.low[2]), uint64(s.low[3])}
}

func (c Counters) values() [4]uint64 {
	return [4]uint64{c.IngressBytes, c.IngressPackets, c.EgressBytes, c.EgressPackets}
}

// retire puts aside a stream whose cgroup is gone, and opens the one that has
// its place now, if any. It reports false if the maps count for that one.
func (k *kernelSource) retire(s *stream) bool {
	delete(k.streams, s.unit)
	next := k.open(s.unit, s.path)
	s.gone = time.Now()
	_ = unix.Close(s.dir)
	s.dir = -1
	if next != nil && next.now.shares(s.now) {
		s.close()
		return false
	}
	k.ended = append(k.ended, s)
	if len(k.ended) > maxEnded {
		k.ended[0].close()
		k.ended = k.ended[1:]
	}
	return true
}

func (s *stream) close() {
	if s.dir >= 0 {
		_ = unix.Close(s.dir)
		s.dir = -1
	}
	s.now.close()
	for _, m := range s.older {
		m.close()
	}
	s.older = nil
}

// close gives up all maps.
func (k *kernelSource) close() {
	for _, s := range k.streams {
		s.close()
	}
	for _, s := range k.ended {
		s.close()
	}
	clear(k.streams)
	k.ended = nil
}

// belongs reports whether the stream counts this run.
func (r *Receiver) belongs(s *stream, run *run) bool {
	return s.epoch == run.epoch || s.epoch == "" && run.epoch == r.cfg.BootID
}

// read fills in the targets: from the kernel where their maps are held and it is
// known what systemd adds to them, and else from systemd.
func (r *Receiver) read(ctx context.Context, b *bus, targets []target) error {
	if r.kernel == nil {
		return r.readBus(ctx, b, targets)
	}
	var rest []int
	r.mu.Lock()
	for i := range targets {
		t := &targets[i]
		r.lookAt(t)
		switch {
		case t.stream == nil:
			rest = append(rest, i)
		case t.stream.state != calibrated:
			t.quiet = false
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
		if t := &asked[i]; err == nil && t.stream != nil && t.stream.probes < maxProbes*maxProbes {
			err = r.probe(ctx, b, t)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, at := range rest {
		if asked[i].stream != nil {
			r.calibrate(&asked[i])
		}
		targets[at] = asked[i]
	}
	return err
}

// lookAt reads the maps of a target, and sets its stream if they count the
// target's run. The caller holds mu.
func (r *Receiver) lookAt(t *target) {
	k := r.kernel
	s := k.find(t.unit.name, t.unit.slice)
	if s == nil && !t.run.ended.IsZero() {
		r.lookAtEnded(t)
	}
	if s == nil {
		return
	}
	value, err := s.now.read()
	if err != nil {
		r.log.Warn("cannot read a unit's counters from the kernel; asking systemd", "unit", s.unit, "err", err)
		delete(k.streams, s.unit)
		s.close()
		return
	}
	switch k.look(s) {
	case left:
		if k.retire(s) && s.run == t.run && (s.state != uncalibrated || s.renewed) {
			t.stream, t.held = s, value
			return
		}
		if s = k.streams[t.unit.name]; s == nil {
			return
		}
		if value, err = s.now.read(); err != nil {
			return
		}
	case detached:
		if s.run == t.run && s.state != uncalibrated {
			r.takeRest(s, value)
		}
		s.doubt()
		return
	case replaced:
		if value, err = s.now.read(); err != nil {
			return
		}
	case unchanged:
	}
	if !r.belongs(s, t.run) {
		return
	}
	if s.run != t.run {
		if s.run != nil {
			s.doubt()
		}
		s.run = t.run
	}
	if _, fell := value.minus(s.now.taken); fell {
		s.doubt()
		s.now.taken = Counters{}
	}
	t.stream, t.held = s, value
}

// lookAtEnded is lookAt for a run whose cgroup is gone. The caller holds mu.
func (r *Receiver) lookAtEnded(t *target) {
	for _, s := range r.kernel.ended {
		if s.run != t.run || s.state == uncalibrated && !s.renewed {
			continue
		}
		held, err := s.now.read()
		if err != nil {
			return
		}
		if next := r.kernel.find(s.unit, sliceOfCgroup(s.path)); next == nil || !next.now.shares(s.now) {
			t.stream, t.held = s, held
		}
		return
	}
}

// compareAll compares the maps of targets with what systemd has just shown.
func (r *Receiver) compareAll(targets []target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range targets {
		t := &targets[i]
		if t.stream == nil {
			continue
		}
		before := t.held
		after, err := t.stream.now.read()
		if shown, ok := t.counters(); ok && err == nil && t.stream.counting() {
			t.held = after
			t.stream.compare(before, shown, after)
		}
	}
}

// probe asks systemd for the counters of one busy unit until it is known what
// systemd adds to those in the map.
func (r *Receiver) probe(ctx context.Context, b *bus, t *target) error {
	for range maxProbes {
		if _, ok := t.counters(); !ok {
			return nil // nothing to compare with
		}
		r.mu.Lock()
		done := t.stream.exact()
		t.stream.probes++
		held, err := t.stream.now.read()
		r.mu.Unlock()
		if done || err != nil {
			return nil
		}
		one := []target{{unit: t.unit, run: t.run, path: t.path, iface: t.iface, stream: t.stream, held: held}}
		if err := r.readBus(ctx, b, one); err != nil {
			return err
		}
		r.compareAll(one)
		if _, ok := one[0].counters(); ok {
			t.held, t.time = one[0].held, one[0].time
			copy(t.value[:ipAccounting], one[0].value[:ipAccounting])
		}
	}
	return nil
}

// calibrate draws the conclusion from the comparisons. Where there is none,
// systemd's own value stands. The caller holds mu.
func (r *Receiver) calibrate(t *target) {
	s := t.stream
	_, whole := t.counters()
	switch {
	case s.state == calibrated: // by another reading meanwhile
	case s.exact():
		if s.state == provisional && !s.renewed {
			// What was left out of extra is on the odometer's total already.
			rest, _ := s.least().minus(s.extra)
			s.run.last, _ = s.run.last.plus(rest)
		}
		s.extra, s.state = s.least(), calibrated
	case s.compared && (s.renewed || s.state == provisional):
		if s.state == uncalibrated {
			s.extra, s.state = s.least(), provisional
		}
	case t.noData && t.got[ipAccounting] && t.value[ipAccounting] != 0 && !s.renewed:
		// systemd 256 and 257 forget where they count (systemd#38112).
		if _, fell := t.held.minus(s.run.last); fell {
			t.stream = nil
			return
		}
		s.extra, s.state = Counters{}, calibrated
	case s.state == provisional:
	case s.renewed && t.gone:
		s.presume()
	case s.renewed:
		// The value in the new map waits until systemd answers.
		t.got = [properties]bool{}
		t.stream = nil
		return
	default:
		if whole {
			s.now.taken = t.held
		}
		t.stream = nil
		return
	}
	t.fill()
}

// presume takes over what the maps before counted as what systemd carried over:
// more than it can be, for a run that systemd will show no more.
func (s *stream) presume() { s.extra, s.state = s.run.last, provisional }

// fill puts the value of the maps into the target, as systemd would show it.
// The caller holds mu.
func (t *target) fill() {
	c, _ := t.stream.extra.plus(t.held)
	t.value[ingressBytes], t.value[ingressPackets] = c.IngressBytes, c.IngressPackets
	t.value[egressBytes], t.value[egressPackets] = c.EgressBytes, c.EgressPackets
	t.got[ingressBytes], t.got[ingressPackets], t.got[egressBytes], t.got[egressPackets] = true, true, true, true
	t.slice, t.got[slice] = sliceOfCgroup(t.stream.path), true
	t.quiet, t.mayBeUnreset, t.noData, t.gone, t.missed, t.lost, t.err = false, false, false, false, false, false, nil
	t.time = time.Now()
}

// advance puts a reading on the odometer of the run. The caller holds mu.
func (t *target) advance(raw Counters) (delta Counters, reset bool) {
	if t.stream == nil {
		return t.run.advance(raw, t.time)
	}
	return t.stream.advance(t.held, t.time)
}

// advance puts a reading of the maps on the odometer of the run, and what else
// the maps before them have counted. The caller holds Receiver.mu.
func (s *stream) advance(held Counters, at time.Time) (delta Counters, reset bool) {
	if s.renewed {
		s.renewed = false
		s.run.last = s.extra
	}
	raw, _ := s.extra.plus(held)
	delta, reset = s.run.advance(raw, at)
	s.now.taken = held
	for _, m := range s.older {
		if value, err := m.read(); err == nil {
			if more, fell := value.minus(m.taken); !fell {
				m.taken = value
				delta, _ = delta.plus(more)
			}
		}
	}
	return delta, reset
}

// takeRest puts the last value of maps on the series of their run, outside of
// the sweep's targets. The caller holds mu.
func (r *Receiver) takeRest(s *stream, held Counters) {
	run, now := s.run, time.Now()
	raw, _ := s.extra.plus(held)
	if _, fell := raw.minus(run.last); fell && !s.renewed {
		return
	}
	first := run.time.IsZero()
	before := run.last
	delta, _ := s.advance(held, now)
	run.final = run.final || !s.gone.IsZero()
	if run.start.IsZero() {
		run.start = s.opened
	}
	if run.slice == "" {
		run.slice = sliceOfCgroup(s.path)
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

// exports reports whether a unit has a series, and is not followed only for the
// balance of its slice.
func (r *Receiver) exports(name string) bool {
	return slices.Contains(r.cfg.Types, typeOf(name)) && r.include.index(name) >= 0 && r.exclude.index(name) < 0
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
	for _, s := range r.kernel.streams {
		s.older = slices.DeleteFunc(s.older, func(m *counterMaps) bool {
			old := now.Sub(m.replaced) > lateTraffic && !s.renewed
			if old {
				m.close()
			}
			return old
		})
	}
	r.kernel.ended = slices.DeleteFunc(r.kernel.ended, func(s *stream) bool {
		over := !r.readRest(s) || now.Sub(s.gone) > lateTraffic
		if over {
			s.close()
		}
		return over
	})
}

// readRest reads the maps of one cgroup that is gone. It reports false when
// there is nothing more to be read. The caller holds mu.
func (r *Receiver) readRest(s *stream) bool {
	held, err := s.now.read()
	if err != nil {
		return false
	}
	// Up to systemd 255, the next run counts in the same maps.
	if next := r.kernel.find(s.unit, sliceOfCgroup(s.path)); next != nil && next.now.shares(s.now) {
		return false
	}
	if s.run == nil {
		s.run = r.runOf(s)
	}
	if s.run == nil {
		return true
	}
	u := r.units[s.unit]
	switch {
	case s.state != uncalibrated:
	case s.renewed && u != nil && u.run == s.run:
		return true // systemd still shows it: the next sweep compares
	case s.renewed:
		s.presume()
	case s.born:
		s.extra, s.state = Counters{}, calibrated
	default:
		return false // systemd's last value stands
	}
	r.takeRest(s, held)
	return true
}

// runOf returns the run that a cgroup belonged to which was gone before any
// sweep. The caller holds mu.
func (r *Receiver) runOf(s *stream) *run {
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
	run := &run{unit: s.unit, epoch: s.epoch, path: invocationPath(s.epoch), slice: sliceOfCgroup(s.path), closed: s.gone}
	r.runs[key] = run
	return run
}

// leave ends the stream of a unit if its cgroup is gone, and takes its last
// value at once. The caller holds mu.
func (r *Receiver) leave(unit string) {
	s := r.kernel.streams[unit]
	if s == nil || r.kernel.look(s) != left {
		return
	}
	held, err := s.now.read()
	// The next run counts from when programs are on its cgroup; until then
	// retire finds none, and what was read before is still the old run's.
	if r.kernel.retire(s) && err == nil && s.run != nil && s.state != uncalibrated && !s.renewed {
		r.takeRest(s, held)
	}
}

// renew takes new maps after a reload, before they can be replaced again.
func (r *Receiver) renew() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.kernel.streams {
		if r.kernel.look(s) == left {
			r.leave(s.unit)
		}
	}
	r.scan("/")
}

// scan opens the streams of the units in a slice and in the slices below. The
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
		if k.streams[name] == nil && r.followsCgroup(name) {
			k.open(name, below)
		}
	}
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
	if err != nil && r.cfg.Source == "auto" {
		r.log.Info("reading all counters over D-Bus", "reason", err)
		return nil
	}
	return err
}
