"""One interface under watch from a script: exact by protocol, with GraphSAGE or without, and nothing left behind."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Ether

import flowsage.pipelines
from flowsage.collector import (
    BusyInterfaceError,
    ConfigurationError,
    EBPFAttachMode,
    MissingInterfaceError,
    create_ebpf_loader,
    in_namespace,
)
from flowsage.collector.xdp import attached_program
from flowsage.pipelines import EBPFMonitoring, create_ebpf_monitoring
from flowsage.pipelines.config import load
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.topics import anomalies_topic
from tests.bpf.support import build, needs_root, tcp, udp
from tests.bpf.veth import VethPair, run, veth_pair
from tests.collector.wires import eventually

pytestmark = needs_root

FRAMES = [
    *(tcp("S", sport=1000 + i) for i in range(30)),
    *(udp(i) for i in range(20)),
    *[bytes(Ether() / IP() / ICMP())] * 3,
    *[bytes(Ether() / IPv6() / ICMPv6EchoRequest())] * 2,
    *[bytes(Ether() / ARP())] * 4,
    bytes(Ether() / IP(proto=47) / b"1234"),
]
PACKETS = {"TCP": 30, "UDP": 20, "ICMP": 5, "OTHER": 5}
BYTES = {
    "TCP": sum(map(len, FRAMES[:30])),
    "UDP": sum(map(len, FRAMES[30:50])),
    "ICMP": sum(map(len, FRAMES[50:55])),
    "OTHER": sum(map(len, FRAMES[55:])),
}


@pytest.fixture(scope="module", autouse=True)
def objects() -> None:
    build()


@pytest.fixture(scope="module")
def pair() -> Iterator[VethPair]:
    with veth_pair("fsmo") as made:
        yield made


def send(pair: VethPair, frames: list[bytes]) -> None:
    with in_namespace(pair.outside):
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sender.bind((pair.sender, 0))
    with sender:
        for frame in frames:
            sender.send(frame)


def quick() -> Settings:
    """Windows of two seconds, so that some close."""
    return load(
        None,
        {
            "sensor": {
                "name": "fsmo",
                "idle_timeout": "0.5s",
                "half_open_timeout": "0.5s",
                "active_timeout": "1s",
                "sweep_interval": "0.1s",
                "table_entries": 1000,
                "ring_bytes": 1 << 20,
            },
            "windows": {"window": "2s", "pane": "0.5s"},
        },
    )


def watch(pair: VethPair, **options: bool) -> EBPFMonitoring:
    return create_ebpf_monitoring(pair.receiver, netns=pair.home, settings=quick(), **options)


def on_the_interface(pair: VethPair) -> tuple[str, int] | None:
    with pair.inside():
        return attached_program(pair.receiver)


def exported(monitoring: EBPFMonitoring, name: str) -> dict[str, float]:
    """Label value ("" where there is none) → number."""
    families = {f.name: f for f in text_string_to_metric_families(monitoring.export_to_prometheus())}
    return {next(iter(s.labels.values()), ""): s.value for s in families[name].samples}


def test_the_counter_alone_is_exact_by_protocol_and_leaves_nothing(pair: VethPair) -> None:
    with watch(pair, enable_graphsage_streaming=False) as monitoring:
        send(pair, FRAMES)
        eventually(lambda: sum(monitoring.get_packet_counters().values()) == len(FRAMES))
        metrics = monitoring.get_metrics()
        assert metrics["interface"] == pair.receiver
        assert metrics["packet_counters"] == monitoring.get_packet_counters() == PACKETS
        assert metrics["byte_counters"] == BYTES
        there = on_the_interface(pair)
        program = metrics["program"]
        assert (program["mode"], program["id"]) == there
        assert (program["name"], program["attached"]) == ("xdp_counter", True)
        assert metrics["state"] == {
            "running": True,
            "xdp_counter": {"on": True, "by": "xdp_counter", "reason": None},
            "graphsage_streaming": {"on": False, "reason": "not asked for"},
        }
        assert metrics["interface_state"]["driver"] == "veth"
        assert metrics["graphsage"] is metrics["ledger"] is None
        assert json.loads(json.dumps(metrics)) == metrics
        assert exported(monitoring, "flowsage_protocol_packets") == PACKETS
        assert exported(monitoring, "flowsage_packet_bytes") == {"": sum(BYTES.values())}
    assert on_the_interface(pair) is None
    assert monitoring.get_packet_counters() == PACKETS  # what was counted can still be read
    assert monitoring.get_metrics()["state"]["xdp_counter"] == {
        "on": False,
        "by": "xdp_counter",
        "reason": "shut down",
    }
    monitoring.shutdown()  # again: nothing happens


def test_with_graphsage_one_program_does_both_and_every_packet_is_in_both_accounts(pair: VethPair) -> None:
    with watch(pair) as monitoring:
        program = monitoring.get_metrics()["program"]
        assert (program["name"], (program["mode"], program["id"])) == ("flow_xdp", on_the_interface(pair))
        send(pair, FRAMES)
        eventually(lambda: monitoring.get_metrics()["graphsage"]["flows"] == 30 + 20 + 3, 20)
        metrics = monitoring.get_metrics()
        assert metrics["packet_counters"] == PACKETS
        assert metrics["byte_counters"] == BYTES
        assert metrics["state"]["xdp_counter"] == {"on": True, "by": "flow_xdp", "reason": None}
        assert metrics["state"]["graphsage_streaming"] == {"on": True, "reason": None}
        assert metrics["ledger"]["packets"] == len(FRAMES)
        assert metrics["ledger"]["not_in_flows"]["non_ip"] == 4
        assert metrics["ledger"]["closes"]
        assert "not ready" in metrics["graphsage"]["standing"]
        assert (metrics["graphsage"]["graph_ready"], metrics["graphsage"]["alarms_ready"]) == (False, False)
        assert (metrics["findings"], metrics["findings_told"]) == ([], 0)
        assert json.loads(json.dumps(metrics)) == metrics
        assert exported(monitoring, "flowsage_protocol_packets") == PACKETS
        assert exported(monitoring, "flowsage_flows_consumed") == {"": 53}
        assert exported(monitoring, "flowsage_ledger_imbalance_packets") == {"": 0}
    assert on_the_interface(pair) is None
    last = monitoring.get_metrics()
    assert last["packet_counters"] == PACKETS
    assert last["ledger"]["in_records"] == len(FRAMES) - 4
    assert last["graphsage"]["windows"] >= 1
    assert last["state"]["graphsage_streaming"] == {"on": False, "reason": "shut down"}


def test_findings_in_the_log_are_in_the_metrics_the_last_hundred_of_them(pair: VethPair) -> None:
    with watch(pair) as monitoring:
        assert monitoring._log is not None
        for number in range(120):
            finding = {"class_uid": 2004, "finding_info": {"uid": str(number)}}
            monitoring._log.append(anomalies_topic("flowsage"), b"10.0.0.1", json.dumps(finding).encode())
        eventually(lambda: monitoring.get_metrics()["findings_told"] == 120)
        metrics = monitoring.get_metrics()
    assert [f["finding_info"]["uid"] for f in metrics["findings"]] == [str(n) for n in range(20, 120)]


def test_without_the_counter_there_are_no_packet_counters(pair: VethPair) -> None:
    with watch(pair, enable_xdp_counter=False) as monitoring:
        metrics = monitoring.get_metrics()
        assert monitoring.get_packet_counters() == metrics["packet_counters"] == metrics["byte_counters"] == {}
        assert metrics["state"]["xdp_counter"] == {"on": False, "by": None, "reason": "not asked for"}
        assert metrics["state"]["graphsage_streaming"]["on"]


def test_scoring_that_fails_is_told_and_packets_are_counted_on(pair: VethPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("flowsage.pipelines.run.LiveScoring.run", broken)
    with watch(pair) as monitoring:
        state = "state", "graphsage_streaming"
        eventually(lambda: not monitoring.get_metrics()[state[0]][state[1]]["on"])
        assert monitoring.get_metrics()[state[0]][state[1]]["reason"] == "it has ended: out of memory"
        send(pair, FRAMES)
        eventually(lambda: monitoring.get_packet_counters() == PACKETS)
    assert on_the_interface(pair) is None


def test_a_sensor_that_fails_is_told_with_its_last_counts_and_leaves_nothing(pair: VethPair) -> None:
    monitoring = watch(pair)
    send(pair, FRAMES)
    eventually(lambda: monitoring.get_packet_counters() == PACKETS)

    def broken() -> int:
        raise RuntimeError("the ring is gone")

    assert monitoring._agent is not None
    monitoring._agent.step = broken  # type: ignore[method-assign]
    eventually(lambda: not monitoring.running)
    metrics = monitoring.get_metrics()
    assert metrics["state"]["xdp_counter"]["reason"] == "the sensor has ended: see the log"
    assert metrics["state"]["graphsage_streaming"]["on"] is False
    assert metrics["packet_counters"] == PACKETS
    assert on_the_interface(pair) is None
    with pytest.raises(RuntimeError, match="the ring is gone"):
        monitoring.shutdown()
    assert monitoring.get_packet_counters() == PACKETS


SCRIPT = """
import json, sys
from flowsage.pipelines import create_ebpf_monitoring
with create_ebpf_monitoring(sys.argv[1]) as monitoring:
    metrics = monitoring.get_metrics()
    metrics["torch"] = sys.modules.get("torch") is not None
    print(json.dumps(metrics))
"""
NO_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torch_geometric", "numba", "communityid", "networkx"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_without_torch_the_counters_work_and_the_state_says_what_to_install(pair: VethPair) -> None:
    with pair.inside():
        metrics = json.loads(run(sys.executable, "-c", NO_TORCH + SCRIPT, pair.receiver))
    assert metrics["packet_counters"] == dict.fromkeys(PACKETS, 0)
    assert metrics["program"]["name"] == "xdp_counter"
    assert metrics["program"]["attached"]
    assert metrics["state"]["xdp_counter"] == {"on": True, "by": "xdp_counter", "reason": None}
    assert metrics["state"]["graphsage_streaming"] == {
        "on": False,
        "reason": "torch is not installed; `pip install 'flowsage[model]'` adds it",
    }
    assert not metrics["torch"]
    assert on_the_interface(pair) is None


def test_without_torch_and_counter_nothing_remains_and_that_is_an_error(pair: VethPair) -> None:
    script = NO_TORCH + (
        "from flowsage.collector import FlowsageError\n"
        "from flowsage.pipelines import create_ebpf_monitoring\n"
        f"try:\n    create_ebpf_monitoring({pair.receiver!r}, enable_xdp_counter=False)\n"
        "except FlowsageError as error:\n    print(type(error).__name__, error)\n"
    )
    with pair.inside():
        said = run(sys.executable, "-c", script)
    assert said.startswith("NothingToMonitorError")
    assert "torch is not installed" in said


def test_without_libbpf_the_counter_is_loaded_by_bpftool(pair: VethPair) -> None:
    """In a mount namespace where libbpf.so.1 is an empty file."""
    library = next(Path("/usr/lib").glob("*/libbpf.so.1")).resolve()
    hide = f'mount --bind /dev/null {library} && exec "$0" -c "$1" "$2"'
    with pair.inside():
        metrics = json.loads(run("unshare", "--mount", "sh", "-c", hide, sys.executable, SCRIPT, pair.receiver))
    assert metrics["packet_counters"] == dict.fromkeys(PACKETS, 0)
    assert metrics["program"]["attached"]
    assert "package libbpf1" in metrics["state"]["graphsage_streaming"]["reason"]
    assert on_the_interface(pair) is None


def test_what_cannot_be_watched_is_an_error_that_leaves_nothing(pair: VethPair) -> None:
    with pytest.raises(ConfigurationError, match="leave one of them on"):
        watch(pair, enable_xdp_counter=False, enable_graphsage_streaming=False)
    with pytest.raises(MissingInterfaceError, match=f"no interface 'fsmo9'.*{pair.receiver}"):
        create_ebpf_monitoring("fsmo9", netns=pair.home)
    with create_ebpf_loader() as loader:
        other = loader.load_program("xdp_counter.o")
        with pair.inside():
            loader.attach_to_interface(other, pair.receiver, EBPFAttachMode.SKB)
        for streaming in (False, True):
            with pytest.raises(BusyInterfaceError, match=f"runs XDP program {other} "):
                watch(pair, enable_graphsage_streaming=streaming)
            assert on_the_interface(pair) == ("skb", other)


def test_an_interface_that_goes_away_is_told_and_its_counts_stay() -> None:
    with veth_pair("fsmg") as pair, watch(pair, enable_graphsage_streaming=False) as monitoring:
        send(pair, FRAMES)
        eventually(lambda: monitoring.get_packet_counters() == PACKETS)
        with pair.inside():
            run("ip", "link", "del", pair.receiver)
        metrics = monitoring.get_metrics()
        assert metrics["interface_state"] is None
        assert not metrics["program"]["attached"]
        assert metrics["packet_counters"] == PACKETS


def test_the_public_names_are_these_and_importing_them_brings_no_torch() -> None:
    names = "DetectionFinding EBPFMonitoring Settings Subscription create_ebpf_monitoring subscribe"
    assert flowsage.pipelines.__all__ == names.split()
    assert all(getattr(flowsage.pipelines, name) for name in flowsage.pipelines.__all__)
    assert not hasattr(flowsage.pipelines, "create_everything")
    code = (
        "import sys, time; t = time.process_time()\n"
        "import flowsage.pipelines\n"
        "print(time.process_time() - t < 0.1)\n"
        "from flowsage.pipelines import create_ebpf_monitoring\n"
        "print('torch' in sys.modules, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]
