package bus

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
	"sync/atomic"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	// maxInFlight keeps a sweep below dbus-daemon's limit of 128 outstanding
	// replies per connection (max_replies_per_connection); the 129th call is
	// refused with LimitsExceeded.
	maxInFlight = 64
	// maxInFlightPrivate is for PID 1's own socket, which has no such limit and
	// takes other clients' calls in between. The calls fit into the socket's
	// buffer, and so do the replies.
	maxInFlightPrivate = 512
	// readEvery is how often a sweep looks for replies at first. To be woken for
	// each of them costs more than to read them, here and in the peer. From half
	// to eight times of it, it adapts to how fast they come.
	readEvery = time.Millisecond
	// firstOwnSerial divides the serial numbers of one connection: godbus
	// counts from 1, the calls of sweeps start here.
	firstOwnSerial = 1 << 31
	// maxMessage bounds one reply. ListUnits answers with about 250 bytes for
	// each unit.
	maxMessage = 64 << 20
	// maxUnasked is the longest message of the D-Bus specification, 128 MiB.
	maxUnasked = 128 << 20
	// maxSignal bounds the signals that are read. The longest that systemd sends
	// of a unit has a few kilobytes; a longer one is skipped unread, so that no
	// other peer of the bus can make this process large.
	maxSignal = 64 << 10
	// keepBuffer is the largest message buffer kept between messages. Only a list
	// of units needs a larger one.
	keepBuffer = 64 << 10
)

// connection is one D-Bus connection that two users share. godbus speaks through
// Read, Write and Close for everything that is rare: Hello, match rules, unit
// lists, signals. Sweeps speak through gets, which encodes and decodes
// thousands of Properties.Get calls in reused buffers. Replies are told apart
// by their serial numbers. Signals that the inventory has no use for are
// dropped before godbus decodes them.
type connection struct {
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

	window int           // how many calls may be without a reply
	every  time.Duration // how often a sweep reads at first; 0 where nothing is buffered on the way
	nap    time.Duration // how often by now; used in Read only
	napped bool          // before the last read; the same

	out []byte // reused encoding buffer, guarded by sending

	wake chan struct{} // has a token when gets has something to do

	wanted func(Signal) bool // see Config
	flood  *flood
	// bus says that peers other than systemd can send messages here.
	bus bool
	// refused counts unrequested messages that were skipped: not from systemd, too
	// long, or malformed.
	refused atomic.Int64

	mu       sync.Mutex
	owner    string // unique name of systemd on the bus; empty while nobody has its name
	named    bool   // the bus has announced an owner, so that an older answer is of no use
	serial   uint32 // next serial of a sweep's call
	inFlight int    // calls without a reply, abandoned ones included
	err      error  // why the connection ended
	round    round  // the call of gets in progress
}

// round is one call of gets.
type round struct {
	size     int                // how many properties; 0 while there is no round
	call     func(int) Property // names them
	done     func(int, Reply)   // takes the replies
	deadline time.Time          // of the writes; zero for none
	first    uint32             // serial of call 0
	sent     int                // calls sent so far
	open     int                // calls of these without a reply
	answered []bool             // by call: a second reply to it says nothing
}

// stream is the part of a socket that a connection uses.
type stream interface {
	io.ReadWriteCloser
	SetWriteDeadline(time.Time) error
}

// Property names one D-Bus property of one object.
type Property struct {
	Path, Interface, Name string
}

// dial connects to a D-Bus address of the unix kind and authenticates with
// EXTERNAL. The whole handshake goes out in one write, as sd-bus does: PID 1
// does not look at a message that arrives together with the last line of a
// handshake until another message follows, so nothing may be sent before its
// OK is here.
func dial(ctx context.Context, address string) (*connection, error) {
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
		w.conn, w.every, w.nap = s, readEvery, readEvery
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

func handshake(ctx context.Context, conn net.Conn) (*connection, error) {
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
	w := &connection{
		conn: conn, in: in, auth: strings.NewReader(""), serial: firstOwnSerial,
		sending: make(chan struct{}, 1), turn: make(chan struct{}, 1), wake: make(chan struct{}, 1),
		window: maxInFlight, flood: newFlood(),
	}
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
func (w *connection) Write(p []byte) (int, error) {
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
	if err := w.write(p, time.Now().Add(CallTimeout)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// write sends whole messages. The caller holds sending.
func (w *connection) write(p []byte, deadline time.Time) error {
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
func (w *connection) Read(p []byte) (int, error) {
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
		case h.kind == dbus.TypeSignal && w.bus && !w.genuine(h), !h.isReply() && h.kind != dbus.TypeSignal:
			w.refused.Add(1) // a call too: nothing is served here
		case h.kind == dbus.TypeSignal && !w.delivers(h):
		default:
			w.unread = w.message
		}
	}
	n := copy(p, w.unread)
	if w.unread = w.unread[n:]; len(w.unread) == 0 {
		w.unread = nil // or it would hold a long message until the next one
	}
	return n, nil
}

// delivers reports whether a signal goes on to godbus, which is slower, and panics at
// a NameAcquired or NameLost without a body.
func (w *connection) delivers(h header) bool {
	s := h.signal()
	return w.wanted != nil && (string(s.Interface) != BusInterface || string(s.Member) == "NameOwnerChanged") &&
		w.wanted(s) && w.flood.admit(s, time.Now())
}

// Close ends the connection; sweeps in progress end with an error.
func (w *connection) Close() error {
	w.fail(net.ErrClosed)
	return w.conn.Close()
}

func (w *connection) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.wakeUp()
}

// failure says why the connection ended.
func (w *connection) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		return net.ErrClosed
	}
	return w.err
}

// next returns the header of the next message, which is whole in w.message. Unrequested
// messages that are too long or malformed are skipped, so that no other peer can end
// the connection.
func (w *connection) next() (header, error) {
	for {
		h, ok, err := w.nextOne()
		switch {
		case err != nil:
			return header{}, fmt.Errorf("read from D-Bus: %w", err)
		case ok:
			return h, nil
		}
		w.refused.Add(1)
	}
}

// nextOne reads one message, or skips it: then ok is false.
func (w *connection) nextOne() (h header, ok bool, err error) {
	if cap(w.message) > keepBuffer {
		w.message = nil
	}
	if w.in.Buffered() == 0 {
		w.pause()
	}
	fixed, err := w.in.Peek(16)
	if err != nil {
		return header{}, false, err
	}
	size, err := messageSize(fixed)
	if err != nil {
		return header{}, false, err
	}
	skippable := unasked(fixed)
	if skippable && size > maxSignal {
		_, err := w.in.Discard(size)
		return header{}, false, err
	}
	if cap(w.message) < size {
		w.message = make([]byte, size)
	}
	w.message = w.message[:size]
	if _, err := io.ReadFull(w.in, w.message); err != nil {
		return header{}, false, err
	}
	if h, err = parseHeader(w.message); err != nil && skippable {
		return header{}, false, nil
	}
	return h, err == nil, err
}

// genuine reports whether a signal is from who may send it: systemd, or the bus
// itself. Match rules do not see to that: anybody on the bus can send a signal
// straight to this connection. It follows the owner of systemd's name on the way.
func (w *connection) genuine(h header) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if string(h.iface) != BusInterface {
		return w.owner != "" && string(h.sender) == w.owner
	}
	if string(h.sender) != BusInterface { // the bus has the name of its interface
		return false
	}
	if string(h.member) == "NameOwnerChanged" {
		d := decoder{order: h.order, data: h.body}
		if name, _, owner := d.string(), d.string(), d.string(); d.err == nil && string(name) == SystemdName {
			w.owner, w.named = string(owner), true
		}
	}
	return true
}

// found takes the answer to GetNameOwner for systemd's name.
func (w *connection) found(owner string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.named {
		w.owner = owner
	}
}

// dispatch hands a reply to the sweep that waits for it. Replies to calls of
// an earlier sweep, given up at its deadline, only make room.
func (w *connection) dispatch(h header) {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := &w.round
	switch i := int64(h.replySerial) - int64(r.first); {
	case i >= 0 && i < int64(r.sent):
		if r.answered[i] {
			return
		}
		r.answered[i] = true
		r.done(int(i), Reply{order: h.order, ErrorName: h.errorName, signature: h.signature, body: h.body})
		r.open--
		w.inFlight--
	case w.inFlight > r.open:
		w.inFlight--
	}
}

// pause is called before a read that may have to wait. While a sweep waits for
// replies, it sends the next calls and lets replies pile up. It does so here, in
// the reading goroutine, since waking the sweep's goroutine for each batch cost more
// than the batch.
func (w *connection) pause() {
	w.mu.Lock()
	room, open, more, over := w.room(), w.round.open, w.round.sent < w.round.size, w.round.size > 0 && w.round.open == 0
	w.mu.Unlock()
	switch {
	case !w.napped || !more:
	case room == 0: // too few replies for a batch
		w.nap = min(2*w.nap, 8*w.every)
	case open == 0: // systemd had nothing to do
		w.nap = max(w.nap/2, w.every/2)
	}
	if room > 0 {
		select {
		case w.sending <- struct{}{}:
			_ = w.refill() // the next read has the error as well
			<-w.sending
		default:
			w.wakeUp() // whoever sends may be stuck, and replies must be read
		}
	} else if over {
		w.wakeUp()
	}
	w.mu.Lock()
	w.napped = w.every > 0 && w.round.open > 0
	w.mu.Unlock()
	if w.napped {
		time.Sleep(w.nap)
	}
}

// wakeUp lets gets look at where its round stands.
func (w *connection) wakeUp() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// gets reads n properties with at most window calls outstanding. call
// names property i; done is called once for each reply, in the order of
// arrival. Both are called from another goroutine as well, but never after gets
// has returned. Calls of gets take turns. It ends early with ctx, whose cause it then
// returns, or with the connection.
func (w *connection) gets(ctx context.Context, n int, call func(i int) Property, done func(i int, r Reply)) error {
	select {
	case w.turn <- struct{}{}:
		defer func() { <-w.turn }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	w.mu.Lock()
	if w.serial > 1<<32-1-uint32(n) {
		w.serial = firstOwnSerial
	}
	answered := slices.Grow(w.round.answered[:0], n)[:n]
	clear(answered)
	deadline, _ := ctx.Deadline()
	w.round = round{size: n, call: call, done: done, deadline: deadline, first: w.serial, answered: answered}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		w.round = round{answered: w.round.answered}
		w.mu.Unlock()
	}()

	for {
		w.mu.Lock()
		err, finished, room := w.err, w.round.sent == n && w.round.open == 0, w.room()
		w.mu.Unlock()
		switch {
		case finished:
			return nil
		case err != nil:
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
		if room > 0 {
			select {
			case w.sending <- struct{}{}:
				err = w.refill()
				<-w.sending
			case <-ctx.Done():
			}
			if err != nil {
				return err
			}
		}
		select {
		case <-w.wake:
		case <-ctx.Done():
		}
	}
}

// room is how many calls of the round may be sent now: those that there is room
// for, once half of the earlier ones have been answered. The caller holds mu.
func (w *connection) room() int {
	if w.inFlight > w.window/2 {
		return 0
	}
	return min(w.window-w.inFlight, w.round.size-w.round.sent)
}

// refill writes the calls that there is room for at once. The caller holds
// sending.
func (w *connection) refill() error {
	w.mu.Lock()
	r, count := &w.round, w.room()
	w.out = w.out[:0]
	for i := range count {
		w.out = appendGet(w.out, w.serial+uint32(i), r.call(r.sent+i))
	}
	w.serial += uint32(count)
	w.inFlight += count
	r.sent += count
	r.open += count
	deadline := r.deadline
	w.mu.Unlock()
	if count == 0 {
		return nil
	}
	return w.write(w.out, deadline)
}
