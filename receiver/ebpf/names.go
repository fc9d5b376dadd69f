package ebpf

import (
	"strconv"
	"strings"
)

// Cgroup is the parsed path of a cgroup. An absent part is "" or nil.
type Cgroup struct {
	// Unit is the system unit that the cgroup belongs to. Cgroups below a unit's belong
	// to the unit. A cgroup that systemd does not manage has none.
	Unit string
	// Slice is the innermost slice above the unit, "-.slice" at the top.
	Slice string
	// User is the user whose session or manager the cgroup belongs to.
	User *User
	// Container is the outermost container or machine around the cgroup. Below a user's
	// manager, that user chose its name.
	Container *Container
}

// User is a user with a login session or a manager of their own.
type User struct {
	UID uint32
	// Unit and Slice are a unit of the user's manager and the slice above it.
	// Outside of a manager's units both are "".
	Unit, Slice string
}

// Container is a container, a pod's container or a virtual machine.
type Container struct {
	Runtime Runtime
	// ID is 12 to 64 hexadecimal digits. Machines have a name only.
	ID   string
	Name string
	// Split says that podman runs it in the cgroup of a service, which starts another
	// one under the same name. Quadlet does so.
	Split bool
	// Pod is the UID of the Kubernetes pod.
	Pod string
}

// Runtime is the program that runs a container; "" if the path does not say.
type Runtime string

// The runtimes that a path can name, by the names of OpenTelemetry's
// container.runtime.name where it has one.
const (
	Docker     Runtime = "docker"
	Podman     Runtime = "podman"
	Containerd Runtime = "containerd"
	CRIO       Runtime = "cri-o"
	LXC        Runtime = "lxc"
	Nspawn     Runtime = "systemd-nspawn"
	Libvirt    Runtime = "libvirt"
)

// ParseCgroup reads the path of a cgroup below the root of the hierarchy, such as
// "/system.slice/nginx.service", by the rules of systemd's cg_path_get_unit and
// cg_path_get_user_unit.
func ParseCgroup(path string) Cgroup {
	parts := strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
	slice, rest := skipSlices(parts)
	c := Cgroup{Slice: slice}
	if uid, ok := uidBetween(slice, "user-", ".slice"); ok {
		c.User = &User{UID: uid}
	}
	pod := podOfSlice(slice)
	if len(rest) == 0 {
		if pod != "" {
			c.Container = &Container{Pod: pod}
		}
		return c
	}
	if c.Unit = unitOf(rest[0]); c.Unit == "" || strings.HasPrefix(rest[0], "lxc.") {
		c.Unit, c.Container = "", unmanagedContainer(rest)
		return c
	}
	unit, rest := c.Unit, rest[1:]
	if uid, ok := uidBetween(unit, "user@", ".service"); ok {
		c.User = &User{UID: uid}
		userSlice, below := skipSlices(rest)
		if len(below) > 0 {
			if u := unitOf(below[0]); u != "" {
				c.User.Unit, c.User.Slice = u, userSlice
				unit, rest = u, below[1:]
			}
		}
	}
	c.Container = unitContainer(unit, rest)
	if c.Container != nil {
		c.Container.Pod = pod
	} else if pod != "" {
		c.Container = &Container{Pod: pod}
	}
	return c
}

// skipSlices returns the last of the leading slices and what follows them.
func skipSlices(parts []string) (slice string, rest []string) {
	slice = "-.slice"
	for i, part := range parts {
		name := unescapeComponent(part)
		if !strings.HasSuffix(name, ".slice") || !validUnit(name) || strings.Contains(name, "@") {
			return slice, parts[i:]
		}
		slice = name
	}
	return slice, nil
}

// unitOf returns the unit that a component is, or "".
func unitOf(component string) string {
	name := unescapeComponent(component)
	if !validUnit(name) || strings.HasSuffix(name, ".slice") {
		return ""
	}
	return name
}

// unescapeComponent takes the "_" away that systemd puts before a name which
// could be a file of the kernel.
func unescapeComponent(s string) string { return strings.TrimPrefix(s, "_") }

// validUnit is systemd's unit_name_is_valid for names that are no templates.
func validUnit(name string) bool {
	dot := strings.LastIndexByte(name, '.')
	if dot <= 0 || len(name) > 255 || !unitType(name[dot+1:]) {
		return false
	}
	stem := name[:dot]
	for i := range len(stem) {
		ch := stem[i]
		letter := ch|0x20 >= 'a' && ch|0x20 <= 'z'
		if !letter && (ch < '0' || ch > '9') && strings.IndexByte(`:-_.\@`, ch) < 0 {
			return false
		}
	}
	at := strings.IndexByte(stem, '@')
	return at < 0 || at > 0 && at < len(stem)-1
}

func unitType(suffix string) bool {
	switch suffix {
	case "service", "scope", "socket", "slice", "mount", "swap", "timer", "path", "target", "device", "automount":
		return true
	}
	return false
}

// uidBetween reads the number of a user as systemd's parse_uid does: decimal,
// without leading zeros, and not one of the two that mean "none".
func uidBetween(s, prefix, suffix string) (uint32, bool) {
	digits, ok := cutAround(s, prefix, suffix)
	if !ok || digits == "" || len(digits) > 1 && digits[0] == '0' || strings.Trim(digits, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	return uint32(n), err == nil && n != 0xffffffff && n != 0xffff
}

func cutAround(s, prefix, suffix string) (string, bool) {
	s, hasPrefix := strings.CutPrefix(s, prefix)
	s, hasSuffix := strings.CutSuffix(s, suffix)
	return s, hasPrefix && hasSuffix
}

// podOfSlice reads the UID of a pod from a slice that kubelet has made:
// kubepods-burstable-podUID.slice, with "_" for each "-" of the UID.
func podOfSlice(slice string) string {
	name, ok := cutAround(slice, "kubepods-", ".slice")
	if !ok {
		return ""
	}
	for _, class := range []string{"burstable-", "besteffort-"} {
		name = strings.TrimPrefix(name, class)
	}
	uid, ok := strings.CutPrefix(name, "pod")
	if !ok {
		return ""
	}
	return strings.ReplaceAll(uid, "_", "-")
}

// scopes are the names of scopes that runtimes make, around the container's id.
var scopes = []struct {
	prefix  string
	runtime Runtime
}{
	{"docker-", Docker},
	{"libpod-", Podman},
	{"cri-containerd-", Containerd},
	{"nerdctl-", Containerd},
	{"crio-", CRIO},
}

// unitContainer returns the container that a unit runs, or nil. below is the path
// within the unit.
func unitContainer(unit string, below []string) *Container {
	for _, s := range scopes {
		if id, ok := cutAround(unit, s.prefix, ".scope"); ok && containerID(id) {
			return &Container{Runtime: s.runtime, ID: id}
		}
	}
	if name, ok := cutAround(unit, "systemd-nspawn@", ".service"); ok {
		return &Container{Runtime: Nspawn, Name: unescapeUnit(name)}
	}
	if name, ok := cutAround(unit, "machine-", ".scope"); ok {
		c := &Container{Name: unescapeUnit(name)}
		if domain, ok := libvirtDomain(c.Name); ok {
			c.Runtime, c.Name = Libvirt, domain
		}
		return c
	}
	if len(below) > 0 { // podman with split cgroups, as Quadlet runs it
		if id, ok := strings.CutPrefix(below[0], "libpod-payload-"); ok && containerID(id) {
			return &Container{Runtime: Podman, ID: id, Split: true}
		}
	}
	return nil
}

// libvirtDomain returns the domain of a machine, qemu-NUMBER-DOMAIN or
// lxc-NUMBER-DOMAIN. The number is another one at each start.
func libvirtDomain(machine string) (domain string, ok bool) {
	driver, rest, _ := strings.Cut(machine, "-")
	number, domain, _ := strings.Cut(rest, "-")
	ok = (driver == "qemu" || driver == "lxc") && number != "" && strings.Trim(number, "0123456789") == "" && domain != ""
	return domain, ok
}

// unmanagedContainer returns the container of a cgroup that a runtime has made
// without systemd, or nil.
func unmanagedContainer(parts []string) *Container {
	first := parts[0]
	for _, prefix := range []string{"lxc.payload.", "lxc.monitor."} {
		if name, ok := strings.CutPrefix(first, prefix); ok && name != "" {
			return &Container{Runtime: LXC, Name: name}
		}
	}
	if (first == "lxc" || first == "lxc.monitor") && len(parts) > 1 { // LXC before 4, Proxmox
		return &Container{Runtime: LXC, Name: parts[1]}
	}
	c := Container{}
	switch first {
	case "docker":
		c.Runtime = Docker
	case "libpod_parent":
		c.Runtime = Podman
	}
	for _, part := range parts {
		if uid, ok := strings.CutPrefix(part, "pod"); ok && first == "kubepods" && c.Pod == "" {
			c.Pod = uid
		}
		if id := strings.TrimPrefix(part, "libpod-"); containerID(id) {
			c.ID = id
			break
		}
	}
	if c.ID == "" && c.Pod == "" {
		return nil
	}
	return &c
}

func containerID(s string) bool {
	return len(s) >= 12 && len(s) <= 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// unescapeUnit is systemd's unit_name_unescape: "-" is "/", \xHH is a byte. A
// name that systemd would refuse stays as it is.
func unescapeUnit(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '-':
			b.WriteByte('/')
		case s[i] != '\\':
			b.WriteByte(s[i])
		case i+3 < len(s) && s[i+1] == 'x':
			n, err := strconv.ParseUint(s[i+2:i+4], 16, 8)
			if err != nil {
				return s
			}
			b.WriteByte(byte(n))
			i += 3
		default:
			return s
		}
	}
	return b.String()
}
