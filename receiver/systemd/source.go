package systemd

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// Config says where systemd is and which units to read.
type Config struct {
	// Bus is "private" for PID 1's own socket (root only), "system" for the system
	// bus, a D-Bus address, or "auto". That is the system bus, with the private socket
	// for sweeps of many units if it can be opened; without a bus the private socket
	// alone. Default: auto.
	Bus string
	// SystemBus is the D-Bus address of the system bus. Default:
	// UsualSystemBus.
	SystemBus string
	// PrivateSocket is the D-Bus address of PID 1's own socket. Default:
	// bus.PrivateSocket.
	PrivateSocket string
	// PrivateFrom is the number of units from which a sweep uses the private socket.
	// Opening it costs PID 1 as much as the calls for so many units cost the bus.
	// Default: 16.
	PrivateFrom int
	// Types are the unit types to list, such as "service".
	Types []string
	// Metered reports whether a unit of any of Types is metered. It is called
	// with valid names only, and must not call the Source.
	Metered func(unit string) bool
	// Balanced reports whether a unit is a slice that is read beside the units in
	// it, metered or not. Under the same conditions as Metered.
	Balanced func(unit string) bool
	// Names are names of units in settings, which may be aliases (Alias=). Before each
	// complete list, Named gets the units' own names by alias. It must not call the
	// Source. Nil: aliases are not resolved.
	Names []string
	Named func(own map[string]string)
	// Known reports whether an earlier Source has read a run. Nil: none.
	Known func(epoch string) bool
	// BootID is the id of this boot. It names the runs of units that have no
	// invocation id.
	BootID string
	// Sink takes the readings. It must not call the Source.
	Sink Sink
	// RelistEvery is how often the units are listed again, for what signals may have
	// missed. Default: 5 minutes.
	RelistEvery time.Duration
	// Logger gets changes of state. Default: none.
	Logger *slog.Logger
}

// Sink takes what a Source reads. Its methods are called one at a time, in the
// order in which things happened, while the Source's lock is held.
type Sink interface {
	// Credit takes a reading. It returns whether a counter was lower than at the
	// last reading of the run.
	Credit(Reading) (fell bool)
	// Restart says that the counters of a run begin again at 0, though they may
	// not be seen to fall.
	Restart(epoch string, at time.Time)
	// Place says that a run has IP accounting, and which slice it is in, empty where
	// nobody knows. It comes once for each run whose start was seen.
	Place(unit, epoch, slice string)
}

// Counters are the four IP accounting counters of one unit, under systemd's
// names (IPIngressBytes, IPIngressPackets, IPEgressBytes, IPEgressPackets).
// Bytes are counted at the IP layer, headers included; packets are counted
// before segmentation offload splits them, so they are not wire packets.
type Counters struct {
	IngressBytes   uint64
	IngressPackets uint64
	EgressBytes    uint64
	EgressPackets  uint64
}

// lower reports whether any of the four counters is below that of d.
func (c Counters) lower(d Counters) bool {
	return c.IngressBytes < d.IngressBytes || c.IngressPackets < d.IngressPackets ||
		c.EgressBytes < d.EgressBytes || c.EgressPackets < d.EgressPackets
}

// Reading is the counters of one run of a unit at one time.
type Reading struct {
	Unit  string
	Epoch string // names the run: its invocation id, or "BOOT/UNIT" without one
	// Slice is the slice of the unit; empty while nobody knows.
	Slice    string
	Counters Counters
	// Start is the moment from which Counters count, as far as systemd says.
	Start time.Time
	// Asked and Time are the moments between which the counters were read.
	Asked, Time time.Time
	// Final says that the run was over by then.
	Final bool
	// Young says that the unit came up after the first list.
	Young bool
	// Unmetered says that the unit is a top-level slice that is not metered.
	Unmetered bool
}

// Unit is the present state of one loaded unit of a metered type.
type Unit struct {
	Name string
	// Accounting is on, off (IPAccounting=no), no_data (nothing to count),
	// lost (systemd lost the counters), failed (reading made no sense) or
	// unknown (not read yet).
	Accounting string
	// Counters are systemd's own, as read last at Time; they count from Start.
	// All three are zero unless Accounting is on.
	Counters    Counters
	Start, Time time.Time
	// Invocation is the id of the run that is counted, empty for the few units
	// that have none.
	Invocation string
	// Slice is the slice that the unit is in, empty before its first reading.
	Slice string
}

// Health counts what went wrong since New.
type Health struct {
	Errors     int64 // failed calls and replies that made no sense
	Refused    int64 // signals that were not systemd's
	Dropped    int64 // signals of systemd that were too many
	Reconnects int64
	Reloads    int64
	Reexecs    int64
	// Reloading is how long reloads and re-executions took, as far as their begin
	// was seen. systemd counts nothing meanwhile.
	Reloading time.Duration
	BadNames  int64 // units skipped for an impossible name
}

// Source reads the IP accounting of systemd's units over D-Bus. Run keeps it
// connected. Its methods may be called from several goroutines at the same time,
// but Read by one at a time.
type Source struct {
	cfg     Config
	log     *slog.Logger
	ready   chan struct{} // closed when the units have been listed once
	learned atomic.Int64  // batches of units whose state has been read
	pace    time.Duration // of the last readings, for one unit; used in Read only
	ends    atomic.Int64  // see Ends

	// mu guards the fields below. It is held while a message is worked into them, and
	// never while systemd is waited for.
	mu  sync.Mutex
	bus *bus.Conn // nil while not connected
	// private is the address to which sweeps of many units go instead; empty for none.
	private string
	broken  error
	listed  bool // the units have been listed once
	// reloadBegan is when systemd last began to reload or re-execute itself, or
	// may have while nobody was connected.
	reloadBegan time.Time
	units       map[string]*unit // the metered units that are loaded, by name
	version     int              // of systemd, the major one; 0 if not known
	said        map[string]int   // what the sweep in progress has logged, see say
	unlisted    map[string]bool  // units that systemd fails to list
	late        bool             // the last sweeps did not reach all units
	health      Health
}

// New returns a Source that is not connected yet.
func New(cfg Config) *Source {
	cfg.Bus = cmp.Or(cfg.Bus, "auto")
	cfg.SystemBus = cmp.Or(cfg.SystemBus, UsualSystemBus)
	cfg.PrivateSocket = cmp.Or(cfg.PrivateSocket, bus.PrivateSocket)
	cfg.RelistEvery = cmp.Or(cfg.RelistEvery, 5*time.Minute)
	cfg.PrivateFrom = cmp.Or(cfg.PrivateFrom, 16)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Known == nil {
		cfg.Known = func(string) bool { return false }
	}
	return &Source{cfg: cfg, log: cfg.Logger, ready: make(chan struct{}), pace: usualPace, units: map[string]*unit{}, said: map[string]int{}, unlisted: map[string]bool{}}
}

// Run connects to systemd and follows its signals until ctx ends, connecting
// again with growing pauses whenever the connection is lost. It returns
// ctx.Err(). It must be called once.
func (s *Source) Run(ctx context.Context) error {
	const shortest, longest = 250 * time.Millisecond, 15 * time.Second
	pause := shortest
	for {
		connected, err := s.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.mu.Lock()
		first := s.broken == nil
		s.broken = err
		s.health.Reconnects++
		s.mu.Unlock()
		if connected {
			pause = shortest
		}
		if first {
			s.log.Warn("lost the connection to systemd; trying again", "err", err)
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
func (s *Source) Ready(ctx context.Context) error {
	select {
	case <-s.ready:
		return nil
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		return errors.Join(s.broken, ctx.Err()) // the cause first
	}
}

// Progress returns a number that grows while the state of units is being read, which
// takes long for many units. It shows whether waiting for Ready makes sense.
func (s *Source) Progress() int64 { return s.learned.Load() }

// Listed reports whether the units have been listed for the first time.
func (s *Source) Listed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.listed
}

// Each calls f for each loaded unit that has a run, and says whether that is
// still being read. f must not call the Source.
func (s *Source) Each(f func(unit, epoch string, reading bool)) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.units {
		if u.run != nil {
			f(u.name, u.run.epoch, u.run.beingRead(now))
		}
	}
}

// Units returns the loaded units of the metered types as they were read last, in
// the order of their names.
func (s *Source) Units() []Unit {
	s.mu.Lock()
	defer s.mu.Unlock()
	units := make([]Unit, 0, len(s.units))
	for _, u := range s.units {
		if u.unmetered {
			continue
		}
		info := Unit{Name: u.name, Accounting: u.state.String(), Invocation: u.status.invocation, Slice: u.slice}
		if u.state == accountingOn {
			info.Counters, info.Start, info.Time = u.run.last, u.run.start, u.run.time
		}
		units = append(units, info)
	}
	slices.SortFunc(units, func(a, b Unit) int { return strings.Compare(a.Name, b.Name) })
	return units
}

// Ends returns how many signals of units that have ended there were since New.
func (s *Source) Ends() int64 { return s.ends.Load() }

// States returns how many units are in each of AccountingStates, in that order.
func (s *Source) States() []int64 {
	counts := make([]int64, accountingCount)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.units {
		if !u.unmetered {
			counts[u.state]++
		}
	}
	return counts
}

// Accounted returns how many units there are and how many of them have counters.
func (s *Source) Accounted() (units, accounted int) {
	counts := s.States()
	for _, n := range counts {
		units += int(n)
	}
	return units, int(counts[accountingOn])
}

// Health returns what went wrong so far.
func (s *Source) Health() Health {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.health
	if s.bus != nil {
		h.Refused += s.bus.Refused()
		h.Dropped += s.bus.Dropped()
	}
	return h
}

// count changes the health.
func (s *Source) count(f func(*Health)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.health)
}
