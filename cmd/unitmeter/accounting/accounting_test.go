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

func TestReadings(t *testing.T) {
	at := func(second int) time.Time { return time.Unix(1000+int64(second), 0) }
	unit := func(name, state string, start, read int, bytes uint64) systemd.Unit {
		return systemd.Unit{Name: name, Accounting: state, Start: at(start), Time: at(read), Counters: systemd.Counters{IngressBytes: bytes}}
	}
	before := Sweep{Time: at(0), Units: []systemd.Unit{
		unit("grew", "on", -9, 0, 100), unit("fell", "on", -9, 0, 100), unit("still", "on", -9, 0, 7),
		unit("gone", "ended", -9, 0, 5), unit("goes", "on", -9, 0, 5), unit("off", "off", 0, 0, 0),
	}}
	now := Sweep{Time: at(2), Units: []systemd.Unit{
		unit("grew", "on", -9, 2, 300), unit("fell", "on", -9, 2, 50), unit("still", "on", -9, 0, 7), unit("gone", "ended", -9, 2, 5),
		unit("goes", "ended", -9, 2, 9), unit("came", "on", 1, 2, 8), unit("both", "ended", 1, 2, 6), unit("late", "on", -1, 2, 8), unit("off", "off", 0, 0, 0),
	}}
	want := map[string]float64{"grew": 100, "fell": -1, "still": -1, "goes": 2, "came": 4, "both": 3, "late": -1, "off": -1} // -1: not known
	for _, r := range readings(before, now) {
		speed := -1.0
		if r.Speed != nil {
			speed = r.Speed[0]
		}
		if wanted, ok := want[r.Name]; !ok || wanted != speed {
			t.Errorf("the speed of %s is %v, want %v", r.Name, speed, wanted)
		}
		delete(want, r.Name)
	}
	if len(want) > 0 {
		t.Errorf("these are missing: %v", want)
	}
	for _, r := range readings(Sweep{}, before) {
		if r.Name == "gone" || r.Speed != nil {
			t.Errorf("the first reading has %+v", r)
		}
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
