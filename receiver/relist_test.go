package receiver

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestRelist: what no signal told of is found by the list of every few minutes, or
// by the next reading, and a unit in the same state as before is asked nothing.
func TestRelist(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("same.service", 1, all(10)))
	fake.SetUnit(accounted("restarted.service", 2, all(20)))
	fake.SetUnit(accounted("ended.service", 3, all(30)))
	r, _ := start(t, Config{Bus: fake.Address()})
	r.Sweep(t.Context())

	fake.SetUnit(accounted("restarted.service", 4, all(5)))
	fake.Remove("ended.service")
	fake.SetUnit(accounted("new.service", 5, all(50)))
	var asked atomic.Int64
	fake.OnGet(func(_ dbus.ObjectPath, iface, _ string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		if iface == unitInterface {
			asked.Add(1)
		}
		return dbus.Variant{}, nil, 0, false
	})
	r.mu.Lock()
	b := r.bus
	r.mu.Unlock()
	if err := r.relist(t.Context(), b, false); err != nil {
		t.Fatal(err)
	}
	if n := asked.Load(); n != 7 {
		t.Errorf("%d properties were asked, want the 7 of the new unit", n)
	}
	s := r.Sweep(t.Context())
	for name, n := range map[string]uint64{"same.service": 10, "restarted.service": 25, "new.service": 50} {
		want(t, s, name, all(n))
	}
	if got, _ := s.seriesOf("ended.service"); got.Total != all(30) {
		t.Errorf("the unit that ended has %+v", got.Total)
	}
}
