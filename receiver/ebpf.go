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
	// rootSlice is the slice under which traffic is unattributed that nobody can
	// name.
	rootSlice = "-.slice"
)

// meterDirs are where the pinned maps are looked for, in this order: where a drop-in
// of the service mounts them, and where "unitmeter meter load" pins them.
func meterDirs() []string { return []string{"/run/unitmeter/meter", ebpf.DefaultDir} }

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
		// That there is nothing in one place says less than what is wrong in another.
		if reason == nil || errors.Is(reason, ebpf.ErrNotLoaded) {
			reason = err
		}
	}
	return nil, reason
}

// meter is the source of readings that counts by itself. It reads the maps of the
// pinned program, or attaches one of its own for as long as it runs.
type meter struct {
	cfg     ebpf.Config
	dirs    []string
	metered func(unit string) bool
	credit  func(ledger.Reading)
	log     *slog.Logger

	mu     sync.Mutex
	reader *ebpf.Reader          // nil while there is nothing to read
	runs   map[cgroup]*cgroupRun // by the entries of the last sweep
	list   []*cgroupRun          // the same, to go through
	swept  time.Time             // when the last sweep began, of an earlier Receiver at first
	// failing is what could not be done at the last sweep, empty if all could.
	failing string
}

// cgroup is one entry of the maps.
type cgroup struct{ id, born uint64 }

// cgroupRun is what the readings of one entry have in common.
type cgroupRun struct {
	reading ledger.Reading
	out     bool  // the settings leave it out
	gone    bool  // the cgroup was removed
	sweep   int64 // the last one that has it
}

// open opens the pinned maps. Where there are none and attach is true, it attaches
// the program for this process alone.
func (m *meter) open(attach bool) error {
	const next = "or set UNITMETER_SOURCE=dbus"
	reader, err := openMeter(m.cfg, m.dirs)
	if err == nil {
		m.reader = reader
		return nil
	}
	if !attach || !errors.Is(err, ebpf.ErrNotLoaded) {
		return fmt.Errorf("%w, %s", err, next)
	}
	// It walks the cgroups once, which takes a fraction of a second.
	reader, attachErr := ebpf.Attach(context.Background(), m.cfg)
	if attachErr != nil {
		return fmt.Errorf("%w, %s; this process cannot count by itself: %w", err, next, attachErr)
	}
	m.reader = reader
	m.log.Info("no eBPF meter is loaded: counting for as long as this process runs")
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
		if run.out {
			continue
		}
		f(run.reading.Unit, run.reading.Epoch, !run.gone)
	}
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
	m.swept = asked
	if sweep.Detached {
		m.close()
		return m.fault(reading, errors.New(`the eBPF meter was unloaded; run "unitmeter meter load" as root`))
	}
	_ = m.fault("delete from the eBPF meter", sweep.Deletion) // it costs memory of the kernel, and no data
	return nil
}

// fault logs what cannot be done once, and when it can be done again, and returns
// the error.
func (m *meter) fault(what string, err error) error {
	switch {
	case err == nil && m.failing != "":
		m.failing = ""
		m.log.Info("the eBPF meter is read again")
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
			run = &cgroupRun{reading: firstReading(sweep, one)}
			run.out = !run.reading.Unattributed && !m.metered(run.reading.Unit)
			run.reading.Young = moment(one.Born).After(m.swept)
			m.runs[key] = run
		}
		run.gone, run.sweep = one.Gone, number
		if one.Deleted { // these are its last values
			run.sweep = 0
		} else {
			m.list = append(m.list, run)
		}
		if run.out {
			continue
		}
		reading := run.reading
		reading.Counters, reading.Asked, reading.Time, reading.Final = sumOf(one.Received, one.Sent), asked, read, one.Gone
		m.credit(reading)
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

// takeLost credits what found no room in the maps. It has the id of no cgroup.
func (m *meter) takeLost(sweep *ebpf.Sweep, asked, read time.Time, number int64) {
	counters := sumOf(sweep.Lost.Received, sweep.Lost.Sent)
	if counters == (ledger.Counters{}) {
		return
	}
	run := &cgroupRun{sweep: number, reading: ledger.Reading{
		Unit: rootSlice, Unattributed: true, Epoch: epochOf(sweep.BootID, "lost", sweep.Loaded),
		Counters: counters, Start: sweep.Since, Asked: asked, Time: read,
	}}
	m.runs[cgroup{0, sweep.Loaded}] = run
	m.list = append(m.list, run)
	m.credit(run.reading)
}

// firstReading is what does not change in the readings of an entry.
func firstReading(sweep *ebpf.Sweep, one *ebpf.Meter) ledger.Reading {
	who := one.Identity
	reading := ledger.Reading{
		Epoch: epochOf(sweep.BootID, strconv.FormatUint(who.ID, 10), one.Born), Slice: who.Cgroup.Slice, Start: who.Made,
	}
	if reading.Start.IsZero() {
		reading.Start = sweep.Since
	}
	switch {
	case who.ID == sweep.RootID:
		reading.Unit, reading.Slice = kernelName, ""
	case !who.Named:
		reading.Unit, reading.Unattributed = rootSlice, true
	case cgroupName(who) == "": // a process in a slice itself
		reading.Unit, reading.Unattributed = who.Cgroup.Slice, true
	default:
		reading.Unit = cgroupName(who)
	}
	return reading
}

// cgroupName is the unit of a cgroup. One that systemd does not manage has the id
// of its container, or else the first component of its path behind the slices. A
// slice itself has none.
func cgroupName(who *ebpf.Identity) string {
	if who.Cgroup.Unit != "" {
		return who.Cgroup.Unit
	}
	if c := who.Cgroup.Container; c != nil && c.ID != "" {
		return c.ID
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

// cgroupEpoch reports whether an epoch was made by epochOf. Those of systemd are an
// invocation id, or a boot id and a unit.
func cgroupEpoch(epoch string) bool {
	parts := strings.Split(epoch, "/")
	return len(parts) == 4 && parts[1] == "cgroup"
}

// switchedTo reports whether a state has what another source counted.
func switchedTo(source string, state ledger.State) bool {
	if state.Time.IsZero() {
		return false
	}
	cgroups := 0
	for _, run := range state.Runs {
		if cgroupEpoch(run.Epoch) {
			cgroups++
		}
	}
	if source == EBPF {
		return cgroups == 0
	}
	return cgroups > 0
}

func sumOf(received, sent ebpf.Counters) ledger.Counters {
	return ledger.Counters{
		Received: ledger.Traffic{Bytes: received.Bytes, Packets: received.Packets},
		Sent:     ledger.Traffic{Bytes: sent.Bytes, Packets: sent.Packets},
	}
}

// typeOf is the type of a unit; a cgroup that is none has the type "cgroup".
func typeOf(name string) string {
	if systemd.ValidUnitName(name) {
		return systemd.TypeOf(name)
	}
	return "cgroup"
}
