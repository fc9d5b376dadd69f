//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
)

const (
	defaultQuiet = 10 * time.Minute
	// batchSize is the number of entries in one system call. A batch has to hold the
	// longest chain of a hash bucket.
	batchSize = 4096
	// namesSize is the same for names, of which one takes half a kilobyte.
	namesSize = 512
)

// Reader reads the counters. It is not for several goroutines at once.
type Reader struct {
	maps       meterMaps
	attached   *counter // with Attach, owner of the maps
	root       string
	info       meterInfo
	prefix     string // of the paths in names
	bootID     string
	since      time.Time
	pin        pin
	identities identities
	deleter    deleter
	keys       []uint64
	entries    []meterEntry
	meters     []Meter
}

// pin is the pin of the meters that were opened. With Attach there is none.
type pin struct {
	path  string
	inode uint64
}

func (p pin) gone() bool { return p.path != "" && inode(p.path) != p.inode }

// Open opens the pinned maps. From Linux 5.19 on it needs no capability, but read
// and write access to the pins, or read access for ReadOnly.
func Open(cfg Config) (*Reader, error) {
	pins := filepath.Join(cmp.Or(cfg.Dir, DefaultDir), layout)
	var writable []string
	if !cfg.ReadOnly {
		writable = []string{meterMapMeters, meterMapNames}
	}
	maps, err := openMaps(pins, writable...)
	if err != nil {
		err = explain(err)
		others, _ := otherLayouts(filepath.Dir(pins)) // a better reason only
		if errors.Is(err, ErrNotLoaded) && len(others) > 0 {
			err = fmt.Errorf("%w: %s; run: unitmeter meter load", ErrOtherLayout, strings.Join(others, ", "))
		}
		return nil, fmt.Errorf("open the meter: %w", err)
	}
	path := filepath.Join(pins, meterMapMeters)
	r := &Reader{maps: maps, pin: pin{path, inode(path)}}
	if err := r.prepare(cfg); err != nil {
		closeMaps(maps)
		return nil, fmt.Errorf("open the meter: %w", err)
	}
	return r, nil
}

// Attach loads and attaches the programs for this Reader alone. They end with
// Close or with the process, however that ends. It needs what Load needs.
func Attach(ctx context.Context, cfg Config) (*Reader, error) {
	root, err := findRoot(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("attach the meter: %w", err)
	}
	c := &counter{root: root}
	if err = c.loadPrograms(cfg.MaxEntries); err == nil {
		if err = c.startNaming(ctx); err == nil {
			err = c.startCounting()
		}
	}
	if err != nil {
		c.close()
		return nil, fmt.Errorf("attach the meter: %w", err)
	}
	r := &Reader{maps: c.maps, attached: c}
	if err := r.prepare(cfg); err != nil {
		c.close()
		return nil, fmt.Errorf("attach the meter: %w", err)
	}
	return r, nil
}

func (r *Reader) prepare(cfg Config) error {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("read the id of the boot: %w", err)
	}
	if err := r.maps.Info.Lookup(uint32(0), &r.info); err != nil {
		return explain(fmt.Errorf("read the root of the meter: %w", err))
	}
	now, err := bootTime()
	if err != nil {
		return err
	}
	r.since = time.Now().Round(0).Add(time.Duration(r.info.Loaded) - time.Duration(now))
	if r.root, err = findRoot(cfg.Root); err != nil && (cfg.Root != "" || r.info.Naming == 0) {
		return err
	}
	if r.info.Root != 1 {
		var n meterName
		if err := r.maps.Names.Lookup(r.info.Root, &n); err == nil {
			r.prefix = strings.TrimSuffix(n.path(), "/")
		}
	}
	size := min(batchSize, int(r.maps.Meters.MaxEntries()))
	r.keys, r.entries = make([]uint64, size), make([]meterEntry, size)
	r.bootID = strings.TrimSpace(string(id))
	r.identities = identities{known: map[uint64]*record{}, deleted: map[uint64]deletedIdentity{}}
	r.deleter = deleter{quiet: uint64(cmp.Or(cfg.Quiet, defaultQuiet)), off: cfg.ReadOnly}
	return nil
}

// Naming returns why the kernel cannot name the cgroups for a Reader from Attach,
// or nil.
func (r *Reader) Naming() error {
	if r.attached == nil {
		return nil
	}
	return r.attached.naming
}

// Close ends the reading, and with Attach the counting.
func (r *Reader) Close() error {
	if r.attached != nil {
		r.attached.close()
		return nil
	}
	closeMaps(r.maps)
	return nil
}

// Read reads all counters, and deletes entries of removed cgroups that were quiet
// long enough. With three quarters of the entries in use it deletes earlier, those
// that were quiet for two readings. An error means that there is no Sweep.
func (r *Reader) Read() (Sweep, error) {
	sweep, err := r.read()
	if err != nil {
		return Sweep{}, fmt.Errorf("read the meter: %w", err)
	}
	return sweep, nil
}

func (r *Reader) read() (Sweep, error) {
	clock := time.Now().Round(0) // the wall clock alone
	now, err := bootTime()
	if err != nil {
		return Sweep{}, err
	}
	var paths map[uint64]string
	if r.info.Naming == 0 {
		if paths, err = r.walk(); err != nil {
			return Sweep{}, err
		}
	}
	booted := clock.Add(-time.Duration(now))
	r.meters = r.meters[:0]
	var cursor ebpf.MapBatchCursor
	for more := true; more; {
		n, err := r.maps.Meters.BatchLookup(&cursor, r.keys, r.entries, nil)
		more = !errors.Is(err, ebpf.ErrKeyNotExist) // the normal end, with the last entries
		if err != nil && more {
			return Sweep{}, explain(fmt.Errorf("look the counters up: %w", err))
		}
		for i, id := range r.keys[:n] {
			rec := r.identities.known[id]
			if rec == nil {
				rec = r.identify(id, &r.entries[i], paths, booted)
			}
			r.meters = append(r.meters, r.meter(rec, &r.entries[i], paths, now))
		}
	}
	var l meterLost
	if err := r.maps.Lost.Lookup(uint32(0), &l); err != nil {
		return Sweep{}, explain(fmt.Errorf("look up what was lost: %w", err))
	}
	// From here on nothing may fail: what is deleted exists in the Sweep alone.
	deleted, deletion := r.deleter.run(r, now)
	r.identities.expire(len(r.meters)-deleted, now)
	return Sweep{
		Time: clock, BootID: r.bootID, Since: r.since, Loaded: r.info.Loaded, RootID: r.info.Root, Naming: r.info.Naming != 0,
		Meters:  r.meters,
		Lost:    Lost{Received: countersOf(&l.Counts[received]), Sent: countersOf(&l.Counts[sent]), Names: l.Names},
		Entries: len(r.meters) - deleted, MaxEntries: int(r.maps.Meters.MaxEntries()),
		Detached: r.pin.gone(), Deletion: deletion,
	}, nil
}

// Idle calls f for each cgroup that exists and had no traffic until the last Read.
func (r *Reader) Idle(f func(*Identity)) error {
	now, err := bootTime()
	if err == nil {
		err = r.idle(f, time.Now().Round(0).Add(-time.Duration(now)))
	}
	if err != nil {
		return fmt.Errorf("list the cgroups of the meter: %w", err)
	}
	return nil
}

func (r *Reader) idle(f func(*Identity), booted time.Time) error {
	if r.info.Naming == 0 {
		return walkCgroups(context.Background(), r.root, func(id uint64, path string) error {
			if r.identities.known[id] == nil {
				f(&Identity{ID: id, Named: true, Path: path, Cgroup: ParseCgroup(path)})
			}
			return nil
		})
	}
	size := min(namesSize, int(r.maps.Names.MaxEntries()))
	keys, names := make([]uint64, size), make([]meterName, size)
	var cursor ebpf.MapBatchCursor
	for more := true; more; {
		n, err := r.maps.Names.BatchLookup(&cursor, keys, names, nil)
		more = !errors.Is(err, ebpf.ErrKeyNotExist) // the normal end, with the last names
		if err != nil && more {
			return explain(fmt.Errorf("look the names up: %w", err))
		}
		for i, id := range keys[:n] {
			// A name without an entry is deleted with its cgroup. The kernel may have named
			// others before it knew the root.
			path := names[i].path()
			if r.identities.known[id] == nil && (path == r.prefix || strings.HasPrefix(path, r.prefix+"/")) {
				f(r.named(id, &names[i], booted))
			}
		}
	}
	return nil
}

// named is who a cgroup with a name is.
func (r *Reader) named(id uint64, n *meterName, booted time.Time) *Identity {
	path := cmp.Or(strings.TrimPrefix(n.path(), r.prefix), "/")
	identity := &Identity{ID: id, Named: true, Path: path, Cgroup: ParseCgroup(path)}
	if n.Made != 0 {
		identity.Made = booted.Add(time.Duration(n.Made))
	}
	return identity
}

// walk finds the paths of all cgroups, where the kernel does not name them.
func (r *Reader) walk() (map[uint64]string, error) {
	paths := map[uint64]string{}
	err := walkCgroups(context.Background(), r.root, func(id uint64, path string) error {
		paths[id] = path
		return nil
	})
	return paths, err
}

// identify finds out who a cgroup is, at its first sight.
func (r *Reader) identify(id uint64, e *meterEntry, paths map[uint64]string, booted time.Time) *record {
	rec := &record{}
	r.identities.known[id] = rec
	if d, ok := r.identities.deleted[id]; ok { // late traffic
		rec.identity, rec.late = d.identity, true
		delete(r.identities.deleted, id)
		return rec
	}
	identity := &Identity{ID: id}
	var n meterName
	if path, ok := paths[id]; ok {
		identity = &Identity{ID: id, Named: true, Path: path, Cgroup: ParseCgroup(path)}
	} else if r.maps.Names.Lookup(id, &n) == nil && strings.HasPrefix(n.path(), r.prefix) {
		identity = r.named(id, &n, booted)
	}
	if identity.Named && e.Gone == 0 {
		identity.Invocation = invocation(r.root, id, identity.Path, identity.Cgroup)
	}
	rec.identity = identity
	return rec
}

// The indexes of the counters in an entry.
const (
	received, sent  = 0, 1
	other, loopback = 0, 1
)

func (r *Reader) meter(rec *record, e *meterEntry, paths map[uint64]string, now uint64) Meter {
	m := Meter{
		Identity: rec.identity, Born: e.Born, Gone: e.Gone != 0,
		Received: countersOf(&e.Counts[received]), Sent: countersOf(&e.Counts[sent]),
	}
	if rec.late {
		m.Gone = true // whatever the entry says that came between two deletions
	} else if paths != nil {
		m.Gone = paths[rec.identity.ID] == ""
	} else if !rec.identity.Named {
		// Its name went while its first packet came, or there was no room for it. If
		// the cgroup exists, it gets another entry with its next packet.
		m.Gone = true
	}
	rec.see(&m, now)
	return m
}

func countersOf(c *[2]meterCounts) Counters {
	local := trafficOf(&c[loopback])
	all := trafficOf(&c[other])
	all.Bytes += local.Bytes
	all.Packets += local.Packets
	all.WireBytes += local.WireBytes
	all.WirePackets += local.WirePackets
	return Counters{Traffic: all, Loopback: local}
}

func trafficOf(c *meterCounts) Traffic {
	return Traffic{Bytes: c.Bytes, Packets: c.Packets, WireBytes: c.Bytes + c.ExtraBytes, WirePackets: c.Packets + c.ExtraPackets}
}
