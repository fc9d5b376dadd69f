package receiver

import (
	"encoding/binary"
	"math"
	"testing"
	"time"
)

// all returns counters that all have the same value.
func all(v uint64) Counters { return Counters{v, v, v, v} }

func TestOdometer(t *testing.T) {
	const most = math.MaxInt64
	for _, test := range []struct {
		name     string
		readings []Counters
		deltas   []Counters
		resets   int
	}{
		{"first reading counts in full", []Counters{{100, 1, 200, 2}}, []Counters{{100, 1, 200, 2}}, 0},
		{"first reading of zero", []Counters{{}}, []Counters{{}}, 0},
		{"growth counts once", []Counters{all(5), all(7), all(7)}, []Counters{all(5), all(2), {}}, 0},
		{"one counter moves", []Counters{all(5), {5, 5, 5, 6}}, []Counters{all(5), {0, 0, 0, 1}}, 0},
		{"all fall", []Counters{all(5), all(3)}, []Counters{all(5), all(3)}, 1},
		{"to zero", []Counters{all(5), {}, all(1)}, []Counters{all(5), {}, all(1)}, 1},
		{"ingress bytes alone fall", []Counters{all(5), {4, 9, 9, 9}}, []Counters{all(5), {4, 9, 9, 9}}, 1},
		{"ingress packets alone fall", []Counters{all(5), {9, 4, 9, 9}}, []Counters{all(5), {9, 4, 9, 9}}, 1},
		{"egress bytes alone fall", []Counters{all(5), {9, 9, 4, 9}}, []Counters{all(5), {9, 9, 4, 9}}, 1},
		{"egress packets alone fall", []Counters{all(5), {9, 9, 9, 4}}, []Counters{all(5), {9, 9, 9, 4}}, 1},
		{"goes on after a fall", []Counters{all(9), all(2), all(3)}, []Counters{all(9), all(2), all(1)}, 1},
		{"the largest value", []Counters{all(most), all(most)}, []Counters{all(most), {}}, 0},
		{"from the largest to one", []Counters{all(most), all(1)}, []Counters{all(most), all(1)}, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			var o odometer
			resets := 0
			for i, raw := range test.readings {
				at := time.Unix(int64(i+1), 0)
				delta, reset := o.advance(raw, at)
				if reset {
					resets++
				}
				if delta != test.deltas[i] {
					t.Errorf("reading %d (%v) added %v, want %v", i, raw, delta, test.deltas[i])
				}
				if o.last != raw || !o.time.Equal(at) {
					t.Errorf("after reading %d the odometer stands at %v of %v", i, o.last, o.time)
				}
			}
			if resets != test.resets {
				t.Errorf("%d resets, want %d", resets, test.resets)
			}
		})
	}
}

func TestSeriesAdd(t *testing.T) {
	const most = math.MaxInt64
	at := func(sec int64) time.Time { return time.Unix(sec, 0) }
	for _, test := range []struct {
		name          string
		total, delta  Counters
		want          Counters
		startsAnew    bool
		wantMovedFlag bool
	}{
		{"grows", all(1), Counters{1, 2, 3, 4}, Counters{2, 3, 4, 5}, false, true},
		{"stands still", all(1), Counters{}, all(1), false, false},
		{"to the largest total", all(most - 1), all(1), all(most), false, true},
		{"ingress bytes overflow", Counters{most, 0, 0, 0}, all(1), all(1), true, true},
		{"ingress packets overflow", Counters{0, most, 0, 0}, all(1), all(1), true, true},
		{"egress bytes overflow", Counters{0, 0, most, 0}, all(1), all(1), true, true},
		{"egress packets overflow", Counters{0, 0, 0, most}, all(1), all(1), true, true},
		{"largest plus largest", all(most), all(most), all(most), true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := series{total: test.total, start: at(10), time: at(20)}
			s.add(test.delta, at(30))
			if s.total != test.want {
				t.Errorf("total is %v, want %v", s.total, test.want)
			}
			wantStart := at(10)
			if test.startsAnew {
				// The new total counts from the last moment of the old one.
				wantStart = at(20)
			}
			if !s.start.Equal(wantStart) {
				t.Errorf("start is %v, want %v", s.start, wantStart)
			}
			if !s.time.Equal(at(30)) {
				t.Errorf("time is %v, want %v", s.time, at(30))
			}
			if s.moved != test.wantMovedFlag {
				t.Errorf("moved is %v", s.moved)
			}
		})
	}
}

// TestSeriesTimeNeverGoesBack: the members of a fold, and stop records of the
// journal, come in any order.
func TestSeriesTimeNeverGoesBack(t *testing.T) {
	var s series
	s.add(all(1), time.Unix(20, 0))
	s.add(all(1), time.Unix(10, 0))
	if want := time.Unix(20, 0); !s.time.Equal(want) {
		t.Errorf("the time of the series is %v after an older reading was added, want %v", s.time, want)
	}
	if s.total != all(2) {
		t.Errorf("total is %v, want %v", s.total, all(2))
	}
}

// FuzzOdometer drives an odometer and a series with a script of traffic,
// resets, new runs and readings. The truth is kept beside: what was last shown
// between one reset and the next, summed.
func FuzzOdometer(f *testing.F) {
	f.Add([]byte{0, 10, 4, 1, 20, 4, 5, 4, 2, 1, 4, 6, 4})
	f.Add([]byte{0, 255, 4, 5, 0, 255, 4, 5, 3, 255, 4})
	f.Add([]byte{4, 4, 4})
	f.Fuzz(func(t *testing.T, script []byte) {
		var (
			raw, shown, closed Counters // closed: of all stretches that are over
			o                  odometer
			s                  = series{start: time.Unix(1, 0), time: time.Unix(1, 0)}
			hidden             bool // a reset that no counter gave away
			pending            bool // a reset that no reading has seen yet
			clock              int64
		)
		grow := func(bytes, packets *uint64, n uint64) {
			*bytes += n * 41
			*packets += n
		}
		for len(script) > 0 {
			op := script[0]
			script = script[1:]
			n := uint64(0)
			if op%8 < 4 && len(script) > 0 {
				n, script = uint64(script[0]), script[1:]
			}
			switch op % 8 {
			case 0:
				grow(&raw.IngressBytes, &raw.IngressPackets, n)
			case 1:
				grow(&raw.EgressBytes, &raw.EgressPackets, n)
			case 2:
				grow(&raw.IngressBytes, &raw.IngressPackets, n<<20)
			case 3:
				grow(&raw.EgressBytes, &raw.EgressPackets, n<<20)
			case 5: // accounting off and on
				closed, _ = closed.plus(shown)
				raw, shown, pending = Counters{}, Counters{}, true
			case 6: // a new invocation
				closed, _ = closed.plus(shown)
				raw, shown, pending, o = Counters{}, Counters{}, false, odometer{}
			default:
				clock++
				before, last := s.total, o.last
				delta, reset := o.advance(raw, time.Unix(clock, 0))
				s.add(delta, time.Unix(clock, 0))
				if _, fell := s.total.minus(before); fell {
					t.Fatalf("total fell from %v to %v", before, s.total)
				}
				if _, fell := raw.minus(last); fell != reset {
					t.Fatalf("from %v to %v: reset is %v", last, raw, reset)
				}
				hidden = hidden || pending && !reset && last != Counters{}
				pending, shown = false, raw
				truth, _ := closed.plus(shown)
				if missing, more := truth.minus(s.total); more || !hidden && missing != (Counters{}) {
					t.Fatalf("total is %v, the truth %v (hidden reset: %v)", s.total, truth, hidden)
				}
			}
		}
	})
}

// FuzzSeriesAdd adds any values: a total is always one that OTLP can hold.
func FuzzSeriesAdd(f *testing.F) {
	f.Add(binary.LittleEndian.AppendUint64(nil, math.MaxInt64), uint8(0))
	f.Add(make([]byte, 64), uint8(3))
	f.Fuzz(func(t *testing.T, values []byte, which uint8) {
		s := series{start: time.Unix(1, 0), time: time.Unix(1, 0)}
		for clock := int64(2); len(values) >= 8; clock++ {
			var delta Counters
			v := binary.LittleEndian.Uint64(values) &^ (1 << 63)
			values = values[8:]
			fields := []*uint64{&delta.IngressBytes, &delta.IngressPackets, &delta.EgressBytes, &delta.EgressPackets}
			*fields[(int64(which)+clock)%4] = v
			before := s
			s.add(delta, time.Unix(clock, 0))
			if !s.total.valid() {
				t.Fatalf("total %v does not fit", s.total)
			}
			_, fell := s.total.minus(before.total)
			switch {
			case fell && !s.start.Equal(before.time):
				t.Fatalf("total fell from %v to %v without a new start", before.total, s.total)
			case fell && s.total != delta:
				t.Fatalf("the new total begins with %v, not with %v", s.total, delta)
			case !fell && !s.start.Equal(before.start) && s.total != delta:
				t.Fatalf("start moved to %v for nothing", s.start)
			}
		}
	})
}

func TestCountersMax(t *testing.T) {
	a, b := Counters{1, 6, 3, 8}, Counters{5, 2, 7, 4}
	if got, want := a.max(b), (Counters{5, 6, 7, 8}); got != want || b.max(a) != want {
		t.Errorf("max of %v and %v is %v and %v, want %v", a, b, got, b.max(a), want)
	}
}
