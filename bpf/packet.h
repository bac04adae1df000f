/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
#ifndef FLOWSAGE_PACKET_H
#define FLOWSAGE_PACKET_H

#include "front.h"

/* What is rare is in global functions: the verifier checks each once, for all callers and all that may be in a packet. */

RARE int end_flow(struct entry *e, const struct packet *p, __u8 reason)
{
	if (!e || !p)
		return AGAIN;
	return end_entry(e, &p->key, p->print, reason);
}

RARE int continue_flow(struct entry *e, const struct packet *p, __u64 start_ns, __u64 now)
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

/* Under settings.dedupe a direction is counted where it was counted last: `owner` is the place, and in its lower half the
 * time of that in ticks. Elsewhere its packets are duplicates, until the owner has been silent for longer than a copy can
 * be late: then whoever comes first takes over. As the word changes by compare and exchange only, one of two copies is
 * counted even where they come at the same moment.
 */
#define TICK_SHIFT 20 /* 2^20 ns */
#define SILENT_TICKS 1024 /* 1.07 s */

static __always_inline __u64 owner_of(const struct packet *p, __u64 now)
{
	return (__u64)p->place << 32 | (__u32)(now >> TICK_SHIFT);
}

static __always_inline int is_duplicate(struct side *s, const struct packet *p, __u64 now)
{
	__u64 mine = owner_of(p, now), seen = *(volatile __u64 *)&s->owner;

	for (int i = 0; i < TAKE_ATTEMPTS && seen != mine; i++) {
		__u64 before = seen;

		if (seen && seen >> 32 != p->place && (__s32)((__u32)mine - (__u32)seen) < SILENT_TICKS)
			return 1;
		seen = __sync_val_compare_and_swap(&s->owner, before, mine);
		if (seen == before)
			return 0;
	}
	return seen >> 32 != p->place;
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

/* After the packet has been counted: what it means to the conversation. Returns true where it was the last ACK (of which
 * a copy may follow under settings.dedupe: then the flow waits out its linger).
 */
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
	return settings.tcp_ends && !settings.dedupe && state & LAST_FIN << (p->side ^ 1) &&
	       (p->tcp_flags & (TCP_ACK | TCP_FIN | TCP_SYN | TCP_RST)) == TCP_ACK;
}

static __always_inline struct entry *new_entry(const struct packet *p, __u64 now)
{
	__u32 zero = 0;
	struct entry *e = bpf_map_lookup_elem(MAP_AT(drafts), &zero);
	struct side *s;

	if (!e)
		return NULL;
	__builtin_memset(e, 0, sizeof(*e));
	e->start_ns = now;
	e->key = p->key;
	e->state = (__u64)(p->place & ~EGRESS) << STATE_INTERFACE | (p->side ? INITIATOR | LAST_SIDE : 0) |
		   (p->icmp_valid ? ICMP_VALID : 0);
	if (p->key.proto == IPPROTO_TCP && !p->fragment) {
		__u32 add = tcp_transition(0, p);

		e->state |= add;
		if (add & SYN_SEEN)
			e->handshake = now;
	}
	e->print = p->print >> 32;
	e->vlan = p->vlan;
	e->icmp_type = p->icmp_type;
	e->icmp_code = p->icmp_code;
	s = &e->side[p->side & 1];
	first_of_side(s, p, now);
	s->word = ONE_PACKET | p->length;
	s->owner = settings.dedupe ? owner_of(p, now) : 0;
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
	if (settings.dedupe && is_duplicate(s, p, now)) {
		c->value[FLOW_DUPLICATE_PACKETS]++;
		c->value[FLOW_DUPLICATE_BYTES] += p->length;
		return DONE;
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
	if (unlikely(e->print != p->print >> 32)) {
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
	if (settings.external_clock && !!(state & LAST_SIDE) != p->side) {
		if (p->side)
			__sync_fetch_and_or(&e->state, LAST_SIDE);
		else
			__sync_fetch_and_and(&e->state, ~LAST_SIDE);
	}
	if (unlikely(e->vlan != p->vlan && !(state & VLAN_CHANGED)))
		__sync_fetch_and_or(&e->state, VLAN_CHANGED);
	/* Should the ring be full here, the walk ends it after its linger. */
	if (tcp && unlikely(tcp_follow(e, p, state, now)))
		end_flow(e, p, FLOW_END_DETECTED);
	return DONE;
}

/* No entry yet: makes one with this packet in it. AGAIN: another CPU was first. NO_ROOM: the table is full. */
RARE int create_flow(const struct packet *p, __u64 now)
{
	struct flow_counters *c = cpu_counters();
	enum outcome outcome;
	struct entry *fresh;
	long error;

	if (!c || !p || !(fresh = new_entry(p, now)))
		return NO_ROOM;
	outcome = enter_front(fresh, p->print);
	if (outcome == AGAIN)
		return AGAIN;
	if (outcome == NO_ROOM) {
		error = bpf_map_update_elem(MAP_AT(flows), &p->print, fresh, BPF_NOEXIST);
		if (error)
			return error == -EEXIST ? AGAIN : NO_ROOM;
	}
	c->value[FLOW_CREATED]++;
	accounted(c, p);
	return DONE;
}

/* The packet becomes a record of its own; where the ring is full too, it is lost. */
RARE int emit_packet(const struct packet *p, __u64 now, int table_full)
{
	enum flow_counter lost = table_full ? FLOW_LOST_TABLE_PACKETS : FLOW_LOST_CLOSED_PACKETS;
	struct flow_counters *c = cpu_counters();
	struct flow_record *r;
	struct entry *fresh;

	if (!c || !p || !(fresh = new_entry(p, now)))
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

static __always_inline void account(struct flow_counters *c, const struct packet *p)
{
	__u64 now = read_clock();
	int outcome = AGAIN, entered = 1;

	for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
		__u64 *cell = cell_of(p->print);
		struct place *place = cell ? place_of(cell, &p->key, p->print) : NULL;
		struct entry *e;

		if (likely(place)) {
			e = &place->entry;
			entered = 1;
		} else {
			e = bpf_map_lookup_elem(MAP_AT(flows), &p->print);
			entered = e && same_key(&e->key, &p->key);
		}
		if (likely(entered))
			outcome = count_packet(c, e, p, now);
		else if (!e)
			outcome = create_flow(p, now);
		else /* made another flow's since the look-up, or that of one with the same print: then there is no place */
			outcome = e->print != p->print >> 32 ? AGAIN : NO_ROOM;
		if (likely(outcome == DONE))
			return;
		if (outcome == NO_ROOM)
			break;
		c->value[FLOW_RETRIES]++;
	}
	emit_packet(p, now, outcome == NO_ROOM && !entered);
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

static __always_inline __u32 frame_length(__u32 length)
{
	const volatile struct flow_input *in;

	if (settings.external_clock && (in = MAPPED_AT(input)) && in->length & FLOW_INPUT_LENGTH)
		return in->length;
	return length;
}

static __always_inline void observe(const struct packet *p, enum parse_verdict verdict)
{
	struct flow_counters *c = cpu_counters();

	if (!c)
		return;
	c->value[FLOW_SEEN_PACKETS]++;
	c->value[FLOW_SEEN_BYTES] += p->length;
	switch (verdict) {
	case PARSE_OK:
		c->value[FLOW_FRAGMENT_NONFIRST] += p->fragment;
		count_protocol(c, p);
		account(c, p);
		break;
	case PARSE_NON_IP:
		c->value[FLOW_NON_IP_PACKETS]++;
		c->value[FLOW_NON_IP_BYTES] += p->length;
		break;
	case PARSE_MALFORMED:
		c->value[FLOW_MALFORMED_PACKETS]++;
		c->value[FLOW_MALFORMED_BYTES] += p->length;
		break;
	case PARSE_TRUNCATED:
		c->value[FLOW_TRUNCATED_PACKETS]++;
		c->value[FLOW_TRUNCATED_BYTES] += p->length;
		break;
	}
}

#endif
