package systemd

import (
	"fmt"
	"regexp"
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

// FullName completes the name of a unit as systemctl does: one without a type is
// that of a service, whatever dots it has. Patterns stay.
func FullName(name string) string {
	types := []string{"service", "socket", "target", "device", "mount", "automount", "swap", "timer", "path", "slice", "scope"}
	if name == "" || IsPattern(name) || strings.Contains(name, ".") && slices.Contains(types, TypeOf(name)) {
		return name
	}
	return name + ".service"
}

// IsPattern reports whether a name has wildcards.
func IsPattern(name string) bool { return strings.ContainsAny(name, "*?[") }

// Patterns is a list of unit name patterns. They mean what they mean to systemctl:
// *, ?, [a-z] and [!a-z] (fnmatch(3) with FNM_NOESCAPE), and a backslash stands for
// itself, as in the names of units.
type Patterns struct {
	texts    []string
	compiled []*regexp.Regexp
}

// ParsePatterns reads patterns. The error names the one that is none.
func ParsePatterns(patterns []string) (Patterns, error) {
	p := Patterns{texts: slices.Clone(patterns)}
	for _, text := range patterns {
		compiled, err := regexp.Compile(expression(text))
		if err != nil || text == "" {
			return Patterns{}, fmt.Errorf("parse unit pattern %q: it is not a pattern; use *, ?, [a-z] and [!a-z], as in nginx*.service", text)
		}
		p.compiled = append(p.compiled, compiled)
	}
	return p, nil
}

// bracket returns the set that a pattern begins with as that of a regular expression,
// and its length.
func bracket(pattern string) (set string, n int) {
	var b strings.Builder
	b.WriteByte('[')
	i := 1
	if i < len(pattern) && (pattern[i] == '!' || pattern[i] == '^') {
		b.WriteByte('^')
		i++
	}
	for first := i; i < len(pattern); i++ {
		switch c := pattern[i]; {
		case c == ']' && i > first: // one that comes first is a member
			return b.String() + "]", i + 1
		case strings.HasPrefix(pattern[i:], "[:") && strings.Contains(pattern[i:], ":]"): // [:digit:]
			end := i + strings.Index(pattern[i:], ":]") + 2
			b.WriteString(pattern[i:end])
			i = end - 1
		case c == '-':
			b.WriteByte(c)
		default:
			b.WriteString(regexp.QuoteMeta(pattern[i : i+1]))
		}
	}
	return "[", i // without its ]
}

// Len returns how many patterns there are.
func (p Patterns) Len() int { return len(p.texts) }

// Texts returns the patterns as they were written.
func (p Patterns) Texts() []string { return p.texts }

// Index returns the position of the first pattern that matches, or -1.
func (p Patterns) Index(name string) int {
	return slices.IndexFunc(p.compiled, func(r *regexp.Regexp) bool { return r.MatchString(name) })
}

// All returns the positions of all patterns that match.
func (p Patterns) All(name string) (all []int) {
	for i, r := range p.compiled {
		if r.MatchString(name) {
			all = append(all, i)
		}
	}
	return all
}

// Match returns the first pattern that matches, or "".
func (p Patterns) Match(name string) string {
	if i := p.Index(name); i >= 0 {
		return p.texts[i]
	}
	return ""
}

// Named returns the patterns with other names in place of those that are names of
// units, where own has one.
func (p Patterns) Named(own map[string]string) Patterns {
	p.compiled = slices.Clone(p.compiled)
	for i, text := range p.texts {
		if name, ok := own[text]; ok {
			p.compiled[i] = regexp.MustCompile("^" + regexp.QuoteMeta(name) + "$")
		}
	}
	return p
}

// expression returns a pattern as a regular expression. That of a [ without its ] is
// not valid.
func expression(pattern string) string {
	var b strings.Builder
	b.WriteString("(?s)^")
	for i := 0; i < len(pattern); i++ {
		switch c := pattern[i]; c {
		case '*':
			b.WriteString(".*")
		case '?':
			b.WriteByte('.')
		case '[':
			set, n := bracket(pattern[i:])
			b.WriteString(set)
			i += n - 1
		default:
			b.WriteString(regexp.QuoteMeta(pattern[i : i+1]))
		}
	}
	return b.String() + "$"
}
