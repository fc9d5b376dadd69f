package config

import (
	"bytes"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares got with a file, or writes the file.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got == string(want) {
		return
	}
	gotLines, wantLines := strings.Split(got, "\n"), strings.Split(string(want), "\n")
	for i := range max(len(gotLines), len(wantLines)) {
		g, w := "(end)", "(end)"
		if i < len(gotLines) {
			g = gotLines[i]
		}
		if i < len(wantLines) {
			w = wantLines[i]
		}
		if g != w {
			t.Fatalf("%s, line %d, is not current; look at the change, then go test ./config -update\n got: %s\nwant: %s", file, i+1, g, w)
		}
	}
}

func TestReferenceIsCurrent(t *testing.T) {
	var markdown bytes.Buffer
	if err := WriteMarkdown(&markdown); err != nil {
		t.Fatal(err)
	}
	golden(t, "../docs/configuration.md", markdown.String())
}

// Each row must say what a reader needs, and no name may be there twice.
func TestTableIsComplete(t *testing.T) {
	seen := make(map[string]bool)
	for _, v := range Variables() {
		if v.Name == "" || v.Group == "" || v.Values == "" || v.Meaning == "" {
			t.Errorf("row %q has an empty column: %+v", v.Name, v)
		}
		for _, name := range []string{v.Name, v.Specific} {
			if name != "" && seen[name] {
				t.Errorf("%s is there twice", name)
			}
			seen[name] = true
		}
	}
}

// The defaults in the table are read as if the user had set them, so that the
// reference cannot say one thing and the agent do another.
func TestDefaultsInTableAreTheDefaults(t *testing.T) {
	home := "HOME=/home/u"
	unset, err := Load([]string{home})
	if err != nil {
		t.Fatal(err)
	}
	var environ []string
	for _, e := range new(loader).table() {
		if e.Default != "" && !e.derived {
			environ = append(environ, e.Name+"="+e.Default)
		}
	}
	set, err := Load(append(environ, home))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(unset, set) {
		t.Errorf("unset: %+v\n  set: %+v", unset, set)
	}
	if len(environ) < 20 {
		t.Errorf("only %d variables have a default; the test sees too little", len(environ))
	}
}
