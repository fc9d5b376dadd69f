package database

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// A mark is a number and its CRC-32C, in a file of its own.
const (
	markSuffix = "-mark"
	markSize   = 12
)

// Mark notes how far the content of the file has come, after that is durable. It is
// not flushed: after a power cut the mark may be behind, but never ahead.
func (db *DB) Mark(n int64) error {
	f, err := openMark(db.path, os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return fmt.Errorf("mark %s: %w", db.path, err)
	}
	_, err = f.WriteAt(record.AppendSum(binary.BigEndian.AppendUint64(nil, uint64(n))), 0)
	return errors.Join(err, f.Close())
}

// Marked returns the last mark of the file at path, or 0 if there is none that can
// be read.
func Marked(path string) int64 {
	f, err := openMark(path, os.O_RDONLY)
	if err != nil {
		return 0
	}
	defer f.Close()
	b := make([]byte, markSize)
	if _, err := io.ReadFull(f, b); err != nil {
		return 0
	}
	if b, err = record.CheckSum(b); err != nil {
		return 0
	}
	return int64(binary.BigEndian.Uint64(b))
}

// openMark does not wait for the other end of a pipe.
func openMark(path string, flags int) (*os.File, error) {
	return os.OpenFile(path+markSuffix, flags|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
}

// DropMark forgets the mark of a file that is no longer at its path.
func DropMark(path string) error {
	if err := os.Remove(path + markSuffix); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
