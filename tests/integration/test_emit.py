"""Sending to a real broker: keys, partitions, pace, and deliveries that fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Message, TopicPartition

from app.embedded import broker, process
from app.emit import Emitter, emit_lines, message_key
from app.errors import CommandError
from app.migrate import create_topics
from app.workload import TransportEffects, WorkloadSpec, generate
from schemas.settings import Settings
from tests.support.services import running_service

PARTITIONS = 4
SPEC = WorkloadSpec(
    seed=5,
    start_ms=1_767_225_600_000,
    events=400,
    sessions=20,
    rooms=3,
    transport=TransportEffects(duplicates=0.1, junk=0.05),
)


def _murmur2(key: bytes) -> int:
    """Kafka's hash of a key as Java computes it, as an unsigned number."""
    mask, factor = 0xFFFFFFFF, 0x5BD1E995
    state = 0x9747B28C ^ len(key)
    whole = len(key) // 4 * 4
    for start in range(0, whole, 4):
        word = int.from_bytes(key[start : start + 4], "little") * factor & mask
        state = state * factor & mask ^ (word ^ word >> 24) * factor & mask
    if whole < len(key):
        state = (state ^ int.from_bytes(key[whole:], "little")) * factor & mask
    state = (state ^ state >> 13) * factor & mask
    return state ^ state >> 15


def _read(settings: Settings, topic: str, count: int) -> list[Message]:
    consumer = Consumer({"bootstrap.servers": settings.kafka, "group.id": topic, "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)])
    messages: list[Message] = []
    deadline_s = time.monotonic() + 30
    while len(messages) < count and time.monotonic() < deadline_s:
        messages += [message for message in consumer.consume(500, 0.5) if message.error() is None]
    consumer.close()
    return messages


def test_the_reference_hash_is_that_of_java() -> None:
    """Known answers from Kafka's own documentation of the algorithm."""
    assert _murmur2(b"21") == -973932308 & 0xFFFFFFFF
    assert _murmur2(b"foobar") == -790332482 & 0xFFFFFFFF


def test_messages_arrive_whole_keyed_by_scope_in_the_partition_of_java(
    settings: Settings, make_topic: Callable[[int], str]
) -> None:
    """All bytes arrive, in order per scope, with the scope as key, where murmur2_random puts it."""
    topic = make_topic(PARTITIONS)
    lines = list(generate(SPEC))
    with Emitter(settings.kafka, topic) as emitter:
        emit_lines(lines, emitter)
    assert (emitter.summary.sent, emitter.summary.delivered, emitter.summary.failed) == (460, 460, 0)
    messages = _read(settings, topic, len(lines))
    assert sorted(message.value() or b"" for message in messages) == sorted(lines)
    keyed = [message for message in messages if message.key() is not None]
    assert len(keyed) > 400
    for message in keyed:
        key, value = message.key(), message.value()
        assert key is not None
        assert value is not None
        assert key == message_key(value)
        assert message.partition() == (_murmur2(key) & 0x7FFFFFFF) % PARTITIONS
    for key in {message.key() for message in keyed}:
        arrived = [message.value() for message in messages if message.key() == key]
        assert arrived == [line for line in lines if message_key(line) == key]


def test_without_keys_messages_are_spread(settings: Settings, make_topic: Callable[[int], str]) -> None:
    """--no-key sends everything without a key, over all partitions."""
    topic = make_topic(PARTITIONS)
    lines = list(generate(SPEC))
    with Emitter(settings.kafka, topic) as emitter:
        for start in range(0, len(lines), 20):
            emit_lines(lines[start : start + 20], emitter, keyed=False)
            emitter.wait(0.05)
    messages = _read(settings, topic, len(lines))
    assert {message.key() for message in messages} == {None}
    assert len({message.partition() for message in messages}) > 1


def test_a_rate_is_kept(settings: Settings, make_topic: Callable[[int], str]) -> None:
    """100 events at 200 a second take about half a second."""
    topic = make_topic(1)
    lines = list(generate(SPEC))[:100]
    with Emitter(settings.kafka, topic) as emitter:
        started_s = time.monotonic()
        emit_lines(lines, emitter, rate_per_s=200)
        taken_s = time.monotonic() - started_s
    assert emitter.summary.delivered == 100
    assert taken_s >= 99 / 200


def test_a_message_that_the_broker_does_not_take_is_counted(
    settings: Settings, make_topic: Callable[[int], str]
) -> None:
    """One message over the producer's limit fails; the others are delivered."""
    topic = make_topic(1)
    with Emitter(settings.kafka, topic) as emitter:
        emit_lines([b"{}", b"x" * 2_000_000, b"[]"], emitter)
    assert (emitter.summary.delivered, emitter.summary.failed) == (2, 1)
    assert "too large" in emitter.summary.why()


def test_a_broker_that_dies_leaves_a_count_of_what_was_not_delivered(tmp_path: Path) -> None:
    """What was acknowledged and what was not add up, and the reason is told."""
    port = process.free_port()
    bootstrap = f"{process.LOOPBACK}:{port}"
    with running_service(broker.service(port), tmp_path / "broker.log"):
        create_topics(bootstrap, 1, False, topics={"t": {}})
        emitter = Emitter(bootstrap, "t", delivery_timeout_ms=2_000)
        emitter.__enter__()
        emit_lines([b"{}"] * 10, emitter)
        emitter.wait(1.0)
        assert emitter.summary.delivered == 10
    emit_lines([b"{}"] * 5, emitter)
    emitter.__exit__(None, None, None)
    assert (emitter.summary.delivered, emitter.summary.failed) == (10, 5)
    assert emitter.summary.why() == "Local: Message timed out (5 times)"


def test_a_topic_that_is_missing_is_named(settings: Settings) -> None:
    """Nothing is made by sending to it."""
    with pytest.raises(CommandError, match=r"has no topic no\.such\.topic"):
        Emitter(settings.kafka, "no.such.topic").__enter__()
