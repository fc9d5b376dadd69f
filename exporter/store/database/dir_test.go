package database

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestLockHolder(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	info, err := dir.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if got := LockHolder(info); got != "" {
		t.Errorf("without a lock: %q", got)
	}
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if got, want := LockHolder(info), fmt.Sprintf("process %d (", os.Getpid()); !strings.HasPrefix(got, want) {
		t.Errorf("with a lock of this process: %q, want %q", got, want)
	}
}
