/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
#ifndef FLOWSAGE_WALK_H
#define FLOWSAGE_WALK_H

#include "record.h"

/* One entry, of either table. */
static __always_inline long visit(struct entry *e, struct flow_walk *w)
{
	__u64 word0 = *(volatile __u64 *)&e->side[0].word, word1 = *(volatile __u64 *)&e->side[1].word;
	enum outcome outcome;
	struct flow_key own;
	__u64 print;
	__u8 reason;

	if (word0 & CLOSED) {
		if (e->state & DEAD) { /* who takes the mark away deletes */
			own = e->key;
			print = print_of(&own);
			if (__sync_fetch_and_and(&e->state, ~DEAD) & DEAD &&
			    bpf_map_delete_elem(MAP_AT(flows), &print))
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
		own = e->key;
		outcome = continue_entry(e, &own, e->start_ns, w->now_ns, RESTART);
		w->flows++;
	} else {
		outcome = end_entry(e, NULL, 0, reason);
		w->removed += outcome == DONE;
	}
	w->failed += outcome != DONE;
	w->emitted += outcome == DONE && (word0 | word1);
	return outcome == NO_ROOM; /* nothing more fits: drain, then walk again */
}

CALLBACK_OF(flow_expire) long visit_flow(void *map, const __u64 *print, struct entry *e, struct flow_walk *w)
{
	return visit(e, w);
}

CALLBACK_OF(flow_front) long visit_place(void *map, const __u32 *index, struct place *place, struct flow_walk *w)
{
	/* Held, its words are open, or closed: those of a place that never was are neither. */
	return *(volatile __u64 *)&place->phase == PLACE_HELD ? visit(&place->entry, w) : 0;
}

/* Visits every entry of one table with its callback; `w`: zeros in, sums out. */
static __always_inline int walk_table(void *table, void *callback, struct flow_walk *w)
{
	struct flow_walk walk = {.mode = w->mode, .now_ns = w->now_ns ?: read_clock()};

	if (bpf_for_each_map_elem(table, callback, &walk, 0) < 0)
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

#endif
