package receiver

import (
	"slices"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// stranger is a peer of the bus that is not systemd.
func stranger(t *testing.T, address string) *dbus.Conn {
	t.Helper()
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// peersOf returns the unique names of all other peers, the receiver's among them.
func peersOf(t *testing.T, conn *dbus.Conn) (peers []string) {
	t.Helper()
	var names []string
	if err := conn.BusObject().Call(busInterface+".ListNames", 0).Store(&names); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if strings.HasPrefix(name, ":") && !slices.Contains(conn.Names(), name) {
			peers = append(peers, name)
		}
	}
	return peers
}

// sendStraight sends a signal to one peer, whatever that has asked the bus for.
func sendStraight(conn *dbus.Conn, to string, path dbus.ObjectPath, iface, member string, body ...any) {
	conn.Send(&dbus.Message{
		Type: dbus.TypeSignal, Flags: dbus.FlagNoReplyExpected, Body: body,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldDestination: dbus.MakeVariant(to), dbus.FieldPath: dbus.MakeVariant(path),
			dbus.FieldInterface: dbus.MakeVariant(iface), dbus.FieldMember: dbus.MakeVariant(member),
			dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(body...)),
		},
	}, nil)
}

// TestForgedSignals: a bus delivers what anybody sends straight to a connection.
// None of it counts that is not from the owner of systemd's name, also when that
// owner changes.
func TestForgedSignals(t *testing.T) {
	const object = dbus.ObjectPath(managerPath)
	path := dbus.ObjectPath(unitPath("a.service"))
	stopped := map[string]dbus.Variant{
		"InvocationID": dbus.MakeVariant(slices.Repeat([]byte{9}, 16)),
		"ActiveState":  dbus.MakeVariant("inactive"), "SubState": dbus.MakeVariant("dead"),
		"InactiveExitTimestamp": dbus.MakeVariant(uint64(1)), "InactiveEnterTimestamp": dbus.MakeVariant(uint64(2)),
	}
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(7)))
	r, _ := start(t, Config{Bus: fake.Address()})
	want(t, r.Sweep(t.Context()), "a.service", all(7))
	forger := stranger(t, fake.Address())

	forge := func(when string) {
		t.Helper()
		before := r.systemd.Health()
		refused := r.systemd.Health().Refused
		sent := int64(0)
		for _, peer := range peersOf(t, forger) {
			sendStraight(forger, peer, object, managerInterface, "UnitRemoved", "a.service", path)
			sendStraight(forger, peer, object, managerInterface, "Reloading", true)
			sendStraight(forger, peer, object, managerInterface, "UnitNew", "b.service", path)
			sendStraight(forger, peer, path, propertiesInterface, "PropertiesChanged", unitInterface, stopped, []string{})
			sendStraight(forger, peer, "/org/freedesktop/DBus", busInterface, "NameOwnerChanged", systemdName, ":1.0", forger.Names()[0])
			sendStraight(forger, peer, "/org/freedesktop/DBus", busInterface, "NameOwnerChanged", systemdName, ":1.0", "")
			// Had the one before last been believed, this one would be as well.
			sendStraight(forger, peer, object, managerInterface, "UnitRemoved", "a.service", path)
			sent = 7
		}
		systemdtest.Eventually(t, "all of them have arrived, "+when, func() bool { return r.systemd.Health().Refused == refused+sent })
		if u := r.unitNamed("a.service"); u.Accounting != "on" || u.Invocation != id(1) {
			t.Errorf("%s, the unit is %+v", when, u)
		}
		if after := r.systemd.Health(); after.Reloads != before.Reloads || after.Reexecs != before.Reexecs || after.Errors != before.Errors {
			t.Errorf("%s, health went from %+v to %+v", when, before, after)
		}
	}
	forge("at first")
	want(t, r.Sweep(t.Context()), "a.service", all(7))

	fake.Restart()
	systemdtest.Eventually(t, "the new owner is noticed", func() bool { return r.systemd.Health().Reexecs == 1 })
	forge("after another process has become systemd")
	fake.SetUnit(accounted("a.service", 1, all(20)))
	want(t, r.Sweep(t.Context()), "a.service", all(20))

	// And the true ones still count.
	fake.Remove("a.service")
	fake.EmitUnitRemoved("a.service")
	systemdtest.Eventually(t, "the end is noticed", func() bool { return len(r.Units()) == 0 })
}

// TestForgedSignalsOfReal: the same with a real systemd and an unprivileged user,
// over a reload and a re-execution.
func TestForgedSignalsOfReal(t *testing.T) {
	rig := theRig(t)
	talker(t, rig, "forged.service", "IPAccounting=yes")
	r, _ := start(t, Config{Bus: rig.SystemBus(), Include: []string{"forged.service"}})
	talk(t, rig, "forged.service", 5)
	want(t, r.Sweep(t.Context()), "forged.service", sent(5))
	forger := stranger(t, rig.SystemBus())
	path := dbus.ObjectPath(unitPath("forged.service"))
	for i, change := range [][]string{nil, {"systemctl", "daemon-reload"}, {"systemctl", "daemon-reexec"}} {
		if change != nil {
			before := r.systemd.Health()
			rig.Run(t, change[0], change[1:]...)
			systemdtest.Eventually(t, "systemd is back", func() bool {
				h := r.systemd.Health()
				return h.Reloads+h.Reexecs > before.Reloads+before.Reexecs
			})
		}
		refused := r.systemd.Health().Refused
		for _, peer := range peersOf(t, forger) {
			sendStraight(forger, peer, managerPath, managerInterface, "UnitRemoved", "forged.service", path)
			sendStraight(forger, peer, managerPath, managerInterface, "Reloading", true)
		}
		systemdtest.Eventually(t, "the forged signals have arrived", func() bool { return r.systemd.Health().Refused >= refused+2 })
		before := r.unitNamed("forged.service")
		if before.Accounting != "on" {
			t.Errorf("after %d: the unit is %+v", i, before)
		}
	}
}
