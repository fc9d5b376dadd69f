package ledger

import (
	"fmt"
	"math"
	"reflect"
	"testing"
	"time"
)

// all returns counters that all have the same value.
func all(v uint64) Counters { return Counters{Traffic{v, v}, Traffic{v, v}} }

func at(seconds int) time.Time { return time.Unix(1e9+int64(seconds), 0) }

func config() Config {
	return Config{MaxSeries: 100, Boot: "boot", Began: at(0), Patterns: []string{"run-*"}, Fold: func(unit string) (string, bool) {
		return "run-*", len(unit) > 4 && unit[:4] == "run-"
	}}
}

func reading(unit, epoch string, second int, c Counters) Reading {
	return Reading{Unit: unit, Epoch: epoch, Counters: c, Start: at(0), Asked: at(second), Time: at(second)}
}

func record(unit, epoch string, second int, c Counters) Record {
	return Record{Unit: unit, Epoch: epoch, Counted: true, Counters: c, Time: at(second), Ended: at(second)}
}

// sweep credits the readings in one sweep; their runs are those that are loaded.
func sweep(l *Ledger, second int, readings ...Reading) State {
	l.Begin()
	for _, r := range readings {
		l.Load(r.Unit)
	}
	for _, r := range readings {
		l.Credit(r)
	}
	for _, r := range readings {
		l.Mark(r.Epoch, true)
	}
	return l.Finish(at(second), true, false)
}

func (s State) find(name string) (found Series, ok bool) {
	for _, s := range s.Series {
		if s.Name == name {
			return s, true
		}
	}
	return found, false
}

func want(t *testing.T, s State, name string, total Counters) Series {
	t.Helper()
	got, ok := s.find(name)
	if !ok || got.Total != total {
		t.Errorf("%s has %+v, want %v", name, got, total)
	}
	return got
}

func TestTotals(t *testing.T) {
	const unit, most = "a.service", math.MaxInt64
	four := func(a, b, c, d uint64) Counters { return Counters{Traffic{a, b}, Traffic{c, d}} }
	read := func(epoch string, second int, c Counters) func(*Ledger) {
		return func(l *Ledger) { l.Credit(reading(unit, epoch, second, c)) }
	}
	stop := func(epoch string, second int, c Counters) func(*Ledger) {
		return func(l *Ledger) { l.Take(record(unit, epoch, second, c), at(second)) }
	}
	restart := func(epoch string, second int) func(*Ledger) {
		return func(l *Ledger) { l.Restart(epoch, at(second)) }
	}
	late := reading(unit, "1", 2, all(7))
	late.Asked, late.Time = at(2), at(9)
	for name, test := range map[string]struct {
		steps  []func(*Ledger)
		want   Counters
		resets int64
	}{
		"first reading":            {[]func(*Ledger){read("1", 1, four(100, 1, 200, 2))}, four(100, 1, 200, 2), 0},
		"growth":                   {[]func(*Ledger){read("1", 1, all(5)), read("1", 2, all(7)), read("1", 3, all(7))}, all(7), 0},
		"another run":              {[]func(*Ledger){read("1", 1, all(5)), read("2", 2, all(7))}, all(12), 0},
		"all fall":                 {[]func(*Ledger){read("1", 1, all(5)), read("1", 2, all(3)), read("1", 3, all(4))}, all(9), 1},
		"to zero":                  {[]func(*Ledger){read("1", 1, all(5)), read("1", 2, all(0)), read("1", 3, all(1))}, all(6), 1},
		"received bytes fall":      {[]func(*Ledger){read("1", 1, all(5)), read("1", 2, four(4, 9, 9, 9))}, four(9, 14, 14, 14), 1},
		"received packets fall":    {[]func(*Ledger){read("1", 1, all(5)), read("1", 2, four(9, 4, 9, 9))}, four(14, 9, 14, 14), 1},
		"sent bytes fall":          {[]func(*Ledger){read("1", 1, all(5)), read("1", 2, four(9, 9, 4, 9))}, four(14, 14, 9, 14), 1},
		"sent packets fall":        {[]func(*Ledger){read("1", 1, all(5)), read("1", 2, four(9, 9, 9, 4))}, four(14, 14, 14, 9), 1},
		"late reading":             {[]func(*Ledger){read("1", 3, all(9)), func(l *Ledger) { l.Credit(late) }, read("1", 10, all(10))}, all(10), 0},
		"restart unseen":           {[]func(*Ledger){read("1", 1, all(5)), restart("1", 2), read("1", 3, all(6))}, all(11), 0},
		"restart before a reading": {[]func(*Ledger){restart("1", 1), read("1", 2, all(6))}, all(6), 0},
		"restart, late reading":    {[]func(*Ledger){read("1", 1, all(5)), restart("1", 3), read("1", 2, all(5)), read("1", 4, all(1))}, all(6), 0},
		"late restart":             {[]func(*Ledger){read("1", 1, all(5)), read("1", 3, all(7)), restart("1", 2), read("1", 4, all(8))}, all(8), 0},
		"record after":             {[]func(*Ledger){read("1", 1, all(5)), stop("1", 2, all(8))}, all(8), 0},
		"record first":             {[]func(*Ledger){stop("1", 2, all(8)), read("1", 1, all(5)), read("1", 3, all(8))}, all(8), 0},
		"record instead":           {[]func(*Ledger){stop("1", 2, all(8)), stop("2", 3, all(1))}, all(9), 0},
		"record twice":             {[]func(*Ledger){stop("1", 2, all(8)), stop("1", 2, all(8))}, all(8), 0},
		"record of less":           {[]func(*Ledger){read("1", 1, all(5)), stop("1", 2, four(1, 9, 1, 9))}, four(5, 9, 5, 9), 0},
		"empty record":             {[]func(*Ledger){read("1", 1, all(5)), stop("1", 2, all(0))}, all(5), 0},
		"the largest":              {[]func(*Ledger){read("1", 1, all(most)), read("1", 2, all(most))}, all(most), 0},
		"over the largest":         {[]func(*Ledger){read("1", 1, all(most)), read("2", 2, all(1))}, all(1), 0},
		"one over the largest":     {[]func(*Ledger){read("1", 1, four(0, 0, most, 0)), read("2", 2, all(2))}, all(2), 0},
	} {
		t.Run(name, func(t *testing.T) {
			l := New(config())
			l.Begin()
			for _, step := range test.steps {
				step(l)
			}
			s := want(t, l.Finish(at(20), false, false), unit, test.want)
			if l.Resets() != test.resets || !s.Observed {
				t.Errorf("%d resets, want %d; %+v", l.Resets(), test.resets, s)
			}
			if name == "over the largest" && !s.Start.Equal(at(1)) {
				t.Errorf("the new total starts at %v, want the last moment of the old one", s.Start)
			}
		})
	}
}

// TestKeepEnded: the last point is repeated while the run is remembered.
func TestKeepEnded(t *testing.T) {
	for keep, shown := range map[time.Duration]bool{0: false, 10 * time.Minute: true} {
		cfg := config()
		cfg.KeepEnded = keep
		l := New(cfg)
		sweep(l, 1, reading("a.service", "1", 1, all(5)))
		if got := want(t, sweep(l, 2), "a.service", all(5)); !got.Observed {
			t.Errorf("no point at the end")
		}
		if got := want(t, sweep(l, 302), "a.service", all(5)); got.Observed != shown {
			t.Errorf("five minutes after the end, KeepEnded %v: %+v", keep, got)
		}
	}
}

// TestKeepEndedMarked: the same for a run that can still be read, and has no news.
func TestKeepEndedMarked(t *testing.T) {
	l := New(config())
	last := reading("a.service", "1", 1, all(5))
	last.Final, last.Slices = true, []string{"system.slice"}
	for second := 1; second < 200; second += 10 {
		l.Begin()
		if second == 1 {
			l.Credit(last)
		}
		l.Mark("1", false)
		s := l.Finish(at(second), true, false)
		for _, name := range []string{"a.service", "system.slice"} {
			if got := want(t, s, name, all(5)); got.Observed != (second <= 121) {
				t.Errorf("%s, %d s after the end: %+v", name, second-1, got)
			}
		}
	}
	l.Begin() // what comes late counts once
	last.Counters, last.Asked, last.Time = all(7), at(300), at(300)
	l.Credit(last)
	l.Mark("1", false)
	want(t, l.Finish(at(300), true, false), "a.service", all(7))
}

// TestOwner: what has an owner has a series of its own, and a run that changes
// hands takes nothing along.
func TestOwner(t *testing.T) {
	owner := OwnerOf(Labels{User: "1000"})
	of := func(owner Owner, unit string, second int, n uint64) Reading {
		r := reading(unit, unit[:1], second, all(n))
		r.Owner = owner
		return r
	}
	total := func(s State, name string, owner Owner) (found Counters) {
		for _, one := range s.Series {
			if one.ID == (ID{Kind: Unit, Name: name, Owner: owner}) {
				found = one.Total
			}
		}
		return found
	}
	l := New(config())
	s := sweep(l, 1, of(Owner{}, "x.service", 1, 5), of(owner, "a.service", 1, 2), of(owner, "run-1", 1, 3), of(OwnerOf(Labels{User: "2"}), "run-2", 1, 4))
	for i, got := range []Counters{total(s, "x.service", Owner{}), total(s, "a.service", owner), total(s, "run-*", owner), total(s, "a.service", Owner{})} {
		if got != []Counters{all(5), all(2), all(7 - 4), {}}[i] {
			t.Errorf("series %d has %+v", i, got)
		}
	}
	// The run of x.service is found to be a user's, in this process or the next one.
	for _, again := range []bool{false, true} {
		if again {
			cfg := config()
			cfg.State = s
			l = New(cfg)
		}
		name := fmt.Sprint("x", again, ".service")
		s = sweep(l, 10, of(owner, name, 10, 9))
		if got := total(s, name, owner); got != all(4) && !again || again && got != (Counters{}) {
			t.Errorf("the owner's has %+v", got)
		}
		if got := total(s, "x.service", Owner{}); got != all(5) {
			t.Errorf("what was there became %+v", got)
		}
	}
	s = sweep(l, 20, of(Owner{}, "x.service", 20, 10))
	if got := total(s, "x.service", Owner{}); got != all(6) {
		t.Errorf("back again it has %+v, want 6", got)
	}
}

// TestSlices: a slice has the growth of all in it, over the limit too, and makes room
// when nothing is in it any more.
func TestSlices(t *testing.T) {
	in := func(unit string, second int, n uint64, slices ...string) Reading {
		r := reading(unit, unit, second, all(n))
		r.Slices = slices
		return r
	}
	cfg := config()
	cfg.MaxSeries = 3
	l := New(cfg)
	hidden := in("h.service", 1, 100, "a.slice")
	hidden.Unmetered = true
	nobody := in("a.slice", 1, 1000, "a.slice")
	nobody.Epoch, nobody.Unattributed = "own", true
	s := sweep(l, 1, in("a.service", 1, 1, "a.slice", "a-b.slice"), in("b.service", 1, 2, "a.slice"), in("c.service", 1, 4, "a.slice", "a-b.slice"), hidden, nobody)
	want(t, s, "a.slice", all(1107))
	want(t, s, "a-b.slice", all(5))
	if s.Overflow == nil || s.Overflow.Total != all(6) {
		t.Errorf("the overflow has %+v, want those of b and c", s.Overflow)
	}
	cfg.State = s
	l = New(cfg)
	s = sweep(l, 2, in("a.service", 2, 11, "a.slice", "a-b.slice"))
	if got := want(t, s, "a.slice", all(1117)); !got.Observed || !got.Start.Equal(at(0)) {
		t.Errorf("a.slice is %+v", got)
	}
	for second := 10; second < 9000; second += 1000 {
		s = sweep(l, second, in(fmt.Sprint(second, ".service"), second, 1, fmt.Sprint(second, ".slice")))
	}
	if _, ok := s.find("a.slice"); ok {
		t.Errorf("a slice without units takes room: %+v", s.Series)
	}
}

// TestMeasureBegins: a measure that was off counts from here.
func TestMeasureBegins(t *testing.T) {
	cfg := config()
	cfg.Measure, cfg.Source, cfg.State = Wire, "ebpf", State{Time: at(10)}
	l := New(cfg)
	young := reading("b.service", "2", 12, all(7))
	young.Start, young.Young = at(11), true
	s := sweep(l, 12, reading("a.service", "1", 12, all(5)), young)
	if got := want(t, s, "a.service", Counters{}); !got.Start.Equal(at(12)) || got.Measure != Wire {
		t.Errorf("it begins as %+v", got)
	}
	want(t, s, "b.service", all(7))
	s = sweep(l, 13, reading("a.service", "1", 13, all(8)))
	want(t, s, "a.service", all(3))
	cfg.State = s
	want(t, sweep(New(cfg), 14, reading("a.service", "1", 14, all(9))), "a.service", all(4))
}

// TestLateRecord: the record of a run that has been forgotten is refused, those of
// runs that ended before or since are not.
func TestLateRecord(t *testing.T) {
	l := New(config())
	sweep(l, 1, reading("a.service", "1", 1, all(100)))
	sweep(l, 2) // it has gone
	if s := sweep(l, 200); len(s.Runs) != 0 || l.Missed() != 1 || l.Known("1") {
		t.Fatalf("it remembers %+v; %d missed", s.Runs, l.Missed())
	}
	if l.Take(record("a.service", "1", 2, all(100)), at(201)) || l.Missed() != 2 {
		t.Errorf("took it; %d missed, want 2", l.Missed())
	}
	// Of a run there may be two records, of which the first has no counters.
	end := record("a.service", "1", 2, Counters{})
	end.Counted = false
	l.Take(end, at(201))
	if l.Take(record("a.service", "1", 2, all(100)), at(201)) || l.Missed() != 3 {
		t.Errorf("took the second record; %d missed, want 3", l.Missed())
	}
	if !l.Take(record("a.service", "2", 201, all(1)), at(201)) || !l.Take(record("a.service", "0", -9, all(2)), at(201)) {
		t.Error("refused a record of a run that it cannot have counted")
	}
	want(t, sweep(l, 202), "a.service", all(103))
}

func TestEarlierBoot(t *testing.T) {
	state := sweep(New(config()), 1, reading("a.service", "1", 1, all(5)))
	cfg := config()
	cfg.Boot, cfg.Began, cfg.State = "next", at(100), state
	l := New(cfg)
	for _, r := range []Record{record("a.service", "1", 50, all(8)), record("b.service", "2", 60, all(3))} {
		r.Boot = "boot"
		l.Take(r, at(101))
	}
	s := sweep(l, 102, reading("a.service", "3", 102, all(1)))
	want(t, s, "a.service", all(9))
	if b := want(t, s, "b.service", all(3)); !b.Start.Equal(state.Time) || !b.Time.Equal(at(60)) {
		t.Errorf("b.service begins at %v and ends at %v", b.Start, b.Time)
	}
}

func TestFold(t *testing.T) {
	l := New(config())
	var members []Reading
	for i := range 10 {
		r := reading(fmt.Sprintf("run-%d.service", i), fmt.Sprint(i), 20, all(uint64(1+i)))
		r.Start = at(19 - i)
		members = append(members, r)
	}
	if s := want(t, sweep(l, 20, members...), "run-*", all(55)); !s.Start.Equal(at(10)) || len(l.order) != 1 {
		t.Errorf("the fold starts at %v", s.Start)
	}
	if s := want(t, sweep(l, 21), "run-*", all(55)); !s.Observed || !s.Time.Equal(at(20)) {
		t.Errorf("at the end of its members: %+v", s)
	}
	if s := want(t, sweep(l, 7200), "run-*", all(55)); !s.Observed || !s.Time.Equal(at(7200)) {
		t.Errorf("without members: %+v", s)
	}
}

func TestLimit(t *testing.T) {
	cfg := config()
	cfg.MaxSeries = 3
	l := New(cfg)
	var readings []Reading
	for _, slice := range []string{"system.slice", "user.slice"} {
		r := reading(slice, slice, 1, all(9))
		r.Unmetered = true
		readings = append(readings, r)
	}
	for i, unit := range []string{"a.service", "b.service", "c.service"} {
		readings = append(readings, reading(unit, unit, 1+i, all(uint64(i+1))))
	}
	s := sweep(l, 5, readings...)
	if want(t, s, "c.service", all(3)); s.Overflow != nil || l.Size() != 5 {
		t.Fatalf("slices use up the limit: %+v", s)
	}
	d := reading("d.service", "d", 6, all(4))
	s = sweep(l, 6, append(readings, d)...)
	if s.Overflow == nil || s.Overflow.Total != all(4) || !s.Overflow.Observed || l.Size() != 6 {
		t.Fatalf("the overflow series is %+v", s.Overflow)
	}
	sweep(l, 7, readings[4])                    // a and b have gone
	sweep(l, 200, readings[4])                  // and are not remembered
	e := reading("e.service", "e", 201, all(5)) // takes the place of a, the oldest
	s = sweep(l, 201, readings[4], e)
	want(t, s, "e.service", all(5))
	want(t, s, "b.service", all(2))
	if _, ok := s.find("a.service"); ok {
		t.Error("a.service was not evicted")
	}
}

func TestBalance(t *testing.T) {
	for name, test := range map[string]struct {
		slice string
		units uint64 // growth of the unit after the slice was read
		want  uint64 // unattributed in the end
	}{
		"unit shows all":  {"system.slice", 10, 0},
		"unit shows some": {"system-a.slice", 4, 6},
		"nobody":          {"system.slice", 0, 10},
		"unknown slice":   {"", 4, 6},
		"another slice":   {"user.slice", 10, 10},
		"root slice":      {"-.slice", 10, 10},
	} {
		t.Run(name, func(t *testing.T) {
			l := New(config())
			step := func(second int, slice, unit uint64) Counters {
				top, u := reading("system.slice", "s", second, all(slice)), reading("a.service", "1", second, all(unit))
				top.Unmetered, u.Slice = true, test.slice
				s := sweep(l, second, top, u)
				if _, ok := s.find("system.slice"); ok || s.Balances[0].Slice != "system.slice" {
					t.Fatalf("the balances are %+v", s.Balances)
				}
				return s.Balances[0].Unattributed.Total
			}
			step(1, 1000, 0) // of the time before, nothing is known
			if got := step(2, 1010, 0); got != all(0) {
				t.Errorf("unattributed at once: %v", got)
			}
			step(3, 1010, test.units)
			if got := step(40, 1010, test.units); got != all(test.want) {
				t.Errorf("unattributed are %v, want %d", got, test.want)
			}
			if got := step(80, 1010, test.units); got != all(test.want) {
				t.Errorf("unattributed later are %v, want %d", got, test.want)
			}
		})
	}
}

func TestRestore(t *testing.T) {
	good := Series{ID: ID{Kind: Unit, Name: "a.service"}, Total: all(5), Start: at(1), Time: at(9)}
	run := Run{Unit: "a.service", Epoch: "1", Boot: "boot", Series: "a.service", Last: all(5), Time: at(9)}
	bad := Series{ID: ID{Kind: Unit, Name: "b.service"}, Total: Counters{Sent: Traffic{Bytes: 1 << 63}}}
	ahead := Balance{Slice: "system.slice", Unattributed: Series{Total: all(3)}, Ahead: all(1), Waiting: all(9)}
	for name, test := range map[string]struct {
		state State
		want  Counters // of a.service after a reading of 7
	}{
		"same run":         {State{Series: []Series{good}, Runs: []Run{run}}, all(7)},
		"no run":           {State{Series: []Series{good}}, all(12)},
		"no series":        {State{Runs: []Run{run}}, all(2)},
		"duplicate":        {State{Series: []Series{good, {ID: ID{Kind: Unit, Name: "a.service"}, Total: all(99)}}, Runs: []Run{run}}, all(7)},
		"impossible total": {State{Series: []Series{bad, good}, Runs: []Run{run}}, all(7)},
		"clock set back":   {State{Series: []Series{{ID: ID{Kind: Unit, Name: "a.service"}, Total: all(5), Start: at(1), Time: at(9e6)}}, Runs: []Run{{Unit: "a.service", Epoch: "1", Boot: "boot", Series: "a.service", Last: all(5), Time: at(9e6)}}}, all(7)},
		"the rest":         {State{Series: []Series{good}, Runs: []Run{run}, Overflow: &Series{Total: all(4)}, Balances: []Balance{ahead}, Journal: Position{"c", "b"}}, all(7)},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config()
			cfg.Began, cfg.State = at(100), test.state
			l := New(cfg)
			s := sweep(l, 102, reading("a.service", "1", 101, all(7)))
			want(t, s, "a.service", test.want)
			if l.Journal() != test.state.Journal || len(s.Series) != 1 {
				t.Errorf("the state is %+v", s)
			}
			if o := test.state.Overflow; o != nil && (s.Overflow == nil || s.Overflow.Total != o.Total) {
				t.Errorf("the overflow series is %+v", s.Overflow)
			}
			if len(test.state.Balances) > 0 && (len(s.Balances) != 1 || s.Balances[0].Waiting != all(7) || s.Balances[0].Unattributed.Total != all(3)) {
				t.Errorf("the balances are %+v", s.Balances)
			}
		})
	}
}

// TestOutage: a run that was remembered for less than an hour goes on.
func TestOutage(t *testing.T) {
	cfg := config()
	cfg.State = sweep(New(config()), 1, reading("a.service", "1", 1, all(5)))
	cfg.Began = at(1000)
	l := New(cfg)
	for second := 1001; second < 4500; second += 600 {
		sweep(l, second) // the unit is not listed
	}
	if !l.Known("1") || l.Known("2") {
		t.Error("the run was not kept for an hour")
	}
	want(t, sweep(l, 4501, reading("a.service", "1", 4501, all(6))), "a.service", all(6))
	if c := all(6).Max(Counters{Sent: Traffic{9, 1}}); !reflect.DeepEqual(c.Sent, Traffic{9, 6}) {
		t.Errorf("max is %v", c)
	}
}

// TestAhead: what a unit shows before its slice does is not unattributed later. A
// run of an earlier boot is no part of what the slices of this one count.
func TestAhead(t *testing.T) {
	for name, test := range map[string]struct {
		slice, boot string
		want        uint64
	}{"known slice": {"system.slice", "", 0}, "unknown slice": {"", "", 0}, "earlier boot": {"", "earlier", 5}} {
		l := New(config())
		top := func(second int, n uint64) State {
			r := reading("system.slice", "s", second, all(n))
			r.Unmetered = true
			return sweep(l, second, r)
		}
		top(1, 1000)
		if test.slice != "" {
			l.Place("a.service", "1", test.slice)
		}
		r := record("a.service", "1", 2, all(5))
		r.Boot = test.boot
		l.Take(r, at(2))
		top(3, 1005)
		top(40, 1005)
		if got := top(80, 1005).Balances[0].Unattributed.Total; got != all(test.want) {
			t.Errorf("%s: unattributed are %v, want %d", name, got, test.want)
		}
	}
}

func TestOverflowIsRestored(t *testing.T) {
	cfg := config()
	cfg.MaxSeries = 1
	a, b := reading("a.service", "1", 1, all(5)), reading("b.service", "2", 1, all(3))
	cfg.State = sweep(New(cfg), 2, a, b)
	cfg.Began, cfg.MaxSeries = at(3), 2 // there would be room now
	a, b = reading("a.service", "1", 4, all(6)), reading("b.service", "2", 4, all(7))
	s := sweep(New(cfg), 5, a, b)
	if want(t, s, "a.service", all(6)); s.Overflow == nil || s.Overflow.Total != all(7) || len(s.Series) != 1 {
		t.Errorf("the state is %+v", s)
	}
}

// TestEvictionSparesTheLoaded: a loaded unit has its series before the first
// reading of its new run.
func TestEvictionSparesTheLoaded(t *testing.T) {
	cfg := config()
	cfg.MaxSeries = 1
	l := New(cfg)
	sweep(l, 1, reading("a.service", "1", 1, all(5)))
	sweep(l, 2)
	sweep(l, 200)
	l.Begin()
	l.Load("a.service")
	l.Credit(reading("b.service", "3", 201, all(1)))
	if s := l.Finish(at(201), true, true); s.Overflow == nil {
		t.Errorf("no overflow: %+v", s)
	} else {
		want(t, s, "a.service", all(5))
	}
}

// TestRecordIsShown: what a record adds has a point for as long as others, and
// never one that backends refuse as old.
func TestRecordIsShown(t *testing.T) {
	l := New(config())
	sweep(l, 1, reading("a.service", "1", 1, all(5)))
	sweep(l, 2)
	l.Take(record("a.service", "1", 2, all(7)), at(110))
	sweep(l, 111)
	if s := want(t, sweep(l, 200), "a.service", all(7)); !s.Observed {
		t.Error("the point is gone before KeepEnded")
	}
	l.Take(record("b.service", "2", 201, all(7)), at(900))
	if s := want(t, sweep(l, 901), "b.service", all(7)); !s.Time.Equal(at(901)) {
		t.Errorf("its point is of %v", s.Time)
	}
}

// TestSwitched: another source has counted the same traffic until the State.
// An agent is killed when it has committed a reading of a run, of which the stop record
// is from before the reading arrived. What the record adds must not change the point
// that was committed: nobody would take it, and deltas go on from the committed total.
func TestRecordBeforeTheCommittedReading(t *testing.T) {
	cfg := config()
	l := New(cfg)
	cfg.State = sweep(l, 20, reading("a.service", "one", 20, all(3)))
	cfg.Began = at(30)
	l = New(cfg)
	l.Take(record("a.service", "one", 19, all(9)), at(31))
	a := want(t, sweep(l, 32), "a.service", all(9))
	if !a.Observed || !a.Time.After(at(20)) {
		t.Errorf("the point of %v is shown again, with another total: %+v", at(20), a)
	}
}

func TestSwitched(t *testing.T) {
	first := New(config())
	sweep(first, 1, reading("a.service", "1", 1, all(5)), reading("run-x", "2", 1, all(7)))
	state := sweep(first, 10, reading("a.service", "1", 10, all(6)), reading("run-x", "2", 10, all(7)))

	cfg := config()
	cfg.State, cfg.Source, cfg.Began = state, "other", at(11)
	l := New(cfg)
	young, late := reading("a.service", "young", 12, all(100)), reading("a.service", "late", 12, all(1000))
	young.Young = true
	late.Start = at(11)
	lost := reading("-.slice", "lost", 12, all(3))
	lost.Unattributed = true
	owned := reading("c.service", "owned", 12, all(70)) // the other source counted it elsewhere
	owned.Owner = OwnerOf(Labels{User: "1000"})
	s := sweep(l, 12,
		reading("a.service", "other", 12, all(50)), // counted by both
		young, late, // since the State
		reading("run-y", "fold", 12, all(60)), // of a fold that both know
		reading("b.service", "b", 12, all(9)), // that the other source did not count
		owned, lost)
	want(t, s, "a.service", all(1106))
	want(t, s, "run-*", all(7))
	want(t, s, "b.service", all(9))
	if got := want(t, s, "c.service", Counters{}); !got.Start.Equal(at(12)) {
		t.Errorf("it begins at %v", got.Start)
	}
	if l.Take(record("a.service", "1", 13, all(8)), at(13)); l.Known("2") {
		t.Error("a run of the other source is known")
	}
	s = sweep(l, 14, reading("a.service", "other", 14, all(52)), reading("run-y", "fold", 14, all(61)))
	want(t, s, "a.service", all(1116)) // what came after the first sweep counts
	want(t, s, "run-*", all(8))
	if s.Balances[0].Unattributed.Total != (Counters{}) {
		t.Errorf("%+v is unattributed, and both sources may have counted it", s.Balances[0])
	}

	cfg.State = s
	again := New(cfg)
	lost.Asked, lost.Time, lost.Counters = at(16), at(16), all(10)
	s = sweep(again, 16, reading("a.service", "other", 16, all(53)), lost)
	want(t, s, "a.service", all(1117))
	if got := s.Balances[0].Unattributed; got.Total != all(7) || !got.Observed || got.Name != "-.slice" {
		t.Errorf("%+v is unattributed, want 7 in -.slice", got)
	}
}

// TestSwitchedRecord: a run may end before the first sweep after a switch.
func TestSwitchedRecord(t *testing.T) {
	cfg := config()
	cfg.State = sweep(New(config()), 10, reading("a.service", "1", 10, all(6)))
	cfg.Source, cfg.Began = "other", at(11)
	l := New(cfg)
	l.Take(record("a.service", "2", 12, all(8)), at(12))
	l.Take(record("b.service", "3", 12, all(8)), at(12))
	s := sweep(l, 13)
	want(t, s, "a.service", all(6))
	want(t, s, "b.service", all(8))
	l.Take(record("a.service", "4", 14, all(8)), at(14))
	want(t, sweep(l, 15), "a.service", all(14))
}
