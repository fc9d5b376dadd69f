//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// findRoot returns dir if it is in a cgroup v2 hierarchy, or for "" where the
// hierarchy is mounted.
func findRoot(dir string) (string, error) {
	dirs := []string{dir}
	if dir == "" {
		dirs = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} // the second on hybrid hosts
	}
	for _, d := range dirs {
		var st unix.Statfs_t
		if err := unix.Statfs(d, &st); err != nil && dir != "" {
			return "", fmt.Errorf("open cgroup %s: %w", d, err)
		}
		if st.Type == unix.CGROUP2_SUPER_MAGIC {
			return d, nil
		}
	}
	return "", fmt.Errorf("%s: %w; boot with systemd.unified_cgroup_hierarchy=1", strings.Join(dirs, " and "), ErrNotCgroup2)
}

// OwnCgroup returns the id of the cgroup of this process.
func OwnCgroup() (uint64, error) {
	root, err := findRoot("")
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0, fmt.Errorf("find the cgroup of this process: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			if id := cgroupID(filepath.Join(root, path)); id != 0 {
				return id, nil
			}
		}
	}
	return 0, fmt.Errorf("find the cgroup of this process below %s: it is not there", root)
}

// cgroupID returns the id of the cgroup with a directory, 0 if there is none.
func cgroupID(dir string) uint64 { return inode(dir) }

func inode(path string) uint64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

// walkCgroups visits root, as "/", and all cgroups below it.
func walkCgroups(ctx context.Context, root string, visit func(id uint64, path string) error) error {
	err := filepath.WalkDir(root, func(dir string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV): // removed meanwhile
			return nil
		case err != nil:
			return err
		case !d.IsDir():
			return nil
		}
		id := cgroupID(dir)
		if id == 0 {
			return nil
		}
		path := strings.TrimPrefix(dir, root)
		if path == "" {
			path = "/"
		}
		return visit(id, path)
	})
	if err != nil {
		return fmt.Errorf("walk the cgroups: %w", err)
	}
	return nil
}

// invocation reads the id of the run of a unit, "" if it cannot.
func invocation(root string, id uint64, path string, c Cgroup) string {
	if c.Unit == "" || root == "" {
		return ""
	}
	var value [64]byte
	n, err := unix.Lgetxattr(filepath.Join(root, unitPath(path, c)), "user.invocation_id", value[:])
	// The path may be another run's by now.
	if err != nil || cgroupID(filepath.Join(root, path)) != id {
		return ""
	}
	return string(value[:n])
}

// unitPath cuts the path of a cgroup behind its innermost unit.
func unitPath(path string, c Cgroup) string {
	units := []string{c.Unit}
	if c.User != nil && c.User.Unit != "" {
		units = append(units, c.User.Unit)
	}
	end := 0
	for end < len(path) && len(units) > 0 {
		start := end + 1
		end = len(path)
		if i := strings.IndexByte(path[start:], '/'); i >= 0 {
			end = start + i
		}
		if unescapeComponent(path[start:end]) == units[0] {
			units = units[1:]
		}
	}
	return path[:end]
}
