// Command demo meters a NATS server under load and checks every number.
//
// It boots a real systemd in throwaway namespaces, runs there a NATS server, an
// OpenTelemetry Collector and unitmeter as units, drives nats bench at the
// server, and sets what the Collector received beside what systemd says. It
// prints the commands that it runs, so that a person can type them elsewhere.
// Nothing on the host is changed and nothing stays behind.
//
// "make demo" builds what it needs and runs it. The exit code is 0 only when
// all four counters are the same in all four readings.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

const (
	unit        = "demo-nats.service"
	subscribers = 10
	messages    = 100_000
	messageSize = 128 // bytes

	unitFile = `[Unit]
Description=NATS server of the unitmeter demo

[Service]
ExecStart=nats-server -a 127.0.0.1 -m 8222
DynamicUser=yes
PrivateNetwork=yes
IPAccounting=yes
`
	// The Collector's file exporter writes here (inside).
	received = "/var/lib/otelcol/received.jsonl"
)

var errInterrupted = errors.New("interrupted")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	// A second signal ends the demo at once; the rig cleans up after itself.
	context.AfterFunc(ctx, stop)
	err := run(ctx, "bin/unitmeter")
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
	}
	switch {
	case ctx.Err() != nil:
		os.Exit(130)
	case err != nil:
		os.Exit(1)
	}
}

// run is the demo, with the unitmeter at the given path. The other files it
// takes from below the working directory, the root of the checkout.
func run(ctx context.Context, unitmeter string) (err error) {
	began := time.Now()
	step := func(format string, args ...any) {
		fmt.Printf("\n[%5.1f s] %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}

	files, dirs, err := findFiles(unitmeter)
	if err != nil {
		return err
	}
	step("booting a systemd of its own (namespaces over an overlay: the host stays as it is)")
	rig, err := systemdtest.Boot(ctx, systemdtest.Config{
		NoTraffic: true,
		Binds:     dirs,
		Logf:      func(format string, args ...any) { fmt.Printf("          "+format+"\n", args...) },
	})
	if ctx.Err() != nil && err != nil {
		return errInterrupted
	}
	if err != nil {
		return err
	}
	in := inside{rig}
	defer func() {
		switch {
		case ctx.Err() != nil:
			err = errInterrupted
		case err != nil:
			in.explain(ctx)
		}
		err = errors.Join(err, rig.Close())
	}()
	if err := in.install(ctx, files); err != nil {
		return err
	}

	step("starting a NATS server with IPAccounting in a network of its own")
	if err := in.write(ctx, "/etc/systemd/system/"+unit, unitFile); err != nil {
		return err
	}
	if _, err := in.run(ctx, "systemctl", "start", unit); err != nil {
		return err
	}

	step("starting an OpenTelemetry Collector with examples/otel-collector/config.yaml, and unitmeter")
	if _, err := in.run(ctx, "systemd-run", "--unit=otelcol", "-p", "StateDirectory=otelcol", "-E", "OTELCOL_FILE="+received,
		"otelcol", "--config", "/etc/otelcol/config.yaml"); err != nil {
		return err
	}
	if err := in.await(ctx, "the Collector to listen on port 4317", func() (bool, error) {
		out, err := in.quietly(ctx, "ss", "-Hltn", "sport = :4317")
		return out != "", err
	}); err != nil {
		return err
	}
	if _, err := in.run(ctx, "systemd-run", "--unit=unitmeter", "--service-type=notify", "-p", "StateDirectory=unitmeter",
		"-E", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317", "-E", "OTEL_METRIC_EXPORT_INTERVAL=1000",
		"unitmeter", "run"); err != nil {
		return err
	}
	if err := in.await(ctx, "the first metrics of "+unit+" to arrive", func() (bool, error) {
		got, err := in.collector()
		return got.points > 0, err
	}); err != nil {
		return err
	}

	step("load: 1 publisher sends %d messages of %d B, each to %d subscribers", messages, messageSize, subscribers)
	if err := in.load(ctx); err != nil {
		return err
	}

	step("waiting until the traffic has ended and the Collector has received a later sample")
	for range 5 {
		quiet, err := in.settle(ctx)
		if err != nil {
			return err
		}
		step("the same four counters, read in four ways")
		r, err := in.readAll(ctx)
		if err != nil {
			return err
		}
		// Whatever moved meanwhile would be no fault of the readings.
		if again, err := in.show(ctx); err != nil {
			return err
		} else if again != quiet {
			step("there was traffic meanwhile; waiting again")
			continue
		}
		fmt.Println()
		if !r.print(os.Stdout) {
			return errors.New("compare the readings: they differ, see the table above")
		}
		step("done: %d points of %s in %d requests reached the Collector; cleaning up", r.collector.points, unit, r.collector.requests)
		return nil
	}
	return fmt.Errorf("wait for quiet: %s still had traffic after five tries; run the demo again", unit)
}
