package stack_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/config"
)

// No container engine runs here. What can be wrong without one: the agent's
// variables, and the paths of the files that are mounted.
func TestManifests(t *testing.T) {
	variable := regexp.MustCompile(`(?m)((?:OTEL|UNITMETER)_[A-Z_]+)(?:\s+value)?: "?([^"\n]+)"?`)
	expanded := regexp.MustCompile(`\$\([A-Z_]+\)`) // by Kubernetes
	for _, file := range []string{"compose.yaml", "kubernetes.yaml"} {
		environ := []string{"HOME=/root"}
		for _, m := range variable.FindAllStringSubmatch(read(t, file), -1) {
			environ = append(environ, m[1]+"="+expanded.ReplaceAllLiteralString(m[2], "node-1"))
		}
		if len(environ) < 3 {
			t.Errorf("%s: only %q is found", file, environ)
		}
		if cfg, err := config.Load(environ); err != nil || len(cfg.Warnings) > 0 {
			t.Errorf("%s: %q: %v, %q", file, environ, err, cfg.Warnings)
		}
	}
	mounts := regexp.MustCompile(`(?m)^\s+- (\.[^:\n]*):`).FindAllStringSubmatch(read(t, "compose.yaml"), -1)
	if len(mounts) < 4 {
		t.Errorf("compose.yaml: only the mounts %q are found", mounts)
	}
	for _, m := range mounts {
		if _, err := os.Stat(m[1]); err != nil {
			t.Errorf("compose.yaml: %v", err)
		}
	}
}

// The README has each file of this directory, and no other.
func TestFilesAreListed(t *testing.T) {
	readme := read(t, "README.md")
	listed := regexp.MustCompile("(?m)^\\| `([^`/]+)` \\|").FindAllStringSubmatch(readme, -1)
	for _, m := range listed {
		if _, err := os.Stat(m[1]); err != nil {
			t.Errorf("README.md: %v", err)
		}
	}
	for _, pattern := range []string{"*.yaml", "*.service"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %q, %v", pattern, files, err)
		}
		for _, file := range files {
			if !strings.Contains(readme, "\n| `"+file+"` |") {
				t.Errorf("README.md does not list %s", file)
			}
		}
	}
}

// The table of docs/migrating.md says what the rules and the relabeling do, and
// its variables exist.
func TestMigrationTable(t *testing.T) {
	doc := read(t, "../../../docs/migrating.md")
	rules, scrape := read(t, "../prometheus/systemd_exporter.rules.yaml"), read(t, "../prometheus/systemd_exporter.scrape.yaml")
	rows := regexp.MustCompile("(?m)^\\| `(systemd_service_ip_\\w+)` \\| `(\\w+)\\{network_io_direction=\"(\\w+)\"\\}` \\|$").FindAllStringSubmatch(doc, -1)
	if len(rows) != 4 {
		t.Fatalf("docs/migrating.md has %d rows of metrics, want 4", len(rows))
	}
	for _, row := range rows {
		old, metric, direction := row[1], row[2], row[3]
		rule := regexp.MustCompile(`record: ` + old + `\n\s+expr: \|\n.*\n\s+` + metric + `\{network_io_direction="` + direction + `"`)
		if !rule.MatchString(rules) {
			t.Errorf("no rule makes %s of %s, %s", old, metric, direction)
		}
		relabeling := regexp.MustCompile(`regex: ` + metric + `;` + direction + `\n\s+target_label: __name__\n\s+replacement: ` + old + `\n`)
		if !relabeling.MatchString(scrape) {
			t.Errorf("no relabeling makes %s of %s, %s", old, metric, direction)
		}
	}
	known := map[string]bool{}
	for _, v := range config.Variables() {
		known[v.Name] = true
	}
	for _, name := range regexp.MustCompile(`\b(?:OTEL|UNITMETER)_[A-Z_]+`).FindAllString(doc, -1) {
		if !known[name] {
			t.Errorf("docs/migrating.md has %s, which does not exist", name)
		}
	}
}
