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

// buildTraffic compiles the traffic generator, static, so that it runs in any
// root tree. It is compiled from the embedded source because the working
// directory may be outside of the module, and once per process because linking
// takes most of the time that a boot does.
var buildTraffic = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "unitmeter-traffic-")
	if err != nil {
		return nil, fmt.Errorf("build traffic generator: %w", err)
	}
	defer os.RemoveAll(dir)
	source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "traffic")
	if err := os.WriteFile(source, trafficSource, 0o600); err != nil {
		return nil, fmt.Errorf("build traffic generator: %w", err)
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, source)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GO111MODULE=on", "GOTOOLCHAIN=local")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build traffic generator: %w; install Go or set Config.NoTraffic\n%s", err, out)
	}
	return os.ReadFile(program)
})
