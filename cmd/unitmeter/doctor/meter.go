package doctor

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ebpf"
)

// ofSystemd skips a check of what only a systemd that counts needs.
func (d *doctor) ofSystemd(run func(context.Context) finding) func(context.Context) finding {
	return func(ctx context.Context) finding {
		if d.cfg.Receiver.Source == receiver.EBPF {
			return skipped("UNITMETER_SOURCE=ebpf: systemd does not count")
		}
		return run(ctx)
	}
}

// checkMeter reads the eBPF counters as the agent does.
func (d *doctor) checkMeter(context.Context) finding {
	source := d.cfg.Receiver.Source
	if !d.configured || source == receiver.DBus {
		return skipped("UNITMETER_SOURCE is not ebpf: systemd counts")
	}
	reader, err := receiver.OpenMeter(ebpf.Config{})
	if err != nil {
		return meterFailure(source, os.Geteuid() == 0, err)
	}
	sweep, err := reader.Read() // a first one deletes nothing
	if err = errors.Join(err, reader.Close()); err != nil {
		return failure(loadMeter, "%v", err)
	}
	return meterFinding(sweep)
}

const loadMeter = "systemctl restart unitmeter-meter.service unitmeter.service"

// meterFailure says what it means that the counters cannot be read.
func meterFailure(source string, root bool, err error) finding {
	fix := "unitmeter enable --ebpf, or set UNITMETER_SOURCE=dbus"
	if errors.Is(err, ebpf.ErrPermission) {
		fix = "unitmeter enable --ebpf, or set UNITMETER_SOURCE=dbus; before Linux 5.19 see docs/ebpf.md"
	}
	switch {
	case source == receiver.Auto:
		return warning(fix, "systemd counts, since the eBPF counters cannot be read: %v", err)
	case root && errors.Is(err, ebpf.ErrNotLoaded):
		return warning("unitmeter meter load", "no eBPF program is loaded: as root the agent attaches one, which counts only while the agent runs")
	}
	return failure(fix, "the eBPF counters cannot be read: %v", err)
}

// meterFinding judges a reading.
func meterFinding(s ebpf.Sweep) finding {
	lost := s.Lost.Received.Bytes + s.Lost.Sent.Bytes
	switch {
	case s.Detached:
		return failure(loadMeter, "the eBPF program was unloaded, and nothing is counted")
	case lost > 0 || s.Lost.Names > 0:
		return warning("unitmeter meter unload && "+loadMeter,
			"the maps were full: %d bytes are unattributed, and %d cgroups have no name", lost, s.Lost.Names)
	case s.Entries > s.MaxEntries/4*3:
		return warning("start the agent, which deletes entries of units that have ended", "%d of %d entries are in use", s.Entries, s.MaxEntries)
	case !s.Naming:
		return warning("boot a kernel with CONFIG_DEBUG_INFO_BTF=y and without lockdown=confidentiality",
			"the kernel does not name cgroups: units that end between two readings are unattributed")
	}
	return good("the eBPF program counts since %s; %d of %d entries are in use", s.Since.Local().Format(time.DateTime), s.Entries, s.MaxEntries)
}
