//go:build linux && !386 && !arm && !mips && !mipsle

package receiver

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unitmeter/unitmeter/receiver/ledger"
)

// BenchmarkMeter sweeps cgroups that all have sent one datagram, each with a series of
// its own: reading, crediting, and the series of the sweep. None may be missing.
func BenchmarkMeter(b *testing.B) {
	theRig(b) // what it needs is needed here
	hierarchy := "/sys/fs/cgroup"
	if _, err := os.Stat(hierarchy + "/unified"); err == nil {
		hierarchy += "/unified" // a hybrid host
	}
	for _, n := range []int{1000, 20000} {
		b.Run(fmt.Sprintf("cgroups=%d", n), func(b *testing.B) {
			root, err := os.MkdirTemp(hierarchy, "unitmeter-bench-")
			if err != nil {
				b.Fatal(err)
			}
			home, err := os.ReadFile("/proc/self/cgroup")
			if err != nil {
				b.Fatal(err)
			}
			_, path, _ := strings.Cut("\n"+string(home), "\n0::")
			path, _, _ = strings.Cut(path, "\n")
			join := func(dir string) {
				if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0); err != nil {
					b.Fatal(err)
				}
			}
			unit := func(i int) string { return fmt.Sprintf("unit%d.service", i) }
			b.Cleanup(func() {
				join(hierarchy + path)
				for i := range n {
					_ = unix.Rmdir(filepath.Join(root, unit(i))) // the next one tells
				}
				if err := unix.Rmdir(root); err != nil {
					b.Error(err)
				}
			})
			sink, err := net.ListenPacket("udp4", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer sink.Close()
			r, _ := start(b, Config{Source: EBPF, MaxSeries: n + 100, meterDirs: []string{b.TempDir()}, meterRoot: root})
			for i := range n {
				dir := filepath.Join(root, unit(i))
				if err := os.Mkdir(dir, 0o755); err != nil {
					b.Fatal(err)
				}
				join(dir)
				c, err := net.Dial("udp4", sink.LocalAddr().String())
				if err != nil {
					b.Fatal(err)
				}
				if _, err := c.Write(make([]byte, 100)); err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
			first := time.Now()
			s := r.Sweep(b.Context())
			b.ReportMetric(float64(time.Since(first).Microseconds())/1000, "first-ms")
			totals := map[string]ledger.Counters{}
			for _, one := range s.State.Series {
				totals[one.ID.Name] = one.Total
			}
			for i := range n {
				if got := totals[unit(i)]; got != (ledger.Counters{Sent: ledger.Traffic{Bytes: 128, Packets: 1}}) {
					b.Fatalf("%s has %+v", unit(i), got)
				}
			}
			used := func() time.Duration {
				var u unix.Rusage
				if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
					b.Fatal(err)
				}
				return time.Duration(u.Utime.Nano() + u.Stime.Nano())
			}
			b.ReportAllocs()
			before := used()
			for b.Loop() {
				if s := r.Sweep(b.Context()); s.Partial || len(s.State.Series) < n {
					b.Fatalf("%d series of %d, partial: %v", len(s.State.Series), n, s.Partial)
				}
			}
			b.ReportMetric(float64((used()-before).Microseconds())/1000/float64(b.N), "cpu-ms/op")
		})
	}
}
