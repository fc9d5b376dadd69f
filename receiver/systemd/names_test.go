package systemd

import (
	"strings"
	"testing"
)

func TestGlobs(t *testing.T) {
	for _, test := range []struct {
		patterns []string
		name     string
		index    int
	}{
		{nil, "a.service", -1},
		{[]string{"*"}, "a.service", 0},
		{[]string{"a.service"}, "a.service", 0},
		{[]string{"a.service"}, "b.service", -1},
		{[]string{"a.service"}, "aXservice", -1},
		{[]string{"b*", "a*"}, "a.service", 1},
		{[]string{"a*", "a.*"}, "a.service", 0},
		{[]string{"nginx*.service"}, "nginx@1.service", 0},
		{[]string{"nginx*.service"}, "nginx.socket", -1},
		{[]string{"?.service"}, "a.service", 0},
		{[]string{"?.service"}, "ab.service", -1},
		{[]string{"[a-c].service"}, "b.service", 0},
		{[]string{"[^a-c].service"}, "b.service", -1},
		{[]string{"run-*.scope"}, "run-r0123.scope", 0},
		{[]string{"session-*.scope"}, "session-c2.scope", 0},
		// A backslash is part of many unit names and stands for itself.
		{[]string{`a\x2db.mount`}, `a\x2db.mount`, 0},
		{[]string{`a\x2d*.mount`}, `a\x2db.mount`, 0},
		{[]string{`a\*`}, `a\b.service`, 0},
		{[]string{`a\*`}, `a*`, -1},
		{[]string{"A*"}, "a.service", -1},
		// As in fnmatch(3).
		{[]string{"[!a-c].service"}, "b.service", -1},
		{[]string{"[!a-c].service"}, "d.service", 0},
		{[]string{"[]a].service"}, "a.service", 0},
		{[]string{"[!]a].service"}, "a.service", -1},
		{[]string{"[a-].service"}, "-.service", 0},
		{[]string{`[\x]2d.service`}, `\2d.service`, 0},
		{[]string{"[[:digit:]].service"}, "7.service", 0},
		{[]string{"*"}, "no/unit", 0}, // of a cgroup
	} {
		g, err := ParsePatterns(test.patterns)
		if err != nil {
			t.Errorf("ParsePatterns(%q): %v", test.patterns, err)
			continue
		}
		if got := g.Index(test.name); got != test.index {
			t.Errorf("%q matches %q at %d, want %d", test.name, test.patterns, got, test.index)
		}
	}
}

func TestFullName(t *testing.T) {
	for name, want := range map[string]string{
		"nginx": "nginx.service", "php8.2-fpm": "php8.2-fpm.service", "a.b.c": "a.b.c.service", "a.service": "a.service",
		"tmp.mount": "tmp.mount", "x.timer": "x.timer", "nginx*": "nginx*", "[ab].service": "[ab].service", "service": "service.service", "": "",
	} {
		if got := FullName(name); got != want {
			t.Errorf("%q is completed to %q, want %q", name, got, want)
		}
	}
}

// FuzzGlobs: a pattern that was accepted can be matched against any name.
func FuzzGlobs(f *testing.F) {
	for _, p := range []string{"*", "a[", "[]a]", "[a-", "[^]", `[\]`, `a\`, "[-]", "[]", "?*?", `[a\-z]`} {
		f.Add(p, "a.service")
	}
	f.Fuzz(func(t *testing.T, pattern, name string) {
		g, err := ParsePatterns([]string{pattern})
		if err != nil {
			if !strings.Contains(err.Error(), "use *, ?") {
				t.Fatalf("the error names no next step: %v", err)
			}
			return
		}
		if !strings.ContainsAny(pattern, "*?[") && (g.Index(name) == 0) != (pattern == name) {
			t.Fatalf("%q matches %q: %v", pattern, name, g.Index(name) == 0)
		}
	})
}

func TestCounterInterfaces(t *testing.T) {
	for _, kind := range []string{"service", "scope", "socket", "mount", "swap", "slice"} {
		want := "org.freedesktop.systemd1." + strings.ToUpper(kind[:1]) + kind[1:]
		if got := CounterInterface(kind); got != want {
			t.Errorf("CounterInterface(%q) = %q, want %q", kind, got, want)
		}
	}
	for _, kind := range []string{"", "timer", "target", "device", "path", "automount", "Service"} {
		if got := CounterInterface(kind); got != "" {
			t.Errorf("CounterInterface(%q) = %q, want none", kind, got)
		}
	}
}
