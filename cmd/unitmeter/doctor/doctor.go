// Package doctor checks everything that the agent needs, and names the fix for each
// fault.
//
//   - check: one question, such as "does systemd answer?"; later checks use what earlier ones found.
//   - finding: the answer, with a status: ok, skip, warn (the agent works, something is missing), fail.
//   - fix: the one command or setting that removes a fault.
//   - report: the findings in the order of the checks.
//
// All of it runs in the caller's goroutine. It changes nothing on the host: it removes
// its test file in the state directory, and detaches its test program, within a second.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/config"
)

// checkTimeout bounds one check.
const checkTimeout = 8 * time.Second

// Statuses of a check.
const (
	statusOK   = "ok"
	statusSkip = "skip" // could not be checked, or has no meaning here
	statusWarn = "warn" // the agent works, and something is missing
	statusFail = "fail" // the agent does not work
)

// finding is the result of one check.
type finding struct {
	Name   string `json:"name"`
	Status string `json:"status"`
	Found  string `json:"found"`
	// Fix is empty where nothing is to be done.
	Fix string `json:"fix,omitempty"`
}

// judge makes a finding; runCheck adds the name. Texts and errors among args may
// come from outside.
func judge(status, fix, format string, args []any) finding {
	for i, arg := range args {
		switch arg := arg.(type) {
		case error:
			args[i] = tty.Line(arg)
		case string:
			args[i] = tty.Clean(arg)
		}
	}
	return finding{Status: status, Fix: tty.Clean(fix), Found: fmt.Sprintf(format, args...)}
}

func good(format string, args ...any) finding { return judge(statusOK, "", format, args) }

// skipped is for what has no meaning here, and needs nothing done.
func skipped(format string, args ...any) finding { return judge(statusSkip, "", format, args) }

// skippedUntil is for a check that could be made in another way.
func skippedUntil(fix, format string, args ...any) finding {
	return judge(statusSkip, fix, format, args)
}

// warning and failure take the fix first, so that each has one.
func warning(fix, format string, args ...any) finding {
	return judge(statusWarn, fix, format, args)
}

func failure(fix, format string, args ...any) finding {
	return judge(statusFail, fix, format, args)
}

// check is one step of the doctor.
type check struct {
	name string
	run  func(ctx context.Context) finding
}

// doctor is what the checks share: an earlier one finds what later ones need.
type doctor struct {
	environ []string
	// cfg has the defaults where configured is false.
	cfg        config.Config
	configured bool
	m          *accounting.Manager // nil where no bus answers
	version    accounting.Version
	units      []accounting.Reading // nil where they could not be read
	stateless  bool                 // the state directory cannot be used
	nameless   bool                 // the name of the endpoint has no address
	reachable  bool                 // the endpoint takes connections
	agent      *agentService
	blocked    string // the fix of the first check on the way to the Collector that failed
}

// checks are all checks, in their order.
func (d *doctor) checks() []check {
	return slices.Concat([]check{
		{"environment", d.checkEnvironment},
		{"user", d.checkUser},
		{"kernel", d.checkKernel},
		{"cgroup", d.checkCgroup},
		{"bus", d.checkBus},
		{"systemd", d.withBus(d.checkVersion)},
		{"agent", d.withBus(d.checkAgent)},
		{"machine", d.withBus(d.checkMachine)},
		{"clock", d.checkClock},
		{"ebpf", d.checkMeter},
	}, d.rootChecks(), []check{
		{"ebpf-filters", d.ofEBPF(d.withBus(d.checkFilters))},
		{"ebpf-systemd", d.ofEBPF(d.withBus(d.checkBoth))},
		{"accounting-default", d.ofSystemd(d.withBus(d.checkDefault))},
		{"accounting", d.ofSystemd(d.withBus(d.checkAccounting))},
		{"counters", d.ofSystemd(d.withBus(d.checkCounters))},
		{"stop-records", d.ofSystemd(d.checkStopRecords)},
		{"state-directory", d.checkState},
		{"endpoint-name", d.withEndpoint(d.checkEndpointName)},
		{"endpoint-connection", d.withEndpoint(d.checkConnection)},
		{"endpoint-tls", d.withEndpoint(d.checkTLS)},
		{"collector", d.withEndpoint(d.checkCollector)},
		{"outbox", d.checkOutbox},
		{"own-traffic", d.checkOwnTraffic},
	})
}

// withBus skips a check where systemd cannot be reached.
func (d *doctor) withBus(run func(context.Context) finding) func(context.Context) finding {
	return func(ctx context.Context) finding {
		if d.m == nil {
			return skipped("systemd cannot be reached")
		}
		return run(ctx)
	}
}

// withEndpoint skips a check where there is no endpoint.
func (d *doctor) withEndpoint(run func(context.Context, endpoint) finding) func(context.Context) finding {
	return func(ctx context.Context) finding {
		switch {
		case !d.configured:
			return skipped("the environment is wrong")
		// Prometheus scrapes the agent, and the console needs nobody.
		case !slices.Contains(d.cfg.Exporters, "otlp"):
			return skipped("OTEL_METRICS_EXPORTER has no otlp")
		}
		ep, err := parseEndpoint(d.cfg.OTLP)
		if err != nil {
			return skipped("the endpoint %q is not valid: %v", d.cfg.OTLP.Endpoint, err)
		}
		f := run(ctx, ep)
		f.Fix = d.cfg.OTLP.Deciding(f.Fix)
		// Later checks of the same way fail of the same cause.
		if f.Status == statusFail && d.blocked == "" {
			d.blocked = f.Fix
		}
		return f
	}
}

// Config says how to check.
type Config struct {
	Environ []string // variables of the shell, as os.Environ has them
	Here    bool     // check with this user and these variables, not with those of unitmeter.service
	JSON    bool     // write the report as one JSON object
	// Out gets the report, Notes a line about how it was made.
	Out, Notes io.Writer
}

// Run makes all checks and writes the report. A failed check is an error; a
// warning is none, since the agent works.
func Run(ctx context.Context, cfg Config) error {
	// Each finding is shown at once: a check that takes its eight seconds must not
	// look like a program that hangs.
	show := func(f finding) { writeFinding(cfg.Out, f) }
	if cfg.JSON {
		show = func(finding) {}
	}
	var findings []finding
	var agent *agentService // nil: checked with this shell
	if !cfg.Here {
		var note string
		if findings, agent, note = examineAsAgent(ctx, cfg.Environ); note != "" {
			fmt.Fprintln(cfg.Notes, tty.Clean(note))
		}
		for _, f := range findings {
			show(f)
		}
	}
	if agent == nil {
		findings = examine(ctx, cfg.Environ, show)
	}
	// A report that was interrupted has no summary: it would count too few.
	if err := ctx.Err(); err != nil {
		return err
	}
	var err error
	if cfg.JSON {
		err = tty.WriteJSON(cfg.Out, report{worst(findings), findings})
	} else {
		_, err = fmt.Fprintf(cfg.Out, "\n%s\n%s", summary(findings), agent.next(findings))
	}
	if err != nil {
		return err
	}
	if failed := statuses(findings)[statusFail]; failed > 0 {
		return fmt.Errorf("%d of %d checks failed; apply the fixes from the top, and run it again", failed, len(findings))
	}
	return nil
}

// report is the JSON object. The doctor reads it too: examineAsAgent.
type report struct {
	Worst  string    `json:"worst"`
	Checks []finding `json:"checks"`
}

// examine makes all checks, in their order, and shows each when it is made.
func examine(ctx context.Context, environ []string, show func(finding)) []finding {
	// The connection is opened by the check of the bus, for all that come after it.
	d := &doctor{environ: environ}
	defer func() {
		if d.m != nil {
			d.m.Close()
		}
	}()
	var findings []finding
	for _, c := range d.checks() {
		if ctx.Err() != nil {
			break
		}
		if f := runCheck(ctx, c); f.Status != "" {
			findings = append(findings, f)
			show(f)
		}
	}
	return findings
}

// runCheck gives a check its name and its time. A finding without a status says that
// there is nothing to check.
func runCheck(ctx context.Context, c check) finding {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	f := c.run(ctx)
	f.Name = c.name
	return f
}

// statuses counts the findings by status.
func statuses(findings []finding) map[string]int {
	counts := map[string]int{}
	for _, f := range findings {
		counts[f.Status]++
	}
	return counts
}

// worst is the status of the whole report. A skipped check is no fault.
func worst(findings []finding) string {
	counts := statuses(findings)
	switch {
	case counts[statusFail] > 0:
		return statusFail
	case counts[statusWarn] > 0:
		return statusWarn
	}
	return statusOK
}

// summary is the last line of the report.
func summary(findings []finding) string {
	counts := statuses(findings)
	text := fmt.Sprintf("%d ok", counts[statusOK])
	for _, status := range []string{statusWarn, statusFail, statusSkip} {
		if n := counts[status]; n > 0 {
			text += fmt.Sprintf(", %d %s", n, status)
		}
	}
	return text
}

// writeFinding writes one finding for a terminal of 80 columns. A fix is on a line
// of its own, however long, so that it can be copied.
func writeFinding(w io.Writer, f finding) {
	const indent, width = 27, 79
	fmt.Fprintf(w, "%-5s %-20s %s\n", f.Status, f.Name, tty.Wrap(f.Found, indent, width))
	if f.Fix != "" {
		fmt.Fprintf(w, "      fix: %s\n", f.Fix)
	}
}

// checkEnvironment reads the configuration. The agent refuses to start with
// what fails here.
func (d *doctor) checkEnvironment(context.Context) finding {
	cfg, err := config.Load(d.environ)
	if err != nil {
		// The fix is that of the first problem: the others may follow from it.
		fix := "unitmeter help environment"
		if p := (*config.Problem)(nil); errors.As(err, &p) {
			fix = p.Variable + ": " + p.Hint
		}
		return failure(fix, "%s; the checks that need the settings use the defaults or are skipped", err)
	}
	d.cfg, d.configured = cfg, true
	set := 0
	for _, kv := range d.environ {
		if ours(kv) {
			set++
		}
	}
	// What is valid, and yet leaves the agent without anything to do, may be
	// a variable that was set for another program.
	if cfg.Disabled {
		return failure("unset OTEL_SDK_DISABLED", "OTEL_SDK_DISABLED is true: the agent does nothing")
	}
	if len(cfg.Exporters) == 0 {
		return failure("unset OTEL_METRICS_EXPORTER", "OTEL_METRICS_EXPORTER is none: the agent sends nothing")
	}
	found := fmt.Sprintf("%d variables OTEL_* and UNITMETER_*; exporters: %s", set, strings.Join(cfg.Exporters, ", "))
	if cfg.OTLP.Endpoint != "" {
		found += fmt.Sprintf("; OTLP over %s to %s", cfg.OTLP.Protocol, cfg.OTLP.Endpoint)
	}
	if len(cfg.Warnings) > 0 {
		return warning("unitmeter help environment", "%s. %s", found, strings.Join(cfg.Warnings, ". "))
	}
	return good("%s", found)
}

// ours reports whether a variable configures unitmeter.
func ours(kv string) bool {
	return strings.HasPrefix(kv, "OTEL_") || strings.HasPrefix(kv, "UNITMETER_")
}

// checkUser reports the user that the checks run as: rights differ.
func (d *doctor) checkUser(context.Context) finding {
	uid := os.Geteuid()
	name := userName(uid)
	// Between these systemd takes the uids of DynamicUser=yes. The check of the bus
	// knows whether that is a problem: to dbus-broker it is none.
	if uid >= 61184 && uid <= 65519 {
		return good("uid %d (%s), a dynamic user", uid, name)
	}
	if uid == 0 {
		return good("root; to check the rights of the agent's user, run it as that user")
	}
	return good("uid %d (%s)", uid, name)
}
