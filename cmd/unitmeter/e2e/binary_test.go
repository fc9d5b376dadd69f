// Package e2e tests the agent from outside: it runs the program beside a real
// systemd and compares what systemd counted with what a receiver got.
//
// The program is UNITMETER_BINARY, or one built from this tree.
//
//   - TestConformance: traffic of known size through units of all kinds, one verdict for each scenario.
//   - The outage tests: a Collector, network or disk that fails; each total must still arrive once.
//   - The benchmarks: cost of the agent beside others.
//   - The rest: commands, documentation, and totals over restarts.
//
// A rig is a systemd in namespaces of its own (receiver/systemdtest). A host is a
// rig with a Collector, a site is a host with the agent behind a network of its
// own, a lab is a rig with a receiver in this process.
package e2e

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"
)

// update names the files to write: readme (docs/metrics.md), baselines (the
// benchmarks' documents), conformance (docs/conformance.md) or faults (docs/faults.md).
var update = flag.String("update", "", "write the results: readme, baselines, conformance or faults")

func TestMain(m *testing.M) {
	flag.Parse()
	switch *update {
	case "", "readme", "baselines", "conformance", "faults":
		os.Exit(m.Run())
	}
	fmt.Fprintf(os.Stderr, "-update=%s: use readme, baselines, conformance or faults\n", *update)
	os.Exit(2)
}

// agentBinary returns the agent to test. It is in the directory of the test
// binary, which every rig shows inside.
var agentBinary = sync.OnceValues(func() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(self), "unitmeter")
	if given := os.Getenv("UNITMETER_BINARY"); given != "" {
		program, err := os.ReadFile(given)
		if err != nil {
			return "", fmt.Errorf("read UNITMETER_BINARY: %w; set it to the agent to test", err)
		}
		return path, os.WriteFile(path, program, 0o755)
	}
	build := exec.Command("make", "-C", "../../..", "--no-print-directory", "build", "BINARY="+path) // as it is shipped
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the agent: %w\n%s", err, out)
	}
	return path, nil
})

// tool returns the path of a program that .ci/tools has built.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs("../../../.tools/bin/" + name)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		t.Fatalf("find %s: %v; run \"make tools\" (for benchmarks \".ci/tools bench\")", name, err)
	}
	return path
}

// patience is how long tests wait for what must come. It is what no machine
// needs, however loaded: tests are about what comes, and not about when.
const patience = 3 * time.Minute

// eventually waits for a condition, for as long as a loaded machine may need.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	if !within(patience, condition) {
		t.Fatalf("this never happened: %s", what)
	}
}

// within waits for a condition and returns false when d has passed without it.
func within(d time.Duration, condition func() bool) bool {
	for end := time.Now().Add(d); ; time.Sleep(20 * time.Millisecond) {
		if condition() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

// memory reads a field of a process's status file in MiB (proc_pid_status(5)).
func memory(t testing.TB, status, field string) float64 {
	t.Helper()
	text, err := os.ReadFile(status)
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(text)
	if match == nil {
		t.Fatalf("%s has no %s:\n%s", status, field, text)
	}
	kb, err := strconv.ParseFloat(string(match[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb / 1024
}
