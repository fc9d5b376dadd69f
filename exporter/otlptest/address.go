package otlptest

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
)

// FreeAddress returns an address of 127.0.0.1 at which nobody listens. Until the
// test ends, nobody who asks for just any port gets it, and who names it does.
func FreeAddress(tb testing.TB) string {
	tb.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		tb.Fatalf("reserve a port: %v", err)
	}
	syscall.CloseOnExec(fd)
	tb.Cleanup(func() { _ = syscall.Close(fd) })
	// A socket that is bound and does not listen is in the way of no other with
	// SO_REUSEADDR, which is all that net.Listen makes.
	err = errors.Join(syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1),
		syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	name, err2 := syscall.Getsockname(fd)
	if err = errors.Join(err, err2); err != nil {
		tb.Fatalf("reserve a port: %v", err)
	}
	return fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
}
