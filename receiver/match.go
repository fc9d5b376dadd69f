package receiver

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// DefaultTypes are the unit types that a Receiver meters. Slices are not among
// them, since a slice contains the traffic of the units in it; the others are
// disjoint.
func DefaultTypes() []string {
	return []string{"service", "scope", "socket", "mount", "swap"}
}

// defaultFold are the patterns of units that live once and never come back
// under the same name. Each pattern is one series.
func defaultFold() []string {
	return []string{
		"run-*.service", "run-*.scope", "session-*.scope",
		"docker-*.scope", "libpod-*.scope", "nerdctl-*.scope", "cri-containerd-*.scope", "crio-*.scope",
	}
}

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

// typeOf returns the type of a unit: what follows the last dot of its name.
func typeOf(unit string) string {
	return unit[strings.LastIndexByte(unit, '.')+1:]
}

// validUnitName reports whether systemd could have such a unit (systemd.unit(5):
// at most 255 characters of the alphabet below, a non-empty prefix and a type).
func validUnitName(name string) bool {
	const alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@"
	dot := strings.LastIndexByte(name, '.')
	return dot > 0 && name[0] != '@' && dot < len(name)-1 && len(name) <= 255 && strings.Trim(name, alphabet) == "" &&
		strings.IndexFunc(name, func(r rune) bool { return !strings.ContainsRune(alphabet, r) }) < 0
}

// globs is a list of unit name patterns with the wildcards of path.Match. A
// backslash stands for itself, as in the names of units.
type globs []string

func parseGlobs(patterns []string) (globs, error) {
	out := make(globs, 0, len(patterns))
	for _, p := range patterns {
		escaped := strings.ReplaceAll(p, `\`, `\\`)
		if _, err := path.Match(escaped, ""); err != nil || p == "" {
			return nil, fmt.Errorf("parse unit pattern %q: it is not a pattern; use *, ? and [a-z], as in nginx*.service", p)
		}
		out = append(out, escaped)
	}
	return out, nil
}

// index returns the position of the first pattern that matches, or -1.
func (g globs) index(name string) int {
	return slices.IndexFunc(g, func(p string) bool {
		ok, _ := path.Match(p, name) // the pattern was checked by parseGlobs
		return ok
	})
}
