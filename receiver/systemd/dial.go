package systemd

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// UsualSystemBus is the default of Config.SystemBus.
const UsualSystemBus = "unix:path=/run/dbus/system_bus_socket"

// Names of D-Bus errors.
const (
	noUnitForInvocation = "org.freedesktop.systemd1.NoUnitForInvocationID"
	noSuchUnit          = "org.freedesktop.systemd1.NoSuchUnit"
	unknownObject       = "org.freedesktop.DBus.Error.UnknownObject"
	noReply             = "org.freedesktop.DBus.Error.NoReply" // systemd re-executes itself
	nameHasNoOwner      = "org.freedesktop.DBus.Error.NameHasNoOwner"
	serviceUnknown      = "org.freedesktop.DBus.Error.ServiceUnknown"
	invalidArgs         = "org.freedesktop.DBus.Error.InvalidArgs"
	limitsExceeded      = "org.freedesktop.DBus.Error.LimitsExceeded"
)

// Addresses returns the D-Bus addresses at which a Source with this configuration
// looks for systemd, in its order. The bus comes first: PID 1 keeps in its own memory
// what a client of its socket does not read, and the bus cuts off such a client.
func (cfg Config) Addresses() []string {
	system := cmp.Or(cfg.SystemBus, UsualSystemBus)
	switch {
	case cfg.Bus == "private":
		return []string{cmp.Or(cfg.PrivateSocket, bus.PrivateSocket)}
	case cfg.Bus == "system", (cfg.Bus == "auto" || cfg.Bus == "") && os.Geteuid() != 0:
		return []string{system}
	case cfg.Bus == "auto", cfg.Bus == "":
		return []string{system, cmp.Or(cfg.PrivateSocket, bus.PrivateSocket)}
	}
	return []string{cfg.Bus}
}

// connect opens the first connection that works. Of two errors it returns the one of
// the system bus.
func (s *Source) connect(ctx context.Context) (*bus.Conn, error) {
	var first error
	for _, address := range s.cfg.Addresses() {
		b, err := bus.Open(ctx, bus.Config{Address: address, Wanted: wanted})
		if err == nil {
			return b, nil
		}
		first = cmp.Or(first, err)
	}
	return nil, fmt.Errorf("%w; is D-Bus running there, and may uid %d use it? set UNITMETER_BUS", first, os.Geteuid())
}

// betterBus reports whether the system bus works by now, if the connection is to PID 1's
// own socket because it did not.
func (s *Source) betterBus(ctx context.Context, b *bus.Conn) bool {
	addresses := s.cfg.Addresses()
	if !b.Private() || bus.Private(addresses[0]) {
		return false
	}
	other, err := bus.Open(ctx, bus.Config{Address: addresses[0], Wanted: wanted})
	if err != nil {
		return false
	}
	_ = other.Close()
	return true
}

// shortcut returns the address of PID 1's own socket, if sweeps can go there: b is a
// bus, and the systemd on it is PID 1. In a container with the host's bus it is not.
func (s *Source) shortcut(ctx context.Context, b *bus.Conn) string {
	if s.cfg.Bus != "auto" || os.Geteuid() != 0 || b.Private() {
		return ""
	}
	line, err := bus.DialPrivate(ctx, s.cfg.PrivateSocket)
	if err != nil {
		return ""
	}
	defer line.Close()
	var began [2]uint64 // no two managers have begun in the same microsecond
	for i, asked := range []getter{b, line} {
		err := asked.Gets(ctx, 1, func(int) bus.Property {
			return bus.Property{Path: bus.ManagerPath, Interface: bus.ManagerInterface, Name: "UserspaceTimestamp"}
		}, func(_ int, reply bus.Reply) { began[i], _ = reply.Uint64() })
		if err != nil || began[i] == 0 || began[i] != began[0] {
			return ""
		}
	}
	return s.cfg.PrivateSocket
}

// getter reads properties: a connection, or a line beside it.
type getter interface {
	Gets(ctx context.Context, n int, call func(i int) bus.Property, done func(i int, r bus.Reply)) error
}

// beside is a line to PID 1's own socket, beside the bus that has the signals.
type beside struct {
	*bus.Line
	bus *bus.Conn
}

// Gets implements getter. Signals that were sent before the last reply have arrived
// when it returns, as they have where both use one connection.
func (l beside) Gets(ctx context.Context, n int, call func(i int) bus.Property, done func(i int, r bus.Reply)) error {
	if err := l.Line.Gets(ctx, n, call, done); err != nil || n == 0 {
		return err
	}
	return l.bus.Gets(ctx, 1, func(int) bus.Property {
		return bus.Property{Path: bus.ManagerPath, Interface: bus.ManagerInterface, Name: "Version"}
	}, func(int, bus.Reply) {})
}

// versionOf returns the major version of systemd, or 0 if it does not say.
func versionOf(ctx context.Context, b *bus.Conn) (version int, err error) {
	ctx, cancel := context.WithTimeout(ctx, bus.CallTimeout)
	defer cancel()
	err = b.Gets(ctx, 1, func(int) bus.Property {
		return bus.Property{Path: bus.ManagerPath, Interface: bus.ManagerInterface, Name: "Version"} // "252.39-1~deb12u2"
	}, func(_ int, reply bus.Reply) {
		text, _ := reply.Text()
		end := strings.IndexFunc(text, func(c rune) bool { return c < '0' || c > '9' })
		version, _ = strconv.Atoi(text[:max(end, 0)])
	})
	if err != nil {
		return 0, fmt.Errorf("read the version of systemd: %w", err)
	}
	return version, nil
}
