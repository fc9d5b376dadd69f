package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/unitmeter/unitmeter/exporter/otlptest"
	"github.com/unitmeter/unitmeter/receiver"
)

// packaged reads a file of the packages.
func packaged(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "packaging", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestMeterAsPackaged: the loader with its three capabilities and the agent without
// any, in the units of the packages, count a unit without IP accounting.
func TestMeterAsPackaged(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	server := otlptest.Start(t, otlptest.Config{})
	w.forward("127.0.0.1:5317", server.Address())
	w.sh("useradd --system --no-create-home unitmeter")
	for name, unit := range map[string]string{"unitmeter.service": "unitmeter.service", "unitmeter-meter.service": "unitmeter-meter.service"} {
		w.WriteFile(t, "/etc/systemd/system/"+unit, packaged(t, name))
	}
	w.WriteFile(t, "/etc/unitmeter/unitmeter.env", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:5317\nOTEL_METRIC_EXPORT_INTERVAL=500\nUNITMETER_WIRE=yes\nUNITMETER_ATTRIBUTES=unitmeter.loopback\n")
	// The rig is not at the root of the hierarchy: to find out where it is, the
	// loader makes a cgroup. And nobody has mounted a BPF file system.
	w.WriteFile(t, "/etc/systemd/system/unitmeter-meter.service.d/rig.conf", "[Service]\nProtectControlGroups=no\n")
	w.sh("mount --make-rshared /; mkdir -p /sys/fs/bpf; mount -t bpf -o mode=700 bpf /sys/fs/bpf; systemctl daemon-reload")

	if out := w.sh("unitmeter meter status 2>&1 && exit 1 || :"); !strings.Contains(out, "no eBPF meter is loaded") {
		t.Errorf("status before: %s", out)
	}
	if out := w.sh("UNITMETER_SOURCE=ebpf UNITMETER_STATE_DIR=none setpriv --reuid unitmeter --clear-groups --inh-caps=-all unitmeter run 2>&1 && exit 1 || :"); !strings.Contains(out, "no permission for eBPF") ||
		!strings.Contains(out, "or set UNITMETER_SOURCE=dbus") || strings.Count(out, "\n") != 1 {
		t.Errorf("without rights it says: %s", out)
	}
	w.sh("systemctl start unitmeter.service")
	w.sh("unitmeter enable --ebpf || { journalctl -u unitmeter -u unitmeter-meter --no-pager; exit 1; } >&2")
	w.sh("systemctl is-active unitmeter-meter.service unitmeter.service && systemctl is-enabled unitmeter-meter.service")
	w.sh("systemd-run --quiet --service-type=notify --unit=sink " + w.Traffic() + " udp-sink 127.0.0.1:9000")
	send := "systemd-run --quiet --wait --unit=talker -p IPAccounting=no " + w.Traffic() + " udp-send 127.0.0.1:9000 -bytes 100 -count "
	// parts is what the agent has sent of the talker in a metric: bytes, by loopback.
	parts := func(metric string) map[string]int64 {
		last := map[string]int64{}
		for _, r := range server.Requests() {
			for _, p := range otlptest.Flatten(r.Metrics) {
				if p.Metric == metric && p.Attrs["systemd.unit.name"] == "talker.service" && p.Attrs["network.io.direction"] == "transmit" {
					last[p.Attrs["unitmeter.loopback"]] = p.Value
				}
			}
		}
		return last
	}
	total := func() int64 { return parts(receiver.IOName)["true"] }
	wantTotal := func(datagrams int64, when string) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d datagrams %s; the total is %d", datagrams, when, total()), func() bool { return total() >= datagrams*128 })
		if got := total(); got != datagrams*128 {
			t.Errorf("%s: the total is %d bytes, want %d", when, got, datagrams*128)
		}
	}
	w.sh(send + "3")
	wantTotal(3, "with everything running")
	w.sh("systemctl kill --signal=KILL unitmeter.service; " + send + "4; systemctl daemon-reexec; systemctl restart unitmeter-meter.service; " + send + "5; systemctl restart unitmeter.service")
	wantTotal(12, "after a kill, with a replaced program")
	for _, metric := range []string{receiver.IOName, receiver.WireIOName} {
		if got := parts(metric); len(got) != 2 || got["true"] != 12*128 || got["false"] != 0 {
			t.Errorf("%s has %v by loopback, want all in true", metric, got)
		}
	}
	if out := w.sh("unitmeter meter status"); !strings.Contains(out, "counting since ") || !strings.Contains(out, " of 65536 entries in use") {
		t.Errorf("status: %s", out)
	}
	if out := w.sh("systemctl show -p CapabilityBoundingSet --value unitmeter.service; ls /sys/fs/bpf/unitmeter"); strings.TrimSpace(out) != "v1" {
		t.Errorf("the capabilities of the agent, and the pins: %s", out)
	}

	findings := w.report("unitmeter doctor --json 2>/dev/null")
	for name, status := range map[string]string{"ebpf": "ok", "ebpf-host": "ok", "ebpf-pins": "ok", "ebpf-filters": "ok", "own-traffic": "ok", "agent": "ok", "accounting-default": "skip", "accounting": "skip", "counters": "skip", "stop-records": "skip"} {
		if findings[name].Status != status {
			t.Errorf("the doctor's check %s is %+v, want %s", name, findings[name], status)
		}
	}

	// As the scripts of the packages do it.
	w.sh("systemctl stop unitmeter-meter.service")
	w.sh(send + "1")
	wantTotal(13, "with the loader's unit stopped")
	w.sh("unitmeter meter unload; unitmeter meter unload; ! test -e /sys/fs/bpf/unitmeter")
	if f := w.report("unitmeter doctor --json 2>/dev/null")["ebpf"]; f.Status != "fail" {
		t.Errorf("without a meter, the doctor says %+v", f)
	}
	w.sh("systemctl restart unitmeter-meter.service unitmeter.service; " + send + "1")
	wantTotal(14, "loaded anew")
	w.sh("unitmeter disable --ebpf")
	w.sh("! test -e /sys/fs/bpf/unitmeter && ! test -e /etc/systemd/system/unitmeter.service.d/50-ebpf.conf && ! systemctl is-enabled unitmeter-meter.service && systemctl is-active unitmeter.service")
	if f := w.report("unitmeter doctor --json 2>/dev/null")["ebpf"]; f.Status != "skip" {
		t.Errorf("switched back, the doctor says %+v", f)
	}

	// Where the program cannot be loaded, nothing is changed.
	w.sh("umount /sys/fs/bpf; ! unitmeter enable --ebpf; ! test -e /etc/systemd/system/unitmeter.service.d/50-ebpf.conf && ! systemctl is-enabled unitmeter-meter.service && systemctl is-active unitmeter.service")
}
