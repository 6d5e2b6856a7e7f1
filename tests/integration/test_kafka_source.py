"""The Kafka source on a real broker: whole batches, exact places, and no other log passed off as its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
from confluent_kafka import Producer

from schemas.messages import RawMessage
from schemas.settings import Settings
from sources.kafka import REREAD_MS, KafkaPartition, KafkaSource, SourcePosition, WrongLog
from tests.support.processes import wait_until

MakeTopic = Callable[[int], str]
CLOCK_MS = 1_767_225_600_000


def source(settings: Settings, topic: str, **options: object) -> KafkaSource:
    return KafkaSource(
        settings.kafka,
        topic,
        lambda: CLOCK_MS,
        broker_append_time=settings.broker_append_time,
        **options,  # type: ignore[arg-type]
    )


def send(settings: Settings, topic: str, values: list[bytes | None], partition: int = 0) -> None:
    producer = Producer({"bootstrap.servers": settings.kafka})
    for value in values:
        producer.produce(topic, value=value, key=b"key", partition=partition, headers=[("reason", b"why")])
    assert producer.flush(20) == 0


@contextmanager
def reading(
    of: KafkaSource, topic: str, partition: int = 0, position: SourcePosition | None = None
) -> Iterator[KafkaPartition]:
    with closing(of.build_part("events", f"{topic}/{partition}", position)) as part:
        yield part


def read(part: KafkaPartition, count: int) -> list[RawMessage]:
    """Exactly `count` messages, then nothing more for a while."""
    found: list[RawMessage] = []

    def poll() -> bool:
        for batch in part.next_batch():
            found.extend(batch)
        return len(found) >= count

    wait_until(poll, f"{count} messages")
    assert part.next_batch() == []
    return found


def test_messages_come_in_order_with_their_place_and_bytes(settings: Settings, make_topic: MakeTopic) -> None:
    """Key, value (also none at all), partition and offset, and an append time."""
    topic = make_topic(2)
    send(settings, topic, [b"one", None, b"\xff\x00"], partition=1)
    with reading(source(settings, topic, with_headers=True), topic, 1) as part:
        messages = read(part, 3)
    assert [(m.partition, m.offset, m.key, m.value) for m in messages] == [
        (1, 0, b"key", b"one"),
        (1, 1, b"key", None),
        (1, 2, b"key", b"\xff\x00"),
    ]
    assert messages[0].headers == [("reason", b"why")]
    assert all(message.appended_at_ms > 0 for message in messages)


def test_a_resumed_partition_goes_on_exactly_where_its_snapshot_was(
    settings: Settings, make_topic: MakeTopic
) -> None:
    """Also when the snapshot was taken at the end of an idle partition: what came since is not lost."""
    topic = make_topic(1)
    with reading(source(settings, topic), topic) as part:
        assert part.next_batch() == []
        empty = part.snapshot()
    assert empty.next_offset == 0
    send(settings, topic, [b"0", b"1"])
    with reading(source(settings, topic), topic, position=empty) as part:
        assert [message.value for message in read(part, 2)] == [b"0", b"1"]
        kept = part.snapshot()
    send(settings, topic, [b"2"])
    with reading(source(settings, topic), topic, position=kept) as part:
        assert [message.offset for message in read(part, 1)] == [2]


def test_a_source_that_rereads_goes_on_a_minute_earlier(settings: Settings, make_topic: MakeTopic) -> None:
    """However many snapshots there were in it; and never before where it began, nor without some snapshots."""
    topic = make_topic(1)
    clock_ms = [CLOCK_MS]
    stamps = settings.broker_append_time
    rereading = KafkaSource(
        settings.kafka, topic, lambda: clock_ms[0], broker_append_time=stamps, reread=True
    )
    go_on_at = []
    with reading(rereading, topic) as part:
        for number in range(8):
            send(settings, topic, [b"%d" % number])
            read(part, 1)
            clock_ms[0] += REREAD_MS // 4
            go_on_at.append(part.snapshot().next_offset)
        clock_ms[0] += 10 * REREAD_MS
        after_a_pause = [part.snapshot().next_offset for _ in range(3)]
    assert go_on_at == [0, 0, 0, 0, 1, 2, 3, 4]
    assert after_a_pause == [7, 8, 8]


def test_a_topic_made_anew_is_another_log(
    settings: Settings, make_topic: MakeTopic, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same name and a valid offset, but another topic id: refused with one clear line."""
    topic, other = make_topic(1), make_topic(1)
    with reading(source(settings, other), other) as part:
        foreign = part.snapshot()
    with (
        pytest.raises(WrongLog, match="was made anew"),
        reading(source(settings, topic), topic, position=foreign),
    ):
        pass
    assert "metering adopt-log" in capfd.readouterr().err


def test_a_changed_partition_count_is_refused(settings: Settings, make_topic: MakeTopic) -> None:
    """Keys have moved between partitions: the line says from how many to how many."""
    topic = make_topic(2)
    with reading(source(settings, topic), topic) as part:
        kept = part.snapshot()._replace(partition_count=1)
    with (
        pytest.raises(WrongLog, match="has 2 partitions, had 1"),
        reading(source(settings, topic), topic, position=kept),
    ):
        pass


def test_a_topic_that_does_not_exist_is_one_clear_line(settings: Settings) -> None:
    """It says what to run."""
    with pytest.raises(WrongLog, match="does not exist: run `metering migrate`"):
        source(settings, "test.nowhere")
