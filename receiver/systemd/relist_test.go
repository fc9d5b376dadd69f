package systemd

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestRelist: what no signal told of is found by the list of every few minutes, or
// by the next reading, and a unit in the same state as before is asked nothing.
func TestRelist(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("same.service", 1, 10))
	fake.SetUnit(accounted("restarted.service", 2, 20))
	fake.SetUnit(accounted("ended.service", 3, 30))
	s, sink := startWith(t, Config{Bus: fake.Address(), RelistEvery: 50 * time.Millisecond})
	read(t, s)

	fake.SetUnit(accounted("restarted.service", 4, 5))
	fake.Remove("ended.service")
	var asked atomic.Int64
	fake.OnGet(func(_ dbus.ObjectPath, iface, _ string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		if iface == bus.UnitInterface {
			asked.Add(1)
		}
		return dbus.Variant{}, nil, 0, false
	})
	fake.SetUnit(accounted("new.service", 5, 50))
	systemdtest.Eventually(t, "the new unit is found", func() bool { return len(s.Units()) == 4 })
	lists := fake.Calls("ListUnitsByPatterns")
	systemdtest.Eventually(t, "there are more lists", func() bool { return fake.Calls("ListUnitsByPatterns") > lists+2 })
	if n := asked.Load(); n != 7 {
		t.Errorf("%d properties were asked, want the 7 of the new unit", n)
	}
	read(t, s)
	for name, n := range map[string]uint64{"same.service": 10, "restarted.service": 25, "new.service": 50, "ended.service": 30} {
		if got := sink.of(name); got != all(n) {
			t.Errorf("%s has %+v, want %d", name, got, n)
		}
	}
}

// TestStubIsNoRun: a unit that is unloaded while it is asked for its state is
// loaded again by that, without an invocation. Its next run is no run of that.
func TestStubIsNoRun(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, 100))
	s, sink := start(t, fake.Address())
	read(t, s)
	fake.OnGet(func(_ dbus.ObjectPath, _, property string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		switch property {
		case "ActiveState":
			return dbus.MakeVariant("inactive"), nil, 0, true
		case "SubState":
			return dbus.MakeVariant("dead"), nil, 0, true
		case "InvocationID":
			return dbus.MakeVariant([]byte{}), nil, 0, true
		}
		return dbus.Variant{}, nil, 0, false
	})
	fake.EmitUnitNew("a.service")
	systemdtest.Eventually(t, "the stub is seen", func() bool { return len(s.Units()) == 0 })
	fake.OnGet(nil)
	fake.SetUnit(accounted("a.service", 2, 30))
	read(t, s) // before the signals of that run are here
	fake.EmitPropertiesChanged("a.service")
	systemdtest.Eventually(t, "the run is known", func() bool {
		units := s.Units()
		return len(units) == 1 && units[0].Invocation == fmt.Sprintf("%032x", 2)
	})
	read(t, s)
	if got := sink.of("a.service"); got != all(130) {
		t.Errorf("the unit has %+v", got)
	}
}

// read reads all units.
func read(t testing.TB, s *Source) {
	t.Helper()
	if err := s.Read(t.Context()); err != nil {
		t.Fatal(err)
	}
}
