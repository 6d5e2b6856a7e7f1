"""Kafka as a Bytewax source that hands on whole batches and knows which log it reads.

Laws:
- A snapshot is (topic id, partition count, next offset). On resume all of it must fit the topic that is
  there: a topic made anew, grown, or cut off past the offset is another log, and the source refuses it with
  one clear line. An offset alone may look valid in the wrong log.
- Without a snapshot it starts at the first message there is. When the log's head has been deleted already,
  `on_missing_head` is told first, since whatever those messages said can no longer be settled live.
- Nothing is committed to the broker: the recovery store is the one place that knows how far the flow is.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, NoReturn

from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from confluent_kafka import (
    OFFSET_BEGINNING,
    TIMESTAMP_LOG_APPEND_TIME,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from schemas.messages import RawMessage
from telemetry import metrics
from telemetry.quiet import KAFKA_LOGGER, ignore_retry

SHORT_PAUSE = timedelta(milliseconds=5)
LONG_PAUSE = timedelta(milliseconds=50)
BUSY_FOR = timedelta(seconds=1)
"""An empty partition is asked again after a short pause while messages came lately, else after a long one: a
stream's latency stays low, and idle partitions cost next to nothing."""
BATCH_MESSAGES = 20_000
"""The most that is handed on at once. Working off a backlog, the larger a batch, the fewer cells are posted half
full and posted again; a steady stream never fills one."""
LONG_POLL_MS = 500
"""How long Kafka holds a fetch back while there is nothing; it answers at once when something comes."""
SHORT_POLL_MS = 20
"""For the embedded broker, which looks only at the end of this time: half of it is added to the latency."""
ROUND_TRIP_S = 10.0
COMMITTED_AFTER_SNAPSHOTS = 2
"""A snapshot is surely committed when the second one after it is taken: Bytewax reads the input of an epoch
only after every earlier one has gone through all sinks."""

REREAD_MS = 60_000
"""From so long before a crash on a source that rereads goes on: more than an append-only file loses with its end,
and than it takes until somebody notices."""


class WrongLog(Exception):
    """The topic is not the log that the flow has read so far. One clear line."""


class LogIdentity(NamedTuple):
    """Which log a topic is: its id changes when it is made anew, its count when it grows."""

    topic_id: str
    partition_count: int


class SourcePosition(NamedTuple):
    """What a snapshot of one partition holds. New fields go to the end, with a default."""

    topic_id: str
    partition_count: int
    next_offset: int
    head_untold: bool = False
    """Whether nothing was read yet, so that it is still to be told if the log's head is missing."""


class Committed(NamedTuple):
    """How far a flow has surely come in one partition."""

    next_offset: int
    appended_at_ms: int
    """Append time of the last message read; 0 when there was none."""
    at_end_ms: int
    """When the flow stood at the end of the log, as far as it knew from the broker's last answer, which is old
    when the broker is away: ask the broker before relying on it. 0 when it knew of more to read."""


@dataclass
class Progress:
    """Committed positions of the partitions that this process reads; shared with the keeper of the fence."""

    log: LogIdentity | None = None
    committed: dict[int, Committed] = field(default_factory=dict)
    failure: Exception | None = None
    """Set by an onlooker that found out that the log is another one: every partition stops with it."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, partition: int, committed: Committed) -> None:
        """Take note; called by the worker that reads the partition."""
        with self._lock:
            self.committed[partition] = committed

    def read(self) -> dict[int, Committed]:
        """A copy, for another thread."""
        with self._lock:
            return dict(self.committed)


def describe_log(admin: AdminClient, topic: str) -> LogIdentity:
    """The identity of the topic's log. Raises WrongLog when there is none, KafkaException when no broker."""
    try:
        found = admin.describe_topics(TopicCollection([topic]), request_timeout=ROUND_TRIP_S)[topic].result()
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise WrongLog(f"topic {topic} does not exist: run `metering migrate`") from None
        raise
    return LogIdentity(str(found.topic_id), len(found.partitions))


def consumer_settings(bootstrap: str) -> dict[str, object]:
    """A consumer that is assigned by hand, never commits, and never jumps."""
    return {
        "bootstrap.servers": bootstrap,
        "group.id": "lingua-metering",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
        "reconnect.backoff.ms": 200,
        "fetch.wait.max.ms": LONG_POLL_MS,
        "fetch.error.backoff.ms": 100,
        "queued.max.messages.kbytes": 32_768,
        "reconnect.backoff.max.ms": 2_000,
    }


MissingHead = Callable[[str, int, int], None]
"""(topic, first offset that is left, its append time in ms); called before the first message is handed on."""


class KafkaPartition(StatefulSourcePartition[list[RawMessage], SourcePosition]):
    """One partition, read by its own consumer."""

    def __init__(
        self,
        consumer: Consumer,
        start: TopicPartition,
        log: LogIdentity,
        progress: Progress,
        now_ms: Callable[[], int],
        *,
        broker_append_time: bool,
        with_headers: bool,
        linger: timedelta,
        reread: bool,
        on_missing_head: MissingHead | None,
        on_retry: Callable[[Exception], None],
    ) -> None:
        self._consumer = consumer
        self._topic, self._partition = start.topic, start.partition
        self._next_offset = max(start.offset, 0)
        self._log = log
        self._progress = progress
        self._now_ms = now_ms
        self._broker_append_time = broker_append_time
        self._with_headers = with_headers
        self._linger = linger
        self._reread = reread
        self._go_on_at = self._next_offset
        self._offsets_at: deque[tuple[int, int]] = deque()
        self._on_missing_head = on_missing_head
        self._on_retry = on_retry
        self._last_appended_at_ms = 0
        self._awake_at: datetime | None = None
        self._busy_until = datetime.now(UTC)
        self._snapshots: deque[Committed] = deque(maxlen=COMMITTED_AFTER_SNAPSHOTS + 1)
        labels = (self._topic, str(self._partition))
        self._lag_events = metrics.LAG_EVENTS.labels(*labels)
        self._lag_seconds = metrics.LAG_SECONDS.labels(*labels)
        consumer.assign([start])

    def next_batch(self) -> list[list[RawMessage]]:
        """Whatever is there, at once, as one batch; waits for nothing. Raises WrongLog."""
        if self._progress.failure is not None:
            raise self._progress.failure
        polled = self._consumer.consume(num_messages=BATCH_MESSAGES, timeout=0)
        messages = [message for message in polled if self._is_message(message)]
        self._awake_at = self._next_poll(full=len(polled) == BATCH_MESSAGES, empty=not messages)
        if not messages:
            return []
        batch = self._take(messages)
        if self._on_missing_head is not None:
            tell, self._on_missing_head = self._on_missing_head, None
            if batch[0].offset > 0:
                tell(self._topic, batch[0].offset, batch[0].appended_at_ms)
        return [batch]

    def _next_poll(self, *, full: bool, empty: bool) -> datetime | None:
        if full:
            return None
        now = datetime.now(UTC)
        if not empty:
            self._busy_until = now + BUSY_FOR
        if self._linger:
            return now + self._linger
        if not empty:
            return None
        return now + (SHORT_PAUSE if now < self._busy_until else LONG_PAUSE)

    def _take(self, messages: list[Message]) -> list[RawMessage]:
        topic, partition = self._topic, self._partition
        if self._broker_append_time and messages[0].timestamp()[0] != TIMESTAMP_LOG_APPEND_TIME:
            refuse(
                f"topic {topic} does not stamp messages with LogAppendTime: set its message.timestamp.type, "
                "or METERING_BROKER_APPEND_TIME=false if the broker cannot"
            )
        now_ms = 0 if self._broker_append_time else self._now_ms()
        with_headers, log = self._with_headers, self._log.topic_id
        batch = [
            RawMessage(
                topic,
                partition,
                message.offset() or 0,
                message.key(),
                message.value(),
                now_ms or message.timestamp()[1],
                _headers(message) if with_headers else None,
                log,
            )
            for message in messages
        ]
        last = batch[-1]
        self._next_offset, self._last_appended_at_ms = last.offset + 1, last.appended_at_ms
        return batch

    def _is_message(self, message: Message) -> bool:
        """False for a report of the client; raises WrongLog for one that waiting cannot heal."""
        error = message.error()
        if error is None:
            return True
        code = error.code()
        if code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            refuse(
                f"{self._topic}/{self._partition}: offset {self._next_offset}, where the flow stopped, is not "
                f"in the log any more ({error.str()}): run `metering adopt-log`"
            )
        if code == KafkaError._PARTITION_EOF:
            # Of a partition whose messages were all deleted this is the only word on where it goes on.
            self._next_offset = max(self._next_offset, message.offset() or 0)
        else:
            self._on_retry(KafkaException(error))
        return False

    def next_awake(self) -> datetime | None:
        """At once after a full batch, else after a pause."""
        return self._awake_at

    def snapshot(self) -> SourcePosition:
        """Where to go on after a crash; called once an epoch."""
        # From the last fetch's answer: costs no round trip.
        _, high = self._consumer.get_watermark_offsets(
            TopicPartition(self._topic, self._partition), cached=True
        )
        now_ms = self._now_ms()
        lag = max(high - self._next_offset, 0)
        self._lag_events.set(lag)
        self._lag_seconds.set(max(now_ms - self._last_appended_at_ms, 0) / 1000 if lag else 0)
        at_end = high >= 0 and lag == 0
        self._snapshots.append(
            Committed(self._next_offset, self._last_appended_at_ms, now_ms if at_end else 0)
        )
        if len(self._snapshots) > COMMITTED_AFTER_SNAPSHOTS:
            self._progress.commit(self._partition, self._snapshots[0])
        head_untold = self._on_missing_head is not None
        go_on_at = self._earlier_offset(now_ms) if self._reread else self._next_offset
        return SourcePosition(self._log.topic_id, self._log.partition_count, go_on_at, head_untold)

    def _earlier_offset(self, now_ms: int) -> int:
        """Where reading was REREAD_MS and some snapshots ago; where it began, if that is not so long ago."""
        self._offsets_at.append((now_ms, self._next_offset))
        earliest_ms = now_ms - REREAD_MS
        while len(self._offsets_at) > COMMITTED_AFTER_SNAPSHOTS and self._offsets_at[0][0] <= earliest_ms:
            _, self._go_on_at = self._offsets_at.popleft()
        return self._go_on_at

    def close(self) -> None:
        """Leave the broker."""
        self._consumer.close()


def _headers(message: Message) -> list[tuple[str, bytes]]:
    """Headers that have a value; those of a dead letter all do."""
    found: Any = message.headers()
    return [(name, value) for name, value in found or () if isinstance(value, bytes)]


class KafkaSource(FixedPartitionedSource[list[RawMessage], SourcePosition]):
    """All partitions of one topic.

    `broker_append_time=False` stamps messages with this process's own clock, for a broker that cannot.
    `linger` is how long to gather messages for one batch; `reread` goes on a minute earlier after a crash,
    so that what Redis may have lost with its last moments is read again; `on_retry` hears of what the client
    tries again, such as a broker that is away. Raises WrongLog, or KafkaException without a broker.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        now_ms: Callable[[], int],
        *,
        broker_append_time: bool,
        progress: Progress | None = None,
        with_headers: bool = False,
        linger: timedelta = timedelta(0),
        reread: bool = False,
        on_missing_head: MissingHead | None = None,
        on_retry: Callable[[Exception], None] = ignore_retry,
    ) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._now_ms = now_ms
        self._broker_append_time = broker_append_time
        self._progress = progress or Progress()
        self._with_headers = with_headers
        self._linger = linger
        self._reread = reread
        self._on_missing_head = on_missing_head
        self._on_retry = on_retry
        self._log = describe_log(AdminClient({"bootstrap.servers": bootstrap}), topic)
        self._progress.log = self._log

    @property
    def log(self) -> LogIdentity:
        """Which log the topic was when this source was made."""
        return self._log

    def list_parts(self) -> list[str]:
        """One a partition, named topic/number."""
        return [f"{self._topic}/{partition}" for partition in range(self._log.partition_count)]

    def build_part(self, step_id: str, for_part: str, resume_state: SourcePosition | None) -> KafkaPartition:
        """A reader that goes on where the snapshot was taken, or begins at the head of the log."""
        partition = int(for_part.rpartition("/")[2])
        start = TopicPartition(self._topic, partition, OFFSET_BEGINNING)
        head_untold = True
        if resume_state is not None:
            position = SourcePosition(*resume_state)
            head_untold = position.head_untold
            self._check_same_log(position)
            start.offset = position.next_offset
        # The client tries for ever by itself; it only has to be said, and not ten times a second.
        reported = {"error_cb": lambda error: self._on_retry(KafkaException(error))}
        polling = {} if self._broker_append_time else {"fetch.wait.max.ms": SHORT_POLL_MS}
        consumer = Consumer(consumer_settings(self._bootstrap) | polling | reported, logger=KAFKA_LOGGER)
        return KafkaPartition(
            consumer,
            start,
            self._log,
            self._progress,
            self._now_ms,
            broker_append_time=self._broker_append_time,
            with_headers=self._with_headers,
            linger=self._linger,
            reread=self._reread,
            on_missing_head=self._on_missing_head if head_untold else None,
            on_retry=self._on_retry,
        )

    def _check_same_log(self, position: SourcePosition) -> None:
        found = self._log
        if position.topic_id != found.topic_id:
            refuse(
                f"topic {self._topic} was made anew (id {found.topic_id}, was {position.topic_id}): the flow's "
                "offsets are from another log. Run `metering adopt-log` to go on with this one"
            )
        if position.partition_count != found.partition_count:
            refuse(
                f"topic {self._topic} has {found.partition_count} partitions, had {position.partition_count}: "
                "keys moved between partitions. Run `metering adopt-log` to go on"
            )


def refuse(line: str) -> NoReturn:
    """Raise WrongLog, with the line on stderr first: Bytewax buries it in a traceback."""
    print(f"metering: {line}", file=sys.stderr, flush=True)  # noqa: T201
    raise WrongLog(line)
