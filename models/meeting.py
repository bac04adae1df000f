"""How plausible is a first meeting? The part of detection that speaks about what has not been seen before.

Told that source s reached target t on service svc for the first time, the prior says how much of the probability lies
on targets at most as likely as t: the *tail*. A tail of .001 means that of a thousand first meetings of s on svc one
would be with a target as unlikely as this. It learns online and without labels, and only as much as what it sees is
plausible, so that an attack that goes on does not become what it expects (DETECTION.md, part 2).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from flowsage.graph.addresses import Internal
from flowsage.graph.build import Contacts
from flowsage.models.columns import Array, Bool, Float32, Float64, Int32, UInt64
from flowsage.models.meeting_config import MeetingConfig
from flowsage.models.meeting_evidence import MeetingEvidence
from flowsage.models.memory import Batch, MeetingMemory, Meetings
from flowsage.models.network import Network, View
from flowsage.models.plausibility import ANSWERS
from flowsage.models.profiles import FEATURES, Inside
from flowsage.models.questions import Answers, Candidates, Everybody, answer, draw, first_meetings
from flowsage.models.sage import Csr, threads_for

LEARNT: Final = 1 << 18
"""Contacts of a window that are learnt at once, before what is too much is forgotten: bounds the memory of a flood."""

_ASKED = ("hosts", "src", "dst", "service")
"""Columns of contacts that make a question."""

GAIN: Final = 3.0
"""Bound on what one meeting says for or against the graph, nats."""

COMMON, STRANGE = 1.0, 3.0
"""A target is not misplaced where it is as common among its like as exp(−COMMON), and wholly from exp(−STRANGE) on."""

SETTLED: Final = 60
"""Windows of activity after which a host that knows nobody on a service is half believed to have no business there."""


class MeetingPrior:
    """Stateful, deterministic given its seed and what it is shown window by window. Not safe for two threads at
    once."""

    def __init__(self, config: MeetingConfig | None = None, inside: Inside | None = None) -> None:
        self.config = c = config or MeetingConfig()
        self.memory = MeetingMemory(
            slots=c.slots,
            far=c.far,
            replayed=c.replayed,
            max_hosts=c.max_hosts,
            seed=c.seed,
            inside=inside or Internal(),
        )
        self.network = Network(width=c.width, layers=c.layers, overlaps=c.overlaps, rate=c.rate, seed=c.seed)
        self.windows = 0
        self.learnt = 0.0
        """Sum of weights of the meetings learnt."""
        self.advantage = 0.0
        """Running log odds of the graph against popularity, by how well each foretold the (gated) meetings so far."""
        self.advantage_inside = 0.0
        """The same by conditional probability among our own hosts."""
        self.unasked = 0
        """First meetings that the bounds on work left unasked, so far."""
        self.loss = float("nan")
        """Of the last training step, nats."""
        self._meetings_since = self._turn = 0
        self._view: View | None = None
        self._stale: list[Int32] = []
        """Host slots that have met somebody since they were embedded, where there is a view."""
        self._asked: tuple[Contacts, Bool, Answers] | None = None
        self._everybody: Everybody | None = None

    @property
    def waiting(self) -> str | None:
        """Why there is no answer yet, or None if it is ready."""
        c = self.config
        if self.learnt < c.ready_meetings:
            return f"has learnt from {self.learnt:.0f} first meetings, needs {c.ready_meetings:.0f}"
        if self.windows < c.ready_windows:
            return f"has seen {self.windows} windows, needs {c.ready_windows}"
        if c.graph and self.network.steps < c.ready_steps:
            return f"has made {self.network.steps} training steps, needs {c.ready_steps}"
        return None

    @property
    def _rows(self) -> int:
        """Rows that are embedded at once: all hosts where there is no view, else a bounded part."""
        return len(self.memory.hosts) if self._view is None else self.config.refreshed

    @property
    def speaks(self) -> bool:
        """Whether answers are of use yet, be it only to weigh the graph against popularity."""
        return self.network.steps > 0 or self.waiting is None

    @property
    def trust(self) -> float:
        """w: share of the graph in the mixture; the rest is popularity's."""
        return self._believed(self.advantage)

    def _believed(self, advantage: float) -> float:
        return float(1 / (1 + np.exp(-advantage))) if self.config.graph and self.network.steps else 0.0

    def tail(self, contacts: Contacts, first: Bool) -> Float64:
        """Tail probability f64[c] of the contacts that `first` bool[c] marks; NaN elsewhere, where bounds on work
        left it unasked, and while it is not ready. Changes nothing."""
        tails = np.full(len(contacts), np.nan)
        if self.waiting is None and first.any():
            met = self._answers(contacts, first)
            tails[met.contact] = met.tail
        return tails

    def misplaced(self, contacts: Contacts, first: Bool) -> Float64:
        """How much each of the contacts that `first` bool[c] marks is out of place, f64[c] from 0 to 1; else as `tail`.

        It is, where the target is among the unlikeliest that hosts like the source meet on the service inside the
        network (`plausibility`), as far as the source is settled: by the share of those others that it knows, or, where
        it knows nobody on that service, by how long it has been here. A new host has yet to meet its peers.
        """
        misplaced = np.full(len(contacts), np.nan)
        if self.waiting is None and first.any():
            met = self._answers(contacts, first)
            windows = np.where(met.source >= 0, self.memory.hosts.columns["windows"][met.source], 0)
            settled = np.where(np.isnan(met.known), windows / (windows + SETTLED), met.known)
            among = np.where(np.isnan(met.among), 1.0, met.among)
            strange = (-np.log(np.maximum(among, 1e-12)) - COMMON) / (STRANGE - COMMON)
            strange = np.minimum(np.maximum(strange, 0.0), 1.0)
            misplaced[met.contact] = np.where(np.isnan(met.tail), np.nan, strange * settled)
        return misplaced

    def learn(self, contacts: Contacts, first: Bool) -> None:
        """Learn one closed window: what its hosts did, and its first meetings as far as they are plausible."""
        c, window = self.config, int(contacts.windows[-1]) if len(contacts.windows) else 0
        met, hosts = self._answers(contacts, first), len(self.memory.hosts)
        self._asked = None
        gate = np.ones(len(met.contact), np.float32)
        if len(met.contact):
            if self.waiting is None:
                asked = ~np.isnan(met.tail)
                gate[:] = np.clip(np.where(asked, met.tail, 0) / c.gate, c.floor, 1)
                self.unasked += int(np.count_nonzero(~asked))
            gate[~contacts.kept[met.contact]] *= c.unanswered
            self._judge(met, gate)
        parts = range(0, max(len(contacts), 1), LEARNT)
        for begin in parts:
            part = slice(begin, begin + LEARNT)
            some = slice(*np.searchsorted(met.contact, (part.start, part.stop))) if len(parts) > 1 else slice(None)
            self._remember(contacts, part, met, some, gate[some], window, max(1, c.replayed_window // len(parts)))
        if len(met.contact) or len(self.memory.hosts) != hosts:
            self._everybody = None
        self.windows += 1
        self._meetings_since += len(met.contact)
        del met, gate  # of a flood they are large, and a view may be made now
        due = max(c.step_meetings, c.step_share * self.memory.replay.newest)
        trained = c.graph and self._meetings_since >= due and self._train()
        if self.speaks:
            self._refresh(trained)

    def _remember(
        self, contacts: Contacts, part: slice, met: Answers, some: slice, gate: Float32, window: int, most: int
    ) -> None:
        """Part of a window's contacts, and `some` of its meetings, which are the first ones among them."""
        source, target = self.memory.see(contacts.hosts, contacts.src[part], contacts.dst[part], window)
        at = met.contact[some] - part.start
        if len(at):
            meetings = Meetings(
                source[at],
                target[at],
                met.source_hash[some],
                met.target_hash[some],
                met.service[some],
                met.target[some] < 0,
            )
            self.learnt += float(self.memory.remember(meetings, gate, window, most).sum())
            if self.config.graph:
                self._stale += [meetings.source, meetings.target]
        moved = self.memory.forget()
        if moved is not None:
            self._everybody = None
            self._stale = [slots[slots >= 0] for slots in (moved[stale] for stale in self._stale)]
            if self._view is not None:
                self._view.compact(moved)

    def embeddings(self, hosts: UInt64) -> Float32:
        """Embeddings f32[n, d] of host hashes u64[n], from what is remembered of them; NaN for hosts never seen, and
        for all before it `speaks`."""
        if not self.speaks:
            return np.full((len(hosts), self.network.encoder.config.embedding), np.nan, np.float32)
        slots = self.memory.hosts.find(hosts)
        found: Float32 = self._current().embedding[torch.from_numpy(slots.astype(np.int64) + 1)].numpy()
        found[slots < 0] = np.nan
        return found

    def encode(self, hosts: UInt64, into: Csr, out_of: Csr) -> Float32:
        """Embeddings f32[n, d] of host hashes u64[n] among the neighbours of a given graph, such as one window's."""
        slots = self.memory.hosts.find(hosts)
        known = np.flatnonzero(slots >= 0)
        x = np.zeros((len(hosts), FEATURES), np.float32)
        x[known] = self.memory.hosts.features(slots[known], self.memory.neighbours.degree(slots[known]))
        encoded: Float32 = self.network.encoder.encode(torch.from_numpy(x), into, out_of).numpy()
        return encoded

    def evidence(self, source: int, target: int, service: int) -> MeetingEvidence | None:
        """How hosts with these hashes stand to each other on a service code; None while not ready."""
        if self.waiting is not None:
            return None
        source_hash, target_hash = np.array([source], np.uint64), np.array([target], np.uint64)
        find, code = self.memory.hosts.find, np.array([service], np.int32)
        at, blank = np.zeros(1, np.int64), np.full((ANSWERS, 1), np.nan)
        met = Answers(at, find(source_hash), find(target_hash), source_hash, target_hash, code, *blank)
        return MeetingEvidence.of(met, self._ask(met), self.trust)

    def embed(self) -> None:
        """Embed everybody anew when next asked, by what the weights are now."""
        self._view = self._asked = self._everybody = None
        self._stale = []

    def gradients(
        self, network: Network, chance: np.random.Generator, *, recent: int, seed: int
    ) -> tuple[float, list[torch.Tensor | None]] | None:
        """Loss and gradients of `network`, which has our weights, on a batch of remembered meetings.

        chance draws the meetings, those of the sources of the `recent` newest first (see `Replay.draw`), seed the
        candidates where not all hosts are. None where too few are remembered.
        """
        c, memory = self.config, self.memory
        at = memory.replay.draw(c.batch, recent, chance)
        if len(at) < 4:
            return None
        batch = memory.batch(at)
        if len(memory.hosts) <= 2 * c.drawn:
            hosts = np.arange(len(memory.hosts), dtype=np.int32)
            return network.gradients(memory, batch, hosts, np.zeros(len(hosts), np.float32), None)
        view = self._current()
        return network.gradients(memory, batch, *self._candidates(batch, seed), view)

    def _current(self) -> View:
        if self._view is None:
            with threads_for(len(self.memory.hosts)):
                self._view = View(self.network, self.memory)
        self._view.grow()
        return self._view

    def _refresh(self, trained: bool) -> None:
        """Embed anew those who met, once they are a few, and after a training step some of the others, in turn.

        Only here, at the end of a window, so that answers do not depend on who asked for what in between.
        """
        c, hosts = self.config, len(self.memory.hosts)
        if self._view is None:
            self._current()
            self._stale = []
            return
        rows = np.empty(0, np.int32)
        if sum(map(len, self._stale)) >= c.stale:
            rows, self._stale = np.unique(np.concatenate(self._stale)), []
        if len(rows) > c.refreshed:
            rows = np.random.default_rng([c.seed, self.windows]).choice(rows, c.refreshed, replace=False)
        if trained:
            others = (self._turn + np.arange(min(c.refreshed, hosts), dtype=np.int32)) % hosts
            self._turn = int(others[-1]) + 1
            rows = np.unique(np.concatenate([rows, others]))
        if len(rows):
            with threads_for(len(rows)):
                self._view.refresh(rows.astype(np.int32))

    def _ask(self, met: Answers) -> Candidates:
        c = self.config
        if self._everybody is None:
            self._everybody = Everybody.of(self.memory, c.exact_hosts)
        return answer(
            self.memory, self.network, self._current(), met, self._everybody,
            trust=(self.trust, self._believed(self.advantage_inside)),
            comparisons=c.comparisons, per_source=c.per_source,
        )  # fmt: skip

    def _answers(self, contacts: Contacts, first: Bool) -> Answers:
        """Of the window at hand: what `tail` found is there for `learn`."""
        if self._asked is not None:
            asked, of, met = self._asked
            same = asked is contacts or all(getattr(asked, k) is getattr(contacts, k) for k in _ASKED)
            if same and (of is first or np.array_equal(of, first)):
                return met
        met = first_meetings(self.memory, contacts, first)
        if len(met.contact) and self.speaks:
            self._ask(met)
        self._asked = (contacts, first, met)
        return met

    def _judge(self, met: Answers, gate: Float32) -> None:
        """Which of graph and popularity foretold these meetings better? Older ones fade: 200 meetings' worth count."""
        if not self.network.steps:
            return
        self.advantage = _weighed(self.advantage, met.log_graph - met.log_popular, gate)
        self.advantage_inside = _weighed(self.advantage_inside, met.gained, gate)

    def _train(self) -> bool:
        """A training step; False if too little is remembered."""
        chance = np.random.default_rng([self.config.seed, self.windows])
        with threads_for(self._rows):
            found = self.gradients(self.network, chance, recent=self._meetings_since, seed=self.windows)
            if found is None:
                return False
            self._meetings_since = 0
            self.loss, gradients = found
            self.network.descend(gradients)
        return True

    def _candidates(self, batch: Batch, seed: int) -> tuple[Int32, Float32]:
        """A sample of hosts in proportion to the batch's own q, and the correction ln 1/(expected number) of each."""
        p = self.memory.popularity
        chance = p.anywhere(self.memory.hosts.received())
        chance = chance + p.shares(batch.service, len(chance))
        chance /= chance.sum()
        ours = np.where(self.memory.hosts.columns["internal"][: len(chance)], chance, 0)
        if ours.any():
            share = np.float32(self.config.drawn_inside)
            chance = (1 - share) * chance + share / ours.sum() * ours
        drawn = draw(chance, self.config.drawn, seed)
        return drawn, -np.log(self.config.drawn * chance[drawn]).astype(np.float32)

    def state(self) -> dict[str, Array]:
        """Everything that it has learnt, as arrays (for a snapshot in safetensors).

        Embeddings are not kept in it: both he who saves and he who restores embed everybody anew, and so go on alike.
        """
        self.embed()
        sums = [
            self.windows,
            self.learnt,
            self.advantage,
            self.advantage_inside,
            self.unasked,
            self._meetings_since,
            self._turn,
        ]
        return {"prior": np.array([*sums, self.loss])} | self.memory.state() | self.network.state()

    def restore(self, state: dict[str, Array]) -> None:
        """What `state` gave, for the same configuration; afterwards it goes on as if nothing had happened."""
        sums = (float(x) for x in state["prior"])
        windows, self.learnt, self.advantage, self.advantage_inside, unasked, meetings, turn, self.loss = sums
        self.windows, self.unasked = int(windows), int(unasked)
        self._meetings_since, self._turn = int(meetings), int(turn)
        self.memory.restore(state)
        self.network.restore(state)
        self.embed()


def _weighed(advantage: float, gain: Float64, gate: Float32) -> float:
    """The advantage after meetings that one of graph and popularity foretold better by `gain` nats; NaN: not asked."""
    asked = ~np.isnan(gain)
    weight = np.where(asked, gate, 0)
    fade = 0.995 ** float(weight.sum())
    told = np.where(asked, np.minimum(np.maximum(gain, -GAIN), GAIN), 0.0)
    weighed: float = advantage * fade + float((told * weight).sum())
    return min(max(weighed, -6.0), 6.0)
