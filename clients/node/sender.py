"""From the spool to Kafka: in order, at least once, for as long as it takes.

The laws.

1. Batches are sent one after the other: the next one is read when the broker (all in-sync replicas) has
   acknowledged every message of this one. Then the position moves. A kill in between sends the batch again.
2. Order per key survives failures. A producer is idempotent and its messages never expire, so what the broker
   has of one producer is a prefix, per partition, of what was given to it. Whatever fails, the producer is
   thrown away, and a new one starts at the first message that is not acknowledged. So a message may come
   twice, but its first occurrence is never before that of one that was made earlier.
3. When the client library says that all brokers are down, or that something failed, the producer is dropped and
   a new one made after a pause that doubles, up to 15 s, and varies, so that a fleet of nodes does not come
   back at one moment. (By itself it would ask a broker that hangs up twenty times a second.) When nothing was
   acknowledged for `stall_timeout_s`, the producer is replaced, too: one whose broker came back as another
   never delivers again.
4. A message is set aside only when the broker refused the message itself, and nothing else was in flight. Who
   may write to which topic is no matter of the message: that is tried again until somebody repairs it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, KafkaError, KafkaException, Message, Producer

from .spool import Record, Spool

BATCH = 1_000
"""Messages between two positions, at most."""

CLOCK_AHEAD_WARNING_MS = 60_000
"""The broker refuses nothing, but metering refuses events that are 300 000 ms ahead of the broker's clock."""

COMPLAINT_INTERVAL_S = 60.0
"""Between two lines in the log about a broker that is away."""

_POLL_S = 0.05
_LAST_REPORTS_S = 2.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 15.0

_OWN_SETTINGS: dict[str, str | int | bool] = {
    "acks": "all",
    "enable.idempotence": True,
    # A batch that fails for good must not be overtaken by the next one: this makes it a fatal error.
    "enable.gapless.guarantee": True,
    # 0 is for ever. An expired message would leave a gap that later messages pass through.
    "message.timeout.ms": 0,
    # Nothing overtakes, also where a broker does not check the sequence of an idempotent producer.
    "max.in.flight.requests.per.connection": 1,
    "partitioner": "murmur2_random",
}
"""What the laws rest on. Nobody may set them otherwise."""

_ALIASES = frozenset(
    {
        "request.required.acks",
        "delivery.timeout.ms",
        "max.in.flight",
        "bootstrap.servers",
        "metadata.broker.list",
    }
)

_DEFAULTS: dict[str, str | int | bool] = {
    "client.id": "lingua-node",
    "compression.type": "lz4",
    "linger.ms": 5,
    # Small enough that a slow line shows progress well within the stall timeout.
    "batch.size": 131_072,
}

_REFUSED = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError.POLICY_VIOLATION,
    }
)
"""What a broker says of a message that it will never take."""

_logger = logging.getLogger("clients.node")


def producer_settings(brokers: str, extra: Mapping[str, object]) -> dict[str, object]:
    """The client's settings, `extra` (TLS, SASL, ...) among them. Raises ValueError for one that is fixed."""
    for name in extra:
        if name in _OWN_SETTINGS or name in _ALIASES:
            raise ValueError(f"kafka: {name} is not yours to set")
    return {**_DEFAULTS, **extra, **_OWN_SETTINGS, "bootstrap.servers": brokers}


class Sender:
    """Takes events out of the spool until it is stopped; `run` is a thread's whole life.

    `stop_at(deadline)` (monotonic seconds): go on until the spool is empty or the deadline, then return. The
    other attributes are for reading, by anybody at any time.
    """

    def __init__(
        self,
        spool: Spool,
        brokers: str,
        topic: str,
        extra: Mapping[str, object],
        stall_timeout_s: float,
        now_ms: Callable[[], int],
        on_set_aside: Callable[[str, Record], None],
    ) -> None:
        self._spool = spool
        self._topic = topic
        self._settings = {
            **producer_settings(brokers, extra),
            "error_cb": self._note_error,
            # It would write a line to stderr for each attempt to connect; `_note_error` is told, too.
            "log_level": 2,
        }
        self._stall_timeout_s = stall_timeout_s
        self._now_ms = now_ms
        self._on_set_aside = on_set_aside
        self._producer: Producer | None = None
        self._stop_at_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._complained_s: float | None = None
        self._all_down = False
        self._stopping = threading.Event()
        self._alone = 0
        """How many of the next messages are sent alone, to find the one that the broker does not take."""
        self.work = threading.Event()
        """Set by whoever stored something, or wants the thread to look at its orders."""
        self.sent = 0
        self.set_aside = 0
        self.damaged = 0
        self.producers_made = 0
        self.oldest_ms: int | None = None
        self.last_error = ""
        self.clock_ahead_ms: int | None = None

    def stop_at(self, deadline_s: float) -> None:
        """Return from `run` when there is nothing to do, or at the deadline."""
        self._stop_at_s = deadline_s
        self._stopping.set()
        self.work.set()

    def run(self) -> None:
        """Send until told to stop."""
        while not self._late():
            try:
                self.work.clear()
                batch = self._spool.read(1 if self._alone else BATCH)
                if not batch:
                    self.oldest_ms = None
                    if self._stop_at_s is not None:
                        break
                    # Whatever arrives sets it; the timeout serves the client's own callbacks.
                    self.work.wait(1.0)
                    if self._producer is not None:
                        self._producer.poll(0)
                    continue
                self._send(batch)
            except Exception as problem:
                # A disk that fails, or a fault of ours: start again from what is known to be delivered.
                _logger.exception("sending failed; it is tried again")
                self.last_error = f"{type(problem).__name__}: {problem}"
                self._drop_producer()
                self._spool.rewind()
                self._pause()
        self._drop_producer()

    def _send(self, batch: Sequence[Record]) -> None:
        damaged = next((index for index, record in enumerate(batch) if record.damaged is not None), None)
        if damaged == 0:
            self._set_aside("damaged on the disk", batch[0])
            self.damaged += 1
            self._spool.rewind()
            return
        whole = batch[:damaged]
        self.oldest_ms = whole[0].made_ms
        delivered, error = self._produce(whole)
        if delivered:
            self.sent += delivered
            self._alone = max(0, self._alone - delivered)
            self._pause_s = _FIRST_PAUSE_S
            self._spool.acknowledge(whole[delivered - 1].end, delivered)
        if delivered == len(batch):
            return
        # What was read further is read again from there.
        self._spool.rewind()
        if delivered == len(whole):
            return
        self._drop_producer()
        if error is None:
            # A stall has taken long enough; brokers that hang up would be asked again at once.
            if self._all_down:
                self._pause()
            return
        self.last_error = error.str()
        if error.code() in _REFUSED and len(whole) == 1:
            self._set_aside(error.str(), whole[0])
            self._spool.rewind()
            self.set_aside += 1
        elif error.code() in _REFUSED and not self._alone:
            self._alone = len(whole) - delivered
        else:
            _logger.warning("sending to %s failed: %s; it is tried again", self._topic, error.str())
            self._pause()

    def _set_aside(self, reason: str, record: Record) -> None:
        # First stored, then passed: a kill in between sets it aside twice.
        self._spool.set_aside(reason, record, self._now_ms())
        self._spool.acknowledge(record.end, 1)
        # The one that was looked for is found.
        self._alone = 0
        _logger.error("an event was set aside: %s; its bytes are in aside.jsonl in the spool", reason)
        self._on_set_aside(reason, record)

    def _produce(self, batch: Sequence[Record]) -> tuple[int, KafkaError | None]:
        """How many, from the first on, are acknowledged; and the first error, None if there was none."""
        producer = self._producer or self._make_producer()
        attempt = _Attempt(len(batch))
        handed_over = 0
        for record in batch:
            try:
                producer.produce(
                    self._topic,
                    value=record.value,
                    key=record.key,
                    on_delivery=partial(attempt.report, handed_over),
                )
            except KafkaException as problem:
                attempt.outcomes[handed_over] = problem.args[0]
                break
            handed_over += 1
        reports, progress_s = 0, time.monotonic()
        while attempt.reports < handed_over and attempt.failed_s is None:
            attempt.serve(producer)
            if attempt.reports > reports:
                reports, progress_s = attempt.reports, time.monotonic()
            elif time.monotonic() - progress_s > self._stall_timeout_s:
                self.last_error = self.last_error or "no answer from the broker"
                break
            if self._all_down or self._late():
                break
        # After a failure the others are about to be delivered, or to fail as well.
        while attempt.reports < handed_over and attempt.failed_s is not None and not self._late():
            if time.monotonic() - attempt.failed_s > _LAST_REPORTS_S:
                break
            attempt.serve(producer)
        if attempt.appended_ms is not None:
            self._compare_clocks(attempt.appended_ms, batch)
        delivered = next(
            (index for index, outcome in enumerate(attempt.outcomes) if outcome is not True), len(batch)
        )
        # What a message was refused for says more than what the producer died of.
        errors = (outcome for outcome in attempt.outcomes if isinstance(outcome, KafkaError))
        return delivered, next(errors, attempt.fatal)

    def _make_producer(self) -> Producer:
        self._producer = Producer(self._settings)
        self._all_down = False
        self.producers_made += 1
        return self._producer

    def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.purge()
            # Serves the reports of what was purged; they go to an attempt that is over.
            with suppress(KafkaException):
                producer.poll(0)

    def _compare_clocks(self, appended_ms: int, batch: Sequence[Record]) -> None:
        """How far the newest event is ahead of the broker's clock; negative, or not known, is well."""
        ahead_ms = max(record.made_ms for record in batch) - appended_ms
        if ahead_ms > CLOCK_AHEAD_WARNING_MS and (self.clock_ahead_ms or 0) <= CLOCK_AHEAD_WARNING_MS:
            _logger.error("this node's clock is %d ms ahead; events of the future are refused", ahead_ms)
        self.clock_ahead_ms = ahead_ms

    def _late(self) -> bool:
        return self._stop_at_s is not None and time.monotonic() >= self._stop_at_s

    def _pause(self) -> None:
        until_s = time.monotonic() + self._pause_s * random.uniform(0.5, 1.0)
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        while (left_s := until_s - time.monotonic()) > 0 and not self._late():
            if self._stop_at_s is None:
                self._stopping.wait(left_s)
            else:
                time.sleep(min(left_s, _POLL_S))

    def _note_error(self, error: KafkaError) -> None:
        self.last_error = error.str()
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._all_down = True
        now_s = time.monotonic()
        if self._complained_s is None or now_s - self._complained_s >= COMPLAINT_INTERVAL_S:
            self._complained_s = now_s
            _logger.warning("Kafka: %s; %d events wait on the disk", error.str(), self._spool.events)


class _Attempt:
    """What became of each message of one batch: True if acknowledged, an error, or None so far."""

    def __init__(self, size: int) -> None:
        self.outcomes: list[KafkaError | Literal[True] | None] = [None] * size
        self.reports = 0
        self.failed_s: float | None = None
        """When the first failure was reported (monotonic)."""
        self.fatal: KafkaError | None = None
        """What the producer died of. It fails every message that it still has, at once."""
        self.appended_ms: int | None = None
        """The broker's clock when it took the last message, if it tells."""

    def serve(self, producer: Producer) -> None:
        """Wait for a report, for a moment."""
        try:
            producer.poll(_POLL_S)
        except KafkaException as problem:
            self.fatal = problem.args[0]
            self._failed()

    def report(self, index: int, error: KafkaError | None, message: Message) -> None:
        """Kafka's client calls it once a message."""
        self.reports += 1
        if error is not None:
            self.outcomes[index] = error
            self._failed()
            return
        self.outcomes[index] = True
        kind, time_ms = message.timestamp()
        if kind == TIMESTAMP_LOG_APPEND_TIME:
            self.appended_ms = time_ms

    def _failed(self) -> None:
        if self.failed_s is None:
            self.failed_s = time.monotonic()
