package enable

import (
	"os"
	"strings"
	"testing"
)

// TestDropIn: the drop-in is the one of the packages.
func TestDropIn(t *testing.T) {
	example, err := os.ReadFile("../../../packaging/examples/unitmeter-ebpf.conf")
	if err != nil {
		t.Fatal(err)
	}
	_, want, _ := strings.Cut(string(example), "[Unit]")
	if _, got, _ := strings.Cut(ebpfText, "[Unit]"); got != want {
		t.Errorf("the drop-in has\n%s\nthe example\n%s", got, want)
	}
}
