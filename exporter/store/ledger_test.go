package store

import (
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// randomLedger changes l at random: units come, go, restart, count and rest,
// and the position moves now and then.
func randomLedger(r *rand.Rand, l Ledger, now time.Time) Ledger {
	next := Ledger{Time: now, Source: l.Source, Position: l.Position}
	number := func() uint64 {
		return []uint64{0, 1, r.Uint64N(1e6), math.MaxInt64, math.MaxInt64 + 1, math.MaxUint64, r.Uint64()}[r.IntN(7)]
	}
	moment := func() time.Time {
		switch r.IntN(20) {
		case 0:
			return time.Time{}
		case 1:
			return time.Unix(0, 0).UTC()
		default:
			return now.Add(-time.Duration(r.Int64N(1e12)))
		}
	}
	for _, s := range l.Series {
		switch r.IntN(10) {
		case 0:
			continue
		case 1, 2, 3:
			s.Total = [4]uint64{number(), s.Total[1] + 5, number(), s.Total[3]}
			s.Seen = moment()
		case 4:
			s.Start = moment()
		case 5:
			s.Seen = moment()
		}
		next.Series = append(next.Series, s)
	}
	for _, run := range l.Runs {
		switch r.IntN(10) {
		case 0:
			continue
		case 1, 2, 3:
			run.Last, run.Seen = [4]uint64{number(), run.Last[1] + 5, number(), 0}, moment()
		case 4:
			run.Unit, run.Last = fmt.Sprint(r.Uint64()), [4]uint64{number()}
		case 5:
			run.Boot = fmt.Sprint(r.Uint64())
		case 6:
			run.Series = fmt.Sprintf("unit-%d", r.IntN(50))
		case 7:
			run.SeriesKind = uint8(r.IntN(4))
		}
		next.Runs = append(next.Runs, run)
	}
	have := map[seriesKey]bool{}
	for _, s := range next.Series {
		have[s.ref()] = true
	}
	for range r.IntN(5) {
		of := seriesKey{1, fmt.Sprintf("unit-%d", r.IntN(50))}
		switch r.IntN(30) {
		case 0:
			of = seriesKey{2, ""} // one series that has no name
		case 1, 2, 3, 4, 5:
			of.kind = 3
		}
		if !have[of] {
			have[of] = true
			next.Series = append(next.Series, Series{Kind: of.kind, Key: of.key, Total: [4]uint64{number(), number(), number(), number()}, Start: moment(), Seen: moment()})
		}
	}
	known := map[string]bool{}
	for _, run := range next.Runs {
		known[run.Key] = true
	}
	for range r.IntN(5) {
		key := fmt.Sprintf("unit-%d.service\x00\xff", r.IntN(50))
		if !known[key] {
			known[key] = true
			next.Runs = append(next.Runs, Run{Key: key, Unit: "u", SeriesKind: 1, Series: fmt.Sprintf("unit-%d", r.IntN(50)), Boot: "b", Last: [4]uint64{number(), 1, 2, number()}, Seen: moment()})
		}
	}
	if r.IntN(5) == 0 {
		next.Position = [2]string{fmt.Sprint("\x00cursor ", r.Uint64()), fmt.Sprint(r.IntN(3))}
	}
	if r.IntN(40) == 0 {
		next.Position, next.Source = [2]string{}, []string{"", "dbus", "ebpf"}[r.IntN(3)]
	}
	if r.IntN(40) == 0 {
		next.Series, next.Runs = nil, nil
	}
	return next
}

// sameLedger compares without the order, which no caller depends on.
func sameLedger(a, b Ledger) error {
	if !a.Time.Equal(b.Time) || len(a.Series) != len(b.Series) || len(a.Runs) != len(b.Runs) {
		return fmt.Errorf("time %v, %d series, %d runs; want %v, %d, %d", a.Time, len(a.Series), len(a.Runs), b.Time, len(b.Series), len(b.Runs))
	}
	if a.marks() != b.marks() {
		return fmt.Errorf("source and position %q, want %q", a.marks(), b.marks())
	}
	series, runs := map[seriesKey]Series{}, map[string]Run{}
	for _, s := range a.Series {
		series[s.ref()] = s
	}
	for _, r := range a.Runs {
		runs[r.Key] = r
	}
	for _, s := range b.Series {
		if got, ok := series[s.ref()]; !ok || got != s {
			return fmt.Errorf("series %v: %+v, want %+v", s.ref(), got, s)
		}
	}
	for _, r := range b.Runs {
		if got, ok := runs[r.Key]; !ok || got != r {
			return fmt.Errorf("run %q: %+v, want %+v", r.Key, got, r)
		}
	}
	return nil
}

func TestLedgerRecords(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	now := time.Date(2026, 11, 23, 0, 0, 0, 123456789, time.UTC)
	writer, current := newLedgerState(), Ledger{}
	var chain [][]byte
	bases := 0
	for i := range 1000 {
		now = now.Add(time.Second)
		current = randomLedger(r, current, now)
		body, base, err := writer.advance(current)
		if err != nil {
			t.Fatal(err)
		}
		if base {
			chain = nil
			bases++
		}
		chain = append(chain, body)
		if i%7 != 0 {
			continue
		}
		reader := newLedgerState()
		for n, body := range chain {
			if err := reader.replay(body, n == 0); err != nil {
				t.Fatalf("step %d, body %d: %v", i, n, err)
			}
		}
		if err := sameLedger(reader.ledger(), current); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if i%49 == 0 { // go on from what was read, as after a restart
			writer = reader
			writer.endReplay()
		}
	}
	if bases < 2 {
		t.Errorf("only %d records of the whole ledger: the chain is not bounded, or the test is too short", bases)
	}
}

// Series with the same key, the position, and a run that names no series are the
// same after commits, a start, and a body that replaces all earlier ones.
func TestLedgerKindsAndPosition(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	now := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
	cfg := Config{Dir: filepath.Join(t.TempDir(), "state"), History: -1, Now: func() time.Time { return now }}
	s := openTest(t, cfg)
	l := Ledger{Position: [2]string{"cursor", "boot"}}
	for i := range 60 {
		for kind := range uint8(5) {
			l.Series = append(l.Series, Series{Kind: kind + 1, Key: fmt.Sprintf("%d.slice", i), Start: now})
		}
		l.Runs = append(l.Runs, Run{Key: fmt.Sprint(i), Unit: "a.service", Boot: "b", SeriesKind: uint8(i % 6), Series: fmt.Sprintf("%d.slice", i)})
	}
	l.Runs = append(l.Runs, Run{Key: "none", Unit: "system.slice", Boot: "b"})
	bases, chain := 0, 0
	for cycle := range 60 {
		now = now.Add(time.Second)
		l.Time = now
		for i := range l.Series {
			l.Series[i].Total, l.Series[i].Seen = add(l.Series[i].Total, [4]uint64{r.Uint64N(1e12), r.Uint64N(1e12), r.Uint64N(1e12), r.Uint64N(1e12)}), now
		}
		for i := range l.Runs {
			l.Runs[i].Last, l.Runs[i].Seen = [4]uint64{r.Uint64()}, now
		}
		if cycle == 1 { // for good: later records, and the new first one, have none or the same
			l.Position[0] = "later cursor"
		}
		if err := s.Commit(t.Context(), Cycle{Time: now, Ledger: l}); err != nil {
			t.Fatal(err)
		}
		if s.ledger.chain < chain {
			bases++
		}
		chain = s.ledger.chain
		if cycle%4 == 0 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = openTest(t, cfg)
		}
		got, err := s.Ledger(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := sameLedger(got, l); err != nil {
			t.Fatalf("cycle %d: %v", cycle, err)
		}
	}
	if bases == 0 {
		t.Error("no body has replaced the others: the test is too short")
	}
}

func TestPositionCostsBytesWhenItChanges(t *testing.T) {
	size := func(positions ...[2]string) (last int) {
		l := newLedgerState()
		for _, at := range positions {
			body, _, err := l.advance(Ledger{Series: []Series{{Kind: 1, Key: "a.service"}}, Position: at})
			if err != nil {
				t.Fatal(err)
			}
			last = len(body)
		}
		return last
	}
	a, b := [2]string{"s=0123456789abcdef;i=1", "boot"}, [2]string{"s=0123456789abcdef;i=2", "boot"}
	none := size([2]string{}, [2]string{})
	if got := size(a, a); got != none {
		t.Errorf("%d bytes with the same position again, want %d as without one", got, none)
	}
	if got := size(a, b, b); got != none {
		t.Errorf("%d bytes with the same position again after a change, want %d as without one", got, none)
	}
	if got, want := size(a, b), none+len(b[0])+len(b[1])+3; got != want {
		t.Errorf("%d bytes with another position, want %d", got, want)
	}
}

func TestLedgerRefusesBadInput(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, l := range map[string]Ledger{
		"series twice": {Series: []Series{{Kind: 1, Key: "a"}, {Kind: 2, Key: "a"}, {Kind: 1, Key: "a"}}},
		"run twice":    {Runs: []Run{{Key: "a"}, {Key: "a"}}},
		"year 3000":    {Series: []Series{{Key: "a", Seen: now.AddDate(974, 0, 0)}}},
		"year 1":       {Runs: []Run{{Key: "a", Seen: time.Unix(-62135596800, 1)}}},
	} {
		if _, _, err := newLedgerState().advance(l); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestLedgerRecordDamage(t *testing.T) {
	l := Ledger{Time: time.Unix(1, 0).UTC(), Series: []Series{{Kind: 1, Key: "a.service", Total: [4]uint64{1, 2, 3, 4}}},
		Runs: []Run{{Key: "x", SeriesKind: 1, Series: "a.service", Unit: "a.service"}}, Position: [2]string{"cursor", "boot"}}
	body, _, err := newLedgerState().advance(l)
	if err != nil {
		t.Fatal(err)
	}
	for i := range body {
		for bit := range 8 {
			damaged := append([]byte(nil), body...)
			damaged[i] ^= 1 << bit
			if err := newLedgerState().replay(damaged, true); err == nil {
				t.Fatalf("bit %d of byte %d of %d flipped: no error", bit, i, len(body))
			}
		}
		if err := newLedgerState().replay(body[:i], true); err == nil {
			t.Fatalf("cut to %d of %d bytes: no error", i, len(body))
		}
	}
}

func FuzzLedgerRecord(f *testing.F) {
	body, _, _ := newLedgerState().advance(Ledger{Series: []Series{{Kind: 1, Key: "a.service"}}, Runs: []Run{{Key: "a", SeriesKind: 1}}, Position: [2]string{"p", "q"}})
	f.Add(body[:len(body)-4])
	f.Add(encodeRecord(time.Time{}, nil, nil, nil)[:11])
	f.Fuzz(func(t *testing.T, b []byte) {
		// With a right checksum, so that the fuzzer gets past it.
		at, position, series, runs, err := decodeRecord(record.AppendSum(b))
		if err != nil {
			return
		}
		at2, position2, series2, runs2, err := decodeRecord(encodeRecord(at, position, series, runs))
		if err != nil || !at.Equal(at2) || !reflect.DeepEqual(position, position2) || !reflect.DeepEqual(series, series2) || !reflect.DeepEqual(runs, runs2) {
			t.Fatalf("decoded %v %v %v %v, encoded and decoded again %v %v %v %v, %v", at, position, series, runs, at2, position2, series2, runs2, err)
		}
	})
}
