package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// underLoad has a service send 2,000 datagrams a second for 8 s, and does
// something to the host meanwhile. systemd itself loses traffic in a reload and
// in a re-execution, so that the truth is what it says of the unit, not what was
// sent.
func underLoad(id, title string, n int, disturb string) scenario {
	const rate, seconds = 2000, 8
	return scenario{
		id: id, title: title,
		units: map[string]string{id + ".service": unitHead + fmt.Sprintf("ExecStart=/bin/sh -c '{send} %d -rate %d; touch /run/{id}.done; exec sleep infinity'\n", rate*seconds, rate)},
		run: func(s *scene) {
			unit := s.id + ".service"
			s.in("systemctl start {id}")
			s.disturbed(n, disturb)
			if s.source == receiver.EBPF {
				s.exact(s.datagrams(rate * seconds))
				return
			}
			if n := s.version(); n == 256 || n == 257 {
				if _, ok := s.lab.counted(unit); !ok {
					s.skip(fmt.Sprintf("systemd %d has lost the counters of the unit (systemd#38112): there is no truth to compare with", n))
				}
			}
			truth, ok := s.lab.counted(unit)
			if !ok {
				s.t.Fatalf("systemd has no counters of %s", unit)
			}
			s.sent("%d × 128 B", rate*seconds)
			s.equal(truth, s.receivedNow)
			if lost := rate*seconds - int(truth.EgressPackets); lost > 0 {
				s.note("systemd itself did not count %d datagrams", lost)
			}
		},
	}
}

// disturbed runs the command n times while the scenario's service sends, and
// waits until that has sent all.
func (s *scene) disturbed(n int, command string) {
	s.t.Helper()
	for range n {
		time.Sleep(time.Duration(200+rand.IntN(600)) * time.Millisecond)
		s.in(command)
	}
	s.in("until [ -e /run/{id}.done ]; do sleep .05; done")
}

// killed has a service send while short ones come and go, and kills the agent
// at random moments.
func killed(id, title string) scenario {
	return scenario{
		id: id, title: title,
		units: map[string]string{
			id + ".service":        commanded,
			id + "-steady.service": unitHead + "ExecStart=/bin/sh -c 'read -r n </run/{id}.steady; {send} $$n -rate 1000; touch /run/{id}.done; exec sleep infinity'\n",
		},
		run: func(s *scene) {
			n := times(20, 100)
			steady := 450 * n
			s.in("mkfifo /run/{id}.steady; systemctl start {id}-steady; echo $1 >/run/{id}.steady", strconv.Itoa(steady))
			stop, done := make(chan struct{}), make(chan int)
			go func() { // short services; ends with stop
				short := 0
				for {
					select {
					case <-stop:
						done <- short
						return
					case <-time.After(150 * time.Millisecond):
					}
					if err := s.transient(fmt.Sprintf("%s-short-%d.service", s.id, short), s.slice(), s.Traffic(), "udp-send", udpSink, "-count", "9"); err == nil {
						short++
					}
				}
			}()
			for range n {
				time.Sleep(time.Duration(rand.IntN(900)) * time.Millisecond)
				s.in(`p=$(systemctl show -p MainPID --value unitmeter); [ $p = 0 ] || kill -9 $p`)
			}
			close(stop)
			short := <-done
			s.in("until [ -e /run/{id}.done ]; do sleep .05; done")
			eventually(s.t, "all short services have ended", func() bool { return s.pending(s.id+"-short*") == 0 })
			// At random: how many short ones there are differs.
			known := systemd.Counters{EgressPackets: uint64(steady + 9*short), EgressBytes: uint64(steady+9*short) * packetBytes}
			s.sent("%d × 128 B, 1,000 a second, and 9 × 128 B of each of %d short services", steady, short)
			if s.source == receiver.DBus { // systemd can leave out a run in the slice, see wholly
				known = systemd.Counters{}
			}
			s.exact(known)
			have := s.names(s.mine)
			for i := range short {
				if name := fmt.Sprintf("%s-short-%d.service", s.id, i); !slices.Contains(have, name) {
					s.t.Errorf("%s is missing; the journal has of it:\n%s", name, s.in("journalctl -o short-precise --no-pager --output-fields=MESSAGE,INVOCATION_ID,IP_METRIC_EGRESS_BYTES,__CURSOR -o verbose -u $1", name))
				}
			}
			restarts, err := strconv.Atoi(strings.TrimSpace(s.in("systemctl show -p NRestarts --value unitmeter")))
			if err != nil || restarts < n*3/4 {
				s.t.Errorf("the agent was killed %d times of %d (%v)", restarts, n, err)
			}
			s.note("%d kills at random moments", restarts)
		},
	}
}

// rebooted moves the state of the agent to another rig, with other runs, another
// boot id, and counters that begin at 0: what a power cut leaves behind.
var rebooted = scenario{
	id: "boot", title: "a reboot",
	units: map[string]string{"boot.service": commanded},
	run: func(s *scene) {
		s.in("systemctl start {id}")
		s.say(500)
		eventually(s.t, "all so far has arrived", func() bool { return s.receivedNow().EgressPackets == 500 })
		before := s.began("boot.service")
		s.in("systemctl kill -s KILL unitmeter; systemctl stop unitmeter")

		next := newLab(s.t, s.recorder, s.source)
		next.Run(s.t, "mkdir", "-p", "/var/lib/unitmeter", "-m", "0700")
		files, err := filepath.Glob(s.Path("/var/lib/unitmeter") + "/*")
		if err != nil || len(files) == 0 {
			s.t.Fatalf("find the agent's state: %v, %q", err, files)
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				s.t.Fatal(err)
			}
			to := "/var/lib/unitmeter/" + filepath.Base(f)
			next.WriteFile(s.t, to, string(data))
			next.Run(s.t, "chmod", "0600", to)
		}
		// It is the same machine, whatever the rig's systemd makes up at its boot.
		machine, err := os.ReadFile(s.Path("/etc/machine-id"))
		if err != nil {
			s.t.Fatal(err)
		}
		next.WriteFile(s.t, "/etc/machine-id", string(machine))
		after := *s
		after.lab = next
		next.WriteFile(s.t, "/run/boot_id", "11111111-2222-4333-8444-555555555555\n")
		next.WriteFile(s.t, "/etc/systemd/system/boot.slice", s.expand("[Slice]\nIPAccounting=yes\n"))
		next.WriteFile(s.t, "/etc/systemd/system/boot.service", s.expand(s.units["boot.service"]))
		next.Run(s.t, "systemctl", "daemon-reload")
		if s.source == receiver.EBPF {
			next.loadMeter(0)
		}
		after.in("systemctl start {id}")
		after.say(70)
		next.startAgent(agent{env: s.agent.env, properties: []string{"BindReadOnlyPaths=/run/boot_id:/proc/sys/kernel/random/boot_id"}})
		after.say(40)
		s.equal(s.datagrams(610), s.receivedNow)
		if !s.began("boot.service").Equal(before) {
			s.t.Error("the start of the series has moved")
		}
		s.note("500 before, 70 between the boot and the agent, 40 after; the start of the series stays")
	},
}

// overflow has more units than may have series.
var overflow = scenario{
	id: "over", title: "40 units where 10 may have series (`UNITMETER_MAX_UNITS`)",
	units: map[string]string{"over@.service": senderOfInstances},
	run: func(s *scene) {
		s.in(`for i in $(seq 40); do systemctl start over@$i; until [ -e /run/over.$i ]; do sleep .01; done; done`)
		all := func() systemd.Counters { return s.sum(func(unit string) bool { return unit == "" || s.mine(unit) }) }
		s.equal(s.truth(s.datagrams(40*41/2)), all)
		rest := s.sum(func(unit string) bool { return unit == "" })
		if n := len(s.names(s.mine)); n > 10 || rest.EgressPackets == 0 {
			s.t.Errorf("there are %d series and %s in the overflow", n, show(rest))
		}
		s.note("%d B of it in the overflow series", rest.EgressBytes)
	},
}

// distinct runs many units of different names, none of which comes back.
var distinct = scenario{
	id: "many", title: "very many distinct services, where 100 may have series",
	run: func(s *scene) {
		n := times(500, 100_000)
		fifth := n / 5
		var memory []int // at the end of each fifth, in KiB
		var cpu []int    // up to there, in microseconds
		for i := range n {
			if err := s.transient(fmt.Sprintf("%s-%d.service", s.id, i), s.slice(), s.Traffic(), "udp-send", udpSink, "-count", "3"); err != nil {
				s.t.Fatal(err)
			}
			if i%50 == 49 { // so that not all of them run at the same time
				eventually(s.t, "most have ended", func() bool { return s.running(s.id+"-*") < 20 })
			}
			if (i+1)%fifth == 0 {
				memory, cpu = append(memory, s.memory()), append(cpu, s.cpu())
			}
		}
		eventually(s.t, "all of them have ended", func() bool { return s.pending(s.id+"-*") == 0 })
		known := s.datagrams(3 * n)
		s.sent("%d × 3 × 128 B", n)
		// A series that made room for another has sent its last point: the sum
		// over all series that there ever were is what the receiver has.
		all := func() systemd.Counters { return s.sum(func(unit string) bool { return unit == "" || s.mine(unit) }) }
		s.equal(s.truth(known), all)
		early, late := memory[0], s.memory()
		if late > early+early/2+8<<10 {
			s.t.Errorf("the agent had %d KiB after %d units, and %d KiB after %d", early, fifth, late, n)
		}
		size := strings.Fields(s.in("du -sk /var/lib/unitmeter"))[0]
		if kib, err := strconv.Atoi(size); err != nil || kib > 64<<10 {
			s.t.Errorf("the state directory has %s KiB (%v)", size, err)
		}
		if live := s.health("unitmeter.series"); live > 110 {
			s.t.Errorf("the agent keeps %d series", live)
		}
		s.note("%d units; the agent's memory (VmRSS) %d KiB after the first fifth and %d KiB at the end, its CPU time %d µs for a unit of the second fifth and %d µs for one of the last; state directory %s KiB",
			n, early, late, (cpu[1]-cpu[0])/fifth, (cpu[4]-cpu[3])/fifth, size)
	},
}

// cpu returns the CPU time that the agent has used so far, in microseconds.
func (s *scene) cpu() int {
	s.t.Helper()
	usec, err := strconv.Atoi(strings.TrimSpace(s.in(`sed -n 's/^usage_usec //p' /sys/fs/cgroup/system.slice/unitmeter.service/cpu.stat`)))
	if err != nil {
		s.t.Fatal(err)
	}
	return usec
}

// memory returns the agent's resident memory in KiB.
func (s *scene) memory() int {
	s.t.Helper()
	kib, err := strconv.Atoi(strings.TrimSpace(s.in(`sed -n 's/^VmRSS:[^0-9]*\([0-9]*\) kB/\1/p' /proc/$(systemctl show -p MainPID --value unitmeter)/status`)))
	if err != nil {
		s.t.Fatal(err)
	}
	return kib
}

// unnamed is short services under the names that systemd-run makes up.
var unnamed = scenario{
	id: "unnamed", title: "100 × `systemd-run` without a name, folded by default, 7 datagrams each",
	run: func(s *scene) {
		s.in(`for i in $(seq 100); do systemd-run --quiet --collect --slice={slice} -p IPAccounting=yes {send} 7; done; until [ -z "$(systemctl list-units --no-legend --state=active,activating,deactivating 'run-*.service')" ]; do sleep .05; done`)
		s.equal(s.truth(s.datagrams(700)), func() systemd.Counters { return s.sum(func(unit string) bool { return unit == "run-*.service" }) })
	},
}
