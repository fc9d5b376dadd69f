package e2e

import (
	"bufio"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// runAgent starts the agent with nothing but env, without a systemd, and returns
// it with its log. It is killed at the end of the test.
func runAgent(t *testing.T, env ...string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	binary, err := agentBinary()
	if err != nil {
		t.Fatal(err)
	}
	agent := exec.Command(binary, "run")
	agent.Env = append(env, "UNITMETER_STATE_DIR=none", "UNITMETER_BUS=unix:path="+t.TempDir()+"/nobody")
	stderr, err := agent.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = agent.Process.Kill()
		_ = agent.Wait()
	})
	return agent, bufio.NewScanner(stderr)
}

// scan reads a log up to the line with the text.
func scan(t *testing.T, log *bufio.Scanner, text string) (lines []string) {
	t.Helper()
	for log.Scan() {
		if lines = append(lines, log.Text()); strings.Contains(log.Text(), text) {
			return lines
		}
	}
	t.Fatalf("the log ends without %q: %q", text, lines)
	return nil
}

// A variable that is not used may hold a secret as well, and the official
// exporters log what they cannot read in it.
func TestUnusedSecretIsNotLogged(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		_, log := runAgent(t, "OTEL_EXPORTER_OTLP_PROTOCOL="+protocol,
			"OTEL_EXPORTER_OTLP_HEADERS=authorization: Bearer s3cr3t", "OTEL_EXPORTER_OTLP_METRICS_HEADERS=a=1",
			"OTEL_EXPORTER_OTLP_ENDPOINT=https://user:s3cr3t%@localhost:1", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://localhost:1",
			"OTEL_EXPORTER_OTLP_TIMEOUT=s3cr3t", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT=1000")
		for _, line := range scan(t, log, "msg=started") {
			if strings.Contains(line, "s3cr3t") {
				t.Errorf("%s: %s", protocol, line)
			}
		}
	}
}

// SIGHUP comes from a hook of a certificate's renewal, a lost terminal, or
// SendSIGHUP=. The agent goes on, and ends as always when it is told to.
func TestHangup(t *testing.T) {
	t.Parallel()
	agent, log := runAgent(t, "OTEL_METRICS_EXPORTER=none")
	scan(t, log, "msg=started")
	for range 2 {
		if err := agent.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		scan(t, log, "SIGHUP")
	}
	if err := agent.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	scan(t, log, "msg=stopping")
	if err := agent.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// A service that is disabled by OTEL_SDK_DISABLED is up all the same: it would be
// started for ever if it did not say so, and killed if it left the watchdog alone.
func TestDisabledIsReady(t *testing.T) {
	t.Parallel()
	address := &net.UnixAddr{Net: "unixgram", Name: filepath.Join(t.TempDir(), "notify")}
	manager, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	if err := manager.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	runAgent(t, "OTEL_SDK_DISABLED=true", "NOTIFY_SOCKET="+address.Name, "WATCHDOG_USEC=300000")
	want := []string{"READY=1", "STATUS=nothing to do: OTEL_SDK_DISABLED is true", "WATCHDOG=1", "WATCHDOG=1"}
	var got []string
	for len(got) < len(want) {
		message := make([]byte, 1024)
		n, err := manager.Read(message)
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		got = append(got, string(message[:n]))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestSaysAtOnce: with IP accounting off, the log and the status say so at the start,
// an hour before the next collection; and commands of root take the service's settings.
func TestSaysAtOnce(t *testing.T) {
	t.Parallel()
	rig := systemdtest.Start(t)
	install(t, rig)
	rig.WriteFile(t, "/etc/systemd/system/demo.service", "[Service]\nExecStart=/bin/sleep infinity\n")
	rig.Run(t, "systemctl", "start", "demo.service")
	rig.WriteFile(t, "/etc/unitmeter/unitmeter.env", "OTEL_METRICS_EXPORTER=none\nOTEL_METRIC_EXPORT_INTERVAL=3600000\n"+
		"# a comment\nUNITMETER_EXCLUDE=\"nothing.service,demo.service\"\n")
	rig.Run(t, "systemctl", "start", "unitmeter")
	const advice = "IP accounting is off for "
	const commands = "; run unitmeter enable --default, or use the eBPF source (unitmeter enable --ebpf)"
	said := func(text string) bool { return strings.Contains(text, advice) && strings.Contains(text, commands) }
	eventually(t, "the status says it", func() bool {
		return said(rig.Run(t, "systemctl", "show", "-P", "StatusText", "unitmeter"))
	})
	if log := rig.Run(t, "journalctl", "-u", "unitmeter", "-p", "warning", "-o", "cat", "--no-pager"); !said(log) {
		t.Errorf("the log does not: %s", log)
	}
	const note = "with the settings of unitmeter.service: UNITMETER_EXCLUDE=nothing.service,demo.service\n"
	for _, command := range []string{"units", "once --source dbus", "top --once --source dbus", "enable --all --dry-run"} {
		out := rig.Run(t, "bash", "-c", "unitmeter "+command+" 2>&1")
		if !strings.HasPrefix(out, note) || strings.Contains(out, "demo.service ") {
			t.Errorf("%s: %s", command, out)
		}
	}
	if out := rig.Run(t, "bash", "-c", "UNITMETER_EXCLUDE=other.service unitmeter units 2>&1"); strings.Contains(out, note) {
		t.Errorf("a setting of the shell does not win: %s", out)
	}
	if out := rig.Run(t, "unitmeter", "units", "demo"); !strings.Contains(out, "UNITMETER_EXCLUDE has demo.service") {
		t.Errorf("units demo: %s", out)
	}
	if out := rig.Run(t, "systemctl", "show", "-P", "StatusText", "unitmeter"); !said(out) {
		t.Errorf("the status has become %s", out)
	}
}
