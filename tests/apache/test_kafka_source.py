"""What only Apache Kafka can do to a log: cut its head, add partitions, stamp or not stamp messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from app.dataflows import kafka_source
from app.migrate import MigrationError
from schemas.settings import Settings
from sources.kafka import WrongLog
from tests.integration.test_kafka_source import read, reading, send, source
from tests.support.processes import wait_until

MakeTopic = Callable[[int], str]


def cut_head(settings: Settings, topic: str, before: int) -> None:
    """Delete the records of partition 0 before an offset."""
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    for done in admin.delete_records([TopicPartition(topic, 0, before)]).values():
        done.result()


def test_a_log_without_its_head_is_told_before_its_first_message(
    settings: Settings, make_topic: MakeTopic
) -> None:
    """Whoever starts without a snapshot hears from which offset on there is anything left, once."""
    topic = make_topic(1)
    send(settings, topic, [b"0", b"1", b"2"])
    cut_head(settings, topic, 2)
    told: list[tuple[str, int, int]] = []
    whole = source(settings, topic, on_missing_head=lambda *what: told.append(what))
    with reading(whole, topic) as part:
        (message,) = read(part, 1)
        send(settings, topic, [b"3"])
        read(part, 1)
    assert told == [(topic, 2, message.appended_at_ms)]


def test_a_log_that_was_cut_past_the_snapshot_is_refused(settings: Settings, make_topic: MakeTopic) -> None:
    """It never jumps, to the head or to the end."""
    topic = make_topic(1)
    send(settings, topic, [b"0"])
    with reading(source(settings, topic), topic) as part:
        read(part, 1)
        kept = part.snapshot()
    send(settings, topic, [b"1", b"2"])
    cut_head(settings, topic, 2)
    with reading(source(settings, topic), topic, position=kept) as part:

        def refused() -> bool:
            try:
                assert part.next_batch() == []
            except WrongLog as error:
                assert "offset 1" in str(error)
                return True
            return False

        wait_until(refused, "the cut is noticed")


def test_a_topic_that_grew_is_another_log(settings: Settings, make_topic: MakeTopic) -> None:
    """Real partitions added by a real broker."""
    topic = make_topic(1)
    with reading(source(settings, topic), topic) as part:
        kept = part.snapshot()
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    for done in admin.create_partitions([NewPartitions(topic, 3)]).values():
        done.result()

    def refused() -> bool:
        try:
            with reading(source(settings, topic), topic, position=kept):
                return False
        except WrongLog as error:
            return "has 3 partitions, had 1" in str(error)

    wait_until(refused, "the new partitions are seen")


def test_a_topic_stamped_by_producers_is_refused(settings: Settings) -> None:
    """Lateness and the check against the future rely on the broker's clock. The flow sees it in the topic's
    settings when it starts, and the source in the messages, should the settings say otherwise."""
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    topic = "test.create-time"
    config = {"message.timestamp.type": "CreateTime"}
    for done in admin.create_topics([NewTopic(topic, 1, 1, config=config)]).values():
        done.result()
    with pytest.raises(MigrationError, match="it must be LogAppendTime"):
        kafka_source(settings, topic)
    send(settings, topic, [b"0"])
    with (
        reading(source(settings, topic), topic) as part,
        pytest.raises(WrongLog, match="does not stamp messages with LogAppendTime"),
    ):
        read(part, 1)
