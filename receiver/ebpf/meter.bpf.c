//go:build ignore

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Counts the packets of each cgroup, and names the cgroups.
 *
 * ingress and egress run for each packet of a socket below the root cgroup.
 * made and removed run when a cgroup is created or removed. The maps are the
 * interface to user space; a change to a map or to a structure in one is a new
 * layout, see layout.go.
 */
#include "kernel.h"

#define MAX_CGROUPS 65536 /* the loader may choose another number */

/*
 * A name takes 512 bytes of kernel memory: 56 for the entry, 24 and the path.
 * The unit is in the first components, so that a longer path loses nothing.
 */
#define PATH_SIZE 424

#define MAX_ROOT_LEVEL 255

enum direction { RECEIVED, SENT, DIRECTIONS };
enum device { OTHER, LOOPBACK, DEVICES };

/*
 * bytes and packets are those that systemd counts: whole IP packets, a GSO
 * packet being one. On the wire it is several, which adds the other two.
 */
struct counts {
	__u64 bytes;
	__u64 packets;
	__u64 extra_bytes;
	__u64 extra_packets;
};

/* Times are nanoseconds of CLOCK_BOOTTIME. */
struct entry {
	struct counts counts[DIRECTIONS][DEVICES];
	__u64 born; /* of the entry */
	__u64 gone; /* of the cgroup; 0 while it exists */
};

struct name {
	__u64 made; /* of the cgroup; 0 if it is older than the program */
	__u32 level;
	__u32 size; /* of the path with its NUL */
	__u8 path[PATH_SIZE];
};

/* Packets of cgroups for which meters had no room, cgroups for which names had none. */
struct lost {
	struct counts counts[DIRECTIONS][DEVICES];
	__u64 names;
};

/* Written by the loader. */
struct info {
	__u64 root;   /* id of the cgroup at which the programs are attached */
	__u64 loaded; /* when counting began, CLOCK_BOOTTIME */
	int level;    /* of the root; cgroups outside of it are not named */
	__u32 naming; /* 1 while made and removed are attached */
};

struct {
	__uint(type, HASH);
	__uint(max_entries, MAX_CGROUPS);
	__uint(map_flags, NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct entry);
} meters SEC(".maps");

struct {
	__uint(type, HASH);
	__uint(max_entries, MAX_CGROUPS);
	__uint(map_flags, NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct name);
} names SEC(".maps");

struct {
	__uint(type, ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lost);
} lost SEC(".maps");

struct {
	__uint(type, ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct info);
} info SEC(".maps");

/* A name is made here: it is too large for the stack. */
struct {
	__uint(type, PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct name);
} scratch SEC(".maps");

static const __u32 only = 0; /* the key of an array of one */

/*
 * A cgroup that has no name while all are named has been removed, and its entry
 * after it: a socket of it lives on. Nothing else would mark the new entry.
 */
static always_inline int exists(__u64 id)
{
	struct info *i = map_lookup(&info, &only);

	return !i || !i->naming || id == i->root || map_lookup(&names, &id);
}

static always_inline struct entry *entry_of(__u64 id)
{
	struct entry *e = map_lookup(&meters, &id);

	if (e)
		return e;
	struct entry fresh = {.born = ktime_get_boot_ns()};

	if (!exists(id))
		fresh.gone = fresh.born;
	map_update(&meters, &id, &fresh, NOEXIST); /* another CPU may be first */
	return map_lookup(&meters, &id);
}

#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define GSO_BY_FRAGS 0xffff /* SCTP: the segments differ in size */

/*
 * Adds the headers that all segments but the first have on the wire. An IPv6
 * packet is taken to have no extension headers.
 */
static always_inline void count_segments(struct __sk_buff *skb, struct counts *c, __u32 segment)
{
	__u32 len = skb->len, segments = skb->gso_segs, headers, protocol_at;
	__u8 byte, protocol;

	if (segment == GSO_BY_FRAGS || skb_load_bytes(skb, 0, &byte, 1))
		return;
	if (byte >> 4 == 4) {
		headers = (byte & 15) * 4;
		protocol_at = 9;
	} else {
		headers = 40;
		protocol_at = 6;
	}
	if (skb_load_bytes(skb, protocol_at, &protocol, 1))
		return;
	if (protocol == IPPROTO_TCP) {
		if (skb_load_bytes(skb, headers + 12, &byte, 1))
			return;
		headers += (byte >> 4) * 4;
	} else if (protocol == IPPROTO_UDP) {
		headers += 8;
	} else {
		return;
	}
	if (len <= headers)
		return;
	if (!segments)
		segments = (len - headers + segment - 1) / segment;
	if (segments < 2)
		return;
	__sync_fetch_and_add(&c->extra_bytes, (__u64)(segments - 1) * headers);
	__sync_fetch_and_add(&c->extra_packets, segments - 1);
}

static always_inline int count(struct __sk_buff *skb, enum direction direction)
{
	struct entry *e = entry_of(skb_cgroup_id(skb));
	__u32 segment = skb->gso_size;
	struct counts *c;

	if (e) {
		c = e->counts[direction];
	} else {
		struct lost *l = map_lookup(&lost, &only);

		if (!l)
			return 1;
		c = l->counts[direction];
	}
	/* The verifier wants the check for NULL before the addition below. */
	barrier(c);
	/* The loopback device is number 1 in each network namespace. */
	c += skb->ifindex == 1 ? LOOPBACK : OTHER;
	__sync_fetch_and_add(&c->bytes, skb->len);
	__sync_fetch_and_add(&c->packets, 1);
	if (segment)
		count_segments(skb, c, segment);
	return 1; /* let the packet pass */
}

SEC("cgroup_skb/ingress")
int ingress(struct __sk_buff *skb)
{
	return count(skb, RECEIVED);
}

SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	return count(skb, SENT);
}

/*
 * The id of the ancestor at a level, which is not below that of the cgroup. The
 * verifier wants a bound to a level that it does not know.
 */
static always_inline __u64 ancestor(struct cgroup *cgroup, __u32 level)
{
	struct cgroup *a = 0;
	struct kernfs_node *kn = 0;
	__u64 id = 0;

	if (level > MAX_ROOT_LEVEL)
		return 0;
	if (field_exists(cgroup->ancestors)) {
		probe_read_kernel(&a, sizeof(a), &cgroup->ancestors[level]);
		probe_read_kernel(&kn, sizeof(kn), &a->kn);
		probe_read_kernel(&id, sizeof(id), &kn->id);
	} else {
		struct cgroup___before_6_1 *old = (void *)cgroup;

		probe_read_kernel(&id, sizeof(id), &old->ancestor_ids[level]);
	}
	return id;
}

/*
 * The events are those of all hierarchies, also of version 1, whose ids are
 * numbers of their own; version 2 is number 0.
 */
static always_inline int below_root(struct cgroup *cgroup)
{
	struct info *i = map_lookup(&info, &only);

	if (!i || cgroup->root->hierarchy_id)
		return 0;
	if (!i->level)
		return 1;
	return cgroup->level >= i->level && ancestor(cgroup, i->level) == i->root;
}

static always_inline void put_name(struct cgroup *cgroup, __u64 id, const char *path, __u64 made)
{
	struct name *n = map_lookup(&scratch, &only);
	struct lost *l = map_lookup(&lost, &only);

	if (!n || !l)
		return;
	n->made = made;
	n->level = cgroup->level;
	n->size = probe_read_kernel_str(n->path, sizeof(n->path), path);
	if (map_update(&names, &id, n, ANY))
		__sync_fetch_and_add(&l->names, 1);
}

/* Runs before the directory can be seen, so before any packet. */
SEC("tp_btf/cgroup_mkdir")
int made(__u64 *ctx)
{
	struct cgroup *cgroup = (void *)ctx[0];

	if (below_root(cgroup))
		put_name(cgroup, cgroup->kn->id, (void *)ctx[1], ktime_get_boot_ns());
	return 0;
}

/* A cgroup without traffic leaves nothing behind. The reader removes the others. */
SEC("tp_btf/cgroup_rmdir")
int removed(__u64 *ctx)
{
	struct cgroup *cgroup = (void *)ctx[0];
	__u64 id = cgroup->kn->id;
	struct entry *e;

	if (!below_root(cgroup))
		return 0;
	e = map_lookup(&meters, &id);
	if (!e) {
		map_delete(&names, &id);
		return 0;
	}
	e->gone = ktime_get_boot_ns();
	if (!map_lookup(&names, &id)) /* there was no room before */
		put_name(cgroup, id, (void *)ctx[1], 0);
	return 0;
}

/* probe_read_kernel_str is for programs under the GPL. */
char _license[] SEC("license") = "Dual BSD/GPL";
