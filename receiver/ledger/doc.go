// Package ledger keeps the totals of all units, so that each byte is in its
// series once.
//
// Two things are needed of it: New makes a Ledger from an earlier State, and
// Credit adds a Reading. Finish ends a sweep and returns the State to commit.
// The package is pure arithmetic: it has no clock, no lock and no connection. The
// caller passes times in and makes one call at a time.
//
// # Glossary
//
//   - counters: bytes and packets, received and sent.
//   - run: one life of a unit, from its start to its end. The counters of a run
//     begin at 0.
//   - epoch: the name of a run. No two runs share one.
//   - reading: the counters of one run at one time.
//   - stop record: the last counters of a run, as PID 1 logs them at its end.
//   - series: the total of one unit name over all of its runs, or of a fold.
//   - fold: several units, matched by one pattern, that share a series.
//   - owner: whose a unit is where its name does not say, a user or a container. It
//     makes the unit another series.
//   - measure: the part and layer of the traffic that a Ledger counts, such as Total,
//     Loopback or Wire.
//   - overflow: the one series for the units over the limit.
//   - balance: a top-level slice against the units in it.
//   - unattributed: traffic that a top-level slice counted and no series has, and
//     traffic whose unit is unknown.
//   - sweep: one reading of all units, between Begin and Finish.
//
// # What survives
//
// A Ledger made from the State of another goes on from there: a reading adds what
// its run has grown by since that State was taken. Totals never go down. A total
// above 2^63-1, which OTLP cannot carry, begins again with a new start time.
//
// When a setting changes the owner or unit of a run, its further growth counts in the
// other series. Its earlier bytes stay where they are.
//
// The State of another source can be used too, see Config.State. Traffic between
// the last sweep of the one and the first of the other is not in the totals.
//
// A run is remembered for Config.KeepEnded after its end, and one of an earlier
// State for an hour. A reading that is older than the last one of its run adds
// nothing. One ambiguity is left: counters that started again from 0 unnoticed, and
// exceed the last reading by the next one, look like growth.
package ledger
