// Package bus connects to systemd over D-Bus, through a message bus or directly to
// PID 1's own socket.
//
// Two things are needed of it: [Open] makes a [Conn], for calls, signals and Gets; and
// [DialPrivate] makes a [Line] to PID 1 for Gets alone.
//
// It adds three things to godbus, on which it is built. Gets reads many properties in a
// pipeline of calls. Signals count only if systemd or the bus sent them. And no message
// of another peer can fill the memory of this process, or end the connection.
//
//   - private socket: PID 1's own ([PrivateSocket]), without a bus in between. PID 1
//     queues messages that its clients do not read, without an upper bound.
//   - genuine signal: one sent by the peer that owns systemd's name on the bus.
//   - flood: more signals than the queue holds. Further ones are dropped and counted
//     until Resume.
//   - window: the number of calls that may wait for replies at the same time.
//
// A Conn or Line that has lost its socket stays lost; the caller opens another.
package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	// PrivateSocket is the address of PID 1's own socket, which root may use.
	PrivateSocket = "unix:path=/run/systemd/private"

	// SystemdName is systemd's name on the bus, ManagerPath the path of its manager.
	SystemdName = "org.freedesktop.systemd1"
	ManagerPath = "/org/freedesktop/systemd1"

	ManagerInterface    = SystemdName + ".Manager"
	UnitInterface       = SystemdName + ".Unit"
	PropertiesInterface = "org.freedesktop.DBus.Properties"
	// BusInterface is the interface of the bus itself, and its name.
	BusInterface = "org.freedesktop.DBus"

	// CallTimeout bounds connecting, and one message that is written.
	CallTimeout = 25 * time.Second
)

// Private reports whether PID 1 itself is at an address, and not a bus.
func Private(address string) bool { return strings.HasSuffix(address, "/systemd/private") }

// Config says where to connect, and what for.
type Config struct {
	Address string // as D-Bus has it, of the unix kind
	// Wanted reports whether a signal is to be delivered; it must be quick, and may
	// not use the Conn. Nil: no signals are asked for.
	Wanted func(Signal) bool
}

// Signal is a signal before it is decoded. Its slices are valid until Wanted returns.
type Signal struct {
	Path, Interface, Member []byte
	// Text is the first argument where that is a string, and else nil.
	Text []byte
}

// Line is a connection for Gets alone. Its methods may be called from several
// goroutines at the same time.
type Line struct {
	connection *connection
	ended      chan struct{} // closed when nothing reads the connection any more
}

// DialPrivate connects to a private socket for Gets alone. PID 1 sends its signals
// there too: the less time the line is open, the fewer can wait in PID 1 for a process
// that is stopped. ctx bounds the connecting. The caller closes the line.
func DialPrivate(ctx context.Context, address string) (*Line, error) {
	w, err := dial(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("connect to PID 1 at %s: %w", address, err)
	}
	w.window, w.authed = maxInFlightPrivate, true
	l := &Line{connection: w, ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		_, _ = io.Copy(io.Discard, w) // replies go to Gets; its error is there too
	}()
	return l, nil
}

// Gets is like Conn.Gets.
func (l *Line) Gets(ctx context.Context, n int, call func(i int) Property, done func(i int, r Reply)) error {
	return l.connection.gets(ctx, n, call, done)
}

// Close ends the connection, and calls in progress with it.
func (l *Line) Close() error {
	err := l.connection.Close()
	<-l.ended
	return err
}

// Conn is one connection. Its methods may be called from several goroutines at the
// same time.
type Conn struct {
	connection *connection // for Gets
	client     *dbus.Conn  // godbus, on top of it: for all that is rare
}

// Open connects to one address and asks for the signals that the inventory of units
// is made from. ctx bounds the connecting, to CallTimeout at the longest. The caller
// closes the connection. Where there are signals, they must be received.
func Open(ctx context.Context, cfg Config) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	w, err := dial(ctx, cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("connect to systemd at %s: %w", cfg.Address, err)
	}
	w.wanted = cfg.Wanted
	if w.bus = !Private(cfg.Address); !w.bus {
		w.window = maxInFlightPrivate
	}
	client, err := dbus.NewConn(w, dbus.WithSignalHandler(w.flood))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to systemd at %s: %w", cfg.Address, err), w.Close())
	}
	c := &Conn{connection: w, client: client}
	if err = c.hello(ctx); err == nil && cfg.Wanted != nil && w.bus {
		err = c.subscribe(ctx)
	}
	if err != nil {
		if errors.Is(err, dbus.ErrClosed) {
			err = w.failure() // which says why
		}
		return nil, errors.Join(fmt.Errorf("connect to systemd at %s: %w", cfg.Address, err), client.Close())
	}
	return c, nil
}

// hello authenticates and registers the connection, so that calls can be made on it.
func (c *Conn) hello(ctx context.Context) error {
	if err := c.client.Auth([]dbus.Auth{external{}}); err != nil || !c.connection.bus {
		return err
	}
	var name string
	return c.client.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.Hello", 0).Store(&name)
}

// subscribe asks for signals. PID 1 sends them to each client of its private
// socket, unasked and unfiltered.
func (c *Conn) subscribe(ctx context.Context) error {
	// Before any signal of systemd's: who that is, and who it comes to be.
	const ownerRule = "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg0='" + SystemdName + "'"
	if err := c.client.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.AddMatch", 0, ownerRule).Err; err != nil {
		return err
	}
	var owner string
	if err := c.client.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, SystemdName).Store(&owner); err != nil {
		return err
	}
	c.connection.found(owner)
	const fromSystemd = "type='signal',sender='" + SystemdName + "',"
	for _, rule := range []string{
		fromSystemd + "interface='" + ManagerInterface + "',member='UnitNew'",
		fromSystemd + "interface='" + ManagerInterface + "',member='UnitRemoved'",
		fromSystemd + "interface='" + ManagerInterface + "',member='Reloading'",
		fromSystemd + "interface='" + PropertiesInterface + "',member='PropertiesChanged',arg0='" + UnitInterface + "'",
	} {
		if err := c.client.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.AddMatch", 0, rule).Err; err != nil {
			return err
		}
	}
	return c.Manager().CallWithContext(ctx, ManagerInterface+".Subscribe", 0).Err
}

// Object returns one of systemd's objects, for calls.
func (c *Conn) Object(path dbus.ObjectPath) dbus.BusObject { return c.client.Object(SystemdName, path) }

// Manager returns the object of systemd's manager.
func (c *Conn) Manager() dbus.BusObject { return c.Object(ManagerPath) }

// Signals returns the channel of the signals that are wanted. It is closed when the
// connection has ended.
func (c *Conn) Signals() <-chan *dbus.Signal { return c.connection.flood.queue }

// Flooded has a token when there are more signals than can be taken. From then on all
// are dropped, but those of reloads and of systemd's name, until Resume. The receiver
// resumes, and then lists the units.
func (c *Conn) Flooded() <-chan struct{} { return c.connection.flood.began }

// Resume ends what Flooded has begun.
func (c *Conn) Resume() { c.connection.flood.paused.Store(false) }

// Dropped returns how many signals were more than could be taken.
func (c *Conn) Dropped() int64 { return c.connection.flood.dropped.Load() }

// Gets reads n properties with many calls outstanding. call names property i; done
// is called once for each reply, in the order of arrival. Both are called from another
// goroutine as well, but never after Gets has returned. Calls of Gets take turns. It
// ends early with ctx, or with the connection.
func (c *Conn) Gets(ctx context.Context, n int, call func(i int) Property, done func(i int, r Reply)) error {
	return c.connection.gets(ctx, n, call, done)
}

// Private reports whether PID 1 itself is at the other end.
func (c *Conn) Private() bool { return !c.connection.bus }

// Refused returns how many messages were skipped that nobody asked for: not from
// systemd, too long, or without a meaning.
func (c *Conn) Refused() int64 { return c.connection.refused.Load() }

// Err says why the connection has ended.
func (c *Conn) Err() error { return c.connection.failure() }

// Close ends the connection; calls in progress end with an error.
func (c *Conn) Close() error { return c.client.Close() }
