package systemdtest

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

//go:embed traffic/main.go
var trafficSource []byte

// trafficProgram is the compiled traffic generator. It is compiled once per
// process, since linking takes as long as a boot, which makes this the one
// package variable that changes: from nil to what never changes again.
var trafficProgram struct {
	mu   sync.Mutex
	file []byte
}

// buildTraffic compiles the traffic generator in dir: static, so that it runs in
// any root tree, and from the embedded source, since the working directory may
// be outside of the module.
func buildTraffic(dir string) ([]byte, error) {
	trafficProgram.mu.Lock()
	defer trafficProgram.mu.Unlock()
	if trafficProgram.file != nil {
		return trafficProgram.file, nil
	}
	source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "traffic")
	if err := os.WriteFile(source, trafficSource, 0o600); err != nil {
		return nil, fmt.Errorf("build traffic generator: %w", err)
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, source)
	cmd.Dir = dir
	// GOTMPDIR: what a killed process leaves here, the supervisor removes.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GO111MODULE=on", "GOTOOLCHAIN=local", "GOTMPDIR="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build traffic generator: %w; install Go or set Config.NoTraffic\n%s", err, out)
	}
	file, err := os.ReadFile(program)
	if err != nil {
		return nil, fmt.Errorf("build traffic generator: %w", err)
	}
	trafficProgram.file = file
	return file, nil
}
