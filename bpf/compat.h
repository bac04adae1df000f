/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* One source, two ways into the kernel: compiled ahead of time by clang for libbpf, or at run time by BCC (which
 * collector/bcc_object.py drives, and for which it defines FLOWSAGE_BCC). What differs is here, and nowhere else:
 *
 *                     libbpf                             BCC
 *  MAP                a definition in .maps              a table of BCC's, of which MAP_AT knows the number
 *  MAPPED             .data, mapped by user space        an array of one row
 *  SETTINGS           .rodata, written before load       constants, from the macro SETTINGS_OF_name
 *  program types      section names                      said by bcc_object.py
 *  RARE               global functions: the verifier     inlined: BCC has no functions between programs
 *                     checks each once
 *  32-bit atomics     yes (-mcpu=v3)                     no (v1): use none
 *  headers            those of user space                those of the kernel, under uapi/
 */
#ifndef FLOWSAGE_COMPAT_H
#define FLOWSAGE_COMPAT_H

#ifdef FLOWSAGE_BCC

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>

#undef SEC
#undef likely
#undef unlikely

#define SEC(name)
#define RARE static __always_inline

/* BCC numbers tables −1, −2, … as they are declared, and puts descriptors in place of the numbers when it has made them. */
enum { MAPS_BEFORE = __COUNTER__ };
#define MAP(name, type, key, value, entries, flags)             \
	enum { MAP_NUMBER_##name = MAPS_BEFORE - __COUNTER__ }; \
	BPF_F_TABLE(BCC_##type, key, value, name, entries, flags)
#define MAP_RINGBUF(name, bytes)                                \
	enum { MAP_NUMBER_##name = MAPS_BEFORE - __COUNTER__ }; \
	BPF_RINGBUF_OUTPUT(name, (bytes) / 4096)
#define MAP_AT(name) ((void *)bpf_pseudo_fd(1, MAP_NUMBER_##name))
#define BCC_HASH "hash"
#define BCC_ARRAY "array"
#define BCC_PERCPU_ARRAY "percpu_array"

#define SETTINGS(type, name, initial) static const type name = {initial, SETTINGS_OF_##name}
#define MAPPED(type, name) MAP(name, ARRAY, __u32, type, 1, BPF_F_MMAPABLE)
#define MAPPED_AT(name) bpf_map_lookup_elem(MAP_AT(name), &(__u32){0})

/* A static function that is called through a pointer has to lie behind the program that hands it out. */
#define CALLBACK_OF(program) static __attribute__((__noinline__, section(".bpf.fn." #program)))

#undef bpf_htons
#undef bpf_ntohs
#undef bpf_htonl
#define bpf_htons __cpu_to_be16
#define bpf_ntohs __be16_to_cpu
#define bpf_htonl __cpu_to_be32
#define bpf_be64_to_cpu __be64_to_cpu

static __always_inline __u32 xdp_length(struct xdp_md *ctx)
{
	return bpf_xdp_get_buff_len(ctx);
}

#else

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define RARE __noinline
#define SETTINGS(type, name, initial) const volatile type name SEC(".rodata." #name) = {initial}
#define MAPPED(type, name) volatile type name SEC(".data." #name) = {}
#define MAPPED_AT(name) (&name)
#define CALLBACK_OF(program) static

#define MAP(name, kind, key_type, value_type, entries, flags) \
	struct {                                              \
		__uint(type, BPF_MAP_TYPE_##kind);            \
		__uint(max_entries, entries);                 \
		__uint(map_flags, flags);                     \
		__type(key, key_type);                        \
		__type(value, value_type);                    \
	} name SEC(".maps")
#define MAP_RINGBUF(name, bytes)                    \
	struct {                                    \
		__uint(type, BPF_MAP_TYPE_RINGBUF); \
		__uint(max_entries, bytes);         \
	} name SEC(".maps")
#define MAP_AT(name) ((void *)&name)

/* What the kernel calls these; of what follows ___ nobody but us takes notice. */
struct xdp_buff___ours {
	__u32 flags;
} __attribute__((preserve_access_index));
enum xdp_buff_flags___ours { XDP_FLAGS_HAS_FRAGS___ours = 1 };
enum bpf_attach_type___ours { BPF_TCX_EGRESS___ours = 47 };
extern void *bpf_cast_to_kern_ctx(void *context) __ksym __weak;

/* bpf_xdp_get_buff_len() takes 8 ns, mostly for returning (speculative return stack overflow), to say for nearly every frame
 * what can be seen: that it has one part. Linux 6.6, which the enumerator stands for, lets us look (6.2, to be exact).
 */
static __always_inline __u32 xdp_length(struct xdp_md *ctx)
{
	if (bpf_core_enum_value_exists(enum bpf_attach_type___ours, BPF_TCX_EGRESS___ours) &&
	    bpf_core_enum_value_exists(enum xdp_buff_flags___ours, XDP_FLAGS_HAS_FRAGS___ours)) {
		struct xdp_buff___ours *xdp = bpf_cast_to_kern_ctx(ctx);

		if (!(xdp->flags & bpf_core_enum_value(enum xdp_buff_flags___ours, XDP_FLAGS_HAS_FRAGS___ours)))
			return ctx->data_end - ctx->data;
	}
	return bpf_xdp_get_buff_len(ctx);
}

#endif

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#endif
