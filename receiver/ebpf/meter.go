package ebpf

import "time"

// DefaultDir is the directory of the pins.
const DefaultDir = "/sys/fs/bpf/unitmeter"

// DefaultMaxEntries is the number of cgroups for which there is room.
const DefaultMaxEntries = 65536

// LoadConfig says what Load loads, and where.
type LoadConfig struct {
	// Dir is the directory of the pins, in a BPF file system. "" is DefaultDir.
	Dir string
	// Root is the cgroup v2 directory that is metered with all below it. "" is the
	// mount point of the hierarchy.
	Root string
	// MaxEntries is the number of cgroups for which there is room; 0 is
	// DefaultMaxEntries. Maps that are pinned already keep their size.
	MaxEntries uint32
}

// Loaded is the outcome of Load.
type Loaded struct {
	// Updated is true when programs that counted already were replaced. No packet
	// was lost.
	Updated bool
	// Naming is nil, or the reason why the kernel cannot name cgroups. They are counted
	// anyway, and a cgroup that is gone before a Read has no name.
	Naming error
	// Cgroups is the number of existing cgroups, Unnamed the number of those without
	// room for a name.
	Cgroups, Unnamed int
	// OtherLayouts are directories of other versions. Their maps count no more, and stay
	// readable until Unload.
	OtherLayouts []string
}

// Config is the configuration of a Reader.
type Config struct {
	// Dir is the directory of the pins for Open. "" is DefaultDir.
	Dir string
	// Root is the cgroup v2 directory that is metered. "" is the mount point of the
	// hierarchy. Open needs it for invocation ids only, and for names where the
	// kernel cannot name.
	Root string
	// MaxEntries is for Attach, as in LoadConfig.
	MaxEntries uint32
	// Quiet is the time without traffic after which the entry of a removed cgroup is
	// deleted. 0 is ten minutes.
	Quiet time.Duration
	// ReadOnly leaves all entries where they are. Of several readers of the same
	// pins, one alone may delete.
	ReadOnly bool
}

// Sweep is one reading of all counters. Its Meters are valid until the next Read.
type Sweep struct {
	// Time is when the reading began.
	Time time.Time
	// BootID, ID and Born together are the epoch of an entry.
	BootID string
	// Since is when counting began: cgroups that are older count since then. Loaded
	// is the same moment in nanoseconds of CLOCK_BOOTTIME. It tells the maps of one
	// loading from those of another in this boot, so it is the epoch of Lost.
	Since  time.Time
	Loaded uint64
	// RootID is the id of the metered root: 1 for the whole host, where its traffic
	// is the kernel's own.
	RootID uint64
	// Naming is true when the kernel names the cgroups. Else those that are gone
	// before a Read have no name.
	Naming bool
	// Meters has one for each cgroup with traffic, in no order.
	Meters []Meter
	// Lost is the traffic that found no room. It only grows.
	Lost Lost
	// Entries is the number of entries in use, of MaxEntries.
	Entries, MaxEntries int
	// Detached is true when the pins were removed or replaced: these maps count no
	// more. Close, and Open again.
	Detached bool
	// Deletion is why an entry could not be deleted, or nil. The Sweep is complete.
	Deletion error
}

// Meter is the counters of one cgroup, without those of cgroups below it.
type Meter struct {
	// Identity is the same pointer in each Sweep, also after the entry was deleted
	// and late traffic has made another one.
	Identity *Identity
	// Born is when the entry was made, in nanoseconds of CLOCK_BOOTTIME. An entry
	// with another Born starts at zero.
	Born           uint64
	Received, Sent Counters
	// Gone is true when the cgroup has been removed or has no name. Sockets that outlive
	// it may still add to the counters.
	Gone bool
	// Deleted is true when this Read deleted the entry: these are its last values.
	Deleted bool
}

// Identity names a cgroup. It does not change.
type Identity struct {
	// ID is the number that the kernel gives to one cgroup in each boot.
	ID uint64
	// Named is false for a cgroup without a known path. It has an ID only.
	Named bool
	// Path is the path below Root, beginning with "/". Beyond 423 bytes it is cut.
	Path string
	// Cgroup is the parsed path.
	Cgroup Cgroup
	// Made is when the cgroup was created, zero if it is older than the loading.
	Made time.Time
	// Invocation is the id of the run of the unit, 32 hexadecimal digits, from the
	// attribute user.invocation_id. "" where it cannot be read: before systemd 252,
	// and when the cgroup was gone at the first Read.
	Invocation string
}

// Counters are the counters of one direction.
type Counters struct {
	// Traffic is all traffic.
	Traffic
	// Loopback is the part of it over the loopback device of a network namespace.
	Loopback Traffic
}

// Traffic is counted at the socket, as systemd does: whole IP packets in bytes.
type Traffic struct {
	Bytes, Packets uint64
	// WireBytes and WirePackets are those after segmentation, without the frames
	// of the link.
	WireBytes, WirePackets uint64
}

// Lost is the traffic and the names that found no room in the maps.
type Lost struct {
	// Received and Sent are the traffic of cgroups without an entry.
	Received, Sent Counters
	// Names is the number of cgroups without a name.
	Names uint64
}
