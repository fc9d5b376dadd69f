package ebpf

import "errors"

// The errors of this package that a caller can act on, for [errors.Is]. On
// another system than 64-bit Linux everything fails with [errors.ErrUnsupported].
var (
	// ErrNotLoaded: nothing is pinned. Load, or use another source.
	ErrNotLoaded = errors.New("no eBPF meter is loaded")
	// ErrOtherLayout: the pinned maps are those of another version of the program.
	ErrOtherLayout = errors.New("the loaded eBPF meter has another layout")
	// ErrOldKernel: use another source.
	ErrOldKernel = errors.New("this kernel is too old for eBPF counting, which needs Linux 5.8")
	// ErrPermission: a capability, the mode of a pin or a system call filter stands
	// in the way; to read before Linux 5.19, CAP_BPF is needed.
	ErrPermission = errors.New("no permission for eBPF")
	// ErrMemlock: before Linux 5.11, the limit of locked memory is too low.
	ErrMemlock = errors.New("the limit of locked memory is too low for eBPF maps")
	// ErrForeignProgram: a program of someone else at the same cgroup allows no other.
	ErrForeignProgram = errors.New("another eBPF program holds the cgroup for itself")
	// ErrNoBTF: the kernel has no type information, so cgroups cannot be named.
	ErrNoBTF = errors.New("the kernel has no BTF")
	// ErrNotCgroup2: the directory is not in a cgroup v2 hierarchy.
	ErrNotCgroup2 = errors.New("not a cgroup v2 directory")
	// ErrNoBPFFS: the directory for the pins is not in a BPF file system.
	ErrNoBPFFS = errors.New("not in a BPF file system")
)
