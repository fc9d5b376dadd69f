package receiver

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/ledger"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/journal"
)

// Config tells a Receiver where systemd is and which units to meter. The zero
// value meters every unit of the default types of this host.
type Config struct {
	// Source is who counts: DBus is systemd, where units have IP accounting on; EBPF
	// is a program of our own, which counts every unit. Auto is EBPF where the
	// pinned maps of that can be opened, and else DBus. Default: DefaultSource.
	//
	// With EBPF there is no connection to systemd, no journal is read, and Bus,
	// SystemBus and StopRecords have no effect. Traffic of cgroups without a unit is
	// metered under the cgroup's name. Where no maps are pinned, New attaches the
	// program for this process, which takes the rights of ebpf.Attach.
	Source string
	// Bus is "private" for PID 1's own socket (root only), "system" for the system bus, a
	// D-Bus address, or "auto"; see systemd.Config. Default: DefaultBus.
	Bus string
	// SystemBus is the D-Bus address of the system bus. Default:
	// systemd.UsualSystemBus.
	SystemBus string
	// Include and Exclude are patterns of unit names. A unit is metered if it
	// matches any of Include (default: all) and none of Exclude.
	Include, Exclude []string
	// Types are the unit types to meter. Default: DefaultTypes.
	Types []string
	// Fold are patterns of units that share one series each, named by the
	// pattern. Nil means DefaultFold; empty means none.
	Fold []string
	// MaxSeries bounds the number of series. What is over it is added to one
	// overflow series. Default: DefaultMaxSeries.
	MaxSeries int
	// UnitType and UnitSlice put systemd.unit.type and systemd.unit.slice on
	// each point.
	UnitType, UnitSlice bool
	// UserUnits gives units of users' managers series of their own, which
	// user@UID.service has without it. Containers does so for containers, which else
	// have a series with the unit or fold that they are in. Wire adds the counters
	// after segmentation, and Loopback splits all of them into what crossed the
	// loopback device and the rest. All four mean nothing with DBus.
	UserUnits, Containers, Wire, Loopback bool
	// ReadOnly leaves the entries of removed cgroups in the pinned maps of EBPF to the
	// Receiver that delivers them.
	ReadOnly bool
	// HostName is put on each point as host.name. Default: the kernel's.
	HostName string
	// StopRecords says whether the last bytes of a unit are read from the journal, which
	// needs root or the systemd-journal group: "off" never, "auto" and "on" where the
	// privileges allow. With "on" the doctor reports a journal that cannot be read.
	// Default: DefaultStopRecords.
	StopRecords string
	// KeepEnded is how long the last point of a unit that has gone is repeated, so
	// that each of several readers gets it: more than the longest time between two
	// collections of one. Default, and the least: 2 minutes.
	KeepEnded time.Duration
	// SweepTimeout bounds one reading of all units. Default: DefaultSweepTimeout.
	SweepTimeout time.Duration
	// State continues the series of an earlier Receiver.
	State ledger.State
	// BootID tells boots apart. Default: the kernel's.
	BootID string
	// Logger gets changes of state. Default: none.
	Logger *slog.Logger

	// privateSocket and privateFrom are PrivateSocket and PrivateFrom of systemd.Config.
	// Tests set them.
	privateSocket string
	privateFrom   int
	// journalctl is the command and its first arguments. Tests set it.
	journalctl   []string
	journalProbe time.Duration
	// meterDirs are instead of those of OpenMeter, and meterRoot is the cgroup that is
	// metered with all below it. Tests set them.
	meterDirs []string
	meterRoot string
	// containerLogs and generator are instead of the directories of the host.
	containerLogs, generator string
}

// source is where readings come from. It credits them to the ledger.
type source interface {
	// Run keeps the source going until ctx ends. It returns ctx.Err().
	Run(ctx context.Context) error
	// Each calls f for each run that is there, and says whether it is still being
	// read. f must not call the source.
	Each(f func(unit, epoch string, reading bool))
	// Read reads the counters of all runs. An error says that some were not reached.
	Read(ctx context.Context) error
}

// A Receiver joins the source of readings, the ledger and the instruments. Run
// keeps it connected; Sweep reads all units once. Its methods may be called from
// several goroutines at the same time.
type Receiver struct {
	cfg     Config
	source  source
	systemd *systemd.Source  // the source, or nil with EBPF
	meter   *meter           // the source, or nil with DBus
	journal *journal.Journal // nil with EBPF and with StopRecords "off"

	// selection is by the units' own names, as far as they are known.
	selection atomic.Pointer[Selection]

	sweeping sync.Mutex // guards shared
	shared   *shared    // the sweep under way; nil: none
	last     atomic.Pointer[Sweep]

	// mu guards what follows. It is held for arithmetic only. The source calls in
	// with its own lock held, so that nothing here may call the source under mu.
	mu         sync.Mutex
	ledger     *ledger.Ledger // of all traffic
	others     []otherLedger  // of other measures of it
	attributes map[ledger.ID]*Attributes
	partial    int64 // sweeps that the deadline or an error cut short
}

// otherLedger counts another measure of the same traffic.
type otherLedger struct {
	measure ledger.Measure
	ledger  *ledger.Ledger
}

// ledgers yields all ledgers.
func (r *Receiver) ledgers() iter.Seq[*ledger.Ledger] {
	return func(yield func(*ledger.Ledger) bool) {
		if !yield(r.ledger) {
			return
		}
		for _, o := range r.others {
			if !yield(o.ledger) {
				return
			}
		}
	}
}

// New checks cfg and returns a Receiver that is not connected yet. With EBPF it has
// opened the maps, which Run closes.
func New(cfg Config) (*Receiver, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	selection, err := cfg.Selection()
	if err != nil {
		return nil, err
	}
	r := &Receiver{cfg: cfg, attributes: map[ledger.ID]*Attributes{}}
	r.selection.Store(&selection)
	metered := func(unit string) bool { return r.selection.Load().Metered(unit) }
	counting, err := r.newMeter(metered)
	if err != nil {
		return nil, err
	}
	keeping := ledger.Config{
		MaxSeries: cfg.MaxSeries, KeepEnded: cfg.KeepEnded, Patterns: cfg.Fold, Metered: metered,
		Fold: func(unit string) (string, bool) {
			pattern := r.selection.Load().Fold.Match(unit)
			return pattern, pattern != ""
		},
		Boot: cfg.BootID, Began: time.Now(), Source: r.cfg.Source, State: cfg.State,
	}
	r.newLedgers(keeping)
	r.cfg.State = ledger.State{} // it may be large
	if counting != nil {
		r.source, r.meter = counting, counting
	} else {
		r.systemd = systemd.New(systemd.Config{
			Bus: cfg.Bus, SystemBus: cfg.SystemBus, PrivateSocket: cfg.privateSocket, PrivateFrom: cfg.privateFrom,
			Types: cfg.Types, Metered: metered, Balanced: ledger.TopSlice,
			Names: selection.Names(), Named: func(own map[string]string) {
				named := selection.Named(own)
				r.selection.Store(&named)
			},
			Known: r.known, BootID: cfg.BootID, Sink: ledgerSink{r}, Logger: cfg.Logger,
		})
		r.source = r.systemd
	}
	if counting != nil || cfg.StopRecords == "off" {
		// Whoever reads the journal again must not take what is counted meanwhile.
		r.ledger.SetJournal(ledger.Position{})
	} else {
		r.journal = journal.New(journal.Config{
			At: journal.Position(r.ledger.Journal()), BootID: cfg.BootID, Take: r.takeRecord,
			Ends: r.systemd.Ends, Probe: cfg.journalProbe,
			Logger: cfg.Logger, Command: cfg.journalctl,
		})
	}
	return r, nil
}

// newLedgers makes the ledgers. One of a measure that was off begins with what passes
// from now on: what another series of it had before must not count again.
func (r *Receiver) newLedgers(cfg ledger.Config) {
	state := cfg.State
	if r.cfg.Source == EBPF && !slices.Contains(r.cfg.Types, "slice") {
		// They would have a gap when they come back.
		cfg.State.Series = slices.DeleteFunc(slices.Clone(state.Series), func(s ledger.Series) bool {
			return s.Owner == ledger.Owner{} && systemd.TypeOf(s.Name) == "slice"
		})
	}
	r.ledger = ledger.New(cfg)
	for _, measure := range r.cfg.measures() {
		i := slices.IndexFunc(state.Others, func(other ledger.State) bool { return other.Measure == measure })
		cfg.Measure, cfg.State = measure, ledger.State{Time: state.Time} // as if of another source
		if i >= 0 {
			cfg.State = state.Others[i]
		}
		r.others = append(r.others, otherLedger{measure, ledger.New(cfg)})
	}
}

// measures are those of the ledgers beside the first.
func (cfg *Config) measures() []ledger.Measure {
	switch {
	case cfg.Source != EBPF:
		return nil
	case cfg.Wire && cfg.Loopback:
		return []ledger.Measure{ledger.Remote, ledger.Loopback, ledger.WireRemote, ledger.WireLoopback}
	case cfg.Wire:
		return []ledger.Measure{ledger.Wire}
	case cfg.Loopback:
		return []ledger.Measure{ledger.Remote, ledger.Loopback}
	}
	return nil
}

// newMeter decides between the sources: nil is systemd.
func (r *Receiver) newMeter(metered func(unit string) bool) (*meter, error) {
	if r.cfg.Source == DBus {
		r.cfg.Loopback = false
		return nil, nil
	}
	m := &meter{
		cfg: ebpf.Config{Root: r.cfg.meterRoot, ReadOnly: r.cfg.ReadOnly}, dirs: r.cfg.meterDirs, metered: metered,
		userUnits: r.cfg.UserUnits, slices: slices.Contains(r.cfg.Types, "slice"),
		runs: map[cgroup]*cgroupRun{}, swept: r.cfg.State.Time, log: r.cfg.Logger,
		credit: func(reading ledger.Reading, received, sent ebpf.Counters) {
			r.mu.Lock()
			defer r.mu.Unlock()
			reading.Counters = measured(ledger.Total, received, sent)
			r.ledger.Credit(reading)
			for _, o := range r.others {
				reading.Counters = measured(o.measure, received, sent)
				o.ledger.Credit(reading)
			}
		},
	}
	if r.cfg.Containers {
		m.containers = newContainers(r.cfg.containerLogs, r.cfg.generator)
	}
	err := m.open(r.cfg.Source == EBPF)
	if err != nil && r.cfg.Source == Auto {
		r.cfg.Source, r.cfg.Loopback = DBus, false
		r.cfg.Logger.Info("systemd counts, over D-Bus: the eBPF meter cannot be read", "err", err)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("count by eBPF: %w; or set UNITMETER_SOURCE=dbus, which counts the units with IP accounting on", err)
	}
	r.cfg.Source = EBPF
	return m, nil
}

// setDefaults fills in what is not set, and refuses what makes no sense.
func (cfg *Config) setDefaults() error {
	cfg.Source = cmp.Or(cfg.Source, DefaultSource)
	if !slices.Contains([]string{DBus, EBPF, Auto}, cfg.Source) {
		return fmt.Errorf("count by %q: there is no such source; use dbus, ebpf or auto", cfg.Source)
	}
	if cfg.meterDirs == nil {
		cfg.meterDirs = meterDirs()
	}
	cfg.Bus = cmp.Or(cfg.Bus, DefaultBus)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Fold == nil {
		cfg.Fold = DefaultFold()
	}
	if len(cfg.Types) == 0 {
		cfg.Types = DefaultTypes()
	}
	for _, t := range cfg.Types {
		if systemd.CounterInterface(t) == "" {
			return fmt.Errorf("meter units of type %q: systemd has no IP accounting for them; use any of service, scope, socket, mount, swap, slice", t)
		}
	}
	cfg.StopRecords = cmp.Or(cfg.StopRecords, DefaultStopRecords)
	if !slices.Contains([]string{"auto", "on", "off"}, cfg.StopRecords) {
		return fmt.Errorf("read stop records %q: there is no such choice; use auto, on or off", cfg.StopRecords)
	}
	if cfg.MaxSeries < 0 || cfg.SweepTimeout < 0 {
		return fmt.Errorf("meter %d series within %v: neither can be negative; use 0 for the default", cfg.MaxSeries, cfg.SweepTimeout)
	}
	cfg.MaxSeries = cmp.Or(cfg.MaxSeries, DefaultMaxSeries)
	cfg.SweepTimeout = cmp.Or(cfg.SweepTimeout, DefaultSweepTimeout)
	if cfg.HostName == "" {
		name, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("find out the host name: %w; set OTEL_RESOURCE_ATTRIBUTES=host.name=NAME", err)
		}
		cfg.HostName = name
	}
	if cfg.BootID == "" {
		id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return fmt.Errorf("read the boot id: %w; unitmeter runs on Linux with /proc mounted", err)
		}
		cfg.BootID = strings.TrimSpace(string(id))
	}
	return nil
}

// Addresses returns the D-Bus addresses at which a Receiver with this
// configuration looks for systemd, in its order.
func (cfg Config) Addresses() []string {
	return systemd.Config{Bus: cfg.Bus, SystemBus: cfg.SystemBus}.Addresses()
}

// Run connects to systemd and follows its signals and its stop records until ctx
// ends, connecting again whenever the connection is lost. With EBPF it waits for the
// end of ctx. It returns ctx.Err(). It must be called once.
func (r *Receiver) Run(ctx context.Context) error {
	var following sync.WaitGroup
	defer following.Wait()
	if r.journal != nil {
		following.Go(func() {
			// Until names are resolved, nobody knows whose records count.
			if len(r.selection.Load().Names()) == 0 || r.systemd.Ready(ctx) == nil {
				r.journal.Run(ctx)
			}
		})
	}
	return r.source.Run(ctx)
}

// Ready waits until the units have been listed for the first time. Where ctx
// ends before, the error says why there is no connection.
func (r *Receiver) Ready(ctx context.Context) error {
	if r.systemd == nil {
		return nil
	}
	return r.systemd.Ready(ctx)
}

// Progress returns a number that grows while the state of units is being read.
func (r *Receiver) Progress() int64 {
	if r.systemd == nil {
		return 0
	}
	return r.systemd.Progress()
}

// Last returns the result of the last sweep, or nil before the first.
func (r *Receiver) Last() *Sweep { return r.last.Load() }

// Counting says who counts.
type Counting struct {
	Source string // DBus or EBPF
	// With EBPF, and after the first sweep: Since is when counting began, and Own says
	// that it ends with this Receiver. Nameless is true where the kernel does not name
	// cgroups: what ends between two sweeps has no name.
	Since         time.Time
	Own, Nameless bool
}

// Counting returns who counts. Auto has been decided by New.
func (r *Receiver) Counting() Counting {
	if r.meter == nil {
		return Counting{Source: DBus}
	}
	r.meter.mu.Lock()
	defer r.meter.mu.Unlock()
	header := &r.meter.header
	return Counting{EBPF, header.Since, r.meter.own, !header.Naming}
}

// Unattributed is the name of the unit that Units has for traffic of no known unit.
const Unattributed = "(unattributed)"

// Units returns the units of the metered types as they were read last, in the order
// of their names. With DBus these are the loaded units, as systemd shows them. With
// EBPF they are the units that have a cgroup (Accounting is "on") or have had traffic
// ("ended"). Their totals are over all runs since counting began.
func (r *Receiver) Units() []systemd.Unit {
	if r.meter == nil {
		return r.systemd.Units()
	}
	last := r.last.Load()
	if last == nil {
		return nil
	}
	units := map[string]*systemd.Unit{}
	for s := range last.State.All() {
		name, accounting := s.ID.Text(), "ended"
		switch {
		case s.Measure != ledger.Total:
			continue
		case s.Kind != ledger.Unit:
			name, accounting = Unattributed, "on"
		}
		u := units[name]
		if u == nil {
			u = &systemd.Unit{Name: name, Accounting: accounting, Slice: s.Slice, Start: s.Start, Time: last.Time}
			units[name] = u
		}
		u.Counters.IngressBytes += s.Total.Received.Bytes
		u.Counters.IngressPackets += s.Total.Received.Packets
		u.Counters.EgressBytes += s.Total.Sent.Bytes
		u.Counters.EgressPackets += s.Total.Sent.Packets
	}
	r.meter.living(func(reading *ledger.Reading) {
		name := ledger.ID{Name: reading.Unit, Owner: reading.Owner}.Text()
		if u := units[name]; u != nil {
			u.Accounting = "on"
			return
		}
		units[name] = &systemd.Unit{
			Name: name, Accounting: "on", Slice: reading.Slice, Start: reading.Start, Time: last.Time,
		}
	})
	list := make([]systemd.Unit, 0, len(units))
	for _, name := range slices.Sorted(maps.Keys(units)) {
		list = append(list, *units[name])
	}
	return list
}

// known reports whether a run has been read, by this Receiver or an earlier one.
func (r *Receiver) known(epoch string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ledger.Known(epoch)
}

// takeRecord takes a stop record and the position after it.
func (r *Receiver) takeRecord(at journal.Position, record *journal.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ledger.SetJournal(ledger.Position(at))
	if record != nil {
		r.ledger.Take(ledger.Record{
			Unit: record.Unit, Epoch: record.Epoch, Boot: record.Boot,
			Counted: record.Counted, Counters: countersOf(record.Counters), Time: record.Time, Ended: record.Ended,
		}, time.Now())
	}
}

// ledgerSink puts what the source reads into the ledger.
type ledgerSink struct{ *Receiver }

// Credit implements systemd.Sink.
func (s ledgerSink) Credit(reading systemd.Reading) (fell bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ledger.Credit(ledger.Reading{
		Unit: reading.Unit, Epoch: reading.Epoch, Slice: reading.Slice, Counters: countersOf(reading.Counters),
		Start: reading.Start, Asked: reading.Asked, Time: reading.Time,
		Final: reading.Final, Young: reading.Young, Unmetered: reading.Unmetered,
	})
}

// Restart implements systemd.Sink.
func (s ledgerSink) Restart(epoch string, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ledger.Restart(epoch, at)
}

// Place implements systemd.Sink.
func (s ledgerSink) Place(unit, epoch, slice string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ledger.Place(unit, epoch, slice)
}

// countersOf has systemd's counters under the ledger's names.
func countersOf(c systemd.Counters) ledger.Counters {
	return ledger.Counters{
		Received: ledger.Traffic{Bytes: c.IngressBytes, Packets: c.IngressPackets},
		Sent:     ledger.Traffic{Bytes: c.EgressBytes, Packets: c.EgressPackets},
	}
}
