package receiver

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// programs are the ids of the programs on a cgroup: those on its ingress, and
// those on its egress.
type programs [2][]ebpf.ProgramID

// attachedTo returns the programs on the cgroup that dir is open on. It fails
// with ENOENT when the cgroup has been removed, also if another one has its
// name by now.
func attachedTo(dir int) (p programs, err error) {
	for i, attach := range []ebpf.AttachType{ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress} {
		found, err := link.QueryPrograms(link.QueryOptions{Target: dir, Attach: attach})
		if err != nil {
			return programs{}, err
		}
		for _, program := range found.Programs {
			p[i] = append(p[i], program.ID)
		}
	}
	return p, nil
}

func (p programs) equal(q programs) bool {
	return slices.Equal(p[0], q[0]) && slices.Equal(p[1], q[1])
}

// counterMaps are the two maps in which systemd's programs on one cgroup count,
// for ingress and egress. systemd makes new ones for a unit after a reload; up
// to version 255 it sets the old ones to zero for the unit's next run.
type counterMaps struct {
	ids  [2]ebpf.MapID
	held [2]*ebpf.Map
	// taken is the part of the maps' values that is on an odometer already.
	taken Counters
	// replaced is when systemd began to count in others.
	replaced time.Time
}

// openMaps opens the maps of systemd's programs among p. It returns nil where
// a direction is not counted.
func openMaps(p programs) *counterMaps {
	m := &counterMaps{}
	for i := range p {
		if m.held[i], m.ids[i] = openMap(p[i]); m.held[i] == nil {
			m.close()
			return nil
		}
	}
	return m
}

// openMap opens the map in which systemd's program counts (bpf-firewall.c): an
// array of two numbers, first packets, then bytes. While systemd replaces a
// program both are attached; the newer map has the larger id.
func openMap(ids []ebpf.ProgramID) (newest *ebpf.Map, newestID ebpf.MapID) {
	for _, id := range ids {
		for _, id := range mapsOf(id) {
			m, err := ebpf.NewMapFromID(id)
			if err != nil {
				continue // replaced this moment
			}
			if m.Type() == ebpf.Array && m.KeySize() == 4 && m.ValueSize() == 8 && m.MaxEntries() == 2 && id > newestID {
				m, newest, newestID = newest, m, id
			}
			if m != nil {
				_ = m.Close()
			}
		}
	}
	return newest, newestID
}

// mapsOf returns the maps of a program if it can be systemd's, whose programs
// have no name in older versions.
func mapsOf(id ebpf.ProgramID) []ebpf.MapID {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil // detached this moment
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil || info.Type != ebpf.CGroupSKB || info.Name != "" && !strings.HasPrefix(info.Name, "sd_fw_") {
		return nil
	}
	ids, _ := info.MapIDs()
	return ids
}

// read returns the present values. The program counts a packet before its
// bytes, so packets are read first.
func (m *counterMaps) read() (c Counters, err error) {
	for _, field := range []struct {
		m   *ebpf.Map
		key uint32
		to  *uint64
	}{
		{m.held[0], 0, &c.IngressPackets}, {m.held[1], 0, &c.EgressPackets},
		{m.held[0], 1, &c.IngressBytes}, {m.held[1], 1, &c.EgressBytes},
	} {
		if err := field.m.Lookup(&field.key, field.to); err != nil {
			return Counters{}, fmt.Errorf("read the counters in BPF map %v: %w", m.ids, err)
		}
	}
	if !c.valid() {
		return Counters{}, fmt.Errorf("read the counters in BPF map %v: impossible values %+v", m.ids, c)
	}
	return c, nil
}

func (m *counterMaps) shares(n *counterMaps) bool {
	return m.ids[0] == n.ids[0] || m.ids[1] == n.ids[1]
}

func (m *counterMaps) close() {
	for _, held := range m.held {
		if held != nil {
			_ = held.Close() // it was open for reading only
		}
	}
}

// mayReadMaps reports why this process cannot open BPF maps of others.
func mayReadMaps() error {
	_, err := ebpf.MapGetNextID(0)
	switch {
	case err == nil || errors.Is(err, os.ErrNotExist): // ErrNotExist: there is none
		return nil
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("read counters from the kernel: %w; the capability CAP_SYS_ADMIN of the host is missing: install packaging/examples/unitmeter-kernel.conf as a drop-in of the unit, or set UNITMETER_SOURCE=dbus", err)
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
	if !validUnitName(name) || counterInterface(typeOf(name)) == "" {
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
