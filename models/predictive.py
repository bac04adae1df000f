"""Predictive probabilities of a key's next window, and ranks among what was seen: the forms that history is made of."""

from __future__ import annotations

import math

import numba

from flowsage.models.weights import CONSTANTS

_THETA, _D = CONSTANTS.strength, CONSTANTS.discount
_ALL, _OWN, _LAST = CONSTANTS.rank_all, CONSTANTS.rank_service, int(CONSTANTS.buckets) - 1


@numba.njit(cache=True, nogil=True, inline="always")
def new_child(tokens, distinct):  # type: ignore[no-untyped-def]
    """C of a new child = −ln((θ + d U)/(θ + N)): Pitman-Yor over N tokens of U distinct children; θ 1, d ½."""
    return -math.log((_THETA + _D * distinct) / (_THETA + tokens))


@numba.njit(cache=True, nogil=True, inline="always")
def known_child(n, tokens):  # type: ignore[no-untyped-def]
    """C of a child with n > 0 of N tokens = −ln((n − d)/(θ + N))."""
    return -math.log((n - _D) / (_THETA + tokens))


@numba.njit(cache=True, nogil=True, inline="always")
def bucket(d):  # type: ignore[no-untyped-def]
    """Half-nat bucket of D."""
    return min(_LAST, int(2.0 * d))


@numba.njit(cache=True, nogil=True, inline="always")
def meeting_rank(d, k, n, k_service, n_service):  # type: ignore[no-untyped-def]
    """dc = −ln p: p_all = (k + 20 e^−D)/(n + 20), p = (k_svc + 10 p_all)/(n_svc + 10); k of n tokens had D in this
    bucket or above."""
    everywhere = (k + _ALL * math.exp(-d)) / (n + _ALL)
    return -math.log((k_service + _OWN * everywhere) / (n_service + _OWN))
