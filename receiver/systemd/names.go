package systemd

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// CounterInterface returns the D-Bus interface that has IPAccounting and the IP
// counters of a unit type such as "service", or "" for a type without.
func CounterInterface(unitType string) string {
	switch unitType {
	case "service":
		return "org.freedesktop.systemd1.Service"
	case "scope":
		return "org.freedesktop.systemd1.Scope"
	case "slice":
		return "org.freedesktop.systemd1.Slice"
	case "socket":
		return "org.freedesktop.systemd1.Socket"
	case "mount":
		return "org.freedesktop.systemd1.Mount"
	case "swap":
		return "org.freedesktop.systemd1.Swap"
	}
	return ""
}

// TypeOf returns the type of a unit: what follows the last dot of its name.
func TypeOf(unit string) string {
	return unit[strings.LastIndexByte(unit, '.')+1:]
}

// ValidUnitName reports whether systemd could have such a unit (systemd.unit(5):
// at most 255 characters of the alphabet below, a non-empty prefix and a type).
func ValidUnitName(name string) bool {
	const alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@"
	dot := strings.LastIndexByte(name, '.')
	return dot > 0 && name[0] != '@' && dot < len(name)-1 && len(name) <= 255 && strings.Trim(name, alphabet) == "" &&
		strings.IndexFunc(name, func(r rune) bool { return !strings.ContainsRune(alphabet, r) }) < 0
}

// Patterns is a list of unit name patterns with the wildcards of path.Match. A
// backslash stands for itself, as in the names of units.
type Patterns []string

func ParsePatterns(patterns []string) (Patterns, error) {
	out := make(Patterns, 0, len(patterns))
	for _, p := range patterns {
		escaped := strings.ReplaceAll(p, `\`, `\\`)
		if _, err := path.Match(escaped, ""); err != nil || p == "" {
			return nil, fmt.Errorf("parse unit pattern %q: it is not a pattern; use *, ? and [a-z], as in nginx*.service", p)
		}
		out = append(out, escaped)
	}
	return out, nil
}

// Index returns the position of the first pattern that matches, or -1.
func (g Patterns) Index(name string) int {
	return slices.IndexFunc(g, func(p string) bool {
		ok, _ := path.Match(p, name) // the pattern was checked by ParsePatterns
		return ok
	})
}
