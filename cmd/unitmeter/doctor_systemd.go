package main

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

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/receiver"
)

// noBus is the finding of checks that need systemd and cannot reach it.
func noBus() finding { return skipped("systemd cannot be reached") }

// checkBus connects to systemd as the agent would.
func (d *doctor) checkBus(ctx context.Context) finding {
	m, err := openManager(ctx, d.cfg.Receiver.Addresses()...)
	if err == nil {
		// A bus without systemd on it is no use.
		var version string
		if err = m.get(ctx, managerPath, managerInterface, "Version", &version); err != nil {
			err = &busError{m.address, fmt.Errorf("use systemd at %s: %w", m.address, err)}
			m.close()
		}
	}
	if err != nil {
		return busFailure(err, booted(), container(), apparmor())
	}
	d.m = m
	if m.address == receiver.PrivateBus {
		return good("PID 1's own socket answers (%s), at half the cost of the system bus", m.address)
	}
	return good("systemd answers at %s", m.address)
}

// booted reports whether systemd is the init of this system (sd_booted(3)).
func booted() bool {
	// The directory is there from early boot on, wherever systemd is process 1.
	info, err := os.Stat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// busFailure says what to do about a bus that cannot be used. The last address
// that was tried is the one that most systems have.
func busFailure(err error, booted bool, container, profile string) finding {
	address := receiver.UsualSystemBus
	var last *busError
	// As root two addresses were tried. The private socket is there or not; what
	// is wrong with the bus can be mended.
	for _, e := range flatten(err) {
		if errors.As(e, &last) {
			address = last.address
		}
	}
	found := strings.ReplaceAll(err.Error(), "\n", "; ")
	if last != nil {
		err = last
	}
	socket := strings.TrimPrefix(address, "unix:path=")
	mount := fmt.Sprintf("mount the host's socket into the container: -v %s:%[1]s", socket)
	if container == "kubernetes" {
		mount = "mount the host's socket into the pod: a hostPath volume of " + socket
	}
	switch {
	case address != receiver.UsualSystemBus && address != receiver.PrivateBus && errors.Is(err, fs.ErrNotExist):
		return failure("unset UNITMETER_BUS and DBUS_SYSTEM_BUS_ADDRESS, or name a socket that exists", "%s", found)
	// Containers first: what mends a host does nothing in them.
	case errors.Is(err, fs.ErrNotExist) && container != "" && !booted:
		return failure(mount, "%s; this is a container (%s)", found, container)
	case errors.Is(err, fs.ErrNotExist) && !booted:
		return failure("run unitmeter on a host whose init is systemd", "%s; systemd is not the init of this system", found)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return failure("systemctl start dbus.socket dbus.service", "%s", found)
	// dbus-daemon says so in the text of its refusal.
	case denied(err) && strings.Contains(err.Error(), "AppArmor"):
		return failure("run the container with --security-opt apparmor=unconfined", "%s (profile %s)", found, profile)
	case address == receiver.PrivateBus && os.Geteuid() != 0: // systemd 247 takes the connection, and cuts it
		return failure("set UNITMETER_BUS=system, or run it as root", "%s", found)
	// A profile refuses with the same error as the mode of the socket.
	case errors.Is(err, fs.ErrPermission) && profile != "":
		return failure("run it without the AppArmor profile "+profile+" (--security-opt apparmor=unconfined)", "%s", found)
	case errors.Is(err, fs.ErrPermission):
		return failure("chmod 0666 "+socket, "%s; every user may open it on most systems", found)
	case strings.Contains(err.Error(), "REJECTED"):
		return failure("use a static user (no DynamicUser=yes), and no user namespace (docker: --userns=host)", "%s; the bus does not know uid %d", found, os.Geteuid())
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
		return failure("systemctl restart dbus.service", "%s: no answer", found)
	// A bus of a user's session, or of a container.
	case dbusErrorIs(err, "org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner", "org.freedesktop.DBus.Error.Spawn.ChildExited"):
		return failure("set DBUS_SYSTEM_BUS_ADDRESS to the bus of the host, or unset it", "%s; systemd is not on this bus", found)
	}
	return failure("set UNITMETER_BUS=auto and DBUS_SYSTEM_BUS_ADDRESS="+receiver.UsualSystemBus, "%s", found)
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
	if d.m == nil {
		return noBus()
	}
	var text string
	if err := d.m.get(ctx, managerPath, managerInterface, "Version", &text); err != nil {
		return failure("systemctl --version", "%v", err)
	}
	// Distributions put their own revision behind it.
	v, err := parseSystemdVersion(text)
	if err != nil {
		return warning("systemctl --version", "%v", err)
	}
	d.version = v
	return versionFinding(v, text)
}

// versionFinding has the bugs that make numbers wrong or missing. Those that the
// receiver works around without a loss are left out.
func versionFinding(v systemdVersion, text string) finding {
	switch {
	case v.before(235, 0):
		return failure("upgrade to systemd 249 or later", "systemd %s has no IP accounting, which came with 235", text)
	case v.before(249, 0):
		return warning("upgrade to systemd 249 or later", "systemd %s stops counting for the length of each daemon-reload (systemd#17489)", text)
	case v.before(256, 0):
		return good("systemd %s", text)
	case v.before(256, 3):
		return warning("upgrade to systemd 258.1 or later",
			"systemd %s drops the counters of a unit when it stops (systemd#33149) and of all running units at a daemon-reload (systemd#38112)", text)
	case v.before(258, 0):
		return warning("upgrade to systemd 258.1 or later",
			"systemd %s loses the counters of running units at each daemon-reload (systemd#38112), until \"unitmeter enable --lost\"; unitmeter shows such units as lost, and never as 0", text)
	case v.before(258, 1):
		return warning("upgrade to systemd 258.1 or later", "systemd %s begins to count from 0 at each daemon-reload (systemd#39130)", text)
	}
	return good("systemd %s", text)
}

// checkMachine finds a container that would give the host's metrics a name of
// its own.
func (d *doctor) checkMachine(ctx context.Context) finding {
	if d.m == nil {
		return noBus()
	}
	where := "not in a container"
	if c := container(); c != "" {
		where = "in a container (" + c + ")"
	}
	if profile := apparmor(); profile != "" {
		where += ", AppArmor profile " + profile
	}
	// Over D-Bus it is the id of the host, read by systemd; the file is that of
	// this mount namespace.
	var host string
	err := d.m.conn.Object(systemdName, managerPath).
		CallWithContext(ctx, "org.freedesktop.DBus.Peer.GetMachineId", 0).Store(&host)
	if err != nil {
		return skipped("%s; systemd does not tell its machine id: %v", where, err)
	}
	const file = "/etc/machine-id"
	const mend = "mount /etc/machine-id of the host into the container, read-only: -v /etc/machine-id:/etc/machine-id:ro"
	own, err := os.ReadFile(file)
	if err != nil {
		return warning(mend, "%s; %v: host.id and service.instance.id cannot be made from it", where, err)
	}
	if id := strings.TrimSpace(string(own)); id != host {
		return warning(mend, "%s; %s says %s, and systemd runs on machine %s: host.id would be wrong", where, file, id, host)
	}
	return good("%s; the machine id is that of systemd's host", where)
}

// readUnits reads all units that the configuration asks for, once.
func (d *doctor) readUnits(ctx context.Context) error {
	// Two checks ask for it.
	if d.unitsRead {
		return nil
	}
	cfg := d.cfg.Receiver
	cfg.SweepTimeout = 0 // ctx is shorter
	units, err := readOnce(ctx, cfg, 0)
	if err == nil {
		d.units, d.unitsRead = units, true
	}
	return err
}

// inState returns the names of the units in a state.
func (d *doctor) inState(state string) []string {
	var names []string
	for _, u := range d.units {
		if u.Accounting == state {
			names = append(names, u.Name)
		}
	}
	return names
}

// checkDefault tells whether units to come are counted by themselves.
func (d *doctor) checkDefault(ctx context.Context) finding {
	if d.m == nil {
		return noBus()
	}
	switch on, err := d.m.defaultAccounting(ctx); {
	case err != nil:
		return failure("systemctl show -p DefaultIPAccounting", "%v", err)
	case !on:
		return warning("unitmeter enable --default", "DefaultIPAccounting=no: units to come are not counted, unless they ask for it")
	}
	return good("DefaultIPAccounting=yes: units to come are counted too")
}

// oneLine makes one line of a joined error.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", ": ") }

// checkAccounting counts the units that are not counted.
func (d *doctor) checkAccounting(ctx context.Context) finding {
	if d.m == nil {
		return noBus()
	}
	if err := d.readUnits(ctx); err != nil {
		return failure("unitmeter once", "%s", oneLine(err))
	}
	// They are off on most hosts, and have nothing to count.
	off := slices.DeleteFunc(d.inState("off"), func(name string) bool { return !carriesTraffic(name) })
	on := len(d.inState("on"))
	switch {
	case len(d.units) == 0:
		return failure("unset UNITMETER_INCLUDE, UNITMETER_EXCLUDE and UNITMETER_UNIT_TYPES", "no running unit is among those to meter")
	case len(off) > 0 && on == 0:
		return failure("unitmeter enable --all", "%d units have IP accounting off and none has counters, so there is nothing to send", len(off))
	case len(off) > 0:
		return warning(enableCommand(off), "%d of %d units have IP accounting off; \"unitmeter units\" lists them", len(off), len(d.units))
	}
	return good("no unit has IP accounting off but mounts that nothing serves; %d have counters", on)
}

// checkCounters tells a systemd that lost the counters of some units from one
// that cannot count at all, since the kernel or a container keeps BPF from it.
func (d *doctor) checkCounters(ctx context.Context) finding {
	if d.m == nil {
		return noBus()
	}
	if err := d.readUnits(ctx); err != nil {
		return failure("unitmeter once", "%s", oneLine(err))
	}
	var virtualization string
	_ = d.m.get(ctx, managerPath, managerInterface, "Virtualization", &virtualization) // a hint only
	return countersFinding(d.inState("on"), d.inState("lost"), d.inState("failed"), virtualization, d.version)
}

// countersFinding decides between one lost unit, the reload bug, and no BPF at
// all: without BPF no unit has counters, whatever the version.
func countersFinding(on, lost, failed []string, virtualization string, v systemdVersion) finding {
	// With the bug, all units lost after a reload is what is to be expected, and
	// says nothing of BPF.
	reloadBug := !v.before(256, 0) && v.before(258, 0)
	switch {
	case len(failed) > 0:
		return warning("report it, with the output of: systemctl show "+shellWord(failed[0]), "the counters of %s make no sense", list(failed))
	case len(lost) > 0 && (len(on) > 0 || reloadBug):
		return warning("unitmeter enable --lost", "systemd has lost the counters of %s", list(lost))
	case len(lost) > 0 && slices.Contains([]string{"docker", "lxc", "lxc-libvirt", "podman", "container-other", "systemd-nspawn", "openvz"}, virtualization):
		return failure("run unitmeter on the host of this container, and meter the container's unit there",
			"IP accounting is on and no unit has counters: systemd is in a container (%s) that may not use BPF", virtualization)
	case len(lost) > 0:
		return failure("boot a kernel with CONFIG_CGROUP_BPF=y and without a lockdown of BPF; why systemd cannot: journalctl -b _PID=1 -g BPF",
			"IP accounting is on and no unit has counters: systemd cannot use BPF for %s", list(lost))
	case len(on) == 0:
		return skipped("no running unit has IP accounting on, so that nothing can be told")
	}
	return good("systemd has counters for %d units", len(on))
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
		return warning("unset UNITMETER_STOP_RECORDS", "UNITMETER_STOP_RECORDS=off: what a unit sends between the last sweep and its end is not seen")
	}
	return stopRecordsFinding(mode, tryJournal(ctx))
}

// stopRecordsFinding judges why the journal cannot be read: an error only where the
// settings ask for it.
func stopRecordsFinding(mode string, err error) finding {
	if err == nil {
		return good("systemd's stop records can be read in the journal")
	}
	bad := warning
	if mode == "on" {
		bad = failure
	}
	next := "usermod -aG systemd-journal " + userName(os.Geteuid())
	if errors.Is(err, exec.ErrNotFound) {
		next = "run the agent as root, or where there is a journalctl"
	}
	return bad(next, "the last bytes of units that end are missed, since the journal cannot be read: %s", oneLine(err))
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
	// journalctl without a right shows nothing, and calls that success.
	if err == nil && len(out) == 0 {
		return errors.New("it has no records of PID 1")
	}
	return err
}

// checkOwnTraffic is the proof from end to end: it sends a request, and systemd
// must have counted it.
func (d *doctor) checkOwnTraffic(ctx context.Context) finding {
	if d.m == nil {
		return noBus()
	}
	const mend = "systemd-run -p IPAccounting=yes --pipe --wait unitmeter doctor --here"
	var p dbus.ObjectPath
	// 0 is the caller, whatever its number is in systemd's namespace.
	err := d.m.call(ctx, "GetUnitByPID", uint32(0)).Store(&p)
	var u accountedUnit
	if err == nil {
		err = d.m.get(ctx, p, unitInterface, "Id", &u.name)
	}
	if err != nil {
		return skippedUntil(mend, "this process belongs to no unit, so it cannot be seen what systemd counts for it")
	}
	if u, err = d.m.unit(ctx, u.name, p); err != nil {
		return failure("systemctl status "+u.name, "%v", err)
	}
	if !u.on {
		return skippedUntil(mend, "this runs in %s, which has IP accounting off", u.name)
	}
	if !u.hasData {
		return failure("unitmeter enable "+u.name, "this runs in %s: IP accounting is on, and systemd has no counters", u.name)
	}
	// Only the growth counts: the unit has sent before, to ask all of this.
	var before, after uint64
	if err := d.m.get(ctx, p, u.iface, "IPEgressBytes", &before); err != nil {
		return failure("systemctl status "+u.name, "%v", err)
	}
	// D-Bus is no IP: what the doctor said to systemd is not in the counter.
	what, err := d.speak(ctx)
	if err != nil {
		return failure("see the check of the endpoint", "nothing could be sent: %s", oneLine(err))
	}
	for {
		if err := d.m.get(ctx, p, u.iface, "IPEgressBytes", &after); err != nil {
			return failure("systemctl status "+u.name, "%v", err)
		}
		if after != noData && after > before {
			return good("systemd counted %d bytes for %s while it sent %s", after-before, u.name, what)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return failure("systemctl set-property --runtime "+u.name+" IPAccounting=yes",
				"%s sent %s, and systemd counted nothing: its BPF programs are not attached, so all zeros are false", u.name, what)
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
			if exporter.Probe(ctx, d.cfg.OTLP) == nil {
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
