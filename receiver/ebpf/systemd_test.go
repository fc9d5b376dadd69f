//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// unitSum returns the counters of a unit with all of its cgroups, wire counters
// left out.
func unitSum(s Sweep, unit string) systemdtest.Accounting {
	sum := systemdtest.Accounting{OK: true}
	for _, m := range s.Meters {
		if m.Identity.Cgroup.Unit == unit {
			sum.IngressBytes += m.Received.Bytes
			sum.IngressPackets += m.Received.Packets
			sum.EgressBytes += m.Sent.Bytes
			sum.EgressPackets += m.Sent.Packets
		}
	}
	return sum
}

// TestSystemd compares with what systemd counts, and goes on where that does not.
func TestSystemd(t *testing.T) {
	rig := systemdtest.Start(t)
	r := attach(t, Config{Root: rig.Path("/sys/fs/cgroup")})
	traffic := rig.Traffic()
	rig.WriteFile(t, "/etc/systemd/system/sink@.service", "[Service]\nIPAccounting=yes\nType=notify\nExecStart="+traffic+" %I 127.0.0.1:9000\n")
	rig.Run(t, "systemctl", "start", "sink@udp\\x2dsink.service", "sink@tcp\\x2dsink.service")
	t.Run("equal", func(t *testing.T) { equalToSystemd(t, rig, r) })
	t.Run("short", func(t *testing.T) { shortUnits(t, rig, r) })
	t.Run("reload", func(t *testing.T) { reloads(t, rig, r) })
}

func equalToSystemd(t *testing.T, rig *systemdtest.Rig, r *Reader) {
	send := rig.Traffic()
	cases := map[string]string{
		"udp":       send + " udp-send 127.0.0.1:9000 -count 100",
		"tcp":       send + " tcp-send 127.0.0.1:9000 -bytes 20000000",
		"fragments": send + " udp-send 127.0.0.1:9000 -count 5 -bytes 60000",
		"refused":   "/bin/bash -c 'for i in {1..20}; do : </dev/tcp/127.0.0.1/9; done 2>/dev/null; true'",
		"closed":    "/bin/bash -c 'for i in {1..20}; do echo x >/dev/udp/127.0.0.1/9; done 2>/dev/null; true'",
		"udp6":      "/bin/bash -c 'for i in {1..20}; do echo x >/dev/udp/::1/9; done 2>/dev/null; true'",
	}
	units := []string{"sink@udp\\x2dsink.service", "sink@tcp\\x2dsink.service"}
	for name, command := range cases {
		unit := "equal-" + name + ".service"
		units = append(units, unit)
		rig.WriteFile(t, "/etc/systemd/system/"+unit, "[Service]\nIPAccounting=yes\nType=oneshot\nRemainAfterExit=yes\nExecStart="+command+"\n")
		rig.Run(t, "systemctl", "start", unit)
	}
	// A delegated unit with a cgroup of its own below.
	units = append(units, "equal-nested.service")
	rig.WriteFile(t, "/usr/local/bin/nested", `#!/bin/bash
cg=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
mkdir -p $cg/a/b && echo $$ >$cg/a/b/cgroup.procs && `+send+` udp-send 127.0.0.1:9000 -count 10
`)
	rig.WriteFile(t, "/etc/systemd/system/equal-nested.service", "[Service]\nIPAccounting=yes\nDelegate=yes\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/local/bin/nested\n")
	rig.Run(t, "systemctl", "start", "equal-nested.service")

	// The last packets of a connection pass when its sender has ended.
	settled := func() string {
		var b strings.Builder
		for _, unit := range units {
			fmt.Fprintln(&b, unit, rig.Show(t, unit))
		}
		return b.String()
	}
	for last := ""; last != settled(); time.Sleep(20 * time.Millisecond) {
		last = settled()
	}
	s := read(t, r)
	for _, unit := range units {
		shown, counted := rig.Show(t, unit), unitSum(s, unit)
		counted.InvocationID = shown.InvocationID
		if shown != counted || counted.EgressPackets+counted.IngressPackets == 0 {
			t.Errorf("%s: systemd says %+v, the meter %+v", unit, shown, counted)
		}
	}
	for _, m := range s.Meters {
		if m.Identity.Cgroup.Unit != units[0] {
			continue
		}
		if want := rig.Show(t, units[0]).InvocationID; m.Identity.Invocation != want {
			t.Errorf("%s: invocation %q, want %q", units[0], m.Identity.Invocation, want)
		}
	}
}

func shortUnits(t *testing.T, rig *systemdtest.Rig, r *Reader) {
	rig.WriteFile(t, "/etc/systemd/system/short@.service", "[Service]\nType=oneshot\nExecStart=/bin/bash -c 'echo x >/dev/udp/127.0.0.1/9000'\n")
	const n = 200
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("short@%d.service", i))
	}
	rig.Run(t, "systemctl", append([]string{"start"}, names...)...)
	s := read(t, r)
	for _, name := range names {
		if sum := unitSum(s, name); sum.EgressPackets != 1 || sum.EgressBytes != 2+28 {
			t.Errorf("%s: %+v, want one packet of 30 B", name, sum)
		}
	}
	gone := 0
	for _, m := range s.Meters {
		if !m.Identity.Named {
			t.Errorf("cgroup %d has no name", m.Identity.ID)
		}
		if m.Gone && strings.HasPrefix(m.Identity.Cgroup.Unit, "short@") && !m.Identity.Made.IsZero() {
			gone++
		}
	}
	if gone != n {
		t.Errorf("%d of %d short units are marked as gone", gone, n)
	}
}

// reloads sends for as long as systemd reloads and reexecutes.
func reloads(t *testing.T, rig *systemdtest.Rig, r *Reader) {
	const n = 10000
	rig.WriteFile(t, "/etc/systemd/system/busy.service", fmt.Sprintf(
		"[Service]\nType=exec\nRemainAfterExit=yes\nExecStart=%s udp-send 127.0.0.1:9000 -count %d -rate 5000\n", rig.Traffic(), n))
	rig.Run(t, "systemctl", "start", "busy.service")
	state := func() string {
		return strings.TrimSpace(rig.Run(t, "systemctl", "show", "busy.service", "-p", "SubState", "--value"))
	}
	busy := 0
	for state() == "running" {
		rig.Run(t, "systemctl", "daemon-reload")
		rig.Run(t, "systemctl", "daemon-reexec")
		busy++
	}
	sum := unitSum(read(t, r), "busy.service")
	if sum.EgressPackets != n || sum.EgressBytes != n*datagramBytes || busy == 0 {
		t.Errorf("%d packets and %d B over %d reloads and reexecs, want %d packets", sum.EgressPackets, sum.EgressBytes, busy, n)
	}
}
