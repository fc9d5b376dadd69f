package exporter

import (
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
	// maxCall bounds the size of one call: servers refuse more than 4 MiB by default,
	// and the framing needs some of that.
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
	// maxCuts bounds the search for the points of a request that are refused. It is
	// enough for four of 4,000.
	maxCuts = 64
	// drainBackoff is the same during shutdown, where time is short.
	drainBackoff = time.Second
)

// sender delivers the entries of a queue in order. Its one goroutine, run, is
// started by New and ended by Shutdown; the fields below "run only" belong to it.
type sender struct {
	queue  *queue
	counts *counts
	send   func(ctx context.Context, request []byte) otlp.Answer

	wake  chan struct{} // has an element: there may be a new entry
	drain chan struct{} // closed: end when all is delivered
	done  chan struct{} // closed: run has ended

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when a field below changes
	kicks   int           // commits that run has not seen yet
	idle    bool          // all is delivered
	held    error         // why entries are held; nil when they are not

	// run only
	limit    int             // the most that one call may carry now
	alone    int64           // entries up to this ID go one by one
	failures int             // failed calls in a row
	begun    map[int64]*work // by ID: entries that one call was not enough for
	tried    int64           // entries up to this ID were tried in place of the first
	drained  bool            // run has noticed drain
}

// work has the results for an entry so far.
type work struct {
	sum     [sha256.Size]byte // of the request, since a new file has the same IDs again
	left    []part            // at least one, unless it is over
	over    bool              // it was delivered before older ones
	cuts    int               // how often a part was cut in two since it was refused
	refused []byte            // the parts that were given up, as one request
	poison  otlp.Answer       // why
	partial Partial           // what was refused of parts that were accepted
}

// part is a part of an entry, or all of it.
type part struct {
	request []byte // nil for all of it between two tries, since that is large
	// refusals is how often it was refused. proven means that the receiver has accepted
	// something else since.
	refusals int
	proven   bool
}

// newSender makes a sender for an outbox, or nil for requests in memory only.
func newSender(outbox Outbox, c *counts, log *slog.Logger, send func(context.Context, []byte) otlp.Answer) *sender {
	return &sender{
		queue: &queue{outbox: outbox, trouble: episode{logger: log}}, counts: c, send: send,
		wake: make(chan struct{}, 1), drain: make(chan struct{}), done: make(chan struct{}),
		changed: make(chan struct{}), kicks: 1,
		limit: maxCall, begun: map[int64]*work{},
	}
}

// kick wakes the sender for a new entry. It never blocks.
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

// behind reports whether the outbox has readable entries, which the sender delivers as
// soon as the receiver accepts them.
func (s *sender) behind() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.idle && s.queue.waiting()
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

// sleep waits for d. The start of the drain ends it early once, for a last try.
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

// step makes at most one call, unless the first entry is refused. It returns how long
// to wait before the next step, and without a wait whether there is more to do.
func (s *sender) step(ctx context.Context) (wait time.Duration, more bool) {
	batch, err := s.queue.next(ctx, 0, s.limit)
	if ctx.Err() != nil {
		return 0, false
	}
	if err != nil {
		s.failures++
		return s.hold(err, otlp.Answer{Verdict: otlp.Transient}), true
	}
	if len(batch) == 0 {
		clear(s.begun)
		s.tried = 0
		return 0, false
	}
	first := batch[0]
	switch w := s.workOf(first); {
	case w != nil && w.over:
		s.ended(ctx, first, w)
		return 0, true
	case w != nil, first.ID <= s.alone:
		batch = batch[:1]
	default:
		if n := slices.IndexFunc(batch, func(e Entry) bool { return s.workOf(e) != nil }); n > 0 {
			batch = batch[:n]
		}
	}
	if len(batch) == 1 {
		return s.single(ctx, first), true
	}
	return s.joined(ctx, batch), true
}

// hold records why entries are held and returns the delay before the next try.
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

// fail is hold, after an answer that is no success.
func (s *sender) fail(a otlp.Answer) time.Duration {
	s.failures++
	s.counts.failed(a, "the requests are kept and sent later")
	return s.hold(a.Err, a)
}

// call makes one attempt with a request of so many points.
func (s *sender) call(ctx context.Context, request []byte, points int) otlp.Answer {
	a := s.send(ctx, request)
	if a.Verdict == otlp.Accepted {
		s.failures = 0
		// The limit may have been halved for a reason that is over.
		s.limit = min(s.limit+maxCall/32, maxCall)
		s.counts.accepted(points, a)
		for _, w := range s.begun {
			for i := range w.left {
				w.left[i].proven = w.left[i].refusals > 0
			}
		}
	}
	return a
}

// joined delivers several entries in one call, and returns how long to wait before
// the next one.
func (s *sender) joined(ctx context.Context, batch []Entry) (wait time.Duration) {
	requests, outcomes, points := make([][]byte, len(batch)), make([]Outcome, len(batch)), 0
	for i, e := range batch {
		requests[i], outcomes[i].ID = e.Request, e.ID
		points += e.Points
	}
	request, last := otlp.Join(requests...), batch[len(batch)-1].ID
	a := s.call(ctx, request, points)
	switch {
	case a.Verdict == otlp.Accepted:
		for i := range outcomes {
			outcomes[i].Partial = Partial{points, a.Rejected, a.Message}
		}
		s.queue.done(ctx, outcomes...)
		return 0
	case ctx.Err() != nil:
		return 0 // our own end, not the receiver's answer
	case a.Verdict == otlp.TooLarge:
		if s.limit = max(len(request)/2, minCall); s.limit == minCall {
			s.alone = last
		}
		return 0
	case a.Verdict == otlp.Suspect, a.Verdict == otlp.Doubtful:
		s.alone = last // find out which of them it is
		return 0
	case a.Slow:
		s.limit = max(len(request)/2, minCall) // as much as the line carries in time
	}
	return s.fail(a)
}

// single delivers the first entry, or the first part of it, and returns how long to
// wait before the next call.
func (s *sender) single(ctx context.Context, e Entry) (wait time.Duration) {
	w := s.begin(e)
	defer s.pause(e, w)
	p := w.left[0] // as it was before
	a, cut := s.try(ctx, e, w, 0)
	blamed := a.Verdict == otlp.Suspect && p.proven && !s.draining()
	switch {
	case a.Verdict == otlp.Accepted:
		if len(w.left) == 0 {
			s.ended(ctx, e, w)
		}
		return 0
	case ctx.Err() != nil, cut && !a.Slow:
		return 0
	case blamed && (w.cuts == 0 || w.partial.Points > 0) && w.search(0):
		return 0 // some of its points may be good
	case blamed:
		s.failures = 0
		w.left, w.poison = w.left[1:], a
		w.refused = append(w.refused, p.request...) // as Join does
		if len(w.left) == 0 {
			s.ended(ctx, e, w)
		}
		return 0
	case dubious(a) && !s.draining() && (p.refusals+1 >= minRefusals || w.cuts > 0):
		if s.acceptsAnother(ctx, e, a.Verdict == otlp.Doubtful) && a.Verdict == otlp.Suspect || ctx.Err() != nil {
			return 0 // the same again: the receiver may have recovered in between
		}
	}
	return s.fail(a)
}

// dubious reports whether an answer may blame the data.
func dubious(a otlp.Answer) bool { return a.Verdict == otlp.Suspect || a.Verdict == otlp.Doubtful }

// try makes one call with a part of an entry. An accepted part is done. A part that was
// too large, or too slow, is cut in two.
func (s *sender) try(ctx context.Context, e Entry, w *work, at int) (a otlp.Answer, cut bool) {
	p, points := &w.left[at], e.Points
	if len(p.request) < len(e.Request) {
		points = otlp.Count(p.request)
	}
	a = s.call(ctx, p.request, points)
	if a.Verdict == otlp.Accepted {
		w.partial.Points += points
		if a.Rejected > 0 {
			w.partial.Rejected += a.Rejected
			w.partial.Message = a.Message
		}
		w.left = slices.Delete(w.left, at, at+1)
		return a, false
	}
	if a.Verdict == otlp.TooLarge || a.Slow && len(p.request) > minCall {
		if w.cut(at) {
			return a, true
		}
		if a.Verdict == otlp.TooLarge {
			a.Verdict = otlp.Suspect // a single point too large
		}
	}
	if dubious(a) {
		p.refusals++
	}
	return a, false
}

// cut cuts a part in two. It returns false if there is nothing to cut.
func (w *work) cut(at int) bool {
	head, tail, err := otlp.Split(w.left[at].request)
	if err != nil || tail == nil {
		return false
	}
	w.left = slices.Replace(w.left, at, at+1, part{request: head}, part{request: tail})
	return true
}

// search cuts a part that was refused, to find out which of its points are.
func (w *work) search(at int) bool {
	if w.cuts == maxCuts || !w.cut(at) {
		return false
	}
	w.cuts++
	return true
}

// acceptsAnother reports whether the receiver accepts anything but the first part of the
// first entry. If not, the receiver is probably broken. It tries the parts in their
// order, from where it ended last. So only parts that were refused just before are
// overtaken: a Prometheus accepts no older points after newer ones. With all, it goes on
// after the first success.
func (s *sender) acceptsAnother(ctx context.Context, first Entry, all bool) (some bool) {
	if w := s.begin(first); !all && w.left[0].refusals > minRefusals {
		w.search(0) // if each request has a bad point, none is accepted as a whole
	}
	for page, refused := []Entry{first}, 0; len(page) > 0; {
		for _, e := range page {
			w, at := s.begin(e), 0
			if e.ID == first.ID {
				at = 1
			}
			for !w.over && at < len(w.left) {
				a, cut := s.try(ctx, e, w, at)
				switch {
				case a.Verdict == otlp.Accepted:
					w.over = len(w.left) == 0
					if some = true; !all {
						return true
					}
				case cut && !a.Slow:
				case dubious(a):
					// Once all were refused, the points are tried apart.
					if refused++; a.Verdict != otlp.Suspect || w.left[at].refusals < 2 || !w.search(at) {
						at++
					}
				default:
					return some // it is away now
				}
				if refused == maxRefused {
					break
				}
			}
			s.pause(e, w)
			if s.tried = max(s.tried, e.ID); refused == maxRefused {
				return some
			}
		}
		var err error
		if page, err = s.queue.next(ctx, max(first.ID, s.tried), maxCall); err != nil {
			return some
		}
	}
	if !some && !all {
		s.tried = 0 // from the beginning the next time
	}
	return some
}

// workOf returns the work for an entry, nil if there is none.
func (s *sender) workOf(e Entry) *work {
	w := s.begun[e.ID]
	if w == nil || w.sum != sha256.Sum256(e.Request) {
		return nil
	}
	return w
}

// begin is workOf for an entry that is about to be tried.
func (s *sender) begin(e Entry) *work {
	w := s.workOf(e)
	if w == nil {
		w = &work{sum: sha256.Sum256(e.Request), left: make([]part, 1)}
		s.begun[e.ID] = w
	}
	if !w.over && w.left[0].request == nil {
		w.left[0].request = e.Request
	}
	return w
}

// pause ends a try.
func (s *sender) pause(e Entry, w *work) {
	if len(w.left) == 1 && len(w.left[0].request) == len(e.Request) {
		if w.left[0].request = nil; w.left[0].refusals == 0 {
			delete(s.begun, e.ID)
		}
	}
}

// ended records that the delivery of the first entry is over.
func (s *sender) ended(ctx context.Context, e Entry, w *work) {
	delete(s.begun, e.ID)
	outcome := Outcome{ID: e.ID, Partial: w.partial}
	if len(w.refused) > 0 {
		outcome.Poison, outcome.Refused = w.poison.Err.Error(), w.refused
		fate := fmt.Sprintf("the refused points of request %d of the outbox are set aside in quarantine, and the others go on", e.ID)
		if s.queue.inSpare {
			fate = "they are dropped, since no state can keep them"
		}
		s.counts.poisoned(otlp.Count(w.refused), w.poison, fate)
	}
	s.queue.done(ctx, outcome)
}
