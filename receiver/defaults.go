package receiver

import "time"

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
// under the same name. Each pattern is one series.
func DefaultFold() []string {
	return []string{
		"run-*.service", "run-*.scope", "session-*.scope",
		"docker-*.scope", "libpod-*.scope", "nerdctl-*.scope", "cri-containerd-*.scope", "crio-*.scope",
		`machine-qemu\x2d*.scope`, `machine-lxc\x2d*.scope`,
	}
}
