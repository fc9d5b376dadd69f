package ledger

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// observed is a reading or a stop record that counts, as the model keeps it.
type observed struct {
	counters Counters
	at       time.Time
}

// model is the truth beside a Ledger: it never forgets, and adds up from scratch.
type model struct {
	seen    map[string][]observed // by epoch
	unit    map[string]string     // by epoch
	evicted Counters
	limited bool // a series was evicted or went over the limit
}

func (m model) clone() model {
	m.seen, m.unit = maps.Clone(m.seen), maps.Clone(m.unit)
	return m
}

func (m *model) note(unit, epoch string, c Counters, at time.Time) {
	m.seen[epoch], m.unit[epoch] = append(slices.Clip(m.seen[epoch]), observed{c, at}), unit
}

func (m *model) last(epoch string) (last observed, ok bool) {
	if n := len(m.seen[epoch]); n > 0 {
		return m.seen[epoch][n-1], true
	}
	return last, false
}

// sums adds the last of each stretch of a run in which no counter fell.
func (m *model) sums() (byName map[string]Counters, total Counters) {
	byName = map[string]Counters{}
	for epoch, seen := range m.seen {
		for i, o := range seen {
			if i+1 < len(seen) {
				if _, fell := seen[i+1].counters.Minus(o.counters); !fell {
					continue
				}
			}
			name := foldF(m.unit[epoch])
			byName[name] = byName[name].Plus(o.counters)
			total = total.Plus(o.counters)
		}
	}
	return byName, total
}

func foldF(unit string) string {
	if strings.HasPrefix(unit, "f") {
		return "f*"
	}
	return unit
}

type fuzzUnit struct {
	name, epoch string
	raw         Counters
	started     time.Time
}

// fuzzHost is a host with units, a journal and an agent.
type fuzzHost struct {
	t       *testing.T
	now     time.Time
	boot    int
	epochs  int
	units   []*fuzzUnit
	slice   Counters // of this boot
	counted Counters // by the slices of all boots
	journal []Record
	flying  []Reading // on the way to the ledger
	limit   int
	began   time.Time
	ledger  *Ledger
	model   model
	states  []State
	models  []model
}

func (h *fuzzHost) agent(state State) {
	h.began, h.flying = h.now, nil
	h.ledger = New(Config{
		MaxSeries: h.limit, Boot: strconv.Itoa(h.boot), Began: h.now, State: state, Patterns: []string{"f*"},
		Fold: func(unit string) (string, bool) { return "f*", foldF(unit) != unit },
	})
}

func (h *fuzzHost) start(u *fuzzUnit) {
	h.epochs++
	u.epoch, u.raw, u.started = fmt.Sprint("run", h.epochs), Counters{}, h.now
}

func (h *fuzzHost) stop(u *fuzzUnit, logged bool) {
	if u.epoch != "" && logged {
		h.journal = append(h.journal, Record{
			Unit: u.name, Epoch: u.epoch, Boot: strconv.Itoa(h.boot), Counted: true, Counters: u.raw, Time: h.now, Ended: h.now,
		})
	}
	u.epoch = ""
}

func (h *fuzzHost) reading(u *fuzzUnit) Reading {
	h.now = h.now.Add(time.Millisecond)
	return Reading{
		Unit: u.name, Epoch: u.epoch, Slice: "system.slice", Counters: u.raw,
		Start: u.started, Asked: h.now.Add(-time.Millisecond), Time: h.now,
	}
}

func (h *fuzzHost) credit(reading Reading) {
	last, ok := h.model.last(reading.Epoch)
	fell := h.ledger.Credit(reading)
	if ok && last.at.After(reading.Asked) {
		if fell {
			h.t.Fatal("a late reading fell")
		}
		return
	}
	h.model.note(reading.Unit, reading.Epoch, reading.Counters, reading.Time)
}

// take hands the next records to the ledger.
func (h *fuzzHost) take(n int) {
	for at, _ := strconv.Atoi(h.ledger.Journal().Cursor); n > 0 && at < len(h.journal); n-- {
		record := h.journal[at]
		at++
		h.ledger.SetJournal(Position{Cursor: strconv.Itoa(at), Boot: strconv.Itoa(h.boot)})
		if record.Boot == strconv.Itoa(h.boot) {
			record.Boot = ""
		}
		last, seen := h.model.last(record.Epoch)
		if seen && !h.ledger.Known(record.Epoch) && !record.Ended.After(h.began) {
			continue // forgotten by the Ledger before this one: nothing says that it is counted
		}
		if record.Counters == (Counters{}) {
			h.ledger.Take(record, h.now)
			continue
		}
		switch known, took := h.ledger.Known(record.Epoch), h.ledger.Take(record, h.now); {
		case took && seen && !known:
			h.t.Fatalf("took the record of %s, which it has forgotten", record.Epoch)
		case took:
			at := record.Time
			if seen && last.at.After(at) {
				at = last.at
			}
			h.model.note(record.Unit, record.Epoch, record.Counters.Max(last.counters), at)
		case known || h.now.Sub(record.Ended) <= keepEnded:
			h.t.Fatalf("refused the record of %s, %v after its end", record.Epoch, h.now.Sub(record.Ended))
		}
	}
}

func (h *fuzzHost) sweep(skip byte) {
	h.ledger.Begin()
	for _, u := range h.units {
		if u.epoch != "" {
			h.ledger.Load(u.name)
		}
	}
	h.now = h.now.Add(time.Millisecond)
	h.ledger.Credit(Reading{
		Unit: "system.slice", Epoch: fmt.Sprint("boot", h.boot), Counters: h.slice, Start: h.began,
		Asked: h.now, Time: h.now, Unmetered: true,
	})
	for i, u := range h.units {
		if u.epoch != "" && skip&(1<<i) == 0 {
			h.credit(h.reading(u))
		}
	}
	for _, u := range h.units {
		if u.epoch != "" {
			h.ledger.Mark(u.epoch, true)
		}
	}
	h.now = h.now.Add(time.Millisecond)
	h.check(h.ledger.Finish(h.now, true, skip != 0))
}

func (h *fuzzHost) check(state State) {
	type key struct {
		name  string
		start int64
	}
	now := map[key]Counters{}
	all := slices.Clone(state.Series)
	if state.Overflow != nil {
		all, h.model.limited = append(all, *state.Overflow), true
	}
	var total Counters
	for _, s := range all {
		k := key{s.Name, s.Start.UnixNano()}
		if _, twice := now[k]; twice {
			h.t.Fatalf("the series %s is there twice", s.Name)
		}
		now[k] = s.Total
		total = total.Plus(s.Total)
		if s.Start.After(s.Time) || s.Time.After(state.Time) {
			h.t.Fatalf("the point of %+v is not within its time, now %v", s, state.Time)
		}
	}
	before := State{}
	if n := len(h.states); n > 0 {
		before = h.states[n-1]
	}
	old := slices.Clone(before.Series)
	if before.Overflow != nil {
		old = append(old, *before.Overflow)
	}
	for _, s := range old {
		total, ok := now[key{s.Name, s.Start.UnixNano()}]
		if _, fell := total.Minus(s.Total); ok && fell {
			h.t.Fatalf("the total of %s went from %v to %v", s.Name, s.Total, total)
		}
		if !ok {
			h.model.evicted, h.model.limited = h.model.evicted.Plus(s.Total), true
		}
	}
	byName, want := h.model.sums()
	if got := total.Plus(h.model.evicted); got != want {
		h.t.Fatalf("all series have %v, want %v\n%+v\n%+v", got, want, state, h.model)
	}
	for _, s := range state.Series {
		if !h.model.limited && s.Total != byName[s.Name] {
			h.t.Fatalf("%s has %v, want %v", s.Name, s.Total, byName[s.Name])
		}
	}
	if len(state.Series) > h.limit {
		h.t.Fatalf("%d series, limit %d", len(state.Series), h.limit)
	}
	for _, b := range state.Balances {
		if _, more := h.counted.Minus(b.Unattributed.Total); more {
			h.t.Fatalf("%+v is more than its slice counted, %v", b, h.counted)
		}
	}
	h.states, h.models = append(h.states, state), append(h.models, h.model.clone())
}

// restart begins an agent with the state of some sweeps ago. Its State is the same
// before anything happened.
func (h *fuzzHost) restart(ago int) {
	if len(h.states) == 0 {
		return
	}
	n := max(1, len(h.states)-ago)
	h.states, h.models = h.states[:n], h.models[:n]
	state := h.states[n-1]
	h.agent(state)
	h.model = h.models[n-1].clone()
	again := h.ledger.state(state.Time)
	for _, s := range []*State{&state, &again} {
		s.Series = slices.Clone(s.Series)
		for i := range s.Series {
			s.Series[i].Slice, s.Series[i].Observed = "", false
		}
		if s.Overflow != nil {
			o := *s.Overflow
			o.Observed, s.Overflow = false, &o
		}
		s.Balances = slices.Clone(s.Balances)
		for i := range s.Balances {
			s.Balances[i].Unattributed.Observed = false
		}
		s.Runs = slices.SortedFunc(slices.Values(s.Runs), func(a, b Run) int { return strings.Compare(a.Epoch, b.Epoch) })
	}
	if !reflect.DeepEqual(state, again) {
		h.t.Fatalf("the state was\n%+v\nand is\n%+v", state, again)
	}
}

// FuzzLedger compares a Ledger with a model over the life of a host. Each byte of a
// script after the first is an operation, with the next one as its argument.
func FuzzLedger(f *testing.F) {
	f.Add([]byte("\x00\x00\x11\x06\x00\x02\x01\x00\x15\x06\x00\x05\x00\x07\x04\x06\x00\x08\x00\x06\x00"))
	f.Add([]byte("\x05\x00\x10\x00\x21\x00\x32\x00\x43\x06\x00\x09\x01\x06\x00\x07\x09\x05\x00\x06\x00\x06\x00"))
	f.Add([]byte("\x02\x00\x10\x06\x00\x02\x00\x09\xff\x06\x00\x05\x00\x06\x00\x01\x00\x0a\x00\x05\x07\x06\x00"))
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) < 3 || len(script) > 400 {
			return
		}
		h := &fuzzHost{
			t: t, now: time.Unix(1e9, 0), limit: 1 + int(script[0]%6),
			model: model{seen: map[string][]observed{}, unit: map[string]string{}},
		}
		for _, name := range []string{"a.service", "b.service", "c.service", "d.service", "f1.service", "f2.service"} {
			u := &fuzzUnit{name: name}
			h.start(u)
			h.units = append(h.units, u)
		}
		h.agent(State{})
		for script = script[1:]; len(script) >= 2; script = script[2:] {
			h.now = h.now.Add(time.Millisecond)
			h.do(script[0], script[1])
		}
		h.take(len(h.journal))
		h.sweep(0)
	})
}

func (h *fuzzHost) do(op, arg byte) {
	u, n := h.units[int(arg%8)%len(h.units)], uint64(arg/8)+1
	growth := Counters{Received: Traffic{41 * n, n}}
	if arg&1 != 0 {
		growth = Counters{Received: Traffic{n, 1}, Sent: Traffic{1000 * n, n}}
	}
	switch op % 13 {
	case 0, 12: // traffic
		if u.epoch != "" {
			u.raw, h.slice, h.counted = u.raw.Plus(growth), h.slice.Plus(growth), h.counted.Plus(growth)
		}
	case 1: // the counters fall, unless the ledger has seen less
		if u.epoch != "" {
			u.raw = growth
		}
	case 2, 3: // the run ends; another begins
		h.stop(u, arg&64 == 0)
		if op%13 == 2 {
			h.start(u)
		}
	case 4: // a reading is on its way
		if u.epoch != "" && len(h.flying) < 4 {
			h.flying = append(h.flying, h.reading(u))
		}
	case 5: // stop records arrive
		h.take(int(arg%8) + 1)
	case 6:
		h.sweep(arg)
	case 7: // the agent restarts, or is killed
		h.restart(int(arg % 4))
	case 8: // the host reboots
		for _, u := range h.units {
			h.stop(u, arg&1 == 0)
			h.start(u)
		}
		h.boot++
		h.slice = Counters{}
		h.restart(int(arg / 2 % 2))
	case 9: // time passes
		h.now = h.now.Add(time.Duration(arg) * time.Second)
	case 10: // accounting is switched off and on, or was before the last reading
		if last, ok := h.model.last(u.epoch); ok && arg&32 != 0 {
			h.ledger.Restart(u.epoch, last.at.Add(-time.Microsecond))
			return
		}
		if u.epoch != "" {
			u.raw = Counters{}
			h.ledger.Restart(u.epoch, h.now)
			if _, ok := h.model.last(u.epoch); ok {
				h.model.note(u.name, u.epoch, Counters{}, h.now)
			}
		}
	case 11: // what was on its way arrives
		for _, reading := range h.flying {
			if h.now.Sub(reading.Time) < time.Minute {
				h.credit(reading)
			}
		}
		h.flying = nil
	}
}
