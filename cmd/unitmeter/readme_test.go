package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/receiver"
)

var update = flag.Bool("update", false, "write the generated parts of the documentation")

// TestReadme checks that the parts of the README that say what the code does
// are what the code says.
func TestReadme(t *testing.T) {
	const name = "../../README.md"
	old, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	text := replaceBlock(t, string(old), "metrics", metricsTable())
	var out bytes.Buffer
	printHelp(&out)
	text = replaceBlock(t, text, "help", "```text\n"+out.String()+"```\n")
	text = replaceBlock(t, text, "conformance", conformanceTable(t))
	if text == string(old) {
		return
	}
	if !*update {
		t.Fatal("README.md is not current; run: go test ./cmd/unitmeter -run TestReadme -update")
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// replaceBlock puts new content between the two comments that mark a block.
func replaceBlock(t *testing.T, text, name, content string) string {
	t.Helper()
	before, rest, ok := strings.Cut(text, "<!-- "+name+":")
	comment, rest, ok2 := strings.Cut(rest, "-->\n")
	_, after, ok3 := strings.Cut(rest, "<!-- /"+name+" -->")
	if !ok || !ok2 || !ok3 {
		t.Fatalf("README.md has no block %q", name)
	}
	return before + "<!-- " + name + ":" + comment + "-->\n\n" + content + "\n<!-- /" + name + " -->" + after
}

// conformanceTable takes scenario, difference and verdict of the last run.
func conformanceTable(t *testing.T) string {
	t.Helper()
	report, err := os.ReadFile("../../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(report)) {
		if strings.HasPrefix(line, "Last run: ") {
			b.WriteString(line + "\n")
		}
		// A row begins and ends with a bar, so that its cells are 1 to 6.
		if cells := strings.Split(line, "|"); len(cells) == 8 {
			fmt.Fprintf(&b, "|%s|%s|%s|\n", cells[1], cells[5], cells[6])
		}
	}
	return b.String()
}

func metricsTable() string {
	var b strings.Builder
	b.WriteString("| metric | kind, unit | attributes | what |\n| --- | --- | --- | --- |\n")
	for _, i := range append(receiver.Instruments(), exporter.Instruments()...) {
		fmt.Fprintf(&b, "| `%s` | %s, `%s` | %s | %s |\n", i.Name, i.Kind, i.Unit, strings.Join(i.Attributes, ", "), i.Description)
	}
	return b.String()
}
