"""A small company's network in namespaces on this machine, with real services, habits and misbehaviour.

from flowsage.pipelines.lab import Lab, LabSettings, in_namespace

with Lab(LabSettings(seed=1)) as lab:
    with in_namespace(lab.netns):
        ...  # attach XDP to lab.interfaces: every packet is seen once
    truth = lab.start_attack("scan")
    truth = lab.wait_attack(truth, timeout_s=60)
"""

from flowsage.collector.interface import in_namespace
from flowsage.pipelines.lab.command import run_lab
from flowsage.pipelines.lab.lab import Lab, LabHost, LabSettings, Scheduled, parse_schedule
from flowsage.pipelines.lab.misbehaviour import ATTACKS, Attack
from flowsage.pipelines.lab.record import Recorded, Recording
from flowsage.pipelines.lab.truth import Step, Truth, label_file, label_flows, read_truth

__all__ = [
    "ATTACKS",
    "Attack",
    "Lab",
    "LabHost",
    "LabSettings",
    "Recorded",
    "Recording",
    "Scheduled",
    "Step",
    "Truth",
    "in_namespace",
    "label_file",
    "label_flows",
    "parse_schedule",
    "read_truth",
    "run_lab",
]
