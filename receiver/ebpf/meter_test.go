//go:build linux && !386 && !arm && !mips && !mipsle

package ebpf

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

func TestCounts(t *testing.T) {
	root := tree(t)
	before := mkdir(t, root+"/before.service")
	r := attach(t, Config{Root: root})
	start := time.Now()
	after := mkdir(t, root+"/a.slice/after.service/payload")
	to4, to6 := sink(t, "udp", "127.0.0.1:0"), sink(t, "udp", "[::1]:0")
	talk(t, socketIn(t, before, to4), 3)
	late := socketIn(t, after, to4)
	talk(t, late, 5)
	talk(t, socketIn(t, before, to6), 1)

	s := read(t, r)
	m := at(s, "/before.service")
	six := uint64(payloadBytes + 48)
	if want := (Traffic{3*datagramBytes + six, 4, 3*datagramBytes + six, 4}); m.Sent.Traffic != want || m.Sent.Loopback != want {
		t.Errorf("sent %+v, want %+v", m.Sent, want)
	}
	if !m.Identity.Made.IsZero() || m.Identity.Cgroup.Unit != "before.service" || m.Gone {
		t.Errorf("identity %+v", m.Identity)
	}
	m = at(s, "/a.slice/after.service/payload")
	wantSent(t, "payload", m.Sent, 5)
	if id := m.Identity; id.ID != cgroupID(after) || id.Cgroup.Unit != "after.service" || id.Cgroup.Slice != "a.slice" ||
		id.Made.Before(start.Add(-time.Second)) || id.Made.After(time.Now()) {
		t.Errorf("identity %+v", id)
	}
	if s.RootID != cgroupID(root) || s.Since.After(start) || s.BootID == "" || s.Entries != 2 || s.Lost != (Lost{}) || s.Detached {
		t.Errorf("sweep %+v", s)
	}
	talk(t, late, 1)
	wantSent(t, "payload", at(read(t, r), "/a.slice/after.service/payload").Sent, 6)
}

// TestWire sends datagrams that the kernel segments, and some that leave the host.
func TestWire(t *testing.T) {
	root := tree(t)
	unit := mkdir(t, root+"/x.service")
	r := attach(t, Config{Root: root})
	c := socketIn(t, unit, sink(t, "udp4", "127.0.0.1:0"))
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var optionErr error
	if err := errors.Join(raw.Control(func(fd uintptr) {
		optionErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1400)
	}), optionErr); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if _, err := c.Write(make([]byte, 42000)); err != nil {
			t.Fatal(err)
		}
	}
	want := Traffic{Bytes: 20 * (42000 + 28), Packets: 20, WireBytes: 600 * (1400 + 28), WirePackets: 600}
	if got := at(read(t, r), "/x.service").Sent; got.Traffic != want || got.Loopback != want {
		t.Errorf("sent %+v, want %+v", got, want)
	}
}

func TestLoopbackSplit(t *testing.T) {
	root := tree(t)
	unit := mkdir(t, root+"/x.service")
	r := attach(t, Config{Root: root})
	done := make(chan error)
	within(t, unit, func() {
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with its namespace
			done <- sendInNamespace()
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
	m := at(read(t, r), "/x.service")
	away := Traffic{2 * datagramBytes, 2, 2 * datagramBytes, 2}
	local := Traffic{3 * datagramBytes, 3, 3 * datagramBytes, 3}
	if m.Sent.Loopback != local || m.Sent.Bytes != away.Bytes+local.Bytes || m.Sent.Packets != 5 {
		t.Errorf("sent %+v, want 3 packets over loopback and 2 others", m.Sent)
	}
	if m.Received.Loopback != local || m.Received.Traffic != local {
		t.Errorf("received %+v, want 3 packets over loopback alone", m.Received)
	}
}

// sendInNamespace sends two datagrams to a network and three to the own host, there
// by the address of the other device.
func sendInNamespace() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	// The kernel's own IPv6 packets would count for who made the namespace.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0); err != nil {
		return err
	}
	for _, args := range []string{"link set lo up", "link add d0 type veth peer name d1", "link set d1 up", "addr add 10.9.9.1/24 dev d0", "link set d0 up", "neigh add 10.9.9.2 dev d0 lladdr 02:00:00:00:00:02"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	local, err := net.ListenPacket("udp4", "10.9.9.1:0")
	if err != nil {
		return err
	}
	defer local.Close()
	for to, n := range map[string]int{"10.9.9.2:9": 2, local.LocalAddr().String(): 3} {
		c, err := net.Dial("udp4", to)
		if err != nil {
			return err
		}
		defer c.Close()
		for range n {
			if _, err := c.Write(make([]byte, payloadBytes)); err != nil {
				return err
			}
		}
	}
	return nil
}

// TestLateTraffic deletes the entry of a removed cgroup again and again, while a
// socket of it still sends.
func TestLateTraffic(t *testing.T) {
	root := tree(t)
	unit := mkdir(t, root+"/late.service")
	r := attach(t, Config{Root: root, Quiet: time.Nanosecond})
	c := socketIn(t, unit, sink(t, "udp4", "127.0.0.1:0"))
	total, last, born, deletions := uint64(0), uint64(0), uint64(0), 0
	sent := 0
	var identity *Identity
	sweep := func() {
		for _, m := range read(t, r).Meters {
			if m.Identity.Path != "/late.service" || identity != nil && m.Identity != identity {
				t.Fatalf("a meter of %+v", m.Identity)
			}
			identity = m.Identity
			if m.Born != born {
				born, last = m.Born, 0
			}
			total, last = total+m.Sent.Bytes-last, m.Sent.Bytes
			if m.Deleted {
				deletions++
			}
		}
	}
	talk(t, c, 1)
	sent++
	sweep()
	remove(t, unit)
	for range 10 {
		for range 4 {
			sweep()
		}
		talk(t, c, 2)
		sent += 2
		sweep()
	}
	sweep()
	sweep()
	if want := uint64(sent) * datagramBytes; total != want || deletions != 11 {
		t.Errorf("%d B over %d deletions, want %d B over 11", total, deletions, want)
	}
	var n meterName
	if err := r.maps.Names.Lookup(identity.ID, &n); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("the name is still there: %v", err)
	}
}

// TestSilentCgroups: what never talked leaves nothing in the maps.
func TestSilentCgroups(t *testing.T) {
	root := tree(t)
	r := attach(t, Config{Root: root})
	unit := mkdir(t, root+"/silent.service")
	id := cgroupID(unit)
	var n meterName
	if err := r.maps.Names.Lookup(id, &n); err != nil || !strings.HasSuffix(n.path(), "/silent.service") {
		t.Fatalf("name %q: %v", n.path(), err)
	}
	remove(t, unit)
	if err := r.maps.Names.Lookup(id, &n); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("the name is still there: %v", err)
	}
}

// TestFull: with few entries, everything is in the meters or in what was lost, and
// the reader makes room before its time.
func TestFull(t *testing.T) {
	root := tree(t)
	r := attach(t, Config{Root: root, MaxEntries: 8})
	to := sink(t, "udp4", "127.0.0.1:0")
	for i := range 30 {
		unit := mkdir(t, fmt.Sprintf("%s/u%d.service", root, i))
		c := socketIn(t, unit, to)
		talk(t, c, 2)
		c.Close()
		remove(t, unit)
	}
	s := read(t, r)
	if s.Entries != 8 || s.MaxEntries != 8 {
		t.Errorf("%d of %d entries, want 8 of 8", s.Entries, s.MaxEntries)
	}
	total := s.Lost.Sent
	for _, m := range s.Meters {
		total.Bytes += m.Sent.Bytes
	}
	if want := uint64(60 * datagramBytes); total.Bytes != want || s.Lost.Sent.Packets != 44 {
		t.Errorf("%d B, of which %+v lost, want %d B and 44 packets lost", total.Bytes, s.Lost.Sent, want)
	}
	read(t, r)
	s = read(t, r)
	deleted := 0
	for _, m := range s.Meters {
		if m.Deleted {
			deleted++
			wantSent(t, m.Identity.Path, m.Sent, 2)
		}
	}
	if deleted != 2 || s.Entries != 6 {
		t.Errorf("%d deleted and %d left, want 2 and 6", deleted, s.Entries)
	}
}

// TestChurn loads while cgroups come and go: what exists has a name, and what does
// not has none.
func TestChurn(t *testing.T) {
	root := tree(t)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for i := range 40 {
				os.Mkdir(fmt.Sprintf("%s/churn%d", root, i), 0o755)
			}
			for i := range 40 {
				unix.Rmdir(fmt.Sprintf("%s/churn%d", root, i))
			}
		}
	}()
	var readers []*Reader
	for range 12 {
		readers = append(readers, attach(t, Config{Root: root}))
	}
	close(stop)
	<-done
	mkdir(t, root+"/stays")
	for i, r := range readers {
		for _, path := range []string{"", "/stays"} {
			var n meterName
			if err := r.maps.Names.Lookup(cgroupID(root+path), &n); err != nil {
				t.Errorf("reader %d: %q has no name: %v", i, path, err)
			}
		}
		var id uint64
		var n meterName
		for it := r.maps.Names.Iterate(); it.Next(&id, &n); {
			if strings.Contains(n.path(), "/churn") {
				t.Errorf("reader %d: %s is gone and has a name", i, n.path())
			}
		}
	}
}

// TestReplace loads again and again while a socket sends, and over the pins of
// another layout.
func TestReplace(t *testing.T) {
	root, dir := tree(t), pinDir(t)
	unit := mkdir(t, root+"/busy.service")
	if loaded := mustLoad(t, LoadConfig{Root: root, Dir: dir}); loaded.Updated || loaded.Cgroups != 2 {
		t.Errorf("the first time: %+v", loaded)
	}
	c := socketIn(t, unit, sink(t, "udp4", "127.0.0.1:0"))
	stop, packets := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		defer func() { packets <- n }()
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := c.Write(make([]byte, payloadBytes)); err == nil {
					n++
				}
			}
		}
	}()
	r := open(t, Config{Root: root, Dir: dir})
	for range 20 {
		if loaded := mustLoad(t, LoadConfig{Root: root, Dir: dir}); !loaded.Updated {
			t.Error("programs were not replaced in place")
		}
	}
	// As if another version had loaded these.
	old := filepath.Join(dir, "v0")
	if err := os.Rename(filepath.Join(dir, layout), old); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Root: root, Dir: dir}); !errors.Is(err, ErrOtherLayout) {
		t.Errorf("opening another layout: %v", err)
	}
	loaded := mustLoad(t, LoadConfig{Root: root, Dir: dir})
	if loaded.Updated || len(loaded.OtherLayouts) != 1 || loaded.OtherLayouts[0] != old {
		t.Errorf("over another layout: %+v", loaded)
	}
	next := open(t, Config{Root: root, Dir: dir})
	for at(read(t, next), "/busy.service").Sent.Packets == 0 {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	n := <-packets
	before, after := read(t, r), read(t, next)
	first, second := at(before, "/busy.service").Sent, at(after, "/busy.service").Sent
	if first.Packets+second.Packets != uint64(n) || first.Packets == 0 || second.Packets == 0 {
		t.Errorf("%d and %d packets, want %d together", first.Packets, second.Packets, n)
	}
	if !before.Detached || after.Detached {
		t.Errorf("detached: the old maps %v, the new %v", before.Detached, after.Detached)
	}
	if n := attached(t, root); n != 2 {
		t.Errorf("%d programs are attached, want 2", n)
	}
	if err := Unload(dir); err != nil {
		t.Fatal(err)
	}
	waitDetached(t, root)
	if _, err := os.Stat(dir); err == nil {
		t.Errorf("%s is still there", dir)
	}
	if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("opening nothing: %v", err)
	}
}

// attached returns the number of programs that are attached to a cgroup.
func attached(t *testing.T, root string) int {
	t.Helper()
	dir, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	n := 0
	for _, a := range []ebpf.AttachType{ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress} {
		found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: a})
		if err != nil {
			t.Fatal(err)
		}
		n += len(found.Programs)
	}
	return n
}

// waitDetached waits until the kernel has let go of the links of a dead process.
func waitDetached(t *testing.T, root string) {
	t.Helper()
	for range 6000 {
		if attached(t, root) == 0 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("programs stay attached")
}

func TestKilled(t *testing.T) {
	root := tree(t)
	cmd := helper(t, "attach", root, "")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if n := attached(t, root); line != "attached\n" || n != 2 {
		t.Errorf("the helper says %q, and %d programs are attached", line, n)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() // "signal: killed"
	waitDetached(t, root)
}

func TestReaderWithoutCapabilities(t *testing.T) {
	root, dir := tree(t), pinDir(t)
	unit, gone := mkdir(t, root+"/x.service"), mkdir(t, root+"/gone.service")
	mustLoad(t, LoadConfig{Root: root, Dir: dir})
	to := sink(t, "udp4", "127.0.0.1:0")
	talk(t, socketIn(t, unit, to), 3)
	talk(t, socketIn(t, gone, to), 4)
	remove(t, gone)
	const nobody = 65534
	run := func() ([]byte, error) {
		cmd := helper(t, "read", root, dir)
		var complaints strings.Builder
		cmd.Stderr = &complaints
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, complaints.String())
		}
		return out, err
	}
	if out, err := run(); err == nil || !strings.Contains(err.Error(), ErrPermission.Error()) {
		t.Errorf("without the group: %s, %v", out, err)
	}
	for _, p := range []string{"", layout, layout + "/meters", layout + "/names", layout + "/lost", layout + "/info"} {
		if err := os.Chown(filepath.Join(dir, p), 0, nobody); err != nil { // as a loader of this group makes them
			t.Fatal(err)
		}
	}
	out, err := run()
	if kernelBefore(5, 19) {
		if err == nil || !strings.Contains(err.Error(), "CAP_BPF") {
			t.Errorf("this kernel needs CAP_BPF: %s, %v", out, err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	var meters []Meter
	if err := json.Unmarshal(out, &meters); err != nil || len(meters) != 2 {
		t.Fatalf("%v: %s", err, out)
	}
	for _, m := range meters {
		want := map[string]int{"/x.service": 3, "/gone.service": 4}[m.Identity.Path]
		wantSent(t, m.Identity.Path, m.Sent, want)
		if m.Deleted != (want == 4) {
			t.Errorf("%s: deleted %v", m.Identity.Path, m.Deleted)
		}
	}
}

func TestForeignProgram(t *testing.T) {
	root := tree(t)
	c := counter{root: root}
	defer c.close()
	if err := c.loadPrograms(8); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: c.programs.Egress, Attach: ebpf.AttachCGroupInetEgress}); err != nil {
		t.Fatal(err)
	}
	_, err = Attach(t.Context(), Config{Root: root})
	if !errors.Is(err, ErrForeignProgram) || !strings.Contains(err.Error(), "(egress)") {
		t.Errorf("attached beside a program without MULTI: %v", err)
	}
}

// TestWithoutNaming is a kernel that refuses the naming programs.
func TestWithoutNaming(t *testing.T) {
	root := tree(t)
	before := mkdir(t, root+"/before.service")
	c := &counter{root: root}
	if err := c.loadPrograms(64); err != nil {
		t.Fatal(err)
	}
	c.naming = errors.New("refused for the test")
	if err := errors.Join(c.startNaming(t.Context()), c.startCounting()); err != nil {
		t.Fatal(err)
	}
	r := &Reader{maps: c.maps, attached: c}
	defer r.Close()
	if err := r.prepare(Config{Root: root, Quiet: time.Nanosecond}); err != nil {
		t.Fatal(err)
	}
	to := sink(t, "udp4", "127.0.0.1:0")
	after, short := mkdir(t, root+"/after.service"), mkdir(t, root+"/short.service")
	talk(t, socketIn(t, before, to), 1)
	talk(t, socketIn(t, after, to), 2)
	talk(t, socketIn(t, short, to), 3)
	remove(t, short)
	s := read(t, r)
	wantSent(t, "before", at(s, "/before.service").Sent, 1)
	wantSent(t, "after", at(s, "/after.service").Sent, 2)
	m := at(s, "")
	wantSent(t, "the one without a name", m.Sent, 3)
	if m.Identity == nil || m.Identity.Named || !m.Gone || at(s, "/after.service").Gone {
		t.Errorf("without a name: %+v", m)
	}
	remove(t, after)
	if m := at(read(t, r), "/after.service"); !m.Gone || !m.Deleted {
		t.Errorf("after its end: %+v", m)
	}
}

func TestErrors(t *testing.T) {
	root := tree(t)
	if _, err := Load(t.Context(), LoadConfig{Root: root, Dir: t.TempDir() + "/unitmeter"}); !errors.Is(err, ErrNoBPFFS) {
		t.Errorf("pins on a disk: %v", err)
	}
	if _, err := Attach(t.Context(), Config{Root: t.TempDir()}); !errors.Is(err, ErrNotCgroup2) {
		t.Errorf("a root on a disk: %v", err)
	}
	if _, err := Open(Config{Dir: "/nonexistent"}); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("pins nowhere: %v", err)
	}
	nobody := helper(t, "attach", root, "")
	nobody.Stderr = nil
	nobody.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var exit *exec.ExitError
	if _, err := nobody.Output(); !errors.As(err, &exit) || !strings.Contains(string(exit.Stderr), ErrPermission.Error()) {
		t.Errorf("attached without capabilities: %v", err)
	}
	other, dir := tree(t), pinDir(t)
	mustLoad(t, LoadConfig{Root: root, Dir: dir, MaxEntries: 16})
	if _, err := Load(t.Context(), LoadConfig{Root: other, Dir: dir}); err == nil || !strings.Contains(err.Error(), "unload") {
		t.Errorf("another root: %v", err)
	}
	for _, move := range [][2]string{{"lost", "spare"}, {"names", "lost"}, {"spare", "names"}} {
		if err := os.Rename(filepath.Join(dir, layout, move[0]), filepath.Join(dir, layout, move[1])); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrOtherLayout) {
		t.Errorf("maps that differ: %v", err)
	}
}

// BenchmarkRead reads maps of n entries. Whether they change makes no difference.
func BenchmarkRead(b *testing.B) {
	root := tree(b)
	for _, n := range []int{1000, 20000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			r, err := Attach(b.Context(), Config{Root: root})
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			for i := range n {
				id := uint64(1)<<40 + uint64(i)
				var name meterName
				name.Size = uint32(copy(name.Path[:], r.prefix+fmt.Sprintf("/system.slice/unit%d.service", i))) + 1
				if err := r.maps.Names.Put(id, &name); err != nil {
					b.Fatal(err)
				}
				if err := r.maps.Meters.Put(id, &meterEntry{Born: 1}); err != nil {
					b.Fatal(err)
				}
			}
			first := time.Now()
			if s := read(b, r); len(s.Meters) < n {
				b.Fatalf("%d meters of %d", len(s.Meters), n)
			}
			b.ReportMetric(float64(time.Since(first).Microseconds())/1000, "first-ms")
			b.ReportAllocs()
			start := cpuTime(b)
			for b.Loop() {
				if s := read(b, r); len(s.Meters) < n {
					b.Fatalf("%d meters of %d", len(s.Meters), n)
				}
			}
			b.ReportMetric(float64((cpuTime(b)-start).Nanoseconds())/float64(b.N)/1e6, "cpu-ms/op")
		})
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
