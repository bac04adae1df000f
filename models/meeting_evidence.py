"""What the prior of first meetings has to say about one of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowsage.graph.services import service_name
from flowsage.models.questions import Answers, Candidates


@dataclass(frozen=True)
class MeetingEvidence:
    """Why a first meeting is (im)plausible. `p` and `popular`: probability of this target by the prior and by
    popularity alone."""

    tail: float
    p: float
    popular: float
    rank: int
    """1 for the likeliest of all candidates."""
    plausible: int
    """Candidates that carry the probability, in effect (exponential of the entropy)."""
    less_likely: int
    """Candidates that are less likely than this one."""
    candidates: int
    among: float
    """Of what hosts like the source meet on the service inside the network, known to it or not, the share that is at
    most as likely; NaN for a target that is not inside, or was never seen."""
    service: str
    never_seen: bool
    """The target was never seen before."""

    @classmethod
    def of(cls, met: Answers, candidates: Candidates, trust: float) -> MeetingEvidence:
        """From the one meeting that was asked about, its candidates and the graph's share in the mixture."""
        p = trust * np.exp(met.log_graph[0]) + (1 - trust) * np.exp(met.log_popular[0])
        live = candidates.density > 0
        density, copies = candidates.density[live], candidates.copies[live]
        mass = density * copies / (density * copies).sum()
        entropy = -float((mass * np.log(mass / copies)).sum())
        return cls(
            tail=float(met.tail[0]),
            p=float(p),
            popular=float(np.exp(met.log_popular[0])),
            rank=1 + round(float(copies[density > p * (1 + 1e-9)].sum())),
            plausible=max(1, round(np.exp(entropy))),
            less_likely=round(float(copies[density < p * (1 - 1e-9)].sum())),
            candidates=round(float(copies.sum())),
            among=float(met.among[0]),
            service=service_name(int(met.service[0])),
            never_seen=bool(met.target[0] < 0),
        )
