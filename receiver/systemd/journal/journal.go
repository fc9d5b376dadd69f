// Package journal reads systemd's stop records: the last counters of each unit, which
// PID 1 writes to the journal when the unit stops.
//
// Two things are needed of it: [New] makes a [Journal], whose Run follows journalctl; and
// Config.Take gets each [Record] with the [Position] after it.
//
//   - stop record: PID 1's message with the counters of one run of a unit at its end. It
//     exists also for units that were unloaded before anybody could read them.
//   - position: the place in the journal after a stop record.
//
// A Journal that continues at the last position takes each record once, over restarts of
// journalctl, of the process and of the host. The caller stores the position.
package journal

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemd"
)

const (
	// stopRecord is the MESSAGE_ID of what PID 1 logs of the resources that a
	// unit used when it stops (sd-messages.h, SD_MESSAGE_UNIT_RESOURCES).
	stopRecord = "ae8f7b866b0347b9af31fe1c80b127c0"
	// successRecord is the MESSAGE_ID of what PID 1 logs, on the same level, before
	// that and of each unit that ends well (SD_MESSAGE_UNIT_SUCCESS). Without traffic
	// there is no stop record: then it shows that the journal is not silent.
	successRecord = "7ad2d189f7e94e70a38c781354912448"
	// While units end and journalctl prints nothing for usualProbe, another one
	// looks whether there is something to print.
	usualProbe = 30 * time.Second
	// A journalctl that ends is started again after pause, and once it has kept ending
	// for patience, after retry and where the journal then ends. The sum is less than
	// two minutes, for which a run is remembered after its end.
	pause    = time.Second
	patience = 10 * time.Second
	retry    = time.Minute
)

// Position is a place in the journal: after the last stop record that has been taken. It
// is not a time, since a clock that is set back makes the same times twice.
type Position struct {
	Cursor string // of that record; empty if the journal had none so far
	Boot   string // of that record, else of who looked, as the journal writes it; empty if nobody did
}

// Record is PID 1's message about the end of a run, with its last counters if it has any.
type Record struct {
	Unit  string
	Epoch string // the invocation id
	// Boot is the id of the boot that the run was of; empty for this one.
	Boot string
	// Counted says that the record has Counters: what the run had counted at its end.
	// Else systemd counted nothing of it, or another record has them.
	Counted  bool
	Counters systemd.Counters
	// Time is when the record was written, by the wall clock. Ended is the same by
	// the monotonic clock of this process.
	Time, Ended time.Time
}

// Config says where to go on and who takes the records.
type Config struct {
	// At is the position up to which records have been taken.
	At Position
	// BootID is the id of this boot.
	BootID string
	// Take takes a record that ends at a position. Nil: there is none, and the
	// position alone has changed. It is called by the goroutine of Run.
	Take func(Position, *Record)
	// Logger gets changes of state. Default: none.
	Logger *slog.Logger
	// Ends returns how many units have ended so far. Nil: nobody knows.
	Ends func() int64
	// Probe is how long journalctl may print nothing while units end. Default: 30 s.
	Probe time.Duration
	// Command is journalctl and its first arguments. Default: journalctl.
	Command []string
}

// Journal follows PID 1's stop records, which have what a unit counted between
// its last reading and its end. It needs root or the group systemd-journal.
type Journal struct {
	cfg     Config
	log     *slog.Logger
	at      Position      // used by Run only
	located chan struct{} // closed when the position is known, or will not be soon
	bad     atomic.Int64
	cursor  atomic.Pointer[string] // that of at, for the probe
}

// New returns a Journal that does not read yet.
func New(cfg Config) *Journal {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Probe = cmp.Or(cfg.Probe, usualProbe)
	if cfg.Ends == nil {
		cfg.Ends = func() int64 { return 0 }
	}
	if cfg.Command == nil {
		cfg.Command = []string{"journalctl"}
	}
	return &Journal{cfg: cfg, log: cfg.Logger, at: cfg.At, located: make(chan struct{})}
}

// Bad returns the number of invalid records.
func (j *Journal) Bad() int64 { return j.bad.Load() }

// Located waits until the position in the journal is known, or will not be known soon,
// or until ctx ends. The first commit needs the position. If the agent is killed after
// a commit without it, the next one starts at the end of the journal, and misses the
// units that ended meanwhile.
func (j *Journal) Located(ctx context.Context) {
	select {
	case <-j.located:
	case <-ctx.Done():
	}
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

// Run takes PID 1's stop records until ctx ends. If journalctl ends, it is started again
// after the last record. If it keeps ending, the records meanwhile are left out: the
// ledger drops a run two minutes after its end, and would then count it again.
func (j *Journal) Run(ctx context.Context) {
	located := sync.OnceFunc(func() { close(j.located) })
	defer time.AfterFunc(patience, located).Stop()
	warned := false
	var failing time.Time // since when journalctl keeps ending
	for {
		began := time.Now()
		err := j.read(ctx, located)
		located()
		// Who ends the agent may end journalctl with it, and first.
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		if failing.IsZero() || time.Since(began) > patience {
			failing = time.Now()
		}
		// Who was never let in need not knock ten times.
		if j.at.Boot != "" && time.Since(failing) < patience {
			continue
		}
		if !warned {
			warned = true
			j.log.Warn("no stop records from the journal; the last bytes of short-lived units may be missed (see unitmeter.unattributed)", "err", err)
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			return
		}
		j.move(Position{}, nil)
	}
}

// move takes the position to another place, with the record that ends there.
func (j *Journal) move(to Position, record *Record) {
	j.at = to
	j.cursor.Store(&to.Cursor)
	j.cfg.Take(to, record)
}

// read takes the stop records after the position, until journalctl or ctx ends. At the
// first start the position is the end of the journal: runs that ended before are not
// counted. It calls located when it knows the position.
func (j *Journal) read(ctx context.Context, located func()) error {
	switch at := j.at; {
	case at.Boot == "":
		last := Position{Boot: j.boot()}
		note := func(rec record) { last = Position{rec.Cursor, rec.Boot} }
		if err := j.records(ctx, note, "--lines=1"); err != nil {
			return err
		}
		j.move(last, nil)
	case at.Boot != j.boot():
		// What the units of earlier boots sent between the last sweep and the
		// shutdown is in their stop records only.
		if err := j.records(ctx, j.take, at.after()...); err != nil {
			return err
		}
	}
	located()
	follow := []string{"--follow", "--no-tail", "--boot"}
	// Nothing of this boot is taken so long as the last record is of another.
	if at := j.at; at.Boot == j.boot() {
		follow = append(follow, at.after()...)
	}
	ctx, silent := context.WithCancelCause(ctx)
	var probing sync.WaitGroup
	defer probing.Wait()
	defer silent(nil)
	probing.Go(func() { j.probe(ctx, silent) })
	err := j.records(ctx, j.take, follow...)
	return cmp.Or(context.Cause(ctx), err, errors.New("follow the journal: journalctl ended"))
}

var errSilent = errors.New("follow the journal: journalctl prints nothing, and there are records")

// probe ends a journalctl that runs but prints nothing, until ctx ends.
func (j *Journal) probe(ctx context.Context, silent func(error)) {
	ends, cursor := j.cfg.Ends(), j.cursor.Load()
	before := ends // at the look before the last: a record comes a little after the end
	for {
		select {
		case <-time.After(j.cfg.Probe):
		case <-ctx.Done():
			return
		}
		nowEnds, nowCursor := j.cfg.Ends(), j.cursor.Load()
		if nowEnds != before && nowCursor == cursor {
			last := ""
			// One that cannot read either is found by the other's end.
			err := j.records(ctx, func(rec record) { last = rec.Cursor }, "--lines=1")
			if err == nil && last != "" && (cursor == nil || last != *cursor) && j.cursor.Load() == cursor {
				j.log.Warn("journalctl printed nothing while units ended; restarting it")
				silent(errSilent)
				return
			}
		}
		before, ends, cursor = ends, nowEnds, nowCursor
	}
}

// boot is the boot id as the journal writes it.
func (j *Journal) boot() string { return strings.ReplaceAll(j.cfg.BootID, "-", "") }

// after makes journalctl begin at the position. The record there comes again:
// with --after-cursor, older versions skip one whatever it is, also where the
// one of the cursor has been vacuumed.
func (p Position) after() []string {
	if p.Cursor == "" {
		return nil
	}
	return []string{"--cursor=" + p.Cursor}
}

// records runs journalctl until it or ctx ends, and calls take with each
// stop record. Only PID 1's own count: anybody can log a message with that id.
func (j *Journal) records(ctx context.Context, take func(record), args ...string) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	command := slices.Concat(j.cfg.Command, []string{"--system", "--quiet", "--output=json"}, args, []string{"MESSAGE_ID=" + stopRecord, "MESSAGE_ID=" + successRecord, "_PID=1"})
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
			j.bad.Add(1)
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

// take takes one stop record.
func (j *Journal) take(rec record) {
	if rec.Cursor == j.at.Cursor {
		return // the one that the reading began with
	}
	to := Position{rec.Cursor, rec.Boot}
	if rec.Invocation == "" {
		j.move(to, nil) // the end of a unit without runs
		return
	}
	counters, counted, at, err := rec.counters()
	if err != nil || !systemd.ValidUnitName(rec.Unit) {
		j.bad.Add(1)
		j.move(to, nil)
		return
	}
	written, _ := strconv.ParseInt(cmp.Or(rec.Source, rec.Realtime), 10, 64)
	now := time.Now()
	record := Record{
		Unit: rec.Unit, Epoch: rec.Invocation, Counted: counted, Counters: counters, Time: at,
		Ended: now.Add(-now.Sub(time.UnixMicro(written))),
	}
	if rec.Boot != j.boot() {
		record.Boot = rec.Boot
	}
	j.move(to, &record)
}

// counters returns what the record says of the run, if anything, and when it was
// written.
func (rec *record) counters() (final systemd.Counters, counted bool, at time.Time, err error) {
	if len(rec.Invocation) != 32 {
		return final, false, at, fmt.Errorf("read a stop record: the invocation id is %q", rec.Invocation)
	}
	for _, field := range []struct {
		text string
		to   *uint64
	}{
		{rec.IngressBytes, &final.IngressBytes}, {rec.IngressPackets, &final.IngressPackets},
		{rec.EgressBytes, &final.EgressBytes}, {rec.EgressPackets, &final.EgressPackets},
	} {
		if field.text != "" && err == nil {
			counted = true
			*field.to, err = strconv.ParseUint(field.text, 10, 63)
		}
	}
	var usec int64
	if err == nil {
		usec, err = strconv.ParseInt(rec.Realtime, 10, 64)
	}
	return final, counted, time.UnixMicro(usec), err
}
