//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// explain adds the kind and the next step to an error of a pin.
func explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w; run: unitmeter meter load", ErrNotLoaded)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %w; run as root or as a member of the group of the pins", ErrPermission, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %w; allow the system call bpf, and before Linux 5.19 give CAP_BPF", ErrPermission, err)
	}
	return err
}

// explainLoad is for maps and programs. limitErr is why the limit of locked memory
// could not be lifted.
func explainLoad(err, limitErr error) error {
	switch {
	case !errors.Is(err, unix.EPERM) && kernelBefore(5, 8):
		return fmt.Errorf("%w: %w", ErrOldKernel, err)
	case !errors.Is(err, unix.EPERM):
		return err
	case limitErr != nil && kernelBefore(5, 11):
		return fmt.Errorf("%w: %w; set LimitMEMLOCK=infinity in the unit, or run: ulimit -l unlimited", ErrMemlock, err)
	}
	// The library's own words are about MEMLOCK, whatever the reason.
	return fmt.Errorf("%w: %w; run as root with CAP_BPF and CAP_NET_ADMIN, outside of a user namespace (PrivateUsers=no)", ErrPermission, unix.EPERM)
}

// kernelBefore is whether the running kernel is older. One that cannot be asked is.
func kernelBefore(major, minor int) bool {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return true
	}
	var gotMajor, gotMinor int
	fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &gotMajor, &gotMinor) // 0.0 is older too
	return gotMajor < major || gotMajor == major && gotMinor < minor
}

func explainNaming(err error) error {
	const then = "cgroups are counted, but those that end between two readings have no name"
	if _, statErr := os.Stat("/sys/kernel/btf/vmlinux"); statErr != nil {
		return fmt.Errorf("name cgroups: %w; %s; boot a kernel with CONFIG_DEBUG_INFO_BTF", ErrNoBTF, then)
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("name cgroups: %w: %w; %s; give CAP_PERFMON", ErrPermission, err, then)
	}
	if lockdown, _ := os.ReadFile("/sys/kernel/security/lockdown"); strings.Contains(string(lockdown), "[confidentiality]") {
		return fmt.Errorf("name cgroups: %w; %s; lockdown=confidentiality forbids it, lockdown=integrity does not", err, then)
	}
	return fmt.Errorf("name cgroups: %w; %s", err, then)
}

// explainAttach finds who else is attached to a cgroup that refuses another
// program.
func explainAttach(err error, root string, attach ebpf.AttachType) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	dir, openErr := os.Open(root)
	if openErr != nil {
		return err
	}
	defer dir.Close()
	// Asking needs CAP_NET_ADMIN as attaching does, so an answer means that the
	// capability is there.
	found, queryErr := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: attach})
	if queryErr != nil || len(found.Programs) == 0 {
		return fmt.Errorf("%w: %w; give CAP_NET_ADMIN, outside of a user namespace (PrivateUsers=no)", ErrPermission, err)
	}
	id, name := found.Programs[0].ID, "unknown"
	if p, err := ebpf.NewProgramFromID(id); err == nil {
		if info, err := p.Info(); err == nil {
			name = info.Name
		}
		p.Close()
	}
	return fmt.Errorf("%w: program %d (%s): %w; let its owner attach it with BPF_F_ALLOW_MULTI; bpftool cgroup show %s lists it", ErrForeignProgram, id, name, err, root)
}
