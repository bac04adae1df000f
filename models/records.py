"""Records: what one analytic remembers at one key, and how it ages.

A key (a host, a (source, service), a pair, a contact) has one *cell* for each analytic of its kind:

    at       s since the origin at which the cell was last touched; 0: never
    level    leaky sum, as of then
    last     largest level of this span

and a *past*, apart from it, since it stays nought until a span is over, and what is nought takes no memory:

    RECORD   largest x of earlier spans, plus fade · time (so that fading needs no visit); fade is the analytic's own
    BEFORE   largest level of the span before
    HELD     until when the record is frozen, because the key was named in an alarm

A span is max(block, τ); what was reached in one becomes record two spans later, so an attack's own ramp does not become
its record while it lasts. A new key starts with the record of its host. What is sent outside also has the record of
what others have sent there (`uploads`), and counts for the host's own only by how much it is beyond that.

A young host has no record for so long that steady traffic would look like news. So its spans begin with a block and
double until they are full length, and a record of that time is taken to have grown as a leaky sum of steady input does.
"""

from __future__ import annotations

import numba
import numpy as np

CELL = np.dtype([("at", "f8"), ("level", "f4"), ("last", "f4")])
"""A quarter of a cache line. A level is good to a part in ten million, and what is judged is its logarithm."""
RECORD, BEFORE, HELD = range(3)


FINER = 8.0
"""Into so many parts the first block is cut, for what is steady."""


@numba.njit(cache=True, nogil=True)
def first_span(steady, born, block):  # type: ignore[no-untyped-def]
    """Length of the first span of a host's life, s: a block.

    But of what is `steady` at a host that was there when the sensor started minutes, so that after the first block it
    is known how busy it is; what begins later in that block is news.
    """
    return block / FINER if steady and born < 2.0 * block / FINER else block


@numba.njit(cache=True, nogil=True)
def span_of(age, step, span):  # type: ignore[no-untyped-def]
    """Which span of its host's life an age is in: 0 is the first block, each is twice the one before until `span`."""
    if age < step:
        return 0.0
    if age < span:
        return np.floor(np.log2(age / step)) + 1.0
    return np.ceil(np.log2(span / step)) + np.floor(age / span)


@numba.njit(cache=True, nogil=True)
def span_end(number, step, span):  # type: ignore[no-untyped-def]
    """Age at which a span ends."""
    doubled = np.ceil(np.log2(span / step))
    if number <= doubled:
        return min(span, step * 2.0**number)
    return (number - doubled + 1.0) * span


@numba.njit(cache=True, nogil=True)
def growth(age, step, tau, span):  # type: ignore[no-untyped-def]
    """ln of how much a leaky sum of steady input has grown since the spans whose record counts now, at most 2."""
    number = span_of(age, step, span)
    if tau <= 0.0 or number < 2.0:
        return 0.0
    since = span_end(number - 2.0, step, span)
    return 0.0 if since > 4.0 * tau else np.log(np.expm1(-age / tau) / np.expm1(-since / tau))


@numba.njit(cache=True, nogil=True)
def touch(cells, past, row, now, tau, span, fade, host_record, host, a, born, step, usual):  # type: ignore[no-untyped-def]
    """Bring a cell to `now`: decay its level, move its spans. True if this is the first touch at `now`.

    `born` of its host, `step` the first span: a block. `usual`: the x that others reach at such a key (`uploads`); a
    host's record is by how much it went beyond.
    """
    at = cells[row].at
    if at == now:
        return False
    cells[row].at = now
    if at == 0.0:
        if host_record[host, a] > 0.0 or usual > 0.0:
            past[row, RECORD] = max(host_record[host, a], fade * now) + usual
        return True
    if 0.0 < past[row, HELD] < now:  # what was told is over; what is left of it is not told again
        cells[row].level, past[row, HELD] = 0.0, 0.0
    level = cells[row].level
    if past[row, HELD] < now:
        then, this = span_of(at - born, step, span), span_of(now - born, step, span)
        if this > then:
            more = np.log1p(past[row, BEFORE]) + fade * at
            edge = level * np.exp(-(born + span_end(then, step, span) - at) / tau) if tau > 0.0 else 0.0
            if this == then + 1.0:
                past[row, BEFORE] = cells[row].last
                cells[row].last = edge
            else:
                more = max(more, np.log1p(np.float64(cells[row].last)) + fade * at)
                past[row, BEFORE] = edge
                cells[row].last = 0.0
            past[row, RECORD] = max(past[row, RECORD], more)
            host_record[host, a] = max(host_record[host, a], more - usual)
    if usual > 0.0:
        past[row, RECORD] = max(past[row, RECORD], usual + fade * now)
    cells[row].level = level * np.exp(-(now - at) / tau) if tau > 0.0 else 0.0
    return True
