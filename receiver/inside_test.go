package receiver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// PID 1's private socket refuses peers of another PID namespace, and other
// users than root need a bus of their own: such tests run this test binary
// within the rig, where it does one of these tasks and prints the result.

// insideReport is the result of a task.
type insideReport struct {
	Err string

	Connections, Answered int // private

	Start time.Time // starts

	Sweeps               int // thousand
	MissingByName        map[string]int
	WrongByName          map[string]uint64
	Partial              int
	Health               string
	IOPoints, PackPoints int
	Logs                 string
}

func runInside(mode string) int {
	var report insideReport
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var err error
	switch mode {
	case "private":
		err = report.private(ctx)
	case "thousand":
		err = report.thousand(ctx)
	case "starts":
		err = report.starts(ctx)
	case "relay":
		err = relay()
	default:
		err = fmt.Errorf("unknown task %q", mode)
	}
	if err != nil {
		report.Err = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// inside runs a task within the rig, behind the command of as, and returns its
// report.
func inside(t *testing.T, rig *systemdtest.Rig, mode string, as ...string) insideReport {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command := append(as, exe)
	cmd := rig.Command(t.Context(), command[0], command[1:]...)
	cmd.Env = append(cmd.Env, insideMode+"="+mode)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("run %s within the rig: %v\n%s", mode, err, out)
	}
	var report insideReport
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	if report.Err != "" {
		t.Fatal(report.Err)
	}
	return report
}

// privateCall makes one connection and one call on it.
func privateCall(ctx context.Context) error {
	conn, err := bus.Open(ctx, bus.Config{Address: bus.PrivateSocket})
	if err != nil {
		return err
	}
	var path dbus.ObjectPath
	err = conn.Manager().CallWithContext(ctx, managerInterface+".GetUnit", 0, "init.scope").Store(&path)
	return errors.Join(err, conn.Close())
}

// privateSource lets a source list its units.
func privateSource(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	none := func(string) bool { return false }
	source := systemd.New(systemd.Config{Bus: bus.PrivateSocket, Types: []string{"scope"}, Metered: none, Balanced: none})
	done := make(chan struct{})
	go func() { defer close(done); _ = source.Run(ctx) }()
	err := source.Ready(ctx)
	cancel()
	<-done
	return err
}

// starts reads when the series of one unit starts.
func (report *insideReport) starts(ctx context.Context) error {
	unit := os.Getenv("UNIT")
	r, err := New(Config{Include: []string{unit}, HostName: "host", StopRecords: "off"})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	defer func() { cancel(); <-done }()
	if err := r.Ready(ctx); err != nil {
		return err
	}
	s, ok := r.Sweep(ctx).seriesOf(unit)
	if !ok {
		return fmt.Errorf("%s has no series", unit)
	}
	report.Start = s.Start
	return nil
}

// private makes 500 connections to PID 1's own socket, one after the other.
// Each must get the answer to its first call: PID 1 does not look at a call
// that arrives together with the handshake.
func (r *insideReport) private(ctx context.Context) error {
	for range 500 {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		var err error
		if r.Connections%2 == 0 { // the first call comes from godbus, or from a sweep
			err = privateCall(ctx)
		} else {
			err = privateSource(ctx)
		}
		cancel()
		r.Connections++
		if err != nil {
			return fmt.Errorf("connection %d: %w", r.Connections, err)
		}
		r.Answered++
	}
	return nil
}

// relayAddress is where relay listens, as the rig sees it. A receiver tells a
// private socket by the end of its name.
const relayAddress = "/run/relay/systemd/private"

// relay stands between the tests outside and PID 1's private socket, which
// would refuse them, until it is killed with the rig.
func relay() error {
	if err := os.MkdirAll(filepath.Dir(relayAddress), 0o755); err != nil {
		return err
	}
	l, err := net.Listen("unix", relayAddress)
	if err != nil {
		return err
	}
	for {
		near, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer near.Close()
			far, err := net.Dial("unix", strings.TrimPrefix(bus.PrivateSocket, "unix:path="))
			if err != nil {
				return // PID 1 re-executes itself; the receiver tries again
			}
			defer far.Close()
			go func() {
				_, _ = io.Copy(far, near) // its end is the end of the connection
				_ = far.Close()
			}()
			_, _ = io.Copy(near, far)
		}()
	}
}

// buses runs a test over the system bus, and as an agent of root uses it: signals over
// the bus, sweeps over PID 1's private socket.
func buses(t *testing.T, test func(t *testing.T, rig *systemdtest.Rig, at Config)) {
	rig := theRig(t)
	t.Run("system bus", func(t *testing.T) { test(t, rig, Config{Bus: rig.SystemBus()}) })
	t.Run("both", func(t *testing.T) {
		test(t, rig, Config{Bus: "auto", SystemBus: rig.SystemBus(), privateSocket: privateSocket(t, rig), privateFrom: 1})
	})
}

// privateSocket returns an address of PID 1's private socket for tests outside.
func privateSocket(t *testing.T, rig *systemdtest.Rig) string {
	t.Helper()
	if _, err := os.Stat(rig.Path(relayAddress)); err != nil {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := rig.Command(context.Background(), exe)
		cmd.Env = append(cmd.Env, insideMode+"=relay")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { _ = cmd.Wait() }() // it ends with the rig
	}
	systemdtest.Eventually(t, "the relay listens", func() bool {
		_, err := os.Stat(rig.Path(relayAddress))
		return err == nil
	})
	return "unix:path=" + rig.Path(relayAddress)
}

// thousandUnits is how many units the test of the same name has.
const thousandUnits = 1000

func thousandName(i int) string { return fmt.Sprintf("thousand@%d.service", i) }

// thousand sweeps a thousand units over dbus-daemon, as whoever runs it, and
// then collects them through the SDK.
func (r *insideReport) thousand(ctx context.Context) error {
	l := &logs{}
	receiver, err := New(Config{Bus: "system", Include: []string{"thousand@*"}, StopRecords: "off", Logger: newLogger(l)})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); _ = receiver.Run(ctx) }()
	defer func() { cancel(); <-done; r.Logs = l.String() }()
	if err := receiver.Ready(ctx); err != nil {
		return err
	}
	r.MissingByName, r.WrongByName = map[string]int{}, map[string]uint64{}
	for r.Sweeps = 0; r.Sweeps < 5; r.Sweeps++ {
		sweep := receiver.Sweep(ctx)
		if sweep.Partial {
			r.Partial++
		}
		for i := range thousandUnits {
			name := thousandName(i)
			s, ok := sweep.seriesOf(name)
			switch {
			case !ok:
				r.MissingByName[name]++
			case s.Total.EgressBytes != thousandBytes:
				r.WrongByName[name] = s.Total.EgressBytes
			}
		}
	}
	r.Health = fmt.Sprintf("%+v", receiver.systemd.Health())

	reader := sdkmetric.NewManualReader()
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithCardinalityLimit(0))
	if err := receiver.Register(provider.Meter("test")); err != nil {
		return err
	}
	var collected metricdata.ResourceMetrics
	if err := reader.Collect(ctx, &collected); err != nil {
		return err
	}
	for _, scope := range collected.ScopeMetrics {
		for _, m := range scope.Metrics {
			sum, _ := m.Data.(metricdata.Sum[int64])
			switch m.Name {
			case IOName:
				r.IOPoints = len(sum.DataPoints)
			case PacketCountName:
				r.PackPoints = len(sum.DataPoints)
			}
		}
	}
	return nil
}
