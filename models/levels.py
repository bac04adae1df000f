"""Levels: the memory of what every key does, and the kernels that raise, judge and forget.

A key (a host, a (source, service), a pair, a contact) has one *cell* for each analytic of its kind:

    LEVEL    leaky sum, as of AT
    AT       s since the origin at which the cell was last touched; 0: never
    LAST     largest level of this span

and a *past*, apart from it, since it stays nought until a span is over, and what is nought takes no memory:

    RECORD   largest x of earlier spans, plus fade · time (so that fading needs no visit)
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
import numpy.typing as npt

from flowsage.graph.build import on_ports
from flowsage.graph.prefetch import prefetch
from flowsage.models.analytics import (
    BURST,
    DATABASE_PORTS,
    DOUBLES,
    DRIP,
    EXFIL,
    FAMILIES,
    FLOOD,
    GUESS,
    MEETING,
    TABLE,
    contributions,
)
from flowsage.models.calibration import STEP, STEPS, THRESHOLD, tail
from flowsage.models.keys import AHEAD, mix
from flowsage.models.prior import GROUPS

LEVEL, AT, LAST = range(3)
RECORD, BEFORE, HELD = range(3)
LEAST_EXCESS = 1.0
"""An alarm needs S of at least this: e times what was there before."""

JOINT_P = 0.02
"""The joint analytic adds up ln(this / p) over families."""

JOINT_MOST = 6.0
"""A family adds at most this: what is stranger still is raised by itself."""

HIGHEST = 1e15
"""No level is higher: what doubles would not end."""

A, G, F = len(TABLE), len(GROUPS), len(FAMILIES)
Arrays = dict[str, npt.NDArray[np.generic]]


@numba.njit(cache=True, nogil=True)
def key_hashes(source, target, service, out):  # type: ignore[no-untyped-def]
    """Keys u64[3, c] of the (source, service), the pair and the contact."""
    for i in range(len(source)):
        pair = mix(source[i], target[i])
        out[0, i] = mix(source[i] ^ np.uint64(0x5E11), np.uint64(service[i]))
        out[1, i] = pair
        out[2, i] = mix(pair, np.uint64(service[i]))


@numba.njit(cache=True, nogil=True)
def all_keys(hashes, src, dst, service, out):  # type: ignore[no-untyped-def]
    """Keys u64[6, c] of the source, the target, then as `key_hashes`, and of the service; src, dst i32[c] in hashes."""
    for i in range(len(src)):
        out[0, i], out[1, i] = hashes[src[i]], hashes[dst[i]]
        out[5, i] = (np.uint64(service[i]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    key_hashes(out[0], out[1], service, out[2:5])


@numba.njit(cache=True, nogil=True)
def facts(known, pair_known, service_known, flows, answered, failed, fwd, rev, knows, counts, sent):  # type: ignore[no-untyped-def]
    """What kernels want of contacts: knows bool[3, c] (the contact, the pair, the source's use of the service), counts
    i32[3, c] (flows, answered, failed) and bytes sent i64[c], those received taken off."""
    for i in range(len(flows)):
        knows[0, i], knows[1, i], knows[2, i] = known[i] > 0, pair_known[i] > 0, service_known[i] > 0
        counts[0, i], counts[1, i], counts[2, i] = flows[i], answered[i], failed[i]
        sent[i] = fwd[i] - rev[i]


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
    at = cells[row, AT]
    if at == now:
        return False
    cells[row, AT] = now
    if at == 0.0:
        if host_record[host, a] > 0.0 or usual > 0.0:
            past[row, RECORD] = max(host_record[host, a], fade * now) + usual
        return True
    if 0.0 < past[row, HELD] < now:  # what was told is over; what is left of it is not told again
        cells[row, LEVEL], past[row, HELD] = 0.0, 0.0
    level = cells[row, LEVEL]
    if past[row, HELD] < now:
        then, this = span_of(at - born, step, span), span_of(now - born, step, span)
        if this > then:
            more = np.log1p(past[row, BEFORE]) + fade * at
            edge = level * np.exp(-(born + span_end(then, step, span) - at) / tau) if tau > 0.0 else 0.0
            if this == then + 1.0:
                past[row, BEFORE] = cells[row, LAST]
                cells[row, LAST] = edge
            else:
                more = max(more, np.log1p(cells[row, LAST]) + fade * at)
                past[row, BEFORE] = edge
                cells[row, LAST] = 0.0
            past[row, RECORD] = max(past[row, RECORD], more)
            host_record[host, a] = max(host_record[host, a], more - usual)
    if usual > 0.0:
        past[row, RECORD] = max(past[row, RECORD], usual + fade * now)
    cells[row, LEVEL] = level * np.exp(-(now - at) / tau) if tau > 0.0 else 0.0
    return True


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
    tries,
    sources,
    fresh,
    surprise,
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
        contributions(service[i], counts[0, i], counts[1, i], counts[2, i], told[i], sent[i], tries[i], 1.0, both,
                      fresh[i, 1], fresh[i, 0], fresh[i, 2], surprise[i], misplaced[i], out)  # fmt: skip
        at = which * half + log_at[which] % half
        log_at[which] += 1
        log_meta[at, 0], log_meta[at, 1], log_meta[at, 2] = source, target, service[i]
        log_meta[at, 3], log_meta[at, 4], log_meta[at, 5] = first[i], last[i], counts[0, i]
        log_meta[at, 6] = np.int64(now * 1e9)
        log_inc[at] = out


@numba.njit(cache=True, nogil=True)
def raise_levels(  # type: ignore[no-untyped-def]
    part, parts, slots, service, counts, told, sent, tries, sources, fresh, surprise, misplaced,
    usual, cells, past, host_born, inside, host_record,
    tau, span, step, column, kind, width, is_target, fade, now, touched,
):  # fmt: skip
    """Every contact once into every level that it raises, as far as the level's host is of this part.

    A level belongs to its host, source or target, and hosts are dealt out by slot: parts share no cell.
    slots i32[5, c]: source and target host, (source, service), pair, contact. counts i32[3, c]: flows, answered,
    failed. usual f8[c]: `uploads.usual`. cells, past f8[·, 3] of each kind. Writes touched i32[·, 3] (analytic, row,
    contact); returns how many.
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
        contributions(service[i], counts[0, i], counts[1, i], counts[2, i], told[i], sent[i], tries[i], sources[i],
                      both, fresh[i, 1], fresh[i, 0], fresh[i, 2], surprise[i], misplaced[i], out)  # fmt: skip
        for a in range(len(kind)):
            if out[a] <= 0.0 or not (theirs if is_target[a] else mine):
                continue
            owner = target if is_target[a] else source
            what = kind[a]
            row = np.int64(owner if what == 0 else slots[1 + what, i]) * width[what] + column[a]
            beyond = usual[i] if a in (EXFIL, DRIP) else 0.0
            if touch(
                cells[what], past[what], row, now, tau[a], span[a], fade, host_record, owner, a, host_born[owner], step,
                beyond,
            ):  # fmt: skip
                touched[m, 0], touched[m, 1], touched[m, 2] = a, row, i
                m += 1
            more = out[a] * (1.0 + cells[what][row, LEVEL]) if DOUBLES[a] else out[a]
            cells[what][row, LEVEL] = min(HIGHEST, cells[what][row, LEVEL] + more)
    return m


@numba.njit(cache=True, nogil=True)
def judge(  # type: ignore[no-untyped-def]
    touched, m, slots, service, cells, past, host_born, born, host_record,
    rate, shape, scale, floors, tau, span, step, column, kind, width, family, is_target, direct, learns, least, share,
    joint, open_, best, family_best, excluded, smallest, fade, now, hour, day, quiet, allowed,
    found, values,
):  # fmt: skip
    """Excess and p of every key touched; what is within `allowed` is an alarm, the rest goes to the calibration.

    Fills found i64[·, 5] (analytic, row, contact, group, host) and values f8[·, 4] (S, x, R, p); returns how many.
    Joint is judged last, of every source whose causes of this block have grown.
    """
    count, total = 0, m
    nothing = np.expm1(THRESHOLD)  # a level that is no excess over any record
    # An excess below which p is above what matters: no host's smallest, no cause of a joint alarm, no alarm.
    enough = np.empty_like(rate)
    for a in range(len(kind)):
        matters = max(share[a], JOINT_P, allowed * share[a])
        for g in range(rate.shape[1]):
            more = max(1.0, rate[a, g] / matters) ** (1.0 / shape[a, g]) - 1.0
            enough[a, g] = THRESHOLD + scale[a, g] * more * (1.0 - 1e-9)
    i = 0
    while i < total:
        soon = min(i + AHEAD, total - 1)
        a, row = touched[soon, 0], np.int64(touched[soon, 1])
        prefetch(cells[kind[a]], row)
        prefetch(past[kind[a]], row)
        host = slots[1, touched[soon, 2]] if is_target[a] else slots[0, touched[soon, 2]]
        prefetch(host_born, np.int64(host))
        a, row, contact = touched[i, 0], touched[i, 1], touched[i, 2]
        i += 1
        host = slots[1, contact] if is_target[a] else slots[0, contact]
        what = kind[a]
        cell, earlier = cells[what], past[what]
        if a == joint:
            x, causes = 0.0, 0
            for f in range(family_best.shape[1]):
                x += family_best[host, f]
                causes += family_best[host, f] > 0.0
            x = x if causes >= 2 else 0.0
            level = np.expm1(x)
        else:
            level = cell[row, LEVEL]
            x = level if what == 3 else -1.0
        held = earlier[row, HELD] >= now
        if not held or learns[a]:
            cell[row, LAST] = max(cell[row, LAST], level)
        if x < 0.0:
            if level <= nothing:
                continue
            x = np.log1p(level)
        # A beat is judged by itself; once it was told, and has paused, it has to become stronger.
        record = 0.0 if direct[a] and held else max(0.0, earlier[row, RECORD] - fade * now)
        excess = x - record
        if excess <= THRESHOLD:
            continue
        age, group = now - host_born[host], 3
        record += growth(age, step, tau[a], span[a])
        excess = x - record
        if excess <= THRESHOLD:
            continue
        if age < hour:
            group = 0
            if a == GUESS and on_ports(service[contact], DATABASE_PORTS):
                continue
        elif what == 0:
            group = 2 if age < day else 3
        else:
            age = now - born[3 - what][row // width[what]]
            group = 1 if age < hour else (2 if age < day else 3)
        if excess < enough[a, group]:
            if not held:
                best[group][host, a] = max(best[group][host, a], np.float32(excess))
            continue
        p = tail(excess, rate[a, group], shape[a, group], scale[a, group])
        p = max(p, floors[a, min(STEPS - 1, int(excess / STEP))])
        smallest[host] = min(smallest[host], p / share[a])
        alarm = open_[a] and excess >= LEAST_EXCESS and x >= least[a] and p <= allowed * share[a]
        if alarm:
            earlier[row, HELD] = now + quiet
            if direct[a]:
                earlier[row, RECORD] = max(earlier[row, RECORD], x + fade * now)
            if not learns[a]:
                cell[row, LAST] = earlier[row, BEFORE] = 0.0
            excluded[host, a] = True
            if not is_target[a]:  # a host that scans is no witness of whom hosts like it meet
                excluded[host, MEETING] = True
            found[count, 0], found[count, 1], found[count, 2] = a, row, contact
            found[count, 3], found[count, 4] = group, host
            values[count, 0], values[count, 1], values[count, 2], values[count, 3] = excess, x, record, p
            count += 1
        elif not held:
            best[group][host, a] = max(best[group][host, a], np.float32(excess))
        if a != joint and not is_target[a] and p < JOINT_P:
            cause = np.float32(min(JOINT_MOST, np.log(JOINT_P / p)))
            if cause > family_best[host, family[a]]:
                family_best[host, family[a]] = cause
                row = host * width[0] + column[joint]
                if touch(
                    cells[0], past[0], row, now, 0.0, span[joint], fade, host_record, host, joint, host_born[host],
                    step, 0.0,
                ):  # fmt: skip
                    touched[total, 0], touched[total, 1], touched[total, 2] = joint, row, contact
                    total += 1
    return count


@numba.njit(cache=True, nogil=True)
def set_statistic(part, parts, source, cells, slots, strength, a, width, column, now, touched, m):  # type: ignore[no-untyped-def]
    """A statistic that is computed (a beat's strength), not summed, becomes the level of its cells, of this part."""
    for i in np.flatnonzero(strength > 0.0):
        if source[i] % parts != part:
            continue
        row = slots[i] * width + column
        if cells[row, AT] != now:
            cells[row, AT] = now
            cells[row, LEVEL] = 0.0
            touched[m, 0], touched[m, 1], touched[m, 2] = a, row, i
            m += 1
        cells[row, LEVEL] = max(cells[row, LEVEL], strength[i])
    return m
