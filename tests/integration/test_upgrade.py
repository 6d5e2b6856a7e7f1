"""A newer version goes on with what an older one kept: its snapshots, its place in the log, and its Redis."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import msgspec
import pytest
import redis
from bytewax.dataflow import Dataflow
from bytewax.operators import KeyedStream
from bytewax.recovery import RecoveryConfig
from bytewax.testing import TestingSink, TestingSource, cluster_main

from app.proof import live_balances
from app.supervisor import make_recovery_store
from app.workload import TransportEffects, WorkloadSpec, generate
from flows.settlement import (
    NO_SCOPE,
    Answers,
    Desk,
    Outgoing,
    Refused,
    SettlementRules,
    SettleScope,
    build_flow,
    decode,
    decode_commands,
    post,
)
from metering.live import LiveScope, Located, _SavedScope
from metering.settle import settle_lines
from schemas import redis_keys
from schemas.messages import RawMessage
from schemas.rate_card import load_rate_card
from schemas.settings import Settings
from sinks.balances import RedisBalances
from sources.kafka import SourcePosition, WrongLog
from tests.integration.test_kafka_source import read, reading, send, source
from tests.support.events import START_MS
from tests.support.golden_state import go_on, seen

CARD = load_rate_card(None)
CLOCK_MS = START_MS + 3_600_000
RULES = SettlementRules(CARD, 12 * 3_600_000, 300_000, emit_interval_ms=0)
PARTITIONS = 3
GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("state_*.json"))

Batches = TestingSource[list[RawMessage]]


# A changed flow resumes ------------------------------------------------------------------------------------


class Today:
    """The project's own wiring."""

    def build(self, events: Batches, book: RedisBalances) -> Dataflow:
        """The flow on this book."""
        return build_flow(events, TestingSource([]), TestingSink([]), book, RULES, lambda: CLOCK_MS)


class Tomorrow:
    """The same with a step before `settle` that has state of its own, and one after it. The steps that there were
    keep their ids: under another one Bytewax would look for their state in vain. Notes what it starts with."""

    def __init__(self) -> None:
        self.messages_read = 0
        self.restored: list[bytes] = []

    def build(self, events: Batches, book: RedisBalances) -> Dataflow:
        """The flow on this book."""
        desk = Desk(book, Answers(), lambda: CLOCK_MS)
        flow = Dataflow("settlement")
        read_now = op.inspect("count_messages", op.input("events", flow, events), self._count)
        decoded = op.flat_map_batch("decode", read_now, lambda batches: decode(batches, CARD))
        parted = op.branch("accepted", decoded, lambda item: item[0] != NO_SCOPE)
        accepted: KeyedStream[list[Located]] = parted.trues  # type: ignore[assignment]
        refused: KeyedStream[Outgoing] = parted.falses  # type: ignore[assignment]
        counted = op.stateful_map(
            "count_groups", accepted, lambda known, group: ((known or 0) + len(group), group)
        )
        settled = op.stateful_batch("settle", counted, lambda saved: self._settle(saved, desk))
        looked_at = op.map("look", settled, lambda item: item)
        commands: TestingSource[list[RawMessage]] = TestingSource([])
        taken = op.flat_map_batch("decode_commands", op.input("commands", flow, commands), decode_commands)
        to_post = op.merge("to_post", looked_at, taken, refused)
        posted = op.flat_map_batch("post", to_post, lambda items: post(items, desk))
        nowhere: list[Refused] = []
        op.output("dead_letters", posted, TestingSink(nowhere))
        return flow

    def _count(self, _step_id: str, batch: list[RawMessage]) -> None:
        self.messages_read += len(batch)

    def _settle(self, saved: bytes | None, desk: Desk) -> SettleScope:
        if saved is not None:
            self.restored.append(saved)
        return SettleScope(saved, RULES, desk)


def batches_of(lines: list[bytes], chance: random.Random) -> list[list[RawMessage]]:
    """The lines in a log of several partitions, in batches."""
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


def purely_settled(lines: list[bytes]) -> dict[str, int]:
    """Every account with an amount, by the pure function."""
    totals: dict[str, int] = {}
    for line in settle_lines(lines, CARD)[0]:
        totals[line.account] = totals.get(line.account, 0) + line.amount_us
    return {account: amount for account, amount in totals.items() if amount}


def nonzero(client: redis.Redis) -> dict[str, int]:
    """Every account with an amount, by Redis."""
    return {account: amount for account, amount in live_balances(client).items() if amount}


@pytest.mark.parametrize("ending", ["stopped", "crashed"])
@pytest.mark.parametrize("seed", range(2))
def test_a_flow_with_new_steps_goes_on_with_the_state_of_the_old_one(
    seed: int, ending: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """From today's flow to one with more steps, and back again, on other numbers of workers, stopped or crashed
    between two snapshots: live cells go on where they were, and nothing is charged twice."""
    chance = random.Random(seed)
    effects = TransportEffects(duplicates=0.1, disorder=0.2, late=0.02, junk=0.03)
    spec = WorkloadSpec(seed=seed, events=900, start_ms=START_MS, minutes=10, transport=effects)
    lines = list(generate(spec))
    batches = batches_of(lines, chance)
    end = TestingSource.EOF if ending == "stopped" else TestingSource.ABORT
    log: list[Any] = list(batches)
    first, second = len(batches) // 3, 2 * len(batches) // 3
    log.insert(second, end())
    log.insert(first, end())
    redis_client.set(redis_keys.EPOCH, 1)
    make_recovery_store(tmp_path / "store")
    events: Batches = TestingSource(log, batch_size=1)
    tomorrow = Tomorrow()
    # A cluster of which one worker is gone never ends by itself: what crashes has one.
    workers_of_tomorrow = 3 if ending == "stopped" else 1
    runs: list[tuple[Today | Tomorrow, int]] = [(Today(), 1), (tomorrow, workers_of_tomorrow), (Today(), 2)]
    for version, workers in runs:
        # Each run has a book of its own: what the one before knew is forgotten.
        cluster_main(  # type: ignore[no-untyped-call]
            version.build(events, RedisBalances(redis_client, 1, 1_000_000)),
            [],
            0,
            epoch_interval=timedelta(milliseconds=5),
            recovery_config=RecoveryConfig(str(tmp_path / "store")),  # type: ignore[no-untyped-call]
            worker_count_per_proc=workers,
        )
    assert nonzero(redis_client) == purely_settled(lines)
    if ending == "stopped":
        assert tomorrow.restored
        assert tomorrow.messages_read == sum(map(len, batches[first:second]))


# Old bytes, new code; new bytes, old code ------------------------------------------------------------------


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_snapshots_of_every_older_version_go_on_as_they_would_have_there(file: Path) -> None:
    """The committed bytes, restored by this code: the same postings, at once and after what comes then; what is
    saved again reads the same."""
    for scope, golden in json.loads(file.read_text())["scopes"].items():
        restored = LiveScope.restore(bytes.fromhex(golden["snapshot"]), CARD)
        assert restored.scope == scope
        again = LiveScope.restore(restored.snapshot(), CARD)
        for live in (restored, again):
            live_on = go_on(live)
            assert live_on == {key: golden[key] for key in ("at_once", "outcomes", "then")}


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_what_older_versions_posted_is_what_one_that_never_stopped_posts(file: Path) -> None:
    """The golden postings are right, not only equal: a scope of today that saw the same, without any restart."""
    for scope, golden in json.loads(file.read_text())["scopes"].items():
        for restore in (None, lambda saved: LiveScope.restore(saved, CARD)):
            live = seen(scope, restore)
            assert go_on(live) == {key: golden[key] for key in ("at_once", "outcomes", "then")}


class SavedByTomorrow(_SavedScope):
    """A later version's snapshot: a field more, at the end, with a default."""

    remark: str = "none"
    times: tuple[int, ...] = ()


def test_a_new_field_with_a_default_reads_old_snapshots() -> None:
    """msgspec fills what the array does not have from the defaults."""
    old = seen("room/r-1").snapshot()
    read_by_tomorrow = msgspec.msgpack.decode(old, type=SavedByTomorrow)
    assert (read_by_tomorrow.remark, read_by_tomorrow.times) == ("none", ())
    assert read_by_tomorrow.scope == "room/r-1"
    assert read_by_tomorrow.windows == msgspec.msgpack.decode(old, type=_SavedScope).windows


def test_an_older_version_reads_newer_snapshots_and_drops_what_it_does_not_know() -> None:
    """msgspec skips what the array has beyond the last field. So a version may be rolled back; what only the newer
    one knew is lost with the next snapshot, and so must never be needed to be right."""
    old = seen("room/r-1").snapshot()
    newer = msgspec.msgpack.encode(
        SavedByTomorrow(
            **msgspec.structs.asdict(msgspec.msgpack.decode(old, type=_SavedScope)), remark="!", times=(1,)
        )
    )
    assert len(newer) > len(old)
    rolled_back = LiveScope.restore(newer, CARD)
    assert rolled_back.snapshot() == old
    assert go_on(rolled_back) == go_on(seen("room/r-1"))


class OlderPosition:
    """Pickles as a SourcePosition of a version that had so many fields."""

    def __init__(self, *values: object) -> None:
        self._values = values

    def __reduce__(self) -> tuple[object, ...]:
        return SourcePosition, self._values


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_positions_of_every_older_version_are_read(file: Path) -> None:
    """The committed pickle, as Bytewax keeps it; the class keeps its name and its module."""
    position = pickle.loads(bytes.fromhex(json.loads(file.read_text())["position"]))
    assert position == SourcePosition("AAAAAAAAAAAAAAAAAAAAAA", 4, 1_234, True)


def test_a_position_with_fewer_fields_goes_on_where_it_was(
    settings: Settings, make_topic: Callable[[int], str]
) -> None:
    """The first version kept three fields, as a tuple of its own or pickled by name; the log is checked as ever."""
    topic = make_topic(1)
    send(settings, topic, [b"0", b"1", b"2"])
    today = source(settings, topic)
    log_id, partitions = today.log
    kept = pickle.dumps(OlderPosition(log_id, partitions, 1))
    positions = [pickle.loads(kept), (log_id, partitions, 1)]
    assert isinstance(positions[0], SourcePosition)
    for position in positions:
        with reading(today, topic, position=position) as part:
            assert [message.value for message in read(part, 2)] == [b"1", b"2"]
    with pytest.raises(WrongLog):
        today.build_part("events", f"{topic}/0", pickle.loads(pickle.dumps(OlderPosition("other", 1, 1))))
