package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	sqlite3 "modernc.org/sqlite/lib"
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrUnavailable says that the file cannot be used now: the disk is full,
	// failing or read-only. Every call tries anew, so the store recovers by
	// itself; meanwhile a caller sends its requests directly.
	ErrUnavailable = errors.New("store is unavailable")
	// ErrInUse says that another process has the directory.
	ErrInUse = errors.New("state directory is in use")
	// ErrNewerSchema says that a newer version of the agent wrote the file.
	ErrNewerSchema = errors.New("store was written by a newer version")
	// ErrClosed says that Close was called.
	ErrClosed = errors.New("store is closed")
)

// Fields of a Config that are zero mean these.
const (
	DefaultOutboxMaxBytes = 256 << 20
	DefaultOutboxMaxAge   = 7 * 24 * time.Hour
	DefaultHistory        = 21 * 24 * time.Hour
)

// Config says where a store is and how large it may become. Only Dir is needed.
type Config struct {
	// Dir is made with mode 0700 if there is none. It must belong to the user
	// of the process and be writable by nobody else.
	Dir string
	// OutboxMaxBytes bounds the requests not yet delivered, as compressed on
	// disk. The newest request is always taken, so the outbox may exceed the
	// bound by one request, and by a quarter while thinning catches up.
	OutboxMaxBytes int64 // 0 = DefaultOutboxMaxBytes
	// OutboxMaxAge bounds how old an undelivered request becomes. At most 16
	// are dropped for each Commit, so that a clock that jumps for a moment does
	// not empty the outbox.
	OutboxMaxAge time.Duration // 0 = DefaultOutboxMaxAge
	// History is how long samples are kept; with less than 0 none are, and
	// those of an earlier configuration are removed.
	History time.Duration // 0 = DefaultHistory
	// SeriesMaxAge is how long a series is kept after it was last seen. A series
	// with a run, or with no time of having been seen, is not too old.
	SeriesMaxAge time.Duration // 0 = 30 days
	// SeriesMax is how many series are kept; those seen longest ago go first.
	SeriesMax int // 0 = 20,000
	// Machine tells this machine from the copies of its disk. A store that another
	// one has used is set aside, with its series and undelivered requests. "" =
	// not known, and not compared.
	Machine string
	// Merge makes one request of two consecutive ones, and says how many points
	// it has; it is used to thin an outbox that is full. It must not retain or
	// change its arguments. It is called while the store is locked and must not
	// call back. With nil the older request is dropped, which keeps the totals of
	// cumulative series that are in both.
	Merge func(older, newer []byte) (merged []byte, points int, err error)
	// Logger is told when the store degrades and when it recovers, once each, and
	// when it begins anew.
	Logger *slog.Logger // nil = discard
	// Now is the clock for bounds of age. nil = time.Now.
	Now func() time.Time
}

// Store is safe for concurrent use. Calls take turns; none starts a goroutine.
type Store struct {
	cfg  Config
	path string

	mu        sync.Mutex
	closed    bool
	lock      *os.File
	db        *database // nil while unavailable
	stale     bool      // a transaction failed: what follows must be read again
	failures  int       // transactions in a row that failed on db
	recovered int       // how often it began anew since Open

	partial *Partial // as the file has it; nil while that is not known
	ledger  *ledgerState
	outbox  outbox
	history history
	down    bool // the last Commit failed
}

// Cycle is what one collection cycle leaves behind.
type Cycle struct {
	Time time.Time
	// Ledger is the whole present state. The store keeps just this, within the
	// bounds of Config, and writes what changed. Ledger.Time is not used.
	Ledger Ledger
	// Request is to be delivered; empty = nothing. At most 64 MiB. It must not
	// be changed any more: Next may return it as it is.
	Request []byte
	Points  int // in Request, for the statistics
	Samples []Sample
}

// Open opens the store in cfg.Dir. It fails if the directory is not safe, is in
// use (ErrInUse) or holds a newer store (ErrNewerSchema), since trying again
// will not help. A disk that is full or failing does not make it fail: then
// Ledger and Commit return ErrUnavailable until the disk has recovered.
//
// A file that is damaged or not ours is set aside, and Open goes on without it;
// the Logger is told.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	setDefault(&cfg.OutboxMaxBytes, DefaultOutboxMaxBytes)
	setDefault(&cfg.OutboxMaxAge, DefaultOutboxMaxAge)
	setDefault(&cfg.History, DefaultHistory)
	setDefault(&cfg.SeriesMaxAge, 30*24*time.Hour)
	setDefault(&cfg.SeriesMax, 20_000)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Store{cfg: cfg, path: filepath.Join(cfg.Dir, fileName)}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.ready()
	if refused := (refusal{}); errors.As(err, &refused) {
		s.release()
		return nil, refused.error
	}
	if err != nil {
		s.noteFailure(fmt.Errorf("%w: %w", ErrUnavailable, err))
	}
	return s, nil
}

func setDefault[T comparable](to *T, value T) {
	if *to == *new(T) {
		*to = value
	}
}

// refusal is an error that another try will not cure.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// Ledger returns the state that the last Commit left: the zero Ledger on the
// first day.
func (s *Store) Ledger(ctx context.Context) (Ledger, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.begin(ctx, "read ledger"); err != nil {
		return Ledger{}, err
	}
	return s.ledger.ledger(), nil
}

// Commit writes one cycle in one transaction. When it returns nil the cycle is
// durable. After an error nothing of it will be delivered or remembered, and the
// next Commit makes up for the ledger, since each holds the whole state.
//
// A ctx that is already done makes it fail; later it is not looked at, since an
// interrupted commit would leave unclear whether it happened.
func (s *Store) Commit(ctx context.Context, c Cycle) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(c.Request) > maxRequest {
		return fmt.Errorf("commit cycle: request of %d bytes is larger than %d: send it in parts", len(c.Request), maxRequest)
	}
	if !inRange(c.Time) || c.Time.IsZero() {
		return fmt.Errorf("commit cycle: time %v is zero or outside the years 1678 to 2262", c.Time)
	}
	if err := s.begin(ctx, "commit cycle"); err != nil {
		s.noteFailure(err)
		return err
	}
	c.Ledger.Time = c.Time
	c.Ledger.Series = s.retain(c.Ledger, c.Time)
	record, base, err := s.ledger.advance(c.Ledger)
	if err != nil {
		s.stale = true // advance stopped half-way
		return fmt.Errorf("commit cycle: %w", err)
	}
	newest := s.outbox.lastID
	err = s.db.tx(func() error {
		if err := s.writeLedger(record, base); err != nil {
			return err
		}
		if err := s.outbox.settle(s.db); err != nil {
			return err
		}
		if len(c.Request) > 0 {
			if err := s.outbox.append(s.db, c); err != nil {
				return err
			}
		}
		if s.cfg.History > 0 {
			return s.history.append(s.db, c)
		}
		return nil
	})
	if err != nil {
		s.outbox.reject(newest)
		err = s.failed("commit cycle", err)
		s.noteFailure(err)
		return err
	}
	s.outbox.settled()
	if len(c.Request) > 0 {
		s.outbox.fresh = Entry{ID: s.outbox.lastID, Request: c.Request}
	}
	s.failures = 0
	// The cycle is durable: what fails from here on is tried again next time.
	if err := s.maintain(); err != nil {
		s.noteFailure(s.failed("maintain store", err))
	} else if s.down {
		s.down = false
		s.cfg.Logger.Info("store has recovered", "path", s.path)
	}
	return nil
}

// maintain does the work that keeps the file small, after a cycle is durable. It
// is split into small transactions, so that no Commit takes long.
func (s *Store) maintain() error {
	if err := s.bound(); err != nil {
		return err
	}
	if err := s.history.advance(s.db); err != nil {
		return err
	}
	if err := s.history.expire(s.db, s.cfg.Now(), max(0, s.cfg.History)); err != nil {
		return err
	}
	return s.shrink()
}

// shrink gives free pages back to the file system: those above 4 MiB, which are
// kept for reuse, and 2 MiB for each Commit, since for each of them a page from
// the end of the file must be moved.
func (s *Store) shrink() error {
	_, free, size, err := s.db.pages()
	if err != nil || free*size <= 4<<20 {
		return err
	}
	// The pragma frees a page for each row that is taken from it.
	return s.db.each("PRAGMA incremental_vacuum(512)", nil, func(func(...any) error) error { return nil })
}

// retain returns the series of l that are not too old or too many. A series
// with a run stays: its unit is alive.
func (s *Store) retain(l Ledger, now time.Time) []Series {
	oldest := now.Add(-s.cfg.SeriesMaxAge)
	old := func(r Series) bool { return r.Seen.Before(oldest) && !r.Seen.IsZero() }
	if len(l.Series) <= s.cfg.SeriesMax && !slices.ContainsFunc(l.Series, old) {
		return l.Series
	}
	alive := make(map[seriesKey]bool, len(l.Runs))
	for _, r := range l.Runs {
		alive[r.ref()] = true
	}
	kept := slices.Clone(l.Series)
	kept = slices.DeleteFunc(kept, func(r Series) bool { return old(r) && !alive[r.ref()] })
	if len(kept) <= s.cfg.SeriesMax {
		return kept
	}
	slices.SortStableFunc(kept, func(a, b Series) int {
		if alive[a.ref()] != alive[b.ref()] {
			if alive[a.ref()] {
				return -1
			}
			return 1
		}
		return b.Seen.Compare(a.Seen)
	})
	return kept[:s.cfg.SeriesMax]
}

// Close ends the use of the file and of the directory. Calls after it return
// ErrClosed.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	return s.release()
}

func (s *Store) release() (err error) {
	if s.db != nil {
		err = s.db.close()
		s.db = nil
	}
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
		s.lock = nil
	}
	s.outbox.reader.release()
	return err
}

// begin makes the store ready for the operation op.
func (s *Store) begin(ctx context.Context, op string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	if s.closed {
		return fmt.Errorf("%s: %w", op, ErrClosed)
	}
	if err := s.ready(); err != nil {
		return fmt.Errorf("%s: %w: %w", op, ErrUnavailable, err)
	}
	return nil
}

// ready opens the file if it is not open, and opens it anew if it is no longer
// the file at its path.
func (s *Store) ready() error {
	if s.db != nil {
		if err := s.leaveIfGone(); err != nil {
			return err
		}
	}
	if s.db != nil {
		if !s.stale {
			return nil
		}
		// Go on with this connection: SQLite knows which pages of its log are
		// durable, and a new connection would believe those that are not.
		err := s.load()
		if err == nil {
			return nil
		}
		s.leave()
		if !isCorrupt(err) {
			return err
		}
	}
	if err := s.holdDir(); err != nil {
		return err
	}
	err := s.open()
	other := errors.Is(err, errMachine)
	if err == nil || !isCorrupt(err) && !other {
		return err
	}
	aside, asideErr := setAside(s.path, s.cfg.Now())
	if asideErr != nil {
		return errors.Join(err, asideErr)
	}
	if other {
		s.leaveTo(aside)
	} else {
		s.beganAnew(err, aside)
	}
	return s.open()
}

// leaveTo notes that the file at aside is of another machine, and how to use it all
// the same.
func (s *Store) leaveTo(aside string) {
	s.recovered++
	if err := disown(aside); err != nil {
		s.cfg.Logger.Warn("the state of another machine is set aside, and cannot be used again", "set_aside", aside, "err", err)
		return
	}
	s.cfg.Logger.Warn("the state is of another machine, as after cloning: it is set aside, and this machine begins its own series",
		"path", s.path, "set_aside", aside, "next", fmt.Sprintf("none after cloning; if this machine has a new machine id on purpose, stop the agent, run "+
			`for s in "" -wal -shm; do mv -f %q$s %q$s; done, and start it again`, aside, s.path))
}

// leaveIfGone gives up the connection if its files are no longer those at the
// path: someone deleted or replaced them, or another disk is mounted there.
func (s *Store) leaveIfGone() error {
	file, log := s.db.present()
	switch {
	case !file:
		s.leave()
		s.beganAnew(fmt.Errorf("%s was deleted or replaced while it was in use", s.path), "")
	case !log:
		// The file is whole only together with its log, which this connection
		// still has open: move everything into the file.
		var busy, pages, moved int
		err := s.db.row("PRAGMA wal_checkpoint(TRUNCATE)", nil, &busy, &pages, &moved)
		if err == nil && busy != 0 {
			err = errors.New("a reader is using it")
		}
		if err != nil {
			return fmt.Errorf("save the log of %s, which was deleted while it was in use: %w", s.path, err)
		}
		s.leave()
	}
	return nil
}

// holdDir takes the directory, and takes it again if there is another one at its
// path by now.
func (s *Store) holdDir() (err error) {
	if s.lock != nil {
		info, err := os.Stat(s.cfg.Dir)
		held, heldErr := s.lock.Stat()
		if err == nil && heldErr == nil && os.SameFile(info, held) {
			return nil
		}
		s.lock.Close()
		s.lock = nil
	}
	s.lock, err = lockDir(s.cfg.Dir)
	return err
}

func (s *Store) open() error {
	db, err := openDatabase(s.path)
	if err != nil {
		if errors.Is(err, ErrNewerSchema) {
			return refusal{err}
		}
		return err
	}
	s.db = db
	if s.cfg.Machine != "" {
		err = db.claim(s.cfg.Machine)
	}
	// A disk that cannot be written now must not keep a store from being read.
	switch code := sqliteCode(err); {
	case err == nil, code == sqlite3.SQLITE_FULL, code == sqlite3.SQLITE_IOERR, code == sqlite3.SQLITE_READONLY:
		err = s.load()
	}
	if err == nil {
		if err = db.remember(); err == nil {
			return nil
		}
	}
	s.leave()
	if sqliteCode(err) == sqlite3.SQLITE_ERROR {
		// A table or a column that the schema has is not there.
		return fmt.Errorf("%s: %w: %w", s.path, errCorrupt, err)
	}
	return err
}

// leave gives up the connection; the next call opens the file again.
func (s *Store) leave() {
	_ = s.db.close()
	s.db, s.stale, s.failures, s.partial = nil, false, 0, nil
}

// beganAnew notes that the content is gone. aside is where the damaged or foreign
// file is now, empty if it had been deleted or replaced.
func (s *Store) beganAnew(reason error, aside string) {
	s.recovered++
	s.cfg.Logger.Warn("store began anew; totals begin again where the units' own counters do",
		"path", s.path, "reason", reason, "set_aside", aside)
}

// load reads into memory what Commit needs.
func (s *Store) load() error {
	s.stale = false
	s.ledger = newLedgerState()
	last := int64(0)
	err := s.db.each("SELECT seq, base, body FROM ledger ORDER BY seq", nil, func(scan func(...any) error) error {
		var seq int64
		var base bool
		var body []byte
		if err := scan(&seq, &base, &body); err != nil {
			return err
		}
		if base != (last == 0) || last != 0 && seq != last+1 {
			return fmt.Errorf("ledger record %d follows record %d: %w", seq, last, errDamaged)
		}
		last = seq
		if err := s.ledger.replay(body, base); err != nil {
			return fmt.Errorf("ledger record %d: %w", seq, err)
		}
		return nil
	})
	s.ledger.endReplay()
	if err == nil {
		err = s.outbox.load(s.db)
	}
	if err == nil {
		err = s.history.load(s.db)
	}
	return err
}

func (s *Store) writeLedger(record []byte, base bool) error {
	if base {
		if _, err := s.db.exec("DELETE FROM ledger"); err != nil {
			return err
		}
	}
	_, err := s.db.exec("INSERT INTO ledger(base, body) VALUES(?, ?)", base, record)
	return err
}

// failed notes that a transaction failed and returns the error for the caller.
func (s *Store) failed(op string, err error) error {
	s.stale = true
	s.failures++
	if isCorrupt(err) {
		// Loading may not meet the damage, so it must be noted here.
		s.condemn(err)
	} else if s.failures > 1 || sqliteCode(err) == sqlite3.SQLITE_READONLY {
		// Perhaps it is the connection: a file that was opened on a read-only
		// disk stays read-only.
		s.leave()
	}
	return fmt.Errorf("%s: %w: %w", op, ErrUnavailable, err)
}

// condemn sets the file aside; the next Commit writes a new one.
func (s *Store) condemn(reason error) {
	s.leave()
	aside, err := setAside(s.path, s.cfg.Now())
	if err != nil {
		s.cfg.Logger.Error("damaged store could not be set aside", "path", s.path, "reason", reason, "err", err)
		return
	}
	s.beganAnew(reason, aside)
}

func (s *Store) noteFailure(err error) {
	if !s.down && errors.Is(err, ErrUnavailable) {
		s.down = true
		s.cfg.Logger.Warn("store is unavailable and will be tried again with each cycle", "path", s.path, "err", err,
			"next", "mend the disk or free some of it, or choose another state directory")
	}
}
