package receiver

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"time"
)

const (
	// stopRecord is the MESSAGE_ID of what PID 1 logs of the resources that a
	// unit used when it stops (sd-messages.h, SD_MESSAGE_UNIT_RESOURCES).
	stopRecord = "ae8f7b866b0347b9af31fe1c80b127c0"
	// journalOverlap is how far before the last sweep of an earlier Receiver
	// the journal is read. It must be less than keepClosed, for which the runs
	// in these records are remembered: so none is counted twice.
	journalOverlap = time.Minute
	journalRetry   = time.Minute
)

// record is a stop record as journalctl prints it.
type record struct {
	Unit           string `json:"UNIT"`
	Invocation     string `json:"INVOCATION_ID"`
	Realtime       string `json:"__REALTIME_TIMESTAMP"`
	IngressBytes   string `json:"IP_METRIC_INGRESS_BYTES"`
	IngressPackets string `json:"IP_METRIC_INGRESS_PACKETS"`
	EgressBytes    string `json:"IP_METRIC_EGRESS_BYTES"`
	EgressPackets  string `json:"IP_METRIC_EGRESS_PACKETS"`
}

// followJournal takes PID 1's stop records until ctx ends.
func (r *Receiver) followJournal(ctx context.Context, since time.Time) {
	warned := false
	for {
		err := r.readJournal(ctx, since)
		since = time.Now()
		// Who ends the agent may end journalctl with it, and first.
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
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
	}
}

// readJournal runs journalctl until it or ctx ends. Only PID 1's own records
// count: anybody can log a message with that id. Those of an earlier boot are of
// runs that nobody remembers, and the ledger may have them already; --follow
// leaves them out by itself only in newer versions (not in systemd 247).
func (r *Receiver) readJournal(ctx context.Context, since time.Time) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	command := r.journalctl
	if command == nil {
		command = []string{"journalctl"}
	}
	args := append(command[1:len(command):len(command)], "--system", "--follow", "--boot", "--quiet", "--output=json",
		fmt.Sprintf("--since=@%d.%06d", since.Unix(), since.Nanosecond()/1000), "--no-tail", "MESSAGE_ID="+stopRecord, "_PID=1")
	cmd := exec.CommandContext(ctx, command[0], args...)
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
		r.takeRecord(lines.Bytes())
	}
	end() // it may still run if a line was too long, and wait for its reader
	err = errors.Join(lines.Err(), cmd.Wait())
	return fmt.Errorf("follow the journal: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
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
func (r *Receiver) takeRecord(line []byte) {
	var rec record
	err := json.Unmarshal(line, &rec)
	var final Counters
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
	if err != nil || len(rec.Invocation) != 32 {
		r.count(func(h *health) { h.badRecords++ })
		return
	}
	if final == (Counters{}) || !r.metered(rec.Unit) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := r.runKey(rec.Unit, rec.Invocation)
	current, ok := r.runs[key]
	if !ok {
		current = &run{unit: rec.Unit, epoch: rec.Invocation, closed: time.Now()}
		r.runs[key] = current
	}
	at := time.UnixMicro(usec)
	if current.series == nil {
		// Nobody read it while it ran: it began after the sweep before.
		current.start = at
		if last := r.last.Load(); last != nil && last.Time.Before(at) {
			current.start = last.Time
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
	r.unitGrew(current.slice, delta)
}
