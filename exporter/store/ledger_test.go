package store

import (
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"
)

// randomLedger changes l at random: units come, go, restart, count and rest.
func randomLedger(r *rand.Rand, l Ledger, now time.Time) Ledger {
	next := Ledger{Time: now}
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
			run.Epoch, run.Last = fmt.Sprint(r.Uint64()), [4]uint64{number()}
		case 5:
			run.Boot = fmt.Sprint(r.Uint64())
		case 6:
			run.Series = fmt.Sprintf("unit-%d", r.IntN(50))
		}
		next.Runs = append(next.Runs, run)
	}
	known := map[string]bool{}
	for _, s := range next.Series {
		known[s.Key] = true
	}
	for range r.IntN(5) {
		key := fmt.Sprintf("unit-%d", r.IntN(50))
		if r.IntN(30) == 0 {
			key = "" // the overflow series
		}
		if !known[key] {
			known[key] = true
			next.Series = append(next.Series, Series{Key: key, Total: [4]uint64{number(), number(), number(), number()}, Start: moment(), Seen: moment()})
		}
	}
	clear(known)
	for _, run := range next.Runs {
		known[run.Key] = true
	}
	for range r.IntN(5) {
		key := fmt.Sprintf("unit-%d.service\x00\xff", r.IntN(50))
		if !known[key] {
			known[key] = true
			next.Runs = append(next.Runs, Run{Key: key, Series: fmt.Sprintf("unit-%d", r.IntN(50)), Epoch: "e", Boot: "b", Last: [4]uint64{number(), 1, 2, number()}, Seen: moment()})
		}
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
	series, runs := map[string]Series{}, map[string]Run{}
	for _, s := range a.Series {
		series[s.Key] = s
	}
	for _, r := range a.Runs {
		runs[r.Key] = r
	}
	for _, s := range b.Series {
		if got, ok := series[s.Key]; !ok || got != s {
			return fmt.Errorf("series %q: %+v, want %+v", s.Key, got, s)
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
		record, base, err := writer.advance(current)
		if err != nil {
			t.Fatal(err)
		}
		if base {
			chain = nil
			bases++
		}
		chain = append(chain, record)
		if i%7 != 0 {
			continue
		}
		reader := newLedgerState()
		for n, record := range chain {
			if err := reader.replay(record, n == 0); err != nil {
				t.Fatalf("step %d, record %d: %v", i, n, err)
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

func TestLedgerRefusesBadInput(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, l := range map[string]Ledger{
		"series twice": {Series: []Series{{Key: "a"}, {Key: "a"}}},
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
	l := Ledger{Time: time.Unix(1, 0).UTC(), Series: []Series{{Key: "a.service", Total: [4]uint64{1, 2, 3, 4}}}, Runs: []Run{{Key: "a.service", Series: "a.service", Epoch: "x"}}}
	record, _, err := newLedgerState().advance(l)
	if err != nil {
		t.Fatal(err)
	}
	for i := range record {
		for bit := range 8 {
			damaged := append([]byte(nil), record...)
			damaged[i] ^= 1 << bit
			if err := newLedgerState().replay(damaged, true); err == nil {
				t.Fatalf("bit %d of byte %d of %d flipped: no error", bit, i, len(record))
			}
		}
		if err := newLedgerState().replay(record[:i], true); err == nil {
			t.Fatalf("cut to %d of %d bytes: no error", i, len(record))
		}
	}
}

func FuzzLedgerRecord(f *testing.F) {
	record, _, _ := newLedgerState().advance(Ledger{Series: []Series{{Key: "a.service"}}, Runs: []Run{{Key: "a"}}})
	f.Add(record[:len(record)-4])
	f.Fuzz(func(t *testing.T, b []byte) {
		// With a right checksum, so that the fuzzer gets past it.
		at, series, runs, err := decodeRecord(appendSum(b))
		if err != nil {
			return
		}
		at2, series2, runs2, err := decodeRecord(encodeRecord(at, series, runs))
		if err != nil || !at.Equal(at2) || !reflect.DeepEqual(series, series2) || !reflect.DeepEqual(runs, runs2) {
			t.Fatalf("decoded %v %v %v, encoded and decoded again %v %v %v, %v", at, series, runs, at2, series2, runs2, err)
		}
	})
}
