//go:build linux && !386 && !arm && !mips && !mipsle

package receiver

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/ledger"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// owned returns the series of a unit with labels, zero for one that does not exist.
func (s *Sweep) owned(name string, labels ledger.Labels) Series {
	got, _ := s.seriesWith(ledger.ID{Kind: ledger.Unit, Name: name, Owner: ledger.OwnerOf(labels)})
	return got
}

// wantOwned wants a unit with labels to have a total.
func wantOwned(t *testing.T, s *Sweep, name string, labels ledger.Labels, total Counters) Series {
	t.Helper()
	got := s.owned(name, labels)
	if got.Total != total {
		t.Fatalf("%s of %+v has %+v, want %+v", name, labels, got.Total, total)
	}
	return got
}

// wantAttributes wants those of the points of a series, the common ones left out.
func wantAttributes(t *testing.T, s Series, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for _, kv := range s.Transmit.ToSlice() {
		got[string(kv.Key)] = kv.Value.String()
	}
	for _, key := range []string{"host.name", "network.io.direction"} {
		delete(got, key)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the attributes are %v, want %v", got, want)
	}
}

// wantWhole wants the sum of all series to be what the meter has counted in all.
func wantWhole(t *testing.T, r *Receiver, dir, root string) {
	t.Helper()
	reader, err := ebpf.Open(ebpf.Config{Dir: dir, Root: root, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	all := func() (sum ledger.Counters) {
		s, err := reader.Read()
		if err != nil {
			t.Fatal(err)
		}
		sum = measured(ledger.Total, s.Lost.Received, s.Lost.Sent)
		for _, m := range s.Meters {
			sum = sum.Plus(measured(ledger.Total, m.Received, m.Sent))
		}
		return sum
	}
	var before, got ledger.Counters
	systemdtest.Eventually(t, "the sum of all series is that of all cgroups", func() bool {
		before, got = all(), ledger.Counters{}
		for s := range r.Sweep(t.Context()).All() {
			if s.Measure == ledger.Total {
				got = got.Plus(s.Total)
			}
		}
		if before == all() && got != before {
			t.Fatalf("all series have %+v, all cgroups %+v", got, before)
		}
		return got == before
	})
}

// managers starts a manager for each of two users that do not exist otherwise.
func managers(t *testing.T, rig *systemdtest.Rig) (users [2]string, run func(user string, args ...string)) {
	t.Helper()
	users = [2]string{"4001", "4002"}
	rig.WriteFile(t, "/etc/systemd/system/user@.service", `[Service]
User=%i
Type=notify
Delegate=yes
Slice=user-%i.slice
Environment=XDG_RUNTIME_DIR=/run/user/%i
ExecStart=/lib/systemd/systemd --user --unit=basic.target --log-target=journal
KillMode=mixed
`)
	run = func(user string, args ...string) {
		t.Helper()
		rig.Run(t, "setpriv", append([]string{"--reuid", user, "--regid", user, "--clear-groups", "env", "XDG_RUNTIME_DIR=/run/user/" + user}, args...)...)
	}
	for _, user := range users {
		rig.Run(t, "install", "-d", "-o", user, "-g", user, "-m", "700", "/run/user/"+user)
		rig.Run(t, "sh", "-c", `grep -q :$0: /etc/passwd || echo "u$0:x:$0:$0::/tmp:/bin/sh" >>/etc/passwd; grep -q :$0: /etc/group || echo "u$0:x:$0:" >>/etc/group`, user)
		rig.Run(t, "systemctl", "start", "user@"+user+".service")
		t.Cleanup(func() { rig.Run(t, "systemctl", "stop", "user@"+user+".service") })
	}
	return users, run
}

// TestUserUnits: units of users' managers have series of their own, and nothing is
// counted twice, whichever way the setting is changed.
func TestUserUnits(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	dir := pins(t, root)
	sink(t, rig)
	users, run1 := managers(t, rig)
	rig.WriteFile(t, "/etc/systemd/user/chat.service", "[Service]\nExecStart=/usr/local/bin/talker chat-%U\n")
	for _, unit := range []string{"brief@", "left@"} {
		rig.WriteFile(t, "/etc/systemd/user/"+unit+".service", "[Service]\nType=oneshot\nExecStart="+rig.Traffic()+" udp-send "+sinkAddress+"\n")
	}
	talker(t, rig, "chat.service") // one of the system has the same name
	for _, user := range users {
		rig.Run(t, "sh", "-c", `rm -f /run/chat-$0.in /run/chat-$0.out; mkfifo /run/chat-$0.in /run/chat-$0.out && chmod 666 /run/chat-$0.in /run/chat-$0.out`, user)
		run1(user, "systemctl", "--user", "start", "chat.service")
	}
	manager, one, two := "user@"+users[0]+".service", ledger.Labels{User: users[0]}, ledger.Labels{User: users[1]}
	say := func(user string, n int) { t.Helper(); talk(t, rig, "chat-"+user, n) }

	cfg := Config{Source: EBPF, meterDirs: []string{dir}, meterRoot: root, Fold: []string{"brief@*.service"}, Exclude: []string{"left@*"}}
	agent := func(on bool) (*Receiver, func() *Sweep) {
		t.Helper()
		cfg.UserUnits = on
		r, stop := run(t, cfg)
		return r, func() *Sweep {
			s := r.Sweep(t.Context())
			cfg.State = s.State
			stop()
			return s
		}
	}
	r, stop := agent(false)
	say(users[0], 5)
	want(t, r.Sweep(t.Context()), manager, sent(5))
	stop()

	r, stop = agent(true)
	s := r.Sweep(t.Context())
	wantOwned(t, s, manager, ledger.Labels{}, sent(5)) // what was counted stays where it is
	began := wantOwned(t, s, "chat.service", one, Counters{})
	wantAttributes(t, began, map[string]string{"systemd.unit.name": "chat.service", "user.id": users[0]})
	if began.Start.Before(s.Time.Add(-time.Hour)) || !began.Start.After(cfg.State.Time.Add(-time.Minute)) {
		t.Errorf("the series begins at %v, the state is of %v", began.Start, cfg.State.Time)
	}
	say(users[0], 3)
	say(users[1], 2)
	talk(t, rig, "chat.service", 4)
	run1(users[0], "systemctl", "--user", "start", "brief@1.service", "brief@2.service", "left@1.service")
	s = stop()
	wantOwned(t, s, manager, ledger.Labels{}, sent(5+1)) // with the one that is left out
	want(t, s, "chat.service", sent(4))
	wantOwned(t, s, "chat.service", one, sent(3))
	wantOwned(t, s, "chat.service", two, sent(2))
	wantOwned(t, s, "brief@*.service", one, sent(2))
	wantOwned(t, s, "brief@*.service", two, Counters{})

	say(users[0], 1) // nobody reads
	r, stop = agent(true)
	rig.Run(t, "systemctl", "restart", manager)
	run1(users[0], "systemctl", "--user", "start", "chat.service")
	say(users[0], 6)
	s = r.Sweep(t.Context())
	wantOwned(t, s, "chat.service", one, sent(3+1+6))
	wantOwned(t, s, manager, ledger.Labels{}, sent(5+1))
	stop()

	r, stop = agent(false)
	say(users[0], 7)
	s = r.Sweep(t.Context())
	wantOwned(t, s, manager, ledger.Labels{}, sent(5+1+7))
	if got := wantOwned(t, s, "chat.service", one, sent(3+1+6)); got.Observed && got.Time.After(cfg.State.Time) {
		t.Errorf("a series without a unit has a point: %+v", got.Series)
	}
	stop()

	r, _ = agent(true)
	say(users[0], 8)
	s = r.Sweep(t.Context())
	wantOwned(t, s, "chat.service", one, sent(3+1+6+8))
	wantOwned(t, s, manager, ledger.Labels{}, sent(5+1+7))
	wantWhole(t, r, dir, root)
}

// sayOnce sends one datagram of 30 B from a cgroup, which is removed.
func sayOnce(t *testing.T, rig *systemdtest.Rig, cgroup string) {
	t.Helper()
	rig.Run(t, "bash", "-c", `mkdir -p "/sys/fs/cgroup/$0" && echo $$ >"/sys/fs/cgroup/$0/cgroup.procs" && echo x >/dev/udp/127.0.0.1/9000
		echo $$ >/sys/fs/cgroup/cgroup.procs; cd /sys/fs/cgroup && rmdir "$0"`, cgroup)
}

// TestContainers: one series for each container, whoever runs it and however often.
func TestContainers(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	sink(t, rig)
	dir := pins(t, root)
	cid := func(n int) string { return fmt.Sprintf("%064x", n) }
	files := t.TempDir()
	link := func(name string) {
		t.Helper()
		if err := os.Symlink("nowhere", filepath.Join(files, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("web-7d4b9_shop_nginx-" + cid(11) + ".log")
	link("web-7d4b9_shop_nginx-" + cid(12) + ".log")
	link("a_b_c.log")
	link("odd")
	for name, text := range map[string]string{
		"web.service":  "[Service]\nExecStop=/usr/bin/podman rm --name=no\nExecStart=/usr/bin/podman run --name=systemd-%N --cidfile=%t/%N.cid --cgroups=split x\n",
		"tpl@.service": "[Service]\nExecStart=/usr/bin/podman run --name systemd-%p_%i --rm x\n",
		"odd.service":  "[Service]\nExecStart=/usr/bin/podman run --name %H --rm x\n",
	} {
		if err := os.WriteFile(filepath.Join(files, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	type wanted struct {
		unit   string
		labels ledger.Labels
	}
	kube := ledger.Labels{ContainerName: "nginx", Pod: "web-7d4b9", Namespace: "shop"}
	cri := kube
	cri.Runtime = "containerd"
	cases := map[string]wanted{
		"system.slice/docker-" + cid(1) + ".scope":                                    {"docker-*.scope", ledger.Labels{Runtime: "docker", ContainerID: cid(1)}},
		"system.slice/docker-" + cid(2) + ".scope/inner":                              {"docker-*.scope", ledger.Labels{Runtime: "docker", ContainerID: cid(2)}},
		"docker/" + cid(3):                                                            {"docker", ledger.Labels{Runtime: "docker", ContainerID: cid(3)}},
		"machine.slice/libpod-" + cid(4) + ".scope/container":                         {"libpod-*.scope", ledger.Labels{Runtime: "podman", ContainerID: cid(4)}},
		"kubepods/burstable/pod12-34/" + cid(11):                                      {"kubepods", kube},
		"kubepods/burstable/pod12-34/" + cid(12):                                      {"kubepods", kube},
		"kubepods.slice/kubepods-pod12_34.slice/cri-containerd-" + cid(11) + ".scope": {"cri-containerd-*.scope", cri},
		"kubepods.slice/kubepods-pod56.slice/crio-" + cid(13) + ".scope":              {"crio-*.scope", ledger.Labels{Runtime: "cri-o", ContainerID: cid(13)}},
		"system.slice/web.service/libpod-payload-" + cid(21):                          {"web.service", ledger.Labels{Runtime: "podman", ContainerName: "systemd-web"}},
		"system.slice/web.service/libpod-payload-" + cid(22):                          {"web.service", ledger.Labels{Runtime: "podman", ContainerName: "systemd-web"}},
		"system.slice/tpl@7.service/libpod-payload-" + cid(23):                        {"tpl@7.service", ledger.Labels{Runtime: "podman", ContainerName: "systemd-tpl_7"}},
		"system.slice/odd.service/libpod-payload-" + cid(24):                          {"odd.service", ledger.Labels{Runtime: "podman"}},
		"system.slice/none.service/libpod-payload-" + cid(25):                         {"none.service", ledger.Labels{Runtime: "podman"}},
		"lxc.payload.c1/system.slice/ssh.service":                                     {"lxc.payload.c1", ledger.Labels{Runtime: "lxc", ContainerName: "c1"}},
		"machine.slice/systemd-nspawn@c2.service/payload/init.scope":                  {"systemd-nspawn@c2.service", ledger.Labels{Runtime: "systemd-nspawn", ContainerName: "c2"}},
		`machine.slice/machine-qemu\x2d1\x2dvm.scope/libvirt`:                         {`machine-qemu\x2d*.scope`, ledger.Labels{Runtime: "libvirt", ContainerName: "vm"}},
		`machine.slice/machine-qemu\x2d2\x2dvm.scope/libvirt`:                         {`machine-qemu\x2d*.scope`, ledger.Labels{Runtime: "libvirt", ContainerName: "vm"}},
		"actions_job/job": {"actions_job", ledger.Labels{}},
	}
	expected := map[wanted]int{}
	for cgroup, w := range cases {
		sayOnce(t, rig, cgroup)
		expected[w]++
	}
	cfg := Config{Source: EBPF, Containers: true, meterDirs: []string{dir}, meterRoot: root, containerLogs: files, generator: files}
	r, stop := run(t, cfg)
	s := r.Sweep(t.Context())
	for w, n := range expected {
		wantOwned(t, s, w.unit, w.labels, counted(0, 0, uint64(30*n), uint64(n)))
	}
	wantAttributes(t, s.owned("cri-containerd-*.scope", cri), map[string]string{
		"systemd.unit.name": "cri-containerd-*.scope", "container.runtime": "containerd", "container.name": "nginx", "k8s.pod.name": "web-7d4b9", "k8s.namespace.name": "shop"})
	wantAttributes(t, s.owned("docker", ledger.Labels{Runtime: "docker", ContainerID: cid(3)}), map[string]string{
		"systemd.unit.name": "docker", "container.runtime": "docker", "container.id": cid(3)})
	wantWhole(t, r, dir, root)

	// One that runs waits for its name, and is complete with it.
	const late = "kubepods/pod99"
	hold := rig.Command(t.Context(), "bash", "-c", `mkdir -p "/sys/fs/cgroup/$0" && echo $$ >"/sys/fs/cgroup/$0/cgroup.procs" && echo x >/dev/udp/127.0.0.1/9000; echo said; read -r x; echo $$ >/sys/fs/cgroup/cgroup.procs`, late+"/"+cid(31))
	in, err := hold.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := hold.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		wantOwned(t, r.Sweep(t.Context()), "kubepods", ledger.Labels{ContainerID: cid(31)}, Counters{})
	}
	link("db-0_shop_pg-" + cid(31) + ".log")
	wantOwned(t, r.Sweep(t.Context()), "kubepods", ledger.Labels{ContainerName: "pg", Pod: "db-0", Namespace: "shop"}, counted(0, 0, 30, 1))
	in.Close()
	if err := hold.Wait(); err != nil {
		t.Fatal(err)
	}

	// Switched off, what comes goes to the fold; what was counted stays.
	cfg.State, cfg.Containers = r.Sweep(t.Context()).State, false
	stop()
	r, _ = run(t, cfg)
	sayOnce(t, rig, "system.slice/docker-"+cid(5)+".scope")
	sayOnce(t, rig, "docker/"+cid(6))
	s = r.Sweep(t.Context())
	want(t, s, "docker-*.scope", counted(0, 0, 30, 1))
	want(t, s, "docker", counted(0, 0, 30, 1))
	wantOwned(t, s, "docker-*.scope", ledger.Labels{Runtime: "docker", ContainerID: cid(1)}, counted(0, 0, 30, 1))
	wantWhole(t, r, dir, root)
}

// TestSlices: a slice is the sum of what is in it, as systemd counts it.
func TestSlices(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	dir := pins(t, root)
	for _, slice := range []string{"deep.slice", "deep-er.slice"} {
		rig.WriteFile(t, "/etc/systemd/system/"+slice, "[Slice]\nIPAccounting=yes\n")
		rig.Run(t, "systemctl", "start", slice)
		t.Cleanup(func() { rig.Run(t, "systemctl", "stop", slice) })
	}
	talker(t, rig, "upper.service", "Slice=deep.slice", "StartLimitInterval=0")
	talker(t, rig, "lower.service", "Slice=deep-er.slice")
	talker(t, rig, "hidden.service", "Slice=deep-er.slice")
	cfg := Config{
		Source: EBPF, Types: append(DefaultTypes(), "slice"), Exclude: []string{"hidden.service"},
		meterDirs: []string{dir}, meterRoot: root,
	}
	r, stop := run(t, cfg)
	check := func() {
		t.Helper()
		s := r.Sweep(t.Context())
		var sum ledger.Counters
		for one := range s.All() {
			if one.Kind == ledger.Unattributed || !strings.HasSuffix(one.Name, ".slice") {
				sum = sum.Plus(one.Total)
			}
		}
		hidden := shown(t, rig, "hidden.service")
		want(t, s, rootSlice, systemdCounters(sum.Plus(countersOf(hidden))))
		for _, slice := range []string{"deep.slice", "deep-er.slice"} {
			want(t, s, slice, shown(t, rig, slice))
		}
	}
	talk(t, rig, "upper.service", 1)
	talk(t, rig, "lower.service", 2)
	talk(t, rig, "hidden.service", 4)
	sayOnce(t, rig, "deep.slice/own") // no unit
	check()
	if s := r.Last(); s.total("deep-er.slice") != sent(6) || s.total("hidden.service") != (Counters{}) {
		t.Errorf("deep-er.slice has %+v, want those of 6 datagrams", s.total("deep-er.slice"))
	}
	rig.Run(t, "systemctl", "restart", "upper.service")
	talk(t, rig, "upper.service", 8)
	check()
	cfg.State = r.Last().State
	stop()
	talk(t, rig, "lower.service", 16)
	r, stop = run(t, cfg)
	talk(t, rig, "hidden.service", 1)
	check()

	// Away for a while, its series begins anew: it has no gap.
	cfg.State, cfg.Types = r.Last().State, nil
	stop()
	r, stop = run(t, cfg)
	talk(t, rig, "lower.service", 3)
	none(t, r.Sweep(t.Context()), "deep.slice")
	cfg.State, cfg.Types = r.Last().State, append(DefaultTypes(), "slice")
	stop()
	r, _ = run(t, cfg)
	talk(t, rig, "lower.service", 5)
	s := r.Sweep(t.Context())
	if got := want(t, s, "deep.slice", sent(5)); got.Start.Before(cfg.State.Time.Add(-time.Hour)) {
		t.Errorf("the series of deep.slice begins at %v", got.Start)
	}
}

// TestMeasures: loopback and the rest, and both after segmentation.
func TestMeasures(t *testing.T) {
	rig := theRig(t)
	root := rig.Path("/sys/fs/cgroup")
	dir := pins(t, root)
	talker(t, rig, "split.service")
	rig.Run(t, "sh", "-c", `ip link show d0 >/dev/null 2>&1 || { ip link add d0 type veth peer name d1 && ip link set d1 up && ip addr add 10.9.9.1/24 dev d0 && ip link set d0 up && ip neigh add 10.9.9.2 dev d0 lladdr 02:00:00:00:00:02; }`)
	rig.Run(t, "ip", "link", "set", "lo", "mtu", "1500") // else it takes what would be segmented
	t.Cleanup(func() { rig.Run(t, "ip", "link", "set", "lo", "mtu", "65536") })
	rig.WriteFile(t, "/etc/systemd/system/away@.service", "[Service]\nType=oneshot\nExecStart="+rig.Traffic()+" udp-send 10.9.9.2:9 -count %i\nExecStart="+rig.Traffic()+" udp-send "+sinkAddress+"\n")
	rig.WriteFile(t, "/etc/systemd/system/tcp.service", "[Service]\nType=notify\nExecStart="+rig.Traffic()+" tcp-sink 127.0.0.1:9100\n")
	rig.WriteFile(t, "/etc/systemd/system/bulk.service", "[Service]\nType=oneshot\nExecStart="+rig.Traffic()+" tcp-send 127.0.0.1:9100 -bytes 3000000\n")
	rig.Run(t, "systemctl", "start", "tcp.service")
	t.Cleanup(func() { rig.Run(t, "systemctl", "stop", "tcp.service") })

	cfg := Config{Source: EBPF, meterDirs: []string{dir}, meterRoot: root}
	r, stop := run(t, cfg)
	measure := func(s *Sweep, name string, m ledger.Measure) Series {
		got, _ := s.seriesWith(ledger.ID{Kind: ledger.Unit, Name: name, Measure: m})
		return got
	}
	next := func(wire, loopback bool) {
		t.Helper()
		cfg.State, cfg.Wire, cfg.Loopback = r.Sweep(t.Context()).State, wire, loopback
		stop()
		r, stop = run(t, cfg)
	}
	talk(t, rig, "split.service", 5)
	next(true, true)
	measures := []ledger.Measure{ledger.Remote, ledger.Loopback, ledger.WireRemote, ledger.WireLoopback}
	s := r.Sweep(t.Context())
	for _, m := range measures { // counted before, and so in other points
		if got := measure(s, "split.service", m); got.Total != (Counters{}) || !got.Start.After(measure(s, "split.service", ledger.Total).Start) {
			t.Errorf("measure %d begins with %+v", m, got.Series)
		}
	}
	talk(t, rig, "split.service", 2)
	rig.Run(t, "systemctl", "start", "away@3.service", "bulk.service")
	next(true, true) // an agent that restarts goes on
	talk(t, rig, "split.service", 4)
	rig.Run(t, "systemctl", "start", "away@3.service")
	s = r.Sweep(t.Context())
	for _, w := range []struct {
		name string
		m    ledger.Measure
		want Counters
	}{
		{"split.service", ledger.Total, sent(11)}, {"split.service", ledger.Loopback, sent(6)}, {"split.service", ledger.Remote, Counters{}},
		{"split.service", ledger.WireLoopback, sent(6)}, {"split.service", ledger.WireRemote, Counters{}},
		{"away@3.service", ledger.Total, sent(8)}, {"away@3.service", ledger.Loopback, sent(2)}, {"away@3.service", ledger.Remote, sent(6)},
		{"away@3.service", ledger.WireLoopback, sent(2)}, {"away@3.service", ledger.WireRemote, sent(6)},
	} {
		if got := measure(s, w.name, w.m); got.Total != w.want {
			t.Errorf("%s has %+v of measure %d, want %+v", w.name, got.Total, w.m, w.want)
		}
	}
	// 3 MB are more segments than super-packets, and each has 52 B of headers or more.
	total, wire := measure(s, "bulk.service", ledger.Total).Total, measure(s, "bulk.service", ledger.WireLoopback).Total
	if wire.EgressBytes-total.EgressBytes < 52*(wire.EgressPackets-total.EgressPackets) || wire.EgressPackets <= total.EgressPackets {
		t.Errorf("on the wire %+v, before segmentation %+v", wire, total)
	}
	pointsOf := func(m ledger.Measure) []string {
		got := measure(s, "away@3.service", m)
		loopback, _ := got.Transmit.Value("unitmeter.loopback")
		return []string{got.Bytes, got.Packets, loopback.String()}
	}
	for m, want := range map[ledger.Measure][]string{
		ledger.Total: {"", "", ""}, ledger.Remote: {IOName, PacketCountName, "false"}, ledger.Loopback: {IOName, PacketCountName, "true"},
		ledger.WireRemote: {WireIOName, WirePacketCountName, "false"}, ledger.WireLoopback: {WireIOName, WirePacketCountName, "true"},
	} {
		if got := pointsOf(m); !slices.Equal(got, want) {
			t.Errorf("measure %d has points %q, want %q", m, got, want)
		}
	}

	next(true, false)
	r.Sweep(t.Context())
	talk(t, rig, "split.service", 3)
	s = r.Sweep(t.Context())
	if got := measure(s, "split.service", ledger.Wire); got.Total != sent(3) || got.Bytes != WireIOName {
		t.Errorf("on the wire %+v in %s, want those of 3 datagrams", got.Total, got.Bytes)
	}
	if got := want(t, s, "split.service", sent(14)); got.Bytes != IOName {
		t.Errorf("the total is in %q", got.Bytes)
	}
	next(false, false)
	if others := len(r.Sweep(t.Context()).State.Others); others != 0 {
		t.Errorf("%d other measures are kept with all of them off", others)
	}
}

// TestMeterEnded: the last point of a unit that has ended is as old as its traffic,
// so that it is repeated for as long as that of systemd, and not until its entry goes.
func TestMeterEnded(t *testing.T) {
	withMeter(t, func(t *testing.T, rig *systemdtest.Rig, cfg Config) {
		sink(t, rig)
		rig.WriteFile(t, "/etc/systemd/system/ended.service", "[Service]\nType=oneshot\nExecStart="+rig.Traffic()+" udp-send "+sinkAddress+"\n")
		r, _ := run(t, cfg)
		rig.Run(t, "systemctl", "start", "ended.service")
		first := want(t, r.Sweep(t.Context()), "ended.service", sent(1))
		for range 3 {
			if next := want(t, r.Sweep(t.Context()), "ended.service", sent(1)); !next.Time.Equal(first.Time) {
				t.Fatalf("the point moved from %v to %v", first.Time, next.Time)
			}
		}
		rig.Run(t, "systemctl", "start", "ended.service")
		if next := want(t, r.Sweep(t.Context()), "ended.service", sent(2)); !next.Time.After(first.Time) {
			t.Errorf("the point of the next run is still of %v", next.Time)
		}
	})
}
