"""Looking into a node's spool, and reading a topic as a consumer finds it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from confluent_kafka import Consumer, Message, TopicPartition

from clients.node.spool import Record, decode_record

PARTITIONS = 4


def spooled_records(directory: Path) -> list[Record]:
    """Every whole line in the spool's segments, sent or not, by reading the files alone."""
    records = []
    for segment in sorted(directory.glob("*.seg")):
        for line in segment.read_bytes().split(b"\n")[:-1]:
            records.append(decode_record(line, (0, 0), (0, 0)))
    return records


def spooled_values(directory: Path) -> list[bytes]:
    """The events in them; all must be undamaged."""
    records = spooled_records(directory)
    assert all(record.damaged is None for record in records)
    return [record.value for record in records]


def read_topic(kafka: str, topic: str, until: int, timeout_s: float = 60.0) -> list[Message]:
    """All messages, per partition in order, up to the ends that the partitions have when `until` were read.

    Fewer than `until` only after the timeout.
    """
    consumer = Consumer({"bootstrap.servers": kafka, "group.id": topic, "enable.auto.commit": False})
    places = [TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)]
    consumer.assign(places)
    found: list[Message] = []
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        found += [message for message in consumer.consume(1_000, 0.2) if message.error() is None]
        if len(found) >= until:
            ends = sum(consumer.get_watermark_offsets(place, timeout=10)[1] for place in places)
            if len(found) >= ends:
                break
    consumer.close()
    return found


def values(messages: Sequence[Message]) -> list[bytes]:
    """What they carry."""
    return [message.value() or b"" for message in messages]
