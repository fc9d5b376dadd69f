package receiver

import (
	"context"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxPolled is how many units are watched closely over a reload: the first
	// that were found to have traffic in the last sweep.
	maxPolled = 128
	// maxNewborn is how many new maps are watched at a time until it is known
	// whose they are, and maxCounting how many of them count already.
	maxNewborn  = 2048
	maxCounting = 64
	// maxLooks is how often a new map is compared with the units' once it counts:
	// the old one is detached soon after.
	maxLooks = 16
	// pollPause is the pause between two looks at all of them, slowPause when
	// systemd has replaced the programs of all, and awayPause when it has been away
	// for longer than pollAtMost.
	pollPause = 20 * time.Microsecond
	slowPause = time.Millisecond
	awayPause = 20 * time.Millisecond
	pollSlice = 100 * time.Microsecond
	// betweenPrograms is more than a packet takes from the one program on a cgroup
	// to the next, by far.
	betweenPrograms = 5 * time.Microsecond
	// Which maps are whose is looked up, behind a lock that systemd needs to attach
	// its programs, when there was no new one for placePause, and at each
	// placeAtMost. A map that was loaded this long ago is attached by then.
	placePause  = 2 * time.Millisecond
	placeAtMost = 50 * time.Millisecond
	// pollAfter is for how long it goes on when systemd has said that the reload
	// is over, and pollAtMost for how long while it does not say so.
	pollAfter  = 300 * time.Millisecond
	pollAtMost = 5 * time.Second
	// renewPause is for how long no map was new, and those of all watched units had
	// been replaced, when all units' are taken while it goes on; else pollAtMost.
	renewPause = 50 * time.Millisecond
)

// reloadWatch reads the maps of busy units often while systemd is being
// reloaded, or is away, so that the last value before it attaches new programs is
// known to the packet. Receiver.mu guards the channels, and is held where begins and
// away are set.
type reloadWatch struct {
	begun   chan struct{} // wakes the goroutine; nil without one
	settled chan struct{} // closed when it has polled; nil when it need not
	begins  atomic.Uint32 // how many reloads have begun
	ends    atomic.Uint32 // how many had when the last one that is over was
	away    atomic.Bool   // there is no connection on which systemd could say anything
}

// over reports whether systemd has said that the last reload is over.
func (w *reloadWatch) over() bool { return w.ends.Load() == w.begins.Load() }

// reloadBegins takes systemd's word that it is about to reload or re-execute. The
// caller holds mu.
func (r *Receiver) reloadBegins() {
	r.reloadBegan = time.Now()
	if r.kernel == nil {
		return
	}
	w := &r.kernel.reload
	w.away.Store(false)
	w.begins.Add(1)
	if w.begun != nil && w.settled == nil {
		w.settled = make(chan struct{})
		w.begun <- struct{}{}
	}
}

// systemdLost says that no signals arrive any more: systemd may re-execute itself
// as often as it likes until the next connection. The caller holds mu.
func (r *Receiver) systemdLost() {
	if r.kernel != nil && !r.kernel.reload.away.Load() {
		r.reloadBegins()
		r.kernel.reload.away.Store(true)
	}
}

// reloadEnds takes systemd's word that the reload is over, or that there is none.
// It makes the new maps at about that time. The caller holds mu.
func (r *Receiver) reloadEnds() {
	if r.kernel != nil {
		w := &r.kernel.reload
		w.away.Store(false)
		w.ends.Store(w.begins.Load())
	}
}

// awaitReload waits until it is known what the maps counted before a reload.
func (r *Receiver) awaitReload(ctx context.Context) {
	r.mu.Lock()
	settled := r.kernel.reload.settled
	r.mu.Unlock()
	if settled == nil {
		return
	}
	select {
	case <-settled:
	case <-ctx.Done():
	}
}

// watchReloads polls at each reload, until ctx ends. It has a thread of its own
// for that, whose sleeps may be as short as it asks.
func (r *Receiver) watchReloads(ctx context.Context) {
	runtime.LockOSThread() // and not unlocked: the thread ends with it
	// Without it, each pause is longer by 50 microseconds.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	// From Linux 6.12 on, who asks for little is run sooner. No privilege is needed.
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Runtime: uint64(pollSlice)}, 0)
	w, calls := &r.kernel.reload, newCalls()
	r.mu.Lock()
	begun := w.begun
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		w.begun = nil
		if w.settled != nil {
			close(w.settled)
			w.settled = nil
		}
	}()
	for {
		select {
		case <-begun:
		case <-ctx.Done():
			return
		}
		p := &poll{calls: calls}
		for more := true; more; more = r.polled(ctx, p) {
			p = r.pollable(p)
			p.run(ctx, w)
		}
	}
}

// poll is the reading of busy units' maps over one reload or more.
//
// New maps are held as soon as their programs have been loaded, before they are
// attached, and read after those of the units each time, without waiting for a
// lock that systemd holds. What a unit's old map had when the new one had nothing
// is in the old one only, and so is by how much it was ahead of the new one later.
// The most of these is all that only the old one counted, unless that was detached
// between two looks.
type poll struct {
	calls   *bpfCalls
	units   []*polled
	newborn []*newborn
	newest  uint32    // program
	born    time.Time // when it was seen; zero when it is known whose its maps are
	adopted time.Time // when a map was new last; zero if none was
	looks   int
	// now and before are the last two readings of the units' maps.
	now, before []values
	counting    int // newborn maps that do
	// begins is how many reloads have been seen to begin, and began when the last was.
	begins uint32
	began  time.Time
}

// values are of the two maps of a unit, by direction.
type values [2]struct{ packets, bytes uint64 }

// polled is a unit that is watched over a reload, with descriptors of its own.
type polled struct {
	tally    *tally // not to be looked into
	dir      int
	attached programs
	// maps are those in which systemd counts, and latest is their last value that
	// is known to be from before other programs were attached.
	maps   counterMaps
	latest Counters
	since  int            // look
	held   counterMaps    // the first of them, by the descriptors that are to be closed
	older  []replacedMaps // oldest first
	done   bool           // in this reload
}

// replacedMaps are maps that others have replaced.
type replacedMaps struct {
	latest   Counters // what is in them and not in those that replaced them, at least
	attached programs
	next     counterMaps
}

// newborn is a map that has not been there before, and of which it is not known
// yet whose it is.
type newborn struct {
	id   uint32
	fd   int
	born time.Time
	// first is the look that saw it count first, and looks how many have since.
	first, looks int
	// only is what each unit's maps have counted and this one has not, at least, if
	// it is that unit's.
	only []values
}

// pollable returns the units to poll, whose new maps wait meanwhile.
func (r *Receiver) pollable(last *poll) *poll {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kernel
	p := &poll{calls: last.calls, newest: k.newest, begins: last.begins, began: last.began}
	for id := range p.calls.programsAfter(p.newest) {
		p.newest = id
	}
	for _, s := range k.tallies {
		if len(p.units) == maxPolled {
			break
		}
		if !s.active || s.dir < 0 {
			continue
		}
		maps, err := s.now.dup()
		if err != nil {
			break // no descriptor is left
		}
		dir, err := unix.FcntlInt(uintptr(s.dir), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			maps.close()
			break
		}
		s.polled = true
		p.units = append(p.units, &polled{tally: s, dir: dir, maps: maps, held: maps, attached: s.attached, latest: s.latest})
	}
	p.now, p.before = make([]values, len(p.units)), make([]values, len(p.units))
	return p
}

// run polls until systemd has replaced the programs of all units, and has said
// that it is done; or until it is time to take all units' maps meanwhile, as it may
// be long before it says so.
func (p *poll) run(ctx context.Context, w *reloadWatch) {
	started, left, over := time.Now(), true, false
	var placed, end time.Time
	for ctx.Err() == nil {
		p.look()
		now := time.Now()
		if begins := w.begins.Load(); begins != p.begins {
			p.begins, p.began, left, over = begins, now, true, false
			for _, u := range p.units {
				u.done = false
			}
		}
		switch {
		case !over && w.ends.Load() == p.begins:
			over, end = true, now.Add(pollAfter)
		case over && (!left || now.After(end)),
			!over && !p.adopted.IsZero() && (!left && now.Sub(p.adopted) > renewPause || now.Sub(started) > pollAtMost):
			p.place()
			return
		case !over && now.Sub(p.began) > pollAtMost && !w.away.Load():
			w.ends.Store(p.begins) // it is stuck, or its word was lost
		}
		if !p.born.IsZero() && now.Sub(p.born) > placePause || now.Sub(placed) > placeAtMost || p.counting >= maxCounting {
			left = p.place()
			placed = now
		}
		pause := pollPause
		switch {
		case now.Sub(p.began) > pollAtMost:
			pause = awayPause
		case !left:
			pause = slowPause
		}
		_ = unix.Nanosleep(&unix.Timespec{Nsec: pause.Nanoseconds()}, nil)
	}
}

// look reads all maps.
func (p *poll) look() {
	p.looks++
	p.now, p.before = p.before, p.now
	for i, u := range p.units {
		for direction := range p.now[i] {
			v := &p.now[i][direction]
			var err error
			if v.packets, v.bytes, err = p.calls.readOne(u.maps, direction); err != nil {
				*v = p.before[i][direction]
			}
		}
	}
	read := time.Now()
	for id := range p.calls.programsAfter(p.newest) {
		p.newest = id
		p.adopt(id)
	}
	if len(p.newborn) > 0 {
		passPrograms(read)
	}
	for _, n := range p.newborn {
		if n.looks < maxLooks {
			p.watch(n)
		}
	}
}

// adopt takes hold of the maps of a new program.
func (p *poll) adopt(program uint32) {
	p.born = time.Now()
	ids, n := p.calls.mapsOf(program)
	for _, id := range ids[:n] {
		known := func(n *newborn) bool { return n.id == id }
		if len(p.newborn) == maxNewborn || slices.ContainsFunc(p.newborn, known) {
			continue
		}
		if fd, ok := p.calls.openCounter(id); ok {
			p.newborn = append(p.newborn, &newborn{id: id, fd: fd, born: p.born})
			p.adopted = p.born
		}
	}
}

// watch compares a new map, once it counts, with those of the units, which have
// just been read.
func (p *poll) watch(n *newborn) {
	m := counterMaps{ids: [2]uint32{n.id}, fds: [2]int{n.fd}}
	packets, bytes, err := p.calls.readOne(m, 0)
	if err != nil || packets == 0 {
		return
	}
	if n.only == nil {
		// When the units' maps had been read before, it was not there or had nothing.
		n.first, n.only = p.looks, slices.Clone(p.before)
		p.counting++
	}
	n.looks++
	for i, unit := range p.now {
		for direction, v := range unit {
			only := &n.only[i][direction]
			only.packets = max(only.packets, v.packets-min(v.packets, packets))
			only.bytes = max(only.bytes, v.bytes-min(v.bytes, bytes))
		}
	}
}

// place finds out whose the new maps are. It reports whether units are left whose
// maps systemd has not replaced in this reload.
func (p *poll) place() (left bool) {
	halfway := false
	for i, u := range p.units {
		attached, err := p.calls.attached(u.dir)
		switch {
		case err != nil: // the cgroup is gone
			continue
		case attached == u.attached: // all of the last reading is from before any others
			for direction, v := range p.now[i] {
				u.latest.set(direction, v.packets, v.bytes)
			}
		default:
			next, several, ok := p.calls.openMaps(&attached)
			switch {
			case switching(u.maps, next, &attached, several, ok):
				next.close()
				halfway = true
			case !ok: // it is counted no more, or is to be again
			case next.ids == u.maps.ids:
				next.close()
				u.attached, u.done = attached, true
			default:
				p.replace(i, attached, next)
			}
		}
		left = left || !u.done
	}
	now := time.Now()
	p.born, p.counting = time.Time{}, 0
	if halfway {
		p.born = now
	}
	// What counts, and is none of the units', is another unit's.
	p.newborn = slices.DeleteFunc(p.newborn, func(n *newborn) bool {
		age := now.Sub(n.born)
		others := !halfway && (n.only != nil || age > placeAtMost) || age > pollAtMost
		if others {
			_ = unix.Close(n.fd)
		}
		return others
	})
	return left
}

// replace goes on with the maps that have replaced those of a unit.
func (p *poll) replace(i int, attached programs, next counterMaps) {
	u := p.units[i]
	u.latest = u.latest.max(p.calls.onlyIn(u.maps, next))
	for direction := range next.ids {
		at := slices.IndexFunc(p.newborn, func(n *newborn) bool { return n.id == next.ids[direction] })
		if at < 0 {
			continue
		}
		if n := p.newborn[at]; n.only != nil && n.first > u.since { // else the unit's maps were others then
			var only Counters
			only.set(direction, n.only[i][direction].packets, n.only[i][direction].bytes)
			u.latest = u.latest.max(only)
		}
	}
	u.older = append(u.older, replacedMaps{latest: u.latest, attached: attached, next: next})
	u.attached, u.maps, u.latest, u.since, u.done = attached, next, Counters{}, p.looks, true
	p.now[i], p.before[i] = values{}, values{}
}

// polled takes what the polling has found, and the new maps, as soon as systemd
// is done with them. It reports whether a reload is going on.
func (r *Receiver) polled(ctx context.Context, p *poll) (more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := &r.kernel.reload
	for _, n := range p.newborn {
		_ = unix.Close(n.fd)
	}
	for _, u := range p.units {
		s := u.tally
		s.polled = false
		same := s.now.ids == u.held.ids
		for _, old := range u.older {
			if same {
				s.replace(r.kernel.calls, old.latest, old.attached, old.next)
			} else {
				old.next.close()
			}
		}
		if same {
			s.latest = s.latest.max(u.latest)
		}
		u.held.close()
		_ = unix.Close(u.dir)
	}
	for pause := time.Millisecond; r.renew() && pause < time.Second && ctx.Err() == nil && w.over(); pause *= 2 {
		r.mu.Unlock()
		time.Sleep(pause)
		r.mu.Lock()
	}
	if !w.over() && ctx.Err() == nil {
		return true
	}
	close(w.settled)
	w.settled = nil
	return false
}
