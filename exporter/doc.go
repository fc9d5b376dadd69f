// Package exporter takes the metrics of one collection, makes their times
// right, and hands them over for delivery as OTLP.
//
// It has no network code of its own for OTLP's details: the official exporters
// (otlpmetricgrpc, otlpmetrichttp) encode each request and own the connection,
// with the endpoint, headers, TLS and compression of OTEL_EXPORTER_OTLP_*. Only
// the points of the unit instruments, thousands in each cycle, it encodes itself.
// The package stops the finished request on its way out, so that it can be made
// durable first and be sent again, byte for byte, for as long as it takes.
//
// # Glossary
//
//   - Resource: what all metrics of this agent are about, the host. Its
//     attributes are stable over restarts, because each change of a resource
//     starts every series anew in most stores.
//   - Start time: the moment from which a cumulative value counts. The SDK sets
//     its own creation time; Export sets the one of the series (see
//     receiver.Series.Start).
//   - Temporality: whether a point carries the total since the start time
//     (cumulative) or the change since the previous point (delta). Export makes
//     deltas itself, from totals that were handed over.
//   - Cycle: one collection: a sweep, the request made from it, and the ledger
//     after it.
//   - Handed over: a cycle is handed over when it is committed to the outbox or,
//     where there is none, accepted by the receiver of the request. Deltas are
//     taken from the last total that was handed over, so that a failure delays
//     bytes and never loses them.
//   - Capture: the request that an official exporter was about to send.
//   - Bulk: the points of the unit instruments in a request.
//   - Outbox: where committed requests wait until they are delivered.
//   - Entry: one request in the outbox.
//   - Sender: the one goroutine that delivers entries, in order, one call at a
//     time.
//   - Delivery: one call with one request and its answer. The answer decides:
//     go on, wait, split, or set the entry aside (quarantine).
//   - Thinning: making one request of two that follow each other, where the outbox
//     is full (Merge). Totals stay exact, and lose a point in time.
//   - Tally: the count of the points that were sent, rejected and dropped.
//   - Episode: a lasting failure, from its first attempt to the first that went
//     well again. It is logged at both ends, not at each attempt.
//
// # Guarantee
//
// With an outbox each committed request is delivered at least once, in order,
// with its original times. A crash between an answer and its record in the
// outbox sends the requests of that one call again. That is harmless for
// cumulative points; a receiver of deltas counts them twice.
package exporter
