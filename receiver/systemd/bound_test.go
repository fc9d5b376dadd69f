package systemd

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestLateSweeps: where no sweep reaches all units before its deadline, each still
// finishes some, and after a few all have been read.
func TestLateSweeps(t *testing.T) {
	t.Parallel()
	fake := systemdtest.StartFake(t)
	const units = 200
	for i := range units {
		fake.SetUnit(accounted(fmt.Sprintf("u%d.service", i), i+1, uint64(i)))
	}
	s, sink := start(t, fake.Address())
	var slow atomic.Bool
	slow.Store(true)
	fake.OnGet(func(_ dbus.ObjectPath, iface, property string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		if !slow.Load() || property != "Slice" {
			return dbus.Variant{}, nil, 0, false
		}
		return dbus.MakeVariant("system.slice"), nil, 50 * time.Millisecond, true
	})
	sweeps := 0
	systemdtest.Eventually(t, "all units have been read", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		err := s.Read(ctx)
		if sweeps++; sweeps == 1 && !errors.As(err, new(late)) {
			t.Fatalf("the first sweep was not late: %v", err)
		}
		for i := range units {
			if i > 0 && sink.of(fmt.Sprintf("u%d.service", i)) != all(uint64(i)) {
				return false
			}
		}
		return true
	})
	t.Logf("%d sweeps", sweeps)
	slow.Store(false)
	read(t, s)
}

// TestFlood: more signals of systemd than can be taken are dropped, but those of
// reloads, and a list makes up for them.
func TestFlood(t *testing.T) {
	t.Parallel()
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, 100))
	s, sink := start(t, fake.Address())
	read(t, s)
	flood := func() {
		for i := range 20000 {
			fake.Emit(bus.ManagerPath, bus.ManagerInterface+".UnitNew", fmt.Sprintf("invented-%d.service", i), dbus.ObjectPath("/a"))
		}
	}
	flood()
	systemdtest.Eventually(t, "signals are dropped", func() bool { return s.Health().Dropped > 0 })
	fake.SetUnit(accounted("b.service", 2, 200))
	fake.EmitUnitNew("b.service")
	fake.EmitReloading(true)
	fake.EmitReloading(false)
	systemdtest.Eventually(t, "the reload is seen", func() bool { return s.Health().Reloads == 1 })
	fake.SetUnit(accounted("c.service", 3, 300))
	flood()
	fake.EmitUnitNew("c.service")
	systemdtest.Eventually(t, "the list has all units", func() bool { return len(s.Units()) == 3 })
	read(t, s)
	for name, n := range map[string]uint64{"a.service": 100, "b.service": 200, "c.service": 300} {
		if got := sink.of(name); got != all(n) {
			t.Errorf("%s has %+v, want %d", name, got, n)
		}
	}
	if lists := fake.Calls("ListUnitsByPatterns"); lists > 50 {
		t.Errorf("systemd was asked for %d lists", lists)
	}
	if fake.Stubs() > 0 {
		t.Errorf("%d names that do not exist were touched", fake.Stubs())
	}
}

// TestUnlistable: what systemd fails to list is found among thousands by few calls, and
// left out.
func TestUnlistable(t *testing.T) {
	fake := systemdtest.StartFake(t)
	for i := range 300 {
		fake.SetUnit(accounted(fmt.Sprintf("u%d.service", i), i+1, uint64(i)))
	}
	fails := func(pattern string) bool {
		return pattern == "*.service" || pattern == "u7.service" || pattern == "u123.service"
	}
	fake.OnCall(func(member string, args []any) ([]any, *dbus.Error, time.Duration, bool) {
		if member != "ListUnitsByPatterns" {
			return nil, nil, 0, false
		}
		for _, pattern := range args[1].([]string) {
			if fails(pattern) {
				return nil, dbus.NewError(invalidArgs, []any{"Invalid argument"}), 0, true
			}
		}
		return nil, nil, 0, false
	})
	s, _ := start(t, fake.Address())
	if n := len(s.Units()); n != 298 {
		t.Errorf("%d units are listed, want 298", n)
	}
	if calls := fake.Calls("ListUnitsByPatterns"); calls > 80 {
		t.Errorf("it took %d lists", calls)
	}
}
