package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"syscall"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

const (
	fileName      = "unitmeter.db"
	applicationID = 0x756e6d74 // "unmt"
	schemaVersion = 1
)

// schema is explained in docs/decisions/store.md. Changing it needs a new
// schemaVersion and a way from the old one. The views are for the sqlite3 of any
// supported distribution, down to 3.34, which has no unixepoch(); strftime() makes
// text, which is a number once one is added.
const schema = `
CREATE TABLE ledger (
  seq  INTEGER PRIMARY KEY AUTOINCREMENT,
  base INTEGER NOT NULL,             -- 1 = holds every row: only the first record
  body BLOB NOT NULL
);
CREATE TABLE frame (
  id   INTEGER PRIMARY KEY AUTOINCREMENT,
  body BLOB NOT NULL                 -- zstd; the dictionary of some outbox bodies
);
CREATE TABLE outbox (
  id     INTEGER PRIMARY KEY AUTOINCREMENT,
  time   INTEGER NOT NULL,           -- unix nanoseconds of the (newest) cycle
  points INTEGER NOT NULL,
  cycles INTEGER NOT NULL,           -- how many cycles thinning merged into this one
  frame  INTEGER NOT NULL,           -- 0 = body needs no dictionary
  body   BLOB NOT NULL               -- zstd
);
CREATE TABLE quarantine (
  id     INTEGER PRIMARY KEY,        -- as it was in the outbox
  time   INTEGER NOT NULL,
  at     INTEGER NOT NULL,           -- unix nanoseconds of the quarantine
  points INTEGER NOT NULL,
  reason TEXT NOT NULL,
  body   BLOB NOT NULL               -- zstd, no dictionary
);
CREATE TABLE unit (
  id   INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  seen INTEGER NOT NULL              -- newest hour with a sample, in hours since 1970; exact to a day
);
CREATE TABLE recent (                -- cycles of the hours that are not in hour yet
  id   INTEGER PRIMARY KEY AUTOINCREMENT,
  hour INTEGER NOT NULL,
  body BLOB NOT NULL
);
CREATE TABLE rolling (               -- one row while the oldest cycles of recent go to hour:
  last INTEGER NOT NULL,             -- of those up to this id
  unit INTEGER NOT NULL              -- the units up to this id have gone
);
CREATE TABLE hour (
  hour             INTEGER NOT NULL, -- hours since 1970
  unit             INTEGER NOT NULL,
  receive_bytes    INTEGER NOT NULL,
  receive_packets  INTEGER NOT NULL,
  transmit_bytes   INTEGER NOT NULL,
  transmit_packets INTEGER NOT NULL,
  seconds          REAL NOT NULL,    -- how much of the hour was measured
  minutes          BLOB NOT NULL,    -- the same in minutes
  PRIMARY KEY (hour, unit)
) WITHOUT ROWID;
CREATE VIEW traffic AS
  SELECT datetime(hour * 3600, 'unixepoch', 'localtime') AS time, hour * 3600 AS epoch, name AS unit,
         receive_bytes, receive_packets, transmit_bytes, transmit_packets, seconds
  FROM hour JOIN unit ON unit.id = hour.unit;
CREATE VIEW top_talkers AS            -- of the last 24 hours
  SELECT unit, sum(receive_bytes + transmit_bytes) AS bytes, sum(receive_bytes) AS receive_bytes,
         sum(transmit_bytes) AS transmit_bytes, sum(receive_packets) AS receive_packets,
         sum(transmit_packets) AS transmit_packets, sum(seconds) AS seconds
  FROM traffic WHERE epoch >= strftime('%s', 'now') - 86400
  GROUP BY unit ORDER BY bytes DESC;
CREATE VIEW top_talkers_last_night AS -- from 22:00 to 06:00 local time
  SELECT unit, sum(receive_bytes + transmit_bytes) AS bytes, sum(receive_bytes) AS receive_bytes,
         sum(transmit_bytes) AS transmit_bytes, sum(receive_packets) AS receive_packets,
         sum(transmit_packets) AS transmit_packets, sum(seconds) AS seconds
  FROM traffic
  WHERE epoch >= 0 + strftime('%s', 'now', 'localtime', 'start of day', '-2 hours', 'utc')
    AND epoch <  0 + strftime('%s', 'now', 'localtime', 'start of day', '+6 hours', 'utc')
  GROUP BY unit ORDER BY bytes DESC;
`

// additions are tables that came after the first stores. They are made where they
// are not there, and a version that does not know them leaves them alone.
const additions = `
CREATE TABLE IF NOT EXISTS partial (  -- one row while the server refuses points of each request
  since    INTEGER NOT NULL,          -- unix nanoseconds
  points   INTEGER NOT NULL,          -- of the request
  rejected INTEGER NOT NULL,          -- of them
  message  TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS owner (    -- one row once the machine is known
  machine TEXT NOT NULL               -- as in Config.Machine
);
`

// database is one connection to the file, with its prepared statements. It is
// not safe for concurrent use.
type database struct {
	path  string
	pool  *sql.DB
	conn  *sql.Conn
	stmts map[string]*sql.Stmt
	files [3]fileID // of the file, its log and its shared memory, once written
}

// Why a file cannot be used as our store; all are answered by setting it aside.
var (
	errForeign = errors.New("is not a unitmeter store")
	errCorrupt = errors.New("is damaged")
	errMachine = errors.New("is of another machine")
)

// openDatabase opens the file, and makes it if there is none.
func openDatabase(path string) (*database, error) {
	if err := makeFile(path); err != nil {
		return nil, err
	}
	db, err := connect(path, "mode=rw")
	if err != nil {
		return nil, err
	}
	if err := db.prepare(); err != nil {
		db.close()
		return nil, err
	}
	return db, nil
}

// makeFile makes the file with the right mode before SQLite would do so with the
// mode that the umask leaves. SQLite gives its log the mode of the file. A file
// that is there is not opened: closing it would drop the locks that another
// connection of this process has on it.
func makeFile(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		return f.Close()
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %w: it is not a regular file", path, errForeign)
	}
	if info.Size() > 0 && info.Size() < 512 {
		// SQLite takes so short a file for a new one.
		return fmt.Errorf("%s: %w: it has %d bytes", path, errForeign, info.Size())
	}
	if info.Mode().Perm()&0o077 != 0 {
		return os.Chmod(path, 0o600)
	}
	return nil
}

func connect(path, params string) (*database, error) {
	dsn := "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + params
	pool, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, err
	}
	pool.SetMaxOpenConns(1)
	// Queries take no context: an interrupted transaction leaves it unclear
	// whether it was committed, and none of them waits longer than the disk.
	conn, err := pool.Conn(context.Background())
	if err != nil {
		pool.Close()
		return nil, err
	}
	return &database{path: path, pool: pool, conn: conn, stmts: map[string]*sql.Stmt{}}, nil
}

// prepare makes the connection durable and the schema present.
func (db *database) prepare() error {
	// Without this, closing unlinks the log by its name, even if that name has
	// become the log of another file; and a reader without write permission
	// could not open a store whose agent has ended.
	err := db.conn.Raw(func(driver any) error {
		_, err := driver.(sqlite.FileControl).FileControlPersistWAL("main", 1)
		return err
	})
	if err != nil {
		return err
	}
	for _, pragma := range []string{
		"PRAGMA busy_timeout = 2000", "PRAGMA trusted_schema = OFF", "PRAGMA cell_size_check = ON",
		"PRAGMA synchronous = FULL",
		// In KiB, an eighth of the default: a commit of 1,000 units reads three pages
		// more than with twice as much. A roll-up reads each page once. Both come
		// from the kernel's cache.
		"PRAGMA cache_size = -256",
	} {
		if err := db.run(pragma); err != nil {
			return err
		}
	}
	if empty, err := db.identify(); err != nil {
		return err
	} else if empty {
		return db.create()
	}
	if err := db.run("PRAGMA journal_mode = WAL"); err != nil {
		return err
	}
	return db.run(additions)
}

// identify says whether the file is empty, and fails if it is not our store.
func (db *database) identify() (empty bool, err error) {
	var app, version, things int64
	for query, to := range map[string]*int64{
		"PRAGMA application_id": &app, "PRAGMA user_version": &version, "SELECT count(*) FROM sqlite_schema": &things,
	} {
		if err := db.conn.QueryRowContext(context.Background(), query).Scan(to); err != nil {
			return false, err
		}
	}
	switch {
	case app == 0 && things == 0:
		return true, nil
	case app != applicationID:
		return false, fmt.Errorf("%s: %w (application id %#x)", db.path, errForeign, app)
	case version > schemaVersion:
		return false, fmt.Errorf("%w: %s has schema %d, this version knows %d: run the newer unitmeter, or move the file away to start anew",
			ErrNewerSchema, db.path, version, schemaVersion)
	case version < schemaVersion:
		return false, fmt.Errorf("%s: %w (schema %d)", db.path, errForeign, version)
	}
	return false, nil
}

// claim makes the machine the owner of a store that has none, and fails with
// errMachine if it has another one.
func (db *database) claim(machine string) error {
	var owner string
	err := db.row("SELECT machine FROM owner", nil, &owner)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		_, err = db.exec("INSERT INTO owner(machine) VALUES(?)", machine)
		return err
	case err == nil && owner != machine:
		return fmt.Errorf("%s: %w", db.path, errMachine)
	}
	return err
}

// disown lets any machine claim the store at path, and moves its log into it.
func disown(path string) error {
	db, err := openDatabase(path)
	if err != nil {
		return err
	}
	err = db.run("DELETE FROM owner; PRAGMA wal_checkpoint(TRUNCATE)")
	return errors.Join(err, db.close())
}

// create makes the schema. A crash in the middle leaves a database without any
// table, to which VACUUM applies the first setting.
func (db *database) create() error {
	for _, query := range []string{"PRAGMA auto_vacuum = INCREMENTAL", "VACUUM", "PRAGMA journal_mode = WAL"} {
		if err := db.run(query); err != nil {
			return err
		}
	}
	return db.tx(func() error {
		return db.run(schema + additions + fmt.Sprintf("PRAGMA application_id = %d; PRAGMA user_version = %d;", applicationID, schemaVersion))
	})
}

// run executes statements that are not worth preparing.
func (db *database) run(query string) error {
	_, err := db.conn.ExecContext(context.Background(), query)
	return err
}

func (db *database) stmt(query string) (*sql.Stmt, error) {
	if s := db.stmts[query]; s != nil {
		return s, nil
	}
	s, err := db.conn.PrepareContext(context.Background(), query)
	if err == nil {
		db.stmts[query] = s
	}
	return s, err
}

// exec executes one statement, prepared once.
func (db *database) exec(query string, args ...any) (sql.Result, error) {
	s, err := db.stmt(query)
	if err != nil {
		return nil, err
	}
	return s.ExecContext(context.Background(), args...)
}

// row reads the one row of a query; sql.ErrNoRows if there is none.
func (db *database) row(query string, args []any, to ...any) error {
	s, err := db.stmt(query)
	if err != nil {
		return err
	}
	return s.QueryRowContext(context.Background(), args...).Scan(to...)
}

// each calls fn for each row of a query, until fn fails. fn must use no other
// statement, since there is one connection.
func (db *database) each(query string, args []any, fn func(scan func(...any) error) error) error {
	s, err := db.stmt(query)
	if err != nil {
		return err
	}
	rows, err := s.QueryContext(context.Background(), args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := fn(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// tx runs fn in a transaction that is durable when tx returns nil.
func (db *database) tx(fn func() error) error {
	if _, err := db.exec("BEGIN IMMEDIATE"); err != nil {
		return err
	}
	err := fn()
	if err == nil {
		if _, err = db.exec("COMMIT"); err == nil {
			return nil
		}
	}
	// SQLite has rolled back by itself after some errors, and then says so here.
	_, _ = db.exec("ROLLBACK")
	return err
}

func (db *database) close() error {
	for _, s := range db.stmts {
		s.Close()
	}
	return errors.Join(db.conn.Close(), db.pool.Close())
}

// fileID tells files apart.
type fileID struct{ dev, ino uint64 }

func identifyFile(path string) (fileID, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return fileID{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return fileID{uint64(st.Dev), st.Ino}, nil
}

// remember notes which files the connection has open; to be called after
// something has been read, since the log is opened with the first transaction.
func (db *database) remember() (err error) {
	for i := range db.files {
		if db.files[i], err = identifyFile(db.path + fileSuffix(i)); err != nil {
			return err
		}
	}
	return nil
}

// fileSuffix names the files of a store in the order of database.files.
func fileSuffix(i int) string { return [...]string{"", "-wal", "-shm"}[i] }

// present says whether the file is still the one that was opened, and whether
// its log and shared memory are. Any of them may have been deleted or replaced.
func (db *database) present() (file, log bool) {
	file, log = true, true
	for i := range db.files {
		id, err := identifyFile(db.path + fileSuffix(i))
		if same := err == nil && id == db.files[i]; !same {
			file = file && i > 0
			log = false
		}
	}
	return file, log
}

// isCorrupt says that the file, not the disk, is at fault.
func isCorrupt(err error) bool {
	code := sqliteCode(err)
	return code == sqlite3.SQLITE_CORRUPT || code == sqlite3.SQLITE_NOTADB ||
		errors.Is(err, errCorrupt) || errors.Is(err, errForeign) || errors.Is(err, errDamaged)
}

// sqliteCode returns SQLite's primary result code, or 0 for other errors.
func sqliteCode(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code() & 0xff
	}
	return 0
}

// pages returns how many pages the file has, how many of them are free, and
// their size in bytes.
func (db *database) pages() (pages, free, size int64, err error) {
	for pragma, to := range map[string]*int64{"page_count": &pages, "freelist_count": &free, "page_size": &size} {
		err = errors.Join(err, db.row("PRAGMA "+pragma, nil, to))
	}
	return pages, free, size, err
}
