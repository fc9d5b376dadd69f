package accounting

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// Manager is a connection to systemd for the few calls of a command. Readings of
// counters come from a Source.
type Manager struct {
	conn *bus.Conn
	// Address is the bus that answered.
	Address string
}

// BusError is one bus that could not be used. Err names its address too.
type BusError struct {
	Address string
	Err     error
}

func (e *BusError) Error() string { return e.Err.Error() }

func (e *BusError) Unwrap() error { return e.Err }

// Connect connects to the first bus that answers. The error joins a
// *BusError for each that does not. The caller closes the manager.
func Connect(ctx context.Context, addresses ...string) (*Manager, error) {
	return connect(ctx, addresses, nil)
}

// Follow is Connect for Reloaded.
func Follow(ctx context.Context, addresses ...string) (*Manager, error) {
	return connect(ctx, addresses, func(s bus.Signal) bool {
		return string(s.Member) == "Reloading" || string(s.Member) == "NameOwnerChanged"
	})
}

// Reloaded waits until systemd has reloaded or re-executed itself. An error says that
// ctx or the connection has ended.
func (m *Manager) Reloaded(ctx context.Context) error {
	for {
		select {
		case signal, ok := <-m.conn.Signals():
			if !ok {
				return fmt.Errorf("follow systemd's reloads: %w", m.conn.Err())
			}
			// Reloading(false), or the new owner of systemd's name.
			over := len(signal.Body) == 1 && signal.Body[0] == false
			if over || len(signal.Body) == 3 && signal.Body[2] != "" {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func connect(ctx context.Context, addresses []string, wanted func(bus.Signal) bool) (*Manager, error) {
	var errs []error
	for _, address := range addresses {
		conn, err := bus.Open(ctx, bus.Config{Address: address, Wanted: wanted})
		if err == nil {
			return &Manager{conn, address}, nil
		}
		errs = append(errs, &BusError{address, err})
	}
	return nil, errors.Join(errs...)
}

// Close ends the connection.
func (m *Manager) Close() { _ = m.conn.Close() }

// callTimeout bounds one call, and not a command: there may be thousands of units.
const callTimeout = 30 * time.Second

// Call calls a method of the manager.
func (m *Manager) Call(ctx context.Context, method string, args ...any) *dbus.Call {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return m.conn.Manager().CallWithContext(ctx, bus.ManagerInterface+"."+method, 0, args...)
}

// Reload has systemd read its configuration anew, and waits until it says that it has:
// no earlier than its generators end. Now and then, waiting gets the time since the
// call. The end of ctx ends the wait, and not the reload.
func (m *Manager) Reload(ctx context.Context, waiting func(time.Duration)) error {
	const every = 3 * time.Second
	began := time.Now()
	call := m.conn.Manager().GoWithContext(ctx, bus.ManagerInterface+".Reload", 0, make(chan *dbus.Call, 1))
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			waiting(time.Since(began))
		case done := <-call.Done:
			return done.Err
		}
	}
}

// Get reads one property.
func (m *Manager) Get(ctx context.Context, object dbus.ObjectPath, iface, property string, to any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var v dbus.Variant
	err := m.conn.Object(object).
		CallWithContext(ctx, bus.PropertiesInterface+".Get", 0, iface, property).Store(&v)
	if err == nil {
		err = dbus.Store([]any{v.Value()}, to)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", property, err)
	}
	return nil
}

// Property reads one property of the manager itself.
func (m *Manager) Property(ctx context.Context, property string, to any) error {
	return m.Get(ctx, bus.ManagerPath, bus.ManagerInterface, property, to)
}

// MachineID asks systemd for the id of the machine that it runs on.
func (m *Manager) MachineID(ctx context.Context) (id string, err error) {
	err = m.conn.Manager().CallWithContext(ctx, "org.freedesktop.DBus.Peer.GetMachineId", 0).Store(&id)
	return id, err
}

// Outside reports whether systemd, or the bus to it, is of another system than this
// process: in a container that was given the host's bus, files of this process are
// not systemd's. It compares root directories, and is false where it may not look.
func (m *Manager) Outside() bool {
	pid, err := m.conn.Peer()
	if err != nil {
		return false
	}
	if pid == 0 {
		return true // not even in this PID namespace
	}
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/root/", pid))
	if err != nil {
		return false
	}
	ours, err := os.Stat("/")
	return err == nil && !os.SameFile(theirs, ours)
}

// Default reads DefaultIPAccounting. systemd answers since version
// 254; before, a unit that does not exist has it: systemd makes one up for the
// question, with the defaults, and forgets it.
func (m *Manager) Default(ctx context.Context) (on bool, err error) {
	err = m.Property(ctx, "DefaultIPAccounting", &on)
	if !ErrorIs(err, "org.freedesktop.DBus.Error.UnknownProperty") {
		return on, err
	}
	const nobody = "unitmeter-asks-for-the-defaults.service"
	p, _, err := m.Load(ctx, nobody)
	if err != nil {
		return false, err
	}
	err = m.Get(ctx, p, counterInterface(nobody), "IPAccounting", &on)
	return on, err
}

// Unit is one loaded unit as systemd shows it now.
type Unit struct {
	Name      string
	Path      dbus.ObjectPath
	iface     string
	On        bool // IPAccounting=
	HasData   bool // the counters have values
	Active    bool // has a cgroup, in which there may be something to count
	Transient bool // made by a program, such as systemd-run; gone after its end
	// Whether the unit has its own setting: permanent, and until the next boot.
	Persistent, Runtime bool
}

// Lost says that a unit should have counters and has none.
func (u Unit) Lost() bool {
	kind := path.Ext(u.Name)
	return u.On && !u.HasData && u.Active && (kind == ".service" || kind == ".scope")
}

// Load loads a unit, if it is not loaded. state is its LoadState: systemd answers for
// any name, with "not-found" where there is no file.
func (m *Manager) Load(ctx context.Context, name string) (p dbus.ObjectPath, state string, err error) {
	if err := m.Call(ctx, "LoadUnit", name).Store(&p); err != nil {
		return "", "", err
	}
	err = m.Get(ctx, p, bus.UnitInterface, "LoadState", &state)
	return p, state, err
}

// rows lists loaded units by their states, of loading too, and a pattern.
func (m *Manager) rows(ctx context.Context, states []string, pattern string) ([]systemd.Listed, error) {
	rows, _, err := systemd.List(ctx, m.conn, states, []string{pattern})
	return rows, err
}

// own returns the own names of loaded units, by their aliases (Alias=) in names.
func (m *Manager) own(ctx context.Context, names []string) map[string]string {
	own := map[string]string{}
	for _, name := range names {
		var p dbus.ObjectPath
		var id string
		if !systemd.IsPattern(name) && m.Call(ctx, "GetUnit", name).Store(&p) == nil && m.Get(ctx, p, bus.UnitInterface, "Id", &id) == nil {
			own[name] = id
		}
	}
	return own
}

// Loaded lists the loaded units in the given states (none: any) that match.
func (m *Manager) Loaded(ctx context.Context, states []string, pattern string) ([]Unit, error) {
	rows, err := m.rows(ctx, states, pattern)
	if err != nil {
		return nil, err
	}
	var units []Unit
	for _, row := range rows {
		if counterInterface(row.Name) == "" || row.Load != "loaded" {
			continue
		}
		u, err := m.Unit(ctx, row.Name, row.Path)
		switch {
		case ErrorIs(err, "org.freedesktop.DBus.Error.UnknownObject", "org.freedesktop.systemd1.NoSuchUnit"):
			continue // it ended meanwhile
		case err != nil:
			return nil, err
		}
		units = append(units, u)
	}
	slices.SortFunc(units, func(a, b Unit) int { return strings.Compare(a.Name, b.Name) })
	return units, nil
}

// Active reports whether a unit is active; false where nobody knows.
func (m *Manager) Active(ctx context.Context, name string) bool {
	rows, err := m.rows(ctx, []string{"active"}, name)
	return err == nil && len(rows) > 0
}

// StartedSinceLoad reports whether any of the units was started after systemd last read
// its configuration.
func (m *Manager) StartedSinceLoad(ctx context.Context, names []string) (bool, error) {
	var loaded, started uint64 // in microseconds
	if err := m.Property(ctx, "UnitsLoadTimestampMonotonic", &loaded); err != nil {
		return false, err
	}
	for _, name := range names {
		var p dbus.ObjectPath
		if m.Call(ctx, "GetUnit", name).Store(&p) == nil && m.Get(ctx, p, bus.UnitInterface, "InactiveExitTimestampMonotonic", &started) == nil && started > loaded {
			return true, nil
		}
	}
	return false, nil
}

// Quiet returns the loaded services with IP accounting whose LogLevelMax= keeps
// their stop records out of the journal.
func (m *Manager) Quiet(ctx context.Context) (quiet []string, err error) {
	rows, err := m.rows(ctx, []string{"loaded"}, "*.service")
	for _, row := range rows {
		const info = 6
		level, on := int32(-1), false
		iface := counterInterface(row.Name)
		if m.Get(ctx, row.Path, iface, "LogLevelMax", &level) == nil && level >= 0 && level < info &&
			m.Get(ctx, row.Path, iface, "IPAccounting", &on) == nil && on {
			quiet = append(quiet, row.Name)
		}
	}
	return quiet, err
}

// Unit reads the state of one unit.
func (m *Manager) Unit(ctx context.Context, name string, p dbus.ObjectPath) (Unit, error) {
	u := Unit{Name: name, Path: p, iface: counterInterface(name)}
	var active, cgroup string
	var dropIns []string
	var bytes uint64
	for _, property := range []struct {
		iface, name string
		to          any
	}{
		{bus.UnitInterface, "Id", &u.Name}, // the name asked for may be an alias
		{bus.UnitInterface, "ActiveState", &active},
		{bus.UnitInterface, "Transient", &u.Transient},
		{bus.UnitInterface, "DropInPaths", &dropIns},
		{u.iface, "ControlGroup", &cgroup},
		{u.iface, "IPAccounting", &u.On},
		{u.iface, "IPEgressBytes", &bytes},
	} {
		if err := m.Get(ctx, p, property.iface, property.name, property.to); err != nil {
			return u, fmt.Errorf("read unit %s: %w", name, err)
		}
	}
	u.Active = active != "inactive" && active != "failed" && cgroup != ""
	u.HasData = bytes != noData
	for _, file := range dropIns {
		if path.Base(file) == SettingFile {
			u.Persistent = u.Persistent || strings.HasPrefix(file, PersistentDir+"/")
			u.Runtime = u.Runtime || strings.HasPrefix(file, RuntimeDir+"/")
		}
	}
	return u, nil
}

// EgressBytes reads what a unit has sent, in bytes. ok is false where systemd has
// no number.
func (m *Manager) EgressBytes(ctx context.Context, u Unit) (n uint64, ok bool, err error) {
	err = m.Get(ctx, u.Path, u.iface, "IPEgressBytes", &n)
	return n, n != noData, err
}

// Filtered reports whether a unit has addresses in IPAddressDeny=.
func (m *Manager) Filtered(ctx context.Context, u Unit) (bool, error) {
	var denied []struct {
		Family  int32
		Address []byte
		Prefix  uint32
	}
	err := m.Get(ctx, u.Path, u.iface, "IPAddressDeny", &denied)
	return len(denied) > 0, err
}

// HasProcesses reports whether there is a process in a unit's cgroup; true where
// it is not known. systemd keeps the cgroups of mounts that it has mounted.
func (m *Manager) HasProcesses(ctx context.Context, unit string) bool {
	var processes []struct {
		Cgroup  string
		PID     uint32
		Command string
	}
	err := m.Call(ctx, "GetUnitProcesses", unit).Store(&processes)
	return err != nil || len(processes) > 0
}

// Where systemd keeps what SetUnitProperties sets. The first wins over the second.
const (
	PersistentDir = "/etc/systemd/system.control"
	RuntimeDir    = "/run/systemd/system.control"
	SettingFile   = "50-IPAccounting.conf"
)

// noData is what systemd answers for a counter that it does not have.
const noData = 1<<64 - 1

// ErrorIs reports whether err is one of the D-Bus errors of that name.
func ErrorIs(err error, names ...string) bool {
	var refused dbus.Error
	return errors.As(err, &refused) && slices.Contains(names, refused.Name)
}

// Denied reports whether systemd or the bus refused the rights of the caller.
func Denied(err error) bool {
	return ErrorIs(err, "org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
		"org.freedesktop.DBus.Error.AuthFailed")
}

// Version asks systemd for its version.
func (m *Manager) Version(ctx context.Context) (Version, error) {
	var text string
	if err := m.Property(ctx, "Version", &text); err != nil {
		return Version{}, err
	}
	return ParseVersion(text)
}

// Version is what the manager's property Version begins with.
type Version struct{ Major, Minor int }

// ParseVersion reads "252.38-1~deb12u1", "v258" or "256~rc3-1". The release
// candidates of a version are taken for the version.
func ParseVersion(text string) (v Version, err error) {
	_, _ = fmt.Sscanf(strings.TrimLeft(text, " v"), "%d.%d", &v.Major, &v.Minor) // some have no minor number
	if v.Major <= 0 {
		return Version{}, fmt.Errorf("read systemd's version %q: it does not begin with a number", text)
	}
	return v, nil
}

// LosesAtReload reports whether this systemd loses the counters of running units at
// a daemon-reload, and leaves units without that get accounting by it
// (systemd#38112).
func (v Version) LosesAtReload() bool { return !v.Before(256, 0) && v.Before(258, 0) }

func (v Version) String() string {
	if v.Minor == 0 {
		return strconv.Itoa(v.Major)
	}
	return fmt.Sprintf("%d.%d", v.Major, v.Minor)
}

// Before reports whether v is older than the given version.
func (v Version) Before(major, minor int) bool {
	return v.Major < major || v.Major == major && v.Minor < minor
}
