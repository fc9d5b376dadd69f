package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/exporter"
	"github.com/unitmeter/unitmeter/receiver"
)

// TestReadme checks that the parts of the README that say what the code does
// are what the code says.
func TestReadme(t *testing.T) {
	const name = "../../../README.md"
	old, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	all := append(receiver.Instruments(), exporter.Instruments()...)
	text := replaceBlock(t, string(old), "metrics", metricsTable(all[:2]))
	text = replaceBlock(t, text, "own-metrics", metricsTable(all[2:]))
	binary, err := agentBinary()
	if err != nil {
		t.Fatal(err)
	}
	help, err := exec.Command(binary, "help").Output()
	if err != nil {
		t.Fatal(err)
	}
	text = replaceBlock(t, text, "help", "```text\n"+string(help)+"```\n")
	text = replaceBlock(t, text, "conformance", conformanceTable(t))
	if text == string(old) {
		return
	}
	if *update != "readme" {
		t.Fatal("README.md is not current; run: go test ./cmd/unitmeter/e2e -run TestReadme -update=readme")
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestLinks follows the links between the files of the documentation.
func TestLinks(t *testing.T) {
	const root = "../../.."
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	links := 0
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && file != root {
			return fs.SkipDir
		}
		if filepath.Ext(file) != ".md" {
			return nil
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			links++
			page := text
			if target != "" {
				target = filepath.Join(filepath.Dir(file), target)
				if _, err := os.Stat(target); err != nil {
					t.Errorf("%s: %v", file, err)
					continue
				}
				page, _ = os.ReadFile(target) // a directory has no anchors
			}
			if anchor != "" && !slices.Contains(anchors(string(page)), anchor) {
				t.Errorf("%s: there is no heading for #%s", file, anchor)
			}
		}
		return nil
	})
	if err != nil || links < 20 {
		t.Errorf("%d links were found, want at least 20: %v", links, err)
	}
}

// anchors are those that GitHub makes of the headings of a page.
func anchors(page string) (names []string) {
	for line := range strings.Lines(page) {
		if rest := strings.TrimLeft(line, "#"); rest != line && strings.HasPrefix(rest, " ") {
			name := strings.ToLower(strings.TrimSpace(rest))
			names = append(names, strings.ReplaceAll(regexp.MustCompile(`[^\w -]`).ReplaceAllString(name, ""), " ", "-"))
		}
	}
	return names
}

// replaceBlock puts new content between the two comments that mark a block.
func replaceBlock(t testing.TB, text, name, content string) string {
	t.Helper()
	before, rest, ok := strings.Cut(text, "<!-- "+name+":")
	comment, rest, ok2 := strings.Cut(rest, "-->\n")
	_, after, ok3 := strings.Cut(rest, "<!-- /"+name+" -->")
	if !ok || !ok2 || !ok3 {
		t.Fatalf("the document has no block %q", name)
	}
	return before + "<!-- " + name + ":" + comment + "-->\n\n" + content + "\n<!-- /" + name + " -->" + after
}

// conformanceTable takes when and on what the suite ran last, and its verdicts.
func conformanceTable(t *testing.T) string {
	t.Helper()
	report, err := os.ReadFile("../../../docs/matrix.md")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(report)) {
		if _, made, ok := strings.Cut(line, "Made by `make test-matrix` "); ok {
			made, _, _ = strings.Cut(made, ", agent")
			b.WriteString("Last run: " + made + ".\n\n")
		}
		if strings.HasPrefix(line, "|") {
			b.WriteString(line)
		}
	}
	if !strings.Contains(b.String(), "Last run") {
		t.Fatal("docs/matrix.md does not say when it was made")
	}
	return b.String()
}

func metricsTable(instruments []receiver.Instrument) string {
	var b strings.Builder
	b.WriteString("| metric | kind, unit | attributes | what |\n| --- | --- | --- | --- |\n")
	for _, i := range instruments {
		fmt.Fprintf(&b, "| `%s` | %s, `%s` | %s | %s |\n", i.Name, i.Kind, i.Unit, strings.Join(i.Attributes, ", "), i.Description)
	}
	return b.String()
}
