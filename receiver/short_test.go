package receiver

import (
	"fmt"
	"os"
	"testing"
)

// TestKernelShortRuns: whose cgroup was looked at is counted whole, though the
// runs send and end within milliseconds, all at the same time, and nobody sweeps.
func TestKernelShortRuns(t *testing.T) {
	const runs, each = 100, 50
	rig := theRig(t)
	sink(t, rig)
	r, _ := start(t, kernelConfig(rig, Config{Include: []string{"kwhole-*"}, Fold: []string{"kwhole-*"}}))
	rig.Run(t, "sh", "-c", fmt.Sprintf(`mkfifo /run/kwhole; i=0; while [ $i -lt %d ]; do
		systemd-run -q --no-block --collect --unit=kwhole-$i.service -p IPAccounting=yes sh -c ': </run/kwhole; exec %s udp-send %s -bytes %d -count %d'
		i=$((i+1)); done`, runs, rig.Traffic(), sinkAddress, payloadBytes, each))
	for i := range runs {
		held(t, r, fmt.Sprintf("kwhole-%d.service", i))
	}
	// The shells wait for one that writes, and any number of them may read.
	start, err := os.OpenFile(rig.Path("/run/kwhole"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer start.Close()
	eventually(t, "all of it is counted", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.series["kwhole-*"].total == sent(runs*each)
	})
	want(t, r.Sweep(t.Context()), "kwhole-*", sent(runs*each))
}
