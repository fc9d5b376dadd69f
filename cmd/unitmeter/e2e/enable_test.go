package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestEnableSlowReload: the command waits for a generator as long as that takes, and
// says so. A signal ends the wait, and not the reload.
func TestEnableSlowReload(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.WriteFile(t, "/run/slow", "#!/bin/sh\nread -r _ </run/gate\n")
	w.sh("mkfifo /run/gate; install -D -m 0755 /run/slow /run/systemd/system-generators/slow")
	waiting := func(lines int) string {
		return fmt.Sprintf(`unitmeter enable --default >/run/said 2>&1 &
			until [ "$(grep -c "^systemd has been reloading for " /run/said)" -ge %d ]; do kill -0 $!; sleep .1; done
			`, lines)
	}
	if out := w.sh(waiting(1) + "kill -INT $!; wait $! && echo NO ERROR; cat /run/said; echo >/run/gate"); strings.Contains(out, "NO ERROR") || !strings.Contains(out, "systemd goes on with it") {
		t.Errorf("after a signal: %s", out)
	}
	if out := w.sh("systemctl show -P IPAccounting dbus.service"); out != "yes\n" {
		t.Errorf("after a signal, accounting is %q", out)
	}
	lines := 1
	if long() {
		lines = 12 // more than the 30 s of other calls
	}
	if out := w.sh(waiting(lines) + "echo >/run/gate; wait $!; cat /run/said"); !strings.Contains(out, "\nthe reload took ") || !strings.Contains(out, "\nIP accounting is on for ") {
		t.Errorf("after a slow reload: %s", out)
	}
}

// TestEnableElsewhere: in a container that has the host's bus, the files to write are
// not systemd's, so the command refuses and says what to run on the host.
func TestEnableElsewhere(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	// The same PID namespace and another root directory, as with --pid=host.
	w.sh(`mkdir /box; mount -t tmpfs box /box; mkdir -p /box/run /box/proc; mount --rbind /run /box/run
		mount --rbind /proc /box/proc; cp "$(command -v unitmeter)" /box/unitmeter`)
	for _, container := range []string{
		"chroot /box /unitmeter",
		"unshare --pid --fork chroot /box /unitmeter",
	} {
		for arguments, hint := range map[string]string{
			"enable --default":  `mkdir -p /etc/systemd/system.conf.d && printf '[Manager]\nDefaultIPAccounting=yes\n' >/etc/systemd/system.conf.d/50-unitmeter.conf && systemctl daemon-reload`,
			"disable --default": "rm /etc/systemd/system.conf.d/50-unitmeter.conf && systemctl daemon-reload",
			"enable dbus":       "systemctl set-property dbus.service IPAccounting=yes",
			"enable --all":      "unitmeter enable --all",
			"enable --ebpf":     "unitmeter enable --ebpf",
		} {
			command := container + " " + arguments
			out := w.sh(command + " 2>&1 && echo NO ERROR || :")
			if !strings.Contains(out, "run this on the host: "+hint) || strings.Contains(out, "NO ERROR") {
				t.Errorf("%s: %s", command, out)
			}
		}
	}
	if out := w.sh("find /box/etc /etc/systemd/system.conf.d /etc/systemd/system.control -name '*nitmeter*' 2>/dev/null || :"); out != "" {
		t.Errorf("files after commands that were refused: %s", out)
	}
}

// TestEnableFullDisk: the drop-in is whole or not there at all.
func TestEnableFullDisk(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.sh(`mkdir -p /etc/systemd/system.conf.d; mount -t tmpfs -o size=4k full /etc/systemd/system.conf.d
		head -c 4096 /dev/zero >/etc/systemd/system.conf.d/filler`)
	if out := w.sh("unitmeter enable --default 2>&1 && echo NO ERROR || :"); !strings.Contains(out, "no space left on device") || strings.Contains(out, "NO ERROR") {
		t.Errorf("on a full disk: %s", out)
	}
	if out := w.sh("ls -A /etc/systemd/system.conf.d"); out != "filler\n" {
		t.Errorf("after a full disk: %s", out)
	}
	w.sh("rm /etc/systemd/system.conf.d/filler; unitmeter enable --default")
	if out := w.sh("systemctl show -P IPAccounting dbus.service"); out != "yes\n" {
		t.Errorf("with room on the disk again, accounting is %q", out)
	}
}
