package receiver

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// sender is a service that sends packets at a rate and then waits for finish.
type sender struct {
	unit    string
	packets uint64
}

func busy(t *testing.T, rig *systemdtest.Rig, name string, packets, rate int, settings ...string) sender {
	t.Helper()
	sink(t, rig)
	rig.WriteFile(t, "/etc/systemd/system/"+name+".service", "[Service]\nIPAccounting=yes\nType=oneshot\nRemainAfterExit=yes\n"+
		strings.Join(settings, "\n")+"\nExecStart="+rig.Traffic()+" udp-send "+sinkAddress+fmt.Sprintf(" -count %d -rate %d\n", packets, rate)+
		"ExecStart=/bin/sh -c 'until [ -e /run/%N.finish ]; do sleep .1; done'\n") // systemd forgets counters of what has exited
	rig.Run(t, "systemctl", "daemon-reload")
	t.Cleanup(func() { rig.Run(t, "systemctl", "stop", name) })
	return sender{name + ".service", uint64(packets)}
}

// start starts the service under the eyes of a receiver, which has calibrated it.
func (c sender) start(t *testing.T, rig *systemdtest.Rig, cfg Config) *Receiver {
	t.Helper()
	cfg.Include = []string{c.unit}
	r, _ := start(t, cfg)
	r.Sweep(t.Context())
	rig.Run(t, "systemctl", "start", "--no-block", c.unit)
	held(t, r, c.unit)
	return r
}

// finish waits until all is sent, and checks that no more than that is counted,
// and what is missing stated. It returns what is counted.
func (c sender) finish(t *testing.T, rig *systemdtest.Rig, r *Receiver) Counters {
	t.Helper()
	sweepUntil(t, r, c.unit+" is read from the kernel again", func(s *Sweep) bool {
		_, ok := s.seriesOf(c.unit)
		return ok && r.heldExactly(c.unit)
	})
	rig.Run(t, "touch", "/run/"+strings.TrimSuffix(c.unit, ".service")+".finish")
	rig.Run(t, "sh", "-c", "while [ $(systemctl show -p ActiveState --value "+c.unit+") = activating ]; do sleep .1; done")
	got, _ := r.Sweep(t.Context()).seriesOf(c.unit)
	if again, _ := r.Sweep(t.Context()).seriesOf(c.unit); again.Total != got.Total {
		t.Errorf("at rest the total goes from %+v to %+v", got.Total, again.Total)
	}
	stated := r.healthNow().uncertain
	t.Logf("%d of %d packets are counted, and %d are stated as uncertain", got.Total.EgressPackets, c.packets, stated.EgressPackets)
	most, _ := got.Total.plus(stated)
	if got.Total.EgressPackets > c.packets || got.Total.EgressBytes > c.packets*datagramBytes {
		t.Errorf("more than %d packets are counted: %+v", c.packets, got.Total)
	}
	// Before 249, systemd has no program attached for a part of the reload.
	if systemdVersion(t, rig) >= 249 && (most.EgressPackets < c.packets || most.EgressBytes < c.packets*datagramBytes) {
		t.Errorf("of %d packets, %+v are counted, and only %+v stated", c.packets, got.Total, stated)
	}
	return got.Total
}

// TestKernelReloadsWhileSwept: reloads and sweeps come at any moments.
func TestKernelReloadsWhileSwept(t *testing.T) {
	rig := theRig(t)
	c := busy(t, rig, "kswept", 16000, 2000)
	r := c.start(t, rig, kernelConfig(rig, Config{}))
	var sweeping sync.WaitGroup
	stop := make(chan struct{})
	sweeping.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
				r.Sweep(t.Context())
			}
		}
	})
	for began := time.Now(); time.Since(began) < 7*time.Second; {
		time.Sleep(time.Duration(50+rand.IntN(500)) * time.Millisecond)
		rig.Run(t, "systemctl", []string{"daemon-reload", "daemon-reexec"}[rand.IntN(2)])
	}
	close(stop)
	sweeping.Wait()
	c.finish(t, rig, r)
}

// TestKernelReloadsUnheard: systemd may reload as often as it likes while there is
// no connection on which it could say so, also when a unit begins to send only then.
func TestKernelReloadsUnheard(t *testing.T) {
	for _, idle := range []bool{false, true} {
		t.Run(fmt.Sprintf("idle before %v", idle), func(t *testing.T) {
			rig := theRig(t)
			rig.Run(t, "rm", "-f", "/run/unheard")
			c := busy(t, rig, fmt.Sprintf("kunheard-%v", idle), 12000, 2000, "ExecStartPre=/bin/sh -c 'until [ -e /run/unheard ]; do sleep .1; done'")
			cable := newCable(t, strings.TrimPrefix(rig.SystemBus(), "unix:path="))
			cfg := kernelConfig(rig, Config{})
			cfg.Bus = cable.address
			r := c.start(t, rig, cfg)
			send := func() { rig.Run(t, "touch", "/run/unheard") }
			if !idle {
				send()
				sweepUntil(t, r, "the unit sends", func(s *Sweep) bool {
					got, _ := s.seriesOf(c.unit)
					return got.Total.EgressPackets > 100
				})
			}
			cable.cut()
			send()
			for range 3 {
				before := programsOf(t, rig, c.unit)
				rig.Run(t, "systemctl", "daemon-reload")
				if version := systemdVersion(t, rig); version != 256 && version != 257 {
					eventually(t, "systemd has attached new programs only", func() bool {
						now := programsOf(t, rig, c.unit)
						return now != before && now.n == before.n
					})
				}
				time.Sleep(500 * time.Millisecond)
			}
			cable.mend()
			c.finish(t, rig, r)
		})
	}
}

// TestKernelReloadThenRestart: what a unit has sent before a reload is not on the
// odometer yet when it is restarted, and the maps are set to zero (up to systemd 255).
func TestKernelReloadThenRestart(t *testing.T) {
	rig := theRig(t)
	const unit = "krenewed.service"
	talker(t, rig, unit, "StartLimitInterval=0", "KillMode=process", "ExecStartPre=/bin/sh -c 'sleep 600 &'")
	t.Cleanup(func() { rig.Run(t, "systemctl", "kill", "--kill-who=all", "--signal=KILL", unit) })
	r, _ := start(t, kernelConfig(rig, Config{Include: []string{unit}}))
	held(t, r, unit)
	total := 0
	for range 3 {
		talk(t, rig, unit, 40)
		before := programsOf(t, rig, unit)
		rig.Run(t, "systemctl", "daemon-reload")
		if version := systemdVersion(t, rig); version != 256 && version != 257 {
			eventually(t, "systemd's new maps are taken", func() bool {
				now := programsOf(t, rig, unit)
				r.mu.Lock()
				defer r.mu.Unlock()
				s := r.kernel.tallies[unit]
				return now != before && s != nil && s.attached == now && r.kernel.reload.settled == nil
			})
		}
		rig.Run(t, "systemctl", "restart", unit)
		talk(t, rig, unit, 5)
		total += 45
		held(t, r, unit)
	}
	got, _ := r.Sweep(t.Context()).seriesOf(unit)
	stated := r.healthNow().uncertain
	most, _ := got.Total.plus(stated)
	t.Logf("of %d packets, %d are counted and %d stated", total, got.Total.EgressPackets, stated.EgressPackets)
	if got.Total.less(sent(total)) != (Counters{}) || sent(total).less(most) != (Counters{}) {
		t.Errorf("of %+v, %+v are counted, and %+v stated", sent(total), got.Total, stated)
	}
}

// programsOf returns what is attached to a unit's cgroup.
func programsOf(t *testing.T, rig *systemdtest.Rig, unit string) programs {
	t.Helper()
	dir, err := openCgroup(rig.Path("/sys/fs/cgroup/system.slice/" + unit))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dir)
	attached, err := newCalls().attached(dir)
	if err != nil {
		t.Fatal(err)
	}
	return attached
}

// TestKernelReloadUncalibrated: what systemd adds to the maps of a unit need not be
// known for what they counted over a reload to be.
func TestKernelReloadUncalibrated(t *testing.T) {
	rig := theRig(t)
	c := busy(t, rig, "kbusy", 60000, 20000)
	r := c.start(t, rig, kernelConfig(rig, Config{}))
	eventually(t, "systemd is asked for the unit's counters", func() bool {
		r.mu.Lock()
		s := r.kernel.tallies[c.unit]
		s.doubt()
		s.probes = maxCompared
		r.mu.Unlock()
		r.Sweep(t.Context())
		r.mu.Lock()
		defer r.mu.Unlock()
		return !s.known && s.reading != nil
	})
	rig.Run(t, "systemctl", "daemon-reload")
	c.finish(t, rig, r)
}

// cable is a connection to a bus that can be cut.
type cable struct {
	address string
	mu      sync.Mutex
	open    map[net.Conn]struct{} // nil while it is cut
}

func newCable(t *testing.T, bus string) *cable {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	cable := &cable{address: "unix:path=" + path, open: map[net.Conn]struct{}{}}
	var relaying sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		cable.cut()
		relaying.Wait()
	})
	relaying.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", bus)
			if err != nil || !cable.carries(near, far) {
				_ = near.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
				relaying.Go(func() {
					_, _ = io.Copy(way[0], way[1]) // until it is cut, or an end hangs up
					_ = way[0].Close()
				})
			}
		}
	})
	return cable
}

// carries takes the two ends of a connection, unless the cable is cut.
func (l *cable) carries(ends ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, end := range ends {
		if l.open == nil {
			_ = end.Close()
		} else {
			l.open[end] = struct{}{}
		}
	}
	return l.open != nil
}

func (l *cable) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for end := range l.open {
		_ = end.Close()
	}
	l.open = nil
}

func (l *cable) mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open = map[net.Conn]struct{}{}
}
