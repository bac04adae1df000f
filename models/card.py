"""The model card: what a model is, what it was made of, and what it must not be used for, as Markdown."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flowsage.models.detector import Detector


def card(detector: Detector, schema: dict[str, Any], trained: dict[str, Any]) -> str:
    """The README.md of a model directory. It names no wall-clock time: the same model has the same card."""
    prior, history, alarms = detector.prior, detector.history, detector.alarms

    def moment(key: str) -> str:
        at = trained.get(key)
        return "unknown" if at is None else datetime.fromtimestamp(at / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

    learnt = [
        f"- history: {sum(history.keys.values()):,} keys from {history.windows:,} windows",
        f"- alarms: {alarms.readiness().reason}",
    ]
    if prior is not None:
        state = f"not ready: {prior.waiting}" if prior.waiting else "ready"
        weights = sum(p.numel() for p in prior.network.parameters())
        learnt.append(
            f"- graph: {state}; {weights:,} weights, {prior.network.steps:,} training steps, "
            f"{len(prior.memory.hosts):,} hosts, trusted {prior.trust:.0%} against popularity"
        )
    facts = [f"- {k.replace('_', ' ')}: {_plain(v)}" for k, v in trained.items() if not k.endswith("_ns")]
    settings = [f"- `{k}`: {_plain(v)}" for k, v in schema.items() if not isinstance(v, dict)]
    shape = [f"- {k}: {_plain(v)}" for k, v in schema["architecture"].items()] if prior is not None else []
    return "\n".join(
        [
            "# A FlowSAGE model",
            "",
            "What FlowSAGE has learnt of one network: how familiar each key is (history), how plausible a first",
            "meeting is (GraphSAGE), and how large the statistics of benign hosts become (calibration of the alarms).",
            "No labels were used. It speaks about the network that it was trained on, and about no other.",
            "",
            "Use it: `flowsage run --model DIR …`, `flowsage replay --model DIR FLOWS`. What it scores has to come",
            f"after {moment('until_ns')}: it has seen everything before.",
            "",
            "## Made of",
            "",
            f"- flows from {moment('first_ns')} to {moment('until_ns')}",
            *facts,
            "",
            "## Learnt",
            "",
            *learnt,
            "",
            "## Made for",
            "",
            *settings,
            *shape,
            f"- features of a host, in order: {', '.join(schema['features']['host'])}",
            "",
            "## Limits",
            "",
            "- What misbehaved all through the training data is part of what is normal to it.",
            "- It holds addresses of hosts, and who met whom: treat it as you treat the flows.",
            "- It ages: networks change, and it remembers what was. Train again, up to now, and put the new directory",
            "  in the place of this one; a running scorer takes it in by itself.",
            "",
        ]
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "default"
    return str(value)
