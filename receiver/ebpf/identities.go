//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

const (
	// keepDeleted is how long late traffic of a deleted entry keeps its identity,
	// and maxDeleted bounds the memory for that.
	keepDeleted = uint64(time.Hour)
	maxDeleted  = 16384
	// pruneEvery is how often the identities of deleted entries are looked through.
	pruneEvery = uint64(time.Minute)
)

// identities are those of the entries in the map, and for a while those of
// deleted entries.
type identities struct {
	known   map[uint64]*record
	deleted map[uint64]deletedIdentity
	pruned  uint64
}

// record is what the Reader remembers of an entry. Times are of CLOCK_BOOTTIME.
type record struct {
	identity *Identity
	late     bool // an entry was deleted before
	born     uint64
	packets  uint64
	changed  uint64 // when a reading saw the last packet
	quiet    int    // readings since then
	seen     uint64 // the last reading
}

type deletedIdentity struct {
	identity *Identity
	at       uint64
}

// see takes note of an entry in a reading at now.
func (rec *record) see(m *Meter, now uint64) {
	packets := m.Received.Packets + m.Sent.Packets
	if rec.seen == 0 || packets != rec.packets || m.Born != rec.born {
		rec.born, rec.packets, rec.changed, rec.quiet = m.Born, packets, now, -1
	}
	rec.quiet++
	rec.seen = now
}

// forget moves the identity of an entry to the deleted ones.
func (ids *identities) forget(id uint64, now uint64) {
	if rec := ids.known[id]; rec != nil {
		delete(ids.known, id)
		ids.deleted[id] = deletedIdentity{rec.identity, now}
	}
}

// expire ends the time of deleted entries. entries is the number of entries in the
// map; someone else may have deleted from it.
func (ids *identities) expire(entries int, now uint64) {
	if len(ids.known) > entries {
		for id, rec := range ids.known {
			if rec.seen != now {
				ids.forget(id, now)
			}
		}
	}
	if now-ids.pruned >= pruneEvery {
		ids.pruned = now
		for id, d := range ids.deleted {
			if now-d.at >= keepDeleted {
				delete(ids.deleted, id)
			}
		}
	}
	for id := range ids.deleted {
		if len(ids.deleted) <= maxDeleted {
			break
		}
		delete(ids.deleted, id)
	}
}

// deleter deletes entries of removed cgroups.
type deleter struct {
	quiet      uint64 // nanoseconds without traffic
	off        bool
	candidates []int // indexes in Reader.meters, kept for their memory
}

// run deletes what has been quiet, and puts the last values into r.meters.
func (d *deleter) run(r *Reader, now uint64) (deleted int, err error) {
	if d.off {
		return 0, nil
	}
	spare := len(r.meters) - int(r.maps.Meters.MaxEntries())/4*3 // to delete early
	d.candidates = d.candidates[:0]
	for i := range r.meters {
		if !r.meters[i].Gone {
			continue
		}
		rec := r.identities.known[r.meters[i].Identity.ID]
		if rec.quiet > 0 && now-rec.changed >= d.quiet || spare > 0 && rec.quiet >= 2 {
			d.candidates = append(d.candidates, i)
		}
	}
	changed := func(i int) uint64 { return r.identities.known[r.meters[i].Identity.ID].changed }
	if spare > 0 {
		slices.SortFunc(d.candidates, func(a, b int) int { return cmp.Compare(changed(a), changed(b)) })
	}
	for _, i := range d.candidates {
		if now-changed(i) < d.quiet && deleted >= spare {
			break
		}
		if err := r.delete(&r.meters[i], now); err != nil {
			return deleted, err
		}
		deleted++
	}
	return deleted, nil
}

// delete takes an entry out of the map, with all that it has counted until then.
func (r *Reader) delete(m *Meter, now uint64) error {
	id := m.Identity.ID
	var e meterEntry
	err := r.maps.Meters.LookupAndDelete(id, &e)
	if errors.Is(err, ebpf.ErrNotSupported) { // before 5.14
		if err = r.maps.Meters.Lookup(id, &e); err == nil {
			err = r.maps.Meters.Delete(id)
		}
	}
	switch {
	case err == nil:
		m.Born, m.Received, m.Sent = e.Born, countersOf(&e.Counts[received]), countersOf(&e.Counts[sent])
	case !errors.Is(err, ebpf.ErrKeyNotExist): // else another reader was first
		return explain(fmt.Errorf("delete the entry of cgroup %d: %w; open the meter with ReadOnly", id, err))
	}
	m.Deleted = true
	r.identities.forget(id, now)
	if err := r.maps.Names.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return explain(fmt.Errorf("delete the name of cgroup %d: %w", id, err))
	}
	return nil
}
