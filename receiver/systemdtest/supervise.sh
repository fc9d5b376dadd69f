# Owns one rig from outside: makes its directory and cgroup, starts boot.sh,
# and removes everything when its standard input ends. The owner only holds the
# other end of that pipe, so a kill -9 of the owner ends the rig as Close does.
#
# environment: DIR (the rig's directory), NAME (its cgroup), ROOT, BOOT (the
# text of boot.sh); arguments: directories to show inside the rig.
# standard output: "pid N", "error TEXT" and "up" from boot.sh.
set -u
prefix=unitmeter-rig-
cgroups=/sys/fs/cgroup
cgroup=$cgroups/$NAME

fail() { echo "error $*"; exit 1; }

# Ends what still runs in a cgroup and removes it. Dying processes keep it busy
# for a moment, hence the tries: for two minutes, which only a loaded machine needs.
remove_cgroup() {
	tries=0
	while [ -d "$1" ]; do
		find "$1" -name cgroup.procs -exec cat {} + 2>/dev/null | while read -r p; do
			[ "$p" -gt 0 ] && kill -9 "$p" 2>/dev/null
		done
		find "$1" -depth -type d -exec rmdir {} + 2>/dev/null
		tries=$((tries + 1))
		[ "$tries" -lt 2400 ] || { echo "cgroup $1 stays busy" >&2; return 1; }
		[ ! -d "$1" ] || sleep 0.05
	done
}

# A living supervisor holds a lock on its directory and on rig-commands in its
# cgroup, so what can be locked belongs to a supervisor that was killed. (Not on
# the cgroup itself: that is the root, and "flock 7" below, of a rig in a rig.)
stale() { [ -d "$1" ] && [ ! -L "$1" ] && [ -O "$1" ] && flock -n "$1" true; }

# These mounts are seen by this script alone. So it makes no difference where,
# or whether, the host has mounted cgroup v2. The tmpfs is for hosts that have it
# in the same place: nothing can be mounted onto itself.
mount -t tmpfs tmpfs "$cgroups" && mount -t cgroup2 cgroup2 "$cgroups" ||
	fail "unsupported cgroup v2 cannot be mounted; boot with a kernel that has it and give this process CAP_SYS_ADMIN"

exec 7<"$cgroups"
flock 7 # one at a time: a rig between mkdir and lock looks stale
for c in "$cgroups/$prefix"*; do
	[ -d "$c/rig-commands" ] && ! stale "$c/rig-commands" || remove_cgroup "$c"
done
for d in "$(dirname "$DIR")/$prefix"*; do
	[ "$d" = "$DIR" ] || ! stale "$d" || rm -rf --one-file-system "$d"
done
mkdir -p "$DIR" && [ -z "$(ls -A "$DIR")" ] || fail "directory $DIR is not empty; name an empty or a new one"
mkdir "$DIR/scratch" || fail "directory $DIR cannot be written"
mkdir -p "$cgroup/rig-commands" || { rm -rf "$DIR"; fail "cgroup $NAME cannot be made; give this process a writable cgroup v2 tree"; }
exec 8<"$DIR" 9<"$cgroup/rig-commands"
flock -n 8 && flock -n 9 || fail "directory $DIR is in use"
exec 7<&-

trap 'exit 1' HUP INT TERM
trap cleanup EXIT
cleanup() {
	trap '' HUP INT TERM
	# PID 1 takes its whole namespace along, and unshare waits for it: after
	# this wait no process of the rig is left.
	kill -9 "$(cat "$DIR/pid" 2>/dev/null || echo "$child")" 2>/dev/null
	wait "$child"
	status=0
	remove_cgroup "$cgroup" || status=1
	rm -rf --one-file-system "$DIR" || status=1
	exit $status
}

(
	# unshare stays outside PID 1's own cgroups, where it would be in the way of
	# controllers, and inside the rig's, where the next sweep would find it.
	echo 0 >"$cgroup/rig-commands/cgroup.procs" || exit 1
	# Modules and the clock are the host's.
	exec setpriv --pdeathsig KILL --bounding-set=-sys_module,-sys_time unshare --mount --pid --fork --uts --ipc --net --kill-child=KILL sh -c "$BOOT" boot "$@"
) </dev/null 3>&1 >"$DIR/boot.log" 2>&1 8<&- 9<&- &
child=$!
exec >/dev/null # so that the owner reads an end of file when the child ends
read -r _
