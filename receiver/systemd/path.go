package systemd

import (
	"encoding/hex"
	"strings"
)

const unitPathPrefix = "/org/freedesktop/systemd1/unit/"

// unitPath returns the object path of a unit: each byte other than a letter or
// a digit is escaped as _xx, and a leading digit too (sd-bus,
// bus_label_escape).
func unitPath(name string) string {
	const digits = "0123456789abcdef"
	b := make([]byte, 0, len(unitPathPrefix)+2*len(name))
	b = append(b, unitPathPrefix...)
	for i := range len(name) {
		c := name[i]
		digit := c >= '0' && c <= '9'
		if c|0x20 >= 'a' && c|0x20 <= 'z' || digit && i > 0 {
			b = append(b, c)
			continue
		}
		b = append(b, '_', digits[c>>4], digits[c&15])
	}
	return string(b)
}

// unitOfPath undoes unitPath. It answers "" for a path that is not one of a
// unit.
func unitOfPath(path string) string {
	label, ok := strings.CutPrefix(path, unitPathPrefix)
	if !ok {
		return ""
	}
	var b strings.Builder
	for i := 0; i < len(label); i++ {
		if label[i] != '_' {
			b.WriteByte(label[i])
			continue
		}
		if i+2 >= len(label) {
			return ""
		}
		c, err := hex.DecodeString(label[i+1 : i+3])
		if err != nil {
			return ""
		}
		b.Write(c)
		i += 2
	}
	return b.String()
}

// invocationPath returns the object path of one run of a unit. Reading by it
// fails when that run is over, and never loads a unit that has gone.
func invocationPath(invocation string) string { return unitPathPrefix + invocation }
