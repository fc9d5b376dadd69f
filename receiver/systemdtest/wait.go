package systemdtest

import (
	"testing"
	"time"
)

// Patience is how long tests wait for what must come. It is what no machine
// needs, however loaded: tests are about what comes, and not about when.
const Patience = 2 * time.Minute

// Eventually waits until ok. It fails the test when that never comes.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to this: %s", what)
		}
	}
}
