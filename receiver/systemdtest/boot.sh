# Runs as PID 1 of the rig until systemd takes its place. Everything that
# systemd could change on the host is replaced or made read-only first.
# environment and arguments: see supervise.sh. Descriptor 3 goes to the owner.
set -eu
read -r pid _ </proc/self/stat # /proc is still the host's, and so is the number
echo "$pid" >"$DIR/pid"
echo "pid $pid" >&3
fail() { echo "error $*" >&3; exit 1; }

mount -t tmpfs -o mode=755 scratch "$DIR/scratch"
cd "$DIR/scratch"
mkdir upper work root
mount -t overlay overlay -o "lowerdir=$ROOT,upperdir=upper,workdir=work" root ||
	fail "unsupported overlayfs over $ROOT cannot be mounted; load it with: modprobe overlay"
new=$DIR/scratch/root
# An overlay does not reach into file systems mounted below its lower directory.
for d in usr usr/local opt var; do
	if mountpoint -q "${ROOT%/}/$d"; then
		mkdir -p "upper.$d" "work.$d"
		mount -t overlay overlay -o "lowerdir=${ROOT%/}/$d,upperdir=upper.$d,workdir=work.$d" "root/$d"
	fi
done
cd "$new"

mkdir -p proc sys dev run tmp mnt etc/systemd/system
mount -t proc proc proc
# Only the settings of the network belong to the rig's own namespace.
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,rw proc/sys/net
if [ -e proc/sysrq-trigger ]; then
	mount --bind proc/sysrq-trigger proc/sysrq-trigger
	mount -o remount,bind,ro proc/sysrq-trigger
fi
mount -t sysfs -o ro sysfs sys
# The process's cgroup at unshare becomes the root that the rig sees.
echo 0 >"/sys/fs/cgroup/$NAME/cgroup.procs"
unshare --cgroup mount -t cgroup2 cgroup2 sys/fs/cgroup
# A shared /dev would keep systemd's directories and links for ever.
mount -t tmpfs -o mode=755,nosuid dev dev
for n in null zero full random urandom tty fuse loop-control loop0 loop1 loop2 loop3 loop4 loop5 loop6 loop7; do
	[ ! -e "/dev/$n" ] || cp -a "/dev/$n" dev/
done
mkdir dev/net
[ ! -e /dev/net/tun ] || cp -a /dev/net/tun dev/net/
ln -s pts/ptmx dev/ptmx
: >dev/console # where systemd says why it cannot start
mount --bind "$DIR/boot.log" dev/console
mount -t tmpfs -o mode=755,nosuid,nodev run run
mkdir run/lock
mount -t tmpfs -o mode=1777 tmp tmp
for d in "$@"; do
	mkdir -p "$new$d"
	mount --bind "$d" "$new$d"
	mount -o remount,bind,ro "$new$d"
done

# The host's own configuration says nothing about the rig: no disks, no enabled
# units, no drop-ins. A tree made for rigs keeps what it brings.
: >etc/fstab
rm -f etc/crypttab
if [ "$ROOT" = / ]; then
	bus=$(readlink etc/systemd/system/dbus.service || true) # Fedora's choice of bus is an alias here
	rm -rf etc/systemd/system etc/systemd/system.conf etc/systemd/system.conf.d
	mkdir etc/systemd/system
	[ -z "$bus" ] || ln -s "$bus" etc/systemd/system/dbus.service
fi
# Work for a first boot on real hardware: slow here, and of no use.
for u in ldconfig systemd-update-done systemd-hwdb-update systemd-journal-catalog-update systemd-firstboot \
	systemd-modules-load systemd-binfmt systemd-udevd systemd-udev-trigger; do
	ln -sf /dev/null "etc/systemd/system/$u.service"
done
rm -f etc/machine-id # may be a bind mount or read-only below
tr -d - </proc/sys/kernel/random/uuid >etc/machine-id

for s in /lib/systemd/systemd /usr/lib/systemd/systemd; do [ ! -x "$new$s" ] || init=$s; done
pivot_root . mnt
cd /
umount -l /mnt
echo up >&3
exec unshare --cgroup env -i container=unitmeter-rig PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	"$init" --system --unit=basic.target --log-target=journal --show-status=no 3>&-
