package main

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/unitmeter/unitmeter/config"
)

func TestSupported(t *testing.T) {
	var elsewhere []string
	for _, c := range commands() {
		if err := supported(c.name, "linux"); err != nil {
			t.Errorf("%s on linux: %v", c.name, err)
		}
		switch err := supported(c.name, "darwin"); {
		case err == nil:
			elsewhere = append(elsewhere, c.name)
		case !errors.Is(err, errors.ErrUnsupported):
			t.Errorf("%s on darwin: %v", c.name, err)
		}
	}
	if want := []string{"history", "version", "help"}; !slices.Equal(elsewhere, want) {
		t.Errorf("commands on darwin: %v, want %v", elsewhere, want)
	}
}

// The reference fits a terminal of 80 columns and has each variable.
func TestHelpEnvironment(t *testing.T) {
	var out bytes.Buffer
	printVariables(&out)
	for _, v := range config.Variables() {
		if !strings.Contains(out.String(), "\n"+v.Name+"\n") {
			t.Errorf("%s is not in the help", v.Name)
		}
	}
	for line := range strings.Lines(out.String()) {
		if utf8.RuneCountInString(strings.TrimSpace(line)) > 80 && !strings.Contains(line, "=") {
			t.Errorf("longer than 80 characters: %s", line)
		}
	}
}
