//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"slices"
	"testing"
)

// TestIdle: the cgroups that exist and have had no traffic, named by the kernel or by a
// walk.
func TestIdle(t *testing.T) {
	root := tree(t)
	to := sink(t, "udp4", "127.0.0.1:0")
	r := attach(t, Config{Root: root})
	busy, older := mkdir(t, root+"/busy.slice/busy.service"), mkdir(t, root+"/older.service")
	gone := mkdir(t, root+"/gone.service")
	talk(t, socketIn(t, busy, to), 1)
	remove(t, gone)
	for _, naming := range []uint32{1, 0} {
		r.info.Naming = naming // as if the kernel refused
		read(t, r)
		var paths []string
		err := r.Idle(func(who *Identity) {
			if who.ID == cgroupID(older) && (!who.Named || who.Cgroup.Unit != "older.service" || naming == 1 && who.Made.IsZero()) {
				t.Errorf("older.service is %+v", who)
			}
			paths = append(paths, who.Path)
		})
		if slices.Sort(paths); err != nil || !slices.Equal(paths, []string{"/", "/busy.slice", "/older.service"}) {
			t.Errorf("naming %d: idle are %q, %v", naming, paths, err)
		}
	}
}
