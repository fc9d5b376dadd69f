package receiver

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// watch follows the directories of slices in the cgroup tree, so that the maps
// of a unit are held before it can end. A nil watch does nothing: then the
// sweeps find the maps.
type watch struct {
	root   string // directory of the root cgroup
	events int    // inotify
	stop   int    // eventfd

	mu     sync.Mutex
	slices map[int32]string // paths, by watch descriptor
}

// newWatch fails where the kernel gives this user no inotify instance.
func newWatch(root string) (*watch, error) {
	events, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("follow the cgroup tree: %w; raise fs.inotify.max_user_instances", err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		_ = unix.Close(events)
		return nil, fmt.Errorf("follow the cgroup tree: %w", err)
	}
	return &watch{root: root, events: events, stop: stop, slices: map[int32]string{}}, nil
}

func (w *watch) close() {
	_ = unix.Close(w.events)
	_ = unix.Close(w.stop)
}

// startKernel begins to follow the cgroup tree and systemd's reloads. It goes on
// until ctx ends; wait returns when it has, and has given up all maps.
func (r *Receiver) startKernel(ctx context.Context) (wait func()) {
	if r.kernel == nil {
		return func() {}
	}
	w, err := newWatch(r.kernel.cgroups)
	if err != nil {
		r.log.Warn("short units may be missed", "err", err)
	}
	r.mu.Lock()
	r.kernel.watch = w
	r.kernel.reload.begun = make(chan struct{}, 1)
	r.scan("/")
	r.mu.Unlock()
	var following sync.WaitGroup
	following.Go(func() { r.watchReloads(ctx) })
	if w != nil {
		told := make(chan news, 4096)
		following.Go(func() { r.watchCgroups(ctx, told) }) // which closes it
		following.Go(func() {
			for n := range told {
				r.hear(n)
			}
		})
	}
	return func() {
		following.Wait()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.kernel.close()
		r.kernel.watch = nil
		if w != nil {
			w.close()
		}
	}
}

// newcomer is a cgroup in which systemd has not begun to count yet, or whose
// run is not known.
type newcomer struct {
	tally *tally
	there bool          // has maps
	next  time.Time     // when to look
	pause time.Duration // before the look after that
}

// A new cgroup is looked at this often, in the beginning, and then after pauses
// that double, until its programs and its invocation are there. Units live for
// some milliseconds at the least.
const (
	firstLook = 100 * time.Microsecond
	lastLook  = 50 * time.Millisecond
	oftenFor  = 20 * time.Millisecond
)

// news is what the watch tells the receiver, which may have no time just then.
type news struct {
	unit     string
	born     *tally // the maps of a new cgroup; nil if one was made or removed
	overflow bool   // the kernel dropped events
}

// watchCgroups tells what happens in the cgroup tree, and takes hold of the maps
// of new units at once, until ctx ends. It has a thread of its own: a short unit
// does not wait until the scheduler of Go has one to spare.
func (r *Receiver) watchCgroups(ctx context.Context, tell chan<- news) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	w, calls := r.kernel.watch, newCalls()
	defer close(tell)
	defer context.AfterFunc(ctx, func() { _, _ = unix.Write(w.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0}) })()
	var coming []*newcomer
	defer func() {
		for _, n := range coming {
			n.tally.close()
		}
	}()
	buffer := make([]byte, 64<<10)
	ready := []unix.PollFd{{Fd: int32(w.events), Events: unix.POLLIN}, {Fd: int32(w.stop), Events: unix.POLLIN}}
	for {
		var timeout *unix.Timespec
		for _, n := range coming {
			left := unix.NsecToTimespec(max(0, time.Until(n.next)).Nanoseconds())
			if timeout == nil || left.Nano() < timeout.Nano() {
				timeout = &left
			}
		}
		_, err := unix.Ppoll(ready, timeout, nil)
		if ctx.Err() != nil {
			return
		}
		n := 0
		if err == nil && ready[0].Revents != 0 {
			n, err = unix.Read(w.events, buffer)
		}
		if err != nil && err != unix.EINTR && err != unix.EAGAIN {
			r.log.Warn("cannot follow the cgroup tree; short units may be missed", "err", err)
			return
		}
		coming = append(coming, r.take(buffer[:max(n, 0)], tell)...)
		kept := coming[:0]
		for _, n := range coming {
			switch {
			case n.meet(calls):
				kept = append(kept, n)
			case n.there:
				tell <- news{unit: n.tally.unit, born: n.tally} // somebody hears until this closes it
			default:
				n.tally.close()
			}
		}
		coming = kept
	}
}

// add watches a slice's directory. Without one of them, as when
// fs.inotify.max_user_watches is reached, the sweeps find its units.
func (w *watch) add(path string) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	wd, err := unix.InotifyAddWatch(w.events, w.root+path, unix.IN_CREATE|unix.IN_DELETE|unix.IN_ONLYDIR)
	if err == nil {
		w.slices[int32(wd)] = path
	}
}

// slice returns the path of a watched slice.
func (w *watch) slice(wd int32, ignored bool) (path string, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	path, ok = w.slices[wd]
	if ignored {
		delete(w.slices, wd)
	}
	return path, ok
}

// take handles events (inotify(7)), and returns the cgroups that were made.
func (r *Receiver) take(events []byte, tell chan<- news) (made []*newcomer) {
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		size := int(binary.NativeEndian.Uint32(events[12:]))
		events = events[unix.SizeofInotifyEvent:]
		name := strings.TrimRight(string(events[:size]), "\x00")
		events = events[size:]
		parent, known := r.kernel.watch.slice(wd, mask&unix.IN_IGNORED != 0)
		unit := unitOfCgroup(name)
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			tell <- news{overflow: true}
		case mask&unix.IN_ISDIR == 0 || !known || unit == "":
		case mask&unix.IN_CREATE != 0:
			made = append(made, r.made(unit, filepath.Join(parent, name))...)
			fallthrough
		default:
			if r.followsCgroup(unit) {
				tell <- news{unit: unit}
			}
		}
	}
	return made
}

func (r *Receiver) followsCgroup(unit string) bool { return topSlice(unit) || r.exports(unit) }

// made returns what is new with a new cgroup: itself, and, as units may have
// come into a slice before its watch, all below.
func (r *Receiver) made(unit, path string) (made []*newcomer) {
	if r.followsCgroup(unit) {
		if dir, err := openCgroup(r.kernel.cgroups + path); err == nil {
			s := newTally(unit, path, dir)
			s.born = true
			made = append(made, &newcomer{tally: s, next: s.opened, pause: firstLook})
		}
	}
	if typeOf(unit) != "slice" {
		return made
	}
	r.kernel.watch.add(path)
	entries, err := os.ReadDir(r.kernel.cgroups + path)
	if err != nil {
		return made // gone again
	}
	for _, entry := range entries {
		if unit := unitOfCgroup(entry.Name()); unit != "" && entry.IsDir() {
			made = append(made, r.made(unit, filepath.Join(path, entry.Name()))...)
		}
	}
	return made
}

// meet looks at a new cgroup, and reports whether to look again.
func (n *newcomer) meet(calls *bpfCalls) (again bool) {
	now := time.Now()
	if n.next.After(now) {
		return true
	}
	s := n.tally
	if !n.there && s.begin(calls) {
		n.there = true
		// Up to systemd 255 the maps may still hold what an earlier run
		// counted. From zero on, they count this one.
		if value, err := calls.read(s.now); err == nil && value == (Counters{}) {
			s.known = true
		}
	}
	if n.there {
		if s.epoch = string(calls.invocationOf(s.dir)); s.epoch != "" {
			return false
		}
	}
	if n.pause > lastLook {
		return false
	}
	n.next = now.Add(n.pause)
	if now.Sub(s.opened) > oftenFor {
		n.pause *= 2
	}
	return true
}

// hear takes news of the cgroup tree.
func (r *Receiver) hear(n news) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kernel
	switch {
	case n.overflow:
		r.log.Info("the kernel dropped news of cgroups; looking at all of them")
		r.scan("/")
		return
	case n.born != nil:
		r.leave(n.unit)
		if n.born.epoch == "" {
			n.born.epoch = string(k.invocation(n.born))
		}
		old := k.tallies[n.unit]
		if old == nil {
			k.tallies[n.unit] = n.born
			break
		}
		// A sweep came first, and knows less of it.
		if old.now.ids == n.born.now.ids && old.run == nil {
			old.born, old.confirmed, old.epoch, old.known, old.opened = true, false, n.born.epoch, n.born.known, n.born.opened
		}
		n.born.close()
	}
	r.leave(n.unit) // it may have ended since
}

const (
	// maxPolled is how many units are watched closely over a reload: the first
	// that were found to have traffic in the last sweep.
	maxPolled = 128
	// pollPause is the pause between two looks at all of them.
	pollPause = 20 * time.Microsecond
	// betweenPrograms is more than a packet takes from the one program on a cgroup
	// to the next, by far.
	betweenPrograms = 5 * time.Microsecond
	// pollAfter is for how long it goes on when systemd has said that the reload
	// is over, and pollAtMost for how long in all.
	pollAfter  = 300 * time.Millisecond
	pollAtMost = 5 * time.Second
)

// reloadWatch reads the maps of busy units often while systemd is being
// reloaded, so that the last value before it attaches new programs is known to
// the packet. All but over and again is guarded by Receiver.mu.
type reloadWatch struct {
	begun   chan struct{} // wakes the goroutine; nil without one
	active  bool          // it polls now
	settled chan struct{} // closed when it has; nil when it need not
	over    atomic.Bool   // systemd has said that the reload is over
	again   atomic.Bool   // the next one has begun
}

func (w *reloadWatch) polling() bool { return w.active }

// reloadBegins takes systemd's word that it is about to reload or re-execute.
func (r *Receiver) reloadBegins() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reloadBegan = time.Now()
	if r.kernel == nil {
		return
	}
	w := &r.kernel.reload
	w.over.Store(false)
	switch {
	case w.begun == nil:
	case w.settled != nil:
		w.again.Store(true)
	default:
		w.settled = make(chan struct{})
		w.begun <- struct{}{}
	}
}

// reloadEnds takes systemd's word that the reload is over. It makes the new
// maps at about that time.
func (r *Receiver) reloadEnds() {
	if r.kernel != nil {
		r.kernel.reload.over.Store(true)
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

// polled is a unit that is watched over a reload, with descriptors of its own.
type polled struct {
	tally    *tally // not to be looked into
	dir      int
	maps     counterMaps
	attached programs
	// latest is what is in the maps and not in those that replace them, at least.
	latest Counters
	next   counterMaps // those that replace them
	gone   [2]bool     // the programs of maps, by direction
	over   [2]bool
}

// watchReloads polls at each reload, until ctx ends. It has a thread of its own
// for that, whose sleeps may be as short as it asks.
func (r *Receiver) watchReloads(ctx context.Context) {
	runtime.LockOSThread() // and not unlocked: the thread ends with it
	// Without it, each pause is longer by 50 microseconds.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
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
		for more := true; more; {
			units := r.pollable()
			w.poll(ctx, calls, units)
			more = r.polled(ctx, units)
		}
	}
}

// pollable returns the units to poll, and makes new maps wait meanwhile.
func (r *Receiver) pollable() (units []*polled) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kernel.reload.active = true
	for _, s := range r.kernel.tallies {
		if len(units) == maxPolled {
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
		units = append(units, &polled{tally: s, dir: dir, maps: maps, attached: s.attached, latest: s.latest})
	}
	return units
}

// poll reads the units until systemd has replaced the programs of all.
func (w *reloadWatch) poll(ctx context.Context, calls *bpfCalls, units []*polled) {
	pause := unix.NsecToTimespec(pollPause.Nanoseconds())
	began, end := time.Now(), time.Time{}
	for ctx.Err() == nil && !w.again.Load() {
		left := false
		for _, p := range units {
			left = p.look(calls) || left
		}
		now := time.Now()
		if w.over.Load() && end.IsZero() {
			end = now.Add(pollAfter)
		}
		if !left && w.over.Load() || !end.IsZero() && now.After(end) || now.Sub(began) > pollAtMost {
			return
		}
		if !left {
			time.Sleep(time.Millisecond) // for systemd to be done with the others
			continue
		}
		_ = unix.Nanosleep(&pause, nil)
	}
}

// look reads the maps, and reports whether it is worth looking again.
func (p *polled) look(calls *bpfCalls) bool {
	for direction := range p.over {
		if !p.over[direction] {
			p.over[direction] = !p.lookAt(calls, direction)
		}
	}
	return !p.over[0] || !p.over[1]
}

// lookAt is look for one direction. As long as the same programs are attached
// after the reading, all of it is from before the new ones.
//
// After that, the two maps have in common only what the new one has by then: the
// old map's value less the new one's, read a little later, is in no other. It is
// read when the new map is found, where mostly both programs are attached still,
// and once more when the old one is detached.
func (p *polled) lookAt(calls *bpfCalls, direction int) (more bool) {
	packets, bytes, err := calls.readOne(p.maps, direction)
	var now programs
	if err == nil {
		err = calls.attachedTo(p.dir, direction, &now)
	}
	if err != nil {
		return false
	}
	if now.n[direction] == p.attached.n[direction] && now.ids[direction] == p.attached.ids[direction] {
		p.latest.set(direction, packets, bytes)
		return true
	}
	found := p.next.ids[direction] == 0
	if found {
		calls.openMap(&p.next, &now, direction)
	}
	switch {
	case p.next.ids[direction] == p.maps.ids[direction]:
		return false // no new map after all
	case p.next.ids[direction] == 0:
		return true
	}
	gone := p.gone[direction]
	if found {
		// The query waits for a lock that systemd holds to attach and detach.
		if packets, bytes, err = calls.readOne(p.maps, direction); err != nil {
			return false
		}
		_ = unix.Nanosleep(&unix.Timespec{Nsec: betweenPrograms.Nanoseconds()}, nil)
	}
	if found || gone {
		if newPackets, newBytes, err := calls.readOne(p.next, direction); err == nil {
			var old Counters
			old.set(direction, packets-min(packets, newPackets), bytes-min(bytes, newBytes))
			p.latest = p.latest.max(old)
		}
	}
	p.gone[direction] = !slices.ContainsFunc(now.in(direction), func(id uint32) bool { return slices.Contains(p.attached.in(direction), id) })
	return !gone
}

// polled takes what the polling has found, and the new maps, as soon as systemd
// is done with them. It reports whether the next reload has begun.
func (r *Receiver) polled(ctx context.Context, units []*polled) (more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := &r.kernel.reload
	w.active = false
	for _, p := range units {
		if s := p.tally; s.now.ids == p.maps.ids {
			s.latest = s.latest.max(p.latest)
		}
		p.maps.close()
		p.next.close()
		_ = unix.Close(p.dir)
	}
	for pause := time.Millisecond; r.renew() && pause < time.Second && ctx.Err() == nil && !w.again.Load(); pause *= 2 {
		r.mu.Unlock()
		time.Sleep(pause)
		r.mu.Lock()
	}
	if w.again.Swap(false) {
		return true
	}
	close(w.settled)
	w.settled = nil
	return false
}
