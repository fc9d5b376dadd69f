package bus

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/unitmeter/unitmeter/receiver/systemdtest"
)

// peer is the other end of a wire. It reads calls as fast as they come and
// answers what the test tells it to.
type peer struct {
	t    *testing.T
	conn net.Conn

	mu    sync.Mutex
	calls []peerCall
}

type peerCall struct {
	serial uint32
	Property
}

// promised is how many calls a sweep has in flight at most, whatever the code
// calls it: half of what dbus-daemon allows.
const promised = 64

// newWire returns a wire that has shaken hands with a peer over a pipe without
// any buffer, and whose messages somebody reads as godbus does. Both ends are
// closed at the end of the test.
func newWire(t *testing.T) (*connection, *peer) {
	t.Helper()
	near, far := net.Pipe()
	go func() {
		in := bufio.NewReader(far)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			if line == "BEGIN\r\n" {
				_, _ = far.Write([]byte("OK 0123456789abcdef0123456789abcdef\r\n"))
				return
			}
		}
	}()
	w, err := handshake(t.Context(), near)
	if err != nil {
		t.Fatal(err)
	}
	w.authed = true
	go func() { _, _ = io.Copy(io.Discard, w) }()
	t.Cleanup(func() {
		_ = w.Close()
		_ = far.Close()
	})
	return w, &peer{t: t, conn: far}
}

// read takes calls until the connection ends.
func (p *peer) read() {
	for {
		call, err := readCall(p.conn)
		if err != nil {
			return
		}
		p.mu.Lock()
		p.calls = append(p.calls, call)
		p.mu.Unlock()
	}
}

func readCall(r io.Reader) (peerCall, error) {
	m, err := dbus.DecodeMessage(r)
	if err != nil {
		return peerCall{}, err
	}
	path, _ := m.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
	call := peerCall{serial: m.Serial(), Property: Property{Path: string(path)}}
	return call, dbus.Store(m.Body, &call.Interface, &call.Name)
}

// take returns the calls that wait for an answer, and forgets them.
func (p *peer) take() []peerCall {
	p.mu.Lock()
	defer p.mu.Unlock()
	calls := p.calls
	p.calls = nil
	return calls
}

func (p *peer) send(message []byte) {
	p.t.Helper()
	if _, err := p.conn.Write(message); err != nil {
		p.t.Errorf("the peer cannot write: %v", err)
	}
}

// numbered is a list of n properties that can be told apart.
func numbered(i int) Property {
	return Property{"/n/" + strconv.Itoa(i), "a.b", "C"}
}

// number undoes numbered.
func (c peerCall) number() uint64 {
	n, _ := strconv.ParseUint(strings.TrimPrefix(c.Path, "/n/"), 10, 64)
	return n
}

// answers collects what gets delivers, and checks that each comes once.
type answers struct {
	t      *testing.T
	mu     sync.Mutex
	values map[int]uint64
	errors map[int]string
}

func newAnswers(t *testing.T) *answers {
	return &answers{t: t, values: map[int]uint64{}, errors: map[int]string{}}
}

func (a *answers) done(i int, r Reply) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, value := a.values[i]
	_, fault := a.errors[i]
	if value || fault {
		a.t.Errorf("call %d was answered twice", i)
	}
	if v, err := r.Uint64(); err != nil {
		a.errors[i] = err.Error()
	} else {
		a.values[i] = v
	}
}

// check wants the first n calls to have the answers of value.
func (a *answers) check(n int, value func(i int) uint64) {
	a.t.Helper()
	if len(a.values) != n {
		a.t.Errorf("%d calls were answered, want %d", len(a.values), n)
	}
	for i, v := range a.values {
		if v != value(i) {
			a.t.Errorf("call %d got %d, want %d", i, v, value(i))
		}
	}
}

// TestGets: whatever the number of calls and the order of the replies, each is
// answered once with its own value, and never more than promised are open.
func TestGets(t *testing.T) {
	for _, n := range []int{0, 1, 31, 32, 33, 64, 65, 1000} {
		for _, order := range []string{"first in first out", "last in first out", "random"} {
			t.Run(fmt.Sprintf("%d calls, %s", n, order), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, p := newWire(t)
					go p.read()
					a := newAnswers(t)
					result := make(chan error, 1)
					go func() { result <- w.gets(t.Context(), n, numbered, a.done) }()
					var open []peerCall
					most := 0
					for {
						synctest.Wait() // all that can be sent has been sent
						open = append(open, p.take()...)
						most = max(most, len(open))
						if len(open) == 0 {
							break
						}
						answer := 1 + rand.N(len(open))
						for range answer {
							i := 0
							switch order {
							case "last in first out":
								i = len(open) - 1
							case "random":
								i = rand.N(len(open))
							}
							p.send(getReply(t, byteOrders[i%2], open[i].serial, 3*open[i].number()))
							open = append(open[:i], open[i+1:]...)
						}
					}
					if err := <-result; err != nil {
						t.Fatal(err)
					}
					a.check(n, func(i int) uint64 { return uint64(3 * i) })
					if most > promised {
						t.Errorf("%d calls were in flight, more than %d", most, promised)
					}
					if n >= promised && most < promised/2 {
						t.Errorf("at most %d calls were in flight: they are not pipelined", most)
					}
				})
			})
		}
	}
}

func TestGetsErrorReplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, p := newWire(t)
		go p.read()
		a := newAnswers(t)
		go func() {
			synctest.Wait()
			for i, call := range p.take() {
				switch i {
				case 0:
					p.send(errorReply(t, binary.LittleEndian, call.serial, noUnit))
				case 1:
					p.send(getReply(t, binary.LittleEndian, call.serial, "not a number"))
				case 2:
					p.send(encode(t, binary.LittleEndian, &dbus.Message{
						Type:    dbus.TypeMethodReply,
						Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldReplySerial: dbus.MakeVariant(call.serial)},
					}))
				default:
					p.send(getReply(t, binary.LittleEndian, call.serial, call.number()))
				}
			}
		}()
		if err := w.gets(t.Context(), 4, numbered, a.done); err != nil {
			t.Fatal(err)
		}
		a.check(1, func(i int) uint64 { return uint64(i) })
		for i, want := range []string{noUnit, `type "s"`, `type ""`} {
			if !strings.Contains(a.errors[i], want) {
				t.Errorf("call %d: error %q, want one with %q", i, a.errors[i], want)
			}
		}
	})
}

// TestGetsLateReplies: the replies to an abandoned sweep come during the next
// one. They are not taken for its own, and count as in flight until they come.
func TestGetsLateReplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, p := newWire(t)
		go p.read()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		early := newAnswers(t)
		if err := w.gets(ctx, 200, numbered, early.done); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("gets returned %v", err)
		}
		late := p.take()
		if len(late) == 0 || len(late) > promised {
			t.Fatalf("%d calls were in flight at the deadline", len(late))
		}
		for range 10 { // between the sweeps
			p.send(getReply(t, binary.LittleEndian, late[0].serial, uint64(1<<40)))
			late = late[1:]
		}
		synctest.Wait()
		if w.inFlight != len(late) {
			t.Errorf("%d calls count as in flight, want %d", w.inFlight, len(late))
		}

		a := newAnswers(t)
		result := make(chan error, 1)
		go func() { result <- w.gets(t.Context(), 200, numbered, a.done) }()
		var open []peerCall
		for {
			synctest.Wait()
			open = append(open, p.take()...)
			if n := len(open) + len(late); n > promised {
				t.Fatalf("%d calls are in flight, %d of them late", n, len(late))
			} else if n == 0 {
				break
			}
			if len(late) > 0 {
				p.send(getReply(t, binary.LittleEndian, late[0].serial, uint64(1<<40)))
				late = late[1:]
			}
			if len(open) > 0 && len(late)%2 == 0 {
				p.send(getReply(t, binary.LittleEndian, open[0].serial, open[0].number()))
				open = open[1:]
			}
		}
		if err := <-result; err != nil {
			t.Fatal(err)
		}
		a.check(200, func(i int) uint64 { return uint64(i) })
		early.check(0, nil)
	})
}

// TestGetsStrangeReplies: replies to calls that nobody made, and second
// replies, change nothing; least of all do they make room for more calls.
func TestGetsStrangeReplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, p := newWire(t)
		go p.read()
		a := newAnswers(t)
		result := make(chan error, 1)
		go func() { result <- w.gets(t.Context(), 300, numbered, a.done) }()
		var open []peerCall
		for {
			synctest.Wait()
			open = append(open, p.take()...)
			if len(open) > promised {
				t.Fatalf("%d calls are in flight", len(open))
			}
			if len(open) == 0 {
				break
			}
			for _, serial := range []uint32{firstOwnSerial - 1, 0, 1<<32 - 1, open[0].serial + 1000} {
				p.send(getReply(t, binary.LittleEndian, serial, uint64(1<<40)))
			}
			for range 3 {
				p.send(getReply(t, binary.LittleEndian, open[0].serial, open[0].number()))
			}
			open = open[1:]
		}
		if err := <-result; err != nil {
			t.Fatal(err)
		}
		a.check(300, func(i int) uint64 { return uint64(i) })
		for range 10 { // and after the sweep, to nobody
			p.send(getReply(t, binary.LittleEndian, firstOwnSerial, uint64(1)))
		}
		synctest.Wait()
		go func() { result <- w.gets(t.Context(), 300, numbered, newAnswers(t).done) }()
		synctest.Wait()
		if n := len(p.take()); n > promised {
			t.Errorf("%d calls are in flight after replies to nobody", n)
		}
		_ = w.Close()
		<-result
	})
}

func TestGetsSerialsStartAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, p := newWire(t)
		w.serial = 1<<32 - 50
		go func() {
			for {
				call, err := readCall(p.conn)
				if err != nil {
					return
				}
				if call.serial < firstOwnSerial {
					t.Errorf("a call has the serial number %d, which is godbus's", call.serial)
				}
				go p.send(getReply(t, binary.LittleEndian, call.serial, call.number()))
			}
		}()
		for range 3 {
			a := newAnswers(t)
			if err := w.gets(t.Context(), 40, numbered, a.done); err != nil {
				t.Fatal(err)
			}
			a.check(40, func(i int) uint64 { return uint64(i) })
		}
	})
}

// TestGetsEndsWithItsContext: whatever the peer does or leaves undone, gets
// returns at its deadline, and no reply is delivered after that.
func TestGetsEndsWithItsContext(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, w *connection, p *peer){
		"the peer never answers": func(_ *testing.T, _ *connection, p *peer) { go p.read() },
		"the peer never reads":   func(*testing.T, *connection, *peer) {},
		"the peer reads half a call": func(_ *testing.T, _ *connection, p *peer) {
			go func() { _, _ = io.ReadFull(p.conn, make([]byte, 100)) }()
		},
		"godbus is stuck in a write": func(_ *testing.T, w *connection, _ *peer) {
			go func() { _, _ = w.Write([]byte("a message that nobody reads")) }()
		},
		"another caller has its turn": func(t *testing.T, w *connection, p *peer) {
			go p.read()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			t.Cleanup(cancel)
			go func() { _ = w.gets(ctx, 1, numbered, newAnswers(t).done) }()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, p := newWire(t)
				prepare(t, w, p)
				synctest.Wait()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				began := time.Now()
				a := newAnswers(t)
				err := w.gets(ctx, 100, numbered, a.done)
				if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("gets returned %v", err)
				}
				// The time of a bubble is exact.
				if took := time.Since(began); took != time.Second {
					t.Errorf("gets took %v of a deadline of 1s", took)
				}
				a.check(0, nil)
			})
		})
	}
}

// TestWriteIsBounded: a peer that reads nothing does not hold godbus for ever,
// and nothing is said after half a message.
func TestWriteIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := newWire(t)
		if _, err := w.Write([]byte("a message that nobody reads")); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Write returned %v", err)
		}
		if err := w.gets(t.Context(), 1, numbered, nil); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("gets on the broken connection returned %v", err)
		}
		if err := w.failure(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the reason is %v", err)
		}
	})
}

// TestGetsEndsWithTheConnection: a connection that ends or goes wrong in any
// way ends the sweep at once, with the reason.
func TestGetsEndsWithTheConnection(t *testing.T) {
	reply := func(t *testing.T, serial uint32) []byte { return getReply(t, binary.LittleEndian, serial, uint64(1)) }
	for name, test := range map[string]struct {
		end  func(t *testing.T, w *connection, p *peer, serial uint32)
		want error
	}{
		"closed by the peer":     {func(_ *testing.T, _ *connection, p *peer, _ uint32) { _ = p.conn.Close() }, io.EOF},
		"closed by us":           {func(_ *testing.T, w *connection, _ *peer, _ uint32) { _ = w.Close() }, net.ErrClosed},
		"closed within a header": {func(t *testing.T, _ *connection, p *peer, s uint32) { p.send(reply(t, s)[:9]); _ = p.conn.Close() }, io.EOF},
		"closed within a body":   {func(t *testing.T, _ *connection, p *peer, s uint32) { p.send(reply(t, s)[:40]); _ = p.conn.Close() }, io.ErrUnexpectedEOF},
		"closed at a body's last byte": {func(t *testing.T, _ *connection, p *peer, s uint32) {
			m := reply(t, s)
			p.send(m[:len(m)-1])
			_ = p.conn.Close()
		}, io.ErrUnexpectedEOF},
		"garbage": {func(_ *testing.T, _ *connection, p *peer, _ uint32) {
			p.send(bytes.Repeat([]byte("garbage\xff"), 4)[:16])
		}, errMalformed},
		"a huge message": {func(_ *testing.T, _ *connection, p *peer, _ uint32) {
			p.send([]byte("l\x02\x00\x01\xff\xff\xff\xff\x01\x00\x00\x00\x10\x00\x00\x00"))
		}, errMalformed},
		"an error without a name": {func(t *testing.T, _ *connection, p *peer, s uint32) {
			m := reply(t, s)
			m[1] = byte(dbus.TypeError)
			p.send(m)
		}, errMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, p := newWire(t)
				go p.read()
				a := newAnswers(t)
				result := make(chan error, 1)
				go func() { result <- w.gets(t.Context(), 200, numbered, a.done) }()
				synctest.Wait()
				test.end(t, w, p, p.take()[0].serial)
				if err := <-result; !errors.Is(err, test.want) {
					t.Errorf("gets returned %v, want %v", err, test.want)
				}
				if err := w.failure(); !errors.Is(err, test.want) {
					t.Errorf("the reason is %v, want %v", err, test.want)
				}
				a.check(0, nil)
				if err := w.gets(t.Context(), 1, numbered, a.done); !errors.Is(err, test.want) {
					t.Errorf("gets on the ended connection returned %v, want %v", err, test.want)
				}
			})
		})
	}
}

// TestWireIsShared: godbus's calls and signals, and the sweeps of several
// callers, go over one connection at the same time. It uses a real socket and
// real time.
func TestWireIsShared(t *testing.T) {
	address, accept := listen(t)
	go func() {
		conn, in := accept()
		var sending sync.Mutex
		send := func(m []byte) {
			sending.Lock()
			defer sending.Unlock()
			_, _ = conn.Write(m)
		}
		for {
			m, err := dbus.DecodeMessage(in)
			if err != nil {
				return
			}
			switch member, _ := m.Headers[dbus.FieldMember].Value().(string); member {
			case "Get":
				path, _ := m.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
				send(getReply(t, byteOrders[m.Serial()%2], m.Serial(), peerCall{Property: Property{Path: string(path)}}.number()))
			case "Echo":
				for _, signal := range []struct {
					iface, member string
					body          []any
				}{
					{ManagerInterface, "UnitNew", m.Body},
					{ManagerInterface, "JobNew", m.Body},      // of no use to anybody
					{"org.freedesktop.DBus", "NameLost", nil}, // godbus would panic
				} {
					send(encode(t, binary.LittleEndian, &dbus.Message{
						Type: dbus.TypeSignal,
						Headers: map[dbus.HeaderField]dbus.Variant{
							dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath("/a")),
							dbus.FieldInterface: dbus.MakeVariant(signal.iface),
							dbus.FieldMember:    dbus.MakeVariant(signal.member),
							dbus.FieldSender:    dbus.MakeVariant("org.freedesktop.DBus"),
						},
						Body: signal.body,
					}))
				}
				send(encode(t, binary.LittleEndian, &dbus.Message{
					Type:    dbus.TypeMethodReply,
					Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldReplySerial: dbus.MakeVariant(m.Serial())},
					Body:    m.Body,
				}))
			}
		}
	}()
	w, err := dial(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	w.wanted = func(s Signal) bool { return string(s.Member) == "UnitNew" }
	conn, err := dbus.NewConn(w, dbus.WithSignalHandler(w.flood))
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Auth([]dbus.Auth{external{}}); err != nil {
		t.Fatal(err)
	}

	var users sync.WaitGroup
	for range 3 {
		users.Go(func() {
			for range 20 {
				a := newAnswers(t)
				if err := w.gets(t.Context(), 150, numbered, a.done); err != nil {
					t.Error(err)
				}
				a.check(150, func(i int) uint64 { return uint64(i) })
			}
		})
	}
	const echoes = 20
	big := strings.Repeat("x", 2*keepBuffer) // also longer than the buffer of the reader
	for i := range 4 {
		users.Go(func() {
			for j := range echoes {
				text := fmt.Sprint(i, j)
				if j%10 == 0 {
					text += big
				}
				text += ".service"
				var back string
				if err := conn.Object("a.b", "/a").Call("a.b.Echo", 0, text).Store(&back); err != nil || back != text {
					t.Errorf("%.20q came back as %.20q, %v", text, back, err)
				}
			}
		})
	}
	users.Wait()
	// The long ones are longer than any signal of systemd's.
	for range 4 * (echoes - echoes/10) {
		select {
		case s := <-w.flood.queue:
			if s.Name != ManagerInterface+".UnitNew" {
				t.Errorf("signal %s", s.Name)
			}
		case <-time.After(systemdtest.Patience):
			t.Fatal("signals are missing")
		}
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}

// listen makes a socket for one connection. accept does the peer's half of the
// handshake.
func listen(t *testing.T) (address string, accept func() (net.Conn, *bufio.Reader)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return "unix:path=" + path, func() (net.Conn, *bufio.Reader) {
		conn, err := l.Accept()
		if err != nil {
			t.Error(err)
			return nil, nil
		}
		t.Cleanup(func() { _ = conn.Close() })
		in := bufio.NewReader(conn)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				t.Error(err)
			}
			if err != nil || line == "BEGIN\r\n" {
				_, _ = conn.Write([]byte("OK 0123456789abcdef0123456789abcdef\r\n"))
				return conn, in
			}
		}
	}
}

// TestHandshake: what goes out is one write, as sd-bus does it, and nothing
// follows before the answer.
func TestHandshake(t *testing.T) {
	want := "\x00AUTH EXTERNAL " + hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid()))) + "\r\nBEGIN\r\n"
	for name, test := range map[string]struct {
		answer string // then the peer closes
		err    string // empty: it works
	}{
		"accepted":              {"OK 0123456789abcdef0123456789abcdef\r\n", ""},
		"accepted by a newline": {"OK 0\n", ""},
		"refused":               {"REJECTED EXTERNAL DBUS_COOKIE_SHA1\r\n", `answered "REJECTED EXTERNAL DBUS_COOKIE_SHA1" to EXTERNAL as uid`},
		"not understood":        {"ERROR\r\n", `answered "ERROR"`},
		"data asked for":        {"DATA\r\n", `answered "DATA"`},
		"OK alone":              {"OK\r\n", `answered "OK"`},
		"another protocol":      {"HTTP/1.1 400 Bad Request\r\n", "400 Bad Request"},
		"not UTF-8":             {"\xff\xfe\r\n", `\xff\xfe`},
		"closed":                {"", "EOF"},
		"closed within a line":  {"OK 0123", "EOF"},
		"a line without an end": {strings.Repeat("O", 1<<20), "buffer full"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				go func() {
					defer far.Close()
					got := make([]byte, 1000)
					n, err := far.Read(got) // one write on a pipe is one read
					if err != nil || string(got[:n]) != want {
						t.Errorf("the handshake is %q, %v; want %q", got[:n], err, want)
					}
					_, _ = io.WriteString(far, test.answer)
				}()
				defer near.Close()
				w, err := handshake(t.Context(), near)
				switch {
				case test.err == "" && err != nil:
					t.Errorf("refused: %v", err)
				case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
					t.Errorf("handshake returned %v, %v; want an error with %q", w, err, test.err)
				}
			})
		})
	}
}

func TestHandshakeEndsWithItsContext(t *testing.T) {
	for name, read := range map[string]bool{"the peer never reads": false, "the peer never answers": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				defer near.Close()
				defer far.Close()
				if read {
					go func() { _, _ = io.Copy(io.Discard, far) }()
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := handshake(ctx, near); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("handshake returned %v", err)
				}
			})
		})
	}
}

func TestDial(t *testing.T) {
	dir := t.TempDir()
	serve := func(name string) {
		l, err := net.Listen("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Write([]byte("OK 0\r\n"))
				t.Cleanup(func() { _ = conn.Close() })
			}
		}()
	}
	abstract := "unitmeter-test-" + strconv.Itoa(os.Getpid())
	for _, name := range []string{filepath.Join(dir, "bus"), filepath.Join(dir, "a b,c;d%é"), "@" + abstract} {
		serve(name)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for address, want := range map[string]string{ // part of the error, empty for none
		"unix:path=" + dir + "/bus":                            "",
		" unix:path=" + dir + "/bus ":                          "",
		"unix:guid=0123,path=" + dir + "/bus":                  "",
		"unix:path=" + dir + "/bus,guid=0123":                  "",
		"unix:path=" + dir + "/a%20b%2cc%3Bd%25%c3%a9":         "",
		"unix:abstract=" + abstract:                            "",
		"tcp:host=localhost,port=1;unix:path=" + dir + "/bus":  "",
		"unix:path=" + dir + "/none;unix:path=" + dir + "/bus": "",
		"":                                      "only unix: addresses are supported; use unix:path=/run/dbus/system_bus_socket",
		";":                                     "only unix: addresses",
		"/run/dbus/system_bus_socket":           "only unix: addresses",
		"tcp:host=localhost,port=1":             "only unix: addresses",
		"unixexec:path=/bin/true":               "only unix: addresses",
		"unix:":                                 "names no path= or abstract= socket",
		"unix:path=":                            "names no path= or abstract= socket",
		"unix:path":                             "names no path= or abstract= socket",
		"unix:tmpdir=/tmp":                      "names no path= or abstract= socket",
		"unix:path=/a%2":                        "ends within a % escape",
		"unix:path=/a%":                         "ends within a % escape",
		"unix:path=/a%zz":                       "not two hex digits",
		"unix:path=" + dir + "/none":            "no such file",
		"unix:path=" + dir + "/file":            "connection refused",
		"unix:path=" + strings.Repeat("a", 200): "invalid argument",
		"tcp:x;unix:path=" + dir + "/none":      "only unix: addresses", // both are told
	} {
		w, err := dial(t.Context(), address)
		switch {
		case want == "" && err != nil:
			t.Errorf("dial(%q): %v", address, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("dial(%q): error %v, want one with %q", address, err, want)
		case err == nil:
			_ = w.Close()
		}
	}
}
