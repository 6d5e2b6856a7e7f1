"""The settlement flow on lists: the same wiring, state and recovery, with books and sinks in memory."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import pytest
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSink, TestingSource, cluster_main, run_main

from app.workload import TransportEffects, WorkloadSpec, generate
from flows.settlement import Refused, SettlementRules, build_flow
from metering.cells import window_start_ms
from metering.live import CellPosting, Displaced, Emission
from metering.settle import settle_lines
from schemas.decode import decode_event
from schemas.messages import RawMessage
from schemas.rate_card import load_rate_card
from schemas.records import DeadLetter
from schemas.rejections import RejectReason
from sinks.balances_memory import MemoryBalances
from tests.support.events import START_MS

CARD = load_rate_card(None)
PARTITIONS = 3
CLOCK_MS = START_MS + 3_600_000


def rules(emit_interval_ms: int = 0) -> SettlementRules:
    return SettlementRules(CARD, 12 * 3_600_000, 300_000, emit_interval_ms)


def workload(seed: int, events: int = 400) -> list[bytes]:
    effects = TransportEffects(duplicates=0.1, disorder=0.2, late=0.02, junk=0.03)
    spec = WorkloadSpec(seed=seed, events=events, start_ms=START_MS, minutes=10, transport=effects)
    return list(generate(spec))


def pure(lines: list[bytes]) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for line in settle_lines(lines, CARD)[0]:
        totals[line.account] += line.amount_us
    return {account: amount for account, amount in totals.items() if amount}


def in_a_log(lines: list[bytes], chance: random.Random) -> list[list[RawMessage]]:
    """Batches of messages on several partitions; a repeat may land on another one than the first."""
    offsets = [0] * PARTITIONS
    batches: list[list[RawMessage]] = []
    rest = list(lines)
    while rest:
        partition = chance.randrange(PARTITIONS)
        batch = []
        for line in rest[: chance.randrange(1, 40)]:
            batch.append(RawMessage("lingua.events", partition, offsets[partition], None, line, CLOCK_MS))
            offsets[partition] += 1
        del rest[: len(batch)]
        batches.append(batch)
    return batches


def nonzero(book: MemoryBalances) -> dict[str, int]:
    return {account: amount for account, amount in book.balances().items() if amount}


@pytest.mark.parametrize("workers", [1, 3])
def test_the_balances_are_the_pure_bill(workers: int) -> None:
    """On one worker and on several."""
    lines = workload(seed=11)
    book, refused = MemoryBalances(), list[Refused]()
    events = TestingSource(in_a_log(lines, random.Random(1)), batch_size=1)
    flow = build_flow(events, TestingSource([]), TestingSink(refused), book, rules(), lambda: CLOCK_MS)
    cluster_main(flow, [], 0, worker_count_per_proc=workers)
    assert nonzero(book) == pure(lines)
    assert len(refused) == len(settle_lines(lines, CARD)[1]) > 0


@pytest.mark.parametrize("seed", range(6))
def test_a_flow_that_crashes_again_and_again_charges_nothing_twice(seed: int, tmp_path: Path) -> None:
    """Aborted between snapshots, it comes back with an older state, reads again, and ends at the same bill."""
    chance = random.Random(seed)
    lines = workload(seed)
    batches: list[object] = [*in_a_log(lines, chance)]
    for _ in range(5):
        batches.insert(chance.randrange(len(batches)), TestingSource.ABORT())
    init_db_dir(tmp_path, 1)
    recovery = RecoveryConfig(str(tmp_path))
    book, refused = MemoryBalances(), list[Refused]()
    events = TestingSource(batches, batch_size=1)
    for _ in range(7):
        flow = build_flow(events, TestingSource([]), TestingSink(refused), book, rules(), lambda: CLOCK_MS)
        # An epoch of no length would snapshot every batch; this one leaves some between snapshots.
        run_main(
            flow, epoch_interval=timedelta(milliseconds=chance.choice([0, 2, 1000])), recovery_config=recovery
        )
    assert nonzero(book) == pure(lines)
    assert sum(book.balances().values()) == 0


def test_a_posting_that_was_answered_older_goes_out_again_with_a_later_event() -> None:
    """The book knows a higher revision of the cell, from another interleaving before a crash: what the flow posts
    first is refused, and must not be forgotten when an event of another window brings a higher revision."""
    lines = [
        line for line in workload(seed=3, events=300) if b"utterance" in line and b'"room_id"' not in line
    ]
    session = json.loads(lines[0])["data"]["session_id"].encode()
    ours = [line for line in lines if session in line]
    first = ours[0]
    later = next(line for line in ours if json.loads(line)["time"][:16] > json.loads(first)["time"][:16])
    scope = f"session/{session.decode()}"
    window = window_start_ms(decode_event(first).time_ms)
    book = MemoryBalances()
    stale = CellPosting(f"{scope}@{window}", window, 2, {"user/u-gone": -5}, "")
    book.post([Emission(scope, [stale], None, [])])
    batches = [
        [RawMessage("lingua.events", 0, 0, None, first, CLOCK_MS)],
        [RawMessage("lingua.events", 0, 5, None, later, CLOCK_MS)],
    ]
    flow = build_flow(
        TestingSource(batches), TestingSource([]), TestingSink([]), book, rules(), lambda: CLOCK_MS
    )
    run_main(flow)
    assert nonzero(book) == pure([first, later])


def test_what_is_refused_keeps_its_bytes_and_place() -> None:
    """A dead letter has the reason, the original bytes, the topic, partition and offset."""
    message = RawMessage("lingua.events", 2, 41, b"key", b"\xff not json", CLOCK_MS)
    refused = list[Refused]()
    flow = build_flow(
        TestingSource([[message]]),
        TestingSource([]),
        TestingSink(refused),
        MemoryBalances(),
        rules(),
        lambda: 0,
    )
    run_main(flow)
    (letter,) = refused
    assert isinstance(letter, DeadLetter)
    assert (letter.topic, letter.partition, letter.offset) == ("lingua.events", 2, 41)
    assert (letter.key, letter.value, letter.reason) == (b"key", b"\xff not json", RejectReason.NOT_JSON)


def test_an_id_that_says_two_things_is_a_dead_letter_wherever_it_comes() -> None:
    """The later position is refused with its bytes; one that counted and was displaced is named by its place."""
    first = workload(seed=3, events=60)[-1]
    twisted = first.replace(b'"time":"2026', b'"time":"2025')
    assert twisted != first
    later = RawMessage("lingua.events", 0, 9, None, twisted, CLOCK_MS)
    earlier = RawMessage("lingua.events", 0, 3, None, first, CLOCK_MS)
    for batches, expected in (([[earlier], [later]], twisted), ([[later], [earlier]], Displaced(0, 9))):
        refused = list[Refused]()
        flow = build_flow(
            TestingSource(batches),
            TestingSource([]),
            TestingSink(refused),
            MemoryBalances(),
            rules(),
            lambda: 0,
        )
        run_main(flow)
        (item,) = refused
        if isinstance(item, DeadLetter):
            assert (item.reason, item.value) == (RejectReason.IDENTITY_CONFLICT, expected)
        else:
            assert item == expected


def command(request_id: str, amount_us: int, offset: int) -> RawMessage:
    data = {"account": "user/u-1", "amount_us": amount_us, "request_id": request_id}
    envelope = {
        "specversion": "1.0",
        "id": f"c-{offset}",
        "source": "web",
        "type": "lingua.account.topped_up.v1",
        "time": "2026-01-01T00:00:00Z",
        "data": data | {"reason": "card", "actor": "user/u-1"},
    }
    value = json.dumps(envelope)
    return RawMessage("lingua.commands", 0, offset, b"user/u-1", value.encode(), CLOCK_MS)


def test_commands_are_carried_out_once_and_a_conflict_is_a_dead_letter() -> None:
    """The same request id with another amount moves nothing and is refused with its bytes."""
    messages = [command("q-1", 500, 0), command("q-1", 500, 1), command("q-1", 900, 2)]
    book, refused = MemoryBalances(), list[Refused]()
    flow = build_flow(
        TestingSource([]), TestingSource([messages]), TestingSink(refused), book, rules(), lambda: CLOCK_MS
    )
    run_main(flow)
    assert nonzero(book) == {"user/u-1": 500, "platform/top_ups": -500}
    (letter,) = refused
    assert isinstance(letter, DeadLetter)
    assert (letter.reason, letter.offset) == (RejectReason.REQUEST_CONFLICT, 2)
