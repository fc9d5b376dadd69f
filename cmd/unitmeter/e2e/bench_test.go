package e2e

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

var (
	collections = flag.Int("collections", 5, "how many collections BenchmarkHost measures of each agent")
	idleFor     = flag.Duration("idle", 10*time.Minute, "how long BenchmarkIdle measures the agents")
)

// BenchmarkHost measures what one collection costs a host: the CPU time of the
// agent, of PID 1 and of dbus-daemon together, for each agent in the table of
// [contenders], on the same units in the same run. Everything is included: reading,
// encoding, commit and sending or being scraped. With -update it writes
// docs/benchmarks.md and its picture.
//
//	make bench PKG=./cmd/unitmeter/e2e BENCH=BenchmarkHost TESTFLAGS=-update=baselines
//
// active says which part of the units has traffic between two collections. An
// operation is a whole measurement, so that -benchtime makes no difference.
func BenchmarkHost(b *testing.B) {
	r := &benchReport{began: time.Now()}
	for _, size := range []struct{ units, active int }{{10, 10}, {100, 10}, {1000, 0}, {1000, 10}, {1000, 100}, {4000, 10}} {
		b.Run(fmt.Sprintf("units=%d/active=%d%%", size.units, size.active), func(b *testing.B) {
			rig := startLoad(b, size.units, size.active)
			others := watchOthers(b, rig)
			for _, a := range contenders(b, size.units, time.Second) {
				b.Run(a.slug(), func(b *testing.B) {
					result := measure(b, rig, a, size.units, *collections)
					result.active = size.active
					r.add(b, result)
				})
			}
			r.rig(b, rig, others())
		})
	}
	r.writeHost(b)
}

// BenchmarkIdle measures what each agent costs a host with 1,000 idle units at an
// interval of 10 s, over ten minutes, or as long as -idle says: all of them at the
// same time, each beside a systemd of its own, and about a second apart. With
// -update=baselines it writes its part of docs/benchmarks.md.
//
//	make bench PKG=./cmd/unitmeter/e2e BENCH=BenchmarkIdle TESTFLAGS=-update=baselines
func BenchmarkIdle(b *testing.B) {
	const units, interval = 1000, 10 * time.Second
	n := max(1, int(*idleFor/interval))
	r := &benchReport{began: time.Now()}
	agents := contenders(b, units, interval)
	rigs := make([]*systemdtest.Rig, len(agents))
	for i := range agents {
		rigs[i] = startLoad(b, units, 0)
	}
	others := watchOthers(b, rigs...)
	all := make([]watched, len(agents))
	var watching sync.WaitGroup
	for i, a := range agents {
		next := a.start(b, rigs[i], units)
		watching.Go(func() { all[i] = watch(next, units, n) })
		time.Sleep(interval / time.Duration(len(agents)))
	}
	watching.Wait()
	rest := others()
	for i, a := range agents {
		reported := false
		b.Run(a.slug(), func(b *testing.B) { // more than once, since it takes no time
			if one := all[i].report(b, rigs[i], a, units); !reported {
				r.add(b, one)
			}
			reported = true
		})
	}
	r.rig(b, rigs[0], rest)
	r.writeIdle(b)
}

// startLoad boots a rig with units, of which active percent send a datagram each
// half second, without a new process each time.
func startLoad(b *testing.B, units, active int) *systemdtest.Rig {
	rig := systemdtest.Start(b)
	// It counts from the beginning, for the agent that reads it: each unit has sent.
	bpffs := rig.Path("/sys/fs/bpf")
	rig.Run(b, "sh", "-euc", "mkdir -p /sys/fs/bpf; mount -t bpf -o mode=755 bpf /sys/fs/bpf")
	if loaded, err := ebpf.Load(b.Context(), ebpf.LoadConfig{Dir: bpffs + "/unitmeter", Root: rig.Path("/sys/fs/cgroup")}); err != nil || loaded.Naming != nil {
		b.Fatal(err, loaded.Naming)
	}
	rig.Run(b, "chgrp", "-R", "nogroup", "/sys/fs/bpf/unitmeter")
	rig.WriteFile(b, "/usr/local/bin/load", "#!/bin/bash\necho x >/dev/udp/127.0.0.1/9\n"+
		"[ $1 -lt "+strconv.Itoa(units*active/100)+" ] || exec sleep infinity\n"+
		"mkfifo /run/load.$1; exec 3<>/run/load.$1 4>/dev/udp/127.0.0.1/9\nwhile :; do read -t .5 -u 3; echo x >&4; done 2>/dev/null\n")
	// PID 1 keeps four open files for each accounted unit, and would keep one more
	// for the journal's: 4,000 units need a limit (ulimit -n) above 16,200.
	rig.WriteFile(b, "/etc/systemd/system/load-@.service", "[Service]\nExecStart=/usr/local/bin/load %i\nIPAccounting=yes\nStandardOutput=null\nStandardError=null\n")
	rig.Run(b, "systemctl", "daemon-reload")
	rig.Run(b, "bash", "-c", fmt.Sprintf(`for i in $(seq 0 100 %d); do systemctl start $(seq -f load-@%%.0f.service $i $((i+99 < %d ? i+99 : %d))); done`, units-1, units-1, units-1))
	if n := strings.Count(rig.Run(b, "systemctl", "list-units", "--state=active", "--no-legend", "--plain", "load-*"), "\n"); n != units {
		b.Fatalf("%d of %d units are up", n, units)
	}
	return rig
}

// A collection is what one collection of an agent looks like from outside.
type collection struct {
	cpu  cpuTimes      // used up to its end
	wall time.Duration // from the first reading to the arrival
	seen int           // units in it
	err  error
}

// measured is what collections of one agent cost on average.
type measured struct {
	agent         contender
	units, active int
	count         int           // collections
	cpu, own      time.Duration // of one collection: all, and that of the agent
	wall          time.Duration // median
	took          time.Duration // all collections together
	rss           float64       // MiB, half an interval after the last
	lost          float64       // units, of one collection
}

// measure starts an agent as bench.service and looks at n collections of it.
func measure(b *testing.B, rig *systemdtest.Rig, a contender, units, n int) measured {
	return watch(a.start(b, rig, units), units, n).report(b, rig, a, units)
}

// watched is what was seen of an agent.
type watched struct {
	first, last collection
	walls       []time.Duration // of those after the first
	lost        int             // units, in all of them
	took        time.Duration
}

// watch looks at n collections. Some before them are not counted: the agents
// connect, and some learn, in them. It ends with the first that has an error.
func watch(next func() collection, units, n int) (w watched) {
	for range 3 {
		if w.first = next(); w.first.err != nil {
			return watched{last: w.first}
		}
	}
	for began := time.Now(); len(w.walls) < n && w.last.err == nil; w.took = time.Since(began) {
		w.last = next()
		w.walls, w.lost = append(w.walls, w.last.wall), w.lost+units-w.last.seen
	}
	slices.Sort(w.walls)
	return w
}

// report says what the collections cost, while the agent is still there.
func (w watched) report(b *testing.B, rig *systemdtest.Rig, a contender, units int) measured {
	if w.last.err != nil {
		b.Fatal(w.last.err)
	}
	n := len(w.walls)
	time.Sleep(a.interval / 2) // what a collection has used is given back after its arrival
	r := measured{
		agent: a, units: units, count: n, took: w.took, rss: rss(b, rig), wall: w.walls[n/2], lost: float64(w.lost) / float64(n),
		cpu: (w.last.cpu.all() - w.first.cpu.all()) / time.Duration(n), own: (w.last.cpu.agent - w.first.cpu.agent) / time.Duration(n),
	}
	if a.ours() && w.lost != 0 {
		b.Errorf("%s lost %d of %d × %d units", a.name, w.lost, n, units)
	}
	milliseconds := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(0, "ns/op") // of no meaning
	b.ReportMetric(milliseconds(r.cpu), "cpu-ms")
	b.ReportMetric(milliseconds(r.own), "agent-ms")
	if !a.rounds {
		b.ReportMetric(milliseconds(r.wall), "wall-ms")
	}
	b.ReportMetric(r.rss, "rss-MiB")
	b.ReportMetric(r.lost, "lost")
	return r
}

// cpuTimes are those of three cgroups since the boot of the rig.
type cpuTimes struct{ agent, systemd, bus time.Duration }

func (c cpuTimes) all() time.Duration { return c.agent + c.systemd + c.bus }

func readCPU(rig *systemdtest.Rig) (c cpuTimes, err error) {
	for group, used := range map[string]*time.Duration{"system.slice/bench.service": &c.agent, "init.scope": &c.systemd, "system.slice/dbus.service": &c.bus} {
		if *used, err = cgroupCPU(rig, group); err != nil {
			return c, err
		}
	}
	return c, nil
}

var usage = regexp.MustCompile(`usage_usec (\d+)`)

func cgroupCPU(rig *systemdtest.Rig, group string) (time.Duration, error) {
	text, err := os.ReadFile(rig.Path("/sys/fs/cgroup/" + group + "/cpu.stat"))
	if err != nil {
		return 0, err
	}
	match := usage.FindSubmatch(text)
	if match == nil {
		return 0, fmt.Errorf("cpu.stat of %s has no usage_usec: %q", group, text)
	}
	n, err := strconv.ParseInt(string(match[1]), 10, 64)
	return time.Duration(n) * time.Microsecond, err
}

// rss returns the resident memory of the agent's main process in MiB.
func rss(b *testing.B, rig *systemdtest.Rig) float64 {
	pid := strings.TrimSpace(rig.Run(b, "systemctl", "show", "--value", "-p", "MainPID", "bench"))
	return memory(b, rig.Path("/proc/"+pid+"/status"), "VmRSS")
}

// launch starts an agent as a unit named bench, and stops it at the end.
func launch(b *testing.B, rig *systemdtest.Rig, a contender) {
	args := []string{"--quiet", "--collect", "--unit=bench", "--property=User=" + a.user, "--property=StateDirectory=bench"}
	for _, name := range slices.Sorted(maps.Keys(a.env)) {
		args = append(args, "--setenv="+name+"="+a.env[name])
	}
	rig.Run(b, "systemd-run", append(args, a.command...)...)
	b.Cleanup(func() {
		rig.Run(b, "systemctl", "stop", "bench")
		rig.Run(b, "rm", "-rf", "/var/lib/bench")
	})
}
