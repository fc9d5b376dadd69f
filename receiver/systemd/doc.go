// Package systemd reads the IP accounting of systemd's units over D-Bus.
//
// Two things are needed of it: a [Source], whose Run stays connected to systemd and
// whose Read takes the counters of all units; and a [Sink] of the caller, which gets the
// counters of each run and makes totals of them. Package journal has the last counters
// of runs that nobody could read, package bus the connection.
//
// # Glossary
//
//   - accounting: whether systemd counts a unit's traffic (IPAccounting=).
//   - run: one invocation of a unit, from its start to its end.
//   - epoch: the name of a run. It is the invocation id, or BOOT/UNIT without one.
//   - inventory: the loaded units of the metered types and their states. It is listed
//     once, and systemd's signals keep it up to date.
//   - sweep: one Read. It reads the units in batches.
//   - final reading: the reading of a unit soon after its end, while it is still loaded.
//   - left-over processes: those that outlive their unit (KillMode=process).
//   - lost: accounting is on, and systemd has lost the counters.
//   - private socket: PID 1's own, see package bus.
//
// # What survives
//
// A Source connects again by itself, also after a restart of the bus or a re-execution of
// systemd. Then it lists the units again, since it may have missed signals. It stores
// nothing: Config.Known says which runs an earlier process has read.
//
// docs/decisions/readings.md has the rules by which each byte counts once.
package systemd
