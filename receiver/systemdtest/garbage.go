package systemdtest

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/godbus/dbus/v5"
)

// StartGarbage starts a D-Bus server that completes the handshake of each client
// and then writes the given bytes, whatever they are: first at once, each of then
// after one more message of the client has arrived (an empty part only counts).
// The connection stays open until the client closes it or the test ends. It
// returns the D-Bus address.
func StartGarbage(t testing.TB, first []byte, then ...[]byte) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "unitmeter-garbage-") // short, for a socket
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "bus")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.Map // of net.Conn, to be closed at the end
	var wg sync.WaitGroup
	wg.Go(func() { // until l is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Store(c, nil)
			wg.Go(func() { // until c is closed by either side
				defer c.Close()
				if err := serveGarbage(c, append([][]byte{first}, then...)); err != nil && !isClosed(err) {
					t.Errorf("garbage peer: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
		wg.Wait()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return "unix:path=" + path
}

// isClosed tells the end of a connection, which is the client's to choose, from
// a mistake in a script.
func isClosed(err error) bool {
	var network *net.OpError
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &network)
}

func serveGarbage(c net.Conn, parts [][]byte) error {
	in := bufio.NewReader(c)
	if _, err := in.ReadByte(); err != nil { // the zero byte of credentials
		return err
	}
	for begun := false; !begun; {
		line, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		answer := "ERROR\r\n" // as the specification wants it for what is not known
		switch {
		case strings.HasPrefix(line, "AUTH EXTERNAL"), strings.HasPrefix(line, "DATA"):
			answer = "OK 0123456789abcdef0123456789abcdef\r\n"
		case strings.HasPrefix(line, "AUTH"):
			answer = "REJECTED EXTERNAL\r\n"
		case strings.HasPrefix(line, "NEGOTIATE_UNIX_FD"):
			answer = "AGREE_UNIX_FD\r\n"
		case strings.HasPrefix(line, "BEGIN"):
			answer, begun = "", true
		}
		if _, err := io.WriteString(c, answer); err != nil {
			return err
		}
	}
	for i, part := range parts {
		// Whole messages, not reads: a client may write a message in pieces.
		if i > 0 {
			if _, err := dbus.DecodeMessage(in); err != nil {
				return err
			}
		}
		if _, err := c.Write(part); err != nil {
			return err
		}
	}
	_, err := io.Copy(io.Discard, in) // until the client has had enough
	return err
}
