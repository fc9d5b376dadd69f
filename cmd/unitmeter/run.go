package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/go-logr/logr"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/doctor"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/receiver"
)

const (
	// firstContact is how long the first collection waits for systemd.
	firstContact = 5 * time.Second
	// stopTimeout bounds the last collection and its delivery. It is below
	// the 10 s that container engines give, and systemd's 90 s.
	stopTimeout = 5 * time.Second
)

// run is the agent. It reads as the data flows: from systemd through the
// receiver and the meter to the exporters.
func run(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	if _, err := parse(t, flags, 0); err != nil {
		return err
	}
	cfg, err := loadConfig(t)
	if err != nil {
		return err
	}
	log := newLogger(t.stderr, cfg)
	defer outliveHangups(log)()
	for _, warning := range cfg.Warnings {
		log.Warn(warning)
	}
	if cfg.Disabled {
		const text = "nothing to do: OTEL_SDK_DISABLED is true"
		log.Info(text)
		notify(log, daemon.SdNotifyReady)
		status(ctx, log, cfg, nil, func() (string, time.Time) { return text, time.Now() })
		return nil
	}
	trimMemory()
	otel.SetLogger(logr.FromSlogHandler(log.Handler()))
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { logSDKError(log, err) }))

	for {
		again, err := meter(ctx, t, cfg, log)
		if err != nil || !again {
			return err
		}
	}
}

// outliveHangups keeps SIGHUP from ending the process until stop is called. systemd
// calls that a clean end, and there would be no last collection. There is nothing
// to reload: the exporter reads files again when they have changed.
func outliveHangups(log *slog.Logger) (stop func()) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	go func() { // until stop
		for range hangups {
			log.Info("SIGHUP: certificate, key and header files are read again when they change; variables need a restart")
		}
	}()
	return func() {
		signal.Stop(hangups)
		close(hangups)
	}
}

// logSDKError logs why a reader could not collect or hand over. A cycle that the
// end of the agent cut short is no error: the last collection has what it had.
func logSDKError(log *slog.Logger, err error) {
	switch {
	case errors.Is(err, context.Canceled):
	case errors.Is(err, context.DeadlineExceeded):
		log.Error("collect and export metrics", "err", err, "next", "raise OTEL_METRIC_EXPORT_TIMEOUT")
	default:
		log.Error("collect and export metrics", "err", err)
	}
}

// meter is run with a checked configuration. Where the state could not be read
// at the start, it works without until it can be, and then asks to be called
// again.
func meter(ctx context.Context, t *terminal, cfg config.Config, log *slog.Logger) (again bool, err error) {
	state, err := openState(ctx, cfg, log)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, state.close()) }()
	var waiting sync.WaitGroup
	defer waiting.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // before the Wait: an error must not wait for the state
	if state.store != nil && state.durable == nil {
		waiting.Go(func() {
			if again = state.await(ctx); again {
				cancel()
			}
		})
	}

	rcvConfig := cfg.Receiver
	rcvConfig.Logger = log
	if state.durable != nil {
		rcvConfig.State = state.durable.State()
	}
	rcv, err := receiver.New(rcvConfig)
	if err != nil {
		return false, usageError{err}
	}
	res, err := exporter.Resource(ctx, buildVersion())
	if err != nil {
		return false, err
	}
	out, err := openExporters(ctx, t, cfg, rcv, res, state, log)
	if err != nil {
		return false, err
	}
	provider := sdkmetric.NewMeterProvider(append(out.readers(cfg),
		sdkmetric.WithResource(res),
		// The receiver bounds the number of series itself, and loses none.
		sdkmetric.WithCardinalityLimit(0),
	)...)
	scope := provider.Meter("github.com/unitmeter/unitmeter", metric.WithInstrumentationVersion(buildVersion()))
	host, _ := res.Set().Value("host.name")
	err = errors.Join(rcv.Register(scope), out.main.Register(scope, host.AsString()))
	if state.durable != nil {
		err = errors.Join(err, state.durable.Register(scope, host.AsString()))
	}
	if err != nil {
		return false, errors.Join(err, provider.Shutdown(ctx), out.close(ctx))
	}

	if err := serve(ctx, cfg, rcv, provider, out, log); err != nil {
		return false, fmt.Errorf("stop: %w", err)
	}
	waiting.Wait()
	return again, nil
}

// serve collects and sends until ctx ends, and then once more.
func serve(ctx context.Context, cfg config.Config, rcv *receiver.Receiver, provider *sdkmetric.MeterProvider, out *outputs, log *slog.Logger) error {
	// The receiver must outlive ctx: shutting down collects once more.
	running, stopReceiver := context.WithCancel(context.WithoutCancel(ctx))
	var receiving sync.WaitGroup
	receiving.Go(func() { _ = rcv.Run(running) }) // it ends with running and nothing else
	log.Info("started", "version", buildVersion(), "exporters", cfg.Exporters, "interval", cfg.Interval)

	ready, stopWaiting := context.WithTimeout(ctx, firstContact)
	if err := rcv.Ready(ready); err == nil {
		// The first points now, and not after a whole interval.
		receiving.Go(func() { _ = provider.ForceFlush(ctx) }) // the exporters log their errors
	}
	stopWaiting()
	if out.prometheus != nil {
		out.prometheus.Serve() // not before: a first scrape without units would look like their end
	}
	notify(log, daemon.SdNotifyReady)
	began, counting := time.Now(), make(chan struct{})
	receiving.Go(func() { // until the first sweep
		defer close(counting)
		if sweep := first(running, rcv); sweep != nil {
			report(log, metering(sweep, rcv))
		}
	})
	status(ctx, log, cfg, counting, func() (string, time.Time) {
		sweep := rcv.Last()
		if sweep == nil {
			return "", began
		}
		return statusText(metering(sweep, rcv), out.main.Health()), sweep.Time
	})

	log.Info("stopping")
	notify(log, daemon.SdNotifyStopping)
	// First a last collection and its delivery, with scrapes until then. Then the
	// connection to systemd ends, which these needed, and last the state, to which
	// they were committed.
	ending, stopEnding := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer stopEnding()
	err := errors.Join(provider.Shutdown(ending), out.close(ending))
	stopReceiver()
	receiving.Wait()
	return err
}

// first waits for the first sweep; nil where ctx ends before.
func first(ctx context.Context, rcv *receiver.Receiver) *receiver.Sweep {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		if sweep := rcv.Last(); sweep != nil {
			return sweep
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// report logs how many units are metered, and what to do where most are not.
func report(log *slog.Logger, text string) {
	if strings.Contains(text, accounting.EnableAll) {
		log.Warn(text)
	} else {
		log.Info(text)
	}
}

// outputs are the exporters of a run.
type outputs struct {
	main       *exporter.Exporter // commits each cycle, and sends it where OTLP is asked for
	console    sdkmetric.Exporter
	prometheus *exporter.Prometheus
}

func openExporters(ctx context.Context, t *terminal, cfg config.Config, rcv *receiver.Receiver, res *resource.Resource, state *state, log *slog.Logger) (out *outputs, err error) {
	out = &outputs{}
	defer func() {
		if err != nil {
			err = errors.Join(err, out.close(ctx))
		}
	}()
	main := exporter.Config{Temporality: cfg.Temporality, Source: rcv, Logger: log}
	for _, name := range cfg.Exporters {
		switch name {
		case "otlp":
			main.OTLP = &cfg.OTLP
		case "console":
			if out.console, err = exporter.NewConsole(t.stdout, rcv); err != nil {
				return out, err
			}
		case "prometheus":
			cfg.Prometheus.Source, cfg.Prometheus.Resource = rcv, res
			cfg.Prometheus.Version, cfg.Prometheus.Logger = buildVersion(), log
			if out.prometheus, err = exporter.NewPrometheus(ctx, cfg.Prometheus); err != nil {
				return out, err
			}
			log.Info("listening for Prometheus", "address", out.prometheus.Addr().String())
		}
	}
	if state.durable != nil {
		main.Sent, main.Outbox = state.durable.Sent(), state.durable
	}
	out.main, err = exporter.New(ctx, main)
	return out, err
}

// readers makes one reader for each exporter.
func (o *outputs) readers(cfg config.Config) []sdkmetric.Option {
	periodic := func(e sdkmetric.Exporter) sdkmetric.Option {
		return sdkmetric.WithReader(sdkmetric.NewPeriodicReader(e,
			sdkmetric.WithInterval(cfg.Interval), sdkmetric.WithTimeout(cfg.ExportTimeout)))
	}
	options := []sdkmetric.Option{periodic(&frugal{Exporter: o.main, patience: min(time.Second, cfg.Interval/4)})}
	if o.console != nil {
		options = append(options, periodic(o.console))
	}
	if o.prometheus != nil {
		options = append(options, sdkmetric.WithReader(o.prometheus.Reader()))
	}
	return options
}

// close ends what the MeterProvider does not.
func (o *outputs) close(ctx context.Context) error {
	if o.prometheus != nil {
		return o.prometheus.Shutdown(ctx)
	}
	return nil
}

// status reports the state to the service manager, and feeds its watchdog for as
// long as there are signs of life, until ctx ends: ask gives what to say ("" is
// nothing), and when the last sign was. What it says is in "systemctl status", and
// where the doctor finds why nothing is delivered. It asks at each tick, and once
// when ready is closed, if it is not nil.
func status(ctx context.Context, log *slog.Logger, cfg config.Config, ready <-chan struct{}, ask func() (text string, alive time.Time)) {
	if os.Getenv("NOTIFY_SOCKET") == "" { // nobody listens
		<-ctx.Done()
		return
	}
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("no watchdog", "err", err)
	}
	every := cfg.Interval
	if watchdog > 0 {
		every = min(every, watchdog/3)
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	last := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-ready:
			ready = nil
		}
		text, alive := ask()
		if text != last {
			last = text
			notify(log, "STATUS="+text)
		}
		// Two missed collections are a reason to start again; a systemd that
		// does not answer, or a Collector that is away, is none.
		if watchdog > 0 && time.Since(alive) < 3*cfg.Interval+cfg.ExportTimeout {
			notify(log, daemon.SdNotifyWatchdog)
		}
	}
}

func statusText(text string, health exporter.Health) string {
	if health.Err != nil {
		text += doctor.FailingSince + health.Since.UTC().Format(time.RFC3339) + ": " + tty.Line(health.Err)
	}
	return text
}

// metering says how many units are metered, and what to do where most have IP
// accounting off. The agent's own unit has it on as a rule.
func metering(sweep *receiver.Sweep, rcv *receiver.Receiver) string {
	text := fmt.Sprintf("metering %d of %d units", sweep.Accounted, sweep.Units)
	off := 0
	for _, u := range rcv.Units() {
		if u.Accounting == "off" && accounting.CarriesTraffic(u.Name) {
			off++
		}
	}
	if rcv.Counting().Source == receiver.DBus && off > sweep.Accounted {
		text += fmt.Sprintf(": IP accounting is off for %d; run %s, or use the eBPF source (unitmeter enable --ebpf)", off, accounting.EnableAll)
	}
	return text
}

// notify sends a message to the service manager, if there is one (sd_notify(3)).
func notify(log *slog.Logger, message string) {
	if _, err := daemon.SdNotify(false, message); err != nil {
		log.Debug("notify the service manager", "err", err)
	}
}
