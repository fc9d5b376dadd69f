package config

import (
	"path/filepath"
	"strings"
)

// parseStateDir reads UNITMETER_STATE_DIR. It does not touch the directory: who
// opens the state creates it and checks its owner.
func parseStateDir(text string, bad report) string {
	const hint = "use an absolute path such as /var/lib/unitmeter, or none"
	switch {
	case strings.EqualFold(text, "none"):
		return ""
	case strings.HasPrefix(text, "~"):
		bad("nothing expands ~ here", hint)
	case !filepath.IsAbs(text):
		bad("not an absolute path", hint)
	case filepath.Clean(text) == "/":
		bad("the root directory cannot belong to the agent alone", hint)
	default:
		return filepath.Clean(text)
	}
	return ""
}

// finishState finds the state directory where none is named: systemd's, then
// that of the XDG base directory specification.
func (l *loader) finishState() {
	named, set := l.given["UNITMETER_STATE_DIR"]
	if set {
		l.cfg.StateDirFrom = named.name
	} else if strings.TrimSpace(l.env["UNITMETER_STATE_DIR"]) == "" {
		l.defaultStateDir()
	}
	if !set || !strings.EqualFold(named.text, "none") {
		return
	}
	for _, name := range []string{"UNITMETER_OUTBOX_MAX_BYTES", "UNITMETER_OUTBOX_MAX_AGE", "UNITMETER_HISTORY"} {
		if s, ok := l.given[name]; ok && !strings.EqualFold(s.text, "none") {
			l.warn(name + " has no effect with UNITMETER_STATE_DIR=none")
		}
	}
}

func (l *loader) defaultStateDir() {
	// systemd sets a colon list for StateDirectory= with several names.
	first, _, _ := strings.Cut(l.env["STATE_DIRECTORY"], ":")
	for _, candidate := range []struct{ name, base, below string }{
		{"STATE_DIRECTORY", first, ""},
		{"XDG_STATE_HOME", l.env["XDG_STATE_HOME"], "unitmeter"},
		{"HOME", l.env["HOME"], ".local/state/unitmeter"},
	} {
		if candidate.base == "" {
			continue
		}
		// The XDG specification: paths that are not absolute are to be ignored.
		reason, _ := malformed(candidate.base)
		if reason != "" || !filepath.IsAbs(candidate.base) {
			l.warn(candidate.name + " is not an absolute path, and is ignored for the state directory")
			continue
		}
		l.cfg.Store.Dir, l.cfg.StateDirFrom = filepath.Join(candidate.base, candidate.below), candidate.name
		return
	}
	l.warn("there is no state directory, so each start of the agent starts every series anew: " +
		"set StateDirectory=unitmeter in its unit, or UNITMETER_STATE_DIR")
}
