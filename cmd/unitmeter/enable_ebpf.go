package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	"github.com/unitmeter/unitmeter/receiver/ebpf"
)

const (
	agentUnit = "unitmeter.service"
	meterUnit = "unitmeter-meter.service"
	ebpfFile  = "/etc/systemd/system/" + agentUnit + ".d/50-ebpf.conf"
	// ebpfText is what packaging/examples/unitmeter-ebpf.conf has too.
	ebpfText = `# Written by "unitmeter enable --ebpf"; "unitmeter disable --ebpf" removes it.
[Unit]
Wants=unitmeter-meter.service
After=unitmeter-meter.service

[Service]
Environment=UNITMETER_SOURCE=ebpf
BindReadOnlyPaths=-/sys/fs/bpf/unitmeter:/run/unitmeter
SystemCallFilter=bpf
`
)

// step is one change, and what undoes it where a later one fails.
type step struct {
	what     string
	do, undo func() error
}

// switchSource makes the agent of this host count by eBPF, or systemd again.
func switchSource(ctx context.Context, t *terminal, on, dry bool) error {
	if !on {
		return takeSteps(t.stdout, dry, []step{
			{"remove " + ebpfFile, removeDropIn, nil},
			systemctl(ctx, "daemon-reload"),
			systemctl(ctx, "try-restart", agentUnit),
			systemctl(ctx, "disable", "--now", meterUnit),
			{"unitmeter meter unload", func() error { return ebpf.Unload("") }, nil},
		})
	}
	load := systemctl(ctx, "enable", "--now", meterUnit)
	load.undo = func() error {
		return errors.Join(systemctl(ctx, "disable", "--now", meterUnit).do(), ebpf.Unload(""))
	}
	reload := systemctl(ctx, "daemon-reload")
	reload.undo = reload.do
	return takeSteps(t.stdout, dry, []step{
		load, // the one that may not be possible here
		{"write " + ebpfFile, func() error { return writeWhole(ebpfFile, ebpfText) }, removeDropIn},
		reload,
		systemctl(ctx, "try-restart", agentUnit),
	})
}

// takeSteps takes one step after the other, and says so. Where one fails, it undoes
// those before, the first one last.
func takeSteps(out io.Writer, dry bool, steps []step) error {
	for i, s := range steps {
		if dry {
			fmt.Fprintln(out, "would", s.what)
			continue
		}
		err := s.do()
		if err == nil {
			fmt.Fprintln(out, s.what)
			continue
		}
		err = fmt.Errorf("%s: %w", s.what, err)
		// A reload comes after the file that it has to see gone.
		for _, done := range steps[:i+1] {
			if done.undo != nil {
				err = errors.Join(err, done.undo())
			}
		}
		return err
	}
	return nil
}

func systemctl(ctx context.Context, args ...string) step {
	return step{what: "systemctl " + strings.Join(args, " "), do: func() error {
		out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s; see: journalctl -b -u %s", err, strings.TrimSpace(string(out)), meterUnit)
		}
		return nil
	}}
}

func removeDropIn() error {
	if err := os.Remove(ebpfFile); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
