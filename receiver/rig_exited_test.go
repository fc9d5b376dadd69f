package receiver

import (
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// exits writes a service that goes on without a process after its start, with more
// settings. It returns the begin of a command that sends as many datagrams as follow.
func exits(t *testing.T, rig *systemdtest.Rig, unit string, settings ...string) {
	t.Helper()
	sink(t, rig)
	send := rig.Traffic() + " udp-send " + sinkAddress + " -count "
	rig.WriteFile(t, "/etc/systemd/system/"+unit, "[Service]\nIPAccounting=yes\nType=oneshot\nRemainAfterExit=yes\nExecStart="+send+"5\n"+
		strings.ReplaceAll(strings.Join(settings, "\n"), "{send} ", send)+"\n")
	rig.Run(t, "systemctl", "daemon-reload")
}

// TestRigExited: a service that goes on without a process has a cgroup again for
// ExecReload= and ExecStop=. What that counts is the run's too, whether it begins
// at 0 (from systemd 256 on, or after two reloads) or at what was before.
func TestRigExited(t *testing.T) {
	rig := theRig(t)
	const unit = "exits.service"
	exits(t, rig, unit, "ExecReload={send} 6", "ExecStop={send} 7", "ExecStop=sh -c 'until [ -e /run/exits ]; do sleep .1; done'", "ExecStop={send} 2")
	for _, reloads := range []int{0, 1, 2} {
		rig.Run(t, "rm", "-f", "/run/exits")
		r, stop := journaled(t, rig, Config{Include: []string{unit, "marker.service"}})
		counted := func(what string, n int) {
			t.Helper()
			sweepUntil(t, r, what, func(s *Sweep) bool { got, _ := s.seriesOf(unit); return got.Total.EgressPackets >= uint64(n) })
			for range 3 {
				s := r.Sweep(t.Context())
				if got, _ := s.seriesOf(unit); got.Total != sent(n) {
					t.Fatalf("%s, %d reloads: the total is %+v, want %+v", what, reloads, got.Total, sent(n))
				}
			}
		}
		exited := func() {
			t.Helper()
			systemdtest.Eventually(t, "it has exited", func() bool {
				return strings.TrimSpace(rig.Run(t, "systemctl", "show", "-P", "SubState", unit)) == "exited"
			})
			caughtUp(t, rig, r)
			r.Sweep(t.Context())
		}
		rig.Run(t, "systemctl", "start", unit)
		counted("started", 5)
		exited()
		rig.Run(t, "systemctl", "reload", unit)
		counted("reloaded", 11)
		exited()
		for range reloads {
			rig.Run(t, "systemctl", "daemon-reload")
			r.Sweep(t.Context())
		}
		rig.Run(t, "systemctl", "stop", "--no-block", unit)
		counted("stopping", 18)
		rig.Run(t, "touch", "/run/exits")
		counted("stopped", 20)
		stop()
	}
}

// TestRigExitedForGood: one without ExecStop= shows what it had to the end.
func TestRigExitedForGood(t *testing.T) {
	rig := theRig(t)
	const unit = "exited-for-good.service"
	exits(t, rig, unit)
	r, _ := journaled(t, rig, Config{Include: []string{unit, "marker.service"}})
	rig.Run(t, "systemctl", "start", unit)
	sweepUntil(t, r, "it is read", func(s *Sweep) bool { got, _ := s.seriesOf(unit); return got.Total == sent(5) })
	r.Sweep(t.Context())
	rig.Run(t, "systemctl", "stop", unit)
	caughtUp(t, rig, r)
	for range 3 {
		want(t, r.Sweep(t.Context()), unit, sent(5))
	}
}

// caughtUp returns when the receiver has taken all signals of what has happened
// so far. It meters marker.service.
func caughtUp(t *testing.T, rig *systemdtest.Rig, r *Receiver) {
	t.Helper()
	for _, running := range []bool{true, false} {
		if running {
			rig.Run(t, "systemd-run", "--unit=marker", "sleep", "1000")
		} else {
			rig.Run(t, "systemctl", "stop", "marker.service")
		}
		systemdtest.Eventually(t, "the marker is noticed", func() bool { return (r.unitNamed("marker.service").Accounting != "") == running })
	}
}
