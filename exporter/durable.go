package exporter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/receiver"
)

// Durable is the Outbox in a store.Store. With each cycle it commits the ledger
// and the history samples of the sweep as well. It is safe for concurrent use as
// Outbox allows: one Commit at a time.
type Durable struct {
	store *store.Store
	state receiver.State // as it was at the start

	// Of the last commit, for the next one. Only Commit uses them.
	now   receiver.State
	whole time.Time // when the last sweep that reached all units began
	cycle int       // counts commits of a sweep
	last  map[string]sampled
}

// sampled is the end of the last history sample of a series.
type sampled struct {
	total amounts
	start time.Time // of the series
	time  time.Time
	cycle int // as of that commit
}

// NewDurable reads the ledger of s. It fails with store.ErrUnavailable if that
// cannot be done now: an agent that went on without it would begin every series
// anew and overwrite the old ones. The caller closes s after the Exporter's
// Shutdown.
func NewDurable(ctx context.Context, s *store.Store) (*Durable, error) {
	ledger, err := s.Ledger(ctx)
	if err != nil {
		return nil, fmt.Errorf("restore the totals of all units: %w", err)
	}
	d := &Durable{
		store: s, state: receiver.State{Time: ledger.Time}, whole: ledger.Time,
		last: make(map[string]sampled, len(ledger.Series)),
	}
	for _, row := range ledger.Series {
		d.state.Series = append(d.state.Series, receiver.Series{Name: row.Key, Total: amounts(row.Total).counters(), Start: row.Start, Time: row.Seen})
		d.last[row.Key] = sampled{row.Total, row.Start, row.Seen, -1}
	}
	for _, row := range ledger.Runs {
		if row.Key == journalKey {
			d.state.Journal = receiver.Position{Cursor: row.Epoch, Boot: row.Boot}
			continue
		}
		d.state.Runs = append(d.state.Runs, receiver.Run{
			Unit: strings.TrimSuffix(row.Key, " "+row.Epoch), Series: row.Series, Epoch: row.Epoch, Boot: row.Boot,
			Last: amounts(row.Last).counters(), Time: row.Seen,
		})
	}
	d.now = d.state
	return d, nil
}

// State returns the ledger as it was at the start: for receiver.Config.State and
// Config.Ledger.
func (d *Durable) State() receiver.State { return d.state }

// Commit implements Outbox.
func (d *Durable) Commit(ctx context.Context, cycle Cycle) error {
	now := d.now
	c := store.Cycle{Time: time.Now(), Request: cycle.Request, Points: cycle.Points}
	if cycle.Sweep != nil {
		now, c.Time = cycle.Sweep.State, cycle.Sweep.Time
		c.Samples = d.samples(cycle.Sweep.State)
	}
	c.Ledger = ledgerOf(now)
	if err := d.store.Commit(ctx, c); err != nil {
		return err
	}
	if cycle.Sweep == nil {
		return nil
	}
	d.now = now
	if d.cycle++; !cycle.Sweep.Partial {
		d.whole = c.Time.Add(-cycle.Sweep.Duration)
	}
	for _, s := range cycle.Sweep.State.Series {
		if s.Observed {
			d.last[s.Name] = sampled{amountsOf(s.Total), s.Start, s.Time, d.cycle}
		}
	}
	forget(d.last, cycle.Sweep.State.Series)
	return nil
}

// samples returns what each unit transferred since its last sample. A unit that
// began since the last cycle, or while its sweep went on, has all of its total in
// the sample. One that is older, but seen for the first time, has none: nobody
// knows when it transferred what its total says. The same goes for a series that
// was given up over the limit of series and began anew under its name: its start
// tells.
func (d *Durable) samples(state receiver.State) []store.Sample {
	samples := make([]store.Sample, 0, len(state.Series))
	var began map[string]bool // made when it is needed
	for _, s := range state.Series {
		if !s.Observed || unattributed(s.Name) {
			continue
		}
		prev, known := d.last[s.Name]
		switch {
		case !known || !prev.start.Equal(s.Start):
			if d.whole.IsZero() || s.Start.Before(d.whole) {
				continue
			}
			prev = sampled{time: s.Start}
		case prev.cycle != d.cycle:
			if began == nil {
				began = d.began(state.Runs)
			}
			if began[s.Name] && prev.time.Before(d.whole) {
				prev.time = d.whole
			}
		}
		if s.Time.Equal(prev.time) {
			continue // no new reading
		}
		name := s.Name
		if name == "" {
			name = "(overflow)"
		}
		samples = append(samples, store.Sample{
			Unit: name, Time: s.Time, Interval: s.Time.Sub(prev.time),
			Delta: amountsOf(s.Total).minus(prev.total),
		})
	}
	return samples
}

// began returns the series of units that were away at the last cycle: all that
// they transferred since their last sample is that of runs which began after it.
// Otherwise a backup that runs once a night would seem to take all day.
func (d *Durable) began(runs []receiver.Run) map[string]bool {
	type key struct{ unit, epoch string }
	old := make(map[key]bool, len(d.now.Runs))
	for _, r := range d.now.Runs {
		old[key{r.Unit, r.Epoch}] = true
	}
	began := map[string]bool{}
	for _, r := range runs {
		if !r.Time.After(d.last[r.Series].time) {
			continue // it is over, and was read before
		}
		if before, some := began[r.Series]; !some || before {
			began[r.Series] = !old[key{r.Unit, r.Epoch}]
		}
	}
	return began
}

// Next implements Outbox.
func (d *Durable) Next(ctx context.Context, maxBytes int) ([]Entry, error) {
	rows, err := d.store.Next(ctx, maxBytes)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, len(rows))
	for i, row := range rows {
		entries[i] = Entry{ID: row.ID, Points: row.Points, Request: row.Request}
	}
	return entries, nil
}

// Done implements Outbox.
func (d *Durable) Done(ctx context.Context, outcomes ...Outcome) error {
	delivered := int64(0)
	for _, o := range outcomes {
		if o.Poison == "" {
			delivered = o.ID
			continue
		}
		if delivered > 0 {
			if err := d.store.Ack(ctx, delivered); err != nil {
				return err
			}
		}
		delivered = 0
		err := d.store.Quarantine(ctx, o.ID, o.Poison)
		if errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrClosed) {
			return err
		}
		if err != nil {
			delivered = o.ID // it is not there any more, so that all is said
		}
	}
	if delivered > 0 {
		return d.store.Ack(ctx, delivered)
	}
	return nil
}

// journalKey is the row of the position in the journal. No run has it: theirs
// have a space.
const journalKey = "journal"

func ledgerOf(state receiver.State) store.Ledger {
	ledger := store.Ledger{
		Time:   state.Time,
		Series: make([]store.Series, len(state.Series)),
		Runs:   make([]store.Run, len(state.Runs), len(state.Runs)+1),
	}
	for i, s := range state.Series {
		ledger.Series[i] = store.Series{Key: s.Name, Total: amountsOf(s.Total), Start: s.Start, Seen: s.Time}
	}
	for i, r := range state.Runs {
		// Units without an invocation id share an epoch, the boot; and two runs
		// of one unit may be in the ledger at the same time.
		ledger.Runs[i] = store.Run{Key: r.Unit + " " + r.Epoch, Series: r.Series, Epoch: r.Epoch, Boot: r.Boot, Last: amountsOf(r.Last), Seen: r.Time}
	}
	if at := state.Journal; at != (receiver.Position{}) {
		ledger.Runs = append(ledger.Runs, store.Run{Key: journalKey, Epoch: at.Cursor, Boot: at.Boot})
	}
	return ledger
}
