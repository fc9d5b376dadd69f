package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	managerPath         = "/org/freedesktop/systemd1"
	callTimeout         = 25 * time.Second // one call that is not part of a sweep
	noUnitForInvocation = "org.freedesktop.systemd1.NoUnitForInvocationID"
	noSuchUnit          = "org.freedesktop.systemd1.NoSuchUnit"
	unknownObject       = "org.freedesktop.DBus.Error.UnknownObject"
	noReply             = "org.freedesktop.DBus.Error.NoReply" // systemd re-executes itself
	nameHasNoOwner      = "org.freedesktop.DBus.Error.NameHasNoOwner"
	serviceUnknown      = "org.freedesktop.DBus.Error.ServiceUnknown"
	limitsExceeded      = "org.freedesktop.DBus.Error.LimitsExceeded"
)

// bus is one connection to systemd: over a message bus, or to PID 1 directly.
type bus struct {
	conn    *connection // for sweeps
	client  *dbus.Conn  // godbus, on top of conn: for all that is rare
	signals chan *dbus.Signal
	private bool // PID 1 itself is at the other end
}

// connect opens the first connection that can be had. The error is that of the
// last address.
func (s *Source) connect(ctx context.Context) (b *bus, err error) {
	for _, address := range s.cfg.Addresses() {
		if b, err = open(ctx, address, private(address)); err == nil {
			return b, nil
		}
	}
	return nil, fmt.Errorf("%w; is D-Bus running there, and may uid %d use it? set UNITMETER_BUS", err, os.Geteuid())
}

// open connects to one address and asks for the signals of the inventory.
func open(ctx context.Context, address string, private bool) (*bus, error) {
	return openFor(ctx, address, private, true)
}

// openFor is open. Without signals, nobody need read them: what is not read
// would pile up without a bound.
func openFor(ctx context.Context, address string, private, signals bool) (*bus, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	w, err := dial(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("connect to systemd at %s: %w", address, err)
	}
	w.bus = !private
	if private {
		w.window = maxInFlightPrivate
	}
	client, err := dbus.NewConn(w, dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to systemd at %s: %w", address, err), w.Close())
	}
	b := &bus{conn: w, client: client, signals: make(chan *dbus.Signal, 64), private: private}
	if signals {
		client.Signal(b.signals)
	}
	if err = b.hello(ctx); err == nil && signals {
		err = b.subscribe(ctx)
	}
	if err != nil {
		if errors.Is(err, dbus.ErrClosed) {
			err = w.failure() // which says why
		}
		return nil, errors.Join(fmt.Errorf("subscribe to systemd's signals at %s: %w", address, err), client.Close())
	}
	return b, nil
}

// hello makes the connection one that calls can be made on.
func (b *bus) hello(ctx context.Context) error {
	if err := b.client.Auth([]dbus.Auth{external{}}); err != nil || b.private {
		return err
	}
	var name string
	return b.client.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.Hello", 0).Store(&name)
}

// subscribe asks for signals. PID 1 sends them to each client of its private
// socket, unasked and unfiltered.
func (b *bus) subscribe(ctx context.Context) error {
	if b.private {
		return nil
	}
	// Before any signal of systemd's: who that is, and who it comes to be.
	const ownerRule = "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg0='" + systemdName + "'"
	if err := b.client.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.AddMatch", 0, ownerRule).Err; err != nil {
		return err
	}
	var owner string
	if err := b.client.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, systemdName).Store(&owner); err != nil {
		return err
	}
	b.conn.found(owner)
	const fromSystemd = "type='signal',sender='" + systemdName + "',"
	for _, rule := range []string{
		fromSystemd + "interface='" + managerInterface + "',member='UnitNew'",
		fromSystemd + "interface='" + managerInterface + "',member='UnitRemoved'",
		fromSystemd + "interface='" + managerInterface + "',member='Reloading'",
		fromSystemd + "interface='" + propertiesInterface + "',member='PropertiesChanged',arg0='" + unitInterface + "'",
	} {
		if err := b.client.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.AddMatch", 0, rule).Err; err != nil {
			return err
		}
	}
	return b.client.Object(systemdName, managerPath).CallWithContext(ctx, managerInterface+".Subscribe", 0).Err
}

// listed is one row of ListUnitsByPatterns.
type listed struct {
	Name, Description, Load, Active, Sub, Followed string
	Path                                           dbus.ObjectPath
	JobID                                          uint32
	JobType                                        string
	JobPath                                        dbus.ObjectPath
}

// list returns the loaded units that match any of the patterns and are not
// inactive. It loads nothing.
func (b *bus) list(ctx context.Context, patterns []string) ([]listed, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	states := []string{"active", "reloading", "refreshing", "activating", "deactivating", "maintenance"}
	var rows []listed
	err := b.client.Object(systemdName, managerPath).
		CallWithContext(ctx, managerInterface+".ListUnitsByPatterns", 0, states, patterns).Store(&rows)
	if err != nil {
		return nil, fmt.Errorf("list systemd's units: %w", err)
	}
	return rows, nil
}

// version returns the major version of systemd, or 0 if it does not say.
func (b *bus) version(ctx context.Context) (version int, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = b.conn.gets(ctx, 1, func(int) property {
		return property{managerPath, managerInterface, "Version"} // "252.39-1~deb12u2"
	}, func(_ int, reply reply) {
		text, _ := reply.string()
		end := strings.IndexFunc(text, func(c rune) bool { return c < '0' || c > '9' })
		version, _ = strconv.Atoi(text[:max(end, 0)])
	})
	if err != nil {
		return 0, fmt.Errorf("read the version of systemd: %w", err)
	}
	return version, nil
}
