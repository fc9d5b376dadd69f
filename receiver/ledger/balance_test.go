package ledger

import "testing"

func TestTopOf(t *testing.T) {
	for slice, want := range map[string]string{
		"system.slice": "system.slice", "user-1000.slice": "user.slice", "a-b-c.slice": "a.slice",
		"-.slice": "", ".slice": "", "": "", `system-serial\x2dgetty.slice`: "system.slice",
	} {
		if got, ok := topOf(slice); got != want || ok != (want != "") {
			t.Errorf("topOf(%q) = %q, want %q", slice, got, want)
		}
		if top := want != "" && slice == want; TopSlice(slice) != top {
			t.Errorf("TopSlice(%q) = %v", slice, !top)
		}
	}
}
