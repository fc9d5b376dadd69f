// Package record encodes the rows of a store: bodies with a checksum, columns of
// numbers in few bits, and zstd.
//
// Two things are needed of it: [AppendSum] and [CheckSum] for the checksum around a
// body; and a pair for each part of a body, such as [AppendColumn] and [ReadColumn].
//
//   - body: the bytes of one row, after its plain columns.
//   - column: numbers of the same kind, one for each row in a body.
//   - sum: the CRC-32C at the end of a body. It covers the plain columns of its row too.
//
// A decoder never trusts its input. Its only error is [ErrDamaged], and it allocates
// little more than the encoded value needs.
package record

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"

	"github.com/klauspost/compress/zstd"
)

// ErrDamaged is the error of every decoder that runs out of input, or meets a
// value that no encoder writes, or a checksum that does not match.
var ErrDamaged = errors.New("is damaged")

// MaxSize is the size of the largest content, in bytes, before compression.
const MaxSize = 64 << 20

// Sum returns the CRC-32C of the numbers and of b. SQLite does not checksum its
// pages. The numbers are those of the row's other columns.
func Sum(b []byte, columns ...int64) uint32 {
	key := make([]byte, 0, 48)
	for _, c := range columns {
		key = binary.BigEndian.AppendUint64(key, uint64(c))
	}
	table := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Checksum(key, table), table, b)
}

// AppendSum appends Sum(b, columns...) to b.
func AppendSum(b []byte, columns ...int64) []byte {
	return binary.BigEndian.AppendUint32(b, Sum(b, columns...))
}

// CheckSum returns b without the checksum at its end, once that matches.
func CheckSum(b []byte, columns ...int64) ([]byte, error) {
	n := len(b) - 4
	if n < 0 || Sum(b[:n], columns...) != binary.BigEndian.Uint32(b[n:]) {
		return nil, ErrDamaged
	}
	return b[:n], nil
}

// AppendBytes appends value and its length; TakeBytes undoes it.
func AppendBytes(b, value []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(value))), value...)
}

// TakeBytes returns the value at the beginning of b, and what follows it.
func TakeBytes(b []byte) (value, rest []byte, err error) {
	n, b, err := takeUvarint(b)
	if err != nil || n > uint64(len(b)) {
		return nil, nil, ErrDamaged
	}
	return b[:n], b[n:], nil
}

func takeUvarint(b []byte) (v uint64, rest []byte, err error) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, ErrDamaged
	}
	return v, b[n:], nil
}

// maxRows bounds the rows of a body: some 100 MB in memory.
const maxRows = 1 << 20

// TakeCount reads how many rows follow. Each needs a bit in some column.
func TakeCount(b []byte) (count uint64, rest []byte, err error) {
	count, b, err = takeUvarint(b)
	if err != nil || count > min(maxRows, 8*uint64(len(b))) {
		return 0, nil, ErrDamaged
	}
	return count, b, nil
}

// Compress returns b as a zstd frame with checksum; nothing stays nothing. It is
// for rare records: it makes an encoder each time rather than hold one.
func Compress(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	enc, err := NewEncoder(len(b))
	if err != nil {
		panic(err) // only the options can be wrong, and they are constant
	}
	return enc.EncodeAll(b, nil)
}

// Decompress undoes Compress.
func Decompress(b []byte) ([]byte, error) {
	if len(b) == 0 {
		return nil, nil
	}
	dec, err := NewDecoder()
	if err != nil {
		return nil, fmt.Errorf("make decoder: %w", err)
	}
	defer dec.Close()
	if b, err = dec.DecodeAll(b, nil); err != nil {
		return nil, fmt.Errorf("content %w: %w", ErrDamaged, err)
	}
	return b, nil
}

// NewEncoder makes an encoder that finds repetitions up to reach bytes back, and
// holds about as much memory and half a MiB. It uses the fastest level: on
// requests against their dictionary it also makes the smallest output of all
// levels, at 1 ms for 580 kB.
func NewEncoder(reach int, opts ...zstd.EOption) (*zstd.Encoder, error) {
	const least, most = 64 << 10, 8 << 20 // what any decoder takes
	window := least
	for window < min(reach, most) {
		window *= 2
	}
	return zstd.NewWriter(nil, append(opts, zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(window))...)
}

// NewDecoder makes a decoder for contents of up to MaxSize.
func NewDecoder(opts ...zstd.DOption) (*zstd.Decoder, error) {
	return zstd.NewReader(nil, append(opts, zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(MaxSize))...)
}

const zeroNanos = math.MinInt64 // stands for the zero time

// Nanos returns t in unix nanoseconds; FromNanos undoes it.
func Nanos(t time.Time) int64 {
	if t.IsZero() {
		return zeroNanos
	}
	return t.UnixNano()
}

// FromNanos returns the time in UTC that Nanos was given.
func FromNanos(n int64) time.Time {
	if n == zeroNanos {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// InRange says that Nanos can hold t.
func InRange(t time.Time) bool {
	return t.IsZero() || t.Year() > 1677 && t.Year() < 2262
}
