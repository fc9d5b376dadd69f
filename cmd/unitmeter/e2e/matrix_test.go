package e2e

import (
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// reloaded is a service over daemon-reload, with nothing sent during it. systemd
// 256 and 257 have no counters of it afterwards (systemd#38112) until its cgroup
// is set up again, and forget what they had counted at the second reload: the
// agent must show a gap and say "lost", not a number. Its own row in
// docs/matrix.md, since it is where versions differ most.
var reloaded = scenario{
	id: "rearm", title: "`daemon-reload`, once and then twice, and IP accounting set again where the counters were lost",
	units: map[string]string{"rearm.service": commanded},
	run: func(s *scene) {
		version := s.version()
		loses := s.source == receiver.DBus && (version == 256 || version == 257)
		s.in("systemctl start {id}")
		known := 0
		counts := func(n int) {
			s.t.Helper()
			s.say(n)
			known += n
			eventually(s.t, "what was sent has arrived", func() bool {
				return s.receivedNow() == systemd.Counters{EgressBytes: uint64(known) * packetBytes, EgressPackets: uint64(known)}
			})
		}
		counts(100)
		for i, reloads := range []string{"systemctl daemon-reload", "systemctl daemon-reload; systemctl daemon-reload"} {
			s.in(reloads)
			if _, ok := s.lab.counted("rearm.service"); s.source == receiver.DBus && ok == loses {
				s.t.Fatalf("after %s, systemd %d has data: %v; what is known of its versions is wrong", reloads, version, ok)
			}
			if loses {
				eventually(s.t, "the agent says that the unit is lost", func() bool { return s.inState("lost") == 1 })
				at := s.last("rearm.service")
				s.say(10) // nobody counts them
				time.Sleep(1500 * time.Millisecond)
				if now := s.last("rearm.service"); !now.Equal(at) {
					s.t.Errorf("there are points up to %v though systemd has had no data since %v", now, at)
				}
				s.in("systemctl set-property --runtime {id}.service IPAccounting=yes")
			}
			if s.source == receiver.DBus {
				eventually(s.t, "the agent says that no unit is lost", func() bool { return s.inState("lost") == 0 && s.inState("on") == 1 })
			}
			// Unlike any value before: a counter that has begun again below the
			// last reading cannot be taken for one that has not.
			counts(50 - 20*i)
		}
		s.equal(s.datagrams(known), s.receivedNow)
		if now, _ := s.lab.counted("rearm.service"); s.source == receiver.DBus && now.EgressPackets != uint64(known) {
			s.note("systemd itself says %d packets in the end", now.EgressPackets)
		}
		if loses {
			s.row.verdict = "exact, with gaps"
			s.note("systemd %d loses the counters at each reload (systemd#38112). The unit was counted as `lost` and had no points until `systemctl set-property --runtime UNIT IPAccounting=yes`; what it sent meanwhile (20 datagrams) was counted by nobody", version)
		}
	},
}

// inState returns how many units the agent said last to be in a state of IP
// accounting.
func (r *recorder) inState(state string) (n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for series, value := range r.gauges {
		if strings.HasPrefix(series, "unitmeter.units{") && strings.Contains(series, "accounting.state="+state) {
			n += value
		}
	}
	return n
}

// last returns the time of the last point of a unit; zero if there is none.
func (r *recorder) last(unit string) (at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.series {
		if s.point.Attrs["systemd.unit.name"] == unit && s.point.Time.After(at) {
			at = s.point.Time
		}
	}
	return at
}
