//go:build !linux

package doctor

import (
	"errors"
	"time"
)

// The doctor refuses to run here. These let it compile.

const (
	cgroupV1 = 1
	cgroupV2 = 2
)

func fileSystem(string) int64 { return 0 }

func clockSynchronized() (bool, error) { return false, errors.ErrUnsupported }

func sinceBoot() (time.Duration, error) { return 0, errors.ErrUnsupported }
