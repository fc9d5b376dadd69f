// Package exporter delivers the metrics of each collection as OTLP, or serves them to
// Prometheus.
//
// Two things are needed of it: [New] makes an [Exporter] for the SDK's periodic reader,
// and [NewDurable] gives it an outbox on disk. [NewPrometheus] and [NewConsole] are the
// other two ways out.
//
// This package makes the points of the unit instruments from the sweep, and decides
// the order of requests. Package otlp encodes and delivers them and classifies the
// answers; package store keeps them until then.
//
// # Glossary
//
//   - Resource: what all metrics of this agent are about, the host. Its
//     attributes are stable over restarts, because each change of a resource
//     starts every series anew in most stores.
//   - Start time: the moment from which a cumulative value counts. The SDK sets
//     its own creation time; the points of the unit instruments have that of
//     their series (see receiver.Series.Start).
//   - Temporality: whether a point carries the total since the start time
//     (cumulative) or the change since the previous point (delta). Export makes
//     deltas itself, from totals that were handed over.
//   - Cycle: one collection, with its sweep, its request, and the ledger after it.
//   - Handed over: a cycle is handed over when it is committed to the outbox or,
//     where that takes none, kept in memory. Deltas are taken from the last total
//     that was handed over, so that a failure delays bytes and never loses them.
//   - Span: the point of one series in a cycle: its change from a start to an end.
//   - Mark: where the last delta of a series ended.
//   - Outbox: where committed requests wait until they are delivered.
//   - Queue: the outbox, and before it the requests that are in memory only.
//   - Entry: one request in the outbox.
//   - Sender: the one goroutine that delivers entries, in order, one call at a
//     time.
//   - Delivery: one call with one request and its answer. The answer decides:
//     go on, wait, split, or set the entry aside (quarantine).
//   - Thinning: making one request of two that follow each other, where the outbox
//     is full (otlp.Merge). Totals stay exact, and lose a point in time.
//   - Counts: how many points were sent, rejected and dropped.
//   - Episode: a lasting failure, from the first failed attempt to the next success.
//     It is logged at both ends, not at each attempt.
//
// # Guarantee
//
// With an outbox each committed request is delivered at least once, in order,
// with its original times. A crash between an answer and its record in the
// outbox sends the requests of that one call again. That is harmless for
// cumulative points; a receiver of deltas counts them twice.
package exporter
