// Package tty writes text for people: on terminals, in tables, on status lines.
//
// Outside text is text that another program chose: the name of a unit, the
// message of a Collector, a field of a certificate. Terminals obey control
// characters in it, so each such text passes through Clean or Line before it is
// written. Table, Fit and WriteJSON do that themselves.
//
// All functions may be called concurrently; a Table belongs to one goroutine.
package tty

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// MaxText is the upper bound for the length of an outside text, in bytes, before
// its control characters are escaped.
const MaxText = 1 << 10

// Clean makes an outside text safe to print: control characters are escaped as Go
// does it (\x1b, \n, \u202e), after Cut.
func Clean(text string) string { return escape(Cut(text)) }

// Cut bounds the length of an outside text to MaxText, and a note of what it left
// out.
func Cut(text string) string {
	if len(text) <= MaxText {
		return text
	}
	end := MaxText
	for end > MaxText-utf8.UTFMax && !utf8.RuneStart(text[end]) {
		end--
	}
	return fmt.Sprintf("%s ... (%d bytes more)", text[:end], len(text)-end)
}

// Line is the text of an error, cleaned, in one line. Semicolons separate joined
// errors.
func Line(err error) string {
	return Clean(strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; "))
}

// escape escapes the control characters of a text.
func escape(text string) string {
	if !strings.ContainsFunc(text, control) {
		return text
	}
	var b strings.Builder
	for i, r := range text {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], "\uFFFD"): // a byte that is no UTF-8
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case r == 0x7f || r >= 0x80 && r < 0xa0:
			fmt.Fprintf(&b, `\x%02x`, r)
		case control(r):
			quoted := strconv.QuoteRuneToASCII(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// control reports whether a terminal may obey a character or hide text behind it:
// C0, DEL, C1, line separators and the controls of bidirectional text (Unicode
// TR9). Bytes that are no UTF-8 count too: a terminal may read them as C1.
func control(r rune) bool {
	switch {
	case r < 0x20, r >= 0x7f && r < 0xa0, r == utf8.RuneError:
		return true
	case r == 0x061c, r == 0x200e, r == 0x200f, r >= 0x2028 && r <= 0x202e, r >= 0x2066 && r <= 0x2069:
		return true
	}
	return false
}

// Wrap breaks a text into lines at spaces. No line is wider than width characters,
// except for a word that is wider by itself, such as an address to copy. All
// lines but the first begin with indent spaces; width includes them.
func Wrap(text string, indent, width int) string {
	var b strings.Builder
	column := indent
	for word := range strings.FieldsSeq(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case column == indent:
		case column+1+n > width:
			fmt.Fprintf(&b, "\n%*s", indent, "")
			column = indent
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += n
	}
	return b.String()
}

// Fit cleans a text and makes it exactly width characters wide, with spaces behind
// it, or before it where right is true. An ellipsis marks a text that was cut.
// Each character must have width one.
func Fit(text string, width int, right bool) string {
	width = max(width, 0)
	runes := []rune(Clean(text))
	switch missing := width - len(runes); {
	case missing < 0 && width > 1:
		return string(runes[:width-1]) + "…"
	case missing < 0:
		return string(runes[:width])
	case right:
		return strings.Repeat(" ", missing) + string(runes)
	default:
		return string(runes) + strings.Repeat(" ", missing)
	}
}

// Bytes writes a number of bytes with three digits and a decimal unit, as in
// 1.23 MB. Below 1 kB it is exact.
func Bytes(v float64) string {
	units := []string{"B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB"}
	i := 0
	// 999.5 and not 1000: it would be rounded to 1000 kB.
	for v >= 999.5 && i < len(units)-1 {
		v /= 1000
		i++
	}
	decimals := 0
	switch {
	case i == 0:
	case v < 9.995:
		decimals = 2
	case v < 99.95:
		decimals = 1
	}
	return strconv.FormatFloat(v, 'f', decimals, 64) + " " + units[i]
}

// Grouped writes a whole number in groups of three digits.
func Grouped(n uint64) string {
	text := strconv.FormatUint(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// ShellWord quotes a word for a command to be copied, if a shell would change it, such
// as the backslashes of escaped unit names.
func ShellWord(word string) string {
	if strings.Contains(word, `\`) {
		return "'" + word + "'"
	}
	return word
}
