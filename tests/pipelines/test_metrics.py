"""Metrics as Prometheus reads them, over HTTP."""

import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from flowsage.pipelines.cli import main
from flowsage.pipelines.metrics import METRICS, Metrics, MetricsServerError
from flowsage.pipelines.status import NotRunningError, fetch, lines


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def served() -> Iterator[tuple[Metrics, int]]:
    metrics, port = Metrics(), free_port()
    metrics.serve("127.0.0.1", port)
    yield metrics, port
    metrics.close()


def example() -> dict[str, float | dict[str, float]]:
    return {m.name: {"some": 3.0, "other": 4.0} if m.label else 5.0 for m in METRICS if m.kind != "info"} | {
        "flowsage_build": {"1.2.3": 1.0}
    }


def test_every_metric_passes_promtools_check(served: tuple[Metrics, int]) -> None:
    metrics, port = served
    metrics.add(example)
    metrics.pane_seconds.observe(0.1)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read()
    promtool = shutil.which("promtool")
    assert promtool, "set-up installs promtool (Debian package prometheus)"
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    for metric in METRICS:
        assert f"# TYPE {metric.name}{ {'counter': '_total', 'info': '_info'}.get(metric.kind, '') }".encode() in text


def test_a_later_source_adds_to_an_earlier_one_and_values_are_read_at_scrape_time(served: tuple[Metrics, int]) -> None:
    metrics, port = served
    packets = [10.0]
    metrics.add(lambda: {"flowsage_packets": packets[0]})
    metrics.add(lambda: {"flowsage_packets_unaccounted": {"non_ip": 2.0}})
    assert fetch("127.0.0.1", port)["flowsage_packets_total"] == {"": 10.0}
    packets[0] = 11.0
    samples = fetch("127.0.0.1", port)
    assert samples["flowsage_packets_total"] == {"": 11.0}
    assert samples["flowsage_packets_unaccounted_total"] == {"non_ip": 2.0}


def test_a_metric_that_is_not_in_the_table_is_an_error() -> None:
    metrics = Metrics()
    metrics.add(lambda: {"flowsage_surprise": 1.0})
    with pytest.raises(KeyError, match="flowsage_surprise"):
        metrics.snapshot()


def test_a_port_in_use_is_one_sentence(served: tuple[Metrics, int]) -> None:
    _, port = served
    with pytest.raises(MetricsServerError, match=f"127.0.0.1:{port} .*--metrics-port"):
        Metrics().serve("127.0.0.1", port)


def test_status_says_whether_the_ledger_closes(served: tuple[Metrics, int]) -> None:
    metrics, port = served
    values = example()
    metrics.add(lambda: values)
    screen = "\n".join(lines(fetch("127.0.0.1", port)))
    assert "5 PACKETS UNEXPLAINED" in screen
    values["flowsage_ledger_imbalance_packets"] = 0.0
    assert "closes exactly" in "\n".join(lines(fetch("127.0.0.1", port)))


def test_status_says_how_long_an_interface_went_unwatched(served: tuple[Metrics, int]) -> None:
    metrics, port = served
    values = example()
    metrics.add(lambda: values)
    values["flowsage_interface_unwatched_seconds"] = {}
    assert "not watched" not in "\n".join(lines(fetch("127.0.0.1", port)))
    values["flowsage_interface_unwatched_seconds"] = {"eth0": 0.0123}
    assert "eth0 was not watched for 12.3 ms" in "\n".join(lines(fetch("127.0.0.1", port)))


def test_status_says_how_much_of_the_calibration_is_there_and_when_the_rest_is_expected(
    served: tuple[Metrics, int],
) -> None:
    metrics, port = served
    values = example() | {
        "flowsage_calibration_ready": 0.0,
        "flowsage_calibration_blocks": 2.0, "flowsage_calibration_blocks_needed": 4.0,
        "flowsage_calibration_host_blocks": 17.0, "flowsage_calibration_host_blocks_needed": 24.0,
        "flowsage_calibration_expected_timestamp_seconds": 1_767_571_200.0, "flowsage_budget_ratio": 0.1,
    }  # fmt: skip
    metrics.add(lambda: values)
    not_ready = "alarms     not ready: 2 of 4 blocks and 17 of 24 host-blocks of calibration seen, "
    assert not_ready + "ready at about 2026-01-05 00:00:00 UTC\n" in "\n".join(lines(fetch("127.0.0.1", port)))
    values |= {"flowsage_calibration_ready": 1.0, "flowsage_budget_ratio": 0.25}
    ready = "alarms     ready: calibrated on 17 host-blocks; 25% of the budget is in force"
    assert ready in lines(fetch("127.0.0.1", port))


def test_status_with_nobody_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotRunningError, match=r"is `flowsage run` running"):
        fetch("127.0.0.1", free_port())
    # Other sensors may be in this machine's kernel.
    monkeypatch.setattr("flowsage.pipelines.status.inventory", list)
    done = CliRunner().invoke(main, ["status", "--port", str(free_port())])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "flowsage: nothing of FlowSAGE is in the kernel, and no FlowSAGE answers at http://127"
    )
    assert len(done.stderr.splitlines()) == 1


def test_status_of_a_process_that_has_only_begun_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint answers before the first packet is counted, and while the program is compiled."""
    monkeypatch.setattr("flowsage.pipelines.status.inventory", list)
    metrics, port = Metrics(), free_port()
    metrics.serve("127.0.0.1", port)
    try:
        done = CliRunner().invoke(main, ["status", "--port", str(port)])
    finally:
        metrics.close()
    assert (done.exit_code, done.stdout) == (0, "process    it has only begun: nothing is counted yet\n")
