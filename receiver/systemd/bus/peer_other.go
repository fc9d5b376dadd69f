//go:build !linux

package bus

import "errors"

// Peer needs Linux.
func (c *Conn) Peer() (pid int, err error) { return 0, errors.ErrUnsupported }
