"""The conservation ledger: where every packet and every flow record is.

    packets seen = in records delivered + in the ring + in the table + each named reason
    records drained = acknowledged + pending + each named loss

Independent counts meet here: the program's per-CPU counters, a walk over the table, how much waits in the ring, the sum
over the records that user space drained, and what its consumers say of them. Where the sensor is quiet while it looks,
both sides are numbers and `balance` is their difference. Under traffic each count is taken twice, before and after; it
lies in between, and `balance` is the distance of the two intervals. Not 0 is a bug.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flowsage.collector.journal import Books
from flowsage.collector.publish import PublishCounts
from flowsage.collector.statistics import PROTOCOLS, by_protocol

if TYPE_CHECKING:
    from flowsage.collector.program import FlowProgram

NOT_FLOWS = ("non_ip", "malformed", "truncated", "duplicate")
"""Reasons why a packet belongs in no record (duplicate: its other copy does); every other that is counted is a loss."""

EVENTS = ("created", "table_full", "closed_race", "retries", "misattributed", "ring_full")
"""Counters of what is no packet."""

QUIET_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Count:
    """Packets and bytes."""

    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The ledger at one moment.

    `seen`, `reasons` and `emitted` are the program's counters, `protocols` what it has seen by protocol (TCP, UDP,
    ICMP, OTHER); `drained` is the sum over the records that user space got from the ring; `in_table` is a walk over the
    table where the sensor was `quiet`, what the counters leave for it otherwise; `in_ring` has been emitted and not yet
    drained. `events` are the program's counters of what is no packet (retries, records made because the table was
    full, …). Records: emitted by the program, drained, resumed from an earlier run's spool, acknowledged, pending in
    the spool, and lost by reason. `unwatched_ns`: how long this process left an interface to change its mode; what came
    meanwhile is not in `seen`.
    """

    seen: Count
    accounted: Count
    reasons: dict[str, Count]
    fragment_nonfirst: int
    emitted: Count
    drained: Count
    in_ring: Count
    in_table: Count
    flows_in_table: int | None
    quiet: bool
    balance: int
    bytes_balance: int
    records_emitted: int
    records_drained: int
    records_resumed: int
    records_acknowledged: int
    records_pending: int
    records_lost: dict[str, int]
    records_balance: int
    protocols: dict[str, Count] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    unwatched_ns: dict[str, int] = field(default_factory=dict)

    @property
    def closes(self) -> bool:
        """Whether every packet and every record is accounted for."""
        return self.balance == 0 and self.bytes_balance == 0 and self.records_balance == 0

    @property
    def lost(self) -> dict[str, Count]:
        """Packets that should have been in a record and are not, by reason."""
        return {reason: count for reason, count in self.reasons.items() if reason not in NOT_FLOWS}

    def to_json(self) -> str:
        """The ledger as `replay --ledger` writes it.

        Top-level names are those of the captures' summaries (packets, accounted_packets, accounted_bytes, non_ip, …);
        everything else stands below them under its own.
        """
        out: dict[str, Any] = {
            "packets": self.seen.packets,
            "bytes": self.seen.bytes,
            "accounted_packets": self.accounted.packets,
            "accounted_bytes": self.accounted.bytes,
            **{reason: count.packets for reason, count in self.reasons.items()},
            "fragment_nonfirst": self.fragment_nonfirst,
            "unaccounted_bytes": {reason: count.bytes for reason, count in self.reasons.items()},
            "lost_packets": sum(count.packets for count in self.lost.values()),
            "delivered": asdict(self.drained),
            "in_ring": asdict(self.in_ring),
            "in_table": asdict(self.in_table),
            "records": {
                "emitted": self.records_emitted,
                "drained": self.records_drained,
                "resumed": self.records_resumed,
                "acknowledged": self.records_acknowledged,
                "pending": self.records_pending,
                "lost": self.records_lost,
            },
            "protocols": {name: asdict(count) for name, count in self.protocols.items()},
            "events": self.events,
            "unwatched_ns": self.unwatched_ns,
            "balance": self.balance,
            "bytes_balance": self.bytes_balance,
            "records_balance": self.records_balance,
        }
        return json.dumps(out, indent=1)


def _apart(low: int, high: int, other_low: int, other_high: int) -> int:
    """Distance of two intervals, 0 where they meet; positive where the first lies higher."""
    if low > other_high:
        return low - other_high
    return high - other_low if high < other_low else 0


def reasons_of(counters: Mapping[str, int]) -> list[str]:
    """Why packets are in no record, in the words of enum flow_counter."""
    names = [name.removesuffix("_packets") for name in counters if name.endswith("_packets")]
    return [name for name in names if name not in ("seen", "accounted", "emitted")]


class Ledger:
    """Adds up what is drained and what becomes of it, and draws up the balance with the counters of `program`.

    Records that a sink takes are acknowledged, where it does not say more (`PublishCounts`); those that it refuses are
    lost, by reason.
    """

    def __init__(self, program: FlowProgram) -> None:
        self._program = program
        self.drained = Count()
        self.drained_records = 0
        self.acknowledged = 0
        self.lost: dict[str, int] = {}

    def drain(self, records: npt.NDArray[Any]) -> None:
        """Add records that have left the ring (`RECORD_DTYPE`, as they came)."""
        ways = records["direction"]
        self.drained_records += len(records)
        self.drained = Count(
            packets=self.drained.packets + int(ways["packets"].sum(dtype=np.uint64)),
            bytes=self.drained.bytes + int(ways["bytes"].sum(dtype=np.uint64)),
        )

    def settle(self, books: Books) -> None:
        """What has been drained since the boot began, in whichever process."""
        self.drained_records = books.records
        self.drained = Count(packets=books.packets, bytes=books.bytes)

    def follow(self, program: FlowProgram) -> None:
        """The program whose counters count from now on."""
        self._program = program

    def acknowledge(self, records: int) -> None:
        """So many drained records have been taken by whoever consumes them."""
        self.acknowledged += records

    def lose(self, reason: str, records: int) -> None:
        """So many drained records are lost, for `reason`."""
        if records:
            self.lost[reason] = self.lost.get(reason, 0) + records

    def snapshot(self, published: PublishCounts | None = None, *, walk: bool = True) -> Snapshot:
        """The balance now. Nothing may be drained or handed on meanwhile; packets may come.

        `published` is what the publisher made of the records that it acknowledged to us. Without `walk` the table is
        not visited (some 10 ms for a large one) and is what the counters leave for it.
        """
        program = self._program
        before = program.counters()
        for _ in range(QUIET_ATTEMPTS):
            table, waiting = program.table() if walk else None, program.ring.waiting
            after = program.counters()
            quiet = before == after
            if quiet:
                break
            before = after
        held = Count(
            packets=after["accounted_packets"] - after["emitted_packets"],
            bytes=after["accounted_bytes"] - after["emitted_bytes"],
        )
        in_table = Count(packets=table.packets, bytes=table.bytes) if table and quiet else held
        # Slots may have been discarded, so that how many wait is a bound; an empty ring is an empty ring.
        in_ring = Count()
        if waiting or not quiet:
            in_ring = Count(
                packets=after["emitted_packets"] - self.drained.packets,
                bytes=after["emitted_bytes"] - self.drained.bytes,
            )
        reasons = {r: Count(packets=after[f"{r}_packets"], bytes=after[f"{r}_bytes"]) for r in reasons_of(after)}
        if quiet:
            drained = self.drained
            balance = after["seen_packets"] - sum(c.packets for c in (*reasons.values(), drained, in_ring, in_table))
            bytes_balance = after["seen_bytes"] - sum(c.bytes for c in (*reasons.values(), drained, in_ring, in_table))
        else:
            again = program.counters()
            balance, bytes_balance = (
                _apart(
                    after[f"seen_{unit}"],
                    again[f"seen_{unit}"],
                    *(sum(c[f"{r}_{unit}"] for r in ("accounted", *reasons)) for c in (after, again)),
                )
                for unit in ("packets", "bytes")
            )
        acknowledged, pending, resumed, lost = self.acknowledged, 0, 0, dict(self.lost)
        if published is not None:
            acknowledged += published.acknowledged - published.handed
            pending, resumed = published.pending, published.resumed
            for reason, records in published.lost.items():
                lost[reason] = lost.get(reason, 0) + records
        return Snapshot(
            seen=Count(packets=after["seen_packets"], bytes=after["seen_bytes"]),
            accounted=Count(packets=after["accounted_packets"], bytes=after["accounted_bytes"]),
            reasons=reasons,
            fragment_nonfirst=after["fragment_nonfirst"],
            emitted=Count(packets=after["emitted_packets"], bytes=after["emitted_bytes"]),
            drained=self.drained,
            in_ring=in_ring,
            in_table=in_table,
            flows_in_table=table.flows if table else None,
            quiet=quiet,
            balance=balance,
            bytes_balance=bytes_balance,
            records_emitted=after["emitted_records"],
            records_drained=self.drained_records,
            records_resumed=resumed,
            records_acknowledged=acknowledged,
            records_pending=pending,
            records_lost=lost,
            records_balance=self.drained_records + resumed - acknowledged - pending - sum(lost.values()),
            protocols={
                name: Count(packets=packets, bytes=octets)
                for name, (packets, octets) in zip(PROTOCOLS, by_protocol(after), strict=True)
            },
            events={name: after[name] for name in EVENTS},
        )
