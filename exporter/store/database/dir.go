package database

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInUse says that another process has the directory.
var ErrInUse = errors.New("state directory is in use")

// Refusal is an error that another try cannot fix.
type Refusal struct{ error }

func (r Refusal) Unwrap() error { return r.error }

// LockDir makes the directory if there is none, and checks that no other user can write
// to it. It locks the directory for this process until the file is closed. The lock is
// on the directory itself: it needs no file, so no space on a full disk, and no process
// can leave a stale one.
func LockDir(dir string) (*os.File, error) {
	if dir == "" {
		return nil, Refusal{errors.New("open store: no directory is given: set a state directory")}
	}
	err := os.MkdirAll(dir, 0o700)
	var f *os.File
	if err == nil {
		f, err = os.Open(dir)
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, Refusal{fmt.Errorf("open store: %w: uid %d needs a state directory of its own", err, os.Geteuid())}
	}
	if errors.Is(err, syscall.ENOTDIR) {
		return nil, Refusal{fmt.Errorf("open store: %w: choose another state directory", err)}
	}
	if err != nil {
		return nil, err
	}
	if err := checkDir(f); err != nil {
		f.Close()
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		info, _ := f.Stat()
		holder := cmp.Or(LockHolder(info), "another process")
		f.Close()
		if err == unix.EWOULDBLOCK {
			return nil, Refusal{fmt.Errorf("%w: %s is held by %s: stop it, or give this agent another state directory", ErrInUse, dir, holder)}
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// checkDir refuses a directory in which someone else could plant requests to be
// sent with our credentials.
func checkDir(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
		return Refusal{fmt.Errorf("open store: %s belongs to uid %d but this process is uid %d: run as that user, or chown -R %d %[1]s, or choose another state directory",
			f.Name(), owner, os.Geteuid(), os.Geteuid())}
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return Refusal{fmt.Errorf("open store: %s can be written by others (mode %#o): chmod 0700 %[1]s after you have checked what is in it", f.Name(), perm)}
	}
	return nil
}

// suffixes name the files of a store.
var suffixes = [...]string{"", "-wal", "-shm", "-journal", markSuffix}

// LockHolder names the process that has the lock of LockDir on a directory, as far
// as /proc/locks tells; "" = none.
func LockHolder(dir fs.FileInfo) string {
	st, ok := dir.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return ""
	}
	defer locks.Close()
	// "1: FLOCK  ADVISORY  WRITE 708 fd:01:13894 0 EOF"
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	for lines := bufio.NewScanner(locks); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || fields[1] != "FLOCK" || fields[5] != file {
			continue
		}
		pid := fields[4]
		if name, err := os.ReadFile("/proc/" + pid + "/comm"); err == nil {
			return fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(name)))
		}
		return "process " + pid
	}
	return ""
}

// keepAside is how many files that were set aside are kept for inspection. More
// of them would fill the disk when the damage comes from the disk itself.
const keepAside = 2

func asideName(now time.Time) string {
	return ".aside-" + now.UTC().Format("20060102T150405.000000Z")
}

// SetAside renames the file at path and what belongs to it, so that sqlite3 can
// still open it under the new name, and returns that name. It keeps the two newest.
func SetAside(path string, now time.Time) (string, error) {
	aside := path + asideName(now)
	if err := os.Rename(path, aside); err != nil {
		return "", err
	}
	for _, suffix := range suffixes[1:] {
		if err := os.Rename(path+suffix, aside+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return aside, pruneAside(path)
}

// pruneAside removes all but the newest of what was set aside.
func pruneAside(path string) error {
	old, err := filepath.Glob(path + ".aside-*Z")
	if err != nil || len(old) <= keepAside {
		return err
	}
	slices.Sort(old)
	for _, o := range old[:len(old)-keepAside] {
		for _, suffix := range suffixes {
			err = errors.Join(err, os.RemoveAll(o+suffix))
		}
	}
	return err
}
