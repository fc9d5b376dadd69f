package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// mainPID returns the number that the agent's process has on the host.
func (l *lab) mainPID() int {
	l.t.Helper()
	return l.hostPID(strings.TrimSpace(l.Run(l.t, "systemctl", "show", "unitmeter", "-p", "MainPID", "--value")))
}

// hostPID returns the number on the host of a process of the rig.
func (l *lab) hostPID(inside string) int {
	l.t.Helper()
	status, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		l.t.Fatal(err)
	}
	rig, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", l.PID()))
	if err != nil {
		l.t.Fatal(err)
	}
	for _, file := range status {
		namespace, err := os.Readlink(filepath.Join(filepath.Dir(file), "ns/pid"))
		if err != nil || namespace != rig {
			continue // it has ended, or is not of the rig
		}
		text, _ := os.ReadFile(file)
		for line := range strings.Lines(string(text)) {
			if pids := strings.Fields(line); len(pids) > 2 && pids[0] == "NSpid:" && pids[len(pids)-1] == inside {
				var pid int
				_, _ = fmt.Sscan(pids[1], &pid)
				return pid
			}
		}
	}
	l.t.Fatalf("no process of the host is process %s of the rig", inside)
	return 0
}

// resident returns the memory of a process in MiB.
func resident(t *testing.T, pid int) float64 {
	t.Helper()
	return memory(t, fmt.Sprintf("/proc/%d/status", pid), "VmRSS")
}

// TestStoppedAgent: while the agent is stopped, PID 1 stays small, and tells others of
// their units.
func TestStoppedAgent(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil, receiver.DBus)
	l.WriteFile(t, "/etc/systemd/system/burst@.service", "[Service]\nType=oneshot\nExecStart=/bin/true\n")
	// Enabled, so that it stays loaded: systemctl waits for a signal then.
	l.WriteFile(t, "/etc/systemd/system/bystander.service", "[Service]\nExecStart=/bin/sleep 0.2\n[Install]\nWantedBy=basic.target\n")
	l.Run(t, "systemctl", "enable", "--quiet", "bystander")
	l.startAgent(agent{env: []string{"UNITMETER_STOP_RECORDS=off"}})
	dbusDaemon := l.hostPID(strings.TrimSpace(l.Run(t, "systemctl", "show", "dbus", "-p", "MainPID", "--value")))
	for range 20 { // what PID 1 needs for itself
		l.Run(t, "systemctl", append([]string{"start"}, numberedUnits("burst@%d.service", 20)...)...)
	}
	waited := func(when string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if out, err := l.Command(ctx, "systemctl", "start", "--wait", "bystander").CombinedOutput(); err != nil {
			t.Errorf("%s: systemctl start --wait: %v\n%s", when, err, out)
		}
	}
	waited("before")
	pid := l.mainPID()
	before, busBefore := resident(t, l.PID()), resident(t, dbusDaemon)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
	rounds, pause := 60, time.Duration(0) // 1,200 starts
	if long() {
		rounds, pause = 300, time.Second // five minutes of 20 a second
	}
	for range rounds {
		next := time.Now().Add(pause)
		l.Run(t, "systemctl", append([]string{"start"}, numberedUnits("burst@%d.service", 20)...)...)
		time.Sleep(time.Until(next))
	}
	waited("while the agent is stopped")
	after, busAfter := resident(t, l.PID()), resident(t, dbusDaemon)
	t.Logf("%d starts with a stopped agent: PID 1 %.1f -> %.1f MiB, dbus-daemon %.1f -> %.1f MiB", 20*rounds, before, after, busBefore, busAfter)
	if after > before+4 {
		t.Errorf("PID 1 has grown by %.1f MiB", after-before)
	}
	if busAfter > busBefore+140 { // max_outgoing_bytes of the system bus, 127 MiB
		t.Errorf("dbus-daemon has grown by %.1f MiB", busAfter-busBefore)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	l.WriteFile(t, "/etc/systemd/system/after.service", "[Service]\nIPAccounting=yes\nType=oneshot\nRemainAfterExit=yes\nExecStart="+sendCommand+" 7\n")
	l.Run(t, "systemctl", "start", "after")
	want := systemd.Counters{EgressPackets: 7, EgressBytes: 7 * packetBytes}
	eventually(t, "the agent meters again", func() bool { return l.sum(named("after.service")) == want })
}

// numberedUnits returns n names.
func numberedUnits(format string, n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf(format, i)
	}
	return names
}

// named returns a predicate for one unit.
func named(name string) func(string) bool { return func(unit string) bool { return unit == name } }

// TestHungSystemd: while PID 1 does not answer, each cycle ends in time with the
// agent's own metrics, and says so; what was counted meanwhile comes after.
func TestHungSystemd(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil, receiver.DBus)
	l.WriteFile(t, "/etc/systemd/system/hung.service", "[Service]\nIPAccounting=yes\nExecStart=/bin/bash -c '"+sendCommand+" 5; until [ -e /run/go-on ]; do sleep 0.1; done; "+sendCommand+" 8; exec sleep 1000'\n")
	l.Run(t, "systemctl", "start", "hung")
	l.startAgent(agent{})
	sent := func(n uint64) func() bool {
		return func() bool {
			return l.sum(named("hung.service")) == systemd.Counters{EgressPackets: n, EgressBytes: n * packetBytes}
		}
	}
	eventually(t, "the first datagrams arrive", sent(5))
	if err := syscall.Kill(l.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(l.PID(), syscall.SIGCONT) }()
	if err := os.WriteFile(l.Path("/run/go-on"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	partial := l.health("unitmeter.sweep.partial")
	began := time.Now()
	eventually(t, "ten cycles without systemd", func() bool { return l.health("unitmeter.sweep.partial") >= partial+10 })
	t.Logf("10 cycles of 300 ms while PID 1 was stopped took %v", time.Since(began).Round(10*time.Millisecond))
	if !sent(5)() {
		t.Error("something of the unit came while systemd was stopped")
	}
	if err := syscall.Kill(l.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all datagrams arrive", sent(13))
	if log := l.log(); !strings.Contains(log, "systemd did not answer") {
		t.Errorf("the log does not say that systemd hangs:\n%s", log)
	}
	for _, problem := range l.wrong() {
		t.Error(problem)
	}
}

// TestUnlistableMount: a mount at a path that is not UTF-8 (systemd#36206) costs the
// other units nothing.
func TestUnlistableMount(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil, receiver.DBus)
	l.Run(t, "bash", "-c", `d=$(printf '/mnt/caf\351'); mkdir -p "$d" && mount -t tmpfs none "$d"`)
	listable := func() bool { return l.Command(t.Context(), "systemctl", "list-units", "--no-pager").Run() == nil }
	if l.version() < 257 {
		eventually(t, "systemd fails to list its units", func() bool { return !listable() })
	}
	l.WriteFile(t, "/etc/systemd/system/sender.service", "[Service]\nIPAccounting=yes\nType=oneshot\nRemainAfterExit=yes\nExecStart="+sendCommand+" 6\n")
	l.startAgent(agent{})
	l.Run(t, "systemctl", "start", "sender")
	want := systemd.Counters{EgressPackets: 6, EgressBytes: 6 * packetBytes}
	eventually(t, "the service is metered", func() bool { return l.sum(named("sender.service")) == want })
	out := l.Run(t, "/usr/local/bin/unitmeter", "once", "--source=dbus", "sender")
	if !strings.Contains(out, "768") {
		t.Errorf("unitmeter once printed:\n%s", out)
	}
	if log := l.log(); l.version() < 257 && !strings.Contains(log, `unit=mnt-caf\xe9.mount`) {
		t.Errorf("the log does not name the mount:\n%s", log)
	}
}

// hostileEnv makes this program a hostile user of the bus, for so long.
const hostileEnv = "UNITMETER_TEST_HOSTILE"

// hostile sends all kinds of messages that an unprivileged user can send, to each peer
// of the bus and to systemd, until ctx ends.
func hostile(ctx context.Context) error {
	const systemBus = "unix:path=/run/dbus/system_bus_socket"
	connect := func() (*dbus.Conn, error) { return dbus.Connect(systemBus, dbus.WithContext(ctx)) }
	main, err := connect()
	if err != nil {
		return err
	}
	// peers are asked for again and again: the agent may connect again.
	peers := func() (list []string) {
		var names []string
		_ = main.BusObject().Call(bus.BusInterface+".ListNames", 0).Store(&names)
		for _, name := range names {
			if strings.HasPrefix(name, ":") {
				list = append(list, name)
			}
		}
		return list
	}
	victim := dbus.ObjectPath("/org/freedesktop/systemd1/unit/victim_2eservice")
	dead := map[string]dbus.Variant{
		"ActiveState": dbus.MakeVariant("inactive"), "SubState": dbus.MakeVariant("dead"),
		"InvocationID": dbus.MakeVariant(make([]byte, 16)), "InactiveEnterTimestamp": dbus.MakeVariant(uint64(1)),
	}
	wide := map[string]dbus.Variant{}
	for i := range 500 {
		wide[fmt.Sprint(i)] = dbus.MakeVariant(strings.Repeat("x", 100))
	}
	deep := dbus.MakeVariant("x")
	for range 30 {
		deep = dbus.MakeVariant(deep)
	}
	signal := func(path dbus.ObjectPath, iface, member string, body ...any) func(*dbus.Conn, string) {
		return straight(dbus.TypeSignal, path, iface, member, body...)
	}
	const manager, props, theBus = bus.ManagerInterface, bus.PropertiesInterface, bus.BusInterface
	n := 0
	invented := func() string { n++; return fmt.Sprintf("invented-%d.service", n) }
	each := []func(*dbus.Conn, string){ // sent to each peer
		signal(bus.ManagerPath, manager, "UnitRemoved", "victim.service", victim),
		signal(bus.ManagerPath, manager, "UnitNew", "invented.service", victim),
		signal(bus.ManagerPath, manager, "Reloading", true),
		signal(bus.ManagerPath, manager, "Reloading", "no boolean"),
		signal(victim, props, "PropertiesChanged", bus.UnitInterface, dead, []string{}),
		signal(victim, props, "PropertiesChanged", bus.UnitInterface, wide, []string{}),
		signal(victim, props, "PropertiesChanged", bus.UnitInterface, map[string]dbus.Variant{"ActiveState": deep}, []string{}),
		signal("/org/freedesktop/DBus", theBus, "NameOwnerChanged", bus.SystemdName, ":1.0", main.Names()[0]),
		signal("/org/freedesktop/DBus", theBus, "NameOwnerChanged", bus.SystemdName, ":1.0", ""),
		signal("/org/freedesktop/DBus", theBus, "NameLost"),
		signal("/org/freedesktop/DBus", theBus, "NameAcquired"),
		signal("/", "a.b", "C"),
		straight(dbus.TypeMethodCall, "/", "org.freedesktop.DBus.Peer", "Ping"),
		straight(dbus.TypeMethodCall, "/", "org.freedesktop.DBus.Introspectable", "Introspect"),
		straight(dbus.TypeMethodReply, "/", "a.b", "C", uint64(1)<<40),
		straight(dbus.TypeError, "/", "a.b", "C", "an error"),
	}
	rare := []func(*dbus.Conn, string){signal("/", "a.b", "C", strings.Repeat("x", 8<<20))}
	asked := []func(*dbus.Conn){ // of systemd
		func(c *dbus.Conn) { // loads a unit, which is announced and unloaded
			c.Object(bus.SystemdName, bus.ManagerPath).Go(manager+".LoadUnit", dbus.FlagNoReplyExpected, nil, invented())
		},
		func(c *dbus.Conn) {
			path := "/org/freedesktop/systemd1/unit/" + strings.NewReplacer("-", "_2d", ".", "_2e").Replace(invented())
			c.Object(bus.SystemdName, dbus.ObjectPath(path)).Go(props+".Get", dbus.FlagNoReplyExpected, nil, bus.UnitInterface, "ActiveState")
		},
		func(c *dbus.Conn) {
			c.Object(bus.SystemdName, bus.ManagerPath).Go(manager+".Unsubscribe", dbus.FlagNoReplyExpected, nil)
		},
		func(c *dbus.Conn) {
			c.Object(bus.SystemdName, bus.ManagerPath).Go(manager+".StartUnit", dbus.FlagNoReplyExpected, nil, "victim.service", "replace")
		},
		func(c *dbus.Conn) {
			c.BusObject().Go(theBus+".RequestName", dbus.FlagNoReplyExpected, nil, bus.SystemdName, uint32(0))
		},
	}
	var users sync.WaitGroup
	defer users.Wait()
	loop := func(pause time.Duration, do func(*dbus.Conn)) {
		users.Go(func() {
			c := main
			for ctx.Err() == nil {
				if !c.Connected() { // the bus has had enough of it
					if c, err = connect(); err != nil {
						return
					}
				}
				do(c)
				select {
				case <-time.After(pause):
				case <-ctx.Done():
				}
			}
		})
	}
	loop(100*time.Millisecond, func(c *dbus.Conn) {
		for _, to := range peers() {
			for _, send := range each {
				send(c, to)
			}
		}
	})
	loop(time.Second, func(c *dbus.Conn) {
		for _, to := range peers() {
			rare[0](c, to)
		}
	})
	loop(20*time.Millisecond, func(c *dbus.Conn) {
		for range 10 { // 500 invented units a second and kind
			asked[0](c)
			asked[1](c)
		}
		for _, ask := range asked[2:] {
			ask(c)
		}
	})
	return nil
}

// straight returns what sends a message to one peer, whatever that has asked for.
func straight(kind dbus.Type, path dbus.ObjectPath, iface, member string, body ...any) func(*dbus.Conn, string) {
	return func(c *dbus.Conn, to string) {
		headers := map[dbus.HeaderField]dbus.Variant{dbus.FieldDestination: dbus.MakeVariant(to)}
		switch kind {
		case dbus.TypeSignal, dbus.TypeMethodCall:
			headers[dbus.FieldPath], headers[dbus.FieldInterface], headers[dbus.FieldMember] = dbus.MakeVariant(path), dbus.MakeVariant(iface), dbus.MakeVariant(member)
		case dbus.TypeError:
			headers[dbus.FieldErrorName] = dbus.MakeVariant("a.b.C")
			fallthrough
		default:
			headers[dbus.FieldReplySerial] = dbus.MakeVariant(uint32(1<<31 + 5))
		}
		if len(body) > 0 {
			headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
		}
		c.Send(&dbus.Message{Type: kind, Flags: dbus.FlagNoReplyExpected, Headers: headers, Body: body}, nil)
	}
}

// TestHostileBus: whatever another user sends on the bus, totals are exact, the agent
// stays small, and no cycle is missed.
func TestHostileBus(t *testing.T) {
	if text := os.Getenv(hostileEnv); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), d)
		defer cancel()
		if err := hostile(ctx); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Parallel()
	l := newLab(t, nil, receiver.DBus)
	l.WriteFile(t, "/etc/systemd/system/victim.service", "[Service]\nIPAccounting=yes\nExecStart=/bin/bash -c 'while sleep 0.05; do "+sendCommand+" 3; done'\n")
	l.WriteFile(t, "/etc/systemd/system/short@.service", "[Service]\nIPAccounting=yes\nType=oneshot\nSlice=short.slice\nExecStart="+sendCommand+" 2\n")
	l.WriteFile(t, "/etc/systemd/system/short.slice", "[Slice]\nIPAccounting=yes\n")
	l.Run(t, "systemctl", "start", "short.slice", "victim")
	l.startAgent(agent{env: []string{"OTEL_METRIC_EXPORT_INTERVAL=1000"}, properties: []string{"User=nobody", "SupplementaryGroups=systemd-journal"}})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l.Run(t, "install", "-m", "755", self, "/usr/local/bin/hostile")
	pid := l.mainPID()
	d := 10 * time.Second
	if long() {
		d = 10 * time.Minute
	}
	attack := l.Command(t.Context(), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/local/bin/hostile", "-test.run=^TestHostileBus$", "-test.timeout=0")
	attack.Env = append(attack.Env, hostileEnv+"="+d.String())
	attack.Dir = "/"
	cycles, began := l.cycles(), time.Now()
	var out strings.Builder
	attack.Stdout, attack.Stderr = &out, &out
	if err := attack.Start(); err != nil {
		t.Fatal(err)
	}
	starts := 0
	for time.Since(began) < d {
		l.Run(t, "systemctl", "start", fmt.Sprintf("short@%d.service", starts%100))
		starts++
		time.Sleep(200 * time.Millisecond)
	}
	if err := attack.Wait(); err != nil {
		t.Fatalf("the hostile user: %v\n%s", err, &out)
	}
	took, end := time.Since(began), time.Now()
	eventually(t, "the cycles until then have arrived", func() bool { return l.lastCycle().After(end) })
	done, peak := l.cycles()-cycles, memory(t, fmt.Sprintf("/proc/%d/status", pid), "VmHWM")
	l.Run(t, "systemctl", "stop", "victim")
	slice, _ := l.counted("short.slice")
	record := l.Run(t, "bash", "-c", "journalctl -q -o json -u victim.service MESSAGE_ID=ae8f7b866b0347b9af31fe1c80b127c0 | tail -1")
	t.Logf("%v: %d cycles, %d short runs, peak %.1f MiB, %d signals refused, %d dropped, %d sweeps cut short",
		took.Round(time.Second), done, starts, peak, l.health("unitmeter.dbus.signals.refused"), l.health("unitmeter.dbus.signals.dropped"), l.health("unitmeter.sweep.partial"))
	eventually(t, "the total of the victim is that of its stop record", func() bool {
		total := l.sum(named("victim.service"))
		return strings.Contains(record, fmt.Sprintf(`"IP_METRIC_EGRESS_BYTES":"%d"`, total.EgressBytes)) && total.EgressBytes > 0
	})
	eventually(t, "the totals of the short runs are those of their slice", func() bool {
		return l.sum(func(unit string) bool { return strings.HasPrefix(unit, "short@") }) == slice && slice.EgressPackets == uint64(2*starts)
	})
	if int(took.Seconds()) > done { // one more has arrived
		t.Errorf("%d cycles in %v, want one each second", done, took)
	}
	if peak > 48 {
		t.Errorf("the agent took %.1f MiB, want 48 at most", peak)
	}
	if refused := l.health("unitmeter.dbus.signals.refused"); refused == 0 {
		t.Error("no signal was refused: the hostile user has sent none")
	}
	for _, problem := range l.wrong() {
		t.Error(problem)
	}
}

// lastCycle returns when the agent's last cycle that has arrived was measured.
func (l *lab) lastCycle() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.collected
}

// cycles returns how many of the agent's cycles have arrived.
func (l *lab) cycles() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.collections
}
