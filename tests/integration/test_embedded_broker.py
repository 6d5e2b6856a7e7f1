"""The broker that the suite runs on, as far as the flows rely on it."""

from __future__ import annotations

import time
from collections.abc import Callable

from confluent_kafka import Consumer, Message, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from schemas.settings import Settings


def test_messages_come_back_as_they_were(settings: Settings, make_topic: Callable[[int], str]) -> None:
    """Keys, headers, null values and every byte of a value survive, in order, with offsets from 0."""
    topic = make_topic(2)
    producer = Producer({"bootstrap.servers": settings.kafka, "acks": "all", "enable.idempotence": True})
    value = bytes(range(256)) * 1000
    headers = [("reason", b"\x00\xff"), ("empty", b""), ("none", None)]
    producer.produce(topic, key=b"k", value=value, headers=headers, partition=1)
    producer.produce(topic, key=None, value=None, partition=1)
    assert producer.flush(10) == 0
    first, second = read(settings, topic, partition=1, messages=2)
    assert (first.offset(), first.key(), first.value(), first.headers()) == (0, b"k", value, headers)
    assert (second.offset(), second.key(), second.value()) == (1, None, None)


def test_append_time_is_the_brokers_where_the_settings_say_so(
    settings: Settings, make_topic: Callable[[int], str]
) -> None:
    """A producer's own timestamp counts only on the broker that the flows are told about."""
    topic = make_topic(1)
    producer = Producer({"bootstrap.servers": settings.kafka})
    old_ms = 1_600_000_000_000
    producer.produce(topic, value=b"x", timestamp=old_ms, partition=0)
    assert producer.flush(10) == 0
    _, stamped_ms = read(settings, topic, partition=0, messages=1)[0].timestamp()
    assert (abs(stamped_ms - time.time() * 1000) < 60_000) == settings.broker_append_time


def test_every_topic_has_an_id_of_its_own(settings: Settings, make_topic: Callable[[int], str]) -> None:
    """Topic ids tell logs apart, and stay the same for the same log."""
    names = [make_topic(1), make_topic(1)]
    admin = AdminClient({"bootstrap.servers": settings.kafka})

    def ids() -> list[str]:
        described = admin.describe_topics(TopicCollection(names))
        return [str(described[name].result().topic_id) for name in names]

    assert len(set(ids())) == 2
    assert ids() == ids()


def read(settings: Settings, topic: str, partition: int, messages: int) -> list[Message]:
    """The first messages of a partition, without errors among them."""
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka,
            "group.id": "test",
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
        }
    )
    consumer.assign([TopicPartition(topic, partition, 0)])
    found: list[Message] = []
    deadline = time.monotonic() + 15
    while len(found) < messages and time.monotonic() < deadline:
        found += consumer.consume(messages - len(found), timeout=0.1)
    consumer.close()
    assert [message.error() for message in found] == [None] * messages
    return found
