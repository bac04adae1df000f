"""Findings as OCSF Detection Findings."""

import copy
import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from py_ocsf_models.events.findings.detection_finding import DetectionFinding

from flowsage.models.analytics import TABLE
from flowsage.models.finding import Evidence, Finding
from flowsage.models.testimony import Witness
from flowsage.pipelines.findings import TECHNIQUES, TITLES, json_schema, to_json, to_ocsf
from flowsage.pipelines.readable import finding_lines
from tests.models.alarm_streams import Watch
from tests.models.test_alarms import BEGIN, LOUD, created, scene
from tests.models.test_attribution import watch

SECOND = 10**9
START = 1_700_000_000 * SECOND


def evidence(**changes: object) -> Evidence:
    fields = {
        "name": "sweep", "src": "10.0.0.5", "dst": "10.0.0.9", "service": (7 << 20) | 446, "proto": 6, "dst_port": 445,
        "observed": 12.0, "expected": 3.0, "unit": "new peers",
        "first_ns": START, "last_ns": START + SECOND, "flows": 12,
    }  # fmt: skip
    return Evidence(**(fields | changes))  # type: ignore[arg-type]


def finding(activity: str = "create", **changes: object) -> Finding:
    fields = {
        "uid": "abc", "activity": activity, "host": "10.0.0.5", "role": "source", "peer": None, "analytic": "sweep",
        "family": "scan", "start_ns": START, "alarm_ns": START + 5 * SECOND,
        "told_ns": START + (5 + 60 * ("create", "update", "close").index(activity)) * SECOND,
        "end_ns": START + 60 * SECOND if activity == "close" else None, "p_value": 1e-5, "severity": 4,
        "sentence": "10.0.0.5 tried 12 new peers on tcp/445", "technique": "T1046", "evidence": (evidence(),),
    }  # fmt: skip
    return Finding(**(fields | changes))  # type: ignore[arg-type]


def test_every_activity_is_a_valid_detection_finding() -> None:
    for activity, number in (("create", 1), ("update", 2), ("close", 3)):
        event = to_ocsf(finding(activity))
        DetectionFinding.model_validate(event)
        assert event["class_uid"] == 2004
        assert event["category_uid"] == 2
        assert event["activity_id"] == number
        assert event["type_uid"] == 200400 + number
        assert event["metadata"]["version"] == "1.8.0"
        assert event["finding_info"]["uid"] == "abc"
    assert to_ocsf(finding("close"))["end_time"] == (START + 60 * SECOND) // 10**6


def closed(schema: Any) -> Any:
    """The schema without room for what it does not name."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: closed(v) for k, v in schema.items()}
    return out | ({"additionalProperties": False} if "properties" in schema else {})


def test_every_finding_is_valid_against_the_schema_in_the_package_which_names_all_there_is() -> None:
    Draft202012Validator.check_schema(json_schema())
    validator = Draft202012Validator(closed(json_schema()))
    bare = evidence(dst=None, service=None, proto=None, dst_port=None)
    one = evidence(src="128.232.110.120", dst="66.35.250.204", src_port=34855, dst_port=80)
    named = evidence(src="printer", proto=-1)
    for analytic in TITLES:
        for activity in ("create", "update", "close"):
            for technique in (None, *TECHNIQUES, "T9999"):
                told = finding(
                    activity, analytic=analytic, technique=technique, peer="10.0.0.9", host="printer",
                    evidence=(evidence(), bare, one, named), analytics=("sweep", analytic), unit="peers",
                )  # fmt: skip
                validator.validate(json.loads(to_json(told)))


@pytest.mark.parametrize("name", ["host scan", "guessing", "exfiltration", "beacon", "worm"])
def test_what_the_alarms_raise_is_valid_and_says_why_to_a_person_and_to_a_program(name: str) -> None:
    rows, host = scene(name, seed=1)
    raised = next(f for f in created(Watch(LOUD).run(rows, BEGIN + 72)) if f.host == host)
    event = json.loads(to_json(raised))
    Draft202012Validator(closed(json_schema())).validate(event)
    DetectionFinding.model_validate(event)
    assert event["evidences"]
    for piece in event["evidences"]:
        assert piece["data"]["text"]
        assert 0 <= piece["data"]["share"] <= 1
    shown = "\n".join(finding_lines(event))
    assert all(piece["data"]["text"] in shown for piece in event["evidences"][:5])
    if name == "beacon":
        assert event["evidences"][0]["data"]["facts"]["period_s"] == pytest.approx(3.0, rel=0.1)


def test_what_the_graph_says_of_a_meeting_is_valid() -> None:
    prior, meetings = watch()
    hashes = prior.memory.hosts.columns["hash"]
    source, target, service = meetings[0]
    said = Witness(prior, str)(int(hashes[source]), int(hashes[target]), service)
    assert said is not None
    event = json.loads(to_json(finding(evidence=(evidence(text=said.text, facts=said.facts),))))
    Draft202012Validator(closed(json_schema())).validate(event)
    assert event["evidences"][0]["data"]["facts"] == said.facts


def test_what_a_later_version_adds_is_valid_for_a_reader_of_version_1_and_what_it_lacks_is_not() -> None:
    validator = Draft202012Validator(json_schema())
    later = json.loads(to_json(finding()))
    later["confidence"] = 90
    later["evidences"][0]["data"]["bytes"] = 12
    validator.validate(later)
    for name in json_schema()["required"]:
        lacking = copy.deepcopy(later)
        del lacking[name]
        with pytest.raises(ValidationError):
            validator.validate(lacking)


def test_evidence_names_end_points_and_what_was_expected() -> None:
    (piece,) = to_ocsf(finding())["evidences"]
    assert piece["src_endpoint"] == {"ip": "10.0.0.5"}
    assert piece["dst_endpoint"] == {"ip": "10.0.0.9", "port": 445}
    assert piece["connection_info"]["protocol_name"] == "tcp"
    assert piece["data"]["observed"] == 12.0
    assert piece["data"]["expected"] == 3.0
    assert piece["data"]["service"] == "tcp/445"


def test_one_flow_has_its_community_id() -> None:
    # The first example of the Community ID specification's baseline data.
    one = evidence(src="128.232.110.120", dst="66.35.250.204", src_port=34855, dst_port=80)
    (piece,) = to_ocsf(finding(evidence=(one,)))["evidences"]
    assert piece["connection_info"]["community_uid"] == "1:LQU9qZlK+B5F3KDmev6m5PMibrg="
    assert "community_uid" not in to_ocsf(finding())["evidences"][0]["connection_info"]


def test_a_host_that_is_no_address_is_a_host_name() -> None:
    event = to_ocsf(finding(host="printer", evidence=(evidence(src="printer"),)))
    assert event["evidences"][0]["src_endpoint"] == {"hostname": "printer"}
    assert event["observables"] == [{"name": "host", "type_id": 1, "value": "printer"}]


def test_the_same_finding_gives_the_same_line() -> None:
    assert to_json(finding()) == to_json(finding())
    assert "\n" not in to_json(finding())


def test_every_analytic_has_a_title_and_every_technique_a_name() -> None:
    assert {a.name for a in TABLE} == set(TITLES)
    assert {a.technique for a in TABLE if a.technique} <= set(TECHNIQUES)


def test_a_person_reads_host_cause_reason_and_evidence() -> None:
    pieces = tuple(evidence(dst=f"10.0.0.{n}") for n in range(7))
    lines = finding_lines(json.loads(to_json(finding(evidence=pieces))))
    assert "RAISED" in lines[0]
    assert "10.0.0.5" in lines[0]
    assert "ATT&CK T1046" in lines[0]
    assert lines[1].strip() == "10.0.0.5 tried 12 new peers on tcp/445"
    assert lines[-1].strip() == "… and 2 more"
    assert len(finding_lines(json.loads(to_json(finding("close"))))) == 1
