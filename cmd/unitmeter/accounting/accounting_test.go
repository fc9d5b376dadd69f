package accounting

import (
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/receiver/systemd"
)

func TestChoose(t *testing.T) {
	for _, test := range []struct {
		patterns []string
		want     string // names, or the error
	}{
		{nil, `a.service b.service tmp.mount a\x2db.service`},
		{[]string{"a"}, "a.service"},
		{[]string{"b.service", "tmp.mount"}, "b.service tmp.mount"},
		{[]string{"*.service"}, `a.service b.service a\x2db.service`},
		{[]string{"[ab].service"}, "a.service b.service"},
		{[]string{`a\x2d*`}, `a\x2db.service`},
		{[]string{"a", "nope"}, `find unit "nope.service": it is not running, or not among the metered units; see "systemctl status nope.service", UNITMETER_INCLUDE and UNITMETER_UNIT_TYPES`},
		{[]string{"[a"}, `parse unit pattern "[a": it is not a pattern; use *, ?, [a-z] and [!a-z], as in nginx*.service`},
	} {
		var units []Reading
		for _, name := range []string{"a.service", "b.service", "tmp.mount", `a\x2db.service`} {
			units = append(units, Reading{Unit: systemd.Unit{Name: name}})
		}
		patterns, err := Patterns(test.patterns)
		if err == nil {
			units, err = choose(units, patterns)
		}
		var names []string
		for _, u := range units {
			names = append(names, u.Name)
		}
		got := strings.Join(names, " ")
		if err != nil {
			got = err.Error()
		}
		if got != test.want {
			t.Errorf("%q: got %s, want %s", test.patterns, got, test.want)
		}
	}
}

func TestSpeed(t *testing.T) {
	at := time.Unix(1000, 0)
	before := systemd.Unit{Time: at, Counters: systemd.Counters{IngressBytes: 100, IngressPackets: 10, EgressBytes: 5, EgressPackets: 1}}
	now := systemd.Unit{Time: at.Add(2 * time.Second), Counters: systemd.Counters{IngressBytes: 300, IngressPackets: 11, EgressBytes: 5, EgressPackets: 1}}
	if got := speed(before, now); got == nil || *got != [4]float64{100, 0.5, 0, 0} {
		t.Errorf("speed is %v", got)
	}
	if speed(now, before) != nil {
		t.Error("counters that fell have no speed")
	}
	if speed(before, before) != nil {
		t.Error("without time there is no speed")
	}
}

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]Version{
		"252.38-1~deb12u1": {252, 38}, "252": {252, 0}, "v258": {258, 0}, "v258.1": {258, 1}, "256~rc3-1": {256, 0},
		"257.13-1~deb13u1": {257, 13}, "239 (239-82.el8)": {239, 0}, " 249.11-0ubuntu3 ": {249, 11}, "249.x": {249, 0},
	} {
		if got, err := ParseVersion(text); err != nil || got != want {
			t.Errorf("ParseVersion(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "systemd", "-1", "v", "0"} {
		if got, err := ParseVersion(text); err == nil {
			t.Errorf("ParseVersion(%q) = %v, want an error", text, got)
		}
	}
}
