package store

import (
	"cmp"
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

	"github.com/unitmeter/unitmeter/exporter/store/database"
	"github.com/unitmeter/unitmeter/exporter/store/history"
	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrUnavailable says that the file cannot be used now: the disk is full,
	// failing or read-only. Every call tries anew, so the store recovers by
	// itself; meanwhile a caller sends its requests directly.
	ErrUnavailable = errors.New("store is unavailable")
	// ErrInUse says that another process has the directory.
	ErrInUse = database.ErrInUse
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
	db        *database.DB // nil while unavailable
	stale     bool         // a transaction failed: what follows must be read again
	condemned error        // why the file at path is to be set aside
	failures  int          // transactions in a row that failed on db
	replaced  int64        // how often a new file began since Open

	partial *Partial // as the file has it; nil while that is not known
	ledger  *ledgerState
	outbox  outbox
	history history.Writer
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
	Samples []history.Sample
}

// Open opens the store in cfg.Dir. It fails if the directory is not safe or in
// use (ErrInUse), since trying again will not help. A disk that is full or failing does not make it fail: then
// Ledger and Commit return ErrUnavailable until the disk has recovered.
//
// A file that is damaged, or not one of this version, is set aside, and Open goes on
// with what of it is whole; the Logger is told. When ctx ends, so does the check.
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
	err := s.ready(ctx)
	if refused := (database.Refusal{}); errors.As(err, &refused) {
		s.release()
		return nil, refused.Unwrap()
	}
	if ctx.Err() != nil {
		s.release()
		return nil, fmt.Errorf("open store: %w", ctx.Err())
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
// durable. After an error nothing of it is kept or delivered. The next Commit then has
// the missing part of the ledger too, since each holds the whole state.
//
// A ctx that is already done makes it fail; later it is not looked at, since an
// interrupted commit would leave unclear whether it happened.
func (s *Store) Commit(ctx context.Context, c Cycle) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(c.Request) > record.MaxSize {
		return fmt.Errorf("commit cycle: request of %d bytes is larger than %d: send it in parts", len(c.Request), record.MaxSize)
	}
	if !record.InRange(c.Time) || c.Time.IsZero() {
		return fmt.Errorf("commit cycle: time %v is zero or outside the years 1678 to 2262", c.Time)
	}
	if err := s.begin(ctx, "commit cycle"); err != nil {
		s.noteFailure(err)
		return err
	}
	c.Ledger.Time = c.Time
	c.Ledger.Series = s.retain(c.Ledger, c.Time)
	body, base, err := s.ledger.advance(c.Ledger)
	if err != nil {
		s.stale = true // advance stopped half-way
		return fmt.Errorf("commit cycle: %w", err)
	}
	newest := s.outbox.lastID
	err = s.db.Tx(func() error {
		if err := s.writeLedger(body, base); err != nil {
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
			return s.history.Append(s.db, c.Time, c.Samples)
		}
		return nil
	})
	if err != nil {
		s.outbox.reject(newest)
		err = s.failed("commit cycle", err)
		s.noteFailure(err)
		return err
	}
	// It only serves to notice damage, and the next one makes up for it.
	_ = s.db.Mark(s.ledger.seq)
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
	if err := s.retry(); err != nil {
		return err
	}
	if err := s.history.Advance(s.db); err != nil {
		return err
	}
	if err := s.history.Expire(s.db, s.cfg.Now(), max(0, s.cfg.History)); err != nil {
		return err
	}
	return s.shrink()
}

// shrink gives free pages back to the file system: those above 4 MiB, which are
// kept for reuse, and 2 MiB for each Commit, since for each of them a page from
// the end of the file must be moved.
func (s *Store) shrink() error {
	_, free, size, err := s.db.Pages()
	if err != nil || free*size <= 4<<20 {
		return err
	}
	// The pragma frees a page for each row that is taken from it.
	return s.db.Each("PRAGMA incremental_vacuum(512)", nil, func(func(...any) error) error { return nil })
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
	if s.db != nil && !s.stale {
		_ = s.db.Checkpoint() // a log without content cannot be damaged
	}
	return s.release()
}

func (s *Store) release() (err error) {
	if s.db != nil {
		err = s.db.Close()
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
	if err := s.ready(ctx); err != nil {
		return fmt.Errorf("%s: %w: %w", op, ErrUnavailable, err)
	}
	return nil
}

// ready opens the file if it is not open, and opens it anew if it is no longer
// the file at its path.
func (s *Store) ready(ctx context.Context) error {
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
		if !database.Damaged(err) {
			return err
		}
		s.condemned = err
	}
	if err := s.holdDir(); err != nil {
		return err
	}
	if s.condemned == nil {
		err := s.open(ctx)
		if !database.Damaged(err) && !errors.Is(err, errMachine) {
			return err
		}
		s.condemned = err
	}
	return s.replace(ctx)
}

// replace sets the condemned file aside and makes a new one, with what of the old
// one is whole.
func (s *Store) replace(ctx context.Context) error {
	aside, err := database.SetAside(s.path, s.cfg.Now())
	if err != nil && aside == "" {
		return errors.Join(s.condemned, err)
	}
	reason := s.condemned
	s.condemned = nil
	if err := s.open(ctx); err != nil {
		return err
	}
	if errors.Is(reason, errMachine) {
		s.leaveTo(aside)
		return nil
	}
	var kept []string
	if !errors.Is(reason, database.ErrForeign) {
		kept, err = s.salvage(aside)
	}
	s.beganAnew(reason, aside, kept)
	if err != nil {
		s.leave()
	}
	return err
}

// salvage copies the ledger and the requests of the file at aside, each if it is
// whole, and returns what it has copied. It copies nothing if the file has lost its
// last cycles: their requests were delivered.
func (s *Store) salvage(aside string) (kept []string, err error) {
	copyPart := func(part string, load func() error, tables ...string) error {
		err := s.db.Copy(tables...)
		if err == nil {
			if err = load(); err == nil {
				kept = append(kept, part)
				return nil
			}
		}
		for _, table := range tables {
			_, err := s.db.Exec("DELETE FROM main." + table)
			if err == nil {
				_, err = s.db.Exec("DELETE FROM main.sqlite_sequence WHERE name = ?", table)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	err = s.db.With(aside, func() error {
		var seq int64
		err := s.db.Row("SELECT coalesce(max(seq), 0) FROM old.sqlite_sequence WHERE name = 'ledger'", nil, &seq)
		if err != nil || seq < database.Marked(aside) {
			return nil
		}
		return errors.Join(
			copyPart("ledger", func() error {
				if err := s.loadLedger(); err != nil || s.ledger.seq != seq {
					return cmp.Or(err, record.ErrDamaged)
				}
				return nil
			}, "ledger"),
			copyPart("requests", func() error { return s.outbox.load(s.db) }, "frame", "outbox", "quarantine", "retry"))
	})
	if err != nil {
		s.cfg.Logger.Warn("the file that is set aside cannot be read", "path", aside, "err", err)
	}
	return kept, s.load()
}

// leaveTo notes that the file at aside is of another machine, and how to use it all
// the same.
func (s *Store) leaveTo(aside string) {
	s.replaced++
	if err := disown(aside); err != nil {
		s.cfg.Logger.Warn("the state of another machine is set aside, and cannot be used again", "set_aside", aside, "err", err)
		return
	}
	s.cfg.Logger.Warn("the state is of another machine, as after cloning: it is set aside, and this machine begins its own series",
		"path", s.path, "set_aside", aside, "next", fmt.Sprintf("none after cloning; if this machine has a new machine id on purpose, stop the agent, run "+
			`for s in "" -wal -shm -mark; do mv -f %q$s %q$s; done, and start it again`, aside, s.path))
}

// leaveIfGone gives up the connection if its files are no longer those at the
// path: someone deleted or replaced them, or another disk is mounted there.
func (s *Store) leaveIfGone() error {
	file, log := s.db.Present()
	switch {
	case !file:
		s.leave()
		// What is there now may be older on purpose.
		if err := database.DropMark(s.path); err != nil {
			return err
		}
		s.beganAnew(fmt.Errorf("%s was deleted or replaced while it was in use", s.path), "", nil)
	case !log:
		// The file is whole only together with its log, which this connection
		// still has open: move everything into the file.
		if err := s.db.Checkpoint(); err != nil {
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
	s.lock, err = database.LockDir(s.cfg.Dir)
	return err
}

func (s *Store) open(ctx context.Context) error {
	db, err := database.Open(ctx, spec(s.cfg.Dir, s.cfg.Logger))
	if err != nil {
		return err
	}
	s.db = db
	if s.cfg.Machine != "" {
		err = claim(db, s.cfg.Machine)
	}
	// A disk that cannot be written now must not keep a store from being read.
	switch code := database.Code(err); {
	case err == nil, code == sqlite3.SQLITE_FULL, code == sqlite3.SQLITE_IOERR, code == sqlite3.SQLITE_READONLY:
		err = s.load()
	}
	if marked := database.Marked(s.path); err == nil && s.ledger.seq < marked {
		err = fmt.Errorf("%s: %w: it has lost %d cycles at its end, as with a damaged log or when an older copy was put in its place", s.path, record.ErrDamaged, marked-s.ledger.seq)
	}
	if err != nil {
		s.leave()
	}
	return err
}

// leave gives up the connection; the next call opens the file again.
func (s *Store) leave() {
	_ = s.db.Close()
	s.db, s.stale, s.failures, s.partial = nil, false, 0, nil
}

// beganAnew notes that there is a new file. aside is where the damaged or foreign
// one is now, empty if it had been deleted or replaced; kept is what was taken over
// from it.
func (s *Store) beganAnew(reason error, aside string, kept []string) {
	s.replaced++
	msg := "store began anew; totals restart from the units' own counters"
	if slices.Contains(kept, "ledger") {
		msg = "store began anew; totals continue"
	}
	s.cfg.Logger.Warn(msg, "path", s.path, "reason", reason, "set_aside", aside, "kept", kept)
}

// maxLedger bounds the records of the ledger in bytes: several times what 20,000
// series need.
const maxLedger = 64 << 20

// load reads into memory what Commit needs.
func (s *Store) load() error {
	s.stale = false
	err := s.loadLedger()
	if err == nil {
		err = s.outbox.load(s.db)
	}
	if err == nil {
		err = s.history.Load(s.db)
	}
	return err
}

func (s *Store) loadLedger() error {
	s.ledger = newLedgerState()
	defer s.ledger.endReplay()
	seq, err := s.db.Sequence("ledger", "seq")
	if err != nil {
		return err
	}
	var size int64
	if err := s.db.Row("SELECT coalesce(sum(length(body)), 0) FROM ledger", nil, &size); err != nil {
		return err
	}
	if size > maxLedger {
		return fmt.Errorf("ledger of %d bytes: %w", size, record.ErrDamaged)
	}
	err = s.db.Each("SELECT seq, base, body FROM ledger ORDER BY seq", nil, func(scan func(...any) error) error {
		var seq int64
		var base bool
		var body []byte
		if err := scan(&seq, &base, &body); err != nil {
			return err
		}
		if last := s.ledger.seq; base != (last == 0) || last != 0 && seq != last+1 {
			return fmt.Errorf("ledger record %d follows record %d: %w", seq, last, record.ErrDamaged)
		}
		s.ledger.seq = seq
		if err := s.ledger.replay(body, base); err != nil {
			return fmt.Errorf("ledger record %d: %w", seq, err)
		}
		return nil
	})
	if err == nil && s.ledger.seq != seq {
		err = fmt.Errorf("ledger ends with record %d of %d: %w", s.ledger.seq, seq, record.ErrDamaged)
	}
	return err
}

func (s *Store) writeLedger(body []byte, base bool) error {
	if base {
		if _, err := s.db.Exec("DELETE FROM ledger"); err != nil {
			return err
		}
	}
	s.ledger.seq++
	_, err := s.db.Exec("INSERT INTO ledger(seq, base, body) VALUES(?, ?, ?)", s.ledger.seq, base, body)
	return err
}

// failed notes that a transaction failed and returns the error for the caller.
func (s *Store) failed(op string, err error) error {
	s.stale = true
	s.failures++
	if database.Damaged(err) {
		// Loading may not meet the damage, so it must be noted here.
		s.leave()
		s.condemned = err
	} else if s.failures > 1 || database.Code(err) == sqlite3.SQLITE_READONLY {
		// Perhaps it is the connection: a file that was opened on a read-only
		// disk stays read-only.
		s.leave()
	}
	return fmt.Errorf("%s: %w: %w", op, ErrUnavailable, err)
}

func (s *Store) noteFailure(err error) {
	if !s.down && errors.Is(err, ErrUnavailable) {
		s.down = true
		s.cfg.Logger.Warn("store is unavailable and will be tried again with each cycle", "path", s.path, "err", err,
			"next", "repair the disk or free some space, or choose another state directory")
	}
}
