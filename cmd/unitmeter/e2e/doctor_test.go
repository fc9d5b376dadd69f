package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// finding is one check in the report of the doctor.
type finding struct{ Name, Status, Found, Fix string }

// ward is a rig with the program installed in it.
type ward struct {
	*systemdtest.Rig
	t *testing.T
}

func newWard(t *testing.T) *ward {
	t.Helper()
	rig := systemdtest.Start(t)
	binary, err := agentBinary()
	if err != nil {
		t.Fatal(err)
	}
	// Every user must be able to run it.
	rig.Run(t, "install", "-m", "0755", binary, "/usr/bin/unitmeter")
	return &ward{rig, t}
}

// sh runs a shell command as root and fails the test if that fails.
func (w *ward) sh(command string) string {
	w.t.Helper()
	return w.Run(w.t, "sh", "-euc", command)
}

// asNobody runs a command without any privilege.
const asNobody = "setpriv --reuid=65534 --regid=65534 --init-groups --inh-caps=-all "

// doctor runs "unitmeter doctor --json" with something in front of it, such as
// variables or another user, in a shell.
func (w *ward) doctor(prefix string) map[string]finding {
	w.t.Helper()
	return w.report(prefix + " unitmeter doctor --here --json")
}

// report runs a command that prints the report of a doctor.
func (w *ward) report(command string) map[string]finding {
	w.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := w.Command(w.t.Context(), "sh", "-c", command)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run() // a fault is an exit code too
	var report struct {
		Worst  string
		Checks []finding
	}
	if bad := json.Unmarshal(stdout.Bytes(), &report); bad != nil {
		w.t.Fatalf("%s: %v, %v\n%s%s", command, err, bad, &stdout, &stderr)
	}
	findings := map[string]finding{}
	for _, f := range report.Checks {
		findings[f.Name] = f
	}
	if failed := report.Worst == "fail"; failed != (cmd.ProcessState.ExitCode() == 1) {
		w.t.Errorf("%s: exit code %d with the worst %s", command, cmd.ProcessState.ExitCode(), report.Worst)
	}
	return findings
}

// want fails unless a check has a status and its fix has a text.
func want(t *testing.T, findings map[string]finding, name, status, fix string) {
	t.Helper()
	f, ok := findings[name]
	if !ok || f.Status != status || !strings.Contains(f.Fix, fix) || (f.Fix == "") != (fix == "") {
		t.Errorf("check %q = %+v, want status %q and a fix with %q", name, f, status, fix)
	}
}

// forward lets the rig reach a server of this test at an address of its own.
func (w *ward) forward(inside, server string) {
	w.t.Helper()
	l, err := w.Listen(context.Background(), "tcp", inside)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", server)
			if err != nil {
				in.Close()
				continue
			}
			end := func() { in.Close(); out.Close() }
			context.AfterFunc(ctx, end)
			running.Go(func() { _, _ = io.Copy(in, out); end() })
			running.Go(func() { _, _ = io.Copy(out, in); end() })
		}
	})
	w.t.Cleanup(func() { l.Close(); stop(); running.Wait() })
}

// TestDoctorFixes plants 23 faults in a real systemd, one after the other. The
// doctor must name the fix; and the fix, applied as it is written, must help.
// TestDoctorEndpoint does the same with 25 faults of an endpoint, TestDoctorState
// with 3, TestDoctorEnvironment with 5, TestEnableLost with 1, TestDoctorAsAgent
// with 1: 58 in all.
func TestDoctorFixes(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	server := otlptest.Start(t, otlptest.Config{})
	w.forward("127.0.0.1:4317", server.Address())
	w.WriteFile(t, "/etc/systemd/system/demo.service", "[Service]\nExecStart=sleep infinity\n")
	w.sh("systemctl daemon-reload; systemctl start demo.service")

	const (
		system  = "UNITMETER_BUS=system "
		nowhere = "UNITMETER_STATE_DIR=/tmp/nowhere/state "
	)
	for _, test := range []struct {
		name   string
		plant  string // shell commands
		prefix string // of the doctor
		check  string
		status string
		fix    string // what the doctor must say
		// apply is what a person does with it: "" for the fix itself, as a
		// command; else commands or, with prefix set, nothing.
		apply string
		fixed string // the prefix after that, if it is another
	}{
		{name: "nothing is accounted", check: "accounting", status: "fail", fix: "unitmeter enable --default"},
		{name: "one service is not", plant: "unitmeter disable demo", check: "accounting", status: "warn", fix: "unitmeter enable demo.service"},
		{name: "default off", plant: "unitmeter disable --default", check: "accounting-default", status: "warn", fix: "unitmeter enable --default"},
		{name: "own unit not accounted", prefix: "systemd-run --quiet --pipe --wait -p IPAccounting=no", check: "own-traffic", status: "skip",
			fix: "systemd-run -p IPAccounting=yes --pipe --wait unitmeter doctor --here", apply: ":", fixed: "systemd-run --quiet --pipe --wait -p IPAccounting=yes"},
		{name: "dbus is stopped", plant: "systemctl stop dbus.socket dbus.service", prefix: system, check: "bus", status: "fail",
			fix: "systemctl start dbus.socket dbus.service"},
		{name: "socket for root only", plant: "chmod 0600 /run/dbus/system_bus_socket", prefix: nowhere + asNobody, check: "bus", status: "fail",
			fix: "chmod 0666 /run/dbus/system_bus_socket"},
		{name: "private socket as nobody", prefix: "UNITMETER_BUS=private " + nowhere + asNobody, check: "bus", status: "fail",
			fix: "set UNITMETER_BUS=system", apply: ":", fixed: system + nowhere + asNobody},
		{name: "wrong bus address", prefix: "UNITMETER_BUS=unix:path=/run/dbus/wrong", check: "bus", status: "fail",
			fix: "unset UNITMETER_BUS", apply: ":", fixed: "env"},
		{name: "no socket in a container", prefix: "unshare -m sh -c 'mount -t tmpfs none /run; touch /.dockerenv; unitmeter doctor --here --json'", check: "bus", status: "fail",
			fix: "-v /run/dbus/system_bus_socket:/run/dbus/system_bus_socket", apply: ":",
			fixed: "unshare -m sh -c 'mkdir -p /tmp/keep; mount --bind /run /tmp/keep; mount -t tmpfs none /run; mkdir /run/dbus; touch /run/dbus/system_bus_socket;" +
				"mount --bind /tmp/keep/dbus/system_bus_socket /run/dbus/system_bus_socket; unitmeter doctor --here --json'"},
		{name: "machine id of the container", prefix: "unshare -m sh -c 'echo 0123456789abcdef0123456789abcdef >/tmp/id; mount --bind /tmp/id /etc/machine-id; unitmeter doctor --here --json'",
			check: "machine", status: "warn", fix: "/etc/machine-id", apply: ":", fixed: "env"},
		{name: "cgroup v1", prefix: "unshare -m sh -c 'mount -t tmpfs none /sys/fs/cgroup; mkdir /sys/fs/cgroup/systemd; mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd; unitmeter doctor --here --json'",
			check: "cgroup", status: "fail", fix: "systemd.unified_cgroup_hierarchy=1", apply: ":", fixed: "env"},
		{name: "no right to the journal that is asked for", prefix: "UNITMETER_STOP_RECORDS=on " + nowhere + asNobody, check: "stop-records", status: "fail",
			fix: "usermod -aG systemd-journal nobody", apply: ":", fixed: nowhere},
		{name: "no right to the journal", prefix: nowhere + asNobody, check: "stop-records", status: "warn", fix: "usermod -aG systemd-journal nobody"},
		{name: "stop records off", prefix: "UNITMETER_STOP_RECORDS=off", check: "stop-records", status: "warn", fix: "unset UNITMETER_STOP_RECORDS", apply: ":", fixed: "env"},
		{name: "log level", plant: "systemd-analyze log-level notice", check: "stop-records", status: "warn", fix: "systemd-analyze log-level info", apply: "systemd-analyze log-level info"},
		{name: "log target", plant: "systemd-analyze log-target kmsg", check: "stop-records", status: "warn", fix: "systemd-analyze log-target journal", apply: "systemd-analyze log-target journal"},
		{name: "level that journald stores", plant: "mkdir -p /etc/systemd/journald.conf.d; printf '[Journal]\nMaxLevelStore=notice\n' >/etc/systemd/journald.conf.d/x.conf",
			check: "stop-records", status: "warn", fix: "MaxLevelStore=info", apply: "rm /etc/systemd/journald.conf.d/x.conf"},
		{name: "quiet unit", plant: "printf '[Service]\nIPAccounting=yes\nLogLevelMax=notice\nExecStart=sleep infinity\n' >/run/systemd/system/quiet.service; systemctl start quiet",
			check: "stop-records", status: "warn", fix: "systemctl edit quiet.service", apply: "systemctl stop quiet; rm /run/systemd/system/quiet.service"},
		{name: "state directory of another user", plant: "install -d -m 0700 -o daemon /var/lib/state", prefix: "UNITMETER_STATE_DIR=/var/lib/state", check: "state-directory", status: "fail",
			fix: "chown -R 0 /var/lib/state"},
		{name: "state directory writable by all", plant: "chmod 0777 /var/lib/state", prefix: "UNITMETER_STATE_DIR=/var/lib/state", check: "state-directory", status: "fail",
			fix: "chmod 0700 /var/lib/state"},
		{name: "state directory that cannot be made", prefix: "UNITMETER_STATE_DIR=/var/lib/theirs " + asNobody, check: "state-directory", status: "fail",
			fix: "install -d -m 0700 -o 65534 /var/lib/theirs", apply: "install -d -m 0700 -o 65534 /var/lib/theirs"},
		{name: "state on a read-only disk", prefix: "systemd-run --quiet --pipe --wait -E UNITMETER_STATE_DIR=/var/lib/state -p ReadOnlyPaths=/var/lib/state", check: "state-directory", status: "fail",
			fix: "StateDirectory=unitmeter", apply: ":", fixed: "systemd-run --quiet --pipe --wait -p StateDirectory=unitmeter"},
		{name: "state on a full disk", plant: "mkdir -p /full; mount -t tmpfs -o size=64k,mode=0700 none /full; dd if=/dev/zero of=/full/x bs=1k count=128 2>/dev/null || :", prefix: "UNITMETER_STATE_DIR=/full",
			check: "state-directory", status: "fail", fix: "df -h /full", apply: "umount /full; chmod 0700 /full"},
		{name: "only mounts are chosen", prefix: "UNITMETER_INCLUDE='nothing*'", check: "accounting", status: "fail", fix: "unset UNITMETER_INCLUDE", apply: ":", fixed: "env"},
		{name: "endpoint down", prefix: "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:9", check: "endpoint-connection", status: "fail",
			fix: "set OTEL_EXPORTER_OTLP_ENDPOINT", apply: ":", fixed: "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := &ward{w.Rig, t}
			if test.plant != "" {
				w.sh(test.plant)
			}
			command := func(prefix string) string {
				if strings.Contains(prefix, "unitmeter doctor") {
					return prefix
				}
				return prefix + " unitmeter doctor --here --json"
			}
			findings := w.report(command(test.prefix))
			want(t, findings, test.check, test.status, test.fix)
			apply := test.apply
			if apply == "" {
				apply = findings[test.check].Fix
			}
			w.sh(apply)
			fixed := test.prefix
			if test.fixed != "" {
				fixed = test.fixed
			}
			want(t, w.report(command(fixed)), test.check, "ok", "")
		})
	}

	// What is left is what nothing in here can fix: nobody sets this clock.
	findings := w.doctor("systemd-run --quiet --pipe --wait -p IPAccounting=yes -p StateDirectory=unitmeter")
	delete(findings, "clock")
	for name, f := range findings {
		if f.Status == "warn" || f.Status == "fail" {
			t.Errorf("after all fixes: %s: %+v", name, f)
		}
	}
	if f := findings["own-traffic"]; f.Status != "ok" || !strings.Contains(f.Found, "an empty request to the Collector") {
		t.Errorf("the proof: %+v", f)
	}
}

// TestDoctorAsAgent makes the checks as the installed agent would.
func TestDoctorAsAgent(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	unit, err := os.ReadFile(filepath.Join("..", "..", "..", "packaging", "unitmeter.service"))
	if err != nil {
		t.Fatal(err)
	}
	server := otlptest.Start(t, otlptest.Config{Decide: func(r otlptest.Request) otlptest.Answer {
		if r.Header["x-token"] != "sesame" {
			return otlptest.Answer{Code: 16} // Unauthenticated
		}
		return otlptest.Answer{}
	}})
	w.forward("127.0.0.1:5317", server.Address())
	w.sh("useradd --system --no-create-home unitmeter")
	w.WriteFile(t, "/etc/systemd/system/unitmeter.service", string(unit))
	w.WriteFile(t, "/etc/unitmeter/unitmeter.env", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:5317\n")
	w.sh("systemctl daemon-reload")

	const settings = "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:5317\nOTEL_METRIC_EXPORT_INTERVAL=1000\nOTEL_EXPORTER_OTLP_TIMEOUT=5000\n"
	findings := w.report("unitmeter doctor --json 2>/dev/null")
	want(t, findings, "collector", "fail", "UNITMETER_OTLP_HEADERS_FILE")
	want(t, findings, "agent", "warn", "systemctl enable --now unitmeter.service")
	want(t, findings, "own-traffic", "ok", "")
	if found := findings["user"].Found; !strings.Contains(found, "(unitmeter)") {
		t.Errorf("user: %s", found)
	}
	if found := findings["state-directory"].Found; !strings.Contains(found, "/var/lib/unitmeter, mode 0700") {
		t.Errorf("state-directory: %s", found)
	}
	w.WriteFile(t, "/etc/unitmeter/unitmeter.env", settings)
	w.sh(findings["agent"].Fix)
	// The requests that cannot be delivered wait, and the agent says why.
	eventually(w.t, "the doctor sees the backlog and its reason", func() bool {
		findings = w.report("unitmeter doctor --json 2>/dev/null")
		return strings.Contains(findings["outbox"].Found, "Unauthenticated")
	})
	want(t, findings, "outbox", "warn", findings["collector"].Fix)
	// The secret as docs/install.md has it, in a credential. systemd mounts those in
	// a namespace of its own, from where they reach a shared tree only.
	example, err := os.ReadFile(filepath.Join("..", "..", "..", "packaging", "examples", "credentials.conf"))
	if err != nil {
		t.Fatal(err)
	}
	w.WriteFile(t, "/etc/systemd/system/unitmeter.service.d/credentials.conf", string(example))
	w.WriteFile(t, "/etc/unitmeter/otlp-headers", "x-token=sesame\n")
	w.sh("chmod 0600 /etc/unitmeter/otlp-headers; mount --make-rshared /; systemctl daemon-reload")
	w.sh("usermod -aG systemd-journal unitmeter; unitmeter enable --default; systemctl restart unitmeter.service")
	eventually(w.t, "the backlog is sent", func() bool {
		findings = w.report("unitmeter doctor --json 2>/dev/null")
		return findings["outbox"].Status == "ok"
	})
	delete(findings, "clock")
	delete(findings, "ebpf") // systemd counts here
	for name, f := range findings {
		if f.Status != "ok" {
			t.Errorf("after the fixes: %s: %+v", name, f)
		}
	}
	if found := findings["collector"].Found; !strings.Contains(found, "1 headers") {
		t.Errorf("collector: %s", found)
	}
	if found := findings["state-directory"].Found; !strings.Contains(found, "in use by process") {
		t.Errorf("the agent's lock is not seen: %s", found)
	}
	// Root's own directory is that of an agent tried by hand.
	w.sh("UNITMETER_STATE_DIR=/root/.local/state/unitmeter unitmeter run & until [ -e /root/.local/state/unitmeter/unitmeter.db ]; do kill -0 $!; sleep .05; done; kill $!; wait $! || :")
	if out := w.sh("unitmeter history"); !strings.Contains(out, " unitmeter.service\n") {
		t.Errorf("history does not read the service's directory:\n%s", out)
	}
	// A program that only root can reach, as in a checkout below /root.
	if out := w.sh("install -D /usr/bin/unitmeter /root/out/of/reach; chmod 0700 /root; /root/out/of/reach doctor 2>&1 || :"); !strings.HasPrefix(out, "cannot check as unitmeter.service does (the user unitmeter may not run /root/out/of/reach)") {
		t.Errorf("a program out of reach: %s", out)
	}
	// Variables in the shell are there to be checked, with the shell's user.
	findings = w.report("OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:9 unitmeter doctor --json")
	want(t, findings, "endpoint-connection", "fail", "set OTEL_EXPORTER_OTLP_ENDPOINT")
}

// TestEnableDisable changes a real systemd and reads what became of it with
// systemctl.
func TestEnableDisable(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.WriteFile(t, "/etc/systemd/system/one.service", "[Service]\nExecStart=sleep infinity\n[Install]\nAlias=uno.service\n")
	w.WriteFile(t, "/etc/systemd/system/two.service", "[Service]\nExecStart=sleep infinity\n")
	w.WriteFile(t, "/etc/systemd/system/idle.service", "[Service]\nExecStart=sleep infinity\n")
	w.sh("systemctl daemon-reload; systemctl enable one.service; systemctl start one.service two.service")
	w.sh("systemd-run --quiet --unit=three sleep infinity")
	accounting := func(unit string) string {
		return strings.TrimSpace(w.Run(t, "systemctl", "show", "-P", "IPAccounting", unit))
	}
	files := func() string {
		return strings.ReplaceAll(strings.TrimSpace(w.sh("find /etc/systemd/system.control /run/systemd/system.control /run/systemd/transient -name '*.conf' 2>/dev/null || :; find /etc/systemd/system.conf.d -type f 2>/dev/null || :")), "\n", " ")
	}
	// fails runs a command that must fail with a text.
	fails := func(code int, text string, command string) {
		t.Helper()
		cmd := w.Command(t.Context(), "sh", "-c", command)
		out, _ := cmd.CombinedOutput() // the code is checked
		if got := cmd.ProcessState.ExitCode(); got != code || !strings.Contains(string(out), text) {
			t.Errorf("%s: exit code %d, want %d, with %q:\n%s", command, got, code, text, out)
		}
	}

	dry := w.sh("unitmeter enable one two --dry-run")
	for _, want := range []string{`SetUnitProperties("one.service", false, [IPAccounting=true])`, "/etc/systemd/system.control/two.service.d/50-IPAccounting.conf", "systemctl set-property one.service IPAccounting=yes"} {
		if !strings.Contains(dry, want) {
			t.Errorf("the dry run has no %q:\n%s", want, dry)
		}
	}
	if accounting("one.service") != "no" || files() != "" {
		t.Errorf("the dry run changed something: %s", files())
	}
	fails(1, `find unit "nosuch.service"`, "unitmeter enable one nosuch")
	if accounting("one.service") != "no" {
		t.Error("one.service was changed although another name was wrong")
	}
	fails(1, `"basic.target"`, "unitmeter enable basic.target")
	fails(1, `no loaded unit`, "unitmeter enable 'nosuch*'")
	fails(1, "sudo unitmeter enable one.service", asNobody+"unitmeter enable one")
	fails(1, "sudo unitmeter enable --all", asNobody+"unitmeter enable --all")
	fails(1, "sudo unitmeter enable --default", asNobody+"unitmeter enable --default")

	// Under an alias, persistent, and at once.
	if out := w.sh("unitmeter enable uno"); out != "one.service: IP accounting is on from now on; counting from 0\n" {
		t.Errorf("enable uno: %q", out)
	}
	if a := w.Show(t, "one.service"); !a.OK || accounting("one.service") != "yes" || files() != "/etc/systemd/system.control/one.service.d/50-IPAccounting.conf" {
		t.Errorf("one.service: %+v, %s", a, files())
	}
	for _, command := range []string{"once", "units", "top --once"} {
		if out := w.sh("unitmeter " + command + " uno"); !strings.Contains(out, "one.service") {
			t.Errorf("%s uno: %q", command, out)
		}
	}
	if out := w.sh("unitmeter enable one"); out != "one.service: IP accounting is already on\n" {
		t.Errorf("enable again: %q", out)
	}
	// A pattern, until the next boot; a transient unit never gets a file in /etc.
	w.sh("unitmeter enable --runtime 'tw*.service'; unitmeter enable three")
	if got := files(); strings.Contains(got, "/etc/systemd/system.control/t") || !strings.Contains(got, "/run/systemd/system.control/two.service.d") || !strings.Contains(got, "/run/systemd/transient/three.service.d") {
		t.Errorf("files: %s", got)
	}
	// What was until the next boot becomes what stays, and goes on counting.
	if out := w.sh("unitmeter enable two"); out != "two.service: IP accounting stays on, also after the next boot\n" || !strings.Contains(files(), "/etc/systemd/system.control/two.service.d") {
		t.Errorf("enable two for good: %q, %s", out, files())
	}
	// systemd would forget the one for the other at the next reload.
	w.sh("unitmeter disable two")
	fails(1, "two.service.d/50-IPAccounting.conf says no, which would win at the next daemon-reload; use \"unitmeter enable two.service\"", "unitmeter enable --runtime two")
	w.sh("unitmeter enable two")
	// A unit that does not run counts when it starts.
	if out := w.sh("unitmeter enable idle"); !strings.Contains(out, "counting begins when the unit starts") {
		t.Errorf("enable idle: %q", out)
	}
	w.sh("systemctl start idle.service")
	if !w.Show(t, "idle.service").OK {
		t.Error("idle.service does not count")
	}
	// systemd mounts it with a program, and keeps its cgroup.
	w.WriteFile(t, "/etc/systemd/system/mnt.mount", "[Mount]\nWhat=none\nWhere=/mnt\nType=tmpfs\n")
	w.sh("systemctl daemon-reload; systemctl start mnt.mount")
	if cgroup := w.Run(t, "systemctl", "show", "-P", "ControlGroup", "mnt.mount"); cgroup == "\n" {
		t.Error("mnt.mount has no cgroup: the test shows nothing")
	}
	w.sh("unitmeter enable --all --runtime")
	if got := files(); !strings.Contains(got, "/run/systemd/system.control/dbus.service.d") || strings.Contains(got, "/etc/systemd/system.control/dbus.service.d") {
		t.Errorf("enable --all --runtime: files: %s", got)
	}
	w.sh("unitmeter enable --all")
	if got := files(); !strings.Contains(got, "/etc/systemd/system.control/dbus.service.d") || strings.Contains(got, ".mount.d") {
		t.Errorf("enable --all: files: %s", got)
	}
	if out := w.sh("unitmeter enable --all; unitmeter once"); !strings.HasPrefix(out, "nothing to do: ") || strings.Contains(out, "unitmeter enable") {
		t.Errorf("after enable --all: %s", out)
	}
	// systemd changes nothing of a masked unit, so nobody is told to.
	w.sh("printf '[Service]\nExecStart=sleep infinity\n' >/run/systemd/system/hidden.service; systemctl start hidden; systemctl mask hidden")
	if out := w.sh("unitmeter units hidden; unitmeter enable --all; unitmeter doctor --here || :"); !strings.Contains(out, "masked unit") || strings.Contains(out, "unitmeter enable hidden") || strings.Contains(out, "hidden.service: ") {
		t.Errorf("with a masked unit: %s", out)
	}
	w.sh("systemctl stop hidden; systemctl unmask hidden; rm /run/systemd/system/hidden.service")
	w.sh("unitmeter disable --all; unitmeter enable idle; unitmeter disable --reset")
	if files() != "" || accounting("idle.service") != "no" {
		t.Errorf("after disable --reset there are %s", files())
	}
	if out := w.sh("unitmeter disable --reset"); !strings.HasPrefix(out, "nothing to do: ") {
		t.Errorf("disable --reset again: %s", out)
	}
	w.sh("unitmeter disable one two three idle")
	for _, unit := range []string{"one", "two", "three", "idle"} {
		if accounting(unit+".service") != "no" {
			t.Errorf("%s is still on", unit)
		}
	}
	// A file that systemd cannot write is no error to it.
	w.sh("systemctl revert two.service; mount --bind /etc /etc; mount -o remount,bind,ro /etc")
	fails(1, "systemd could not write /etc/systemd/system.control/two.service.d/50-IPAccounting.conf, so it is on until the next boot only", "unitmeter enable two")
	w.sh("umount /etc; systemctl daemon-reload")
	if accounting("two.service") != "yes" {
		t.Error("two.service is not on until the next boot")
	}
	if out := w.sh("unitmeter enable two; unitmeter disable two"); !strings.HasPrefix(out, "two.service: IP accounting stays on") {
		t.Errorf("with a writable /etc: %s", out)
	}
	// By default: all that has no setting of its own.
	before := accounting("systemd-journald.service")
	dry = w.sh("unitmeter enable --default --dry-run")
	if !strings.Contains(dry, "DefaultIPAccounting=yes") || strings.Contains(files(), "50-unitmeter") {
		t.Errorf("dry run of --default: %s", dry)
	}
	w.sh("unitmeter enable --default")
	if now := accounting("systemd-journald.service"); before != "no" || now != "yes" || !strings.Contains(files(), "/etc/systemd/system.conf.d/50-unitmeter.conf") {
		t.Errorf("by default: %s, then %s, files %s", before, now, files())
	}
	w.sh("unitmeter disable --default")
	if now := accounting("systemd-journald.service"); now != "no" || strings.Contains(files(), "50-unitmeter") {
		t.Errorf("after disable --default: %s, files %s", now, files())
	}
	if out := w.sh("unitmeter disable --default"); !strings.HasPrefix(out, "nothing to do") {
		t.Errorf("a second time: %q", out)
	}
	w.sh("unitmeter enable --default --runtime")
	fails(1, "still has yes because of another file", "unitmeter disable --default")
	w.sh("unitmeter disable --default --runtime")
	// What another file overrides is told, and another's file is not removed.
	w.WriteFile(t, "/etc/systemd/system.conf.d/90-local.conf", "[Manager]\nDefaultIPAccounting=no\n")
	fails(1, "because of another file", "unitmeter disable --all >/dev/null; unitmeter enable --default")
	w.WriteFile(t, "/etc/systemd/system.conf.d/50-unitmeter.conf", "# mine\n")
	fails(1, "was not written by unitmeter", "unitmeter disable --default")
	fails(1, "was not written by unitmeter", "unitmeter enable --default")
}
