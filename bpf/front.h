/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
#ifndef FLOWSAGE_FRONT_H
#define FLOWSAGE_FRONT_H

#include "record.h"

/* A free place, ours from now on, and its number; NULL where the next ones in turn are all held. */
static __always_inline struct place *free_place(__u32 *number)
{
	__u32 zero = 0;
	__u64 *given = bpf_map_lookup_elem(MAP_AT(turns), &zero);

	for (int i = 0; given && i < PLACE_TURNS; i++) {
		__u32 next = __sync_fetch_and_add(given, 1) & (settings.front_entries - 1);
		struct place *place = bpf_map_lookup_elem(MAP_AT(front), &next);

		if (place && !__sync_val_compare_and_swap(&place->phase, PLACE_FREE, PLACE_FILLING)) {
			*number = next;
			return place;
		}
	}
	return NULL;
}

/* Fills a place and has `cell` say so. The words are closed until everything else is there: nobody counts in it before, or
 * ends it.
 */
static __always_inline void fill_place(struct place *place, const struct entry *fresh, __u64 *cell, __u64 says)
{
	struct entry *e = &place->entry;

	__sync_lock_test_and_set(&e->side[0].word, CLOSED);
	__sync_lock_test_and_set(&e->side[1].word, CLOSED);
	e->start_ns = fresh->start_ns;
	e->handshake = fresh->handshake;
	e->state = fresh->state | IN_FRONT;
	e->print = fresh->print;
	e->vlan = fresh->vlan;
	e->icmp_type = fresh->icmp_type;
	e->icmp_code = fresh->icmp_code;
	for (int i = 0; i < 2; i++)
		__builtin_memcpy(&e->side[i].last_ns, &fresh->side[i].last_ns, sizeof(struct side) - sizeof(__u64));
	e->key = fresh->key;
	__sync_lock_test_and_set(&place->phase, PLACE_HELD);
	__sync_lock_test_and_set(cell, says);
	__sync_lock_test_and_set(&e->side[1].word, fresh->side[1].word);
	__sync_lock_test_and_set(&e->side[0].word, fresh->side[0].word);
}

/* Puts a new entry into the front. AGAIN: another CPU was first; NO_ROOM: its cell is another flow's, or no place free. */
static __always_inline enum outcome enter_front(const struct entry *fresh, __u64 print)
{
	__u64 *cell = cell_of(print), mine = CELL_TAG(print) << 32, seen;
	struct place *place;
	__u32 number = 0;

	if (!cell)
		return NO_ROOM;
	seen = __sync_val_compare_and_swap(cell, 0, mine);
	if (seen)
		return seen == mine || place_of(cell, &fresh->key, print) ? AGAIN : NO_ROOM;
	place = free_place(&number);
	if (!place) {
		__sync_lock_test_and_set(cell, 0);
		return NO_ROOM;
	}
	fill_place(place, fresh, cell, mine | (number + 1));
	return DONE;
}

#endif
