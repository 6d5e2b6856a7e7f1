"""Where a topic's log begins and ends now."""

from __future__ import annotations

import time
from collections.abc import Mapping

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from sources.kafka import ROUND_TRIP_S, SHORT_POLL_MS, consumer_settings, describe_log
from telemetry.quiet import KAFKA_LOGGER

DEADLINE_S = 30.0


class TopicEnds:
    """`metering.ports.Log` on Kafka. Raises KafkaException when the broker is away, WrongLog without the topic.

    An end is what a reader comes to, not what the broker says about itself: the embedded one answers with the
    first offset of the last batch.
    """

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._bootstrap = bootstrap
        self._topic = topic

    def ends(self) -> Mapping[int, int]:
        return {number: next_ for number, (first, next_) in self.spans().items() if next_ > first}

    def spans(self) -> dict[int, tuple[int, int]]:
        """Partition -> (offset of the first message, offset of the next message to come)."""
        admin = AdminClient({"bootstrap.servers": self._bootstrap}, logger=KAFKA_LOGGER)
        partitions = describe_log(admin, self._topic).partition_count
        # The end is known when a fetch comes back empty.
        soon = {"fetch.wait.max.ms": SHORT_POLL_MS}
        consumer = Consumer(consumer_settings(self._bootstrap) | soon, logger=KAFKA_LOGGER)
        try:
            firsts: dict[int, int] = {}
            starts = []
            for number in range(partitions):
                first, said = consumer.get_watermark_offsets(
                    TopicPartition(self._topic, number), timeout=ROUND_TRIP_S
                )
                firsts[number] = first
                starts.append(TopicPartition(self._topic, number, max(first, said - 1)))
            found = self._read_to_the_end(consumer, starts)
            return {number: (firsts[number], next_) for number, next_ in found.items()}
        finally:
            consumer.close()

    def _read_to_the_end(self, consumer: Consumer, starts: list[TopicPartition]) -> dict[int, int]:
        consumer.assign(starts)
        ends: dict[int, int] = {}
        deadline = time.monotonic() + DEADLINE_S
        while len(ends) < len(starts):
            for message in consumer.consume(num_messages=1_000, timeout=0.2):
                error = message.error()
                if error is None:
                    continue
                if error.code() == KafkaError._PARTITION_EOF:
                    # Whatever came later is beyond the moment that was asked for.
                    ends.setdefault(message.partition() or 0, message.offset() or 0)
                elif not error.retriable():
                    raise KafkaException(error)
            if time.monotonic() > deadline:
                raise KafkaException(
                    KafkaError(KafkaError._TIMED_OUT, f"topic {self._topic}: the end was not reached")
                )
        return ends
