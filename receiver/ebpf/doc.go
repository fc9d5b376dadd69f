// Package ebpf counts the network traffic of each cgroup with its own eBPF program, so
// that no unit needs IPAccounting=.
//
// Two things are needed of it: [Load] attaches the program at the root of the cgroup
// tree and pins it with its maps, which takes three capabilities, once; and [Open]
// reads the pinned maps, from Linux 5.19 on without a capability. [Attach] does both in
// one process, with nothing pinned, until the process ends. The package needs 64-bit
// Linux 5.8 or newer with cgroup v2, also beside version 1.
//
// # Glossary
//
//   - program: meter.bpf.c as a whole. It has four functions. The kernel calls ingress
//     and egress for each packet of a socket, and made and removed for each cgroup that
//     is created or removed.
//   - entry: the counters of one cgroup in the kernel's map. A [Meter] is one reading of
//     an entry.
//   - name: the path of a cgroup in the kernel's map.
//   - root: the cgroup that is metered with all below it, mostly the host's.
//   - pin: a file in a BPF file system that keeps a map or a link alive.
//   - link: the attachment of a program.
//   - layout: the maps and their structures. A directory of pins has one.
//   - gone: the cgroup was removed. Its sockets may live on.
//   - epoch: the life of an entry: boot id, cgroup id and Born. A counter never falls
//     within an epoch, and each epoch begins at zero.
//   - sweep: one reading of all entries.
//
// # What is exact
//
// Bytes and packets equal systemd's IP accounting, which uses the same hook: whole IP
// packets at the socket. A segmentation offload (GSO) packet is one packet. The tests
// compare UDP, TCP, fragments, refused connections and delegated subtrees with
// systemctl show. Wire counters add the segments and their headers; IPv6
// extension headers and SCTP are left out of that addition.
//
// Loopback is traffic over the device lo of any network namespace, whose index is
// always 1. It includes the host's traffic to its other addresses, which takes the
// same device.
//
// Denied packets (IPAddressDeny=) are counted here and not by systemd: the program
// cannot see the verdict of another. Packet sockets, forwarded packets and those of
// virtual machines belong to no socket and are counted in neither. Traffic before
// Load is not counted.
//
// An entry is created by the first packet of a cgroup. Its name is in the map before
// that, since the kernel runs made before anyone can enter the cgroup. The names of
// older cgroups come from a walk in Load. A cgroup without traffic leaves nothing.
//
// # What survives
//
// The pinned program counts without any process: while the reader restarts or is
// killed, while systemd reloads or reexecutes, and while another Load replaces the
// program. Unload and the end of the boot end it. What [Attach] attached ends with the
// process, also by SIGKILL.
//
// The tests but for the systemd one also pass on Debian's kernels 5.10.223 and
// 6.1.192, in which subtrees, deletion and replaced programs take other calls.
//
// The Reader deletes the entry of a removed cgroup after ten minutes without traffic,
// and returns its last values in the same Sweep. Later traffic makes a new entry, with
// another Born and, for an hour, the same Identity. One gap is left: a packet that
// another CPU counts during the deletion, which takes about 100 ns.
//
// With 65,536 entries in use, the traffic of further cgroups counts in [Lost].
//
// # Figures
//
// Linux 6.18, two CPUs of 2.8 GHz, quiet:
//
//   - Read: 0.34 to 0.44 ms of CPU for 1,000 entries, 10 ms for 20,000, 7 and 15
//     allocations (go test -bench Read -benchtime 100x -count 3).
//   - Load beside 1,076 cgroups: 76 ms, again 56 to 59 ms; almost all of it is reading
//     the kernel's BTF.
//   - Maps (memlock in /proc/self/fdinfo): 2.7 MB empty, 3.4 MB with 1,000 entries and
//     2,076 names, 48.8 MB full.
//   - A packet: 30 ns in BPF_PROG_TEST_RUN, best of 30 times 100,000, both with and
//     without the loopback split.
package ebpf

//go:generate go run generate.go
