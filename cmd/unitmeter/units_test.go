package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/receiver"
)

func TestStateOf(t *testing.T) {
	plain := receiver.Config{Types: []string{"service", "scope", "mount"}}
	for _, test := range []struct {
		name                string
		cfg                 receiver.Config
		unit                receiver.Unit
		state, reason, mend string
		series              string
	}{
		{"metered", plain, receiver.Unit{Name: "a.service", Accounting: "on"}, "metered", "of its own", "", "a.service"},
		{"folded", receiver.Config{Fold: []string{"session-*.scope"}}, receiver.Unit{Name: "session-3.scope", Accounting: "on"}, "metered", "folded into session-*.scope", "", "session-*.scope"},
		{"off", plain, receiver.Unit{Name: "a.service", Accounting: "off"}, "off", "IPAccounting=no", "unitmeter enable a.service", ""},
		{"off, to be copied", plain, receiver.Unit{Name: `a\x2db.service`, Accounting: "off"}, "off", "IPAccounting=no", `unitmeter enable 'a\x2db.service'`, ""},
		{"off mount", plain, receiver.Unit{Name: "tmp.mount", Accounting: "off"}, "off", "a program serves it", "", ""},
		{"lost", plain, receiver.Unit{Name: "a.service", Accounting: "lost"}, "lost", "although it runs", "unitmeter enable --runtime a.service", ""},
		{"no data", plain, receiver.Unit{Name: "a.service", Accounting: "no_data"}, "no-data", "no processes", "", ""},
		{"failed", plain, receiver.Unit{Name: "a.service", Accounting: "failed"}, "failed", "no sense", "systemctl show a.service", ""},
		{"unknown", plain, receiver.Unit{Name: "a.service", Accounting: "unknown"}, "unknown", "not been read", "unitmeter units a.service", ""},
		{"slice", plain, receiver.Unit{Name: "a.slice", Accounting: "on"}, "excluded", "traffic of the units in it", "", ""},
		{"type", plain, receiver.Unit{Name: "a.socket", Accounting: "on"}, "excluded", "UNITMETER_UNIT_TYPES has no socket", "", ""},
		{"not included", receiver.Config{Include: []string{"b*", "c*"}}, receiver.Unit{Name: "a.service", Accounting: "on"}, "excluded", "UNITMETER_INCLUDE", "", ""},
		{"excluded", receiver.Config{Include: []string{"a*"}, Exclude: []string{"x", `a\x2d*`}}, receiver.Unit{Name: `a\x2db.service`, Accounting: "off"}, "excluded", `UNITMETER_EXCLUDE has a\x2d*`, "", ""},
	} {
		got := stateOf(test.cfg, test.unit)
		if got.Unit != test.unit.Name || got.State != test.state || !strings.Contains(got.Reason, test.reason) ||
			!strings.Contains(got.Mend, test.mend) || (got.Mend == "") != (test.mend == "") || got.Series != test.series {
			t.Errorf("%s: %+v", test.name, got)
		}
	}
}

func TestPrintStates(t *testing.T) {
	states := []unitState{
		{Unit: "x.slice", State: "excluded", Reason: "r"}, {Unit: "o.service", State: "off", Reason: "r", Mend: "unitmeter enable o.service"},
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
