package main

import (
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// An agent that cannot start says so, and does not wait for its state first.
func TestStartFailsWithoutState(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	unavailable := filepath.Join(t.TempDir(), strings.Repeat("x", 300)) // too long a name, for now as far as the store knows
	code, _, stderr := runCommand(t, []string{
		noSystemd, "UNITMETER_STATE_DIR=" + unavailable, "OTEL_METRICS_EXPORTER=prometheus", "OTEL_EXPORTER_PROMETHEUS_HOST=127.0.0.1",
		"OTEL_EXPORTER_PROMETHEUS_PORT=" + strconv.Itoa(taken.Addr().(*net.TCPAddr).Port),
	}, "run")
	if code != 1 || !strings.Contains(stderr, "store is unavailable") || !strings.Contains(stderr, "set OTEL_EXPORTER_PROMETHEUS_HOST and OTEL_EXPORTER_PROMETHEUS_PORT") {
		t.Errorf("code %d: %s", code, stderr)
	}
}
