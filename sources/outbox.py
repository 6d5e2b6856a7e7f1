"""The outbox as a Bytewax source: the Redis stream `ledger`.

It keeps no place of its own. The ledger reads from the head at every start: entries are trimmed only after their
rows are stored, and an hour later, so what is read again is a bounded repeat that the archive replaces. Another
reader says itself where it goes on.

Entries are numbered. A stream that goes back, or whose entry of a number is not the one that was stored, is of a
Redis that lost its end: it is refused, and the whole of Redis with it. Nothing is handed on again before the last
stored entry was seen to be still the same.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import redis
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition

from metering.outbox import Continuity
from schemas.messages import OutboxMessage
from schemas.redis_keys import LEDGER_STREAM
from telemetry import metrics

BATCH_ENTRIES = 500
GATHER = timedelta(milliseconds=200)
"""Entries are gathered for so long: fewer, larger inserts."""
AWAY = timedelta(seconds=1)


def _number_and_time(entry: OutboxMessage) -> tuple[int, int] | None:
    """Of an entry; None for a foreign one, which whoever stores entries sets aside."""
    try:
        return int(entry.fields[b"entry"]), int(entry.fields[b"at"])
    except (KeyError, ValueError):
        return None


class _OutboxPartition(StatefulSourcePartition[list[OutboxMessage], None]):
    def __init__(
        self,
        client: redis.Redis,
        away: Callable[[Exception], bool],
        continuity: Continuity | None,
        refuse: Callable[[str], NoReturn],
        after: bytes,
    ) -> None:
        self._client = client
        self._away = away
        self._continuity = continuity
        self._refuse = refuse
        self._last_id = after
        self._pause = GATHER
        self._ahead_id: bytes | None = None

    def next_batch(self) -> list[list[OutboxMessage]]:
        """Up to BATCH_ENTRIES entries, as one batch; none while Redis is away."""
        try:
            reply: Any = self._client.xread({LEDGER_STREAM: self._last_id}, count=BATCH_ENTRIES)
            entries = [OutboxMessage(entry_id, fields) for _, read in reply for entry_id, fields in read]
            numbered = list(filter(None, map(_number_and_time, entries)))
            problem = self._problem_ahead(numbered, entries[-1].entry_id) if numbered else None
        except Exception as error:
            if not self._away(error):
                raise
            metrics.RETRIES.labels("read the outbox").inc()
            self._pause = AWAY
            return []
        self._pause = timedelta(0) if len(entries) == BATCH_ENTRIES else GATHER
        if not entries:
            return []
        problem = problem or self._problem(numbered)
        if problem is not None:
            self._refuse(problem)
        self._last_id = entries[-1].entry_id
        return [entries]

    def _problem(self, numbered: list[tuple[int, int]]) -> str | None:
        if self._continuity is None:
            return None
        for number, at_ms in numbered:
            metrics.OUTBOX_MISSING.inc(self._continuity.missing(number))
            problem = self._continuity.check(number, at_ms)
            if problem is not None:
                return problem
        return None

    def _problem_ahead(self, numbered: list[tuple[int, int]], last_id: bytes) -> str | None:
        # Asked after the batch was read: whatever took the place of the entry ahead before that is seen.
        if self._continuity is None or not (ahead := self._continuity.looks_ahead(max(numbered)[0])):
            return None
        known = self._ahead_id
        return self._continuity.check_ahead(self._at(known) if known else self._find(ahead, last_id))

    def _at(self, entry_id: bytes) -> tuple[int, int] | None:
        read: Any = self._client.xrange(LEDGER_STREAM, min=entry_id, max=entry_id)
        return _number_and_time(OutboxMessage(*read[0])) if read else None

    def _find(self, ahead: int, after: bytes) -> tuple[int, int] | None:
        """The first entry with that number or a higher one."""
        while True:
            read: Any = self._client.xrange(LEDGER_STREAM, min=b"(" + after, count=BATCH_ENTRIES)
            if not read:
                return None
            for entry_id, fields in read:
                found = _number_and_time(OutboxMessage(entry_id, fields))
                if found is not None and found[0] >= ahead:
                    self._ahead_id = entry_id
                    return found
            after = read[-1][0]

    def next_awake(self) -> datetime | None:
        """At once while there is more, else after gathering."""
        return datetime.now(UTC) + self._pause

    def snapshot(self) -> None:
        """Nothing: the stream itself is what is left to do."""


class OutboxSource(FixedPartitionedSource[list[OutboxMessage], None]):
    """One reader.

    `away(error)` says that Redis is away, and reading goes on when it is back. `continuity` knows what is stored;
    `refuse` is called with what is wrong when the stream is of another history, and raises. A reader without
    `continuity` looks at nothing but what is there. `after()` is the id of the last entry that is not wanted.
    """

    def __init__(
        self,
        client: redis.Redis,
        away: Callable[[Exception], bool],
        continuity: Continuity | None,
        refuse: Callable[[str], NoReturn],
        after: Callable[[], bytes] = lambda: b"0-0",
    ) -> None:
        self._client = client
        self._away = away
        self._continuity = continuity
        self._refuse = refuse
        self._after = after

    def list_parts(self) -> list[str]:
        """The stream."""
        return [LEDGER_STREAM]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _OutboxPartition:
        """A reader at its place."""
        return _OutboxPartition(self._client, self._away, self._continuity, self._refuse, self._after())
