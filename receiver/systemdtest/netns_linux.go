package systemdtest

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Listen listens inside the rig's network on behalf of this process, so that a
// server in a test can be reached from the units. Its traffic belongs to no unit
// on this side. network and addr are those of [net.Listen].
func (r *Rig) Listen(ctx context.Context, network, addr string) (net.Listener, error) {
	var l net.Listener
	err := r.inNetwork(func() (err error) {
		l, err = new(net.ListenConfig).Listen(ctx, network, addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s in the rig: %w", addr, err)
	}
	return l, nil
}

// Dial connects from inside the rig's network on behalf of this process. The
// host in addr must be an IP address: for a name, net dials from other threads.
func (r *Rig) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := r.inNetwork(func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dial %s in the rig: %w", addr, err)
	}
	return c, nil
}

// inNetwork runs f on a thread in the rig's network namespace. A socket stays in
// the namespace in which it was made.
func (r *Rig) inNetwork(f func() error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and no other one
		// can inherit its namespace.
		runtime.LockOSThread()
		done <- func() error {
			ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", r.pid))
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter network namespace: %w", err)
			}
			return f()
		}()
	}()
	return <-done
}
