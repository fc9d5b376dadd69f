package doctor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

const loadMeter = "systemctl restart " + accounting.MeterUnit + " " + accounting.AgentUnit

// ofSystemd skips a check of what only a systemd that counts needs.
func (d *doctor) ofSystemd(run func(context.Context) finding) func(context.Context) finding {
	return func(ctx context.Context) finding {
		if d.cfg.Receiver.Source == receiver.EBPF {
			return skipped("UNITMETER_SOURCE=ebpf: systemd does not count")
		}
		return run(ctx)
	}
}

// byEBPF reports whether the agent counts by eBPF, or would like to.
func (d *doctor) byEBPF() bool {
	return d.cfg.Receiver.Source == receiver.EBPF || d.cfg.Receiver.Source == receiver.Auto
}

// ofEBPF leaves out a check of what only the eBPF source needs.
func (d *doctor) ofEBPF(run func(context.Context) finding) func(context.Context) finding {
	return func(ctx context.Context) finding {
		if !d.byEBPF() {
			return finding{}
		}
		return run(ctx)
	}
}

// asRoot leaves out a check that needs more than the agent's rights.
func asRoot(run func(context.Context) finding) func(context.Context) finding {
	return func(ctx context.Context) finding {
		if os.Geteuid() != 0 {
			return finding{}
		}
		return run(ctx)
	}
}

// rootChecks are those that the doctor of the agent's user leaves to root's.
func (d *doctor) rootChecks() []check {
	return []check{
		{"ebpf-host", d.ofEBPF(asRoot(d.checkMeterHost))},
		{"ebpf-pins", asRoot(d.checkPins)},
	}
}

// checkMeter reads the eBPF counters as the agent does.
func (d *doctor) checkMeter(context.Context) finding {
	if !d.byEBPF() {
		return skipped("UNITMETER_SOURCE is not ebpf: systemd counts")
	}
	reader, err := receiver.OpenMeter(ebpf.Config{})
	if err != nil {
		_, major, minor, _ := kernelRelease() // 0.0 if nobody knows
		return meterFailure(d.cfg.Receiver.Source, os.Geteuid() == 0, major > 5 || major == 5 && minor >= 19, err)
	}
	sweep, err := reader.Read() // a first one deletes nothing
	if err = errors.Join(err, reader.Close()); err != nil {
		return failure(loadMeter, "%v", err)
	}
	return meterFinding(sweep)
}

// meterFailure says what it means that the counters cannot be read. free says that
// the kernel needs no capability for that.
func meterFailure(source string, root, free bool, err error) finding {
	fix := "unitmeter enable --ebpf, or set UNITMETER_SOURCE=dbus"
	if errors.Is(err, ebpf.ErrPermission) && !free {
		fix = "add AmbientCapabilities=CAP_BPF, CapabilityBoundingSet=CAP_BPF and PrivateUsers=no to a drop-in of " + accounting.AgentUnit + ", as before Linux 5.19 (docs/ebpf.md)"
	}
	if errors.Is(err, ebpf.ErrNoBPFFS) {
		fix = "mount -t bpf -o mode=700 bpf /sys/fs/bpf && " + loadMeter
	}
	switch {
	case source == receiver.Auto:
		return warning(fix, "systemd counts, since the eBPF counters cannot be read: %v", err)
	case root && errors.Is(err, ebpf.ErrNotLoaded):
		return warning("unitmeter meter load", "no eBPF program is loaded: as root the agent attaches one, which counts only while the agent runs")
	}
	return failure(fix, "the eBPF counters cannot be read: %v", err)
}

// meterFinding judges a reading.
func meterFinding(s ebpf.Sweep) finding {
	lost := s.Lost.Received.Bytes + s.Lost.Sent.Bytes
	switch {
	case s.Detached:
		return failure(loadMeter, "the eBPF program was unloaded, and nothing is counted")
	case lost > 0 || s.Lost.Names > 0:
		return warning("unitmeter meter unload && "+loadMeter,
			"the maps were full: %d bytes are unattributed, and %d cgroups have no name", lost, s.Lost.Names)
	case s.Entries > s.MaxEntries/4*3:
		return warning("start the agent, which deletes entries of units that have ended", "%d of %d entries are in use", s.Entries, s.MaxEntries)
	case !s.Naming:
		return warning("see the check ebpf-host, then "+loadMeter, "the kernel does not name cgroups: units that end between two readings are unattributed")
	}
	return good("the eBPF program counts since %s; %d of %d entries are in use", s.Since.Local().Format(time.DateTime), s.Entries, s.MaxEntries)
}

// checkMeterHost attaches a program for a moment: the kernel refuses for many reasons,
// and knows them best.
func (d *doctor) checkMeterHost(ctx context.Context) finding {
	reader, err := ebpf.Attach(ctx, ebpf.Config{})
	if err != nil {
		return attachFailure(d.cfg.Receiver.Source, err)
	}
	naming := reader.Naming()
	_ = reader.Close() // detaches, whatever it returns
	if naming != nil {
		return namingFailure(naming)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	release, major, minor, err2 := kernelRelease()
	if err := errors.Join(err, err2); err != nil {
		return skipped("%v", err)
	}
	if controller := netController(string(mounts)); controller != "" && (major < 5 || major == 5 && minor < 15) {
		return warning("boot a kernel of version 5.15 or later, or with the kernel parameter cgroup_no_v1=net_cls,net_prio",
			"Linux %s with the cgroup v1 controller %s in use counts new sockets as those of the kernel, not of their unit", release, controller)
	}
	return good("Linux %s lets an eBPF program count and name all cgroups", release)
}

// attachFailure says why this host lets no program count.
func attachFailure(source string, err error) finding {
	judged, fix := failure, "boot a kernel of version 5.8 or later with CONFIG_CGROUP_BPF=y, or set UNITMETER_SOURCE=dbus"
	if source == receiver.Auto {
		judged = warning
	}
	switch {
	case errors.Is(err, ebpf.ErrForeignProgram):
		fix = "have the owner of that program attach it with BPF_F_ALLOW_MULTI, or detach it: bpftool cgroup help"
	case errors.Is(err, ebpf.ErrMemlock):
		fix = "set LimitMEMLOCK=infinity in " + accounting.MeterUnit + ", or: ulimit -l unlimited"
	case errors.Is(err, ebpf.ErrNotCgroup2):
		fix = "boot with the kernel parameter systemd.unified_cgroup_hierarchy=1, or set UNITMETER_SOURCE=dbus"
	case errors.Is(err, ebpf.ErrPermission):
		fix = "run it on the host, or the container with --cap-add=BPF --cap-add=NET_ADMIN --cap-add=PERFMON, or set UNITMETER_SOURCE=dbus"
	case errors.Is(err, errors.ErrUnsupported):
		fix = "set UNITMETER_SOURCE=dbus"
	}
	return judged(fix, "no eBPF program can count here: %v", err)
}

// namingFailure is about a host that lets a program count, and not name.
func namingFailure(err error) finding {
	fix := "boot without lockdown=confidentiality; lockdown=integrity does no harm"
	switch {
	case errors.Is(err, ebpf.ErrNoBTF):
		fix = "boot a kernel with CONFIG_DEBUG_INFO_BTF=y"
	case errors.Is(err, ebpf.ErrPermission):
		fix = "give CAP_PERFMON to who loads the program"
	}
	return warning(fix, "%v", err)
}

// netController returns a mounted cgroup v1 controller for networks that has cgroups,
// or "". mounts is as /proc/self/mounts.
func netController(mounts string) string {
	for line := range strings.Lines(mounts) {
		f := strings.Fields(line)
		if len(f) < 4 || f[2] != "cgroup" {
			continue
		}
		for _, controller := range []string{"net_cls", "net_prio"} {
			below, _ := filepath.Glob(f[1] + "/*/cgroup.procs")
			if slices.Contains(strings.Split(f[3], ","), controller) && len(below) > 0 {
				return controller
			}
		}
	}
	return ""
}

// checkPins looks for programs that nobody reads, and for a boot that loads none.
func (d *doctor) checkPins(ctx context.Context) finding {
	current, others, err := ebpf.Pinned("")
	switch {
	case err != nil:
		return failure("ls -l "+ebpf.DefaultDir, "%v", err)
	case len(others) > 0:
		return warning("unitmeter meter unload && "+loadMeter, "%s was left by another version: its counters stand still, and take memory", strings.Join(others, ", "))
	case current && !d.byEBPF():
		return warning("unitmeter meter unload, or unitmeter enable --ebpf", "an eBPF program counts (%s), and nobody reads it: UNITMETER_SOURCE is not ebpf", ebpf.DefaultDir)
	case !current:
		return finding{}
	}
	var state string
	if d.m != nil && d.m.Call(ctx, "GetUnitFileState", accounting.MeterUnit).Store(&state) == nil && state == "disabled" {
		return warning("systemctl enable "+accounting.MeterUnit, "%s is disabled: after the next boot no eBPF program is loaded", accounting.MeterUnit)
	}
	return good("the pins of this version are in %s, and of no other", ebpf.DefaultDir)
}

// checkFilters names the units of which eBPF counts more than systemd.
func (d *doctor) checkFilters(ctx context.Context) finding {
	units, err := d.m.Loaded(ctx, []string{"active", "reloading", "activating", "deactivating"}, "*")
	if err != nil {
		return skipped("%v", err)
	}
	var names []string
	for _, u := range units {
		if filtered, err := d.m.Filtered(ctx, u); err == nil && filtered { // else it has ended
			names = append(names, u.Name)
		}
	}
	if len(names) == 0 {
		return good("no running unit has IPAddressDeny=")
	}
	return good("packets that IPAddressDeny= drops are counted too, which systemd leaves out: those of %s", list(names))
}

// checkBoth compares the two sources where both count.
func (d *doctor) checkBoth(ctx context.Context) finding {
	cfg := d.cfg.Receiver
	cfg.SweepTimeout = 0 // ctx is shorter
	theirs, err := accounting.Open(ctx, cfg, receiver.DBus, systemd.Patterns{})
	if err != nil {
		return skipped("systemd cannot be read: %v", err)
	}
	defer theirs.Close()
	reader, err := receiver.OpenMeter(ebpf.Config{ReadOnly: true})
	if err != nil {
		return skipped("the eBPF counters cannot be read")
	}
	defer reader.Close()
	before := theirs.Read(ctx)
	sweep, err := reader.Read()
	after := theirs.Read(ctx)
	if err = errors.Join(err, before.Err(), after.Err()); err != nil {
		return skipped("%v", err)
	}
	return bothFinding(before.Units, after.Units, sweep)
}

// bothFinding compares the runs that both sources have counted from their first
// packet. systemd was read before the sweep and after it.
func bothFinding(before, after []systemd.Unit, sweep ebpf.Sweep) finding {
	old := map[string]systemd.Unit{}
	for _, u := range before {
		old[u.Name] = u
	}
	compared := 0
	var less, more []string
	for _, u := range after {
		ours, ok := sumSince(sweep, u)
		if first := old[u.Name]; !ok || first.Accounting != "on" || first.Invocation != u.Invocation {
			continue
		} else if compared++; below(ours, accounting.Values(first.Counters)) {
			less = append(less, u.Name)
		} else if below(accounting.Values(u.Counters), ours) {
			more = append(more, u.Name)
		}
	}
	switch {
	case len(less) > 0:
		return failure("report a bug with the output of: unitmeter once --json --source ebpf; unitmeter once --json --source dbus",
			"eBPF has counted less than systemd for %s", list(less))
	case compared == 0:
		return skipped("no unit with IP accounting has started since the program was loaded")
	case len(more) > 0:
		return good("of %d units that both count, systemd has less for %s, as after a reload or with IPAddressDeny=", compared, list(more))
	}
	return good("systemd and eBPF have the same bytes and packets for the %d units that both count", compared)
}

// below reports whether any of the counters is.
func below(a, b [4]uint64) bool {
	return slices.ContainsFunc([]int{0, 1, 2, 3}, func(i int) bool { return a[i] < b[i] })
}

// sumSince adds up the present run of a unit. ok is false if systemd counts it for a
// longer or shorter time than eBPF.
func sumSince(sweep ebpf.Sweep, u systemd.Unit) (sum [4]uint64, ok bool) {
	const together = 2 * time.Second // making the cgroup, and systemd's time of it
	var began time.Time
	for _, m := range sweep.Meters {
		if who := m.Identity; who.Cgroup.Unit == u.Name && !m.Gone && strings.HasSuffix(who.Path, "/"+u.Name) && who.Made.After(began) {
			began = who.Made
		}
	}
	if u.Accounting != "on" || began.IsZero() || u.Start.Sub(began).Abs() > together {
		return sum, false
	}
	for _, m := range sweep.Meters {
		if m.Identity.Cgroup.Unit == u.Name && !m.Identity.Made.Before(began) {
			for i, n := range [4]uint64{m.Received.Bytes, m.Received.Packets, m.Sent.Bytes, m.Sent.Packets} {
				sum[i] += n
			}
		}
	}
	return sum, true
}

// checkOwnMeter is the proof from end to end: what the doctor sends is counted for
// its own cgroup, so the programs are attached.
func (d *doctor) checkOwnMeter(ctx context.Context) finding {
	reader, err := receiver.OpenMeter(ebpf.Config{ReadOnly: true})
	if err != nil {
		return skipped("the eBPF counters cannot be read")
	}
	defer reader.Close()
	id, err := ebpf.OwnCgroup()
	if err != nil {
		return skipped("%v", err)
	}
	sent := func() (n uint64, path string, err error) {
		sweep, err := reader.Read()
		for _, m := range sweep.Meters {
			if m.Identity.ID == id {
				n += m.Sent.Bytes
				path = m.Identity.Path
			}
		}
		return n, path, err
	}
	before, _, err := sent()
	if err != nil {
		return failure(loadMeter, "%v", err)
	}
	what, err := d.speak(ctx)
	if err != nil {
		return failure("see the check of the endpoint", "nothing could be sent: %s", err)
	}
	for {
		after, path, err := sent()
		if err != nil {
			return failure(loadMeter, "%v", err)
		}
		if after > before {
			return good("eBPF counted %d bytes for %s while it sent %s", after-before, path, what)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return failure("unitmeter meter unload && "+loadMeter, "this process sent %s, and eBPF counted nothing: the programs are not attached at the root of the cgroups", what)
		}
	}
}
