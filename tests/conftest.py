"""Fixtures that every room's tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker import Broker, NoKafkaError, find_jars, make_brokers

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Captures, labelled flows and tools that live beside the checkout and are not ours to copy."""
    path = Path(os.environ.get("FLOWSAGE_SHARED", ROOT.parent / "shared"))
    if not (path / "pcaps" / "MANIFEST.csv").exists():
        pytest.skip(f"no captures and labelled flows at {path} (set FLOWSAGE_SHARED)")
    return path


@pytest.fixture(scope="session")
def kafka_jars() -> Path:
    """The jars of Apache Kafka."""
    try:
        return find_jars(Path(os.environ.get("FLOWSAGE_SHARED", ROOT.parent / "shared")))
    except NoKafkaError as error:
        pytest.fail(f"no broker to test against: {error}")


@pytest.fixture(scope="session")
def broker(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One Kafka broker for all tests that do not kill it; give topics and groups names of your own."""
    [broker] = make_brokers(kafka_jars, tmp_path_factory.mktemp("kafka"))
    try:
        yield broker.start()
    finally:
        broker.kill()
