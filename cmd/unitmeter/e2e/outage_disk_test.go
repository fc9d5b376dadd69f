package e2e

import (
	"strings"
	"testing"
	"time"
)

// TestDiskFaults breaks the disk under the running agent in every way that is at
// hand. The agent must go on sending meanwhile, have its state again by itself
// afterwards, and be exact all the time; the faults of the store alone, with
// power cuts and torn files, are in exporter/store.
func TestDiskFaults(t *testing.T) {
	t.Parallel()
	s := newSite(t, collectorConfig(plainReceivers))
	s.in(`mkdir -m 700 ` + siteState + `; mount -t tmpfs -o size=8m,mode=700 tmpfs ` + siteState)
	s.startAgent()
	log := func(text string) int {
		return strings.Count(s.in("journalctl -o cat --no-pager -u unitmeter"), text)
	}
	const failing = "store is unavailable"
	pid := `$(systemctl show -p MainPID --value unitmeter)`
	for _, f := range []struct {
		name, begin, fix string
		anew             bool // the store begins with a new file, and no commit need fail
	}{
		{name: "full", begin: `dd if=/dev/zero of=` + siteState + `/filler bs=4k 2>/dev/null || true; dd if=/dev/zero of=` + siteState + `/filler2 bs=1 2>/dev/null || true`, fix: `rm ` + siteState + `/filler*`},
		{name: "read-only at the start", begin: `systemctl stop unitmeter; mount -o remount,ro ` + siteState + `; systemctl start unitmeter`, fix: `mount -o remount,rw ` + siteState},
		{name: "fsync fails", begin: `systemd-run --quiet --unit=eio strace -f -qq -o /dev/null -e trace=fsync,fdatasync -e inject=fsync,fdatasync:error=EIO -p ` + pid, fix: `systemctl stop eio`},
		{name: "files deleted", begin: `rm ` + siteState + `/unitmeter.db*`, anew: true},
		{name: "file damaged at the start", begin: `systemctl stop unitmeter; rm ` + siteState + `/unitmeter.db-*; head -c 65536 /dev/urandom | dd of=` + siteState + `/unitmeter.db conv=notrunc 2>/dev/null; systemctl start unitmeter`, anew: true},
	} {
		began, failed := time.Now(), log(failing)
		anew := log("store began anew")
		s.in(f.begin)
		if f.anew {
			eventually(s.t, f.name+": the store begins anew", func() bool { return log("store began anew") > anew })
		} else {
			eventually(s.t, f.name+": commits fail", func() bool { return log(failing) > failed })
			s.caughtUp() // by sending directly
			s.in(f.fix)
			committed := s.committed()
			eventually(s.t, f.name+": commits work", func() bool { return s.committed() > committed })
		}
		s.caughtUp()
		t.Logf("%s: %v", f.name, time.Since(began).Round(100*time.Millisecond))
	}
	if n := strings.TrimSpace(s.in("systemctl show -p NRestarts --value unitmeter")); n != "0" {
		t.Errorf("the agent has restarted %s times", n)
	}
	s.exact()
}
