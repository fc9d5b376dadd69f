package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/receiver"
)

// conformance lists all groups. Each gets a rig of its own.
func conformance() []group {
	return []group{
		{
			name: "lifecycles",
			// Folds are wanted for one scenario; the others have a series for
			// each unit.
			agent: agent{env: []string{"UNITMETER_FOLD=fold@*.service"}},
			scenarios: []scenario{
				crashLoop("crash", "`Restart=always`, 30 runs that crash", ""),
				crashLoop("direct", "`Restart=always`, `RestartMode=direct`, 30 runs that crash", "RestartMode=direct"),
				manualRestart, oneshot, stopOnly, prePost,
				acceptNo, acceptYes, delegated, privateNetwork, instances, folded,
				toggled, orphans, older,
			},
		},
	}
}

const unitHead = "[Unit]\nStartLimitIntervalSec=0\n[Service]\nIPAccounting=yes\nSlice={slice}\n"

// crashLoop is a service that sends 50 datagrams and fails, 29 times, and stays
// up after the 30th.
func crashLoop(id, title, setting string) scenario {
	const runs, each = 30, 50
	return scenario{
		id: id, title: title,
		units: map[string]string{id + ".service": unitHead + "Restart=always\nRestartSec=20ms\n" + setting + "\n" +
			fmt.Sprintf("ExecStart=/bin/sh -c '{send} %d && echo >>/run/{id}.runs; [ $$(wc -l </run/{id}.runs) -lt %d ] || exec sleep infinity; exit 1'\n", each, runs)},
		run: func(s *scene) {
			if _, n := s.systemd(); setting == "RestartMode=direct" && n < 254 {
				s.skip(fmt.Sprintf("it came with systemd 254, and this is %d", n))
			}
			s.in(`systemctl start {id}; until [ -e /run/{id}.runs ] && [ $(wc -l </run/{id}.runs) -ge ` + strconv.Itoa(runs) + ` ]; do sleep .02; done`)
			s.exact(s.datagrams(runs * each))
		},
	}
}

var manualRestart = scenario{
	id: "manual", title: "`systemctl restart`, 20 times",
	units: map[string]string{"manual.service": unitHead + "ExecStart=/bin/sh -c '{send} 50; echo >>/run/{id}.runs; exec sleep infinity'\n"},
	run: func(s *scene) {
		s.in(`for i in $(seq 20); do systemctl restart {id}; until [ -e /run/{id}.runs ] && [ $(wc -l </run/{id}.runs) -ge $i ]; do sleep .005; done; done`)
		s.exact(s.datagrams(20 * 50))
	},
}

var oneshot = scenario{
	id: "oneshot", title: "`Type=oneshot`, 20 starts",
	units: map[string]string{"oneshot.service": unitHead + "Type=oneshot\nExecStart={send} 50\n"},
	run: func(s *scene) {
		s.in(`for i in $(seq 20); do systemctl start {id}; done`)
		s.exact(s.datagrams(20 * 50))
	},
}

var stopOnly = scenario{
	id: "stoponly", title: "oneshot, `RemainAfterExit=`, with `ExecStop=` only, 6 runs",
	units: map[string]string{"stoponly.service": unitHead + "Type=oneshot\nRemainAfterExit=yes\nExecStop={send} 50\n"},
	run: func(s *scene) {
		s.in(`for i in $(seq 6); do systemctl start {id}; sleep .$((i * 13)); systemctl stop {id}; done`)
		s.exact(s.datagrams(6 * 50))
	},
}

var prePost = scenario{
	id: "prepost", title: "traffic of `ExecStartPre=`, `ExecReload=`, `ExecStop=` and `ExecStopPost=`, 4 runs",
	units: map[string]string{"prepost.service": unitHead + "Type=notify\nNotifyAccess=all\nExecStartPre={send} 10\nExecStart=/bin/sh -c '{send} 20; systemd-notify --ready; exec sleep infinity'\n" +
		"ExecReload={send} 5\nExecStop={send} 30\nExecStopPost={send} 40\n"},
	run: func(s *scene) {
		s.in(`for i in $(seq 4); do systemctl start {id}; systemctl reload {id}; systemctl stop {id}; done`)
		s.exact(s.datagrams(4 * (10 + 20 + 5 + 30 + 40)))
	},
}

const socketHead = "[Socket]\nIPAccounting=yes\nSlice={slice}\n"

var acceptNo = scenario{
	id: "listen", title: "socket activation, `Accept=no`, 5 connections of 100 kB",
	units: map[string]string{
		"listen.socket":  socketHead + "ListenStream=127.0.0.1:7001\n",
		"listen.service": unitHead + "ExecStart={traffic} tcp-source - -bytes 100000 -conns 5\n",
	},
	run: func(s *scene) {
		s.in(`systemctl start {id}.socket; for i in $(seq 5); do {traffic} tcp-fetch 127.0.0.1:7001; done; until [ "$(systemctl show -p ActiveState --value {id}.service)" = inactive ]; do sleep .02; done`)
		s.sent("5 × 100 kB of payload")
		s.exact(receiver.Counters{})
		s.atLeast(500_000)
	},
}

var acceptYes = scenario{
	id: "accept", title: "socket activation, `Accept=yes`, 5 connections of 100 kB",
	units: map[string]string{
		"accept.socket":   socketHead + "ListenStream=127.0.0.1:7002\nAccept=yes\n",
		"accept@.service": unitHead + "ExecStart={traffic} tcp-source - -bytes 100000\n",
	},
	run: func(s *scene) {
		s.in(`systemctl start {id}.socket; for i in $(seq 5); do {traffic} tcp-fetch 127.0.0.1:7002; done; until [ -z "$(systemctl list-units --no-legend --state=active '{id}@*')" ]; do sleep .02; done`)
		s.sent("5 × 100 kB of payload")
		s.exact(receiver.Counters{})
		s.atLeast(500_000)
	},
}

// atLeast wants the slice to have sent at least so many bytes: the payload of
// TCP, whose headers vary.
func (s *scene) atLeast(bytes uint64) {
	s.t.Helper()
	if sent := s.row.accounted.EgressBytes; sent < bytes || sent > bytes+bytes/5 {
		s.t.Errorf("systemd accounted %d B for a payload of %d B", sent, bytes)
	}
}

var delegated = scenario{
	id: "nested", title: "5 delegated scopes that send from nested cgroups",
	run: func(s *scene) {
		s.in(`cat >/run/nested.sh <<'END'
set -e
c=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)
mkdir -p $c/a/b
echo $$ >$c/a/b/cgroup.procs
{send} 100
END
for i in $(seq 5); do systemd-run --quiet --scope --slice={slice} --unit=nested-$i -p IPAccounting=yes -p Delegate=yes bash /run/nested.sh; done`)
		s.exact(s.datagrams(5 * 100))
	},
}

var privateNetwork = scenario{
	id: "private", title: "`PrivateNetwork=yes`, sender and receiver inside",
	units: map[string]string{
		"private.service":      unitHead + "Type=notify\nPrivateNetwork=yes\nExecStart={traffic} udp-sink " + udpSink + "\n",
		"private-peer.service": unitHead + "Type=oneshot\nPrivateNetwork=yes\nExecStart={send} 200\n[Unit]\nJoinsNamespaceOf=private.service\n",
	},
	run: func(s *scene) {
		s.in(`systemctl start private; systemctl start private-peer; systemctl start private-peer`)
		known := s.datagrams(400)
		known.IngressBytes, known.IngressPackets = known.EgressBytes, known.EgressPackets
		s.exact(known)
	},
}

const senderOfInstances = unitHead + "ExecStart=/bin/sh -c '{send} %i; touch /run/{id}.%i; exec sleep infinity'\n"

var instances = scenario{
	id: "inst", title: "a template with 5 instances",
	units: map[string]string{"inst@.service": senderOfInstances},
	run: func(s *scene) {
		s.in(`for i in 1 2 3 4 5; do systemctl start inst@$i; done; for i in 1 2 3 4 5; do until [ -e /run/inst.$i ]; do sleep .01; done; done`)
		s.exact(s.datagrams(1 + 2 + 3 + 4 + 5))
		if names := s.names(s.mine); len(names) != 5 {
			s.t.Errorf("there are series for %q, want one for each instance", names)
		}
	},
}

var folded = scenario{
	id: "fold", title: "30 instances folded into one series, each gone when the next comes",
	units: map[string]string{"fold@.service": senderOfInstances},
	run: func(s *scene) {
		s.in(`for i in $(seq 30); do systemctl start fold@$i; until [ -e /run/fold.$i ]; do sleep .01; done; [ $((i % 10)) = 0 ] || systemctl stop fold@$i; done`)
		s.exact(s.datagrams(30 * 31 / 2))
		if names := s.names(s.mine); len(names) != 1 || names[0] != "fold@*.service" {
			s.t.Errorf("there are series for %q, want the one of the fold", names)
		}
	},
}

// commanded is a service that sends as many datagrams as it is told to; see say.
const commanded = unitHead + `ExecStartPre=/bin/sh -c 'for f in in out; do [ -p /run/{id}.$$f ] || mkfifo /run/{id}.$$f; done'
ExecStart=/bin/sh -c 'while read -r n </run/{id}.in; do {send} $$n && echo done >/run/{id}.out; done'
`

// say has the scenario's commanded service send n datagrams.
func (s *scene) say(n int) {
	s.t.Helper()
	s.in(`timeout 30 sh -c 'echo '$1' >/run/{id}.in && read -r x </run/{id}.out'`, strconv.Itoa(n))
}

var toggled = scenario{
	id: "toggle", title: "accounting switched off and on, 3 times",
	units: map[string]string{"toggle.service": commanded},
	run: func(s *scene) {
		s.in("systemctl start toggle")
		s.say(100)
		known := 100
		for range 3 {
			at := known
			if !within(10*time.Second, func() bool { return s.receivedNow().EgressPackets == uint64(at) }) {
				s.t.Fatalf("received were %s, sent were %d", show(s.receivedNow()), at)
			}
			// Off and on between two readings would look like growth.
			s.in("systemctl set-property --runtime toggle.service IPAccounting=no; sleep 1")
			s.t.Log(s.counted("toggle.service"))
			s.say(10)
			s.t.Log(s.counted("toggle.service"))
			s.in("systemctl set-property --runtime toggle.service IPAccounting=yes")
			s.t.Log(s.counted("toggle.service"))
			s.say(200)
			s.t.Log(s.counted("toggle.service"))
			known += 200
		}
		s.equal(s.datagrams(known), s.receivedNow)
		unaccounted := receiver.Counters{EgressBytes: 3 * 10 * packetBytes}
		if !within(10*time.Second, func() bool { return s.lab.unattributed(s.slice()) == unaccounted }) {
			s.t.Errorf("unattributed are %s, and %s were sent while accounting was off", show(s.lab.unattributed(s.slice())), show(unaccounted))
		}
		s.note("30 more datagrams, sent while accounting was off, are in `unitmeter.unattributed`, to the byte")
	},
}

var orphans = scenario{
	id: "orphan", title: "late bytes of a TCP socket whose sender was killed",
	units: map[string]string{"orphan.service": unitHead + "ExecStart={traffic} tcp-send " + slowSink + " -bytes 50000000\n"},
	run: func(s *scene) {
		s.in("systemctl start orphan; sleep .5; systemctl kill -s KILL orphan; until systemctl is-failed orphan; do sleep .01; done")
		atEnd := s.sliceCounted()
		var last receiver.Counters
		s.eventually("the socket is drained", func() bool {
			before := last
			last = s.sliceCounted()
			time.Sleep(700 * time.Millisecond)
			return last == before
		})
		s.sent("TCP until killed")
		s.exact(receiver.Counters{})
		late := s.row.accounted.EgressBytes - atEnd.EgressBytes
		if late == 0 {
			s.t.Error("nothing was sent after the end: this shows nothing")
		}
		s.note("%d B of it after the unit had failed", late)
	},
}

var older = scenario{
	id: "older", title: "a unit that ran, and sent, before the agent came",
	units: map[string]string{"older.service": commanded},
	run: func(s *scene) {
		s.in("systemctl stop unitmeter; systemctl start older")
		s.say(1000)
		s.in("sleep 2; systemctl start older") // the second does nothing
		s.restartAgent()
		s.say(10)
		s.exact(s.datagrams(1010))
		out := strings.Fields(s.in("busctl get-property org.freedesktop.systemd1 /org/freedesktop/systemd1/unit/older_2eservice org.freedesktop.systemd1.Unit InactiveExitTimestamp"))
		usec, err := strconv.ParseInt(out[len(out)-1], 10, 64)
		if err != nil {
			s.t.Fatal(err)
		}
		if began := time.UnixMicro(usec); !s.began("older.service").Equal(began) {
			s.t.Errorf("the series starts at %v, the unit did at %v", s.began("older.service"), began)
		}
		s.note("the series starts when the unit did, 2 s before the agent. A day cannot be had: no namespace has a wall clock of its own")
	},
}
