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
	now  receiver.State
	at   time.Time
	last map[string]reading
}

// reading is the end of the last history sample of a series.
type reading struct {
	total receiver.Counters
	time  time.Time
	start time.Time // of the series: one that was forgotten begins anew
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
		store: s, state: receiver.State{Time: ledger.Time}, at: ledger.Time,
		last: make(map[string]reading, len(ledger.Series)),
	}
	for _, row := range ledger.Series {
		total := counters(row.Total)
		d.state.Series = append(d.state.Series, receiver.Series{Name: row.Key, Total: total, Start: row.Start, Time: row.Seen})
		d.last[row.Key] = reading{total, row.Seen, row.Start}
	}
	for _, row := range ledger.Runs {
		if row.Key == journalKey {
			d.state.Journal = receiver.Position{Cursor: row.Epoch, Boot: row.Boot}
			continue
		}
		d.state.Runs = append(d.state.Runs, receiver.Run{
			Unit: strings.TrimSuffix(row.Key, " "+row.Epoch), Series: row.Series, Epoch: row.Epoch, Boot: row.Boot,
			Last: counters(row.Last), Time: row.Seen,
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
		c.Samples = d.samples(cycle.Sweep.State.Series)
	}
	c.Ledger = ledgerOf(now)
	if err := d.store.Commit(ctx, c); err != nil {
		return err
	}
	if cycle.Sweep == nil {
		return nil
	}
	d.now, d.at = now, c.Time
	for _, s := range cycle.Sweep.State.Series {
		if s.Observed {
			d.last[s.Name] = reading{s.Total, s.Time, s.Start}
		}
	}
	if len(d.last) > 2*len(cycle.Sweep.State.Series)+256 {
		d.forget(cycle.Sweep.State.Series)
	}
	return nil
}

// forget drops the readings of series that the ledger does not have any more.
func (d *Durable) forget(series []receiver.Series) {
	kept := make(map[string]reading, len(series))
	for _, s := range series {
		if r, ok := d.last[s.Name]; ok {
			kept[s.Name] = r
		}
	}
	d.last = kept
}

// samples returns what each unit transferred since its last sample. A unit that
// began since the last cycle has all of its total in the sample. One that is
// older, but seen for the first time, has none: nobody knows when it
// transferred what its total says.
func (d *Durable) samples(series []receiver.Series) []store.Sample {
	samples := make([]store.Sample, 0, len(series))
	for _, s := range series {
		if !s.Observed || strings.Contains(s.Name, "/") { // a name with a slash is no unit's, but the receiver's own account
			continue
		}
		prev, known := d.last[s.Name]
		if !known || !prev.start.Equal(s.Start) {
			prev = reading{}
			if d.at.IsZero() || s.Start.Before(d.at) {
				continue
			}
			prev.time = s.Start
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
			Delta: [4]uint64{
				s.Total.IngressBytes - prev.total.IngressBytes, s.Total.IngressPackets - prev.total.IngressPackets,
				s.Total.EgressBytes - prev.total.EgressBytes, s.Total.EgressPackets - prev.total.EgressPackets,
			},
		})
	}
	return samples
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
		ledger.Series[i] = store.Series{Key: s.Name, Total: array(s.Total), Start: s.Start, Seen: s.Time}
	}
	for i, r := range state.Runs {
		// Units without an invocation id share an epoch, the boot; and two runs
		// of one unit may be in the ledger at the same time.
		ledger.Runs[i] = store.Run{Key: r.Unit + " " + r.Epoch, Series: r.Series, Epoch: r.Epoch, Boot: r.Boot, Last: array(r.Last), Seen: r.Time}
	}
	if at := state.Journal; at != (receiver.Position{}) {
		ledger.Runs = append(ledger.Runs, store.Run{Key: journalKey, Epoch: at.Cursor, Boot: at.Boot})
	}
	return ledger
}

func array(c receiver.Counters) [4]uint64 {
	return [4]uint64{c.IngressBytes, c.IngressPackets, c.EgressBytes, c.EgressPackets}
}

func counters(a [4]uint64) receiver.Counters {
	return receiver.Counters{IngressBytes: a[0], IngressPackets: a[1], EgressBytes: a[2], EgressPackets: a[3]}
}
