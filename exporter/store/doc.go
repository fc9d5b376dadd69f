// Package store keeps what the agent must not lose in one SQLite file:
//
//   - the ledger: the state of every series and run, so that totals continue
//     over restarts;
//   - the outbox: encoded requests that no server has taken yet, oldest first;
//   - the history: what each unit transferred, for some weeks back.
//
// [Store.Commit] writes one collection cycle to all three in one transaction.
// The package knows nothing of systemd or OTLP: series and runs are generic and
// requests are opaque bytes.
//
// # What survives
//
// A Commit that returned nil survives a crash of the agent (kill -9, panic, out of
// memory). On a disk that honours flush requests it also survives a power cut or a
// crash of the kernel, since the write-ahead log is fsynced before Commit returns
// (journal_mode=WAL, synchronous=FULL). The same holds for Ack and Quarantine.
//
// A Commit that did not return is stored wholly or not at all. After a power cut the
// last cycle may be absent. Nothing older is lost, and no cycle is stored in part.
//
// Nothing is delivered of a Commit that returned an error.
// One exception: when fsync itself failed and the agent dies before its next
// successful Commit, the cycle may reappear, since the kernel kept the pages.
//
// A request is delivered at least once, not exactly once: if the agent dies
// between the server's answer and the end of Ack, the requests of that one Next
// are delivered again.
//
// Cycles may be lost on a disk that lies about flushes, and by damage to the file itself.
// SQLite does not checksum its pages, so every record has its own checksum, and damaged
// records are never used. At the start the whole tree is checked. The last cycle is
// compared with a mark beside the file, since a damaged log looks like a shorter one. A
// damaged file is set aside, and the new one takes over the ledger and the requests, each
// if undamaged. A damaged request is quarantined. A damaged hour of one unit's history is
// left out and counted.
//
// A file of another version, or one that another machine has used, as on a clone,
// is set aside as well: its series and requests are not this machine's. See
// [Config].
//
// # Bounds
//
// The outbox is bounded by bytes and by age; see [Config]. The file keeps up to 4 MiB of
// free pages for reuse. Above that it shrinks by up to 2 MiB with each Commit. The
// write-ahead log is reused from its start at 4 MiB, and grows beyond only while a reader
// holds an old snapshot. It keeps its size, so that an Ack can still be written on a full
// disk.
package store
