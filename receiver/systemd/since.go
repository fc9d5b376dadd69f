package systemd

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemd/bus"
)

// since finds out from when on, at the earliest, units have had IP accounting: a
// unit that runs since March may have it since today. systemd does not say; the
// files that switch it on have a time, where they can be read. It is asked of the
// units of the first list: of later ones, their first reading tells.
func (s *Source) since(ctx context.Context, b *bus.Conn) {
	everywhere := defaultSince()
	const atOnce = 24 // with those of maxAsked and of a sweep, below dbus-daemon's limit
	var units []*unit
	s.mu.Lock()
	for _, u := range s.units {
		if u.run != nil && !u.run.read() {
			units = append(units, u)
		}
	}
	s.mu.Unlock()
	for some := range slices.Chunk(units, atOnce) {
		calls := make([]*dbus.Call, 0, 2*atOnce)
		answered := make(chan *dbus.Call, 2*atOnce)
		for _, u := range some {
			for _, property := range []string{"FragmentPath", "DropInPaths"} {
				calls = append(calls, b.Object(dbus.ObjectPath(u.run.path)).
					GoWithContext(ctx, bus.PropertiesInterface+".Get", dbus.FlagNoAutoStart, answered, bus.UnitInterface, property))
			}
		}
		for range calls {
			<-answered
		}
		for i, u := range some {
			var fragment string
			var files []string
			// Of a unit that has gone meanwhile, or whose files are another's, nothing
			// is known.
			store(calls[2*i], &fragment)
			store(calls[2*i+1], &files)
			since := everywhere
			for _, file := range append(files, fragment) {
				since = later(since, switchedOn(file, "IPAccounting"))
			}
			s.mu.Lock()
			u.since = since
			s.mu.Unlock()
		}
	}
}

// store takes the answer of a Get, if there is one of its type.
func store(call *dbus.Call, to any) {
	var v dbus.Variant
	if call.Err == nil && call.Store(&v) == nil {
		_ = dbus.Store([]any{v.Value()}, to) // of another type: not known
	}
}

// defaultSince is when the file was written that makes accounting the default of all
// units; zero without one.
func defaultSince() (since time.Time) {
	for _, dir := range []string{"/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"} {
		files, _ := filepath.Glob(dir + "/systemd/system.conf.d/*.conf") // the pattern is a good one
		for _, file := range append(files, dir+"/systemd/system.conf") {
			since = later(since, switchedOn(file, "DefaultIPAccounting"))
		}
	}
	return since
}

// switchedOn is when a file was written that has a setting; zero for other files.
func switchedOn(file, setting string) time.Time {
	text, err := os.ReadFile(file)
	if err != nil || !bytes.Contains(text, []byte("\n"+setting)) {
		return time.Time{}
	}
	info, err := os.Stat(file)
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
