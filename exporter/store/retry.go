package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// Retry has the agent that uses dir send all requests of the quarantine again, from
// its next cycle on, and returns how many there are. Without an agent that is when
// the next one has started.
func Retry(ctx context.Context, dir string) (requests int, err error) {
	db, err := openBeside(ctx, dir, true)
	if err != nil {
		return 0, fmt.Errorf("open quarantine: %w", err)
	}
	err = db.Tx(func() error {
		_, err := db.Exec("INSERT OR IGNORE INTO retry(id) SELECT id FROM quarantine")
		if err == nil {
			err = db.Row("SELECT count(*) FROM retry", nil, &requests)
		}
		return err
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return 0, fmt.Errorf("send quarantined requests again: %w", err)
	}
	return requests, nil
}

// retry moves what Retry has noted to the end of the outbox. What is damaged stays
// in quarantine.
func (s *Store) retry() error {
	var waiting int
	if err := s.db.Row("SELECT count(*) FROM retry", nil, &waiting); err != nil || waiting == 0 {
		return err
	}
	o := &s.outbox
	newest, sent := o.lastID, 0
	err := s.db.Tx(func() error {
		var rows []outboxRow
		err := s.db.Each("SELECT id, time, points, body FROM quarantine WHERE id IN (SELECT id FROM retry) ORDER BY id", nil,
			func(scan func(...any) error) error {
				row := outboxRow{cycles: 1, again: 1}
				err := scan(&row.id, &row.time, &row.points, &row.body)
				rows = append(rows, row)
				return err
			})
		if err != nil {
			return err
		}
		for _, row := range rows {
			if _, err := record.Decompress(row.body); err != nil {
				continue
			}
			if _, err := s.db.Exec("DELETE FROM quarantine WHERE id = ?", row.id); err != nil {
				return err
			}
			o.lastID++
			row.id = o.lastID
			if err := o.add(s.db, row); err != nil {
				return err
			}
			sent++
		}
		_, err = s.db.Exec("DELETE FROM retry")
		return err
	})
	if err != nil {
		o.reject(newest)
		return err
	}
	s.cfg.Logger.Info("requests of the quarantine are sent again", "requests", sent, "damaged", waiting-sent)
	return s.db.Row("SELECT count(*) FROM quarantine", nil, &o.counts.quarantined)
}
