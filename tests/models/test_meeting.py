"""The prior of first meetings: what it says, how it learns, and that its work is bounded."""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

from flowsage.graph.build import Contacts
from flowsage.graph.flows import HostTable, hash_names
from flowsage.models import signatures
from flowsage.models.decoder import service_codes
from flowsage.models.meeting import MeetingPrior
from flowsage.models.meeting_config import MeetingConfig
from flowsage.models.memory import MeetingMemory
from flowsage.models.neighbours import FROM, TO, NeighbourSlots
from flowsage.models.network import Network, popularity_of
from flowsage.models.sage import Csr

from .enterprise import CREDENTIALS, HTTPS, SMB, Enterprise, enterprise, make_contacts


def eager(**changes: Any) -> MeetingConfig:
    """A configuration that is ready soon."""
    return MeetingConfig(**{"ready_meetings": 20.0, "ready_windows": 5, "ready_steps": 1} | changes)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(prior: MeetingPrior, world: Enterprise, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Tails f64[c] of the windows begin:end, learning each after it was scored."""
    tails = np.full(len(world.src), np.nan)
    for part in world.each_window()[begin:end]:
        contacts, first = world.contacts(part.start, part.stop), world.first[part]
        tails[part] = prior.tail(contacts, first)
        prior.learn(contacts, first)
    return tails


def table(*names: str) -> HostTable:
    array = pa.array(names)
    return HostTable(array, hash_names(array))


def window(hosts: HostTable, index: int, *meetings: tuple[int, int, int]) -> tuple[Contacts, np.ndarray]:
    """Contacts of one window, all of them first meetings."""
    src, dst, service = np.array(meetings, np.int64).reshape(-1, 3).T
    contacts = make_contacts(hosts, np.full(len(src), index), src, dst, service)
    return contacts, np.ones(len(src), np.bool_)


def small(seed: int = 0) -> Enterprise:
    return enterprise(seed, departments=3, people=12, windows=60)


def average_precision(world: Enterprise, tails: np.ndarray, kind: int) -> float:
    """Of one kind of attack against all benign first meetings, in the second half."""
    late = (world.window >= world.windows // 2) & world.first & ~np.isnan(tails)
    late &= (world.kind == 0) | (world.kind == kind)
    return float(average_precision_score(world.kind[late] == kind, -tails[late]))


def test_the_graph_finds_another_departments_credentials_where_popularity_is_blind() -> None:
    world = enterprise(0, windows=600)
    popular = average_precision(world, run(MeetingPrior(MeetingConfig(graph=False), world.inside), world), CREDENTIALS)
    graph = average_precision(world, run(MeetingPrior(inside=world.inside), world), CREDENTIALS)
    assert graph > 1.25 * popular, (graph, popular)  # measured: .059 and .035


def test_it_says_why_it_is_not_ready_and_gives_no_number_until_then() -> None:
    prior, hosts = MeetingPrior(), table("a", "b", "c")
    contacts, first = window(hosts, 0, (0, 1, SMB), (2, 1, SMB))
    assert np.isnan(prior.tail(contacts, first)).all()
    assert prior.waiting is not None
    assert "needs 200" in prior.waiting
    prior.learn(contacts, first)
    assert prior.waiting.startswith("has learnt from 2 first meetings")
    assert prior.evidence(int(hosts.hash[0]), int(hosts.hash[2]), SMB) is None


def test_only_first_meetings_are_asked_about() -> None:
    world = small()
    prior = MeetingPrior(eager())
    tails = run(prior, world)
    assert prior.waiting is None
    late = world.window > 20
    assert np.isnan(tails[~world.first]).all()
    assert np.isfinite(tails[world.first & late]).all()
    asked = tails[np.isfinite(tails)]
    assert asked.min() > 0
    assert asked.max() <= 1


def test_asking_changes_nothing() -> None:
    world = small()
    quiet, asked = MeetingPrior(eager()), MeetingPrior(eager())
    for part in world.each_window():
        contacts, first = world.contacts(part.start, part.stop), world.first[part]
        middle = (part.start + part.stop) // 2
        asked.tail(world.contacts(part.start, middle), world.first[part.start : middle])
        np.testing.assert_array_equal(asked.tail(contacts, first), quiet.tail(contacts, first))
        quiet.learn(contacts, first)
        asked.learn(contacts, first)


@pytest.mark.parametrize("exact_hosts", [2_500, 50])
def test_two_runs_agree_bit_for_bit_and_a_restored_one_goes_on_as_if_nothing_had_happened(exact_hosts: int) -> None:
    world, config = small(), eager(exact_hosts=exact_hosts, step_meetings=4)
    torch.manual_seed(1)
    whole = MeetingPrior(config)
    before = run(whole, world, 0, 40)
    state = whole.state()
    after = run(whole, world, 40)
    assert whole.network.steps > 10
    torch.manual_seed(2)
    again = MeetingPrior(config)
    np.testing.assert_array_equal(run(again, world, 0, 40), before)
    again.state()
    np.testing.assert_array_equal(run(again, world, 40), after)
    restored = MeetingPrior(config)
    restored.restore(state)
    np.testing.assert_array_equal(run(restored, world, 40), after)
    assert all(isinstance(value, np.ndarray) for value in state.values())


def test_a_sample_of_candidates_answers_much_as_all_of_them_do() -> None:
    world = small()
    exact = MeetingPrior(eager(graph=False))
    sampled = MeetingPrior(eager(graph=False, exact_hosts=50))
    full, part = run(exact, world), run(sampled, world)
    asked = np.isfinite(full)
    assert asked.sum() > 200
    assert np.abs(full - part)[asked].mean() < 0.02
    assert np.corrcoef(full[asked], part[asked])[0, 1] > 0.98


def test_a_popular_target_is_plausible_and_one_that_nobody_reaches_is_not() -> None:
    hosts = table(*[f"h{i}" for i in range(60)])
    prior = MeetingPrior(eager(graph=False))
    for i in range(40):
        prior.learn(*window(hosts, i, (i, 58, SMB), (i, 59, HTTPS)))
    contacts, first = window(hosts, 40, (41, 58, SMB), (42, 3, SMB), (43, 59, SMB))
    popular, nobody, elsewhere = prior.tail(contacts, first)
    assert popular > 0.5
    assert nobody < 0.2
    assert nobody < elsewhere < popular


@pytest.mark.parametrize("exact_hosts", [2_500, 40])
def test_questions_are_asked_with_the_embedding_of_their_own_source(exact_hosts: int) -> None:
    world = small()
    prior = MeetingPrior(eager(exact_hosts=exact_hosts))
    run(prior, world)
    if exact_hosts == 2_500:
        prior.embed()
    memory, network, slots = prior.memory, prior.network, np.arange(20, dtype=np.int32)
    graph, index = memory.graph(np.arange(len(memory.hosts), dtype=np.int32)), torch.arange(len(memory.hosts))
    embedding = network.encoder(graph.x, graph.into, graph.out_of)
    sketch = signatures.sketch(signatures.signs(memory.hosts.columns["hash"][index]), index, None, *graph.sketched)
    codes = np.full(20, SMB, np.int32)
    expected, stranger = network.decoder.sources(embedding[:20], sketch[:20], service_codes(codes))
    towers, f_stranger = network.sources(prior._current(), slots, codes)
    peers = network.decoder.targets(embedding, sketch).detach()
    # Made anew they are exact; as they are kept, they are as old as the last time that it was each host's turn.
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3} if exact_hosts == 2_500 else {"rtol": 0, "atol": 0.5}
    np.testing.assert_allclose(towers, expected.detach(), **close)
    np.testing.assert_allclose(f_stranger, stranger.detach(), **close)
    np.testing.assert_allclose(prior._current().peers[1 : len(peers) + 1], peers, **close)


def test_evidence_counts_the_candidates_that_are_less_likely() -> None:
    hosts = table(*[f"h{i}" for i in range(60)])
    prior = MeetingPrior(eager(graph=False))
    for i in range(40):
        prior.learn(*window(hosts, i, (i, 58, SMB)))
    seen = hosts.hash.tolist()
    usual, odd = prior.evidence(seen[41], seen[58], SMB), prior.evidence(seen[41], seen[20], SMB)
    assert usual is not None
    assert odd is not None
    assert usual.rank == 1
    assert usual.less_likely == usual.candidates - 1
    assert usual.p > 0.5
    assert usual.p == pytest.approx(usual.popular)
    assert usual.service == "tcp/445"
    assert odd.rank > 1
    assert odd.tail < usual.tail
    never = prior.evidence(seen[41], 12345, SMB)
    assert never is not None
    assert never.never_seen


def test_what_is_implausible_is_hardly_learnt() -> None:
    hosts = table(*[f"h{i}" for i in range(700)])
    prior = MeetingPrior(eager(graph=False))
    for i in range(60):
        prior.learn(*window(hosts, i, *[(10 * i + k, 699, SMB) for k in range(10)]))
    ungated = sum((j + 2) ** -0.5 for j in range(50))  # host 0 knows one target already
    learnt = prior.learnt
    prior.learn(*window(hosts, 60, *[(0, k, SMB) for k in range(1, 51)]))
    assert prior.learnt - learnt < 0.7 * ungated
    learnt = prior.learnt
    prior.learn(*window(hosts, 61, (650, 699, SMB)))
    assert prior.learnt - learnt == pytest.approx(1)


def test_training_takes_its_own_meetings_out_of_popularity() -> None:
    hosts = table(*[f"h{i}" for i in range(40)])
    memory = MeetingMemory(slots=8, far=4, replayed=1 << 10, max_hosts=1000, seed=0, inside=None)
    prior = MeetingPrior(MeetingConfig(graph=False))
    prior.memory = memory
    for i in range(30):
        prior.learn(*window(hosts, i, (i, 39, SMB)))
    batch = memory.batch(np.arange(30))
    target = memory.hosts.find(hosts.hash[39:])
    q = popularity_of(memory, batch, target.astype(np.int32))
    others = q[~batch.fresh]
    assert len(others) == 29
    # With every meeting taken out nothing is known of the service: the target is one host of forty.
    uniform = (1 - q[0, -1]) / len(memory.hosts)
    np.testing.assert_allclose(others[:, -2], uniform, rtol=1e-4)
    graph = memory.graph(np.arange(len(memory.hosts), dtype=np.int32), without=batch)
    assert len(graph.into.index) == 0
    assert float(graph.x[:, :64].abs().max()) < 1e-5


def test_in_training_nobody_meets_whom_he_knew_on_that_service_at_that_moment() -> None:
    rng, hosts = np.random.default_rng(0), table(*[f"h{i}" for i in range(12)])
    prior = MeetingPrior(MeetingConfig(graph=False, replayed=24))  # a ring that forgets half of it
    met: list[tuple[int, int, int]] = []
    for i in range(30):
        ends, services = rng.integers(0, 12, (2, 4)), rng.choice([80, SMB], 4)
        pairs = {(int(s), int(t), int(v)) for s, t, v in zip(*ends, services, strict=True)}
        fresh = sorted(m for m in pairs if m[0] != m[1] and m not in met)
        if fresh:
            prior.learn(*window(hosts, i, *fresh))
            met += fresh
    memory = prior.memory
    assert memory.replay.newest == len(met) - 1 > 2 * 24
    slots = memory.hosts.find(hosts.hash)
    batch, ring = memory.batch(np.arange(24)), memory.replay.ring
    q = popularity_of(memory, batch, slots)
    order = [n % 24 for n in range(memory.replay.newest - 23, memory.replay.newest + 1)]  # oldest first
    for i in range(len(batch)):
        own = (batch.source[i], batch.target[i], batch.service[i])
        at = next(k for k, n in enumerate(order) if tuple(ring[n]) == own)
        before = [ring[n] for n in order[:at]]
        known = {int(t) for s, t, v in before if (s, v) == (own[0], own[2])} | {int(own[0]), int(own[1])}
        assert {int(s) for s, x in zip(slots, q[i], strict=False) if x == 0} == known


def test_embeddings_are_inductive_and_unknown_hosts_have_none() -> None:
    world = small()
    prior = MeetingPrior(eager())
    run(prior, world)
    found = prior.embeddings(np.append(world.hosts.hash[:5], np.uint64(99)))
    assert found.shape == (6, 144)
    assert np.isfinite(found[:5]).all()
    assert np.isnan(found[5]).all()
    edge_index = torch.tensor([[0, 1, 2], [3, 3, 4]])
    into, out_of = Csr.from_edge_index(edge_index, 6), Csr.from_edge_index(edge_index.flip(0), 6)
    inside = prior.encode(np.append(world.hosts.hash[:5], np.uint64(99)), into, out_of)
    assert np.isfinite(inside).all()
    np.testing.assert_allclose(inside[:5, :48], found[:5, :48], rtol=1e-4, atol=1e-5)


def test_whoever_asks_early_for_embeddings_gets_none_and_changes_nothing() -> None:
    world = small()
    prior, unasked = MeetingPrior(eager()), MeetingPrior(eager())
    spoke = 0
    for part in world.each_window():
        contacts, first = world.contacts(part.start, part.stop), world.first[part]
        for each in (prior, unasked):
            each.learn(contacts, first)
        found = prior.embeddings(contacts.hosts.hash[np.unique(np.concatenate([contacts.src, contacts.dst]))])
        assert (np.isfinite(found) == prior.speaks).all()
        spoke += prior.speaks
        asked = prior.tail(contacts, first), unasked.tail(contacts, first)
        assert np.array_equal(*asked, equal_nan=True)
    assert 1 < spoke < world.windows


def test_neighbour_slots_keep_a_fair_sample_of_the_past() -> None:
    slots, inside = NeighbourSlots(16, 4, seed=3), np.ones(1001, np.bool_)
    slots.ensure(1001)
    target = np.arange(1, 1001, dtype=np.int32)
    added = slots.meet(np.zeros(1000, np.int32), target, np.ones(1000, np.float32), inside, tick=0)
    assert (added == 1).all()
    _, kept, weight = slots.csr(TO, np.zeros(1, np.int32))
    assert len(kept) == 16
    assert (weight == 1).all()
    assert 250 < kept.mean() < 750
    _, back, _ = slots.csr(FROM, np.array([7], np.int32))
    assert back.tolist() == [0]
    again = slots.meet(np.zeros(16, np.int32), kept, np.ones(16, np.float32), inside, tick=1)
    assert (again == 0).all()
    world = NeighbourSlots(16, 4, seed=3)
    world.ensure(1001)
    inside[:] = np.arange(1001) <= 12
    world.meet(np.zeros(1000, np.int32), target, np.ones(1000, np.float32), inside, tick=0)
    _, kept, _ = world.csr(TO, np.zeros(1, np.int32))
    assert len(kept) == 12 + 4, "the world's many sites leave those who are inside their place"
    assert set(range(1, 13)) <= set(kept.tolist())


def test_memory_is_bounded_and_forgets_who_was_unseen_for_longest() -> None:
    hosts = table(*[f"h{i}" for i in range(1000)])
    prior = MeetingPrior(eager(max_hosts=100, replayed=256, exact_hosts=60))
    for i in range(100):
        meetings = [(10 * i + k, 10 * i + k + 1, SMB + k % 3) for k in range(9)]
        prior.learn(*window(hosts, i, *meetings, (10 * i, 999, SMB)))
    assert len(prior.memory.hosts) <= 113
    assert prior.memory.hosts.keys.evicted > 800
    assert len(prior.memory.replay) == 256
    assert (prior.memory.hosts.find(hosts.hash[980:999]) >= 0).all()
    assert (prior.memory.hosts.find(hosts.hash[:500]) == -1).all()
    known, _ = window(hosts, 100, (3, 4, SMB), (5, 6, SMB))
    prior.learn(known, np.zeros(2, np.bool_))  # hosts that were forgotten, in meetings that somebody else remembers
    contacts, first = window(hosts, 101, (980, 985, SMB), (5, 999, SMB), (3, 985, SMB))
    assert np.isfinite(prior.tail(contacts, first)).all()


def test_a_flood_is_counted_whole_but_costs_little() -> None:
    hosts = table(*[f"h{i}" for i in range(3_000)])
    prior = MeetingPrior(eager())
    for i in range(20):
        prior.learn(*window(hosts, i, *[(100 * i + k, 2_000 + k % 40, SMB + k % 5) for k in range(100)]))
    assert prior.waiting is None
    rng = np.random.default_rng(0)
    n = 300_000
    keys = np.unique(
        rng.integers(0, 3_000, n) * 3_000 * 400 + rng.integers(0, 3_000, n) * 400 + rng.integers(0, 400, n)
    )
    flood = np.stack([keys // 1_200_000, keys // 400 % 3_000, SMB + 100 + keys % 400], 1)
    flood = flood[flood[:, 0] != flood[:, 1]]
    contacts = make_contacts(hosts, np.full(len(flood), 20), *flood.T)
    first = np.ones(len(flood), np.bool_)
    prior.tail(*window(hosts, 20, (1, 2, SMB)))
    begin = time.process_time()
    tails = prior.tail(contacts, first)
    prior.learn(contacts, first)
    spent = time.process_time() - begin
    asked = int(np.isfinite(tails).sum())
    assert 500 < asked < 40_000
    assert prior.unasked == len(flood) - asked
    assert int(prior.memory.replay.pair["met"][: len(prior.memory.replay.pairs)].sum()) == 2_000 + len(flood)
    assert len(prior.memory.replay) <= 2_000 + prior.config.replayed_window
    assert spent < 5, f"{spent:.2f} s of processor time for {len(flood)} first meetings"


def test_one_training_step_does_not_grow_with_the_network() -> None:
    names = pa.array([f"h{i}" for i in range(20_000)])
    hosts = HostTable(names, hash_names(names))
    prior = MeetingPrior(eager())
    rng = np.random.default_rng(1)
    for i in range(3):
        meetings = np.unique(np.stack([rng.permutation(20_000), rng.zipf(1.4, 20_000) % 20_000], 1), axis=0)
        meetings = meetings[meetings[:, 0] != meetings[:, 1]]
        contacts = make_contacts(
            hosts, np.full(len(meetings), i), meetings[:, 0], meetings[:, 1], np.full(len(meetings), SMB)
        )
        prior.learn(contacts, np.ones(len(meetings), np.bool_))
    assert prior.network.steps >= 1
    batch = prior.memory.batch(prior.memory.replay.draw(512, 100, rng))
    assert 256 < len(batch) <= 1_024
    loss = prior.network.step(prior.memory, batch, *prior._candidates(batch, 0), prior._current())
    assert np.isfinite(loss)


def test_weights_start_from_popularity() -> None:
    network = Network(width=48, layers=2, overlaps=False, rate=1e-3, seed=0)
    last = list(network.decoder.target.parameters())[-2].detach()
    assert float(last.abs().sum()) == 0
    world = small()
    learnt, popular = (
        MeetingPrior(eager(ready_steps=0, overlaps=False, step_meetings=10**9)),
        MeetingPrior(eager(graph=False)),
    )
    np.testing.assert_allclose(run(learnt, world), run(popular, world), rtol=1e-6)
