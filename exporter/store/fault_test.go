package store

import (
	"os"
	"testing"
)

// skip skips a test whose means are missing here, unless the environment says
// that none may be missing.
func skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("UNITMETER_TEST_NO_SKIP") != "" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}
