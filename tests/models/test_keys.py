"""The table of keys against a plain dictionary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsage.models.keys import KeyTable, mix


def keys(rng: np.random.Generator, n: int, distinct: int) -> np.ndarray:
    pool = rng.integers(0, 2**64, distinct, np.uint64)
    return pool[rng.integers(0, distinct, n)]


def in_a_dictionary(columns: list[np.ndarray]) -> list[list[int]]:
    slots: dict[int, int] = {}
    return [[slots.setdefault(int(k), len(slots)) for k in column] for column in columns]


def test_a_key_keeps_its_slot_and_new_keys_get_the_next_ones_through_growth() -> None:
    rng = np.random.default_rng(1)
    columns = [keys(rng, n, 3 * n) for n in (1, 7, 1_000, 50_000, 3)]
    table = KeyTable()
    for tick, (column, expected) in enumerate(zip(columns, in_a_dictionary(columns), strict=True)):
        assert table.find_or_insert(column, tick).tolist() == expected
    assert len(table) == len(np.unique(np.concatenate(columns)))
    assert table.find(columns[0]).tolist() == in_a_dictionary(columns)[0]


def test_finding_does_not_insert_and_says_minus_one_for_what_is_absent() -> None:
    table = KeyTable()
    table.find_or_insert(np.array([5, 6], np.uint64), 0)
    assert table.find(np.array([6, 7, 0], np.uint64)).tolist() == [1, -1, -1]
    assert len(table) == 2


def test_zero_and_the_largest_key_are_keys_like_others() -> None:
    table = KeyTable()
    extremes = np.array([0, 2**64 - 1, 2**63], np.uint64)
    assert table.find(extremes).tolist() == [-1, -1, -1]
    assert table.find_or_insert(extremes, 0).tolist() == [0, 1, 2]
    assert table.find(extremes).tolist() == [0, 1, 2]


def test_keys_that_fall_on_one_position_are_all_found() -> None:
    clash = np.arange(1, 400, dtype=np.uint64) << np.uint64(32)
    table = KeyTable()
    assert table.find_or_insert(clash, 0).tolist() == list(range(399))
    assert table.find(clash[::-1]).tolist() == list(range(398, -1, -1))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=30), min_size=1, max_size=12), st.integers(1, 30))
def test_evicting_forgets_what_came_once_then_the_longest_unseen_and_keeps_the_rest_in_order(
    ticks: list[list[int]], limit: int
) -> None:
    table = KeyTable()
    seen: dict[int, list[int]] = {}
    for tick, column in enumerate(ticks):
        table.find_or_insert(np.array(column, np.uint64), tick)
        for key in dict.fromkeys(column):
            seen.setdefault(key, []).append(tick)
    order = list(seen)  # dictionaries keep the order of first insertion: that of slots
    excess = max(0, len(order) - limit)
    oldest = sorted(order, key=lambda k: (seen[k][-1], order.index(k)))
    once = [k for k in oldest if len(seen[k]) == 1]
    gone = once[: min(excess, max(0, len(once) - limit // 2))]
    gone += [k for k in oldest if k not in gone][: excess - len(gone)]
    remap = table.evict(limit)
    if not excess:
        assert remap is None
        assert table.evicted == 0
    else:
        expected = {k: i for i, k in enumerate(k for k in order if k not in gone)}
        assert remap is not None
        assert remap.tolist() == [expected.get(k, -1) for k in order]
        assert table.evicted == len(order) - limit
        assert table.find(np.array(order, np.uint64)).tolist() == [expected.get(k, -1) for k in order]
    assert len(table) == min(limit, len(order))


def test_a_flood_of_keys_that_come_once_leaves_half_of_the_room_to_those_that_came_back() -> None:
    table, known = KeyTable(), np.arange(50, dtype=np.uint64)
    for tick in (0, 1):
        table.find_or_insert(known, tick)
    for tick in range(2, 22):
        table.find_or_insert(np.arange(1_000 * tick, 1_000 * tick + 200, dtype=np.uint64), tick)
        table.evict(100)
    assert (table.find(known) >= 0).all()


def test_a_restored_table_has_the_same_slots_ticks_and_losses() -> None:
    rng = np.random.default_rng(2)
    table = KeyTable()
    for tick in range(5):
        table.find_or_insert(keys(rng, 500, 2_000), tick)
    table.evict(300)
    again = KeyTable.restore(table.state())
    for name, array in table.state().items():
        np.testing.assert_array_equal(again.state()[name], array)
    more = keys(rng, 500, 2_000)
    np.testing.assert_array_equal(again.find_or_insert(more, 9), table.find_or_insert(more, 9))
    np.testing.assert_array_equal(again.evict(100), table.evict(100))


@pytest.mark.parametrize("bits", [range(16), range(48, 64)])
def test_mixed_neighbours_spread_over_low_and_high_bits(bits: range) -> None:
    mixed = np.array([int(mix(np.uint64(a), np.uint64(b))) for a in range(64) for b in range(64)], np.uint64)
    assert len(np.unique(mixed)) == 4096
    for bit in bits:
        assert 0.45 < ((mixed >> np.uint64(bit)) & np.uint64(1)).mean() < 0.55


def test_mixing_depends_on_order() -> None:
    assert mix(np.uint64(3), np.uint64(4)) != mix(np.uint64(4), np.uint64(3))


def test_ticks_may_be_as_far_apart_as_they_like() -> None:
    table = KeyTable()
    for key, tick in ((1, -(2**40)), (2, 5), (3, 6), (2, 7), (4, 2**40), (5, 2**40 + 1)):
        table.find_or_insert(np.array([key], np.uint64), tick)
    table = KeyTable.restore(table.state())
    table.find_or_insert(np.array([6], np.uint64), 2**41)
    assert table.evict(4) is not None
    assert table.find(np.arange(1, 7, dtype=np.uint64)).tolist() == [-1, 0, -1, 1, 2, 3]
