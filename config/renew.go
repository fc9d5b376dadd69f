package config

import (
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// renewed is a value that is read from files, and read again when one of them has
// changed. It is safe for concurrent use.
type renewed[T any] struct {
	files []string
	read  func() (T, error)

	mu    sync.Mutex
	seen  []stamp // of the files, before the latest read
	value T       // of the latest read that went well
	err   error   // of the latest read
}

// newRenewed reads the value for the first time. What read reports to its loader
// is then for l, and later it is the error of get.
func newRenewed[T any](l *loader, read func(*loader) T, files ...string) *renewed[T] {
	r := &renewed[T]{files: files, seen: stamps(files)}
	first := l.again()
	r.value = read(first)
	l.problems = append(l.problems, first.problems...)
	l.cfg.Warnings = append(l.cfg.Warnings, first.cfg.Warnings...)
	r.read = func() (T, error) {
		again := l.again()
		return read(again), again.err()
	}
	return r
}

// get returns the present value. With an error it is the former one.
func (r *renewed[T]) get() (T, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// After an error always: what was in the way (rights, a missing mount) need
	// not be seen in a stamp.
	if now := stamps(r.files); r.err != nil || !slices.Equal(now, r.seen) {
		r.seen = now
		var value T
		if value, r.err = r.read(); r.err == nil {
			r.value = value
		}
	}
	return r.value, r.err
}

// A stamp tells one content of a file from another. Files are renewed in place,
// by renaming, and by turning a link to another directory.
type stamp struct {
	changed time.Time
	size    int64
	inode   uint64
}

// stamps returns the zero stamp for a file that is not there, or has no name.
func stamps(files []string) []stamp {
	out := make([]stamp, len(files))
	for i, file := range files {
		if info, err := os.Stat(file); err == nil {
			out[i] = stamp{changed: info.ModTime(), size: info.Size()}
			if s, ok := info.Sys().(*syscall.Stat_t); ok {
				out[i].inode = s.Ino
			}
		}
	}
	return out
}
