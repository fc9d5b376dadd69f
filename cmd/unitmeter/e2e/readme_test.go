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

// TestReadme checks that the tables of docs/metrics.md are those of the code.
func TestReadme(t *testing.T) {
	const name = "../../../docs/metrics.md"
	old, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	all := append(receiver.Instruments(), exporter.Instruments()...)
	text := replaceBlock(t, string(old), "metrics", metricsTable(all[:4]))
	text = replaceBlock(t, text, "own-metrics", metricsTable(all[4:]))
	if text == string(old) {
		return
	}
	if *update != "readme" {
		t.Fatal("docs/metrics.md is not current; run: go test ./cmd/unitmeter/e2e -run TestReadme -update=readme")
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestReadmeCommands checks that each command in the documentation exists, with its flags.
func TestReadmeCommands(t *testing.T) {
	binary, err := agentBinary()
	if err != nil {
		t.Fatal(err)
	}
	example := regexp.MustCompile("(?m)(?:^ {4}|^[$] |`|sudo |bin/)unitmeter ([a-z]+)([^`#\n]*)")
	found := 0
	for _, file := range documents(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range example.FindAllStringSubmatch(string(text), -1) {
			found++
			help, err := exec.Command(binary, "help", m[1]).CombinedOutput()
			if err != nil {
				t.Errorf("%s: unitmeter %s: %s", file, m[1], help)
			}
			for word := range strings.FieldsSeq(m[2]) {
				if strings.HasPrefix(word, "--") && len(word) > 2 && !strings.Contains(string(help), word) {
					t.Errorf("%s: unitmeter %s has no flag %s", file, m[1], word)
				}
			}
		}
	}
	if found < 20 {
		t.Errorf("%d commands were found, want 20 or more", found)
	}
}

// documents lists all Markdown files of the tree.
func documents(t *testing.T) (files []string) {
	t.Helper()
	const root = "../../.."
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && file != root:
			return fs.SkipDir
		case filepath.Ext(file) == ".md":
			files = append(files, file)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestLinks follows the links between the files of the documentation.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	links := 0
	for _, file := range documents(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
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
	}
	if links < 20 {
		t.Errorf("%d links were found, want 20 or more", links)
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

func metricsTable(instruments []receiver.Instrument) string {
	var b strings.Builder
	b.WriteString("| metric | kind, unit | attributes | what |\n| --- | --- | --- | --- |\n")
	for _, i := range instruments {
		fmt.Fprintf(&b, "| `%s` | %s, `%s` | %s | %s |\n", i.Name, i.Kind, i.Unit, strings.Join(i.Attributes, ", "), i.Description)
	}
	return b.String()
}
