package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// FailingSince is what stands before the reason in the agent's status line.
const FailingSince = "; failing since "

// capBPF is the bit of CAP_BPF (capabilities(7)).
const capBPF = 1 << 39

// agentService is what decides how the agent's unit runs.
type agentService struct {
	user   string
	state  string // ActiveState
	status string // its status line; empty where it does not run
	// properties are those that a transient unit needs to run alike, as
	// systemd-run takes them.
	properties []string
	settings   string // the file that its variables belong into, or ""
}

// findAgent reads the agent's unit; nil if there is none.
func findAgent(ctx context.Context, m *accounting.Manager) (*agentService, error) {
	p, state, err := m.Load(ctx, accounting.AgentUnit)
	if err != nil || state != "loaded" {
		return nil, err
	}
	var a agentService
	var group string
	var groups, environment, stateDirectory []string
	var stateMode uint32
	var capabilities uint64
	var files []struct {
		Path     string
		Optional bool
	}
	var credentials []struct{ Name, Path string }
	var binds []struct {
		Source, Destination string
		Optional            bool
		Flags               uint64
	}
	const service = bus.SystemdName + ".Service"
	for _, property := range []struct {
		iface, name string
		to          any
	}{
		{bus.UnitInterface, "ActiveState", &a.state},
		{service, "StatusText", &a.status},
		{service, "User", &a.user},
		{service, "Group", &group},
		{service, "SupplementaryGroups", &groups},
		{service, "Environment", &environment},
		{service, "EnvironmentFiles", &files},
		{service, "StateDirectory", &stateDirectory},
		{service, "StateDirectoryMode", &stateMode},
		{service, "LoadCredential", &credentials},
		{service, "BindReadOnlyPaths", &binds},
		{service, "AmbientCapabilities", &capabilities},
	} {
		err := m.Get(ctx, p, property.iface, property.name, property.to)
		if err != nil && !accounting.ErrorIs(err, "org.freedesktop.DBus.Error.UnknownProperty") { // an older systemd
			return nil, err
		}
	}
	set := func(name, value string) {
		if value != "" {
			a.properties = append(a.properties, "--property="+name+"="+value)
		}
	}
	// The sandbox is not copied: systemd-run cannot do all of it, and what it
	// forbids is tested with the package.
	set("User", a.user)
	set("Group", group)
	set("SupplementaryGroups", strings.Join(groups, " "))
	for _, kv := range environment {
		a.properties = append(a.properties, "--setenv="+kv)
	}
	for _, f := range files {
		a.settings = f.Path // the last one wins
		path := f.Path
		if f.Optional {
			path = "-" + path
		}
		set("EnvironmentFile", path)
	}
	if len(stateDirectory) > 0 {
		set("StateDirectory", strings.Join(stateDirectory, " "))
		set("StateDirectoryMode", fmt.Sprintf("%04o", stateMode)) // or systemd would open it to all
	}
	for _, c := range credentials {
		set("LoadCredential", c.Name+":"+c.Path)
	}
	for _, b := range binds { // of the eBPF counters
		path := b.Source + ":" + b.Destination
		if b.Optional {
			path = "-" + path
		}
		set("BindReadOnlyPaths", path)
	}
	if capabilities&capBPF != 0 { // to read the eBPF counters before Linux 5.19
		set("AmbientCapabilities", "CAP_BPF")
	}
	// Whatever the unit has: the proof of own traffic needs it.
	set("IPAccounting", "yes")
	return &a, nil
}

// examineAsAgent makes the checks as the agent's unit would, in a transient
// unit of the same user, settings and credentials. It does not where there is no
// such unit, or no right to do so: agent is nil then, and note may say why.
func examineAsAgent(ctx context.Context, environ []string) (findings []finding, agent *agentService, note string) {
	// Who sets a variable in the shell wants to know what comes of that one.
	if os.Geteuid() != 0 || slices.ContainsFunc(environ, ours) {
		return nil, nil, ""
	}
	ask, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	m, err := accounting.Connect(ask, receiver.Config{}.Addresses()...)
	if err != nil {
		return nil, nil, "" // the checks report it
	}
	defer m.Close()
	a, err := findAgent(ask, m)
	if err != nil || a == nil {
		return nil, nil, ""
	}
	findings, err = a.examine(ctx)
	if err != nil {
		return nil, nil, fmt.Sprintf("cannot check as %s does (%s); these checks use the settings of this shell", accounting.AgentUnit, tty.Line(err))
	}
	return withRootChecks(ctx, m, findings), a, fmt.Sprintf("checked as %s: with its user (%s), environment and credentials; use --here for those of this shell", accounting.AgentUnit, a.user)
}

// withRootChecks adds the checks for which the agent's user has no right.
func withRootChecks(ctx context.Context, m *accounting.Manager, findings []finding) []finding {
	i := slices.IndexFunc(findings, func(f finding) bool { return f.Name == "ebpf" })
	if i < 0 {
		return findings // it was interrupted
	}
	d := &doctor{m: m}
	d.cfg.Receiver.Source = receiver.EBPF
	if findings[i].Status == statusSkip { // the agent's user knows the settings
		d.cfg.Receiver.Source = receiver.DBus
	}
	for _, c := range d.rootChecks() {
		if f := runCheck(ctx, c); f.Status != "" {
			i++
			findings = slices.Insert(findings, i, f)
		}
	}
	return findings
}

// ServiceVariables returns the environment that systemd gives to unitmeter.service, as
// NAME=value. It is nil where there is no such unit, for others than root, and where
// environ has a setting of its own.
func ServiceVariables(ctx context.Context, environ []string) []string {
	if os.Geteuid() != 0 || slices.ContainsFunc(environ, ours) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	m, err := accounting.Connect(ctx, receiver.Config{}.Addresses()...)
	if err != nil {
		return nil // whatever the command does next reports it
	}
	defer m.Close()
	a, err := findAgent(ctx, m)
	if err != nil || a == nil {
		return nil
	}
	// systemd reads its files best by itself.
	args := []string{"--pipe", "--wait", "--quiet", "--collect", fmt.Sprintf("--unit=unitmeter-environment-%d", os.Getpid())}
	for _, property := range a.properties {
		if strings.HasPrefix(property, "--setenv=") || strings.HasPrefix(property, "--property=EnvironmentFile=") {
			args = append(args, property)
		}
	}
	if len(args) == 5 { // it has none
		return nil
	}
	out, err := exec.CommandContext(ctx, "systemd-run", append(args, "/usr/bin/env", "-0")...).Output()
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimRight(string(out), "\x00"), "\x00")
}

// next says where settings go and what makes a running agent take them: a fix
// such as "set VARIABLE=..." leaves both open. It is empty where no fix needs
// it.
func (a *agentService) next(findings []finding) string {
	if a == nil || a.settings == "" || !slices.ContainsFunc(findings, func(f finding) bool {
		return strings.Contains(f.Fix, "OTEL_") || strings.Contains(f.Fix, "UNITMETER_") || strings.HasPrefix(f.Fix, "usermod ")
	}) {
		return ""
	}
	return fmt.Sprintf("Variables belong in %s. To apply them, or a new group:\n      systemctl restart %s\n", a.settings, accounting.AgentUnit)
}

// examine runs the doctor in a transient unit.
func (a *agentService) examine(ctx context.Context) ([]finding, error) {
	// This very program, and not the installed one: it may be a newer one that is
	// tried out.
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// --collect, because a doctor that finds faults ends with 1, and systemd keeps
	// units that failed.
	args := append([]string{"--pipe", "--wait", "--quiet", "--collect", fmt.Sprintf("--unit=unitmeter-doctor-%d", os.Getpid())}, a.properties...)
	cmd := exec.CommandContext(ctx, "systemd-run", append(args, self, "doctor", "--here", "--json")...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	// The exit code says nothing here: a doctor that found a fault ends with 1
	// and has a report all the same.
	var theirs report
	if bad := json.Unmarshal(out, &theirs); bad == nil && len(theirs.Checks) > 0 {
		return theirs.Checks, nil // a failure of the doctor is that of a check
	}
	// What systemd-run complained about is worth more than its exit code.
	var exit *exec.ExitError
	const notExecutable = 203 // EXIT_EXEC of systemd.exec(5), which says nothing itself
	if errors.As(err, &exit) && exit.ExitCode() == notExecutable {
		return nil, fmt.Errorf("the user %s may not run %s", a.user, self)
	}
	if exit != nil && len(exit.Stderr) > 0 {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return nil, fmt.Errorf("run systemd-run: %w", err)
}

// checkAgent asks whether the installed agent runs.
func (d *doctor) checkAgent(ctx context.Context) finding {
	a, err := findAgent(ctx, d.m)
	d.agent = a
	switch {
	case err != nil:
		return skipped("%s cannot be read: %v", accounting.AgentUnit, err)
	case a == nil:
		return skipped("there is no %s; these checks use the settings of this shell", accounting.AgentUnit)
	case a.state == "active":
		return good("%s runs", accounting.AgentUnit)
	// With Restart= a service that ends at once is activating most of the time.
	case a.state == "failed", a.state == "activating":
		return failure("journalctl -u "+accounting.AgentUnit+" -n 20", "%s does not start (%s); see its log", accounting.AgentUnit, a.state)
	}
	return warning("systemctl enable --now "+accounting.AgentUnit, "%s does not run (%s)", accounting.AgentUnit, a.state)
}
