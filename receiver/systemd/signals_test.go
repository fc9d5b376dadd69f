package systemd

import (
	"testing"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// TestWanted: only signals that the inventory has a use for are decoded.
func TestWanted(t *testing.T) {
	const systemd = "/org/freedesktop/systemd1"
	service := unitPath("a.service")
	for _, test := range []struct {
		path, iface, member, text string
		want                      bool
	}{
		{systemd, bus.ManagerInterface, "UnitNew", "a.service", true},
		{systemd, bus.ManagerInterface, "UnitNew", "a.device", false},
		{systemd, bus.ManagerInterface, "UnitNew", "", false},
		{systemd, bus.ManagerInterface, "UnitRemoved", "a.scope", true},
		{systemd, bus.ManagerInterface, "UnitRemoved", "a.timer", false},
		{systemd, bus.ManagerInterface, "Reloading", "", true},
		{systemd, bus.ManagerInterface, "JobNew", "", false},
		{systemd, bus.ManagerInterface, "StartupFinished", "", false},
		{service, bus.PropertiesInterface, "PropertiesChanged", bus.UnitInterface, true},
		{service, bus.PropertiesInterface, "PropertiesChanged", bus.SystemdName + ".Service", false},
		{unitPath("a.device"), bus.PropertiesInterface, "PropertiesChanged", bus.UnitInterface, false},
		{service, bus.PropertiesInterface, "PropertiesChanged", "", false},
		{"/org/freedesktop/DBus", bus.BusInterface, "NameOwnerChanged", bus.SystemdName, true},
		{"/a", "a.b", "C", "a.service", false},
	} {
		got := wanted(bus.Signal{Path: []byte(test.path), Interface: []byte(test.iface), Member: []byte(test.member), Text: []byte(test.text)})
		if got != test.want {
			t.Errorf("%s.%s of %s with %q is wanted: %v", test.iface, test.member, test.path, test.text, got)
		}
	}
}
