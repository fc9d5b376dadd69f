package main

import (
	"errors"
	"slices"
	"testing"
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
