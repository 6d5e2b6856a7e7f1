"""The outbox as a Bytewax source: the Redis stream `ledger`.

It keeps no place of its own. The ledger reads from the head at every start: entries are trimmed only after their
rows are stored, and an hour later, so what is read again is a bounded repeat that the archive replaces. Another
reader says itself where it goes on.

Entries are numbered. A stream that goes back, or whose entry of a number is not the one that was stored, is of a
Redis that lost its end: it is refused, and the whole of Redis with it.
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

    def next_batch(self) -> list[list[OutboxMessage]]:
        """Up to BATCH_ENTRIES entries, as one batch; none while Redis is away."""
        try:
            reply: Any = self._client.xread({LEDGER_STREAM: self._last_id}, count=BATCH_ENTRIES)
        except Exception as error:
            if not self._away(error):
                raise
            metrics.RETRIES.labels("read the outbox").inc()
            self._pause = AWAY
            return []
        entries = [OutboxMessage(entry_id, fields) for _, read in reply for entry_id, fields in read]
        self._pause = timedelta(0) if len(entries) == BATCH_ENTRIES else GATHER
        if not entries:
            return []
        self._check(entries)
        self._last_id = entries[-1].entry_id
        return [entries]

    def _check(self, entries: list[OutboxMessage]) -> None:
        if self._continuity is None:
            return
        for entry in entries:
            try:
                number, at_ms = int(entry.fields[b"entry"]), int(entry.fields[b"at"])
            except (KeyError, ValueError):
                continue  # Foreign: whoever stores entries sets it aside.
            metrics.OUTBOX_MISSING.inc(self._continuity.missing(number))
            problem = self._continuity.check(number, at_ms)
            if problem is not None:
                self._refuse(problem)

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
