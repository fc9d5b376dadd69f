package e2e

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"testing"
)

const allocationsFile = "../../../docs/benchmarks-baseline.txt"

// TestAllocations runs the benchmarks of what is done in each cycle (the sweep,
// the observation, the encoding and the commit) and compares their allocations
// with the committed baseline. Their times are of no interest here. They run in a
// process of their own, built as the agent is: the race detector allocates too.
// The baseline is what they print, in the format of benchstat.
func TestAllocations(t *testing.T) {
	// The flags of `make build`, so that both share what is compiled.
	cmd := exec.Command("go", "test", "-trimpath", "-buildvcs=false", "-tags", "grpcnotrace", "-p", "1", "-timeout", "10m",
		"-run", "^$", "-bench", "^Benchmark(Sweep|Observe|Export4000Points|Commit4000Points)$", "-benchmem", "-benchtime", "20x",
		"./receiver", "./exporter", "./exporter/store")
	cmd.Dir = "../../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s%s", cmd, err, out, &complaints)
	}
	if *update == "baselines" {
		if err := os.WriteFile(allocationsFile, out, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	text, err := os.ReadFile(allocationsFile)
	if err != nil {
		t.Fatal(err)
	}
	const renew = "if that is meant: go test ./cmd/unitmeter/e2e -run TestAllocations -update=baselines"
	now, baseline := allocations(t, out), allocations(t, text)
	for name, was := range baseline {
		// What a reply happens to meet differs a little from run to run.
		n, ran := now[name]
		switch limit := was + was/50 + 20; {
		case !ran && os.Geteuid() == 0: // without root there is no systemd to sweep
			t.Errorf("%s has not run; %s", name, renew)
		case n > limit:
			t.Errorf("%s: %d allocations, which were %d and may be %d; %s", name, n, was, limit, renew)
		}
	}
	for name := range now {
		if _, ok := baseline[name]; !ok {
			t.Errorf("%s is not in the baseline; %s", name, renew)
		}
	}
}

// The number of processors ends the name, and depends on the machine.
var allocationsLine = regexp.MustCompile(`^(Benchmark\S+?)(?:-\d+)?\s.*\s(\d+) allocs/op$`)

func allocations(t *testing.T, text []byte) map[string]int {
	t.Helper()
	found := map[string]int{}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if match := allocationsLine.FindStringSubmatch(lines.Text()); match != nil {
			n, err := strconv.Atoi(match[2])
			if err != nil {
				t.Fatal(err)
			}
			found[match[1]] = n
		}
	}
	if len(found) == 0 {
		t.Fatalf("no benchmark in:\n%s", text)
	}
	return found
}
