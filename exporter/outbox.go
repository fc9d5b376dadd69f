package exporter

import (
	"context"
	"log/slog"
	"slices"
	"sync"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// Outbox keeps committed requests until they are delivered. An Exporter calls Commit
// from Export, and Next and Done from its sender. So Commit may run at the same time
// as one of the others.
type Outbox interface {
	// Commit makes the cycle durable before it returns nil. After an error
	// nothing of the cycle may show up in Next.
	Commit(ctx context.Context, cycle Cycle) error
	// Next returns the oldest entries after the given ID in the order of their
	// commit: at least one if there is any, and no further one that would bring the
	// sum of their requests over maxBytes. It returns none when all is delivered.
	Next(ctx context.Context, after int64, maxBytes int) ([]Entry, error)
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
	// Behind are the series of Sweep whose totals the deltas do not have yet, with
	// what the deltas have in place of Total. Mostly there are none.
	Behind []ledger.Series
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
	// Poison is why points of the entry must be set aside: the receiver refused them
	// each time they were tried. It is empty for a delivered entry.
	Poison string
	// Refused is a request with those points. The receiver has the others.
	Refused []byte
	// Partial has the points that the receiver refused of the entry's request.
	Partial Partial
}

// Partial is a partial success: so many points of a request are refused, and the
// others taken. The zero Partial is a full success.
type Partial struct {
	Points   int
	Rejected int64
	Message  string
}

const (
	// maxSpare bounds the request in memory that grows during an outage.
	maxSpare = 8 << 20
	// minSpare is how many requests are kept in memory unmerged: the one being
	// delivered, and another to try in its place.
	minSpare = 2
)

// queue is what a sender delivers: the entries of an outbox and, where there is
// none or it takes no cycles, requests in memory. Its methods are safe for
// concurrent use, but next and done by one goroutine.
type queue struct {
	outbox  Outbox  // nil without a state
	trouble episode // the outbox could not be read or written

	mu    sync.Mutex
	spare []Entry // before the entries of outbox
	last  int64   // ID of the newest in spare

	// next and done only
	inSpare    bool      // what next returned last is
	unrecorded []Outcome // the outbox does not know them yet
}

// add keeps the request of a cycle in memory. With more than minSpare there, it is
// merged into the newest one: totals stay exact, and points in time are lost. add
// returns false if the request would be too large.
func (q *queue) add(c Cycle) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	request, points := c.Request, c.Points
	if n := len(q.spare) - 1; n >= minSpare {
		var err error
		if request, points, err = otlp.Merge(q.spare[n].Request, request); err != nil || len(request) > maxSpare {
			return false
		}
		q.spare = q.spare[:n]
	}
	q.last++
	q.spare = append(q.spare, Entry{ID: q.last, Points: points, Request: request})
	return true
}

// next is like Outbox.Next, for memory first and then the outbox. It returns an error
// while outcomes are not recorded in the outbox, which would return these entries
// again. With after, it continues in the place of the call before.
func (q *queue) next(ctx context.Context, after int64, maxBytes int) ([]Entry, error) {
	q.mu.Lock()
	spare := slices.Clone(q.spare[:min(len(q.spare), minSpare)])
	q.mu.Unlock()
	if after == 0 {
		q.inSpare = len(spare) > 0
	}
	if q.inSpare {
		spare = slices.DeleteFunc(spare, func(e Entry) bool { return e.ID <= after })
		if len(spare) > 1 && len(spare[0].Request)+len(spare[1].Request) > maxBytes {
			spare = spare[:1]
		}
		return spare, nil
	}
	if q.outbox == nil {
		return nil, nil
	}
	if err := q.record(ctx); err != nil {
		return nil, err
	}
	entries, err := q.outbox.Next(ctx, after, maxBytes)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		q.failed("read the outbox", err)
	default:
		q.trouble.over("the outbox works again")
	}
	return entries, err
}

// done notes that the delivery of the first entries is over, also where ctx has
// ended.
func (q *queue) done(ctx context.Context, outcomes ...Outcome) {
	if q.inSpare {
		q.mu.Lock()
		q.spare = q.spare[len(outcomes):]
		q.mu.Unlock()
		return
	}
	q.unrecorded = append(q.unrecorded, outcomes...)
	_ = q.record(ctx) // next tries again
}

func (q *queue) record(ctx context.Context) error {
	if len(q.unrecorded) == 0 {
		return nil
	}
	if err := q.outbox.Done(context.WithoutCancel(ctx), q.unrecorded...); err != nil {
		q.failed("record deliveries in the outbox", err)
		return err
	}
	q.unrecorded = nil
	return nil
}

func (q *queue) failed(what string, err error) {
	q.trouble.failed(slog.LevelError, what, "cannot "+what+"; delivery waits for it", err,
		"next", "check the space, the rights and the health of the disk under the state directory")
}

// waiting reports whether the undelivered entries are all in the outbox, and the outbox
// could be read and written at the last try.
func (q *queue) waiting() bool {
	_, err := q.trouble.current()
	q.mu.Lock()
	defer q.mu.Unlock()
	return err == nil && len(q.spare) == 0
}

// drop empties the memory and returns how many points were in it.
func (q *queue) drop() (points int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range q.spare {
		points += e.Points
	}
	q.spare = nil
	return points
}
