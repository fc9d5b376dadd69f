package bus

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// socket is a connected socket outside the runtime's poller: its calls block a
// thread. The poller wakes a thread for each message that arrives, also while
// nobody wants to read, and a sweep gets thousands of them.
type socket struct{ *os.File }

// newSocket takes over the descriptor of conn, and closes conn.
func newSocket(conn *net.UnixConn) (s *socket, err error) {
	defer func() { err = errors.Join(err, conn.Close()) }()
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var failed error
	err = raw.Control(func(original uintptr) {
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
		if fd, failed = syscall.Dup(int(original)); failed != nil {
			return
		}
		syscall.CloseOnExec(fd)
		if failed = syscall.SetNonblock(fd, false); failed != nil {
			_ = syscall.Close(fd)
		}
	})
	if err := errors.Join(err, failed); err != nil {
		return nil, fmt.Errorf("take over the connection: %w", err)
	}
	return &socket{os.NewFile(uintptr(fd), "D-Bus")}, nil
}

// control calls f with the descriptor.
func (s *socket) control(f func(fd int) error) error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	return errors.Join(raw.Control(func(fd uintptr) { failed = f(int(fd)) }), failed)
}

// SetWriteDeadline bounds the next Write; the zero time means never.
func (s *socket) SetWriteDeadline(deadline time.Time) error {
	var limit syscall.Timeval // zero means none
	if !deadline.IsZero() {
		limit = syscall.NsecToTimeval(max(time.Until(deadline), time.Millisecond).Nanoseconds())
	}
	return s.control(func(fd int) error {
		return os.NewSyscallError("setsockopt", syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &limit))
	})
}

// Write writes p. Over the deadline the error is os.ErrDeadlineExceeded.
func (s *socket) Write(p []byte) (int, error) {
	n, err := s.File.Write(p)
	if errors.Is(err, syscall.EAGAIN) {
		err = os.ErrDeadlineExceeded
	}
	return n, err
}

// Close ends the connection, and with it a Read and a Write in progress.
func (s *socket) Close() error {
	// Closing the descriptor alone would leave them waiting. The peer may have
	// hung up, so that there is nothing to shut down.
	_ = s.control(func(fd int) error { return syscall.Shutdown(fd, syscall.SHUT_RDWR) })
	return s.File.Close()
}
