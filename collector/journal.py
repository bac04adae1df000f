"""The sensor's own side of the ledger, kept where a kill cannot reach it: in a small map beside the program's.

Before a batch is handed to the sink, what the books will be afterwards is written down (the intent); once the sink has
taken it, one store makes that the books (the commit), and only then are the ring's slots given back. Killed in between,
the next process finds the intent and hands on exactly the same slots under the same number.

    words 0-3     magic, boot (two words), phase
    words 16, 48  two slots; phase = 2k: slot k % 2 are the books; 2k + 1: so they are, and the other slot is the intent
    page 1 …      four texts: what the program of an even and an odd generation is, what earlier ones have counted

A process can be killed between two stores, never within one: each word is stored at once, and the phase last.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from flowsage.collector.errors import ProgramError

JOURNAL_VERSION = 1
_MAGIC = int.from_bytes(b"FSAGE", "big") << 24 | JOURNAL_VERSION
_PHASE = 3
_SLOTS = (16, 48)
_TEXT_WORDS = 1024
_TEXTS = 512
JOURNAL_BYTES = 8 * (_TEXTS + 4 * _TEXT_WORDS)
"""Size of the map's one value."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Books:
    """What has been handed on, since the boot began.

    sequence      number of the next batch
    position      of the ring's reader: everything before it has been taken by the sink
    records, packets, bytes    in the batches before `sequence`
    watermark_ns, drained_ns   of the latest batch (Unix time; 0: none yet)
    offset_ns     Unix time minus the program's clock, as used for the latest batch
    generation    of the program whose table and ring these are, from 1; 0: none has been loaded yet
    target        of the program that is to replace it; the same where no upgrade is under way
    """

    sequence: int = 0
    position: int = 0
    records: int = 0
    packets: int = 0
    bytes: int = 0
    watermark_ns: int = 0
    drained_ns: int = 0
    offset_ns: int = 0
    generation: int = 0
    target: int = 0


_FIELDS = len(astuple(Books()))


class Journal:
    """Books, intent and texts in `words` (64-bit words, JOURNAL_BYTES in all; fresh ones are all 0).

    `boot` names these books: they live from the first start of a sensor until it is removed, through any restart and
    upgrade. Raises ProgramError for words of another version.
    """

    def __init__(self, words: memoryview | None = None) -> None:
        self._words = memoryview(bytearray(JOURNAL_BYTES)).cast("Q") if words is None else words
        if not self._words[0]:
            boot = uuid.uuid4().int
            self._words[1], self._words[2] = boot >> 64, boot & _MASK
            self._words[0] = _MAGIC
        elif self._words[0] != _MAGIC:
            raise ProgramError(
                "the pinned books are of another version of FlowSAGE; end the sensor with that version, or remove it "
                "with `flowsage collect --detach`"
            )
        self.boot = f"{self._words[1] << 64 | self._words[2]:032x}"

    @property
    def books(self) -> Books:
        """As committed."""
        return self._read(self._words[_PHASE] // 2)

    @property
    def intent(self) -> Books | None:
        """What the books become once the batch that was being handed on is known to have been taken; None: none was."""
        phase = self._words[_PHASE]
        return self._read(phase // 2 + 1) if phase % 2 else None

    def begin(self, after: Books) -> None:
        """A batch is about to be handed on; with it taken, the books are `after`."""
        phase = self._words[_PHASE] & ~1
        self._words[_PHASE] = phase
        start = _SLOTS[(phase // 2 + 1) % 2]
        for place, value in enumerate(astuple(after)):
            self._words[start + place] = value & _MASK
        self._words[_PHASE] = phase + 1

    def commit(self) -> None:
        """It has been taken."""
        self._words[_PHASE] += 1

    def write(self, after: Books) -> None:
        """Both at once, for a change that nobody else takes part in."""
        self.begin(after)
        self.commit()

    def _read(self, turn: int) -> Books:
        start = _SLOTS[turn % 2]
        values = list(self._words[start : start + _FIELDS])
        offset = values[7]
        values[7] = offset - (1 << 64) if offset >> 63 else offset
        return Books(**dict(zip(Books.__dataclass_fields__, values, strict=True)))

    # ---- texts of a generation: written while it is not the current one ----

    def describe(self, generation: int, what: Mapping[str, Any]) -> None:
        """Say what the program of a generation is."""
        self._write_text(generation % 2, what)

    def description(self, generation: int) -> dict[str, Any]:
        """What was said of it."""
        return self._read_text(generation % 2)

    def carry(self, generation: int, counted: Mapping[str, int]) -> None:
        """What the programs before this generation have counted, by counter, where it does not go on in their maps."""
        self._write_text(2 + generation % 2, counted)

    def carried(self, generation: int) -> dict[str, int]:
        """The same, for the ledger to add."""
        return self._read_text(2 + generation % 2)

    def _write_text(self, which: int, content: Mapping[str, Any]) -> None:
        text = json.dumps(content).encode()
        size = -(-len(text) // 8)
        if size >= _TEXT_WORDS:
            raise ProgramError(f"{len(text)} bytes do not fit the journal")
        start = _TEXTS + which * _TEXT_WORDS
        self._words[start] = len(text)
        self._words[start + 1 : start + 1 + size] = memoryview(text.ljust(8 * size)).cast("Q")

    def _read_text(self, which: int) -> dict[str, Any]:
        start = _TEXTS + which * _TEXT_WORDS
        length = self._words[start]
        if not length:
            return {}
        text = self._words[start + 1 : start + 1 + -(-length // 8)].tobytes()[:length]
        content: dict[str, Any] = json.loads(text)
        return content
