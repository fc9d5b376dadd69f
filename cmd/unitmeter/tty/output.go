package tty

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// IsTerminal reports whether a file is a terminal: only a terminal has a mode
// (tty_ioctl(4)); other character devices, such as /dev/null, have none.
func IsTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), getTermios)
	return err == nil
}

// WriteJSON writes a value as indented JSON. Control characters in its texts are
// escaped in JSON's own way, so that the value stays the same.
func WriteJSON(w io.Writer, v any) error {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b) // escapes C0 and the line separators itself
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(v); err != nil {
		return err
	}
	var out strings.Builder
	for _, r := range b.String() {
		if r != '\n' && control(r) {
			fmt.Fprintf(&out, `\u%04x`, r)
		} else {
			out.WriteRune(r)
		}
	}
	_, err := io.WriteString(w, out.String())
	return err
}

// Table writes rows of cells in columns.
type Table struct {
	w     io.Writer
	right bool
	width int // of the terminal, 0 if it is none
	rows  [][]string
	drop  [][]string
}

// NewTable begins a table with a header. With right, the cells are aligned to the
// right, except for those of the last column.
func NewTable(w io.Writer, right bool, header ...string) *Table {
	t := &Table{w: w, right: right, rows: [][]string{header}}
	if f, ok := w.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			t.width = int(size.Col)
		}
	}
	return t
}

// Drop names the columns to leave out together, one group after the other, where the
// terminal is too narrow. A file or a pipe gets them all.
func (t *Table) Drop(groups ...[]string) { t.drop = groups }

// Row adds a row with a cell for each column. Each cell is cleaned.
func (t *Table) Row(cells ...string) {
	row := make([]string, len(cells))
	for i, cell := range cells {
		row[i] = Clean(cell)
	}
	t.rows = append(t.rows, row)
}

// Flush writes the table. Its error is that of all writes.
func (t *Table) Flush() error {
	for _, group := range t.drop {
		if t.width == 0 || t.needs() <= t.width {
			break
		}
		for _, column := range group {
			if i := slices.Index(t.rows[0], column); i >= 0 {
				for j, row := range t.rows {
					t.rows[j] = slices.Concat(row[:i], row[i+1:])
				}
			}
		}
	}
	var flags uint
	if t.right {
		flags = tabwriter.AlignRight
	}
	tab := tabwriter.NewWriter(t.w, 0, 8, 2, ' ', flags)
	for _, row := range t.rows {
		last := len(row) - 1
		text := strings.Join(row, "\t")
		if t.right && last > 0 {
			text = strings.Join(row[:last], "\t") + "\t " + row[last] // outside of the columns: no padding but this
		}
		_, _ = io.WriteString(tab, text+"\n")
	}
	return tab.Flush()
}

// needs is how wide the table is.
func (t *Table) needs() int {
	last := len(t.rows[0]) - 1
	sum := 2 * last
	if t.right && last > 0 {
		sum++
	}
	for i := range t.rows[0] {
		widest := 0
		for _, row := range t.rows {
			widest = max(widest, utf8.RuneCountInString(row[i]))
		}
		sum += widest
	}
	return sum
}
