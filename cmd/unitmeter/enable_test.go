package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// runCommand runs the program in this process.
func runCommand(t *testing.T, environ []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = dispatch(t.Context(), &terminal{args: args, environ: environ, stdout: &out, stderr: &errs})
	return code, out.String(), errs.String()
}

// TestEnableEBPF: a dry run names each step.
func TestEnableEBPF(t *testing.T) {
	code, stdout, _ := runCommand(t, nil, "enable", "--ebpf", "--dry-run")
	if code != exitOK || strings.Count(stdout, "would ") != 4 || !strings.Contains(stdout, "would write /etc/systemd/system/unitmeter.service.d/50-ebpf.conf") {
		t.Errorf("the dry run ends with %d:\n%s", code, stdout)
	}
	for _, args := range [][]string{{"--ebpf", "--all"}, {"--ebpf", "--runtime"}, {"--ebpf", "a.service"}} {
		if code, _, _ := runCommand(t, nil, append([]string{"enable"}, args...)...); code != exitUsage {
			t.Errorf("enable %q ends with %d", args, code)
		}
	}
}

// fakeUnit is a service of the fake, with accounting.
func fakeUnit(name string, traffic uint64) systemdtest.Unit {
	return systemdtest.Unit{
		Name: name, InvocationID: strings.Repeat("a", 30) + fmt.Sprintf("%02x", name[0]), Accounting: true,
		IngressBytes: traffic, IngressPackets: traffic, EgressBytes: traffic, EgressPackets: traffic,
	}
}

// losing plants the fault of systemd 256 and 257, which no systemd of this machine
// has: a running unit, gone.service, without data until it is set again.
func losing(t *testing.T) *systemdtest.Fake {
	t.Helper()
	fake := systemdtest.StartFake(t)
	fake.SetUnit(fakeUnit("fine.service", 7))
	fake.SetUnit(fakeUnit("gone.service", systemdtest.NoData))
	fake.OnGet(func(_ dbus.ObjectPath, _, property string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		switch {
		case property == "Version":
			return dbus.MakeVariant("257.13-1~deb13u1"), nil, 0, true
		case property == "Transient":
			return dbus.MakeVariant(false), nil, 0, true
		case property == "DropInPaths":
			return dbus.MakeVariant([]string{}), nil, 0, true
		}
		return dbus.Variant{}, nil, 0, false
	})
	fake.OnCall(func(member string, args []any) ([]any, *dbus.Error, time.Duration, bool) {
		if member != "SetUnitProperties" {
			return nil, nil, 0, false
		}
		if name, runtime := args[0], args[1]; name != "gone.service" || runtime != true {
			t.Errorf("SetUnitProperties(%v, %v), want gone.service at run time", name, runtime)
		}
		go fake.SetUnit(fakeUnit("gone.service", 0)) // the fake is locked now
		return []any{}, nil, 0, true
	})
	return fake
}

// TestRearm: enable --lost --follow restores what each reload takes, until the
// connection ends.
func TestRearm(t *testing.T) {
	fake := losing(t)
	out, stdout := io.Pipe()
	var errs bytes.Buffer
	ended := make(chan int)
	go func() {
		code := dispatch(t.Context(), &terminal{args: []string{"enable", "--lost", "--follow"}, environ: []string{"UNITMETER_BUS=" + fake.Address()}, stdout: stdout, stderr: &errs})
		_ = stdout.Close()
		ended <- code
	}()
	lines := bufio.NewScanner(out)
	for range 3 {
		if !lines.Scan() || lines.Text() != "gone.service: counting again" {
			t.Fatalf("it said %q", lines.Text())
		}
		fake.SetUnit(fakeUnit("gone.service", systemdtest.NoData))
		fake.EmitReloading(true)
		fake.EmitReloading(false)
	}
	if !lines.Scan() {
		t.Error("the last reload was missed")
	}
	fake.KillBus()
	if lines.Scan() {
		t.Errorf("it also said %q", lines.Text())
	}
	if code := <-ended; code != exitFailure {
		t.Errorf("it ends with %d, %s", code, &errs)
	}
	for _, args := range [][]string{{"--follow"}, {"--follow", "--all"}, {"--rearm", "--runtime"}, {"--rearm", "--lost"}} {
		if code, _, _ := runCommand(t, nil, append([]string{"enable"}, args...)...); code != exitUsage {
			t.Errorf("enable %q ends with %d", args, code)
		}
	}
}

// TestEnableLost: the doctor finds the units, and the command that it names helps.
func TestEnableLost(t *testing.T) {
	fake := losing(t)
	environ := []string{"UNITMETER_BUS=" + fake.Address(), "UNITMETER_STATE_DIR=none", "OTEL_METRICS_EXPORTER=console"}
	// The doctor finds it, and names the command that fixes it.
	_, report, _ := runCommand(t, environ, "doctor", "--here")
	for _, want := range []string{"\n      fix: unitmeter enable --lost\n"} {
		if !strings.Contains(report, want) {
			t.Errorf("the doctor does not say %q:\n%s", want, report)
		}
	}
	code, out, errs := runCommand(t, environ, "enable", "--lost")
	if code != exitOK || out != "gone.service: counting again\n" {
		t.Fatalf("enable --lost = %d, %q, %q", code, out, errs)
	}
	if _, report, _ := runCommand(t, environ, "doctor", "--here"); !strings.Contains(report, "\nok    counters ") {
		t.Errorf("after enable --lost:\n%s", report)
	}
}
