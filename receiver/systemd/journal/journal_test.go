package journal

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestLongRecord: a line that no stop record can be ends the following with an
// error, which is logged, and does not leave it waiting for ever.
func TestLongRecord(t *testing.T) {
	j := New(Config{
		Command: []string{"sh", "-c", "exec tr '\\0' x </dev/zero"}, Take: func(Position, *Record) {},
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := j.read(ctx, func() {}); !errors.Is(err, bufio.ErrTooLong) || ctx.Err() != nil {
		t.Errorf("it returned %v; context: %v", err, ctx.Err())
	}
}

// TestTake: a record that makes no sense moves the position on and is counted.
// The record of the position itself, with which journalctl begins, is not taken
// again.
func TestTake(t *testing.T) {
	var at Position
	var units []string
	j := New(Config{BootID: "b-1", At: Position{"c0", "b1"}, Take: func(p Position, r *Record) {
		if at = p; r != nil {
			units = append(units, fmt.Sprintf("%s %s %v", r.Unit, r.Boot, r.Counted))
		}
	}})
	good := record{Boot: "b1", Invocation: "0123456789abcdef0123456789abcdef", Realtime: "1700000000000000", EgressBytes: "5"}
	for _, change := range []func(*record){
		func(r *record) { r.Cursor, r.Unit = "c0", "again.service" },
		func(r *record) { r.Cursor, r.Unit = "c1", "a.service" },
		func(r *record) { r.Cursor, r.Unit, r.Boot = "c2", "b.service", "b0" },
		func(r *record) { r.Cursor, r.Unit, r.Invocation = "c3", "c.service", "short" },
		func(r *record) { r.Cursor, r.Unit, r.EgressBytes = "c4", "d.service", "18446744073709551615" },
		func(r *record) { r.Cursor, r.Unit, r.EgressBytes = "c5", "e.service", "" },
		func(r *record) { r.Cursor, r.Unit = "c6", "no unit\x1b[2J.service" },
	} {
		rec := good
		change(&rec)
		j.take(rec)
	}
	if got, want := units, []string{"a.service  true", "b.service b0 true", "e.service  false"}; !slices.Equal(got, want) {
		t.Errorf("taken are %q, want %q", got, want)
	}
	if at.Cursor != "c6" || j.Bad() != 3 {
		t.Errorf("the position is %v, %d were bad", at, j.Bad())
	}
}
