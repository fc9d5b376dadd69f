package systemdtest

import (
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
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
	dir string // exists while the daemon runs

	mu       sync.Mutex
	daemon   *exec.Cmd // the shell around it; nil while it is killed
	lifeline io.Closer // standard input of the shell
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
	dir := filepath.Join(os.TempDir(), "unitmeter-bus-"+strings.ToLower(rand.Text()[:10]))
	b := &Bus{dir: dir}
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.kill() }) // it may be killed already
	return b
}

func (b *Bus) socket() string { return filepath.Join(b.dir, "bus") }

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
	if err := os.Mkdir(b.dir, 0o755); err != nil { // clients may be other users
		return fmt.Errorf("start dbus-daemon: %w", err)
	}
	config := filepath.Join(b.dir, "bus.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, busConfig, b.socket()), 0o644); err != nil {
		return fmt.Errorf("start dbus-daemon: %w", err)
	}
	log := filepath.Join(b.dir, "bus.log")
	// As with a rig, the end of the pipe is the end of the daemon and its files,
	// also when this process is killed.
	const script = `dbus-daemon --config-file="$1" --nofork --nopidfile --nosyslog --print-address=1 2>"$2" &
exec >/dev/null; read -r _; kill -9 $!; rm -rf "$3"`
	cmd := exec.Command("sh", "-c", script, "bus", config, log, b.dir)
	// Of its own session, so that an interrupt leaves it time to clean up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
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
		said, _ := os.ReadFile(log) // a help only
		lifeline.Close()
		return fmt.Errorf("start dbus-daemon: %w\n%s", errors.Join(err, cmd.Wait()), said)
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
