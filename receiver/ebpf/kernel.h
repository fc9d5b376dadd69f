/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The part of the kernel's BPF interface that meter.bpf.c uses. With it here,
 * a build needs no kernel headers and gives the same bytes on every host.
 */
#ifndef UNITMETER_KERNEL_H
#define UNITMETER_KERNEL_H

typedef unsigned char __u8;
typedef unsigned int __u32;
typedef unsigned long long __u64;

#define SEC(name) __attribute__((section(name), used))
#define barrier(pointer) __asm__ volatile("" : "+r"(pointer))
#define always_inline inline __attribute__((always_inline))

/* How a map is described to the loader. */
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

enum map_type { HASH = 1, ARRAY = 2, PERCPU_ARRAY = 6 };
enum map_flag { NO_PREALLOC = 1 };
enum update_flag { ANY = 0, NOEXIST = 1 };

/* Helper functions, by their numbers in include/uapi/linux/bpf.h. */
static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*map_update)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*map_delete)(void *map, const void *key) = (void *)3;
static long (*skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) = (void *)26;
static __u64 (*skb_cgroup_id)(const void *skb) = (void *)79;
static long (*probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)113;
static long (*probe_read_kernel_str)(void *to, __u32 size, const void *from) = (void *)115;
static __u64 (*ktime_get_boot_ns)(void) = (void *)125;

/* The packet as a program sees it: a fixed layout, include/uapi/linux/bpf.h. */
struct __sk_buff {
	__u32 len;
	__u32 unused1[9];
	__u32 ifindex;
	__u32 unused2[25];
	__u64 unused3[2]; /* flow_keys, tstamp */
	__u32 unused4;    /* wire_len */
	__u32 gso_segs;
	__u64 unused5; /* sk */
	__u32 gso_size;
};
_Static_assert(__builtin_offsetof(struct __sk_buff, ifindex) == 40, "ifindex");
_Static_assert(__builtin_offsetof(struct __sk_buff, gso_segs) == 164, "gso_segs");
_Static_assert(__builtin_offsetof(struct __sk_buff, gso_size) == 176, "gso_size");

/*
 * Kernel structures, of which the loader adjusts the offsets to the running
 * kernel (CO-RE). The name behind ___ is not compared.
 */
#define KERNEL __attribute__((preserve_access_index))
#define field_exists(field) __builtin_preserve_field_info(field, 2)

struct kernfs_node {
	__u64 id;
} KERNEL;

struct cgroup_root {
	int hierarchy_id;
} KERNEL;

struct cgroup {
	struct kernfs_node *kn;
	struct cgroup_root *root;
	int level;
	struct cgroup *ancestors[]; /* since 6.1 */
} KERNEL;

struct cgroup___before_6_1 {
	int level;
	__u64 ancestor_ids[];
} KERNEL;

#endif
