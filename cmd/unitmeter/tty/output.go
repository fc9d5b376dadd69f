package tty

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

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
	tab   *tabwriter.Writer
	right bool
}

// NewTable begins a table with a header. With right, the cells are aligned to the
// right, except for those of the last column.
func NewTable(w io.Writer, right bool, header ...string) *Table {
	t := &Table{right: right}
	flags := uint(0)
	if right {
		flags = tabwriter.AlignRight
	}
	t.tab = tabwriter.NewWriter(w, 0, 8, 2, ' ', flags)
	t.Row(header...)
	return t
}

// Row adds a row. Each cell is cleaned.
func (t *Table) Row(cells ...string) {
	for i, cell := range cells {
		switch {
		case i == 0:
		case i == len(cells)-1 && t.right:
			_, _ = io.WriteString(t.tab, "\t ") // the last cell is outside of the columns: no padding but this
		default:
			_, _ = io.WriteString(t.tab, "\t")
		}
		_, _ = io.WriteString(t.tab, Clean(cell))
	}
	_, _ = io.WriteString(t.tab, "\n")
}

// Flush writes the table. Its error is that of all writes.
func (t *Table) Flush() error { return t.tab.Flush() }
