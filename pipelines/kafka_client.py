"""kafka-python's clients: how they are connected, and their errors in our words.

Where they cannot connect they say only that they had no success, and leave a thread and sockets behind; why is told to
their log and nobody else.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from kafka import KafkaProducer
from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient

from flowsage.collector.errors import FencedError, LogError, LogUnavailableError, RecordTooLargeError

T = TypeVar("T")

# Its trace of the wire would show passwords (SASL PLAIN).
logging.getLogger("kafka.protocol").setLevel(logging.INFO)

NO_TOPIC = "no topic {} is known; make it with `flowsage topics --create`"
_FENCED = (
    kafka_errors.ProducerFencedError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.InvalidProducerIdMappingError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.CommitFailedError,
    kafka_errors.FencedInstanceIdError,
    kafka_errors.TransactionCoordinatorFencedError,
)
_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)


def translated(error: BaseException, what: str) -> LogError:
    """kafka-python's error as one of ours; `what` could not be done."""
    said = str(error) or type(error).__name__
    if isinstance(error, _FENCED):
        return FencedError(f"{what}: somebody else has taken over ({said}); begin anew from what is committed")
    if isinstance(error, _TOO_LARGE):
        return RecordTooLargeError(f"{what}: Kafka takes no record of this size ({said})")
    if isinstance(error, kafka_errors.UnknownTopicOrPartitionError):
        return LogUnavailableError(f"{what}: {NO_TOPIC.format('of this name')}")
    if isinstance(error, (kafka_errors.SaslAuthenticationFailedError, kafka_errors.AuthorizationError)):
        return LogError(f"{what}: Kafka refuses us ({said}); look at the [kafka] settings and the brokers' ACLs")
    if isinstance(error, (kafka_errors.KafkaError, OSError)):
        return LogUnavailableError(f"{what}: {said}")
    return LogError(f"{what}: {said}")


@contextmanager
def translating(what: str) -> Iterator[None]:
    """kafka-python's errors within the block become ours."""
    try:
        yield
    except LogError:
        raise
    except (kafka_errors.KafkaError, OSError, ValueError, RuntimeError) as error:
        raise translated(error, what) from error


def connect(make: Callable[..., T], config: dict[str, Any]) -> T:
    """A client of kafka-python; where it cannot connect, nothing of it is left, and the error says why.

    `make` is KafkaProducer, KafkaConsumer or KafkaAdminClient. What they raise themselves is that they had no success,
    and they leave a thread and sockets behind.
    """
    made: list[KafkaNetClient] = []
    started = time.monotonic()

    def client(**values: Any) -> KafkaNetClient:
        made.append(KafkaNetClient(**values))
        return made[-1]

    try:
        return make(**config, kafka_client=client)
    except kafka_errors.KafkaTimeoutError as error:
        for c in made:
            c.close()
        why, servers = _WHY.reason(started), ", ".join(config["bootstrap_servers"])
        if "Authentication" in why:
            raise LogError(f"Kafka at {servers} refuses us ({why}); look at the [kafka] settings for SASL") from error
        raise LogUnavailableError(
            f"no broker answers at {servers} ({why}); is one up, and do the [kafka] settings for TLS and SASL suit it?"
        ) from error


class _Why(logging.Handler):
    """Remembers why kafka-python could not connect, which it tells its log and nobody else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: deque[tuple[float, str]] = deque(maxlen=64)
        own = logging.getLogger("kafka.net.manager")
        own.setLevel(logging.WARNING)
        own.propagate = False
        own.addHandler(self)

    def reason(self, since: float) -> str:
        """What says most: that we were refused, or else what came last (the last attempt is often cut short).

        Several clients may be connecting at a time: what is heard may be another's, and none takes it away.
        """
        heard = [why for at, why in tuple(self.heard) if at >= since]
        by_weight = sorted(heard, key=lambda why: ("Authentication" in why) - ("timed out" in why))
        return by_weight[-1] if by_weight else "no answer"

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, and pass it on to whoever wants to read what kafka-python says."""
        if found := _FAILED.match(record.getMessage()):
            self.heard.append((time.monotonic(), found[1]))
        parent = logging.getLogger("kafka")
        if parent.isEnabledFor(record.levelno):
            parent.handle(record)


_FAILED = re.compile(r"(?:Connection|Bootstrap connection to .*?) failed: (.*?)(?: \(backoff.*)?$", re.DOTALL)
_WHY = _Why()


def abandon(producer: KafkaProducer) -> None:
    """Close at once; what is not acknowledged is not sent any more."""
    try:
        producer.close(timeout=0)
    except kafka_errors.KafkaError:
        # With anything unsent, its close stops at a flush that cannot be done in no time, and the thread lives on.
        producer._sender.force_close()
