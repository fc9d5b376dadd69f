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
	slices map[int32]string // paths, by watch descriptor; guarded by Receiver.mu

	mu     sync.Mutex
	passes []time.Time // when to look for new maps after a reload
}

// newWatch fails where the kernel gives this user no inotify instance.
func newWatch(root string) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("follow the cgroup tree: %w; raise fs.inotify.max_user_instances", err)
	}
	return &watch{root: root, fd: fd, events: os.NewFile(uintptr(fd), "inotify"), slices: map[int32]string{}}, nil
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

// newcomer is a cgroup in which systemd has not begun to count yet.
type newcomer struct {
	unit, path string
	dir        int
	born       time.Time
	next       time.Time     // when to look
	pause      time.Duration // before the look after that
	stream     *stream       // once its programs were there
}

// A new cgroup is looked at after these pauses, each the double of the one
// before, until its programs and its invocation are there.
const (
	firstLook = 100 * time.Microsecond
	lastLook  = 50 * time.Millisecond
)

// followCgroups follows the cgroup tree until ctx ends, and then gives up all
// maps.
func (r *Receiver) followCgroups(ctx context.Context) {
	k := r.kernel
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		k.close()
	}()
	w := k.watch
	if w == nil {
		<-ctx.Done()
		return
	}
	defer w.events.Close()
	defer context.AfterFunc(ctx, w.wake)()
	var waiting []*newcomer
	defer func() {
		for _, n := range waiting {
			n.close()
		}
	}()
	buffer := make([]byte, 64<<10)
	for w.wait(ctx, waiting) {
		n, err := w.events.Read(buffer)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			r.log.Warn("cannot follow the cgroup tree; short units may be missed", "err", err)
			<-ctx.Done()
			return
		}
		waiting = append(waiting, r.take(buffer[:n])...)
		kept := waiting[:0]
		for _, n := range waiting {
			if r.meet(n) {
				kept = append(kept, n)
			}
		}
		waiting = kept
		if w.due() {
			r.renew()
		}
	}
}

// afterReload makes followCgroups look for new maps, now and some times more:
// systemd makes them some time after it has said that the reload is over.
func (k *kernelSource) afterReload() {
	if k == nil || k.watch == nil {
		return
	}
	w := k.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	w.passes = w.passes[:0]
	for _, pause := range []time.Duration{0, 10, 30, 100, 300, 1000, 2000} {
		w.passes = append(w.passes, time.Now().Add(pause*time.Millisecond))
	}
	_ = w.events.SetReadDeadline(time.Now()) // closed: nobody waits
}

// wake ends a wait for events.
func (w *watch) wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.events.SetReadDeadline(time.Now()) // closed: nobody waits
}

// wait prepares a wait for events, which is over when something else is to be
// done. It reports false after the end of ctx.
func (w *watch) wait(ctx context.Context, waiting []*newcomer) bool {
	next := time.Now().Add(time.Minute)
	for _, n := range waiting {
		if n.next.Before(next) {
			next = n.next
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.passes) > 0 && w.passes[0].Before(next) {
		next = w.passes[0]
	}
	return ctx.Err() == nil && w.events.SetReadDeadline(next) == nil
}

// due takes the passes whose time has come.
func (w *watch) due() (due bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.passes) > 0 && !w.passes[0].After(time.Now()) {
		w.passes, due = w.passes[1:], true
	}
	return due
}

// add watches a slice's directory. Without one of them, as when
// fs.inotify.max_user_watches is reached, the sweeps find its units. The caller
// holds Receiver.mu.
func (w *watch) add(path string) {
	if w == nil {
		return
	}
	wd, err := unix.InotifyAddWatch(w.fd, w.root+path, unix.IN_CREATE|unix.IN_DELETE|unix.IN_ONLYDIR)
	if err == nil {
		w.slices[int32(wd)] = path
	}
}

// take handles events, and returns the cgroups that have been made.
func (r *Receiver) take(events []byte) (made []*newcomer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		size := int(binary.NativeEndian.Uint32(events[12:]))
		events = events[unix.SizeofInotifyEvent:]
		name := strings.TrimRight(string(events[:size]), "\x00")
		events = events[size:]
		if n := r.event(wd, mask, name); n != nil {
			made = append(made, n)
		}
	}
	return made
}

// event handles one event. The caller holds mu.
func (r *Receiver) event(wd int32, mask uint32, name string) *newcomer {
	k := r.kernel
	parent, known := k.watch.slices[wd]
	switch {
	case mask&unix.IN_Q_OVERFLOW != 0:
		r.log.Info("the kernel dropped news of cgroups; looking at all of them")
		r.scan("/")
		return nil
	case mask&unix.IN_IGNORED != 0:
		delete(k.watch.slices, wd)
		return nil
	}
	unit := unitOfCgroup(name)
	if mask&unix.IN_ISDIR == 0 || !known || unit == "" {
		return nil
	}
	path := filepath.Join(parent, name)
	followed := topSlice(unit) || r.exports(unit)
	if followed {
		r.leave(unit)
	}
	if mask&unix.IN_CREATE == 0 {
		return nil
	}
	var n *newcomer
	if followed && k.streams[unit] == nil {
		if dir, err := unix.Open(k.cgroups+path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			now := time.Now()
			n = &newcomer{unit: unit, path: path, dir: dir, born: now, next: now, pause: firstLook}
		}
	}
	if typeOf(unit) == "slice" {
		r.scan(path) // units in it may have come before the watch
	}
	return n
}

// meet looks at a new cgroup, and reports whether to look again.
func (r *Receiver) meet(n *newcomer) (again bool) {
	now := time.Now()
	if n.next.After(now) {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kernel
	if n.stream == nil {
		if s := k.streams[n.unit]; s != nil { // a sweep or a scan came first
			n.close()
			n.stream = s
		} else {
			n.stream = k.openDir(n.unit, n.path, n.dir)
		}
		if n.stream != nil && n.stream.run == nil {
			n.stream.born, n.stream.confirmed, n.stream.opened = true, false, n.born
			// Up to systemd 255 the maps may still hold what an earlier run
			// counted. From zero on, they count this one.
			if value, err := n.stream.now.read(); err == nil && value == (Counters{}) {
				n.stream.state = calibrated
			}
		}
	}
	if n.stream != nil {
		if n.stream.dir < 0 || n.stream.run != nil {
			return false
		}
		if n.stream.epoch = invocationOfCgroup(n.stream.dir); n.stream.epoch != "" {
			return false
		}
	}
	if n.pause > lastLook || n.stream == nil && !n.there() {
		if n.stream == nil {
			n.close()
		}
		return false
	}
	n.next = now.Add(n.pause)
	n.pause *= 2
	return true
}

func (n *newcomer) close() {
	if n.stream == nil {
		_ = unix.Close(n.dir)
	}
}

// there reports whether the cgroup still exists.
func (n *newcomer) there() bool {
	_, err := attachedTo(n.dir)
	return err == nil
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
