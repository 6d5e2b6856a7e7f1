"""A message as it lies in a Kafka log, before anyone looks inside."""

from __future__ import annotations

import msgspec


class RawMessage(msgspec.Struct, frozen=True, gc=False):
    """Original bytes and where they stand; `appended_at_ms` is the broker's append time (ms)."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    appended_at_ms: int
    headers: list[tuple[str, bytes]] | None = None
    log: str = ""
    """The topic's id: a topic made anew counts its offsets anew."""


class OutboxMessage(msgspec.Struct, frozen=True, gc=False):
    """One entry of the outbox: what one script call changed, all or nothing."""

    entry_id: bytes
    fields: dict[bytes, bytes]
