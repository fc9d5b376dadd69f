package config

import (
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/unitmeter/unitmeter/receiver"
	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// unitTypes are the types that have IP counters (org.freedesktop.systemd1(5)).
func unitTypes() []string { return append(receiver.DefaultTypes(), "slice") }

// parseGlobs reads a comma list of patterns for unit names.
func parseGlobs(text string, bad report) []string {
	var out []string
	for _, pattern := range splitList(text, bad) {
		if reason, hint := checkGlob(pattern); reason != "" {
			bad(fmt.Sprintf("%q %s", shorten(pattern), reason), hint)
			continue
		}
		pattern = systemd.FullName(pattern)
		if !slices.Contains(out, pattern) {
			out = append(out, pattern)
		}
	}
	return out
}

// checkGlob says why a pattern can match no unit that has IP counters.
func checkGlob(pattern string) (reason, hint string) {
	if strings.HasPrefix(pattern, "/") {
		return "is a path", "use the unit's name; 'systemd-escape -p --suffix=mount PATH' gives that of a mount"
	}
	for _, r := range pattern {
		if !isAlnum(r) && !strings.ContainsRune(`:-_.\@*?[]^!`, r) {
			return fmt.Sprintf("contains %q, which no unit name does", r), "use a name as 'systemctl list-units' shows it"
		}
	}
	if strings.Contains(pattern, `\\`) {
		return `contains two backslashes in a row, which no unit name does`, `write one backslash, as in dev-disk\x2d1.swap`
	}
	if _, err := systemd.ParsePatterns([]string{pattern}); err != nil {
		return "has a [ without its ], or an empty []", "use *, ?, [a-z] and [!a-z], as in nginx*.service"
	}
	if len(pattern) > 255 {
		return "is longer than a unit name can be (255)", "use * for a part of it"
	}
	return checkSuffix(pattern)
}

// checkSuffix looks at what follows the last wildcard, or at the whole name.
func checkSuffix(pattern string) (reason, hint string) {
	wild := strings.LastIndexAny(pattern, "*?]")
	tail := pattern[wild+1:]
	if tail == "" && wild >= 0 {
		return "", ""
	}
	for _, t := range unitTypes() {
		stem, typed := strings.CutSuffix(tail, "."+t)
		if wild >= 0 && (typed || strings.HasSuffix("."+t, tail)) || stem != "" && typed {
			return "", ""
		}
	}
	if wild < 0 && slices.Contains(unitTypes(), strings.TrimPrefix(pattern, ".")) {
		return "has no name before its type", "write *." + strings.TrimPrefix(pattern, ".") + " for all of that type"
	}
	dot := strings.LastIndexByte(tail, '.')
	suffix := tail[dot+1:]
	if dot >= 0 && slices.Contains([]string{"timer", "target", "path", "device", "automount"}, suffix) {
		return "is of a type that has no network counters", "use " + strings.Join(unitTypes(), ", ")
	}
	if dot >= 0 {
		if guess := Nearest(suffix, unitTypes(), 2); guess != "" {
			return "does not end in a type of unit", "did you mean ." + guess + "?"
		}
	}
	if wild < 0 {
		return "", "" // to systemctl it is a service too
	}
	return "does not end in a type of unit", "end it in *, or in a type such as .service"
}

// finishUnits warns of what the other variables leave no effect.
func (l *loader) finishUnits() {
	r := &l.cfg.Receiver
	for _, option := range []struct {
		name, what string
		on         bool
	}{
		{"UNITMETER_USER_UNITS", "units of users' managers", r.UserUnits},
		{"UNITMETER_CONTAINERS", "containers", r.Containers},
		{"UNITMETER_WIRE", "what is on the wire", r.Wire},
		{"UNITMETER_ATTRIBUTES", "unitmeter.loopback", r.Loopback},
	} {
		if s, set := l.given[option.name]; set && option.on && r.Source == receiver.DBus {
			l.warn(fmt.Sprintf("%s=%s has no effect: systemd does not count %s; set UNITMETER_SOURCE=ebpf, or remove it", s.name, shorten(s.shown), option.what))
		}
	}
	check := func(name string, patterns []string) {
		if _, set := l.given[name]; !set {
			return
		}
		for _, p := range patterns {
			suffix := p[strings.LastIndexByte(p, '.')+1:]
			if slices.Contains(unitTypes(), suffix) && !slices.Contains(l.cfg.Receiver.Types, suffix) {
				l.warn(fmt.Sprintf("%s has %s, and UNITMETER_UNIT_TYPES does not have %s", name, shorten(p), suffix))
			}
			if slices.Contains(l.cfg.Receiver.Exclude, p) {
				l.warn(fmt.Sprintf("%s has %s, and so does UNITMETER_EXCLUDE, which wins", name, shorten(p)))
			}
		}
	}
	check("UNITMETER_INCLUDE", l.cfg.Receiver.Include)
	check("UNITMETER_FOLD", l.cfg.Receiver.Fold)
}

// parseBus reads UNITMETER_BUS.
func parseBus(text string, bad report) string {
	choices := []string{"auto", "system", "private"}
	if lower := strings.ToLower(text); slices.Contains(choices, lower) {
		return lower
	}
	if !strings.Contains(text, ":") {
		hint := "use auto, system, private, or an address such as unix:path=/run/dbus/system_bus_socket"
		if guess := Nearest(strings.ToLower(text), choices, 2); guess != "" {
			hint = "did you mean " + guess + "?"
		} else if strings.HasPrefix(text, "/") {
			hint = "write unix:path=" + shorten(text)
		}
		bad("neither a kind of bus nor a D-Bus address", hint)
		return ""
	}
	return parseBusAddress(text, bad)
}

// parseBusAddress checks a D-Bus address (D-Bus specification, "Server
// Addresses"): a list, of which the agent takes the unix sockets.
func parseBusAddress(text string, bad report) string {
	const hint = "use an address such as unix:path=/run/dbus/system_bus_socket"
	usable := false
	for address := range strings.SplitSeq(text, ";") {
		rest, ok := strings.CutPrefix(strings.TrimSpace(address), "unix:")
		if !ok {
			continue
		}
		sockets := 0
		for pair := range strings.SplitSeq(rest, ",") {
			key, value, _ := strings.Cut(pair, "=")
			socket, err := url.PathUnescape(value)
			if err != nil {
				bad("has a '%' that is not followed by two hexadecimal digits", "write '%' as %25")
				return ""
			}
			if key == "path" && !path.IsAbs(socket) {
				bad("the path of the socket is not absolute", hint)
				return ""
			}
			if (key == "path" || key == "abstract") && socket != "" {
				sockets++
			}
		}
		if sockets != 1 {
			bad("a unix address needs one of path= and abstract=", hint)
			return ""
		}
		usable = true
	}
	if !usable {
		bad("names no unix socket, and no other kind is supported", hint)
		return ""
	}
	return text
}
