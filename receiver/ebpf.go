package receiver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/ledger"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

const (
	// kernelName is the series of the root cgroup, whose sockets are the kernel's own.
	kernelName = "kernel"
	// rootSlice is the slice of unattributed traffic without a name.
	rootSlice = "-.slice"
)

// meterDirs are where the pinned maps are looked for, in this order: where a drop-in
// of the service mounts them, and where "unitmeter meter load" pins them. It is not a
// directory further down: systemd 247 and 262 make those above it with the umask of the unit.
func meterDirs() []string { return []string{"/run/unitmeter", ebpf.DefaultDir} }

// OpenMeter opens the maps that a Receiver reads with EBPF, in the first place that
// has any. The error is that of ebpf.Open.
func OpenMeter(cfg ebpf.Config) (*ebpf.Reader, error) { return openMeter(cfg, meterDirs()) }

func openMeter(cfg ebpf.Config, dirs []string) (*ebpf.Reader, error) {
	var reason error
	for _, cfg.Dir = range dirs {
		reader, err := ebpf.Open(cfg)
		if err == nil {
			return reader, nil
		}
		// A fault in one place explains more than the absence in the other.
		if reason == nil || errors.Is(reason, ebpf.ErrNotLoaded) {
			reason = err
		}
	}
	return nil, reason
}

// meter is the eBPF source. It reads the maps of the pinned program, or attaches its
// own program while it runs.
type meter struct {
	cfg     ebpf.Config
	dirs    []string
	metered func(unit string) bool
	credit  func(reading ledger.Reading, received, sent ebpf.Counters)
	log     *slog.Logger
	// Which units and containers have their own series: see Config.
	userUnits, slices bool
	containers        *containers // nil: they have none

	mu     sync.Mutex
	reader *ebpf.Reader          // nil while there is nothing to read
	own    bool                  // reader has attached the program
	header ebpf.Sweep            // the last one, without its Meters
	runs   map[cgroup]*cgroupRun // by the entries of the last sweep
	list   []*cgroupRun          // the same, to go through
	swept  time.Time             // when the last sweep began, of an earlier Receiver at first
	// failing is the operation that failed at the last sweep, empty if none did.
	failing string
}

// cgroup is one entry of the maps.
type cgroup struct{ id, born uint64 }

// cgroupRun has the common part of all readings of one entry.
type cgroupRun struct {
	reading        ledger.Reading
	out            bool          // the settings leave it out
	gone           bool          // the cgroup was removed
	sweep          int64         // the last one that has it
	received, sent ebpf.Counters // of the last reading that was credited
}

// open opens the pinned maps. Where there are none and attach is true, it attaches
// the program for this process alone.
func (m *meter) open(attach bool) error {
	reader, err := openMeter(m.cfg, m.dirs)
	if err == nil {
		m.reader, m.own = reader, false
		return nil
	}
	if !attach || !errors.Is(err, ebpf.ErrNotLoaded) {
		return err
	}
	// It walks the cgroups once, which takes a fraction of a second.
	alone := m.cfg
	alone.ReadOnly = false
	reader, attachErr := ebpf.Attach(context.Background(), alone)
	if attachErr != nil {
		return fmt.Errorf("%w, and this process cannot count by itself: %w", ebpf.ErrNotLoaded, attachErr)
	}
	m.reader, m.own = reader, true
	m.log.Info("no eBPF meter is loaded: this process attached its own, which ends with it")
	if err := reader.Naming(); err != nil {
		m.log.Warn("short-lived units have no name", "err", err)
	}
	return nil
}

// Run implements source. At its end the maps are closed.
func (m *meter) Run(ctx context.Context) error {
	<-ctx.Done()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.close()
	return ctx.Err()
}

// living calls f for each metered unit that has a cgroup, with or without traffic.
func (m *meter) living(f func(*ledger.Reading)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	each := func(run *cgroupRun) {
		if r := &run.reading; !run.gone && !r.Unmetered && !r.Unattributed {
			f(r)
		}
	}
	for _, run := range m.list {
		each(run)
	}
	if m.reader == nil {
		return // Read has failed, and has said so
	}
	_ = m.fault("list the cgroups", m.reader.Idle(func(who *ebpf.Identity) {
		if run := m.first(&m.header, &ebpf.Meter{Identity: who}, m.swept); run != nil {
			each(run)
		}
	}))
}

// close closes the maps. The caller holds mu.
func (m *meter) close() {
	if m.reader != nil {
		_ = m.reader.Close() // nothing was written
		m.reader = nil
	}
}

// Each implements source.
func (m *meter) Each(f func(unit, epoch string, reading bool)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, run := range m.list {
		if !run.out {
			f(run.reading.Unit, run.reading.Epoch, !run.gone)
		}
	}
}

// units returns how many units have a cgroup with traffic.
func (m *meter) units() int {
	units := map[ledger.ID]struct{}{}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, run := range m.list {
		if r := &run.reading; !run.gone && !r.Unmetered && !r.Unattributed {
			units[ledger.ID{Name: r.Unit, Owner: r.Owner}] = struct{}{}
		}
	}
	return len(units)
}

// Read implements source. It takes milliseconds, and does not look at ctx.
func (m *meter) Read(context.Context) error {
	const reading = "read the eBPF meter"
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reader == nil {
		if err := m.open(false); err != nil {
			return m.fault(reading, err)
		}
	}
	asked := time.Now()
	sweep, err := m.reader.Read()
	if err != nil {
		return m.fault(reading, err)
	}
	m.take(&sweep, asked, time.Now())
	m.swept, m.header = asked, sweep
	m.header.Meters = nil
	if sweep.Detached {
		m.close()
		return m.fault(reading, errors.New(`the eBPF meter was unloaded; run "unitmeter meter load" as root`))
	}
	_ = m.fault("delete from the eBPF meter", sweep.Deletion) // it costs memory of the kernel, and no data
	return nil
}

// fault logs an operation that fails, once, and when it works again. It returns the
// error.
func (m *meter) fault(what string, err error) error {
	switch {
	case err == nil && m.failing != "":
		m.failing = ""
		m.log.Info("the eBPF meter can be read again")
	case err != nil && what != m.failing:
		m.failing = what
		m.log.Warn(what, "err", err)
	}
	return err
}

// take credits a sweep. The caller holds mu.
func (m *meter) take(sweep *ebpf.Sweep, asked, read time.Time) {
	moment := func(boottime uint64) time.Time {
		return sweep.Since.Add(time.Duration(boottime - sweep.Loaded))
	}
	number := asked.UnixNano()
	m.list = m.list[:0]
	for i := range sweep.Meters {
		one := &sweep.Meters[i]
		key := cgroup{one.Identity.ID, one.Born}
		run := m.runs[key]
		if run == nil {
			if run = m.first(sweep, one, asked); run == nil {
				continue
			}
			run.reading.Young = moment(one.Born).After(m.swept)
			m.runs[key] = run
		}
		// What is gone and quiet says nothing new, so its series can have its last point.
		quiet := run.gone && one.Gone && one.Received == run.received && one.Sent == run.sent
		run.gone, run.sweep = one.Gone, number
		if one.Deleted { // these are its last values
			run.sweep = 0
		} else {
			m.list = append(m.list, run)
		}
		if run.out || quiet {
			continue
		}
		run.received, run.sent = one.Received, one.Sent
		reading := run.reading
		reading.Asked, reading.Time, reading.Final = asked, read, one.Gone
		m.credit(reading, one.Received, one.Sent)
	}
	m.takeLost(sweep, asked, read, number)
	if len(m.runs) == len(m.list) {
		return
	}
	for key, run := range m.runs {
		if run.sweep != number {
			delete(m.runs, key)
		}
	}
}

// takeLost credits the traffic of cgroups that found no room in the maps. It belongs to
// no cgroup id.
func (m *meter) takeLost(sweep *ebpf.Sweep, asked, read time.Time, number int64) {
	if sweep.Lost.Received == (ebpf.Counters{}) && sweep.Lost.Sent == (ebpf.Counters{}) {
		return
	}
	run := &cgroupRun{sweep: number, reading: ledger.Reading{
		Unit: rootSlice, Unattributed: true, Epoch: epochOf(sweep.BootID, "lost", sweep.Loaded),
		Slices: m.slicesOf("/"), Start: sweep.Since, Asked: asked, Time: read,
	}}
	m.runs[cgroup{0, sweep.Loaded}] = run
	m.list = append(m.list, run)
	m.credit(run.reading, sweep.Lost.Received, sweep.Lost.Sent)
}

// first makes the unchanging part of an entry's readings, nil while the name of its
// container is not known yet.
func (m *meter) first(sweep *ebpf.Sweep, one *ebpf.Meter, now time.Time) *cgroupRun {
	who := one.Identity
	run := &cgroupRun{reading: ledger.Reading{
		Epoch: epochOf(sweep.BootID, strconv.FormatUint(who.ID, 10), one.Born), Slice: who.Cgroup.Slice,
		Slices: m.slicesOf(who.Path), Start: who.Made,
	}}
	reading := &run.reading
	if reading.Start.IsZero() {
		reading.Start = sweep.Since
	}
	switch reading.Unit = cgroupName(who); {
	case who.ID == sweep.RootID:
		reading.Unit, reading.Slice = kernelName, ""
	case !who.Named:
		reading.Unit, reading.Unattributed = rootSlice, true
		return run
	case reading.Unit == "": // a process in a slice itself
		reading.Unit, reading.Unattributed = who.Cgroup.Slice, true
		return run
	}
	var labels ledger.Labels
	// Units of a user's manager without their own series count for the manager.
	if u := who.Cgroup.User; m.userUnits && u != nil && u.Unit != "" && m.metered(u.Unit) {
		reading.Unit, reading.Slice, labels.User = u.Unit, u.Slice, strconv.FormatUint(uint64(u.UID), 10)
	}
	if c := who.Cgroup.Container; m.containers != nil && c != nil {
		fresh := !one.Gone && now.Sub(who.Made) < namePatience
		if !m.containers.label(&labels, c, reading.Unit, now) && fresh {
			return nil
		}
	}
	reading.Owner = ledger.OwnerOf(labels)
	if !m.metered(reading.Unit) {
		reading.Unmetered, run.out = true, len(reading.Slices) == 0
	}
	return run
}

// slicesOf returns the slices with series at the beginning of a path.
func (m *meter) slicesOf(path string) (names []string) {
	if !m.slices {
		return nil
	}
	for name := rootSlice; strings.HasSuffix(name, ".slice") && systemd.ValidUnitName(name); {
		if m.metered(name) {
			names = append(names, name)
		}
		name, path, _ = strings.Cut(strings.TrimPrefix(path, "/"), "/")
		name = strings.TrimPrefix(name, "_") // systemd's escape
	}
	return names
}

// cgroupName is the unit of a cgroup. One that systemd does not manage has the first
// component of its path behind the slices. A slice itself has none.
func cgroupName(who *ebpf.Identity) string {
	if who.Cgroup.Unit != "" {
		return who.Cgroup.Unit
	}
	for component := range strings.SplitSeq(strings.Trim(who.Path, "/"), "/") {
		if !strings.HasSuffix(component, ".slice") {
			return strings.ToValidUTF8(component, "\uFFFD") // a directory may have any bytes, OTLP may not
		}
	}
	return ""
}

// epochOf names the run of a cgroup. born tells the entries of one id apart.
func epochOf(boot, id string, born uint64) string {
	return boot + "/cgroup/" + id + "/" + strconv.FormatUint(born, 10)
}

// measured are the counters of a measure.
func measured(measure ledger.Measure, received, sent ebpf.Counters) ledger.Counters {
	traffic := func(c *ebpf.Counters) ledger.Traffic {
		t, local := c.Traffic, &c.Loopback
		switch measure {
		case ledger.Loopback, ledger.WireLoopback:
			t = *local
		case ledger.Remote, ledger.WireRemote:
			t.Bytes, t.Packets = t.Bytes-local.Bytes, t.Packets-local.Packets
			t.WireBytes, t.WirePackets = t.WireBytes-local.WireBytes, t.WirePackets-local.WirePackets
		}
		if measure >= ledger.Wire {
			return ledger.Traffic{Bytes: t.WireBytes, Packets: t.WirePackets}
		}
		return ledger.Traffic{Bytes: t.Bytes, Packets: t.Packets}
	}
	return ledger.Counters{Received: traffic(&received), Sent: traffic(&sent)}
}

// noType is the type of a cgroup that is no unit.
const noType = "cgroup"

// typeOf is the type of a unit, or noType, as for lxc.payload.web.
func typeOf(name string) string {
	t := systemd.TypeOf(name)
	switch t {
	case "service", "scope", "socket", "slice", "mount", "swap", "timer", "path", "target", "device", "automount":
		if systemd.ValidUnitName(name) {
			return t
		}
	}
	return noType
}
