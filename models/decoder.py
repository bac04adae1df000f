"""From embeddings to f(s, t, svc): how much likelier a meeting is than popularity says."""

from __future__ import annotations

from typing import Final, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn

from flowsage.models import signatures
from flowsage.models.columns import Float32, Int32, Int64
from flowsage.models.keys import mix
from flowsage.models.sage import seed_parameters

TOWER: Final = 32
SERVICE: Final = 16
_CODES: Final = 512
EXPECTED: Final = 0.4
"""Coefficient that the overlaps of second neighbours begin with: those who share peers meet, on most networks."""

GAIN: Final = 8.0
"""Overlaps are cosines, most of them small: a coefficient has to become large, and Adam's steps are of one size."""


_OF_SOURCE: Final = tuple(a for a, _ in signatures.PAIRS)
_OF_TARGET: Final = tuple(b for _, b in signatures.PAIRS)
_PLACES: Final = tuple(_OF_TARGET.index(b) if b in _OF_TARGET else -1 for b in range(signatures.BLOCKS))
"""Where in the target side, behind its tower, each block of a sketch is: what is there need not be kept twice."""
_REST: Final = _PLACES.index(-1)


@numba.njit(cache=True, nogil=True, inline="always")
def service_row(service):  # type: ignore[no-untyped-def]
    """Two hashed rows of the service table for a service code."""
    key = mix(0, service)
    return np.int64(key & np.uint64(_CODES - 1)), np.int64((key >> np.uint64(20)) & np.uint64(_CODES - 1))


@numba.njit(cache=True, nogil=True)
def _service_rows(service, rows):  # type: ignore[no-untyped-def]
    for i in range(len(service)):
        rows[i, 0], rows[i, 1] = service_row(service[i])


def service_codes(service: Int32) -> Tensor:
    """Two hashed rows i64[n, 2] of the service table for each service code."""
    rows = np.empty((len(service), 2), np.int64)
    _service_rows(service, rows)
    return torch.from_numpy(rows)


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
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
            self.service = nn.EmbeddingBag(_CODES, SERVICE, mode="sum")
            self.source = nn.Sequential(nn.Linear(embedding + SERVICE, 64), nn.ReLU(), nn.Linear(64, TOWER))
            self.target = nn.Sequential(nn.Linear(embedding, 64), nn.ReLU(), nn.Linear(64, TOWER))
            self.diagonal = nn.Linear(SERVICE, TOWER)
            self.overlap = nn.Linear(SERVICE, len(signatures.PAIRS)) if overlaps else None
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
    def answer(
        plain: Plain, rows: Int64, service: Int32, embedding: Float32, peers: Float32, rest: Float32 | None
    ) -> tuple[Float32, Float32]:
        """As `sources`, without gradients and without torch, whose own overhead is what costs where rows are few (five
        times as much): of `rows` i64[n] of the tables embedding f32[h, d], peers and rest (`unsketched`), and service
        codes i32[n]."""
        n, d = len(rows), embedding.shape[1]
        x, known = np.empty((n, d + SERVICE), np.float32), np.empty((n, SERVICE), np.float32)
        _inputs(rows, service, embedding, plain.service, x, known)
        hidden = _linear(plain.source[0], x)
        np.maximum(hidden, 0, out=hidden)
        tower = _linear(plain.source[1], hidden)
        _scale(tower, _linear(plain.diagonal, known), np.float32(TOWER**-0.5))
        stranger = _linear(plain.stranger, tower)[:, 0]
        if plain.overlap is None or rest is None:
            return tower, stranger
        out = np.empty((n, TOWER + len(signatures.PAIRS) * signatures.WIDTH), np.float32)
        _outputs(rows, peers, rest, tower, _linear(plain.overlap, known), np.float32(GAIN), out)
        return out, stranger

    def targets(self, embedding: Tensor, sketch: Tensor | None) -> Tensor:
        """Target side f32[n, depth]."""
        tower: Tensor = self.target(embedding)
        if not self.overlaps or sketch is None:
            return tower
        return torch.cat([tower, *(_block(sketch, b) for _, b in signatures.PAIRS)], 1)


@numba.njit(cache=True, nogil=True)
def _inputs(rows, service, embedding, table, x, known):  # type: ignore[no-untyped-def]
    """Vectors of services to known f32[n, SERVICE], and what the source tower sees to x f32[n, d + SERVICE]."""
    d = embedding.shape[1]
    for i in range(len(rows)):
        first, second = service_row(service[i])
        for j in range(d):
            x[i, j] = embedding[rows[i], j]
        for j in range(SERVICE):
            known[i, j] = x[i, d + j] = table[first, j] + table[second, j]


@numba.njit(cache=True, nogil=True)
def _scale(tower, diagonal, factor):  # type: ignore[no-untyped-def]
    for i in range(tower.shape[0]):
        for j in range(tower.shape[1]):
            tower[i, j] = tower[i, j] * (np.float32(1) + diagonal[i, j]) * factor


@numba.njit(cache=True, nogil=True)
def _outputs(rows, peers, rest, tower, weight, gain, out):  # type: ignore[no-untyped-def]
    """Towers, and behind them the blocks of sketches that overlaps are made of, weighted by service."""
    for i in range(len(rows)):
        for j in range(TOWER):
            out[i, j] = tower[i, j]
        for k in range(len(_OF_SOURCE)):
            scale, begin = gain * weight[i, k], TOWER + k * signatures.WIDTH
            place = _PLACES[_OF_SOURCE[k]]
            for j in range(signatures.WIDTH):
                if place >= 0:
                    out[i, begin + j] = peers[rows[i], TOWER + place * signatures.WIDTH + j] * scale
                else:
                    out[i, begin + j] = rest[rows[i], j] * scale


def _plain(layer: nn.Module) -> Linear:
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().numpy().T, layer.bias.detach().numpy()


def _linear(layer: Linear, x: Float32) -> Float32:
    out: Float32 = x @ layer[0]
    out += layer[1]
    return out


def unsketched(sketch: Tensor) -> Tensor:
    """The part f32[n, WIDTH] of sketches that is not in `Decoder.targets` of them: `sketched` puts it back."""
    return _block(sketch, _REST).contiguous()


def sketched(own: Tensor, peers: Tensor, rest: Tensor) -> Tensor:
    """Sketches f32[n, BLOCKS · WIDTH] of hosts with these signatures, target sides, and what these leave out."""
    overlaps = peers[:, TOWER:]
    others = (rest if place < 0 else _block(overlaps, place) for place in _PLACES[1:])
    return torch.cat([own, *others], 1)


def _block(sketch: Tensor, k: int) -> Tensor:
    return sketch[:, k * signatures.WIDTH : (k + 1) * signatures.WIDTH]
