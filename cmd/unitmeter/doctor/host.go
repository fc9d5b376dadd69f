package doctor

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
	"github.com/unitmeter/unitmeter/cmd/unitmeter/tty"
	"github.com/unitmeter/unitmeter/exporter/otlp"
	"github.com/unitmeter/unitmeter/exporter/store"
	"github.com/unitmeter/unitmeter/exporter/store/database"
)

// userName is the name of a uid, or the number where it has none.
func userName(uid int) string {
	// A uid without a name is usual in containers, and no fault.
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return "uid " + strconv.Itoa(uid)
}

// checkClock asks whether the kernel says that its clock is right: the times of
// all points come from it.
func (d *doctor) checkClock(ctx context.Context) finding {
	const fix = "timedatectl set-ntp true"
	now := time.Now()
	// A host without a battery begins in 1970 at each boot. Points from then
	// are no use.
	if now.Year() < 2025 {
		return failure(fix, "the clock says %s, which is before the release of this program", now.UTC().Format(time.RFC3339))
	}
	synchronized, err := clockSynchronized()
	if err != nil {
		return skipped("adjtimex: %v", err)
	}
	if !synchronized {
		return warning(fix, "%s; the clock is not synchronized (adjtimex: STA_UNSYNC)", now.UTC().Format(time.RFC3339))
	}
	found := now.UTC().Format(time.RFC3339) + ", synchronized"
	if d.m == nil {
		return good("%s", found)
	}
	// Without an answer the first half of the check still stands.
	if step, err := d.clockStep(ctx); err == nil && step.Abs() > maxClockStep {
		return warning("reboot, or ignore it: only the start times of older units are wrong",
			"%s, but changed by %s since boot", found, step)
	}
	return good("%s", found)
}

// maxClockStep is how far the clock may be set after boot. NTP at its fastest
// slews by 43 s in a day without a step.
const maxClockStep = 10 * time.Minute

// clockStep is by how much the wall clock has been set since boot. systemd's
// times from before are not corrected, and the series start at such times.
func (d *doctor) clockStep(ctx context.Context) (time.Duration, error) {
	var wall, monotonic uint64
	if err := d.m.Property(ctx, "UserspaceTimestamp", &wall); err != nil {
		return 0, err
	}
	if err := d.m.Property(ctx, "UserspaceTimestampMonotonic", &monotonic); err != nil {
		return 0, err
	}
	since, err := sinceBoot()
	if err != nil {
		return 0, err
	}
	if wall > math.MaxInt64 || monotonic > math.MaxInt64 {
		return 0, errors.New("systemd's boot time is out of range")
	}
	atBoot := time.UnixMicro(int64(wall)).Add(-time.Duration(monotonic) * time.Microsecond)
	return time.Since(atBoot.Add(since)).Round(time.Second), nil
}

// checkKernel looks for what systemd's counting needs of the kernel.
func (d *doctor) checkKernel(context.Context) finding {
	release, major, minor, err := kernelRelease()
	if err != nil {
		return skipped("%v", err)
	}
	// cgroup v2 has programs for ingress and egress since 4.10, and several on one
	// cgroup, which systemd's delegated units need, since 4.15.
	if major < 4 || major == 4 && minor < 15 {
		return failure("boot a kernel of version 4.15 or later", "Linux %s cannot count the traffic of slices and services", release)
	}
	found := "Linux " + release
	// Without a stored configuration, the check of the counters decides.
	switch on, known := kernelOption(release, "CONFIG_CGROUP_BPF"); {
	case known && !on:
		return failure("boot a kernel that is built with CONFIG_CGROUP_BPF=y", "Linux %s is built without CONFIG_CGROUP_BPF, which systemd needs to count", release)
	case known:
		found += ", CONFIG_CGROUP_BPF=y"
	}
	// Only a hint: whether it keeps systemd from counting depends on the version.
	if text, err := os.ReadFile("/sys/kernel/security/lockdown"); err == nil {
		if strings.Contains(string(text), "[confidentiality]") {
			found += ", lockdown=confidentiality (kernels before 5.9 may refuse BPF then)"
		}
	}
	return good("%s", found)
}

// kernelRelease is the release of the running kernel, and its first two numbers.
func kernelRelease() (release string, major, minor int, err error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", 0, 0, fmt.Errorf("uname: %w", err)
	}
	release = unix.ByteSliceToString(name.Release[:])
	// Distributions append what they like to the two numbers.
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return release, 0, 0, fmt.Errorf("the release %q is not understood", release)
	}
	return release, major, minor, nil
}

// kernelOption reads one setting of the kernel's build, where it is stored.
func kernelOption(release, option string) (on, known bool) {
	for _, file := range []string{"/proc/config.gz", "/boot/config-" + release, "/lib/modules/" + release + "/config"} {
		text, err := os.ReadFile(file)
		if err == nil && strings.HasSuffix(file, ".gz") {
			var unzip io.Reader
			if unzip, err = gzip.NewReader(bytes.NewReader(text)); err == nil {
				text, err = io.ReadAll(unzip)
			}
		}
		if err == nil {
			return bytes.Contains(text, []byte("\n"+option+"=y\n")), true
		}
	}
	return false, false
}

// checkCgroup looks for cgroup v2, to which systemd attaches the programs that
// count. It is enough that systemd's own tree is v2 ("hybrid").
func (d *doctor) checkCgroup(context.Context) finding {
	return cgroupFinding("/sys/fs/cgroup")
}

// cgroupFinding distinguishes the hierarchies by the types of the file systems.
func cgroupFinding(root string) finding {
	// The types and not the names: /sys/fs/cgroup is there in all of them.
	switch {
	case fileSystem(root) == cgroupV2:
		return good("v2 (unified) at %s", root)
	case fileSystem(root+"/unified") == cgroupV2:
		return good("v2 at %s/unified (hybrid)", root)
	case fileSystem(root+"/systemd") == cgroupV1:
		return failure("boot with the kernel parameter systemd.unified_cgroup_hierarchy=1",
			"%s is cgroup v1 (legacy), on which systemd counts no IP traffic", root)
	}
	return skipped("no cgroup tree is mounted at %s", root)
}

// container names the kind of container that this process is in, or "".
func container() string {
	for _, mark := range []struct{ file, name string }{{"/run/.containerenv", "podman"}, {"/.dockerenv", "docker"}} {
		if _, err := os.Stat(mark.file); err == nil {
			return mark.name
		}
	}
	// The kubelet sets it in each pod.
	if os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		return "kubernetes"
	}
	// What systemd, or its systemd-nspawn, leaves for the programs inside.
	if text, err := os.ReadFile("/run/systemd/container"); err == nil {
		return cmp.Or(strings.TrimSpace(string(text)), "unknown")
	}
	return os.Getenv("container")
}

// apparmor is the AppArmor profile of this process, or "".
func apparmor() string {
	for _, file := range []string{"/proc/self/attr/apparmor/current", "/proc/self/attr/current"} {
		if text, err := os.ReadFile(file); err == nil {
			profile := strings.Trim(string(text), "\x00\n")
			if profile != "" && profile != "unconfined" {
				return profile
			}
		}
	}
	return ""
}

// minFree is how much room the state needs at the least, in bytes.
const minFree = 64 << 20

// checkState looks at the directory as the store would when it opens it.
func (d *doctor) checkState(context.Context) finding {
	if !d.configured {
		return skipped("the environment is wrong")
	}
	if d.cfg.Store.Dir == "" {
		return warning("set UNITMETER_STATE_DIR=/var/lib/unitmeter, or StateDirectory=unitmeter in the agent's unit",
			"there is none: each start of the agent restarts every series, and nothing is stored while the Collector is away")
	}
	f := stateFinding(d.cfg.Store.Dir, d.cfg.Store.OutboxMaxBytes)
	d.stateless = f.Status == statusFail
	return f
}

// stateFinding has the rules of the store (package store, checkDir) and says
// the fix for each.
func stateFinding(dir string, outbox int64) finding {
	uid := os.Geteuid()
	mkdir := fmt.Sprintf("install -d -m 0700 -o %d %s", uid, dir)
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return absentState(dir, mkdir)
	case errors.Is(err, fs.ErrPermission):
		return failure("run it as the user that "+dir+" belongs to, or as root: "+mkdir, "uid %d may not search the directories above %s", uid, dir)
	case err != nil:
		return failure(mkdir, "%v", err)
	case !info.IsDir():
		return failure("set UNITMETER_STATE_DIR to another path, or move the file away: mv "+dir+" "+dir+".old", "%s is not a directory", dir)
	}
	// Before the mode: chmod by somebody else would fail.
	if owner := int(info.Sys().(*syscall.Stat_t).Uid); owner != uid {
		return failure(fmt.Sprintf("chown -R %d %s", uid, dir),
			"%s belongs to %s, and this is uid %d (%s); or run this as that user", dir, userName(owner), uid, userName(uid))
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return failure("chmod 0700 "+dir, "others may write to %s (mode %#o)", dir, perm)
	}
	// The bits do not show a read-only mount, a full disk or a sandbox.
	if err := writable(dir); err != nil {
		fix := "chmod u+rwx " + dir
		if errors.Is(err, syscall.EROFS) {
			fix = "set UNITMETER_STATE_DIR to a directory on a disk that can be written (in a unit: StateDirectory=unitmeter)"
		} else if errors.Is(err, syscall.ENOSPC) {
			fix = "free some space: df -h " + dir
		}
		return failure(fix, "%s cannot be written: %v", dir, err)
	}
	// Bavail and not Bfree: the rest is kept for root.
	var disk unix.Statfs_t
	if err := unix.Statfs(dir, &disk); err != nil {
		return failure("df -h "+dir, "%s: %v", dir, err)
	}
	free := int64(min(disk.Bavail, math.MaxInt64/uint64(disk.Bsize)) * uint64(disk.Bsize))
	found := fmt.Sprintf("%s, mode %#o, %s free", dir, info.Mode().Perm(), tty.Bytes(float64(free)))
	// No fault: it should be the agent.
	if holder := database.LockHolder(info); holder != "" {
		found += ", in use by " + holder
	}
	if free < minFree {
		return warning("free some space: df -h "+dir, "%s: less than %s", found, tty.Bytes(minFree))
	}
	if free < outbox {
		return warning("set UNITMETER_OUTBOX_MAX_BYTES to less than what is free, or free some space", "%s: less than the outbox may take (%s)", found, tty.Bytes(float64(outbox)))
	}
	return good("%s", found)
}

// checkOutbox looks for requests that wait for the Collector for too long, and
// for those that it refused until they were set aside.
func (d *doctor) checkOutbox(ctx context.Context) finding {
	if !d.configured || d.cfg.Store.Dir == "" {
		return skipped("there is no state directory")
	}
	reader, err := store.OpenReader(ctx, d.cfg.Store.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return skipped("the agent has not used this state directory yet")
	}
	if errors.Is(err, fs.ErrPermission) && d.stateless {
		return skipped("the state directory cannot be read")
	}
	const look = "journalctl -u " + accounting.AgentUnit + " -n 20"
	if err != nil {
		return failure(look, "%v", err)
	}
	waiting, err := reader.Backlog(ctx)
	refused, err2 := reader.Quarantined(ctx)
	partial, since, err3 := reader.Partial(ctx)
	if err := errors.Join(err, err2, err3, reader.Close()); err != nil {
		return failure(look, "%v", err)
	}
	// A request is sent when it is made, so one of the cycle before last shows
	// that something is in the way.
	if age := time.Since(waiting.Oldest); waiting.Requests > 0 && age > 2*d.cfg.Interval+d.cfg.OTLP.Timeout {
		return d.backlogFinding(waiting, age.Round(time.Second))
	}
	if partial.Rejected > 0 {
		return partialFinding(partial, since)
	}
	if n := len(refused); n > 0 {
		last := refused[n-1]
		return warning("unitmeter history --quarantined",
			"the Collector refused %d requests for good (see its log), the last at %s: %s", n, last.At.UTC().Format(time.RFC3339), last.Reason)
	}
	return good("no request was refused, and none waits too long")
}

// partialFinding is about a receiver that takes the requests, and not the points.
func partialFinding(p store.Partial, since time.Time) finding {
	judged := warning
	if p.Rejected >= int64(p.Points) {
		judged = failure
	}
	return judged(otlp.Answer{Message: p.Message}.Hint(), "since %s the Collector accepts each request and refuses %d of its %d points: %q",
		since.UTC().Format(time.RFC3339), p.Rejected, p.Points, p.Message)
}

// backlogFinding says why requests wait: what the agent says of itself counts
// first, since what was in its way may be gone by now.
func (d *doctor) backlogFinding(waiting store.Backlog, age time.Duration) finding {
	found := fmt.Sprintf("%d requests (%s) wait for the Collector, the oldest for %s", waiting.Requests, tty.Bytes(float64(waiting.Bytes)), age)
	if d.agent != nil {
		if _, why, failing := strings.Cut(d.agent.status, FailingSince); failing {
			found += "; the agent has failed since " + why
		}
	}
	switch {
	case d.blocked != "":
		return warning(d.blocked, "%s; see the checks of the endpoint. The requests are sent once that is fixed", found)
	case d.agent == nil:
		return warning("unitmeter run", "%s; there is no %s to send them", found, accounting.AgentUnit)
	case d.agent.state != "active":
		return warning("systemctl enable --now "+accounting.AgentUnit, "%s; %s does not run (%s)", found, accounting.AgentUnit, d.agent.state)
	}
	// Between two tries an agent waits for up to minutes.
	return warning("systemctl restart "+accounting.AgentUnit, "%s; the Collector accepts requests now, and the agent retries by itself", found)
}

// absentState judges a directory that the agent would have to make.
func absentState(dir, mkdir string) finding {
	parent := filepath.Dir(dir)
	for {
		if _, err := os.Stat(parent); err == nil || parent == "/" {
			break
		}
		parent = filepath.Dir(parent)
	}
	// By the kernel's own rules, and without making anything.
	if err := unix.Access(parent, unix.W_OK|unix.X_OK); err != nil {
		return failure("as root: "+mkdir, "%s does not exist, and uid %d may not create it in %s: %v", dir, os.Geteuid(), parent, err)
	}
	return good("%s does not exist yet; the agent creates it", dir)
}

// writable makes a file and removes it again.
func writable(dir string) error {
	f, err := os.CreateTemp(dir, "doctor-")
	if err != nil {
		return err
	}
	// One block, synced: some file systems report a full disk only then.
	_, err = f.Write(make([]byte, 4096))
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
}
