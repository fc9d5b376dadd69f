package systemd

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/godbus/dbus/v5"
)

// The paths are systemd's own, as `busctl tree org.freedesktop.systemd1` and
// bus_label_escape (test-bus-util.c) show them.
func TestUnitPath(t *testing.T) {
	for name, label := range map[string]string{
		"dbus.service":                    "dbus_2eservice",
		"-.slice":                         "_2d_2eslice",
		"init.scope":                      "init_2escope",
		"getty@tty1.service":              "getty_40tty1_2eservice",
		"1password.service":               "_31password_2eservice",
		"9p2000.mount":                    "_39p2000_2emount",
		"a9.mount":                        "a9_2emount",
		`dev-disk-by\x2duuid-a.swap`:      "dev_2ddisk_2dby_5cx2duuid_2da_2eswap",
		`systemd-fsck@dev-a\x2db.service`: "systemd_2dfsck_40dev_2da_5cx2db_2eservice",
		"under_score.service":             "under_5fscore_2eservice",
		"colon:x.socket":                  "colon_3ax_2esocket",
		"ABCxyz.service":                  "ABCxyz_2eservice",
		"run-rdeadbeef.scope":             "run_2drdeadbeef_2escope",
	} {
		want := unitPathPrefix + label
		if got := unitPath(name); got != want {
			t.Errorf("unitPath(%q) = %q, want %q", name, got, want)
		}
		if !dbus.ObjectPath(want).IsValid() {
			t.Errorf("%q is not an object path", want)
		}
		if got := unitOfPath(want); got != name {
			t.Errorf("unitOfPath(%q) = %q, want %q", want, got, name)
		}
	}
}

func TestUnitOfPathRefuses(t *testing.T) {
	for _, path := range []string{
		"", "/", "/org/freedesktop/systemd1", "/org/freedesktop/systemd1/unit",
		"/org/freedesktop/systemd1/job/1", "/org/freedesktop/systemd1/units/a",
		unitPathPrefix, unitPathPrefix + "a_", unitPathPrefix + "a_2", unitPathPrefix + "a_zz",
		unitPathPrefix + "a_2eservice_", unitPathPrefix + "_",
	} {
		if got := unitOfPath(path); got != "" {
			t.Errorf("unitOfPath(%q) = %q, want none", path, got)
		}
	}
}

func FuzzUnitPath(f *testing.F) {
	for _, s := range []string{"dbus.service", `a\x2db.mount`, "1.scope", "\xff\x00", "_", "é.service"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		path := unitPath(name)
		if name != "" && !dbus.ObjectPath(path).IsValid() {
			t.Fatalf("unitPath(%q) = %q is not an object path", name, path)
		}
		if got := unitOfPath(path); got != name {
			t.Fatalf("%q came back as %q", name, got)
		}
		_ = unitOfPath(unitPathPrefix + name) // any label: no panic
		_ = meteredPath(name)
	})
}

func TestMeteredPath(t *testing.T) {
	for path, want := range map[string]bool{
		unitPath("a.service"): true, unitPath("a.scope"): true, unitPath("a.socket"): true,
		unitPath("a.mount"): true, unitPath("a.swap"): true, unitPath("a.slice"): true,
		unitPath("a.device"): false, unitPath("a.target"): false, unitPath("a.timer"): false,
		unitPath("a.service.device"): false, unitPath("a.device.service"): true,
		invocationPath("0123456789abcdef0123456789abcdef"): true,
		"": true, "/": true,
	} {
		if got := meteredPath(path); got != want {
			t.Errorf("meteredPath(%q) = %v", path, got)
		}
	}
}

func TestValidUnitName(t *testing.T) {
	long := strings.Repeat("a", 255-len(".service")) + ".service"
	for _, name := range []string{
		"a.service", "a", `a\x2db.mount`, "getty@tty1.service", "-.slice", "a.b.c.scope", "A:9_-.socket", long,
		"dbus-:1.2-org.freedesktop.problems@0.service", "system-serial\\x2dgetty.slice",
	} {
		want := name != "a"
		if ValidUnitName(name) != want {
			t.Errorf("ValidUnitName(%q) = %v", name, !want)
		}
	}
	for _, name := range []string{
		"", ".", ".service", "a.", "service", "@.service", "@tty1.service",
		"a b.service", "a/b.service", "a\x00.service", "a\n.service", "é.service", "a\xff.service", "a.serv ice",
		"a*.service", "a'.service", "a%.service", "a+b.service", "a" + long,
	} {
		if ValidUnitName(name) {
			t.Errorf("ValidUnitName(%q) = true", name)
		}
	}
}

func FuzzValidUnitName(f *testing.F) {
	f.Add("a.service")
	f.Add("a\xc3.service")
	f.Fuzz(func(t *testing.T, name string) {
		if ValidUnitName(name) && (len(name) > 255 || !utf8.ValidString(name) || strings.ContainsAny(name, "/ \x00\n%\"'*?[")) {
			t.Fatalf("%q passed for a unit name", name)
		}
	})
}
