package main

import (
	"context"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/unitmeter/unitmeter/receiver"
)

// TestTopSpeed compares what top shows of a NATS server with what the sender
// says of itself.
func TestTopSpeed(t *testing.T) {
	w := newWard(t)
	w.sh("systemd-run --quiet --unit=natsd -p IPAccounting=yes " + tool(t, "nats-server") + " -a 127.0.0.1")
	w.sh("i=0; until bash -c 'exec 3<>/dev/tcp/127.0.0.1/4222'; do i=$((i+1)); [ $i -lt 1800 ]; sleep 0.1; done 2>/dev/null")
	rcv, err := receiver.New(receiver.Config{Bus: w.SystemBus(), StopRecords: "off"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = rcv.Run(ctx) })
	defer running.Wait()
	defer cancel()
	if err := rcv.Ready(ctx); err != nil {
		t.Fatal(err)
	}

	const interval, messages, size = 250 * time.Millisecond, 4000, 16384
	readings := make(chan sweepMsg, 10_000)
	running.Go(func() { feed(ctx, rcv, interval, func(m tea.Msg) { readings <- m.(sweepMsg) }) })
	b := newBoard([]string{"natsd"}, interval)
	b.wanted, _ = unitPatterns(b.wanted)
	bytes := 0.0 // the area under the shown speeds
	take := func() {
		m, before := <-readings, b.last
		b.take(m.at, m.units)
		if r := b.rows["natsd.service"]; r != nil && !before.IsZero() {
			bytes += r.history[len(r.history)-1].in * m.at.Sub(before).Seconds()
		}
	}
	take()
	out := w.sh(tool(t, "nats") + " bench pub subject --size " + strconv.Itoa(size) + " --msgs " + strconv.Itoa(messages) + " --sleep 50us --no-progress 2>/dev/null")
	for range len(readings) + 2 { // those during the bench, and one that began after it
		take()
	}
	r := b.rows["natsd.service"]
	if r == nil {
		t.Fatal("natsd.service is not on the board")
	}
	if counted := float64(r.session.IngressBytes); math.Abs(bytes-counted) > 0.05*counted {
		t.Errorf("the speeds add up to %.0f bytes, %.0f were counted", bytes, counted)
	}
	match := regexp.MustCompile(`stats: ([0-9,]+) msgs/sec`).FindStringSubmatch(out)
	if match == nil {
		t.Fatalf("nats bench said:\n%s", out)
	}
	perSecond, err := strconv.ParseFloat(strings.ReplaceAll(match[1], ",", ""), 64)
	if err != nil {
		t.Fatal(err)
	}
	theirs := perSecond * size
	ours := float64(r.session.IngressBytes) / (messages / perSecond)
	t.Logf("nats bench: %s/s; top: %s/s (%+.2f %%), peak %s/s", humanBytes(theirs), humanBytes(ours), 100*(ours/theirs-1), humanBytes(r.peak.in))
	if math.Abs(ours-theirs) > 0.05*theirs {
		t.Errorf("top shows %.0f B/s, nats bench says %.0f B/s: more than 5 %% apart", ours, theirs)
	}
}

// TestTopOnce runs the command for pipes beside a real systemd.
func TestTopOnce(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.sh("systemd-run --quiet --unit=quiet -p IPAccounting=yes sleep infinity")
	out := w.sh("unitmeter top --once --interval 300ms quiet")
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 2 || !strings.HasSuffix(lines[1], " quiet.service") || !strings.Contains(lines[1], "0 B/s") {
		t.Errorf("top --once:\n%s", out)
	}
	cmd := w.Command(t.Context(), "unitmeter", "top", "--once", "--interval", "300ms", "nosuch")
	text, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(text), `find unit "nosuch.service"`) {
		t.Errorf("an unknown unit: %v, %s", err, text)
	}
	cmd = w.Command(t.Context(), "unitmeter", "top")
	text, err = cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != exitUsage || !strings.Contains(string(text), "--once") {
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
