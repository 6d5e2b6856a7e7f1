"""A node is killed under load, again and again: what it stored arrives, in order, with the same bytes."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

from confluent_kafka import Message

from schemas.decode import decode_event
from schemas.events import Usage
from schemas.settings import Settings
from tests.support.node_client import PARTITIONS, read_topic, spooled_values, values
from tests.support.processes import wait_until

NOBODY = "127.0.0.1:9"


def usage(value: bytes) -> Usage:
    """The event; the real decoder must take it."""
    event = decode_event(value)
    assert isinstance(event, Usage)
    return event


def first_occurrences(messages: list[Message]) -> dict[str, list[str]]:
    """Utterance ids per scope, each where it came first."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for value in values(messages):
        event = usage(value)
        found[event.scope].setdefault(event.utterance_id)
    return {scope: list(ids) for scope, ids in found.items()}


def test_whatever_was_stored_when_the_node_was_killed_arrives_in_order(
    settings: Settings, make_topic: Callable[[int], str], tmp_path: Path
) -> None:
    """Four kills, one of them without a broker: no event on the disk is lost, none is overtaken or changed."""
    topic = make_topic(PARTITIONS)
    spool, journal = tmp_path / "spool", tmp_path / "journal"
    rng = Random(7)
    stored: set[bytes] = set()
    sent_twice = 0

    def program(brokers: str, run: int, *more: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "tests.support.node_program",
            *(brokers, topic, str(spool), str(journal), str(run), *more),
        ]

    for run in range(4):
        lines_before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        child = subprocess.Popen(program(NOBODY if run == 1 else settings.kafka, run))
        wanted = lines_before + 30 + rng.randrange(60)
        try:
            wait_until(
                lambda wanted=wanted: journal.exists() and journal.read_bytes().count(b"\n") >= wanted,  # type: ignore[misc]
                f"the node of run {run} has stored enough",
                timeout_s=60,
            )
        finally:
            child.kill()
            assert child.wait() == -9
        # Read from the files by other means than the spool's own: a torn end is no whole line.
        stored |= set(spooled_values(spool))
    # Nobody waited for the broker, so the last runs left something to send.
    assert stored
    assert subprocess.run(program(settings.kafka, 9, "drain"), check=False).returncode == 0
    assert list(spool.glob("*.seg")) == []

    durable = set(journal.read_text().split())
    messages = read_topic(settings.kafka, topic, until=len(stored))
    arrived = values(messages)
    by_id: dict[str, set[bytes]] = defaultdict(set)
    for value in arrived:
        by_id[usage(value).id].add(value)
    assert all(len(versions) == 1 for versions in by_id.values()), "a repeat has the same bytes"
    assert stored - set(arrived) == set(), "what was on the disk arrives"
    assert durable - {usage(value).utterance_id for value in arrived} == set(), "what was promised arrives"
    sent_twice = len(arrived) - len(by_id)
    assert sent_twice < len(by_id), "a restart goes on where the last one was, and not at the beginning"

    for message in messages:
        assert message.key() == usage(message.value() or b"").scope.encode()
    for scope, ids in first_occurrences(messages).items():
        room = scope.removeprefix("room/")
        numbers = [(int(run), int(number)) for run, name, number in (each.split(".") for each in ids)]
        assert {each.split(".")[1] for each in ids} == {room}
        assert numbers == sorted(numbers), f"{scope}: nothing overtakes"
        for run in range(4):
            of_run = [number for each, number in numbers if each == run]
            assert of_run == list(range(len(of_run))), f"{scope}, run {run}: only the end may be lost"
