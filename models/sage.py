"""GraphSAGE layers that run on CSR, and the encoder of the meeting prior built of them.

`SageLayer` computes what `torch_geometric.nn.SAGEConv` computes and has its parameters, so weights go either way by
`load_state_dict`. It differs in how: the mean over neighbours is one sparse product on CSR arrays
(`torch.nn.functional.embedding_bag`, whose offsets are the CSR row pointers), taken on whichever side of the linear map
is narrower, where a COO path materialises one row an edge and scatters it.

Source: Hamilton, Ying, Leskovec: Inductive Representation Learning on Large Graphs, NeurIPS 2017 (mean aggregator); Xu
et al.: Representation Learning on Graphs with Jumping Knowledge Networks, ICML 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numba
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURE_EPS: Final = 1e-12

THREADED: Final = 16_384
"""Rows from which torch's threads are worth their while; with fewer they wait for each other, the longer the busier the
machine (measured: a step of 20 ms took 100)."""


@contextmanager
def threads_for(rows: int) -> Iterator[None]:
    """One thread for torch where at most `rows` rows are worked on at once and these are too few for more."""
    threads = torch.get_num_threads()
    if rows >= THREADED or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a `SageEncoder`. `layers` 0 leaves the role MLP alone: no message passing."""

    features: int
    width: int = 48
    layers: int = 2
    seed: int = 0

    @property
    def embedding(self) -> int:
        """Width d of an embedding: jumping knowledge keeps the output of every layer."""
        return self.width * (self.layers + 1)


@numba.njit(cache=True, nogil=True, inline="always")
def inverse(total):  # type: ignore[no-untyped-def]
    """`Csr.scale` of a row whose weights add up to f32 `total`."""
    return np.float32(1) / total if total > np.float32(FEATURE_EPS) else np.float32(0)


class Csr:
    """Weighted neighbours of each row, as a mean: row i averages the columns `index[indptr[i]:indptr[i+1]]`.

    indptr i32[rows+1], index i32[edges] (into `columns` rows of a table), weight f32[edges] or None for an even mean.
    Weights must not be negative; a row without neighbours, or whose weights are all 0, has mean 0. Who knows `scale`
    f32[rows] of the weights already may say it.
    """

    def __init__(
        self, indptr: Tensor, index: Tensor, columns: int, weight: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        self.indptr = indptr.to(torch.int32).contiguous()
        self.index = index.to(torch.int32).contiguous()
        self.columns = columns
        self.weight = None if weight is None else weight.to(torch.float32).contiguous()
        self._scale = None if scale is None else scale.unsqueeze(1)
        self._transposed: Csr | None = None

    @classmethod
    def from_edge_index(cls, edge_index: Tensor, nodes: int, weight: Tensor | None = None) -> Csr:
        """Neighbours of each target of edge_index i64[2, e] (source, target), as PyG's default flow aggregates them."""
        source, target = edge_index
        order = torch.argsort(target, stable=True)
        indptr = torch.zeros(nodes + 1, dtype=torch.int32)
        indptr[1:] = torch.cumsum(torch.bincount(target, minlength=nodes), 0)
        return cls(indptr, source[order], nodes, None if weight is None else weight[order])

    def to(self, device: torch.device) -> Csr:
        """The same where `device` is, with all that a gradient needs made here first."""
        parts = (None if t is None else t.to(device) for t in (self.indptr, self.index, self.weight, self.scale))
        indptr, index, weight, scale = parts
        assert indptr is not None
        assert index is not None
        moved = Csr(indptr, index, self.columns, weight)
        back = self.transposed
        moved._scale, moved._transposed = scale, Csr(
            back.indptr.to(device), back.index.to(device), back.columns,
            None if back.weight is None else back.weight.to(device),
        )  # fmt: skip
        return moved

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def scale(self) -> Tensor:
        """One over the sum of weights of each row, [rows, 1]; 0 where that sum is 0."""
        if self._scale is None:
            if self.weight is None:
                total = (self.indptr[1:] - self.indptr[:-1]).to(torch.float32)
            else:
                total = functional.embedding_bag(
                    self._positions(), self.weight.unsqueeze(1), self.indptr, mode="sum", include_last_offset=True
                ).squeeze(1)
            self._scale = torch.where(total > FEATURE_EPS, 1 / total.clamp(min=FEATURE_EPS), 0).unsqueeze(1)
        return self._scale

    def _positions(self) -> Tensor:
        return torch.arange(len(self.index), dtype=torch.int32)

    @property
    def transposed(self) -> Csr:
        """The same edges by column: what carries a gradient back (deterministic, unlike a scatter)."""
        if self._transposed is None:
            counts = (self.indptr[1:] - self.indptr[:-1]).to(torch.int64)
            row = torch.repeat_interleave(torch.arange(self.rows, dtype=torch.int32), counts)
            order = torch.argsort(self.index, stable=True)
            indptr = torch.zeros(self.columns + 1, dtype=torch.int32)
            indptr[1:] = torch.cumsum(torch.bincount(self.index, minlength=self.columns), 0)
            weight = None if self.weight is None else self.weight[order]
            self._transposed = Csr(indptr, row[order], self.rows, weight)
        return self._transposed

    def sum(self, table: Tensor) -> Tensor:
        """Weighted sum of the neighbours' rows of `table` [columns, d] -> [rows, d]."""
        if not len(self.index):
            return table.new_zeros((self.rows, table.shape[1]))
        return functional.embedding_bag(
            self.index, table, self.indptr, mode="sum", per_sample_weights=self.weight, include_last_offset=True
        )


class _Mean(torch.autograd.Function):
    """Mean over CSR rows whose backward pass is the same product on the transposed graph."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, csr: Csr) -> Tensor:
        ctx.csr = csr
        return csr.sum(table.contiguous()).mul_(csr.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        csr: Csr = ctx.csr
        return csr.transposed.sum((grads[0] * csr.scale).contiguous()), None


def neighbour_mean(table: Tensor, csr: Csr) -> Tensor:
    """Mean of each row's neighbours, [columns, d] -> [rows, d]; differentiable in `table`."""
    if not torch.is_grad_enabled():
        return csr.sum(table.contiguous()).mul_(csr.scale)
    mean: Tensor = _Mean.apply(table, csr)  # type: ignore[no-untyped-call]
    return mean


class Workspace:
    """Named buffers that are kept between calls, so that a forward pass allocates nothing once it is warm."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised f32[rows, columns] that is valid until `name` is taken again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = torch.empty(rows * columns)
            self._buffers[name] = buffer
        return buffer[: rows * columns].view(rows, columns)


def _mean_into(out: Tensor, table: Tensor, csr: Csr, linear: nn.Linear, space: Workspace) -> Tensor:
    """Add `linear.weight` times the neighbours' mean to `out` [rows, o], aggregating on the narrower side."""
    if linear.out_features < linear.in_features:
        projected = space.take("projected", len(table), linear.out_features)
        torch.mm(table, linear.weight.t(), out=projected)
        return out.addcmul_(csr.sum(projected), csr.scale)
    return out.addmm_(csr.sum(table).mul_(csr.scale), linear.weight.t())


class SageLayer(nn.Module):
    """h'_i = W_l · mean_{j in N(i)} h_j + b + W_r · h_i.

    Parameters are named and shaped as in `torch_geometric.nn.SAGEConv(inputs, outputs)`: lin_l.weight [outputs,
    inputs], lin_l.bias [outputs], lin_r.weight [outputs, inputs].
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin_l = nn.Linear(inputs, outputs)
        self.lin_r = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, csr: Csr) -> Tensor:
        """[n, inputs] -> [n, outputs], differentiable."""
        if self.lin_l.out_features < self.lin_l.in_features:
            mean = neighbour_mean(x @ self.lin_l.weight.t(), csr) + self.lin_l.bias
        else:
            mean = self.lin_l(neighbour_mean(x, csr))
        out: Tensor = mean + self.lin_r(x)
        return out

    @torch.no_grad()
    def infer(self, x: Tensor, csr: Csr, space: Workspace, name: str = "out") -> Tensor:
        """As `forward`, without gradients, into the workspace's buffer `name`."""
        out = space.take(name, len(x), self.lin_r.out_features)
        torch.addmm(self.lin_l.bias, x, self.lin_r.weight.t(), out=out)
        return _mean_into(out, x, csr, self.lin_l, space)


class DirectedSageLayer(nn.Module):
    """h'_i = W_root · h_i + W_in · mean of those who reach i + W_out · mean of those whom i reaches + b."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.root = nn.Linear(inputs, outputs)
        self.into = nn.Linear(inputs, outputs, bias=False)
        self.out_of = nn.Linear(inputs, outputs, bias=False)

    def forward(self, root: Tensor, table: Tensor, into: Csr, out_of: Csr) -> Tensor:
        """Rows [r, inputs] and the table [n, inputs] of their neighbours -> [r, outputs], differentiable."""
        out: Tensor = (
            self.root(root) + self.into(neighbour_mean(table, into)) + self.out_of(neighbour_mean(table, out_of))
        )
        return out

    @torch.no_grad()
    def infer(self, table: Tensor, into: Csr, out_of: Csr, space: Workspace, name: str = "out") -> Tensor:
        """As `forward` for all rows of the table, without gradients, into the workspace's buffer `name`."""
        out = space.take(name, len(table), self.root.out_features)
        torch.addmm(self.root.bias, table, self.root.weight.t(), out=out)
        _mean_into(out, table, into, self.into, space)
        return _mean_into(out, table, out_of, self.out_of, space)


class SageEncoder(nn.Module):
    """Role MLP, then directed GraphSAGE layers with LayerNorm; embedding = [h0, h1, …] (jumping knowledge).

    Initialisation depends on `config.seed` alone: torch's global generator is neither read nor moved.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
            self.role = nn.Sequential(
                nn.Linear(config.features, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width)
            )
            self.layers = nn.ModuleList(DirectedSageLayer(width, width) for _ in range(config.layers))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.layers))
        seed_parameters(self, config.seed)
        self._space = Workspace()

    def forward(self, x: Tensor, into: Csr, out_of: Csr) -> Tensor:
        """Features [n, features] and neighbours both ways -> embeddings [n, d], differentiable."""
        return self.refresh(x, torch.arange(len(x)), None, into, out_of)

    def refresh(self, x: Tensor, rows: Tensor, known: Tensor | None, into: Csr, out_of: Csr) -> Tensor:
        """Embeddings [r, d] of `rows` i64[r] with features x [r, features], differentiable.

        `known` [n, d]: the embeddings that everybody else keeps meanwhile (None: rows are all there is, in order).
        `into` and `out_of` have r rows and n columns. Neighbours among `rows` pass gradients on, the others speak from
        `known`: with all rows this is full-batch training, with few the historical embeddings of Fey et al.,
        GNNAutoScale, ICML 2021.
        """
        h = self.role(x)
        hidden = [h]
        for k, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            width = self.config.width
            table = h if known is None else known[:, k * width : (k + 1) * width].index_copy(0, rows, h)
            h = torch.relu(norm(layer(h, table, into, out_of)))
            hidden.append(h)
        return torch.cat(hidden, 1)

    @torch.no_grad()
    def encode(self, x: Tensor, into: Csr, out_of: Csr, out: Tensor | None = None) -> Tensor:
        """Embeddings [n, d] of all rows on the fast path (no gradients, buffers reused). `out`: where to put them."""
        width = self.config.width
        if out is None:
            out = torch.empty(len(x), self.config.embedding)
        h: Tensor = self.role(x)
        out[:, :width] = h
        for k, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            assert isinstance(layer, DirectedSageLayer)
            h = norm(layer.infer(h, into, out_of, self._space)).relu_()
            out[:, (k + 1) * width : (k + 2) * width] = h
        return out

    def let_go(self) -> None:
        """Give back the buffers of `encode`."""
        self._space = Workspace()


def seed_parameters(module: nn.Module, seed: int) -> None:
    """Glorot-uniform weights, zero biases, unit norms, normal embeddings, drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear):
                bound = (6 / (part.in_features + part.out_features)) ** 0.5
                part.weight.uniform_(-bound, bound, generator=generator)
                if part.bias is not None:
                    part.bias.zero_()
            elif isinstance(part, nn.Embedding):
                part.weight.normal_(0, 0.3, generator=generator)
