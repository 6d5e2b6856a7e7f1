"""Every Redis key, in one place. The scheduler reads `balance` and keeps holds; the rest is the pipeline's."""

from __future__ import annotations

LEDGER_STREAM = "ledger"
"""Stream, the outbox: one entry per script call with all its lines; drained into ClickHouse."""

UNREADABLE_STREAM = "ledger:unreadable"
"""Stream: outbox entries that no script of ours wrote, set aside whole with the reason."""

EPOCH = "epoch"
"""String, an integer: which Redis this is. Scripts refuse to run when it is missing or another."""

REBUILDING = "rebuilding"
"""String, an integer: the epoch that a rebuild is about to announce. While it is there `epoch` is not."""

ENTRIES = "entries"
"""String, an integer: the number of the last outbox entry. It only grows, across epochs too: a Redis that has
less than somebody saw before has lost its end, and scripts refuse it."""

LAST_ENTRY = "last_entry"
"""String: the id of the last outbox entry in the stream. Where another one stands than somebody saw, the end was
lost too."""

LEDGER_STORED = "ledger_stored"
"""String, an integer: the number of the last outbox entry whose rows are in ClickHouse."""

ALERTS_SENT = "alerts_sent"
"""String, the id of a stream entry: alerts of everything up to it are in Kafka. It goes with the stream."""

RESETTLE = "resettle"
"""Hash: token and step of the last resettle, and up to where one was complete (frozen_before_ms,
appended_before_ms)."""

FENCE = "frozen_before_ms"
"""String, an integer that only grows: windows that start before it take no live postings."""

LIVE_CELLS = "cells"
"""Sorted set of cell ids by window start (ms): the cells whose records are kept."""

CELL_PREFIX = "cell:"
"""`cell:<cell_id>` is a string: the last revision and vector that were posted for the cell."""

BALANCE_PREFIX = "balance:"
"""`balance:{<account>}` is a hash: balance_us, held_us, floor_us, seq, updated_at_ms."""

HOLDS_PREFIX = "holds:"
"""`holds:{<account>}` is a sorted set: sessions by the expiry (ms) of their holds. See clients/scheduler/lua."""

HOLD_AMOUNTS_PREFIX = "hold_amounts:"
"""`hold_amounts:{<account>}` is a hash: session -> us held for it, and `/total`, their sum."""

HOLDS_EXPIRING = "holds_expiring"
"""Sorted set: accounts by the expiry (ms) of their first hold."""

REQUEST_PREFIX = "request:"
"""`request:<request_id>` is a hash: the digest of a money command's body and its first result."""

REQUESTS = "requests"
"""Sorted set of request ids by when they were carried out (ms): those that have a hash."""

REQUEST_MARK_PREFIX = "requests:"
"""`requests:<4 hex digits>` is a hash: digest of a request id -> digest of its command's body, for requests so old
that only the ledger has their result. A request id is spent for ever."""

GRANTS = "grants"
"""Sorted set of `<account>|<grant id>` by when the grant expires (ms): grants that the fence has not passed."""

RATE_VERSIONS = "rate_versions"
"""Hash: effective_from (ms) -> the rates in force from then on, so that no version is ever edited."""

POSITIONS = "positions"
"""Hash: topic/partition -> committed position of the settlement flow, in broker time (ms)."""

LOG = "log"
"""Hash: topic_id, partition_count and generation of the log that the live cells' revisions are counted in."""

NEXT_GENERATION = "log:next_generation"
"""String, an integer: the generation that the next log gets, where a rebuild has found no `log`."""

DEFAULT_FLOOR_US = -18_000_000_000
"""-300 balance minutes."""

LOW_US = 600_000_000
"""10 balance minutes: whoever falls below gets an alert."""


def balance(account: str) -> str:
    """The hash of one account; the braces are part of the key."""
    return f"{BALANCE_PREFIX}{{{account}}}"


def holds(account: str) -> str:
    """The sessions of one account that have holds."""
    return f"{HOLDS_PREFIX}{{{account}}}"


def hold_amounts(account: str) -> str:
    """What each of them holds."""
    return f"{HOLD_AMOUNTS_PREFIX}{{{account}}}"


def cell(cell_id: str) -> str:
    """The record of one live cell."""
    return CELL_PREFIX + cell_id


def request(request_id: str) -> str:
    """The idempotency record of one money command."""
    return REQUEST_PREFIX + request_id


def request_mark(digits: str) -> str:
    """The marks of old requests whose ids' digests begin with these four hex digits."""
    return REQUEST_MARK_PREFIX + digits
