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
//   - odometer: turns raw counters, which restart, into totals, which do not.
//     Each reading adds the growth since the last one.
//   - series: the total of one unit name over all of its runs, or of a fold.
//   - fold: several units, matched by one pattern, that share a series.
//   - overflow: the one series that takes the units over the limit.
//   - stop record: PID 1's message in the journal at the end of a unit, with its last
//     counters. It has the bytes between the last sweep and the end.
//   - unattributed: traffic that a top-level slice counted and no series has. With EBPF,
//     traffic of cgroups that found no room, have no name, or are slices.
//   - lost: a running unit whose counters systemd has lost.
//
// # What is exact, and what is not
//
// Each byte that systemd shows for a run is added once, whatever happens to the unit,
// the bus, systemd or this process. That needs the last Sweep.State in Config.State of
// the next process.
//
// What systemd does not count cannot be added. It counts nothing during a reload or
// re-execution: about a tenth of a second, and the time of slow generators (see
// docs/decisions/kernel-mode.md). It counts only what passes through the unit's own IP
// sockets. With EBPF nothing is missed while the meter is loaded.
//
// When the source changes, traffic between the last sweep of the old source and the
// first of the new one is in no total. One ambiguity is left: accounting that is
// switched off and on between two readings, without a signal, and has then counted
// more than before, looks like growth.
package receiver
