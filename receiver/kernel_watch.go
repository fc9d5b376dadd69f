package receiver

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
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
