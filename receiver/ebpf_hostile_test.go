//go:build linux && !386 && !arm && !mips && !mipsle

package receiver

import (
	"testing"
	"time"
	"unicode/utf8"

	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// TestHostileNames: whatever a user calls the cgroups of a delegated subtree, all
// traffic counts for the delegated unit, and no other series appears.
func TestHostileNames(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	sink(t, rig)
	rig.WriteFile(t, "/usr/local/bin/hostile", `#!/bin/bash
set -eu
own=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)
long=$(printf 'x%.0s' $(seq 255))
id=$(printf '0123456789abcdef%.0s' 1 2 3 4)
send() { mkdir -p "$1" && echo $$ >"$1/cgroup.procs" && echo x >/dev/udp/127.0.0.1/9000; }
for name in nginx.service user@0.service init.scope -.slice system.slice/sshd.service kernel '..service' '_' '%s%n' '"},{' \
	$'\xff\xfe' $'\xed\xa0\x80.service' $'\e[31m' 'a b' 'x\x2ey.service' "docker-$id.scope" "libpod-payload-$id" "${long::247}.service"; do
	send "$own/$name"
done
deep=.
for i in $(seq 15); do # 4,096 bytes of path are more than one system call takes
	mkdir "$own/$deep/$long" && deep+=/$long
done
cd "$own/$deep"
for i in $(seq 15); do
	mkdir $long && cd $long
done
echo $$ >cgroup.procs && echo x >/dev/udp/127.0.0.1/9000
# A line feed is refused by the kernel.
! mkdir "$own/"$'a\nb' 2>/dev/null
exec sleep infinity
`)
	const unit = "hostile.service"
	r, _ := run(t, Config{Source: EBPF, UnitType: true, UnitSlice: true, meterDirs: []string{pins(t, root)}, meterRoot: root})
	before := map[ledger.ID]bool{}
	for s := range r.Sweep(t.Context()).State.All() {
		before[s.ID] = true
	}
	rig.WriteFile(t, "/etc/systemd/system/"+unit, "[Service]\nType=simple\nUser=daemon\nDelegate=yes\nExecStart=/usr/local/bin/hostile\n")
	rig.Run(t, "systemctl", "daemon-reload")
	rig.Run(t, "systemctl", "start", unit)
	t.Cleanup(func() { rig.Run(t, "systemctl", "stop", unit) })
	const datagrams = 19
	wanted := counted(0, 0, datagrams*30, datagrams)
	for end := time.Now().Add(3 * time.Minute); r.Sweep(t.Context()).total(unit) != wanted; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s has %+v, want %+v; its journal:\n%s", unit, r.Sweep(t.Context()).total(unit), wanted,
				rig.Run(t, "journalctl", "--no-pager", "-o", "cat", "-u", unit))
		}
	}
	for s := range r.Sweep(t.Context()).State.All() {
		if !before[s.ID] && s.ID.Name != unit && s.ID.Name != "sink.service" { // which received it
			t.Errorf("there is a series %+v", s.ID)
		}
		if !utf8.ValidString(s.ID.Name) || !utf8.ValidString(s.Slice) {
			t.Errorf("%q of %q is no UTF-8, which OTLP refuses", s.ID.Name, s.Slice)
		}
	}
	// By root, where names are free.
	rig.Run(t, "bash", "-c", `c=/sys/fs/cgroup/$'\xff'; mkdir $c && echo $$ >$c/cgroup.procs && echo x >/dev/udp/127.0.0.1/9000; echo $$ >/sys/fs/cgroup/cgroup.procs; rmdir $c`)
	want(t, r.Sweep(t.Context()), "\uFFFD", counted(0, 0, 30, 1))
}
