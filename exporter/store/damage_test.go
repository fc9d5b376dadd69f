package store

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store/history"
)

var damages = flag.Int("damages", 100, "how many random damages TestRandomDamage does")

const damageCycles = 800 // more than two hours, so that one is rolled up

// damage is one that a disk, a file system or a program does to a file.
type damage struct {
	name string
	do   func(r *rand.Rand, content []byte) []byte
}

var damageKinds = []damage{
	{"a flipped bit", func(r *rand.Rand, b []byte) []byte {
		b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		return b
	}},
	{"some flipped bits", func(r *rand.Rand, b []byte) []byte {
		for range 2 + r.IntN(30) {
			b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		}
		return b
	}},
	{"a sector of zeros", func(r *rand.Rand, b []byte) []byte {
		clear(sector(r, b, 512))
		return b
	}},
	{"a block of zeros", func(r *rand.Rand, b []byte) []byte {
		clear(sector(r, b, 4096))
		return b
	}},
	{"a sector from elsewhere", func(r *rand.Rand, b []byte) []byte {
		copy(sector(r, b, 512), slices.Clone(sector(r, b, 512)))
		return b
	}},
	{"a block from elsewhere", func(r *rand.Rand, b []byte) []byte {
		copy(sector(r, b, 4096), slices.Clone(sector(r, b, 4096)))
		return b
	}},
	{"random bytes", func(r *rand.Rand, b []byte) []byte {
		at := r.IntN(len(b))
		for i := at; i < min(len(b), at+1+r.IntN(8192)); i++ {
			b[i] = byte(r.Uint32())
		}
		return b
	}},
	{"cut off", func(r *rand.Rand, b []byte) []byte { return b[:r.IntN(len(b))] }},
	{"cut off at a block", func(r *rand.Rand, b []byte) []byte { return b[:r.IntN(len(b))/4096*4096] }},
}

func sector(r *rand.Rand, b []byte, size int) []byte {
	at := r.IntN((len(b)+size-1)/size) * size
	return b[at:min(len(b), at+size)]
}

// TestRandomDamage damages the files of a store, after a crash or a clean end. The
// store is never blocked for good and never has a wrong number, and what is not
// there any more has been said or is counted.
func TestRandomDamage(t *testing.T) {
	inMemory(t)
	r := rand.New(rand.NewPCG(17, 18))
	now := clock()
	cfg := Config{Dir: filepath.Join(t.TempDir(), "state"), Now: func() time.Time { return now }, OutboxMaxAge: 1000 * time.Hour}
	s := openTest(t, cfg)
	for n := 1; n <= damageCycles; n++ {
		now = numberedCycle(n).Time
		c := numberedCycle(n)
		for unit := range 40 {
			c.Samples = append(c.Samples, history.Sample{Unit: fmt.Sprintf("unit-%d.service", unit), Time: c.Time, Delta: [4]uint64{r.Uint64N(1e6), r.Uint64N(1e4), r.Uint64N(1e6), r.Uint64N(1e4)}, Interval: 10 * time.Second})
		}
		if err := s.Commit(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if n == damageCycles-200 {
			if err := s.Quarantine(t.Context(), Entry{ID: 3, Points: 1, Request: numberedCycle(3).Request}, "refused"); err != nil {
				t.Fatal(err)
			}
			if err := s.Ack(t.Context(), int64(n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	crashed := filesOf(t, cfg.Dir)
	want := damaged(t, cfg.Dir, s)
	if len(want.waiting) != 200 || len(want.quarantined) != 1 || len(want.history) != 41 || want.history[0].Steps[0].Total != [4]uint64{damageCycles, 2 * damageCycles, 3 * damageCycles, damageCycles} {
		t.Fatalf("without damage: %+v", want)
	}
	s.Close()
	ended := filesOf(t, cfg.Dir)

	outcomes := map[string]int{}
	for i := range *damages {
		files := crashed
		if i%3 == 0 {
			files = ended
		}
		name := []string{fileName, fileName + "-wal"}[r.IntN(2)]
		if len(files[name]) == 0 {
			name = fileName
		}
		kind := damageKinds[r.IntN(len(damageKinds))]
		dir := filepath.Join(t.TempDir(), "state")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for file, content := range files {
			if file == name {
				content = kind.do(r, slices.Clone(content))
			}
			if err := os.WriteFile(filepath.Join(dir, file), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cfg.Dir = dir
		outcome, err := survives(t, cfg, want)
		if err != nil {
			t.Errorf("damage %d, %s in %s of %d bytes: %v", i, kind.name, name, len(files[name]), err)
		}
		outcomes[outcome]++
		_ = os.RemoveAll(dir)
	}
	t.Logf("%d damages: %v", *damages, outcomes)
}

// content is what a store gives back.
type content struct {
	ledger      int
	waiting     []int
	quarantined []Quarantined
	history     []history.UnitUsage
	lost        int // parts of the history
}

func damaged(t *testing.T, dir string, s *Store) (c content) {
	t.Helper()
	c.ledger = ledgerCycle(t, s)
	c.waiting = outboxCycles(t, s)
	r, err := OpenReader(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if c.quarantined, err = r.Quarantined(t.Context()); err != nil {
		t.Fatal(err)
	}
	u, err := r.History(t.Context(), history.Query{})
	if err != nil {
		t.Fatal(err)
	}
	c.lost = u.Damaged
	c.history = u.Units
	return c
}

// survives opens a damaged store and uses it for a while.
func survives(t *testing.T, cfg Config, want content) (outcome string, err error) {
	var log bytes.Buffer
	cfg.Logger = testLogger(&log)
	s, err := Open(t.Context(), cfg)
	if err != nil {
		return "", fmt.Errorf("open: %w", err)
	}
	defer func() { s.Close() }()
	// What was done before the damage was met.
	tries, n := 0, want.ledger
	for ; tries < 4; tries++ {
		if _, err = s.Ledger(t.Context()); err == nil {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("after %d tries: %w; the log:\n%s", tries, err, &log)
	}
	got := damaged(t, cfg.Dir, s)
	said := s.Stats().Replaced > 0 || strings.Contains(log.String(), "level=WARN") || strings.Contains(log.String(), "level=ERROR")
	switch {
	case got.ledger != want.ledger && (got.ledger != 0 || !said):
		return "", fmt.Errorf("ledger of cycle %d, want %d or a new beginning that is said; the log:\n%s", got.ledger, want.ledger, &log)
	case !said && (!slices.Equal(got.waiting, want.waiting) || !reflect.DeepEqual(got.quarantined, want.quarantined)):
		return "", fmt.Errorf("in silence: waiting %v, quarantined %v", got.waiting, got.quarantined)
	case !said && got.lost == 0 && !reflect.DeepEqual(got.history, want.history):
		return "", errors.New("another history in silence")
	}
	// Then it is as any other, over the roll-up of what was damaged and another start.
	failed := 0
	for range 3 {
		for range 4 {
			n++
			err := s.Commit(t.Context(), numberedCycle(n))
			if errors.Is(err, ErrUnavailable) {
				failed++
			} else if err != nil {
				return "", err
			}
		}
		n += 360 // an hour later
	}
	n -= 360
	if failed > 2 {
		return "", fmt.Errorf("%d commits failed; the log:\n%s", failed, &log)
	}
	if err := s.Close(); err != nil {
		return "", err
	}
	replaced := s.Stats().Replaced
	if s, err = Open(t.Context(), cfg); err != nil {
		return "", fmt.Errorf("open again: %w", err)
	}
	after := damaged(t, cfg.Dir, s)
	switch {
	case after.ledger != n || s.Stats().Replaced != 0:
		return "", fmt.Errorf("at the next start: ledger of cycle %d, want %d; %+v; the log:\n%s", after.ledger, n, s.Stats(), &log)
	case replaced == 0 && after.lost == 0 && (after.history[0].Steps[0].Total[0] != uint64(want.ledger+12) || !reflect.DeepEqual(after.history[1:], want.history[1:])):
		return "", errors.New("another history in silence after a roll-up")
	}
	if err := s.Ack(t.Context(), s.outbox.lastID); err != nil {
		return "", fmt.Errorf("acknowledge all: %w", err)
	}
	switch {
	case replaced > 0 && got.ledger == 0:
		return "new ledger", nil
	case replaced > 0:
		return "ledger kept in a new file", nil
	case after.lost > 0:
		return "history with a counted gap", nil
	case s.Stats().Quarantined > 1:
		return "a request set aside", nil
	}
	return "no effect", nil
}

// filesOf reads the files of a store as a crash would leave them.
func filesOf(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	other := copyStore(t, dir) // by another process, as closing a file here drops locks
	files := map[string][]byte{}
	for _, suffix := range []string{"", "-wal", "-mark"} {
		content, err := os.ReadFile(filepath.Join(other, fileName+suffix))
		if err != nil {
			t.Fatal(err)
		}
		files[fileName+suffix] = content
	}
	return files
}
