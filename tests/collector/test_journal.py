"""The books are whole at every store, so that a kill finds those before a batch or those after it."""

from __future__ import annotations

import itertools

import pytest

from flowsage.collector.errors import ProgramError
from flowsage.collector.journal import JOURNAL_BYTES, Books, Journal


class KilledError(Exception):
    """In place of a SIGKILL: no store follows."""


class Words:
    """The journal's memory, which survives; after `stores` words no more are written."""

    def __init__(self) -> None:
        self.words = [0] * (JOURNAL_BYTES // 8)
        self.stores = 1 << 30

    def __getitem__(self, at):
        return (
            memoryview(b"".join(w.to_bytes(8, "little") for w in self.words[at])).cast("Q")
            if isinstance(at, slice)
            else self.words[at]
        )

    def __setitem__(self, at, value) -> None:
        values = list(value) if isinstance(at, slice) else [value]
        for place, word in enumerate(values):
            if not self.stores:
                raise KilledError
            self.stores -= 1
            self.words[(at.start if isinstance(at, slice) else at) + place] = word


def books(n: int) -> Books:
    return Books(sequence=n, position=256 * n, records=n, packets=2 * n, bytes=99 * n, watermark_ns=n, offset_ns=-n)


def test_killed_between_any_two_stores_the_books_are_those_before_or_those_after():
    outcomes = set()
    for n, stores in itertools.product((1, 2), range(40)):
        words = Words()
        journal = Journal(words)
        for i in range(n):
            journal.write(books(i))
        words.stores = stores
        try:
            journal.begin(books(n))
            journal.commit()
        except KilledError:
            pass
        words.stores = 1 << 30
        found = Journal(words)
        assert found.boot == journal.boot
        assert found.books in (books(n - 1), books(n))
        assert found.intent in (None, books(n))
        outcomes.add((found.books == books(n), found.intent is not None))
        found.begin(books(n + 1))
        found.commit()
        assert Journal(words).books == books(n + 1)
    assert outcomes == {(False, False), (False, True), (True, False)}


def test_fresh_words_are_a_boot_of_their_own_with_empty_books():
    first, second = Journal(), Journal()
    assert first.boot != second.boot
    assert len(first.boot) == 32
    assert (first.books, first.intent) == (Books(), None)


def test_what_a_generation_is_and_what_was_counted_before_it_are_kept_beside_those_of_the_one_before():
    journal = Journal()
    journal.describe(4, {"identity": "a"})
    journal.carry(4, {"seen_packets": 1 << 63})
    journal.describe(5, {"identity": "b"})
    assert [journal.description(g)["identity"] for g in (4, 5)] == ["a", "b"]
    assert (journal.carried(4), journal.carried(5)) == ({"seen_packets": 1 << 63}, {})
    journal.carry(6, {})
    assert journal.carried(6) == {}
    with pytest.raises(ProgramError, match="do not fit"):
        journal.describe(5, {"identity": "b" * 9000})


def test_books_of_another_version_are_refused_with_what_to_do():
    words = memoryview(bytearray(JOURNAL_BYTES)).cast("Q")
    words[0] = 12345
    with pytest.raises(ProgramError, match=r"another version.*--detach"):
        Journal(words)
