package systemd

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/godbus/dbus/v5"

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
	limitsExceeded      = "org.freedesktop.DBus.Error.LimitsExceeded"
)

// Addresses returns the D-Bus addresses at which a Source with this
// configuration looks for systemd, in its order.
func (cfg Config) Addresses() []string {
	system := cmp.Or(cfg.SystemBus, UsualSystemBus)
	switch {
	case cfg.Bus == "private":
		return []string{bus.PrivateSocket}
	case cfg.Bus == "system", (cfg.Bus == "auto" || cfg.Bus == "") && os.Geteuid() != 0:
		return []string{system}
	case cfg.Bus == "auto", cfg.Bus == "":
		return []string{bus.PrivateSocket, system}
	}
	return []string{cfg.Bus}
}

// connect opens the first connection that can be had. The error is that of the
// last address.
func (s *Source) connect(ctx context.Context) (b *bus.Conn, err error) {
	for _, address := range s.cfg.Addresses() {
		if b, err = bus.Open(ctx, bus.Config{Address: address, Wanted: wanted}); err == nil {
			return b, nil
		}
	}
	return nil, fmt.Errorf("%w; is D-Bus running there, and may uid %d use it? set UNITMETER_BUS", err, os.Geteuid())
}

// listed is one row of ListUnitsByPatterns.
type listed struct {
	Name, Description, Load, Active, Sub, Followed string
	Path                                           dbus.ObjectPath
	JobID                                          uint32
	JobType                                        string
	JobPath                                        dbus.ObjectPath
}

// running are the states of units that are not inactive.
var running = []string{"active", "reloading", "refreshing", "activating", "deactivating", "maintenance"}

// list returns the loaded units in any of the states that match any of the patterns.
// It loads nothing.
func list(ctx context.Context, b *bus.Conn, states, patterns []string) ([]listed, error) {
	ctx, cancel := context.WithTimeout(ctx, bus.CallTimeout)
	defer cancel()
	var rows []listed
	err := b.Manager().CallWithContext(ctx, bus.ManagerInterface+".ListUnitsByPatterns", 0, states, patterns).Store(&rows)
	if err != nil {
		return nil, fmt.Errorf("list systemd's units: %w", err)
	}
	return rows, nil
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
