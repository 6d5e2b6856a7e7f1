"""The node's emitter and a broker: away and back, one that hangs up, one that refuses a message; and the bill."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.embedded import apache_kafka, broker, process
from app.embedded.process import LOOPBACK
from app.migrate import create_topics
from clients.node import Refusal, RefusalReason, UsageEmitter
from clients.node.prometheus import EmitterCollector
from schemas.decode import decode_event
from schemas.events import Usage
from schemas.settings import Settings
from tests.support.node_client import PARTITIONS, read_topic, values
from tests.support.processes import wait_until
from tests.support.services import chosen_broker, running_service

ROOMS = 5


def emit(emitter: UsageEmitter, first: int, count: int) -> None:
    """Numbered utterances, in turn in five rooms."""
    for number in range(first, first + count):
        with emitter.utterance(
            session_id="s-1", user_id="u-1", room_id=f"r-{number % ROOMS}", utterance_id=f"ut-{number}"
        ) as spoken:
            spoken.add_ms(asr=10)


def numbers_by_room(found: list[bytes]) -> dict[str, list[int]]:
    """Of each room the utterances' numbers, each where it came first."""
    rooms: dict[str, list[int]] = {}
    for value in found:
        event = decode_event(value)
        assert isinstance(event, Usage)
        numbers = rooms.setdefault(event.scope, [])
        number = int(event.utterance_id.removeprefix("ut-"))
        if number not in numbers:
            numbers.append(number)
    return rooms


@contextmanager
def a_broker(directory: Path, port: int) -> Iterator[None]:
    """One on that port, with the topic. The embedded one begins empty each time, Apache Kafka keeps its data."""
    apache = chosen_broker() == "apache"
    service = apache_kafka.service(directory / "kafka", port) if apache else broker.service(port)
    with running_service(service, directory / "broker.log"):
        create_topics(f"{LOOPBACK}:{port}", PARTITIONS, False, topics={"t": {}})
        yield


def test_a_broker_that_comes_late_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Nobody waits for it; everything arrives once it is there, in order per room."""
    port = process.free_port()
    kafka = f"{LOOPBACK}:{port}"
    found: list[bytes] = []
    with UsageEmitter(kafka, "n-17", tmp_path / "spool", topic="t", stall_timeout_s=3.0) as emitter:
        emit(emitter, 0, 300)
        wait_until(lambda: emitter.stats().spooled == 300, "all is stored while there is no broker")
        assert not emitter.flush(0.0)
        wait_until(lambda: emitter.stats().oldest_age_s > 0, "the sender has seen them")
        with a_broker(tmp_path, port):
            assert emitter.flush(60.0)
            emit(emitter, 300, 200)
            assert emitter.flush(60.0)
            found += values(read_topic(kafka, "t", 500))
        emit(emitter, 500, 300)
        wait_until(lambda: emitter.stats().spooled == 300, "all is stored while the broker is away")
        with a_broker(tmp_path, port):
            assert emitter.flush(60.0)
            found += values(read_topic(kafka, "t", 300))
        stats = emitter.stats()
        assert (stats.emitted, stats.refused, stats.spooled, stats.oldest_age_s) == (800, {}, 0, 0.0)
    assert numbers_by_room(found) == {
        f"room/r-{room}": list(range(room, 800, ROOMS)) for room in range(ROOMS)
    }


def test_a_broker_that_hangs_up_is_not_asked_in_a_hot_loop(tmp_path: Path) -> None:
    """It takes connections and drops them: the node waits longer and longer, and hardly uses its processor."""
    connections = 0
    with socket.create_server((LOOPBACK, 0)) as listener:

        def hang_up() -> None:
            nonlocal connections
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()
                    connections += 1

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        kafka = f"{LOOPBACK}:{listener.getsockname()[1]}"
        with UsageEmitter(kafka, "n-17", tmp_path / "spool", exit_timeout_s=0.0) as emitter:
            emit(emitter, 0, 10)
            wait_until(lambda: connections >= 2, "it is asked twice")
            cpu_s, began_s = time.process_time(), time.monotonic()
            wait_until(lambda: emitter.stats().producers_made >= 6, "it is asked again and again")
            elapsed_s = time.monotonic() - began_s
            assert time.process_time() - cpu_s < 0.5 * elapsed_s
            # Each one asked only once or twice, and waited longer than the one before.
            assert connections <= 3 * emitter.stats().producers_made
            assert emitter.stats().spooled == 10
            assert emitter.stats().last_error != ""
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_message_that_is_refused_for_good_does_not_block_the_rest(
    settings: Settings, make_topic: Callable[[int], str], tmp_path: Path
) -> None:
    """It is set aside with the reason; those before it and after it arrive in order."""
    topic = make_topic(PARTITIONS)
    refused: list[Refusal] = []
    with UsageEmitter(
        settings.kafka,
        "n-17",
        tmp_path / "spool",
        topic=topic,
        kafka={"message.max.bytes": 1_000},
        on_refused=refused.append,
    ) as emitter:
        emit(emitter, 0, 50)
        with emitter.utterance(session_id="s-1", user_id="u-1", source_lang="語" * 256) as spoken:
            spoken.add_ms(asr=10)
        emit(emitter, 50, 50)
        assert emitter.flush(60.0)
        assert (emitter.stats().sent, emitter.stats().set_aside) == (100, 1)
        assert emitter.stats().refused == {RefusalReason.SET_ASIDE: 1}
    (entry,) = [json.loads(line) for line in (tmp_path / "spool" / "aside.jsonl").read_text().splitlines()]
    assert "too large" in entry["reason"]
    assert entry["key"] == "session/s-1"
    assert entry["value"].encode() == refused[0].value
    found = values(read_topic(settings.kafka, topic, 100))
    assert numbers_by_room(found) == {
        f"room/r-{room}": list(range(room, 100, ROOMS)) for room in range(ROOMS)
    }


def test_damage_on_the_disk_does_not_block_the_rest(
    settings: Settings, make_topic: Callable[[int], str], tmp_path: Path
) -> None:
    """The damaged record is set aside and told; the others are sent, none of them twice."""
    topic = make_topic(PARTITIONS)
    spool = tmp_path / "spool"
    with UsageEmitter(LOOPBACK + ":9", "n-17", spool, exit_timeout_s=0.0) as emitter:
        emit(emitter, 0, 40)
    (segment,) = spool.glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    refused: list[Refusal] = []
    with UsageEmitter(settings.kafka, "n-17", spool, topic=topic, on_refused=refused.append) as emitter:
        assert emitter.flush(60.0)
        assert (emitter.stats().sent, emitter.stats().damaged) == (39, 1)
        assert [refusal.reason for refusal in refused] == [RefusalReason.SET_ASIDE]
    found = values(read_topic(settings.kafka, topic, 39))
    assert len(found) == 39
    assert sum(len(numbers) for numbers in numbers_by_room(found).values()) == 39


def test_settings_that_would_break_the_guarantees_are_refused(tmp_path: Path) -> None:
    """By name; TLS and the like are passed on, and a name that does not exist is told by the client."""
    for name in ("acks", "enable.idempotence", "message.timeout.ms", "delivery.timeout.ms", "partitioner"):
        with pytest.raises(ValueError, match=f"kafka: {name} is not yours to set"):
            UsageEmitter("127.0.0.1:9", "n-17", tmp_path, kafka={name: 1})
    with UsageEmitter("127.0.0.1:9", "n-17", tmp_path, kafka={"client.id": "mine"}, exit_timeout_s=0.0):
        pass


def test_prometheus_sees_what_stats_says(
    settings: Settings, make_topic: Callable[[int], str], tmp_path: Path
) -> None:
    """Counters and gauges, with every reason for a refusal."""
    registry = CollectorRegistry()
    with UsageEmitter(settings.kafka, "n-17", tmp_path / "spool", topic=make_topic(1)) as emitter:
        registry.register(EmitterCollector(emitter))
        emit(emitter, 0, 3)
        assert emitter.flush(60.0)
        text = generate_latest(registry).decode()
        size = emitter.stats().spooled_bytes
    for line in (
        "lingua_node_emitted_total 3.0",
        "lingua_node_sent_total 3.0",
        'lingua_node_refused_total{reason="spool_full"} 0.0',
        "lingua_node_spooled_events 0.0",
        f"lingua_node_spooled_bytes {float(size)}",
    ):
        assert line in text.splitlines()


def test_the_bill_of_emitted_events(
    settings: Settings, make_topic: Callable[[int], str], tmp_path: Path
) -> None:
    """What was emitted, read back from the topic and settled from a file, costs what the stop watch measured."""
    topic = make_topic(PARTITIONS)
    wall_ns = 1_767_225_600_000_000_000
    timer_ns = 0

    with UsageEmitter(
        settings.kafka,
        "n-17",
        tmp_path / "spool",
        topic=topic,
        clock_ns=lambda: wall_ns,
        timer_ns=lambda: timer_ns,
    ) as emitter:
        emitter.room_joined(room_id="r-9", user_id="u-2")
        wall_ns += 1_000_000_000
        with emitter.utterance(session_id="s-1", user_id="u-1", room_id="r-9") as spoken:
            with spoken.asr():
                timer_ns += 120_400_000
            with spoken.nmt():
                timer_ns += 80_600_000
            with spoken.tts():
                timer_ns += 200_000_000
            spoken.gpu_active_ms = 350
        with emitter.utterance(session_id="s-2", user_id="u-3") as spoken, spoken.asr():
            timer_ns += 7_500_000
        assert emitter.flush(60.0)
    messages = read_topic(settings.kafka, topic, 3)
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"".join(value + b"\n" for value in values(messages)))
    settled = subprocess.run(
        [sys.executable, "-m", "app", "settle", str(file)], capture_output=True, text=True, check=True
    )
    assert settled.stderr == ""
    amounts = {
        (line["account"], line["cell_id"]): line["amount_us"]
        for line in map(json.loads, settled.stdout.splitlines())
    }
    room, session = "room/r-9@1767225600000", "session/s-2@1767225600000"
    # 120 + 81 + 200 ms at 1000 us, in two equal parts; 350 ms of GPU at 500 us. Then 8 ms, and no GPU.
    assert amounts == {
        ("node/n-17", room): 175_000,
        ("platform/revenue", room): 401_000 - 175_000,
        ("user/u-1", room): -200_500,
        ("user/u-2", room): -200_500,
        ("node/n-17", session): 0,
        ("platform/revenue", session): 8_000,
        ("user/u-3", session): -8_000,
    }
