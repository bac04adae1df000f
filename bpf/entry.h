/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* Folds packets into flow records.
 *
 * Exact without locks. Each direction of a flow has one 64-bit word: bit 63 CLOSED, 23 bits of packets, 40 bits of bytes.
 * A packet is counted by a single fetch_add on it; whoever ends the flow takes the word by an exchange that leaves CLOSED.
 * So a packet is either in what was taken, or its fetch_add returns CLOSED and it is not in this entry: it looks up again,
 * and becomes a record of its own when that fails too. Who gets the open word of side 0 owns the entry: it takes side 1,
 * submits, and deletes the key, which nobody else may. An element of a preallocated table can be reused at once, under the
 * hands of a CPU that still points to it: `print` is compared after counting and after taking, and undone if it differs.
 * Everything else in an entry is written plainly: under a race between CPUs a minimum or a sum of squares may miss a
 * packet, packets and bytes never do.
 *
 * The ring is reserved before anything is taken, so a full ring leaves the flow where it is.
 *
 * Entries are in two tables. The front is an array of places; which of them is a flow's, a cell of a second array tells,
 * the one that its print points to. So a packet finds its entry by two indices, which are inlined, where the look-up of a
 * hash is four functions deep (25 ns). A flow whose cell is another's goes to the hash, and stays there. (Should two CPUs
 * begin one flow at the very moment its cell becomes free, each in another table, then it ends in two records.) Places
 * are given out in turn, and flows that begin one after the other lie so: memory likes that better than their prints.
 */
#ifndef FLOWSAGE_ENTRY_H
#define FLOWSAGE_ENTRY_H

#include "parse.h"

#define CLOSED (1ULL << 63)
#define PACKET_SHIFT 40
#define ONE_PACKET (1ULL << PACKET_SHIFT)
#define BYTES_MASK (ONE_PACKET - 1)
#define PACKETS_MASK ((1ULL << 23) - 1)
#define PACKETS_EMIT (1ULL << 22) /* emit, half-way to overflow */
#define PACKETS_FULL (PACKETS_MASK - 4096) /* the ring has been full since: count no more here */
#define ATTEMPTS 3
#define TAKE_ATTEMPTS 16
#define SLOT_BYTES 256
#define WAKE_EVERY (64 * SLOT_BYTES) /* past the threshold: a forced wake-up costs 5 us */
#define IAT_US_MAX (1ULL << 26)
#ifndef TABLE_ENTRIES
#define TABLE_ENTRIES 262144
#endif
#ifndef FRONT_ENTRIES
#define FRONT_ENTRIES 4
#endif
#ifndef FRONT_CELLS
#define FRONT_CELLS 8
#endif
#ifndef RING_BYTES
#define RING_BYTES (16 << 20)
#endif

#define CELLS_PER_PLACE 2
#define CELL_TAG(print) ((print) >> 32 | 1)
#define PLACE_TURNS 4 /* places that are tried before the flow goes to the hash */
#define STATE_INTERFACE 32 /* by how much the interface is shifted */

#define EEXIST 17

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

enum entry_state {
	INITIATOR = 1 << 0, /* the side that sent the first packet: 0 or 1 */
	VLAN_CHANGED = 1 << 1,
	CONTINUED = 1 << 2,
	RESTART = 1 << 3, /* the walk has emitted: the next packet begins the record */
	ICMP_VALID = 1 << 4,
	SYN_SEEN = 1 << 5, /* `handshake` is the time of the SYN */
	SYNACK_SEEN = 1 << 6,
	HANDSHAKE = 1 << 7, /* `handshake` is the time from SYN to SYN-ACK */
	OPENED = 1 << 8, /* something else than a SYN was seen */
	FIN_SEEN = 1 << 9, /* << side */
	LAST_FIN = 1 << 11, /* << side: which sent the second FIN */
	ENDED = 1 << 13, /* RST, or FIN both ways: kept for stragglers */
	DEAD = 1 << 14, /* closed and emitted, but the deletion failed: the walk deletes */
	LAST_SIDE =
		1
		<< 15, /* which sent the last packet, in order of arrival: under an external clock only, which may step back */
	IN_FRONT = 1 << 16, /* where the entry is: never changes */
};

/* A cache line of its own, see struct entry. */
struct side {
	__u64 word;
	__u64 last_ns;
	__u64 length_sumsq;
	__u64 iat_sum_ns;
	__u64 iat_sumsq_us2;
	__u32 length_min;
	__u32 length_max;
	__u32 fragments;
	__u8 tcp_flags;
	__u8 ttl_min;
	__u8 ttl_max;
	__u8 pad;
	__u64 owner; /* under settings.dedupe: where the direction is counted, and since when: packet.h */
};

/* In the hash the kernel's element is 48 bytes of its own, the key (8), then this: 256 in all, and each side on one cache
 * line, in the kernels that we know. In another layout only speed changes.
 */
struct entry {
	struct flow_key key;
	__u64 start_ns;
	__u64 handshake;
	__u64 state; /* enum entry_state; the upper half, which never changes, is the interface of the first packet */
	__u32 print; /* the upper half */
	__u16 vlan;
	__u8 icmp_type;
	__u8 icmp_code;
	struct side side[2]; /* by place in the key, not by who began */
};

/* A place in the front: taken by compare-and-swap, given back, its key wiped, by who owned and ended the entry. */
struct place {
	__u64 phase; /* enum place_phase */
	__u64 pad[6]; /* each side on a cache line */
	struct entry entry;
};

enum place_phase { PLACE_FREE, PLACE_FILLING, PLACE_HELD };

_Static_assert(sizeof(struct side) == 64, "side");
_Static_assert(sizeof(struct entry) == 200, "entry");
_Static_assert(sizeof(struct place) == 256, "place");

MAP(flows, HASH, __u64, struct entry, TABLE_ENTRIES, 0);
/* Mapped: that begins on a page, whatever the kernel. */
MAP(front, ARRAY, __u32, struct place, FRONT_ENTRIES, BPF_F_MMAPABLE);
/* 0: free; otherwise CELL_TAG of whose it is, and below it the number of its place, plus 1; 0 while that is being filled. */
MAP(cells, ARRAY, __u32, __u64, FRONT_CELLS, 0);
MAP(turns, ARRAY, __u32, __u64, 1, 0); /* places given out so far */
MAP_RINGBUF(records, RING_BYTES);
MAP(counters, PERCPU_ARRAY, __u32, struct flow_counters, 1, 0);
/* Where a new entry is put together: the stack of the packet path has no room for it. */
MAP(drafts, PERCPU_ARRAY, __u32, struct entry, 1, 0);
SETTINGS(struct flow_settings, settings, .layout = FLOW_LAYOUT_VERSION);
/* What user space writes while the program runs. */
MAPPED(struct flow_input, input);

static __always_inline __u64 read_clock(void)
{
	const volatile struct flow_input *in;

	if (!settings.external_clock)
		return bpf_ktime_get_ns();
	in = MAPPED_AT(input);
	return in ? in->clock_ns : 0;
}

/* Has `timeout` passed from `then` to `now`? Time may step back; timeout 0 never passes. */
static __always_inline int passed(__u64 now, __u64 then, __u64 timeout)
{
	return timeout && (__s64)(now - then) >= (__s64)timeout;
}

/* The cell of the flow with this print; NULL where there is no front. */
static __always_inline __u64 *cell_of(__u64 print)
{
	__u32 index = print & (settings.front_entries * CELLS_PER_PLACE - 1);

	return settings.front_entries ? bpf_map_lookup_elem(MAP_AT(cells), &index) : NULL;
}

/* The place of the flow with this key, by its cell; NULL where it has none. */
static __always_inline struct place *place_of(const __u64 *cell, const struct flow_key *key, __u64 print)
{
	__u64 seen = *(const volatile __u64 *)cell;
	__u32 number = (__u32)seen - 1;
	struct place *place;

	if (seen >> 32 != CELL_TAG(print))
		return NULL;
	place = bpf_map_lookup_elem(MAP_AT(front), &number);
	return place && same_key(&place->entry.key, key) ? place : NULL;
}

static __always_inline struct flow_counters *cpu_counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(MAP_AT(counters), &zero);
}

/* Atomic: flow_expire may be interrupted between load and store by a packet on its CPU. The packet path itself, which
 * nothing on its CPU interrupts, adds plainly.
 */
static __always_inline void count(enum flow_counter which, __u64 n)
{
	struct flow_counters *c = cpu_counters();

	if (c)
		__sync_fetch_and_add(&c->value[which], n);
}

#endif
