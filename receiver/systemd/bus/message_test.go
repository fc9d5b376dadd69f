package bus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
)

// encode returns a message in godbus's own encoding.
func encode(t testing.TB, order binary.ByteOrder, m *dbus.Message) []byte {
	t.Helper()
	if len(m.Body) > 0 {
		if m.Headers == nil {
			m.Headers = map[dbus.HeaderField]dbus.Variant{}
		}
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
	}
	var b bytes.Buffer
	if err := m.EncodeTo(&b, order); err != nil {
		t.Fatal(err)
	}
	// EncodeTo leaves the serial number alone, and 0 is not valid.
	order.PutUint32(b.Bytes()[8:], 1)
	return b.Bytes()
}

// getReply returns the encoded answer to a Properties.Get call.
func getReply(t testing.TB, order binary.ByteOrder, serial uint32, value any) []byte {
	t.Helper()
	return encode(t, order, &dbus.Message{
		Type: dbus.TypeMethodReply,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldReplySerial: dbus.MakeVariant(serial),
			dbus.FieldSender:      dbus.MakeVariant(":1.2"),
			dbus.FieldDestination: dbus.MakeVariant(":1.3"),
		},
		Body: []any{dbus.MakeVariant(value)},
	})
}

// errorReply returns an encoded error.
func errorReply(t testing.TB, order binary.ByteOrder, serial uint32, name string) []byte {
	t.Helper()
	return encode(t, order, &dbus.Message{
		Type: dbus.TypeError,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldReplySerial: dbus.MakeVariant(serial),
			dbus.FieldErrorName:   dbus.MakeVariant(name),
		},
		Body: []any{"told in English"},
	})
}

// parse does what wire.next does with the bytes of one message.
func parse(message []byte) (header, error) {
	size, err := messageSize(message[:16])
	if err != nil {
		return header{}, err
	}
	if size != len(message) {
		return header{}, errors.New("the size is wrong")
	}
	return parseHeader(message[:size:size])
}

const noUnit = "org.freedesktop.systemd1.NoSuchUnit"

var byteOrders = []binary.ByteOrder{binary.LittleEndian, binary.BigEndian}

func TestAppendGetIsWhatGodbusReads(t *testing.T) {
	long := strings.Repeat("x", 255)
	var buf []byte
	var want []Property
	// Each length of each string, so that every padding occurs, one after the
	// other in one buffer as in a batch.
	for n := 1; n <= 9; n++ {
		want = append(want,
			Property{"/" + long[:n], UnitInterface, "Id"},
			Property{"/a", "a.b" + long[:n], "Id"},
			Property{"/a", "a.b", "I" + long[:n]})
	}
	want = append(want,
		Property{"/org/freedesktop/systemd1/unit/" + long[:247] + "_2eservice", "org.freedesktop.systemd1.Service", "IPIngressBytes"},
		Property{"/org/freedesktop/systemd1/unit/" + strings.Repeat("_2d", 247) + "_2eservice", "org.freedesktop.systemd1.Service", "IPIngressBytes"})
	for i, p := range want {
		buf = appendGet(buf, firstOwnSerial+uint32(i), p)
	}
	in := bytes.NewReader(buf)
	for i, p := range want {
		m, err := dbus.DecodeMessage(in)
		if err != nil {
			t.Fatalf("call %d (%v): %v", i, p, err)
		}
		if err := m.IsValid(); err != nil {
			t.Errorf("call %d (%v): %v", i, p, err)
		}
		if m.Type != dbus.TypeMethodCall || m.Flags != dbus.FlagNoAutoStart || m.Serial() != firstOwnSerial+uint32(i) {
			t.Errorf("call %d is of type %v, flags %v, serial %d", i, m.Type, m.Flags, m.Serial())
		}
		for field, want := range map[dbus.HeaderField]any{
			dbus.FieldPath:        dbus.ObjectPath(p.Path),
			dbus.FieldDestination: SystemdName,
			dbus.FieldInterface:   PropertiesInterface,
			dbus.FieldMember:      "Get",
			dbus.FieldSignature:   dbus.SignatureOf("", ""),
		} {
			if got := m.Headers[field].Value(); got != want {
				t.Errorf("call %d: header field %d is %v, want %v", i, field, got, want)
			}
		}
		var iface, name string
		if err := dbus.Store(m.Body, &iface, &name); err != nil || iface != p.Interface || name != p.Name {
			t.Errorf("call %d asks for %q of %q (%v), want %q of %q", i, name, iface, err, p.Name, p.Interface)
		}
	}
	if in.Len() != 0 {
		t.Errorf("%d bytes are left over", in.Len())
	}
	// And our own parser agrees with our own encoder.
	h, err := parse(appendGet(nil, 7, want[0]))
	if err != nil || h.kind != dbus.TypeMethodCall || string(h.path) != want[0].Path || string(h.member) != "Get" || h.isReply() {
		t.Errorf("parsed as %+v, %v", h, err)
	}
}

func TestParseHeader(t *testing.T) {
	for _, order := range byteOrders {
		t.Run(order.String(), func(t *testing.T) {
			reply, err := parse(getReply(t, order, 0x81020304, uint64(5)))
			if err != nil || !reply.isReply() || reply.replySerial != 0x81020304 || string(reply.signature) != "v" || reply.errorName != nil {
				t.Errorf("reply parsed as %+v, %v", reply, err)
			}
			fault, err := parse(errorReply(t, order, 9, noUnit))
			if err != nil || !fault.isReply() || fault.replySerial != 9 || string(fault.errorName) != noUnit {
				t.Errorf("error parsed as %+v, %v", fault, err)
			}
			signal, err := parse(encode(t, order, &dbus.Message{
				Type: dbus.TypeSignal,
				Headers: map[dbus.HeaderField]dbus.Variant{
					dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath("/org/freedesktop/systemd1")),
					dbus.FieldInterface: dbus.MakeVariant(ManagerInterface),
					dbus.FieldMember:    dbus.MakeVariant("UnitNew"),
					dbus.FieldUnixFDs:   dbus.MakeVariant(uint32(0)),
				},
				Body: []any{"a.service", dbus.ObjectPath("/a")},
			}))
			if err != nil || signal.isReply() || string(signal.path) != "/org/freedesktop/systemd1" ||
				string(signal.iface) != ManagerInterface || string(signal.member) != "UnitNew" || string(signal.signature) != "so" {
				t.Errorf("signal parsed as %+v, %v", signal, err)
			}
			if d := (decoder{order: order, data: signal.body}); string(d.string()) != "a.service" || d.err != nil {
				t.Errorf("the body of the signal begins otherwise: %q", signal.body)
			}
		})
	}
}

func TestParseHeaderRefuses(t *testing.T) {
	good := getReply(t, binary.LittleEndian, 1<<31, uint64(5))
	change := func(f func(m []byte)) []byte {
		m := bytes.Clone(good)
		f(m)
		return m
	}
	for name, message := range map[string][]byte{
		"byte order":            change(func(m []byte) { m[0] = 'x' }),
		"byte order zero":       change(func(m []byte) { m[0] = 0 }),
		"other byte order":      change(func(m []byte) { m[0] = 'B' }),
		"body of 4 GiB":         change(func(m []byte) { binary.LittleEndian.PutUint32(m[4:], math.MaxUint32) }),
		"body over the limit":   change(func(m []byte) { binary.LittleEndian.PutUint32(m[4:], maxMessage) }),
		"fields of 4 GiB":       change(func(m []byte) { binary.LittleEndian.PutUint32(m[12:], math.MaxUint32) }),
		"fields end in a field": change(func(m []byte) { m[12]-- }),
		"field of an odd type":  change(func(m []byte) { m[18] = 'y' }),
		"field of two types":    change(func(m []byte) { m[17] = 2 }),
		"field without a type":  change(func(m []byte) { m[17] = 0 }),
		"signature without end": change(func(m []byte) { m[19] = 1 }),
		"field longer than all": change(func(m []byte) { m[17] = 255 }),
		"error without a name":  change(func(m []byte) { m[1] = byte(dbus.TypeError) }),
	} {
		t.Run(name, func(t *testing.T) {
			h, err := parse(message)
			if !errors.Is(err, errMalformed) {
				t.Errorf("parsed as %+v, %v", h, err)
			}
		})
	}
}

func TestReplyValues(t *testing.T) {
	id := []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	for _, order := range byteOrders {
		open := func(value any) Reply {
			h, err := parse(getReply(t, order, 1, value))
			if err != nil {
				t.Fatal(err)
			}
			return Reply{order: h.order, ErrorName: h.errorName, signature: h.signature, body: h.body}
		}
		for _, v := range []uint64{0, 1, 1 << 32, math.MaxInt64, math.MaxInt64 + 1, math.MaxUint64} {
			if got, err := open(v).Uint64(); got != v || err != nil {
				t.Errorf("%v: %d read as %d, %v", order, v, got, err)
			}
		}
		for _, v := range []bool{true, false} {
			if got, err := open(v).Bool(); got != v || err != nil {
				t.Errorf("%v: %v read as %v, %v", order, v, got, err)
			}
		}
		for _, v := range []string{"", "active", strings.Repeat("é", 5000)} {
			if got, err := open(v).Text(); got != v || err != nil {
				t.Errorf("%v: %q read as %q, %v", order, v, got, err)
			}
		}
		for _, v := range [][]byte{{}, {7}, id} {
			if got, err := open(v).Bytes(); !bytes.Equal(got, v) || err != nil {
				t.Errorf("%v: %x read as %x, %v", order, v, got, err)
			}
		}

		// Each reader takes its own type and no other.
		values := map[string]any{
			"t": uint64(1), "b": true, "s": "1", "ay": []byte{1},
			"y": byte(1), "n": int16(1), "q": uint16(1), "i": int32(1), "u": uint32(1), "x": int64(1), "d": 1.0,
			"o": dbus.ObjectPath("/a"), "g": dbus.SignatureOf(""), "as": []string{"1"}, "v": dbus.MakeVariant(uint64(1)),
			"(tt)": struct{ A, B uint64 }{1, 2}, "a{sv}": map[string]dbus.Variant{"a": dbus.MakeVariant(uint64(1))},
		}
		readers := map[string]func(Reply) error{
			"t":  func(r Reply) error { _, err := r.Uint64(); return err },
			"b":  func(r Reply) error { _, err := r.Bool(); return err },
			"s":  func(r Reply) error { _, err := r.Text(); return err },
			"ay": func(r Reply) error { _, err := r.Bytes(); return err },
		}
		for kind, value := range values {
			r := open(value)
			for wanted, read := range readers {
				err := read(r)
				if (err == nil) != (kind == wanted) {
					t.Errorf("%v: a value of type %s read as %s: %v", order, kind, wanted, err)
				}
				if err != nil && !strings.Contains(err.Error(), kind) {
					t.Errorf("%v: the error %q does not name the type %s", order, err, kind)
				}
			}
		}
	}
}

func TestReplyRefuses(t *testing.T) {
	variant := func(signature string, value ...byte) []byte {
		b := append([]byte{byte(len(signature))}, signature...)
		b = append(b, 0)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
		return append(b, value...)
	}
	le := binary.LittleEndian
	for name, test := range map[string]struct {
		reply Reply
		want  string
	}{
		"error reply":           {Reply{order: le, ErrorName: []byte(noUnit)}, noUnit},
		"empty body":            {Reply{order: le, signature: []byte("v")}, "type"},
		"no signature":          {Reply{order: le, body: variant("t", 1, 0, 0, 0, 0, 0, 0, 0)}, "type"},
		"plain uint64":          {Reply{order: le, signature: []byte("t"), body: []byte{1, 0, 0, 0, 0, 0, 0, 0}}, "type"},
		"two values":            {Reply{order: le, signature: []byte("vv"), body: variant("t", 1, 0, 0, 0, 0, 0, 0, 0)}, "type"},
		"cut off value":         {Reply{order: le, signature: []byte("v"), body: variant("t", 1, 0, 0, 0, 0, 0, 0)}, "malformed"},
		"cut off padding":       {Reply{order: le, signature: []byte("v"), body: []byte{1, 't', 0, 0}}, "malformed"},
		"cut off signature":     {Reply{order: le, signature: []byte("v"), body: []byte{9, 't', 0}}, "type"},
		"signature without end": {Reply{order: le, signature: []byte("v"), body: []byte{1, 't', 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}}, ""},
		"not UTF-8 signature":   {Reply{order: le, signature: []byte("v"), body: variant("\xff\xfe", 1, 0, 0, 0, 0, 0, 0, 0)}, "type"},
	} {
		t.Run(name, func(t *testing.T) {
			if v, err := test.reply.Uint64(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("read as %d, error %v; want an error with %q", v, err, test.want)
			}
		})
	}
	for name, body := range map[string][]byte{
		"string longer than the body": variant("s", 255, 255, 255, 255, 'a', 0),
		"string without an end":       variant("s", 1, 0, 0, 0, 'a', 'b'),
	} {
		// The value of an s begins at 4, not at 8.
		body = append(body[:4:4], body[8:]...)
		r := Reply{order: le, signature: []byte("v"), body: body}
		if v, err := r.Text(); err == nil {
			t.Errorf("%s: read as %q", name, v)
		}
	}
	r := Reply{order: le, signature: []byte("v"), body: []byte{2, 'a', 'y', 0, 255, 255, 255, 255, 1}}
	if v, err := r.Bytes(); err == nil {
		t.Errorf("array longer than the body: read as %x", v)
	}
}

// FuzzParseHeader gives our parser and godbus's the same bytes. Ours may be
// stricter, but what both accept must mean the same.
func FuzzParseHeader(f *testing.F) {
	for _, m := range [][]byte{
		getReply(f, binary.LittleEndian, 1<<31, uint64(5)),
		getReply(f, binary.BigEndian, 1<<31, []byte{1, 2}),
		errorReply(f, binary.LittleEndian, 1<<31+1, noUnit),
		appendGet(nil, 7, Property{"/a", "b.c", "d"}),
	} {
		order, err := byteOrder(m[0])
		if err != nil {
			f.Fatal(err)
		}
		end := 16 + int(order.Uint32(m[12:]))
		f.Add(m[0] == 'B', m[1], m[16:end], m[(end+7)&^7:])
	}
	f.Fuzz(func(t *testing.T, big bool, kind byte, fields, body []byte) {
		m := []byte{'l', kind, 0, 1}
		var order binary.AppendByteOrder = binary.LittleEndian
		if big {
			m[0], order = 'B', binary.BigEndian
		}
		m = order.AppendUint32(m, uint32(len(body)))
		m = order.AppendUint32(m, 1)
		m = order.AppendUint32(m, uint32(len(fields)))
		m = append(m, fields...)
		m = append(appendPadding(m, 0, 8), body...)
		h, err := parse(m)
		if err != nil {
			return
		}
		_ = h.signal()
		r := Reply{order: h.order, ErrorName: h.errorName, signature: h.signature, body: h.body}
		_, _ = r.Uint64()
		_, _ = r.Bool()
		_, _ = r.Text()
		_, _ = r.Bytes()

		theirs, err := dbus.DecodeMessage(bytes.NewReader(m))
		if err != nil {
			return
		}
		for field, ours := range map[dbus.HeaderField][]byte{
			dbus.FieldPath: h.path, dbus.FieldInterface: h.iface, dbus.FieldMember: h.member, dbus.FieldErrorName: h.errorName,
		} {
			var want string
			switch v := theirs.Headers[field].Value().(type) {
			case string:
				want = v
			case dbus.ObjectPath:
				want = string(v)
			case nil:
			default:
				return // a field of a type that it may not have: godbus does not mind
			}
			if string(ours) != want {
				t.Fatalf("header field %d is %q, godbus says %q", field, ours, want)
			}
		}
		if serial, ok := theirs.Headers[dbus.FieldReplySerial].Value().(uint32); ok && serial != h.replySerial {
			t.Fatalf("reply serial is %d, godbus says %d", h.replySerial, serial)
		}
	})
}

// FuzzMessageSize: no header makes a size that cannot be allocated or that is
// smaller than the header itself.
func FuzzMessageSize(f *testing.F) {
	f.Add(getReply(f, binary.LittleEndian, 1, uint64(5))[:16])
	f.Add(bytes.Repeat([]byte{255}, 16))
	f.Fuzz(func(t *testing.T, fixed []byte) {
		if len(fixed) < 16 {
			return
		}
		size, err := messageSize(fixed[:16:16])
		if err != nil {
			return
		}
		longest := maxMessage
		if unasked(fixed) {
			longest = maxUnasked // is skipped, and never allocated
		}
		if size < 16 || size > longest {
			t.Fatalf("size is %d", size)
		}
		if size > 1<<16 {
			return
		}
		message := make([]byte, size)
		copy(message, fixed)
		_, _ = parseHeader(message)
	})
}

// FuzzReply reads any body as each of the four types.
func FuzzReply(f *testing.F) {
	f.Add(false, []byte("v"), []byte{1, 't', 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add(true, []byte("v"), []byte{1, 's', 0, 0, 0, 0, 0, 1, 'a', 0})
	f.Add(false, []byte("v"), []byte{2, 'a', 'y', 0, 1, 0, 0, 0, 9})
	f.Add(false, []byte("v"), []byte{1, 'b', 0, 0, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, big bool, signature, body []byte) {
		r := Reply{order: binary.LittleEndian, signature: signature, body: body[:len(body):len(body)]}
		if big {
			r.order = binary.BigEndian
		}
		if v, err := r.Uint64(); err == nil && (len(body) < 16 || r.order.Uint64(body[8:]) != v) {
			t.Fatalf("read %d from %x", v, body)
		}
		if v, err := r.Bool(); err == nil && (len(body) < 8 || (r.order.Uint32(body[4:]) != 0) != v) {
			t.Fatalf("read %v from %x", v, body)
		}
		if v, err := r.Text(); err == nil && !bytes.Contains(body, []byte(v)) {
			t.Fatalf("read %q from %x", v, body)
		}
		if v, err := r.Bytes(); err == nil && !bytes.Contains(body, v) {
			t.Fatalf("read %x from %x", v, body)
		}
	})
}
