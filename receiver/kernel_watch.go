package receiver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	fd     int    // of events, whose Fd method would end its deadlines
	events *os.File

	reloaded chan struct{}
	passes   time.Duration // pause before the pass after the next; of followCgroups

	mu     sync.Mutex
	slices map[int32]string // paths, by watch descriptor
}

// newWatch fails where the kernel gives this user no inotify instance.
func newWatch(root string) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("follow the cgroup tree: %w; raise fs.inotify.max_user_instances", err)
	}
	return &watch{root: root, fd: fd, events: os.NewFile(uintptr(fd), "inotify"), reloaded: make(chan struct{}, 1), slices: map[int32]string{}}, nil
}

// startKernel begins to follow the cgroup tree. It goes on until ctx ends;
// wait returns when it has.
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
	r.scan("/")
	r.mu.Unlock()
	var following sync.WaitGroup
	following.Go(func() { r.followCgroups(ctx) })
	return following.Wait
}

// newcomer is a cgroup in which systemd has not begun to count yet, or whose
// run is not known.
type newcomer struct {
	unit, path string
	dir        int
	born       time.Time
	next       time.Time     // when to look
	pause      time.Duration // before the look after that
	stream     *stream       // once there are maps
}

// A new cgroup is looked at this often, in the beginning, and then after pauses
// that double, until its programs and its invocation are there. Units live for
// some milliseconds at the least.
const (
	firstLook = 200 * time.Microsecond
	lastLook  = 50 * time.Millisecond
	oftenFor  = 20 * time.Millisecond
)

// news is what the watch tells the receiver, which may have no time just then.
type news struct {
	unit     string
	born     *stream // the maps of a new cgroup; nil if one was made or removed
	overflow bool    // the kernel dropped events
}

// followCgroups takes what the watch tells until ctx ends, and then gives up
// all maps.
func (r *Receiver) followCgroups(ctx context.Context) {
	k := r.kernel
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		k.close()
	}()
	if k.watch == nil {
		<-ctx.Done()
		return
	}
	told := make(chan news, 4096)
	go r.watchCgroups(ctx, told) // which closes it
	passes := time.NewTimer(0)
	defer passes.Stop()
	for {
		select {
		case n, ok := <-told:
			if !ok {
				<-ctx.Done()
				return
			}
			r.hear(n)
		case <-k.watch.reloaded:
			passes.Reset(0)
			k.watch.passes = firstPass
		case <-passes.C:
			if k.watch.passes > 0 && k.watch.passes <= lastPass {
				r.renew()
				passes.Reset(k.watch.passes)
				k.watch.passes *= 3
			}
		}
	}
}

// After a reload, new maps are looked for after pauses, each three times the
// one before: systemd makes them some time after it has said that it is over.
const (
	firstPass = 10 * time.Millisecond
	lastPass  = 3 * time.Second
)

// afterReload makes followCgroups look for new maps.
func (k *kernelSource) afterReload() {
	if k == nil || k.watch == nil {
		return
	}
	select {
	case k.watch.reloaded <- struct{}{}:
	default: // it has yet to hear of the one before
	}
}

// watchCgroups tells what happens in the cgroup tree, and takes hold of the maps
// of new units at once, until ctx ends.
func (r *Receiver) watchCgroups(ctx context.Context, tell chan<- news) {
	w := r.kernel.watch
	defer close(tell)
	defer context.AfterFunc(ctx, func() { _ = w.events.Close() })() // ends a Read
	var waiting []*newcomer
	defer func() {
		for _, n := range waiting {
			n.close()
		}
	}()
	buffer := make([]byte, 64<<10)
	for ctx.Err() == nil {
		next := time.Now().Add(time.Minute)
		for _, n := range waiting {
			if n.next.Before(next) {
				next = n.next
			}
		}
		err := w.events.SetReadDeadline(next)
		n := 0
		if err == nil {
			n, err = w.events.Read(buffer)
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			if ctx.Err() == nil {
				r.log.Warn("cannot follow the cgroup tree; short units may be missed", "err", err)
			}
			return
		}
		waiting = append(waiting, r.take(buffer[:n], tell)...)
		kept := waiting[:0]
		for _, n := range waiting {
			if r.kernel.meet(n) {
				kept = append(kept, n)
			} else if n.stream != nil {
				tell <- news{unit: n.unit, born: n.stream} // until ctx ends somebody hears
			}
		}
		waiting = kept
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
	wd, err := unix.InotifyAddWatch(w.fd, w.root+path, unix.IN_CREATE|unix.IN_DELETE|unix.IN_ONLYDIR)
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
			now := time.Now()
			made = append(made, &newcomer{unit: unit, path: path, dir: dir, born: now, next: now, pause: firstLook})
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
func (k *kernelSource) meet(n *newcomer) (again bool) {
	now := time.Now()
	if n.next.After(now) {
		return true
	}
	there := true
	if n.stream == nil {
		attached, err := attachedTo(n.dir)
		there = err == nil
		if maps := openMaps(attached); maps != nil {
			n.stream = &stream{unit: n.unit, path: n.path, dir: n.dir, attached: attached, now: maps, born: true, opened: n.born}
			// Up to systemd 255 the maps may still hold what an earlier run
			// counted. From zero on, they count this one.
			if value, err := maps.read(); err == nil && value == (Counters{}) {
				n.stream.state = calibrated
			}
		}
	}
	if n.stream != nil {
		if n.stream.epoch = invocationOfCgroup(n.dir); n.stream.epoch != "" {
			return false
		}
	}
	if n.pause > lastLook || !there {
		if n.stream != nil {
			n.stream.epoch = k.invocation(n.unit, n.dir)
		} else {
			n.close()
		}
		return false
	}
	n.next = now.Add(n.pause)
	if now.Sub(n.born) > oftenFor {
		n.pause *= 2
	}
	return true
}

func (n *newcomer) close() {
	if n.stream != nil {
		n.stream.close()
	} else {
		_ = unix.Close(n.dir)
	}
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
		old := k.streams[n.unit]
		if old == nil {
			k.streams[n.unit] = n.born
			break
		}
		// A sweep came first, and knows less of it.
		if old.now.ids == n.born.now.ids && old.run == nil {
			old.born, old.confirmed, old.epoch, old.state, old.opened = true, false, n.born.epoch, n.born.state, n.born.opened
		}
		n.born.close()
	}
	r.leave(n.unit) // it may have ended since
}

// invocationOfCgroup returns the invocation id that systemd has put on a new
// cgroup. On one that outlives a run, it is that of the first.
func invocationOfCgroup(dir int) string {
	id := make([]byte, 64)
	for _, name := range []string{"trusted.invocation_id", "user.invocation_id"} {
		if n, err := unix.Fgetxattr(dir, name, id); err == nil && n == 32 {
			return string(id[:n])
		}
	}
	return ""
}

func openCgroup(path string) (int, error) {
	return unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}
