package receiver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/unitmeter/unitmeter/receiver/ledger"
	"github.com/unitmeter/unitmeter/receiver/systemd"
	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// id returns the invocation id number n.
func id(n int) string { return fmt.Sprintf("%032x", n) }

// accounted returns a running unit with IP accounting.
func accounted(name string, invocation int, c Counters) systemdtest.Unit {
	return systemdtest.Unit{
		Name: name, InvocationID: id(invocation), Accounting: true, Started: time.Now().Add(-time.Minute),
		IngressBytes: c.IngressBytes, IngressPackets: c.IngressPackets, EgressBytes: c.EgressBytes, EgressPackets: c.EgressPackets,
	}
}

// none wants a series to have no point.
func none(t testing.TB, s *Sweep, name string) {
	t.Helper()
	if got, ok := s.seriesOf(name); ok {
		t.Errorf("%s has a point: %+v", name, got)
	}
}

func TestNoDataIsNoNumber(t *testing.T) {
	const no = systemdtest.NoData
	for name, test := range map[string]struct {
		unit  systemdtest.Unit
		state string // "on" has a point
	}{
		"zero":                   {accounted("a.service", 1, Counters{}), "on"},
		"largest":                {accounted("a.service", 1, all(math.MaxInt64)), "on"},
		"all":                    {accounted("a.service", 1, all(no)), "lost"},
		"ingress bytes":          {accounted("a.service", 1, counted(no, 1, 1, 1)), "lost"},
		"ingress packets":        {accounted("a.service", 1, counted(1, no, 1, 1)), "lost"},
		"egress bytes":           {accounted("a.service", 1, counted(1, 1, no, 1)), "lost"},
		"egress packets":         {accounted("a.service", 1, counted(1, 1, 1, no)), "lost"},
		"scope":                  {accounted("a.scope", 1, all(no)), "lost"},
		"mount without a cgroup": {accounted("a.mount", 1, all(no)), "no_data"},
		"socket of AF_UNIX":      {accounted("a.socket", 1, all(no)), "no_data"},
		"service that exited": {func() systemdtest.Unit {
			u := accounted("a.service", 1, all(no))
			u.SubState = "exited"
			return u
		}(), "no_data"},
		"accounting off": {func() systemdtest.Unit {
			u := accounted("a.service", 1, all(no))
			u.Accounting = false
			return u
		}(), "off"},
	} {
		t.Run(name, func(t *testing.T) {
			fake := systemdtest.StartFake(t)
			fake.SetUnit(test.unit)
			r, _ := start(t, Config{Bus: fake.Address()})
			for range 2*recheckEvery + 1 {
				s := r.Sweep(t.Context())
				if s.Partial {
					t.Fatal("the sweep is partial")
				}
				got, ok := s.seriesOf(test.unit.Name)
				if ok != (test.state == "on") {
					t.Fatalf("point: %v, %+v", ok, got)
				}
				raw := counted(test.unit.IngressBytes, test.unit.IngressPackets, test.unit.EgressBytes, test.unit.EgressPackets)
				if ok && got.Total != raw {
					t.Fatalf("total is %+v, want %+v", got.Total, raw)
				}
				if u := r.unitNamed(test.unit.Name); u.Accounting != test.state || !ok && u.Counters != (Counters{}) {
					t.Fatalf("the unit is %+v, want %s", u, test.state)
				}
			}
		})
	}
}

// TestLostAndFound is what systemd 256 and 257 do over reloads.
func TestLostAndFound(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(1000)))
	r, l := start(t, Config{Bus: fake.Address()})
	want(t, r.Sweep(t.Context()), "a.service", all(1000))
	for range 3 {
		fake.SetUnit(accounted("a.service", 1, all(systemdtest.NoData)))
		for range 3 {
			none(t, r.Sweep(t.Context()), "a.service")
		}
		fake.SetUnit(accounted("a.service", 1, all(1500))) // it goes on
		for range 3 {
			want(t, r.Sweep(t.Context()), "a.service", all(1500))
		}
	}
	l.only(t, 3, "systemd lost the counters", "a.service")
	l.only(t, 3, "can be read again", "a.service")
	fake.SetUnit(accounted("a.service", 1, all(systemdtest.NoData)))
	none(t, r.Sweep(t.Context()), "a.service")
	fake.SetUnit(accounted("a.service", 1, all(200))) // or from 0
	want(t, r.Sweep(t.Context()), "a.service", all(1700))
	if n := r.ledger.Resets(); n != 1 {
		t.Errorf("%d resets, want 1", n)
	}
}

// TestLogOfMany: what befalls all units at once is told of a few and counted.
func TestLogOfMany(t *testing.T) {
	fake := systemdtest.StartFake(t)
	const units = 50
	set := func(c Counters) {
		for i := range units {
			fake.SetUnit(accounted(fmt.Sprintf("u%d.service", i), i+1, c))
		}
	}
	set(all(10))
	r, l := start(t, Config{Bus: fake.Address()})
	r.Sweep(t.Context())
	for i := 1; i <= 2; i++ {
		set(all(systemdtest.NoData))
		r.Sweep(t.Context())
		r.Sweep(t.Context())
		l.only(t, 5*i, "WARN", "systemd lost the counters")
		l.only(t, i, "INFO", "the same of more units: systemd lost the counters")
		set(all(10))
		r.Sweep(t.Context())
		l.only(t, 6*i, "can be read again")
	}
	if !strings.Contains(l.String(), fmt.Sprintf(`"units":%d`, units-5)) {
		t.Errorf("the rest is not counted:\n%s", l)
	}
}

func TestFallingCounters(t *testing.T) {
	for name, fallen := range map[string]Counters{
		"all": all(40), "to zero": {}, "ingress bytes": counted(99, 200, 200, 200), "ingress packets": counted(200, 99, 200, 200),
		"egress bytes": counted(200, 200, 99, 200), "egress packets": counted(200, 200, 200, 99),
	} {
		t.Run(name, func(t *testing.T) {
			fake := systemdtest.StartFake(t)
			fake.SetUnit(accounted("a.service", 1, all(100)))
			r, l := start(t, Config{Bus: fake.Address()})
			first := want(t, r.Sweep(t.Context()), "a.service", all(100))
			fake.SetUnit(accounted("a.service", 1, fallen))
			total := plus(all(100), fallen)
			if got := want(t, r.Sweep(t.Context()), "a.service", total); !got.Start.Equal(first.Start) {
				t.Errorf("the series starts at %v, not at %v", got.Start, first.Start)
			}
			if u := r.unitNamed("a.service"); u.Counters != fallen || !u.Start.Equal(first.Time) {
				t.Errorf("the unit's counters are %+v from %v, want %+v from %v", u.Counters, u.Start, fallen, first.Time)
			}
			more := plus(fallen, all(1))
			fake.SetUnit(accounted("a.service", 1, more))
			total = plus(total, all(1))
			want(t, r.Sweep(t.Context()), "a.service", total)
			l.only(t, 1, "fell", "a.service")
			if n := r.ledger.Resets(); n != 1 {
				t.Errorf("%d resets, want 1", n)
			}
		})
	}
}

// TestBadReplies: whatever systemd answers for one unit, it is told and never
// becomes a number, the other units do not suffer, and it ends with the fault.
func TestBadReplies(t *testing.T) {
	fault := func(name string) *dbus.Error { return dbus.NewError(name, []any{"for a test"}) }
	const (
		dbusError  = "org.freedesktop.DBus.Error."
		cannotRead = "cannot read the counters"
	)
	for _, test := range []struct {
		name     string
		property string
		reply    any // a value, or a *dbus.Error
		log      string
		partial  bool // the sweep says so instead of a log
	}{
		{"bytes as text", "IPIngressBytes", "100", `a value of type "s"`, false},
		{"bytes as int64", "IPEgressBytes", int64(100), `a value of type "x"`, false},
		{"bytes as uint32", "IPEgressBytes", uint32(100), `a value of type "u"`, false},
		{"bytes as double", "IPIngressBytes", 100.0, `a value of type "d"`, false},
		{"bytes as bool", "IPIngressBytes", true, `a value of type "b"`, false},
		{"bytes as a byte", "IPIngressBytes", byte(1), `a value of type "y"`, false},
		{"packets as a path", "IPIngressPackets", dbus.ObjectPath("/a"), `a value of type "o"`, false},
		{"packets as an array", "IPIngressPackets", []uint64{100}, `a value of type "at"`, false},
		{"packets as a pair", "IPEgressPackets", struct{ A, B uint64 }{1, 2}, `a value of type "(tt)"`, false},
		{"packets as a map", "IPEgressPackets", map[string]uint64{"a": 1}, `a value of type "a{st}"`, false},
		{"packets within two variants", "IPIngressPackets", dbus.MakeVariant(uint64(100)), `a value of type "v"`, false},
		{"more than can be", "IPIngressBytes", uint64(math.MaxInt64 + 1), "an impossible value of IPIngressBytes, 9223372036854775808", false},
		{"almost no data", "IPEgressPackets", uint64(math.MaxUint64 - 1), "an impossible value of IPEgressPackets, 18446744073709551614", false},
		{"no such property", "IPIngressBytes", fault(dbusError + "UnknownProperty"), "UnknownProperty", false},
		{"no such interface", "IPIngressBytes", fault(dbusError + "UnknownInterface"), "UnknownInterface", false},
		{"no such method", "IPIngressPackets", fault(dbusError + "UnknownMethod"), "UnknownMethod", false},
		{"not allowed", "IPEgressBytes", fault(dbusError + "AccessDenied"), "AccessDenied", false},
		{"SELinux", "IPEgressBytes", fault(dbusError + "SELinuxSecurityContextUnknown"), "SELinux", false},
		{"invalid arguments", "IPEgressPackets", fault(dbusError + "InvalidArgs"), "InvalidArgs", false},
		{"failed", "IPEgressPackets", fault(dbusError + "Failed"), "Failed", false},
		{"a very long error", "IPEgressPackets", fault("a.b" + strings.Repeat("c", 250)), "ccc", false},
		{"no reply", "IPIngressBytes", fault(dbusError + "NoReply"), "", true},
		{"too many calls", "IPIngressPackets", fault(dbusError + "LimitsExceeded"), "", true},
		{"systemd has left the bus", "IPIngressPackets", fault(dbusError + "NameHasNoOwner"), "", true},
		{"systemd has left the bus, the other way", "IPEgressBytes", fault(dbusError + "ServiceUnknown"), "", true},
		{"slice as a number", "Slice", uint64(1), `a value of type "t"`, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			fake := systemdtest.StartFake(t)
			fake.SetUnit(accounted("bad.service", 1, all(100)))
			fake.SetUnit(accounted("good.service", 2, all(7)))
			fake.OnGet(func(path dbus.ObjectPath, _, property string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
				if property != test.property || string(path) != unitPathPrefix+id(1) {
					return dbus.Variant{}, nil, 0, false
				}
				if err, ok := test.reply.(*dbus.Error); ok {
					return dbus.Variant{}, err, 0, true
				}
				return dbus.MakeVariant(test.reply), nil, 0, true
			})
			r, l := start(t, Config{Bus: fake.Address()})
			for i := range 3 {
				s := r.Sweep(t.Context())
				none(t, s, "bad.service")
				want(t, s, "good.service", all(7))
				if s.Partial != test.partial {
					t.Errorf("partial: %v", s.Partial)
				}
				if h := r.systemd.Health(); h.Errors != int64(i+1) || test.partial != (r.partial > 0) {
					t.Errorf("after %d sweeps: %+v", i+1, h)
				}
			}
			if test.partial {
				l.only(t, 0, "bad.service")
			} else {
				l.only(t, 1, "WARN", cannotRead, "bad.service", test.log)
				if u := r.unitNamed("bad.service"); u.Accounting != "failed" || u.Counters != (Counters{}) {
					t.Errorf("the unit is %+v", u)
				}
			}
			fake.OnGet(nil)
			for range 2 {
				s := r.Sweep(t.Context())
				want(t, s, "bad.service", all(100))
				if s.Partial {
					t.Error("the sweep is partial still")
				}
			}
			if !test.partial {
				l.only(t, 1, "INFO", "can be read again", "bad.service")
			}
			l.only(t, 0, "good.service")
		})
	}
}

// TestBadStates: a unit whose state makes no sense is skipped and counted. The
// list that comes after the fault has it.
func TestBadStates(t *testing.T) {
	for name, test := range map[string]struct {
		property string
		value    any
		skipped  bool
	}{
		"InvocationID of 15 bytes":        {"InvocationID", make([]byte, 15), true},
		"InvocationID of 17 bytes":        {"InvocationID", make([]byte, 17), true},
		"InvocationID of 64 KiB":          {"InvocationID", make([]byte, 1<<16), true},
		"InvocationID as text":            {"InvocationID", id(1), true},
		"no InvocationID":                 {"InvocationID", nil, true},
		"ActiveState as a number":         {"ActiveState", uint64(1), true},
		"no ActiveState":                  {"ActiveState", nil, true},
		"SubState as a bool":              {"SubState", true, true},
		"InactiveExitTimestamp as text":   {"InactiveExitTimestamp", "today", true},
		"ActiveEnterTimestamp as a int64": {"ActiveEnterTimestamp", int64(5), true},
		"no ActiveExitTimestamp":          {"ActiveExitTimestamp", nil, true},
		// These are strange, but say nothing about the counters.
		"ActiveState of the future":        {"ActiveState", "exploding", false},
		"SubState of 1 MiB":                {"SubState", strings.Repeat("x", 1<<20), false},
		"InactiveExitTimestamp never":      {"InactiveExitTimestamp", uint64(0), false},
		"InactiveExitTimestamp too large":  {"InactiveExitTimestamp", uint64(math.MaxUint64), false},
		"InactiveExitTimestamp in 2200":    {"InactiveExitTimestamp", uint64(7258118400000000), false},
		"ActiveExitTimestamp in the past":  {"ActiveExitTimestamp", uint64(1), false},
		"ActiveExitTimestamp in 2200":      {"ActiveExitTimestamp", uint64(7258118400000000), false},
		"InactiveEnterTimestamp too large": {"InactiveEnterTimestamp", uint64(math.MaxUint64), false},
	} {
		t.Run(name, func(t *testing.T) {
			fake := systemdtest.StartFake(t)
			bad := accounted("bad.service", 1, all(100))
			bad.Properties = map[string]any{test.property: test.value}
			fake.SetUnit(bad)
			fake.SetUnit(accounted("good.service", 2, all(7)))
			r, _ := start(t, Config{Bus: fake.Address()})
			s := r.Sweep(t.Context())
			want(t, s, "good.service", all(7))
			if test.skipped {
				none(t, s, "bad.service")
				if h := r.systemd.Health(); h.Errors != 1 {
					t.Errorf("the skip was not counted: %+v", h)
				}
				fake.SetUnit(accounted("bad.service", 1, all(100)))
				fake.EmitReloading(true)
				fake.EmitReloading(false)
				s = sweepUntil(t, r, "the unit is listed", func(s *Sweep) bool { _, ok := s.seriesOf("bad.service"); return ok })
			}
			got := want(t, s, "bad.service", all(100))
			if got.Start.After(got.Time) || got.Start.Unix() <= 0 {
				t.Errorf("the series starts at %v", got.Start)
			}
		})
	}
}

// TestBadLists: rows that cannot be are skipped and counted; a list that is
// none is told, and tried again.
func TestBadLists(t *testing.T) {
	row := func(name string, path dbus.ObjectPath) listed {
		return listed{Name: name, Load: "loaded", Active: "active", Sub: "running", Path: path, JobPath: "/"}
	}
	good := row("good.service", dbus.ObjectPath(unitPath("good.service")))
	type short struct{ Name, Description string }
	for name, test := range map[string]struct {
		rows     any // or a *dbus.Error
		badNames int64
		err      string // of the connection
	}{
		"twice the same":          {[]listed{good, good}, 0, ""},
		"alias":                   {[]listed{good, row("other.service", good.Path)}, 0, ""},
		"a path that is no unit":  {[]listed{good, row("a.service", "/")}, 1, ""},
		"a job":                   {[]listed{good, row("a.service", "/org/freedesktop/systemd1/job/1")}, 1, ""},
		"a space":                 {[]listed{good, row("a b.service", dbus.ObjectPath(unitPath("a b.service")))}, 1, ""},
		"a slice with a space":    {[]listed{good, row("a b.slice", dbus.ObjectPath(unitPath("a b.slice")))}, 1, ""},
		"a slice without a name":  {[]listed{good, row(".slice", dbus.ObjectPath(unitPath(".slice")))}, 1, ""},
		"a slash":                 {[]listed{good, row("a/b.service", dbus.ObjectPath(unitPath("a/b.service")))}, 1, ""},
		"a NUL":                   {[]listed{good, row("a", dbus.ObjectPath(unitPath("a\x00b.service")))}, 1, ""},
		"not UTF-8":               {[]listed{good, row("a", dbus.ObjectPath(unitPath("a\xff\xfe.service")))}, 1, ""},
		"a huge name":             {[]listed{good, row("a", dbus.ObjectPath(unitPath(strings.Repeat("a", 1<<16)+".service")))}, 1, ""},
		"a name one too long":     {[]listed{good, row("a", dbus.ObjectPath(unitPath(strings.Repeat("a", 248)+".service")))}, 1, ""},
		"a cut off name":          {[]listed{good, row("a.service", "/org/freedesktop/systemd1/unit/a_2")}, 1, ""},
		"a name without a type":   {[]listed{good, row("a", dbus.ObjectPath(unitPath("a")))}, 1, ""},
		"a name of a type alone":  {[]listed{good, row(".service", dbus.ObjectPath(unitPath(".service")))}, 1, ""},
		"a bad escape":            {[]listed{good, row("a.service", "/org/freedesktop/systemd1/unit/a_zz")}, 1, ""},
		"an invocation":           {[]listed{good, row("a.service", dbus.ObjectPath(unitPathPrefix+id(9)))}, 1, ""},
		"a thousand bad rows":     {append(slices.Repeat([]listed{row("a b", "/")}, 1000), good), 1000, ""},
		"a type that is not ours": {[]listed{good, row("a.timer", dbus.ObjectPath(unitPath("a.timer")))}, 0, ""},
		"rows too short":          {[]short{{"good.service", ""}}, 0, "list systemd's units"},
		"no rows but text":        {"good.service", 0, "list systemd's units"},
		"refused":                 {dbus.NewError("org.freedesktop.DBus.Error.AccessDenied", []any{"for a test"}), 0, "list systemd's units: for a test"},
		"an error without words":  {dbus.NewError("org.freedesktop.DBus.Error.Failed", nil), 0, "list systemd's units: org.freedesktop.DBus.Error.Failed"},
	} {
		t.Run(name, func(t *testing.T) {
			fake := systemdtest.StartFake(t)
			fake.SetUnit(accounted("good.service", 1, all(7)))
			fake.OnCall(func(member string, _ []any) ([]any, *dbus.Error, time.Duration, bool) {
				if member != "ListUnitsByPatterns" {
					return nil, nil, 0, false
				}
				if err, ok := test.rows.(*dbus.Error); ok {
					return nil, err, 0, true
				}
				return []any{test.rows}, nil, 0, true
			})
			if test.err != "" {
				r, l := unstarted(t, Config{Bus: fake.Address()})
				systemdtest.Eventually(t, "it has tried again", func() bool { return fake.Calls("ListUnitsByPatterns") >= 2 })
				l.only(t, 1, "WARN", "lost the connection to systemd; trying again", test.err)
				if s := r.Sweep(t.Context()); !s.Partial || len(s.State.Series) != 0 {
					t.Errorf("without a list, a sweep is %+v", s)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
				defer cancel()
				if err := r.Ready(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), test.err) {
					t.Errorf("Ready returned %v, want the reason in it", err)
				}
				fake.OnCall(nil)
				want(t, sweepUntil(t, r, "it has recovered", func(s *Sweep) bool { return !s.Partial }), "good.service", all(7))
				l.only(t, 1, "INFO", "connected to systemd again")
				return
			}
			r, _ := start(t, Config{Bus: fake.Address()})
			s := r.Sweep(t.Context())
			want(t, s, "good.service", all(7))
			if h := r.systemd.Health(); h.BadNames != test.badNames || h.Errors != 0 {
				t.Errorf("%+v, want %d bad names", h, test.badNames)
			}
			if len(s.State.Series) != 1 || fake.Stubs() != 0 {
				t.Errorf("series %+v; %d names were touched that are not there", s.State.Series, fake.Stubs())
			}
		})
	}
}

// TestBadSignals: none of these disturbs a running unit, or loads one.
func TestBadSignals(t *testing.T) {
	const (
		changed   = propertiesInterface + ".PropertiesChanged"
		unitNew   = managerInterface + ".UnitNew"
		unitGone  = managerInterface + ".UnitRemoved"
		reloading = managerInterface + ".Reloading"
		goodPath  = unitPathPrefix + "good_2eservice"
		manager   = "/org/freedesktop/systemd1"
	)
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("good.service", 1, all(7)))
	r, _ := start(t, Config{Bus: fake.Address()})
	want(t, r.Sweep(t.Context()), "good.service", all(7))
	properties := func(key string, value any) map[string]dbus.Variant {
		return map[string]dbus.Variant{"InvocationID": dbus.MakeVariant(make([]byte, 16)), key: dbus.MakeVariant(value)}
	}
	for _, signal := range []struct {
		path   dbus.ObjectPath
		name   string
		values []any
	}{
		{manager, unitNew, nil},
		{manager, unitNew, []any{uint32(5)}},
		{manager, unitNew, []any{strings.Repeat("x", 1<<15) + ".service", dbus.ObjectPath("/")}},
		{manager, unitNew, []any{"a b.service", dbus.ObjectPath("/")}},
		{manager, unitNew, []any{"", dbus.ObjectPath("/")}},
		{manager, unitGone, nil},
		{manager, unitGone, []any{[]string{"good.service"}}},
		{manager, unitGone, []any{"", dbus.ObjectPath("/")}},
		{manager, unitGone, []any{"good.service.service", dbus.ObjectPath("/")}},
		{manager, reloading, nil},
		{manager, reloading, []any{"true"}},
		{manager, managerInterface + ".StartupFinished", []any{uint64(1)}},
		{goodPath, changed, nil},
		{goodPath, changed, []any{unitInterface}},
		{goodPath, changed, []any{unitInterface, "no map", []string{}}},
		{goodPath, changed, []any{unitInterface, map[string]string{"ActiveState": "inactive"}, []string{}}},
		{goodPath, changed, []any{unitInterface, properties("InvocationID", []byte{1, 2}), []string{}}},
		{goodPath, changed, []any{unitInterface, properties("InvocationID", id(2)), []string{}}},
		{goodPath, changed, []any{unitInterface, properties("ActiveState", uint32(0)), []string{}}},
		{goodPath, changed, []any{unitInterface, properties("SubState", false), []string{}}},
		{goodPath, changed, []any{unitInterface, properties("InactiveExitTimestamp", "today"), []string{}}},
		{goodPath, changed, []any{uint32(7), properties("ActiveState", "inactive"), []string{}}},
		{"/", changed, []any{unitInterface, properties("ActiveState", "inactive"), []string{}}},
		{unitPathPrefix + "a_2", changed, []any{unitInterface, properties("ActiveState", "active"), []string{}}},
		{unitPathPrefix + "a_20b_2eservice", changed, []any{unitInterface, properties("ActiveState", "active"), []string{}}},
	} {
		fake.Emit(signal.path, signal.name, signal.values...)
	}
	// What comes after all of them is noticed, so all of them have been.
	fake.SetUnit(accounted("last.service", 3, all(9)))
	fake.EmitPropertiesChanged("last.service")
	s := sweepUntil(t, r, "a good signal is noticed", func(s *Sweep) bool { _, ok := s.seriesOf("last.service"); return ok })
	want(t, s, "good.service", all(7))
	if u := r.unitNamed("good.service"); u.Accounting != "on" || u.Invocation != id(1) {
		t.Errorf("the unit is %+v", u)
	}
	if len(s.State.Series) != 2 || fake.Stubs() != 0 {
		t.Errorf("series %+v; %d names were touched that are not there", s.State.Series, fake.Stubs())
	}
	h := r.systemd.Health()
	if h.Reloads != 0 || h.Reconnects != 0 {
		t.Errorf("%+v", h)
	}
	// The others are not even looked at: they cannot be about a metered unit.
	if h.Errors < 10 || h.BadNames < 3 {
		t.Errorf("bad signals were not counted: %+v", h)
	}
}

// TestRestartDuringSweep: the signals of a restart come late. The sweep finds
// the run gone, looks, and reads the new one.
func TestRestartDuringSweep(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	fake.SetUnit(accounted("b.service", 2, all(7)))
	r, _ := start(t, Config{Bus: fake.Address()})
	want(t, r.Sweep(t.Context()), "a.service", all(100))
	total := uint64(100)
	for i := 3; i < 6; i++ {
		fake.SetUnit(accounted("a.service", i, all(10)))
		total += 10
		s := r.Sweep(t.Context())
		want(t, s, "a.service", all(total))
		want(t, s, "b.service", all(7))
		if s.Partial {
			t.Error("the sweep is partial")
		}
	}
	fake.EmitPropertiesChanged("a.service") // the late signal changes nothing
	want(t, r.Sweep(t.Context()), "a.service", all(total))

	// Gone without a signal, and gone during the sweep.
	fake.Remove("a.service")
	for range 3 {
		s := r.Sweep(t.Context())
		want(t, s, "a.service", all(total)) // the last point, for a while
		if s.Partial {
			t.Error("the sweep is partial")
		}
	}
	if u := r.unitNamed("a.service"); u.Accounting != "" {
		t.Errorf("the unit is still known: %+v", u)
	}
	// And back, as another run.
	fake.SetUnit(accounted("a.service", 9, all(5)))
	fake.EmitUnitNew("a.service")
	s := sweepUntil(t, r, "it is noticed", func(*Sweep) bool { return r.unitNamed("a.service").Accounting == "on" })
	want(t, s, "a.service", all(total+5))
	if fake.Stubs() != 0 {
		t.Errorf("%d names were touched that are not there", fake.Stubs())
	}
}

// TestReloadFreezes: during a reload, UnitRemoved comes for each unit, and
// nothing is gone.
func TestReloadFreezes(t *testing.T) {
	fake := systemdtest.StartFake(t)
	names := []string{"a.service", "b.service", "c.scope"}
	for i, name := range names {
		fake.SetUnit(accounted(name, i+1, all(100)))
	}
	fake.SetUnit(accounted("gone.service", 9, all(3)))
	r, _ := start(t, Config{Bus: fake.Address()})
	r.Sweep(t.Context())
	lists := fake.Calls("ListUnitsByPatterns")
	fake.EmitReloading(true)
	for _, name := range names {
		fake.EmitUnitRemoved(name)
	}
	fake.Remove("gone.service") // this one really goes
	fake.EmitUnitRemoved("gone.service")
	for _, name := range names {
		fake.EmitUnitNew(name)
	}
	fake.SetUnit(accounted("a.service", 1, all(150)))
	for range 3 {
		s := r.Sweep(t.Context())
		for _, name := range names[1:] {
			want(t, s, name, all(100))
		}
		want(t, s, "a.service", all(150))
	}
	fake.EmitReloading(false)
	systemdtest.Eventually(t, "the units are listed again", func() bool { return fake.Calls("ListUnitsByPatterns") > lists })
	systemdtest.Eventually(t, "the reload is counted", func() bool { return r.systemd.Health().Reloads == 1 })
	for range 2 {
		s := r.Sweep(t.Context())
		want(t, s, "a.service", all(150))
		want(t, s, "b.service", all(100))
	}
	systemdtest.Eventually(t, "what is gone is forgotten", func() bool {
		r.Sweep(t.Context())
		return r.unitNamed("gone.service").Accounting == ""
	})
	// Outside of a reload, UnitRemoved means what it says.
	fake.Remove("b.service")
	fake.EmitUnitRemoved("b.service")
	systemdtest.Eventually(t, "a removed unit is forgotten", func() bool { return r.unitNamed("b.service").Accounting == "" })
	if h := r.systemd.Health(); h.Reloads != 1 || r.ledger.Resets() != 0 || h.Errors != 0 {
		t.Errorf("%+v", h)
	}
}

// TestNameOwnerChanged: systemd that comes back is listed and subscribed to
// anew, and no unit is at fault meanwhile.
func TestNameOwnerChanged(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	r, l := start(t, Config{Bus: fake.Address()})
	want(t, r.Sweep(t.Context()), "a.service", all(100))
	fake.SetUnit(accounted("a.service", 1, all(130)))
	fake.SetUnit(accounted("b.service", 2, all(5)))
	fake.Restart()
	s := sweepUntil(t, r, "the new unit is listed", func(s *Sweep) bool { _, ok := s.seriesOf("b.service"); return ok })
	want(t, s, "a.service", all(130))
	systemdtest.Eventually(t, "it subscribes again", func() bool { return fake.Calls("Subscribe") == 2 })
	fake.SetUnit(accounted("c.service", 3, all(6)))
	fake.EmitUnitNew("c.service")
	sweepUntil(t, r, "signals come again", func(s *Sweep) bool { _, ok := s.seriesOf("c.service"); return ok })
	if h := r.systemd.Health(); h.Reexecs != 1 || h.Reloads != 0 || h.Reconnects != 0 {
		t.Errorf("%+v", h)
	}
	l.only(t, 0, "WARN")
}

func TestReconnect(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	fake.SetUnit(accounted("b.service", 2, all(100)))
	r, l := start(t, Config{Bus: fake.Address()})
	first := want(t, r.Sweep(t.Context()), "a.service", all(100))
	for i := range 2 {
		fake.KillBus()
		s := sweepUntil(t, r, "the loss is noticed", func(s *Sweep) bool { return s.Partial })
		none(t, s, "a.service")
		systemdtest.Eventually(t, "it has tried again", func() bool { return r.systemd.Health().Reconnects >= int64(2*i+2) })
		l.only(t, i+1, "WARN", "lost the connection to systemd; trying again")
		grown := uint64(200 + 100*i)
		fake.SetUnit(accounted("a.service", 1, all(grown))) // counts on meanwhile
		fake.SetUnit(accounted("b.service", 3+i, all(7)))   // restarts meanwhile
		fake.StartBus()
		s = sweepUntil(t, r, "it has recovered", func(s *Sweep) bool { return !s.Partial })
		if got := want(t, s, "a.service", all(grown)); !got.Start.Equal(first.Start) {
			t.Errorf("the series starts at %v, not at %v", got.Start, first.Start)
		}
		want(t, s, "b.service", all(107+7*uint64(i)))
		l.only(t, i+1, "INFO", "connected to systemd again")
	}
	l.only(t, 2, "WARN")
}

// TestStubStorm: systemd announces a unit that comes and goes each time that
// somebody touches a name that is not there. Were the answer to touch it, that
// would never end.
func TestStubStorm(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	r, _ := start(t, Config{Bus: fake.Address()})
	want(t, r.Sweep(t.Context()), "a.service", all(100))
	const storm = 2000
	began := time.Now()
	for i := range storm {
		name := fmt.Sprintf("ghost-%d.service", i%10)
		fake.EmitUnitNew(name)
		fake.EmitUnitRemoved(name)
	}
	fake.EmitUnitNew("ghost.mount")
	// Sweeps go on all the time, and what is real is still noticed.
	fake.SetUnit(accounted("b.service", 2, all(5)))
	fake.EmitUnitNew("b.service")
	s := sweepUntil(t, r, "a real unit is noticed", func(s *Sweep) bool { _, ok := s.seriesOf("b.service"); return ok })
	want(t, s, "a.service", all(100))
	var gets, lists int
	systemdtest.Eventually(t, "without anything new there are no calls more", func() bool {
		gets, lists = fake.Calls("Get"), fake.Calls("ListUnitsByPatterns")
		time.Sleep(2 * (250 * time.Millisecond)) // in which a loop would go on
		return fake.Calls("Get") == gets && fake.Calls("ListUnitsByPatterns") == lists
	})
	if most := 3 + int(time.Since(began)/(250*time.Millisecond)); lists > most {
		t.Errorf("%d units that come and go made %d lists, want at most %d", storm, lists, most)
	}
	if fake.Stubs() > 0 {
		t.Errorf("%d units that come and go had %d names touched", storm, fake.Stubs())
	}
	if len(s.State.Series) != 2 {
		t.Errorf("series %+v", s.State.Series)
	}
}

// TestSweepDeadline: what is late has no point in this sweep and is whole in the
// next one; late replies are not taken for new ones.
func TestSweepDeadline(t *testing.T) {
	fake := systemdtest.StartFake(t)
	const units = 40
	for i := range units {
		fake.SetUnit(accounted(fmt.Sprintf("u%d.service", i), i+1, all(100)))
	}
	r, l := start(t, Config{Bus: fake.Address()})
	hasty, _ := start(t, Config{Bus: fake.Address(), SweepTimeout: 100 * time.Millisecond})
	r.Sweep(t.Context())
	for i := range units {
		fake.SetUnit(accounted(fmt.Sprintf("u%d.service", i), i+1, all(200)))
	}
	slow := dbus.ObjectPath(unitPathPrefix + id(units/2))
	fake.OnGet(func(path dbus.ObjectPath, _, property string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		if path != slow || property != "IPEgressBytes" {
			return dbus.Variant{}, nil, 0, false
		}
		return dbus.MakeVariant(uint64(150)), nil, 600 * time.Millisecond, true
	})
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	s := r.Sweep(short)
	if !s.Partial || short.Err() == nil {
		t.Errorf("partial: %v, after %v", s.Partial, s.Duration)
	}
	for i := range units {
		name := fmt.Sprintf("u%d.service", i)
		if i+1 == units/2 {
			none(t, s, name)
		} else if got, ok := s.seriesOf(name); ok && got.Total != all(200) {
			t.Errorf("%s has the total %+v", name, got.Total)
		}
	}
	fake.OnGet(nil)
	for range 3 {
		s = r.Sweep(t.Context())
		for i := range units {
			want(t, s, fmt.Sprintf("u%d.service", i), all(200))
		}
		if s.Partial {
			t.Error("the next sweep is partial too")
		}
		time.Sleep(200 * time.Millisecond) // for the late reply to come within this loop
	}
	if h := r.systemd.Health(); r.partial != 1 || r.ledger.Resets() != 0 || h.Errors != 0 {
		t.Errorf("%+v", h)
	}
	l.only(t, 1, "WARN") // that it was late

	// Never an answer: the sweep ends all the same, and so does one whose own
	// context is over.
	fake.OnGet(func(dbus.ObjectPath, string, string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		return dbus.Variant{}, nil, systemdtest.NoReply, true
	})
	if s := hasty.Sweep(t.Context()); !s.Partial {
		t.Error("a sweep without any answer is not partial")
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if s := r.Sweep(over); !s.Partial {
		t.Error("a sweep with a context that is over is not partial")
	}
}

// held makes the fake wait with the counters of its units until release is called.
func held(fake *systemdtest.Fake) (release func()) {
	gate := make(chan struct{})
	fake.OnGet(func(dbus.ObjectPath, string, string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		<-gate
		return dbus.Variant{}, nil, 0, false
	})
	return sync.OnceFunc(func() { close(gate) })
}

// waiting says how many calls wait for the sweep under way.
func (r *Receiver) waiting() int {
	r.sweeping.Lock()
	defer r.sweeping.Unlock()
	if r.shared == nil {
		return 0
	}
	return r.shared.waiting
}

// TestSweepIsShared: calls that come together get one sweep, and one of them that
// gives up takes nothing from the others, be it the one that began the sweep.
func TestSweepIsShared(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	r, _ := start(t, Config{Bus: fake.Address()})
	release := held(fake)
	defer release()
	hasty, giveUp := context.WithCancel(t.Context())
	gave := make(chan *Sweep)
	go func() { gave <- r.Sweep(hasty) }()
	systemdtest.Eventually(t, "one call has begun", func() bool { return r.waiting() == 1 })
	var sweeps [8]*Sweep
	var all8 sync.WaitGroup
	for i := range sweeps {
		all8.Go(func() { sweeps[i] = r.Sweep(t.Context()) })
	}
	systemdtest.Eventually(t, "all of them wait", func() bool { return r.waiting() == 1+len(sweeps) })
	giveUp()
	if s := <-gave; !s.Partial || len(s.State.Series) != 0 {
		t.Errorf("who gave up has %+v", s)
	}
	release()
	all8.Wait()
	for _, s := range sweeps {
		want(t, s, "a.service", all(100))
		if s != sweeps[0] || s.Partial || r.Last() != s {
			t.Errorf("one has the sweep %p, partial %v; another %p; Last is %p", s, s.Partial, sweeps[0], r.Last())
		}
	}
	if r.partial != 0 {
		t.Errorf("%d sweeps count as partial", r.partial)
	}
}

// TestSweepAfterOneCutShort: nobody gets the rest of a sweep that was given up.
func TestSweepAfterOneCutShort(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	r, _ := start(t, Config{Bus: fake.Address()})
	over, cancel := context.WithCancel(t.Context())
	cancel()
	ending := &shared{done: make(chan struct{})}
	r.shared = ending
	if s := r.Sweep(over); !s.Partial {
		t.Error("a call that is over has a whole sweep")
	}
	got := make(chan *Sweep)
	go func() { got <- r.Sweep(t.Context()) }()
	r.sweeping.Lock()
	r.shared = nil
	r.sweeping.Unlock()
	close(ending.done)
	want(t, <-got, "a.service", all(100))
}

// TestConcurrentUse gives the race detector all methods at once, while units
// come, change and go.
func TestConcurrentUse(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("steady.service", 1, all(1)))
	r, _ := start(t, Config{Bus: fake.Address(), SystemBus: fake.Address(), MaxSeries: 5})
	reader := sdkmetric.NewManualReader()
	if err := r.Register(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)).Meter("test")); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var users sync.WaitGroup
	use := func(f func()) {
		users.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					f()
				}
			}
		})
	}
	use(func() { r.Sweep(t.Context()) })
	use(func() {
		var collected metricdata.ResourceMetrics
		if err := reader.Collect(t.Context(), &collected); err != nil {
			t.Error(err)
		}
	})
	use(func() { r.Units() })
	use(func() {
		if s := r.Last(); s != nil {
			for series, attributes := range s.All() {
				_, _ = series.Total, attributes.Receive.Len()
			}
		}
	})
	for i := range 200 {
		name := fmt.Sprintf("u%d.service", i%7)
		fake.SetUnit(accounted(name, 100+i, all(uint64(i))))
		fake.EmitUnitNew(name)
		fake.EmitPropertiesChanged(name)
		if i%3 == 0 {
			fake.Remove(name)
			fake.EmitUnitRemoved(name)
		}
		if i%50 == 49 {
			fake.EmitReloading(true)
			fake.EmitReloading(false)
		}
	}
	close(done)
	users.Wait()
	want(t, r.Sweep(t.Context()), "steady.service", all(1))
}

// TestStateContinues: a Receiver that is given the state of another goes on
// exactly where that one stood.
func TestStateContinues(t *testing.T) {
	fake := systemdtest.StartFake(t)
	cfg := Config{
		Bus: fake.Address(), BootID: "boot-1", UnitType: true, UnitSlice: true, Fold: []string{"fold-*.service"}, MaxSeries: 4,
		Include: []string{"same.service", "new.service", "gone.service", "fold-*", "over-*", "init.scope"},
	}
	perpetual := accounted("init.scope", 0, all(70))
	perpetual.InvocationID = ""
	fake.SetUnit(perpetual)
	fake.SetUnit(accounted("same.service", 1, all(100)))
	fake.SetUnit(accounted("new.service", 2, all(100)))
	fake.SetUnit(accounted("fold-1.service", 4, all(10)))
	fake.SetUnit(accounted("fold-2.service", 5, all(20)))
	first, _ := start(t, cfg)
	sweepUntil(t, first, "the first are read", func(s *Sweep) bool { return len(s.State.Runs) == 5 })
	// These three are too many: they share the overflow series.
	for i, name := range []string{"gone.service", "over-1.service", "over-2.service"} {
		fake.SetUnit(accounted(name, 6+i, all(1)))
		fake.EmitUnitNew(name)
	}
	s := sweepUntil(t, first, "all are read", func(s *Sweep) bool { return len(s.State.Runs) == 8 })
	before := s.State
	wantAll := func(s *Sweep, totals map[string]uint64) {
		t.Helper()
		for name, total := range totals {
			got := want(t, s, name, all(total))
			i := slices.IndexFunc(before.Series, func(s ledger.Series) bool { return s.Name == name })
			if i >= 0 && !got.Start.Equal(before.Series[i].Start) {
				t.Errorf("%q starts at %v, it did at %v", name, got.Start, before.Series[i].Start)
			}
		}
	}
	wantAll(s, map[string]uint64{"same.service": 100, "new.service": 100, "fold-*.service": 30, "init.scope": 70, "": 3})

	// Meanwhile nobody looks.
	perpetual.IngressBytes, perpetual.IngressPackets, perpetual.EgressBytes, perpetual.EgressPackets = 75, 75, 75, 75
	fake.SetUnit(perpetual)
	fake.SetUnit(accounted("same.service", 1, all(130)))
	fake.SetUnit(accounted("new.service", 12, all(40))) // less than before
	fake.SetUnit(accounted("fold-1.service", 4, all(11)))
	fake.Remove("fold-2.service")
	fake.SetUnit(accounted("fold-3.service", 13, all(5)))
	fake.Remove("gone.service")
	fake.SetUnit(accounted("over-1.service", 7, all(10)))
	fake.SetUnit(accounted("over-2.service", 14, all(10)))
	cfg.State = before
	second, _ := start(t, cfg)
	after := map[string]uint64{"same.service": 130, "new.service": 140, "fold-*.service": 36, "init.scope": 75, "": 22}
	s = sweepUntil(t, second, "all are read", func(s *Sweep) bool { return !s.Partial })
	wantAll(s, after)
	for range 3 {
		wantAll(second.Sweep(t.Context()), after)
	}

	// A reboot: all runs are new, whatever their ids say.
	cfg.State, cfg.BootID = second.Sweep(t.Context()).State, "boot-2"
	perpetual.IngressBytes, perpetual.IngressPackets, perpetual.EgressBytes, perpetual.EgressPackets = 80, 80, 80, 80
	fake.SetUnit(perpetual)
	fake.SetUnit(accounted("same.service", 21, all(150)))
	fake.SetUnit(accounted("new.service", 22, all(60)))
	fake.Remove("fold-1.service")
	fake.Remove("fold-3.service")
	fake.SetUnit(accounted("fold-4.service", 23, all(4)))
	fake.SetUnit(accounted("over-1.service", 24, all(1)))
	fake.SetUnit(accounted("over-2.service", 25, all(1)))
	third, _ := start(t, cfg)
	rebooted := map[string]uint64{"same.service": 280, "new.service": 200, "fold-*.service": 40, "init.scope": 155, "": 24}
	for range 3 {
		wantAll(third.Sweep(t.Context()), rebooted)
	}
	if n := third.ledger.Resets(); n != 0 {
		t.Errorf("a reboot is no reset: %d", n)
	}

	// The states that were given are as they were.
	if !maps.Equal(totals(before), map[string]Counters{
		"same.service": all(100), "new.service": all(100), "fold-*.service": all(30), "init.scope": all(70), "": all(3),
	}) {
		t.Errorf("the first state has become %+v", totals(before))
	}
}

// totals are the totals of the units' series of a state, by name, with that of
// the overflow under "".
func totals(s ledger.State) map[string]Counters {
	m := map[string]Counters{}
	for one := range s.All() {
		if one.Kind != ledger.Unattributed {
			m[one.Name] = systemdCounters(one.Total)
		}
	}
	return m
}

// TestStateOutlastsAnOutage: systemd is away when the agent starts. The run is not taken for a new one afterwards.
func TestStateOutlastsAnOutage(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	first, _ := start(t, Config{Bus: fake.Address()})
	state := first.Sweep(t.Context()).State
	fake.KillBus()
	second, _ := unstarted(t, Config{Bus: fake.Address(), State: state})
	systemdtest.Eventually(t, "it has tried", func() bool { return second.systemd.Health().Reconnects > 0 })
	for range 2 {
		if s := second.Sweep(t.Context()); !s.Partial || len(s.State.Runs) != 1 || s.State.Series[0].Total != ledgerAll(100) {
			t.Fatalf("without systemd the state has become %+v", s.State)
		}
	}
	fake.SetUnit(accounted("a.service", 1, all(110)))
	fake.StartBus()
	want(t, sweepUntil(t, second, "it is connected", func(s *Sweep) bool { return !s.Partial }), "a.service", all(110))
}

// TestFoldIsExact: whatever units come, grow, restart and vanish, between
// sweeps or under one's eyes, the fold and the overflow series have all that
// was shown.
func TestFoldIsExact(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	fake := systemdtest.StartFake(t)
	type truth struct {
		invocation  int
		count, read uint64 // what systemd counts, and what the last sweep saw of it
	}
	units := map[string]*truth{}
	invocations := 0
	set := func(name string, u *truth) {
		units[name] = u
		fake.SetUnit(accounted(name, u.invocation, all(u.count)))
	}
	come := func(name string) {
		invocations++
		set(name, &truth{invocation: invocations, count: uint64(random.IntN(1000))})
	}
	// These two and the fold are as many series as there may be: the rest
	// overflows.
	steady := []string{"a.service", "b.service", "fold-0.service"}
	for _, name := range steady {
		come(name)
	}
	r, _ := start(t, Config{Bus: fake.Address(), Fold: []string{"fold-*.service"}, MaxSeries: len(steady)})
	r.Sweep(t.Context())
	for _, u := range units {
		u.read = u.count
	}
	seriesName := func(unit string) string {
		switch {
		case strings.HasPrefix(unit, "fold-"):
			return "fold-*.service"
		case slices.Contains(steady, unit):
			return unit
		}
		return ""
	}
	closed := map[string]uint64{} // by series: of the runs that are over, what was seen
	for round := range 80 {
		for range random.IntN(6) {
			name := fmt.Sprintf([]string{"over-%d.service", "fold-%d.service"}[random.IntN(2)], random.IntN(8))
			if random.IntN(4) == 0 {
				name = steady[random.IntN(len(steady))]
			}
			u, ok := units[name]
			switch what := random.IntN(4); {
			case ok && what == 0: // grows: nothing tells
				u.count += uint64(random.IntN(1000))
				set(name, u)
			case ok && what == 1 && !slices.Contains(steady, name): // goes
				closed[seriesName(name)] += u.read
				delete(units, name)
				fake.Remove(name)
				fake.EmitUnitRemoved(name)
			default: // comes, or restarts
				if ok {
					closed[seriesName(name)] += u.read
				}
				come(name)
				fake.EmitPropertiesChanged(name)
			}
		}
		sweepUntil(t, r, "the inventory is up to date", func(*Sweep) bool {
			known := r.Units()
			return len(known) == len(units) && !slices.ContainsFunc(known, func(k systemd.Unit) bool {
				u := units[k.Name]
				return u == nil || k.Accounting != "on" || k.Invocation != id(u.invocation)
			})
		})
		s := r.Sweep(t.Context())
		sums := maps.Clone(closed)
		for name, u := range units {
			u.read = u.count
			sums[seriesName(name)] += u.read
		}
		for name, sum := range sums {
			got, ok := s.seriesOf(name)
			if !ok || got.Total != all(sum) {
				t.Fatalf("round %d: %q has %+v (%v), want %d", round, name, got.Total, ok, sum)
			}
		}
		if n := len(totals(s.State)); n > len(steady)+1 {
			t.Fatalf("round %d: %d series", round, n)
		}
	}
}

func TestIncludeExclude(t *testing.T) {
	fake := systemdtest.StartFake(t)
	for i, name := range []string{
		"nginx.service", "nginx@1.service", "nginx.socket", "sshd.service", "home.mount", "a.swap", "session-1.scope", "run-1.service",
		"a.timer", "a.target", "system.slice", `odd\x2dname.service`,
	} {
		fake.SetUnit(accounted(name, i+1, all(1)))
	}
	for _, test := range []struct {
		name  string
		cfg   Config
		names []string // of the series
	}{
		{"defaults", Config{}, []string{
			"a.swap", "home.mount", "nginx.service", "nginx.socket", "nginx@1.service", `odd\x2dname.service`, "run-*.service", "session-*.scope", "sshd.service",
		}},
		{"include", Config{Include: []string{"nginx*"}}, []string{"nginx.service", "nginx.socket", "nginx@1.service"}},
		{"two includes", Config{Include: []string{"nginx.*", "sshd.service"}}, []string{"nginx.service", "nginx.socket", "sshd.service"}},
		{"exclude", Config{Exclude: []string{"nginx*", "*.mount", "*.swap", "run-*", "session-*"}}, []string{`odd\x2dname.service`, "sshd.service"}},
		{"exclude wins", Config{Include: []string{"nginx*"}, Exclude: []string{"*.socket"}}, []string{"nginx.service", "nginx@1.service"}},
		{"a backslash is a backslash", Config{Include: []string{`odd\x2d*`}}, []string{`odd\x2dname.service`}},
		{"types", Config{Types: []string{"socket", "scope"}}, []string{"nginx.socket", "session-*.scope"}},
		{"slices", Config{Types: []string{"slice"}}, []string{"system.slice"}},
		{"no fold", Config{Include: []string{"run-*", "session-*"}, Fold: []string{}}, []string{"run-1.service", "session-1.scope"}},
		{"fold of our own", Config{Include: []string{"nginx*"}, Fold: []string{"nginx@*.service", "nginx*"}}, []string{"nginx*", "nginx@*.service"}},
		{"nothing", Config{Include: []string{"none"}}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.cfg.Bus = fake.Address()
			r, _ := start(t, test.cfg)
			got := slices.Sorted(maps.Keys(totals(r.Sweep(t.Context()).State)))
			if !slices.Equal(got, test.names) {
				t.Errorf("the series are %q, want %q", got, test.names)
			}
			// The same by signals.
			for _, name := range []string{"nginx.service", "sshd.service", "a.timer"} {
				fake.EmitPropertiesChanged(name)
				fake.EmitUnitNew(name)
			}
			again := slices.Sorted(maps.Keys(totals(r.Sweep(t.Context()).State)))
			if !slices.Equal(again, test.names) {
				t.Errorf("after signals the series are %q, want %q", again, test.names)
			}
		})
	}
	if fake.Stubs() != 0 {
		t.Errorf("%d names were touched that are not there", fake.Stubs())
	}
}

// TestPoints collects through the SDK: names, units, attributes and values.
func TestPoints(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, counted(11, 12, 13, 14)))
	off := accounted("off.service", 2, all(systemdtest.NoData))
	off.Accounting = false
	fake.SetUnit(off)
	fake.SetUnit(accounted("b.socket", 3, all(systemdtest.NoData)))
	r, _ := start(t, Config{Bus: fake.Address(), UnitType: true, UnitSlice: true, HostName: "h"})
	reader := sdkmetric.NewManualReader()
	if err := r.Register(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)).Meter("test")); err != nil {
		t.Fatal(err)
	}
	collect := func(ctx context.Context) map[string]metricdata.Metrics {
		t.Helper()
		var collected metricdata.ResourceMetrics
		if err := reader.Collect(ctx, &collected); err != nil {
			t.Fatal(err)
		}
		metrics := map[string]metricdata.Metrics{}
		for _, m := range collected.ScopeMetrics[0].Metrics {
			metrics[m.Name] = m
		}
		return metrics
	}
	collect(t.Context())
	metrics := collect(t.Context())
	for _, i := range Instruments() {
		m, ok := metrics[i.Name]
		if !ok {
			if !slices.Contains([]string{UnattributedName, WireIOName, WirePacketCountName}, i.Name) { // no slice, no eBPF
				t.Errorf("%s has no point", i.Name)
			}
			continue
		}
		if m.Unit != i.Unit || m.Description != i.Description {
			t.Errorf("%s is in %q: %q", m.Name, m.Unit, m.Description)
		}
		delete(metrics, i.Name)
		if i.Name == IOName || i.Name == PacketCountName {
			sum, ok := m.Data.(metricdata.Sum[int64])
			if !ok || !sum.IsMonotonic || sum.Temporality != metricdata.CumulativeTemporality {
				t.Errorf("%s is %T", m.Name, m.Data)
			}
			wanted := map[string]int64{"receive": 11, "transmit": 13}
			if i.Name == PacketCountName {
				wanted = map[string]int64{"receive": 12, "transmit": 14}
			}
			for _, p := range sum.DataPoints {
				direction, _ := p.Attributes.Value("network.io.direction")
				set := attribute.NewSet(attribute.String("host.name", "h"), attribute.String("systemd.unit.name", "a.service"),
					attribute.String("systemd.unit.type", "service"), attribute.String("systemd.unit.slice", "system.slice"),
					attribute.String("network.io.direction", direction.AsString()))
				if p.Attributes != set || p.Value != wanted[direction.AsString()] {
					t.Errorf("%s has the point %v %d", m.Name, p.Attributes.ToSlice(), p.Value)
				}
				delete(wanted, direction.AsString())
			}
			if len(wanted) > 0 {
				t.Errorf("%s has no point for %v", m.Name, wanted)
			}
		}
		if i.Name == "unitmeter.units" {
			states := map[string]int64{}
			for _, p := range m.Data.(metricdata.Gauge[int64]).DataPoints {
				state, _ := p.Attributes.Value("unitmeter.accounting.state")
				states[state.AsString()] = p.Value
			}
			if !maps.Equal(states, map[string]int64{"unknown": 0, "on": 1, "off": 1, "no_data": 1, "lost": 0, "failed": 0}) {
				t.Errorf("the units are %v", states)
			}
		}
	}
	if s := r.Last(); s.Units != 3 || s.Accounted != 1 {
		t.Errorf("the sweep has %d of %d units, want 1 of 3", s.Accounted, s.Units)
	}
	if len(metrics) > 0 {
		t.Errorf("these instruments are not in the list: %v", slices.Collect(maps.Keys(metrics)))
	}

	// A sweep that is cut short does not cost the collection.
	fake.OnGet(func(dbus.ObjectPath, string, string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
		return dbus.Variant{}, nil, systemdtest.NoReply, true
	})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var collected metricdata.ResourceMetrics
	_ = reader.Collect(ctx, &collected) // the SDK may tell of the context
	fake.OnGet(nil)
	if h := r.systemd.Health(); r.partial != 1 {
		t.Errorf("%+v", h)
	}
}

// TestNewRefuses: a setting that cannot be meant is refused with its name, its
// value and the next step.
func TestNewRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		cfg  Config
		want []string
	}{
		"include":             {Config{Include: []string{"a["}}, []string{`"a["`, "use *, ?"}},
		"include, the second": {Config{Include: []string{"a", "[]b"}}, []string{`"[]b"`, "use *, ?"}},
		"empty include":       {Config{Include: []string{""}}, []string{`""`, "use *, ?"}},
		"exclude":             {Config{Exclude: []string{"[a-"}}, []string{`"[a-"`, "use *, ?"}},
		"exclude, range":      {Config{Exclude: []string{"[b-a]"}}, []string{`"[b-a]"`, "use *, ?"}},
		"fold":                {Config{Fold: []string{"[^"}}, []string{`"[^"`, "use *, ?"}},
		"empty fold":          {Config{Fold: []string{"a*", ""}}, []string{`""`, "use *, ?"}},
		"type":                {Config{Types: []string{"timer"}}, []string{`"timer"`, "use any of service"}},
		"type with a dot":     {Config{Types: []string{".service"}}, []string{`".service"`, "use any of"}},
		"type in capitals":    {Config{Types: []string{"service", "Socket"}}, []string{`"Socket"`, "use any of"}},
		"empty type":          {Config{Types: []string{""}}, []string{`""`, "use any of"}},
		"stop records":        {Config{StopRecords: "always"}, []string{`"always"`, "use"}},
		"negative limit":      {Config{MaxSeries: -1}, []string{"-1", "use 0"}},
		"negative timeout":    {Config{SweepTimeout: -time.Second}, []string{"-1s", "use 0"}},
		"stop records, case":  {Config{StopRecords: "Auto"}, []string{`"Auto"`, "use"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := New(test.cfg)
			if err == nil {
				t.Fatalf("New took it: %+v", r.cfg)
			}
			for _, text := range test.want {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("the error %q has no %q", err, text)
				}
			}
		})
	}
}

// TestBusRefuses: an address that leads nowhere is told with the next step,
// once, and tried again.
func TestBusRefuses(t *testing.T) {
	garbage := systemdtest.StartGarbage(t, []byte("\xff\xfe\x00garbage that is no D-Bus message at all"))
	for name, test := range map[string]struct{ bus, want string }{
		"no address":     {"somewhere", "only unix: addresses"},
		"another kind":   {"tcp:host=localhost,port=1", "only unix: addresses"},
		"nobody there":   {"unix:path=" + t.TempDir() + "/none", "no such file"},
		"a bad escape":   {"unix:path=/%gg", "not two hex digits"},
		"garbage speaks": {garbage, "malformed message"},
	} {
		t.Run(name, func(t *testing.T) {
			r, l := unstarted(t, Config{Bus: test.bus})
			systemdtest.Eventually(t, "it has tried again", func() bool { return r.systemd.Health().Reconnects >= 2 })
			l.only(t, 1, "WARN", "lost the connection to systemd; trying again", test.want)
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			if err := r.Ready(ctx); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Ready returned %v", err)
			}
			if s := r.Sweep(t.Context()); !s.Partial || len(s.State.Series) > 0 {
				t.Errorf("the sweep is %+v", s)
			}
		})
	}
}

// TestStateOfOtherSettings: a run that the settings leave out for a while is
// none to be counted anew when they ask for it again.
func TestStateOfOtherSettings(t *testing.T) {
	fake := systemdtest.StartFake(t)
	fake.SetUnit(accounted("a.service", 1, all(100)))
	fake.SetUnit(accounted("system.slice", 2, all(500)))
	var state ledger.State
	cycle := func(cfg Config) *Sweep {
		t.Helper()
		cfg.Bus, cfg.State = fake.Address(), state
		r, _ := start(t, cfg)
		s := sweepUntil(t, r, "all are read", func(s *Sweep) bool { return !s.Partial })
		r.Sweep(t.Context())
		state = r.Sweep(t.Context()).State
		return s
	}
	want(t, cycle(Config{}), "a.service", all(100))
	cycle(Config{Exclude: []string{"a.*"}})
	fake.SetUnit(accounted("a.service", 1, all(130)))
	want(t, cycle(Config{}), "a.service", all(130))

	// A slice that is read for its balance only, and then for a series of its own.
	unattributed, _ := cycle(Config{}).seriesWith(ledger.ID{Kind: ledger.Unattributed, Name: "system.slice"})
	fake.SetUnit(accounted("system.slice", 2, all(507)))
	s := cycle(Config{Types: []string{"service", "slice"}})
	want(t, s, "system.slice", all(7))
	if got, _ := s.seriesWith(ledger.ID{Kind: ledger.Unattributed, Name: "system.slice"}); got.Total != unattributed.Total {
		t.Errorf("unattributed are %v, they were %v", got.Total, unattributed.Total)
	}
}

// TestSwitchDuringReading: accounting is switched off and on between the replies
// for packets and those for bytes. Packets of before count once.
func TestSwitchDuringReading(t *testing.T) {
	for name, sweeps := range map[string]int{"busy": 1, "idle": 3} {
		t.Run(name, func(t *testing.T) {
			fake := systemdtest.StartFake(t)
			fake.SetUnit(accounted("a.service", 1, all(100)))
			r, _ := start(t, Config{Bus: fake.Address()})
			for range sweeps {
				want(t, r.Sweep(t.Context()), "a.service", all(100))
			}
			fake.SetUnit(accounted("a.service", 1, all(110)))
			var packets atomic.Int32
			fake.OnGet(func(_ dbus.ObjectPath, _, property string) (dbus.Variant, *dbus.Error, time.Duration, bool) {
				switch {
				case !strings.HasSuffix(property, "Packets"):
					return dbus.MakeVariant(uint64(3)), nil, 0, strings.HasSuffix(property, "Bytes")
				case packets.Add(1) <= 2:
					return dbus.Variant{}, nil, 0, false
				}
				return dbus.MakeVariant(uint64(3)), nil, 0, true
			})
			// What came between the last reading and the switch, nobody can know whole.
			for range 3 {
				want(t, r.Sweep(t.Context()), "a.service", all(103))
			}
			if n := r.ledger.Resets(); n != 1 {
				t.Errorf("%d resets, want 1", n)
			}
		})
	}
}

// TestSwitchedOnUnderChurn: a unit whose accounting is switched on is asked again
// also where other units restart all the time.
func TestSwitchedOnUnderChurn(t *testing.T) {
	fake := systemdtest.StartFake(t)
	off := accounted("off.service", 1, all(systemdtest.NoData))
	off.Accounting = false
	fake.SetUnit(off)
	fake.SetUnit(accounted("churn.service", 2, all(1)))
	r, _ := start(t, Config{Bus: fake.Address()})
	none(t, r.Sweep(t.Context()), "off.service")
	fake.SetUnit(accounted("off.service", 1, all(0)))
	var s *Sweep
	for i := range recheckEvery {
		fake.SetUnit(accounted("churn.service", 3+i, all(1))) // no signal tells
		s = r.Sweep(t.Context())
	}
	want(t, s, "off.service", all(0))
}
