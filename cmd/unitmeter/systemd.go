package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver"
)

const (
	systemdName      = "org.freedesktop.systemd1"
	managerPath      = "/org/freedesktop/systemd1"
	managerInterface = "org.freedesktop.systemd1.Manager"
	unitInterface    = "org.freedesktop.systemd1.Unit"
)

// accountable are the types of unit that have IP counters.
func accountable() []string { return append(receiver.DefaultTypes(), "slice") }

// counterInterface is the D-Bus interface that has IPAccounting and the
// counters of a unit, or "" for a type of unit without.
func counterInterface(unit string) string {
	return receiver.CounterInterface(strings.TrimPrefix(path.Ext(unit), "."))
}

// manager is a connection to systemd for the few calls of a command that a
// person waits for. What reads counters all the time is the receiver.
type manager struct {
	conn    *dbus.Conn
	address string
}

// busError is one bus that could not be used; err names its address too.
type busError struct {
	address string
	err     error
}

func (e *busError) Error() string { return e.err.Error() }

func (e *busError) Unwrap() error { return e.err }

// openManager connects to the first bus that answers. The error joins a
// *busError for each that does not. The caller closes the manager.
func openManager(ctx context.Context, addresses ...string) (*manager, error) {
	var errs []error
	for _, address := range addresses {
		conn, err := receiver.Dial(ctx, address)
		if err == nil {
			return &manager{conn, address}, nil
		}
		errs = append(errs, &busError{address, err})
	}
	return nil, errors.Join(errs...)
}

func (m *manager) close() { _ = m.conn.Close() }

// call calls a method of the manager.
func (m *manager) call(ctx context.Context, method string, args ...any) *dbus.Call {
	return m.conn.Object(systemdName, managerPath).CallWithContext(ctx, managerInterface+"."+method, 0, args...)
}

// get reads one property.
func (m *manager) get(ctx context.Context, path dbus.ObjectPath, iface, property string, to any) error {
	var v dbus.Variant
	err := m.conn.Object(systemdName, path).
		CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, iface, property).Store(&v)
	if err == nil {
		err = dbus.Store([]any{v.Value()}, to)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", property, err)
	}
	return nil
}

// defaultAccounting reads DefaultIPAccounting. systemd tells it since version
// 254; before, a unit that does not exist has it: systemd makes one up for the
// question, with the defaults, and forgets it.
func (m *manager) defaultAccounting(ctx context.Context) (on bool, err error) {
	err = m.get(ctx, managerPath, managerInterface, "DefaultIPAccounting", &on)
	if !dbusErrorIs(err, "org.freedesktop.DBus.Error.UnknownProperty") {
		return on, err
	}
	const nobody = "unitmeter-asks-for-the-defaults.service"
	var p dbus.ObjectPath
	if err := m.call(ctx, "LoadUnit", nobody).Store(&p); err != nil {
		return false, err
	}
	err = m.get(ctx, p, counterInterface(nobody), "IPAccounting", &on)
	return on, err
}

// accountedUnit is one loaded unit as systemd shows it now.
type accountedUnit struct {
	name      string
	path      dbus.ObjectPath
	iface     string
	on        bool // IPAccounting=
	hasData   bool // the counters have values
	active    bool // has a cgroup, in which there may be something to count
	transient bool // made by a program, such as systemd-run; gone after its end
	// Whether there is a setting of its own, for good and until the next boot.
	persistent, runtime bool
}

// lost says that a unit should have counters and has none.
func (u accountedUnit) lost() bool {
	kind := path.Ext(u.name)
	return u.on && !u.hasData && u.active && (kind == ".service" || kind == ".scope")
}

// loaded lists the loaded units in the given states (none: any) that match.
func (m *manager) loaded(ctx context.Context, states []string, pattern string) ([]accountedUnit, error) {
	var rows []struct {
		Name, Description, Load, Active, Sub, Followed string
		Path                                           dbus.ObjectPath
		JobID                                          uint32
		JobType                                        string
		JobPath                                        dbus.ObjectPath
	}
	// fnmatch(3) takes a backslash for an escape, names of units have real ones.
	patterns := []string{strings.ReplaceAll(pattern, `\`, `\\`)}
	if err := m.call(ctx, "ListUnitsByPatterns", states, patterns).Store(&rows); err != nil {
		return nil, fmt.Errorf("list systemd's units: %w", err)
	}
	var units []accountedUnit
	for _, row := range rows {
		if counterInterface(row.Name) == "" || row.Load != "loaded" {
			continue
		}
		u, err := m.unit(ctx, row.Name, row.Path)
		switch {
		case dbusErrorIs(err, "org.freedesktop.DBus.Error.UnknownObject", "org.freedesktop.systemd1.NoSuchUnit"):
			continue // it ended meanwhile
		case err != nil:
			return nil, err
		}
		units = append(units, u)
	}
	slices.SortFunc(units, func(a, b accountedUnit) int { return strings.Compare(a.name, b.name) })
	return units, nil
}

// unit reads the state of one unit.
func (m *manager) unit(ctx context.Context, name string, p dbus.ObjectPath) (accountedUnit, error) {
	u := accountedUnit{name: name, path: p, iface: counterInterface(name)}
	var active, cgroup string
	var dropIns []string
	var bytes uint64
	for _, property := range []struct {
		iface, name string
		to          any
	}{
		{unitInterface, "Id", &u.name}, // the name asked for may be an alias
		{unitInterface, "ActiveState", &active},
		{unitInterface, "Transient", &u.transient},
		{unitInterface, "DropInPaths", &dropIns},
		{u.iface, "ControlGroup", &cgroup},
		{u.iface, "IPAccounting", &u.on},
		{u.iface, "IPEgressBytes", &bytes},
	} {
		if err := m.get(ctx, p, property.iface, property.name, property.to); err != nil {
			return u, fmt.Errorf("read unit %s: %w", name, err)
		}
	}
	u.active = active != "inactive" && active != "failed" && cgroup != ""
	u.hasData = bytes != noData
	for _, file := range dropIns {
		if path.Base(file) == settingFile {
			u.persistent = u.persistent || strings.HasPrefix(file, persistentDir+"/")
			u.runtime = u.runtime || strings.HasPrefix(file, runtimeDir+"/")
		}
	}
	return u, nil
}

// hasProcesses reports whether there is a process in a unit's cgroup; true where
// it cannot be told. systemd keeps the cgroups of mounts that it has mounted.
func (m *manager) hasProcesses(ctx context.Context, unit string) bool {
	var processes []struct {
		Cgroup  string
		PID     uint32
		Command string
	}
	err := m.call(ctx, "GetUnitProcesses", unit).Store(&processes)
	return err != nil || len(processes) > 0
}

// realNames replaces aliases by the names of the units that have them. What is no
// loaded unit stays, and so do patterns.
func realNames(ctx context.Context, cfg receiver.Config, names []string) []string {
	if len(names) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	m, err := openManager(ctx, cfg.Addresses()...)
	if err != nil {
		return names // the reading of the units tells it
	}
	defer m.close()
	names = slices.Clone(names)
	for i, name := range names {
		var p dbus.ObjectPath
		var id string
		if !strings.ContainsAny(name, "*?[") && m.call(ctx, "GetUnit", fullName(name)).Store(&p) == nil && m.get(ctx, p, unitInterface, "Id", &id) == nil {
			names[i] = id
		}
	}
	return names
}

// shellWord makes the name of a unit fit for a command that is to be copied: in
// escaped names the shell would take the backslashes away.
func shellWord(name string) string {
	if strings.Contains(name, `\`) {
		return "'" + name + "'"
	}
	return name
}

// enableCommand switches on units that are off. A few names are better than
// "all": the rest may be off on purpose.
func enableCommand(off []string) string {
	const few = 3
	if len(off) > few {
		return "unitmeter enable --all"
	}
	command := "unitmeter enable"
	for _, name := range off {
		command += " " + shellWord(name)
	}
	return command
}

// Where systemd keeps what SetUnitProperties sets. The first wins over the second.
const (
	persistentDir = "/etc/systemd/system.control"
	runtimeDir    = "/run/systemd/system.control"
	settingFile   = "50-IPAccounting.conf"
)

// noData is what systemd answers for a counter that it does not have.
const noData = 1<<64 - 1

// dbusErrorIs reports whether err is one of the D-Bus errors of that name.
func dbusErrorIs(err error, names ...string) bool {
	var refused dbus.Error
	if !errors.As(err, &refused) {
		return false
	}
	for _, name := range names {
		if refused.Name == name {
			return true
		}
	}
	return false
}

// denied reports whether systemd or the bus refused the rights of the caller.
func denied(err error) bool {
	return dbusErrorIs(err, "org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
		"org.freedesktop.DBus.Error.AuthFailed")
}

// version asks systemd for its version.
func (m *manager) version(ctx context.Context) (systemdVersion, error) {
	var text string
	if err := m.get(ctx, managerPath, managerInterface, "Version", &text); err != nil {
		return systemdVersion{}, err
	}
	return parseSystemdVersion(text)
}

// systemdVersion is what the Manager property Version begins with.
type systemdVersion struct{ major, minor int }

// parseSystemdVersion reads "252.38-1~deb12u1", "v258" or "256~rc3-1". The
// release candidates of a version are taken for the version.
func parseSystemdVersion(text string) (v systemdVersion, err error) {
	digits := func(s string) (int, string) {
		n := 0
		for n < len(s) && s[n] >= '0' && s[n] <= '9' {
			n++
		}
		number, _ := strconv.Atoi(s[:min(n, 6)])
		return number, s[n:]
	}
	rest := ""
	v.major, rest = digits(strings.TrimPrefix(strings.TrimSpace(text), "v"))
	if v.major == 0 {
		return v, fmt.Errorf("read systemd's version %q: it does not begin with a number", text)
	}
	if after, ok := strings.CutPrefix(rest, "."); ok {
		v.minor, _ = digits(after)
	}
	return v, nil
}

func (v systemdVersion) String() string {
	if v.minor == 0 {
		return strconv.Itoa(v.major)
	}
	return fmt.Sprintf("%d.%d", v.major, v.minor)
}

// before reports whether v is older than the given version.
func (v systemdVersion) before(major, minor int) bool {
	return v.major < major || v.major == major && v.minor < minor
}
