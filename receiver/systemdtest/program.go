package systemdtest

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

//go:embed traffic/main.go
var trafficSource []byte

//go:embed wallclock/main_linux.go
var wallClockSource []byte

//go:embed kinds/main_linux.go
var kindsSource []byte

// programs are the compiled helpers by name. Each is compiled once per process,
// since linking takes as long as a boot, which makes this the one package
// variable that changes: a program that is there never changes again.
var programs = struct {
	mu    sync.Mutex
	files map[string][]byte
}{files: map[string][]byte{}}

// build compiles a program of one file, in dir: static, so that it runs in any
// root tree, and from embedded source, since the working directory may be
// outside of the module.
func build(dir, name string, source []byte) ([]byte, error) {
	programs.mu.Lock()
	defer programs.mu.Unlock()
	if file := programs.files[name]; file != nil {
		return file, nil
	}
	main, program := filepath.Join(dir, name+".go"), filepath.Join(dir, name)
	if err := os.WriteFile(main, source, 0o600); err != nil {
		return nil, fmt.Errorf("build %s: %w", name, err)
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, main)
	cmd.Dir = dir
	// GOTMPDIR: what a killed process leaves here, the supervisor removes.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GO111MODULE=on", "GOTOOLCHAIN=local", "GOTMPDIR="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w; install Go or set Config.NoTraffic\n%s", name, err, out)
	}
	file, err := os.ReadFile(program)
	if err != nil {
		return nil, fmt.Errorf("build %s: %w", name, err)
	}
	programs.files[name] = file
	return file, nil
}

// WallClock installs a program that runs another one with a wall clock that can
// be stepped (see the wallclock directory of this package), and returns its path
// inside the rig:
//
//	wallclock FILE COMMAND [ARG...]
//
// FILE, inside too, has the seconds by which the clock is off.
func (r *Rig) WallClock(t testing.TB) string {
	t.Helper()
	return r.install(t, "wallclock", wallClockSource)
}

// Kinds installs a program that makes unusual kinds of network traffic (see the kinds
// directory of this package), and returns its path inside the rig.
func (r *Rig) Kinds(t testing.TB) string {
	t.Helper()
	return r.install(t, "kinds", kindsSource)
}

func (r *Rig) install(t testing.TB, name string, source []byte) string {
	t.Helper()
	path := "/usr/local/bin/" + name
	program, err := build(t.TempDir(), name, source)
	if err == nil {
		err = r.writeFile(path, program, 0o755)
	}
	if err != nil {
		t.Fatalf("install %s: %v", name, err)
	}
	return path
}
