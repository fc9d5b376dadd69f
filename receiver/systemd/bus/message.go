package bus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/godbus/dbus/v5"
)

// Header fields of a D-Bus message (D-Bus specification, "Header Fields").
const (
	fieldPath        = 1
	fieldInterface   = 2
	fieldMember      = 3
	fieldErrorName   = 4
	fieldReplySerial = 5
	fieldDestination = 6
	fieldSender      = 7
	fieldSignature   = 8
)

var errMalformed = errors.New("malformed message")

// header has the fields of a message that decide where it goes. The slices point into
// the message.
type header struct {
	kind                           dbus.Type
	order                          binary.ByteOrder
	replySerial                    uint32
	path, iface, member, errorName []byte
	sender                         []byte // filled in by the bus; nil where there is none
	signature                      []byte
	body                           []byte
}

func (h header) isReply() bool {
	return h.kind == dbus.TypeMethodReply || h.kind == dbus.TypeError
}

// messageSize returns the length of the message that begins with the 16 bytes
// in fixed. It fails where no message can be so long.
func messageSize(fixed []byte) (int, error) {
	order, err := byteOrder(fixed[0])
	if err != nil {
		return 0, err
	}
	body, fields := uint64(order.Uint32(fixed[4:])), uint64(order.Uint32(fixed[12:]))
	size := 16 + (fields+7)&^7 + body
	longest := uint64(maxMessage)
	if unasked(fixed) {
		longest = maxUnasked // it can be skipped
	}
	if size > longest {
		return 0, fmt.Errorf("%w: it claims %d bytes, more than %d", errMalformed, size, longest)
	}
	return int(size), nil
}

// unasked reports whether the message that begins with the bytes in fixed is a signal or
// a call. Any peer can send one, and no caller waits for it.
func unasked(fixed []byte) bool {
	kind := dbus.Type(fixed[1])
	return kind != dbus.TypeMethodReply && kind != dbus.TypeError
}

func byteOrder(flag byte) (binary.ByteOrder, error) {
	switch flag {
	case 'l':
		return binary.LittleEndian, nil
	case 'B':
		return binary.BigEndian, nil
	}
	return nil, fmt.Errorf("%w: byte order %q", errMalformed, flag)
}

// parseHeader parses one whole message of the length that messageSize gave.
func parseHeader(message []byte) (header, error) {
	order, err := byteOrder(message[0])
	if err != nil {
		return header{}, err
	}
	h := header{kind: dbus.Type(message[1]), order: order}
	end := 16 + int(order.Uint32(message[12:]))
	h.body = message[(end+7)&^7:]
	d := decoder{order: order, data: message[:end], at: 16}
	for d.at < end && d.err == nil {
		d.align(8)
		code, signature := d.byte(), d.signature()
		switch string(signature) {
		case "u":
			v := d.uint32()
			if code == fieldReplySerial {
				h.replySerial = v
			}
		case "s", "o", "g":
			var v []byte
			if signature[0] == 'g' {
				v = d.signature()
			} else {
				v = d.string()
			}
			switch code {
			case fieldPath:
				h.path = v
			case fieldInterface:
				h.iface = v
			case fieldMember:
				h.member = v
			case fieldErrorName:
				h.errorName = v
			case fieldSender:
				h.sender = v
			case fieldSignature:
				h.signature = v
			}
		default:
			return header{}, fmt.Errorf("%w: header field %d of type %q", errMalformed, code, signature)
		}
	}
	if h.kind == dbus.TypeError && len(h.errorName) == 0 && d.err == nil {
		return header{}, fmt.Errorf("%w: error without a name", errMalformed)
	}
	return h, d.err
}

// signal returns what Wanted sees of a signal.
func (h header) signal() Signal {
	s := Signal{Path: h.path, Interface: h.iface, Member: h.member}
	if len(h.signature) > 0 && h.signature[0] == 's' {
		d := decoder{order: h.order, data: h.body}
		s.Text = d.string()
	}
	return s
}

// decoder reads D-Bus values from the start of a message or body. The first
// error sticks; after it all values are zero.
type decoder struct {
	order binary.ByteOrder
	data  []byte
	at    int
	err   error
}

func (d *decoder) take(n int) []byte {
	if d.err != nil || n < 0 || n > len(d.data)-d.at {
		d.err = errMalformed
		return nil
	}
	d.at += n
	return d.data[d.at-n : d.at]
}

func (d *decoder) align(n int) { d.take(-d.at & (n - 1)) }

func (d *decoder) byte() byte {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	d.align(4)
	if b := d.take(4); b != nil {
		return d.order.Uint32(b)
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	d.align(8)
	if b := d.take(8); b != nil {
		return d.order.Uint64(b)
	}
	return 0
}

func (d *decoder) string() []byte { return d.terminated(int(d.uint32())) }

func (d *decoder) signature() []byte { return d.terminated(int(d.byte())) }

func (d *decoder) terminated(n int) []byte {
	b := d.take(n)
	if zero := d.take(1); zero != nil && zero[0] != 0 {
		d.err = errMalformed
	}
	return b
}

// bytes reads an array of bytes.
func (d *decoder) bytes() []byte { return d.take(int(d.uint32())) }

// appendGet appends a Properties.Get call to buf.
func appendGet(buf []byte, serial uint32, p Property) []byte {
	const noAutoStart = 2
	start := len(buf)
	buf = append(buf, 'l', byte(dbus.TypeMethodCall), noAutoStart, 1)
	body := 4 + len(p.Interface) + 1
	body += -body&3 + 4 + len(p.Name) + 1
	buf = binary.LittleEndian.AppendUint32(buf, uint32(body))
	buf = binary.LittleEndian.AppendUint32(buf, serial)
	buf = binary.LittleEndian.AppendUint32(buf, 0) // length of the fields, set below
	buf = appendField(buf, start, fieldPath, 'o', p.Path)
	buf = appendField(buf, start, fieldDestination, 's', SystemdName)
	buf = appendField(buf, start, fieldInterface, 's', PropertiesInterface)
	buf = appendField(buf, start, fieldMember, 's', "Get")
	buf = appendPadding(buf, start, 8)
	buf = append(buf, fieldSignature, 1, 'g', 0, 2, 's', 's', 0)
	binary.LittleEndian.PutUint32(buf[start+12:], uint32(len(buf)-start-16))
	buf = appendPadding(buf, start, 8)
	buf = appendString(buf, p.Interface)
	buf = appendPadding(buf, start, 4)
	return appendString(buf, p.Name)
}

func appendField(buf []byte, start int, code, kind byte, value string) []byte {
	buf = appendPadding(buf, start, 8)
	buf = append(buf, code, 1, kind, 0)
	return appendString(buf, value)
}

func appendString(buf []byte, value string) []byte {
	buf = binary.LittleEndian.AppendUint32(buf, uint32(len(value)))
	buf = append(buf, value...)
	return append(buf, 0)
}

func appendPadding(buf []byte, start, alignment int) []byte {
	for (len(buf)-start)%alignment != 0 {
		buf = append(buf, 0)
	}
	return buf
}

// Reply is the answer to one Properties.Get call. Its slices are only valid
// until the handler that got it returns.
type Reply struct {
	ErrorName []byte // D-Bus error name, empty for a value
	order     binary.ByteOrder
	signature []byte // of the message body
	body      []byte
}

// replyError is an error reply, or a reply of another type than the property
// has.
type replyError struct{ name string }

func (e replyError) Error() string { return "systemd answered " + e.name }

// value opens the variant of a Get reply, which must be of the given type.
func (r Reply) value(signature string) (decoder, error) {
	if len(r.ErrorName) > 0 {
		return decoder{}, replyError{string(r.ErrorName)}
	}
	d := decoder{order: r.order, data: r.body}
	if got := d.signature(); string(r.signature) != "v" || string(got) != signature {
		return decoder{}, replyError{fmt.Sprintf("a value of type %q where %q belongs", bytes.ToValidUTF8(got, []byte("?")), signature)}
	}
	return d, nil
}

// Uint64 returns a value of the type t.
func (r Reply) Uint64() (uint64, error) {
	d, err := r.value("t")
	if err != nil {
		return 0, err
	}
	v := d.uint64()
	return v, d.err
}

// Bool returns a value of the type b.
func (r Reply) Bool() (bool, error) {
	d, err := r.value("b")
	if err != nil {
		return false, err
	}
	v := d.uint32()
	return v != 0, d.err
}

// Text returns a value of the type s.
func (r Reply) Text() (string, error) {
	d, err := r.value("s")
	if err != nil {
		return "", err
	}
	v := string(d.string())
	return v, d.err
}

// Bytes returns a copy of a value of the type ay.
func (r Reply) Bytes() ([]byte, error) {
	d, err := r.value("ay")
	if err != nil {
		return nil, err
	}
	v := bytes.Clone(d.bytes())
	return v, d.err
}
