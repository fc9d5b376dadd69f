// Command traffic makes and swallows network traffic of exactly known size, so
// that tests can tell what systemd must have counted. On loopback, without
// losses, a UDP datagram of N payload bytes counts as N+28 bytes (IPv4) or N+48
// (IPv6), once for the sender and once for the receiver.
//
//	traffic udp-sink ADDR                                   receive and discard
//	traffic udp-send ADDR [-bytes 100] [-count 1] [-rate 0]  send datagrams; rate in packets/s, 0 = at once
//	traffic tcp-sink ADDR [-conns 0] [-rate 0]               accept, read and discard; rate in B/s for each connection
//	traffic tcp-send ADDR [-bytes 1]                         connect, send, wait until the peer has read all
//	traffic tcp-source ADDR [-bytes 1] [-conns 0]            accept, send, wait until the peer has read all
//	traffic tcp-fetch ADDR                                   connect and read to the end
//
// A listener serves -conns connections and ends (0: serves for ever). ADDR is
// host:port; "-" is the socket that systemd passed in LISTEN_FDS. Listeners
// report READY=1 (Type=notify). A sender that is refused or cut off fails: it
// never sends less than it was told in silence.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "traffic:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) < 2 {
		return errors.New("usage: traffic udp-sink|udp-send|tcp-sink|tcp-send|tcp-source|tcp-fetch ADDR [flags]")
	}
	mode, addr := args[0], args[1]
	flags := flag.NewFlagSet(mode, flag.ContinueOnError)
	size := flags.Int64("bytes", -1, "payload bytes")
	count := flags.Int("count", 1, "datagrams")
	conns := flags.Int("conns", 0, "connections to serve, 0 for no limit")
	rate := flags.Int64("rate", 0, "packets or bytes a second, 0 for no limit")
	if err := flags.Parse(args[2:]); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%s: argument %q is not understood; flags come after the address", mode, flags.Arg(0))
	}
	if *size < 0 { // the default differs: a datagram is easily told from another
		*size = 1
		if mode == "udp-send" {
			*size = 100
		}
	}
	var err error
	switch mode {
	case "udp-sink":
		err = udpSink(addr)
	case "udp-send":
		err = udpSend(addr, *size, *count, *rate)
	case "tcp-sink":
		err = serve(addr, *conns, func(c net.Conn) error { return discard(c, *rate) })
	case "tcp-source":
		err = serve(addr, *conns, func(c net.Conn) error { return send(c, *size) })
	case "tcp-send":
		err = dial(addr, func(c net.Conn) error { return send(c, *size) })
	case "tcp-fetch":
		err = dial(addr, func(c net.Conn) error { return discard(c, *rate) })
	default:
		return fmt.Errorf("mode %q is not known; run traffic without arguments for a list", mode)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", mode, addr, err)
	}
	_, err = fmt.Fprintln(out, "done")
	return err
}

// passed returns the first socket that systemd passed.
func passed() (*os.File, error) {
	if os.Getenv("LISTEN_FDS") == "" {
		return nil, errors.New("no LISTEN_FDS in the environment; start it from a socket unit or name an address")
	}
	return os.NewFile(3, "LISTEN_FD"), nil
}

// ready tells systemd that a listener listens. Outside of Type=notify there is
// nobody to tell.
func ready() error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	c, err := net.Dial("unixgram", path)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte("READY=1"))
	return err
}

func udpSink(addr string) error {
	var c net.PacketConn
	var err error
	if addr == "-" {
		var f *os.File
		if f, err = passed(); err != nil {
			return err
		}
		c, err = net.FilePacketConn(f)
	} else {
		c, err = net.ListenPacket("udp", addr)
	}
	if err != nil {
		return err
	}
	if err := ready(); err != nil {
		return err
	}
	for buf := make([]byte, 1<<16); ; {
		if _, _, err := c.ReadFrom(buf); err != nil {
			return err
		}
	}
}

func udpSend(addr string, size int64, count int, rate int64) error {
	if size > 65507 {
		return fmt.Errorf("%d bytes do not fit into a datagram; 65507 do", size)
	}
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	// A connected socket, so that a missing receiver is an error of the next write.
	payload := make([]byte, size)
	began := time.Now()
	for i := range count {
		if rate > 0 {
			// Against the start, not the last packet: sleeps that last too long
			// are made up for.
			time.Sleep(time.Until(began.Add(time.Duration(int64(i) * int64(time.Second) / rate))))
		}
		if _, err := c.Write(payload); err != nil {
			return fmt.Errorf("after %d datagrams: %w", i, err)
		}
	}
	return nil
}

func serve(addr string, conns int, handle func(net.Conn) error) error {
	var l net.Listener
	var err error
	switch {
	case addr != "-":
		l, err = net.Listen("tcp", addr)
	case strings.HasPrefix(os.Getenv("LISTEN_FDNAMES"), "connection"): // Accept=yes
		var f *os.File
		var c net.Conn
		if f, err = passed(); err != nil {
			return err
		}
		if c, err = net.FileConn(f); err != nil {
			return err
		}
		f.Close() // FileConn has a copy, and the peer waits for the last one
		return handle(c)
	default:
		var f *os.File
		if f, err = passed(); err != nil {
			return err
		}
		l, err = net.FileListener(f)
	}
	if err != nil {
		return err
	}
	defer l.Close()
	if err := ready(); err != nil {
		return err
	}
	results := make(chan error) // of counted connections only
	for i := 0; conns == 0 || i < conns; i++ {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { // ends with its connection
			err := handle(c)
			if conns > 0 {
				results <- err
			} else if err != nil {
				fmt.Fprintln(os.Stderr, "traffic:", err)
			}
		}()
	}
	var failures []error
	for range conns {
		failures = append(failures, <-results)
	}
	return errors.Join(failures...)
}

func dial(addr string, handle func(net.Conn) error) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	return handle(c)
}

// send returns when the peer has closed, that is, has read everything.
func send(c net.Conn, size int64) error {
	defer c.Close()
	chunk := make([]byte, 1<<16)
	for left := size; left > 0; {
		n, err := c.Write(chunk[:min(left, int64(len(chunk)))])
		left -= int64(n)
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", size-left, size, err)
		}
	}
	// The peer's end of file tells it to close, and its close tells us.
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, c)
	return err
}

func discard(c net.Conn, rate int64) error {
	defer c.Close()
	if rate == 0 {
		_, err := io.Copy(io.Discard, c)
		return err
	}
	// A slow reader fills the sender's buffers: what it has not read is still on
	// the sender's side when that one is killed.
	for tick := time.NewTicker(100 * time.Millisecond); ; <-tick.C {
		if _, err := io.CopyN(io.Discard, c, max(rate/10, 1)); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}
