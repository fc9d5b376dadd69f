package systemd

import (
	"strings"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// wanted reports whether the inventory has a use for a signal. PID 1 sends two
// PropertiesChanged for each change of any unit, devices and targets included,
// and on its own socket the signals of jobs too; most are not for us.
func wanted(s bus.Signal) bool {
	switch string(s.Interface) {
	case bus.PropertiesInterface:
		return string(s.Text) == bus.UnitInterface && meteredPath(string(s.Path))
	case bus.ManagerInterface:
		switch string(s.Member) {
		case "UnitNew", "UnitRemoved":
			return CounterInterface(TypeOf(string(s.Text))) != ""
		case "Reloading":
			return true
		}
	case bus.BusInterface:
		return string(s.Member) == "NameOwnerChanged"
	}
	return false
}

// meteredPath reports whether an object path belongs to a unit of a type with IP
// counters, or names a unit by its invocation id.
func meteredPath(path string) bool {
	i := strings.LastIndex(path, "_2e")
	if i < 0 {
		return true
	}
	return CounterInterface(path[i+len("_2e"):]) != ""
}
