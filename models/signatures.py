"""Signatures: who is near whom, without learning anybody's identity.

Every host has a vector of random signs, drawn by hash from its name. Means of signatures over neighbours, and over
neighbours' neighbours, are sketches of neighbourhoods: the dot product of two sketches estimates how much two
neighbourhoods overlap, so that "those who reach this target reach the same servers as this source does" becomes one
number. Message passing over role features alone cannot say that: two departments with the same roles look the same to
it. A new host has a signature as soon as it has a name, so this stays inductive.

Source: Dong et al.: Pure Message Passing Can Estimate Common Neighbor for Link Prediction, NeurIPS 2024
(quasi-orthogonal vectors); Chamberlain et al.: Graph Neural Networks for Link Prediction with Subgraph Sketching, ICLR
2023.
"""

from __future__ import annotations

from typing import Final

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowsage.models.columns import UInt64
from flowsage.models.keys import mix
from flowsage.models.sage import Csr, neighbour_mean

WIDTH: Final = 32
"""Signs in a signature; an estimate of a cosine has standard error 1/sqrt(WIDTH)."""

ENOUGH: Final = 0.5
"""Sum of neighbours' weights at which their direction is believed by half."""

BLOCKS: Final = 5
"""Blocks of `sketch`: own, servers, clients, servers of clients, clients of servers."""

PAIRS: Final = ((1, 3), (4, 2), (1, 1), (1, 0), (2, 0))
"""(block of the source, block of the target) whose overlap the decoder sees: the servers of s and those that t's
clients use; the clients of s's servers and those of t; servers of both; t among the servers of s; t among the clients
of s."""


@numba.njit(cache=True, nogil=True)
def _signs(hashes: UInt64, out: npt.NDArray[np.float32]) -> None:
    scale = np.float32(1 / np.sqrt(WIDTH))
    for i in range(len(hashes)):
        bits = mix(hashes[i], 5)
        for j in range(WIDTH):
            out[i, j] = scale if (bits >> np.uint64(j)) & np.uint64(1) else -scale


def signs(hashes: UInt64) -> Tensor:
    """Signatures f32[n, WIDTH] of unit length."""
    out = np.empty((len(hashes), WIDTH), np.float32)
    _signs(hashes, out)
    return torch.from_numpy(out)


def sketch(own: Tensor, rows: Tensor, known: Tensor | None, into: Csr, out_of: Csr) -> Tensor:
    """Sketches f32[r, BLOCKS · WIDTH] of `rows` i64[r]; no block is longer than 1.

    own f32[n, WIDTH]: signatures of all; known f32[n, BLOCKS · WIDTH]: sketches that the others keep meanwhile (None:
    rows are all there is); into, out_of: neighbours of the rows.
    """
    servers, clients = _sure(own, out_of), _sure(own, into)
    tables = []
    for block, fresh in ((1, servers), (2, clients)):
        table = fresh if known is None else known[:, block * WIDTH : (block + 1) * WIDTH].index_copy(0, rows, fresh)
        tables.append(table.contiguous())
    second = neighbour_mean(tables[0], into), neighbour_mean(tables[1], out_of)
    return torch.cat([own if known is None else own[rows], servers, clients, *second], 1)


def _sure(own: Tensor, csr: Csr) -> Tensor:
    """Direction of the neighbours' mean, the longer the more there are and the less they are everybody's."""
    mean = neighbour_mean(own, csr)
    weight = csr.scale.clamp(min=1e-6).reciprocal() * (csr.scale > 0)
    sure: Tensor = mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-6) * (weight / (weight + ENOUGH))
    return sure
