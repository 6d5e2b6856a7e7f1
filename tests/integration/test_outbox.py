"""The outbox: never trimmed past what is stored, never for longer than it must be kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from bytewax.testing import TestingSource, run_main
from prometheus_client import REGISTRY

from flows.ledger import build_flow
from metering.live import CellPosting, Emission
from metering.outbox import Continuity
from metering.ports import WrongRedis
from schemas import redis_keys
from schemas.messages import OutboxMessage
from schemas.ports import StoreRefused
from schemas.records import LedgerLine
from sinks.balances import RedisBalances, heals
from sinks.memory import MemoryJournal
from sinks.outbox import RedisOutbox
from sources.outbox import BATCH_ENTRIES, OutboxSource

HOUR_S = 3_600


@pytest.fixture
def client(redis_client: redis.Redis) -> redis.Redis:
    """A Redis in use."""
    redis_client.set(redis_keys.EPOCH, 1)
    redis_client.set(redis_keys.ENTRIES, 100)
    return redis_client


def outbox(client: redis.Redis, retention_s: int = HOUR_S, max_entries: int = 1_000) -> RedisOutbox:
    return RedisOutbox(client, 1, retention_s, max_entries)


def entry(entry_id: bytes) -> OutboxMessage:
    return OutboxMessage(entry_id, {})


def old_entries(client: redis.Redis, count: int) -> None:
    """Entries of long ago, numbered 1-0, 2-0, ..."""
    for number in range(1, count + 1):
        client.xadd(redis_keys.LEDGER_STREAM, {"n": number}, id=f"{number}-0")


def left(client: redis.Redis) -> list[str]:
    return [entry_id.decode() for entry_id, _ in client.xrange(redis_keys.LEDGER_STREAM)]


def test_only_what_is_stored_is_trimmed_however_old(client: redis.Redis) -> None:
    """The last stored entry itself may stay; its number is noted."""
    old_entries(client, 5)
    assert outbox(client).note_stored(entry(b"3-0"), 3) == 3
    assert left(client) == ["3-0", "4-0", "5-0"]
    assert client.get(redis_keys.LEDGER_STORED) == b"3"


def test_what_is_stored_stays_for_the_retention(client: redis.Redis) -> None:
    """An hour, so that a restarted reader repeats a bounded piece and nothing is missing."""
    entries = [client.xadd(redis_keys.LEDGER_STREAM, {"n": number}) for number in range(3)]
    last = entries[-1]
    assert isinstance(last, bytes)
    assert outbox(client).note_stored(entry(last), 3) == 3


def test_the_retention_never_fills_the_outbox(client: redis.Redis) -> None:
    """With more than half of the bound in use, what is stored goes at once."""
    entries = [client.xadd(redis_keys.LEDGER_STREAM, {"n": number}) for number in range(6)]
    stored = entries[3]
    assert isinstance(stored, bytes)
    assert outbox(client, max_entries=10).note_stored(entry(stored), 4) == 3
    assert left(client)[0] == stored.decode()


def test_an_outbox_that_lost_its_end_is_condemned(client: redis.Redis) -> None:
    """The reader knows a higher number than Redis does: from then on no script runs."""
    client.set(redis_keys.ENTRIES, 4)
    with pytest.raises(WrongRedis, match="rebuild-balances"):
        outbox(client).check_reached(5)
    assert client.get(redis_keys.EPOCH) is None


def test_a_reader_of_an_older_epoch_notes_nothing(client: redis.Redis) -> None:
    """One that slept through a rebuild must not say that entries of the new epoch are stored."""
    client.set(redis_keys.EPOCH, 2)
    with pytest.raises(WrongRedis):
        outbox(client).note_stored(entry(b"3-0"), 3)
    with pytest.raises(WrongRedis):
        outbox(client).condemn("it looks odd")
    assert client.get(redis_keys.EPOCH) == b"2"
    assert client.get(redis_keys.LEDGER_STORED) is None


def numbered(client: redis.Redis, number: int, at_ms: int = 7) -> None:
    client.xadd(redis_keys.LEDGER_STREAM, {"epoch": 1, "entry": number, "at": at_ms, "fence": 60_000})


def read(client: redis.Redis, continuity: Continuity) -> list[int]:
    """The numbers of the entries that a reader hands on."""
    part = OutboxSource(client, heals, continuity, outbox(client).condemn).build_part("in", "ledger", None)
    return [int(message.fields[b"entry"]) for batch in part.next_batch() for message in batch]


def test_entries_are_read_from_what_is_stored_on(client: redis.Redis) -> None:
    """Entries that are stored already may come again."""
    for number in (4, 5, 6):
        numbered(client, number)
    assert read(client, Continuity(5, 7)) == [4, 5, 6]


@pytest.mark.parametrize(
    ("numbers", "stored_at_ms"),
    [((4, 5, 5), 7), ((5, 4), 7), ((4, 5, 6), 8)],
    ids=["a number twice", "going back", "another entry of the number that is stored"],
)
def test_another_history_is_condemned(
    client: redis.Redis, numbers: tuple[int, ...], stored_at_ms: int
) -> None:
    """A Redis that came back without its end gives numbers again, for other entries."""
    for number in numbers:
        numbered(client, number)
    with pytest.raises(WrongRedis, match="lost its end"):
        read(client, Continuity(5, stored_at_ms))
    assert client.get(redis_keys.EPOCH) is None


def test_nothing_is_stored_again_before_the_last_stored_entry_was_seen(client: redis.Redis) -> None:
    """It lies batches ahead. Of another history not even the first batch is handed on."""
    stored = BATCH_ENTRIES + 50
    for number in range(1, stored + 10):
        numbered(client, number)
    with pytest.raises(
        WrongRedis, match=f"entry {stored} of the outbox was written at 7 ms, the ledger's at 8"
    ):
        read(client, Continuity(stored, 8))
    assert client.get(redis_keys.EPOCH) is None
    assert read(client, Continuity(stored, 7)) == list(range(1, BATCH_ENTRIES + 1))


def test_a_stored_entry_that_is_gone_while_older_ones_are_there_is_missed(client: redis.Redis) -> None:
    """Streams are trimmed from their head: then the end was lost."""
    for number in (1, 2, 3):
        numbered(client, number)
    with pytest.raises(WrongRedis, match="has not got entry 4 any more"):
        read(client, Continuity(4, 7))


def test_what_is_stored_again_is_looked_at_again_before_each_batch(client: redis.Redis) -> None:
    """Redis may lose its end between two batches as well."""
    stored = 2 * BATCH_ENTRIES + 50
    for number in range(1, stored + 10):
        numbered(client, number)
    keeper = outbox(client)
    part = OutboxSource(client, heals, Continuity(stored, 7), keeper.condemn).build_part("in", "ledger", None)
    assert [len(batch) for batch in part.next_batch()] == [BATCH_ENTRIES]
    ids = [entry_id for entry_id, _ in client.xrange(redis_keys.LEDGER_STREAM)]  # type: ignore[union-attr]
    client.xdel(redis_keys.LEDGER_STREAM, *ids[stored - 5 :])
    for number in range(stored - 4, stored + 1):
        numbered(client, number, at_ms=9)
    with pytest.raises(WrongRedis, match="lost its end"):
        part.next_batch()


def test_reading_goes_on_after_redis_was_away_while_it_looked_ahead(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is read again, and nothing is taken for a number that came twice."""
    stored = BATCH_ENTRIES + 50
    for number in range(1, stored + 1):
        numbered(client, number)
    part = OutboxSource(client, heals, Continuity(stored, 7), outbox(client).condemn).build_part(
        "in", "l", None
    )

    def away(*_: object, **__: object) -> None:
        raise redis.ConnectionError("gone for a moment")

    with monkeypatch.context() as patched:
        patched.setattr(client, "xrange", away)
        assert part.next_batch() == []
    found = [message for _ in range(2) for batch in part.next_batch() for message in batch]
    assert len(found) == stored


def test_looking_for_the_last_stored_entry_notes_nothing(client: redis.Redis) -> None:
    """Some of its rows may be missing in the ledger."""
    client.set(redis_keys.ENTRIES, 4)
    outbox(client).check_reached(4)
    assert client.get(redis_keys.LEDGER_STORED) is None


def test_entries_that_were_removed_unread_are_counted(client: redis.Redis) -> None:
    """Somebody else trimmed the stream: the ledger has a gap, which is said, and the rest goes on."""
    before = missing_so_far()
    for number in (8, 9, 12):
        numbered(client, number)
    assert read(client, Continuity(5, 7)) == [8, 9, 12]
    assert missing_so_far() - before == 4


def missing_so_far() -> float:
    return REGISTRY.get_sample_value("metering_outbox_missing_total") or 0.0


class RefusingJournal(MemoryJournal):
    """A store that cannot take ledger lines."""

    def insert_lines(self, lines: object) -> None:
        raise StoreRefused("no such table")


def posted(client: redis.Redis) -> list[OutboxMessage]:
    """A ledger line in the outbox, and what its reader gets."""
    cell = CellPosting("session/s-1@0", 0, 1, {"user/u-1": -7}, "v1")
    RedisBalances(client, 1, 1_000).post([Emission("session/s-1", [cell], None, [])])
    return [OutboxMessage(entry_id, fields) for entry_id, fields in client.xrange(redis_keys.LEDGER_STREAM)]


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error and whatever led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_nothing_is_trimmed_when_the_rows_could_not_be_stored(client: redis.Redis) -> None:
    """The flow fails and the entry is there for the next start."""
    messages = posted(client)
    flow = build_flow(TestingSource([messages]), RefusingJournal(), outbox(client, retention_s=0))
    with pytest.raises(Exception) as raised:  # Bytewax wraps it more than once.
        run_main(flow)
    causes = list(causes_of(raised.value))
    assert any(isinstance(cause, StoreRefused) for cause in causes), causes
    assert len(left(client)) == 1


def test_a_foreign_entry_is_set_aside_whole_and_the_rest_goes_on(client: redis.Redis) -> None:
    """It waits in a stream of its own, with the reason."""
    messages = posted(client)
    foreign = OutboxMessage(b"1-1", {b"hello": b"world"})
    journal = MemoryJournal()
    run_main(build_flow(TestingSource([[foreign, *messages]]), journal, outbox(client)))
    lines: list[LedgerLine] = journal.stored_lines()
    assert {line.account for line in lines} == {"user/u-1", "platform/revenue"}
    ((_, aside),) = client.xrange(redis_keys.UNREADABLE_STREAM)
    assert aside[b"hello"] == b"world"
    assert aside[b"entry_id"] == b"1-1"
    assert b"KeyError" in aside[b"why"]
