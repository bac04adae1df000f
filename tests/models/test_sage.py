"""The layers against PyG, and the encoder against itself."""

import pytest
import torch
from torch_geometric.nn import SAGEConv

from flowsage.models.sage import (
    Csr,
    DirectedSageLayer,
    EncoderConfig,
    SageEncoder,
    SageLayer,
    Workspace,
    neighbour_mean,
)

from .sage_bench import forward_case


def graph(nodes: int, edges: int, seed: int) -> torch.Tensor:
    """Random directed edges, with loops and doubles, that leave the last fifth of the nodes alone."""
    return torch.randint(0, nodes * 4 // 5, (2, edges), generator=torch.Generator().manual_seed(seed))


def features(nodes: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(nodes, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 64), (64, 32), (7, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_a_layer_computes_what_sageconv_computes(inputs: int, outputs: int, seed: int) -> None:
    edge_index, x = graph(50, 200, seed), features(50, inputs, seed)
    conv = SAGEConv(inputs, outputs)
    layer = SageLayer(inputs, outputs)
    layer.load_state_dict(conv.state_dict())
    csr = Csr.from_edge_index(edge_index, 50)
    expected = conv(x, edge_index)
    torch.testing.assert_close(layer(x, csr), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.infer(x, csr, Workspace()), expected, atol=1e-5, rtol=0)


def test_weights_go_back_into_sageconv() -> None:
    layer, conv = SageLayer(5, 9), SAGEConv(5, 9)
    conv.load_state_dict(layer.state_dict())
    edge_index, x = graph(20, 60, 0), features(20, 5)
    torch.testing.assert_close(conv(x, edge_index), layer(x, Csr.from_edge_index(edge_index, 20)), atol=1e-5, rtol=0)


def test_gradients_equal_those_of_sageconv() -> None:
    edge_index = graph(40, 150, 3)
    conv, layer = SAGEConv(6, 8), SageLayer(6, 8)
    layer.load_state_dict(conv.state_dict())
    ours, theirs = features(40, 6).requires_grad_(), features(40, 6).requires_grad_()
    layer(ours, Csr.from_edge_index(edge_index, 40)).square().sum().backward()
    conv(theirs, edge_index).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.lin_l.weight.grad, conv.lin_l.weight.grad, atol=1e-3, rtol=1e-5)


def test_a_weighted_mean_is_the_dense_product() -> None:
    edge_index = graph(30, 90, 4)
    weight = torch.rand(90, generator=torch.Generator().manual_seed(5))
    weight[edge_index[1] == 3] = 0.0
    x = features(30, 4)
    dense = torch.zeros(30, 30).index_put_((edge_index[1], edge_index[0]), weight, accumulate=True)
    total = dense.sum(1, keepdim=True)
    expected = torch.where(total > 0, dense / total.clamp(min=1e-9), 0) @ x
    mean = neighbour_mean(x, Csr.from_edge_index(edge_index, 30, weight))
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=0)
    assert mean[3].abs().sum() == 0
    assert mean[-1].abs().sum() == 0


def test_a_graph_without_edges_leaves_bias_and_own_features() -> None:
    layer, x = SageLayer(3, 4), features(5, 3)
    csr = Csr.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), 5)
    torch.testing.assert_close(layer(x, csr), layer.lin_l.bias + layer.lin_r(x))
    torch.testing.assert_close(layer.infer(x, csr, Workspace()), layer.lin_l.bias + layer.lin_r(x))


def test_a_directed_layer_is_two_sageconvs_that_share_the_root() -> None:
    edge_index, x = graph(40, 160, 6), features(40, 6)
    layer = DirectedSageLayer(6, 5)
    into, out_of = SAGEConv(6, 5, root_weight=False, bias=False), SAGEConv(6, 5, root_weight=False, bias=False)
    into.lin_l.weight, out_of.lin_l.weight = layer.into.weight, layer.out_of.weight
    expected = layer.root(x) + into(x, edge_index) + out_of(x, edge_index.flip(0))
    ways = Csr.from_edge_index(edge_index, 40), Csr.from_edge_index(edge_index.flip(0), 40)
    torch.testing.assert_close(layer(x, x, *ways), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.infer(x, *ways, Workspace()), expected, atol=1e-5, rtol=0)


def test_the_fast_path_encodes_as_training_does_and_repeats_itself_bit_for_bit() -> None:
    edge_index, x = graph(60, 300, 7), features(60, 10)
    ways = Csr.from_edge_index(edge_index, 60), Csr.from_edge_index(edge_index.flip(0), 60)
    encoder = SageEncoder(EncoderConfig(features=10))
    slow = encoder(x, *ways)
    fast = encoder.encode(x, *ways)
    assert fast.shape == (60, 144)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder.encode(x, *ways), fast)


def test_a_training_step_gives_identical_bits_twice() -> None:
    edge_index, x = graph(400, 5_000, 8), features(400, 10)

    def gradients() -> list[torch.Tensor]:
        ways = Csr.from_edge_index(edge_index, 400), Csr.from_edge_index(edge_index.flip(0), 400)
        encoder = SageEncoder(EncoderConfig(features=10, seed=4))
        encoder(x, *ways).square().mean().backward()
        return [p.grad for p in encoder.parameters() if p.grad is not None]

    first, second = gradients(), gradients()
    assert len(first) > 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_initial_weights_depend_on_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    one = SageEncoder(EncoderConfig(features=4, seed=9))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = SageEncoder(EncoderConfig(features=4, seed=9))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = SageEncoder(EncoderConfig(features=4, seed=10))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_few_live_rows_among_known_embeddings_get_what_the_whole_graph_would_give_them() -> None:
    edge_index, x = graph(50, 250, 9), features(50, 6)
    into, out_of = Csr.from_edge_index(edge_index, 50), Csr.from_edge_index(edge_index.flip(0), 50)
    encoder = SageEncoder(EncoderConfig(features=6))
    whole = encoder.encode(x, into, out_of)
    rows = torch.tensor([4, 17, 30])

    def of_rows(csr: Csr) -> Csr:
        parts = [csr.index[csr.indptr[i] : csr.indptr[i + 1]] for i in rows]
        indptr = torch.cumsum(torch.tensor([0, *[len(p) for p in parts]]), 0)
        return Csr(indptr, torch.cat(parts), 50)

    few = encoder.refresh(x[rows], rows, whole, of_rows(into), of_rows(out_of))
    torch.testing.assert_close(few, whole[rows], atol=1e-5, rtol=1e-5)


def test_both_forward_passes_of_the_benchmark_agree() -> None:
    case = forward_case(2_000, 20_000)
    torch.testing.assert_close(case.ours(), case.pyg(), atol=1e-4, rtol=1e-4)
