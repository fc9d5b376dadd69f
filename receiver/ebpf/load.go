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
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Load loads the programs, attaches them and pins them with their maps, so that
// they count until Unload or the next boot. It needs CAP_BPF and CAP_NET_ADMIN,
// CAP_PERFMON for names, and write access to Root if that is not the root of the
// hierarchy. Where the meter is loaded already, its programs are replaced in
// place, over the same maps. The pins get the group of the process.
func Load(ctx context.Context, cfg LoadConfig) (Loaded, error) {
	loaded, err := load(ctx, cfg)
	if err != nil {
		return Loaded{}, fmt.Errorf("load the meter: %w", err)
	}
	return loaded, nil
}

func load(ctx context.Context, cfg LoadConfig) (loaded Loaded, err error) {
	dir := cmp.Or(cfg.Dir, DefaultDir)
	root, err := findRoot(cfg.Root)
	if err != nil {
		return loaded, err
	}
	unlock, err := lockDir(ctx, dir)
	if err != nil {
		return loaded, err
	}
	defer unlock()
	if err := os.RemoveAll(filepath.Join(dir, unfinished)); err != nil { // of a loader that was killed
		return loaded, explain(err)
	}
	if loaded.OtherLayouts, err = otherLayouts(dir); err != nil {
		return loaded, err
	}

	c := counter{root: root}
	defer c.close() // what is pinned stays
	pins := filepath.Join(dir, layout)
	c.maps, err = openMaps(pins, meterMapMeters, meterMapNames, meterMapLost, meterMapInfo)
	switch {
	case err == nil:
		loaded.Updated = true
		err = c.update(ctx, pins)
	case errors.Is(err, fs.ErrNotExist):
		err = c.install(ctx, dir, cfg.MaxEntries, loaded.OtherLayouts)
	default:
		err = explain(err)
	}
	loaded.Naming, loaded.Cgroups, loaded.Unnamed = c.naming, c.cgroups, c.unnamed
	return loaded, err
}

// update replaces the programs of pinned links.
func (c *counter) update(ctx context.Context, pins string) error {
	var i meterInfo
	if err := c.maps.Info.Lookup(uint32(0), &i); err != nil {
		return fmt.Errorf("read the root of the loaded meter: %w", err)
	}
	if i.Root != cgroupID(c.root) {
		return fmt.Errorf("the loaded meter counts below the cgroup with id %d, which is not %s: run unitmeter meter unload first", i.Root, c.root)
	}
	if err := c.loadPrograms(0); err != nil {
		return err
	}
	if err := c.startNaming(ctx); err != nil {
		return err
	}
	if err := c.startCounting(pins); err != nil {
		return err
	}
	return c.pinLinks(pins)
}

// install loads a meter where there is none of this layout. The counting links of
// another layout are taken over, so that nothing is counted in neither or in both.
func (c *counter) install(ctx context.Context, dir string, maxEntries uint32, others []string) error {
	if err := c.loadPrograms(maxEntries); err != nil {
		return err
	}
	if err := c.startNaming(ctx); err != nil {
		return err
	}
	fresh := filepath.Join(dir, unfinished)
	if err := os.Mkdir(fresh, 0o750); err != nil {
		return explain(fmt.Errorf("make the directory of the pins: %w", err))
	}
	if err := pinMaps(c.maps, fresh); err != nil {
		return err
	}
	if err := c.startCounting(others...); err != nil {
		return err
	}
	if err := c.pinLinks(fresh); err != nil {
		return err
	}
	for _, other := range others {
		for _, name := range []string{meterProgMade, meterProgRemoved} {
			if err := os.Remove(filepath.Join(other, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("detach the programs of the other layout: %w", err)
			}
		}
	}
	if err := os.Rename(fresh, filepath.Join(dir, layout)); err != nil {
		return fmt.Errorf("name the directory of the pins: %w", err)
	}
	return nil
}

// counter is one copy of the programs with its maps, from loading to attaching.
type counter struct {
	root     string // directory of the cgroup
	maps     meterMaps
	programs meterPrograms
	updated  map[string]link.Link // by program: counting links whose pins stay
	fresh    map[string]link.Link // by program: links to pin
	naming   error                // why cgroups cannot be named
	cgroups  int                  // that the walk has met
	unnamed  int                  // of which names had no room
}

func (c *counter) close() {
	for _, links := range []map[string]link.Link{c.updated, c.fresh} {
		for _, l := range links {
			l.Close()
		}
	}
	for _, p := range []*ebpf.Program{c.programs.Ingress, c.programs.Egress, c.programs.Made, c.programs.Removed} {
		p.Close()
	}
	closeMaps(c.maps)
}

// loadPrograms loads the programs over the maps of c, which it creates if there
// are none. That the naming programs cannot be loaded is no error.
func (c *counter) loadPrograms(maxEntries uint32) error {
	spec, err := loadMeter()
	if err != nil {
		return fmt.Errorf("read the embedded programs: %w", err)
	}
	if c.maps.Meters == nil {
		for _, name := range []string{meterMapMeters, meterMapNames} {
			spec.Maps[name].MaxEntries = cmp.Or(maxEntries, DefaultMaxEntries)
		}
		// Before 5.11 maps count as locked memory. Where this is refused, the limit
		// may be high enough.
		limitErr := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
		if err := spec.LoadAndAssign(&c.maps, nil); err != nil {
			return explainLoad(fmt.Errorf("create the maps: %w", err), limitErr)
		}
	}
	opts := ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		meterMapMeters: c.maps.Meters, meterMapNames: c.maps.Names, meterMapLost: c.maps.Lost, meterMapInfo: c.maps.Info,
	}}
	// A pinned map is as large as its first loader wanted.
	for _, name := range []string{meterMapMeters, meterMapNames} {
		spec.Maps[name].MaxEntries = c.maps.Meters.MaxEntries()
	}
	var counting struct {
		Ingress *ebpf.Program `ebpf:"ingress"`
		Egress  *ebpf.Program `ebpf:"egress"`
	}
	if err := spec.LoadAndAssign(&counting, &opts); err != nil {
		return explainLoad(fmt.Errorf("load the counting programs: %w", err), nil)
	}
	c.programs.Ingress, c.programs.Egress = counting.Ingress, counting.Egress
	var naming struct {
		Made    *ebpf.Program `ebpf:"made"`
		Removed *ebpf.Program `ebpf:"removed"`
	}
	if err := spec.LoadAndAssign(&naming, &opts); err != nil {
		c.naming = explainNaming(err)
		return nil
	}
	c.programs.Made, c.programs.Removed = naming.Made, naming.Removed
	return nil
}

// startNaming attaches the naming programs, and then names what is there. In this
// order no cgroup is missed, and the packets come after.
func (c *counter) startNaming(ctx context.Context) error {
	c.fresh = map[string]link.Link{}
	now, err := bootTime()
	if err != nil {
		return err
	}
	i := meterInfo{Root: cgroupID(c.root), Loaded: now}
	var old meterInfo
	if err := c.maps.Info.Lookup(uint32(0), &old); err == nil && old.Loaded != 0 {
		i.Loaded, i.Level = old.Loaded, old.Level
	} else if err := c.maps.Info.Put(uint32(0), &i); err != nil {
		return fmt.Errorf("set the root: %w", err)
	}
	if c.naming == nil {
		c.naming = c.attachNaming()
	}
	prefix := ""
	if c.naming == nil {
		i.Naming = 1
		if i.Root != 1 { // the root of a hierarchy is always 1
			if prefix, i.Level, err = c.findPrefix(); err != nil {
				return err
			}
		}
	}
	if err := c.maps.Info.Put(uint32(0), &i); err != nil {
		return fmt.Errorf("set the root: %w", err)
	}
	return walkCgroups(ctx, c.root, func(id uint64, path string) error {
		c.cgroups++
		return c.putName(id, prefix+path, filepath.Join(c.root, path))
	})
}

// attachNaming attaches removed first: of a cgroup that comes and goes in between,
// nothing must stay.
func (c *counter) attachNaming() error {
	for _, p := range []struct {
		name    string
		program *ebpf.Program
	}{{meterProgRemoved, c.programs.Removed}, {meterProgMade, c.programs.Made}} {
		l, err := link.AttachTracing(link.TracingOptions{Program: p.program})
		if err != nil {
			return explainNaming(err)
		}
		c.fresh[p.name] = l
	}
	return nil
}

// findPrefix returns the path of c.root in the hierarchy, and its level. Inside of
// a cgroup namespace no file says so; the name of a cgroup below it does.
func (c *counter) findPrefix() (string, int32, error) {
	probe := fmt.Sprintf("/unitmeter-probe-%d", os.Getpid())
	if err := os.Mkdir(c.root+probe, 0o755); err != nil {
		return "", 0, explain(fmt.Errorf("find the path of the cgroup %s: %w", c.root, err))
	}
	var n meterName
	err := c.maps.Names.Lookup(cgroupID(c.root+probe), &n)
	if err := errors.Join(err, os.Remove(c.root+probe)); err != nil {
		return "", 0, fmt.Errorf("find the path of the cgroup %s: %w", c.root, err)
	}
	prefix, ok := strings.CutSuffix(n.path(), probe)
	if !ok {
		return "", 0, fmt.Errorf("find the path of the cgroup %s: %q is too deep; choose one further up", c.root, n.path())
	}
	return prefix, int32(n.Level) - 1, nil
}

// putName names a cgroup that the walk has met, if the kernel has not.
func (c *counter) putName(id uint64, path, dir string) error {
	n := meterName{Level: uint32(strings.Count(strings.TrimSuffix(path, "/"), "/"))}
	n.Size = uint32(copy(n.Path[:len(n.Path)-1], path)) + 1
	err := c.maps.Names.Update(id, &n, ebpf.UpdateNoExist)
	switch {
	case errors.Is(err, ebpf.ErrKeyExist):
		return nil
	case errors.Is(err, unix.E2BIG):
		c.unnamed++
		return nil
	case err != nil:
		return fmt.Errorf("name the cgroup %s: %w", path, err)
	}
	if cgroupID(dir) == id {
		return nil
	}
	// It went away before it had a name, so no event will remove it.
	var e meterEntry
	if err := c.maps.Meters.Lookup(id, &e); errors.Is(err, ebpf.ErrKeyNotExist) {
		c.maps.Names.Delete(id) // may be gone: then all is well
	}
	return nil
}

// startCounting gives the counting links in the first of the directories that has
// any to the programs of c, or else attaches them.
func (c *counter) startCounting(pins ...string) error {
	c.updated = map[string]link.Link{}
	for name, to := range map[string]struct {
		program *ebpf.Program
		attach  ebpf.AttachType
	}{
		meterProgIngress: {c.programs.Ingress, ebpf.AttachCGroupInetIngress},
		meterProgEgress:  {c.programs.Egress, ebpf.AttachCGroupInetEgress},
	} {
		for _, dir := range pins {
			l, err := link.LoadPinnedLink(filepath.Join(dir, name), nil)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return explain(fmt.Errorf("open the link %s: %w", name, err))
			}
			if err := l.Update(to.program); err != nil {
				l.Close()
				return explain(fmt.Errorf("replace the program %s: %w", name, err))
			}
			if filepath.Base(dir) == layout {
				c.updated[name] = l
			} else { // its pin moves to this layout
				c.fresh[name] = l
			}
			break
		}
		if c.updated[name] != nil || c.fresh[name] != nil {
			continue
		}
		l, err := link.AttachCgroup(link.CgroupOptions{Path: c.root, Attach: to.attach, Program: to.program})
		if err != nil {
			return explainAttach(fmt.Errorf("attach the program %s to %s: %w", name, c.root, err), c.root, to.attach)
		}
		c.fresh[name] = l
	}
	return nil
}

func (c *counter) pinLinks(dir string) error {
	for name, l := range c.fresh {
		if err := pinLink(l, dir, name); err != nil {
			return err
		}
	}
	return nil
}

func (n *meterName) path() string {
	if n.Size == 0 || int(n.Size) > len(n.Path) {
		return ""
	}
	return string(n.Path[:n.Size-1])
}

// bootTime returns CLOCK_BOOTTIME in nanoseconds.
func bootTime() (uint64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("read the boot clock: %w", err)
	}
	return uint64(ts.Nano()), nil
}
