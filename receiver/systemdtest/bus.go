package systemdtest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// busConfig allows everything to everyone and sets no limit: dbus-daemon's own
// defaults hold, among them 128 outstanding replies for each connection.
const busConfig = `<busconfig>
  <type>system</type>
  <listen>unix:path=%s</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
  </policy>
</busconfig>
`

// Bus is a real dbus-daemon with its default limits, on a socket of its own.
type Bus struct {
	dir string

	mu       sync.Mutex
	daemon   *exec.Cmd
	lifeline io.Closer
}

// StartBus starts a bus, which ends with the test or with this process. Without
// a dbus-daemon on this machine, the test is skipped or failed as by [Start].
func StartBus(t testing.TB) *Bus {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		const reason = "the command dbus-daemon is missing; install dbus"
		if os.Getenv("UNITMETER_TEST_NO_SKIP") != "" {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	// Not t.TempDir: a socket's path has at most 107 bytes.
	dir, err := os.MkdirTemp("", "unitmeter-bus-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil { // clients may be other users
		t.Fatal(err)
	}
	b := &Bus{dir: dir}
	config := fmt.Sprintf(busConfig, b.socket())
	if err := os.WriteFile(b.config(), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.kill() }) // it may be killed already
	return b
}

func (b *Bus) socket() string { return filepath.Join(b.dir, "bus") }
func (b *Bus) config() string { return filepath.Join(b.dir, "bus.conf") }

// Address returns the D-Bus address. It stays the same over Kill and Start.
func (b *Bus) Address() string { return "unix:path=" + b.socket() }

// Kill ends the daemon and with it every connection. It returns when the daemon
// has ended.
func (b *Bus) Kill(t testing.TB) {
	t.Helper()
	if err := b.kill(); err != nil {
		t.Fatal(err)
	}
}

// Start starts the daemon again after Kill. It returns when the bus can be
// connected to.
func (b *Bus) Start(t testing.TB) {
	t.Helper()
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
}

func (b *Bus) start() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.daemon != nil {
		return errors.New("start dbus-daemon: it runs already; kill it first")
	}
	// As with a rig, the end of the pipe is the end of the daemon, also when
	// this process is killed.
	const script = `dbus-daemon --config-file="$1" --nofork --nopidfile --nosyslog --print-address=1 & exec >/dev/null; read -r _; kill -9 $!`
	cmd := exec.Command("sh", "-c", script, "bus", b.config())
	cmd.Stderr = os.Stderr
	lifeline, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start dbus-daemon: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start dbus-daemon: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start dbus-daemon: %w", err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil { // the address, when it listens
		lifeline.Close()
		return fmt.Errorf("start dbus-daemon: %w", errors.Join(err, cmd.Wait()))
	}
	b.daemon, b.lifeline = cmd, lifeline
	return nil
}

func (b *Bus) kill() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.daemon == nil {
		return errors.New("kill dbus-daemon: it does not run; start it first")
	}
	b.lifeline.Close()
	err := b.daemon.Wait()
	b.daemon = nil
	if err != nil {
		return fmt.Errorf("kill dbus-daemon: %w", err)
	}
	return nil
}
