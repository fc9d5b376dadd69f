// Package packaging_test builds the packages and uses them as their users do: a
// real dpkg and rpm, in a real systemd.
package packaging_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	colmetricpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// epoch is the SOURCE_DATE_EPOCH of all builds here: 2026-11-01 00:00 UTC.
const epoch = "1793491200"

// build runs build.sh of the tree at root and returns the directory of the
// packages.
func build(t testing.TB, root, version string, env []string, formats ...string) string {
	t.Helper()
	out := t.TempDir()
	cmd := exec.Command(filepath.Join(root, "packaging/build.sh"), append([]string{version, "amd64", out}, formats...)...)
	cmd.Env = append(append(os.Environ(), "SOURCE_DATE_EPOCH="+epoch), env...)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build.sh %s: %v\n%s", version, err, text)
	}
	return out
}

func TestPackages(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	// A copy, so that nobody edits the source between two builds.
	source := filepath.Join(t.TempDir(), "source")
	for _, name := range []string{"cmd", "config", "exporter", "receiver", "packaging", "go.mod", "go.sum", "Makefile", "LICENSE"} {
		if err := copyTree(filepath.Join(root, name), filepath.Join(source, name)); err != nil {
			t.Fatal(err)
		}
	}
	first := build(t, source, "0.1.0", nil)
	second := build(t, source, "v0.2.0", nil, "deb", "rpm")
	t.Run("reproducible", func(t *testing.T) { testReproducible(t, source, first) })
	t.Run("contents", func(t *testing.T) { testContents(t, first) })
	t.Run("deb", func(t *testing.T) { testDeb(t, root, first, second) })
	t.Run("rpm", func(t *testing.T) { testRPM(t, first, second) })
	t.Run("scratch container", func(t *testing.T) { testScratch(t, first) })
}

// The same source gives the same bytes in another place, at another time, in
// another time zone, and with other rights for new files.
func testReproducible(t *testing.T, source, first string) {
	elsewhere := filepath.Join(t.TempDir(), "a", "longer", "path")
	if err := copyTree(source, elsewhere); err != nil {
		t.Fatal(err)
	}
	wrapper := filepath.Join(elsewhere, "packaging/build.sh")
	text, err := os.ReadFile(wrapper)
	if err != nil {
		t.Fatal(err)
	}
	strange := bytes.Replace(text, []byte("set -euo pipefail\n"), []byte("set -euo pipefail\numask 077\n"), 1)
	if err := os.WriteFile(wrapper, strange, 0o755); err != nil {
		t.Fatal(err)
	}
	again := build(t, elsewhere, "0.1.0", []string{"TZ=Asia/Tokyo", "LC_ALL=C.UTF-8", "USER=somebody"})
	files, err := os.ReadDir(first)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 4 {
		t.Fatalf("%d files were built, want 4: %v", len(files), files)
	}
	for _, f := range files {
		a, err := os.ReadFile(filepath.Join(first, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(again, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s is not the same in a second build", f.Name())
		}
	}
}

// copyTree copies with the times of now, so that a build that takes them from
// the files is found out.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if d.IsDir() {
			return os.MkdirAll(target, 0o755)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, text, info.Mode().Perm())
	})
}

// Each format has the same files, with the same rights.
func testContents(t *testing.T, dir string) {
	want := map[string]string{ // in the package, with its mode
		"usr/bin/unitmeter":                                    "-rwxr-xr-x",
		"usr/lib/systemd/system/unitmeter.service":             "-rw-r--r--",
		"usr/lib/systemd/system/unitmeter-meter.service":       "-rw-r--r--",
		"usr/lib/systemd/system/unitmeter-rearm.service":       "-rw-r--r--",
		"usr/lib/sysusers.d/unitmeter.conf":                    "-rw-r--r--",
		"etc/unitmeter/unitmeter.env":                          "-rw-r-----",
		"usr/share/man/man8/unitmeter.8.gz":                    "-rw-r--r--",
		"usr/share/bash-completion/completions/unitmeter":      "-rw-r--r--",
		"usr/share/fish/vendor_completions.d/unitmeter.fish":   "-rw-r--r--",
		"usr/share/doc/unitmeter/examples/credentials.conf":    "-rw-r--r--",
		"usr/share/doc/unitmeter/examples/unitmeter-ebpf.conf": "-rw-r--r--",
		"usr/share/doc/unitmeter/LICENSES.gz":                  "-rw-r--r--",
		"usr/share/doc/unitmeter/examples/stop-records.conf":   "-rw-r--r--",
	}
	list := map[string]*exec.Cmd{
		"unitmeter_0.1.0_amd64.deb":    exec.Command("dpkg-deb", "-c", "unitmeter_0.1.0_amd64.deb"),
		"unitmeter-0.1.0-1.x86_64.rpm": exec.Command("rpm", "-qplv", "unitmeter-0.1.0-1.x86_64.rpm"),
		"unitmeter_0.1.0_x86_64.apk":   exec.Command("tar", "-tvzf", "unitmeter_0.1.0_x86_64.apk", "--warning=no-unknown-keyword"),
	}
	for name, cmd := range list {
		cmd.Dir = dir
		out := output(t, cmd)
		got := map[string]string{}
		for line := range strings.Lines(out) {
			fields := strings.Fields(line)
			got[strings.TrimLeft(fields[len(fields)-1], "./")] = fields[0]
		}
		for file, mode := range want {
			if got[file] != mode {
				t.Errorf("%s: %s has mode %q, want %q", name, file, got[file], mode)
			}
		}
	}
	archive := output(t, exec.Command("tar", "-tzf", filepath.Join(dir, "unitmeter-0.1.0-linux-amd64.tar.gz")))
	for _, file := range []string{"unitmeter", "unitmeter.service", "unitmeter.sysusers", "unitmeter.env", "unitmeter.8", "LICENSES", "completion/_unitmeter", "examples/credentials.conf"} {
		if !strings.Contains(archive, "unitmeter-0.1.0-linux-amd64/"+file+"\n") {
			t.Errorf("%s is not in the archive:\n%s", file, archive)
		}
	}
	// Every module that is linked in has its licence in the file.
	modules := output(t, exec.Command("tar", "-xzOf", filepath.Join(dir, "unitmeter-0.1.0-linux-amd64.tar.gz"), "unitmeter-0.1.0-linux-amd64/LICENSES"))
	program := filepath.Join(t.TempDir(), "unitmeter")
	if err := os.WriteFile(program, []byte(output(t, exec.Command("tar", "-xzOf", filepath.Join(dir, "unitmeter-0.1.0-linux-amd64.tar.gz"), "unitmeter-0.1.0-linux-amd64/unitmeter"))), 0o755); err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile("../LICENSE")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(modules, "unitmeter\n=========\n\n"+string(own)) {
		t.Error("our own licence is missing")
	}
	linked := 0
	for line := range strings.Lines(output(t, exec.Command("go", "version", "-m", program))) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == "dep" {
			linked++
			if !strings.Contains(modules, "\n"+f[1]+"@"+f[2]+"\n") {
				t.Errorf("the licence of %s is missing", f[1])
			}
		}
	}
	if linked < 10 {
		t.Errorf("only %d modules are linked in; the test sees too little", linked)
	}
	if out := output(t, exec.Command(program, "version")); out != "unitmeter 0.1.0\n" {
		t.Errorf("version prints %q", out)
	}
}

func output(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	if _, err := exec.LookPath(cmd.Path); err != nil {
		if os.Getenv("UNITMETER_TEST_NO_SKIP") == "" {
			t.Skipf("%v; install the Debian package of that name", err)
		}
		t.Fatalf("%v; install the Debian package of that name", err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, &stderr)
	}
	return string(out)
}

// start boots a rig that shows the packages, and lets packages start services.
func start(t testing.TB, packages ...string) *systemdtest.Rig {
	t.Helper()
	rig := systemdtest.Start(t)
	for _, dir := range packages {
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			rig.WriteFile(t, "/root/"+filepath.Base(file), string(text))
		}
	}
	// Build machines and containers often forbid it, and the rig looks like them.
	rig.Run(t, "rm", "-f", "/usr/sbin/policy-rc.d")
	return rig
}

// collector runs the Collector of the examples inside, for OTLP over gRPC at
// address, and returns the file in which it keeps what it gets.
func collector(t testing.TB, rig *systemdtest.Rig, root, address string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "examples/otel-collector/test-file.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	rig.WriteFile(t, "/root/otelcol.yaml", string(text))
	otelcol := filepath.Join(root, ".tools/bin/otelcol")
	if _, err := os.Stat(otelcol); err != nil {
		t.Fatalf("%v; run: .ci/tools otelcol", err)
	}
	rig.Run(t, "systemd-run", "--quiet", "--unit=otelcol", "--setenv=OTELCOL_FILE=/root/metrics.jsonl",
		"--setenv=OTELCOL_GRPC="+address, "--setenv=OTELCOL_HEALTH=127.0.0.1:13133", otelcol, "--config=/root/otelcol.yaml")
	eventually(t, "the Collector listens", func() bool {
		return rig.Command(context.Background(), "sh", "-c", "ss -ltn | grep -qF "+address).Run() == nil
	})
	return rig.Path("/root/metrics.jsonl")
}

// sent returns what the Collector has for a series of a unit: its last point.
func sent(t testing.TB, file, unit, direction string) (last otlptest.Point, found bool) {
	t.Helper()
	last, found = received(t, file, unit)["systemd.unit.network.io "+direction]
	return last, found
}

// received returns the last points of a unit that the Collector has, by metric
// and direction.
func received(t testing.TB, file, unit string) map[string]otlptest.Point {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	last := map[string]otlptest.Point{}
	for line := range strings.Lines(string(text)) {
		if !strings.HasSuffix(line, "\n") {
			break // not written to its end yet
		}
		var request colmetricpb.ExportMetricsServiceRequest
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal([]byte(line), &request); err != nil {
			t.Fatalf("read the Collector's file: %v", err)
		}
		for _, p := range otlptest.Flatten(&request) {
			if p.Attrs["systemd.unit.name"] == unit {
				last[p.Metric+" "+p.Attrs["network.io.direction"]] = p
			}
		}
	}
	return last
}

// eventually waits for what other processes do in their own time.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not come true that %s", what)
		}
	}
}

// property returns one property of the service.
func property(t testing.TB, rig *systemdtest.Rig, name string) string {
	t.Helper()
	return strings.TrimSpace(rig.Run(t, "systemctl", "show", "--value", "-p", name, "unitmeter.service"))
}

func exists(rig *systemdtest.Rig, path string) bool {
	return rig.Command(context.Background(), "test", "-e", path).Run() == nil
}

// talk makes a unit that sends one datagram of 128 bytes, headers included, and
// stays.
func talk(t testing.TB, rig *systemdtest.Rig) systemdtest.Accounting {
	t.Helper()
	// Without a process in it, systemd loses its counters in a reload.
	rig.Run(t, "systemd-run", "--quiet", "--unit=talker", "-p", "IPAccounting=yes", "-p", "ExecStartPre="+rig.Traffic()+" udp-send 127.0.0.1:9 -bytes 100 -count 1",
		"sleep", "infinity")
	var show systemdtest.Accounting
	eventually(t, "the unit has sent", func() bool { show = rig.Show(t, "talker.service"); return show.EgressPackets > 0 })
	if !show.OK || show.EgressBytes != 128 {
		t.Fatalf("the talker sent %+v, want 128 bytes", show)
	}
	return show
}

func testDeb(t *testing.T, root, first, second string) {
	rig := start(t, first, second)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(rig.Run(t, "journalctl", "--no-pager", "-n", "60", "-u", "unitmeter", "-u", "otelcol", "-u", "talker"))
		}
	})
	file := collector(t, rig, root, "127.0.0.1:4317")
	dpkg := func(args ...string) string { t.Helper(); return rig.Run(t, "dpkg", args...) }

	files := func() string {
		t.Helper()
		return rig.Run(t, "find", "/etc", "/var/lib", "/usr", "/run/systemd", "-xdev", "-name", "*unitmeter*", "-not", "-path", "/var/lib/dpkg/*")
	}

	before := files()
	dpkg("-i", "/root/unitmeter_0.1.0_amd64.deb")
	for name, want := range map[string]string{"ActiveState": "active", "UnitFileState": "enabled", "User": "unitmeter", "NRestarts": "0", "NeedDaemonReload": "no"} {
		if got := property(t, rig, name); got != want {
			t.Errorf("after the installation %s is %q, want %q\n%s", name, got, want, rig.Run(t, "journalctl", "-u", "unitmeter", "--no-pager"))
		}
	}
	if got := rig.Run(t, "stat", "-c", "%U:%G %a", "/var/lib/unitmeter"); got != "unitmeter:unitmeter 700\n" {
		t.Errorf("the state directory is %q", got)
	}
	if out, err := rig.Command(context.Background(), "systemd-analyze", "verify", "/usr/lib/systemd/system/unitmeter.service").CombinedOutput(); err != nil || strings.Contains(string(out), "unitmeter.service:") && !strings.Contains(string(out), "man ") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	// The threshold counts in tenths.
	if out, err := rig.Command(context.Background(), "systemd-analyze", "security", "--no-pager", "--threshold=11", "unitmeter.service").CombinedOutput(); err != nil {
		t.Errorf("the exposure is above 1.1: %v\n%s", err, out)
	} else {
		t.Log(strings.TrimSpace(string(out[bytes.LastIndex(bytes.TrimSpace(out), []byte("\n"))+1:])))
	}

	// The one file to edit.
	settings := "OTEL_METRIC_EXPORT_INTERVAL=1000\n"
	rig.Run(t, "sh", "-c", "echo "+strings.TrimSpace(settings)+" >>/etc/unitmeter/unitmeter.env")
	// With the example that lets it read the journal: the sandbox allows journalctl.
	rig.Run(t, "install", "-Dm644", "-t", "/etc/systemd/system/unitmeter.service.d", "/usr/share/doc/unitmeter/examples/stop-records.conf")
	rig.Run(t, "systemctl", "daemon-reload")
	rig.Run(t, "systemctl", "restart", "unitmeter.service")
	show := talk(t, rig)
	eventually(t, "journalctl reads the stop records", func() bool {
		return rig.Command(context.Background(), "pgrep", "-u", "unitmeter", "-x", "journalctl").Run() == nil
	})
	rig.Run(t, "rm", "-r", "/etc/systemd/system/unitmeter.service.d")
	rig.Run(t, "systemctl", "daemon-reload")
	var last otlptest.Point
	eventually(t, "the Collector has the unit's bytes", func() (ok bool) {
		last, ok = sent(t, file, "talker.service", "transmit")
		return ok
	})
	if uint64(last.Value) != show.EgressBytes {
		t.Errorf("the Collector has %v, systemd has %+v", last, show)
	}

	t.Run("upgrade", func(t *testing.T) {
		pid := property(t, rig, "MainPID")
		dpkg("-i", "--force-confdef", "/root/unitmeter_0.2.0_amd64.deb")
		if got := rig.Run(t, "unitmeter", "version"); got != "unitmeter 0.2.0\n" {
			t.Errorf("after the upgrade: %q", got)
		}
		if now := property(t, rig, "MainPID"); now == pid || now == "0" || property(t, rig, "ActiveState") != "active" {
			t.Errorf("the service was not restarted: process %s, then %s", pid, now)
		}
		if text := rig.Run(t, "cat", "/etc/unitmeter/unitmeter.env"); !strings.HasSuffix(text, settings) {
			t.Error("the edited settings did not survive")
		}
		since := time.Now()
		eventually(t, "the series goes on", func() bool {
			after, ok := sent(t, file, "talker.service", "transmit")
			return ok && after.Time.After(since) && after.Value == last.Value && after.Start.Equal(last.Start)
		})
	})
	t.Run("what the administrator disabled stays so", func(t *testing.T) {
		rig.Run(t, "systemctl", "disable", "unitmeter.service")
		dpkg("-i", "--force-confdef", "--force-downgrade", "/root/unitmeter_0.1.0_amd64.deb")
		if got := property(t, rig, "UnitFileState"); got != "disabled" {
			t.Errorf("UnitFileState is %q", got)
		}
		rig.Run(t, "systemctl", "enable", "unitmeter.service")
	})
	t.Run("remove", func(t *testing.T) {
		enableMeter(t, rig)
		dpkg("-r", "unitmeter")
		wantNoMeter(t, rig)
		if got := property(t, rig, "ActiveState"); got != "inactive" {
			t.Errorf("the service is %s", got)
		}
		if got := property(t, rig, "LoadState"); got != "not-found" {
			t.Errorf("systemd still has the unit: %s", got)
		}
		for _, path := range []string{"/var/lib/unitmeter", "/etc/unitmeter/unitmeter.env"} {
			if !exists(rig, path) {
				t.Errorf("%s is gone before a purge", path)
			}
		}
	})
	t.Run("install again", func(t *testing.T) {
		dpkg("-i", "/root/unitmeter_0.2.0_amd64.deb")
		if got := property(t, rig, "ActiveState"); got != "active" {
			t.Errorf("the service is %s", got)
		}
	})
	t.Run("purge", func(t *testing.T) {
		dpkg("-P", "unitmeter")
		rig.Run(t, "rm", "-r", filepath.Dir(rigDropIn))
		if left := files(); left != before {
			t.Errorf("these are left:\n%s\nbefore the installation there were:\n%s", left, before)
		}
		if got := property(t, rig, "ActiveState"); got != "inactive" {
			t.Errorf("the service is %s", got)
		}
	})
	t.Run("policy-rc.d", func(t *testing.T) {
		rig.WriteFile(t, "/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")
		dpkg("-i", "/root/unitmeter_0.1.0_amd64.deb")
		if got := property(t, rig, "ActiveState"); got != "inactive" {
			t.Errorf("the service was started against the policy: it is %s", got)
		}
	})
}

const rigDropIn = "/run/systemd/system/unitmeter-meter.service.d/rig.conf"

// enableMeter makes the installed agent count by eBPF.
func enableMeter(t *testing.T, rig *systemdtest.Rig) {
	t.Helper()
	// The rig is not at the root of the hierarchy: to find out where it is, the loader
	// makes a cgroup. And nobody has mounted a BPF file system.
	rig.WriteFile(t, rigDropIn, "[Service]\nProtectControlGroups=no\n")
	rig.Run(t, "sh", "-euc", "mount --make-rshared /; mountpoint -q /sys/fs/bpf || mount -t bpf -o mode=700 bpf /sys/fs/bpf; systemctl daemon-reload; unitmeter enable --ebpf; unitmeter meter status")
	if n := programs(t, rig); n != 1 {
		t.Errorf("%d programs count what the units send", n)
	}
}

// wantNoMeter wants neither a program nor a pin to be left.
func wantNoMeter(t *testing.T, rig *systemdtest.Rig) {
	t.Helper()
	eventually(t, "no program is left", func() bool { return programs(t, rig) == 0 })
	if exists(rig, "/sys/fs/bpf/unitmeter") {
		t.Error("the removal left pins")
	}
}

// programs is the number of programs that see what the units of a rig send.
func programs(t *testing.T, rig *systemdtest.Rig) int {
	t.Helper()
	dir, err := os.Open(rig.Path("/sys/fs/cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: ebpf.AttachCGroupInetEgress})
	if err != nil {
		t.Fatal(err)
	}
	return len(found.Programs)
}

// RPM distributions do not start what they install.
func testRPM(t *testing.T, first, second string) {
	rig := start(t, first, second)
	if _, err := exec.LookPath("rpm"); err != nil {
		output(t, exec.Command("rpm"))
	}
	// Debian's rpm knows of no package that Debian's dpkg has installed.
	rpm := func(args ...string) {
		t.Helper()
		rig.Run(t, "rpm", append([]string{"--force-debian", "--nodeps"}, args...)...)
	}
	rpm("-i", "/root/unitmeter-0.1.0-1.x86_64.rpm")
	if got := property(t, rig, "ActiveState"); got != "inactive" {
		t.Errorf("after the installation the service is %s", got)
	}
	rig.Run(t, "systemctl", "enable", "--now", "unitmeter.service")
	pid := property(t, rig, "MainPID")
	rpm("-U", "/root/unitmeter-0.2.0-1.x86_64.rpm")
	if now := property(t, rig, "MainPID"); now == pid || now == "0" {
		t.Errorf("the upgrade did not restart the service: process %s, then %s", pid, now)
	}
	if got := rig.Run(t, "unitmeter", "version"); got != "unitmeter 0.2.0\n" {
		t.Errorf("after the upgrade: %q", got)
	}
	enableMeter(t, rig)
	rpm("-e", "unitmeter")
	wantNoMeter(t, rig)
	for name, want := range map[string]string{"ActiveState": "inactive", "LoadState": "not-found"} {
		if got := property(t, rig, name); got != want {
			t.Errorf("after the removal %s is %q, want %q", name, got, want)
		}
	}
	if !exists(rig, "/var/lib/unitmeter") {
		t.Error("the removal took the state along")
	}
	if exists(rig, "/etc/systemd/system/multi-user.target.wants/unitmeter.service") || exists(rig, "/etc/systemd/system/sysinit.target.wants/unitmeter-meter.service") {
		t.Error("the removal left the service enabled")
	}
}

// No container engine runs here, but what the recipe in Containerfile comes to
// does: nothing but the program, the bus's socket, another user, no rights.
func testScratch(t *testing.T, first string) {
	rig := start(t)
	rig.Run(t, "mkdir", "-p", "/srv/scratch")
	program := output(t, exec.Command("tar", "-xzOf", filepath.Join(first, "unitmeter-0.1.0-linux-amd64.tar.gz"), "unitmeter-0.1.0-linux-amd64/unitmeter"))
	rig.WriteFile(t, "/srv/scratch/unitmeter", program)
	rig.Run(t, "chmod", "755", "/srv/scratch/unitmeter")
	show := talk(t, rig)
	out := rig.Run(t, "systemd-run", "--quiet", "--pipe", "--wait", "-p", "RootDirectory=/srv/scratch", "-p", "MountAPIVFS=yes",
		"-p", "BindPaths=/run/dbus/system_bus_socket", "-p", "User=65534", "-p", "Group=65534", "-p", "CapabilityBoundingSet=", "-p", "NoNewPrivileges=yes",
		"-p", "ProtectSystem=strict", "/unitmeter", "once", "--json", "talker.service")
	if want := fmt.Sprintf(`"egress_bytes": %d`, show.EgressBytes); !strings.Contains(out, want) {
		t.Errorf("no %s in:\n%s", want, out)
	}
}
