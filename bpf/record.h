/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
#ifndef FLOWSAGE_RECORD_H
#define FLOWSAGE_RECORD_H

#include "entry.h"

static __always_inline struct flow_record *reserve(void)
{
	struct flow_record *record = bpf_ringbuf_reserve(MAP_AT(records), sizeof(*record), 0);

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
		return e->state & LAST_SIDE ? last1 : last0;
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
	r->ifindex = e->state >> STATE_INTERFACE;
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
		r->sequence = (__u64)bpf_get_smp_processor_id() << 48 |
			      __sync_fetch_and_add(&c->value[FLOW_EMITTED_RECORDS], 1);
		__sync_fetch_and_add(&c->value[FLOW_EMITTED_PACKETS],
				     r->direction[0].packets + r->direction[1].packets);
		__sync_fetch_and_add(&c->value[FLOW_EMITTED_BYTES], r->direction[0].bytes + r->direction[1].bytes);
	}
	if (wake) {
		waiting = bpf_ringbuf_query(MAP_AT(records), BPF_RB_AVAIL_DATA);
		if (waiting >= settings.wake_bytes && (waiting - settings.wake_bytes) % WAKE_EVERY < SLOT_BYTES)
			flags = BPF_RB_FORCE_WAKEUP;
	}
	bpf_ringbuf_submit(r, flags);
}

enum outcome {
	DONE,
	AGAIN, /* nothing was done: the entry is somebody else's by now */
	NO_ROOM, /* nothing was done: the ring is full */
};

/* The entry, which is ours and closed, out of its table. A key without an IP version is no packet's. */
static __always_inline void leave_table(struct entry *e, const struct flow_key *key, __u64 print)
{
	struct place *place;
	__u64 *cell;

	if (e->state & IN_FRONT) {
		cell = cell_of(print);
		place = cell ? place_of(cell, key, print) : NULL;
		if (place) {
			__sync_lock_test_and_set(&((__u64 *)&place->entry.key)[4], 0);
			__sync_lock_test_and_set(cell, 0);
			__sync_lock_test_and_set(&place->phase, PLACE_FREE);
		}
	} else if (bpf_map_delete_elem(MAP_AT(flows), &print)) {
		__sync_fetch_and_or(&e->state, DEAD);
	}
}

/* Ends the entry: takes both words, emits, deletes. `key` is a copy, or NULL to fetch it from the table once the entry is
 * ours (what a walk finds is only sure to be of one piece from then on), and its print with it.
 */
static __always_inline enum outcome end_entry(struct entry *e, const struct flow_key *key, __u64 print, __u8 reason)
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
		if (e->print != print >> 32) {
			/* Another flow's entry by now. What was added to CLOSED meanwhile has been counted elsewhere. */
			__sync_lock_test_and_set(&e->side[0].word, word0);
			bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
			return AGAIN;
		}
		own = *key;
	} else {
		own = e->key;
		print = print_of(&own);
	}
	word1 = __sync_lock_test_and_set(&e->side[1].word, CLOSED);
	if (word0 | word1) {
		fill(r, &own, e, e->start_ns, word0, word1, reason);
		submit(r, key != NULL);
	} else { /* went on after an active timeout, and nothing followed */
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
	}
	leave_table(e, &own, print);
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
	if (unlikely(e->print != print_of(key) >> 32)) { /* another flow's entry since the claim: back with it */
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

#endif
