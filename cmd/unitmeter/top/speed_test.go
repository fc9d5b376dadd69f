package top

import (
	"context"
	"math"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// TestTopSpeed compares what top shows of a NATS server with what the sender
// says of itself.
func TestTopSpeed(t *testing.T) {
	rig := systemdtest.Start(t)
	sh := func(command string) string { return rig.Run(t, "sh", "-euc", command) }
	sh("systemd-run --quiet --unit=natsd -p IPAccounting=yes " + tool(t, "nats-server") + " -a 127.0.0.1")
	sh("i=0; until bash -c 'exec 3<>/dev/tcp/127.0.0.1/4222'; do i=$((i+1)); [ $i -lt 1800 ]; sleep 0.1; done 2>/dev/null")
	source, err := accounting.Open(t.Context(), receiver.Config{Bus: rig.SystemBus()}, receiver.DBus, systemd.Patterns{})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	const interval, messages, size = 250 * time.Millisecond, 4000, 16384
	readings := make(chan accounting.Sweep, 10_000)
	running.Go(func() { feed(ctx, source, interval, func(m tea.Msg) { readings <- m.(accounting.Sweep) }) })
	b := newBoard(only(t, "natsd"), interval)
	bytes := 0.0 // the area under the shown speeds
	take := func() {
		m, before := <-readings, b.last
		b.take(m.Time, m.Units)
		if r := b.rows["natsd.service"]; r != nil && !before.IsZero() {
			bytes += r.history[len(r.history)-1].of[bytesIn] * m.Time.Sub(before).Seconds()
		}
	}
	take()
	out := sh(tool(t, "nats") + " bench pub subject --size " + strconv.Itoa(size) + " --msgs " + strconv.Itoa(messages) + " --sleep 50us --no-progress 2>/dev/null")
	for range len(readings) + 2 { // those during the bench, and one that began after it
		take()
	}
	r := b.rows["natsd.service"]
	if r == nil {
		t.Fatal("natsd.service is not on the board")
	}
	if counted := float64(r.session[bytesIn]); math.Abs(bytes-counted) > 0.05*counted {
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
	ours := float64(r.session[bytesIn]) / (messages / perSecond)
	t.Logf("nats bench: %s/s; top: %s/s (%+.2f %%), peak %s/s", tty.Bytes(theirs), tty.Bytes(ours), 100*(ours/theirs-1), tty.Bytes(r.peak.of[bytesIn]))
	if math.Abs(ours-theirs) > 0.05*theirs {
		t.Errorf("top shows %.0f B/s, nats bench says %.0f B/s: more than 5 %% apart", ours, theirs)
	}
}

// tool returns the path of a program that .ci/tools has built.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("../../../.tools/bin/" + name)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		t.Fatalf("find %s: %v; run \"make tools\"", name, err)
	}
	return path
}
