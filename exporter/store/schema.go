package store

import (
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/unitmeter/unitmeter/exporter/store/database"
	"github.com/unitmeter/unitmeter/exporter/store/history"
	"github.com/unitmeter/unitmeter/exporter/store/record"
)

const fileName = "unitmeter.db"

// schema is explained in docs/decisions/store.md. Changing it, or a body in it, needs
// a new Version in spec: a store of another version is set aside.
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
  again  INTEGER NOT NULL,           -- 1 = was in quarantine
  sum    INTEGER NOT NULL,           -- CRC-32C of the above
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
CREATE TABLE retry (                 -- what a person wants to be sent again
  id INTEGER PRIMARY KEY             -- in quarantine
);
CREATE TABLE partial (               -- one row while the server refuses points of each request
  since    INTEGER NOT NULL,         -- unix nanoseconds
  points   INTEGER NOT NULL,         -- of the request
  rejected INTEGER NOT NULL,         -- of them
  message  TEXT NOT NULL
);
CREATE TABLE owner (                 -- one row once the machine is known
  machine TEXT NOT NULL,             -- as in Config.Machine
  sum     INTEGER NOT NULL           -- CRC-32C of machine
);
` + history.Schema

// spec says what the file in dir must be. log = nil: it is not opened to be written.
func spec(dir string, log *slog.Logger) database.Spec {
	s := database.Spec{
		Path:        filepath.Join(dir, fileName),
		Application: 0x756e6d74, // "unmt"
		Version:     2,
		Schema:      schema,
		MaxValue:    record.MaxSize + 1<<20,
	}
	if log != nil {
		s.Stray = func(path, aside string) {
			log.Warn("a file that does not belong to the store is set aside", "path", path, "set_aside", aside)
		}
	}
	return s
}

// errMachine says that the store is one of another machine.
var errMachine = errors.New("is of another machine")

// claim makes the machine the owner of a store that has none, and fails with
// errMachine if it has another one.
func claim(db *database.DB, machine string) error {
	var owner string
	var sum uint32
	err := db.Row("SELECT machine, sum FROM owner", nil, &owner, &sum)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		_, err = db.Exec("INSERT INTO owner(machine, sum) VALUES(?, ?)", machine, record.Sum([]byte(machine)))
	case err == nil && sum != record.Sum([]byte(owner)):
		err = fmt.Errorf("the owner of the store %w", record.ErrDamaged)
	case err == nil && owner != machine:
		err = errMachine
	}
	return err
}

// disown lets any machine claim the store at path, and moves its log into it.
func disown(path string) error {
	s := spec(filepath.Dir(path), nil)
	s.Path = path
	db, err := database.OpenBeside(s, true)
	if err != nil {
		return err
	}
	_, err = db.Exec("DELETE FROM owner")
	return errors.Join(err, db.Checkpoint(), db.Close())
}
