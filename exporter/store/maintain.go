package store

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
