package accounting

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// Reading is one unit with its counters and, over an interval, their speeds.
type Reading struct {
	systemd.Unit
	// Masked says that systemd changes no settings of the unit.
	Masked bool
	// Speed is in bytes or packets per second, in the order of Values; nil where
	// it is not known.
	Speed *[4]float64
}

// Values are the counters of a unit: bytes and packets received, bytes and
// packets sent.
func Values(c systemd.Counters) [4]uint64 {
	return [4]uint64{c.IngressBytes, c.IngressPackets, c.EgressBytes, c.EgressPackets}
}

// Source is where a command takes its readings from: systemd over D-Bus, or an eBPF
// program. It belongs to one goroutine.
type Source struct {
	Origin
	rcv   *receiver.Receiver
	stop  func()
	first *Sweep // until Read returns it
}

// Origin says who counts, and since when.
type Origin struct {
	receiver.Counting
	// Refused is why no program counts for this command alone; nil where one does, or
	// need not.
	Refused error
}

// Sweep is one reading of all units.
type Sweep struct {
	Time    time.Time
	Units   []systemd.Unit
	Partial bool // some could not be read
}

// Sources are the values of --source.
func Sources() []string { return []string{receiver.Auto, receiver.DBus, receiver.EBPF} }

// Open opens a source by its name in Sources, and reads it once. Auto takes the
// counters of a loaded eBPF program. Without one it takes systemd's, if that counts
// all units that match any of the patterns, or no fewer units than it leaves out.
// Else Auto attaches a program, which ends with Close or with the process. The caller
// closes the source.
func Open(ctx context.Context, cfg receiver.Config, name string, patterns systemd.Patterns) (*Source, error) {
	if name != receiver.Auto {
		return open(ctx, cfg, name)
	}
	s, err := open(ctx, cfg, receiver.Auto)
	if err == nil && (s.Source == receiver.EBPF || !s.first.sparse()) {
		return s, nil
	}
	if err == nil && patterns.Len() > 0 {
		// Where systemd has ended meanwhile, a program may count all the same.
		if wanted, err := Resolve(ctx, cfg, patterns); err == nil && s.first.counts(wanted) {
			return s, nil
		}
	}
	own, ownErr := open(ctx, cfg, receiver.EBPF)
	switch {
	case ownErr == nil && err == nil:
		s.Close()
		return own, nil
	case ownErr == nil:
		return own, nil
	case err == nil:
		s.Refused = ownErr
		return s, nil
	case os.Geteuid() == 0:
		err = errors.Join(err, ownErr)
	}
	return nil, err
}

// open starts a receiver that only looks, and reads it once.
func open(ctx context.Context, cfg receiver.Config, name string) (*Source, error) {
	cfg.Source = name
	cfg.StopRecords = "off" // nothing is left running behind
	cfg.ReadOnly = true
	if name != receiver.DBus { // each unit by itself
		cfg.Fold, cfg.MaxSeries = []string{}, math.MaxInt
		cfg.UserUnits, cfg.Containers, cfg.Wire, cfg.Loopback = true, true, false, false
	}
	r, err := receiver.New(cfg)
	if err != nil {
		return nil, err
	}
	running, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() { _ = r.Run(running) }) // it ends with running and nothing else
	s := &Source{rcv: r, stop: func() { cancel(); done.Wait() }}
	if r.Counting().Source == receiver.DBus {
		err = reachable(ctx, cfg)
	}
	if err == nil {
		err = ready(ctx, r)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	first := s.Read(ctx)
	s.first, s.Counting = &first, r.Counting() // known only now
	return s, nil
}

// ready waits until all units have been listed, as long as there is progress.
func ready(ctx context.Context, r *receiver.Receiver) error {
	for {
		before := r.Progress()
		waiting, end := context.WithTimeout(ctx, connectTimeout)
		err := r.Ready(waiting)
		end()
		if err == nil || ctx.Err() != nil || r.Progress() == before {
			return err
		}
	}
}

// reachable is an error at once where there is no systemd. The receiver would wait
// for one.
func reachable(ctx context.Context, cfg receiver.Config) error {
	ctx, end := context.WithTimeout(ctx, connectTimeout)
	defer end()
	m, err := Connect(ctx, cfg.Addresses()...)
	if err == nil {
		m.Close()
	}
	return Explain(err)
}

// Explain adds to an error of Connect that there is no systemd on this host, if that
// is so.
func Explain(err error) error {
	// sd_booted(3)
	if _, missing := os.Lstat("/run/systemd/system"); err != nil && errors.Is(missing, fs.ErrNotExist) {
		return fmt.Errorf("%w; this host does not run systemd (there is no /run/systemd/system)", err)
	}
	return err
}

// Close ends the source.
func (s *Source) Close() { s.stop() }

// Read reads all units. The first call returns what Open has read. With EBPF the
// units whose Accounting is "ended" are those without a cgroup.
func (s *Source) Read(ctx context.Context) Sweep {
	if first := s.first; first != nil {
		s.first = nil
		return *first
	}
	swept := s.rcv.Sweep(ctx)
	return Sweep{swept.Time, s.rcv.Units(), swept.Partial}
}

// all reads all units, in as many sweeps as it takes. It is an error if one of them has
// nothing new.
func (s *Source) all(ctx context.Context) (Sweep, error) {
	began := time.Now()
	for before := -1; ; {
		sweep := s.Read(ctx)
		missing := 0
		for _, u := range sweep.Units {
			if u.Accounting == "unknown" || u.Accounting == "on" && u.Time.Before(began) {
				missing++
			}
		}
		if !sweep.Partial || ctx.Err() != nil || before >= 0 && missing >= before {
			return sweep, cmp.Or(ctx.Err(), sweep.Err())
		}
		before = missing
	}
}

// sparse reports whether more units are off than on, of those that carry traffic.
func (s *Sweep) sparse() bool {
	off, on := 0, 0
	for _, u := range s.Units {
		switch {
		case u.Accounting == "on" && CarriesTraffic(u.Name):
			on++
		case u.Accounting == "off" && CarriesTraffic(u.Name):
			off++
		}
	}
	return off > on
}

// counts reports whether each pattern has a unit, and each of these has counters.
func (s *Sweep) counts(patterns systemd.Patterns) bool {
	found := make([]bool, patterns.Len())
	for _, u := range s.Units {
		for _, i := range patterns.All(u.Name) {
			found[i] = true
			if !Counted(u) {
				return false
			}
		}
	}
	return !slices.Contains(found, false)
}

// Err is the error of a command that needs all units.
func (s *Sweep) Err() error {
	if s.Partial {
		return errors.New("read all units: not all of them could be read in time; raise UNITMETER_SWEEP_TIMEOUT, or see \"unitmeter doctor\"")
	}
	return nil
}

// String says who counts, and since when.
func (o Origin) String() string {
	switch {
	case o.Source == receiver.DBus:
		return "by systemd"
	case o.Own:
		return "by eBPF since " + o.Since.Local().Format(time.TimeOnly)
	}
	return "by eBPF since " + o.Since.Local().Format("2006-01-02 15:04")
}

// Hint is how to see more, empty where there is nothing more.
func (o Origin) Hint() string {
	switch {
	case o.Nameless:
		return "the kernel does not name cgroups: units that end between two readings are in " + receiver.Unattributed
	case o.Own:
		return "to keep counting: unitmeter enable --ebpf"
	case o.Refused == nil:
		return ""
	case os.Geteuid() != 0:
		return "as root, every unit is shown, with nothing switched on"
	}
	return "every unit would be shown, but eBPF cannot count here: " + tty.Line(o.Refused)
}

// Readings are those of the units that Read was asked for.
type Readings struct {
	Origin
	Units  []Reading
	Speeds bool // there are two readings
}

// Read reads the units of a source that match any of the patterns, and all units
// without patterns. With an interval above zero it reads twice and computes speeds.
// Where the counting begins with this call, it does so over a second by default.
func Read(ctx context.Context, cfg receiver.Config, source string, patterns systemd.Patterns, interval time.Duration) (*Readings, error) {
	s, err := Open(ctx, cfg, source, patterns)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	now, err := s.all(ctx)
	if err != nil {
		return nil, err
	}
	if s.Own && interval == 0 {
		interval = time.Second
	}
	var before Sweep
	if interval > 0 {
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		before = now
		if now, err = s.all(ctx); err != nil {
			return nil, err
		}
	}
	units, err := Choose(ctx, cfg, s.Source, readings(before, now), patterns)
	return &Readings{s.Origin, units, interval > 0}, err
}

// readings are the units of a sweep. They have speeds where there is one before.
func readings(before, now Sweep) []Reading {
	old := make(map[string]systemd.Unit, len(before.Units))
	for _, u := range before.Units {
		old[u.Name] = u
	}
	list := make([]Reading, 0, len(now.Units))
	for _, u := range now.Units {
		r := Reading{Unit: u}
		growth, from, known := Growth(old[u.Name], u, before.Time)
		if seconds := u.Time.Sub(from).Seconds(); known && seconds > 0 {
			r.Speed = new([4]float64)
			for i, n := range growth {
				r.Speed[i] = float64(n) / seconds
			}
		}
		if Shown(u, growth) {
			list = append(list, r)
		}
	}
	return list
}

// Growth returns the growth of a unit's counters, and since when. since is the time of
// the last reading of all units, zero for none. ok is false where the growth is unknown:
// at the first reading, where a counter fell, and without counters.
func Growth(old, now systemd.Unit, since time.Time) (growth [4]uint64, from time.Time, ok bool) {
	switch {
	case !Counted(now):
		return growth, from, false
	case Counted(old) && old.Invocation == now.Invocation:
		before, after := Values(old.Counters), Values(now.Counters)
		for i := range growth {
			if after[i] < before[i] { // systemd lost it, or accounting was switched
				return [4]uint64{}, from, false
			}
			growth[i] = after[i] - before[i]
		}
		return growth, old.Time, true
	}
	if since.IsZero() || now.Start.Before(since) {
		return growth, from, false
	}
	return Values(now.Counters), since, true // a new run: all of it came since then
}

// Counted reports whether a unit has counters.
func Counted(u systemd.Unit) bool { return u.Accounting == "on" || u.Accounting == "ended" }

// Shown reports whether a unit is worth a row: it exists, or it has grown.
func Shown(u systemd.Unit, growth [4]uint64) bool {
	return u.Accounting != "ended" || growth != [4]uint64{}
}

// Choose keeps the units that match any of the patterns, and all units without
// patterns. A pattern without a unit is an error. It asks systemd what the readings of
// a source do not say; eBPF needs no systemd.
func Choose(ctx context.Context, cfg receiver.Config, source string, units []Reading, patterns systemd.Patterns) ([]Reading, error) {
	m, err := Connect(ctx, cfg.Addresses()...)
	switch {
	case err == nil:
		defer m.Close()
	case source == receiver.EBPF:
		return choose(units, patterns)
	default:
		return nil, err
	}
	masked, err := m.rows(ctx, []string{"masked"}, "*")
	if err != nil {
		return nil, err
	}
	for i := range units {
		units[i].Masked = slices.ContainsFunc(masked, func(r systemd.Listed) bool { return r.Name == units[i].Name })
	}
	return choose(units, patterns.Named(m.own(ctx, patterns.Texts())))
}

func choose(units []Reading, patterns systemd.Patterns) ([]Reading, error) {
	used := make([]bool, patterns.Len())
	chosen := slices.DeleteFunc(units, func(u Reading) bool {
		all := patterns.All(UnitName(u.Name))
		for _, i := range all {
			used[i] = true
		}
		return patterns.Len() > 0 && len(all) == 0
	})
	for i, p := range patterns.Texts() {
		if !used[i] {
			return nil, fmt.Errorf("find unit %q: it is not running, or not among the metered units; see \"systemctl status %s\", UNITMETER_INCLUDE and UNITMETER_UNIT_TYPES", p, p)
		}
	}
	return chosen, nil
}
