package systemdtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	id1 = "0123456789abcdef0123456789abcdef"
	id2 = "00000000000000000000000000000002"
)

func connectTo(t *testing.T, address string) *dbus.Conn {
	t.Helper()
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func get(ctx context.Context, conn *dbus.Conn, path dbus.ObjectPath, iface, prop string) (dbus.Variant, error) {
	var v dbus.Variant
	err := conn.Object(busName, path).CallWithContext(ctx, propertiesInterface+".Get", 0, iface, prop).Store(&v)
	return v, err
}

func callManager(t *testing.T, conn *dbus.Conn, member string, args ...any) *dbus.Call {
	t.Helper()
	return conn.Object(busName, managerPath).CallWithContext(t.Context(), managerInterface+"."+member, 0, args...)
}

func errorName(err error) string {
	var e dbus.Error
	if errors.As(err, &e) {
		return e.Name
	}
	return fmt.Sprint(err)
}

// TestFakeIsLikeSystemd asks the fake and a real systemd the same questions.
func TestFakeIsLikeSystemd(t *testing.T) {
	t.Parallel()
	rig := Start(t)
	rig.WriteFile(t, "/etc/systemd/system/a-b.service", "[Service]\nIPAccounting=yes\nExecStart=sleep 1000\n")
	rig.Run(t, "systemctl", "start", "a-b.service")
	realID := rig.Show(t, "a-b.service").InvocationID
	fake := StartFake(t)
	fake.SetUnit(Unit{Name: "a-b.service", InvocationID: id1, Accounting: true})
	fake.SetUnit(Unit{Name: "basic.target", SubState: "active", InvocationID: id2})

	// The calls, with what comes back: the signature, or the name of the error.
	questions := func(address, invocation string) []string {
		conn := connectTo(t, address)
		var out []string
		note := func(what string, body []any, err error) {
			if err != nil {
				out = append(out, what+": "+errorName(err))
			} else {
				out = append(out, what+": "+dbus.SignatureOf(body...).String())
			}
		}
		manager := func(member string, args ...any) {
			c := callManager(t, conn, member, args...)
			note(fmt.Sprint(member, args), c.Body, c.Err)
		}
		manager("Subscribe")
		manager("Subscribe")
		manager("ListUnits")
		manager("ListUnitsByPatterns", []string{"active"}, []string{"*.service", "*.target"})
		manager("GetUnit", "a-b.service")
		manager("GetUnit", "gone.service")
		manager("Unsubscribe")
		manager("Unsubscribe")
		for _, q := range []struct{ what, path, iface, prop string }{
			{"counter by name", string(unitPath("a-b.service")), typeInterface("a-b.service"), "IPIngressBytes"},
			{"counter by invocation", unitPrefix + invocation, typeInterface("a-b.service"), "IPEgressPackets"},
			{"accounting", unitPrefix + invocation, typeInterface("a-b.service"), "IPAccounting"},
			{"invocation", unitPrefix + invocation, unitInterface, "InvocationID"},
			{"timestamp", unitPrefix + invocation, unitInterface, "InactiveExitTimestamp"},
			{"state", unitPrefix + invocation, unitInterface, "ActiveState"},
			{"gone by invocation", unitPrefix + "00000000000000000000000000000001", unitInterface, "ActiveState"},
			{"gone by name", string(unitPath("gone.service")), typeInterface("gone.service"), "IPIngressBytes"},
			{"no such property", unitPrefix + invocation, unitInterface, "Nonsense"},
			{"no such interface", unitPrefix + invocation, busName + ".Nonsense", "Id"},
			{"interface of another type", unitPrefix + invocation, busName + ".Slice", "IPIngressBytes"},
			{"unit without counters", string(unitPath("basic.target")), busName + ".Target", "IPIngressBytes"},
			{"no such object", "/org/freedesktop/systemd1/nonsense", unitInterface, "Id"},
			{"version", string(managerPath), managerInterface, "Version"},
		} {
			v, err := get(t.Context(), conn, dbus.ObjectPath(q.path), q.iface, q.prop)
			note(q.what, []any{v.Value()}, err)
		}
		for _, iface := range []string{unitInterface, busName + ".Nonsense"} {
			all := conn.Object(busName, dbus.ObjectPath(unitPrefix+invocation)).CallWithContext(t.Context(), propertiesInterface+".GetAll", 0, iface)
			note("all of "+iface, all.Body, all.Err)
		}
		return out
	}
	real, faked := questions(rig.SystemBus(), realID), questions(fake.Address(), id1)
	for i := range real {
		if real[i] != faked[i] {
			t.Errorf("systemd says %s; the fake says %s", real[i], faked[i])
		}
	}
	if v, err := get(t.Context(), connectTo(t, rig.SystemBus()), unitPath("gone.service"), busName+".Service", "IPIngressBytes"); err != nil || v.Value() != uint64(NoData) {
		t.Errorf("gone unit by name: got %v, %v, want NoData", v, err)
	}
	if fake.Stubs() == 0 {
		t.Error("gone unit by name: the fake has not loaded a stub")
	}
}

func TestFakeServesUnits(t *testing.T) {
	t.Parallel()
	fake := StartFake(t)
	conn := connectTo(t, fake.Address())
	fake.SetUnit(Unit{Name: "a.service", InvocationID: id1, Accounting: true, IngressBytes: 1, EgressPackets: NoData, Started: time.UnixMicro(77)})
	tests := []struct {
		name, iface, prop string
		want              any
	}{
		{"counter", busName + ".Service", "IPIngressBytes", uint64(1)},
		{"no data", busName + ".Service", "IPEgressPackets", uint64(NoData)},
		{"id", unitInterface, "InvocationID", []byte("\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef")},
		{"started", unitInterface, "InactiveExitTimestamp", uint64(77)},
	}
	for _, tt := range tests {
		for _, path := range []dbus.ObjectPath{unitPath("a.service"), dbus.ObjectPath(unitPrefix + id1)} {
			if v, err := get(t.Context(), conn, path, tt.iface, tt.prop); err != nil || !reflect.DeepEqual(v.Value(), tt.want) {
				t.Errorf("%s at %s: got %v, %v, want %v", tt.name, path, v, err, tt.want)
			}
		}
	}
	// Misbehaviour that needs no script.
	fake.SetUnit(Unit{Name: "a.service", InvocationID: "0123", Properties: map[string]any{
		"IPIngressBytes": "many", "SubState": nil, "Extra": dbus.MakeVariant(int32(5)),
	}})
	if v, err := get(t.Context(), conn, unitPath("a.service"), busName+".Service", "IPIngressBytes"); err != nil || v.Value() != "many" {
		t.Errorf("wrong type: got %v, %v", v, err)
	}
	if v, err := get(t.Context(), conn, unitPath("a.service"), unitInterface, "InvocationID"); err != nil || !bytes.Equal(v.Value().([]byte), []byte{1, 0x23}) {
		t.Errorf("truncated id: got %v, %v", v, err)
	}
	if _, err := get(t.Context(), conn, unitPath("a.service"), unitInterface, "SubState"); errorName(err) != "org.freedesktop.DBus.Error.UnknownProperty" {
		t.Errorf("property taken away: got %v", err)
	}
	if _, err := get(t.Context(), conn, dbus.ObjectPath(unitPrefix+id1), unitInterface, "Id"); errorName(err) != "org.freedesktop.systemd1.NoUnitForInvocationID" {
		t.Errorf("run that is over: got %v", err)
	}
	fake.Remove("a.service")
	huge := strings.Repeat("x", 1<<20) + ".service"
	odd := "a\nb\x01\"é\u202e.service"
	fake.SetUnit(Unit{Name: huge})
	fake.SetUnit(Unit{Name: odd, ActiveState: "failed"})
	var units []listed
	if err := callManager(t, conn, "ListUnitsByPatterns", []string{}, []string{"*.service"}).Store(&units); err != nil {
		t.Fatal(err)
	}
	if len(units) != 2 || units[0].Name != odd || units[1].Name != huge {
		t.Errorf("got %d units", len(units))
	}
	if err := callManager(t, conn, "ListUnitsByPatterns", []string{"failed"}, []string{}).Store(&units); err != nil || len(units) != 1 {
		t.Errorf("by state: got %d units, %v", len(units), err)
	}
}

func TestFakeScripts(t *testing.T) {
	t.Parallel()
	fake := StartFake(t)
	conn := connectTo(t, fake.Address())
	fake.SetUnit(Unit{Name: "a.service", InvocationID: id1})
	fake.OnGet(func(path dbus.ObjectPath, iface, prop string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		switch prop {
		case "Falls":
			return dbus.MakeVariant(uint64(3)), nil, 0, true
		case "Fails":
			return dbus.Variant{}, dbus.NewError("org.example.Broken", []any{"no"}), 0, true
		case "Slow":
			return dbus.MakeVariant("late"), nil, 100 * time.Millisecond, true
		case "Never":
			return dbus.Variant{}, nil, NoReply, true
		case "": // GetAll
			return dbus.MakeVariant(map[string]dbus.Variant{"X": dbus.MakeVariant(iface)}), nil, 0, true
		}
		return dbus.Variant{}, nil, 0, false
	})
	path := unitPath("a.service")
	ctx, cancel := context.WithCancel(t.Context())
	never := conn.Object(busName, path).GoWithContext(ctx, propertiesInterface+".Get", 0, nil, "i", "Never")
	slow := conn.Object(busName, path).Go(propertiesInterface+".Get", 0, nil, "i", "Slow")
	// Neither holds up what comes later.
	if v, err := get(t.Context(), conn, path, "i", "Falls"); err != nil || v.Value() != uint64(3) {
		t.Errorf("reply: got %v, %v", v, err)
	}
	if _, err := get(t.Context(), conn, path, "i", "Fails"); errorName(err) != "org.example.Broken" {
		t.Errorf("error: got %v", err)
	}
	if v, err := get(t.Context(), conn, path, unitInterface, "Id"); err != nil || v.Value() != "a.service" {
		t.Errorf("not handled: got %v, %v", v, err)
	}
	var all map[string]dbus.Variant
	if err := conn.Object(busName, path).Call(propertiesInterface+".GetAll", 0, "i").Store(&all); err != nil || all["X"].Value() != "i" {
		t.Errorf("all: got %v, %v", all, err)
	}
	if c := <-slow.Done; c.Err != nil {
		t.Errorf("slow: got %v", c.Err)
	}
	select {
	case c := <-never.Done:
		t.Errorf("never: got %v, %v", c.Body, c.Err)
	default:
	}
	cancel()
	<-never.Done
	if n := fake.Calls("Get"); n != 5 {
		t.Errorf("got %d Gets, want 5", n)
	}

	fake.OnCall(func(member string, args []any) ([]any, *dbus.Error, time.Duration, bool) {
		return nil, dbus.NewError("org.freedesktop.DBus.Error.AccessDenied", nil), 0, member == "GetUnit" && args[0] == "a.service"
	})
	if err := callManager(t, conn, "GetUnit", "a.service").Err; errorName(err) != "org.freedesktop.DBus.Error.AccessDenied" {
		t.Errorf("manager call: got %v", err)
	}
	fake.OnCall(nil)
	if err := callManager(t, conn, "GetUnit", "a.service").Err; err != nil {
		t.Error(err)
	}
}

func TestFakeSignals(t *testing.T) {
	t.Parallel()
	fake := StartFake(t)
	conn := connectTo(t, fake.Address())
	fake.SetUnit(Unit{Name: "a.service", ActiveState: "inactive"})
	if err := conn.AddMatchSignal(dbus.WithMatchSender(busName)); err != nil {
		t.Fatal(err)
	}
	signals := make(chan *dbus.Signal, 100)
	conn.Signal(signals)
	fake.EmitUnitNew("before-subscribe.service")
	if err := callManager(t, conn, "Subscribe").Err; err != nil {
		t.Fatal(err)
	}
	fake.EmitReloading(true)
	fake.EmitUnitRemoved("a.service")
	fake.EmitUnitNew("a.service")
	fake.EmitPropertiesChanged("a.service")
	if _, err := get(t.Context(), conn, unitPath("gone.service"), unitInterface, "Id"); err != nil {
		t.Errorf("a gone unit by its name: got %v", err)
	}
	fake.Emit(managerPath, managerInterface+".Last")
	var names []string
	for s := range signals {
		_, name, _ := strings.Cut(strings.TrimPrefix(s.Name, busName), ".")
		names = append(names, name)
		if strings.HasSuffix(s.Name, "PropertiesChanged") && s.Body[0] == unitInterface {
			if v := s.Body[1].(map[string]dbus.Variant)["ActiveState"]; v.Value() != "inactive" {
				t.Errorf("changed state: got %v", v)
			}
		}
		if strings.HasSuffix(name, "Last") {
			break
		}
	}
	want := []string{"Manager.Reloading", "Manager.UnitRemoved", "Manager.UnitNew", "freedesktop.DBus.Properties.PropertiesChanged",
		"freedesktop.DBus.Properties.PropertiesChanged", "Manager.UnitNew", "Manager.UnitRemoved", "Manager.Last"}
	if !slices.Equal(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
}

func TestFakeGoesAway(t *testing.T) {
	t.Parallel()
	fake := StartFake(t)
	conn := connectTo(t, fake.Address())
	owners := make(chan *dbus.Signal, 10)
	if err := conn.AddMatchSignal(dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, busName)); err != nil {
		t.Fatal(err)
	}
	conn.Signal(owners)
	fake.OnGet(func(dbus.ObjectPath, string, string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		return dbus.Variant{}, nil, NoReply, true
	})
	inFlight := conn.Object(busName, managerPath).Go(propertiesInterface+".Get", 0, nil, managerInterface, "Version")
	eventually(t, "the call to arrive", func() bool { return fake.Calls("Get") == 1 })
	fake.Restart()
	if c := <-inFlight.Done; errorName(c.Err) != "org.freedesktop.DBus.Error.NoReply" {
		t.Errorf("in flight: got %v", c.Err)
	}
	if lost, back := <-owners, <-owners; lost.Body[2] != "" || back.Body[2] == "" {
		t.Errorf("owners: got %v, %v", lost.Body, back.Body)
	}
	fake.OnGet(nil)
	if _, err := get(t.Context(), conn, managerPath, managerInterface, "Version"); err != nil {
		t.Error(err)
	}

	fake.KillBus()
	<-conn.Context().Done()
	if c, err := dbus.Connect(fake.Address()); err == nil {
		c.Close()
		t.Error("connected to a bus that was killed")
	}
	fake.StartBus()
	if _, err := get(t.Context(), connectTo(t, fake.Address()), managerPath, managerInterface, "Version"); err != nil {
		t.Error(err)
	}
}

// The limit that agents run into: the 129th call in flight is refused.
func TestBusLimits(t *testing.T) {
	t.Parallel()
	fake := StartFake(t)
	conn := connectTo(t, fake.Address())
	fake.OnGet(func(dbus.ObjectPath, string, string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		return dbus.Variant{}, nil, NoReply, true
	})
	done := make(chan *dbus.Call, 200)
	for range 130 {
		conn.Object(busName, managerPath).Go(propertiesInterface+".Get", 0, done, managerInterface, "Version")
	}
	for range 2 {
		if c := <-done; errorName(c.Err) != "org.freedesktop.DBus.Error.LimitsExceeded" {
			t.Errorf("got %v, want LimitsExceeded", c.Err)
		}
	}
	eventually(t, "the others to arrive", func() bool { return fake.Calls("Get") == 128 })
	if len(done) > 0 {
		t.Errorf("%d more calls were answered", len(done))
	}
}

func TestBusForOtherUsers(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user")
	}
	bus := StartBus(t)
	cmd := exec.Command("setpriv", "--reuid", "65534", "--clear-groups", "busctl", "--address="+bus.Address(), "list")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("as uid 65534: %v\n%s", err, out)
	}
}

func TestBusDiesWithOwner(t *testing.T) {
	t.Parallel()
	if os.Getenv("SYSTEMDTEST_BUS") != "" {
		fmt.Println("bus", StartBus(t).Address())
		select {} // until it is killed
	}
	StartBus(t) // skips where there is none
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestBusDiesWithOwner$", "-test.v")
	cmd.Env = append(os.Environ(), "SYSTEMDTEST_BUS=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said, address string
	for buf := make([]byte, 1000); address == ""; {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		said += string(buf[:n])
		if _, rest, ok := strings.Cut(said, "bus unix:path="); ok && strings.Contains(rest, "\n") {
			address, _, _ = strings.Cut(rest, "\n")
		}
	}
	dial := func() error {
		c, err := net.Dial("unix", address)
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := dial(); err != nil {
		t.Fatal(err)
	}
	kill(t, cmd.Process.Pid)
	cmd.Wait() // the error is the kill
	eventually(t, "the bus and its directory to be gone", func() bool {
		return dial() != nil && !exists(filepath.Dir(address))
	})
}

func TestGarbage(t *testing.T) {
	t.Parallel()
	// Byte for byte, and right behind the handshake: godbus would wait for ever
	// for what it can call a message.
	script := []byte("\xff\xfe\x00 not a message at all")
	raw, err := net.Dial("unix", strings.TrimPrefix(StartGarbage(t, script), "unix:path="))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if _, err := io.WriteString(raw, "\x00AUTH\r\nAUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nNONSENSE\r\nBEGIN\r\n"); err != nil {
		t.Fatal(err)
	}
	want := "REJECTED EXTERNAL\r\nOK 0123456789abcdef0123456789abcdef\r\nAGREE_UNIX_FD\r\nERROR\r\n" + string(script)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(raw, got); err != nil || string(got) != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}

	// With a good answer to Hello, garbage comes as the answer of a call.
	hello, broken := reply(t, 1, ":1.7"), reply(t, 2, "text")
	if n := bytes.Count(broken, []byte("text")); n != 1 {
		t.Fatalf("%d places to break", n)
	}
	broken = bytes.Replace(broken, []byte("text"), []byte("t\xff\xfet"), 1)
	conn, err := dbus.Dial(StartGarbage(t, nil, hello, broken))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.Auth(nil); err != nil {
		t.Fatal(err)
	}
	if err := conn.Hello(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var s string
	if err := callContext(ctx, conn).Store(&s); err == nil && s != "t\xff\xfet" {
		t.Errorf("got %q, want the broken text or an error", s)
	}
}

func callContext(ctx context.Context, conn *dbus.Conn) *dbus.Call {
	return conn.Object(busName, managerPath).CallWithContext(ctx, managerInterface+".Anything", 0)
}

// reply is a method reply with one string, as a peer would encode it.
func reply(t *testing.T, serial uint32, text string) []byte {
	t.Helper()
	msg := &dbus.Message{
		Type: dbus.TypeMethodReply, Body: []any{text},
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldReplySerial: dbus.MakeVariant(serial),
			dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf("")),
		},
	}
	var b bytes.Buffer
	if err := msg.EncodeTo(&b, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	out := b.Bytes()
	binary.LittleEndian.PutUint32(out[8:], serial) // its own serial must not be 0
	return out
}

func TestUnitPath(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"a.service": "a_2eservice", "1a-b@c.socket": "_31a_2db_40c_2esocket", "": "_", "é.scope": "_c3_a9_2escope",
	} {
		got := strings.TrimPrefix(string(unitPath(name)), unitPrefix)
		if got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
		}
		if back := unescape(got); name != "" && back != name {
			t.Errorf("%q: comes back as %q", name, back)
		}
	}
}
