"""What the README says is there, is there."""

import re
import shlex
import subprocess
import sys

from click.testing import CliRunner

from flowsage.pipelines.cli import main
from flowsage.pipelines.metrics import METRICS
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_metric_is_in_the_table_and_nothing_else() -> None:
    suffix = {"counter": "_total", "gauge": "", "info": "_info"}
    table = set(re.findall(r"^\| `(flowsage_\w+)", README, re.M))
    assert table - {"flowsage_pane_seconds"} == {m.name + suffix[m.kind] for m in METRICS}


def test_every_command_and_option_that_is_shown_exists() -> None:
    shown = set()
    for line in re.findall(r"^flowsage [^\n]+", README, re.M):
        words = shlex.split(line.split("#")[0].split("|")[0])
        shown.add(words[1])
        help_text = CliRunner().invoke(main, [words[1], "--help"]).output
        for option in (w for w in words if w.startswith("--")):
            assert option in help_text, line
    assert shown >= {"run", "collect", "replay", "lab", "status"}


def test_the_example_in_python_runs(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from tests.pipelines.test_replay import scan_flows

    scan_flows(tmp_path / "lab.parquet", minutes=12)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
