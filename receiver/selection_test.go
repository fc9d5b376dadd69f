package receiver

import (
	"testing"

	"github.com/unitmeter/unitmeter/receiver/systemd"
)

func TestDefaultFoldTakesWhatLivesOnce(t *testing.T) {
	g, err := systemd.ParsePatterns(DefaultFold())
	if err != nil {
		t.Fatal(err)
	}
	for name, folded := range map[string]bool{
		"run-r8bb1.service": true, "run-u12.scope": true, "session-3.scope": true,
		"docker-0a1b.scope": true, "libpod-0a1b.scope": true, "cri-containerd-0a1b.scope": true, "crio-0a1b.scope": true,
		"chk@7-127.0.0.1:9200-127.0.0.1:51526.service": true, "chk@7-::1:9200-::1:51526.service": true,
		"systemd-coredump@3-4711-0.service": true, "systemd-creds@12-998-1000.service": true, "sshd-unix-local@1-2-0.service": true,
		"dbus-:1.2-org.freedesktop.problems@0.service": true, "unitmeter-doctor-99.service": true,
		"3f5c0de4a1b24e6f9a7d3f5c0de4a1b24e6f9a7d3f5c0de4a1b24e6f9a7d3f5c-1a2b3c4d5e6f7a8b.service": true,
		"tunnel@10-1-2-3.service": false, "backup@2026-11-30.service": false, "ata@pci-0000:00:1f.2.service": false,
		"dbus.service": false, "facade.service": false, "20261130-report.service": false, "user@1000.service": false, "nginx.service": false, "docker.service": false, "getty@tty1.service": false, "init.scope": false, "run-lock.mount": false,
	} {
		if got := g.Index(name) >= 0; got != folded {
			t.Errorf("%s is folded: %v, want %v", name, got, folded)
		}
	}
}
