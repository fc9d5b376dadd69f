package systemd

import (
	"cmp"
	"context"
	"os"
	"strings"

	"github.com/godbus/dbus/v5"
)

const (
	// PrivateBus is the address of PID 1's own socket, which root may use.
	// There is no bus behind it.
	PrivateBus = "unix:path=/run/systemd/private"
	// UsualSystemBus is the default of Config.SystemBus.
	UsualSystemBus = "unix:path=/run/dbus/system_bus_socket"
)

// private reports whether PID 1 itself is at an address, and not a bus.
func private(address string) bool { return strings.HasSuffix(address, "/systemd/private") }

// Addresses returns the D-Bus addresses at which a Source with this
// configuration looks for systemd, in its order.
func (cfg Config) Addresses() []string {
	system := cmp.Or(cfg.SystemBus, UsualSystemBus)
	switch {
	case cfg.Bus == "private":
		return []string{PrivateBus}
	case cfg.Bus == "system", (cfg.Bus == "auto" || cfg.Bus == "") && os.Geteuid() != 0:
		return []string{system}
	case cfg.Bus == "auto", cfg.Bus == "":
		return []string{PrivateBus, system}
	}
	return []string{cfg.Bus}
}

// Dial connects to systemd at one address in the way of a Receiver, for calls
// other than readings. It gets no signals. ctx bounds the connecting, to 25 s at
// the most; the caller closes the connection.
func Dial(ctx context.Context, address string) (*dbus.Conn, error) {
	b, err := openFor(ctx, address, private(address), false)
	if err != nil {
		return nil, err
	}
	return b.client, nil
}
