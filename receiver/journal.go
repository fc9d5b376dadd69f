package receiver

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// stopRecord is the MESSAGE_ID of what PID 1 logs of the resources that a
	// unit used when it stops (sd-messages.h, SD_MESSAGE_UNIT_RESOURCES).
	stopRecord = "ae8f7b866b0347b9af31fe1c80b127c0"
	// A journalctl that ends is started again after journalPause, and once it has
	// kept ending for journalPatience, after journalRetry and where the journal
	// then ends. The sum is less than keepClosed.
	journalPause    = time.Second
	journalPatience = 10 * time.Second
	journalRetry    = time.Minute
	// lateRecord is how old a point may be that a stop record moves: this is
	// what the journal had of the time before a reboot or a stop of the agent.
	lateRecord = 5 * time.Minute
)

// Position is a place in the journal: after the last stop record that is in the
// totals. It is a place and no time, since a clock may be set back, and then
// times before and after are the same.
type Position struct {
	Cursor string // of that record; empty if the journal had none so far
	Boot   string // of that record, else of who looked, as the journal writes it; empty if nobody did
}

// record is a stop record as journalctl prints it.
type record struct {
	Cursor         string `json:"__CURSOR"`
	Boot           string `json:"_BOOT_ID"`
	Unit           string `json:"UNIT"`
	Invocation     string `json:"INVOCATION_ID"`
	Realtime       string `json:"__REALTIME_TIMESTAMP"`
	Source         string `json:"_SOURCE_REALTIME_TIMESTAMP"` // when PID 1 wrote it; journald may be late
	IngressBytes   string `json:"IP_METRIC_INGRESS_BYTES"`
	IngressPackets string `json:"IP_METRIC_INGRESS_PACKETS"`
	EgressBytes    string `json:"IP_METRIC_EGRESS_BYTES"`
	EgressPackets  string `json:"IP_METRIC_EGRESS_PACKETS"`
}

// readsJournal reports whether the end of units is read from the journal.
func (r *Receiver) readsJournal() bool {
	return r.cfg.StopRecords != "off"
}

// followJournal takes PID 1's stop records until ctx ends. Where journalctl has
// ended, the next one goes on from the last record. Where that keeps ending, what
// it cannot read is left out: a run is forgotten after keepClosed, and would then
// be counted again.
func (r *Receiver) followJournal(ctx context.Context) {
	placed := sync.OnceFunc(func() { close(r.placed) })
	defer time.AfterFunc(journalPatience, placed).Stop()
	warned := false
	var failing time.Time // since when journalctl keeps ending
	for {
		began := time.Now()
		err := r.readJournal(ctx, placed)
		placed()
		// Who ends the agent may end journalctl with it, and first.
		select {
		case <-time.After(journalPause):
		case <-ctx.Done():
			return
		}
		if failing.IsZero() || time.Since(began) > journalPatience {
			failing = time.Now()
		}
		// Who was never let in need not knock ten times.
		if r.position().Boot != "" && time.Since(failing) < journalPatience {
			continue
		}
		if !warned {
			warned = true
			r.log.Warn("no stop records from the journal; the last bytes of short units may be missed (see unitmeter.unattributed)", "err", err)
		}
		select {
		case <-time.After(journalRetry):
		case <-ctx.Done():
			return
		}
		r.mu.Lock()
		r.journal = Position{}
		r.mu.Unlock()
	}
}

// readJournal takes the stop records after the position, until journalctl or ctx
// ends. At the first start that is where the journal ends: what is before, the
// counters of running units have, or nobody counted. It calls placed when it knows
// the place.
func (r *Receiver) readJournal(ctx context.Context, placed func()) error {
	switch at := r.position(); {
	case at.Boot == "":
		last := Position{Boot: r.journalBoot()}
		note := func(rec record) { last = Position{rec.Cursor, rec.Boot} }
		if err := r.journalRecords(ctx, note, "--lines=1"); err != nil {
			return err
		}
		r.mu.Lock()
		r.journal = last
		r.mu.Unlock()
	case at.Boot != r.journalBoot():
		// What the units of earlier boots sent between the last sweep and the
		// shutdown is in their stop records only.
		if err := r.journalRecords(ctx, r.takeRecord, at.after()...); err != nil {
			return err
		}
	}
	placed()
	follow := []string{"--follow", "--no-tail", "--boot"}
	// Nothing of this boot is taken so long as the last record is of another.
	if at := r.position(); at.Boot == r.journalBoot() {
		follow = append(follow, at.after()...)
	}
	err := r.journalRecords(ctx, r.takeRecord, follow...)
	return cmp.Or(err, errors.New("follow the journal: journalctl ended"))
}

// awaitJournal waits until the place in the journal is known. An agent that is
// killed after its first commit would begin where the journal ends by then, if the
// commit did not have it, and leave out what ended meanwhile.
func (r *Receiver) awaitJournal(ctx context.Context) {
	if !r.readsJournal() {
		return
	}
	select {
	case <-r.placed:
	case <-ctx.Done():
	}
}

// position returns what of the journal is in the totals.
func (r *Receiver) position() Position {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.journal
}

// journalBoot is the boot id as the journal writes it.
func (r *Receiver) journalBoot() string { return strings.ReplaceAll(r.cfg.BootID, "-", "") }

// after makes journalctl begin at the position. The record there comes again:
// with --after-cursor, older versions skip one whatever it is, also where the
// one of the cursor has been vacuumed.
func (p Position) after() []string {
	if p.Cursor == "" {
		return nil
	}
	return []string{"--cursor=" + p.Cursor}
}

// journalRecords runs journalctl until it or ctx ends, and calls take with each
// stop record. Only PID 1's own count: anybody can log a message with that id.
func (r *Receiver) journalRecords(ctx context.Context, take func(record), args ...string) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	command := r.journalctl
	if command == nil {
		command = []string{"journalctl"}
	}
	command = slices.Concat(command, []string{"--system", "--quiet", "--output=json"}, args, []string{"MESSAGE_ID=" + stopRecord, "_PID=1"})
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	// A group of its own: what interrupts the agent leaves it the last records.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var stderr bytes.Buffer
	cmd.Stderr = &limited{&stderr, 4096}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("run journalctl: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run journalctl: %w", err)
	}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var rec record
		if json.Unmarshal(lines.Bytes(), &rec) != nil {
			r.count(func(h *health) { h.badRecords++ })
			continue
		}
		take(rec)
	}
	if lines.Err() != nil {
		end() // it may still run, and wait for its reader
	}
	if err := errors.Join(lines.Err(), cmd.Wait()); err != nil {
		return fmt.Errorf("read the journal: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}

// limited writes the first n bytes and discards the rest.
type limited struct {
	w io.Writer
	n int
}

func (l *limited) Write(p []byte) (int, error) {
	keep := p[:min(len(p), l.n)]
	l.n -= len(keep)
	if _, err := l.w.Write(keep); err != nil {
		return 0, err
	}
	return len(p), nil
}

// takeRecord puts one stop record on the odometer of its run: what the run had
// at its end, if that is more than was read.
func (r *Receiver) takeRecord(rec record) {
	metered := r.metered(rec.Unit)
	r.mu.Lock()
	defer r.mu.Unlock()
	if rec.Cursor == r.journal.Cursor {
		return // the one that the reading began with
	}
	r.journal = Position{rec.Cursor, rec.Boot}
	final, at, err := rec.counters()
	if err != nil {
		r.health.badRecords++
		return
	}
	if final == (Counters{}) || !metered {
		return
	}
	now := time.Now()
	if at.After(now) {
		at = now // of a clock that was set back since
	}
	key := r.runKey(rec.Unit, rec.Invocation)
	current, ok := r.runs[key]
	if !ok && r.mayBeForgotten(rec, now) {
		r.health.missed++
		return
	}
	if !ok {
		current = &run{unit: rec.Unit, epoch: rec.Invocation, closed: now}
		r.runs[key] = current
	}
	if !current.closed.IsZero() {
		current.closed = now // what is new of it is shown for as long as of others
	}
	if rec.Boot != r.journalBoot() {
		current.earlier = cmp.Or(current.earlier, rec.Boot)
	}
	if current.series == nil {
		// Nobody read it while it ran: it began after the sweep before.
		current.start = at
		before := r.cfg.State.Time
		if last := r.last.Load(); last != nil {
			before = last.Time
		}
		if !before.IsZero() && before.Before(at) {
			current.start = before
		}
		current.series = r.seriesOf(rec.Unit, current.slice, current.start)
	}
	current.final = true
	final = final.max(current.last)
	if at.Before(current.time) {
		at = current.time
	}
	delta, _ := current.advance(final, at)
	current.series.add(delta, at)
	if current.earlier == "" {
		r.unitGrew(current.slice, delta)
		return
	}
	// The slices of this boot have not counted it, but what waits may be of it.
	for _, b := range r.balances {
		delta = b.take(delta)
	}
}

// mayBeForgotten reports whether the run of a record may have been counted, and
// forgotten since: the record comes later than a run is remembered. journald can
// hang for three minutes before its watchdog ends it. The caller holds mu.
func (r *Receiver) mayBeForgotten(rec record, now time.Time) bool {
	usec, _ := strconv.ParseInt(cmp.Or(rec.Source, rec.Realtime), 10, 64)
	// On the monotonic clock, as the others are.
	ended := now.Add(-now.Sub(time.UnixMicro(usec)))
	return ended.After(r.began) && !ended.After(r.forgotten)
}

// counters returns what the record says of the run, and when it was written.
func (rec *record) counters() (final Counters, at time.Time, err error) {
	if len(rec.Invocation) != 32 {
		return final, at, fmt.Errorf("read a stop record: the invocation id is %q", rec.Invocation)
	}
	for _, field := range []struct {
		text string
		to   *uint64
	}{
		{rec.IngressBytes, &final.IngressBytes}, {rec.IngressPackets, &final.IngressPackets},
		{rec.EgressBytes, &final.EgressBytes}, {rec.EgressPackets, &final.EgressPackets},
	} {
		if field.text != "" && err == nil {
			*field.to, err = strconv.ParseUint(field.text, 10, 63)
		}
	}
	var usec int64
	if err == nil {
		usec, err = strconv.ParseInt(rec.Realtime, 10, 64)
	}
	return final, time.UnixMicro(usec), err
}
