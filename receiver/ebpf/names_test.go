package ebpf

import (
	"reflect"
	"strings"
	"testing"
)

const id64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// paths has what libsystemd 252 says of each path (ps -o unit,uunit,slice,ouid),
// and the container.
var paths = []struct {
	path string
	want Cgroup
}{
	{"/", Cgroup{Slice: "-.slice"}},
	{"", Cgroup{Slice: "-.slice"}},
	{"/system.slice", Cgroup{Slice: "system.slice"}},
	{"/system.slice/nginx.service", Cgroup{Unit: "nginx.service", Slice: "system.slice"}},
	{"/system.slice/system-getty.slice/getty@tty1.service", Cgroup{Unit: "getty@tty1.service", Slice: "system-getty.slice"}},
	{"/init.scope", Cgroup{Unit: "init.scope", Slice: "-.slice"}},
	{"/system.slice/__odd.service", Cgroup{Unit: "_odd.service", Slice: "system.slice"}},
	{"/system.slice/_cpu.service", Cgroup{Unit: "cpu.service", Slice: "system.slice"}},
	{"/system.slice/cgroup.odd.service", Cgroup{Unit: "cgroup.odd.service", Slice: "system.slice"}},
	{"/system.slice/x.mount", Cgroup{Unit: "x.mount", Slice: "system.slice"}},
	{"/system.slice/x.socket", Cgroup{Unit: "x.socket", Slice: "system.slice"}},
	{"/system.slice/foo.service/supervisor", Cgroup{Unit: "foo.service", Slice: "system.slice"}},
	{"/system.slice/foo.service/inner.slice/bar.service", Cgroup{Unit: "foo.service", Slice: "system.slice"}},
	{"/system.slice/foo@.service", Cgroup{Slice: "system.slice"}}, // a template
	{"/system.slice/@foo.service", Cgroup{Slice: "system.slice"}},
	{"/system.slice/foo.bar", Cgroup{Slice: "system.slice"}},
	{"/system.slice/fo o.service", Cgroup{Slice: "system.slice"}},
	{"/system.slice/" + strings.Repeat("x", 248) + ".service", Cgroup{Slice: "system.slice"}},
	{"/system.slice/" + strings.Repeat("x", 247) + ".service", Cgroup{Unit: strings.Repeat("x", 247) + ".service", Slice: "system.slice"}},
	{"/foo.slice/foo-bar.slice", Cgroup{Slice: "foo-bar.slice"}},
	{"/foo.slice/foo-bar.slice/notaunit", Cgroup{Slice: "foo-bar.slice"}},
	{"/system.slice/-.slice", Cgroup{Slice: "-.slice"}},

	{"/user.slice/user-1000.slice", Cgroup{Slice: "user-1000.slice", User: &User{UID: 1000}}},
	{"/user.slice/user-1000.slice/session-3.scope", Cgroup{Unit: "session-3.scope", Slice: "user-1000.slice", User: &User{UID: 1000}}},
	{"/user.slice/user-1000.slice/session-3.scope/sub", Cgroup{Unit: "session-3.scope", Slice: "user-1000.slice", User: &User{UID: 1000}}},
	{"/user.slice/user-1000.slice/session-3.scope/foo.service", Cgroup{Unit: "session-3.scope", Slice: "user-1000.slice", User: &User{UID: 1000}}},
	{"/user.slice/user-1000.slice/user@1000.service", Cgroup{Unit: "user@1000.service", Slice: "user-1000.slice", User: &User{UID: 1000}}},
	{"/user.slice/user-1000.slice/user@1000.service/init.scope", Cgroup{Unit: "user@1000.service", Slice: "user-1000.slice",
		User: &User{UID: 1000, Unit: "init.scope", Slice: "-.slice"}}},
	{"/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-firefox-1234.scope", Cgroup{Unit: "user@1000.service", Slice: "user-1000.slice",
		User: &User{UID: 1000, Unit: "app-gnome-firefox-1234.scope", Slice: "app.slice"}}},
	{"/user.slice/user-1000.slice/user@1000.service/app.slice", Cgroup{Unit: "user@1000.service", Slice: "user-1000.slice", User: &User{UID: 1000}}},
	{"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id64 + ".scope/container", Cgroup{Unit: "user@1000.service", Slice: "user-1000.slice",
		User: &User{UID: 1000, Unit: "libpod-" + id64 + ".scope", Slice: "user.slice"}, Container: &Container{Runtime: Podman, ID: id64}}},
	{"/user.slice/user-01.slice/user@4294967295.service/x.service", Cgroup{Unit: "user@4294967295.service", Slice: "user-01.slice"}},

	{"/system.slice/docker-0123456789abcdef.scope", Cgroup{Unit: "docker-0123456789abcdef.scope", Slice: "system.slice", Container: &Container{Runtime: Docker, ID: "0123456789abcdef"}}},
	{"/system.slice/docker-" + id64 + ".scope/kubelet.slice/kubelet-kubepods.slice/x.scope", Cgroup{Unit: "docker-" + id64 + ".scope", Slice: "system.slice", Container: &Container{Runtime: Docker, ID: id64}}},
	{"/system.slice/docker-desktop.scope", Cgroup{Unit: "docker-desktop.scope", Slice: "system.slice"}},
	{"/machine.slice/libpod-" + id64 + ".scope/container", Cgroup{Unit: "libpod-" + id64 + ".scope", Slice: "machine.slice", Container: &Container{Runtime: Podman, ID: id64}}},
	{"/machine.slice/libpod-conmon-" + id64 + ".scope", Cgroup{Unit: "libpod-conmon-" + id64 + ".scope", Slice: "machine.slice"}},
	{"/system.slice/web.service/libpod-payload-" + id64, Cgroup{Unit: "web.service", Slice: "system.slice", Container: &Container{Runtime: Podman, ID: id64, Split: true}}},
	{"/system.slice/web.service/runtime", Cgroup{Unit: "web.service", Slice: "system.slice"}},
	{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a_1b.slice/cri-containerd-" + id64 + ".scope",
		Cgroup{Unit: "cri-containerd-" + id64 + ".scope", Slice: "kubepods-burstable-pod0a_1b.slice", Container: &Container{Runtime: Containerd, ID: id64, Pod: "0a-1b"}}},
	{"/kubepods.slice/kubepods-pod0a_1b.slice/crio-" + id64 + ".scope",
		Cgroup{Unit: "crio-" + id64 + ".scope", Slice: "kubepods-pod0a_1b.slice", Container: &Container{Runtime: CRIO, ID: id64, Pod: "0a-1b"}}},
	{"/kubepods.slice/kubepods-pod0a_1b.slice", Cgroup{Slice: "kubepods-pod0a_1b.slice", Container: &Container{Pod: "0a-1b"}}},
	{"/kubepods/burstable/pod0a-1b/" + id64, Cgroup{Slice: "-.slice", Container: &Container{ID: id64, Pod: "0a-1b"}}},
	{"/kubepods/pod0a-1b/" + id64, Cgroup{Slice: "-.slice", Container: &Container{ID: id64, Pod: "0a-1b"}}},
	{"/docker/" + id64, Cgroup{Slice: "-.slice", Container: &Container{Runtime: Docker, ID: id64}}},
	{"/docker/" + id64 + "/docker/abcdef012345", Cgroup{Slice: "-.slice", Container: &Container{Runtime: Docker, ID: id64}}},
	{"/libpod_parent/libpod-" + id64, Cgroup{Slice: "-.slice", Container: &Container{Runtime: Podman, ID: id64}}},
	{"/actions_job/" + id64, Cgroup{Slice: "-.slice", Container: &Container{ID: id64}}},
	{"/lxc.payload.c1/system.slice/inner.service", Cgroup{Slice: "-.slice", Container: &Container{Runtime: LXC, Name: "c1"}}},
	{"/lxc.payload.c1/init.scope", Cgroup{Slice: "-.slice", Container: &Container{Runtime: LXC, Name: "c1"}}},
	{"/lxc/101/ns/init.scope", Cgroup{Slice: "-.slice", Container: &Container{Runtime: LXC, Name: "101"}}},
	{"/lxc", Cgroup{Slice: "-.slice"}},
	{"/lxc.monitor.c1", Cgroup{Slice: "-.slice", Container: &Container{Runtime: LXC, Name: "c1"}}},
	{"/lxc.payload.web.service/init.scope", Cgroup{Slice: "-.slice", Container: &Container{Runtime: LXC, Name: "web.service"}}},
	{"/machine.slice/systemd-nspawn@c1.service/payload/system.slice/inner.service",
		Cgroup{Unit: "systemd-nspawn@c1.service", Slice: "machine.slice", Container: &Container{Runtime: Nspawn, Name: "c1"}}},
	{`/machine.slice/machine-qemu\x2d1\x2dvm.scope/libvirt/vcpu0`,
		Cgroup{Unit: `machine-qemu\x2d1\x2dvm.scope`, Slice: "machine.slice", Container: &Container{Runtime: Libvirt, Name: "vm"}}},
	{`/machine.slice/machine-lxc\x2d12\x2dmy\x2dweb.scope/libvirt`,
		Cgroup{Unit: `machine-lxc\x2d12\x2dmy\x2dweb.scope`, Slice: "machine.slice", Container: &Container{Runtime: Libvirt, Name: "my-web"}}},
	{`/machine.slice/machine-qemu\x2dvm.scope`, Cgroup{Unit: `machine-qemu\x2dvm.scope`, Slice: "machine.slice", Container: &Container{Name: "qemu-vm"}}},
	{`/machine.slice/machine-c1.scope`, Cgroup{Unit: "machine-c1.scope", Slice: "machine.slice", Container: &Container{Name: "c1"}}},
	{`/machine.slice/machine-a\x2.scope`, Cgroup{Unit: `machine-a\x2.scope`, Slice: "machine.slice", Container: &Container{Name: `a\x2`}}},
}

func TestParseCgroup(t *testing.T) {
	for _, p := range paths {
		if got := ParseCgroup(p.path); !reflect.DeepEqual(got, p.want) {
			t.Errorf("%s:\n got %+v %+v %+v\nwant %+v %+v %+v", p.path, got, got.User, got.Container, p.want, p.want.User, p.want.Container)
		}
	}
}

func FuzzParseCgroup(f *testing.F) {
	for _, p := range paths {
		f.Add(p.path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		c := ParseCgroup(path)
		if !strings.HasSuffix(c.Slice, ".slice") || !validUnit(c.Slice) {
			t.Fatalf("%q: slice %q", path, c.Slice)
		}
		units := []string{c.Unit}
		if c.User != nil {
			units = append(units, c.User.Unit)
		}
		for _, unit := range units {
			if unit != "" && (!validUnit(unit) || strings.HasSuffix(unit, ".slice") || !strings.Contains(path, unit)) {
				t.Fatalf("%q: unit %q", path, unit)
			}
		}
		if c.Unit == "" {
			return
		}
		// What a unit has below itself does not change whose it is. A user's manager
		// and split cgroups are the exceptions.
		below := ParseCgroup(path + "/payload/x.service")
		if below.Unit != c.Unit || below.Slice != c.Slice {
			t.Fatalf("%q: unit %q in %q, below it %q in %q", path, c.Unit, c.Slice, below.Unit, below.Slice)
		}
	})
}
