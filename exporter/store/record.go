package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/klauspost/compress/zstd"
)

// errDamaged is the error of every decoder that runs out of input, or meets a
// value that no encoder writes, or a checksum that does not match.
var errDamaged = errors.New("record is truncated or damaged")

// maxRequest is the size of the largest request that Commit takes, in bytes.
const maxRequest = 64 << 20

// appendSum appends the CRC-32C of b. SQLite does not checksum its pages.
func appendSum(b []byte) []byte {
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// checkSum returns b without the checksum at its end, once that matches.
func checkSum(b []byte) ([]byte, error) {
	n := len(b) - 4
	if n < 0 || crc32.Checksum(b[:n], crc32.MakeTable(crc32.Castagnoli)) != binary.BigEndian.Uint32(b[n:]) {
		return nil, errDamaged
	}
	return b[:n], nil
}

func appendBytes(b, value []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(value))), value...)
}

func takeBytes(b []byte) (value, rest []byte, err error) {
	n, b, err := takeUvarint(b)
	if err != nil || n > uint64(len(b)) {
		return nil, nil, errDamaged
	}
	return b[:n], b[n:], nil
}

func takeUvarint(b []byte) (v uint64, rest []byte, err error) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, errDamaged
	}
	return v, b[n:], nil
}

// takeCount reads how many rows follow. Each needs a bit in some column, so a
// damaged count cannot ask for all of the memory.
func takeCount(b []byte) (count uint64, rest []byte, err error) {
	count, b, err = takeUvarint(b)
	if err != nil || count > 8*uint64(len(b)) {
		return 0, nil, errDamaged
	}
	return count, b, nil
}

// compress returns b as a zstd frame with checksum; nothing stays nothing. It is
// for rare records: it makes an encoder each time rather than hold one.
func compress(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	enc, err := newEncoder(len(b))
	if err != nil {
		panic(err) // only the options can be wrong, and they are constant
	}
	return enc.EncodeAll(b, nil)
}

func decompress(b []byte) ([]byte, error) {
	if len(b) == 0 {
		return nil, nil
	}
	dec, err := newDecoder()
	if err != nil {
		return nil, fmt.Errorf("make decoder: %w", err)
	}
	defer dec.Close()
	return dec.DecodeAll(b, nil)
}

// newEncoder makes an encoder that finds repetitions up to reach bytes back, and
// holds about as much memory and half a MiB. It uses the fastest level: on
// requests against their dictionary it also makes the smallest output of all
// levels, at 1 ms for 580 kB.
func newEncoder(reach int, opts ...zstd.EOption) (*zstd.Encoder, error) {
	const least, most = 64 << 10, 8 << 20 // what any decoder takes
	window := least
	for window < min(reach, most) {
		window *= 2
	}
	return zstd.NewWriter(nil, append(opts, zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(window))...)
}

func newDecoder(opts ...zstd.DOption) (*zstd.Decoder, error) {
	return zstd.NewReader(nil, append(opts, zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(maxRequest))...)
}
