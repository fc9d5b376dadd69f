package record

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestColumnRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	columns := map[string][]uint64{
		"empty":   {},
		"zero":    {0},
		"edges":   {0, 1, math.MaxInt64, math.MaxInt64 + 1, math.MaxUint64 - 1, math.MaxUint64, 0, math.MaxUint64},
		"all max": slices.Repeat([]uint64{math.MaxUint64}, 9),
		"falling": {math.MaxUint64, 1 << 63, 1<<63 - 1, 1 << 32, 5, 0},
	}
	for bits := range 65 {
		var column []uint64
		for range 100 {
			v := r.Uint64()
			if bits < 64 {
				v &= 1<<bits - 1
			}
			column = append(column, v)
		}
		columns["random "+string(rune('0'+bits))] = column
	}
	for name, column := range columns {
		rest := []byte("rest")
		b := append(AppendColumn([]byte("before"), column), rest...)
		got := make([]uint64, len(column))
		after, err := ReadColumn(b[len("before"):], got)
		if err != nil || !slices.Equal(got, column) || string(after) != "rest" {
			t.Errorf("%s: wrote %v, read %v, rest %q, %v", name, column, got, after, err)
		}
	}
}

// Sizes that the history's bounds rest on.
func TestColumnSize(t *testing.T) {
	idle, burst := make([]uint64, 60), make([]uint64, 60)
	burst[30] = 1e12
	if n := len(AppendColumn(nil, idle)); n > 9 {
		t.Errorf("60 zeros need %d bytes, want at most 9", n)
	}
	if n := len(AppendColumn(nil, burst)); n > 19 {
		t.Errorf("59 zeros and 1e12 need %d bytes, want at most 19", n)
	}
}

func FuzzColumn(f *testing.F) {
	f.Add([]byte{}, uint8(3))
	f.Add([]byte{0xff, 0, 0, 0, 0, 0, 0, 0x80, 1, 2, 3, 4, 5, 6, 7, 8}, uint8(2))
	f.Fuzz(func(t *testing.T, b []byte, n uint8) {
		// As input of the decoder: no panic. As numbers: they come back.
		_, _ = ReadColumn(b, make([]uint64, n))
		var column []uint64
		for ; len(b) >= 8; b = b[8:] {
			column = append(column, binary.LittleEndian.Uint64(b))
		}
		got := make([]uint64, len(column))
		rest, err := ReadColumn(AppendColumn(nil, column), got)
		if err != nil || len(rest) != 0 || !slices.Equal(got, column) {
			t.Fatalf("wrote %v, read %v, rest %v, %v", column, got, rest, err)
		}
	})
}
