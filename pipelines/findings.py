"""Findings as OCSF Detection Findings (schema 1.8.0, class 2004): what a SOC's tools read.

One JSON object a finding and a change of its life: Create when a host is raised, Update when it gets worse, Close when
it has been quiet. `finding_info.uid` stays the same through all of them; `time` (the end of the pane that had it told)
and `metadata.uid` are each one's own. The same stream of findings gives the same
bytes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.resources
import ipaddress
import json
from dataclasses import replace
from typing import Any

import communityid

from flowsage.graph.services import service_name
from flowsage.models.finding import Evidence, Finding

SCHEMA_VERSION = "1.8.0"
ACTIVITIES = {
    "create": (1, "Create", 1, "New"),
    "update": (2, "Update", 2, "In Progress"),
    "close": (3, "Close", 4, "Resolved"),
}
SEVERITIES = ("Unknown", "Informational", "Low", "Medium", "High", "Critical")
"""By severity_id."""
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}
TITLES = {
    "burst": "Burst of flows on one service",
    "chatter": "Many flows on one service, for hours",
    "fan": "Many new peers",
    "sweep": "Sweep of one service over many hosts",
    "ports": "Scan of one host's ports",
    "guess": "Password guessing",
    "fail": "Many failed connections",
    "lateral": "Lateral movement",
    "exfil": "Exfiltration",
    "drip": "Slow exfiltration",
    "haul": "More than anybody moves on one service",
    "flood": "Flood",
    "fan-in": "Many new sources",
    "fail-in": "Target of failed connections",
    "novelty": "Services new to this host",
    "beacon": "Beacon",
    "session": "Session without an end",
    "newcomer": "Newcomer among settled clients",
    "meeting": "Implausible first meetings",
    "joint": "Several unusual things at once",
}
"""What a person calls each analytic."""
TECHNIQUES = {
    "T1018": ("Remote System Discovery", "TA0007", "Discovery"),
    "T1021": ("Remote Services", "TA0008", "Lateral Movement"),
    "T1030": ("Data Transfer Size Limits", "TA0010", "Exfiltration"),
    "T1039": ("Data from Network Shared Drive", "TA0009", "Collection"),
    "T1041": ("Exfiltration Over C2 Channel", "TA0010", "Exfiltration"),
    "T1046": ("Network Service Discovery", "TA0007", "Discovery"),
    "T1048": ("Exfiltration Over Alternative Protocol", "TA0010", "Exfiltration"),
    "T1071": ("Application Layer Protocol", "TA0011", "Command and Control"),
    "T1078": ("Valid Accounts", "TA0008", "Lateral Movement"),
    "T1110": ("Brute Force", "TA0006", "Credential Access"),
    "T1210": ("Exploitation of Remote Services", "TA0008", "Lateral Movement"),
    "T1498": ("Network Denial of Service", "TA0040", "Impact"),
    "T1595": ("Active Scanning", "TA0043", "Reconnaissance"),
}
"""MITRE ATT&CK technique → its name, tactic id and tactic (ATT&CK v15, enterprise)."""


@functools.cache
def version() -> str:
    """FlowSAGE's version, as installed."""
    return importlib.metadata.version("flowsage")


@functools.cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a finding, version 1: `finding.schema.json` in this package."""
    text = importlib.resources.files("flowsage.pipelines").joinpath("finding.schema.json").read_text()
    schema: dict[str, Any] = json.loads(text)
    return schema


def endpoint(host: str, port: int | None = None) -> dict[str, Any]:
    """OCSF network endpoint: an address as `ip`, any other name as `hostname`."""
    try:
        out: dict[str, Any] = {"ip": str(ipaddress.ip_address(host))}
    except ValueError:
        out = {"hostname": host}
    return out | ({"port": port} if port is not None else {})


def community_uid(evidence: Evidence) -> str | None:
    """Community ID v1 of the evidence's flow, None where it is not one flow with known ports and addresses."""
    if None in (evidence.dst, evidence.src_port, evidence.dst_port, evidence.proto):
        return None
    try:
        flow = communityid.FlowTuple(evidence.proto, evidence.src, evidence.dst, evidence.src_port, evidence.dst_port)
        return str(communityid.CommunityID().calc(flow))
    except (communityid.FlowTupleError, ValueError):
        return None


def _evidence(evidence: Evidence) -> dict[str, Any]:
    out: dict[str, Any] = {"name": evidence.name, "src_endpoint": endpoint(evidence.src, evidence.src_port)}
    if evidence.dst is not None:
        out["dst_endpoint"] = endpoint(evidence.dst, evidence.dst_port)
    if evidence.proto is not None and evidence.proto >= 0:
        connection = {"direction_id": 0, "protocol_num": evidence.proto, "community_uid": community_uid(evidence)}
        connection["protocol_name"] = PROTOCOLS.get(evidence.proto)
        out["connection_info"] = {k: v for k, v in connection.items() if v is not None}
    out["data"] = {
        "observed": evidence.observed,
        "expected": evidence.expected,
        "unit": evidence.unit,
        "flows": evidence.flows,
        "first_seen_time": evidence.first_ns // 10**6,
        "last_seen_time": evidence.last_ns // 10**6,
    }
    if evidence.text:
        out["data"] |= {"text": evidence.text, "share": round(evidence.share, 4)}
    if evidence.facts:
        out["data"]["facts"] = evidence.facts
    if evidence.service is not None:
        out["data"]["service"] = service_name(evidence.service)
    return out


def _attack(technique: str) -> dict[str, Any]:
    out: dict[str, Any] = {"technique": {"uid": technique}, "version": "15.1"}
    if technique in TECHNIQUES:
        name, tactic_uid, tactic = TECHNIQUES[technique]
        out["technique"]["name"] = name
        out["tactic"] = {"uid": tactic_uid, "name": tactic}
    return out


def at_site(finding: Finding, site: int) -> Finding:
    """The finding as one of a site, a partition of the flows' topic: two sites may see the same hosts do the same."""
    return replace(finding, uid=f"{site}-{finding.uid}")


def event_uid(finding: Finding) -> str:
    """Which change of which finding this is: the same when the same flows are scored again, and no other's."""
    return f"{finding.uid}-{finding.activity}-{finding.told_ns}"


def to_ocsf(finding: Finding) -> dict[str, Any]:
    """The finding as an OCSF Detection Finding, ready for `json.dumps`. Times are milliseconds since the epoch."""
    activity_id, activity, status_id, status = ACTIVITIES[finding.activity]
    named = dict.fromkeys([*(finding.hosts or (finding.host,)), *([finding.peer] if finding.peer else [])])
    info: dict[str, Any] = {
        "uid": finding.uid,
        "title": TITLES[finding.lead or finding.analytic],
        "desc": finding.sentence,
        "analytic": {"name": finding.analytic, "uid": finding.analytic, "type_id": 4, "type": "Learning (ML/DL)"},
        "created_time": finding.alarm_ns // 10**6,
        "first_seen_time": finding.start_ns // 10**6,
        "last_seen_time": (finding.end_ns or finding.told_ns) // 10**6,
        "types": [finding.family],
    }
    if finding.technique:
        info["attacks"] = [_attack(finding.technique)]
    out: dict[str, Any] = {
        "activity_id": activity_id,
        "activity_name": activity,
        "category_uid": 2,
        "category_name": "Findings",
        "class_uid": 2004,
        "class_name": "Detection Finding",
        "type_uid": 200400 + activity_id,
        "type_name": f"Detection Finding: {activity}",
        "severity_id": finding.severity,
        "severity": SEVERITIES[finding.severity],
        "status_id": status_id,
        "status": status,
        "time": finding.told_ns // 10**6,
        "start_time": finding.start_ns // 10**6,
        "message": finding.sentence,
        "metadata": {
            "version": SCHEMA_VERSION,
            "product": {"name": "FlowSAGE", "vendor_name": "FlowSAGE", "version": version()},
            "uid": event_uid(finding),
        },
        "finding_info": info,
        "evidences": [_evidence(e) for e in finding.evidence],
        "observables": [
            {
                "name": "peer" if name == finding.peer else "host",
                "type_id": 2 if "ip" in endpoint(name) else 1,
                "value": name,
            }
            for name in named
        ],
        "unmapped": {
            "p_value": finding.p_value,
            "role": finding.role,
            "family": finding.family,
            "analytics": list(finding.analytics),
            "observed": finding.observed,
            "expected": finding.expected,
            "unit": finding.unit,
        },
    }
    if finding.end_ns is not None:
        out["end_time"] = finding.end_ns // 10**6
    return out


def to_json(finding: Finding) -> str:
    """One line of JSON, the same bytes for the same finding."""
    return json.dumps(to_ocsf(finding), separators=(",", ":"), ensure_ascii=False)
