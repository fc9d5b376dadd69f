// Package receiver reads the network traffic of systemd's units: their IP accounting
// over D-Bus, or the counters of an eBPF program of our own.
//
// Two things are needed of it: New makes a Receiver, whose Run keeps it
// connected to its source; Register gives it a meter, and from then on each
// collection of that meter is one sweep over all units. Sweep does the same
// without a meter.
//
// # Glossary
//
//   - unit: what systemd manages. Services, scopes, slices, sockets, mounts and
//     swaps have four IP counters each.
//   - source: who counts, systemd (DBus) or our own program (EBPF).
//   - meter: that program with its maps, see package ebpf.
//   - accounting: whether systemd counts a unit's traffic (IPAccounting=).
//   - invocation: one run of a unit, from start to stop, named by systemd with
//     a random InvocationID. Counters begin at 0 with each.
//   - epoch: what tells runs apart: the invocation id, or the boot id for the
//     few units without one (init.scope, system.slice). With EBPF, one entry of one
//     cgroup: then a unit has a run for each of its cgroups.
//   - run: one epoch of one unit, with the reading up to which it is in the
//     totals.
//   - inventory: the loaded units and their states, listed once and kept up
//     to date by systemd's signals.
//   - sweep: one reading of the counters of all accounted units.
//   - odometer: what turns raw counters, which restart, into totals, which do
//     not: each reading adds what it has grown by since the last.
//   - series: the total of one unit name over all of its runs, or of a fold.
//   - fold: several units, matched by one pattern, that share a series.
//   - overflow: the one series that takes the units over the limit.
//   - stop record: what PID 1 writes to the journal at the end of a unit, its
//     counters among it. It has the bytes between the last sweep and the end.
//   - unattributed: what a top-level slice counted and no series has. With EBPF,
//     traffic of cgroups that found no room, have no name, or are slices.
//   - lost: a running unit whose counters systemd has lost.
//
// # What is exact, and what is not
//
// Each byte that systemd shows for a run is added once, whatever happens to
// the unit, to the bus, to systemd or to this process, provided that
// Config.State carries on what Sweep.State was. What systemd itself does not
// count cannot be added: all traffic for as long as a reload or re-execution of
// systemd takes, which is about a tenth of a second, and longer by what its generators
// take (see docs/decisions/kernel-mode.md); and all that is
// not sent or received through the unit's own IP sockets. With EBPF nothing is
// missed while the meter is loaded. When the source changes, what passes between the last sweep of the one and
// the first of the other is in no total of a series that both count. There is one
// ambiguity: accounting that is switched off and on again between two readings,
// without a signal, and by the second has counted more than before, looks like
// growth.
package receiver
