"""Moves the fence on a timer: a fixed distance behind the committed position of the settlement flow.

The position of a partition is a time before which everything appended has surely been settled; the fence
follows the slowest partition of all workers, which publish theirs in Redis. So while the broker or the flow is
away the fence stands still, and nobody becomes late by that. When the broker is back, its end of the log means
little for a while: producers still hold what they could not send. So the fence stands still a little longer.

It also looks whether the topic is still the same log: an open consumer would not notice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import redis
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from metering.cells import window_start_ms
from metering.ports import BalanceBook
from schemas import redis_keys
from sources.kafka import Committed, Progress, WrongLog, consumer_settings, describe_log
from telemetry import metrics
from telemetry.quiet import KAFKA_LOGGER

ROUND_TRIP_S = 5.0

SHORTEST_HOLD_S = 30.0
"""Producers try to reconnect every 10 s at most, by their clients' defaults, and then deliver."""
LONGEST_HOLD_S = 120.0
"""Bounds what is kept live meanwhile."""


class Hold:
    """After an outage of the broker, for how long the fence still stands: as long as the outage was, within bounds.

    Times are seconds of any clock that does not jump.
    """

    def __init__(self) -> None:
        self._failing_since: float | None = None
        self._until = 0.0

    def failed(self, now: float) -> None:
        """The broker did not answer."""
        if self._failing_since is None:
            self._failing_since = now

    def answered(self, now: float) -> None:
        """The broker answered."""
        if self._failing_since is not None:
            self.was_away(now - self._failing_since, now)
            self._failing_since = None

    def was_away(self, seconds: float, now: float) -> None:
        """The broker is back after `seconds`, as far as is known."""
        self._until = now + min(max(seconds, SHORTEST_HOLD_S), LONGEST_HOLD_S)

    def holds(self, now: float) -> bool:
        """Whether the fence must stand."""
        return self._failing_since is not None or now < self._until


class FenceKeeper:
    """A thread beside the flow. Whatever fails is said, counted, and tried again at the next turn. `each_turn` is
    called after the fence was moved."""

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        client: redis.Redis,
        book: BalanceBook,
        progress: Progress,
        *,
        lag_ms: int,
        interval_s: float,
        say: Callable[[str], None],
        each_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._client = client
        self._book = book
        self._progress = progress
        self._lag_ms = lag_ms
        self._interval_s = interval_s
        self._say = say
        self._each_turn = each_turn
        self._hold = Hold()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fence-keeper", daemon=True)

    def start(self) -> None:
        """Start turning."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the turn that is under way."""
        self._stopped.set()
        self._thread.join(timeout=ROUND_TRIP_S * 4)

    def _run(self) -> None:
        admin = AdminClient({"bootstrap.servers": self._bootstrap}, logger=KAFKA_LOGGER)
        consumer = Consumer(consumer_settings(self._bootstrap), logger=KAFKA_LOGGER)
        self._look_back()
        while not self._stopped.wait(self._interval_s):
            try:
                self._check_log(admin)
                self._publish(consumer)
                self._hold.answered(time.monotonic())
                if not self._hold.holds(time.monotonic()):
                    self._move()
                self._each_turn()
            except WrongLog as error:
                self._say(str(error))
                self._progress.failure = error
                return
            except Exception as error:
                if isinstance(error, KafkaException):
                    self._hold.failed(time.monotonic())
                metrics.RETRIES.labels("move the fence").inc()
                self._say(f"the fence stands still for now: {error}")
        consumer.close()

    def _look_back(self) -> None:
        """A keeper that has just started does not know whether the broker was away with it: positions that nobody
        published for long say that it may have been."""
        try:
            known = self._client.hvals(redis_keys.POSITIONS)
        except redis.RedisError:
            return
        if known:
            silent_s = time.time() - max(map(int, known)) / 1000
            if silent_s > SHORTEST_HOLD_S + 3 * self._interval_s:
                self._hold.was_away(silent_s, time.monotonic())

    def _check_log(self, admin: AdminClient) -> None:
        found = describe_log(admin, self._topic)
        if self._progress.log is not None and found != self._progress.log:
            raise WrongLog(
                f"topic {self._topic} was made anew or grew while it was read: it is another log. "
                "Run `metering adopt-log` to go on with it"
            )

    def _publish(self, consumer: Consumer) -> None:
        for partition, committed in self._progress.read().items():
            position_ms = self._position_ms(consumer, partition, committed)
            if position_ms:
                self._client.hset(redis_keys.POSITIONS, f"{self._topic}/{partition}", str(position_ms))

    def _position_ms(self, consumer: Consumer, partition: int, committed: Committed) -> int:
        """A time before which everything appended was read; 0 when nothing was read and there is more.

        That the flow stood at the end counts only while the broker has no more than that. Otherwise it is the
        append time of the last message read: under steady traffic that follows just behind.
        """
        _, high = consumer.get_watermark_offsets(
            TopicPartition(self._topic, partition), timeout=ROUND_TRIP_S, cached=False
        )
        if high < 0:
            raise KafkaException(f"{self._topic}/{partition}: the broker does not say where the log ends")
        at_end_ms = committed.at_end_ms if committed.next_offset >= high else 0
        return max(at_end_ms, committed.appended_at_ms)

    def _move(self) -> None:
        """Raise the fence behind the slowest partition, once all of them have a position."""
        assert self._progress.log is not None
        if not self._book.known_fence_ms and not self._client.zcard(redis_keys.LIVE_CELLS):
            return  # Nothing was ever settled: there is nothing to freeze, and nobody to be called late.
        known = self._client.hgetall(redis_keys.POSITIONS)
        names = [f"{self._topic}/{n}".encode() for n in range(self._progress.log.partition_count)]
        if not all(name in known for name in names):
            return
        slowest_ms = min(int(known[name]) for name in names)
        metrics.FENCE.set(self._book.raise_fence(window_start_ms(slowest_ms - self._lag_ms)) / 1000)
