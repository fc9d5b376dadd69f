package receiver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/ledger"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// insideMode is the environment variable that makes the test binary do one
// task within the rig instead of running tests. See inside_test.go.
const insideMode = "UNITMETER_TEST_INSIDE"

// booted is the one rig that all tests and benchmarks of this package share:
// booted by the first that asks, from the tree in UNITMETER_TEST_ROOT if that is
// set, and closed by TestMain.
var booted rigOnce

type rigOnce struct {
	once sync.Once
	rig  *systemdtest.Rig
	err  error
}

func (r *rigOnce) boot() (*systemdtest.Rig, error) {
	r.once.Do(func() {
		r.rig, r.err = systemdtest.Boot(context.Background(), systemdtest.Config{Root: os.Getenv("UNITMETER_TEST_ROOT")})
	})
	return r.rig, r.err
}

func TestMain(m *testing.M) {
	if mode := os.Getenv(insideMode); mode != "" {
		os.Exit(runInside(mode))
	}
	code := m.Run()
	if booted.rig != nil {
		if err := booted.rig.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// theRig returns the shared rig. Where there can be none, the test is skipped
// with the reason, or fails if UNITMETER_TEST_NO_SKIP is set.
func theRig(t testing.TB) *systemdtest.Rig {
	t.Helper()
	rig, err := booted.boot()
	if errors.Is(err, errors.ErrUnsupported) && os.Getenv("UNITMETER_TEST_NO_SKIP") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return rig
}

// start starts a receiver and waits until it has listed the units. It ends with
// the test. Host name and stop records are the test's own, unless cfg has them.
func start(t testing.TB, cfg Config) (*Receiver, *logs) {
	t.Helper()
	r, l := unstarted(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), systemdtest.Patience)
	defer cancel()
	if err := r.Ready(ctx); err != nil {
		t.Fatalf("%v; it logged:\n%s", err, l)
	}
	return r, l
}

// unstarted is start without the waiting.
func unstarted(t testing.TB, cfg Config) (*Receiver, *logs) {
	t.Helper()
	l := &logs{}
	cfg.Logger = newLogger(l)
	if cfg.HostName == "" {
		cfg.HostName = "host"
	}
	if cfg.StopRecords == "" {
		cfg.StopRecords = "off"
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
		if t.Failed() {
			t.Logf("the receiver logged:\n%s", l)
		}
	})
	return r, l
}

func newLogger(l *logs) *slog.Logger { return slog.New(slog.NewJSONHandler(l, nil)) }

// logs is what a receiver has logged.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// line is one logged line.
type line struct {
	Level, Msg, Unit, Err string
}

// matching returns the lines whose message, unit and error contain all of texts.
func (l *logs) matching(t testing.TB, texts ...string) []line {
	t.Helper()
	var found []line
	for text := range strings.Lines(l.String()) {
		var one line
		if err := json.Unmarshal([]byte(text), &one); err != nil {
			t.Fatalf("logged line %q: %v", text, err)
		}
		whole := one.Level + " " + one.Msg + " " + one.Unit + " " + one.Err
		if !slices.ContainsFunc(texts, func(s string) bool { return !strings.Contains(whole, s) }) {
			found = append(found, one)
		}
	}
	return found
}

// only wants the messages with texts to be logged exactly n times.
func (l *logs) only(t testing.TB, n int, texts ...string) {
	t.Helper()
	if got := l.matching(t, texts...); len(got) != n {
		t.Errorf("logged %d lines with %q, want %d; all of them:\n%s", len(got), texts, n, l)
	}
}

// Counters are what the tests count in: systemd's own.
type Counters = systemd.Counters

// all are counters in which every number is n.
func all(n uint64) Counters { return counted(n, n, n, n) }

// counted are counters in systemd's order.
func counted(inBytes, inPackets, outBytes, outPackets uint64) Counters {
	return Counters{IngressBytes: inBytes, IngressPackets: inPackets, EgressBytes: outBytes, EgressPackets: outPackets}
}

// plus returns the sum of two counters.
func plus(a, b Counters) Counters { return systemdCounters(countersOf(a).Plus(countersOf(b))) }

// recheckEvery is after how many sweeps at the latest a unit without accounting is
// asked again.
const recheckEvery = 6

// systemdCounters undoes countersOf.
func systemdCounters(c ledger.Counters) Counters {
	return counted(c.Received.Bytes, c.Received.Packets, c.Sent.Bytes, c.Sent.Packets)
}

// Series is a series of a sweep.
type Series struct {
	*ledger.Series
	*Attributes
	Total Counters
}

// seriesOf returns the series of a unit or fold, or of the overflow for "", and whether it has points in the
// sweep.
func (s *Sweep) seriesOf(name string) (Series, bool) {
	if name == "" {
		return s.seriesWith(ledger.ID{Kind: ledger.Overflow})
	}
	return s.seriesWith(unitID(name))
}

func (s *Sweep) seriesWith(id ledger.ID) (Series, bool) {
	for one, attributes := range s.All() {
		if one.ID == id {
			return Series{one, attributes, systemdCounters(one.Total)}, one.Observed
		}
	}
	return Series{Series: &ledger.Series{}, Attributes: &Attributes{}}, false
}

// sweepUntil sweeps until ok, for things that take effect some time after the
// call that made them. It fails the test when they never do.
func sweepUntil(t testing.TB, r *Receiver, what string, ok func(*Sweep) bool) *Sweep {
	t.Helper()
	var s *Sweep
	systemdtest.Eventually(t, what, func() bool {
		s = r.Sweep(t.Context())
		return ok(s)
	})
	return s
}

// unitNamed returns what Units says of a unit, with Accounting "" if nothing.
func (r *Receiver) unitNamed(name string) systemd.Unit {
	units := r.Units()
	if i := slices.IndexFunc(units, func(u systemd.Unit) bool { return u.Name == name }); i >= 0 {
		return units[i]
	}
	return systemd.Unit{Name: name}
}

// The D-Bus names that the tests use.
const (
	systemdName         = "org.freedesktop.systemd1"
	managerPath         = "/org/freedesktop/systemd1"
	managerInterface    = "org.freedesktop.systemd1.Manager"
	unitInterface       = "org.freedesktop.systemd1.Unit"
	propertiesInterface = "org.freedesktop.DBus.Properties"
	busInterface        = "org.freedesktop.DBus"
	unitPathPrefix      = managerPath + "/unit/"
)

// unitPath returns the object path of a unit.
func unitPath(name string) string {
	var b strings.Builder
	for i, c := range []byte(name) {
		if c|0x20 >= 'a' && c|0x20 <= 'z' || i > 0 && c >= '0' && c <= '9' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "_%02x", c)
		}
	}
	return unitPathPrefix + b.String()
}

// listed is one row of ListUnitsByPatterns.
type listed struct {
	Name, Description, Load, Active, Sub, Followed string
	Path                                           dbus.ObjectPath
	JobID                                          uint32
	JobType                                        string
	JobPath                                        dbus.ObjectPath
}
