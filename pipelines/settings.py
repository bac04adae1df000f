"""Every setting with its unit, its default and what it is for: sections and fields of `Settings`.

An unknown key is refused by name, wherever it stands. Durations and sizes are integers (nanoseconds, bytes) once read.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from flowsage.pipelines.quantities import SECOND, Duration, Names, Size

ENVIRONMENT = "FLOWSAGE_"


class Section(BaseModel):
    """A table of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class SensorSettings(Section):
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


class WindowSettings(Section):
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


class ModelSettings(Section):
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
        5_000_000,
        gt=0,
        description="keys of history remembered a level; first those leave that came once, then the longest unseen",
    )
    max_hosts: int = Field(200_000, gt=0, description="hosts the graph's memory holds")
    threads: int = Field(2, gt=0, description="threads for training and scoring")


class AlarmSettings(Section):
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


class KafkaSettings(Section):
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


class ScoreSettings(Section):
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


class MetricsSettings(Section):
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
