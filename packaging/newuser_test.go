package packaging_test

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestNewUser is the first hour of somebody who has a host, a NATS server on it,
// a Collector that does not listen at the usual port, and our package. It does
// what the package's doctor says, and nothing else.
func TestNewUser(t *testing.T) {
	newUser(t)
}

// BenchmarkNewUser reports how long that takes, from dpkg until the Collector has
// the numbers: the goal is under 60 s.
func BenchmarkNewUser(b *testing.B) {
	var took time.Duration
	for range b.N {
		took += newUser(b)
	}
	b.ReportMetric(took.Seconds()/float64(b.N), "s/newuser")
	b.ReportMetric(0, "ns/op") // it has the rig and the build in it
}

// newUser returns the time from the installation until the Collector has what
// systemd counted.
func newUser(t testing.TB) time.Duration {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	rig := start(t, build(t, root, "0.1.0", nil, "deb"))
	const endpoint = "127.0.0.1:14317"
	file := collector(t, rig, root, endpoint)
	startNATS(t, rig, root)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(rig.Run(t, "journalctl", "--no-pager", "-n", "60", "-u", "unitmeter", "-u", "otelcol", "-u", "orders"))
		}
	})

	began := time.Now()
	rig.Run(t, "dpkg", "-i", "/root/unitmeter_0.1.0_amd64.deb")
	report, code := doctor(t, rig)
	if code != 1 {
		t.Errorf("before the fixes doctor ends with %d, want 1:\n%s", code, report)
	}
	fixes := fixesOf(report)
	for _, want := range []string{"unitmeter enable --default", "usermod -aG systemd-journal unitmeter"} {
		if !slices.Contains(fixes, want) {
			t.Errorf("doctor does not name %q:\n%s", want, report)
		}
	}
	for _, fix := range fixes {
		switch {
		case strings.Contains(fix, "set OTEL_EXPORTER_OTLP_ENDPOINT"):
			// The one file to edit; doctor says which.
			if !strings.Contains(report, "Variables belong in /etc/unitmeter/unitmeter.env") {
				t.Errorf("doctor does not say where to set it:\n%s", report)
			}
			rig.Run(t, "sh", "-c", "echo OTEL_EXPORTER_OTLP_ENDPOINT=http://"+endpoint+" >>/etc/unitmeter/unitmeter.env")
		case strings.HasPrefix(fix, "timedatectl "): // nobody sets the clock of a rig
		default:
			rig.Run(t, "sh", "-euc", fix)
		}
	}
	bench(t, rig)
	if !strings.Contains(report, "systemctl restart unitmeter.service") {
		t.Errorf("doctor does not say what makes the settings count:\n%s", report)
	}
	rig.Run(t, "systemctl", "restart", "unitmeter.service")
	var show systemdtest.Accounting
	var got map[string]otlptest.Point
	eventually(t, "the Collector has what systemd says of orders.service", func() bool {
		show, got = rig.Show(t, "orders.service"), received(t, file, "orders.service")
		value := func(metric string) uint64 { return uint64(got["systemd.unit.network."+metric].Value) }
		return show.OK && show.IngressPackets > 0 && value("io receive") == show.IngressBytes && value("io transmit") == show.EgressBytes &&
			value("packet.count receive") == show.IngressPackets && value("packet.count transmit") == show.EgressPackets
	})
	took := time.Since(began)
	t.Logf("systemd: %+v after %v", show, took.Round(time.Millisecond))

	// 20,000 messages of 128 bytes went in.
	if show.IngressBytes < 20_000*128 {
		t.Errorf("systemd counted %d bytes of 20,000 messages of 128", show.IngressBytes)
	}
	if changed := rig.Run(t, "dpkg", "--verify", "unitmeter"); changed != "??5?????? c /etc/unitmeter/unitmeter.env\n" {
		t.Errorf("of what the package has, these are edited: %q", changed)
	}
	report, code = doctor(t, rig)
	if left := fixesOf(report); code != 0 || len(slices.DeleteFunc(left, func(m string) bool { return strings.HasPrefix(m, "timedatectl ") })) > 0 {
		t.Errorf("after the fixes doctor ends with %d, and names %q:\n%s", code, left, report)
	}
	// root finds what the service has kept, without being told where.
	if history := rig.Run(t, "unitmeter", "history"); !strings.Contains(history, "UNIT") {
		t.Errorf("history: %s", history)
	}
	return took
}

// startNATS runs a NATS server as a unit of the host, without IP accounting, as
// most hosts have it.
func startNATS(t testing.TB, rig *systemdtest.Rig, root string) {
	t.Helper()
	server := filepath.Join(root, ".tools/bin/nats-server")
	rig.Run(t, "install", server, filepath.Join(root, ".tools/bin/nats"), "/usr/local/bin/")
	rig.WriteFile(t, "/etc/systemd/system/orders.service", "[Service]\nExecStart=/usr/local/bin/nats-server -a 127.0.0.1\n")
	rig.Run(t, "systemctl", "daemon-reload")
	rig.Run(t, "systemctl", "start", "orders.service")
	eventually(t, "NATS answers", func() bool { return rig.Command(context.Background(), "/usr/local/bin/nats", "rtt").Run() == nil })
}

// bench loads the NATS server, and ends.
func bench(t testing.TB, rig *systemdtest.Rig) {
	t.Helper()
	rig.Run(t, "nats", "bench", "pub", "orders", "--msgs", "20000", "--size", "128", "--no-progress")
}

// doctor runs the doctor as a person does, and returns what it prints.
func doctor(t testing.TB, rig *systemdtest.Rig) (report string, code int) {
	t.Helper()
	out, err := rig.Command(context.Background(), "unitmeter", "doctor").Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	return string(out), code
}

// fixesOf returns the fixes of a report, in its order.
func fixesOf(report string) (fixes []string) {
	for line := range strings.Lines(report) {
		if fix, ok := strings.CutPrefix(strings.TrimSpace(line), "fix: "); ok {
			fixes = append(fixes, fix)
		}
	}
	return fixes
}
