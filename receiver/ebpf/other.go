//go:build !linux || 386 || arm || mips || mipsle

package ebpf

import (
	"context"
	"errors"
	"fmt"
	"runtime"
)

func unsupported() error {
	return fmt.Errorf("eBPF on %s/%s: %w; use 64-bit Linux, or UNITMETER_SOURCE=dbus", runtime.GOOS, runtime.GOARCH, errors.ErrUnsupported)
}

// Load fails on this system.
func Load(context.Context, LoadConfig) (Loaded, error) { return Loaded{}, unsupported() }

// Pinned finds nothing on this system.
func Pinned(string) (current bool, others []string, err error) { return false, nil, nil }

// OwnCgroup fails on this system.
func OwnCgroup() (uint64, error) { return 0, unsupported() }

// Unload fails on this system.
func Unload(string) error { return unsupported() }

// Reader reads nothing on this system.
type Reader struct{}

// Open fails on this system.
func Open(Config) (*Reader, error) { return nil, unsupported() }

// Attach fails on this system.
func Attach(context.Context, Config) (*Reader, error) { return nil, unsupported() }

// Read fails on this system.
func (*Reader) Read() (Sweep, error) { return Sweep{}, unsupported() }

// Idle fails on this system.
func (*Reader) Idle(func(*Identity)) error { return unsupported() }

// Naming returns nil on this system.
func (*Reader) Naming() error { return nil }

// Close does nothing on this system.
func (*Reader) Close() error { return nil }
