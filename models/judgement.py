"""Judgement: by how much each level exceeds its record, how rare that is, and what is rare enough to be told."""

from __future__ import annotations

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch
from flowsage.graph.services import on_ports
from flowsage.models.analytics import DATABASE_PORTS, GUESS, MEETING, STEADY
from flowsage.models.calibration import STEP, STEPS, THRESHOLD, tail
from flowsage.models.keys import AHEAD
from flowsage.models.records import BEFORE, HELD, RECORD, first_span, growth, touch

LEAST_EXCESS = 1.0
"""An alarm needs S of at least this: e times what was there before."""

JOINT_P = 0.02
"""The joint analytic adds up ln(this / p) over families."""

JOINT_MOST = 6.0
"""A family adds at most this: what is stranger still is raised by itself."""


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
            level = cell[row].level
            x = level if what == 3 else -1.0
        held = earlier[row, HELD] >= now
        if not held or learns[a]:
            cell[row].last = max(cell[row].last, level)
        if x < 0.0:
            if level <= nothing:
                continue
            x = np.log1p(level)
        # A beat is judged by itself; once it was told, and has paused, it has to become stronger.
        record = 0.0 if direct[a] and held else max(0.0, earlier[row, RECORD] - fade[a] * now)
        excess = x - record
        if excess <= THRESHOLD:
            continue
        age, group = now - host_born[host], 3
        first = first_span(STEADY[a], host_born[host], step)
        record += growth(age, first, tau[a], span[a])
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
        # Who was there when the sensor started counts as new, but is judged as one who is not.
        counted = group
        if group == 0 and first < step:
            group = 2
        if excess < enough[a, group]:
            if not held:
                best[counted][host, a] = max(best[counted][host, a], np.float32(excess))
            continue
        p = tail(excess, rate[a, group], shape[a, group], scale[a, group])
        p = max(p, floors[a, min(STEPS - 1, int(excess / STEP))])
        smallest[host] = min(smallest[host], p / share[a])
        alarm = open_[a] and excess >= LEAST_EXCESS and x >= least[a] and p <= allowed * share[a]
        if alarm:
            earlier[row, HELD] = now + quiet
            if direct[a]:
                earlier[row, RECORD] = max(earlier[row, RECORD], x + fade[a] * now)
            if not learns[a]:
                cell[row].last = earlier[row, BEFORE] = 0.0
            excluded[host, a] = True
            if not is_target[a]:  # a host that scans is no witness of whom hosts like it meet
                excluded[host, MEETING] = True
            found[count, 0], found[count, 1], found[count, 2] = a, row, contact
            found[count, 3], found[count, 4] = group, host
            values[count, 0], values[count, 1], values[count, 2], values[count, 3] = excess, x, record, p
            count += 1
        elif not held:
            best[counted][host, a] = max(best[counted][host, a], np.float32(excess))
        if a != joint and not is_target[a] and p < JOINT_P:
            cause = np.float32(min(JOINT_MOST, np.log(JOINT_P / p)))
            if cause > family_best[host, family[a]]:
                family_best[host, family[a]] = cause
                row = host * width[0] + column[joint]
                if touch(
                    cells[0], past[0], row, now, 0.0, span[joint], fade[joint], host_record, host, joint,
                    host_born[host], step, 0.0,
                ):  # fmt: skip
                    touched[total, 0], touched[total, 1], touched[total, 2] = joint, row, contact
                    total += 1
    return count
