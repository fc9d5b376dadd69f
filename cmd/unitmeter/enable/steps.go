package enable

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver/ebpf"
)

const (
	ebpfFile = "/etc/systemd/system/" + accounting.AgentUnit + ".d/50-ebpf.conf"
	// ebpfText has the same settings as packaging/examples/unitmeter-ebpf.conf.
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

// step is one change, and its undoing if a later one fails.
type step struct {
	what     string
	do, undo func() error
}

// sourceSteps make the agent of this host count by eBPF, or systemd again.
func sourceSteps(ctx context.Context, on bool) []step {
	unload := step{what: "unitmeter meter unload", do: func() error { return ebpf.Unload("") }}
	if !on {
		return []step{
			{"remove " + ebpfFile, removeDropIn, nil},
			systemctl(ctx, "daemon-reload"),
			systemctl(ctx, "try-restart", accounting.AgentUnit),
			systemctl(ctx, "disable", "--now", accounting.MeterUnit),
			unload,
		}
	}
	anyway := context.WithoutCancel(ctx) // Ctrl-C may be why there is something to undo
	load := systemctl(ctx, "enable", "--now", accounting.MeterUnit)
	load.undo = func() error {
		return errors.Join(systemctl(anyway, "disable", "--now", accounting.MeterUnit).do(), unload.do())
	}
	reload := systemctl(ctx, "daemon-reload")
	reload.undo = systemctl(anyway, "daemon-reload").do
	return []step{
		load, // the one that may not be possible here
		{"write " + ebpfFile, func() error { return writeWhole(ebpfFile, ebpfText) }, removeDropIn},
		reload,
		systemctl(ctx, "try-restart", accounting.AgentUnit),
	}
}

// takeSteps takes one step after the other, and says so. Where one fails, it undoes
// those before, the first one last.
func (c Config) takeSteps(steps []step) error {
	for i, s := range steps {
		if c.DryRun {
			fmt.Fprintln(c.Out, "would", s.what)
			continue
		}
		err := s.do()
		if err == nil {
			fmt.Fprintln(c.Out, s.what)
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
			return fmt.Errorf("%w: %s; see: journalctl -b -u %s", err, strings.TrimSpace(string(out)), accounting.MeterUnit)
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

// writeWhole writes a file and its directory. The file is whole or, after a failure,
// as it was before: a full disk must not leave an empty drop-in.
func writeWhole(file, text string) (err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	// systemd reads only names that end in .conf.
	f, err := os.CreateTemp(filepath.Dir(file), ".unitmeter-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

// reset undoes all changes of enable and of systemctl set-property IPAccounting=, since
// systemd keeps both in the same files.
func (w *switcher) reset(ctx context.Context) error {
	var files []string
	for _, pattern := range []string{
		accounting.PersistentDir + "/*.d/" + accounting.SettingFile, accounting.RuntimeDir + "/*.d/" + accounting.SettingFile,
		"/run/systemd/transient/*.d/" + accounting.SettingFile,
		"/etc/systemd/" + defaultFile, "/run/systemd/" + defaultFile, ebpfFile,
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		files = append(files, found...)
	}
	var steps []step
	for _, unit := range []string{accounting.RearmUnit, accounting.MeterUnit} {
		if systemctl(ctx, "is-enabled", "--quiet", unit).do() == nil {
			steps = append(steps, systemctl(ctx, "disable", "--now", unit))
		}
	}
	restart := false
	for _, file := range files {
		if text, err := os.ReadFile(file); filepath.Base(file) != accounting.SettingFile && (err != nil || !strings.HasPrefix(string(text), "# Written by \"unitmeter")) {
			fmt.Fprintf(w.Out, "%s stays: it was not written by unitmeter\n", file)
			continue
		}
		restart = restart || file == ebpfFile
		steps = append(steps, step{what: "remove " + file, do: func() error {
			if err := os.Remove(file); err != nil {
				return fmt.Errorf("%w; run \"sudo unitmeter disable --reset\"", err)
			}
			// Other files may be in its directory.
			if err := os.Remove(filepath.Dir(file)); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			return nil
		}})
	}
	if len(steps) == 0 {
		fmt.Fprintln(w.Out, "nothing to do: no unit's IP accounting was switched")
		return nil
	}
	steps = append(steps, systemctl(ctx, "daemon-reload"))
	if restart {
		steps = append(steps, systemctl(ctx, "try-restart", accounting.AgentUnit), step{"unitmeter meter unload", func() error { return ebpf.Unload("") }, nil})
	}
	return w.takeSteps(steps)
}
