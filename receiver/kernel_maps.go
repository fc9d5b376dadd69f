package receiver

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxPrograms is how many programs on one direction of a cgroup are looked at.
// systemd attaches one for accounting; the kernel allows 64. A unit with more is
// read over D-Bus.
const maxPrograms = 16

// programs are the ids of the programs attached to a cgroup itself, for ingress
// and egress, in the order in which they run.
type programs struct {
	ids [2][maxPrograms]uint32
	n   [2]uint32
}

// in returns the programs of one direction.
func (p *programs) in(direction int) []uint32 { return p.ids[direction][:p.n[direction]] }

// bpfCalls makes bpf(2) calls that only look: it loads, attaches and changes
// nothing. The kernel reads and writes its fields, so it must be on the heap,
// where nothing moves, and have one user at a time. There is no allocation per
// call; cilium/ebpf has about sixteen for each unit and sweep.
type bpfCalls struct {
	attr [128]byte // union bpf_attr; recent kernels write up to byte 64
	info [80]byte  // struct bpf_prog_info up to name, or bpf_map_info
	ids  [maxPrograms]uint32
	maps [8]uint32
	key  uint32
	// value is of a map whose values are known to have eight bytes.
	value uint64
	id    [64]byte // of an invocation
}

// newCalls is not inlined, or the compiler would leave the result on the stack of
// a caller that keeps it to itself, and stacks move.
//
//go:noinline
func newCalls() *bpfCalls { return &bpfCalls{} }

func (c *bpfCalls) u32(at int, v uint32) { binary.NativeEndian.PutUint32(c.attr[at:], v) }
func (c *bpfCalls) u64(at int, p unsafe.Pointer) {
	binary.NativeEndian.PutUint64(c.attr[at:], uint64(uintptr(p)))
}

// call makes one call with what is in attr, up to size.
func (c *bpfCalls) call(command, size uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(&c.attr)), size)
	runtime.KeepAlive(c)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// attached returns the programs on the cgroup that dir is open on. It fails
// with ENOENT when the cgroup has been removed, also if another one has its
// name by now, and with ENOSPC if there are too many.
func (c *bpfCalls) attached(dir int) (p programs, err error) {
	for i := range p.n { // BPF_CGROUP_INET_INGRESS, BPF_CGROUP_INET_EGRESS
		if err = c.attachedTo(dir, i, &p); err != nil {
			return programs{}, err
		}
	}
	return p, nil
}

// attachedTo is attached for one direction.
func (c *bpfCalls) attachedTo(dir, direction int, p *programs) error {
	clear(c.attr[:])
	c.u32(0, uint32(dir))       // target_fd
	c.u32(4, uint32(direction)) // attach_type
	c.u64(16, unsafe.Pointer(&c.ids))
	c.u32(24, maxPrograms) // prog_cnt
	if _, err := c.call(unix.BPF_PROG_QUERY, 32); err != nil {
		return err
	}
	p.n[direction] = binary.NativeEndian.Uint32(c.attr[24:])
	p.ids[direction] = [maxPrograms]uint32{}
	copy(p.in(direction), c.ids[:])
	return nil
}

// byID opens a program (BPF_PROG_GET_FD_BY_ID) or a map (BPF_MAP_GET_FD_BY_ID).
func (c *bpfCalls) byID(command uintptr, id, flags uint32) (int, error) {
	clear(c.attr[:])
	c.u32(0, id)
	c.u32(8, flags)
	return c.call(command, 12)
}

// describe fills in info on an open program or map.
func (c *bpfCalls) describe(fd int, size uint32) error {
	clear(c.attr[:])
	c.u32(0, uint32(fd))
	c.u32(4, size)
	c.u64(8, unsafe.Pointer(&c.info))
	_, err := c.call(unix.BPF_OBJ_GET_INFO_BY_FD, 16)
	return err
}

// mapsOf returns the maps of a program if it can be systemd's, whose programs
// have no name in older versions.
func (c *bpfCalls) mapsOf(program uint32) (ids [8]uint32, n uint32) {
	fd, err := c.byID(unix.BPF_PROG_GET_FD_BY_ID, program, 0)
	if err != nil {
		return ids, 0 // detached this moment
	}
	defer unix.Close(fd)
	clear(c.info[:])
	binary.NativeEndian.PutUint32(c.info[52:], uint32(len(c.maps))) // nr_map_ids
	binary.NativeEndian.PutUint64(c.info[56:], uint64(uintptr(unsafe.Pointer(&c.maps))))
	if c.describe(fd, 80) != nil || binary.NativeEndian.Uint32(c.info[:]) != unix.BPF_PROG_TYPE_CGROUP_SKB {
		return ids, 0
	}
	if name := c.info[64:80]; name[0] != 0 && !strings.HasPrefix(string(name), "sd_fw_") {
		return ids, 0
	}
	return c.maps, min(binary.NativeEndian.Uint32(c.info[52:]), uint32(len(c.maps)))
}

// openCounter opens a map if it is one in which systemd counts (bpf-firewall.c):
// an array of two numbers, first packets, then bytes.
func (c *bpfCalls) openCounter(id uint32) (fd int, ok bool) {
	fd, err := c.byID(unix.BPF_MAP_GET_FD_BY_ID, id, unix.BPF_F_RDONLY)
	if err != nil {
		return -1, false // replaced this moment
	}
	clear(c.info[:])
	field := func(i int) uint32 { return binary.NativeEndian.Uint32(c.info[4*i:]) } // type, id, key, value, entries
	if c.describe(fd, 80) != nil || field(0) != unix.BPF_MAP_TYPE_ARRAY || field(2) != 4 || field(3) != 8 || field(4) != 2 {
		_ = unix.Close(fd)
		return -1, false
	}
	return fd, true
}

// counterMaps are the two maps in which systemd's programs on one cgroup count,
// for ingress and egress. systemd makes new ones for a unit after a reload; up
// to version 255 it sets the old ones to zero for the unit's next run. The zero
// value is none.
type counterMaps struct {
	ids [2]uint32
	fds [2]int
}

// openMaps opens the maps of systemd's programs among p; ok is false where a
// direction is not counted. While systemd replaces a program both may be
// attached: the last is the newer, and several says so.
func (c *bpfCalls) openMaps(p *programs) (m counterMaps, several, ok bool) {
	for direction := range m.fds {
		several = c.openMap(&m, p, direction) || several
	}
	if m.ids[0] == 0 || m.ids[1] == 0 {
		m.close()
		return counterMaps{}, several, false
	}
	return m, several, true
}

// openMap is openMaps for one direction.
func (c *bpfCalls) openMap(m *counterMaps, p *programs, direction int) (several bool) {
	for _, program := range p.in(direction) {
		ids, n := c.mapsOf(program)
		for _, id := range ids[:n] {
			fd, ok := c.openCounter(id)
			switch {
			case !ok:
			case id == m.ids[direction]:
				_ = unix.Close(fd)
			default:
				if m.ids[direction] != 0 {
					several = true
					_ = unix.Close(m.fds[direction])
				}
				m.ids[direction], m.fds[direction] = id, fd
			}
		}
	}
	return several
}

// read returns the present values. The program counts a packet before its
// bytes, so packets are read first: bytes that are on the way then move past a
// packet count that was read, and not the other way round.
func (c *bpfCalls) read(m counterMaps) (v Counters, err error) {
	for _, direction := range [2]int{0, 1} {
		packets, bytes, err := c.readOne(m, direction)
		if err != nil {
			return Counters{}, err
		}
		v.set(direction, packets, bytes)
	}
	if !v.valid() {
		return Counters{}, fmt.Errorf("read the counters in BPF maps %v: impossible values %+v", m.ids, v)
	}
	return v, nil
}

// still reports whether the packet counters have the values of v.
func (c *bpfCalls) still(m counterMaps, v Counters) bool {
	clear(c.attr[:])
	c.u64(8, unsafe.Pointer(&c.key))
	c.u64(16, unsafe.Pointer(&c.value))
	c.key = 0
	for direction, want := range [2]uint64{v.IngressPackets, v.EgressPackets} {
		c.u32(0, uint32(m.fds[direction]))
		if _, err := c.call(unix.BPF_MAP_LOOKUP_ELEM, 32); err != nil || c.value != want {
			return false
		}
	}
	return true
}

// programsAfter yields the ids of the programs above the given one, which are those
// that were loaded after it, in that order.
func (c *bpfCalls) programsAfter(id uint32) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for {
			clear(c.attr[:])
			c.u32(0, id)
			if _, err := c.call(unix.BPF_PROG_GET_NEXT_ID, 12); err != nil {
				return
			}
			if id = binary.NativeEndian.Uint32(c.attr[4:]); !yield(id) {
				return
			}
		}
	}
}

// readOne returns the values of one direction.
func (c *bpfCalls) readOne(m counterMaps, direction int) (packets, bytes uint64, err error) {
	clear(c.attr[:])
	c.u32(0, uint32(m.fds[direction]))
	c.u64(8, unsafe.Pointer(&c.key))
	c.u64(16, unsafe.Pointer(&c.value))
	for c.key = range uint32(2) {
		if _, err := c.call(unix.BPF_MAP_LOOKUP_ELEM, 32); err != nil {
			return 0, 0, fmt.Errorf("read the counters in BPF map %d: %w", m.ids[direction], err)
		}
		if c.key == 0 {
			packets = c.value
		}
	}
	return packets, c.value, nil
}

// onlyIn returns what old maps have counted and those that have replaced them have
// not, at least. They have in common only what the new ones have by then. It is all
// of it while both are attached, or if the new ones have counted nothing.
func (c *bpfCalls) onlyIn(old, next counterMaps) Counters {
	var all, both Counters
	for direction := range old.ids {
		packets, bytes, err := c.readOne(old, direction)
		if err != nil {
			return Counters{}
		}
		all.set(direction, packets, bytes)
	}
	passPrograms(time.Now())
	for direction := range next.ids {
		packets, bytes, err := c.readOne(next, direction)
		if err != nil {
			return Counters{}
		}
		both.set(direction, packets, bytes)
	}
	return all.less(both)
}

// passPrograms waits until a packet that one program on a cgroup has counted by then
// has been counted by the next one too. A sleep would take ten times as long.
func passPrograms(then time.Time) {
	for time.Since(then) < betweenPrograms {
	}
}

// set puts both values of one direction: 0 is ingress, 1 egress.
func (v *Counters) set(direction int, packets, bytes uint64) {
	if direction == 0 {
		v.IngressPackets, v.IngressBytes = packets, bytes
	} else {
		v.EgressPackets, v.EgressBytes = packets, bytes
	}
}

// switching reports whether systemd is about to replace maps by next, the last of those
// that openMaps has found.
func switching(maps, next counterMaps, attached *programs, several, ok bool) bool {
	return several || next.ids != maps.ids && next.shares(maps) || !ok && attached.n[0] != attached.n[1]
}

func (m counterMaps) shares(n counterMaps) bool {
	return m.ids[0] != 0 && m.ids[0] == n.ids[0] || m.ids[1] != 0 && m.ids[1] == n.ids[1]
}

// dup returns the same maps behind descriptors of their own.
func (m counterMaps) dup() (counterMaps, error) {
	for i, fd := range m.fds {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			if i == 1 {
				_ = unix.Close(m.fds[0])
			}
			return counterMaps{}, err
		}
		m.fds[i] = dup
	}
	return m, nil
}

// close gives up the maps, and makes them none.
func (m *counterMaps) close() {
	for i, id := range m.ids {
		if id != 0 {
			_ = unix.Close(m.fds[i]) // it was open for reading only
		}
	}
	*m = counterMaps{}
}

// mayReadMaps reports why this process cannot open BPF maps of others.
func mayReadMaps() error {
	c := newCalls()
	_, err := c.call(unix.BPF_MAP_GET_NEXT_ID, 12)
	switch {
	case err == nil || errors.Is(err, unix.ENOENT): // there is none
		return nil
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("read counters from the kernel: %w; the capability CAP_SYS_ADMIN of the host is missing: install examples/unitmeter-kernel.conf as a drop-in of unitmeter.service (see docs/install.md), or set UNITMETER_SOURCE=dbus", err)
	}
	return fmt.Errorf("read counters from the kernel: %w; the kernel needs CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF; set UNITMETER_SOURCE=dbus", err)
}

// findCgroups returns the directory of systemd's cgroups: the mount of the
// unified hierarchy, as /proc/self/mountinfo has it, and in it PID 1's root.
func findCgroups() (string, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find the cgroup hierarchy: %w; unitmeter runs on Linux with /proc mounted", err)
	}
	defer file.Close()
	mount, err := cgroupMount(file)
	if err != nil {
		return "", err
	}
	// Within a container that sees the host's cgroups, systemd's root is below.
	if text, err := os.ReadFile("/proc/1/cgroup"); err == nil {
		for line := range strings.Lines(string(text)) {
			if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
				root, ok := strings.CutSuffix(path, "/init.scope")
				if _, err := os.Stat(filepath.Join(mount, root)); ok && err == nil {
					return filepath.Join(mount, root), nil
				}
			}
		}
	}
	return mount, nil
}

// cgroupMount returns the mount point of the cgroup2 file system in a
// mountinfo (proc_pid_mountinfo(5)), the conventional ones before others.
func cgroupMount(mountinfo io.Reader) (string, error) {
	var found []string
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		mount, kind, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(mount)
		if ok && len(fields) > 4 && strings.HasPrefix(kind, "cgroup2 ") {
			found = append(found, strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(fields[4]))
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("find the cgroup hierarchy: %w", err)
	}
	for _, usual := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if slices.Contains(found, usual) {
			return usual, nil
		}
	}
	if len(found) == 0 {
		return "", errors.New("find the cgroup hierarchy: no cgroup2 file system is mounted; boot with systemd.unified_cgroup_hierarchy=1, or set UNITMETER_SOURCE=dbus")
	}
	return found[0], nil
}

// unitOfCgroup returns the unit whose cgroup has this name, "" for none.
// systemd puts a "_" before names that could be taken for a file of the kernel
// (cg_escape).
func unitOfCgroup(name string) string {
	name = strings.TrimPrefix(name, "_")
	if !validUnitName(name) || CounterInterface(typeOf(name)) == "" {
		return ""
	}
	return name
}

// sliceOfCgroup returns the slice that a cgroup is in.
func sliceOfCgroup(path string) string {
	if name := unitOfCgroup(filepath.Base(filepath.Dir(path))); name != "" && typeOf(name) == "slice" {
		return name
	}
	return "-.slice"
}

// cgroupOfSlice returns the path of a slice below the root: a-b.slice is
// /a.slice/a-b.slice.
func cgroupOfSlice(slice string) string {
	stem := strings.TrimSuffix(slice, ".slice")
	if stem == "-" {
		return "/"
	}
	path := "/"
	for i, c := range stem + "-" {
		if c == '-' {
			path = filepath.Join(path, stem[:i]+".slice")
		}
	}
	return path
}

// invocation returns the invocation id that a symbolic link in units names, or
// else the one on the cgroup; empty if neither does. It is valid until the next
// call. link is "invocation:NAME" with a zero byte.
func (c *bpfCalls) invocation(units int, link []byte, dir int) []byte {
	n, _, errno := unix.Syscall6(unix.SYS_READLINKAT, uintptr(units), uintptr(unsafe.Pointer(&link[0])),
		uintptr(unsafe.Pointer(&c.id)), uintptr(len(c.id)), 0, 0)
	if errno == 0 {
		return c.id[:n]
	}
	return c.invocationOf(dir)
}

// invocationOf returns the invocation id that systemd has put on a new cgroup;
// empty for none. On one that outlives a run, it is that of the first.
func (c *bpfCalls) invocationOf(dir int) []byte {
	for _, name := range [...]string{"trusted.invocation_id\x00", "user.invocation_id\x00"} {
		n, _, errno := unix.Syscall6(unix.SYS_FGETXATTR, uintptr(dir), uintptr(unsafe.Pointer(unsafe.StringData(name))),
			uintptr(unsafe.Pointer(&c.id)), uintptr(len(c.id)), 0, 0)
		if errno == 0 && n == 32 {
			return c.id[:n]
		}
	}
	return nil
}

func openCgroup(path string) (int, error) {
	return unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}
