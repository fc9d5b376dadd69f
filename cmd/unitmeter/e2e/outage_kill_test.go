package e2e

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// TestKills kills the agent and the Collector at random moments, in outages and
// in the catching up after them. No request that was committed may be missing,
// and what comes twice may only be of the call that was in flight.
func TestKills(t *testing.T) {
	t.Parallel()
	s := newSite(t, collectorConfig(plainReceivers))
	// Answers that take their time, so that kills find calls in flight.
	s.answered = func() { time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond) }
	s.startAgent(patientCalls)
	kills, outages, down := map[string]int{}, 0, false
	for range times(6, 100) {
		time.Sleep(time.Duration(rand.IntN(700)) * time.Millisecond)
		victim := [...]string{"unitmeter", "collector"}[rand.IntN(2)]
		switch {
		case !down && victim == "collector" && rand.IntN(2) == 0: // an outage begins
			s.in("systemctl kill -s KILL collector; systemctl stop collector")
			outages++
			kills["collector"]++
			down = true
			continue
		case down && rand.IntN(3) == 0: // catching up begins
			s.in("systemctl start collector")
			down = false
		case down:
			victim = "unitmeter"
		}
		s.in(fmt.Sprintf(`p=$(systemctl show -p MainPID --value %s); until [ $p != 0 ] && kill -9 $p; do p=$(systemctl show -p MainPID --value %[1]s); done`, victim))
		kills[victim]++
	}
	s.in("systemctl start collector")
	s.caughtUp()
	cycles, repeats, points := s.settle()
	if all := kills["unitmeter"] + kills["collector"]; repeats > all {
		t.Errorf("%d calls came twice after %d kills", repeats, all)
	}
	t.Logf("%d kills of the agent, %d of the Collector, %d outages: %d cycles committed, all arrived; %d calls repeated with %d points",
		kills["unitmeter"], kills["collector"], outages, cycles, repeats, points)
	if restarts := strings.TrimSpace(s.in("journalctl -o cat --no-pager -u unitmeter | grep -c 'status=9/KILL' || true")); restarts == "0" && kills["unitmeter"] > 0 {
		t.Error("the journal has no kill of the agent")
	}
}
