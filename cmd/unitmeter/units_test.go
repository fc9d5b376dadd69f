package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

func TestStateOf(t *testing.T) {
	plain := receiver.Config{Types: []string{"service", "scope", "mount"}}
	for _, test := range []struct {
		name               string
		cfg                receiver.Config
		unit               systemd.Unit
		state, reason, fix string
		series             string
	}{
		{"metered", plain, systemd.Unit{Name: "a.service", Accounting: "on"}, "metered", "of its own", "", "a.service"},
		{"folded", receiver.Config{Fold: []string{"session-*.scope"}}, systemd.Unit{Name: "session-3.scope", Accounting: "on"}, "metered", "folded into session-*.scope", "", "session-*.scope"},
		{"off", plain, systemd.Unit{Name: "a.service", Accounting: "off"}, "off", "IP accounting is off", "unitmeter enable a.service", ""},
		{"off, to be copied", plain, systemd.Unit{Name: `a\x2db.service`, Accounting: "off"}, "off", "IP accounting is off", `unitmeter enable 'a\x2db.service'`, ""},
		{"off mount", plain, systemd.Unit{Name: "tmp.mount", Accounting: "off"}, "off", "if a program serves it", "", ""},
		{"lost", plain, systemd.Unit{Name: "a.service", Accounting: "lost"}, "lost", "lost its counters", "unitmeter enable --runtime a.service", ""},
		{"no data", plain, systemd.Unit{Name: "a.service", Accounting: "no_data"}, "no-data", "no processes", "", ""},
		{"failed", plain, systemd.Unit{Name: "a.service", Accounting: "failed"}, "failed", "not valid", "systemctl show a.service", ""},
		{"unknown", plain, systemd.Unit{Name: "a.service", Accounting: "unknown"}, "unknown", "could not be read", "unitmeter units a.service", ""},
		{"slice", plain, systemd.Unit{Name: "a.slice", Accounting: "on"}, "excluded", "traffic of the units in it", "", ""},
		{"type", plain, systemd.Unit{Name: "a.socket", Accounting: "on"}, "excluded", "UNITMETER_UNIT_TYPES has no socket", "", ""},
		{"not included", receiver.Config{Include: []string{"b*", "c*"}}, systemd.Unit{Name: "a.service", Accounting: "on"}, "excluded", "UNITMETER_INCLUDE", "", ""},
		{"excluded", receiver.Config{Include: []string{"a*"}, Exclude: []string{"x", `a\x2d*`}}, systemd.Unit{Name: `a\x2db.service`, Accounting: "off"}, "excluded", `UNITMETER_EXCLUDE has a\x2d*`, "", ""},
	} {
		got := stateOf(test.cfg, test.unit)
		if got.Unit != test.unit.Name || got.State != test.state || !strings.Contains(got.Reason, test.reason) ||
			!strings.Contains(got.Fix, test.fix) || (got.Fix == "") != (test.fix == "") || got.Series != test.series {
			t.Errorf("%s: %+v", test.name, got)
		}
	}
}

func TestPrintStates(t *testing.T) {
	states := []unitState{
		{Unit: "x.slice", State: "excluded", Reason: "r"}, {Unit: "o.service", State: "off", Reason: "r", Fix: "unitmeter enable o.service"},
		{Unit: "m.service", State: "metered", Reason: "r"}, {Unit: "l.service", State: "lost", Reason: "r"},
	}
	var out bytes.Buffer
	if err := printStates(&out, states, false); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	if m, l, o := strings.Index(text, "m.service"), strings.Index(text, "l.service"), strings.Index(text, "o.service"); m < 0 || l < m || o < l {
		t.Errorf("not in the order metered, lost, off:\n%s", text)
	}
	if strings.Contains(text, "x.slice") || !strings.HasSuffix(text, "4 units: 1 metered, 1 lost, 1 off, 1 excluded\n") {
		t.Errorf("excluded units are to be counted only:\n%s", text)
	}
	out.Reset()
	if err := printStates(&out, states, true); err != nil || !strings.Contains(out.String(), "x.slice") {
		t.Errorf("a unit that was asked for is left out: %v\n%s", err, &out)
	}
}
