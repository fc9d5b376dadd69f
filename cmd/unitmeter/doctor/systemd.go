package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// checkBus connects to systemd as the agent would.
func (d *doctor) checkBus(ctx context.Context) finding {
	m, err := accounting.Connect(ctx, d.cfg.Receiver.Addresses()...)
	if err == nil {
		// A bus without systemd on it is no use, and a user's systemd counts nothing.
		var version string
		var paths []string
		_ = m.Property(ctx, "UnitPath", &paths) // a hint only
		if len(paths) > 0 && !slices.Contains(paths, "/etc/systemd/system") {
			m.Close()
			return failure("unset UNITMETER_BUS and DBUS_SYSTEM_BUS_ADDRESS", "the systemd at %s is a user's, which has no IP accounting", m.Address)
		}
		if err = m.Property(ctx, "Version", &version); err != nil {
			err = &accounting.BusError{Address: m.Address, Err: fmt.Errorf("use systemd at %s: %w", m.Address, err)}
			m.Close()
		}
	}
	if err != nil && d.cfg.Receiver.Source == receiver.EBPF {
		return skipped("%v; with UNITMETER_SOURCE=ebpf the agent does not need it", err)
	}
	if err != nil {
		return busFailure(err, booted(), container(), apparmor())
	}
	d.m = m
	if m.Address == bus.PrivateSocket && d.cfg.Receiver.Bus != "private" {
		return warning("systemctl start dbus.socket dbus.service", "only PID 1's own socket answers (%s): PID 1 needs more and more memory while the agent is stopped", m.Address)
	}
	return good("systemd answers at %s", m.Address)
}

// booted reports whether systemd is the init of this system (sd_booted(3)).
func booted() bool {
	// The directory is there from early boot on, wherever systemd is process 1.
	info, err := os.Stat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// busFailure says what to do about a bus that cannot be used.
func busFailure(err error, booted bool, container, profile string) finding {
	address := systemd.UsualSystemBus
	var last *accounting.BusError
	// As root two addresses were tried. The private socket is there or not; what
	// is wrong with the bus can be fixed.
	for _, e := range flatten(err) {
		var tried *accounting.BusError
		if errors.As(e, &tried) && (last == nil || tried.Address != bus.PrivateSocket) {
			last, address = tried, tried.Address
		}
	}
	found := tty.Line(err)
	if last != nil {
		err = last
	}
	socket := strings.TrimPrefix(address, "unix:path=")
	mount := fmt.Sprintf("mount the host's socket into the container: -v %s:%[1]s", socket)
	if container == "kubernetes" {
		mount = "mount the host's socket into the pod: a hostPath volume of " + socket
	}
	switch {
	case address != systemd.UsualSystemBus && address != bus.PrivateSocket && errors.Is(err, fs.ErrNotExist):
		return failure("unset UNITMETER_BUS and DBUS_SYSTEM_BUS_ADDRESS, or name a socket that exists", "%s", found)
	// Containers first: the fix for a host does nothing in them.
	case errors.Is(err, fs.ErrNotExist) && container != "" && !booted:
		return failure(mount, "%s; this is a container (%s)", found, container)
	case errors.Is(err, fs.ErrNotExist) && !booted:
		return failure("run unitmeter on a host whose init is systemd", "%s; systemd is not the init of this system", found)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return failure("systemctl start dbus.socket dbus.service", "%s", found)
	// dbus-daemon says so in the text of its refusal.
	case accounting.Denied(err) && strings.Contains(err.Error(), "AppArmor"):
		return failure("run the container with --security-opt apparmor=unconfined", "%s (profile %s)", found, profile)
	case address == bus.PrivateSocket && os.Geteuid() != 0: // systemd 247 takes the connection, and cuts it
		return failure("set UNITMETER_BUS=system, or run it as root", "%s", found)
	// A profile refuses with the same error as the mode of the socket.
	case errors.Is(err, fs.ErrPermission) && profile != "":
		return failure("run it without the AppArmor profile "+profile+" (--security-opt apparmor=unconfined)", "%s", found)
	case errors.Is(err, fs.ErrPermission):
		return failure("chmod 0666 "+socket, "%s; most systems let every user open it", found)
	case strings.Contains(err.Error(), "REJECTED"):
		return failure("use a static user (no DynamicUser=yes), and no user namespace (docker: --userns=host)", "%s; the bus does not know uid %d", found, os.Geteuid())
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
		return failure("systemctl restart dbus.service", "%s: no answer", found)
	// A bus of a user's session, or of a container.
	case accounting.ErrorIs(err, "org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner", "org.freedesktop.DBus.Error.Spawn.ChildExited"):
		return failure("set DBUS_SYSTEM_BUS_ADDRESS to the bus of the host, or unset it", "%s; systemd is not on this bus", found)
	}
	return failure("set UNITMETER_BUS=auto and DBUS_SYSTEM_BUS_ADDRESS="+systemd.UsualSystemBus, "%s", found)
}

// flatten returns the parts of a joined error.
func flatten(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}

// checkVersion knows the versions of systemd that count wrongly.
func (d *doctor) checkVersion(ctx context.Context) finding {
	v, err := d.m.Version(ctx)
	if err != nil {
		return failure("systemctl --version", "%v", err)
	}
	d.version = v
	return versionFinding(v)
}

// versionFinding has the bugs that make numbers wrong or missing. Those that the
// receiver works around without a loss are left out.
func versionFinding(v accounting.Version) finding {
	switch {
	case v.Before(235, 0):
		return failure("upgrade to systemd 249 or later", "systemd %s has no IP accounting; 235 was the first version with it", v)
	case v.Before(249, 0):
		return warning("upgrade to systemd 249 or later", "systemd %s counts nothing while a daemon-reload lasts (systemd#17489)", v)
	case v.Before(256, 0):
		return good("systemd %s", v)
	case v.Before(256, 3):
		return warning("unitmeter enable --ebpf",
			"systemd %s drops the counters of a unit when it stops (systemd#33149) and of all running units at a daemon-reload (systemd#38112)", v)
	case v.Before(258, 0): // the check of the counters has the fix
		return good("systemd %s, which loses the counters of running units at each daemon-reload (systemd#38112)", v)
	case v.Before(258, 1):
		return warning("upgrade to systemd 258.1 or later", "systemd %s starts to count from 0 at each daemon-reload (systemd#39130)", v)
	}
	return good("systemd %s", v)
}

// checkMachine finds a container that would give the host's metrics a name of
// its own.
func (d *doctor) checkMachine(ctx context.Context) finding {
	where := "not in a container"
	if c := container(); c != "" {
		where = "in a container (" + c + ")"
	}
	if profile := apparmor(); profile != "" {
		where += ", AppArmor profile " + profile
	}
	// Over D-Bus it is the id of the host, read by systemd; the file is that of
	// this mount namespace.
	host, err := d.m.MachineID(ctx)
	if err != nil {
		return skipped("%s; systemd does not answer with its machine id: %v", where, err)
	}
	const file = "/etc/machine-id"
	const fix = "mount /etc/machine-id of the host into the container, read-only: -v /etc/machine-id:/etc/machine-id:ro"
	own, err := os.ReadFile(file)
	if err != nil {
		return warning(fix, "%s; %v: without it there is no host.id and no service.instance.id", where, err)
	}
	if id := strings.TrimSpace(string(own)); id != host {
		return warning(fix, "%s; %s says %s, and systemd runs on machine %s: host.id would be wrong", where, file, id, host)
	}
	return good("%s; the machine id is the one of systemd's host", where)
}

// inState returns the names of the units in a state. Masked ones are left out where
// they could have counters: nothing can be done about them.
func (d *doctor) inState(state string) []string {
	var names []string
	for _, u := range d.units {
		if u.Accounting == state && !(u.Masked && (state == "off" || state == "lost")) {
			names = append(names, u.Name)
		}
	}
	return names
}

// checkDefault asks whether future units are counted by themselves.
func (d *doctor) checkDefault(ctx context.Context) finding {
	switch on, err := d.m.Default(ctx); {
	case err != nil:
		return failure("systemctl show -p DefaultIPAccounting", "%v", err)
	case !on:
		return warning("unitmeter enable --default", "DefaultIPAccounting=no: future units are not counted, unless their files ask for it")
	}
	return good("DefaultIPAccounting=yes: future units are counted too")
}

// checkAccounting counts the units that are not counted.
func (d *doctor) checkAccounting(ctx context.Context) finding {
	cfg := d.cfg.Receiver
	cfg.SweepTimeout = 0 // ctx is shorter
	readings, err := accounting.Read(ctx, cfg, receiver.DBus, systemd.Patterns{}, 0)
	if err != nil {
		return failure("unitmeter once --source dbus", "%s", err)
	}
	d.units = readings.Units
	// They are off on most hosts, and have nothing to count.
	off := slices.DeleteFunc(d.inState("off"), func(name string) bool { return !accounting.CarriesTraffic(name) })
	on := len(d.inState("on"))
	switch {
	case len(d.units) == 0:
		return failure("unset UNITMETER_INCLUDE, UNITMETER_EXCLUDE and UNITMETER_UNIT_TYPES", "the settings leave out all running units")
	case len(off) > 0 && on == 0:
		return failure(accounting.EnableAll, "%d units have IP accounting off and none has counters, so there is nothing to send", len(off))
	case len(off) > 0:
		return warning(accounting.EnableCommand(off), "%d of %d units have IP accounting off; \"unitmeter units\" lists them", len(off), len(d.units))
	}
	return good("all units with traffic have IP accounting on; %d have counters", on)
}

// checkCounters distinguishes a systemd that lost the counters of some units from one
// that cannot count at all, because the kernel or a container forbids BPF.
func (d *doctor) checkCounters(ctx context.Context) finding {
	if d.units == nil {
		return skipped("the units could not be read")
	}
	c := counters{on: d.inState("on"), lost: d.inState("lost"), failed: d.inState("failed"), version: d.version, packaged: d.agent != nil}
	// Hints only: without them the counters count as lost.
	_ = d.m.Property(ctx, "Virtualization", &c.virtualization)
	c.never, _ = d.m.StartedSinceLoad(ctx, c.lost)
	c.rearmed = c.packaged && d.m.Active(ctx, accounting.RearmUnit)
	return countersFinding(c)
}

// counters is what the judgement on the counters needs.
type counters struct {
	on, lost, failed []string
	virtualization   string
	version          accounting.Version
	// never says that a lost unit began after the last reload: no reload took its
	// counters, so it had none.
	never             bool
	packaged, rearmed bool // the agent's units are installed, and that which re-arms runs
}

// countersFinding decides between one lost unit, the reload bug, and no BPF at
// all: without BPF no unit has counters, whatever the version.
func countersFinding(c counters) finding {
	rearm := "unitmeter enable --lost"
	loses := c.version.LosesAtReload() && !c.rearmed
	if loses && c.packaged {
		rearm = "unitmeter enable --rearm"
	}
	const other = "; with \"unitmeter enable --ebpf\", unitmeter counts without systemd"
	switch {
	case len(c.failed) > 0:
		return warning("report a bug with the output of: systemctl show "+tty.ShellWord(c.failed[0]), "the counters of %s are not valid", list(c.failed))
	// With the bug all units are lost after a reload, whether or not BPF works.
	case len(c.lost) > 0 && (len(c.on) > 0 || c.version.LosesAtReload() && !c.never):
		return warning(rearm, "systemd has lost the counters of %s%s", list(c.lost), other)
	case len(c.lost) > 0 && slices.Contains([]string{"docker", "lxc", "lxc-libvirt", "podman", "container-other", "systemd-nspawn", "openvz"}, c.virtualization):
		return failure("run unitmeter on the host of this container, and meter the container's unit there",
			"IP accounting is on and no unit has counters: systemd runs in a container (%s) that may not use BPF", c.virtualization)
	case len(c.lost) > 0:
		return failure("boot a kernel with CONFIG_CGROUP_BPF=y and without a lockdown of BPF; why systemd cannot: journalctl -b _PID=1 -g BPF",
			"IP accounting is on and no unit has counters: systemd cannot use BPF for %s", list(c.lost))
	case len(c.on) == 0:
		return skipped("no running unit has IP accounting on, so there are no counters to check")
	case loses && c.packaged:
		return warning(rearm, "systemd has counters for %d units, and loses them at the next daemon-reload (systemd#38112)%s", len(c.on), other)
	}
	return good("systemd has counters for %d units", len(c.on))
}

// list names some units.
func list(names []string) string {
	const most = 3
	if len(names) > most {
		return fmt.Sprintf("%s and %d more units", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// checkStopRecords reads the journal as the agent does, for the last bytes of units.
func (d *doctor) checkStopRecords(ctx context.Context) finding {
	// With a configuration that is wrong it is empty, which is auto.
	mode := d.cfg.Receiver.StopRecords
	if mode == "off" {
		return warning("unset UNITMETER_STOP_RECORDS", "UNITMETER_STOP_RECORDS=off: traffic between the last sweep and the end of a unit is missed")
	}
	f := stopRecordsFinding(mode, tryJournal(ctx))
	if f.Status != statusOK || d.m == nil {
		return f
	}
	var level, target string
	err := errors.Join(d.m.Property(ctx, "LogLevel", &level), d.m.Property(ctx, "LogTarget", &target))
	quiet, err2 := d.m.Quiet(ctx)
	if err := errors.Join(err, err2); err != nil {
		return failure("systemctl show -p LogLevel -p LogTarget", "%v", err)
	}
	return silenceFinding(level, target, journaldSettings(ctx), quiet)
}

// journaldSettings returns journald's configuration, as far as it can be read: its
// comments are the defaults.
func journaldSettings(ctx context.Context) map[string]string {
	text, _ := exec.CommandContext(ctx, "systemd-analyze", "cat-config", "systemd/journald.conf").Output()
	settings := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			settings[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
	}
	return settings
}

// silenceFinding says what keeps stop records, which are of the level info, out of
// the journal. quiet are units whose own setting does.
func silenceFinding(level, target string, journald map[string]string, quiet []string) finding {
	const why = "systemd's stop records are not in the journal, so the traffic of short-lived units is missed: "
	heard := []string{"", "info", "debug", "6", "7"}
	switch {
	case !slices.Contains(heard, level):
		return warning("systemd-analyze log-level info, and set LogLevel=info in /etc/systemd/system.conf", why+"LogLevel=%s", level)
	case !slices.Contains([]string{"", "journal", "journal-or-kmsg", "auto"}, target):
		return warning("systemd-analyze log-target journal, and set LogTarget=journal-or-kmsg in /etc/systemd/system.conf", why+"LogTarget=%s", target)
	case journald["Storage"] == "none":
		return warning("remove Storage=none from /etc/systemd/journald.conf, and: systemctl restart systemd-journald", why+"journald stores nothing (Storage=none)")
	case !slices.Contains(heard, journald["MaxLevelStore"]):
		return warning("set MaxLevelStore=info in /etc/systemd/journald.conf, and: systemctl restart systemd-journald", why+"journald has MaxLevelStore=%s", journald["MaxLevelStore"])
	case len(quiet) > 0:
		return warning("systemctl edit "+tty.ShellWord(quiet[0])+", and remove LogLevelMax= or set it to info", why+"LogLevelMax= of %s", list(quiet))
	}
	return good("the journal with systemd's stop records can be read")
}

// stopRecordsFinding judges why the journal cannot be read: an error only where the
// settings ask for it.
func stopRecordsFinding(mode string, err error) finding {
	if err == nil {
		return good("the journal with systemd's stop records can be read")
	}
	bad := warning
	if mode == "on" {
		bad = failure
	}
	next := "usermod -aG systemd-journal " + userName(os.Geteuid())
	if errors.Is(err, exec.ErrNotFound) {
		next = "install journalctl, or run the agent as root"
	}
	return bad(next, "the journal cannot be read, so the last bytes of units that end are missed: %s", err)
}

// tryJournal reads one record of PID 1, as the receiver reads its stop records.
func tryJournal(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "journalctl", "--system", "--quiet", "--lines=1", "--output=json", "_PID=1")
	cmd.WaitDelay = time.Second
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if text := strings.TrimSpace(stderr.String()); err != nil && text != "" {
		return errors.New(text)
	}
	// journalctl without the right to read shows nothing, and exits with 0.
	if err == nil && len(out) == 0 {
		return errors.New("there are no records of PID 1")
	}
	return err
}

// checkOwnTraffic is the proof from end to end: it sends a request, and the source
// must have counted it.
func (d *doctor) checkOwnTraffic(ctx context.Context) finding {
	switch {
	case d.cfg.Receiver.Source == receiver.EBPF:
		return d.checkOwnMeter(ctx)
	case d.m == nil:
		return skipped("systemd cannot be reached")
	}
	const fix = "systemd-run -p IPAccounting=yes --pipe --wait unitmeter doctor --here"
	var p dbus.ObjectPath
	// 0 is the caller, whatever its number is in systemd's namespace.
	err := d.m.Call(ctx, "GetUnitByPID", uint32(0)).Store(&p)
	var name string
	if err == nil {
		err = d.m.Get(ctx, p, bus.UnitInterface, "Id", &name)
	}
	if err != nil {
		return skippedUntil(fix, "this process belongs to no unit, so systemd has no counters for it")
	}
	// Only the growth counts: the unit has sent before, to ask all of this.
	u, err := d.m.Unit(ctx, name, p)
	before, counted, err2 := d.m.EgressBytes(ctx, u)
	if err := errors.Join(err, err2); err != nil {
		return failure("systemctl status "+name, "%v", err)
	}
	switch {
	case !u.On:
		return skippedUntil(fix, "this process is in %s, which has IP accounting off", name)
	case !counted:
		return failure("unitmeter enable "+name, "this process is in %s: IP accounting is on, and systemd has no counters", name)
	}
	// D-Bus is no IP: what the doctor said to systemd is not in the counter.
	what, err := d.speak(ctx)
	if err != nil {
		return failure("see the check of the endpoint", "nothing could be sent: %s", err)
	}
	for {
		after, counted, err := d.m.EgressBytes(ctx, u)
		if err != nil {
			return failure("systemctl status "+name, "%v", err)
		}
		if counted && after > before {
			return good("systemd counted %d bytes for %s while it sent %s", after-before, name, what)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return failure("systemctl set-property --runtime "+name+" IPAccounting=yes",
				"%s sent %s, and systemd counted nothing: its BPF programs are not attached, so a 0 may be wrong", name, what)
		}
	}
}

// speak sends something over IP: a request where there is an endpoint, else a
// datagram to this host.
func (d *doctor) speak(ctx context.Context) (what string, err error) {
	// What the agent will do is the better proof; a datagram to this host is
	// counted all the same, whether or not somebody takes it.
	if d.reachable {
		if ep, err := parseEndpoint(d.cfg.OTLP); err == nil && ep.network == "tcp" {
			if otlp.Probe(ctx, d.cfg.OTLP) == nil {
				return "an empty request to the Collector", nil
			}
		}
	}
	conn, err := new(net.Dialer).DialContext(ctx, "udp", "127.0.0.1:9")
	if err != nil {
		return "", err
	}
	_, err = conn.Write([]byte("unitmeter doctor"))
	return "a datagram to this host", errors.Join(err, conn.Close())
}
