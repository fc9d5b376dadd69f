// Command unitmeter is an OpenTelemetry metrics agent that meters the network
// traffic of every systemd unit.
//
// Two things are needed: a host whose units are counted, by systemd's IP accounting
// ("unitmeter enable --default") or by eBPF ("unitmeter enable --ebpf"); and an OTLP
// receiver at OTEL_EXPORTER_OTLP_ENDPOINT. "unitmeter run" sends the traffic of each
// unit there, and "unitmeter once" prints it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/doctor"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/config"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// version is set by the Makefile with -ldflags "-X main.version=...".
var version string

// Exit codes, as documented in "unitmeter help".
const (
	exitOK      = 0
	exitFailure = 1 // the work could not be done
	exitUsage   = 2 // the command line or the environment is wrong
)

// endLimit is the longest time from the first signal to the end. It is above
// stopTimeout and below the packaged unit's TimeoutStopSec.
const endLimit = 15 * time.Second

func main() {
	// A second signal ends the process at once: the first one has restored
	// the default by then.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, func() {
		stop()
		time.AfterFunc(endLimit, func() {
			fmt.Fprintf(os.Stderr, "unitmeter: did not end within %s of the signal, and ends now; look for a disk or a reader that hangs\n", endLimit)
			os.Exit(exitFailure)
		})
	})
	t := &terminal{args: os.Args[1:], environ: os.Environ(), stdout: os.Stdout, stderr: os.Stderr}
	withhold()
	os.Exit(dispatch(ctx, t))
}

// withhold removes the variables of OTLP from the environment of the process. The
// official exporters read them as well. They log invalid ones with their values, which
// may be secrets, even if the variable for metrics wins.
func withhold() {
	for _, v := range config.Variables() {
		if v.Specific != "" {
			_, _ = os.Unsetenv(v.Name), os.Unsetenv(v.Specific)
		}
	}
}

// terminal is what a command gets from the outside.
type terminal struct {
	args, environ  []string
	stdout, stderr io.Writer
}

// command is one subcommand.
type command struct {
	name, arguments, summary string
	run                      func(ctx context.Context, t *terminal, flags *flag.FlagSet) error
}

// commands lists the subcommands in the order of the help.
func commands() []command {
	return []command{
		{"run", "", "meter all units and send the metrics until stopped (the default)", run},
		{"once", "[--json] [--interval D] [--source S] [UNIT...]", "read all units once and print their traffic", once},
		{"top", "[--once] [--interval D] [--bytes] [--source S] [UNIT...]", "show the speeds of all units, live", showSpeeds},
		{"units", "[--json] [UNIT...]", "list all units: metered or not, and why", units},
		{"enable", "[--runtime] [--dry-run] UNIT...|--all|--lost [--follow]|--default|--ebpf|--rearm", "switch IP accounting on", switchOn},
		{"disable", "[--runtime] [--dry-run] UNIT...|--all|--default|--ebpf|--rearm|--reset", "switch IP accounting off", switchOff},
		{"meter", "load|unload|status", "load the eBPF program that counts for UNITMETER_SOURCE=ebpf, or take it away", manageMeter},
		{"doctor", "[--json] [--here]", "check everything that the agent needs, and name the fix for each fault", diagnose},
		{"history", "[--since T] [--until T] [--hourly|--daily|--weekly|--monthly] [-n N] [--json|--csv] [UNIT...]|--quarantined [--retry]", "print the traffic of units in the last 24 hours, or since T", showHistory},
		{"version", "", "print the version", printVersion},
		{"help", "[COMMAND|environment]", "print this help, or the variables that configure unitmeter", help},
	}
}

// usageError is a mistake in the command line or the environment.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// dispatch runs the subcommand that the arguments name and returns the exit
// code. Errors are printed here and nowhere else.
func dispatch(ctx context.Context, t *terminal) int {
	name, rest := "run", t.args
	if len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
		name, rest = rest[0], rest[1:]
	} else if len(rest) > 0 {
		switch rest[0] {
		case "-h", "-help", "--help":
			name, rest = "help", rest[1:]
		case "-v", "-V", "-version", "--version":
			name, rest = "version", rest[1:]
		}
	}
	all := commands()
	i := slices.IndexFunc(all, func(c command) bool { return c.name == name })
	if i < 0 {
		fmt.Fprintf(t.stderr, "unitmeter: %v\n", noCommand(name))
		return exitUsage
	}
	t.args = rest
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	err := supported(name, runtime.GOOS)
	if err == nil {
		err = all[i].run(ctx, t, flags)
	}
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, flag.ErrHelp):
		printCommandHelp(t.stdout, all[i], flags)
		return exitOK
	case errors.As(err, &usage):
		fmt.Fprintf(t.stderr, "unitmeter %s: %s\n", name, indent(err))
		return exitUsage
	default:
		fmt.Fprintf(t.stderr, "unitmeter %s: %s\n", name, indent(err))
		return exitFailure
	}
}

// supported returns an error for a command that cannot work on a system: all but
// these need systemd.
func supported(name, system string) error {
	if system == "linux" || slices.Contains([]string{"history", "version", "help"}, name) {
		return nil
	}
	return fmt.Errorf("run on %s: %w; this command needs Linux with systemd", system, errors.ErrUnsupported)
}

// indent sets the lines of a joined error below each other, cleaned.
func indent(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	for i := range lines {
		lines[i] = tty.Clean(lines[i])
	}
	return strings.Join(lines, "\n  ")
}

// parse reads the flags of a subcommand and checks the number of its
// arguments.
func parse(t *terminal, flags *flag.FlagSet, maxArgs int) ([]string, error) {
	// Flags may stand behind arguments, as in "once nats.service --json", but not
	// behind "--". And -.mount and -.slice are units, of which the doctor and
	// others speak as of any other.
	var args, rest, plain []string
	for i, arg := range t.args {
		if arg == "--" {
			plain = append(plain, t.args[i+1:]...)
			break
		}
		if strings.HasPrefix(arg, "-.") {
			plain = append(plain, arg)
		} else {
			rest = append(rest, arg)
		}
	}
	for {
		if err := flags.Parse(rest); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return nil, err
			}
			return nil, usageError{explainFlag(err, flags, t.args)}
		}
		if flags.NArg() == 0 {
			break
		}
		args, rest = append(args, flags.Arg(0)), flags.Args()[1:]
	}
	args = append(args, plain...)
	if maxArgs >= 0 && len(args) > maxArgs {
		return nil, usageError{fmt.Errorf("%q is one argument too many; see \"unitmeter help %s\"", args[maxArgs], flags.Name())}
	}
	return args, nil
}

// parsePatterns reads the flags of a subcommand, and its other arguments as
// patterns for the names of units.
func parsePatterns(t *terminal, flags *flag.FlagSet) (none systemd.Patterns, err error) {
	args, err := parse(t, flags, -1)
	if err != nil {
		return none, err
	}
	patterns, err := accounting.Patterns(args)
	if err != nil {
		return none, usageError{err}
	}
	return patterns, nil
}

// sourceFlag declares the flag --source.
func sourceFlag(flags *flag.FlagSet, to *string) {
	*to = receiver.Auto
	flags.Func("source", "who counts: dbus (systemd), ebpf (a program, loaded or attached until the end), or auto, the default", func(name string) error {
		if !slices.Contains(accounting.Sources(), name) {
			return fmt.Errorf("use one of %s", strings.Join(accounting.Sources(), ", "))
		}
		*to = name
		return nil
	})
}

// loadUnits reads what the environment says of units. On a host with the service, root
// gets the service's settings: a command is about what that meters.
func loadUnits(ctx context.Context, t *terminal) (receiver.Config, error) {
	// The timeouts go with UNITMETER_SWEEP_TIMEOUT.
	names := []string{"OTEL_METRIC_EXPORT_TIMEOUT", "DBUS_SYSTEM_BUS_ADDRESS"}
	for _, v := range config.Variables() {
		if v.Group == config.GroupUnits && v.Name != "UNITMETER_SOURCE" { // which has a flag
			names = append(names, v.Name)
		}
	}
	var taken, shown []string
	for _, kv := range doctor.ServiceVariables(ctx, t.environ) {
		if name, value, _ := strings.Cut(kv, "="); slices.Contains(names, name) && value != "" {
			taken, shown = append(taken, kv), append(shown, tty.Clean(kv))
		}
	}
	if len(taken) > 0 {
		fmt.Fprintf(t.stderr, "with the settings of unitmeter.service: %s\n", strings.Join(shown, " "))
	}
	cfg, err := config.Load(append(taken, t.environ...))
	if err != nil {
		return cfg.Receiver, usageError{err}
	}
	return cfg.Receiver, nil
}

// loadConfig reads the environment.
func loadConfig(t *terminal) (config.Config, error) {
	cfg, err := config.Load(t.environ)
	if err != nil {
		return cfg, usageError{err}
	}
	return cfg, nil
}

func printVersion(_ context.Context, t *terminal, flags *flag.FlagSet) error {
	if _, err := parse(t, flags, 0); err != nil {
		return err
	}
	_, err := fmt.Fprintf(t.stdout, "unitmeter %s\n", buildVersion())
	return err
}

// buildVersion is the version that the Makefile stamped, else what Go knows of
// the module, as after "go install".
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
