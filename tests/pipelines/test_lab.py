"""The lab's life: real namespaces, sockets and tools, so root is needed and nothing is imitated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowsage.collector.errors import ConfigurationError, FlowsageError, UsageError
from flowsage.pipelines.cli import main
from flowsage.pipelines.lab import ATTACKS, Lab, LabSettings, Scheduled, parse_schedule, run_lab
from flowsage.pipelines.lab.attacks import RUNS
from flowsage.pipelines.lab.network import namespaces, processes_in
from flowsage.pipelines.lab.plan import HOSTS
from tests.pipelines.lab_played import Played, alive, needs_root, packets_of, play, port_packets, remains, until


@pytest.fixture(name="played", scope="module")
def fixture_played() -> Played:
    return play()


@needs_root
def test_traffic_flows_within_three_seconds_of_the_start(played: Played, tmp_path: Path) -> None:
    seconds = [played.first_packet_s]
    # Where something else keeps the machine busy at that moment, another start tells.
    while min(seconds) >= 3 and len(seconds) < 6:
        began = time.monotonic()
        with Lab(LabSettings(prefix="fslbu", truth_path=tmp_path / "truth.jsonl")) as lab:
            assert until(lambda: port_packets(lab) > 0, 60)
            seconds.append(time.monotonic() - began)
    assert min(seconds) < 3, seconds


@needs_root
def test_every_host_has_a_namespace_a_port_and_a_process(played: Played) -> None:
    names = [host.name for host in played.lab.hosts]
    assert len(names) == len(set(names)) >= 14
    assert set(played.processes) == set(names)
    assert played.namespace_count == len(names) + 1
    assert all(len(interface) <= 15 for interface in played.lab.interfaces)
    assert played.lost_hosts == []


@needs_root
def test_hosts_talk_as_their_roles_say(played: Played) -> None:
    total: Counter[str] = Counter()
    for counters in played.counters.values():
        total.update(counters)
    for success in ("http_ok", "dns_ok", "ping_ok", "transfers_ok", "datagrams_received"):
        assert total[success] > 0, success
    assert total["http_ok"] > 50
    services = {(packet[4], packet[5]) for packet in played.packets if packet[6] == 0x02 or packet[5] == 17}
    assert {(80, 6), (443, 6), (8080, 6), (445, 6), (53, 17), (123, 17), (514, 17)} <= services
    senders = {packet[1] for packet in played.packets}
    assert {host.address for host in HOSTS if host.role not in ("c2", "dropzone")} <= senders


@needs_root
def test_a_quiet_lab_leaves_the_cores_to_the_detector(played: Played) -> None:
    assert played.quiet_cpu < 0.30


@needs_root
def test_each_packet_enters_the_bridge_once_and_is_recorded_once(played: Played) -> None:
    assert played.recorded.dropped == 0
    # The two counts are taken a moment apart, while traffic flows.
    assert played.recorded.packets == pytest.approx(played.recorded_ports, abs=200)
    assert played.recorded.packets > 5_000
    segments = Counter(packet for packet in played.packets if packet[5] == 6 and packet[6] & 0x02)
    assert max(segments.values()) == 1


@needs_root
def test_stop_leaves_no_namespace_no_interface_and_no_process(played: Played) -> None:
    assert played.remains == []
    assert played.living == []


# Being killed, being refused


@needs_root
def test_when_the_caller_is_killed_the_lab_goes_too(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from flowsage.pipelines.lab import *\n"
        f"lab = Lab(LabSettings(prefix='fslbk', truth_path=Path({str(tmp_path / 'truth.jsonl')!r}))).start()\n"
        "print('up', flush=True); time.sleep(60)"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    assert caller.stdout.readline() == "up\n"
    assert len(remains("fslbk")) > 20
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert until(lambda: not remains("fslbk"), 15)


@needs_root
def test_what_a_killed_lab_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    settings = LabSettings(prefix="fslbs", truth_path=tmp_path / "truth.jsonl")
    first = Lab(settings).start()
    supervisor = int(Path(f"/proc/{first.processes['web']}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    assert until(lambda: not any(alive(pid) for pid in first.processes.values()), 15), "hosts outlive their parent"
    stale = namespaces("fslbs")
    assert len(stale) > 14
    with pytest.raises(FlowsageError, match="has ended by itself"):
        first.start_attack("beacon")
    with Lab(settings) as second:
        assert processes_in([Path(host.namespace) for host in second.hosts])
        assert until(lambda: second.counters()["gw"].get("datagrams_received", 0) > 0, 60)
        with pytest.raises(FlowsageError, match="already runs"):
            Lab(settings).start()
        with pytest.raises(FlowsageError, match=r"cannot be recorded to .*No such file"):
            second.record(tmp_path / "absent" / "lab.pcap")
        with pytest.raises(UsageError, match="no misbehaviour is called 'earthquake'"):
            second.start_attack("earthquake")
        with pytest.raises(UsageError, match="no parameter beets"):
            second.start_attack("beacon", beets=3)
        with pytest.raises(UsageError, match="no host of the lab"):
            second.run_schedule([Scheduled(1, "worm", "nobody")])
    assert remains("fslbs") == []
    first.stop()


@needs_root
def test_namespaces_go_even_when_somebody_mounted_over_them(tmp_path: Path) -> None:
    code = (
        "import subprocess; from pathlib import Path; from flowsage.pipelines.lab import *\n"
        "from flowsage.pipelines.lab.network import namespaces\n"
        f"with Lab(LabSettings(prefix='fslbm', truth_path=Path({str(tmp_path / 'truth.jsonl')!r}))):\n"
        "    subprocess.run(['mount', '--rbind', '/run/netns', '/run/netns'], check=True)\n"
        "print(namespaces('fslbm'))"
    )
    # In a mount namespace of its own, so that nobody else's namespaces are mounted over.
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
    assert until(lambda: not remains("fslbm"), 15)


@needs_root
def test_the_command_plays_its_schedule_and_stops_on_a_signal(tmp_path: Path) -> None:
    said = StringIO()

    def press_ctrl_c(lab: Lab) -> None:
        # From a thread: the main one is about to wait.
        subprocess.Popen(["sh", "-c", f"sleep 3; kill -INT {os.getpid()}"])

    began = time.monotonic()
    truths = run_lab(
        LabSettings(prefix="fslbc", truth_path=tmp_path / "truth.jsonl"),
        schedule="0.5:beacon@office1",
        record=tmp_path / "lab.pcap",
        duration_s=30,
        out=said,
        on_started=press_ctrl_c,
    )
    assert time.monotonic() - began < 25
    assert [(truth.attack, truth.attacker, truth.status) for truth in truths] == [("beacon", "office1", "stopped")]
    assert truths[0].steps
    assert (truths[0].end_ns or 0) - truths[0].start_ns > 1_000_000_000
    assert "10.77.0.101" in said.getvalue()
    assert "beacon-1: office1 (10.77.0.101) begins, towards 198.51.100.66" in said.getvalue()
    assert packets_of(tmp_path / "lab.pcap")
    assert remains("fslbc") == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_schedule_that_cannot_be_played_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    truth = tmp_path / "truth.jsonl"
    done = CliRunner().invoke(main, ["lab", "--attack", "10:foo", "--truth", str(truth), "--duration", "1"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"flowsage: no misbehaviour is called 'foo': choose from {', '.join(ATTACKS)}\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no host of the lab is called 'nobody'"):
        run_lab(LabSettings(truth_path=truth), schedule="1:worm@nobody")
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_without_nmap_the_scan_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlowsageError, match="apt install nmap"):
        Lab(LabSettings()).run_schedule("10:scan")


@pytest.mark.parametrize("settings", [LabSettings(prefix="toolong"), LabSettings(prefix="A"), LabSettings(pace=0)])
def test_settings_that_cannot_be_are_refused(settings: LabSettings) -> None:
    with pytest.raises(ConfigurationError):
        Lab(settings)


def test_every_misbehaviour_has_a_way_to_be_done() -> None:
    assert set(ATTACKS) == set(RUNS)
    assert f"Misbehaviour: {', '.join(ATTACKS)};" in " ".join(
        CliRunner().invoke(main, ["lab", "--help"]).output.split()
    )
    assert len({attack.attacker for attack in ATTACKS.values()}) == len(ATTACKS)


def test_a_schedule_is_read_in_order_of_time() -> None:
    assert parse_schedule("2.5m:worm@office1, 75:scan") == [
        Scheduled(75, "scan"),
        Scheduled(150, "worm", "office1"),
    ]
    for wrong in ("scan@75", "soon:scan", "5parsecs:scan"):
        with pytest.raises(UsageError, match="WHEN:ATTACK"):
            parse_schedule(wrong)
