"""What everybody does all day: people at work, machines by themselves, servers among each other, the outside world.

Rates are a guess at an office of our days, chosen so that each habit is there that detectors stumble over: many first
meetings, heavy-tailed uploads, clocks of all periods, refused connections, a crawler, backups, an inventory by an
administrator's service, people who join, move, and help each other out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flowsage.pipelines.enterprise.flows import ESTABLISHED, ICMP, REFUSED, UDP, UNANSWERED, Flows, Ints, sizes
from flowsage.pipelines.enterprise.network import ADMIN, DAY, DEVELOPER, HELPDESK, HOUR, Network

Floats = npt.NDArray[np.float64]

FAILS = 0.006
"""Share of connections that are refused or unanswered for no reason."""


class Work:
    """Sessions of people at their machines: `who` i8[n] (index of the workstation), `begin` and `length` s."""

    def __init__(self, f: Flows, net: Network, span_s: float) -> None:
        rng = f.rng
        days = int(np.ceil(span_s / DAY))
        who, begin, length = [], [], []
        people = len(net.stations)
        usual = rng.normal(8.4, 0.9, people)
        for day in range(days):
            weekend = f.weekend(day)
            there = np.flatnonzero(rng.random(people) < (0.06 if weekend else 0.92))
            count = rng.poisson(2.0 if weekend else 7.0, len(there)) + 1
            one = np.repeat(there, count)
            start = (day * 24 + usual[one] + rng.normal(0, 0.3, len(one)) + rng.beta(1.1, 1.2, len(one)) * 9.0) * HOUR
            who.append(one)
            begin.append(start)
            length.append(rng.gamma(1.6, 1_500.0, len(one)))
        self.who, self.begin, self.length = np.concatenate(who), np.concatenate(begin), np.concatenate(length)
        here = (self.begin >= net.joins[self.who]) & (self.begin < span_s)
        self.who, self.begin, self.length = self.who[here], self.begin[here], self.length[here]
        self._rng = rng

    def moments(self, an_hour: float | Floats, only: npt.NDArray[np.bool_] | None = None) -> tuple[Ints, Floats]:
        """(who, s) of something that happens so many times an active hour, to `only` bool[w]."""
        rate = np.broadcast_to(np.asarray(an_hour, np.float64), (int(self.who.max(initial=0)) + 1,))[self.who]
        if only is not None:
            rate = rate * only[self.who]
        count = self._rng.poisson(rate * self.length / HOUR)
        index = np.repeat(np.arange(len(self.who)), count)
        return self.who[index], self.begin[index] + self._rng.random(len(index)) * self.length[index]

    def ticks(self, who: Ints, period: float, jitter: float) -> tuple[Ints, Floats]:
        """(who, s) of a clock that runs while `who` are at work, `jitter` a share of the period."""
        at = np.flatnonzero(np.isin(self.who, who))
        count = (self.length[at] / period).astype(np.int64)
        index = np.repeat(at, count)
        turn = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
        noise = self._rng.uniform(-jitter, jitter, len(index)) * period
        return self.who[index], self.begin[index] + (turn + 0.5) * period + noise


def clock(
    rng: np.random.Generator, hosts: Ints, begin: float | Floats, end: float, period: float, jitter: float
) -> tuple[Ints, Floats]:
    """(host, s) of a clock that always runs on each host from `begin` s on, each with a phase of its own."""
    first = np.broadcast_to(np.asarray(begin, np.float64), hosts.shape) + rng.random(len(hosts)) * period
    count = np.maximum(0, (end - first) / period).astype(np.int64)
    index = np.repeat(np.arange(len(hosts)), count)
    turn = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    at = first[index] + (turn + rng.uniform(-jitter, jitter, len(index))) * period
    return hosts[index], at


def zipf(rng: np.random.Generator, count: int, among: int, exponent: float) -> Ints:
    """Ranks i8[count] below `among`, low ones more often."""
    odds = np.arange(1, among + 1, dtype=np.float64) ** -exponent
    drawn: Ints = np.searchsorted(np.cumsum(odds / odds.sum()), rng.random(count))
    return np.minimum(drawn, among - 1)


def _some_fail(rng: np.random.Generator, count: int, share: float = FAILS) -> npt.NDArray[np.int8]:
    draw = rng.random(count)
    state: npt.NDArray[np.int8] = np.where(
        draw < share, np.where(draw < share / 2, REFUSED, UNANSWERED), ESTABLISHED
    ).astype(np.int8)
    return state


def people(f: Flows, net: Network, work: Work) -> None:
    """Names, mail, files, applications, the web, printers, calls, and each role's own."""
    rng, st = f.rng, net.stations
    n = len(st)

    def at_servers(who: Ints, at: Floats, kind: str, exponent: float = 0.8) -> Ints:
        """A server of the department, everyone having a favourite."""
        home = net.department_at(at, who)
        pools = np.stack([getattr(d, kind) for d in net.departments])
        rank = (zipf(rng, len(who), pools.shape[1], exponent) + who) % pools.shape[1]
        found: Ints = pools[home, rank]
        return found

    def go(an_hour: float | Floats, only: npt.NDArray[np.bool_] | None = None) -> tuple[Ints, Floats, Ints]:
        who, at = work.moments(an_hour, only)
        return who, at, st[who]

    _, at, src = go(14.0)
    f.add(at, src, net.core[zipf(rng, len(at), 2, 1.0)], 53, proto=UDP, out=sizes(rng, 70, len(at), 0.2),
          back=sizes(rng, 180, len(at), 0.5), lasts=0.02)  # fmt: skip
    for rate, port, out, back in ((1.5, 88, 1_500, 1_400), (0.7, 389, 900, 4_000)):
        _, at, src = go(rate)
        f.add(at, src, net.core[zipf(rng, len(at), 2, 1.0)], port, out=sizes(rng, out, len(at), 0.3),
              back=sizes(rng, back, len(at), 0.5))  # fmt: skip
    who, at = work.ticks(np.arange(n), 300.0, 0.02)
    f.add(at, st[who], net.mail, 993, out=sizes(rng, 900, len(at)), back=sizes(rng, 3_000, len(at), 1.5))
    who, at, src = go(2.0)
    f.add(at, src, at_servers(who, at, "files"), 445, out=sizes(rng, 20_000, len(at), 2.0),
          back=sizes(rng, 60_000, len(at), 2.0), lasts=sizes(rng, 5, len(at)),
          state=_some_fail(rng, len(at)))  # fmt: skip
    who, at, src = go(4.0)
    f.add(at, src, at_servers(who, at, "apps"), 443, out=sizes(rng, 2_500, len(at)),
          back=sizes(rng, 20_000, len(at), 1.2), state=_some_fail(rng, len(at)))  # fmt: skip
    who, at, src = go(0.4)
    f.add(at, src, at_servers(who, at, "printers"), 9_100, out=sizes(rng, 400_000, len(at), 1.3), back=2_000.0)
    _, at, src = go(1.5)
    f.add(at, src, net.intranet[zipf(rng, len(at), 4, 1.0)], 443, back=sizes(rng, 30_000, len(at), 1.2))
    # The web: everybody's tastes are the world's, and half of them their own.
    who, at, src = go(16.0)
    rank = zipf(rng, len(at), len(net.outside), 1.05)
    own = rng.random(len(at)) < 0.5
    rank = np.where(own, (zipf(rng, len(at), 60, 0.9) * 61 + who * 17) % len(net.outside), rank)
    f.add(at, src, net.outside[rank], np.where(rng.random(len(at)) < 0.95, 443, 80),
          out=sizes(rng, 3_000, len(at), 1.3), back=sizes(rng, 25_000, len(at), 1.6), lasts=sizes(rng, 4, len(at), 1.3),
          state=_some_fail(rng, len(at), 0.015))  # fmt: skip
    cloud = (np.arange(n) * 7) % len(net.clouds)
    who, at, src = go(0.4, rng.random(n) < 0.6)
    f.add(at, src, net.clouds[cloud[who]], 443, out=sizes(rng, 300_000, len(at), 1.9), back=20_000.0, lasts=8.0)
    for p, (period, jitter) in enumerate(((30.0, 0.02), (60.0, 0.05), (240.0, 0.05), (900.0, 0.1))):
        # Something on one machine in ten that asks its own site by the clock, from the first day on or from some later.
        chosen = np.flatnonzero(rng.random(n) < 0.025)
        who, at = work.ticks(chosen, period, jitter)
        since = np.where(rng.random(n) < 0.7, 0.0, rng.random(n) * DAY * 4)
        kept = at >= since[who]
        f.add(at[kept], st[who[kept]], net.outside[1_000 + 37 * p + who[kept]], 443, out=600.0, back=900.0)
    _, at, src = go(0.15)
    f.add(at, src, net.outside[:3][zipf(rng, len(at), 3, 1.0)], 3_478, proto=UDP, out=sizes(rng, 2e7, len(at)),
          back=sizes(rng, 2e7, len(at)), lasts=sizes(rng, 1_200, len(at), 0.6))  # fmt: skip
    f.add(work.begin, st[work.who], net.outside[5 + work.who % 3], 5_223, out=sizes(rng, 40_000, len(work.who)),
          back=sizes(rng, 60_000, len(work.who)), lasts=work.length)  # fmt: skip
    # Relations: colleagues share files; somebody else's server is needed for a while; a drive that is no more.
    who, at, src = go(0.04)
    home = net.department_at(at, who)
    order = np.argsort(net.home, kind="stable")
    counts = np.bincount(net.home, minlength=len(net.departments))
    start = np.cumsum(counts) - counts
    mates = order[start[home] + rng.integers(0, np.maximum(1, counts[home]))]
    there = net.joins[mates] <= at
    f.add(at[there], src[there], st[mates[there]], 445, out=sizes(rng, 50_000, int(there.sum()), 1.5),
          back=sizes(rng, 50_000, int(there.sum()), 1.5), state=_some_fail(rng, int(there.sum()), 0.2))  # fmt: skip
    who, at, src = go(0.02)
    other = rng.integers(0, len(net.departments), len(at))
    apps = np.stack([d.apps for d in net.departments])[other, rng.integers(0, 4, len(at))]
    files = np.stack([d.files for d in net.departments])[other, rng.integers(0, 2, len(at))]
    smb = rng.random(len(at)) < 0.4
    again = rng.integers(1, 6, len(at))  # used a few times over an hour
    at, src, target, smb = (np.repeat(v, again) for v in (at, src, np.where(smb, files, apps), smb))
    f.add(at + rng.random(len(at)) * HOUR, src, target, np.where(smb, 445, 443), out=3_000.0,
          back=sizes(rng, 30_000, len(at), 1.2))  # fmt: skip
    stale = np.flatnonzero(rng.random(n) < 0.04)
    mapped = np.isin(work.who, stale)
    begin = np.repeat(work.begin[mapped], 3) + np.tile([1.0, 4.0, 10.0], int(mapped.sum()))
    f.add(begin, st[np.repeat(work.who[mapped], 3)], net.retired, 445, state=UNANSWERED)
    developer, admin, desk = net.role == DEVELOPER, net.role == ADMIN, net.role == HELPDESK
    _, at, src = go(1.5, developer)
    f.add(at, src, net.builds[zipf(rng, len(at), 4, 0.7)], np.where(rng.random(len(at)) < 0.6, 22, 443),
          out=sizes(rng, 8_000, len(at), 1.8), back=sizes(rng, 40_000, len(at), 1.8),
          lasts=sizes(rng, 30, len(at), 1.5))  # fmt: skip
    _, at, src = go(2.0, admin)
    f.add(at, src, net.servers[rng.integers(0, len(net.servers), len(at))], rng.choice([3_389, 5_985, 22], len(at)),
          out=sizes(rng, 60_000, len(at), 1.2), back=sizes(rng, 200_000, len(at), 1.2),
          lasts=sizes(rng, 300, len(at), 1.2))  # fmt: skip
    who, at, src = go(np.where(desk, 1.0, np.where(admin, 0.25, 0.0))[: work.who.max(initial=0) + 1])
    mates = rng.integers(0, n, len(at))
    there = net.joins[mates] <= at
    f.add(at[there], src[there], st[mates[there]], 3_389, out=sizes(rng, 2e6, int(there.sum()), 1.0),
          back=sizes(rng, 4e6, int(there.sum()), 1.0), lasts=sizes(rng, 600, int(there.sum())),
          state=_some_fail(rng, int(there.sum()), 0.08))  # fmt: skip


def machines(f: Flows, net: Network, work: Work, span_s: float) -> None:
    """Workstations by themselves, by the clock: time, definitions, a vendor's telemetry."""
    rng, st = f.rng, net.stations
    on = np.flatnonzero(net.always_on)
    off = np.flatnonzero(~net.always_on)

    def all_day(period: float, jitter: float) -> tuple[Ints, Floats]:
        who, at = clock(rng, on, net.joins[on], span_s, period, jitter)
        others, then = work.ticks(off, period, jitter)
        return np.concatenate((who, others)), np.concatenate((at, then))

    who, at = all_day(1_024.0, 0.01)
    f.add(at, st[who], net.core[who % 2], 123, proto=UDP, out=48.0, back=48.0, lasts=0.01)
    who, at = all_day(900.0, 0.05)
    f.add(at, st[who], net.management, 8_530, out=sizes(rng, 900, len(at), 0.2), back=sizes(rng, 1_500, len(at), 0.6))
    who, at = all_day(1_800.0, 0.1)
    f.add(at, st[who], net.outside[10 + who % 4], 443, out=sizes(rng, 6_000, len(at), 0.6), back=2_000.0)


def servers(f: Flows, net: Network, work: Work, span_s: float) -> None:
    """Servers among each other: databases by load, names, replication, monitoring, mail, visitors of the DMZ."""
    rng = f.rng
    everyone = net.servers[net.servers != net.monitor]
    who, at = clock(rng, everyone, 0.0, span_s, 120.0, 0.01)
    f.add(at, net.monitor, who, 9_100, out=300.0, back=sizes(rng, 9_000, len(at), 0.2), lasts=0.05)
    who, at = clock(rng, everyone, 0.0, span_s, 300.0, 0.02)
    f.add(at, net.monitor, who, 0, proto=ICMP, out=84.0, back=84.0, src_port=8, lasts=0.01)
    for d, department in enumerate(net.departments):
        who, at = work.moments(3.0, net.home == d)
        f.add(at + 0.05, department.apps[rng.integers(0, len(department.apps), len(at))], department.sql, 1_433,
              out=sizes(rng, 2_000, len(at)), back=sizes(rng, 9_000, len(at), 1.2))  # fmt: skip
    who, at = clock(rng, everyone, 0.0, span_s, 600.0, 0.3)
    f.add(at, who, net.core[0], 53, proto=UDP, out=70.0, back=160.0, lasts=0.02)
    _, at = clock(rng, np.zeros(1, np.int64), 0.0, span_s, 15.0, 0.4)
    f.add(at, net.core[rng.integers(0, 2, len(at))], net.resolvers[rng.integers(0, 2, len(at))], 53, proto=UDP,
          out=75.0, back=sizes(rng, 190, len(at), 0.4), lasts=0.05)  # fmt: skip
    _, at = clock(rng, np.zeros(1, np.int64), 0.0, span_s, 300.0, 0.05)
    f.add(at, net.core[0], net.core[1], 389, out=sizes(rng, 9_000, len(at)), back=sizes(rng, 9_000, len(at)))
    day = 1.0 + 0.9 * np.sin((np.arange(0, span_s, 60.0) / DAY - 0.3) * 2 * np.pi)
    for rate, port, target in ((0.4, 443, net.dmz[0]), (0.1, 25, net.dmz[1]), (0.05, 443, net.dmz[2])):
        at = np.repeat(np.arange(0, span_s, 60.0), rng.poisson(rate * day)) + 0.0
        at = at + rng.random(len(at)) * 60.0
        visitor = net.visitors[zipf(rng, len(at), len(net.visitors), 0.8)]
        f.add(at, visitor, target, port, out=sizes(rng, 2_000, len(at)), back=sizes(rng, 20_000, len(at), 1.3),
              state=_some_fail(rng, len(at), 0.02))  # fmt: skip
    _, at = clock(rng, np.zeros(1, np.int64), 0.0, span_s, 240.0, 0.9)
    f.add(at, net.dmz[1], net.outside[500 + zipf(rng, len(at), 800, 0.9)], 25, out=sizes(rng, 30_000, len(at), 1.5),
          back=1_200.0, state=_some_fail(rng, len(at), 0.05))  # fmt: skip
    _, at = clock(rng, np.zeros(1, np.int64), 0.0, span_s, 90.0, 0.5)
    f.add(at, net.dmz[1], net.mail, 25, out=sizes(rng, 20_000, len(at), 1.4), back=900.0)


def nights(f: Flows, net: Network, span_s: float) -> None:
    """Each night: backups, the crawler's round, the inventory."""
    rng = f.rng
    stored = np.setdiff1d(net.servers, [net.backup, net.monitor, net.crawler])
    webs = np.concatenate([net.intranet, *[d.apps for d in net.departments]])
    for day in range(int(np.ceil(span_s / DAY))):
        at = day * DAY + 1.0 * HOUR + np.sort(rng.random(len(stored))) * 2 * HOUR
        f.add(at, rng.permutation(stored), net.backup, 10_000, out=sizes(rng, 2e9, len(at), 1.0), back=2e6,
              lasts=sizes(rng, 400, len(at), 0.5))  # fmt: skip
        pages = np.repeat(webs, rng.poisson(40, len(webs)))
        at = day * DAY + 3.5 * HOUR + np.sort(rng.random(len(pages))) * 1.5 * HOUR
        f.add(at, net.crawler, pages, 443, out=900.0, back=sizes(rng, 25_000, len(at), 1.2))
        here = net.stations[(net.joins <= day * DAY + 12 * HOUR)]
        at = day * DAY + 12 * HOUR + np.sort(rng.random(len(here))) * 2 * HOUR
        f.add(at, net.management, rng.permutation(here), 5_985, out=sizes(rng, 20_000, len(at), 0.4),
              back=sizes(rng, 90_000, len(at), 0.4), state=_some_fail(rng, len(at), 0.15))  # fmt: skip


def events(f: Flows, net: Network, work: Work, span_s: float) -> None:
    """Once each: a roll-out that everybody takes part in, and a day of updates."""
    rng, st = f.rng, net.stations
    n = len(st)
    since = max(0.3 * span_s, 10 * HOUR) + rng.random(n) * 3 * HOUR
    who, at = work.ticks(np.arange(n), 1_200.0, 0.05)
    kept = at > since[who]
    f.add(at[kept], st[who[kept]], net.rollout, 8_443, out=sizes(rng, 900, int(kept.sum()), 0.3), back=1_500.0)
    day = int(span_s // DAY // 2) * DAY if span_s >= DAY else 0.0
    mine = (work.begin >= day + 7 * HOUR) & (work.begin < min(day + DAY, span_s))
    first = np.full(n, np.inf)
    np.minimum.at(first, work.who[mine], work.begin[mine])
    updated = np.flatnonzero(np.isfinite(first))
    f.add(first[updated] + 30.0 + rng.random(len(updated)) * HOUR, st[updated], net.management, 8_530, out=6e5,
          back=sizes(rng, 4e8, len(updated), 0.3), lasts=sizes(rng, 60, len(updated), 0.4))  # fmt: skip
    parts = np.repeat(updated, 8)
    sites = net.outside[14 + rng.integers(0, 6, len(parts))]
    f.add(first[parts] + 60.0 + rng.random(len(parts)) * HOUR, st[parts], sites, 443,
          out=9e4, back=sizes(rng, 2e7, len(parts), 0.6), lasts=4.0)  # fmt: skip
