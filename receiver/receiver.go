package receiver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Config tells a Receiver where systemd is and which units to meter. The zero
// value meters every unit of the default types of this host.
type Config struct {
	// Bus is "private" for PID 1's own socket (root only, half the cost),
	// "system" for the system bus, a D-Bus address, or "auto" for the private
	// socket where it can be opened and else the system bus. Default: DefaultBus.
	Bus string
	// SystemBus is the D-Bus address of the system bus. Default:
	// unix:path=/run/dbus/system_bus_socket.
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
	// HostName is put on each point as host.name. Default: the kernel's.
	HostName string
	// StopRecords is "off" to read no stop records of PID 1 in the journal. "auto"
	// and "on" read them, which root and the systemd-journal group may; where they
	// cannot be read, the Receiver goes on without. Default: DefaultStopRecords.
	StopRecords string
	// KeepEnded is how long the last point of a unit that has gone is repeated, so
	// that each of several readers gets it: more than the longest time between two
	// collections of one. Default, and the least: 2 minutes.
	KeepEnded time.Duration
	// SweepTimeout bounds one reading of all units. Default: DefaultSweepTimeout.
	SweepTimeout time.Duration
	// State continues the series of an earlier Receiver.
	State State
	// BootID tells boots apart. Default: the kernel's.
	BootID string
	// Logger gets changes of state. Default: none.
	Logger *slog.Logger
}

// A Receiver follows systemd's units and reads their IP accounting. Run keeps
// it connected; Sweep reads all units once. Its methods may be called from
// several goroutines at the same time.
type Receiver struct {
	cfg              Config
	include, exclude globs
	fold             globs
	log              *slog.Logger

	// sweeping is held for the length of a sweep; last is its result.
	sweeping sync.Mutex
	last     atomic.Pointer[Sweep]

	mu    sync.Mutex
	bus   *bus // nil while not connected
	ready chan struct{}
	// placed is closed when it is known what of the journal is in the totals, or
	// that this will not be known soon.
	placed chan struct{}
	broken error // why there is no connection
	listed bool  // the units have been listed once
	// reloadBegan is when systemd last began to reload or re-execute itself, or
	// may have while nobody was connected.
	reloadBegan time.Time
	units       map[string]*unit // the metered units that are loaded, by name
	runs        map[string]*run  // by epoch; closed ones stay for keepClosed
	series      map[string]*series
	order       []*series                    // all of series, in the order of their creation
	index       map[attribute.Distinct]place // in order; made anew when order changes
	health      health
	version     int            // of systemd, the major one; 0 if not known
	said        map[string]int // what the sweep in progress has logged, see say
	// balances are by the name of a top-level slice.
	balances map[string]*balance
	// unplaced is the growth of units whose slice nobody could find out.
	unplaced Counters
	// journal is how far the stop records are on the odometers.
	journal Position
	// began is when this Receiver was made, and forgotten when the last of the
	// runs was closed that it remembers no more.
	began, forgotten time.Time
	// journalctl is the command and its first arguments; tests set it.
	journalctl []string
}

// health counts what went wrong since the start, for the unitmeter.*
// instruments. Guarded by Receiver.mu.
type health struct {
	dbusErrors int64 // failed calls and replies that made no sense
	refused    int64 // signals that were not systemd's, of earlier connections
	reconnects int64
	reloads    int64
	reexecs    int64
	partial    int64 // sweeps that the deadline or an error cut short
	badNames   int64 // units skipped for an impossible name
	resets     int64 // falls of a counter within one run
	missed     int64 // runs that ended without a last reading or record
	badRecords int64 // stop records that made no sense
}

// New checks cfg and returns a Receiver that is not connected yet.
func New(cfg Config) (*Receiver, error) {
	r := &Receiver{
		cfg:      cfg,
		log:      cfg.Logger,
		ready:    make(chan struct{}),
		placed:   make(chan struct{}),
		units:    map[string]*unit{},
		runs:     map[string]*run{},
		series:   map[string]*series{},
		said:     map[string]int{},
		balances: map[string]*balance{},
		began:    time.Now(),
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if len(cfg.Include) == 0 {
		cfg.Include = []string{"*"}
	}
	if r.include, err = parseGlobs(cfg.Include); err != nil {
		return nil, err
	}
	if r.exclude, err = parseGlobs(cfg.Exclude); err != nil {
		return nil, err
	}
	if cfg.Fold == nil {
		r.cfg.Fold = DefaultFold()
	}
	if r.fold, err = parseGlobs(r.cfg.Fold); err != nil {
		return nil, err
	}
	if len(cfg.Types) == 0 {
		r.cfg.Types = DefaultTypes()
	}
	for _, t := range r.cfg.Types {
		if CounterInterface(t) == "" {
			return nil, fmt.Errorf("meter units of type %q: systemd has no IP accounting for them; use any of service, scope, socket, mount, swap, slice", t)
		}
	}
	r.cfg.KeepEnded = max(cfg.KeepEnded, keepClosed)
	r.cfg.StopRecords = cmp.Or(cfg.StopRecords, DefaultStopRecords)
	if !slices.Contains([]string{"auto", "on", "off"}, r.cfg.StopRecords) {
		return nil, fmt.Errorf("read stop records %q: unknown value; use auto, on or off", cfg.StopRecords)
	}
	if cfg.MaxSeries < 0 || cfg.SweepTimeout < 0 {
		return nil, fmt.Errorf("meter %d series within %v: neither can be negative; use 0 for the default", cfg.MaxSeries, cfg.SweepTimeout)
	}
	r.cfg.Bus = cmp.Or(cfg.Bus, DefaultBus)
	r.cfg.SystemBus = cmp.Or(cfg.SystemBus, UsualSystemBus)
	r.cfg.MaxSeries = cmp.Or(cfg.MaxSeries, DefaultMaxSeries)
	r.cfg.SweepTimeout = cmp.Or(cfg.SweepTimeout, DefaultSweepTimeout)
	if r.cfg.HostName == "" {
		if r.cfg.HostName, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("find out the host name: %w; set OTEL_RESOURCE_ATTRIBUTES=host.name=NAME", err)
		}
	}
	if r.cfg.BootID == "" {
		id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, fmt.Errorf("read the boot id: %w; unitmeter runs on Linux with /proc mounted", err)
		}
		r.cfg.BootID = strings.TrimSpace(string(id))
	}
	r.restore(cfg.State)
	return r, nil
}

// restore takes over the series and runs of an earlier Receiver. The run of an
// earlier boot can never be read again, but the journal may have its end. One
// without an invocation id has no stop record.
//
// A time after now is one of a clock that was stepped back since. It becomes
// now: else no reading would count until the clock is there again.
func (r *Receiver) restore(state State) {
	now := time.Now()
	past := func(t time.Time) time.Time {
		if t.After(now) {
			return now
		}
		return t
	}
	for _, s := range state.Series {
		if _, ok := r.series[s.Name]; ok || !s.Total.valid() {
			continue
		}
		if top, ok := strings.CutPrefix(s.Name, aheadPrefix); ok {
			r.balanceOf(top).ahead = s.Total
			continue
		}
		if top, ok := strings.CutPrefix(s.Name, waitingPrefix); ok {
			b := r.balanceOf(top)
			b.waiting, b.turned, b.read = s.Total, now, now // the journal has yet to be read
			continue
		}
		var restored *series
		if top, ok := strings.CutPrefix(s.Name, unattributedPrefix); ok {
			restored = r.newUnattributed(top)
			r.balanceOf(top).series = restored
		} else {
			restored = r.newSeries(s.Name, "", s.Start)
		}
		restored.total, restored.start, restored.time, restored.fresh = s.Total, s.Start, past(s.Time), false
	}
	if r.readsJournal() {
		r.journal = state.Journal
	}
	for _, saved := range state.Runs {
		var earlier string
		if saved.Boot != r.cfg.BootID {
			if earlier = saved.Boot; saved.Epoch == saved.Boot || !r.readsJournal() {
				continue
			}
		}
		restored := &run{
			unit: saved.Unit, epoch: saved.Epoch, earlier: earlier, closed: time.Now(), restored: true,
			odometer: odometer{last: saved.Last, time: past(saved.Time)},
		}
		// Without its series, which the ledger may have forgotten, or a slice had
		// none so far, a new one begins with what the run grows by from here.
		if !strings.HasPrefix(saved.Series, unattributedPrefix) {
			restored.series = r.series[saved.Series]
		}
		r.runs[r.runKey(saved.Unit, saved.Epoch)] = restored
	}
}

// Run connects to systemd and follows its signals until ctx ends, connecting
// again with growing pauses whenever the connection is lost. It returns
// ctx.Err(). It must be called once.
func (r *Receiver) Run(ctx context.Context) error {
	if r.readsJournal() {
		var journal sync.WaitGroup
		journal.Go(func() { r.followJournal(ctx) })
		defer journal.Wait()
	}
	const shortest, longest = 250 * time.Millisecond, 15 * time.Second
	pause := shortest
	for {
		connected, err := r.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.mu.Lock()
		first := r.broken == nil
		r.broken = err
		r.health.reconnects++
		r.mu.Unlock()
		if connected {
			pause = shortest
		}
		if first {
			r.log.Warn("lost systemd; trying again", "err", err)
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
			return ctx.Err()
		}
		pause = min(2*pause, longest)
	}
}

// Ready waits until the units have been listed for the first time. Where ctx
// ends before, the error says why there is no connection.
func (r *Receiver) Ready(ctx context.Context) error {
	select {
	case <-r.ready:
		return nil
	case <-ctx.Done():
		r.mu.Lock()
		defer r.mu.Unlock()
		return errors.Join(r.broken, ctx.Err()) // the cause first
	}
}

// Last returns the result of the last sweep, or nil before the first.
func (r *Receiver) Last() *Sweep { return r.last.Load() }

// newSeries makes the series of a name and its attribute sets. The caller
// holds mu.
func (r *Receiver) newSeries(name, slice string, start time.Time) *series {
	s := &series{
		name:   name,
		start:  start,
		fresh:  true,
		shared: name == "" || slices.Contains(r.cfg.Fold, name),
	}
	r.describe(s, slice)
	r.keep(s)
	return s
}

// describe makes the attribute sets of a series. The caller holds mu.
func (r *Receiver) describe(s *series, slice string) {
	attrs := []attribute.KeyValue{attribute.String("host.name", r.cfg.HostName)}
	if s.name == "" {
		attrs = append(attrs, attribute.Bool("otel.metric.overflow", true))
	} else {
		attrs = append(attrs, attribute.String("systemd.unit.name", s.name))
		if r.cfg.UnitType {
			attrs = append(attrs, attribute.String("systemd.unit.type", typeOf(s.name)))
		}
		if r.cfg.UnitSlice && slice != "" && !s.shared {
			attrs = append(attrs, attribute.String("systemd.unit.slice", slice))
		}
	}
	s.slice = slice
	s.setAttributes(attrs...)
	r.index = nil
}

// setAttributes makes the sets of both directions, and the options that
// observe them, once.
func (s *series) setAttributes(attrs ...attribute.KeyValue) {
	direction := attribute.Key("network.io.direction")
	s.receive = attribute.NewSet(append(slices.Clone(attrs), direction.String("receive"))...)
	s.transmit = attribute.NewSet(append(slices.Clone(attrs), direction.String("transmit"))...)
	s.options = &options{
		receive:  []metric.ObserveOption{metric.WithAttributeSet(s.receive)},
		transmit: []metric.ObserveOption{metric.WithAttributeSet(s.transmit)},
	}
}

// keep adds a series to those of the receiver. The caller holds mu.
func (r *Receiver) keep(s *series) {
	r.series[s.name] = s
	r.order = append(r.order, s)
	r.index = nil
}

// seriesOf returns the series that a unit belongs to, and makes it where it is
// new. Over the limit, the series that has been without a unit for longest
// makes room; where all have one, the unit goes to the overflow series. The
// caller holds mu.
func (r *Receiver) seriesOf(unit, slice string, start time.Time) *series {
	name := unit
	if i := r.fold.index(unit); i >= 0 {
		name = r.cfg.Fold[i]
	}
	if s, ok := r.series[name]; ok {
		if r.cfg.UnitSlice && s.slice != slice && !s.shared {
			r.describe(s, slice) // restored, or moved to another slice
		}
		return s
	}
	if len(r.series) >= r.cfg.MaxSeries && !r.evict() {
		if s, ok := r.series[""]; ok {
			return s
		}
		name = ""
	}
	return r.newSeries(name, slice, start)
}

// evict forgets the series that moved last the longest ago, among those
// without a run. A unit that comes back under its name begins a new series.
func (r *Receiver) evict() bool {
	used := map[*series]bool{}
	for run := range maps.Values(r.runs) {
		used[run.series] = true
	}
	for name := range r.units { // some have yet to be read for the first time since the restart
		used[r.series[name]] = true
	}
	oldest := -1
	for i, s := range r.order {
		if !s.shared && !strings.Contains(s.name, "/") && !used[s] && !s.observed && !s.moved &&
			(oldest < 0 || s.time.Before(r.order[oldest].time)) {
			oldest = i
		}
	}
	if oldest < 0 {
		return false
	}
	delete(r.series, r.order[oldest].name)
	r.order = slices.Delete(r.order, oldest, oldest+1)
	r.index = nil
	return true
}

// series is the working state of one exported series.
type series struct {
	name, slice       string
	total             Counters
	start, time       time.Time
	shown             time.Time // time as of the last sweep
	shared            bool      // by several units: a fold, or the overflow series
	fresh             bool      // made since the last sweep
	observed          bool      // by the last sweep
	moved             bool      // since the last sweep
	receive, transmit attribute.Set
	options           *options
}

// runKey is the key of a run in Receiver.runs. An invocation id is unique by
// itself; units without one have the boot id as their epoch.
func (r *Receiver) runKey(unit, epoch string) string {
	if epoch == r.cfg.BootID {
		return epoch + "/" + unit
	}
	return epoch
}
