package receiver

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	// maxInFlight keeps a sweep below dbus-daemon's limit of 128 outstanding
	// replies per connection (max_replies_per_connection); the 129th call is
	// refused with LimitsExceeded.
	maxInFlight = 64
	// batchSize is how many calls must have been answered before the next
	// ones go out, all that there is room for in one write.
	batchSize = 32
	// readEvery is how often a sweep looks for replies. They come a hundred in
	// a millisecond, and to be woken for each of them costs more than to read
	// them, here and in the peer.
	readEvery = time.Millisecond
	// firstOwnSerial divides the serial numbers of one connection: godbus
	// counts from 1, the calls of sweeps start here.
	firstOwnSerial = 1 << 31
	// maxMessage bounds one incoming message. ListUnits answers with about
	// 250 bytes for each unit; the D-Bus specification allows 128 MiB.
	maxMessage = 64 << 20
	// keepBuffer is the largest message buffer kept between messages. Only a list
	// of units needs a larger one.
	keepBuffer = 64 << 10
)

// wire is one D-Bus connection that two users share. godbus speaks through
// Read, Write and Close for everything that is rare: Hello, match rules, unit
// lists, signals. Sweeps speak through gets, which encodes and decodes
// thousands of Properties.Get calls in reused buffers. Replies are told apart
// by their serial numbers. Signals that the inventory has no use for are
// dropped before godbus decodes them.
type wire struct {
	conn stream
	in   *bufio.Reader

	message []byte // the message being read, header included
	unread  []byte // what godbus has yet to read of it
	auth    *strings.Reader
	authed  bool

	// Both are locks of which the deadline of a sweep can be waited for: taken
	// by a send, given back by a receive.
	sending chan struct{} // one writer at a time
	turn    chan struct{} // held by the caller of gets whose turn it is

	every time.Duration // how often a sweep reads; 0 where nothing is buffered on the way

	out []byte // reused encoding buffer, guarded by sending

	mu       sync.Mutex
	progress *sync.Cond // signalled when gets may go on
	serial   uint32     // next serial of a sweep's call
	first    uint32     // serial of call 0 of the sweep in progress
	calls    int        // calls sent so far in the sweep in progress
	answered []bool     // by call: a second reply to it says nothing
	open     int        // calls of the sweep in progress without a reply
	inFlight int        // calls without a reply, abandoned ones included
	deliver  func(i int, r reply)
	err      error // why the connection ended
}

// stream is what a wire needs of its connection.
type stream interface {
	io.ReadWriteCloser
	SetWriteDeadline(time.Time) error
}

// property names one D-Bus property of one object.
type property struct {
	path, iface, name string
}

// dial connects to a D-Bus address of the unix kind and authenticates with
// EXTERNAL. The whole handshake goes out in one write, as sd-bus does: PID 1
// does not look at a message that arrives together with the last line of a
// handshake until another message follows, so nothing may be sent before its
// OK is here.
func dial(ctx context.Context, address string) (*wire, error) {
	var tried []error
	for one := range strings.SplitSeq(address, ";") {
		name, err := socketName(one)
		if err != nil {
			tried = append(tried, err)
			continue
		}
		conn, err := new(net.Dialer).DialContext(ctx, "unix", name)
		if err != nil {
			tried = append(tried, err)
			continue
		}
		w, err := handshake(ctx, conn)
		if err != nil {
			tried = append(tried, errors.Join(err, conn.Close()))
			continue
		}
		s, err := newSocket(conn.(*net.UnixConn))
		if err != nil {
			tried = append(tried, err)
			continue
		}
		w.conn, w.every = s, readEvery
		early, _ := w.in.Peek(w.in.Buffered()) // what a peer says unasked behind its OK
		w.in.Reset(io.MultiReader(bytes.NewReader(bytes.Clone(early)), s))
		return w, nil
	}
	return nil, errors.Join(tried...)
}

// socketName returns the socket of a D-Bus address as the net package names
// it: a path, or @name for an abstract socket.
func socketName(address string) (string, error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(address), "unix:")
	if !ok {
		return "", fmt.Errorf("read D-Bus address %q: only unix: addresses are supported; use unix:path=/run/dbus/system_bus_socket or the like", address)
	}
	for pair := range strings.SplitSeq(rest, ",") {
		key, value, _ := strings.Cut(pair, "=")
		value, err := unescape(value)
		if err != nil {
			return "", fmt.Errorf("read D-Bus address %q: %w", address, err)
		}
		switch {
		case key == "path" && value != "":
			return value, nil
		case key == "abstract" && value != "":
			return "@" + value, nil
		}
	}
	return "", fmt.Errorf("read D-Bus address %q: it names no path= or abstract= socket; use unix:path=/run/dbus/system_bus_socket or the like", address)
}

// unescape undoes the %xx escapes of a D-Bus address value.
func unescape(value string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(value); i++ {
		if value[i] != '%' {
			b.WriteByte(value[i])
			continue
		}
		if i+2 >= len(value) {
			return "", fmt.Errorf("%q ends within a %% escape", value)
		}
		c, err := hex.DecodeString(value[i+1 : i+3])
		if err != nil {
			return "", fmt.Errorf("%q has a %% escape that is not two hex digits", value)
		}
		b.Write(c)
		i += 2
	}
	return b.String(), nil
}

func handshake(ctx context.Context, conn net.Conn) (*wire, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	uid := hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid())))
	if _, err := conn.Write([]byte("\x00AUTH EXTERNAL " + uid + "\r\nBEGIN\r\n")); err != nil {
		return nil, fmt.Errorf("authenticate to D-Bus: %w", err)
	}
	in := bufio.NewReaderSize(conn, 64<<10)
	line, err := in.ReadSlice('\n')
	if err != nil {
		return nil, fmt.Errorf("authenticate to D-Bus: %w", err)
	}
	if !strings.HasPrefix(string(line), "OK ") {
		return nil, fmt.Errorf("authenticate to D-Bus: the bus answered %q to EXTERNAL as uid %d", strings.TrimSpace(string(line)), os.Geteuid())
	}
	w := &wire{
		conn: conn, in: in, auth: strings.NewReader(""), serial: firstOwnSerial,
		sending: make(chan struct{}, 1), turn: make(chan struct{}, 1),
	}
	w.progress = sync.NewCond(&w.mu)
	return w, nil
}

// external makes godbus believe that it authenticates: the handshake has been
// done, and Write answers for the bus.
type external struct{}

func (external) FirstData() (name, resp []byte, status dbus.AuthStatus) {
	return []byte("EXTERNAL"), nil, dbus.AuthOk
}

func (external) HandleData([]byte) ([]byte, dbus.AuthStatus) { return nil, dbus.AuthError }

// Write implements io.Writer for godbus, which writes one message at a time.
func (w *wire) Write(p []byte) (int, error) {
	if !w.authed {
		switch line := strings.TrimSpace(string(p)); line {
		case "\x00": // the byte that carries credentials
		case "AUTH":
			w.auth = strings.NewReader("REJECTED EXTERNAL\r\n")
		case "BEGIN":
			w.authed = true
		default:
			w.auth = strings.NewReader("OK 0\r\n")
		}
		return len(p), nil
	}
	w.sending <- struct{}{}
	defer func() { <-w.sending }()
	if err := w.write(p, time.Now().Add(callTimeout)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// write sends whole messages. The caller holds sending.
func (w *wire) write(p []byte, deadline time.Time) error {
	err := w.conn.SetWriteDeadline(deadline)
	if err == nil {
		_, err = w.conn.Write(p)
	}
	if err != nil {
		// Part of a message may be out: nothing more can be said on this connection.
		err = fmt.Errorf("write to D-Bus: %w", err)
		w.fail(err)
		return errors.Join(err, w.conn.Close())
	}
	return nil
}

// Read implements io.Reader for godbus: it returns the bytes of the next
// message that is meant for it, and hands over the others on the way. It runs
// in godbus's reading goroutine, which ends at the first error.
func (w *wire) Read(p []byte) (int, error) {
	if w.auth.Len() > 0 {
		return w.auth.Read(p)
	}
	for len(w.unread) == 0 {
		h, err := w.next()
		if err != nil {
			w.fail(err)
			return 0, err
		}
		switch {
		case h.isReply() && h.replySerial >= firstOwnSerial:
			w.dispatch(h)
		case h.kind == dbus.TypeSignal && !wanted(h):
		default:
			w.unread = w.message
		}
	}
	n := copy(p, w.unread)
	w.unread = w.unread[n:]
	return n, nil
}

// Close ends the connection; sweeps in progress end with an error.
func (w *wire) Close() error {
	w.fail(net.ErrClosed)
	return w.conn.Close()
}

func (w *wire) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.progress.Broadcast()
}

// failure says why the connection ended.
func (w *wire) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		return net.ErrClosed
	}
	return w.err
}

// next reads one whole message into w.message and parses its header.
func (w *wire) next() (header, error) {
	if cap(w.message) > keepBuffer {
		w.message = nil
	}
	if w.in.Buffered() == 0 {
		w.pause()
	}
	fixed, err := w.in.Peek(16)
	if err != nil {
		return header{}, fmt.Errorf("read from D-Bus: %w", err)
	}
	size, err := messageSize(fixed)
	if err != nil {
		return header{}, fmt.Errorf("read from D-Bus: %w", err)
	}
	if cap(w.message) < size {
		w.message = make([]byte, size)
	}
	w.message = w.message[:size]
	if _, err := io.ReadFull(w.in, w.message); err != nil {
		return header{}, fmt.Errorf("read from D-Bus: %w", err)
	}
	h, err := parseHeader(w.message)
	if err != nil {
		return header{}, fmt.Errorf("read from D-Bus: %w", err)
	}
	return h, nil
}

// dispatch hands a reply to the sweep that waits for it. Replies to calls of
// an earlier sweep, given up at its deadline, only make room.
func (w *wire) dispatch(h header) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch i := int64(h.replySerial) - int64(w.first); {
	case w.deliver != nil && i >= 0 && i < int64(w.calls):
		if w.answered[i] {
			return
		}
		w.answered[i] = true
		w.deliver(int(i), reply{order: h.order, errorName: h.errorName, signature: h.signature, body: h.body})
		w.open--
		w.inFlight--
	case w.inFlight > w.open:
		w.inFlight--
	}
}

// pause lets replies pile up before the next read, while a sweep waits for some.
func (w *wire) pause() {
	w.mu.Lock()
	// gets has nothing to do for each reply: it waits for room for a batch, or
	// for the last one.
	if w.open == 0 || w.inFlight <= maxInFlight-batchSize {
		w.progress.Broadcast()
	}
	sweeping := w.open > 0
	w.mu.Unlock()
	if sweeping && w.every > 0 {
		time.Sleep(w.every)
	}
}

// gets reads n properties with at most maxInFlight calls outstanding. call
// names property i; done is called once for each reply, in the order of
// arrival, from another goroutine but never after gets has returned. Calls of
// gets take turns. It ends early with ctx, or with the connection.
func (w *wire) gets(ctx context.Context, n int, call func(i int) property, done func(i int, r reply)) error {
	select {
	case w.turn <- struct{}{}:
		defer func() { <-w.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	stop := context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.progress.Broadcast()
	})
	defer stop()

	w.mu.Lock()
	if w.serial > 1<<32-1-uint32(n) {
		w.serial = firstOwnSerial
	}
	w.first, w.calls, w.open, w.deliver = w.serial, 0, 0, done
	w.answered = slices.Grow(w.answered[:0], n)[:n]
	clear(w.answered)
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		w.open, w.deliver = 0, nil
		w.mu.Unlock()
	}()

	for sent := 0; ; {
		w.mu.Lock()
		for w.err == nil && ctx.Err() == nil && (w.open > 0 && sent == n || sent < n && w.inFlight > maxInFlight-batchSize) {
			w.progress.Wait()
		}
		err, finished, room := w.err, sent == n && w.open == 0, maxInFlight-w.inFlight
		w.mu.Unlock()
		switch {
		case finished:
			return nil
		case err != nil:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
		count := min(room, n-sent)
		if err := w.send(ctx, count, func(i int) property { return call(sent + i) }); err != nil {
			return err
		}
		sent += count
	}
}

// send writes the next count Get calls at once.
func (w *wire) send(ctx context.Context, count int, call func(i int) property) error {
	select {
	case w.sending <- struct{}{}:
		defer func() { <-w.sending }()
	case <-ctx.Done():
		return ctx.Err()
	}
	w.mu.Lock()
	serial := w.serial
	w.serial += uint32(count)
	w.calls += count
	w.open += count
	w.inFlight += count
	w.mu.Unlock()
	w.out = w.out[:0]
	for i := range count {
		w.out = appendGet(w.out, serial+uint32(i), call(i))
	}
	deadline, _ := ctx.Deadline()
	return w.write(w.out, deadline)
}
