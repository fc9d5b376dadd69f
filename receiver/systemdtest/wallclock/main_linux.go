// Command wallclock runs a program whose wall clock is off, and can be stepped
// while it runs; all other programs keep theirs. No namespace has a wall clock of
// its own, so each clock_gettime(CLOCK_REALTIME) of the program and of its
// children is answered from here (seccomp user notification).
//
//	wallclock FILE COMMAND [ARG...]
//
// FILE holds the seconds to add, and is read at each call. The monotonic clock
// is true. The program must ask the kernel where it has no vDSO, as Go's and C's
// programs do. Needs CAP_SYS_ADMIN and Linux 5.0.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		var status *exec.ExitError
		if errors.As(err, &status) && status.Exited() {
			os.Exit(status.ExitCode())
		}
		fmt.Fprintln(os.Stderr, "wallclock:", err)
		os.Exit(1)
	}
}

// inner is the first argument of the process that becomes the program.
const inner = "--inner"

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: wallclock FILE COMMAND [ARG...]")
	}
	if args[0] == inner {
		return become(args[1:])
	}
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT) // the program decides when it is over
	runtime.LockOSThread()                         // a tracer is a thread
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", append([]string{inner}, args[1:]...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", args[1], err)
	}
	if err := theirs.Close(); err != nil {
		return err
	}
	if err := hideVDSO(cmd.Process.Pid); err != nil {
		return fmt.Errorf("start %s: %w", args[1], err)
	}
	listener, err := receive(ours)
	if err != nil {
		return fmt.Errorf("receive the seccomp listener: %w", err)
	}
	go answer(listener, args[0]) // ends with this process
	return cmd.Wait()
}

// hideVDSO lets a traced process run until it has become the program, takes the
// vDSO out of what the kernel tells that, and lets go of it.
func hideVDSO(pid int) error {
	// The first stop is the exec of inner itself, the last the program's.
	for execs, deliver := 0, 0; ; {
		var status syscall.WaitStatus
		if execs > 0 {
			if err := syscall.PtraceCont(pid, deliver); err != nil {
				return fmt.Errorf("continue: %w", err)
			}
		}
		if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil {
			return fmt.Errorf("wait: %w", err)
		}
		if !status.Stopped() {
			return fmt.Errorf("it ended before it began (%v)", status)
		}
		deliver = int(status.StopSignal())
		if status.StopSignal() != syscall.SIGTRAP {
			continue
		}
		deliver = 0
		if execs++; execs == 2 {
			break
		}
	}
	// Field 28 of stat is where the stack began: argc, argv, 0, environ, 0, auxv.
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	at, err := strconv.ParseInt(fields[25], 10, 64)
	if err != nil {
		return err
	}
	memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer memory.Close()
	word := func() (w uint64) {
		var b [8]byte
		if _, e := memory.ReadAt(b[:], at); e != nil && err == nil {
			err = e
		}
		at += 8
		return binary.NativeEndian.Uint64(b[:])
	}
	at += 8 * int64(word()+1) // argv and its 0
	for word() != 0 && err == nil {
	}
	const vDSO, ignore = 33, 1 // AT_SYSINFO_EHDR, AT_IGNORE
	for {
		key, here := word(), at-8
		if err != nil || key == 0 {
			return fmt.Errorf("find the vDSO in the auxiliary vector: %w", errors.Join(err, errors.ErrUnsupported))
		}
		if key == vDSO {
			if _, err := memory.WriteAt(binary.NativeEndian.AppendUint64(nil, ignore), here); err != nil {
				return err
			}
			break
		}
		word()
	}
	return syscall.PtraceDetach(pid)
}

// become asks for the notifications, sends their descriptor to the parent and
// becomes the program.
func become(command []string) error {
	runtime.LockOSThread() // the filter is the thread's, and so is the exec
	path, err := exec.LookPath(command[0])
	if err != nil {
		return err
	}
	const ld, jeq, ret = 0x20, 0x15, 0x06 // BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
	const notify, allow = 0x7fc00000, 0x7fff0000
	low := uint32(16) // of the first argument
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		low += 4
	}
	filter := []syscall.SockFilter{
		{Code: ld, K: 0}, // the system call's number
		{Code: jeq, Jf: 3, K: syscall.SYS_CLOCK_GETTIME},
		{Code: ld, K: low},
		{Code: jeq, Jf: 1, K: 0}, // CLOCK_REALTIME
		{Code: ret, K: notify},
		{Code: ret, K: allow},
	}
	number, ok := map[string]uintptr{"amd64": 317, "arm64": 277, "riscv64": 277}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("seccomp on %s: its number is not known here", runtime.GOARCH)
	}
	const setModeFilter, newListener, setNoNewPrivs = 1, 8, 38
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, setNoNewPrivs, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("set no_new_privs: %w", errno)
	}
	program := syscall.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := syscall.RawSyscall(number, setModeFilter, newListener, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("ask for notifications (seccomp): %w", errno)
	}
	if err := syscall.Sendmsg(3, []byte{0}, syscall.UnixRights(int(fd)), nil, 0); err != nil {
		return fmt.Errorf("send the seccomp listener: %w", err)
	}
	syscall.CloseOnExec(3)
	syscall.CloseOnExec(int(fd))
	return fmt.Errorf("run %s: %w", path, syscall.Exec(path, command, os.Environ()))
}

// notification is struct seccomp_notif, response struct seccomp_notif_resp.
type notification struct {
	id         uint64
	pid, flags uint32
	number     int32
	arch       uint32
	pointer    uint64
	args       [6]uint64
}

type response struct {
	id    uint64
	value int64
	error int32
	flags uint32
}

// answer tells the time, until the program is gone.
func answer(listener int, file string) {
	const receive, send = 0xc0502100, 0xc0182101
	for {
		var call notification
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(listener), receive, uintptr(unsafe.Pointer(&call))); errno != 0 {
			if errno == syscall.EINTR || errno == syscall.ENOENT { // the caller was interrupted, or is gone
				continue
			}
			return
		}
		reply := response{id: call.id}
		if err := tell(call, file); err != nil {
			fmt.Fprintln(os.Stderr, "wallclock:", err)
			reply.error = -int32(syscall.EINVAL)
		}
		// A caller that is gone by now needs no answer.
		_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, uintptr(listener), send, uintptr(unsafe.Pointer(&reply)))
	}
}

func tell(call notification, file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	now := time.Now()
	b := binary.NativeEndian.AppendUint64(nil, uint64(now.Unix()+seconds))
	b = binary.NativeEndian.AppendUint64(b, uint64(now.Nanosecond()))
	memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", call.pid), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer memory.Close()
	_, err = memory.WriteAt(b, int64(call.args[1]))
	return err
}

func socketPair() (ours int, theirs *os.File, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return fds[0], os.NewFile(uintptr(fds[1]), "inner"), nil
}

// receive returns the one descriptor that arrives.
func receive(socket int) (int, error) {
	var b [1]byte
	rights := make([]byte, syscall.CmsgSpace(4))
	_, n, _, _, err := syscall.Recvmsg(socket, b[:], rights, syscall.MSG_CMSG_CLOEXEC)
	if err != nil {
		return 0, err
	}
	messages, err := syscall.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) != 1 {
		return 0, errors.Join(err, fmt.Errorf("receive a descriptor: %d control messages", len(messages)))
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return 0, errors.Join(err, fmt.Errorf("receive a descriptor: got %d", len(fds)))
	}
	return fds[0], nil
}
