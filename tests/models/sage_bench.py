"""One forward pass of two mean-aggregating layers, ours on CSR and PyG's on COO: for `make bench` and the tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch_geometric.nn import SAGEConv

from flowsage.models.sage import Csr, SageLayer, Workspace


@dataclass(frozen=True)
class ForwardCase:
    """A random directed graph with the same two layers twice."""

    ours: Callable[[], torch.Tensor]
    pyg: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class ForwardTimes:
    """Median milliseconds of a forward pass."""

    ours_ms: float
    pyg_ms: float

    @property
    def ratio(self) -> float:
        return self.pyg_ms / self.ours_ms


def forward_case(
    hosts: int = 100_000, edges: int = 1_000_000, widths: tuple[int, int, int] = (32, 64, 32), seed: int = 0
) -> ForwardCase:
    """Both ways to compute layer 2 (relu(layer 1 (x))) on one graph, with one set of weights."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(0, hosts, (2, edges), generator=generator)
    x = torch.randn(hosts, widths[0], generator=generator)
    csr = Csr.from_edge_index(edge_index, hosts)
    layers = [SageLayer(widths[0], widths[1]), SageLayer(widths[1], widths[2])]
    convs = [SAGEConv(widths[0], widths[1]), SAGEConv(widths[1], widths[2])]
    for layer, conv in zip(layers, convs, strict=True):
        conv.load_state_dict(layer.state_dict())
    space = Workspace()

    def ours() -> torch.Tensor:
        hidden = layers[0].infer(x, csr, space, "hidden").relu_()
        return layers[1].infer(hidden, csr, space, "out")

    @torch.no_grad()
    def pyg() -> torch.Tensor:
        out: torch.Tensor = convs[1](convs[0](x, edge_index).relu_(), edge_index)
        return out

    return ForwardCase(ours, pyg)


def bench_forward(hosts: int = 100_000, edges: int = 1_000_000, repeats: int = 7) -> ForwardTimes:
    """Times of both in one run, alternating, at the number of threads that torch has now."""
    case = forward_case(hosts, edges)
    times: dict[str, list[float]] = {"ours": [], "pyg": []}
    for round_ in range(repeats + 2):
        for name, run in (("ours", case.ours), ("pyg", case.pyg)):
            start = time.perf_counter()
            run()
            if round_ >= 2:  # the first two warm caches and buffers
                times[name].append((time.perf_counter() - start) * 1e3)
    middle = repeats // 2
    return ForwardTimes(sorted(times["ours"])[middle], sorted(times["pyg"])[middle])


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(bench_forward())
