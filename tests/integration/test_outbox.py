"""The outbox: never trimmed past what is stored, never for longer than it must be kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from bytewax.testing import TestingSource, run_main

from flows.ledger import build_flow
from metering.live import CellPosting, Emission
from schemas import redis_keys
from schemas.messages import OutboxMessage
from schemas.ports import StoreRefused
from schemas.records import LedgerLine
from sinks.balances import RedisBalances
from sinks.memory import MemoryJournal
from sinks.outbox import RedisOutbox

HOUR_S = 3_600


def old_entries(client: redis.Redis, count: int) -> None:
    """Entries of long ago, numbered 1-0, 2-0, ..."""
    for number in range(1, count + 1):
        client.xadd(redis_keys.LEDGER_STREAM, {"n": number}, id=f"{number}-0")


def left(client: redis.Redis) -> list[str]:
    return [entry_id.decode() for entry_id, _ in client.xrange(redis_keys.LEDGER_STREAM)]


def test_only_what_is_stored_is_trimmed_however_old(redis_client: redis.Redis) -> None:
    """The last stored entry itself may stay."""
    old_entries(redis_client, 5)
    assert RedisOutbox(redis_client, HOUR_S, 1_000).trim(b"3-0") == 3
    assert left(redis_client) == ["3-0", "4-0", "5-0"]


def test_what_is_stored_stays_for_the_retention(redis_client: redis.Redis) -> None:
    """An hour, so that a restarted reader repeats a bounded piece and nothing is missing."""
    entries = [redis_client.xadd(redis_keys.LEDGER_STREAM, {"n": number}) for number in range(3)]
    last = entries[-1]
    assert isinstance(last, bytes)
    assert RedisOutbox(redis_client, HOUR_S, 1_000).trim(last) == 3


def test_the_retention_never_fills_the_outbox(redis_client: redis.Redis) -> None:
    """With more than half of the bound in use, what is stored goes at once."""
    entries = [redis_client.xadd(redis_keys.LEDGER_STREAM, {"n": number}) for number in range(6)]
    stored = entries[3]
    assert isinstance(stored, bytes)
    assert RedisOutbox(redis_client, HOUR_S, 10).trim(stored) == 3
    assert left(redis_client)[0] == stored.decode()


class RefusingJournal(MemoryJournal):
    """A store that cannot take ledger lines."""

    def insert_lines(self, lines: object) -> None:
        raise StoreRefused("no such table")


def posted(client: redis.Redis) -> list[OutboxMessage]:
    """A ledger line in the outbox, and what its reader gets."""
    client.set(redis_keys.EPOCH, 1)
    cell = CellPosting("session/s-1@0", 0, 1, {"user/u-1": -7}, "v1")
    RedisBalances(client, 1, 1_000).post([Emission("session/s-1", [cell], None, [])])
    return [OutboxMessage(entry_id, fields) for entry_id, fields in client.xrange(redis_keys.LEDGER_STREAM)]


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error and whatever led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_nothing_is_trimmed_when_the_rows_could_not_be_stored(redis_client: redis.Redis) -> None:
    """The flow fails and the entry is there for the next start."""
    messages = posted(redis_client)
    flow = build_flow(TestingSource([messages]), RefusingJournal(), RedisOutbox(redis_client, 0, 1_000))
    with pytest.raises(Exception) as raised:  # Bytewax wraps it more than once.
        run_main(flow)
    causes = list(causes_of(raised.value))
    assert any(isinstance(cause, StoreRefused) for cause in causes), causes
    assert len(left(redis_client)) == 1


def test_a_foreign_entry_is_set_aside_whole_and_the_rest_goes_on(redis_client: redis.Redis) -> None:
    """It waits in a stream of its own, with the reason."""
    messages = posted(redis_client)
    foreign = OutboxMessage(b"1-1", {b"hello": b"world"})
    journal = MemoryJournal()
    run_main(
        build_flow(TestingSource([[foreign, *messages]]), journal, RedisOutbox(redis_client, HOUR_S, 1_000))
    )
    lines: list[LedgerLine] = journal.stored_lines()
    assert {line.account for line in lines} == {"user/u-1", "platform/revenue"}
    ((_, aside),) = redis_client.xrange(redis_keys.UNREADABLE_STREAM)
    assert aside[b"hello"] == b"world"
    assert aside[b"entry_id"] == b"1-1"
    assert b"KeyError" in aside[b"why"]
