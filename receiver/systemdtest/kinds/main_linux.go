// Command kinds makes one kind of network traffic, of a size that is known as far as
// the kind allows. It complements the traffic command, whose traffic is plain.
//
//	kinds udp6|tcp4|tcp6|mptcp|sendfile|raw|rawhdr|packet|gso|gro|refused|closed|denied|multicast|broadcast|fragments|thread
//	kinds listen PORT BACKLOG SECONDS    accept nothing for a time, then all
//	kinds dial PORT N SECONDS            N connections at once, held for a time
//	kinds pass PATH                      pass a socket to the one who takes it, over the Unix socket PATH
//	kinds take PATH                      take a socket, send 20 datagrams of 500 B with it
//	kinds move DIRECTORY FIFO            make a socket, go to another cgroup, then send as many
//	                                     datagrams of 100 B over it as each line of FIFO.in says,
//	                                     and write a line to FIFO.out
//	kinds flood N                        make N cgroups below the own one, send a datagram of 100 B
//	                                     in each, and let them stand
//
// Datagrams go to a receiver in the same process, or to 127.0.0.1:9999.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	sink     = "127.0.0.1:9999"
	closed   = "127.0.0.1:1"
	datagram = 42000 // of gso and gro
	segment  = 1400

	protocolTest  = 253 // for experiments, RFC 3692
	udpSegment    = 103
	udpGRO        = 104
	protocolUDP   = 17
	largeReceiver = 4 << 20
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "kinds:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("name a kind of traffic")
	}
	var numbers []int
	for _, a := range args[1:] {
		n, _ := strconv.Atoi(a) // 0 for a path
		numbers = append(numbers, n)
	}
	switch name := args[0]; {
	case name == "udp6":
		return udp("udp6", "[::1]:0", 100, 100)
	case name == "tcp4":
		return tcp("127.0.0.1:0", 20_000_000, false)
	case name == "tcp6":
		return tcp("[::1]:0", 20_000_000, false)
	case name == "mptcp":
		return tcp("127.0.0.1:0", 5_000_000, true)
	case name == "sendfile":
		return sendfile(3_000_000)
	case name == "raw":
		return raw()
	case name == "rawhdr":
		return rawHeader()
	case name == "packet":
		return errors.Join(packet(), udp("udp4", "127.0.0.1:0", 1, 100))
	case name == "gso":
		return segmented(false)
	case name == "gro":
		return segmented(true)
	case name == "refused":
		for range 20 {
			_, err := net.Dial("tcp4", closed)
			if err == nil {
				return fmt.Errorf("dial %s: it accepts, want a refusal", closed)
			}
			if !errors.Is(err, syscall.ECONNREFUSED) {
				return err
			}
		}
		return nil
	case name == "closed":
		return toClosed(20, syscall.ECONNREFUSED)
	case name == "denied":
		return toClosed(20, syscall.EPERM)
	case name == "multicast":
		return multicast()
	case name == "broadcast":
		return broadcast()
	case name == "fragments":
		return udp("udp4", "127.0.0.1:0", 5, 20000)
	case name == "thread":
		return thread()
	case name == "listen" && len(args) == 4:
		return listen(numbers[0], numbers[1], time.Duration(numbers[2])*time.Second)
	case name == "dial" && len(args) == 4:
		return dial(numbers[0], numbers[1], time.Duration(numbers[2])*time.Second)
	case name == "pass" && len(args) == 2:
		return pass(args[1])
	case name == "take" && len(args) == 2:
		return take(args[1])
	case name == "flood" && len(args) == 2:
		return flood(numbers[0])
	case name == "move" && len(args) == 3:
		return move(args[1], args[2])
	}
	return fmt.Errorf("%q is no kind of traffic, or has the wrong arguments", args)
}

// udp sends n datagrams to itself.
func udp(network, address string, n, size int) error {
	to, err := net.ListenPacket(network, address)
	if err != nil {
		return err
	}
	defer to.Close()
	c, err := net.Dial(network, to.LocalAddr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	for range n {
		if _, err := c.Write(make([]byte, size)); err != nil {
			return err
		}
		if _, _, err := to.ReadFrom(make([]byte, size)); err != nil {
			return err
		}
	}
	return nil
}

// connection returns both ends of a connection over loopback.
func connection(address string, multipath bool) (client, server *net.TCPConn, err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(multipath)
	l, err := lc.Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	var d net.Dialer
	d.SetMultipathTCP(multipath)
	c, err := d.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	s, err := l.Accept()
	if err != nil {
		return nil, nil, err
	}
	client, server = c.(*net.TCPConn), s.(*net.TCPConn)
	if used, err := client.MultipathTCP(); err != nil || used != multipath {
		return nil, nil, fmt.Errorf("multipath TCP is %v, want %v: %w", used, multipath, errors.Join(err, errors.ErrUnsupported))
	}
	return client, server, nil
}

// finish reads the server's end to the end, and closes both.
func finish(client, server *net.TCPConn, send func() error) error {
	read := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, server)
		read <- errors.Join(err, server.Close())
	}()
	err := errors.Join(send(), client.CloseWrite())
	_, readErr := io.Copy(io.Discard, client)
	return errors.Join(err, readErr, <-read, client.Close())
}

func tcp(address string, size int, multipath bool) error {
	client, server, err := connection(address, multipath)
	if err != nil {
		return err
	}
	return finish(client, server, func() error {
		_, err := client.Write(make([]byte, size))
		return err
	})
}

func sendfile(size int) error {
	f, err := os.CreateTemp("", "")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := f.Truncate(int64(size)); err != nil {
		return err
	}
	client, server, err := connection("127.0.0.1:0", false)
	if err != nil {
		return err
	}
	return finish(client, server, func() error {
		c, err := client.SyscallConn()
		if err != nil {
			return err
		}
		var sendErr error
		left := size
		err = c.Write(func(fd uintptr) bool {
			for left > 0 {
				n, err := syscall.Sendfile(int(fd), int(f.Fd()), nil, left)
				if errors.Is(err, syscall.EAGAIN) {
					return false
				}
				if err != nil {
					sendErr = err
					return true
				}
				left -= n
			}
			return true
		})
		return errors.Join(err, sendErr)
	})
}

func raw() error {
	var sockets [2]int
	for i := range sockets {
		s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, protocolTest)
		if err != nil {
			return err
		}
		sockets[i] = s
	}
	for range 20 {
		if err := syscall.Sendto(sockets[1], make([]byte, 200), 0, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return err
		}
	}
	return nil
}

// header is an IPv4 packet of 120 B.
func header() []byte {
	p := make([]byte, 120)
	p[0], p[8], p[9] = 0x45, 64, protocolTest
	binary.BigEndian.PutUint16(p[2:], 120)
	copy(p[12:], []byte{127, 0, 0, 1, 127, 0, 0, 1})
	return p
}

func rawHeader() error {
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_RAW)
	if err != nil {
		return err
	}
	for range 20 {
		if err := syscall.Sendto(s, header(), 0, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return err
		}
	}
	return nil
}

// packet sends by a packet socket, which belongs to no cgroup that is counted.
func packet() error {
	s, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	const ipv4 = 0x0008 // ETH_P_IP in network order
	for range 20 {
		if err := syscall.Sendto(s, header(), 0, &syscall.SockaddrLinklayer{Protocol: ipv4, Ifindex: lo.Index, Halen: 6}); err != nil {
			return err
		}
	}
	return nil
}

// option sets a socket option.
func option(c syscall.Conn, level, name, value int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) { setErr = syscall.SetsockoptInt(int(fd), level, name, value) })
	return errors.Join(err, setErr)
}

// segmented sends large datagrams that the kernel cuts (UDP_SEGMENT), and may join
// for the receiver.
func segmented(join bool) error {
	to, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	if err := option(to, syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, largeReceiver); err != nil {
		return err
	}
	if join {
		if err := option(to, protocolUDP, udpGRO, 1); err != nil {
			return err
		}
	}
	c, err := net.DialUDP("udp4", nil, to.LocalAddr().(*net.UDPAddr))
	if err != nil {
		return err
	}
	if err := option(c, protocolUDP, udpSegment, segment); err != nil {
		return err
	}
	for range 20 {
		if _, err := c.Write(make([]byte, datagram)); err != nil {
			return err
		}
	}
	return nil
}

// toClosed sends n datagrams of 64 B to a port where nobody listens. ECONNREFUSED is
// the answer to the one before, with nothing sent; EPERM is a filter's.
func toClosed(n int, want error) error {
	c, err := net.Dial("udp4", closed)
	if err != nil {
		return err
	}
	for n > 0 {
		_, err := c.Write(make([]byte, 64))
		if err != nil && !errors.Is(err, want) {
			return err
		}
		if err == nil || errors.Is(want, syscall.EPERM) {
			n--
		}
	}
	return nil
}

func multicast() error {
	group := &net.UDPAddr{IP: net.IPv4(239, 1, 1, 1), Port: 5555}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	var receivers [2]*net.UDPConn
	for i := range receivers {
		if receivers[i], err = net.ListenMulticastUDP("udp4", lo, group); err != nil {
			return err
		}
	}
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) {
		setErr = errors.Join(
			syscall.SetsockoptInet4Addr(int(fd), syscall.IPPROTO_IP, syscall.IP_MULTICAST_IF, [4]byte{127, 0, 0, 1}),
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_MULTICAST_LOOP, 1))
	})
	if err := errors.Join(err, setErr); err != nil {
		return err
	}
	for range 10 {
		if _, err := c.WriteTo(make([]byte, 300), group); err != nil {
			return err
		}
		for _, r := range receivers {
			if _, err := r.Read(make([]byte, 300)); err != nil {
				return err
			}
		}
	}
	return nil
}

func broadcast() error {
	to, err := net.ListenPacket("udp4", ":5556")
	if err != nil {
		return err
	}
	c, err := net.ListenUDP("udp4", nil)
	if err != nil {
		return err
	}
	if err := option(c, syscall.SOL_SOCKET, syscall.SO_BROADCAST, 1); err != nil {
		return err
	}
	for range 10 {
		if _, err := c.WriteTo(make([]byte, 80), &net.UDPAddr{IP: net.IPv4bcast, Port: 5556}); err != nil {
			return err
		}
		if _, _, err := to.ReadFrom(make([]byte, 80)); err != nil {
			return err
		}
	}
	return nil
}

// ownCgroup returns the directory of the cgroup of this process.
func ownCgroup() (string, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	_, path, _ := strings.Cut("\n"+string(text), "\n0::")
	path, _, _ = strings.Cut(path, "\n")
	return filepath.Join("/sys/fs/cgroup", path), nil
}

func flood(n int) error {
	own, err := ownCgroup()
	if err != nil {
		return err
	}
	for i := range n {
		dir := filepath.Join(own, strconv.Itoa(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0); err != nil {
			return err
		}
		c, err := net.Dial("udp4", sink)
		if err != nil {
			return err
		}
		if _, err := c.Write(make([]byte, 100)); err != nil {
			return err
		}
		c.Close()
	}
	if err := notify(); err != nil {
		return err
	}
	select {} // its end would remove the cgroups
}

// notify tells systemd that a service of Type=notify is ready.
func notify() error {
	c, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
	if err != nil {
		return err
	}
	_, err = c.Write([]byte("READY=1"))
	return errors.Join(err, c.Close())
}

// thread sends from a thread in a threaded cgroup below that of the process.
func thread() error {
	own, err := ownCgroup()
	if err != nil {
		return err
	}
	dir := filepath.Join(own, "threaded")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.type"), []byte("threaded"), 0); err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends
		if err := os.WriteFile(filepath.Join(dir, "cgroup.threads"), fmt.Append(nil, syscall.Gettid()), 0); err != nil {
			done <- err
			return
		}
		done <- udp("udp4", "127.0.0.1:0", 30, 100)
	}()
	return errors.Join(<-done, udp("udp4", "127.0.0.1:0", 10, 100))
}

// listen accepts nothing at first: the backlog fills.
func listen(port, backlog int, idle time.Duration) error {
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := syscall.SetsockoptInt(s, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := errors.Join(syscall.Bind(s, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: port}), syscall.Listen(s, backlog)); err != nil {
		return err
	}
	time.Sleep(idle)
	f := os.NewFile(uintptr(s), "listener")
	l, err := net.FileListener(f)
	if err != nil {
		return err
	}
	for {
		if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			return err
		}
		c, err := l.Accept()
		if err != nil {
			return nil // nobody comes any more
		}
		c.Close()
	}
}

func dial(port, n int, hold time.Duration) error {
	for range n {
		s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		if err := syscall.Connect(s, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: port}); err != nil && !errors.Is(err, syscall.EINPROGRESS) {
			return err
		}
	}
	time.Sleep(hold)
	return nil
}

func pass(path string) error {
	c, err := net.Dial("udp4", sink)
	if err != nil {
		return err
	}
	f, err := c.(*net.UDPConn).File()
	if err != nil {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		return err
	}
	taker, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	if _, _, err := taker.WriteMsgUnix([]byte("x"), syscall.UnixRights(int(f.Fd())), nil); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, taker) // until it is done
	return err
}

func take(path string) error {
	var c *net.UnixConn
	for {
		var err error
		if c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path}); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	defer c.Close()
	rights := make([]byte, syscall.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(make([]byte, 1), rights)
	if err != nil {
		return err
	}
	messages, err := syscall.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d messages: %w", len(messages), err)
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	for range 20 {
		if _, err := syscall.Write(fds[0], make([]byte, 500)); err != nil {
			return err
		}
	}
	return nil
}

func move(dir, fifo string) error {
	c, err := net.Dial("udp4", sink)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0); err != nil {
		return err
	}
	// Open for both, so that there is always a writer.
	in, err := os.OpenFile(fifo+".in", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	out, err := os.OpenFile(fifo+".out", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for lines := bufio.NewScanner(in); lines.Scan(); {
		n, err := strconv.Atoi(lines.Text())
		if err != nil {
			return err
		}
		for range n {
			if _, err := c.Write(make([]byte, 100)); err != nil {
				return err
			}
		}
		if _, err := fmt.Fprintln(out, "done"); err != nil {
			return err
		}
	}
	return nil
}
