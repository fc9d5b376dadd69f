package exporter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/exporter/store/history"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// Durable is the Outbox in a store.Store. With each cycle it commits the ledger
// and the history samples of the sweep as well. It is safe for concurrent use as
// Outbox allows: one Commit at a time.
type Durable struct {
	store *store.Store
	state ledger.State // as it was at the start
	sent  ledger.State // the same, with the totals that deltas have

	// Of the last commit, for the next one. Only Commit uses them.
	now    ledger.State
	behind []store.Series // Cycle.Behind
	whole  time.Time      // when the last sweep that reached all units began
	cycle  int            // counts commits of a sweep
	last   map[ledger.ID]sampled
}

// sampled is the end of the last history sample of a series.
type sampled struct {
	total amounts
	start time.Time // of the series
	time  time.Time
	cycle int // as of that commit
}

// NewDurable reads the ledger of s. It fails with store.ErrUnavailable if that
// cannot be done now. Without it an agent would restart every series and overwrite the
// old ones. The caller closes s after the Exporter's
// Shutdown.
func NewDurable(ctx context.Context, s *store.Store) (*Durable, error) {
	saved, err := s.Ledger(ctx)
	if err != nil {
		return nil, fmt.Errorf("restore the totals of all units: %w", err)
	}
	totals, sent := saved, saved
	var behind []store.Series
	totals.Series, sent.Series, behind = split(saved.Series)
	d := &Durable{store: s, state: stateOf(totals), sent: stateOf(sent), whole: saved.Time, last: make(map[ledger.ID]sampled, len(saved.Series))}
	for s := range d.state.All() {
		d.last[s.ID] = sampled{amountsOf(s.Total), s.Start, s.Time, -1}
	}
	d.now, d.behind = d.state, behind
	return d, nil
}

// State returns the ledger as it was at the start: for receiver.Config.State.
func (d *Durable) State() ledger.State { return d.state }

// Sent returns State with the totals that deltas were handed over up to: for
// Config.Sent.
func (d *Durable) Sent() ledger.State { return d.sent }

// Commit implements Outbox.
func (d *Durable) Commit(ctx context.Context, cycle Cycle) error {
	now, behind := d.now, d.behind
	c := store.Cycle{Time: time.Now(), Request: cycle.Request, Points: cycle.Points}
	if cycle.Sweep != nil {
		now, behind, c.Time = cycle.Sweep.State, nil, cycle.Sweep.Time
		for i := range cycle.Behind {
			row := seriesRow(&cycle.Behind[i])
			row.Kind |= sentMark
			behind = append(behind, row)
		}
		c.Samples = d.samples(cycle.Sweep.State)
	}
	c.Ledger = ledgerOf(now)
	c.Ledger.Series = append(c.Ledger.Series, behind...)
	if err := d.store.Commit(ctx, c); err != nil {
		return err
	}
	if cycle.Sweep == nil {
		return nil
	}
	d.now, d.behind = now, behind
	if d.cycle++; !cycle.Sweep.Partial {
		d.whole = c.Time.Add(-cycle.Sweep.Duration)
	}
	for s := range cycle.Sweep.State.All() {
		if s.Observed {
			d.last[s.ID] = sampled{amountsOf(s.Total), s.Start, s.Time, d.cycle}
		}
	}
	forget(d.last, &cycle.Sweep.State)
	return nil
}

// samples returns the traffic of each unit since its last sample. A unit that started
// since the last cycle, or during its sweep, has all of its total in the sample. An
// older unit that is seen for the first time has none, since the times of its traffic
// are unknown. The same applies to a series that was dropped at the limit of series and
// started again under its name: its start differs.
func (d *Durable) samples(state ledger.State) []history.Sample {
	samples := make([]history.Sample, 0, len(state.Series))
	var began map[ledger.ID]bool // made when it is needed
	for s := range state.All() {
		if !s.Observed || s.Kind == ledger.Unattributed || s.Measure != ledger.Total {
			continue
		}
		prev, known := d.last[s.ID]
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
			if began[s.ID] && prev.time.Before(d.whole) {
				prev.time = d.whole
			}
		}
		if s.Time.Equal(prev.time) {
			continue // no new reading
		}
		name := s.ID.Text()
		if s.Kind == ledger.Overflow {
			name = "(overflow)"
		}
		samples = append(samples, history.Sample{
			Unit: name, Time: s.Time, Interval: s.Time.Sub(prev.time),
			Delta: amountsOf(s.Total).minus(prev.total),
		})
	}
	return samples
}

// began returns the series of units that were away at the last cycle: their traffic
// since the last sample is from runs that started after it. Without this, a backup that
// runs once a night would seem to take all day.
func (d *Durable) began(runs []ledger.Run) map[ledger.ID]bool {
	old := make(map[string]bool, len(d.now.Runs))
	for _, r := range d.now.Runs {
		old[r.Epoch] = true
	}
	began := map[ledger.ID]bool{}
	for _, r := range runs {
		id, ok := r.SeriesID(ledger.Total)
		if !ok || !r.Time.After(d.last[id].time) {
			continue // it is over, and was read before
		}
		if before, some := began[id]; !some || before {
			began[id] = !old[r.Epoch]
		}
	}
	return began
}

// Next implements Outbox.
func (d *Durable) Next(ctx context.Context, after int64, maxBytes int) ([]Entry, error) {
	rows, err := d.store.NextAfter(ctx, after, maxBytes)
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
	if n := len(outcomes); n > 0 && outcomes[n-1].Poison == "" {
		p := store.Partial(outcomes[n-1].Partial)
		if p.Rejected == 0 {
			p = store.Partial{}
		}
		// This is for the doctor only, and must not hold up the delivery.
		_ = d.store.NotePartial(ctx, p)
	}
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
		err := d.store.Quarantine(ctx, store.Entry{ID: o.ID, Points: otlp.Count(o.Refused), Request: o.Refused}, o.Poison)
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

// The kinds of series in the store.
const (
	_ = iota // of no series: a run that has none
	kindUnit
	kindOverflow
	kindUnattributed
	kindAhead   // Balance.Ahead, by the slice's name
	kindWaiting // Balance.Waiting, by the slice's name
	kindOwned   // a unit with an Owner, by ownedKey

	// measureShift is where a kind has its Measure, above one of these numbers.
	measureShift = 4

	// sentMark beside a kind and a measure says that the row's total is what deltas
	// have of the series. Without such a row they have the series' own.
	sentMark = 1 << 7
)

// split returns the rows of series without those of their deltas, with these in their
// place, and the rows of the deltas.
func split(rows []store.Series) (totals, sent, behind []store.Series) {
	type ref struct {
		kind uint8
		key  string
	}
	place := map[ref]int{}
	for _, row := range rows {
		if row.Kind&sentMark == 0 {
			place[ref{row.Kind, row.Key}] = len(totals)
			totals = append(totals, row)
		}
	}
	sent = slices.Clone(totals)
	for _, row := range rows {
		if row.Kind&sentMark != 0 {
			behind = append(behind, row)
			row.Kind &^= sentMark
			if i, ok := place[ref{row.Kind, row.Key}]; ok {
				sent[i] = row
			}
		}
	}
	return totals, sent, behind
}

// seriesRow converts a series to the store's form.
func seriesRow(s *ledger.Series) store.Series {
	kind, key := rowOf(s.ID)
	return store.Series{Kind: kind, Key: key, Total: amountsOf(s.Total), Start: s.Start, Seen: s.Time}
}

// ledgerOf converts a state to the store's form.
func ledgerOf(state ledger.State) store.Ledger {
	others := state.Others
	state.Others = nil
	kept := store.Ledger{
		Time:     state.Time,
		Series:   make([]store.Series, 0, len(state.Series)+1+3*len(state.Balances)),
		Runs:     make([]store.Run, 0, len(state.Runs)),
		Position: [2]string{state.Journal.Cursor, state.Journal.Boot},
		Source:   state.Source,
	}
	keep(&kept, &state)
	for i := range others {
		keep(&kept, &others[i])
	}
	return kept
}

// keep adds the series and runs of a state.
func keep(kept *store.Ledger, state *ledger.State) {
	measure := uint8(state.Measure) << measureShift
	// The rows of a balance are seen at the same time, so that the store gives up
	// all of them together, or the last ones first: those of the totals.
	for _, b := range state.Balances {
		kept.Series = append(kept.Series,
			store.Series{Kind: measure | kindAhead, Key: b.Slice, Total: amountsOf(b.Ahead), Seen: b.Unattributed.Time},
			store.Series{Kind: measure | kindWaiting, Key: b.Slice, Total: amountsOf(b.Waiting), Seen: b.Unattributed.Time})
	}
	for s := range state.All() {
		kept.Series = append(kept.Series, seriesRow(s))
	}
	for i := range state.Runs {
		r := &state.Runs[i]
		run := store.Run{Key: r.Epoch, Unit: r.Unit, Boot: r.Boot, SeriesKind: measure, Last: amountsOf(r.Last), Seen: r.Time}
		if measure != 0 {
			run.Key += measureSuffix(state.Measure)
		}
		if id, ok := r.SeriesID(state.Measure); ok {
			run.SeriesKind, run.Series = rowOf(id)
		}
		kept.Runs = append(kept.Runs, run)
	}
}

// measureSuffix tells the runs of one epoch apart.
func measureSuffix(m ledger.Measure) string { return " " + strconv.Itoa(int(m)) }

// rowOf returns the kind and key of a series' row.
func rowOf(id ledger.ID) (kind uint8, key string) {
	kind, key = uint8(id.Measure)<<measureShift, id.Name
	switch {
	case id.Kind == ledger.Overflow:
		return kind | kindOverflow, key
	case id.Kind == ledger.Unattributed:
		return kind | kindUnattributed, key
	case id.Owner != ledger.Owner{}:
		return kind | kindOwned, ownedKey(id)
	}
	return kind | kindUnit, key
}

// ownedKey is the name and the labels, with a NUL between any two, which no name has.
func ownedKey(id ledger.ID) string {
	l := id.Owner.Labels()
	return strings.Join([]string{id.Name, l.User, l.Runtime, l.ContainerID, l.ContainerName, l.Pod, l.Namespace}, "\x00")
}

// parseOwned undoes ownedKey; ok is false for any other key.
func parseOwned(key string) (name string, owner ledger.Owner, ok bool) {
	p := strings.Split(key, "\x00")
	if len(p) != 7 {
		return "", owner, false
	}
	return p[0], ledger.OwnerOf(ledger.Labels{User: p[1], Runtime: p[2], ContainerID: p[3], ContainerName: p[4], Pod: p[5], Namespace: p[6]}), true
}

// stateOf undoes ledgerOf.
func stateOf(kept store.Ledger) ledger.State {
	byMeasure := map[ledger.Measure]*store.Ledger{ledger.Total: {}}
	of := func(kind *uint8) (*store.Ledger, ledger.Measure) {
		measure := ledger.Measure(*kind >> measureShift)
		*kind &= 1<<measureShift - 1
		if byMeasure[measure] == nil {
			byMeasure[measure] = &store.Ledger{}
		}
		return byMeasure[measure], measure
	}
	for _, row := range kept.Series {
		part, _ := of(&row.Kind)
		part.Series = append(part.Series, row)
	}
	for _, row := range kept.Runs {
		part, measure := of(&row.SeriesKind)
		row.Key = strings.TrimSuffix(row.Key, measureSuffix(measure))
		part.Runs = append(part.Runs, row)
	}
	var state ledger.State
	for _, measure := range slices.Sorted(maps.Keys(byMeasure)) {
		one := restored(byMeasure[measure], measure)
		one.Time, one.Source = kept.Time, kept.Source
		if measure == ledger.Total {
			state = one
			state.Journal = ledger.Position{Cursor: kept.Position[0], Boot: kept.Position[1]}
		} else {
			state.Others = append(state.Others, one)
		}
	}
	return state
}

// restored undoes keep. A balance whose total the store has dropped begins anew.
func restored(kept *store.Ledger, measure ledger.Measure) ledger.State {
	state := ledger.State{Measure: measure}
	balances := map[string]*ledger.Balance{}
	for _, row := range kept.Series {
		s := ledger.Series{ID: ledger.ID{Name: row.Key, Measure: measure}, Total: amounts(row.Total).counters(), Start: row.Start, Time: row.Seen}
		b := balances[row.Key]
		if b == nil && row.Kind >= kindUnattributed && row.Kind != kindOwned {
			b = &ledger.Balance{Slice: row.Key}
			balances[row.Key] = b
		}
		switch row.Kind {
		case kindUnit:
			state.Series = append(state.Series, s)
		case kindOwned:
			var ok bool
			if s.Name, s.Owner, ok = parseOwned(row.Key); ok {
				state.Series = append(state.Series, s)
			}
		case kindOverflow:
			s.Kind = ledger.Overflow
			state.Overflow = &s
		case kindUnattributed:
			s.Kind = ledger.Unattributed
			b.Unattributed = s
		case kindAhead:
			b.Ahead = s.Total
		case kindWaiting:
			b.Waiting = s.Total
		}
	}
	for _, slice := range slices.Sorted(maps.Keys(balances)) {
		if b := balances[slice]; b.Unattributed.Kind == ledger.Unattributed {
			state.Balances = append(state.Balances, *b)
		}
	}
	for _, row := range kept.Runs {
		r := ledger.Run{Unit: row.Unit, Epoch: row.Key, Boot: row.Boot, Last: amounts(row.Last).counters(), Time: row.Seen, Overflow: row.SeriesKind == kindOverflow}
		switch row.SeriesKind {
		case kindUnit:
			r.Series = row.Series
		case kindOwned:
			r.Series, r.Owner, _ = parseOwned(row.Series)
		}
		state.Runs = append(state.Runs, r)
	}
	return state
}
