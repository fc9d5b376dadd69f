//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// BenchmarkShort makes and removes 100,000 cgroups one after the other, each of which
// sends three datagrams, and reads each second. An operation is all of them.
//
//	make bench PKG=./receiver/ebpf BENCH=Short TESTFLAGS=-benchtime=1x
//
// Entries are deleted after 10 s without traffic, and not after ten minutes.
func BenchmarkShort(b *testing.B) {
	const n, each = 100_000, 3
	root := tree(b)
	to := sink(b, "udp4", "127.0.0.1:0")
	for b.Loop() {
		r := attach(b, Config{Root: root, Quiet: 10 * time.Second})
		empty := r.memory(b)
		peak, entries := empty, 0
		last := map[epoch]uint64{}
		var packets, unnamed, total uint64
		sweep := func() {
			s := read(b, r)
			for _, m := range s.Meters {
				key := epoch{m.Identity.ID, m.Born}
				if last[key] == 0 && !m.Identity.Named {
					unnamed++
				}
				packets += m.Sent.Packets - last[key]
				last[key] = m.Sent.Packets
				if m.Deleted {
					delete(last, key)
				}
			}
			entries, peak, total = max(entries, s.Entries), max(peak, r.memory(b)), s.Lost.Sent.Packets
		}
		next := time.Now()
		for i := range n {
			dir := filepath.Join(root, strconv.Itoa(i)+".service")
			if err := os.Mkdir(dir, 0o755); err != nil {
				b.Fatal(err)
			}
			c := socketIn(b, dir, to)
			talk(b, c, each)
			c.Close()
			remove(b, dir)
			if time.Now().After(next) {
				next = time.Now().Add(time.Second)
				sweep()
			}
		}
		for end := time.Now().Add(time.Minute); ; time.Sleep(time.Second) {
			if sweep(); r.memory(b) <= empty+1<<14 {
				break
			}
			if time.Now().After(end) {
				b.Fatalf("the maps have %d B, at the beginning %d B", r.memory(b), empty)
			}
		}
		if packets != n*each || unnamed > 0 || total > 0 {
			b.Errorf("%d of %d packets, %d cgroups without a name, %d packets lost", packets, n*each, unnamed, total)
		}
		b.ReportMetric(float64(empty)/(1<<20), "empty-MiB")
		b.ReportMetric(float64(peak)/(1<<20), "peak-MiB")
		b.ReportMetric(float64(r.memory(b))/(1<<20), "end-MiB")
		b.ReportMetric(float64(entries), "peak-entries")
		r.Close()
	}
}

type epoch struct{ id, born uint64 }

var memlock = regexp.MustCompile(`(?m)^memlock:\s+(\d+)$`)

// memory returns the kernel memory of the maps.
func (r *Reader) memory(b *testing.B) (sum int64) {
	for _, m := range []*ebpf.Map{r.maps.Meters, r.maps.Names, r.maps.Lost, r.maps.Info} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", m.FD()))
		if err != nil {
			b.Fatal(err)
		}
		match := memlock.FindSubmatch(text)
		if match == nil {
			b.Fatalf("fdinfo has no memlock: %s", text)
		}
		n, err := strconv.ParseInt(string(match[1]), 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		sum += n
	}
	return sum
}

// BenchmarkCost compares what the program costs a packet with what systemd's own IP
// accounting on a unit and its slice costs, in turns of some 100 ms in one process. The
// figures are medians over the rounds, so that other work on the machine matters little.
//
//	make bench PKG=./receiver/ebpf BENCH=Cost TESTFLAGS=-benchtime=40x
//
// An operation is one round of all. run-ns/packet is what the kernel's statistics say
// of the programs (BPF_ENABLE_STATS, which itself costs some 40 ns).
func BenchmarkCost(b *testing.B) {
	rig := systemdtest.Start(b)
	for name, text := range map[string]string{"cost.slice": "[Slice]\nIPAccounting=yes\n", "cost.service": "[Service]\nSlice=cost.slice\nIPAccounting=yes\nExecStart=/bin/sleep infinity\n"} {
		rig.WriteFile(b, "/etc/systemd/system/"+name, text)
	}
	rig.Run(b, "systemctl", "start", "cost.service")
	root := tree(b)
	slice := rig.Path("/sys/fs/cgroup/cost.slice")
	places := map[string]string{"none": mkdir(b, root+"/plain.slice/plain.service"), "ours": mkdir(b, root+"/ours.slice/ours.service"), "systemd": slice + "/cost.service"}
	order := []string{"none", "ours", "systemd"}
	ours := filepath.Dir(places["ours"])

	for _, kind := range []struct {
		name string
		make func(b *testing.B, dir string) *pump
	}{{"udp", udpPump}, {"tcp", tcpPump}} {
		b.Run(kind.name, func(b *testing.B) {
			attach(b, Config{Root: ours})
			pumps := map[string]*pump{}
			for _, name := range order {
				pumps[name] = kind.make(b, places[name])
			}
			var against, overhead, theirs []float64 // of the CPU time of one work
			for round := 0; b.Loop(); round++ {
				now := map[string]float64{}
				for i := range order {
					name := order[(i+round)%len(order)]
					now[name] = pumps[name].run(b)
				}
				against = append(against, now["ours"]/now["systemd"])
				overhead = append(overhead, now["ours"]/now["none"])
				theirs = append(theirs, now["systemd"]/now["none"])
			}
			b.ReportMetric(0, "ns/op") // of no meaning
			b.ReportMetric((median(overhead)-1)*100, "ours-%")
			b.ReportMetric((median(theirs)-1)*100, "systemd-%")
			b.ReportMetric(median(against), "ours/systemd")
		})
	}
	b.Run("run", func(b *testing.B) {
		stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
		if err != nil {
			b.Fatal(err)
		}
		defer stats.Close()
		attach(b, Config{Root: ours})
		levels := map[string][]string{"ours": {ours}, "systemd": {slice, places["systemd"]}}
		costs := map[string][]float64{}
		pumps := map[string]*pump{"ours": udpPump(b, places["ours"]), "systemd": udpPump(b, places["systemd"])}
		for b.Loop() {
			for name, p := range pumps {
				before := runTime(b, levels[name])
				p.run(b)
				costs[name] = append(costs[name], float64(runTime(b, levels[name])-before)/float64(p.packets))
			}
		}
		b.ReportMetric(0, "ns/op")
		for name, c := range costs {
			b.ReportMetric(median(c), name+"-ns/packet")
		}
	})
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

// runTime is the time that programs attached to cgroups have run so far.
func runTime(b *testing.B, dirs []string) (sum time.Duration) {
	for _, dir := range dirs {
		f, err := os.Open(dir)
		if err != nil {
			b.Fatal(err)
		}
		for _, attach := range []ebpf.AttachType{ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress} {
			found, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: attach})
			if err != nil || len(found.Programs) != 1 {
				b.Fatalf("%d programs at %s, want 1: %v", len(found.Programs), dir, err)
			}
			p, err := ebpf.NewProgramFromID(found.Programs[0].ID)
			if err != nil {
				b.Fatal(err)
			}
			s, err := p.Stats()
			if err = errors.Join(err, p.Close()); err != nil {
				b.Fatal(err)
			}
			sum += s.Runtime
		}
		f.Close()
	}
	return sum
}

// pump moves data between two sockets of one cgroup. work does a fixed amount.
type pump struct {
	work    func() error
	packets int // sent in one work
}

// run returns the CPU time of one work in seconds.
func (p *pump) run(b *testing.B) float64 {
	start := cpuTime(b)
	if err := p.work(); err != nil {
		b.Fatal(err)
	}
	return (cpuTime(b) - start).Seconds()
}

// udpPump sends datagrams of 64 B there and back.
func udpPump(b *testing.B, dir string) *pump {
	const n = 20_000
	var there, back *net.UDPConn
	within(b, dir, func() {
		l, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			b.Fatal(err)
		}
		there, err = net.DialUDP("udp4", nil, l.LocalAddr().(*net.UDPAddr))
		if err != nil {
			b.Fatal(err)
		}
		to := there.LocalAddr().(*net.UDPAddr)
		local := l.LocalAddr().(*net.UDPAddr)
		l.Close()
		if back, err = net.DialUDP("udp4", local, to); err != nil {
			b.Fatal(err)
		}
	})
	b.Cleanup(func() { there.Close(); back.Close() })
	buf := make([]byte, 64)
	return &pump{packets: 2 * n, work: func() error {
		for range n {
			for _, way := range [][2]*net.UDPConn{{there, back}, {back, there}} {
				if _, err := way[0].Write(buf); err != nil {
					return err
				}
				if _, err := way[1].Read(buf); err != nil {
					return err
				}
			}
		}
		return nil
	}}
}

// tcpPump sends 256 MiB in writes of 128 KiB.
func tcpPump(b *testing.B, dir string) *pump {
	const size, chunk = 256 << 20, 128 << 10
	var client, server net.Conn
	within(b, dir, func() {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		if client, err = net.Dial("tcp4", l.Addr().String()); err != nil {
			b.Fatal(err)
		}
		if server, err = l.Accept(); err != nil {
			b.Fatal(err)
		}
	})
	b.Cleanup(func() { client.Close(); server.Close() })
	out, in := make([]byte, chunk), make([]byte, chunk)
	return &pump{work: func() error {
		done := make(chan error, 1)
		go func() {
			for left := size; left > 0; {
				n, err := server.Read(in)
				if err != nil {
					done <- err
					return
				}
				left -= n
			}
			done <- nil
		}()
		for range size / chunk {
			if _, err := client.Write(out); err != nil {
				return err
			}
		}
		return <-done
	}}
}
