package systemd

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// Listed is one row of systemd's list of units.
type Listed struct {
	Name, Description, Load, Active, Sub, Followed string
	Path                                           dbus.ObjectPath
	JobID                                          uint32
	JobType                                        string
	JobPath                                        dbus.ObjectPath
}

// List returns the loaded units that are in any of the states (none given: in any)
// and match any of the patterns, in which a backslash stands for itself. It loads
// nothing.
//
// Before version 257, systemd fails to list any units if the description of one is not
// UTF-8, such as a mount at a path in another encoding. Then List returns the others,
// and the names of those that fail.
func List(ctx context.Context, b *bus.Conn, states, patterns []string) (rows []Listed, failed []string, err error) {
	if len(patterns) == 0 {
		return nil, nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, bus.CallTimeout)
	defer cancel()
	err = b.Manager().CallWithContext(ctx, bus.ManagerInterface+".ListUnitsByPatterns", 0, states, patterns).Store(&rows)
	var refused dbus.Error
	switch {
	case err == nil:
		return rows, nil, nil
	case !errors.As(err, &refused) || !slices.Contains([]string{invalidArgs, "System.Error.EINVAL"}, refused.Name):
		return nil, nil, fmt.Errorf("list systemd's units: %w", err)
	case len(patterns) == 1 && ValidUnitName(patterns[0]):
		return nil, patterns, nil
	case len(patterns) == 1:
		names, err := names(ctx, b, patterns[0])
		if err != nil || slices.Equal(names, patterns) {
			return nil, nil, errors.Join(err, fmt.Errorf("list systemd's units %q: %w", patterns[0], refused))
		}
		return List(ctx, b, states, names)
	}
	for _, half := range [][]string{patterns[:len(patterns)/2], patterns[len(patterns)/2:]} {
		more, bad, err := List(ctx, b, states, half)
		if err != nil {
			return nil, nil, err
		}
		rows, failed = append(rows, more...), append(failed, bad...)
	}
	return rows, failed, nil
}

// names returns the names of the loaded units that match a pattern, in any state.
func names(ctx context.Context, b *bus.Conn, pattern string) (matching []string, err error) {
	patterns, err := ParsePatterns([]string{pattern})
	if err != nil {
		return nil, err
	}
	const units = "/org/freedesktop/systemd1/unit"
	var text string
	if err := b.Object(units).CallWithContext(ctx, "org.freedesktop.DBus.Introspectable.Introspect", 0).Store(&text); err != nil {
		return nil, fmt.Errorf("list the objects of systemd's units: %w", err)
	}
	var tree struct {
		Nodes []struct {
			Name string `xml:"name,attr"`
		} `xml:"node"`
	}
	if err := xml.NewDecoder(strings.NewReader(text)).Decode(&tree); err != nil {
		return nil, fmt.Errorf("list the objects of systemd's units: %w", err)
	}
	for _, node := range tree.Nodes {
		if name := unitOfPath(unitPathPrefix + node.Name); ValidUnitName(name) && patterns.Index(name) >= 0 {
			matching = append(matching, name)
		}
	}
	return matching, nil
}

// runningStates are the states of units that are not inactive.
func runningStates() []string {
	return []string{"active", "reloading", "refreshing", "activating", "deactivating", "maintenance"}
}

// list is List. It logs which units systemd fails to list.
func (s *Source) list(ctx context.Context, b *bus.Conn, states, patterns []string) ([]Listed, error) {
	rows, failed, err := List(ctx, b, states, patterns)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range failed {
		if !s.unlisted[name] && len(s.unlisted) < maxUnlisted {
			s.unlisted[name] = true
			s.log.Warn("systemd cannot list a unit, since its description is not UTF-8; it is not metered, all others are", "unit", name,
				"next", "give it another path or Description=, or upgrade systemd to 257")
		}
	}
	return rows, err
}

// maxUnlisted bounds what is kept, and logged, of units that cannot be listed.
const maxUnlisted = 100
