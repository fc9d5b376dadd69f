package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

func someUnits() *accounting.Readings {
	at := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	on := func(name string, n uint64) systemd.Unit {
		return systemd.Unit{
			Name: name, Accounting: "on", Start: at, Time: at.Add(time.Hour), Invocation: strings.Repeat("a", 32),
			Counters: systemd.Counters{IngressBytes: n, IngressPackets: 2, EgressBytes: 1<<63 - 1 - n, EgressPackets: 4},
		}
	}
	return &accounting.Readings{Speeds: true, Origin: accounting.Origin{Counting: receiver.Counting{Source: receiver.DBus}}, Units: []accounting.Reading{
		{Unit: on("a.service", 1)},
		{Unit: on("b.service", 1000), Speed: &[4]float64{1.5, 2, 3, 4}},
		{Unit: systemd.Unit{Name: "off.service", Accounting: "off"}},
		{Unit: systemd.Unit{Name: "lost.service", Accounting: "lost"}},
		{Unit: systemd.Unit{Name: "tmp.mount", Accounting: "no_data"}},
		{Unit: systemd.Unit{Name: "boot.mount", Accounting: "off"}},
	}}
}

func TestOnceJSON(t *testing.T) {
	var out bytes.Buffer
	if err := printJSON(&out, someUnits()); err != nil {
		t.Fatal(err)
	}
	var units []map[string]any
	decoder := json.NewDecoder(&out)
	decoder.UseNumber()
	if err := decoder.Decode(&units); err != nil {
		t.Fatal(err)
	}
	if got := units[0]["egress_bytes"]; got != json.Number("9223372036854775806") {
		t.Errorf("egress_bytes is %v: large counters must be exact", got)
	}
	if units[0]["start"] != "2026-11-23T12:00:00Z" || units[0]["time"] != "2026-11-23T13:00:00Z" {
		t.Errorf("times are %v and %v", units[0]["start"], units[0]["time"])
	}
	if v, ok := units[2]["ingress_bytes"]; !ok || v != nil || units[2]["state"] != "off" {
		t.Errorf("a unit without accounting must have null counters: %v", units[2])
	}
	if units[4]["state"] != "no-data" {
		t.Errorf("state is %v", units[4]["state"])
	}
	if _, ok := units[0]["ingress_bytes_per_second"]; ok || units[1]["ingress_bytes_per_second"] != json.Number("1.5") {
		t.Error("speeds belong to the units that have them, and to no other")
	}
}

func TestOnceTable(t *testing.T) {
	var out bytes.Buffer
	if err := printTable(&out, someUnits(), true); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"IN B/S", "9223372036854774807", "b.service",
		"off.service (IP accounting is off)", "lost.service (systemd lost its counters)",
		"unitmeter enable off.service boot.mount", "unitmeter enable --lost",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, &out)
		}
	}
	out.Reset()
	totals := someUnits()
	totals.Speeds = false
	if err := printTable(&out, totals, false); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), "off.service") || strings.Contains(out.String(), "B/S") {
		t.Errorf("the short table has too much:\n%s", &out)
	}
	// "enable --default" leaves out the mount: it would be told to for ever.
	if want := "off: 1. To switch it on: unitmeter enable --default\n"; !strings.Contains(out.String(), want) {
		t.Errorf("the short table lacks %q:\n%s", want, &out)
	}
}
