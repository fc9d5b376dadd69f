// Package database opens one SQLite file, and checks it before anything of it is used.
//
// Two things are needed of it: [Open] with a [Spec] makes a [DB], and DB.Tx runs
// statements in one durable transaction. [OpenBeside] is for a process beside the one
// that writes.
//
// [Open] looks at the kind of each file before it opens any: a pipe or a
// directory in the place of the file or of its log would hang or stop SQLite. The
// header and the schema must be those that [Spec.Schema] makes, so that no foreign
// trigger or view runs. SQLite's own check of the whole tree must pass. Any other file
// is [ErrForeign] or damaged, see [Damaged]; [SetAside] renames it, so that a new one
// can be made.
//
//   - log: SQLite's write-ahead log, beside the file.
//   - mark: a number beside the file and the log: how far the content had come.
//
// What Tx has committed survives a crash and a power cut. SQLite takes a damaged log
// for a shorter one, without an error. So the caller notes the progress with DB.Mark,
// and compares it with [Marked] after Open.
package database

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"syscall"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// ErrForeign means that this version has not written the file.
var ErrForeign = errors.New("is not a store of this version of unitmeter")

// Spec says what a file must be.
type Spec struct {
	Path string
	// Application and Version are SQLite's application_id and user_version.
	Application, Version uint32
	// Schema has the statements that make an empty store. Open takes no file with
	// another schema.
	Schema string
	// MaxValue bounds the size of a row and of each value, in bytes. A larger one
	// is not read.
	MaxValue int
	// Stray is told of a file beside the database that does not belong to it, and
	// where it is now. nil: the file is not opened for writing, and stays.
	Stray func(path, aside string)
}

// DB is one connection to the file, with its prepared statements. It is not safe
// for concurrent use.
type DB struct {
	path  string
	pool  *sql.DB
	conn  *sql.Conn
	stmts map[string]*sql.Stmt
	files [3]fileID // of the file, its log and its shared memory
}

// object is a row of sqlite_schema.
type object struct {
	kind, name, table, text string
	root                    int64
}

// Open opens the file for writing, and makes it if there is none. When ctx ends,
// the check of the tree does as well.
func Open(ctx context.Context, spec Spec) (*DB, error) {
	image, objects, err := spec.template()
	if err != nil {
		return nil, err
	}
	there, err := spec.inspect(image)
	if err == nil && !there {
		err = create(spec.Path, image)
	}
	if err != nil {
		return nil, err
	}
	db, err := connect(spec.Path, "mode=rw")
	if err != nil {
		return nil, err
	}
	err = db.keepLog()
	if err == nil {
		err = db.prepare(spec, objects, "PRAGMA synchronous = FULL", "PRAGMA journal_mode = WAL",
			// In KiB, an eighth of the default: a commit of 1,000 units reads three pages
			// more than with twice as much. A roll-up reads each page once. Both come
			// from the kernel's cache.
			"PRAGMA cache_size = -256")
	}
	if err == nil {
		err = db.Check(ctx)
	}
	if err == nil {
		err = db.remember()
	}
	if err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// OpenBeside opens the file beside the one who writes it: for reading, or for one
// short transaction. It makes and moves no file, and does not check the tree.
func OpenBeside(spec Spec, write bool) (*DB, error) {
	image, objects, err := spec.template()
	if err != nil {
		return nil, err
	}
	spec.Stray = nil
	there, err := spec.inspect(image)
	if err == nil && !there {
		err = fmt.Errorf("open %s: %w", spec.Path, fs.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	mode, pragma := "mode=ro", "PRAGMA query_only = ON"
	if write {
		mode, pragma = "mode=rw", "PRAGMA synchronous = FULL"
	}
	db, err := connect(spec.Path, mode)
	if err != nil {
		return nil, err
	}
	if err = db.keepLog(); err == nil {
		err = db.prepare(spec, objects, pragma)
	}
	if err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// keepLog has the log stay at the end. Without this, closing unlinks it by its name,
// even if that name has become the log of another file; and a reader without write
// permission could not open a store whose agent has ended.
func (db *DB) keepLog() error {
	return db.conn.Raw(func(c any) error {
		_, err := c.(sqlite.FileControl).FileControlPersistWAL("main", 1)
		return err
	})
}

func dsn(path, params string) string {
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + params
}

func connect(path, params string) (*DB, error) {
	pool, err := sql.Open("sqlite", dsn(path, params))
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
	return &DB{path: path, pool: pool, conn: conn, stmts: map[string]*sql.Stmt{}}, nil
}

// template returns an empty store and the schema in it.
func (spec Spec) template() (image []byte, objects []object, err error) {
	db, err := connect("template", "mode=memory")
	if err != nil {
		return nil, nil, err
	}
	defer db.Close()
	err = db.run("PRAGMA auto_vacuum = INCREMENTAL", spec.Schema,
		fmt.Sprintf("PRAGMA application_id = %d", spec.Application), fmt.Sprintf("PRAGMA user_version = %d", spec.Version))
	if err == nil {
		objects, err = db.objects(0)
	}
	if err == nil {
		err = db.conn.Raw(func(c any) (err error) {
			image, err = c.(interface{ Serialize() ([]byte, error) }).Serialize()
			return err
		})
	}
	if err != nil {
		return nil, nil, fmt.Errorf("make an empty store: %w", err)
	}
	// Written and read with a write-ahead log, which a database in memory has not.
	image[18], image[19] = 2, 2
	return image, objects, nil
}

// objects reads the schema, but not more than limit and one; 0 = all.
func (db *DB) objects(limit int) (out []object, err error) {
	// ANALYZE, which a person may run, makes sqlite_stat1.
	err = db.Each("SELECT type, name, tbl_name, rootpage, coalesce(sql, '') FROM sqlite_schema WHERE name NOT LIKE 'sqlite_stat_' ORDER BY rowid LIMIT ?",
		[]any{limit - 1 + min(1, limit)*2}, func(scan func(...any) error) error {
			var o object
			err := scan(&o.kind, &o.name, &o.table, &o.root, &o.text)
			out = append(out, o)
			return err
		})
	return out, err
}

// prepare sets up the connection, and fails with ErrForeign if the file has another
// schema.
func (db *DB) prepare(spec Spec, objects []object, pragmas ...string) error {
	if _, err := sqlite.Limit(db.conn, sqlite3.SQLITE_LIMIT_LENGTH, spec.MaxValue); err != nil {
		return err
	}
	err := db.run(append([]string{"PRAGMA busy_timeout = 2000", "PRAGMA trusted_schema = OFF", "PRAGMA cell_size_check = ON"}, pragmas...)...)
	var found []object
	if err == nil {
		found, err = db.objects(len(objects))
	}
	switch {
	case Code(err) == sqlite3.SQLITE_ERROR: // SQLite cannot read the schema
		return fmt.Errorf("%s: %w: %w", db.path, record.ErrDamaged, err)
	case err == nil && !slices.Equal(found, objects):
		return fmt.Errorf("%s: %w: it has other tables, indexes, views or triggers", db.path, ErrForeign)
	}
	return err
}

// Check has SQLite look at every page.
func (db *DB) Check(ctx context.Context) error {
	var verdict string
	// It takes 0.3 s for 80 MiB.
	if err := db.conn.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&verdict); err != nil {
		return err
	}
	if verdict != "ok" {
		return fmt.Errorf("%s: %w: %s", db.path, record.ErrDamaged, verdict)
	}
	return nil
}

// headerSize is the size of SQLite's file header.
const headerSize = 100

// inspect looks at the files without opening any that could block, and compares
// the header with that of an empty store.
func (spec Spec) inspect(image []byte) (there bool, err error) {
	for i := range suffixes {
		path := spec.Path + suffixes[i]
		info, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return false, err
		case i == 0 && !info.Mode().IsRegular():
			return false, fmt.Errorf("%s: %w: it is no regular file (%v)", path, ErrForeign, info.Mode().Type())
		case i == 0:
			there = true
		case !there || !info.Mode().IsRegular() || suffixes[i] == "-journal":
			// A log without its database would be taken for that of the next one, and
			// a journal undone. We never write a journal.
			if spec.Stray == nil {
				return false, fmt.Errorf("%s: %w: the agent sets it aside when it starts", path, ErrForeign)
			}
			aside := path + asideName(time.Now())
			if err := os.Rename(path, aside); err != nil {
				return false, err
			}
			spec.Stray(path, aside)
			continue
		}
		if info.Mode().Perm()&0o077 != 0 {
			_ = os.Chmod(path, 0o600)
		}
	}
	if !there {
		return false, nil
	}
	f, err := os.Open(spec.Path)
	if err != nil {
		return true, err
	}
	defer f.Close()
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(f, header); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return true, fmt.Errorf("%s: %w: it is shorter than %d bytes", spec.Path, ErrForeign, headerSize)
	} else if err != nil {
		return true, err
	}
	number := func(at int) uint32 { return binary.BigEndian.Uint32(header[at:]) }
	switch {
	case !bytes.Equal(header[:16], image[:16]) || number(68) != spec.Application:
		return true, fmt.Errorf("%s: %w", spec.Path, ErrForeign)
	case number(60) != spec.Version:
		return true, fmt.Errorf("%s: %w: its format is version %d, this unitmeter has %d", spec.Path, ErrForeign, number(60), spec.Version)
	}
	// A person may have turned off the log. The other fields count pages and changes.
	for i := range header {
		if i == 18 || i == 19 {
			if header[i] == 1 || header[i] == 2 {
				continue
			}
		} else if i >= 24 && i < 44 || i >= 92 {
			continue
		}
		if header[i] != image[i] {
			return true, fmt.Errorf("%s: %w: byte %d of the header is %#x", spec.Path, record.ErrDamaged, i, header[i])
		}
	}
	return true, nil
}

// create makes the file from the image of an empty store: wholly or not at all.
func create(path string, image []byte) error {
	temporary := path + ".new"
	if err := errors.Join(os.RemoveAll(temporary), DropMark(path)); err != nil {
		return err
	}
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(image)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		_ = os.Remove(temporary)
	}
	return err
}

// run executes statements that are not worth preparing.
func (db *DB) run(queries ...string) error {
	for _, query := range queries {
		if _, err := db.conn.ExecContext(context.Background(), query); err != nil {
			return err
		}
	}
	return nil
}

func (db *DB) stmt(query string) (*sql.Stmt, error) {
	if s := db.stmts[query]; s != nil {
		return s, nil
	}
	s, err := db.conn.PrepareContext(context.Background(), query)
	if err == nil {
		db.stmts[query] = s
	}
	return s, err
}

// Exec executes one statement, prepared once.
func (db *DB) Exec(query string, args ...any) (sql.Result, error) {
	s, err := db.stmt(query)
	if err != nil {
		return nil, err
	}
	return s.ExecContext(context.Background(), args...)
}

// Row reads the one row of a query; sql.ErrNoRows if there is none. A value whose type
// is not that of its argument in to is ErrDamaged of package record.
func (db *DB) Row(query string, args []any, to ...any) error {
	s, err := db.stmt(query)
	if err != nil {
		return err
	}
	err = s.QueryRowContext(context.Background(), args...).Scan(to...)
	if err != nil && Code(err) == 0 && !errors.Is(err, sql.ErrNoRows) && !errors.Is(err, sql.ErrConnDone) && !errors.Is(err, driver.ErrBadConn) {
		err = fmt.Errorf("%w: %w", record.ErrDamaged, err)
	}
	return err
}

// Each calls fn for each row of a query, until fn fails. fn must use no other
// statement, since there is one connection. scan returns ErrDamaged of package record
// for a value whose type is not that of its argument.
func (db *DB) Each(query string, args []any, fn func(scan func(...any) error) error) error {
	s, err := db.stmt(query)
	if err != nil {
		return err
	}
	rows, err := s.QueryContext(context.Background(), args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	scan := func(to ...any) error {
		if err := rows.Scan(to...); err != nil {
			return fmt.Errorf("%w: %w", record.ErrDamaged, err)
		}
		return nil
	}
	for rows.Next() {
		if err := fn(scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Tx runs fn in a transaction that is durable when Tx returns nil.
func (db *DB) Tx(fn func() error) error {
	if _, err := db.Exec("BEGIN IMMEDIATE"); err != nil {
		return err
	}
	err := fn()
	if err == nil {
		if _, err = db.Exec("COMMIT"); err == nil {
			return nil
		}
	}
	// SQLite has rolled back by itself after some errors, and then says so here.
	_, _ = db.Exec("ROLLBACK")
	return err
}

// Sequence returns the highest key that a table with AUTOINCREMENT ever had. SQLite
// takes a damaged one for a full disk.
func (db *DB) Sequence(table, key string) (int64, error) {
	var seq, last int64
	err := db.Row(fmt.Sprintf("SELECT (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = '%s'), (SELECT coalesce(max(%s), 0) FROM %[1]s)", table, key), nil, &seq, &last)
	if err == nil && (last > seq || seq > 1<<48) {
		err = fmt.Errorf("%s: %w: the sequence of %s is at %d, after %d", db.path, record.ErrDamaged, table, seq, last)
	}
	return seq, err
}

// With runs fn while the tables of the file at path can be used with "old." before
// their names.
func (db *DB) With(path string, fn func() error) error {
	if _, err := db.Exec("ATTACH ? AS old", dsn(path, "mode=rw")); err != nil {
		return err
	}
	var differs bool
	const schema = "SELECT type, name, tbl_name, rootpage, sql FROM %s.sqlite_schema"
	err := db.Row(fmt.Sprintf("SELECT EXISTS ("+schema+" EXCEPT "+schema+")", "old", "main"), nil, &differs)
	switch {
	case err == nil && differs:
		err = fmt.Errorf("%s: %w: it has other tables, indexes, views or triggers", path, ErrForeign)
	case err == nil:
		err = fn()
	}
	_, detached := db.Exec("DETACH old")
	return errors.Join(err, detached)
}

// Copy copies tables of the file of With, all of them or none. Each must pass
// SQLite's check.
func (db *DB) Copy(tables ...string) error {
	for _, table := range tables {
		var verdict string
		if err := db.Row("PRAGMA old.quick_check('"+table+"')", nil, &verdict); err != nil {
			return err
		}
		if verdict != "ok" {
			return fmt.Errorf("%s: %w: %s", table, record.ErrDamaged, verdict)
		}
	}
	return db.Tx(func() error {
		for _, table := range tables {
			if _, err := db.Exec("INSERT INTO main." + table + " SELECT * FROM old." + table); err != nil {
				return err
			}
		}
		return nil
	})
}

// Close ends the use of the file.
func (db *DB) Close() error {
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

// remember notes which files the connection has open, once something has been
// read: the log is opened with the first transaction.
func (db *DB) remember() (err error) {
	for i := range db.files {
		if db.files[i], err = identifyFile(db.path + suffixes[i]); err != nil {
			return err
		}
	}
	return nil
}

// Present says whether the file is still the one that was opened, and whether
// its log and shared memory are. Any of them may have been deleted or replaced.
func (db *DB) Present() (file, log bool) {
	file, log = true, true
	for i := range db.files {
		id, err := identifyFile(db.path + suffixes[i])
		if same := err == nil && id == db.files[i]; !same {
			file = file && i > 0
			log = false
		}
	}
	return file, log
}

// Damaged says that the file, not the disk, is at fault.
func Damaged(err error) bool {
	switch Code(err) {
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH:
		return true
	}
	return errors.Is(err, record.ErrDamaged) || errors.Is(err, ErrForeign)
}

// Code returns SQLite's primary result code, or 0 for other errors.
func Code(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code() & 0xff
	}
	return 0
}

// Checkpoint moves the log into the file, all of it.
func (db *DB) Checkpoint() error {
	var busy, pages, moved int
	err := db.Row("PRAGMA wal_checkpoint(TRUNCATE)", nil, &busy, &pages, &moved)
	if err == nil && busy != 0 {
		err = errors.New("a reader is using it")
	}
	return err
}

// Pages returns how many pages the file has, how many of them are free, and
// their size in bytes.
func (db *DB) Pages() (pages, free, size int64, err error) {
	for pragma, to := range map[string]*int64{"page_count": &pages, "freelist_count": &free, "page_size": &size} {
		err = errors.Join(err, db.Row("PRAGMA "+pragma, nil, to))
	}
	return pages, free, size, err
}
