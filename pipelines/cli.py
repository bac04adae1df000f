"""The `flowsage` command: data on stdout, messages on stderr, exit codes 0, 1, 2, 77 (permission), 78 (configuration).

Commands import what they need when they run, so that a sensor needs no torch and starts at once.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from flowsage.collector.errors import FlowsageError, UsageError
from flowsage.pipelines.options import (
    DAY,
    EXISTING,
    FOLDER,
    MOMENT,
    TARGET,
    config_options,
    duration,
    duration_option,
    kafka_options,
    model_options,
    need_kafka,
    need_model,
    sensor_options,
    settings_from,
)

LAB_DEFAULTS: dict[str, dict[str, Any]] = {
    "sensor": {"idle_timeout": "4s", "active_timeout": "6s", "half_open_timeout": "1s", "linger": "0.5s",
               "sweep_interval": "0.5s", "name": "lab"},
    "windows": {"window": "6s", "pane": "1s"},
    "model": {"ready_windows": 12, "ready_meetings": 80, "ready_steps": 8},
    "alarms": {"time_scale": 60, "budget": 50, "settle": "1h"},
}  # fmt: skip
"""The lab runs a day in 24 minutes: short timeouts, windows and panes, alarms and graph that are ready in a minute."""


EXTRAS = {
    **dict.fromkeys(("communityid", "networkx", "numba", "safetensors", "torch", "torch_geometric"), "model"),
    **dict.fromkeys(("aiohttp", "asyncssh", "dnslib"), "lab"),
}
"""Packages that a sensor does without, and which of our extras brings them."""


class Group(click.Group):
    """Turns FlowSAGE's own errors into one sentence on stderr and the exit code that they carry."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except FlowsageError as e:
            click.echo(f"flowsage: {e}", err=True)
            ctx.exit(e.exit_code)
        except ModuleNotFoundError as e:
            name = (e.name or "").partition(".")[0]
            if name not in EXTRAS:
                raise
            click.echo(f"flowsage: {name} is not installed; `pip install 'flowsage[{EXTRAS[name]}]'` adds it", err=True)
            ctx.exit(1)
        except RuntimeError as e:
            if "no locator available" not in str(e):  # numba's words where neither our folder nor ~/.cache will do
                raise
            said = "compiled kernels can be kept neither beside the package nor in ~/.cache"
            click.echo(f"flowsage: {said}; set NUMBA_CACHE_DIR to a folder that this user may write to", err=True)
            ctx.exit(1)
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(0)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flowsage", prog_name="flowsage")
def main() -> None:
    """Say which hosts of a network behave unlike themselves, from the kernel up.

    \b
    flowsage run --interface eth0     watch an interface, print findings
    flowsage run --lab                the same on a small network of its own, with an attack in it
    flowsage replay FILE --findings - the same over a capture or a file of flows
    """


@main.command()
@sensor_options
@model_options
@config_options
@click.option("--lab", is_flag=True, help="watch a small network of real hosts in namespaces, with a scan in it")
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    metavar="WHEN:NAME",
    help="with --lab: such as 75:scan or 2m:worm",
)
@click.option("--pcap", type=EXISTING, help="send a capture through the XDP program, by its own clock")
@click.option("--flows", type=EXISTING, help="a Parquet file of flows")
@click.option(
    "--findings",
    type=click.Path(path_type=Path, allow_dash=True),
    default="-",
    help="where findings go: FILE or - (stdout)",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines even where stdout is a terminal")
@duration_option
@click.option("--metrics-port", type=int, help="port of /metrics (default 9436)")
@click.option("--no-metrics", is_flag=True, help="without the HTTP endpoint")
def run(**options: Any) -> None:
    """Everything in one process: packets (or a file) in, findings out."""
    lab = options["lab"]
    settings = settings_from(options, LAB_DEFAULTS if lab else None)
    chosen = [n for n in ("lab", "pcap", "flows") if options[n]] + (["interface"] if settings.sensor.interfaces else [])
    if lab and "interface" in chosen:
        raise UsageError("--lab brings its own interfaces; name either --lab or --interface")
    if len(chosen) != 1:
        raise UsageError(
            f"name {'only one thing' if chosen else 'what'} to watch: "
            "--interface IF, --lab, --pcap FILE or --flows FILE"
        )
    if options["attacks"] and not lab:
        raise UsageError("--attack is what happens in the lab: it goes with --lab")
    need_model(settings)
    if find_spec("numba") is None:
        # The model is imported only once packets are counted; without it none should be.
        raise ModuleNotFoundError(name="numba")
    from flowsage.pipelines.run import run_file, run_live

    output = {"findings": options["findings"], "as_json": options["as_json"]}
    if options["pcap"] or options["flows"]:
        run_file(settings, options["pcap"], options["flows"], **output)
    else:
        run_live(settings, lab=lab, attacks=options["attacks"], duration_s=options["duration"], **output)


@main.command()
@sensor_options
@kafka_options
@config_options
@click.option("-o", "--output", help="a folder for Parquet files, or - for lines (default: Kafka, if named, else -)")
@duration_option
@click.option("--name", help="of the sensor (default: the host's)")
@click.option("--no-pin", is_flag=True, help="the program ends with this process; otherwise it survives a kill")
@click.option("--keep-privileges", is_flag=True, default=None, help="do not give up capabilities after attaching")
@click.option("--detach", is_flag=True, help="remove what is in the kernel of this sensor, or of any on --interface")
def collect(**options: Any) -> None:
    """Only the sensor: flow records to Kafka, to files or to the terminal. No model, no torch."""
    settings = settings_from(options)
    if options["detach"]:
        from flowsage.pipelines.sensor import detach

        detach(settings, options["interfaces"])
        return
    if not settings.sensor.interfaces:
        raise UsageError("name an interface to watch: --interface IF")
    from flowsage.collector.privileges import without_early_threads

    without_early_threads()
    from flowsage.pipelines.sensor import run_collect

    run_collect(settings, output=options["output"], duration_s=options["duration"])


@main.command()
@click.argument("source", type=EXISTING, metavar="INPUT")
@model_options
@config_options
@click.option("--records", type=TARGET, help="write flow records (Parquet)")
@click.option("--no-timeouts", is_flag=True, help="one record a 5-tuple, ended by nothing but the end of the input")
@click.option("--ledger", type=TARGET, help="write what became of every packet (JSON)")
@click.option("--scores", type=TARGET, help="write a score a flow, in input order (Parquet)")
@click.option("--hosts", type=TARGET, help="write a score a host and window (Parquet)")
@click.option(
    "--findings", type=click.Path(path_type=Path, allow_dash=True), help="write findings (JSON lines, or .parquet)"
)
def replay(source: Path, **options: Any) -> None:
    """Offline, as fast as it can: a capture (pcap, pcapng) or a Parquet file of flows."""
    settings = settings_from(options)
    need_model(settings)
    from flowsage.pipelines.replay import Outputs
    from flowsage.pipelines.replay import replay as replay_file

    outputs = Outputs(**{k: options[k] for k in ("records", "ledger", "scores", "hosts", "findings")})
    replay_file(source, settings, outputs, no_timeouts=options["no_timeouts"])


@main.command()
@click.argument("flows", type=EXISTING, nargs=-1, metavar="[FLOWS...]")
@click.option("--from", "begin", type=MOMENT, help="instead of FLOWS: those of the topic from this moment on (UTC)")
@click.option("--to", "end", type=MOMENT, help="with --from: up to this moment; default: now")
@click.option("--partition", type=click.IntRange(0), help="with --from: of this partition alone")
@kafka_options
@click.option("-o", "--output", "into", type=FOLDER, required=True, help="where the model directory goes")
@click.option("--steps", type=click.IntRange(0), default=200, show_default=True, help="steps of rehearsal")
@click.option("--batches", type=click.IntRange(1), default=4, show_default=True, help="batches a step, dealt out")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto: a GPU if there is one")
@click.option("--checkpoint", type=click.IntRange(1), default=1 << 18, show_default=True, help="flows from one to next")
@click.option("--restart", is_flag=True, help="forget a training that was interrupted")
@model_options
@config_options
def train(flows: tuple[Path, ...], into: Path, **options: Any) -> None:
    """Learn from flow files (Parquet) or from Kafka, and write a model directory that run, score and replay start from.

    \b
    flowsage train monday.parquet tuesday.parquet --output models/office
    flowsage train --kafka kafka1:9092 --from 2026-01-05 --to 2026-01-12 --output models/office
    torchrun --nproc-per-node 2 -m flowsage.pipelines.cli train FLOWS... --output DIR
    """
    own = ("steps", "batches", "device", "checkpoint", "restart")
    training = {"checkpoint_flows" if k == "checkpoint" else k: options.pop(k) for k in own}
    begin, end = (options.pop(k) for k in ("begin", "end"))
    training |= {
        "begin_ns": None if begin is None else round(begin.replace(tzinfo=UTC).timestamp()) * 10**9,
        "end_ns": None if end is None else round(end.replace(tzinfo=UTC).timestamp()) * 10**9,
        "partition": options.pop("partition"),
    }
    settings = settings_from(options)
    if bool(flows) == (begin is not None):
        raise UsageError("name what to learn from: flow files, or --from MOMENT for a time range of the topic")
    if begin is not None:
        need_kafka(settings)
    from flowsage.pipelines.train import TrainSettings, interrupted
    from flowsage.pipelines.train import train as train_model
    from flowsage.pipelines.world import World

    chosen = TrainSettings(**training)
    try:
        train_model(flows, into, settings, chosen)
    except KeyboardInterrupt:
        if World().leads:
            click.echo(interrupted(into, chosen), err=True)
        sys.exit(130)


@main.command()
@config_options
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    metavar="WHEN:NAME",
    help="such as 75:scan or 2m:worm; repeat",
)
@duration_option
@click.option("--record", type=TARGET, help="record the wire as a capture")
@click.option("--flows", type=TARGET, help="record labelled flows (Parquet)")
@click.option("--truth", type=TARGET, help="write what really happened (JSON lines)")
@click.option("--simulate", type=TARGET, help="no hosts: write labelled flows of a simulated enterprise (Parquet)")
@click.option("--start", type=DAY, help="with --simulate: its first day, such as 2026-01-05, the default (a Monday)")
@click.option("--days", type=float, default=4.0, show_default=True, help="with --simulate: how long")
@click.option("--hosts", type=int, default=300, show_default=True, help="with --simulate: how many hosts it has")
@click.option("--repeats", type=int, default=2, show_default=True, help="with --simulate: attacks of each kind")
@click.option("--seed", type=int, help="seed of habits and misbehaviour")
def lab(**options: Any) -> None:
    """A small network of real hosts in namespaces: services, clients, and on request misbehaviour.

    Misbehaviour: scan, slow-scan, worm, guess, beacon, exfil, flood; WHEN:NAME@HOST lets another host do it.
    With --simulate a far larger network that exists only as flows.
    """
    settings = settings_from(options, LAB_DEFAULTS)
    if options["simulate"]:
        start: datetime | None = options["start"]
        if options["attacks"] or options["record"] or options["flows"] or options["duration"]:
            raise UsageError("--simulate writes flows of --days days; it has no wire to record and no schedule")
        from flowsage.pipelines.enterprise.command import write_simulation

        write_simulation(
            options["simulate"],
            start=start.date() if start else None,
            days=options["days"],
            hosts=options["hosts"],
            repeats=options["repeats"],
            seed=settings.model.seed,
            truth=options["truth"],
        )
        return
    if options["start"]:
        raise UsageError("--start is the first day of --simulate; hosts of the lab live now")
    from flowsage.pipelines.lab_session import lab_session

    lab_session(
        settings,
        attacks=options["attacks"],
        duration_s=options["duration"],
        record=options["record"],
        flows=options["flows"],
        truth=options["truth"],
    )


@main.command()
@config_options
@kafka_options
@click.option("--create", is_flag=True, help="make the topics that are not there")
@click.option("--dry-run", is_flag=True, help="with --create: only say what would be done")
@click.option("--partitions", type=click.IntRange(1), help="sites scored apart, at most; default: as it is, or 8")
@click.option("--replication", type=click.IntRange(1), help="replicas; default: 3, or as many brokers as there are")
@click.option("--timeout", type=duration, default="30s", show_default=True, help="how long to wait for the brokers")
def topics(**options: Any) -> None:
    """Look after the topics in Kafka: make them, and say what is not as it should be."""
    settings = settings_from(options)
    need_kafka(settings)
    from flowsage.pipelines.topics import look_after
    from flowsage.pipelines.topics import topics as wanted

    plan = wanted(settings.kafka.prefix, partitions=options["partitions"] or 0, replication=options["replication"] or 0)
    create = options["create"] and not options["dry_run"]
    for report in look_after(settings.kafka, plan, create=create, timeout_s=options["timeout"]):
        click.echo(str(report))


@main.command()
@kafka_options
@model_options
@config_options
@click.option("--state", help="folder or URL (s3://bucket/path) where what was learnt is kept, for whoever goes on")
@duration_option
@click.option("--metrics-port", type=int, help="port of /metrics (default 9436)")
@click.option("--no-metrics", is_flag=True, help="without the HTTP endpoint")
def score(**options: Any) -> None:
    """Flows from Kafka in, findings to Kafka out. Start as many as there are sites: they share the partitions."""
    settings = settings_from(options)
    need_kafka(settings)
    from flowsage.pipelines.score import run_score

    run_score(settings, duration_s=options["duration"])


@main.command()
@kafka_options
@config_options
@click.option("--json", "as_json", is_flag=True, help="JSON lines (OCSF), as published")
@click.option("-e", "--evidence", is_flag=True, help="with the flows that made each finding")
@click.option("--severity", default="unknown", help="the least to show: low, medium, high, critical")
@click.option("--host", help="only findings that name this address or one of this network")
@click.option("--since", help="begin with what was published then: 2h (ago), 2026-11-24T12:00, earliest; default now")
@click.option("--no-follow", is_flag=True, help="stop when all that is there is shown")
def watch(**options: Any) -> None:
    """Findings from Kafka as they come, a line each."""
    settings = settings_from(options)
    need_kafka(settings)
    from flowsage.pipelines.watch import watch as watch_findings

    names = ("as_json", "evidence", "severity", "host", "since")
    watch_findings(settings, follow=not options["no_follow"], **{k: options[k] for k in names})


@main.command()
@click.option("--address", default="127.0.0.1", help="where `flowsage run` serves its metrics")
@click.option("--port", "--metrics-port", "port", type=int, default=9436, show_default=True, help="port of its metrics")
@click.option("--json", "as_json", is_flag=True, help="as one JSON object")
def status(address: str, port: int, as_json: bool) -> None:
    """Ask a running FlowSAGE how it is: packets, ledger, windows, model, findings."""
    from flowsage.pipelines.status import show

    show(address, port, as_json=as_json)


@main.command()
@click.argument("kind", type=click.Choice(["collect", "score"]))
@click.option(
    "--config", type=EXISTING, default="/etc/flowsage/flowsage.toml", show_default=True, help="its configuration file"
)
def unit(kind: str, config: Path) -> None:
    """Print the systemd unit of the sensor (collect) or of the scorer (score), for this installation.

    \b
    flowsage unit collect > /etc/systemd/system/flowsage-collect.service
    systemctl enable --now flowsage-collect
    """
    from flowsage.pipelines.unit import closed_to_others
    from flowsage.pipelines.unit import unit as unit_file

    if kind == "score" and (folder := closed_to_others(Path(sys.executable))):
        said = f"the scorer runs as a user of its own, who may not pass {folder} to get to {sys.executable}"
        click.echo(f"flowsage: {said}: install FlowSAGE elsewhere, such as in /opt", err=True)
    click.echo(unit_file(kind, config), nl=False)


if __name__ == "__main__":
    main()
