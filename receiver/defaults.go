package receiver

import (
	"strings"
	"time"
)

// The sources of readings, for Config.Source.
const (
	DBus = "dbus"
	EBPF = "ebpf"
	Auto = "auto"
)

// Fields of a Config that are zero mean these.
const (
	DefaultSource       = DBus
	DefaultBus          = "auto"
	DefaultMaxSeries    = 5000
	DefaultStopRecords  = "auto"
	DefaultSweepTimeout = 10 * time.Second
)

// DefaultTypes are the unit types that a Receiver meters. Slices are not among
// them, since a slice contains the traffic of the units in it; the others are
// disjoint.
func DefaultTypes() []string {
	return []string{"service", "scope", "socket", "mount", "swap"}
}

// DefaultFold are the patterns of units that live once and never come back
// under the same name. Each pattern is one series. Those of the third line are
// units of one connection each (Accept=yes): NUMBER-ADDRESS:PORT-ADDRESS:PORT, or
// NUMBER-PID-UID of sockets that systemd and sshd have; then what dbus-daemon starts,
// podman's health checks, whose names begin with a container's id, and our own doctor.
func DefaultFold() []string {
	return []string{
		"run-*.service", "run-*.scope", "session-*.scope",
		"docker-*.scope", "libpod-*.scope", "nerdctl-*.scope", "cri-containerd-*.scope", "crio-*.scope",
		`machine-qemu\x2d*.scope`, `machine-lxc\x2d*.scope`,
		"*@[0-9]*-*:[0-9]*-*:[0-9]*.service", "systemd-*@[0-9]*-[0-9]*-[0-9]*.service", "sshd*@[0-9]*-[0-9]*-[0-9]*.service",
		"dbus-:*@*.service", strings.Repeat("[0-9a-f]", 6) + strings.Repeat("?", 18) + "*.service", "unitmeter-doctor-*.service",
	}
}
