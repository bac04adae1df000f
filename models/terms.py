"""Terms: what history says of a contact, by name, and what they come to."""

from __future__ import annotations

import numba
import numpy as np

TERMS = (
    "B_s", "B_ss", "K_ss", "B_svc", "F_s", "F_ss", "C_ss", "P_ss", "C_es", "C_e", "dc", "F_o", "N_o", "G_o", "F_0",
    "F_1", "B_self", "R_0", "A_0", "D",
)  # fmt: skip
"""Rows of `terms`; the first three without the cap. F_o, N_o, G_o are of `load`, R_0 of `rarity`, the others of
`familiarity`."""
(
    B_S, B_SS, K_SS, B_SVC, F_S, F_SS, C_SS, P_SS, C_ES, C_E, DC, F_O, N_O, G_O, F_0, F_1, B_SELF, R_0, A_0, D,
) = range(len(TERMS))  # fmt: skip
FREE, CAPPED, BEST = range(3)
"""Columns of `sums`, half a cache line a directed contact: all that a flow needs of its contact."""


@numba.njit(cache=True, nogil=True)
def contact_sums(terms, weights, sums):  # type: ignore[no-untyped-def]
    """S without what is a flow's own, into sums f8[4]: `FREE`, and `CAPPED` where B_s, B_ss, K_ss are at most D.

    terms and weights f8[20] (D's is 0) of a directed contact.
    """
    common = 0.0
    for k in range(K_SS + 1, len(TERMS)):
        common += weights[k] * terms[k]
    a, b, k, d = terms[B_S], terms[B_SS], terms[K_SS], terms[D]
    sums[FREE] = common + weights[B_S] * a + weights[B_SS] * b + weights[K_SS] * k
    sums[CAPPED] = common + weights[B_S] * min(a, d) + weights[B_SS] * min(b, d) + weights[K_SS] * min(k, d)
    sums[BEST] = -np.inf
