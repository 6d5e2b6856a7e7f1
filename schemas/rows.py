"""What the usage store keeps of an accepted event: the event, where it lay in the log, and its price.

Instants are integer milliseconds since the Unix epoch (`_ms`), amounts service microseconds (`_us`).
"""

from __future__ import annotations

import msgspec

from schemas.events import Lifecycle, Usage


class UsageRow(msgspec.Struct, frozen=True, gc=False):
    """One occurrence of one utterance in the log, priced at the rates in force at its time.

    Identity is the event's (scope, source, id); of several occurrences the one with the smallest
    (partition, offset) counts.
    """

    usage: Usage
    partition: int
    offset: int
    appended_at_ms: int
    window_start_ms: int
    cost_us: int
    credit_us: int
    rate_version: str


class LifecycleRow(msgspec.Struct, frozen=True, gc=False):
    """One occurrence of one lifecycle event in the log; identity as for usage."""

    lifecycle: Lifecycle
    partition: int
    offset: int
    appended_at_ms: int


class StoredUpTo(msgspec.Struct, frozen=True, gc=False):
    """Everything before `next_offset` of a partition is stored. Of several the highest offset counts."""

    topic: str
    log: str
    partition: int
    next_offset: int
    appended_at_ms: int
    """Append time of the last message before it."""
