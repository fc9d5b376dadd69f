package receiver

import (
	"bufio"
	"context"
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestRigEarlierBoot: the stop records of an earlier boot are of runs that the
// ledger may have counted already, and that no Receiver remembers.
func TestRigEarlierBoot(t *testing.T) {
	rig := theRig(t)
	sink(t, rig)
	const path = "/proc/sys/kernel/random/boot_id"
	restart := func() {
		rig.Run(t, "journalctl", "--sync")
		rig.Run(t, "systemctl", "reset-failed", "systemd-journald.service")
		rig.Run(t, "systemctl", "restart", "systemd-journald.service")
	}
	run := func(unit string) {
		rig.Run(t, "systemd-run", "--wait", "--unit="+unit, "-p", "IPAccounting=yes", rig.Traffic(), "udp-send", sinkAddress, "-count", "5")
		rig.Run(t, "journalctl", "--sync")
	}
	rig.WriteFile(t, "/etc/earlier-boot", "11111111-2222-4333-8444-555555555555\n")
	before := time.Now()
	rig.Run(t, "mount", "--bind", "/etc/earlier-boot", path)
	restart()
	run("earlier-boot")
	rig.Run(t, "umount", path)
	restart()
	run("this-boot")
	if log := rig.Run(t, "journalctl", "-o", "export", "UNIT=earlier-boot.service", "MESSAGE_ID="+stopRecord); !strings.Contains(log, "_BOOT_ID=11111111222243338444555555555555") {
		t.Fatalf("the journal has no record of the earlier boot:\n%s", log)
	}

	r, err := New(Config{
		Bus: rig.SystemBus(), SystemBus: rig.SystemBus(), HostName: "host", StopEdge: "journal", Include: []string{"*-boot.service"},
		State: State{Time: before, Series: []Series{{Name: "earlier-boot.service", Total: sent(5), Start: before, Time: before}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.journalctl = []string{"nsenter", "-t", strconv.Itoa(rig.PID()), "-a", "--", "setpriv", "--pdeathsig", "KILL", "journalctl"}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	defer func() { cancel(); <-done }()
	s := sweepUntil(t, r, "the later record is read", func(s *Sweep) bool {
		got, _ := s.seriesOf("this-boot.service")
		return got.Total == sent(5)
	})
	if got, _ := s.seriesOf("earlier-boot.service"); got.Total != sent(5) {
		t.Errorf("it counted the earlier boot again: %+v", got.Total)
	}
}

// TestLongRecord: a line that no stop record can be ends the following with an
// error, which is logged, and does not leave it waiting for ever.
func TestLongRecord(t *testing.T) {
	r, err := New(Config{HostName: "host"})
	if err != nil {
		t.Fatal(err)
	}
	r.journalctl = []string{"sh", "-c", "exec tr '\\0' x </dev/zero"}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := r.readJournal(ctx, time.Now()); !errors.Is(err, bufio.ErrTooLong) || ctx.Err() != nil {
		t.Errorf("it returned %v; context: %v", err, ctx.Err())
	}
}
