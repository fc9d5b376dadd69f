package doctor

import (
	"time"

	"golang.org/x/sys/unix"
)

// Types of file systems, as fileSystem has them.
const (
	cgroupV1 = unix.CGROUP_SUPER_MAGIC
	cgroupV2 = unix.CGROUP2_SUPER_MAGIC
)

// fileSystem is the type of the file system that a directory is in, or 0.
func fileSystem(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Type)
}

// clockSynchronized asks the kernel whether its clock is right (adjtimex(2)).
// Chrony, ntpd and systemd-timesyncd all report it there, so that none of them
// need be known here.
func clockSynchronized() (bool, error) {
	var state unix.Timex // all zero: asks, and sets nothing
	status, err := unix.Adjtimex(&state)
	return status != unix.TIME_ERROR && state.Status&unix.STA_UNSYNC == 0, err
}

// sinceBoot is the time since boot, in suspend as well.
func sinceBoot() (time.Duration, error) {
	var since unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &since)
	return time.Duration(since.Nano()), err
}
