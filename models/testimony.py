"""The graph as a witness: what it holds for and against a first meeting, in words and in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from flowsage.graph.services import service_name
from flowsage.models.attribution import Attribution, attribute
from flowsage.models.meeting import MeetingPrior

SHOWN: Final = 3
"""Remembered meetings that are named, each way."""

LEAST: Final = 0.05
"""Nats below which a remembered meeting is not worth a word."""

Name = Callable[[int], str | None]
"""Name of the host with this hash; None: forgotten."""


@dataclass(frozen=True)
class Testimony:
    """text goes on where a sentence about the meeting ends; facts are for a program."""

    text: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Witness:
    """Asked about (source hash, target hash, service code). It changes nothing in the prior."""

    prior: MeetingPrior
    name: Name

    def __call__(self, source: int, target: int, service: int) -> Testimony | None:
        """What there is to say; None where the graph is not ready."""
        prior, memory = self.prior, self.prior.memory
        find = memory.hosts.find
        s, t = (int(v) for v in find(np.array([source, target], np.uint64)))
        words: list[str] = []
        facts: dict[str, Any] = {}
        code = int(memory.popularity.find(np.array([service], np.int32))[0])
        ring = memory.replay.ring
        if min(s, t, code) < 0 or not ((ring[:, 0] == s) & (ring[:, 1] == t) & (ring[:, 2] == code)).any():
            evidence = prior.evidence(source, target, service)
            if evidence is None:
                return None
            if evidence.never_seen:
                words.append("a host never seen before")
            words.append(
                f"{evidence.less_likely:,} of {evidence.candidates:,} possible peers are less likely, about "
                f"{evidence.plausible:,} were to be expected"
            )
            if evidence.among < 1:
                words.append(f"{evidence.among:.2%} of what hosts like it meet on this service is as unlikely")
                facts["among"] = _figures(evidence.among)
            facts |= {
                "tail": _figures(evidence.tail), "target_probability": _figures(evidence.p),
                "popularity": _figures(evidence.popular), "rank": evidence.rank, "candidates": evidence.candidates,
                "less_likely": evidence.less_likely, "plausible": evidence.plausible,
            }  # fmt: skip
        if s >= 0 and t >= 0 and prior.trust > 0:
            found = attribute(memory, prior.network, prior._current(), (s, t, service))
            facts |= {"graph_nats": _figures(found.f), "trust": _figures(prior.trust)}
            for key, sign, says in (("against", -1, "against it"), ("supporting", 1, "for it")):
                told = self._told(found, sign)
                if told:
                    facts[key] = told
                    met = (f"{m['src']} met {m['dst']} on {m['service']}" for m in told)
                    words.append(f"{says}: {', '.join(met)}")
        return Testimony("; ".join(words), facts)

    def _told(self, found: Attribution, sign: int) -> list[dict[str, Any]]:
        """The strongest remembered meetings of one sign."""
        hashes = self.prior.memory.hosts.columns["hash"]
        out: list[dict[str, Any]] = []
        for i in np.argsort(-sign * found.effect, kind="stable")[:SHOWN]:
            source, target = (self.name(int(hashes[slots[i]])) for slots in (found.source, found.target))
            if sign * found.effect[i] < LEAST or source is None or target is None:
                continue
            service = service_name(int(found.service[i]))
            out.append({"src": source, "dst": target, "service": service, "nats": _figures(float(found.effect[i]))})
        return out


def _figures(value: float) -> float:
    return float(f"{value:.3g}")
