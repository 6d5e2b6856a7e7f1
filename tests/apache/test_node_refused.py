"""What only a real Kafka does to a node's events: it refuses a message by its size, and it tells its clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from app.migrate import create_topics
from clients.node import UsageEmitter
from schemas.decode import decode_event
from schemas.events import Usage
from schemas.settings import Settings
from tests.support.node_client import PARTITIONS, read_topic, values
from tests.support.processes import wait_until


def test_a_message_that_the_broker_refuses_is_set_aside_and_overtaken_in_order(
    settings: Settings, make_topic: Callable[[int], str], tmp_path: Path
) -> None:
    """The topic takes 1 000 bytes a batch: batches fail whole, single small ones pass, the large one never does."""
    topic = make_topic(PARTITIONS)
    limit = ConfigEntry("max.message.bytes", "1000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[limit])
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    for done in admin.incremental_alter_configs([resource]).values():
        done.result()

    def emit(number: int, language: str) -> None:
        with emitter.utterance(
            session_id="s-1", user_id="u-1", utterance_id=f"ut-{number}", source_lang=language
        ) as spoken:
            spoken.add_ms(asr=10)

    with UsageEmitter(settings.kafka, "n-17", tmp_path / "spool", topic=topic) as emitter:
        for number in range(40):
            # Of many different characters: a batch is compressed before it is measured.
            emit(number, "".join(map(chr, range(0x4E00, 0x4F00))) if number == 20 else "zh")
        assert emitter.flush(60.0)
        assert (emitter.stats().sent, emitter.stats().set_aside) == (39, 1)
    (entry,) = [json.loads(line) for line in (tmp_path / "spool" / "aside.jsonl").read_text().splitlines()]
    assert '"utterance_id":"ut-20"' in entry["value"]
    found = [decode_event(value) for value in values(read_topic(settings.kafka, topic, 39))]
    firsts = dict.fromkeys(event.utterance_id for event in found if isinstance(event, Usage))
    assert list(firsts) == [f"ut-{number}" for number in range(40) if number != 20]


def test_a_clock_that_is_ahead_is_seen(
    settings: Settings, make_topic: Callable[[int], str], tmp_path: Path
) -> None:
    """The broker's append time comes with the acknowledgement."""
    for ahead_s, seen in ((0, False), (600, True)):
        with UsageEmitter(
            settings.kafka,
            "n-17",
            tmp_path / "spool",
            topic=make_topic(1),
            clock_ns=lambda ahead_s=ahead_s: time.time_ns() + ahead_s * 1_000_000_000,  # type: ignore[misc]
        ) as emitter:
            emitter.room_closed(room_id="r-1")
            assert emitter.flush(60.0)
            ahead_ms = emitter.stats().clock_ahead_ms
            assert ahead_ms is not None
            assert (ahead_ms > 300_000) == seen


def test_a_topic_that_is_not_there_yet_is_waited_for(
    settings: Settings, make_topic: Callable[[int], str], tmp_path: Path
) -> None:
    """It is no fault of the message: nothing is set aside, and when the topic is made everything arrives."""
    topic = make_topic(PARTITIONS) + ".later"
    with UsageEmitter(
        settings.kafka,
        "n-17",
        tmp_path / "spool",
        topic=topic,
        kafka={"topic.metadata.propagation.max.ms": 500},
    ) as emitter:
        for number in range(20):
            emitter.room_joined(room_id="r-1", user_id=f"u-{number}")
        wait_until(
            lambda: "nknown topic" in emitter.stats().last_error, "it is told that the topic is missing"
        )
        assert emitter.stats().spooled == 20
        create_topics(settings.kafka, PARTITIONS, False, topics={topic: {}})
        assert emitter.flush(60.0)
        assert (emitter.stats().sent, emitter.stats().set_aside) == (20, 0)
    found = values(read_topic(settings.kafka, topic, 20))
    assert [json.loads(value)["data"]["user_id"] for value in found] == [
        f"u-{number}" for number in range(20)
    ]
