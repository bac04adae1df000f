// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
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
 */
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
#define TABLE_ENTRIES 262144
#define RING_BYTES (16 << 20)

#define EEXIST 17

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

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
};

/* 56 of 64 bytes: a cache line of its own, see struct entry. */
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
	__u64 spare;
};

/* The kernel's hash element is 48 bytes of its own, the key (40), then this: 256 in all, and each side on one cache line,
 * in the kernels that we know. In another layout only speed changes.
 */
struct entry {
	__u64 start_ns;
	__u64 last_ns; /* of the last packet in order of arrival; under the external clock only, which may step back */
	__u64 handshake;
	__u32 ifindex;
	__u32 state;
	__u32 print;
	__u16 vlan;
	__u8 icmp_type;
	__u8 icmp_code;
	struct side side[2]; /* by place in the key, not by who began */
};

_Static_assert(sizeof(struct side) == 64, "side");
_Static_assert(sizeof(struct entry) == 168, "entry");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, TABLE_ENTRIES);
	__type(key, struct flow_key);
	__type(value, struct entry);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flow_counters);
} counters SEC(".maps");

/* Where a new entry is put together: the stack of the packet path has no room for it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct entry);
} drafts SEC(".maps");

const volatile struct flow_settings settings SEC(".rodata.settings") = {};
volatile struct flow_input input SEC(".data.input") = {};

static __always_inline __u64 read_clock(void)
{
	return settings.external_clock ? input.clock_ns : bpf_ktime_get_ns();
}

/* Has `timeout` passed from `then` to `now`? Time may step back; timeout 0 never passes. */
static __always_inline int passed(__u64 now, __u64 then, __u64 timeout)
{
	return timeout && (__s64)(now - then) >= (__s64)timeout;
}

static __always_inline struct flow_counters *cpu_counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
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

/* ---- records: reserve, fill, submit ---- */

static __always_inline struct flow_record *reserve(void)
{
	struct flow_record *record = bpf_ringbuf_reserve(&records, sizeof(*record), 0);

	if (!record)
		count(FLOW_RING_FULL, 1);
	return record;
}

static __always_inline void fill_direction(struct flow_direction *to, const struct side *from, __u64 word)
{
	to->packets = word >> PACKET_SHIFT & PACKETS_MASK;
	to->bytes = word & BYTES_MASK;
	to->pad = 0;
	if (!to->packets) { /* statistics are those of an earlier record, or unset */
		to->length_sumsq = 0;
		to->iat_sum_ns = 0;
		to->iat_sumsq_us2 = 0;
		to->last_ns = 0;
		to->length_min = 0;
		to->length_max = 0;
		to->tcp_flags = 0;
		to->ttl_min = 0;
		to->ttl_max = 0;
		to->fragments = 0;
		return;
	}
	to->length_sumsq = from->length_sumsq;
	to->iat_sum_ns = from->iat_sum_ns;
	to->iat_sumsq_us2 = from->iat_sumsq_us2;
	to->last_ns = from->last_ns;
	to->length_min = from->length_min;
	to->length_max = from->length_max;
	to->tcp_flags = from->tcp_flags;
	to->ttl_min = from->ttl_min;
	to->ttl_max = from->ttl_max;
	to->fragments = from->fragments;
}

static __always_inline void copy_address(__u8 *to, const __u8 *from)
{
	((__u64 *)to)[0] = ((const __u64 *)from)[0];
	((__u64 *)to)[1] = ((const __u64 *)from)[1];
}

/* Of both sides, the later of their last packets. */
static __always_inline __u64 last_of(const struct entry *e, __u64 word0, __u64 word1)
{
	__u64 last0 = e->side[0].last_ns, last1 = e->side[1].last_ns;

	if (settings.external_clock)
		return e->last_ns;
	/* A side that has no packet in this record may still hold the time of an earlier one. */
	if (!(word0 & ~CLOSED))
		return word1 & ~CLOSED || last1 > last0 ? last1 : last0;
	if (!(word1 & ~CLOSED))
		return last0;
	return last0 > last1 ? last0 : last1;
}

/* Everything that a record says, from what was taken: word0 and word1. `start_ns` apart: the entry may go on. */
static __always_inline void fill(struct flow_record *r, const struct flow_key *key, const struct entry *e,
				 __u64 start_ns, __u64 word0, __u64 word1, __u8 reason)
{
	__u32 state = e->state;

	if (state & INITIATOR) {
		copy_address(r->initiator, key->addr[1]);
		copy_address(r->responder, key->addr[0]);
		r->initiator_port = key->port[1];
		r->responder_port = key->port[0];
		fill_direction(&r->direction[0], &e->side[1], word1);
		fill_direction(&r->direction[1], &e->side[0], word0);
	} else {
		copy_address(r->initiator, key->addr[0]);
		copy_address(r->responder, key->addr[1]);
		r->initiator_port = key->port[0];
		r->responder_port = key->port[1];
		fill_direction(&r->direction[0], &e->side[0], word0);
		fill_direction(&r->direction[1], &e->side[1], word1);
	}
	r->proto = key->proto;
	r->ip_version = key->ip_version;
	r->end_reason = reason;
	r->flags = (state & VLAN_CHANGED ? FLOW_VLAN_CHANGED : 0) | (state & CONTINUED ? FLOW_CONTINUED : 0);
	r->start_ns = start_ns;
	r->end_ns = last_of(e, word0, word1);
	r->handshake_ns = state & HANDSHAKE ? e->handshake : 0;
	r->ifindex = e->ifindex;
	r->vlan = e->vlan;
	r->icmp_type = e->icmp_type;
	r->icmp_code = e->icmp_code;
	r->icmp_valid = !!(state & ICMP_VALID);
	__builtin_memset(r->pad, 0, sizeof(r->pad));
	__builtin_memset(r->reserved, 0, sizeof(r->reserved));
}

/* `wake`: not in a walk, after which its caller drains. */
static __always_inline void submit(struct flow_record *r, int wake)
{
	struct flow_counters *c = cpu_counters();
	__u64 flags = BPF_RB_NO_WAKEUP, waiting;

	if (c) {
		r->sequence =
			(__u64)bpf_get_smp_processor_id() << 48 | __sync_fetch_and_add(&c->value[FLOW_SEQUENCE], 1);
		__sync_fetch_and_add(&c->value[FLOW_EMITTED_RECORDS], 1);
		__sync_fetch_and_add(&c->value[FLOW_EMITTED_PACKETS],
				     r->direction[0].packets + r->direction[1].packets);
		__sync_fetch_and_add(&c->value[FLOW_EMITTED_BYTES], r->direction[0].bytes + r->direction[1].bytes);
	}
	if (wake) {
		waiting = bpf_ringbuf_query(&records, BPF_RB_AVAIL_DATA);
		if (waiting >= settings.wake_bytes && (waiting - settings.wake_bytes) % WAKE_EVERY < SLOT_BYTES)
			flags = BPF_RB_FORCE_WAKEUP;
	}
	bpf_ringbuf_submit(r, flags);
}

/* ---- ending and continuing an entry ---- */

enum outcome {
	DONE,
	AGAIN, /* nothing was done: the entry is somebody else's by now */
	NO_ROOM, /* nothing was done: the ring is full */
};

/* Ends the entry: takes both words, emits, deletes. `key` is a copy, or NULL to fetch it from `in_table` once the entry is
 * ours (a walk's key is only sure to be the entry's own from then on).
 */
static __always_inline enum outcome end_entry(struct entry *e, const struct flow_key *key,
					      struct flow_key *in_table, __u32 print, __u8 reason)
{
	struct flow_record *r = reserve();
	struct flow_key own;
	__u64 word0, word1;

	if (!r)
		return NO_ROOM;
	word0 = __sync_lock_test_and_set(&e->side[0].word, CLOSED);
	if (word0 & CLOSED) {
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
		return AGAIN;
	}
	if (key) {
		if (e->print != print) {
			/* Another flow's entry by now. What was added to CLOSED meanwhile has been counted elsewhere. */
			__sync_lock_test_and_set(&e->side[0].word, word0);
			bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
			return AGAIN;
		}
		own = *key;
	} else {
		own = *in_table;
	}
	word1 = __sync_lock_test_and_set(&e->side[1].word, CLOSED);
	if (word0 | word1) {
		fill(r, &own, e, e->start_ns, word0, word1, reason);
		submit(r, key != NULL);
	} else { /* went on after an active timeout, and nothing followed */
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
	}
	if (bpf_map_delete_elem(&flows, &own))
		__sync_fetch_and_or(&e->state, DEAD);
	return DONE;
}

/* What the word holds, leaving 0. Never touches a closed one. */
static __always_inline __u64 take(__u64 *word)
{
	for (int i = 0; i < TAKE_ATTEMPTS; i++) {
		__u64 seen = *(volatile __u64 *)word;

		if (!seen || seen & CLOSED)
			return 0;
		if (__sync_val_compare_and_swap(word, seen, 0) == seen)
			return seen;
	}
	return 0; /* stays, and goes with the next record */
}

/* Undoes take(). Returns what could not be undone: the word was closed meanwhile, and these packets are in no other record. */
static __always_inline __u64 give_back(__u64 *word, __u64 taken)
{
	if (!taken || !(__sync_fetch_and_add(word, taken) & CLOSED))
		return 0;
	count(FLOW_MISATTRIBUTED, taken >> PACKET_SHIFT & PACKETS_MASK);
	return taken;
}

/* Emits what there is and lets the entry go on. The claim is the change of start_ns: one CPU emits. */
static __always_inline enum outcome continue_entry(struct entry *e, const struct flow_key *key, __u64 start_ns,
						   __u64 now, __u32 set_state)
{
	struct flow_record *r = reserve();
	__u64 word0, word1;

	if (!r)
		return NO_ROOM;
	if (__sync_val_compare_and_swap(&e->start_ns, start_ns, now) != start_ns) {
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
		return AGAIN;
	}
	word0 = take(&e->side[0].word);
	word1 = take(&e->side[1].word);
	if (unlikely(e->print != print_of(key))) { /* another flow's entry since the claim: back with it */
		word0 = give_back(&e->side[0].word, word0);
		word1 = give_back(&e->side[1].word, word1);
	}
	if (!(word0 | word1)) {
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
		return AGAIN;
	}
	fill(r, key, e, start_ns, word0, word1, FLOW_END_ACTIVE_TIMEOUT);
	__sync_fetch_and_and(&e->state, ~HANDSHAKE);
	__sync_fetch_and_or(&e->state, CONTINUED | set_state);
	submit(r, !(set_state & RESTART));
	return DONE;
}

/* Why the entry should be emitted at `now`, 0: it should not. */
static __always_inline __u8 due(const struct entry *e, __u64 now, __u64 word0, __u64 word1)
{
	__u64 last = last_of(e, word0, word1);
	__u32 state = e->state;

	if (state & ENDED && (__s64)(now - last) >= (__s64)settings.linger_ns)
		return FLOW_END_DETECTED;
	if (passed(now, last, settings.idle_ns))
		return FLOW_END_IDLE_TIMEOUT;
	if ((state & (SYN_SEEN | OPENED)) == SYN_SEEN && passed(now, last, settings.half_open_ns))
		return FLOW_END_IDLE_TIMEOUT;
	if (!(state & RESTART) && passed(now, e->start_ns, settings.active_ns))
		return FLOW_END_ACTIVE_TIMEOUT;
	return 0;
}

/* ---- the packet path ---- */

/* What is rare is in global functions: the verifier checks each once, for all callers and all that may be in a packet. */

__noinline int end_flow(struct entry *e, const struct packet *p, __u8 reason)
{
	if (!e || !p)
		return AGAIN;
	return end_entry(e, &p->key, NULL, p->print, reason);
}

__noinline int continue_flow(struct entry *e, const struct packet *p, __u64 start_ns, __u64 now)
{
	if (!e || !p)
		return AGAIN;
	return continue_entry(e, &p->key, start_ns, now, 0);
}

/* floor(ns / 1000) for less than 2^32 by multiplication: a 64-bit division costs more than the rest of the statistics. */
static __always_inline __u64 microseconds(__u64 ns)
{
	__u64 us = ns >> 32 ? ns / 1000 : ns * 274877907 >> 38;

	return us > IAT_US_MAX ? IAT_US_MAX : us;
}

static __always_inline void first_of_side(struct side *s, const struct packet *p, __u64 now)
{
	s->last_ns = now;
	s->length_sumsq = (__u64)p->length * p->length;
	s->iat_sum_ns = 0;
	s->iat_sumsq_us2 = 0;
	s->length_min = p->length;
	s->length_max = p->length;
	s->fragments = p->fragment;
	s->tcp_flags = p->tcp_flags;
	s->ttl_min = p->ttl;
	s->ttl_max = p->ttl;
}

static __always_inline void next_of_side(struct side *s, const struct packet *p, __u64 now, __u64 last)
{
	__u64 gap = (__s64)(now - last) > 0 ? now - last : 0;
	__u64 us = microseconds(gap);

	s->last_ns = now;
	s->length_sumsq += (__u64)p->length * p->length;
	s->iat_sum_ns += gap;
	s->iat_sumsq_us2 += us * us;
	if (p->length < s->length_min)
		s->length_min = p->length;
	if (p->length > s->length_max)
		s->length_max = p->length;
	if (p->ttl < s->ttl_min)
		s->ttl_min = p->ttl;
	if (p->ttl > s->ttl_max)
		s->ttl_max = p->ttl;
	s->tcp_flags |= p->tcp_flags;
	s->fragments += p->fragment;
}

/* TCP bits that this packet adds to `state`. */
static __always_inline __u32 tcp_transition(__u32 state, const struct packet *p)
{
	__u8 flags = p->tcp_flags;
	__u32 add = 0;

	if (flags & TCP_SYN)
		add |= flags & TCP_ACK ? SYNACK_SEEN | OPENED : SYN_SEEN;
	else
		add |= OPENED;
	if (settings.tcp_ends) {
		if (flags & TCP_RST)
			add |= ENDED;
		if (flags & TCP_FIN && !(state & FIN_SEEN << p->side)) {
			add |= FIN_SEEN << p->side;
			if (state & FIN_SEEN << (p->side ^ 1))
				add |= LAST_FIN << p->side | ENDED;
		}
	}
	return add;
}

/* After the packet has been counted: what it means to the conversation. Returns true where it was the last ACK. */
static __always_inline int tcp_follow(struct entry *e, const struct packet *p, __u32 state, __u64 now)
{
	__u32 add = tcp_transition(state, p) & ~state;

	if (unlikely(add)) {
		if (add & SYN_SEEN && !(state & SYNACK_SEEN))
			e->handshake = now;
		if (add & SYNACK_SEEN && state & SYN_SEEN) {
			/* 0 is "not seen": a clock too coarse to tell gives 1 ns. */
			e->handshake = (__s64)(now - e->handshake) > 0 ? now - e->handshake : 1;
			add |= HANDSHAKE;
		}
		__sync_fetch_and_or(&e->state, add);
	}
	return settings.tcp_ends && state & LAST_FIN << (p->side ^ 1) &&
	       (p->tcp_flags & (TCP_ACK | TCP_FIN | TCP_SYN | TCP_RST)) == TCP_ACK;
}

static __always_inline struct entry *new_entry(const struct packet *p, __u32 ifindex, __u64 now)
{
	__u32 zero = 0;
	struct entry *e = bpf_map_lookup_elem(&drafts, &zero);
	struct side *s;

	if (!e)
		return NULL;
	__builtin_memset(e, 0, sizeof(*e));
	e->start_ns = now;
	e->last_ns = now;
	e->ifindex = ifindex;
	e->state = (p->side ? INITIATOR : 0) | (p->icmp_valid ? ICMP_VALID : 0);
	if (p->key.proto == IPPROTO_TCP && !p->fragment) {
		__u32 add = tcp_transition(0, p);

		e->state |= add;
		if (add & SYN_SEEN)
			e->handshake = now;
	}
	e->print = p->print;
	e->vlan = p->vlan;
	e->icmp_type = p->icmp_type;
	e->icmp_code = p->icmp_code;
	s = &e->side[p->side & 1];
	first_of_side(s, p, now);
	s->word = ONE_PACKET | p->length;
	return e;
}

static __always_inline void accounted(struct flow_counters *c, const struct packet *p)
{
	c->value[FLOW_ACCOUNTED_PACKETS]++;
	c->value[FLOW_ACCOUNTED_BYTES] += p->length;
}

/* Counts the packet in the entry. AGAIN: it has not been, the entry is gone. */
static __always_inline enum outcome count_packet(struct flow_counters *c, struct entry *e, const struct packet *p,
						 __u64 now)
{
	__u64 one = ONE_PACKET | p->length, start = e->start_ns, word, last;
	int tcp = p->key.proto == IPPROTO_TCP && !p->fragment;
	struct side *s = &e->side[p->side & 1];
	__u32 state = e->state;

	if (settings.tcp_ends &&
	    unlikely(tcp && state & ENDED && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)) {
		if (end_flow(e, p, FLOW_END_DETECTED) != NO_ROOM)
			return AGAIN;
	}
	word = *(volatile __u64 *)&s->word;
	last = s->last_ns;
	if (unlikely(word & CLOSED))
		return AGAIN;
	if (settings.soonest_ns && unlikely(!word || passed(now, last, settings.soonest_ns))) {
		/* This side has been silent; has the other? Records do not depend on when the walk comes by. */
		__u8 reason = due(e, now, e->side[0].word, e->side[1].word);

		if (reason && reason != FLOW_END_ACTIVE_TIMEOUT && end_flow(e, p, reason) != NO_ROOM)
			return AGAIN;
	}
	if (unlikely(state & RESTART)) {
		if (__sync_fetch_and_and(&e->state, ~RESTART) & RESTART)
			e->start_ns = now;
	} else if (unlikely(passed(now, start, settings.active_ns) ||
			    (word >> PACKET_SHIFT & PACKETS_MASK) >= PACKETS_EMIT)) {
		if (continue_flow(e, p, start, now) == NO_ROOM &&
		    (word >> PACKET_SHIFT & PACKETS_MASK) >= PACKETS_FULL)
			return NO_ROOM;
	}
	word = __sync_fetch_and_add(&s->word, one);
	if (unlikely(word & CLOSED))
		return AGAIN;
	if (unlikely(e->print != p->print)) {
		if (!(__sync_fetch_and_add(&s->word, -one) & CLOSED))
			return AGAIN;
		/* Its new owner has emitted it with the packet inside: it is counted once, in the wrong flow. */
		c->value[FLOW_MISATTRIBUTED]++;
		accounted(c, p);
		return DONE;
	}
	accounted(c, p);
	if (likely(word))
		next_of_side(s, p, now, last);
	else
		first_of_side(s, p, now);
	if (settings.external_clock)
		e->last_ns = now;
	if (unlikely(e->vlan != p->vlan && !(state & VLAN_CHANGED)))
		__sync_fetch_and_or(&e->state, VLAN_CHANGED);
	/* Should the ring be full here, the walk ends it after its linger. */
	if (tcp && unlikely(tcp_follow(e, p, state, now)))
		end_flow(e, p, FLOW_END_DETECTED);
	return DONE;
}

/* No entry yet: makes one with this packet in it. AGAIN: another CPU was first. NO_ROOM: the table is full. */
__noinline int create_flow(const struct packet *p, __u32 ifindex, __u64 now)
{
	struct flow_counters *c = cpu_counters();
	struct entry *fresh;
	long error;

	if (!c || !p || !(fresh = new_entry(p, ifindex, now)))
		return NO_ROOM;
	error = bpf_map_update_elem(&flows, &p->key, fresh, BPF_NOEXIST);
	if (error)
		return error == -EEXIST ? AGAIN : NO_ROOM;
	c->value[FLOW_CREATED]++;
	accounted(c, p);
	return DONE;
}

/* The packet becomes a record of its own; where the ring is full too, it is lost. */
__noinline int emit_packet(const struct packet *p, __u32 ifindex, __u64 now, int table_full)
{
	enum flow_counter lost = table_full ? FLOW_LOST_TABLE_PACKETS : FLOW_LOST_CLOSED_PACKETS;
	struct flow_counters *c = cpu_counters();
	struct flow_record *r;
	struct entry *fresh;

	if (!c || !p || !(fresh = new_entry(p, ifindex, now)))
		return NO_ROOM;
	c->value[table_full ? FLOW_TABLE_FULL : FLOW_CLOSED_RACE]++;
	r = reserve();
	if (!r) {
		c->value[lost]++;
		c->value[lost + 1] += p->length;
		return NO_ROOM;
	}
	accounted(c, p);
	fill(r, &p->key, fresh, now, fresh->side[0].word, fresh->side[1].word, FLOW_END_LACK_OF_RESOURCES);
	submit(r, 1);
	return DONE;
}

static __always_inline void account(struct xdp_md *ctx, struct flow_counters *c, const struct packet *p)
{
	__u64 now = read_clock();
	int outcome = AGAIN;
	struct entry *e = NULL;

	for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
		e = bpf_map_lookup_elem(&flows, &p->key);
		outcome = likely(e) ? count_packet(c, e, p, now) : create_flow(p, ctx->ingress_ifindex, now);
		if (likely(outcome == DONE))
			return;
		if (outcome == NO_ROOM)
			break;
		c->value[FLOW_RETRIES]++;
	}
	emit_packet(p, ctx->ingress_ifindex, now, outcome == NO_ROOM && !e);
}

/* By the same rule as counter.bpf.c, so that an interface needs no second program to have its packets by protocol. */
static __always_inline void count_protocol(struct flow_counters *c, const struct packet *p)
{
	switch (p->key.proto) {
	case IPPROTO_TCP:
		c->value[FLOW_PACKETS_TCP]++;
		c->value[FLOW_BYTES_TCP] += p->length;
		break;
	case IPPROTO_UDP:
		c->value[FLOW_PACKETS_UDP]++;
		c->value[FLOW_BYTES_UDP] += p->length;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		c->value[FLOW_PACKETS_ICMP]++;
		c->value[FLOW_BYTES_ICMP] += p->length;
		break;
	}
}

SEC("xdp.frags")
int flow_xdp(struct xdp_md *ctx)
{
	struct flow_counters *c = cpu_counters();
	struct packet p = {};

	if (!c)
		return XDP_PASS;
	p.length = bpf_xdp_get_buff_len(ctx);
	if (settings.external_clock && input.length & FLOW_INPUT_LENGTH)
		p.length = input.length;
	c->value[FLOW_SEEN_PACKETS]++;
	c->value[FLOW_SEEN_BYTES] += p.length;
	switch (parse_frame(ctx, &p)) {
	case PARSE_OK:
		c->value[FLOW_FRAGMENT_NONFIRST] += p.fragment;
		count_protocol(c, &p);
		account(ctx, c, &p);
		break;
	case PARSE_NON_IP:
		c->value[FLOW_NON_IP_PACKETS]++;
		c->value[FLOW_NON_IP_BYTES] += p.length;
		break;
	case PARSE_MALFORMED:
		c->value[FLOW_MALFORMED_PACKETS]++;
		c->value[FLOW_MALFORMED_BYTES] += p.length;
		break;
	case PARSE_TRUNCATED:
		c->value[FLOW_TRUNCATED_PACKETS]++;
		c->value[FLOW_TRUNCATED_BYTES] += p.length;
		break;
	}
	return settings.mirror ? XDP_DROP : XDP_PASS;
}

/* The floor to compare with. */
SEC("xdp.frags")
int pass_xdp(struct xdp_md *ctx)
{
	return XDP_PASS;
}

/* ---- the walk ---- */

static long visit(void *map, struct flow_key *key, struct entry *e, struct flow_walk *w)
{
	__u64 word0 = *(volatile __u64 *)&e->side[0].word, word1 = *(volatile __u64 *)&e->side[1].word;
	enum outcome outcome;
	struct flow_key own;
	__u8 reason;

	if (word0 & CLOSED) {
		if (e->state & DEAD) { /* who takes the mark away deletes */
			own = *key;
			if (__sync_fetch_and_and(&e->state, ~DEAD) & DEAD && bpf_map_delete_elem(&flows, &own))
				__sync_fetch_and_or(&e->state, DEAD);
		} else {
			w->failed++; /* being ended on another CPU */
		}
		return 0;
	}
	if (w->mode == FLOW_WALK_COUNT) {
		w->flows++;
		w->packets += (word0 >> PACKET_SHIFT & PACKETS_MASK) + (word1 >> PACKET_SHIFT & PACKETS_MASK);
		w->bytes += (word0 & BYTES_MASK) + (word1 & BYTES_MASK);
		return 0;
	}
	reason = w->mode == FLOW_WALK_FLUSH ? FLOW_END_FORCED : due(e, w->now_ns, word0, word1);
	if (!reason) {
		w->flows++;
		return 0;
	}
	if (reason == FLOW_END_ACTIVE_TIMEOUT) {
		own = *key;
		outcome = continue_entry(e, &own, e->start_ns, w->now_ns, RESTART);
		w->flows++;
	} else {
		outcome = end_entry(e, NULL, key, 0, reason);
		w->removed += outcome == DONE;
	}
	w->failed += outcome != DONE;
	w->emitted += outcome == DONE && (word0 | word1);
	return outcome == NO_ROOM; /* nothing more fits: drain, then walk again */
}

SEC("syscall")
int flow_expire(struct flow_walk *w)
{
	struct flow_walk walk = {.mode = w->mode, .now_ns = w->now_ns ?: read_clock()};

	if (bpf_for_each_map_elem(&flows, visit, &walk, 0) < 0)
		return 1;
	w->now_ns = walk.now_ns;
	w->emitted = walk.emitted;
	w->removed = walk.removed;
	w->failed = walk.failed;
	w->flows = walk.flows;
	w->packets = walk.packets;
	w->bytes = walk.bytes;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
