package systemdtest

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"net"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	busName             = "org.freedesktop.systemd1"
	managerPath         = dbus.ObjectPath("/org/freedesktop/systemd1")
	unitPrefix          = string(managerPath) + "/unit/"
	managerInterface    = busName + ".Manager"
	unitInterface       = busName + ".Unit"
	propertiesInterface = "org.freedesktop.DBus.Properties"
	// backlog is how many messages may wait for the fake: godbus drops what
	// does not fit, and a dropped call would look like a fault on purpose.
	backlog = 1 << 16
)

// NoData is the value of a counter that systemd has no data for.
const NoData = math.MaxUint64

// NoReply as a delay of OnGet or OnCall means that the call is never answered.
const NoReply = time.Duration(-1)

// Unit is a unit of a [Fake]. Nothing in it is checked: a test may want it wrong.
type Unit struct {
	// Name's suffix chooses the type interface (x.service: ...systemd1.Service).
	Name        string
	Description string
	// LoadState, ActiveState and SubState are loaded, active and running when
	// empty.
	LoadState, ActiveState, SubState string
	// InvocationID is hexadecimal, normally 32 digits; "" is a unit without one.
	// With any other number of digits it can be read but is no path.
	InvocationID string
	// Accounting is the IPAccounting property. The counters are served as they
	// are; without accounting systemd serves NoData.
	Accounting                   bool
	IngressBytes, IngressPackets uint64
	EgressBytes, EgressPackets   uint64
	// Started is InactiveExitTimestamp and ActiveEnterTimestamp, real and
	// monotonic; the zero value is 0, for never.
	Started time.Time
	// Properties sets or replaces properties, by name, on the Unit interface if
	// that has the name, else on the type interface. A nil value takes a property
	// away. A dbus.Variant is served as it is.
	Properties map[string]any
}

// Fake is org.freedesktop.systemd1 on a bus of its own. It answers in the order
// of the calls, from what the test tells it. Where systemd does a thing that a
// client must expect, so does the fake: signals reach the bus only after
// Subscribe; and touching a unit by a name
// that is gone loads a stub, with UnitNew and UnitRemoved.
type Fake struct {
	t   testing.TB
	bus *Bus

	mu          sync.Mutex
	conn        *dbus.Conn // nil while the bus is killed
	socket      net.Conn   // beneath conn
	served      chan struct{}
	units       map[string]Unit
	subscribers map[string]bool
	calls       map[string]int
	stubs       int
	onGet       func(dbus.ObjectPath, string, string) (dbus.Variant, *dbus.Error, time.Duration, bool)
	onCall      func(string, []any) ([]any, *dbus.Error, time.Duration, bool)
}

// StartFake starts a fake on a new [Bus]; both end with the test.
func StartFake(t testing.TB) *Fake {
	t.Helper()
	f := &Fake{
		t: t, bus: StartBus(t), units: map[string]Unit{}, subscribers: map[string]bool{}, calls: map[string]int{},
	}
	f.connect()
	t.Cleanup(f.disconnect)
	return f
}

// Address returns the D-Bus address. It stays the same over Restart, KillBus and
// StartBus.
func (f *Fake) Address() string { return f.bus.Address() }

// SetUnit adds a unit or replaces the one of the same name, without a signal.
func (f *Fake) SetUnit(u Unit) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.units[u.Name] = u
}

// Remove takes a unit away, without a signal.
func (f *Fake) Remove(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.units, name)
}

// OnGet is asked about each Get and, with prop "", each GetAll, before the units
// are. When handled, the call gets the reply or the error after the delay (or
// never: NoReply). Later calls are not held up. For GetAll, reply holds a
// map[string]dbus.Variant. nil ends it.
func (f *Fake) OnGet(hook func(object dbus.ObjectPath, iface, prop string) (reply dbus.Variant, err *dbus.Error, delay time.Duration, handled bool)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onGet = hook
}

// OnCall is OnGet for the methods of the Manager: member is ListUnits, GetUnit
// and so on, reply the values of the answer.
func (f *Fake) OnCall(hook func(member string, args []any) (reply []any, err *dbus.Error, delay time.Duration, handled bool)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onCall = hook
}

// Calls returns how many calls of a method, such as Get or ListUnits, have
// arrived.
func (f *Fake) Calls(member string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[member]
}

// Stubs returns how often a name that is gone was touched: each time, a real
// systemd tells all its clients of a unit that comes and goes.
func (f *Fake) Stubs() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stubs
}

// EmitUnitNew emits UnitNew.
func (f *Fake) EmitUnitNew(name string) {
	f.Emit(managerPath, managerInterface+".UnitNew", name, unitPath(name))
}

// EmitUnitRemoved emits UnitRemoved.
func (f *Fake) EmitUnitRemoved(name string) {
	f.Emit(managerPath, managerInterface+".UnitRemoved", name, unitPath(name))
}

// EmitReloading emits Reloading, with true before a daemon-reload and false
// behind it.
func (f *Fake) EmitReloading(active bool) {
	f.Emit(managerPath, managerInterface+".Reloading", active)
}

// EmitPropertiesChanged emits the two signals that systemd emits when a unit has
// changed: for the type interface, empty here, then for Unit with what SetUnit
// has set.
func (f *Fake) EmitPropertiesChanged(name string) {
	f.mu.Lock()
	u := f.units[name]
	f.mu.Unlock()
	const member = propertiesInterface + ".PropertiesChanged"
	if iface := typeInterface(name); iface != "" {
		f.Emit(unitPath(name), member, iface, map[string]dbus.Variant{}, []string{})
	}
	f.Emit(unitPath(name), member, unitInterface, u.properties()[unitInterface], []string{})
}

// Emit emits any signal, if any client has subscribed.
func (f *Fake) Emit(object dbus.ObjectPath, name string, values ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.emit(object, name, values...)
}

// Restart gives the name up and takes it again on a new connection, as a
// daemon-reexec looks from outside. What clients had subscribed to is lost, which a
// real reexec keeps.
func (f *Fake) Restart() {
	f.disconnect()
	f.connect()
}

// KillBus ends the bus and every connection to it.
func (f *Fake) KillBus() {
	f.t.Helper()
	f.bus.Kill(f.t)
	f.disconnect()
}

// StartBus starts the bus after KillBus and takes the name again.
func (f *Fake) StartBus() {
	f.t.Helper()
	f.bus.Start(f.t)
	f.connect()
}

// connect returns when the name is owned and calls are answered.
func (f *Fake) connect() {
	f.t.Helper()
	socket, err := net.Dial("unix", f.bus.socket())
	if err != nil {
		f.t.Fatalf("fake systemd: %v", err)
	}
	conn, err := dbus.NewConn(socket)
	if err != nil {
		f.t.Fatalf("fake systemd: %v", err)
	}
	if err := cmp.Or(conn.Auth(nil), conn.Hello()); err != nil {
		f.t.Fatalf("fake systemd: connect: %v", err)
	}
	err = conn.AddMatchSignal(dbus.WithMatchInterface("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"))
	if err != nil {
		f.t.Fatalf("fake systemd: watch clients: %v", err)
	}
	// From here on godbus answers nothing itself, and replies arrive in order.
	messages := make(chan *dbus.Message, backlog)
	conn.Eavesdrop(messages)
	conn.Send(&dbus.Message{
		Type: dbus.TypeMethodCall, Flags: dbus.FlagNoReplyExpected,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldDestination: dbus.MakeVariant("org.freedesktop.DBus"),
			dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath("/org/freedesktop/DBus")),
			dbus.FieldInterface:   dbus.MakeVariant("org.freedesktop.DBus"),
			dbus.FieldMember:      dbus.MakeVariant("RequestName"),
			dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf("", uint32(0))),
		},
		Body: []any{busName, uint32(dbus.NameFlagDoNotQueue)},
	}, nil)
	served := make(chan struct{})
	f.mu.Lock()
	f.conn, f.socket, f.served = conn, socket, served
	f.mu.Unlock()
	acquired := make(chan struct{})
	go func() { // until the connection ends
		defer close(served)
		for msg := range messages {
			if header(msg, dbus.FieldMember) == "NameAcquired" && msg.Type == dbus.TypeSignal && slices.Equal(msg.Body, []any{busName}) {
				close(acquired)
				continue
			}
			f.handle(conn, msg)
		}
	}()
	select {
	case <-acquired:
	case <-served:
		f.t.Fatal("fake systemd: the bus ended while the name was requested")
	}
}

// disconnect returns when no call is handled any more.
func (f *Fake) disconnect() {
	f.mu.Lock()
	conn, socket, served := f.conn, f.socket, f.served
	f.conn = nil
	clear(f.subscribers)
	f.mu.Unlock()
	if conn != nil {
		// Not conn.Close: it closes the channel that godbus may be sending to.
		socket.Close()
		<-served
	}
}

func header(msg *dbus.Message, field dbus.HeaderField) string {
	switch v := msg.Headers[field].Value().(type) {
	case string:
		return v
	case dbus.ObjectPath:
		return string(v)
	}
	return ""
}

// An answer is what a call gets, and when.
type answer struct {
	body  []any
	err   *dbus.Error
	delay time.Duration
}

func failed(name, format string, args ...any) answer {
	return answer{err: dbus.NewError(name, []any{fmt.Sprintf(format, args...)})}
}

func (f *Fake) handle(conn *dbus.Conn, msg *dbus.Message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	member := header(msg, dbus.FieldMember)
	if msg.Type == dbus.TypeSignal && member == "NameOwnerChanged" {
		if len(msg.Body) == 3 && msg.Body[2] == "" { // name, old owner, new owner
			delete(f.subscribers, msg.Body[0].(string))
		}
		return
	}
	if msg.Type != dbus.TypeMethodCall {
		return
	}
	f.calls[member]++
	var a answer
	switch header(msg, dbus.FieldInterface) {
	case managerInterface:
		a = f.manager(header(msg, dbus.FieldSender), member, msg.Body)
	case propertiesInterface:
		a = f.property(dbus.ObjectPath(header(msg, dbus.FieldPath)), member, msg.Body)
	case "org.freedesktop.DBus.Peer":
		a = answer{}
	case "org.freedesktop.DBus.Introspectable": // the names of all units
		var b strings.Builder
		for name := range f.units {
			fmt.Fprintf(&b, "<node name=%q/>", path.Base(string(unitPath(name))))
		}
		a = answer{body: []any{"<node>" + b.String() + "</node>"}}
	default:
		a = failed("org.freedesktop.DBus.Error.UnknownInterface", "the fake has no interface %s", header(msg, dbus.FieldInterface))
	}
	if msg.Flags&dbus.FlagNoReplyExpected != 0 {
		return
	}
	// Below 0 is NoReply.
	switch {
	case a.delay > 0:
		time.AfterFunc(a.delay, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.conn == conn { // else it is lost, as it would be
				f.reply(conn, msg, a)
			}
		})
	case a.delay == 0:
		f.reply(conn, msg, a)
	}
}

func (f *Fake) reply(conn *dbus.Conn, msg *dbus.Message, a answer) {
	out := &dbus.Message{
		Type: dbus.TypeMethodReply, Body: a.body,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldDestination: dbus.MakeVariant(header(msg, dbus.FieldSender)),
			dbus.FieldReplySerial: dbus.MakeVariant(msg.Serial()),
		},
	}
	if a.err != nil {
		out.Type, out.Body = dbus.TypeError, a.err.Body
		out.Headers[dbus.FieldErrorName] = dbus.MakeVariant(a.err.Name)
	}
	f.send(conn, out)
}

func (f *Fake) emit(object dbus.ObjectPath, name string, values ...any) {
	// systemd broadcasts as soon as anybody at all has subscribed.
	if f.conn == nil || len(f.subscribers) == 0 {
		return
	}
	dot := strings.LastIndexByte(name, '.')
	f.send(f.conn, &dbus.Message{
		Type: dbus.TypeSignal, Body: values,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath:      dbus.MakeVariant(object),
			dbus.FieldInterface: dbus.MakeVariant(name[:max(dot, 0)]),
			dbus.FieldMember:    dbus.MakeVariant(name[dot+1:]),
		},
	})
}

// send reports what cannot be encoded: a client that waits for it would look as
// if it had met a fault on purpose.
func (f *Fake) send(conn *dbus.Conn, msg *dbus.Message) {
	if len(msg.Body) > 0 {
		msg.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(msg.Body...))
	}
	if err := msg.IsValid(); err != nil {
		f.t.Errorf("fake systemd: encode %v: %v; use StartGarbage for what is no D-Bus", msg.Body, err)
		return
	}
	conn.Send(msg, make(chan *dbus.Call, 1))
}

// listed is an entry of ListUnits, in the order of its fields on the wire.
type listed struct {
	Name, Description, Load, Active, Sub, Following string
	Path                                            dbus.ObjectPath
	Job                                             uint32
	JobType                                         string
	JobPath                                         dbus.ObjectPath
}

func (f *Fake) list(states, patterns []string) answer {
	units := []listed{}
	// A backslash is itself (FNM_NOESCAPE), and a bad pattern matches nothing.
	globs, glob := make([]string, len(patterns)), strings.NewReplacer(`\`, `\\`, "[!", "[^")
	for i, pattern := range patterns {
		globs[i] = glob.Replace(pattern)
	}
	for _, name := range slices.Sorted(maps.Keys(f.units)) {
		u := f.units[name]
		load, active, sub := u.states()
		// Empty lists match everything, and a state is of any of the three kinds.
		if len(states) > 0 && !slices.Contains(states, load) && !slices.Contains(states, active) && !slices.Contains(states, sub) {
			continue
		}
		matches := func(glob string) bool {
			ok, err := path.Match(glob, name)
			return ok && err == nil
		}
		if len(globs) > 0 && !slices.ContainsFunc(globs, matches) {
			continue
		}
		units = append(units, listed{Name: name, Description: u.Description, Load: load, Active: active, Sub: sub, Path: unitPath(name), JobPath: "/"})
	}
	return answer{body: []any{units}}
}

// manager answers a call of the Manager interface.
func (f *Fake) manager(client, member string, args []any) answer {
	if f.onCall != nil {
		if body, err, delay, handled := f.onCall(member, args); handled {
			return answer{body, err, delay}
		}
	}
	var name string
	if len(args) > 0 {
		name, _ = args[0].(string) // "" is a unit that is not there
	}
	_, known := f.units[name]
	switch member {
	case "Subscribe":
		if f.subscribers[client] {
			return failed("org.freedesktop.systemd1.AlreadySubscribed", "Client is already subscribed.")
		}
		f.subscribers[client] = true
		return answer{}
	case "Unsubscribe":
		if !f.subscribers[client] {
			return failed("org.freedesktop.systemd1.NotSubscribed", "Client is not subscribed.")
		}
		delete(f.subscribers, client)
		return answer{}
	case "ListUnits":
		return f.list(nil, nil)
	case "ListUnitsByPatterns":
		var states, patterns []string
		if err := dbus.Store(args, &states, &patterns); err != nil {
			return failed("org.freedesktop.DBus.Error.InvalidArgs", "%v", err)
		}
		return f.list(states, patterns)
	case "GetUnit":
		if !known {
			return failed("org.freedesktop.systemd1.NoSuchUnit", "Unit %s not loaded.", name)
		}
		return answer{body: []any{unitPath(name)}}
	}
	return failed("org.freedesktop.DBus.Error.UnknownMethod", "the fake has no method %s", member)
}

// stub is what systemd does when a client touches a name that it does not know.
func (f *Fake) stub(name string) {
	f.stubs++
	f.emit(managerPath, managerInterface+".UnitNew", name, unitPath(name))
	f.emit(managerPath, managerInterface+".UnitRemoved", name, unitPath(name))
}

// property answers a call of the Properties interface.
func (f *Fake) property(object dbus.ObjectPath, member string, args []any) answer {
	var iface, prop string
	var err error
	switch member {
	case "Get":
		err = dbus.Store(args, &iface, &prop)
	case "GetAll":
		err = dbus.Store(args, &iface)
	default:
		return failed("org.freedesktop.DBus.Error.UnknownMethod", "the fake has no method %s", member)
	}
	if err != nil {
		return failed("org.freedesktop.DBus.Error.InvalidArgs", "%v", err)
	}
	if f.onGet != nil {
		if v, err, delay, handled := f.onGet(object, iface, prop); handled {
			if member == "GetAll" {
				return answer{[]any{v.Value()}, err, delay}
			}
			return answer{[]any{v}, err, delay}
		}
	}
	// An unknown interface is an unknown property to Get, and its own error to
	// GetAll: so it is in sd-bus.
	var all map[string]map[string]dbus.Variant
	if object == managerPath {
		all = map[string]map[string]dbus.Variant{managerInterface: {"Version": dbus.MakeVariant("252 (fake)")}}
	} else {
		u, a := f.lookup(object)
		if a.err != nil {
			return a
		}
		all = u.properties()
	}
	if member == "GetAll" {
		properties, ok := all[iface]
		if !ok {
			return failed("org.freedesktop.DBus.Error.UnknownInterface", "Unknown interface '%s'.", iface)
		}
		return answer{body: []any{properties}}
	}
	v, ok := all[iface][prop]
	if !ok {
		return failed("org.freedesktop.DBus.Error.UnknownProperty", "Unknown property '%s'.", prop)
	}
	return answer{body: []any{v}}
}

// lookup finds a unit by either of its paths.
func (f *Fake) lookup(object dbus.ObjectPath) (Unit, answer) {
	last, ok := strings.CutPrefix(string(object), unitPrefix)
	if !ok {
		return Unit{}, failed("org.freedesktop.DBus.Error.UnknownObject", "Unknown object '%s'.", object)
	}
	if _, err := hex.DecodeString(last); err == nil && len(last) == 32 {
		for _, u := range f.units {
			if u.InvocationID == last {
				return u, answer{}
			}
		}
		return Unit{}, failed("org.freedesktop.systemd1.NoUnitForInvocationID", "No unit with the specified invocation ID %s known.", last)
	}
	name := unescape(last)
	if u, ok := f.units[name]; ok && unitPath(name) == object {
		return u, answer{}
	}
	// systemd does not refuse a name that it does not know: it loads a unit for it
	// that is not found, answers, and drops it.
	f.stub(name)
	return Unit{
		Name: name, LoadState: "not-found", ActiveState: "inactive", SubState: "dead",
		IngressBytes: NoData, IngressPackets: NoData, EgressBytes: NoData, EgressPackets: NoData,
	}, answer{}
}

func (u Unit) states() (load, active, sub string) {
	return cmp.Or(u.LoadState, "loaded"), cmp.Or(u.ActiveState, "active"), cmp.Or(u.SubState, "running")
}

// properties returns what a client can read, by interface.
func (u Unit) properties() map[string]map[string]dbus.Variant {
	load, active, sub := u.states()
	id, err := hex.DecodeString(u.InvocationID)
	if err != nil {
		id = []byte(u.InvocationID) // a wrong id is served wrong
	}
	var started uint64
	if !u.Started.IsZero() {
		started = uint64(u.Started.UnixMicro())
	}
	never := dbus.MakeVariant(uint64(0))
	unit := map[string]dbus.Variant{
		"Id": dbus.MakeVariant(u.Name), "Names": dbus.MakeVariant([]string{u.Name}), "Description": dbus.MakeVariant(u.Description),
		"LoadState": dbus.MakeVariant(load), "ActiveState": dbus.MakeVariant(active), "SubState": dbus.MakeVariant(sub),
		"InvocationID": dbus.MakeVariant(id),
	}
	for _, edge := range []string{"InactiveExit", "ActiveEnter", "ActiveExit", "InactiveEnter"} {
		at := never
		if edge == "InactiveExit" || edge == "ActiveEnter" {
			at = dbus.MakeVariant(started)
		}
		unit[edge+"Timestamp"], unit[edge+"TimestampMonotonic"] = at, at
	}
	all := map[string]map[string]dbus.Variant{unitInterface: unit}
	iface := typeInterface(u.Name)
	switch iface {
	case "":
		iface = unitInterface // where Properties go that Unit does not have
	case busName + ".Timer", busName + ".Path", busName + ".Target", busName + ".Automount", busName + ".Device":
		all[iface] = map[string]dbus.Variant{} // these have no cgroup
	default:
		all[iface] = map[string]dbus.Variant{
			"IPAccounting":   dbus.MakeVariant(u.Accounting),
			"IPIngressBytes": dbus.MakeVariant(u.IngressBytes), "IPIngressPackets": dbus.MakeVariant(u.IngressPackets),
			"IPEgressBytes": dbus.MakeVariant(u.EgressBytes), "IPEgressPackets": dbus.MakeVariant(u.EgressPackets),
			"Slice": dbus.MakeVariant("system.slice"), "ControlGroup": dbus.MakeVariant("/system.slice/" + u.Name),
		}
	}
	if service := all[busName+".Service"]; service != nil {
		service["Type"] = dbus.MakeVariant("simple")
		service["ExecMainStartTimestamp"], service["ExecMainStartTimestampMonotonic"] = dbus.MakeVariant(started), dbus.MakeVariant(started)
	}
	for name, value := range u.Properties {
		target := all[iface]
		if _, ok := unit[name]; ok {
			target = unit
		}
		switch v := value.(type) {
		case nil:
			delete(target, name)
		case dbus.Variant:
			target[name] = v
		default:
			target[name] = dbus.MakeVariant(v)
		}
	}
	return all
}

// typeInterface returns the interface that goes with a unit's suffix, or "" for
// a name without one.
func typeInterface(name string) string {
	suffix := strings.TrimPrefix(path.Ext(name), ".")
	if suffix == "" || strings.Trim(suffix, "abcdefghijklmnopqrstuvwxyz") != "" {
		return ""
	}
	return busName + "." + strings.ToUpper(suffix[:1]) + suffix[1:]
}

// unitPath is systemd's bus_path_encode: letters, and digits but the first, stay.
func unitPath(name string) dbus.ObjectPath {
	if name == "" {
		return dbus.ObjectPath(unitPrefix + "_")
	}
	var b strings.Builder
	for i, c := range []byte(name) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || i > 0 && c >= '0' && c <= '9' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "_%02x", c)
		}
	}
	return dbus.ObjectPath(unitPrefix + b.String())
}

// unescape is the reverse of unitPath. What was never escaped stays as it is.
func unescape(s string) string {
	if s == "_" {
		return ""
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '_' && i+2 < len(s) {
			if c, err := hex.DecodeString(s[i+1 : i+3]); err == nil {
				b.Write(c)
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
