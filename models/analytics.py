"""The analytics: statistics of a host or a pair, each with a name that a person understands (DETECTION.md, part 3).

`TABLE` declares them all, one row each. A contact of a pane raises the *level* of the keys that it belongs to, by what
`contributions` says; the level is a leaky sum with time constant τ, x = ln(1 + level), and the *excess* S = x − R says
by how much x passes the record R of that key (`records.py`). Beacon and joint have statistics of their own
(`beacon.py`, `judgement.py`) and share everything after that: excess, calibration, alarm, finding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from flowsage.graph.columns import UNKNOWN
from flowsage.graph.services import TCP, is_reversed, on_ports, port_part, protocol_of
from flowsage.models.prior import PRIOR

F8 = npt.NDArray[np.float64]

MINUTE, HOUR, DAY, WEEK = 60.0, 3_600.0, 86_400.0, 604_800.0

HOST, SERVICE, PAIR, CONTACT = range(4)
"""What a key is of: a host, (source, service), (source, target), (source, target, service)."""

BYTES_SCALE = 1e4
"""Bytes in one unit of level: below ten kilobytes nothing is worth a word."""

VISITS = 20.0
"""Visits of clients to a server for one by a new client, in one unit of level: below that, new clients are common. They
count more where the newcomer seldom takes to a new service, and less where it often does."""

ADMIN_PORTS = (22, 23, 135, 139, 445, 3389, 5900, 5985, 5986)
"""TCP services through which one host is given orders by another."""

DATABASE_PORTS = (1433, 3306, 5432)
"""TCP services where programs log in for every question, so that a host's first hour of it says nothing."""


@dataclass(frozen=True)
class Analytic:
    """One analytic.

    family     findings of one host and one family are one finding
    role       whether the host that it speaks of is the "source" or the "target" of the contacts
    kind       HOST, SERVICE, PAIR or CONTACT: what it keeps a level of
    tau        time constant of the level, seconds; 0: the statistic is computed, not summed
    technique  MITRE ATT&CK id, or None
    unit       what the level counts, as a person reads it after the number
    words      the sentence; {host} {peer} {service} {observed} {count} {span} {shape} are filled in
    least      level below which nobody would act on it, so nothing is raised: in `unit`
    learns     whether what was named becomes record once it is over: a backup is told once, a scan each time
    scale      how much of `unit` one unit of level is
    doubles    each unit doubles 1 + level, so that x counts them, in ln 2: two are twice as strange as one, not half as
               strange again, and one that was seen before takes away one
    habit      seconds in which a record fades by ln 2: how long what a key did once counts as what it does
    """

    name: str
    family: str
    role: str
    kind: int
    tau: float
    technique: str | None
    unit: str
    words: str
    least: float
    learns: bool = False
    scale: float = 1.0
    doubles: bool = False
    habit: float = WEEK

    @property
    def prior(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(rate of exceedances a host-block, mean excess), each by age group; measured, see `prior.py`."""
        return PRIOR[self.name]


TABLE: tuple[Analytic, ...] = (
    Analytic("burst", "volume", "source", SERVICE, MINUTE, None, "flows",
             "{host} opened {observed} flows on {service} in {span}", 40, True),
    Analytic("chatter", "volume", "source", SERVICE, 4 * HOUR, None, "flows",
             "{host} opened {observed} flows on {service} in {span}", 300, True),
    Analytic("fan", "scan", "source", HOST, MINUTE, "T1018", "new peers",
             "{host} met {observed} new peers{on} in {span}", 8),
    Analytic("sweep", "scan", "source", SERVICE, 4 * HOUR, "T1046", "new peers, failed ones in full",
             "{host} tried {count} new peers on {service} in {span}", 4),
    Analytic("ports", "scan", "source", PAIR, 4 * HOUR, "T1046", "new services",
             "{host} tried {observed} new services of {peer} in {span}", 10),
    Analytic("guess", "credential", "source", PAIR, HOUR, "T1110", "brief sessions",
             "{host} opened {observed} brief sessions on {service} of {peer} in {span}", 15),
    Analytic("fail", "scan", "source", HOST, HOUR, "T1046", "failed flows",
             "{observed} flows of {host}{on} failed in {span}", 6),
    Analytic("lateral", "lateral", "source", HOST, HOUR, "T1021", "new internal peers",
             "{host} reached {count} new internal peers{on} in {span}", 3),
    Analytic("exfil", "exfiltration", "source", PAIR, MINUTE, "T1048", "bytes",
             "{host} sent {peer} {observed} more than it received in {span}", 5e5, True, BYTES_SCALE),
    Analytic("drip", "exfiltration", "source", PAIR, 4 * HOUR, "T1030", "bytes",
             "{host} sent {peer} {observed} more than it received in {span}", 2e5, True, BYTES_SCALE),
    Analytic("haul", "collection", "source", SERVICE, HOUR, "T1039", "bytes",
             "{host} moved {observed} within the network on {service} in {span}", 5e7, True, BYTES_SCALE),
    Analytic("flood", "flood", "target", HOST, HOUR, "T1498", "flows",
             "{host} was sent {observed} flows{on} in {span}", 120, True),
    Analytic("fan-in", "flood", "target", HOST, HOUR, "T1498", "new sources",
             "{host} was met by {observed} new sources{on} in {span}", 20),
    Analytic("fail-in", "flood", "target", HOST, HOUR, "T1046", "failed flows",
             "{observed} flows to {host}{on} failed in {span}", 20),
    Analytic("novelty", "novelty", "source", HOST, HOUR, None, "nats of new services",
             "{host} used {count} services that are new to it in {span}", 8),
    Analytic("beacon", "beacon", "source", CONTACT, 0.0, "T1071", "strength of the beat",
             "{host} calls {peer} on {service} like a clock, {shape}", 1),
    Analytic("session", "beacon", "source", CONTACT, 0.0, "T1071", "strength of the session",
             "{host} has been in touch with {peer} on {service} without a pause for {shape}", 1),
    Analytic("newcomer", "novelty", "source", HOST, HOUR, None, "visits for one so new",
             "{host} came to {count} servers{on} whose clients had long been the same in {span}", 200, scale=VISITS),
    Analytic("meeting", "novelty", "source", HOST, HOUR, "T1078", "peers that hosts like it do not meet",
             "{host} met {count} peers that hosts like it do not meet in {span}", 1.5, doubles=True,
             habit=DAY / 2),
    Analytic("joint", "joint", "source", HOST, 0.0, None, "nats of several causes",
             "{host} does several unusual things at once", 4),
)  # fmt: skip

NAMES = tuple(a.name for a in TABLE)
FAMILIES = tuple(dict.fromkeys(a.family for a in TABLE))
(
    BURST,
    CHATTER,
    FAN,
    SWEEP,
    PORTS,
    GUESS,
    FAIL,
    LATERAL,
    EXFIL,
    DRIP,
    HAUL,
    FLOOD,
    FAN_IN,
    FAIL_IN,
    NOVELTY,
    BEACON,
    SESSION,
    NEWCOMER,
    MEETING,
    JOINT,
) = range(len(TABLE))
SHAPED = (BEACON, SESSION)
"""Those that are judged by themselves, by what the visits of a contact look like, and not by a sum."""
KIND = np.array([a.kind for a in TABLE], np.int64)
FAMILY = np.array([FAMILIES.index(a.family) for a in TABLE], np.int64)
IS_TARGET = np.array([a.role == "target" for a in TABLE])
TAU = np.array([a.tau for a in TABLE])
COLUMN = np.array([sum(b.kind == a.kind for b in TABLE[:i]) for i, a in enumerate(TABLE)], np.int64)
"""Position of an analytic among those of its kind."""
SHARE = np.array(
    [
        {
            "beacon": 0.2,
            **dict.fromkeys(("chatter", "haul", "newcomer"), 0.04),
            **dict.fromkeys(("sweep", "guess", "fail", "exfil", "meeting"), 0.15),
        }.get(a.name, 0.075)
        for a in TABLE
    ]
)
"""Share of an analytic in the budget: p of a host is the smallest p / share (weighted Bonferroni, Genovese 2006, with
ten effectively independent analytics). The p of what is slow falls slowly, that of the others by powers of ten a
minute, so a beat, a slow scan (of one service, or of many) and slow guessing need larger shares, and the others hardly
miss them. So does an upload: bytes have the heaviest tail of all; and peers who are out of place, of whom there are
few. For what goes on for hours, is more than anybody ever moved, or comes where nobody new ever comes, half a share is
enough."""
EARLY = np.array([a.family in ("scan", "credential", "flood") and a.name != "fan-in" for a in TABLE])
"""Raised after the first block: no habit is needed to tell them."""
FIRST = np.array([a.name in ("sweep", "ports", "guess", "fail", "fail-in") for a in TABLE])
"""Raised in the first block, before this network has shown anything. What is merely much (flows to a busy server, peers
of a monitor) may have been so for years; what fails, or asks for a password again and again, seldom has."""
STEADY = np.array([a.name == "flood" for a in TABLE])
"""What comes to a server as steadily as ever, from the first minutes on: see `records.first_span`."""
LEARNS = np.array([a.learns for a in TABLE])
DOUBLES = np.array([a.doubles for a in TABLE])
HABIT = np.array([a.habit for a in TABLE])
"""Who helped a colleague out once has no habit of it: a record of peers out of place is one fewer each half day."""
LEAST = np.array(
    [a.least if a.tau == 0 else a.least * np.log(2.0) if a.doubles else np.log1p(a.least / a.scale) for a in TABLE]
)
"""x below which nothing is raised."""
WIDTH = np.array([sum(a.kind == k for a in TABLE) for k in range(4)], np.int64)
"""Number of analytics of each kind."""

ANSWERED, UNANSWERED = 0.02, 0.1
"""What a new peer counts in a sweep: one that answers, and one that does not where silence is common (UDP, the outside
web). A refused or unanswered TCP handshake counts 1."""

SHARED_MOST = 10.0
"""Bytes towards a destination count one over the number of hosts that use it, at least one over this."""

SURPRISE, SURPRISE_MOST = 2.0, 8.0
"""A first use counts by how far its surprise passes the first, at most the second, nats."""


@numba.njit(cache=True, nogil=True)
def contributions(  # type: ignore[no-untyped-def]
    service,
    flows,
    answered,
    failed,
    told,
    sent,
    moved,
    tries,
    sources,
    inside,
    new_pair,
    new_contact,
    new_service,
    surprise,
    settled,
    misplaced,
    out,
):
    """What one contact adds to the level of each analytic: out f8[A].

    service i32 code; flows, answered, failed counts; told: replies are known; sent: bytes out − in; moved: bytes out +
    in; tries: sessions that may be no more than a guess (`Contacts.tries`); sources: distinct ones of (target,
    service); inside: (source, target) are internal; new_*: the pair, the contact (source, target, service), the
    source's use of the service was never counted before; surprise: C_ss, nats; settled: how settled the clients of
    (target, service) are, nats; misplaced: how much the first meeting is out of place, 0 to 1, less in a
    crowd (`crowds`), NaN where not asked.
    """
    out[:] = 0.0
    # A handshake that fails says something; silence where there is none (Zeek's S0 of UDP) does not: many never reply.
    protocol = protocol_of(service)
    failed = failed if protocol in (TCP, UNKNOWN) else 0
    out[BURST] = flows
    # Where services are not known, that a host does much for hours says no more than that it works.
    if port_part(service) >= 0:
        out[CHATTER] = flows
    out[FAIL] = failed
    if new_pair:
        out[FAN] = 1.0
    # What our hosts send to the world is a small part of what its hosts receive; and answers are not sent on purpose.
    if (inside[1] or not inside[0]) and not is_reversed(service):
        out[FLOOD] = flows
        out[FAIL_IN] = failed
        if new_pair:
            out[FAN_IN] = 1.0
    if new_contact:
        if answered > 0 or not told:
            out[SWEEP] = ANSWERED
        else:
            web = port_part(service) in (80, 443)
            out[SWEEP] = 1.0 if protocol == TCP and (inside[1] or not web) else UNANSWERED
        out[PORTS] = 1.0
        if inside[0] and inside[1] and on_ports(service, ADMIN_PORTS):
            out[LATERAL] = 1.0
        # Relations are known among our own hosts; of the world's each is met by few, and for no reason that shows.
        if inside[1] and misplaced > 0.0:
            out[MEETING] = misplaced
    if new_service:
        out[NOVELTY] = min(SURPRISE_MOST, max(0.0, surprise - SURPRISE))
        # Who uses a service elsewhere meets one more server; who never did has no business there.
        if inside[0] and inside[1] and answered > 0 and not is_reversed(service) and settled > math.log(VISITS):
            out[NEWCOMER] = math.exp(settled + min(SURPRISE, surprise - SURPRISE)) / VISITS
    out[GUESS] = tries
    if inside[0] and inside[1] and not is_reversed(service):
        out[HAUL] = moved / BYTES_SCALE
    if inside[0] and sent > 0:
        # What is sent within the network is a copy, and counts as a haul; what a host sends outside is judged by what
        # it has sent outside before. Where others send to as well is less of a secret: a cloud, a mail relay.
        out[EXFIL] = 0.0 if inside[1] else sent / BYTES_SCALE / min(SHARED_MOST, max(1.0, sources))
        out[DRIP] = out[EXFIL]
