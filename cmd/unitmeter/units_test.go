package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

func named(unit, state string) accounting.Reading {
	return accounting.Reading{Unit: systemd.Unit{Name: unit, Accounting: state}}
}

func TestStateOf(t *testing.T) {
	plain := receiver.Config{Types: []string{"service", "scope", "mount"}}
	for _, test := range []struct {
		name               string
		cfg                receiver.Config
		unit               accounting.Reading
		state, reason, fix string
		series             string
	}{
		{"metered", plain, named("a.service", "on"), "metered", "of its own", "", "a.service"},
		{"folded", receiver.Config{Fold: []string{"session-*.scope"}}, named("session-3.scope", "on"), "metered", "folded into session-*.scope", "", "session-*.scope"},
		{"off", plain, named("a.service", "off"), "off", "IP accounting is off", "unitmeter enable a.service", ""},
		{"off, to be copied", plain, named(`a\x2db.service`, "off"), "off", "IP accounting is off", `unitmeter enable 'a\x2db.service'`, ""},
		{"off mount", plain, named("tmp.mount", "off"), "off", "if a program serves it", "", ""},
		{"masked", plain, accounting.Reading{Unit: systemd.Unit{Name: "a.service", Accounting: "off"}, Masked: true}, "off", "masked", "", ""},
		{"lost", plain, named("a.service", "lost"), "lost", "lost its counters", "unitmeter enable --runtime a.service", ""},
		{"no data", plain, named("a.service", "no_data"), "no-data", "no processes", "", ""},
		{"failed", plain, named("a.service", "failed"), "failed", "not valid", "systemctl show a.service", ""},
		{"unknown", plain, named("a.service", "unknown"), "unknown", "could not be read", "unitmeter units a.service", ""},
		{"slice", plain, named("a.slice", "on"), "excluded", "traffic of the units in it", "", ""},
		{"type", plain, named("a.socket", "on"), "excluded", "UNITMETER_UNIT_TYPES has no socket", "", ""},
		{"not included", receiver.Config{Include: []string{"b*", "c*"}}, named("a.service", "on"), "excluded", "UNITMETER_INCLUDE", "", ""},
		{"excluded", receiver.Config{Include: []string{"a*"}, Exclude: []string{"x", `a\x2d*`}}, named(`a\x2db.service`, "off"), "excluded", `UNITMETER_EXCLUDE has a\x2d*`, "", ""},
	} {
		selection, err := test.cfg.Selection()
		if err != nil {
			t.Fatal(err)
		}
		got := stateOf(selection, test.unit)
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
	if err := printStates(&out, states, false, "possible", nil); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	if m, l, o := strings.Index(text, "m.service"), strings.Index(text, "l.service"), strings.Index(text, "o.service"); m < 0 || l < m || o < l {
		t.Errorf("not in the order metered, lost, off:\n%s", text)
	}
	if strings.Contains(text, "x.slice") || !strings.Contains(text, "4 units: 1 metered, 1 lost, 1 off, 1 excluded.\nTo count all") {
		t.Errorf("excluded units are to be counted only:\n%s", text)
	}
	out.Reset()
	if err := printStates(&out, states, true, "", nil); err != nil || !strings.Contains(out.String(), "x.slice") {
		t.Errorf("a unit that was asked for is left out: %v\n%s", err, &out)
	}
}
