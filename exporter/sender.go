package exporter

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"

	"github.com/unitmeter/unitmeter/exporter/otlp"
)

const (
	// maxCall is the most that one call carries: servers refuse more than
	// 4 MiB by default, and the framing needs some of that.
	maxCall = 3 << 20
	// minCall is where halving maxCall ends. Single entries may be larger:
	// they are split by points.
	minCall = 64 << 10
	// maxBackoff is the longest delay between two tries.
	maxBackoff = time.Minute
	// minRefusals is how often a request is refused before another one is tried in
	// its place.
	minRefusals = 3
	// maxRefused bounds the other requests that are refused in its place at a time.
	maxRefused = 16
	// drainBackoff is the same during shutdown, where time is short.
	drainBackoff = time.Second
)

// sender delivers the entries of an outbox in order. Its one goroutine, run, is
// started by New and ended by Shutdown; the fields below "run only" belong to it.
type sender struct {
	outbox Outbox
	counts *counts
	log    *slog.Logger
	call   func(ctx context.Context, request []byte) otlp.Answer

	wake  chan struct{} // has an element: there may be a new entry
	drain chan struct{} // closed: end when the outbox is empty
	done  chan struct{} // closed: run has ended

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when a field below changes
	kicks   int           // commits that run has not seen yet
	idle    bool          // all is delivered
	held    error         // why entries are held; nil when they are not

	// run only
	limit    int                         // the most that one call may carry now
	alone    int64                       // entries up to this ID go one by one
	failures int                         // failed calls in a row
	refusals int                         // of the first entry or its first part, in a row
	proven   bool                        // since its last refusal another entry was accepted
	ahead    map[int64][sha256.Size]byte // entries that were delivered before older ones
	part     parts
	acked    []Outcome // ended deliveries that the outbox does not know yet
	trouble  episode   // the outbox could not be read or written
	drained  bool      // run has noticed drain
}

// parts is an entry that is delivered in pieces.
type parts struct {
	entry Entry
	left  [][]byte
	// poison is why a part of it, or all of it, was given up.
	poison string
	// partial is what was refused of its parts, or of the whole request.
	partial Partial
}

func newSender(outbox Outbox, c *counts, log *slog.Logger, call func(context.Context, []byte) otlp.Answer) *sender {
	return &sender{
		outbox: outbox, counts: c, log: log, call: call,
		wake: make(chan struct{}, 1), drain: make(chan struct{}), done: make(chan struct{}),
		changed: make(chan struct{}), kicks: 1,
		limit: maxCall, trouble: episode{logger: log},
	}
}

// kick tells the sender about a new entry. It never blocks.
func (s *sender) kick() {
	s.mu.Lock()
	s.kicks++
	s.set(false, s.held)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// set changes what flush waits for. s.mu is held.
func (s *sender) set(idle bool, held error) {
	s.idle, s.held = idle, held
	close(s.changed)
	s.changed = make(chan struct{})
}

// flush waits until all is delivered, or returns why it cannot be now.
func (s *sender) flush(ctx context.Context) error {
	for {
		s.mu.Lock()
		idle, held, changed := s.idle, s.held, s.changed
		s.mu.Unlock()
		if idle || held != nil {
			return held
		}
		select {
		case <-changed:
		case <-s.done:
			return sdkmetric.ErrExporterShutdown
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// behind says that there are older entries which the sender can read, so that it
// will deliver them as soon as the receiver lets it.
func (s *sender) behind() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.trouble.current()
	return !s.idle && err == nil
}

// run delivers until ctx ends, or until drain is closed and all is delivered.
func (s *sender) run(ctx context.Context) {
	defer close(s.done)
	for ctx.Err() == nil {
		s.mu.Lock()
		kicks := s.kicks
		s.mu.Unlock()
		wait, more := s.step(ctx)
		s.mu.Lock()
		switch {
		case wait > 0 || ctx.Err() != nil: // hold has set held
		case more:
			s.set(false, nil)
		case kicks == s.kicks:
			s.set(true, nil)
		default:
			more = true // a commit that step may not have seen
		}
		s.mu.Unlock()
		switch {
		case wait > 0:
			s.sleep(ctx, wait)
		case more:
		case s.draining():
			return
		default:
			s.rest(ctx)
		}
	}
}

func (s *sender) draining() bool {
	select {
	case <-s.drain:
		return true
	default:
		return false
	}
}

// rest waits for something to do.
func (s *sender) rest(ctx context.Context) {
	select {
	case <-s.wake:
	case <-s.drain:
	case <-ctx.Done():
	}
}

// sleep waits for d. The beginning of the drain cuts it short once: a last try
// is worth its cost.
func (s *sender) sleep(ctx context.Context, d time.Duration) {
	drain := s.drain
	if s.drained {
		drain = nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-drain:
		s.drained = true
	case <-ctx.Done():
	}
}

// step makes at most one call. It returns how long to wait before the next step,
// and without a wait whether there is more to do.
func (s *sender) step(ctx context.Context) (wait time.Duration, more bool) {
	if wait := s.record(ctx); wait > 0 {
		return wait, true
	}
	batch, err := s.outbox.Next(ctx, s.limit)
	if ctx.Err() != nil {
		return 0, false
	}
	if err != nil {
		return s.stuck("read the outbox", err), true
	}
	s.trouble.over("the outbox works again")
	if len(batch) == 0 {
		s.ahead = nil
		return 0, false
	}
	if len(s.ahead) > 0 {
		if s.delivered(batch[0]) {
			delete(s.ahead, batch[0].ID)
			s.part = parts{}
			s.ended(batch[:1])
			return s.record(ctx), true
		}
		if n := slices.IndexFunc(batch, s.delivered); n > 0 {
			batch = batch[:n]
		}
	}
	if batch[0].ID <= s.alone {
		batch = batch[:1]
	}
	if wait = s.deliver(ctx, batch); wait == 0 {
		wait = s.record(ctx) // at once, for ctx may have ended
	}
	return wait, true
}

// record tells the outbox which deliveries are over. Until it knows them nothing
// else is done: it would give them out again. It returns how long to wait before
// the next try, 0 after success.
func (s *sender) record(ctx context.Context) (wait time.Duration) {
	if len(s.acked) == 0 {
		return 0
	}
	if err := s.outbox.Done(context.WithoutCancel(ctx), s.acked...); err != nil {
		return s.stuck("record deliveries in the outbox", err)
	}
	s.acked = nil
	return 0
}

// stuck logs an outbox that fails and returns the delay before the next try.
func (s *sender) stuck(what string, err error) time.Duration {
	s.failures++
	s.trouble.failed(slog.LevelError, what, "cannot "+what+"; delivery waits for it", err,
		"next", "check the space, the rights and the health of the disk under the state directory")
	return s.hold(err, otlp.Answer{Verdict: otlp.Transient})
}

// hold notes why entries are held and returns the delay before the next try.
func (s *sender) hold(err error, a otlp.Answer) time.Duration {
	s.mu.Lock()
	s.set(false, err)
	s.mu.Unlock()
	most := maxBackoff
	if s.draining() {
		most = drainBackoff
	}
	return a.Backoff(s.failures, most)
}

// deliver makes one call for a batch of at least one entry and returns how long
// to wait before the next one.
func (s *sender) deliver(ctx context.Context, batch []Entry) (wait time.Duration) {
	first, last := batch[0], batch[len(batch)-1]
	requests, points := make([][]byte, len(batch)), 0
	for i, e := range batch {
		requests[i] = e.Request
		points += e.Points
	}
	request := otlp.Join(requests...)
	// The outbox may have merged the entry with another one since it was
	// split; then the parts are of no use.
	inParts := len(s.part.left) > 0 && s.part.entry.ID == first.ID && bytes.Equal(s.part.entry.Request, first.Request)
	if inParts {
		batch, request = batch[:1], s.part.left[0]
		points = otlp.Count(request)
	} else {
		s.part = parts{}
	}
	a := s.call(ctx, request)
	if a.Verdict != otlp.Accepted && ctx.Err() != nil {
		return 0 // our own end, not the receiver's answer
	}
	switch {
	case a.Verdict == otlp.Accepted:
		s.failures = 0
		// The limit may have been halved for a reason that is over.
		s.limit = min(s.limit+maxCall/32, maxCall)
		s.counts.accepted(points, a)
		s.part.partial.Points += points
		if a.Rejected > 0 {
			s.part.partial.Rejected += a.Rejected
			s.part.partial.Message = a.Message
		}
		s.ended(batch)
		return 0
	case len(batch) > 1 && a.Verdict == otlp.TooLarge:
		if s.limit = max(len(request)/2, minCall); s.limit == minCall {
			s.alone = last.ID
		}
		return 0
	case len(batch) > 1 && (a.Verdict == otlp.Suspect || a.Verdict == otlp.Doubtful):
		s.alone = last.ID // find out which of them it is
		return 0
	case len(batch) > 1 && a.Slow:
		s.limit = max(len(request)/2, minCall) // as much as the line carries in time
	case a.Slow && len(request) > minCall:
		s.split(first, request, inParts)
	case a.Verdict == otlp.TooLarge:
		if s.split(first, request, inParts) {
			return 0
		}
		a.Verdict = otlp.Suspect // a single point too large
	}
	if (a.Verdict == otlp.Suspect || a.Verdict == otlp.Doubtful) && !s.draining() && s.refused(ctx, batch, points, a) {
		return 0
	}
	s.failures++
	s.counts.failed(a, "the requests stay in the outbox and are sent later")
	return s.hold(a.Err, a)
}

// refused deals with a first entry that may be refused for its data. It returns
// false if that is to be held.
func (s *sender) refused(ctx context.Context, batch []Entry, points int, a otlp.Answer) (done bool) {
	s.refusals++
	if a.Verdict == otlp.Suspect && s.proven {
		s.failures = 0
		s.counts.poisoned(points, a, fmt.Sprintf("request %d of the outbox is set aside in quarantine, and the others go on", batch[0].ID))
		s.part.poison = a.Err.Error()
		s.ended(batch)
		return true
	}
	if s.refusals >= minRefusals {
		s.proven = s.acceptsAnother(ctx, a.Verdict == otlp.Doubtful)
		if ctx.Err() != nil || s.proven && a.Verdict == otlp.Suspect {
			return true // the first one again: the receiver may have recovered in between
		}
	}
	return false
}

// acceptsAnother says whether the receiver accepts another entry than the first:
// the one behind it, one further on with each refusal, or the newest. If it does
// not, it is rather the receiver that is broken, and would refuse all others too.
// With all, the others follow if it does.
func (s *sender) acceptsAnother(ctx context.Context, all bool) bool {
	entries, err := s.outbox.Next(ctx, maxCall)
	if err != nil || len(entries) < 2 {
		return false
	}
	others := slices.DeleteFunc(entries[1:], s.delivered)
	if len(others) == 0 {
		return false
	}
	at := (s.refusals - minRefusals) % len(others)
	if !s.pass(ctx, others[at]) && !s.pass(ctx, others[len(others)-1]) {
		return false
	}
	for refused := 0; all && at+1 < len(others) && refused < maxRefused; at++ {
		if !s.delivered(others[at+1]) && !s.pass(ctx, others[at+1]) {
			refused++
		}
	}
	return true
}

// pass tries to deliver an entry before older ones.
func (s *sender) pass(ctx context.Context, e Entry) bool {
	a := s.call(ctx, e.Request)
	if a.Verdict != otlp.Accepted {
		return false
	}
	s.counts.accepted(e.Points, a)
	if s.ahead == nil {
		s.ahead = map[int64][sha256.Size]byte{}
	}
	s.ahead[e.ID] = sha256.Sum256(e.Request)
	return true
}

// delivered says that an entry was delivered before older ones, and has not been
// merged with another one since.
func (s *sender) delivered(e Entry) bool {
	sum, ok := s.ahead[e.ID]
	return ok && sum == sha256.Sum256(e.Request)
}

// split replaces the request, an entry or the first of its parts, by its halves.
// It returns false if there is nothing to cut.
func (s *sender) split(entry Entry, request []byte, inParts bool) bool {
	head, tail, err := otlp.Split(request)
	if err != nil || tail == nil {
		return false
	}
	if !inParts {
		s.part = parts{entry: entry, left: [][]byte{request}}
	}
	s.part.left = append([][]byte{head, tail}, s.part.left[1:]...)
	return true
}

// ended notes that the delivery of the entries, or of the first part of an
// entry, is over.
func (s *sender) ended(batch []Entry) {
	s.refusals, s.proven = 0, false
	if len(s.part.left) > 1 {
		s.part.left = s.part.left[1:]
		return
	}
	for _, e := range batch {
		s.acked = append(s.acked, Outcome{ID: e.ID, Poison: s.part.poison, Partial: s.part.partial})
	}
	s.part = parts{}
}
