package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// layers has the packages of this module and what each may import of it.
// ARCHITECTURE.md draws it.
var layers = map[string][]string{
	"cmd/unitmeter": {
		"cmd/unitmeter/accounting", "cmd/unitmeter/calendar", "cmd/unitmeter/doctor", "cmd/unitmeter/enable", "cmd/unitmeter/top", "cmd/unitmeter/tty", "config",
		"exporter", "exporter/otlp", "exporter/store", "exporter/store/history", "receiver", "receiver/ebpf", "receiver/systemd",
	},
	"cmd/unitmeter/doctor": {
		"cmd/unitmeter/accounting", "cmd/unitmeter/tty", "config",
		"exporter/otlp", "exporter/store", "exporter/store/database", "receiver", "receiver/ebpf", "receiver/systemd", "receiver/systemd/bus",
	},
	"cmd/unitmeter/enable":     {"cmd/unitmeter/accounting", "cmd/unitmeter/tty", "receiver", "receiver/ebpf", "receiver/systemd", "receiver/systemd/bus"},
	"cmd/unitmeter/top":        {"cmd/unitmeter/accounting", "cmd/unitmeter/tty", "receiver", "receiver/systemd"},
	"cmd/unitmeter/accounting": {"cmd/unitmeter/tty", "receiver", "receiver/systemd", "receiver/systemd/bus"},
	"cmd/unitmeter/calendar":   {},
	"cmd/unitmeter/tty":        {},

	"config":        {"exporter", "exporter/otlp", "exporter/store", "receiver", "receiver/systemd"},
	"exporter":      {"exporter/otlp", "exporter/store", "exporter/store/history", "receiver", "receiver/ledger"},
	"exporter/otlp": {},

	"exporter/store":          {"exporter/store/database", "exporter/store/history", "exporter/store/record"},
	"exporter/store/database": {"exporter/store/record"},
	"exporter/store/history":  {"exporter/store/database", "exporter/store/record"},
	"exporter/store/record":   {},

	"receiver":                 {"receiver/ebpf", "receiver/ledger", "receiver/systemd", "receiver/systemd/journal"},
	"receiver/ebpf":            {},
	"receiver/ledger":          {},
	"receiver/systemd":         {"receiver/systemd/bus"},
	"receiver/systemd/bus":     {},
	"receiver/systemd/journal": {"receiver/systemd"},

	// Not part of the product: support of tests, generators, the demo.
	"cmd/unitmeter/e2e":              {},
	"examples/otel-collector/demo":   {"receiver/systemdtest"},
	"examples/otel-collector/stack":  {},
	"exporter/otlptest":              {},
	"packaging":                      {},
	"packaging/generate":             {"config"},
	"receiver/systemdtest":           {},
	"receiver/systemdtest/kinds":     {},
	"receiver/systemdtest/traffic":   {},
	"receiver/systemdtest/wallclock": {},
}

// TestLayers checks that imports only point downwards. A package's own tests may
// import what they need.
func TestLayers(t *testing.T) {
	listed := 0
	for _, pkg := range imports(t, "./...") {
		if !pkg.ours() {
			continue
		}
		listed++
		allowed, known := layers[pkg.name()]
		if !known {
			t.Errorf("package %s has no layer: add it to layers", pkg.name())
			continue
		}
		for _, path := range pkg.Imports {
			if name, ours := strings.CutPrefix(path, modulePrefix); ours && !slices.Contains(allowed, name) {
				t.Errorf("%s imports %s, which is not below it", pkg.name(), name)
			}
		}
		for _, name := range allowed {
			if !slices.Contains(pkg.Imports, modulePrefix+name) {
				t.Errorf("%s may import %s, and does not: remove it from layers", pkg.name(), name)
			}
		}
		// `go test` runs a cached test again when a directory that it read changes.
		if _, err := os.ReadDir(pkg.Dir); err != nil {
			t.Error(err)
		}
	}
	if listed != len(layers) {
		t.Errorf("go list has %d packages of this module, layers has %d: remove those that are gone", listed, len(layers))
	}
}

// TestNoTestSupport checks that nothing of the tests is in the product.
func TestNoTestSupport(t *testing.T) {
	packages := imports(t, "./cmd/unitmeter")
	if !slices.ContainsFunc(packages, func(p listedPackage) bool { return p.ours() && p.name() == "receiver" }) {
		t.Fatal("go list -deps ./cmd/unitmeter does not have the receiver: this test sees nothing")
	}
	for _, pkg := range packages {
		switch pkg.ImportPath {
		case modulePrefix + "receiver/systemdtest", modulePrefix + "exporter/otlptest", "testing":
			t.Errorf("the agent links %s", pkg.ImportPath)
		}
	}
}

const modulePrefix = "github.com/unitmeter/unitmeter/"

// listedPackage has the fields of `go list -json` that are used here.
type listedPackage struct {
	Dir, ImportPath string
	Imports         []string
}

func (p listedPackage) ours() bool   { return strings.HasPrefix(p.ImportPath, modulePrefix) }
func (p listedPackage) name() string { return strings.TrimPrefix(p.ImportPath, modulePrefix) }

// imports returns the packages of a pattern and all that they import, tests
// left out, as they are built for Linux.
func imports(t *testing.T, pattern string) []listedPackage {
	t.Helper()
	list := exec.Command("go", "list", "-deps", "-json=Dir,ImportPath,Imports", pattern)
	list.Dir = "../../.."
	list.Env = append(os.Environ(), "GOOS=linux", "CGO_ENABLED=0")
	var stderr bytes.Buffer
	list.Stderr = &stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", list, err, &stderr)
	}
	var packages []listedPackage
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var pkg listedPackage
		if err := decoder.Decode(&pkg); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatalf("read the output of %v: %v", list, err)
		}
		packages = append(packages, pkg)
	}
}
