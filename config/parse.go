package config

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const day = 24 * time.Hour

// boolean is a row for a boolean. The specification knows the words true and false
// only, so that yes and 1 are mistakes and not truths.
func boolean(v Variable, to *bool) entry {
	v.Values, v.Default = "true, false", "false"
	return entry{Variable: v, parse: func(text string, bad report) {
		switch strings.ToLower(text) {
		case "true":
			*to = true
		case "false":
			*to = false
		default:
			bad("not a truth value", "use true or false")
		}
	}}
}

// yesNo is a row for what is on or off.
func yesNo(v Variable, to *bool) entry {
	v.Values, v.Default = "yes, no", "no"
	return entry{Variable: v, parse: func(text string, bad report) { *to = choose(text, []string{"yes", "no"}, bad) == "yes" }}
}

// enum is a row for one of a few words.
func enum(v Variable, to *string, choices ...string) entry {
	v.Values = strings.Join(choices, ", ")
	return entry{Variable: v, parse: func(text string, bad report) { *to = choose(text, choices, bad) }}
}

// choose returns the choice that text is, in whatever case ("Enum").
func choose(text string, choices []string, bad report) string {
	lower := strings.ToLower(text)
	if !slices.Contains(choices, lower) {
		bad("unknown value", oneOf(lower, choices))
		return ""
	}
	return lower
}

// splitList cuts a comma list. An empty item is a mistake: most often a value
// that was cut off, or a variable that expanded to nothing.
func splitList(text string, bad report) []string {
	items := strings.Split(text, ",")
	for i, item := range items {
		items[i] = strings.TrimSpace(item)
		if items[i] == "" {
			bad(fmt.Sprintf("item %d of the list is empty", i+1), "remove the extra comma")
			return nil
		}
	}
	return items
}

// parseChoices reads a comma list of words. Duplicates count once.
func parseChoices(text string, choices []string, bad report) []string {
	var out []string
	for _, item := range splitList(text, bad) {
		lower := strings.ToLower(item)
		if !slices.Contains(choices, lower) {
			bad(fmt.Sprintf("unknown value %q", shorten(item)), oneOf(lower, choices))
			continue
		}
		if !slices.Contains(out, lower) {
			out = append(out, lower)
		}
	}
	return out
}

func parseExporters(text string, bad report) []string {
	choices := []string{"otlp", "console", "prometheus", "none"}
	for item := range strings.SplitSeq(text, ",") {
		if strings.EqualFold(strings.TrimSpace(item), "logging") {
			bad("logging is a deprecated name", "use console")
			return nil
		}
	}
	out := parseChoices(text, choices, bad)
	if !slices.Contains(out, "none") {
		return out
	}
	if len(out) > 1 {
		bad("none does not go with other exporters", "use none alone, or remove it")
	}
	return nil
}

// whole is a row for a whole number from low to high.
func whole(v Variable, to *int, low, high int) entry {
	v.Values = fmt.Sprintf("%d to %d", low, high)
	return entry{Variable: v, parse: func(text string, bad report) {
		if n, ok := parseWhole(text, int64(low), int64(high), "a whole number", bad); ok {
			*to = int(n)
		}
	}}
}

// milliseconds is a row for a time in the way of the specification. 0 would be
// no limit for a timeout; an agent that waits without limit is one that hangs,
// so 0 is refused as it is for an interval.
func milliseconds(v Variable, to *time.Duration) entry {
	v.Values = "milliseconds, 1 to 2147483647"
	return entry{Variable: v, parse: func(text string, bad report) {
		if d, err := time.ParseDuration(text); err == nil && d >= time.Millisecond {
			bad("has a unit", fmt.Sprintf("write %d, which is in milliseconds", d.Milliseconds()))
			return
		}
		if n, ok := parseWhole(text, 1, math.MaxInt32, "a number of milliseconds without a unit,", bad); ok {
			*to = time.Duration(n) * time.Millisecond
		}
	}}
}

func inMilliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

func parseWhole(text string, low, high int64, what string, bad report) (int64, bool) {
	n, err := strconv.ParseInt(text, 10, 64)
	hint := fmt.Sprintf("use %s from %d to %d", what, low, high)
	digits := strings.TrimLeft(text, "+-")
	switch {
	case digits == "" || strings.Trim(digits, "0123456789") != "":
		bad("not a whole number", hint)
	case err != nil || n < low || n > high:
		bad("out of range", hint)
	default:
		return n, true
	}
	return 0, false
}

// duration is a row for one of the agent's own times, which have a unit.
// optional allows none, which is stored as -1.
func duration(v Variable, to *time.Duration, low, high time.Duration, optional bool) entry {
	v.Values = fmt.Sprintf("a time such as %s, %s to %s", v.Default, showTime(low), showTime(high))
	if optional {
		v.Values += "; or none"
	}
	return entry{Variable: v, parse: func(text string, bad report) {
		if optional && strings.EqualFold(text, "none") {
			*to = -1
			return
		}
		d, ok := parseTime(text)
		hint := fmt.Sprintf("use a number with a unit (s, m, h, d) from %s to %s", showTime(low), showTime(high))
		switch {
		case !ok:
			bad("not a time", hint)
		case d < low || d > high:
			bad("out of range", hint)
		default:
			*to = d
		}
	}}
}

// parseTime is time.ParseDuration with days: "7d", "1d12h".
func parseTime(text string) (time.Duration, bool) {
	before, after, found := strings.Cut(text, "d")
	if !found {
		d, err := time.ParseDuration(text)
		// A bare 0 is the one number that ParseDuration takes without a unit.
		return d, err == nil && text != "0"
	}
	days, err := strconv.ParseUint(before, 10, 32)
	if err != nil {
		return 0, false
	}
	var rest time.Duration
	if after != "" {
		if rest, err = time.ParseDuration(after); err != nil || rest < 0 {
			return 0, false
		}
	}
	// 50000 days are out of every range, and their sum with the rest of a day
	// does not overflow.
	return time.Duration(min(days, 50_000))*day + min(rest, 50_000*day), true
}

func showTime(d time.Duration) string {
	switch {
	case d >= day:
		return fmt.Sprintf("%dd", d/day)
	case d >= time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d >= time.Minute:
		return fmt.Sprintf("%dm", d/time.Minute)
	}
	return d.String()
}

// parseSize reads a number of bytes. Only units of 1024 are taken: MB would be
// read as one thing by some and another by others.
func parseSize(text string, low int64, bad report) int64 {
	digits := strings.TrimRight(text, "BKMGTbkmgti ")
	unit := strings.TrimSpace(text[len(digits):])
	shift, known := map[string]uint{"": 0, "b": 0, "kib": 10, "mib": 20, "gib": 30, "tib": 40}[strings.ToLower(unit)]
	const hint = "use a whole number with B, KiB, MiB, GiB or TiB, such as 256MiB"
	n, err := strconv.ParseUint(digits, 10, 63)
	switch {
	case digits == "" || strings.Trim(digits, "0123456789") != "":
		bad("not a size", hint)
	case !known:
		bad("the unit "+strconv.Quote(unit)+" is not known", hint)
	case err != nil || n > math.MaxInt64>>shift || int64(n)<<shift > 1<<50:
		bad("more than 1024TiB", "use what the disk can spare, such as 256MiB")
	case int64(n)<<shift < low:
		bad("less than 1MiB, which cannot hold one request", hint)
	default:
		return int64(n) << shift
	}
	return 0
}

// parseAttributes reads OTEL_RESOURCE_ATTRIBUTES as the SDK does
// (sdk/resource/env.go), and refuses what the SDK logs, mends or drops.
func (l *loader) parseAttributes(text string, bad report) map[string]string {
	out := make(map[string]string)
	for _, item := range splitList(text, bad) {
		key, value, found := strings.Cut(item, "=")
		key = strings.TrimSpace(key)
		value = strings.TrimSpace(value)
		leftover, leftoverHint := itemLeftover(value)
		decoded, err := url.PathUnescape(value)
		_, dup := out[key]
		switch {
		case !found:
			bad(fmt.Sprintf("%q has no '='", shorten(item)), "write key=value, and a comma in a value as %2C")
		case key == "":
			bad(fmt.Sprintf("%q has no key before '='", shorten(item)), "write key=value")
		case strings.ContainsFunc(key, unicode.IsSpace) || strings.Contains(key, "%"):
			bad(fmt.Sprintf("the key %q contains white space or '%%'", shorten(key)), "use a plain key such as deployment.environment.name")
		case leftover != "":
			bad(fmt.Sprintf("the value of %s %s", shorten(key), leftover), leftoverHint)
		case err != nil:
			bad(fmt.Sprintf("the value of %s has a '%%' that is not followed by two hexadecimal digits", shorten(key)), "write '%' as %25")
		case !utf8.ValidString(decoded):
			bad(fmt.Sprintf("the value of %s is not valid UTF-8 when decoded", shorten(key)), "encode the UTF-8 bytes of each character")
		case dup:
			bad(fmt.Sprintf("the key %s is there twice", shorten(key)), "keep one of them")
		default:
			out[key] = decoded
		}
	}
	return out
}

func parseListenHost(text string, bad report) string {
	host := strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")
	switch {
	case strings.Contains(text, "://") || strings.Contains(text, "/"):
		bad("a URL or a path", "use a host name or address alone, such as 0.0.0.0")
	case validHost(host):
		return host
	case strings.Contains(host, ":"):
		bad("not a host name or address", "put the port into OTEL_EXPORTER_PROMETHEUS_PORT")
	default:
		bad("not a host name or address", "use one such as localhost or 0.0.0.0")
	}
	return ""
}

// validHost accepts IP addresses and host names (RFC 1123, with the underscore
// that container networks have).
func validHost(host string) bool {
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	labels := strings.Split(strings.TrimSuffix(host, "."), ".")
	if len(host) > 253 {
		return false
	}
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.ContainsFunc(label, func(r rune) bool { return r != '-' && r != '_' && !isAlnum(r) }) {
			return false
		}
	}
	// 10.0.0.300 is a mistyped address and not a name.
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

func isAlnum(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
