"""Findings (OCSF) as lines for a person."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

MARKS = {1: "RAISED", 2: "WORSE", 3: "OVER"}
"""By activity_id."""


def clock(milliseconds: int) -> str:
    """Time of day of a Unix time in milliseconds, UTC."""
    return datetime.fromtimestamp(milliseconds / 1e3, UTC).strftime("%H:%M:%S")


def _name(endpoint: dict[str, Any] | None) -> str:
    return str(endpoint.get("ip") or endpoint.get("hostname")) if endpoint else "several hosts"


def _evidence_line(evidence: dict[str, Any]) -> str:
    data = evidence["data"]
    target = f" → {_name(evidence['dst_endpoint'])}" if "dst_endpoint" in evidence else ""
    flows = f"{data['flows']:,} flow{'s' if data['flows'] != 1 else ''}"
    what = data.get("text") or f"{data['observed']:,.3g} {data['unit']}, expected at most {data['expected']:,.3g}"
    return (
        f"    {_name(evidence['src_endpoint'])}{target}  {data.get('service', '')}  {flows}, "
        f"{clock(data['first_seen_time'])}-{clock(data['last_seen_time'])}: {what}"
    )


def finding_lines(finding: dict[str, Any], evidence: int = 5) -> list[str]:
    """A headline, what happened in a sentence, and the first pieces of evidence of an OCSF Detection Finding."""
    info = finding["finding_info"]
    host = finding["observables"][0]["value"]
    head = f"{clock(finding['time'])}  {MARKS[finding['activity_id']]:6s}  {host}  {info['title']}"
    if finding["activity_id"] == 3:
        return [head]
    techniques = " ".join(a["technique"]["uid"] for a in info.get("attacks", []))
    mitre = f", ATT&CK {techniques}" if techniques else ""
    head += f"  [{finding['severity']}, p = {finding['unmapped']['p_value']:.1e}{mitre}]"
    pieces = finding["evidences"]
    more = len(pieces) - evidence
    return [
        head,
        f"    {info['desc']}",
        *map(_evidence_line, pieces[:evidence]),
        *([f"    … and {more} more"] if more > 0 else []),
    ]
