package e2e

import (
	"fmt"
	"regexp"
	"strconv"
	"time"

	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// conformanceEBPF lists the groups for the source ebpf: those of dbus, as far as they
// are not about IP accounting itself, and what only this source promises. The meter
// is pinned, and loaded before the agent starts.
func conformanceEBPF() []group {
	unprivileged := agent{properties: []string{"User=nobody", "Group=" + meterGroup, "BindReadOnlyPaths=/sys/fs/bpf/unitmeter:/run/unitmeter"}}
	delta := []string{"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta"}
	return []group{
		{
			name:  "lifecycles",
			agent: agent{env: []string{"UNITMETER_FOLD=fold@*.service"}},
			scenarios: []scenario{
				crashLoop("crash", "`Restart=always`, 30 runs that crash", "RestartSec=20ms"),
				crashLoop("direct", "`Restart=always`, `RestartMode=direct`, 30 runs that crash", "RestartMode=direct\nRestartSec=20ms"),
				manualRestart, oneshot, stopOnly, prePost,
				witnessed(acceptNo), witnessed(acceptYes), delegated, privateNetwork, instances, folded,
				witnessed(orphans), switched, reloaded,
			},
		},
		{
			name:  "short, without a privilege",
			agent: unprivileged,
			scenarios: []scenario{
				brief("brief", "%d services of 10 ms with 100 kB each, agent as `nobody` in the group of the pins", times(200, 10_000)),
				churn, unnamed, sameName,
			},
		},
		{
			name: "under load",
			scenarios: []scenario{
				underLoad("reload", fmt.Sprintf("5 × `daemon-reload` under load, the last with a generator of %d s", times(2, 5)), 5,
					fmt.Sprintf("mkdir -p /etc/systemd/system-generators; n=$(cat /run/{id}.n 2>/dev/null || echo 0); echo $((n + 1)) >/run/{id}.n; [ $n != 4 ] || { printf '#!/bin/sh\nsleep %d\n' >/etc/systemd/system-generators/slow; chmod +x /etc/systemd/system-generators/slow; }; systemctl daemon-reload; rm -f /etc/systemd/system-generators/slow", times(2, 5))),
				underLoad("reexec", "5 × `daemon-reexec` under load", 5, "systemctl daemon-reexec"),
				underLoad("replace", "the program replaced 20 times under load", 20, "unitmeter meter load | grep -q replaced"),
				underLoad("busload", "3 × restart of dbus under load", 3, "systemctl restart dbus"),
			},
		},
		{name: "clock", agent: agent{wallClock: true}, scenarios: []scenario{before, stepped("clock", "the agent's wall clock stepped forth and back, cumulative")}},
		{
			name: "clock with deltas", agent: agent{wallClock: true, env: delta},
			scenarios: []scenario{stepped("clockdelta", "the agent's wall clock stepped forth and back, deltas")},
		},
		{name: "killed", scenarios: []scenario{killed("kill", "`kill -9` of the agent under load, cumulative"), away, rebooted}},
		{name: "killed with deltas", agent: agent{env: delta}, scenarios: []scenario{killed("killdelta", "`kill -9` of the agent under load, deltas")}},
		{name: "overflow", agent: agent{env: []string{"UNITMETER_MAX_UNITS=10", "UNITMETER_INCLUDE=over@*.service"}}, scenarios: []scenario{overflow}},
		{name: "many", agent: agent{env: []string{"UNITMETER_MAX_UNITS=100"}}, scenarios: []scenario{distinct}},
		{name: "no room", room: littleRoom, scenarios: []scenario{full}},
		{name: "flooded", room: uint32(floodRoom()), agent: agent{env: []string{"GOMEMLIMIT=96MiB"}, properties: append([]string{"MemoryMax=256M"}, unprivileged.properties...)}, scenarios: []scenario{flooded}},
		{name: "little room", room: littleRoom, scenarios: []scenario{late}},
		{name: "kinds of traffic", scenarios: kindsOfTraffic()},
	}
}

// witnessed has systemd count the slice of a scenario that does not know what it sends.
func witnessed(s scenario) scenario {
	s.witness = true
	return s
}

// switched is a service whose IP accounting is switched while it sends.
var switched = scenario{
	id: "toggle", title: "accounting switched on and off, 3 times",
	units: map[string]string{"toggle.service": commanded},
	run: func(s *scene) {
		s.in("systemctl start {id}")
		s.say(100)
		for range 3 {
			for _, to := range []string{"yes", "no"} {
				s.in("systemctl set-property --runtime {id}.service IPAccounting=$1", to)
				s.say(100)
			}
		}
		s.exact(s.datagrams(700))
	},
}

// brief is n services of about 10 ms.
func brief(id, title string, n int) scenario {
	return scenario{
		id: id, title: fmt.Sprintf(title, n),
		run: func(s *scene) {
			const bytes, datagrams = 1000, 100
			for i := range n {
				if err := s.transient(fmt.Sprintf("%s-%d.service", s.id, i), s.slice(), s.Traffic(), "udp-send", udpSink, "-bytes", strconv.Itoa(bytes), "-count", strconv.Itoa(datagrams)); err != nil {
					s.t.Fatal(err)
				}
				if i%50 == 49 { // so that not all of them run at the same time
					eventually(s.t, "most have ended", func() bool { return s.running(s.id+"-*") < 20 })
				}
			}
			eventually(s.t, "all of them have ended", func() bool { return s.pending(s.id+"-*") == 0 })
			s.sent("%d × %d × %d B", n, datagrams, bytes+28)
			s.exact(systemd.Counters{EgressPackets: uint64(n * datagrams), EgressBytes: uint64(n * datagrams * (bytes + 28))})
			// Of 10,000 not all have a series at the same time, nor room for 10 minutes.
			if names := s.names(s.mine); !long() && len(names) != n {
				s.t.Errorf("there are %d series for %d units", len(names), n)
			}
		},
	}
}

// before has the agent come when the unit has been sending for a while.
var before = scenario{
	id: "before", title: "a unit that ran, and sent, before the agent came",
	units: map[string]string{"before.service": commanded},
	run: func(s *scene) {
		s.in("systemctl stop unitmeter; systemctl start before")
		s.say(1000)
		s.restartAgent()
		started := time.Now()
		s.say(10)
		s.exact(s.datagrams(1010))
		if began := s.began("before.service"); !began.Before(started) {
			s.t.Errorf("the series starts at %v, the agent was started before %v", began, started)
		}
	},
}

// away has traffic of old and new units while the agent is dead.
var away = scenario{
	id: "away", title: "`kill -9` of the agent, and traffic while it is away",
	units: map[string]string{"away.service": commanded},
	run: func(s *scene) {
		n := times(3, 20)
		s.in("systemctl start {id}")
		for i := range n {
			s.say(50)
			s.in("systemctl kill --signal=KILL unitmeter; systemctl stop unitmeter")
			s.say(20)
			s.in("systemd-run --quiet --wait --collect --unit={id}-$1 --slice={slice} {send} 30", strconv.Itoa(i))
			s.restartAgent()
		}
		s.exact(s.datagrams(100 * n))
		s.note("%d times", n)
	},
}

// littleRoom is the number of cgroups for which a meter has room that is to be full.
const littleRoom = 256

// full has more units than there is room for, while the agent cannot make any.
var full = scenario{
	id: "full", title: fmt.Sprintf("300 short services with room for %d in the maps, all while the agent is stopped (SIGSTOP)", littleRoom),
	run: func(s *scene) {
		const n = 300
		s.in("systemctl kill --signal=STOP unitmeter")
		for i := range n {
			if err := s.transient(fmt.Sprintf("%s-%d.service", s.id, i), s.slice(), s.Traffic(), "udp-send", udpSink, "-count", "3"); err != nil {
				s.t.Fatal(err)
			}
		}
		eventually(s.t, "all of them have ended", func() bool { return s.pending(s.id+"-*") == 0 })
		if used := s.entries(); used != littleRoom {
			s.t.Errorf("%d of %d entries are in use", used, littleRoom)
		}
		s.in("systemctl kill --signal=CONT unitmeter")
		known := s.datagrams(3 * n)
		s.sent("%d × 3 × 128 B", n)
		// Only bytes are unattributed.
		all := func() systemd.Counters {
			sum, rest := s.receivedNow(), s.lab.unattributed("-.slice")
			sum.IngressBytes, sum.EgressBytes = sum.IngressBytes+rest.IngressBytes, sum.EgressBytes+rest.EgressBytes
			sum.EgressPackets = sum.EgressBytes / packetBytes
			return sum
		}
		s.equal(known, all)
		rest := s.lab.unattributed("-.slice")
		if rest.EgressBytes == 0 {
			s.t.Error("everything found room: this shows nothing")
		}
		s.note("%d B of it in `unitmeter.unattributed`", rest.EgressBytes)
	},
}

func floodRoom() int { return times(littleRoom, ebpf.DefaultMaxEntries) }

// flooded has an unprivileged user with a delegated subtree, which each user of a
// systemd host has, fill the maps with cgroups that stand.
var flooded = scenario{
	id: "flood", title: fmt.Sprintf("an unprivileged user fills the maps, which have room for %d cgroups", floodRoom()),
	units: map[string]string{
		"flood.service":      commanded,
		"flood-new.service":  unitHead + "Type=oneshot\nExecStart={send} 40\n",
		"flood-user.service": unitHead + fmt.Sprintf("Type=notify\nTimeoutStartSec=infinity\nLimitNOFILE=8192\nUser=daemon\nDelegate=yes\nExecStart={kinds} flood %d\n", floodRoom()+100),
	},
	run: func(s *scene) {
		s.in("systemctl start {id}")
		s.say(10)
		began, cpu := time.Now(), s.cpu()
		s.in("systemctl start {id}-user || { journalctl --no-pager -o cat -u {id}-user >&2; exit 1; }")
		took := time.Since(began)
		if used := s.entries(); used != floodRoom() {
			s.t.Errorf("%d of %d entries are in use", used, floodRoom())
		}
		s.say(100)
		s.in("systemctl start {id}-new")
		sum := 10 + 100 + 40 + floodRoom() + 100
		s.sent("%d × 128 B", sum)
		all := func() systemd.Counters {
			total, rest := s.receivedNow(), s.lab.unattributed("-.slice")
			total.EgressBytes += rest.EgressBytes
			total.EgressPackets = total.EgressBytes / packetBytes
			return total
		}
		s.equal(s.datagrams(sum), all)
		// What had room goes on.
		known := s.sum(func(unit string) bool { return unit == "flood.service" })
		if known != (systemd.Counters{EgressBytes: 110 * packetBytes, EgressPackets: 110}) {
			s.t.Errorf("the unit that was there before has %s", show(known))
		}
		fresh := s.sum(func(unit string) bool { return unit == "flood-new.service" })
		s.note("%.1f s for it; the unit that was there before is exact, %d B of another user are in `unitmeter.unattributed`; then %d MiB (VmRSS) and %d ms of CPU time of the agent for %d cycles",
			took.Seconds(), 40*packetBytes-int(fresh.EgressBytes), s.memory()/1024, (s.cpu()-cpu)/1000, int(time.Since(began)/(300*time.Millisecond)))
	},
}

var entriesInUse = regexp.MustCompile(`(?m)^(\d+) of \d+ entries in use$`)

// entries returns how many entries the meter has.
func (s *scene) entries() int {
	s.t.Helper()
	out := s.in("unitmeter meter status")
	match := entriesInUse.FindStringSubmatch(out)
	if match == nil {
		s.t.Fatalf("the status is %q", out)
	}
	n, err := strconv.Atoi(match[1])
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// late has a socket send whose unit and cgroup are gone. The maps are so full that
// its entry is deleted whenever it pauses.
var late = scenario{
	id: "late", title: "a socket that outlives its unit, over deletions of its entry",
	units: map[string]string{
		"late.service": unitHead + "Type=oneshot\nExecStart=/bin/sh -c 'mkfifo /run/late.in /run/late.out; {kinds} move /sys/fs/cgroup/late-holder /run/late & echo 5 >/run/late.in; read -r x </run/late.out'\n",
	},
	run: func(s *scene) {
		n := times(10, 50)
		s.in(`for i in $(seq $1); do
	c=/sys/fs/cgroup/filler-$i; mkdir $c; (echo $BASHPID >$c/cgroup.procs; echo x >/dev/udp/127.0.0.1/9999)
done; mkdir /sys/fs/cgroup/late-holder; systemctl start {id}; ! [ -e /sys/fs/cgroup/{slice}/{id}.service ]`, strconv.Itoa(littleRoom*3/4))
		reader, err := ebpf.Open(ebpf.Config{Dir: s.Path(ebpf.DefaultDir), Root: s.Path("/sys/fs/cgroup"), ReadOnly: true})
		if err != nil {
			s.t.Fatal(err)
		}
		defer reader.Close()
		var id uint64
		has := func() bool {
			sweep, err := reader.Read()
			if err != nil {
				s.t.Fatal(err)
			}
			for _, m := range sweep.Meters {
				if m.Identity.Cgroup.Unit == "late.service" {
					id = m.Identity.ID
				}
				if id != 0 && m.Identity.ID == id {
					return true
				}
			}
			return false
		}
		eventually(s.t, "its first entry is there", has)
		for range n {
			eventually(s.t, "its entry is deleted", func() bool { return !has() })
			s.say(7)
			if !has() {
				s.t.Error("what it sends makes no entry: this shows nothing")
			}
		}
		s.exact(s.datagrams(5 + 7*n))
		s.note("%d deletions", n)
	},
}

// kindsOfTraffic has what the reference compares. systemd counts the slices too.
func kindsOfTraffic() []scenario {
	both := func(bytes, packets uint64) systemd.Counters {
		return systemd.Counters{IngressBytes: bytes, IngressPackets: packets, EgressBytes: bytes, EgressPackets: packets}
	}
	out := func(bytes, packets uint64) systemd.Counters {
		return systemd.Counters{EgressBytes: bytes, EgressPackets: packets}
	}
	const gsoBytes, segments, segmentBytes = 20 * (42000 + 28), 600, 600 * (1400 + 28)
	var all []scenario
	for _, k := range []struct {
		kind, title string
		known       systemd.Counters // zero where headers and acknowledgements vary
		setting     string
	}{
		{"udp6", "UDP over IPv6", both(14800, 100), ""},
		{"tcp4", "TCP over IPv4, 20 MB, with segmentation offload", systemd.Counters{}, ""},
		{"tcp6", "TCP over IPv6, 20 MB", systemd.Counters{}, ""},
		{"mptcp", "MPTCP, 5 MB", systemd.Counters{}, ""},
		{"sendfile", "sendfile(2), 3 MB", systemd.Counters{}, ""},
		{"raw", "two raw sockets, each of which sees what one sends", systemd.Counters{EgressBytes: 4400, EgressPackets: 20, IngressBytes: 8800, IngressPackets: 40}, ""},
		{"rawhdr", "a raw socket that brings its own IP header", out(2400, 20), ""},
		{"packet", "20 packets of a packet socket, which is counted nowhere, and one datagram", both(packetBytes, 1), ""},
		{"gso", "20 datagrams of 42 kB cut by the kernel (`UDP_SEGMENT`)", systemd.Counters{EgressBytes: gsoBytes, EgressPackets: 20, IngressBytes: segmentBytes, IngressPackets: segments}, ""},
		{"gro", "the same, not cut for the receiver (`UDP_GRO`)", both(gsoBytes, 20), ""},
		{"refused", "20 connections that are refused", systemd.Counters{EgressBytes: 20 * 60, EgressPackets: 20, IngressBytes: 20 * 40, IngressPackets: 20}, ""},
		{"closed", "20 datagrams to a closed port", out(20*92, 20), ""},
		{"multicast", "multicast, one sender and two receivers", systemd.Counters{EgressBytes: 3280, EgressPackets: 10, IngressBytes: 6560, IngressPackets: 20}, ""},
		{"broadcast", "broadcast, sender and receiver", both(1080, 10), ""},
		{"fragments", "datagrams of 20 kB over an MTU of 1,500", both(5*20028, 5), "PrivateNetwork=yes\nExecStartPre=ip link set lo mtu 1500\n"},
		{"thread", "a thread in a threaded cgroup of a delegated unit, and the process", both(40*packetBytes, 40), "Delegate=yes\n"},
	} {
		all = append(all, scenario{
			id: k.kind, title: k.title, witness: true,
			units: map[string]string{k.kind + ".service": unitHead + "Type=oneshot\nRemainAfterExit=yes\n" + k.setting + "ExecStart={kinds} " + k.kind + "\n"},
			run: func(s *scene) {
				if k.kind == "broadcast" {
					s.in("ip link add d0 type veth peer name d1; ip addr add 10.77.0.1/24 dev d0; ip link set d0 up; ip link set d1 up; ip route add default dev d0")
				}
				s.in("systemctl start {id} || { journalctl --no-pager -u {id} >&2; exit 1; }")
				s.sent("as the title says")
				s.exact(k.known)
			},
		})
	}
	return append(all, halfOpen("backlog", "a listener that accepts nothing for 2 s, with a backlog of 2, and 10 dialers", 2, 1),
		halfOpen("cookies", "the same with SYN cookies (`tcp_syncookies=2`) and a backlog of 128", 128, 2), handed, bridged, denied)
}

// halfOpen has connections that wait for a listener.
func halfOpen(id, title string, backlog, cookies int) scenario {
	port := 6000 + backlog
	return scenario{
		id: id, title: title, witness: true,
		units: map[string]string{
			id + ".service":      unitHead + fmt.Sprintf("ExecStart={kinds} listen %d %d 2\n", port, backlog),
			id + "-dial.service": unitHead + fmt.Sprintf("ExecStart={kinds} dial %d 10 3\n", port),
		},
		run: func(s *scene) {
			s.in(fmt.Sprintf(`sysctl -qw net.ipv4.tcp_syncookies=%d; systemctl start {id}; until ss -ltn | grep -q :%d; do sleep .01; done; systemctl start {id}-dial
while [ -n "$(systemctl list-units --no-legend --state=active '{id}*.service')" ]; do sleep .05; done; sysctl -qw net.ipv4.tcp_syncookies=1`, cookies, port))
			s.sent("10 connections")
			s.exact(systemd.Counters{})
		},
	}
}

// handed is a socket that another unit uses than the one that made it.
var handed = scenario{
	id: "pass", title: "a socket passed to another unit (SCM_RIGHTS) stays with who made it", witness: true,
	units: map[string]string{
		"pass.service":      unitHead + "ExecStart={kinds} pass /run/pass.socket\n",
		"pass-take.service": unitHead + "Type=oneshot\nExecStart={kinds} take /run/pass.socket\n",
	},
	run: func(s *scene) {
		s.in("systemctl start {id}; systemctl start {id}-take")
		s.sent("20 × 528 B")
		s.exact(systemd.Counters{EgressBytes: 20 * 528, EgressPackets: 20})
		if taker := s.sum(func(unit string) bool { return unit == "pass-take.service" }); taker != (systemd.Counters{}) {
			s.t.Errorf("the unit that took the socket has %s", show(taker))
		}
	},
}

// bridged is a connection between two network namespaces.
var bridged = scenario{
	id: "bridge", title: "TCP between two network namespaces on a bridge, 5 MB", witness: true,
	units: map[string]string{
		"bridge.service":      unitHead + "Type=notify\nNetworkNamespacePath=/run/netns/conf-b\nExecStart={traffic} tcp-sink 10.88.0.2:7100 -conns 1\n",
		"bridge-send.service": unitHead + "Type=oneshot\nNetworkNamespacePath=/run/netns/conf-a\nExecStart={traffic} tcp-send 10.88.0.2:7100 -bytes 5000000\n",
	},
	run: func(s *scene) {
		s.in(`ip link add br0 type bridge; ip link set br0 up
for n in a b; do
	ip netns add conf-$n; ip link add v$n type veth peer name eth0 netns conf-$n; ip link set v$n master br0 up
	ip -n conf-$n link set eth0 up
done
ip -n conf-a addr add 10.88.0.1/24 dev eth0; ip -n conf-b addr add 10.88.0.2/24 dev eth0
systemctl start {id}; systemctl start {id}-send`)
		s.sent("5 MB of payload")
		s.exact(systemd.Counters{})
	},
}

// denied sends what systemd's own filter drops, and does not count.
var denied = scenario{
	id: "deny", title: "`IPAddressDeny=any`: 20 datagrams that are dropped count as sent",
	units: map[string]string{"deny.service": unitHead + "Type=oneshot\nIPAddressDeny=any\nExecStart={kinds} denied\n"},
	run: func(s *scene) {
		s.in("systemctl start {id}")
		s.sent("20 × 92 B, dropped")
		s.exact(systemd.Counters{EgressBytes: 20 * 92, EgressPackets: 20})
		s.note("systemd counts none of it")
	},
}
