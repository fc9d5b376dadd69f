package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	sqlite3 "modernc.org/sqlite/lib"

	"github.com/unitmeter/unitmeter/exporter/store/database"
	"github.com/unitmeter/unitmeter/exporter/store/history"
	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// Reader reads a store beside the agent that writes it, or after it has ended.
// It takes no lock that would hinder the agent, and writes nothing. It is safe
// for concurrent use; calls take turns.
type Reader struct {
	mu sync.Mutex
	db *database.DB
}

// OpenReader opens the store in dir for reading. The error satisfies
// errors.Is(err, fs.ErrNotExist) if there is none yet.
func OpenReader(ctx context.Context, dir string) (*Reader, error) {
	db, err := openBeside(ctx, dir, false)
	if err != nil {
		return nil, fmt.Errorf("open history: %w", err)
	}
	return &Reader{db: db}, nil
}

func openBeside(ctx context.Context, dir string, write bool) (*database.DB, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s := spec(dir, nil)
	db, err := database.OpenBeside(s, write)
	switch code := database.Code(err); {
	case errors.Is(err, fs.ErrNotExist):
		err = fmt.Errorf("%w: has the agent run with this state directory?", err)
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("%w: run as root or as the agent's user", err)
	case code == sqlite3.SQLITE_CANTOPEN || code == sqlite3.SQLITE_READONLY || code == sqlite3.SQLITE_PERM || code == sqlite3.SQLITE_AUTH:
		err = fmt.Errorf("%s or its -wal and -shm cannot be opened by uid %d (%w): run as root or as the agent's user", s.Path, os.Geteuid(), err)
	case database.Damaged(err):
		err = fmt.Errorf("%w: start the agent again: it sets such a file aside", err)
	}
	return db, err
}

// Close ends the use of the file.
func (r *Reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.db.Close()
}

// History reads one consistent state of the history, after a check of the file.
func (r *Reader) History(ctx context.Context, q history.Query) (history.Usage, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.db.Check(ctx)
	var usage history.Usage
	if err == nil {
		usage, err = history.Read(ctx, r.db, q)
	}
	if database.Damaged(err) {
		err = fmt.Errorf("%w: restart the agent: it sets the file aside and begins a new history", err)
	}
	if err != nil {
		return history.Usage{}, fmt.Errorf("read history: %w", err)
	}
	return usage, nil
}

// Quarantined is a request that was taken out of the outbox.
type Quarantined struct {
	ID     int64
	Time   time.Time // of its cycle
	At     time.Time // when it was quarantined
	Points int
	Bytes  int // compressed
	Reason string
}

// Quarantined lists the quarantine, oldest first.
func (r *Reader) Quarantined(ctx context.Context) ([]Quarantined, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := ctx.Err()
	var out []Quarantined
	if err == nil {
		out, err = quarantined(r.db)
	}
	if err != nil {
		return nil, fmt.Errorf("list quarantine: %w", err)
	}
	return out, nil
}

func quarantined(db *database.DB) (out []Quarantined, err error) {
	err = db.Each("SELECT id, time, at, points, length(body), substr(reason, 1, ?) FROM quarantine ORDER BY id", []any{quarantineReason},
		func(scan func(...any) error) error {
			var q Quarantined
			var t, at int64
			err := scan(&q.ID, &t, &at, &q.Points, &q.Bytes, &q.Reason)
			q.Time, q.At = record.FromNanos(t), record.FromNanos(at)
			out = append(out, q)
			return err
		})
	return out, err
}

// Partial returns what the server said to the newest delivered request, and since
// when it says so; the zero Partial if it took all points.
func (r *Reader) Partial(ctx context.Context) (p Partial, since time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var at int64
	if err = ctx.Err(); err == nil {
		err = r.db.Row("SELECT since, points, rejected, message FROM partial", nil, &at, &p.Points, &p.Rejected, &p.Message)
	}
	if errors.Is(err, sql.ErrNoRows) {
		return Partial{}, time.Time{}, nil
	}
	if err != nil {
		return Partial{}, time.Time{}, fmt.Errorf("read refused points: %w", err)
	}
	return p, record.FromNanos(at), nil
}

// Backlog is the outbox as it stands in the file.
type Backlog struct {
	Requests int
	Bytes    int64     // on disk, compressed
	Oldest   time.Time // of the cycle of the oldest request; zero if there is none
}

// Backlog returns how much no server has taken yet. What an agent delivered
// while its disk failed still counts until the next cycle is committed.
func (r *Reader) Backlog(ctx context.Context) (Backlog, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b Backlog
	err := ctx.Err()
	if err == nil {
		var oldest sql.NullInt64
		// A frame is part of the requests that need it; one is kept for the next
		// request when there is none.
		err = r.db.Row(`SELECT count(*),
			coalesce(sum(length(body)) + count(*) * ?1, 0) +
			(SELECT coalesce(sum(length(body) + ?1), 0) FROM frame WHERE id IN (SELECT frame FROM outbox)),
			(SELECT time FROM outbox ORDER BY id LIMIT 1) FROM outbox`, []any{rowOverhead}, &b.Requests, &b.Bytes, &oldest)
		if oldest.Valid {
			b.Oldest = record.FromNanos(oldest.Int64)
		}
	}
	if err != nil {
		return Backlog{}, fmt.Errorf("read backlog: %w", err)
	}
	return b, nil
}
