"""The one typed configuration: flags over environment over a TOML file.

    [sensor]                      FLOWSAGE_SENSOR__IDLE_TIMEOUT=30s
    interfaces = ["eth0"]         flowsage run --interface eth0
    idle_timeout = "30s"

Every key below is a section and a field of `Settings`; an unknown one is refused by name, wherever it stands. Durations
are written "250ms", "15s", "2m", "1h" or a number of seconds, sizes "64MiB" or a number of bytes; both are integers
(nanoseconds, bytes) once read.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from flowsage.collector.errors import ConfigurationError

_UNITS_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9}
_UNITS_BYTES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
ENVIRONMENT = "FLOWSAGE_"
RESERVED = {"FLOWSAGE_CONFIG", "FLOWSAGE_SHARED"}
"""Variables with our prefix that are not configuration keys: the file itself, and where tests find captures."""


def _scaled(value: object, units: dict[str, int], example: str) -> object:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if not found or found[2] not in units:
        raise ValueError(f"{value!r} is not of the form {example}")
    return round(float(found[1]) * units[found[2]])


def _duration(value: object) -> object:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return round(value * 10**9)
    return _scaled(value, {"": 10**9, **_UNITS_NS}, '"15s" (ms, s, m, h, d)')


def _size(value: object) -> object:
    return _scaled(value, _UNITS_BYTES, '"64MiB"')


def _names(value: object) -> object:
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


def _seconds(value: int) -> str:
    return f"{value / 10**9:g}s"


Duration = Annotated[int, BeforeValidator(_duration), PlainSerializer(_seconds), Field(ge=0)]
"""Nanoseconds, read from "15s" or a number of seconds."""
Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]
"""Bytes, read from "64MiB" or a number."""
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
"""A list of names; "eth0,eth1" in the environment."""
SECOND = 10**9


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class SensorSettings(_Section):
    """The kernel program and what drains it."""

    name: str = Field(default_factory=socket.gethostname, description="sensor's name: key of its flow batches")
    interfaces: Names = Field((), description="interfaces to watch; they share one flow table")
    mode: Literal["auto", "drv", "skb", "hw"] = Field(
        "auto", description="XDP mode; auto falls back from drv to skb and says so"
    )
    mirror: bool = Field(False, description="the interface only mirrors traffic: drop packets once they are counted")
    replace: bool = Field(False, description="replace an XDP program that somebody else attached")
    egress: bool = Field(False, description="count what leaves the interfaces too (Linux 6.6)")
    dedupe: bool = Field(False, description="count a packet that several of the interfaces see once")
    loader: Literal["auto", "libbpf", "bcc"] = Field(
        "auto", description="libbpf: the program that is shipped; bcc: compiled here; auto: shipped, where it is there"
    )
    pins: str = Field(
        "/sys/fs/bpf/flowsage", description='where `collect` pins on bpffs, so that it can be killed; "": nowhere'
    )
    keep_privileges: bool = Field(False, description="do not give up capabilities once everything is attached")
    table_entries: int = Field(262_144, gt=0, description="flows in the kernel's table")
    ring_bytes: Size = Field(32 * 2**20, description="ring buffer, a power of two")
    idle_timeout: Duration = Field(15 * SECOND, description="a flow that is silent for so long has ended")
    active_timeout: Duration = Field(60 * SECOND, description="a flow that goes on is reported at least so often")
    half_open_timeout: Duration = Field(5 * SECOND, description="a SYN without SYN-ACK is given up after")
    linger: Duration = Field(1 * SECOND, description="an ended TCP flow waits so long for stragglers")
    sweep_interval: Duration = Field(1 * SECOND, description="how often idle flows are looked for")
    poll_interval: Duration = Field(SECOND // 10, description="how often the ring is drained")


class WindowSettings(_Section):
    """Event time."""

    window: Duration = Field(60 * SECOND, description="history and graph learn from windows of this length")
    pane: Duration = Field(10 * SECOND, description="alarms look this often")
    lateness: Duration = Field(0, description="how long a window waits beyond what its sensors' watermarks say")
    idle_timeout: Duration = Field(
        30 * SECOND, gt=0, description="a sensor that is silent for so long is not waited for until it speaks again"
    )
    max_ahead: Duration = Field(
        300 * SECOND, gt=0, description="a flow that begins later than so long from now is refused: its clock is wrong"
    )
    max_behind: Duration = Field(
        300 * SECOND, gt=0, description="a sensor whose clock is so far behind, and stays so, is not waited for"
    )


Prior = Literal["none", "popularity", "mlp", "sage1", "sage2", "sage2-sketches"]


class ModelSettings(_Section):
    """What is learnt."""

    seed: int = Field(0, ge=0)
    directory: str = Field("", description="model directory (`flowsage train`) to start from; a new one is taken in")
    prior: Prior = Field(
        "sage2-sketches",
        description="prior of first meetings: none, popularity, mlp (roles alone), sage1, sage2 (GraphSAGE of so many "
        "layers), sage2-sketches (with overlaps of neighbourhoods)",
    )
    ready_windows: int = Field(30, ge=0, description="windows that the graph must have seen before it says anything")
    ready_meetings: float = Field(200, ge=0, description="first meetings that it must have learnt from")
    ready_steps: int = Field(20, ge=0, description="training steps that it must have made")
    undirected: bool = Field(False, description="the flows' direction is not known")
    max_keys: int = Field(
        5_000_000, gt=0, description="keys of history remembered a level; the longest unseen leave first"
    )
    max_hosts: int = Field(200_000, gt=0, description="hosts the graph's memory holds")
    threads: int = Field(2, gt=0, description="threads for training and scoring")


class AlarmSettings(_Section):
    """What a person is shown."""

    budget: float = Field(
        10.0, gt=0, description="false findings a day per 100 hosts that you accept (at least one a day)"
    )
    block: Duration = Field(
        900 * SECOND, description="calibration counts hosts in blocks of this length (divided by time_scale)"
    )
    settle: Duration = Field(
        86_400 * SECOND,
        description="how long the budget grows, since a first day is full of first times (divided by time_scale)",
    )
    time_scale: float = Field(1.0, ge=1, description="how much faster than life the network runs (the lab: 60)")
    internal: Names = Field((), description="networks that are ours; default: private and link-local addresses")


class KafkaSettings(_Section):
    """Kafka: where the brokers are, what the topics are called, how the sensor publishes. Empty: not set.

    Below `client_id` every key is a setting of kafka-python under its own name, and means what it means there.
    """

    bootstrap_servers: Names = Field((), description="host:port of some brokers; none: no Kafka")
    prefix: str = Field("flowsage", pattern=r"^[A-Za-z0-9-]+$", description="topics are called PREFIX.flows.v1, …")
    site: str = Field("default", min_length=1, description="network of this sensor; a site is scored as one whole")
    spool: Path = Field(Path("/var/lib/flowsage/spool"), description="where batches wait that Kafka does not take")
    spool_bytes: Size = Field(2**30, description="the most that waits there; the oldest are given up, counted")
    patience: Duration = Field(SECOND // 4, description="how long the sensor waits for Kafka before it spools a batch")
    client_id: str = Field("flowsage", description="name of this client in the brokers' logs")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    ssl_cafile: str = ""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    ssl_password: SecretStr = SecretStr("")
    ssl_crlfile: str = ""
    ssl_ciphers: str = ""
    ssl_check_hostname: bool = True
    sasl_mechanism: Literal["", "PLAIN", "GSSAPI", "SCRAM-SHA-256", "SCRAM-SHA-512"] = ""
    sasl_plain_username: str = ""
    sasl_plain_password: SecretStr = SecretStr("")
    sasl_kerberos_name: str = ""
    sasl_kerberos_service_name: str = "kafka"
    sasl_kerberos_domain_name: str = ""
    proxy_url: SecretStr = SecretStr("")
    client_dns_lookup: str = "use_all_dns_ips"
    request_timeout_ms: int = Field(30_000, gt=500)
    reconnect_backoff_ms: int = Field(50, gt=0)
    reconnect_backoff_max_ms: int = Field(1000, gt=0)
    retry_backoff_ms: int = Field(100, gt=0)
    connections_max_idle_ms: int = Field(540_000, gt=0)
    metadata_max_age_ms: int = Field(300_000, gt=0)

    def client(self) -> dict[str, Any]:
        """The settings of every client, for kafka-python; secrets among them do not show in its own messages."""
        ours = ("prefix", "site", "spool", "spool_bytes", "patience")
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in ours}
        values = {k: _Masked(v.get_secret_value()) if isinstance(v, SecretStr) else v for k, v in values.items()}
        return {k: v for k, v in values.items() if v != ""} | {"bootstrap_servers": list(self.bootstrap_servers)}


class _Masked(str):
    """A secret that works as a string and does not show where a dictionary of settings is printed."""

    def __repr__(self) -> str:
        return "'**********'"


class ScoreSettings(_Section):
    """`flowsage score`: what it leaves behind for whoever goes on."""

    group: str = Field("flowsage-scorer", min_length=1, description="consumer group; one group scores a topic once")
    session_timeout: Duration = Field(
        10 * SECOND, gt=0, description="a scorer that is silent for so long is dead: others get its partitions"
    )
    state: str = Field("", description="folder or URL (s3://…) for snapshots of what was learnt; none: it warms up")
    snapshot_interval: Duration = Field(300 * SECOND, description="how often one is written, by the sensors' time")
    snapshot_windows: int = Field(0, ge=0, description="and after every so many windows; 0: by time alone")
    snapshots: int = Field(3, gt=0, description="snapshots that are kept of each partition")
    embeddings: bool = Field(False, description="publish the hosts' embeddings of every window too")


class MetricsSettings(_Section):
    """Prometheus."""

    enabled: bool = True
    address: str = "127.0.0.1"
    port: int = Field(9436, gt=0, lt=65_536, description="HTTP port of /metrics")


class Settings(BaseSettings):
    """Everything that can be set, with its default."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT, env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=False
    )
    sensor: SensorSettings = SensorSettings()
    windows: WindowSettings = WindowSettings()
    model: ModelSettings = ModelSettings()
    alarms: AlarmSettings = AlarmSettings()
    kafka: KafkaSettings = KafkaSettings()
    score: ScoreSettings = ScoreSettings()
    metrics: MetricsSettings = MetricsSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and file are merged by `load`; here the environment is put between them."""
        return (init_settings,)

    def to_toml(self) -> str:
        """The whole configuration as a TOML file that `load` reads back."""
        lines = []
        for section, values in self.model_dump(mode="json").items():
            lines.append(f"[{section}]")
            lines += [f"{k} = {_toml(v)}" for k, v in values.items()]
            lines.append("")
        return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else str(value)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as e:
        raise ConfigurationError(f"cannot read the configuration file {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"{path} is not valid TOML: {e}") from e


def _read_environment() -> dict[str, Any]:
    for key in os.environ:
        section = key.removeprefix(ENVIRONMENT).partition("__")[0].lower()
        if key.startswith(ENVIRONMENT) and key not in RESERVED and section not in Settings.model_fields:
            raise ConfigurationError(
                f"the environment variable {key} names no configuration key; the form is {ENVIRONMENT}SECTION__KEY, "
                "and `flowsage run --show-config` lists them"
            )
    try:
        return EnvSettingsSource(Settings)()
    except SettingsError as e:
        raise ConfigurationError(f"the environment cannot be read as configuration: {e}") from e


def _merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers win, key by key."""
    out: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            if isinstance(values, dict) and isinstance(out.get(section), dict):
                out[section] = out[section] | values
            else:
                out[section] = values
    return out


def load(
    path: Path | None = None,
    flags: dict[str, dict[str, Any]] | None = None,
    *,
    defaults: dict[str, dict[str, Any]] | None = None,
) -> Settings:
    """Settings from `flags` over the environment over the file at `path` (or $FLOWSAGE_CONFIG) over `defaults`.

    `defaults` is what a command prefers where nobody says otherwise (the lab's time scale). Raises ConfigurationError
    that names the key, the value and what would be right.
    """
    path = path or (Path(os.environ["FLOWSAGE_CONFIG"]) if os.environ.get("FLOWSAGE_CONFIG") else None)
    layers = [defaults or {}, _read_file(path) if path else {}, _read_environment(), flags or {}]
    try:
        return Settings(**_merge(*layers))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        where = f" (in {path}, the environment or the flags)" if path else ""
        if first["type"] == "extra_forbidden":
            near = _near(key)
            raise ConfigurationError(f"unknown configuration key {key!r}{where}{near}") from e
        message = first["msg"].removeprefix("Value error, ")
        if _secret(key):
            raise ConfigurationError(f"configuration key {key!r}{where}: {message}") from None
        raise ConfigurationError(f"configuration key {key!r}{where}: {message}, not {first['input']!r}") from e


def _secret(key: str) -> bool:
    """Whether `key` ("kafka.ssl_password") holds what must not be told."""
    section, _, name = key.partition(".")
    found = Settings.model_fields.get(section)
    fields = getattr(found.annotation, "model_fields", {}) if found else {}
    return name in fields and fields[name].annotation is SecretStr


def _near(key: str) -> str:
    sections = {name: section for name, section in Settings().__dict__.items() if isinstance(section, _Section)}
    known = [f"{name}.{field}" for name, section in sections.items() for field in type(section).model_fields]
    best = difflib.get_close_matches(key, [*known, *sections], 1, 0.7)
    return f"; did you mean {best[0]!r}?" if best else "; `flowsage run --show-config` lists the known ones"
