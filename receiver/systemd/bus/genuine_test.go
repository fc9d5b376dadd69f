package bus

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestLargeSignals: what is longer than a signal of systemd's is skipped without
// being kept, whoever sent it, and the connection goes on.
func TestLargeSignals(t *testing.T) {
	w, p := newWire(t)
	large := func(kind dbus.Type, n int) []byte {
		m := encode(t, binary.LittleEndian, &dbus.Message{
			Type: kind, Body: []any{strings.Repeat("x", n)},
			Headers: map[dbus.HeaderField]dbus.Variant{
				dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath(ManagerPath)), dbus.FieldInterface: dbus.MakeVariant(ManagerInterface),
				dbus.FieldMember: dbus.MakeVariant("UnitNew"),
			},
		})
		return m
	}
	go p.read()
	sent := []int{maxSignal, 1 << 20, 28 << 20}
	for _, n := range sent {
		p.send(large(dbus.TypeSignal, n))
		p.send(large(dbus.TypeMethodCall, n))
	}
	// Shorter, but no message: an unknown header field of a type that has no place there.
	odd := large(dbus.TypeSignal, 10)
	odd[18] = 'y'
	p.send(odd)
	a := newAnswers(t)
	done := make(chan error, 1)
	go func() { done <- w.gets(t.Context(), 1, numbered, a.done) }()
	var calls []peerCall
	systemdtest.Eventually(t, "a call arrives", func() bool { calls = append(calls, p.take()...); return len(calls) == 1 })
	p.send(getReply(t, binary.LittleEndian, calls[0].serial, uint64(5)))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got, want := w.refused.Load(), int64(2*len(sent)+1); got != want {
		t.Errorf("%d messages were refused, want %d", got, want)
	}
	if cap(w.message) > keepBuffer {
		t.Errorf("a buffer of %d bytes is kept", cap(w.message))
	}
}

// TestOwnerAnnouncedFirst: the answer to who owns the name may be older than an
// announcement that has been read meanwhile.
func TestOwnerAnnouncedFirst(t *testing.T) {
	w := &connection{bus: true}
	announce := func(owner string) {
		t.Helper()
		h, err := parse(encode(t, binary.BigEndian, &dbus.Message{
			Type: dbus.TypeSignal, Body: []any{SystemdName, ":1.1", owner},
			Headers: map[dbus.HeaderField]dbus.Variant{
				dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath("/org/freedesktop/DBus")), dbus.FieldInterface: dbus.MakeVariant(BusInterface),
				dbus.FieldMember: dbus.MakeVariant("NameOwnerChanged"), dbus.FieldSender: dbus.MakeVariant(BusInterface),
			},
		}))
		if err != nil || !w.genuine(h) {
			t.Fatalf("%v: the bus is not believed", err)
		}
	}
	from := func(sender string) bool {
		return w.genuine(header{iface: []byte(ManagerInterface), member: []byte("UnitRemoved"), sender: []byte(sender)})
	}
	if from("") || from(":1.1") {
		t.Error("somebody is believed before systemd is known")
	}
	announce(":1.2")
	w.found(":1.1")
	if from(":1.1") || !from(":1.2") {
		t.Error("the older answer has won")
	}
	announce("")
	if from("") || from(":1.2") {
		t.Error("somebody is believed while nobody has systemd's name")
	}
}
