"""How alarms are set."""

from __future__ import annotations

from dataclasses import dataclass

from flowsage.collector.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """Settings of the alarms.

    budget         false findings a day per 100 hosts that open flows
    least_a_day    false findings a day that the smallest network may have
    settle_ns      how long the budget grows: what is new on the first day may happen every day
    block_ns       step of the calibration; budgets and p-values are per host and block
    time_scale     how much faster than life everything happens: time constants, blocks, ages and gaps are divided by it
                   (a lab in which a day takes 24 minutes has 60)
    ready_blocks, ready_host_blocks    calibration that must have been seen before anything is raised; for scans,
                   guessing and floods a block is enough, and where they fail and are beyond doubt they need not wait
    internal       networks whose hosts are ours (names that are no addresses are); None: private addresses
    max_keys       of each kind (hosts, pairs …); beyond it some are forgotten (`KeyTable.evict`), counted
    log            contacts remembered as evidence, half of them new or failed ones
    """

    budget: float = 10.0
    least_a_day: float = 1.0
    settle_ns: int = 86_400 * 10**9
    block_ns: int = 900 * 10**9
    pane_ns: int = 10 * 10**9
    time_scale: float = 1.0
    ready_blocks: int = 4
    ready_host_blocks: int = 24
    internal: tuple[str, ...] | None = None
    max_keys: int = 500_000
    log: int = 32_768

    def __post_init__(self) -> None:
        """Refuse what cannot be (ConfigurationError)."""
        for name in ("budget", "block_ns", "pane_ns", "time_scale", "ready_blocks", "max_keys", "log"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"alarms: {name} is {getattr(self, name)}, it must be above 0")
