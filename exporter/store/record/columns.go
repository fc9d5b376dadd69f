package record

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// A column is a list of numbers whose count the reader knows. It is a mode byte
// and then, for each value, an exponential Golomb code of order k, padded to a
// whole byte: the low k bits are stored plainly and the rest with a prefix that
// tells its length. Small values cost little and a rare huge one costs no more
// than 129 bits, which suits counters: mostly quiet, sometimes bursts.
const (
	columnDelta = 0x40 // mode bit: values are Zigzag differences to the one before
	columnOrder = 0x3f // mode bits: k
)

// AppendColumn appends the code of values to b, with the k, and with or without
// differences, that make it shortest.
func AppendColumn(b []byte, values []uint64) []byte {
	var plain, delta [65]int // how many values have this many bits
	last := uint64(0)
	for _, v := range values {
		plain[bits.Len64(v)]++
		delta[bits.Len64(Zigzag(int64(v-last)))]++
		last = v
	}
	k, size := bestOrder(&plain)
	dk, dsize := bestOrder(&delta)
	mode := byte(k)
	if dsize < size {
		k, mode = dk, byte(dk)|columnDelta
	}
	w := bitWriter{b: append(b, mode)}
	last = 0
	for _, v := range values {
		if mode&columnDelta != 0 {
			v, last = Zigzag(int64(v-last)), v
		}
		q := v>>k + 1 // 0 stands for 1<<64
		n := bits.Len64(q) - 1
		if q == 0 {
			n = 64
		}
		w.ones(n)
		w.put(q, n)
		w.put(v, k)
	}
	return w.close()
}

// bestOrder returns the k for which a column with the given histogram of bit
// lengths becomes shortest, and about how many bits that is.
func bestOrder(histogram *[65]int) (k, size int) {
	longest, count := 0, 0
	for n, c := range histogram {
		if c > 0 {
			longest, count = n, count+c
		}
	}
	size = math.MaxInt
	for order := 0; order <= min(longest, columnOrder); order++ {
		sum := count * (1 + order)
		for n := order + 1; n <= longest; n++ {
			sum += histogram[n] * 2 * (n - order)
		}
		if sum < size {
			k, size = order, sum
		}
	}
	return k, size
}

// ReadColumn decodes len(values) numbers from b and returns what follows them.
func ReadColumn(b []byte, values []uint64) ([]byte, error) {
	if len(b) == 0 {
		return nil, ErrDamaged
	}
	mode := b[0]
	k := int(mode & columnOrder)
	r := bitReader{b: b[1:]}
	last := uint64(0)
	for i := range values {
		n := r.ones()
		if n > 64-k {
			return nil, ErrDamaged
		}
		q := r.get(n) | 1<<n // 1<<64 is 0, as in AppendColumn
		if n == 64 && q != 0 {
			return nil, ErrDamaged
		}
		v := (q-1)<<k | r.get(k)
		if mode&columnDelta != 0 {
			v = last + uint64(Unzigzag(v))
			last = v
		}
		values[i] = v
	}
	return r.close()
}

// Zigzag maps small numbers of either sign to small numbers.
func Zigzag(v int64) uint64 { return uint64(v)<<1 ^ uint64(v>>63) }

func Unzigzag(v uint64) int64 { return int64(v>>1) ^ -int64(v&1) }

// bitWriter appends bits, lowest first.
type bitWriter struct {
	b   []byte
	acc uint64
	n   int // bits in acc, below 32 between calls
}

func (w *bitWriter) put(v uint64, n int) {
	for ; n > 32; n -= 32 {
		w.put(v, 32)
		v >>= 32
	}
	w.acc |= (v & (1<<n - 1)) << w.n
	w.n += n
	if w.n >= 32 {
		w.b = append(w.b, byte(w.acc), byte(w.acc>>8), byte(w.acc>>16), byte(w.acc>>24))
		w.acc >>= 32
		w.n -= 32
	}
}

// ones writes n one bits and a zero bit.
func (w *bitWriter) ones(n int) {
	w.put(^uint64(0), n)
	w.put(0, 1)
}

// close pads to a whole byte and returns everything written.
func (w *bitWriter) close() []byte {
	for ; w.n > 0; w.n -= 8 {
		w.b = append(w.b, byte(w.acc))
		w.acc >>= 8
	}
	return w.b
}

// bitReader reads what bitWriter wrote. Beyond the end it delivers zeros and
// remembers that.
type bitReader struct {
	b     []byte
	pos   int // of the next byte to take from b
	acc   uint64
	n     int // bits in acc, at most 63; those above are zero
	short bool
}

// fill makes sure that acc has n bits, at most 32.
func (r *bitReader) fill(n int) {
	if r.n >= n {
		return
	}
	if r.pos+4 <= len(r.b) {
		r.acc |= uint64(binary.LittleEndian.Uint32(r.b[r.pos:])) << r.n
		r.pos += 4
		r.n += 32
		return
	}
	for ; r.n < n; r.n += 8 {
		if r.pos == len(r.b) {
			r.short = true
			r.n = n
			return
		}
		r.acc |= uint64(r.b[r.pos]) << r.n
		r.pos++
	}
}

func (r *bitReader) get(n int) uint64 {
	if n > 32 {
		low := r.get(32)
		return low | r.get(n-32)<<32
	}
	r.fill(n)
	v := r.acc & (1<<n - 1)
	r.acc >>= n
	r.n -= n
	return v
}

// ones counts one bits up to the zero bit that ends them, and skips that too.
// Any answer above 64 means that there are too many.
func (r *bitReader) ones() (count int) {
	for count <= 64 {
		r.fill(1)
		// The bits of acc above n are zero, so at most n are counted.
		n := bits.TrailingZeros64(^r.acc)
		count += n
		if n < r.n {
			r.acc >>= n + 1
			r.n -= n + 1
			return count
		}
		r.acc, r.n = 0, 0
	}
	return count
}

// close skips the padding and returns the rest of the input.
func (r *bitReader) close() ([]byte, error) {
	if r.short {
		return nil, ErrDamaged
	}
	return r.b[r.pos-r.n/8:], nil
}
