package history

import (
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"github.com/unitmeter/unitmeter/exporter/store/record"
)

func TestHourRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 2000 {
		var spans []span
		end := r.Int64N(1000) - 500
		for range r.IntN(70) {
			s := span{begin: end, end: end + r.Int64N(700)}
			switch r.IntN(10) {
			case 0: // a gap
				s.begin += 50
				s.end += 50
			case 1: // the clock went back
				s.begin -= 5000
				s.end -= 5000
			}
			end = s.end
			if r.IntN(3) > 0 {
				s.delta = [4]uint64{r.Uint64N(1e6), r.Uint64N(100), r.Uint64(), math.MaxUint64}
			}
			spans = append(spans, s)
		}
		got, err := decodeHour(491_000, 3, encodeHour(491_000, 3, spans))
		if err != nil || !slices.Equal(got, spans) {
			t.Fatalf("wrote %v, read %v, %v", spans, got, err)
		}
		var units []int64
		for range spans {
			units = append(units, r.Int64())
		}
		gotUnits, got, err := decodeCycle(491_000, encodeCycle(491_000, units, spans))
		if err != nil || !slices.Equal(got, spans) || !slices.Equal(gotUnits, units) {
			t.Fatalf("wrote %v, read %v, %v", spans, got, err)
		}
	}
}

func FuzzHistoryBodies(f *testing.F) {
	f.Add(encodeHour(491_000, 3, []span{{begin: -5, end: 595, delta: [4]uint64{1, 2, 3, 4}}, {begin: 595, end: 1195}}))
	f.Add(encodeCycle(491_000, []int64{1}, []span{{begin: -5, end: 595, delta: [4]uint64{1, 2, 3, 4}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if spans, err := decodeHour(491_000, 3, record.AppendSum(b, 491_000, 3)); err == nil && len(spans) > 0 {
			again, err := decodeHour(491_000, 3, encodeHour(491_000, 3, spans))
			if err != nil || !reflect.DeepEqual(spans, again) {
				t.Fatalf("decoded %v, then %v, %v", spans, again, err)
			}
		}
		if units, spans, err := decodeCycle(491_000, record.AppendSum(b, 491_000)); err == nil {
			units2, spans2, err := decodeCycle(491_000, encodeCycle(491_000, units, spans))
			if err != nil || !reflect.DeepEqual(spans, spans2) || !reflect.DeepEqual(units, units2) {
				t.Fatalf("decoded %v, then %v, %v", spans, spans2, err)
			}
		}
	})
}
