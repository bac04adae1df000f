"""Configuration of the prior of first meetings (`meeting`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MeetingConfig:
    """Ablations are configurations: layers 0 (no message passing), overlaps off, graph off (popularity alone)."""

    seed: int = 0
    graph: bool = True
    layers: int = 2
    overlaps: bool = True
    width: int = 48
    slots: int = 24
    far: int = 8
    """Neighbours remembered each way, inside the network and outside."""
    max_hosts: int = 200_000
    replayed: int = 1 << 18
    """Meetings kept for replay, and of one window at most."""
    replayed_window: int = 4_096
    gate: float = 0.05
    """Tail from which a meeting is learnt in full; below, in proportion, but at least `floor`."""
    floor: float = 0.02
    unanswered: float = 0.1
    """Weight of a meeting that was never answered."""
    batch: int = 512
    rate: float = 3e-3
    step_meetings: int = 8
    step_share: float = 1 / 128
    """A training step is due after so many new meetings, or after this share of all so far where that is more: what is
    one among ever more teaches ever less."""
    exact_hosts: int = 2_500
    """Up to so many hosts all are candidates of a question; beyond, a sample."""
    drawn: int = 256
    drawn_inside: float = 0.5
    """Candidates of a training step, where there are more than twice as many hosts (with fewer all are), and the share
    of them that is drawn from our own hosts alone: there, who meets whom has reasons."""
    stale: int = 32
    """Hosts that have met somebody since they were embedded, from which on they are embedded anew."""
    refreshed: int = 512
    """At most so many at once. After a training step as many others follow in turn."""
    comparisons: int = 1_500_000
    per_source: int = 32
    """Bounds on what is asked: comparisons with candidates a window, (source, service) a source."""
    ready_meetings: float = 200.0
    """Sum of weights of learnt meetings, windows and training steps before it says anything."""
    ready_windows: int = 30
    ready_steps: int = 20
