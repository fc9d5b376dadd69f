package receiver

import (
	"slices"

	"github.com/unitmeter/unitmeter/receiver/systemd"
)

// Selection is which units a Config meters, and which of them share a series.
type Selection struct {
	Types                  []string
	Include, Exclude, Fold systemd.Patterns
}

// Selection reads the lists of a Config; without Types, Include or Exclude, those
// leave out nothing. The error names the pattern that is none.
func (cfg Config) Selection() (s Selection, err error) {
	s.Types = cfg.Types
	for _, list := range []struct {
		texts []string
		to    *systemd.Patterns
	}{{cfg.Include, &s.Include}, {cfg.Exclude, &s.Exclude}, {cfg.Fold, &s.Fold}} {
		if *list.to, err = systemd.ParsePatterns(list.texts); err != nil {
			return Selection{}, err
		}
	}
	return s, nil
}

// Metered reports whether a unit is metered.
func (s Selection) Metered(unit string) bool {
	// A cgroup that is no unit has no type to leave out.
	t := typeOf(unit)
	typed := len(s.Types) == 0 || t == noType || slices.Contains(s.Types, t)
	return typed && (s.Include.Len() == 0 || s.Include.Index(unit) >= 0) && s.Exclude.Index(unit) < 0
}

// Names are the patterns that are the name of a unit, which may be an alias.
func (s Selection) Names() []string {
	texts := slices.Concat(s.Include.Texts(), s.Exclude.Texts(), s.Fold.Texts())
	return slices.DeleteFunc(texts, systemd.IsPattern)
}

// Named is the selection by the units' own names.
func (s Selection) Named(own map[string]string) Selection {
	s.Include, s.Exclude, s.Fold = s.Include.Named(own), s.Exclude.Named(own), s.Fold.Named(own)
	return s
}
