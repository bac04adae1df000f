"""How unusual is this volume for this key: a Student-t tail over the key's earlier window means."""

from __future__ import annotations

import math

import numba

from flowsage.graph.prefetch import prefetch
from flowsage.models.key_levels import V_M2, V_MEAN, V_WINDOWS
from flowsage.models.keys import AHEAD
from flowsage.models.weights import CONSTANTS

_FLOOR, _CAP, _MEMORY = CONSTANTS.volume_floor, CONSTANTS.volume_cap, CONSTANTS.volume_memory
_M0, _K0, _A0, _B0 = CONSTANTS.volume_mean, CONSTANTS.volume_weight, CONSTANTS.volume_shape, CONSTANTS.volume_rate
_NEAR = 2.08
"""A normal tail at 2.08 is still above e^-4, and a Student-t tail is heavier: nothing to compute below."""
_FAR = 1e4

_Y_SUM, _Y_FLOWS, _CENTRE, _SCALE = range(4)


@numba.njit(cache=True, nogil=True)
def log_tail(z: float, nu: float) -> float:
    """ln P(T ≥ z) of Student's t with nu degrees of freedom, z > 0.

    P = I_x(nu/2, 1/2)/2 with x = nu/(nu+z²), I by its continued fraction (Lentz; DLMF 8.17.22), from the side on
    which it converges fast.
    """
    a, b, x = 0.5 * nu, 0.5, nu / (nu + z * z)
    log_x, log_y = -math.log1p(z * z / nu), -math.log1p(nu / (z * z))
    swap = x > (a + 1.0) / (a + b + 2.0)
    if swap:
        a, b, x, log_x, log_y = b, a, 1.0 - x, log_y, log_x
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * log_x + b * log_y - math.log(a)
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(1.0 - (a + b) * x / (a + 1.0), tiny)
    h = d
    for m in range(1, 300):
        step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / (1.0 + step * d)
        c = 1.0 + step / c
        h *= d * c
        step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / (1.0 + step * d)
        c = 1.0 + step / c
        h *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    if swap:
        return math.log(0.5 * (1.0 - h * math.exp(front)))
    return front + math.log(0.5 * h)


@numba.njit(cache=True, nogil=True)
def volume(run, rows, memory, count, scratch, out):  # type: ignore[no-untyped-def]
    """V of each directed flow into out f8[n·ways], and the windows' means into `memory` [slots, 3].

    V = clip(−ln P(T ≥ z) − 4, 0, 30), y = ln(1+count), T the normal-inverse-gamma predictive after the n earlier window
    means of the key (mean μ, sum of squares M): with n' = min(n, 50), m = (.6 + n μ)/(.1 + n), a = 1 + n'/2,
    b = 2 + M n'/2n + .05 n' (μ − 6)²/(.1 + n'), z = (y − m)/√(b (n' + 1.1)/(a (n' + .1))), 2a degrees of freedom.
    count i64[n]: −1 where unknown; such flows get 0 and teach nothing. scratch f8[rows, 4].
    """
    ways = run.ways
    for w in range(len(run.windows)):
        first = rows.start[w]
        size = rows.start[w + 1] - first
        for r in range(size):
            prefetch(memory, rows.row_slot[first + min(r + AHEAD, size - 1)])
            slot = rows.row_slot[first + r]
            n = memory[slot, V_WINDOWS]
            mean = memory[slot, V_MEAN]
            short = min(n, _MEMORY)
            shape = _A0 + 0.5 * short
            rate = _B0 + 0.5 * memory[slot, V_M2] * short / max(n, 1.0)
            rate += 0.5 * _K0 * short * (mean - _M0) ** 2 / (_K0 + short)
            scratch[r, _Y_SUM] = 0.0
            scratch[r, _Y_FLOWS] = 0.0
            scratch[r, _CENTRE] = (_K0 * _M0 + n * mean) / (_K0 + n)
            scratch[r, _SCALE] = math.sqrt(rate * (short + _K0 + 1.0) / (shape * (short + _K0)))
        last = run.flow_offsets[w + 1] - 1
        for i in range(run.flow_offsets[w], last + 1):
            soon = (run.of_flow[min(i + AHEAD, last)] - run.first) * ways
            prefetch(rows.row, (run.of_flow[min(i + 2 * AHEAD, last)] - run.first) * ways)
            prefetch(scratch, rows.row[soon])
            if count[i] < 0:
                out[i * ways : (i + 1) * ways] = 0.0
                continue
            y = math.log(1.0 + count[i])
            for way in range(ways):
                r = rows.row[(run.of_flow[i] - run.first) * ways + way]
                scratch[r, _Y_SUM] += y
                scratch[r, _Y_FLOWS] += 1.0
                far = y - scratch[r, _CENTRE]
                if far > _NEAR * scratch[r, _SCALE]:
                    n = memory[rows.row_slot[first + r], V_WINDOWS]
                    tail = log_tail(min(far / scratch[r, _SCALE], _FAR), 2.0 * (_A0 + 0.5 * min(n, _MEMORY)))
                    out[i * ways + way] = min(max(-tail - _FLOOR, 0.0), _CAP)
                else:
                    out[i * ways + way] = 0.0
        for r in range(size):
            prefetch(memory, rows.row_slot[first + min(r + AHEAD, size - 1)])
            if scratch[r, _Y_FLOWS] > 0.0:
                slot = rows.row_slot[first + r]
                y = scratch[r, _Y_SUM] / scratch[r, _Y_FLOWS]
                memory[slot, V_WINDOWS] += 1.0
                off = y - memory[slot, V_MEAN]
                memory[slot, V_MEAN] += off / memory[slot, V_WINDOWS]
                memory[slot, V_M2] += off * (y - memory[slot, V_MEAN])
