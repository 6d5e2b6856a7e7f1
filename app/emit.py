"""Sends messages to Kafka as producers should: keyed by scope, acknowledged by all replicas, checked.

A line that is no valid event is sent all the same, since refusing is the flow's business; it gets the key
that its ids suggest, or none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from app.errors import CommandError
from schemas.decode import decode_event
from schemas.rejections import Rejected
from sinks.kafka import DELIVERY_TIMEOUT_MS, producer_settings

CONNECT_TIMEOUT_S = 5.0
_IDLE_POLL_S = 0.05


def message_key(line: bytes) -> bytes | None:
    """The scope of the event, as bytes. For a broken one: what its ids suggest, or None."""
    try:
        return decode_event(line).scope.encode()
    except Rejected:
        return _guessed_key(line)


def _guessed_key(line: bytes) -> bytes | None:
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    data = fields.get("data") if isinstance(fields, dict) else None
    if not isinstance(data, dict):
        return None
    for name, prefix in (("room_id", "room/"), ("session_id", "session/")):
        if isinstance(data.get(name), str) and data[name]:
            return f"{prefix}{data[name]}".encode()
    return None


@dataclass
class EmitSummary:
    """What became of a run. `failures` counts deliveries that failed, by what Kafka said."""

    sent: int = 0
    delivered: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Messages that were not acknowledged."""
        return self.sent - self.delivered

    @property
    def rate_per_s(self) -> float:
        """Delivered messages a second."""
        return self.delivered / max(self.seconds, 1e-9)

    def why(self) -> str:
        """What Kafka said, the most frequent first."""
        if not self.failures:
            return "Kafka did not answer in time"
        return "; ".join(f"{words} ({count} times)" for words, count in self.failures.most_common(3))


class Emitter:
    """A checked producer for one topic, as a context manager.

    Entering raises CommandError within about CONNECT_TIMEOUT_S when the broker is not there or lacks the
    topic. `send` blocks only while the producer's queue is full. Leaving waits for every delivery; retries
    are the producer's own, idempotent, for `delivery_timeout_ms`.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        on_delivered: Callable[[int], None] | None = None,
        delivery_timeout_ms: int = DELIVERY_TIMEOUT_MS,
    ) -> None:
        self.summary = EmitSummary()
        self._bootstrap = bootstrap
        self._topic = topic
        self._on_delivered = on_delivered
        self._delivery_timeout_ms = delivery_timeout_ms
        self._last_error = ""
        self._started_s = 0.0
        self._producer = Producer(
            {
                **producer_settings(bootstrap),
                "message.timeout.ms": delivery_timeout_ms,
                "client.id": "metering-emit",
                # Batches matter more than the first milliseconds here.
                "linger.ms": 20,
                "error_cb": self._note_error,
                # The one line that this program prints says it; librdkafka need not say it too.
                "log_level": 0,
            }
        )

    def __enter__(self) -> Emitter:
        try:
            metadata = self._producer.list_topics(timeout=CONNECT_TIMEOUT_S)
        except KafkaException as problem:
            # What went wrong with the connection is told by a callback.
            self._producer.poll(0)
            why = self._last_error or _words(problem.args[0])
            raise CommandError(f"METERING_KAFKA={self._bootstrap}: no broker answers: {why}") from None
        if self._topic not in metadata.topics:
            raise CommandError(
                f"METERING_KAFKA={self._bootstrap}: has no topic {self._topic}; `metering migrate` makes the topics"
            )
        self._started_s = time.monotonic()
        return self

    def send(self, value: bytes, key: bytes | None) -> None:
        """Hand one message to the producer."""
        self.summary.sent += 1
        while True:
            try:
                self._producer.produce(self._topic, value=value, key=key, on_delivery=self._delivered)
                break
            except BufferError:
                self._producer.poll(_IDLE_POLL_S)
            except KafkaException as problem:
                self.summary.failures[_words(problem.args[0])] += 1
                break
        self._producer.poll(0)

    def wait(self, seconds: float) -> None:
        """Wait, and take delivery reports meanwhile."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._producer.poll(min(left_s, _IDLE_POLL_S))

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._producer.flush(self._delivery_timeout_ms / 1000 + 5)
        self.summary.seconds = time.monotonic() - self._started_s

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self.summary.failures[_words(error)] += 1
            return
        self.summary.delivered += 1
        if self._on_delivered is not None:
            self._on_delivered(len(message.value() or b"") + 1)

    def _note_error(self, error: KafkaError) -> None:
        self._last_error = _words(error)


def _words(error: KafkaError) -> str:
    """What Kafka says, without the client's own instance names and as one line."""
    return " ".join(str(error.str()).split())


def emit_lines(
    lines: Iterable[bytes], emitter: Emitter, keyed: bool = True, rate_per_s: float | None = None
) -> None:
    """Send all lines, with `keyed` by scope, at most `rate_per_s` of them a second on average."""
    started_s = time.monotonic()
    for number, line in enumerate(lines):
        if rate_per_s is not None:
            ahead_s = number / rate_per_s - (time.monotonic() - started_s)
            if ahead_s > 0:
                emitter.wait(ahead_s)
        emitter.send(line, message_key(line) if keyed else None)
