"""What the flows send to Kafka: produced with checked delivery, or not at all.

Order of effects: all messages of a call are produced and confirmed by all replicas before the call returns, so
a flow cannot go on past one that was lost. A crash before that produces them again, with the same identity: a dead
letter's is (topic, log, partition, offset of the original), and the archive replaces; an alert's is its id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bytewax.outputs import DynamicSink, StatelessSinkPartition
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from metering.live import Displaced
from schemas.dead_letter_headers import headers_of
from schemas.records import DeadLetter
from schemas.rejections import RejectReason
from schemas.topics import DEAD_LETTERS
from sinks.retrying import retrying
from telemetry import metrics
from telemetry.quiet import ignore_retry

DELIVERY_TIMEOUT_MS = 20_000
FETCH_TIMEOUT_S = 10.0


class NotDelivered(Exception):
    """Some messages were not confirmed; producing all of them again is safe."""


def producer_settings(bootstrap: str) -> dict[str, object]:
    """Confirmed by all replicas, in order, without duplicates, and partitioned as every client here does."""
    return {
        "bootstrap.servers": bootstrap,
        "acks": "all",
        "enable.idempotence": True,
        "partitioner": "murmur2_random",
        "compression.type": "lz4",
        "linger.ms": 5,
        "message.timeout.ms": DELIVERY_TIMEOUT_MS,
        # Headers come on top of an original that may have been as large as the broker takes.
        "message.max.bytes": 1_148_000,
    }


class Outgoing(NamedTuple):
    """A message to send."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()


class ConfirmedProducer:
    """Sends to one topic; waits while the broker is away."""

    def __init__(
        self, bootstrap: str, topic: str, on_retry: Callable[[Exception], None] = ignore_retry
    ) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._on_retry = on_retry
        self._producer: Producer | None = None

    def send(self, messages: Sequence[Outgoing]) -> None:
        """Returns when every message is stored; blocks and tries again for as long as it takes."""
        retrying(lambda: self._send_once(messages), heals=_heals, on_retry=self._on_retry)

    def _send_once(self, messages: Sequence[Outgoing]) -> None:
        if self._producer is None:
            self._producer = Producer(producer_settings(self._bootstrap))
        failures: list[str] = []

        def confirm(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                failures.append(error.str())

        for key, value, headers in messages:
            while True:
                try:
                    self._producer.produce(
                        self._topic, key=key, value=value, headers=list(headers), on_delivery=confirm
                    )
                    break
                except BufferError:
                    self._producer.poll(0.1)
        unconfirmed = self._producer.flush(DELIVERY_TIMEOUT_MS / 1000 + 5)
        if failures or unconfirmed:
            # A producer whose broker came back as another one never delivers again: the next try has its own.
            self._producer = None
            raise NotDelivered(
                failures[0] if failures else f"{unconfirmed} messages to {self._topic} not confirmed"
            )


class KafkaDeadLetters:
    """Sends dead letters; waits while the broker is away."""

    def __init__(
        self,
        bootstrap: str,
        events_topic: str,
        events_log: str,
        on_retry: Callable[[Exception], None] = ignore_retry,
    ) -> None:
        self._bootstrap = bootstrap
        self._events_topic = events_topic
        self._events_log = events_log
        self._on_retry = on_retry
        self._producer = ConfirmedProducer(bootstrap, DEAD_LETTERS, on_retry)

    def send(self, refused: Sequence[DeadLetter | Displaced]) -> None:
        """Returns when every letter is stored; blocks and tries again for as long as it takes."""
        letters = [self._with_bytes(item) if isinstance(item, Displaced) else item for item in refused]
        self._producer.send(
            [Outgoing(letter.key, letter.value, list(headers_of(letter))) for letter in letters]
        )
        for letter in letters:
            metrics.DEAD_LETTERS.labels("settlement", letter.reason).inc()

    def _with_bytes(self, displaced: Displaced) -> DeadLetter:
        message = retrying(lambda: self._fetch(displaced), heals=_heals, on_retry=self._on_retry)
        found = message is not None and message.offset() == displaced.offset
        return DeadLetter(
            topic=self._events_topic,
            log=self._events_log,
            partition=displaced.partition,
            offset=displaced.offset,
            reason=RejectReason.IDENTITY_CONFLICT,
            detail="counted until an occurrence with a smaller position came"
            + ("" if found else "; its bytes are not in the log any more"),
            key=message.key() if message is not None and found else None,
            value=message.value() if message is not None and found else None,
            appended_at_ms=message.timestamp()[1] if message is not None and found else 0,
        )

    def _fetch(self, displaced: Displaced) -> Message | None:
        """The message at that place, or the next one that is left; None at the end of the log."""
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                "group.id": "lingua-metering",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
            }
        )
        try:
            consumer.assign([TopicPartition(self._events_topic, displaced.partition, displaced.offset)])
            message = consumer.poll(FETCH_TIMEOUT_S)
            if message is None:
                raise NotDelivered(f"{self._events_topic}/{displaced.partition}: no answer")
            error = message.error()
            if error is None:
                return message
            if error.code() == KafkaError._PARTITION_EOF:
                return None
            raise KafkaException(error)
        finally:
            consumer.close()


def _heals(error: Exception) -> bool:
    return isinstance(error, NotDelivered) or (
        isinstance(error, KafkaException) and error.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE
    )


class DeadLetterSink(DynamicSink[DeadLetter | Displaced]):
    """Hands each batch to `letters.send` whole; `send` may be called from several workers, each its own."""

    def __init__(self, make_letters: Callable[[], KafkaDeadLetters]) -> None:
        self._make_letters = make_letters

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _DeadLetterPartition:
        """One sender a worker."""
        return _DeadLetterPartition(self._make_letters())


class _DeadLetterPartition(StatelessSinkPartition[DeadLetter | Displaced]):
    def __init__(self, letters: KafkaDeadLetters) -> None:
        self._letters = letters

    def write_batch(self, items: list[DeadLetter | Displaced]) -> None:
        """Blocks until the broker has confirmed them all."""
        if items:
            self._letters.send(items)
