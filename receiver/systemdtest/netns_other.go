//go:build !linux

package systemdtest

import (
	"context"
	"errors"
	"net"
)

// Listen is for Linux. Boot refuses other systems, so it is never reached.
func (r *Rig) Listen(context.Context, string, string) (net.Listener, error) {
	return nil, errors.ErrUnsupported
}

// Dial is for Linux, as Listen is.
func (r *Rig) Dial(context.Context, string, string) (net.Conn, error) {
	return nil, errors.ErrUnsupported
}
