"""The options that several commands share, and the configuration that the options of one come to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from flowsage.collector.errors import ModelError, UsageError
from flowsage.pipelines.config import load
from flowsage.pipelines.quantities import seconds
from flowsage.pipelines.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])
EXISTING = click.Path(path_type=Path)
TARGET = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
DAY = click.DateTime(["%Y-%m-%d"])
MOMENT = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"])


def duration(value: str) -> float:
    """A duration in the forms that the configuration knows ("300", "5m", "250ms"), as seconds: a type of click's.

    Refuses (exit code 2) what is none.
    """
    try:
        return seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def config_options(command: F) -> F:
    """--config, --check-config, --show-config and -v, which every command that is configured takes."""
    for option in (
        click.option("--config", type=EXISTING, help="TOML file (default: $FLOWSAGE_CONFIG)"),
        click.option("--check-config", is_flag=True, help="say whether the configuration is right, and stop"),
        click.option("--show-config", is_flag=True, help="print the configuration in force as TOML, and stop"),
        click.option("-v", "--verbose", count=True, help="say more on stderr (-vv: everything)"),
    ):
        command = option(command)
    return command


def sensor_options(command: F) -> F:
    """What concerns the kernel program."""
    for option in (
        click.option("-i", "--interface", "interfaces", multiple=True, help="interface to watch; repeat for several"),
        click.option("--mode", type=click.Choice(["auto", "drv", "skb", "hw"]), help="XDP mode"),
        click.option("--mirror", is_flag=True, default=None, help="drop packets once counted (the port only mirrors)"),
        click.option("--replace", is_flag=True, default=None, help="replace somebody else's XDP program"),
        click.option("--egress", is_flag=True, default=None, help="count what leaves the interfaces too"),
        click.option("--dedupe", is_flag=True, default=None, help="count a packet that several interfaces see once"),
        click.option("--loader", type=click.Choice(["auto", "libbpf", "bcc"]), help="shipped program, or compiled"),
    ):
        command = option(command)
    return command


def model_options(command: F) -> F:
    """What concerns windows, model and alarms."""
    for option in (
        click.option("--window", type=duration, help="window, such as 60s or 5m"),
        click.option("--pane", type=duration, help="pane, such as 10s"),
        click.option("--budget", type=float, help="false findings a day per 100 hosts that you accept"),
        click.option("--undirected", is_flag=True, default=None, help="the flows' direction is not known"),
        click.option("--model", "directory", type=FOLDER, help="model directory to start from, and to watch"),
        click.option("--no-graph", is_flag=True, default=None, help="without the GraphSAGE prior"),
        click.option("--seed", type=int, help="seed of the model"),
    ):
        command = option(command)
    return command


def kafka_options(command: F) -> F:
    """Where Kafka is; everything else about it is configuration."""
    for option in (
        click.option("--kafka", metavar="HOST:PORT", help="Kafka brokers, comma-separated"),
        click.option("--prefix", help="what the topics' names begin with"),
    ):
        command = option(command)
    return command


def settings_from(options: dict[str, Any], defaults: dict[str, dict[str, Any]] | None = None) -> Settings:
    """The configuration in force, from the options a command was given; --check-config and --show-config end here."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(options.pop("verbose"), logging.DEBUG)
    # Its own words about every lost connection would drown ours.
    quiet = {logging.WARNING: logging.CRITICAL, logging.INFO: logging.ERROR}.get(level, logging.INFO)
    logging.getLogger("kafka").setLevel(quiet)
    logging.basicConfig(level=level, format="flowsage: %(levelname)s: %(message)s", stream=sys.stderr)
    path, check, show = options.pop("config"), options.pop("check_config"), options.pop("show_config")
    prior = "none" if options.get("no_graph") else None
    flags: dict[str, dict[str, Any]] = {
        "sensor": {k: options.get(k) for k in ("mode", "mirror", "replace", "egress", "dedupe", "loader", "name")}
        | {"interfaces": options.get("interfaces") or None, "pins": "" if options.get("no_pin") else None}
        | {"keep_privileges": options.get("keep_privileges")},
        "windows": {k: options.get(k) for k in ("window", "pane")},
        "model": {k: options.get(k) for k in ("undirected", "seed")}
        | {"prior": prior, "directory": str(options["directory"]) if options.get("directory") else None},
        "alarms": {"budget": options.get("budget")},
        "kafka": {"bootstrap_servers": options.get("kafka"), "prefix": options.get("prefix")},
        "score": {"state": options.get("state")},
        "metrics": {"port": options.get("metrics_port"), "enabled": False if options.get("no_metrics") else None},
    }
    settings = load(
        path, {s: {k: v for k, v in f.items() if v is not None} for s, f in flags.items()}, defaults=defaults
    )
    if show:
        click.echo(settings.to_toml(), nl=False)
    if check:
        click.echo("configuration is valid", err=True)
    if show or check:
        raise click.exceptions.Exit(0)
    return settings


def duration_option(command: F) -> F:
    """--duration, of every command that otherwise goes on until it is stopped."""
    return click.option("--duration", type=duration, help="stop after so long: 300 (seconds), 90s, 5m, 2h")(command)


def need_kafka(settings: Settings) -> None:
    """Raises UsageError where no broker is named."""
    if not settings.kafka.bootstrap_servers:
        raise UsageError("name a broker: --kafka HOST:PORT, or kafka.bootstrap_servers in the configuration")


def need_model(settings: Settings) -> None:
    """Raises ModelError where a model directory is named and there is none: nobody need read or watch anything first.

    What is in it is looked at where it is loaded.
    """
    path = Path(settings.model.directory)
    if settings.model.directory and not path.is_dir():
        raise ModelError(f"there is no model directory {path}; `flowsage train` makes one")
