"""The encoder's forward pass on CSR against PyG's SAGEConv on COO."""

from collections.abc import Iterator

from tests.bench.rows import Row
from tests.models.sage_bench import bench_forward


def rows() -> Iterator[Row]:
    """100 k hosts, 1 M edges, 32→64→32."""
    times = bench_forward()
    yield Row(
        name="forward pass, 100 k hosts / 1 M edges, 32→64→32", value=times.ours_ms, unit="ms",
        reference="PyG SAGEConv on COO", reference_value=times.pyg_ms, bar="≥ 8 x", met=times.ratio >= 8,
    )  # fmt: skip
