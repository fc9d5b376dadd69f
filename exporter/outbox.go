package exporter

import (
	"context"

	"github.com/unitmeter/unitmeter/receiver"
)

// Outbox keeps committed requests until they are delivered. An Exporter calls
// Commit from Export, and Next and Done from its sender, so that Commit may run
// at the same time as one of the others.
type Outbox interface {
	// Commit makes the cycle durable before it returns nil. After an error
	// nothing of the cycle may show up in Next.
	Commit(ctx context.Context, cycle Cycle) error
	// Next returns the oldest entries in the order of their commit: at least
	// one if there is any, and no further one that would bring the sum of
	// their requests over maxBytes. It returns none when all is delivered.
	Next(ctx context.Context, maxBytes int) ([]Entry, error)
	// Done removes entries that need no more delivery. The outcomes are in
	// the order of Next, and start with its first entry.
	Done(ctx context.Context, outcomes ...Outcome) error
}

// Cycle is what one Export commits.
type Cycle struct {
	// Sweep is the reading behind the request; nil before the first one.
	Sweep *receiver.Sweep
	// Request is a serialized ExportMetricsServiceRequest; nil when there is
	// nothing to send.
	Request []byte
	// Points is the number of data points in Request.
	Points int
}

// Entry is one request in the outbox.
type Entry struct {
	// ID grows with each commit.
	ID int64
	// Points is the number of data points in Request.
	Points int
	// Request is a serialized ExportMetricsServiceRequest.
	Request []byte
}

// Outcome says how the delivery of one entry ended.
type Outcome struct {
	// ID is the Entry's.
	ID int64
	// Poison is why the entry must be set aside: the receiver refused it each
	// time it was tried. It is empty for a delivered entry.
	Poison string
	// Partial is what the receiver refused of the request that the entry was in.
	Partial Partial
}

// Partial is a partial success: so many points of a request are refused, and the
// others taken. The zero Partial is a full success.
type Partial struct {
	Points   int
	Rejected int64
	Message  string
}
