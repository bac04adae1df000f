"""Levels: what every key does, raised contact by contact in the cells of each analytic (`records`)."""

from __future__ import annotations

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch
from flowsage.models.analytics import BURST, DOUBLES, DRIP, EXFIL, FAMILIES, FLOOD, HAUL, STEADY, TABLE, contributions
from flowsage.models.keys import AHEAD, mix
from flowsage.models.prior import GROUPS
from flowsage.models.records import first_span, touch

HIGHEST = 1e15
"""No level is higher: what doubles would not end."""

A, G, F = len(TABLE), len(GROUPS), len(FAMILIES)


@numba.njit(cache=True, nogil=True)
def key_hashes(source, target, service, out):  # type: ignore[no-untyped-def]
    """Keys u64[3, c] of the (source, service), the pair and the contact."""
    for i in range(len(source)):
        pair = mix(source[i], target[i])
        out[0, i] = mix(source[i] ^ np.uint64(0x5E11), np.uint64(service[i]))
        out[1, i] = pair
        out[2, i] = mix(pair, np.uint64(service[i]))


@numba.njit(cache=True, nogil=True)
def all_keys(hashes, src, dst, service, offsets, ends, out):  # type: ignore[no-untyped-def]
    """Keys u64[2·c] of hosts, pane by pane its sources and then its targets; u64[4, c] as `key_hashes`, and of the
    service. src, dst i32[c] are indices into hashes, contacts offsets[k]:offsets[k + 1] a pane.
    """
    source, target = np.empty(len(src), np.uint64), np.empty(len(src), np.uint64)
    for k in range(len(offsets) - 1):
        for i in range(offsets[k], offsets[k + 1]):
            source[i] = ends[offsets[k] + i] = hashes[src[i]]
            target[i] = ends[offsets[k + 1] + i] = hashes[dst[i]]
    for i in range(len(src)):
        out[3, i] = (np.uint64(service[i]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    key_hashes(source, target, service, out[:3])


@numba.njit(cache=True, nogil=True)
def both_ends(ends, offsets, out):  # type: ignore[no-untyped-def]
    """Slots i32[2·c] of hosts in the order of `all_keys` as those of sources and of targets, i32[2 or more, c]."""
    for k in range(len(offsets) - 1):
        for i in range(offsets[k], offsets[k + 1]):
            out[0, i], out[1, i] = ends[offsets[k] + i], ends[offsets[k + 1] + i]


@numba.njit(cache=True, nogil=True)
def facts(known, pair_known, service_known, flows, answered, failed, fwd, rev, knows, counts, sent, moved):  # type: ignore[no-untyped-def]
    """What kernels want of contacts: knows bool[3, c] (the contact, the pair, the source's use of the service), counts
    i32[3, c] (flows, answered, failed) and bytes: sent i64[c] less those received, and moved i64[c], both ways."""
    for i in range(len(flows)):
        knows[0, i], knows[1, i], knows[2, i] = known[i] > 0, pair_known[i] > 0, service_known[i] > 0
        counts[0, i], counts[1, i], counts[2, i] = flows[i], answered[i], failed[i]
        sent[i], moved[i] = fwd[i] - rev[i], fwd[i] + rev[i]


@numba.njit(cache=True, nogil=True)
def register(slots, failed, known, host_born, born, active_block, now, block, fresh, active):  # type: ignore[no-untyped-def]
    """Births of hosts and keys, and who is active for the first time in the block.

    Writes fresh bool[c, 3] (the contact, the pair, the source's use of the service: never counted, and history does not
    know it either) and active i32[2, ·]. Returns (active sources, active targets, contacts that are new or failed).
    """
    actives, news = np.zeros(2, np.int64), 0
    last = slots.shape[1] - 1
    for i in range(last + 1):
        soon = min(i + AHEAD, last)
        for role in range(2):
            prefetch(host_born, np.int64(slots[role, soon]))
            prefetch(active_block, np.int64(slots[role, soon]))
        for j in range(3):
            prefetch(born[j], np.int64(slots[4 - j, soon]))
        for role in range(2):
            host = slots[role, i]
            if host_born[host] < 0.0:
                host_born[host] = now
            if active_block[host, role] != block:
                active_block[host, role] = block
                active[role, actives[role]] = host
                actives[role] += 1
        for j in range(3):
            fresh[i, j] = False
            births = born[j]
            slot = slots[4 - j, i]
            if births[slot] < 0.0:
                births[slot] = now
                fresh[i, j] = not known[j, i]
        news += fresh[i, 0] or fresh[i, 2] or failed[i] > 0
    return actives[0], actives[1], news


@numba.njit(cache=True, nogil=True)
def remember(  # type: ignore[no-untyped-def]
    slots,
    service,
    counts,
    told,
    sent,
    moved,
    tries,
    sources,
    fresh,
    surprise,
    settled,
    misplaced,
    first,
    last,
    inside,
    now,
    news,
    log_inc,
    log_meta,
    log_at,
):
    """The contacts into the log, what is new or failed apart from routine, so that routine does not push it out.

    Bytes are logged as they are, however many share the destination (`explain`). What this very pane would overwrite
    again is left out: `news` is how many are new or failed.
    """
    both, out, half, n = np.zeros(2, np.bool_), np.zeros(log_inc.shape[1]), len(log_meta) // 2, len(service)
    seen = np.zeros(2, np.int64)
    skip = np.array([news - half, n - news - half])
    for i in range(n):
        which = 0 if fresh[i, 0] or fresh[i, 2] or counts[2, i] > 0 else 1
        seen[which] += 1
        if seen[which] <= skip[which]:
            continue
        source, target = slots[0, i], slots[1, i]
        both[0], both[1] = inside[source], inside[target]
        contributions(service[i], counts[0, i], counts[1, i], counts[2, i], told[i], sent[i], moved[i], tries[i], 1.0,
                      both, fresh[i, 1], fresh[i, 0], fresh[i, 2], surprise[i], settled[i], misplaced[i],
                      out)  # fmt: skip
        at = which * half + log_at[which] % half
        log_at[which] += 1
        log_meta[at, 0], log_meta[at, 1], log_meta[at, 2] = source, target, service[i]
        log_meta[at, 3], log_meta[at, 4], log_meta[at, 5] = first[i], last[i], counts[0, i]
        log_meta[at, 6] = np.int64(now * 1e9)
        log_inc[at] = out


@numba.njit(cache=True, nogil=True)
def raise_levels(  # type: ignore[no-untyped-def]
    part, parts, slots, service, counts, told, sent, moved, tries, sources, fresh, surprise, settled, misplaced,
    usual, highest, cells, past, host_born, inside, host_record,
    tau, span, step, column, kind, width, is_target, fade, now, touched,
):  # fmt: skip
    """Every contact once into every level that it raises, as far as the level's host is of this part.

    A level belongs to its host, source or target, and hosts are dealt out by slot: parts share no cell. slots i32[5,
    c]: source and target host, (source, service), pair, contact. counts i32[3, c]: flows, answered, failed. usual,
    highest f8[c]: `uploads.usual`, `peaks.highest`. cells (`records.CELL`) [·], past f8[·, 3] of each kind. Writes
    touched i32[·, 3] (analytic, row, contact); returns how many.
    """
    out, both, m = np.zeros(len(kind)), np.zeros(2, np.bool_), 0
    last = len(service) - 1
    for i in range(last + 1):
        soon = min(i + AHEAD, last)
        prefetch(cells[1], np.int64(slots[2, soon]) * width[1] + column[BURST])
        prefetch(cells[2], np.int64(slots[3, soon]) * width[2] + column[EXFIL])
        prefetch(cells[0], np.int64(slots[1, soon]) * width[0] + column[FLOOD])
        prefetch(host_born, np.int64(slots[0, soon]))
        prefetch(host_born, np.int64(slots[1, soon]))
        source, target = slots[0, i], slots[1, i]
        mine, theirs = source % parts == part, target % parts == part
        if not (mine or theirs):
            continue
        both[0], both[1] = inside[source], inside[target]
        contributions(service[i], counts[0, i], counts[1, i], counts[2, i], told[i], sent[i], moved[i], tries[i],
                      sources[i], both, fresh[i, 1], fresh[i, 0], fresh[i, 2], surprise[i], settled[i], misplaced[i],
                      out)  # fmt: skip
        for a in range(len(kind)):
            if out[a] <= 0.0 or not (theirs if is_target[a] else mine):
                continue
            owner = target if is_target[a] else source
            what = kind[a]
            row = np.int64(owner if what == 0 else slots[1 + what, i]) * width[what] + column[a]
            beyond = usual[i] if a in (EXFIL, DRIP) else highest[i] if a == HAUL else 0.0
            if touch(
                cells[what], past[what], row, now, tau[a], span[a], fade[a], host_record, owner, a, host_born[owner],
                first_span(STEADY[a], host_born[owner], step), beyond,
            ):  # fmt: skip
                touched[m, 0], touched[m, 1], touched[m, 2] = a, row, i
                m += 1
            more = out[a] * (1.0 + cells[what][row].level) if DOUBLES[a] else out[a]
            cells[what][row].level = min(HIGHEST, cells[what][row].level + more)
    return m


@numba.njit(cache=True, nogil=True)
def set_statistic(part, parts, source, cells, slots, strength, a, width, column, now, touched, m):  # type: ignore[no-untyped-def]
    """A statistic that is computed (a beat's strength), not summed, becomes the level of its cells, of this part."""
    for i in np.flatnonzero(strength > 0.0):
        if source[i] % parts != part:
            continue
        row = slots[i] * width + column
        if cells[row].at != now:
            cells[row].at = now
            cells[row].level = 0.0
            touched[m, 0], touched[m, 1], touched[m, 2] = a, row, i
            m += 1
        cells[row].level = max(cells[row].level, strength[i])
    return m
