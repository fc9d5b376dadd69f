// Package systemdtest gives tests a systemd to talk to.
//
// A [Rig] is the real thing: the machine's own systemd (or that of another root
// tree) as PID 1 of throwaway namespaces, over an overlay of the root file
// system, with a real dbus-daemon, journal and cgroup-BPF IP accounting. What a
// rig does stays inside it: nothing on the host is changed, and nothing is left
// behind, not even when the owner is killed. It needs Linux, root, cgroup v2,
// overlayfs, systemd, dbus-daemon and util-linux; [Boot] says which is missing.
//
// A [Fake] is org.freedesktop.systemd1 with an obedient mind, on a real private
// dbus-daemon (a [Bus]). It is for what the real systemd cannot be made to do:
// wrong types, errors, silence, counters that fall. [StartGarbage] is for peers
// that do not even speak D-Bus. Neither needs root.
//
// Everything that fails inside a helper that takes a [testing.TB] fails the
// test. All methods may be called from several goroutines.
package systemdtest
