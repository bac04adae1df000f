"""From embeddings to f(s, t, svc): how much likelier a meeting is than popularity says."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowsage.models import signatures
from flowsage.models.columns import Float32, Int32, Int64
from flowsage.models.popularity import keys_of
from flowsage.models.sage import seed_parameters

TOWER: Final = 32
SERVICE: Final = 16
_CODES: Final = 512
EXPECTED: Final = 0.4
"""Coefficient that the overlaps of second neighbours begin with: those who share peers meet, on most networks."""

GAIN: Final = 8.0
"""Overlaps are cosines, most of them small: a coefficient has to become large, and Adam's steps are of one size."""


def service_rows(service: Int32) -> Int64:
    """Two hashed rows i64[n, 2] of the service table for each service code."""
    keys = keys_of(service)
    rows = np.empty((len(keys), 2), np.int64)
    rows[:, 0], rows[:, 1] = keys & np.uint64(_CODES - 1), (keys >> np.uint64(20)) & np.uint64(_CODES - 1)
    return rows


def service_codes(service: Int32) -> Tensor:
    """`service_rows` as a tensor."""
    return torch.from_numpy(service_rows(service))


Linear = tuple[Float32, Float32]
"""Transposed weights and bias of a layer."""


class Plain(NamedTuple):
    """The weights of a decoder's source side as NumPy views, which follow them: layers are updated in place."""

    service: Float32
    source: tuple[Linear, Linear]
    diagonal: Linear
    stranger: Linear
    overlap: Linear | None


class Decoder(nn.Module):
    """f = <source tower([z_s, e_svc]) · diag(e_svc), target tower(z_t)> + overlaps of signatures, weighted by service.

    Both sides come out as vectors [n, depth] whose dot product is f, so that all targets can be tried at once. f starts
    as 0: before it has learnt anything, p is popularity.
    """

    def __init__(self, embedding: int, *, overlaps: bool, seed: int) -> None:
        super().__init__()
        self.overlaps = overlaps
        pairs = len(signatures.PAIRS) if overlaps else 0
        self.depth = TOWER + pairs * signatures.WIDTH
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
            self.service = nn.EmbeddingBag(_CODES, SERVICE, mode="sum")
            self.source = nn.Sequential(nn.Linear(embedding + SERVICE, 64), nn.ReLU(), nn.Linear(64, TOWER))
            self.target = nn.Sequential(nn.Linear(embedding, 64), nn.ReLU(), nn.Linear(64, TOWER))
            self.diagonal = nn.Linear(SERVICE, TOWER)
            self.overlap = nn.Linear(SERVICE, pairs) if overlaps else None
            self.stranger = nn.Linear(TOWER, 1)
        seed_parameters(self, seed)
        with torch.no_grad():
            self.service.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed + 1))
            for last in (self.target[2], self.stranger, self.overlap):
                if isinstance(last, nn.Linear):
                    last.weight.zero_()
            if self.overlap is not None:
                self.overlap.bias[:2] = EXPECTED

    def sources(self, embedding: Tensor, sketch: Tensor | None, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Source side f32[n, depth] of n (source, service), and f32[n], f of a host never seen before."""
        service = self.service(codes)
        tower = self.source(torch.cat([embedding, service], 1)) * (1 + self.diagonal(service)) / TOWER**0.5
        stranger = self.stranger(tower).squeeze(1)
        if self.overlap is None or sketch is None:
            return tower, stranger
        weight = GAIN * self.overlap(service)
        blocks = [_block(sketch, a) * weight[:, k : k + 1] for k, (a, _) in enumerate(signatures.PAIRS)]
        return torch.cat([tower, *blocks], 1), stranger

    def plain(self) -> Plain:
        """The weights that `answer` reads, as they are and as they will be."""
        return Plain(
            self.service.weight.detach().numpy(), (_plain(self.source[0]), _plain(self.source[2])),
            _plain(self.diagonal), _plain(self.stranger), None if self.overlap is None else _plain(self.overlap),
        )  # fmt: skip

    @staticmethod
    def answer(plain: Plain, embedding: Float32, sketch: Float32 | None, codes: Int64) -> tuple[Float32, Float32]:
        """As `sources`, without gradients and in NumPy: of a few rows, torch's own overhead is what costs (five times
        as much)."""
        service = plain.service[codes[:, 0]] + plain.service[codes[:, 1]]
        hidden = np.maximum(_linear(plain.source[0], np.concatenate([embedding, service], 1)), 0)
        tower = _linear(plain.source[1], hidden) * (1 + _linear(plain.diagonal, service)) * np.float32(TOWER**-0.5)
        stranger = _linear(plain.stranger, tower)[:, 0]
        if plain.overlap is None or sketch is None:
            return tower, stranger
        weight = np.float32(GAIN) * _linear(plain.overlap, service)
        blocks = [sketch[:, a * signatures.WIDTH : (a + 1) * signatures.WIDTH] for a, _ in signatures.PAIRS]
        return np.concatenate([tower, *(b * weight[:, k : k + 1] for k, b in enumerate(blocks))], 1), stranger

    def targets(self, embedding: Tensor, sketch: Tensor | None) -> Tensor:
        """Target side f32[n, depth]."""
        tower: Tensor = self.target(embedding)
        if not self.overlaps or sketch is None:
            return tower
        return torch.cat([tower, *(_block(sketch, b) for _, b in signatures.PAIRS)], 1)


def _plain(layer: nn.Module) -> Linear:
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().numpy().T, layer.bias.detach().numpy()


def _linear(layer: Linear, x: Float32) -> Float32:
    out: Float32 = x @ layer[0]
    out += layer[1]
    return out


def _block(sketch: Tensor, k: int) -> Tensor:
    return sketch[:, k * signatures.WIDTH : (k + 1) * signatures.WIDTH]
