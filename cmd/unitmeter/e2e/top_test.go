package e2e

import (
	"context"
	"io"
	"strings"
	"testing"
)

// TestTopOnce runs the command for pipes beside a real systemd.
func TestTopOnce(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.sh("systemd-run --quiet --unit=quiet -p IPAccounting=yes sleep infinity")
	out := w.sh("unitmeter top --once --interval 300ms --source dbus quiet")
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 4 || lines[3] != "Counted by systemd." || !strings.HasSuffix(lines[1], " quiet.service") || !strings.Contains(lines[1], "0 B/s") {
		t.Errorf("top --once:\n%s", out)
	}
	cmd := w.Command(t.Context(), "unitmeter", "top", "--once", "--interval", "300ms", "nosuch")
	text, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(text), `find unit "nosuch.service"`) {
		t.Errorf("an unknown unit: %v, %s", err, text)
	}
	cmd = w.Command(t.Context(), "unitmeter", "top")
	text, err = cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(text), "--once") {
		t.Errorf("without a terminal: %v, %s", err, text)
	}
}

// TestTopTerminal runs top on a real terminal, and ends it by a key and by a
// signal. The terminal must be left as it was.
func TestTopTerminal(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, unit := range []string{"one", "two"} { // the first row is selected, and has no colours
		w.sh("systemd-run --quiet --unit=" + unit + " -p IPAccounting=yes bash -c 'while :; do echo hello >/dev/udp/127.0.0.1/9; sleep 0.02; done'")
	}
	for name, end := range map[string]func(keys io.Writer) error{
		"key":    func(keys io.Writer) error { _, err := io.WriteString(keys, "q"); return err },
		"signal": func(io.Writer) error { return w.Command(t.Context(), "pkill", "-TERM", "-x", "unitmeter").Run() },
	} {
		for _, color := range []string{"NO_COLOR=", "NO_COLOR=1"} {
			t.Run(name+" "+color, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				cmd := w.Command(ctx, "script", "-qefc", "stty cols 80 rows 24; unitmeter top", "/dev/null")
				cmd.Env = append(cmd.Env, "TERM=xterm-256color", color)
				keys, err := cmd.StdinPipe()
				if err != nil {
					t.Fatal(err)
				}
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				var screen strings.Builder
				ended := false
				buf := make([]byte, 4096)
				for {
					n, err := out.Read(buf)
					screen.Write(buf[:n])
					if err != nil {
						break
					}
					// The second reading is on the screen with its speeds.
					if !ended && strings.Contains(screen.String(), "two.service") && strings.Contains(screen.String(), "kB/s") {
						ended = true
						if err := end(keys); err != nil {
							t.Error(err)
						}
					}
				}
				if err := cmd.Wait(); err != nil {
					t.Errorf("it ended with %v:\n%q", err, screen.String())
				}
				text := screen.String()
				if on, off := strings.Count(text, "\x1b[?1049h"), strings.Count(text, "\x1b[?1049l"); on != 1 || off != 1 {
					t.Errorf("the alternate screen was entered %d times and left %d times:\n%q", on, off, text)
				}
				if colored := strings.Contains(text, "\x1b[36m"); colored != (color == "NO_COLOR=") {
					t.Errorf("colours with %s: %t\n%q", color, colored, text)
				}
			})
		}
	}
}
