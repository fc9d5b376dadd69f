package e2e

import (
	"context"
	"errors"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

const (
	otlpAddress = "127.0.0.1:4317"
	udpSink     = "127.0.0.1:9999"
	tcpSink     = "127.0.0.1:9998"
	slowSink    = "127.0.0.1:9997"
	sendCommand = "/usr/local/bin/traffic udp-send " + udpSink + " -bytes 100 -count"
)

// lab is a rig with an agent in it that exports to a recorder outside.
type lab struct {
	*systemdtest.Rig
	*recorder
	t      *testing.T
	source string
	conn   *dbus.Conn    // to the rig's system bus
	agent  agent         // as it was started last
	clock  time.Duration // by how much the agent's wall clock is off
}

// newLab boots a rig, from UNITMETER_TEST_ROOT or the host's own systemd, and
// starts all of it but the agent. An OTLP receiver is made if none is given.
func newLab(t *testing.T, r *recorder, source string) *lab {
	t.Helper()
	binary, err := agentBinary()
	if err != nil {
		t.Fatal(err)
	}
	if r == nil {
		r = newRecorder()
	}
	l := &lab{Rig: systemdtest.Start(t), recorder: r, t: t, source: source}
	otlp, err := l.Listen(t.Context(), "tcp", otlpAddress)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, otlp, r)
	if l.conn, err = dbus.Connect(l.SystemBus()); err != nil {
		t.Fatalf("connect to the rig's bus: %v", err)
	}
	t.Cleanup(func() { l.conn.Close() })
	l.Run(t, "install", "-m", "755", binary, "/usr/local/bin/unitmeter")
	sink := func(unit string, args ...string) {
		l.Run(t, "systemd-run", append([]string{"--quiet", "--unit=" + unit, "-p", "Type=notify", l.Traffic()}, args...)...)
	}
	sink("udp-sink", "udp-sink", udpSink)
	sink("tcp-sink", "tcp-sink", tcpSink)
	sink("slow-sink", "tcp-sink", slowSink, "-rate", "2000000")
	return l
}

// meterGroup may read the maps of the eBPF meter: nogroup.
const meterGroup = "65534"

// loadMeter loads the eBPF meter with room for so many cgroups; 0 is the default.
func (l *lab) loadMeter(room uint32) {
	l.t.Helper()
	l.Run(l.t, "sh", "-euc", "mkdir -p /sys/fs/bpf; mount -t bpf -o mode=700 bpf /sys/fs/bpf")
	if room > 0 { // the command has no such setting
		cfg := ebpf.LoadConfig{Dir: l.Path(ebpf.DefaultDir), Root: l.Path("/sys/fs/cgroup"), MaxEntries: room}
		if loaded, err := ebpf.Load(l.t.Context(), cfg); err != nil || loaded.Naming != nil {
			l.t.Fatal(err, loaded.Naming)
		}
		l.Run(l.t, "chgrp", "-R", meterGroup, ebpf.DefaultDir)
		return
	}
	if out := l.Run(l.t, "setpriv", "--regid", meterGroup, "--clear-groups", "/usr/local/bin/unitmeter", "meter", "load"); !strings.HasPrefix(out, "counting ") {
		l.t.Fatalf("the loader says %q", out)
	}
}

// agent is how to start the agent.
type agent struct {
	env        []string // added to, and over, what all agents get
	properties []string // of its unit
	wallClock  bool     // of its own, off by the seconds in clockFile
}

// clockFile has the seconds by which the wall clock of an agent is off that has
// one of its own.
const clockFile = "/run/clock"

// startAgent starts the agent and returns when its first points have arrived.
func (l *lab) startAgent(a agent) {
	l.t.Helper()
	l.agent = a
	args := []string{"--quiet", "--collect", "--unit=unitmeter", "-p", "StateDirectory=unitmeter", "-p", "StateDirectoryMode=0700",
		"-p", "Restart=always", "-p", "RestartSec=5ms", "-p", "StartLimitIntervalSec=0"}
	for _, e := range append([]string{
		"UNITMETER_SOURCE=" + l.source, "OTEL_EXPORTER_OTLP_ENDPOINT=http://" + otlpAddress, "OTEL_METRIC_EXPORT_INTERVAL=300", "OTEL_METRIC_EXPORT_TIMEOUT=20000",
	}, a.env...) {
		args = append(args, "--setenv="+e)
	}
	for _, p := range a.properties {
		args = append(args, "-p", p)
	}
	l.unsteady = a.wallClock
	if a.wallClock {
		l.Run(l.t, "sh", "-c", "[ -e "+clockFile+" ] || echo 0 >"+clockFile)
		args = append(args, l.WallClock(l.t), clockFile)
	}
	l.Run(l.t, "systemd-run", append(args, "/usr/local/bin/unitmeter", "run")...)
	l.t.Cleanup(func() {
		if l.t.Failed() {
			l.t.Logf("the agent's log:\n%s", l.log())
		}
	})
	eventually(l.t, "the agent exports", l.exports)
}

// restartAgent starts the agent again after "systemctl stop", which has unloaded
// its unit.
func (l *lab) restartAgent() {
	l.t.Helper()
	l.startAgent(l.agent)
}

// exports reports whether anything has arrived.
func (l *lab) exports() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.series)+len(l.gauges) > 0
}

// log returns the end of the agent's log.
func (l *lab) log() string {
	log, err := l.Command(context.Background(), "journalctl", "--no-pager", "-o", "cat", "-u", "unitmeter", "-n", "40").CombinedOutput()
	if err != nil {
		return err.Error()
	}
	return string(log)
}

// arrives waits for a condition on what has been received, until what the agent
// measured in d from now is here too: on a loaded machine, the receiver can be
// behind by more than that.
func (l *lab) arrives(d time.Duration, condition func() bool) bool {
	end := time.Now().Add(d)
	within(10*time.Minute, func() bool {
		l.mu.Lock()
		reached := l.reached.Add(-l.clock)
		l.mu.Unlock()
		// A point that is yet to come is one from before the clock was set.
		return reached.After(end) && reached.Before(time.Now().Add(time.Second)) || condition()
	})
	return condition()
}

// counted returns what systemctl show says of a unit, and whether it has data.
func (l *lab) counted(unit string) (systemd.Counters, bool) {
	l.t.Helper()
	a := l.Show(l.t, unit)
	return systemd.Counters{IngressBytes: a.IngressBytes, IngressPackets: a.IngressPackets, EgressBytes: a.EgressBytes, EgressPackets: a.EgressPackets}, a.OK
}

// systemd returns the version of systemd in the rig, and its number.
func (l *lab) systemd() (text string, number int) {
	l.t.Helper()
	line, _, _ := strings.Cut(l.Run(l.t, "systemctl", "--version"), "\n")
	fields := strings.Fields(line) // systemd 252 (252.38-1~deb12u1)
	number, err := strconv.Atoi(fields[1])
	if err != nil {
		l.t.Fatalf("the version of systemd is %q", line)
	}
	return strings.Trim(fields[len(fields)-1], "()"), number
}

func (l *lab) version() int {
	_, n := l.systemd()
	return n
}

// transient starts a transient service, with accounting where systemd counts, as systemd-run does, but
// without a process of its own for each.
func (l *lab) transient(unit, slice string, command ...string) error {
	type property struct {
		Name  string
		Value dbus.Variant
	}
	type execute struct {
		Path          string
		Args          []string
		IgnoreFailure bool
	}
	type auxiliary struct {
		Name       string
		Properties []property
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return l.conn.Object("org.freedesktop.systemd1", "/org/freedesktop/systemd1").CallWithContext(ctx,
		"org.freedesktop.systemd1.Manager.StartTransientUnit", 0, unit, "fail", []property{
			{"IPAccounting", dbus.MakeVariant(l.source == receiver.DBus)},
			{"Slice", dbus.MakeVariant(slice)},
			{"CollectMode", dbus.MakeVariant("inactive-or-failed")},
			{"ExecStart", dbus.MakeVariant([]execute{{command[0], command, false}})},
		}, []auxiliary{}).Err
}

// running returns how many units that match the pattern run.
func (l *lab) running(pattern string) int {
	l.t.Helper()
	return l.listed("--state=active,activating,deactivating,reloading", pattern)
}

// pending returns how many transient units that match the pattern have not ended,
// those included that have yet to start: what has ended is not loaded.
func (l *lab) pending(pattern string) int {
	l.t.Helper()
	return l.listed("--all", pattern)
}

func (l *lab) listed(which, pattern string) int {
	l.t.Helper()
	return strings.Count(l.Run(l.t, "systemctl", "list-units", "--no-legend", "--plain", which, pattern), "\n")
}

// shell runs a script inside. It fails the test with what the script said.
func (l *lab) shell(t *testing.T, script string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	out, err := l.Command(ctx, "bash", append([]string{"-euc", script, "bash"}, args...)...).CombinedOutput()
	if err != nil {
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			t.Fatalf("in the rig: %v\n%s\n%s", err, script, out)
		}
		t.Fatal(err)
	}
	return string(out)
}
