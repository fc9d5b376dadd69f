//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// layout is the directory of the pins. It is another one as soon as a map, or a
// structure in a map, changes in meter.bpf.c.
const layout = "v1"

// A directory becomes the layout's when all is pinned in it.
const unfinished = layout + "-new"

var layouts = regexp.MustCompile(`^v[0-9]+$`)

// mapModes are the pinned maps: those that the reader deletes from, and the rest.
// A pin gets the group of who makes it.
var mapModes = map[string]fs.FileMode{
	meterMapMeters: 0o660,
	meterMapNames:  0o660,
	meterMapLost:   0o640,
	meterMapInfo:   0o640,
}

const linkMode = 0o600

// lockDir makes the directory of the pins, and waits until no other loader works
// on it.
func lockDir(ctx context.Context, dir string) (unlock func(), err error) {
	if err := requireBPFFS(filepath.Dir(dir)); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, explain(fmt.Errorf("make %s: %w", dir, err))
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, explain(fmt.Errorf("open the pins: %w", err))
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w; another loader works on it", dir, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// requireBPFFS mounts a BPF file system where systemd does it on a host, and not in
// containers.
func requireBPFFS(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return explain(fmt.Errorf("find the BPF file system %s: %w", dir, err))
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	err := ErrNoBPFFS
	if dir == filepath.Dir(DefaultDir) {
		mountErr := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700")
		if mountErr == nil {
			return nil
		}
		err = fmt.Errorf("%w: mount: %w", ErrNoBPFFS, mountErr)
	}
	return fmt.Errorf("%s: %w; as root of the host, run: mount -t bpf -o mode=700 bpf /sys/fs/bpf", dir, err)
}

// otherLayouts returns the directories that other versions have left in dir.
func otherLayouts(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, explain(fmt.Errorf("list the pins: %w", err))
	}
	var others []string
	for _, e := range entries {
		if layouts.MatchString(e.Name()) && e.Name() != layout {
			others = append(others, filepath.Join(dir, e.Name()))
		}
	}
	return others, nil
}

// Pinned reports whether this version's program is pinned in dir, "" being DefaultDir,
// and returns the directories that other versions have left there.
func Pinned(dir string) (current bool, others []string, err error) {
	dir = cmp.Or(dir, DefaultDir)
	if others, err = otherLayouts(dir); errors.Is(err, ErrNotLoaded) {
		return false, nil, nil
	}
	_, statErr := os.Stat(filepath.Join(dir, layout, meterMapMeters))
	return statErr == nil, others, err
}

// openMaps opens the maps that are pinned in dir, without scratch: those of the
// given names to be written to, the others to be read.
func openMaps(dir string, writable ...string) (maps meterMaps, err error) {
	defer func() {
		if err != nil {
			closeMaps(maps)
		}
	}()
	spec, err := loadMeter()
	if err != nil {
		return maps, err
	}
	for name, to := range map[string]**ebpf.Map{
		meterMapMeters: &maps.Meters, meterMapNames: &maps.Names, meterMapLost: &maps.Lost, meterMapInfo: &maps.Info,
	} {
		opts := ebpf.LoadPinOptions{ReadOnly: !slices.Contains(writable, name)}
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), &opts)
		if err != nil {
			return maps, fmt.Errorf("open the map %s: %w", name, err)
		}
		*to = m
		want := spec.Maps[name]
		if m.Type() != want.Type || m.KeySize() != want.KeySize || m.ValueSize() != want.ValueSize {
			return maps, fmt.Errorf("map %s in %s: %w; run: unitmeter meter unload, then load again", name, dir, ErrOtherLayout)
		}
	}
	return maps, nil
}

func closeMaps(maps meterMaps) {
	for _, m := range []*ebpf.Map{maps.Meters, maps.Names, maps.Lost, maps.Info, maps.Scratch} {
		m.Close() // does nothing with nil, and has no error to report otherwise
	}
}

// pinMaps pins the maps in dir.
func pinMaps(maps meterMaps, dir string) error {
	for name, m := range map[string]*ebpf.Map{
		meterMapMeters: maps.Meters, meterMapNames: maps.Names, meterMapLost: maps.Lost, meterMapInfo: maps.Info,
	} {
		path := filepath.Join(dir, name)
		if err := m.Pin(path); err != nil {
			return explain(fmt.Errorf("pin the map %s: %w", name, err))
		}
		if err := os.Chmod(path, mapModes[name]); err != nil {
			return fmt.Errorf("pin the map %s: %w", name, err)
		}
	}
	return nil
}

// pinLink pins a link in dir, in the place of one that may be there. A link that
// is pinned elsewhere moves.
func pinLink(l link.Link, dir, name string) error {
	path := filepath.Join(dir, name)
	fresh := path + "-new"
	os.Remove(fresh) // of a loader that was killed here
	if err := l.Pin(fresh); err != nil {
		return fmt.Errorf("pin the link %s: %w", name, err)
	}
	if err := os.Chmod(fresh, linkMode); err != nil {
		return fmt.Errorf("pin the link %s: %w", name, err)
	}
	if err := os.Rename(fresh, path); err != nil {
		return fmt.Errorf("pin the link %s: %w", name, err)
	}
	return nil
}

// Unload detaches all programs and removes all pins in dir, "" being DefaultDir.
// Counting ends when no other process holds the links. Nothing to remove is no
// error.
func Unload(dir string) error {
	dir = cmp.Or(dir, DefaultDir)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := lockDir(context.Background(), dir)
	if err != nil {
		return fmt.Errorf("unload the meter: %w", err)
	}
	defer unlock()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("unload the meter: %w", err)
	}
	foreign := false
	for _, e := range entries {
		if !layouts.MatchString(e.Name()) && e.Name() != unfinished {
			foreign = true
		} else if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("unload the meter: %w", err)
		}
	}
	if foreign {
		return nil
	}
	if err := os.Remove(dir); err != nil {
		return fmt.Errorf("unload the meter: %w", err)
	}
	return nil
}
