package config

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

func TestFileWithoutPermission(t *testing.T) {
	file := filepath.Join(t.TempDir(), "headers")
	if err := os.WriteFile(file, []byte("a=1\n"), 0); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		// Root may read every file; this thread becomes nobody for files.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := syscall.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
		defer syscall.Setfsuid(0)
	}
	_, err := Load([]string{"HOME=/h", "UNITMETER_OTLP_HEADERS_FILE=" + file})
	want := fmt.Sprintf("read UNITMETER_OTLP_HEADERS_FILE=%q: permission denied: name a file that the agent's user can read", file)
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
