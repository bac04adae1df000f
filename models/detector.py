"""The detector: history, graph and alarms, put together.

Flows come to it twice. As they *arrive*, a pane at a time, the alarms look at them with what is known so far; when
their *window* closes, history scores them and learns from them, and so does the graph's prior. Between the two,
nothing learnt from an open window is used, so scores depend on the past alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from flowsage.collector.errors import ConfigurationError
from flowsage.graph import memory
from flowsage.graph.addresses import Internal
from flowsage.graph.build import Contacts, contacts
from flowsage.graph.flows import FlowBatch
from flowsage.graph.hostgraph import HostGraph, host_graph
from flowsage.models.alarms import AlarmConfig, Alarms
from flowsage.models.finding import Finding
from flowsage.models.history import History, HistoryConfig, HistoryScores
from flowsage.models.meeting import MeetingPrior
from flowsage.models.meeting_config import MeetingConfig
from flowsage.models.surprise import IN_FLOWS, IN_HOSTS, SURPRISE, P, of_flows
from flowsage.models.testimony import Witness

ALL_TIME = 1 << 62
"""Window length, ns, that holds every flow of a pane, whenever it started."""

LARGE = 1 << 21
"""Flows that leave so much behind in the heap that it is worth giving back."""

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """What the parts are made with. `graph` off leaves history and alarms, as an ablation or on a small machine.

    `testimony` off: findings come without what the graph holds for and against the first meetings in them. It changes
    no score and no alarm, and takes time that a file whose findings nobody reads can spare.
    """

    window_ns: int = 60 * 10**9
    graph: bool = True
    testimony: bool = True
    history: HistoryConfig = field(default_factory=HistoryConfig)
    meeting: MeetingConfig = field(default_factory=MeetingConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)


@dataclass(frozen=True)
class ClosedWindows:
    """A run of windows that closed: n flows, c contacts, and what history says of them."""

    flows: FlowBatch
    contacts: Contacts
    scores: HistoryScores
    tails: Float64
    """[c] tail probability of first meetings, NaN for known contacts and while the graph is not ready."""
    said: Float64
    """[k, 2] what the alarms say of each host-window of `scores`: see the next two."""
    undirected: bool = False

    @property
    def p_values(self) -> Float64:
        """[k] smallest p-value among the alarms' analytics, NaN while not ready."""
        return self.said[:, P]

    @property
    def surprise(self) -> Float64:
        """[k] decades by which that p is smaller than is usual for the host, 0 while not ready."""
        return self.said[:, SURPRISE]

    @cached_property
    def flow_surprise(self) -> Float64:
        """[n] that of the flow's source in its window; undirected, the larger of both ends'."""
        s = self.scores
        return of_flows(self.contacts, s.host, s.window, self.surprise, undirected=self.undirected)

    @property
    def flow_score(self) -> Float64:
        """[n] history's, and what the alarms say of the host on top of it, nats."""
        return self.scores.flow_score + IN_FLOWS * self.flow_surprise

    @property
    def host_score(self) -> Float64:
        """[k] the same of host-windows."""
        return self.scores.score + IN_HOSTS * self.surprise

    def graph(self, k: int, internal: Internal | None = None) -> HostGraph:
        """The host graph of the k-th window of the run, with its features."""
        begin, end = self.contacts.flow_offsets[k : k + 2]
        return host_graph(
            self.flows.take(slice(int(begin), int(end))), self.contacts.slice(k), internal=internal or Internal()
        )


class Detector:
    """Stateful and deterministic: the same flows in the same steps give the same scores and findings."""

    def __init__(self, config: DetectorConfig | None = None) -> None:
        self.config = config or DetectorConfig()
        self.history = History(self.config.history)
        self.alarms = Alarms(self.config.alarms)
        self.prior = MeetingPrior(self.config.meeting, self.alarms.internal) if self.config.graph else None
        self._folded: tuple[FlowBatch, Contacts] | None = None
        """Flows of the last pane, and their contacts."""
        self._introduce()

    def _introduce(self) -> None:
        """The graph is the alarms' witness of first meetings."""
        if self.prior is not None and self.config.testimony:
            self.alarms.witness = Witness(self.prior, self.alarms.host_name)

    def pane(self, now_ns: int, arrived: FlowBatch) -> list[Finding]:
        """Look at the flows that arrived since the last pane; returns findings created, updated or closed.

        now_ns is event time: it never goes back, and moves on without flows too, so that findings can close.
        """
        seen = contacts(arrived, ALL_TIME)
        self._folded = arrived, seen
        looked = self.history.lookup(seen)
        found = self.alarms.step(now_ns, seen, looked, self._misplaced(seen, looked.known == 0))
        if len(arrived) >= LARGE:
            memory.give_back()
        return found

    def close(self, flows: FlowBatch, *, terms: bool = False) -> ClosedWindows:
        """Score the flows of windows that have closed, in time order, and learn from them.

        `terms`: what history's scores are made of is kept too.
        """
        run = self._fold(flows)
        scores = self.history.score(flows, run, terms=terms)
        if len(flows) >= LARGE:
            memory.give_back()
        first = scores.known == 0
        tails = np.full(len(run), np.nan)
        for k, (begin, end) in enumerate(zip(run.offsets[:-1], run.offsets[1:], strict=True)):
            tails[begin:end] = self._meet(run.slice(k), first[begin:end])
        said = self.alarms.take(flows.hosts.hash[scores.host])
        return ClosedWindows(flows, run, scores, tails, said, self.config.history.undirected)

    def whole(
        self, flows: FlowBatch, ends_ns: Sequence[int], *, terms: bool = False
    ) -> tuple[list[Finding], ClosedWindows]:
        """`pane` and `close` of windows of which each is all of one pane, that ends at its time of `ends_ns`.

        It says and learns the same. But history, which nothing else teaches, goes through all of them at once.
        """
        run = contacts(flows, self.config.window_ns)
        scores = self.history.score(flows, run, terms=terms, looked=True)
        assert scores.looked is not None
        first, hosts = scores.known == 0, flows.hosts.hash[scores.host]
        tails, said, found = np.full(len(run), np.nan), np.empty((len(hosts), 2)), list[Finding]()
        of_hosts = [*np.searchsorted(scores.window, run.windows).tolist(), len(hosts)]
        misplaced = np.empty(len(run))
        for k in range(len(ends_ns)):
            part = slice(int(run.offsets[k]), int(run.offsets[k + 1]))
            seen, fresh = run.slice(k), first[part]
            misplaced[part] = self._misplaced(seen, fresh)
            if self.alarms.witness is not None:  # who tells what the graph knows now, before it learns more
                theirs = slice(of_hosts[k], of_hosts[k + 1])
                found += self.alarms.step(ends_ns[k], seen, scores.looked.some(part), misplaced[part])
                said[theirs] = self.alarms.take(hosts[theirs])
            tails[part] = self._meet(seen, fresh)
        if self.alarms.witness is None:
            found, said = self.alarms.step_each(ends_ns, run, scores.looked, misplaced, hosts, of_hosts)
        return found, ClosedWindows(flows, run, scores, tails, said, self.config.history.undirected)

    def _meet(self, window: Contacts, first: npt.NDArray[np.bool_]) -> Float64:
        """Tails of a window's first meetings, from which the prior then learns."""
        if self.prior is None:
            return np.full(len(window), np.nan)
        tails = self.prior.tail(window, first)
        self.prior.learn(window, first)
        return tails

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """(arrays, values for JSON): everything learnt, with the findings that are open. `restore` goes on from it.

        Saving makes the graph embed everybody anew, so he who saves and he who restores go on bit for bit alike.
        """
        alarms, values = self.alarms.state()
        parts = {"history": self.history.state(), "alarms": alarms}
        if self.prior is not None:
            parts["prior"] = self.prior.state()
        arrays = {f"{part}/{name}": array for part, state in parts.items() for name, array in state.items()}
        return arrays, {"alarms": values, "graph": self.prior is not None}

    @classmethod
    def restore(cls, config: DetectorConfig, arrays: dict[str, Array], values: dict[str, Any]) -> Detector:
        """The detector that `state` describes, under the same configuration.

        Raises ConfigurationError or ValueError where that state is of another version or configuration.
        """

        def part(name: str) -> dict[str, Array]:
            return {k.removeprefix(name): v for k, v in arrays.items() if k.startswith(name)}

        if values["graph"] != config.graph:
            raise ConfigurationError(f"the state was learnt with model.graph={str(values['graph']).lower()}")
        detector = cls(config)
        detector.history = History.restore(part("history/"), config.history)
        detector.alarms = Alarms.restore(config.alarms, part("alarms/"), values["alarms"])
        if config.graph:
            detector.prior = MeetingPrior(config.meeting, detector.alarms.internal)
            detector.prior.restore(part("prior/"))
        detector._introduce()
        return detector

    def _fold(self, flows: FlowBatch) -> Contacts:
        """Contacts of closed windows. Where one pane was all of one window, as in a file of few flows, it has them."""
        window_ns, folded, self._folded = self.config.window_ns, self._folded, None
        if folded is not None and folded[0] is flows and len(flows) and len(folded[1].windows) == 1:
            first, last = (int(flows.start_ns[k]) // window_ns for k in (0, -1))
            if first == last:
                window = np.full(len(folded[1]), first, np.int64)
                return Contacts(**(vars(folded[1]) | {"window": window, "windows": np.array([first], np.int64)}))
        return contacts(flows, window_ns)

    def _misplaced(self, seen: Contacts, first: npt.NDArray[np.bool_]) -> Float64:
        if self.prior is None:
            return np.full(len(seen), np.nan)
        return self.prior.misplaced(seen, first)
