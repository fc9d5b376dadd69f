// Package accounting is the IP accounting of this host's units as the commands
// see it: who has it, how to name units, one reading of their counters, and the
// calls that switch it.
//
//   - accounting: systemd's setting IPAccounting= of a unit; on, off, or lost where it is on and systemd has no counters.
//   - pattern: a unit's name with wildcards, as systemctl takes it.
//   - reading: a unit with its counters at one time.
//   - manager: a connection to systemd (org.freedesktop.systemd1(5)) for a few calls.
//
// A command is one goroutine; Manager may be used by several.
package accounting
