// Package accounting reads and switches the accounting of this host's units for the
// commands (once, top, units, enable, doctor).
//
// Two things are needed of it: [Open] makes a [Source], whose Read returns all units with
// their counters, by systemd or by eBPF; and [Connect] makes a [Manager], whose calls
// switch systemd's accounting.
//
//   - accounting: whether a unit is counted: on, off, or lost where systemd has lost the
//     counters. systemd's setting is IPAccounting=.
//   - source: who counts, systemd or an eBPF program. An [Origin] says which, and since
//     when.
//   - pattern: a unit's name with wildcards, as systemctl takes it.
//   - reading: a unit with its counters at one time.
//   - manager: a connection to systemd (org.freedesktop.systemd1(5)) for a few calls.
//
// A command is one goroutine; Manager may be used by several.
package accounting
