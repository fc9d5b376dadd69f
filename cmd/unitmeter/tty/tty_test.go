package tty

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestClean(t *testing.T) {
	for text, want := range map[string]string{
		"nats.service":                 "nats.service",
		`a\x2db.mount`:                 `a\x2db.mount`,
		"Müller, 100 µs":               "Müller, 100 µs",
		"a\x1b]0;owned\a\rb":           `a\x1b]0;owned\a\rb`,
		"one\ntwo\tthree\x00\x7f":      `one\ntwo\tthree\x00\x7f`,
		"C1 \u009b31m":                 `C1 \x9b31m`,
		"raw \x9b31m":                  `raw \x9b31m`,
		"bidi \u202egpj\u2066\u200f":   `bidi \u202egpj\u2066\u200f`,
		strings.Repeat("x", MaxText):   strings.Repeat("x", MaxText),
		strings.Repeat("x", MaxText+1): strings.Repeat("x", MaxText) + " ... (1 bytes more)",
	} {
		if got := Clean(text); got != want {
			t.Errorf("Clean(%q) = %q, want %q", text, got, want)
		}
	}
	if got := Cut(strings.Repeat("é", MaxText)); !utf8.ValidString(got) {
		t.Errorf("a character is cut in two: %q", got[MaxText-4:])
	}
}

func FuzzClean(f *testing.F) {
	f.Add("\x1b[31m\xff\u202e")
	f.Fuzz(func(t *testing.T, text string) {
		clean := Clean(text)
		if i := strings.IndexFunc(clean, control); i >= 0 || !utf8.ValidString(clean) {
			t.Errorf("Clean(%q) = %q", text, clean)
		}
	})
}

func TestWriteJSON(t *testing.T) {
	value := []string{"a\x1b]0;b\x7f", "c\u009b\u202ed", "é<>"}
	var out bytes.Buffer
	if err := WriteJSON(&out, value); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsFunc(strings.ReplaceAll(out.String(), "\n", ""), control) {
		t.Errorf("control characters in %q", &out)
	}
	var got []string
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || strings.Join(got, " ") != strings.Join(value, " ") {
		t.Errorf("%q became %q, %v", value, got, err)
	}
}

func TestTable(t *testing.T) {
	for width, want := range map[int]string{
		0:  "  IN B/S   SINCE UNIT\n    1200  12\\n00 a.service\n       -         b.service\n",
		26: "  IN B/S   SINCE UNIT\n    1200  12\\n00 a.service\n       -         b.service\n",
		25: "  IN B/S UNIT\n    1200 a.service\n       - b.service\n",
		17: "UNIT\na.service\nb.service\n",
	} {
		var out bytes.Buffer
		tab := NewTable(&out, true, "IN B/S", "SINCE", "UNIT")
		tab.width = width
		tab.Drop([]string{"SINCE"}, []string{"absent", "IN B/S"})
		tab.Row("1200", "12\n00", "a.service")
		tab.Row("-", "", "b.service")
		if err := tab.Flush(); err != nil || out.String() != want {
			t.Errorf("%d wide: got %v\n%s\nwant\n%s", width, err, &out, want)
		}
	}
}

func TestWrap(t *testing.T) {
	if got, want := Wrap("aa bb  cc https://a.very/long/one d", 2, 8), "aa bb\n  cc\n  https://a.very/long/one\n  d"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestBytes(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0 B", 0.4: "0 B", 999: "999 B", 999.4: "999 B", 999.5: "1.00 kB", 1000: "1.00 kB", 9994: "9.99 kB", 9995: "10.0 kB",
		99949: "99.9 kB", 99950: "100 kB", 999499: "999 kB", 999500: "1.00 MB", 1.234e9: "1.23 GB", 9.2e18: "9.20 EB", 1e25: "10000 ZB",
	} {
		if got := Bytes(v); got != want {
			t.Errorf("Bytes(%v) = %q, want %q", v, got, want)
		}
	}
	if got := Bits(12_345_678); got != "12.3 Mbit" {
		t.Errorf("Bits has %q", got)
	}
	for v, want := range map[uint64]string{0: "0", 999: "999", 1000: "1,000", 123456: "123,456", 1234567: "1,234,567", 1<<64 - 1: "18,446,744,073,709,551,615"} {
		if got := Grouped(v); got != want {
			t.Errorf("Grouped(%d) = %q, want %q", v, got, want)
		}
	}
}
