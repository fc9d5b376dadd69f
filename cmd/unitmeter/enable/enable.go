// Package enable switches the counting of traffic on and off: IP accounting of units,
// systemd's default for it, or the services that count by eBPF or restore lost counters.
//
// Two things are needed of it: a [Config] with a [Subject], and [Run].
//
//   - subject: the thing to switch. Units are switched by calls to systemd, all others by
//     files and systemctl.
//   - step: one change of a file or by systemctl, with its undoing.
//   - lost: IP accounting is on, and systemd has lost the counters.
//
// Changes survive a reboot unless Config.Runtime is set. If switching on by files fails at
// a step, the steps before it are undone.
//
// Run is one goroutine.
package enable

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
)

// Subject is what Run switches on or off.
type Subject int

const (
	Units   Subject = iota // those of Config.Names
	All                    // the metered and running units
	Lost                   // the units whose counters systemd has lost
	Default                // systemd's default for all units
	EBPF                   // counting by eBPF in the agent's service
	Rearm                  // the service that restores lost counters
	Reset                  // all of these at once; off only
)

// Config has the settings of Run. Receiver and Out are required.
type Config struct {
	Receiver receiver.Config // the buses, and which units are metered
	Out      io.Writer
	On       bool
	Subject  Subject
	Names    []string // of Units: names and patterns, as accounting.Patterns makes them
	Follow   bool     // of Lost: again after each reload of systemd, until ctx ends
	Runtime  bool     // until the next boot only; of Units, All, Lost and Default
	DryRun   bool     // say what would be changed
}

// Run makes the change, and prints on Out what it has changed. It needs root, or
// polkit's manage-units for units. It finds all units before it changes the first:
// with a wrong name, nothing is changed.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Subject == EBPF && cfg.DryRun {
		return cfg.takeSteps(sourceSteps(ctx, cfg.On))
	}
	connect := accounting.Connect
	if cfg.Follow {
		connect = accounting.Follow
	}
	m, err := connect(ctx, cfg.Receiver.Addresses()...)
	if err != nil {
		return fmt.Errorf("%w; see \"unitmeter doctor\"", accounting.Explain(err))
	}
	defer m.Close()
	w := &switcher{cfg, m}
	if !w.DryRun && m.Outside() {
		return fmt.Errorf("change the settings of the host from a container: the files to write are not here; run this on the host: %s", w.onHost())
	}
	switch w.Subject {
	case EBPF:
		return w.takeSteps(sourceSteps(ctx, w.On))
	case Rearm:
		return w.takeSteps([]step{systemctl(ctx, w.verb(), "--now", accounting.RearmUnit)})
	case Reset:
		return w.reset(ctx)
	case Default:
		return w.setDefault(ctx)
	case Lost:
		if w.Follow {
			return w.follow(ctx)
		}
	}
	units, err := w.choose(ctx)
	if err != nil {
		return err
	}
	return w.setUnits(ctx, units)
}

// switcher makes the changes that need systemd.
type switcher struct {
	Config
	m *accounting.Manager
}

// verb is the command.
func (c Config) verb() string { return map[bool]string{true: "enable", false: "disable"}[c.On] }

// onHost returns a command that does the same without this program, where there is one.
func (w *switcher) onHost() string {
	switch w.Subject {
	case Default:
		if w.On {
			return fmt.Sprintf("mkdir -p /etc/systemd/system.conf.d && printf '[Manager]\\nDefaultIPAccounting=yes\\n' >/etc/systemd/%s && systemctl daemon-reload", defaultFile)
		}
		return "rm /etc/systemd/" + defaultFile + " && systemctl daemon-reload"
	case EBPF:
		return "unitmeter " + w.verb() + " --ebpf"
	case Rearm:
		return "unitmeter " + w.verb() + " --rearm"
	case Reset:
		return "unitmeter disable --reset"
	case Lost:
		return "unitmeter enable --lost"
	case All:
		return "unitmeter " + w.verb() + " --all"
	}
	var commands []string
	for _, name := range w.Names {
		commands = append(commands, "systemctl set-property "+tty.ShellWord(name)+" IPAccounting="+yesNo(w.On))
	}
	return strings.Join(commands, " && ")
}

func onOff(on bool) string { return map[bool]string{true: "on", false: "off"}[on] }

func yesNo(on bool) string { return map[bool]string{true: "yes", false: "no"}[on] }
