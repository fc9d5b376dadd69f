package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/database"
	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// Entry is one request of the outbox.
type Entry struct {
	ID      int64     // grows with each entry and is never used again
	Time    time.Time // of its cycle; of the newest cycle if thinning merged some
	Points  int       // in Request
	Request []byte
}

// Bounds of the quarantine. The oldest requests go first.
const (
	quarantineMax      = 100
	quarantineMaxBytes = 16 << 20
	quarantineReason   = 1 << 10 // bytes of the reason that are kept
)

const (
	rowOverhead   = 32 // bytes that SQLite adds to a body, about
	thinMaxCycles = 64 // thinning makes one request of so many; then it drops
	thinSteps     = 8  // merges for each Commit
	dropSteps     = 16 // drops by age for each Commit
	dropBatch     = 64 // drops at a time when thinning does not keep up
)

// outbox is what is known of the table in memory: only sums, so that a long
// outage costs no memory.
type outbox struct {
	lastID    int64 // newest id ever given out
	lastFrame int64
	entries   int64
	bytes     int64 // of entries and frames
	frames    map[int64]frameUse

	acked    int64 // up to here the requests were delivered
	unsaved  bool  // acked is newer than the file
	leased   int64 // up to here Next has handed requests out
	rejected int64 // if not 0, what comes after it was never committed

	writer frameWriter // for new requests
	thin   frameWriter // for merged ones
	reader frameReader

	// fresh is the newest request as it was committed. Mostly it is the next one
	// to be sent, and need not be decompressed for that.
	fresh Entry

	// Thinning walks from the oldest to the newest and merges neighbours that
	// together are not more than limit cycles. Each walk doubles the limit.
	limit  int64
	cursor int64 // id at which the walk is

	thinning, dropping bool // has been logged in this episode
	counts             counts
}

type counts struct {
	thinned, thinnedPoints, dropped, droppedPoints, quarantined int64
}

type frameUse struct {
	entries int64
	bytes   int64
}

// load reads the sums anew. Ids go on from the highest ever given out, even if
// the file is a new one: the sender may still hold ids from the old one.
func (o *outbox) load(db *database.DB) error {
	o.writer.forget()
	o.thin.forget()
	o.reader.close()
	o.fresh = Entry{}
	o.limit, o.cursor = 0, 0
	o.entries, o.bytes, o.frames = 0, 0, map[int64]frameUse{}
	for table, last := range map[string]*int64{"outbox": &o.lastID, "frame": &o.lastFrame} {
		seq, err := db.Sequence(table, "id")
		if err != nil {
			return err
		}
		*last = max(*last, seq)
	}
	err := db.Each("SELECT id, length(body) FROM frame", nil, func(scan func(...any) error) error {
		var id, size int64
		err := scan(&id, &size)
		o.frames[id] = frameUse{bytes: size + rowOverhead}
		o.bytes += size + rowOverhead
		return err
	})
	if err != nil {
		return err
	}
	err = db.Each("SELECT "+outboxColumns+", length(body) FROM outbox", nil, func(scan func(...any) error) error {
		var row outboxRow
		var size int64
		err := scan(append(row.columns(), &size)...)
		use := o.frames[row.frame]
		use.entries++
		o.frames[row.frame] = use
		o.entries++
		o.bytes += size + rowOverhead
		return err
	})
	if err != nil {
		return err
	}
	all, err := quarantined(db)
	o.counts.quarantined = int64(len(all))
	return err
}

// append adds the request of c as the newest.
func (o *outbox) append(db *database.DB, c Cycle) error {
	o.lastID++
	return o.put(db, &o.writer, outboxRow{id: o.lastID, time: c.Time.UnixNano(), points: int64(c.Points), cycles: 1}, c.Request)
}

// outboxRow is a row of the table.
type outboxRow struct {
	id, time, points, cycles, frame, again int64
	sum                                    uint32
	body                                   []byte
}

const outboxColumns = "id, time, points, cycles, frame, again, sum"

// columns are where to scan outboxColumns.
func (r *outboxRow) columns() []any {
	return []any{&r.id, &r.time, &r.points, &r.cycles, &r.frame, &r.again, &r.sum}
}

func (r *outboxRow) checksum() uint32 {
	return record.Sum(nil, r.id, r.time, r.points, r.cycles, r.frame, r.again)
}

func (o *outbox) put(db *database.DB, w *frameWriter, row outboxRow, request []byte) error {
	e, err := w.encode(request, o.lastFrame+1)
	if err != nil {
		return err
	}
	use := o.frames[e.frame]
	if e.newFrame != nil {
		o.lastFrame = e.frame
		if _, err := db.Exec("INSERT INTO frame(id, body) VALUES(?, ?)", e.frame, e.newFrame); err != nil {
			return err
		}
		use.bytes = int64(len(e.newFrame)) + rowOverhead
		o.bytes += use.bytes
		if err := o.removeFrames(db); err != nil {
			return err
		}
	}
	o.frames[e.frame] = use
	row.frame, row.body = e.frame, e.body
	return o.add(db, row)
}

// add inserts a row whose frame is there.
func (o *outbox) add(db *database.DB, row outboxRow) error {
	_, err := db.Exec("INSERT INTO outbox("+outboxColumns+", body) VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
		row.id, row.time, row.points, row.cycles, row.frame, row.again, row.checksum(), row.body)
	if err != nil {
		return err
	}
	use := o.frames[row.frame]
	use.entries++
	o.frames[row.frame] = use
	o.entries++
	o.bytes += int64(len(row.body)) + rowOverhead
	return nil
}

// remove deletes the entries with from <= id <= to, and the frames that nothing
// needs any more, and returns the sums of what it deleted.
func (o *outbox) remove(db *database.DB, from, to int64) (cycles, points int64, err error) {
	type group struct{ frame, entries, bytes int64 }
	var groups []group
	err = db.Each("SELECT frame, count(*), sum(length(body)), sum(cycles), sum(points) FROM outbox WHERE id BETWEEN ? AND ? GROUP BY frame",
		[]any{from, to}, func(scan func(...any) error) error {
			var g group
			var c, p int64
			err := scan(&g.frame, &g.entries, &g.bytes, &c, &p)
			groups = append(groups, g)
			cycles += c
			points += p
			return err
		})
	if err != nil || len(groups) == 0 {
		return 0, 0, err
	}
	if _, err := db.Exec("DELETE FROM outbox WHERE id BETWEEN ? AND ?", from, to); err != nil {
		return 0, 0, err
	}
	for _, g := range groups {
		o.entries -= g.entries
		o.bytes -= g.bytes + g.entries*rowOverhead
		use := o.frames[g.frame]
		use.entries -= g.entries
		o.frames[g.frame] = use
	}
	if o.entries == 0 {
		o.limit, o.cursor = 0, 0
		o.reader.release()
		o.thin.forget()
	}
	if o.fresh.ID <= to {
		o.fresh = Entry{}
	}
	return cycles, points, o.removeFrames(db)
}

// removeFrames deletes the frames that no entry needs, but for the two in use
// for writing: else a Collector that takes each request at once would make each
// request a new frame.
func (o *outbox) removeFrames(db *database.DB) error {
	for id, use := range o.frames {
		if use.entries > 0 || id == o.writer.id || id == o.thin.id {
			continue
		}
		delete(o.frames, id)
		o.bytes -= use.bytes
		if _, err := db.Exec("DELETE FROM frame WHERE id = ?", id); err != nil {
			return err
		}
	}
	return nil
}

// visible returns the range of ids that may be delivered or thinned.
func (o *outbox) visible() (from, to int64) {
	if o.rejected != 0 {
		return o.acked + 1, o.rejected
	}
	return o.acked + 1, math.MaxInt64
}

// reject makes sure that what a failed transaction wrote after the entry newest
// is never delivered, even if the file turns out to hold it.
func (o *outbox) reject(newest int64) {
	if o.rejected == 0 {
		o.rejected = newest
	}
}

// settle removes what is rejected or delivered but still in the file; settled is
// to be called once the transaction is durable.
func (o *outbox) settle(db *database.DB) error {
	if o.rejected != 0 {
		if _, _, err := o.remove(db, o.rejected+1, math.MaxInt64); err != nil {
			return err
		}
	}
	if o.unsaved {
		if _, _, err := o.remove(db, 0, o.acked); err != nil {
			return err
		}
	}
	return nil
}

func (o *outbox) settled() { o.rejected, o.unsaved = 0, false }

// first returns the first entry with from <= id <= to; sql.ErrNoRows if none, and
// with ErrDamaged a row of which only the id and the body are good.
func (o *outbox) first(db *database.DB, from, to int64) (row outboxRow, err error) {
	err = db.Row("SELECT "+outboxColumns+", body FROM outbox WHERE id BETWEEN ? AND ? ORDER BY id LIMIT 1",
		[]any{from, to}, append(row.columns(), &row.body)...)
	if err == nil && row.sum != row.checksum() {
		err = fmt.Errorf("request %d of the outbox %w", row.id, record.ErrDamaged)
	}
	return row, err
}

// decode returns the request in row. The error is record.ErrDamaged unless the file
// could not be read.
func (o *outbox) decode(db *database.DB, row outboxRow) ([]byte, error) {
	if row.id == o.fresh.ID && row.cycles == 1 {
		return o.fresh.Request, nil
	}
	request, err := o.reader.decode(row.body, row.frame, func(id int64) (body []byte, err error) {
		return body, db.Row("SELECT body FROM frame WHERE id = ?", []any{id}, &body)
	})
	if err != nil && database.Code(err) == 0 {
		return nil, fmt.Errorf("%w: %w", record.ErrDamaged, err)
	}
	return request, err
}

// Next returns the oldest requests that were not acknowledged, in the order of
// their cycles: as many as fit in maxBytes, decompressed, but at least one if
// there is any. They stay in the outbox until Ack or Quarantine, and thinning
// leaves them alone from now on. A request that is damaged on disk is put into
// quarantine and the next one is returned.
func (s *Store) Next(ctx context.Context, maxBytes int) ([]Entry, error) {
	return s.NextAfter(ctx, 0, maxBytes)
}

// NextAfter is Next for the requests after an id.
func (s *Store) NextAfter(ctx context.Context, after int64, maxBytes int) ([]Entry, error) {
	const op = "read outbox"
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.begin(ctx, op); err != nil {
		return nil, err
	}
	var out []Entry
	for total := 0; ; {
		from, to := s.outbox.visible()
		if from = max(from, after+1); len(out) > 0 {
			from = out[len(out)-1].ID + 1
		}
		row, err := s.outbox.first(s.db, from, to)
		if errors.Is(err, sql.ErrNoRows) {
			break
		}
		if err == nil && len(out) > 0 && total+requestSize(row.body) > maxBytes {
			break
		}
		var request []byte
		if err == nil {
			request, err = s.outbox.decode(s.db, row)
		}
		if errors.Is(err, record.ErrDamaged) {
			if err := s.quarantine(row, err.Error()); err != nil {
				return nil, s.failed(op, err)
			}
			s.cfg.Logger.Error("request is damaged on disk and was put into quarantine", "path", s.path, "id", row.id, "err", err)
			continue
		}
		if err != nil {
			return nil, s.failed(op, err)
		}
		out = append(out, Entry{ID: row.id, Time: record.FromNanos(row.time), Points: int(row.points), Request: request})
		if total += len(request); total >= maxBytes {
			break
		}
	}
	if len(out) > 0 {
		s.outbox.leased = max(s.outbox.leased, out[len(out)-1].ID)
	}
	return out, nil
}

// Ack removes the requests up to and with the id upTo, since a server has them.
// If the file cannot be written, Ack fails but Next does not return them again,
// and the next Commit that succeeds removes them.
func (s *Store) Ack(ctx context.Context, upTo int64) error {
	const op = "remove delivered requests"
	s.mu.Lock()
	defer s.mu.Unlock()
	o := &s.outbox
	if upTo > o.lastID {
		return fmt.Errorf("%s: id %d was never handed out, the newest is %d", op, upTo, o.lastID)
	}
	if upTo > o.acked {
		o.acked, o.unsaved = upTo, true
	}
	if err := s.begin(ctx, op); err != nil {
		return err
	}
	if !o.unsaved {
		return nil
	}
	err := s.db.Tx(func() error {
		_, _, err := o.remove(s.db, 0, o.acked)
		return err
	})
	if err != nil {
		return s.failed(op, err)
	}
	o.unsaved = false
	s.failures = 0
	s.noteDrained()
	return nil
}

// Partial is what a server said when it took a request and refused points of it. The
// zero Partial is none.
type Partial struct {
	Points   int   // of the request
	Rejected int64 // of them
	Message  string
}

// NotePartial keeps what the server said to the newest delivered request, for a
// Reader. It writes only what is new.
func (s *Store) NotePartial(ctx context.Context, p Partial) error {
	const op = "note refused points"
	p.Message = strings.ToValidUTF8(p.Message[:min(len(p.Message), quarantineReason)], "?")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.partial != nil && *s.partial == p {
		return nil
	}
	if err := s.begin(ctx, op); err != nil {
		return err
	}
	err := s.db.Tx(func() error {
		since := s.cfg.Now().UnixNano()
		err := s.db.Row("SELECT coalesce(max(since), ?) FROM partial", []any{since}, &since)
		if err == nil {
			_, err = s.db.Exec("DELETE FROM partial")
		}
		if err == nil && p.Rejected > 0 {
			_, err = s.db.Exec("INSERT INTO partial(since, points, rejected, message) VALUES(?, ?, ?, ?)", since, p.Points, p.Rejected, p.Message)
		}
		return err
	})
	if err != nil {
		return s.failed(op, err)
	}
	s.partial = &p
	return nil
}

func (s *Store) noteDrained() {
	o := &s.outbox
	if o.entries == 0 && (o.thinning || o.dropping) {
		o.thinning, o.dropping = false, false
		s.cfg.Logger.Info("outbox is empty again", "thinned_requests", o.counts.thinned, "dropped_cycles", o.counts.dropped)
	}
}

// Quarantine takes the request with the id of refused out of the outbox, so that
// those after it can be delivered. It keeps refused, which has only the points that
// no server has, and up to 1 KiB of the reason. The quarantine has room for 100
// requests and 16 MiB; the oldest go first.
func (s *Store) Quarantine(ctx context.Context, refused Entry, reason string) error {
	const op = "quarantine request"
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.begin(ctx, op); err != nil {
		return err
	}
	row, err := s.outbox.first(s.db, refused.ID, refused.ID)
	if from, to := s.outbox.visible(); errors.Is(err, sql.ErrNoRows) || refused.ID < from || refused.ID > to {
		return fmt.Errorf("%s: id %d is not in the outbox", op, refused.ID)
	}
	if err = unlessDamaged(err); err == nil {
		row.points, row.body = int64(refused.Points), record.Compress(refused.Request)
		err = s.quarantine(row, reason)
	}
	if err != nil {
		return s.failed(op, err)
	}
	s.failures = 0
	s.noteDrained()
	return nil
}

// quarantine moves row to the quarantine, with the points and the body that it has now.
func (s *Store) quarantine(row outboxRow, reason string) error {
	if len(reason) > quarantineReason {
		reason = reason[:quarantineReason]
	}
	var given sql.Result
	err := s.db.Tx(func() error {
		_, err := s.db.Exec("INSERT OR REPLACE INTO quarantine(id, time, at, points, reason, body) VALUES(?, ?, ?, ?, ?, ?)",
			row.id, row.time, s.cfg.Now().UnixNano(), row.points, strings.ToValidUTF8(reason, "?"), row.body)
		if err != nil {
			return err
		}
		if given, err = s.db.Exec(`DELETE FROM quarantine WHERE id IN (SELECT id FROM (
			SELECT id, row_number() OVER newest AS n, sum(length(body)) OVER newest AS size FROM quarantine
			WINDOW newest AS (ORDER BY id DESC)) WHERE n > 1 AND (n > ? OR size > ?))`, quarantineMax, quarantineMaxBytes); err != nil {
			return err
		}
		_, _, err = s.outbox.remove(s.db, row.id, row.id)
		return err
	})
	if err != nil {
		return err
	}
	if n, err := given.RowsAffected(); err == nil && n > 0 {
		s.cfg.Logger.Warn("quarantine is full: the oldest requests are deleted", "requests", n,
			"max_requests", quarantineMax, "max_bytes", quarantineMaxBytes)
	}
	return s.db.Row("SELECT count(*) FROM quarantine", nil, &s.outbox.counts.quarantined)
}

// bound brings the outbox back within its bounds, a few steps at a time.
func (s *Store) bound() error {
	o := &s.outbox
	old, err := s.tooOld()
	if err != nil {
		return err
	}
	if len(old) == 0 && o.bytes <= s.cfg.OutboxMaxBytes {
		return nil
	}
	before := o.counts
	err = s.db.Tx(func() error {
		for _, id := range old {
			if err := s.drop(id, id); err != nil {
				return err
			}
		}
		for step := 0; step < thinSteps && o.bytes > s.cfg.OutboxMaxBytes; step++ {
			thinned, err := s.thinOne()
			if err == nil && !thinned {
				err = s.dropOldest(1)
			}
			if err != nil {
				return err
			}
		}
		// Thinning does not keep up, as after a restart with a smaller bound.
		for step := 0; step < dropSteps && o.bytes > s.cfg.OutboxMaxBytes/4*5 && o.entries > 1; step++ {
			if err := s.dropOldest(dropBatch); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		o.counts = before
		return err
	}
	if o.counts.thinned > before.thinned && !o.thinning {
		o.thinning = true
		s.cfg.Logger.Warn("outbox is full: merging the oldest cycles, totals stay exact",
			"max_bytes", s.cfg.OutboxMaxBytes, "entries", o.entries)
	}
	if o.counts.dropped > before.dropped && !o.dropping {
		o.dropping = true
		why := "outbox is full"
		if len(old) > 0 {
			why = "outbox holds requests that are too old"
		}
		s.cfg.Logger.Warn(why+": dropping the oldest cycles",
			"max_bytes", s.cfg.OutboxMaxBytes, "max_age", s.cfg.OutboxMaxAge, "entries", o.entries)
	}
	s.noteDrained()
	return nil
}

// tooOld returns the ids of some entries that are older than the bound. It looks
// at some more of the first ones than that, since an entry may come from a clock
// that was ahead.
func (s *Store) tooOld() (ids []int64, err error) {
	if s.outbox.entries == 0 {
		return nil, nil
	}
	oldest := s.cfg.Now().Add(-s.cfg.OutboxMaxAge).UnixNano()
	err = s.db.Each("SELECT "+outboxColumns+" FROM outbox ORDER BY id LIMIT ?", []any{4 * dropSteps}, func(scan func(...any) error) error {
		var row outboxRow
		err := scan(row.columns()...)
		// A person has asked for those of the quarantine. Next deals with damaged ones.
		if row.time < oldest && row.again == 0 && row.sum == row.checksum() && len(ids) < dropSteps {
			ids = append(ids, row.id)
		}
		return err
	})
	return ids, err
}

// dropOldest drops the n oldest entries that are not with the sender, but never
// the newest entry. If the sender has nearly all of them, it drops those.
func (s *Store) dropOldest(n int) error {
	for _, after := range []int64{s.outbox.leased, 0} {
		var from, to sql.NullInt64
		err := s.db.Row("SELECT min(id), max(id) FROM (SELECT id FROM outbox WHERE id > ? AND id < (SELECT max(id) FROM outbox) ORDER BY id LIMIT ?)",
			[]any{after, n}, &from, &to)
		if err != nil {
			return err
		}
		if from.Valid {
			return s.drop(from.Int64, to.Int64)
		}
	}
	return nil
}

func (s *Store) drop(from, to int64) error {
	o := &s.outbox
	cycles, points, err := o.remove(s.db, from, to)
	if to > o.acked { // else a server has it
		o.counts.dropped += cycles
		o.counts.droppedPoints += points
	}
	return err
}

// thinOne merges the next two neighbours. It returns false if there are none
// whose merging would help.
func (s *Store) thinOne() (bool, error) {
	const window = 256
	o := &s.outbox
	if o.limit == 0 {
		o.limit = 2
	}
	for {
		from, to := o.visible()
		from = max(from, o.cursor, o.leased+1)
		var ids, cycles []int64
		err := s.db.Each("SELECT id, cycles FROM outbox WHERE id BETWEEN ? AND ? AND again = 0 ORDER BY id LIMIT ?", []any{from, to, window},
			func(scan func(...any) error) error {
				var id, n int64
				err := scan(&id, &n)
				ids, cycles = append(ids, id), append(cycles, n)
				return err
			})
		if err != nil {
			return false, err
		}
		for i := range len(ids) - 1 {
			if cycles[i]+cycles[i+1] <= o.limit {
				o.cursor = ids[i+1]
				return s.merge(ids[i], ids[i+1])
			}
		}
		switch {
		case len(ids) == window:
			o.cursor = ids[window-1]
		case o.limit < thinMaxCycles:
			o.limit *= 2
			o.cursor = 0
		default:
			// From here on only new entries can be merged: the walk stays at
			// its end.
			if len(ids) > 0 {
				o.cursor = ids[len(ids)-1]
			}
			return false, nil
		}
	}
}

// merge makes one entry of two neighbours. It returns false if that cannot be.
func (s *Store) merge(older, newer int64) (bool, error) {
	o := &s.outbox
	a, err := o.first(s.db, older, older)
	if err != nil {
		return false, unlessDamaged(err)
	}
	b, err := o.first(s.db, newer, newer)
	if err != nil {
		return false, unlessDamaged(err)
	}
	if s.cfg.Merge == nil {
		if _, _, err := o.remove(s.db, a.id, a.id); err != nil {
			return false, err
		}
		b.cycles += a.cycles
		if _, err := s.db.Exec("UPDATE outbox SET cycles = ?, sum = ? WHERE id = ?", b.cycles, b.checksum(), b.id); err != nil {
			return false, err
		}
		o.counts.thinnedPoints += a.points
	} else {
		merged, points, err := s.mergeRequests(a, b)
		if errors.Is(err, errUnmergeable) {
			if !o.thinning {
				o.thinning = true
				s.cfg.Logger.Warn("outbox is full and cycles cannot be merged: dropping the oldest", "err", err)
			}
			return false, nil
		}
		if err != nil {
			return false, err
		}
		// Requests between them were in quarantine.
		for _, id := range []int64{a.id, b.id} {
			if _, _, err := o.remove(s.db, id, id); err != nil {
				return false, err
			}
		}
		o.counts.thinnedPoints += a.points + b.points - points
		b.cycles, b.points = a.cycles+b.cycles, points
		if err := o.put(s.db, &o.thin, b, merged); err != nil {
			return false, err
		}
	}
	o.counts.thinned++
	return true, nil
}

// unlessDamaged leaves damaged rows to Next.
func unlessDamaged(err error) error {
	if errors.Is(err, record.ErrDamaged) {
		return nil
	}
	return err
}

var errUnmergeable = errors.New("requests cannot be merged")

func (s *Store) mergeRequests(a, b outboxRow) (merged []byte, points int64, err error) {
	var requests [2][]byte
	for i, row := range []outboxRow{a, b} {
		if requests[i], err = s.outbox.decode(s.db, row); errors.Is(err, record.ErrDamaged) {
			return nil, 0, fmt.Errorf("%w: %w", errUnmergeable, err)
		} else if err != nil {
			return nil, 0, err
		}
	}
	merged, n, err := s.cfg.Merge(requests[0], requests[1])
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", errUnmergeable, err)
	}
	if len(merged) > record.MaxSize {
		return nil, 0, fmt.Errorf("%w: the result has %d bytes", errUnmergeable, len(merged))
	}
	return merged, int64(n), nil
}

// Stats is a snapshot of the store. Counts begin at Open.
type Stats struct {
	OutboxEntries int64
	OutboxBytes   int64     // compressed, on disk
	OldestTime    time.Time // of the oldest request not delivered; zero if there is none

	Thinned, ThinnedPoints int64 // requests, and their points, merged into a newer one
	Dropped, DroppedPoints int64 // cycles, and points, given up undelivered
	Quarantined            int64 // requests now in quarantine
	Replaced               int64 // times that a new file began, for the old one was damaged, foreign or gone
}

// Stats never fails: what the file cannot tell now is as it was or zero.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := &s.outbox
	st := Stats{
		OutboxEntries: o.entries, OutboxBytes: o.bytes,
		Thinned: o.counts.thinned, ThinnedPoints: o.counts.thinnedPoints,
		Dropped: o.counts.dropped, DroppedPoints: o.counts.droppedPoints, Quarantined: o.counts.quarantined,
		Replaced: s.replaced,
	}
	if s.db == nil {
		return st
	}
	from, to := o.visible()
	var oldest sql.NullInt64
	if err := s.db.Row("SELECT time FROM outbox WHERE id BETWEEN ? AND ? ORDER BY id LIMIT 1", []any{from, to}, &oldest); err == nil {
		st.OldestTime = record.FromNanos(oldest.Int64)
	}
	return st
}
