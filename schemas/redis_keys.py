"""Every Redis key, in one place. The scheduler reads `balance`; the rest belongs to the pipeline."""

from __future__ import annotations

LEDGER_STREAM = "ledger"
"""Stream, the outbox: one entry per script call with all its lines; drained into ClickHouse."""

UNREADABLE_STREAM = "ledger:unreadable"
"""Stream: outbox entries that no script of ours wrote, set aside whole with the reason."""

EPOCH = "epoch"
"""String, an integer: which Redis this is. Scripts refuse to run when it is missing or another."""

FENCE = "frozen_before_ms"
"""String, an integer that only grows: windows that start before it take no live postings."""

LIVE_CELLS = "cells"
"""Sorted set of cell ids by window start (ms): the cells whose records are kept."""

CELL_PREFIX = "cell:"
"""`cell:<cell_id>` is a string: the last revision and vector that were posted for the cell."""

BALANCE_PREFIX = "balance:"
"""`balance:{<account>}` is a hash: balance_us, held_us, floor_us, seq, updated_at_ms."""

REQUEST_PREFIX = "request:"
"""`request:<request_id>` is a hash: the digest of a money command's body and its first result."""

RATE_VERSIONS = "rate_versions"
"""Hash: effective_from (ms) -> the rates in force from then on, so that no version is ever edited."""

POSITIONS = "positions"
"""Hash: topic/partition -> committed position of the settlement flow, in broker time (ms)."""

LOG = "log"
"""Hash: topic_id, partition_count and generation of the log that the live cells' revisions are counted in."""

DEFAULT_FLOOR_US = -18_000_000_000
"""-300 balance minutes."""


def balance(account: str) -> str:
    """The hash of one account; the braces are part of the key."""
    return f"{BALANCE_PREFIX}{{{account}}}"


def cell(cell_id: str) -> str:
    """The record of one live cell."""
    return CELL_PREFIX + cell_id


def request(request_id: str) -> str:
    """The idempotency record of one money command."""
    return REQUEST_PREFIX + request_id
