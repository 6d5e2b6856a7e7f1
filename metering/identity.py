"""Identity: who an event is, what it says, and which of several occurrences counts.

Within a scope an event is known by (source, id). Of several occurrences the one with the smallest
(partition, offset) counts; a repeat that says the same is dropped, one that differs is a conflict.
Digests stand in for the strings so that a state of millions of ids stays small: 128 bits for identities,
64 bits for bodies that are only ever compared under one identity.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from schemas.events import Event, Lifecycle, Usage

_encode = msgspec.msgpack.Encoder().encode

OFFSET_BITS = 48
"""An offset takes the low 48 bits of a position: 281 * 10**12 messages a partition."""


def position(partition: int, offset: int) -> int:
    """(partition, offset) as one integer that sorts alike."""
    return partition << OFFSET_BITS | offset


def partition_and_offset(packed: int) -> tuple[int, int]:
    """The inverse of `position`."""
    return packed >> OFFSET_BITS, packed & ((1 << OFFSET_BITS) - 1)


def identity_digest(source: str, event_id: str) -> bytes:
    """16 bytes for (source, id); the length keeps ("ab", "c") apart from ("a", "bc")."""
    return blake2b(f"{len(source)}:{source}{event_id}".encode(), digest_size=16).digest()


def body_digest(event: Event) -> bytes:
    """8 bytes for type, time (ms) and data: equal exactly when a repeat says the same thing.

    The fields are listed, and their order is part of every snapshot: a new field goes to the end, and only
    when it is set, or else repeats across an upgrade would look like conflicts.
    """
    if type(event) is Usage:
        body: tuple[object, ...] = (
            event.time_ms,
            event.session_id,
            event.room_id,
            event.user_id,
            event.node_id,
            event.utterance_id,
            event.audio_ms,
            event.asr_time_ms,
            event.nmt_time_ms,
            event.tts_time_ms,
            event.gpu_active_time_ms,
            event.source_lang,
            event.target_lang,
        )
    else:
        assert isinstance(event, Lifecycle)
        body = (event.time_ms, int(event.kind), event.user_id, event.session_id, event.room_id)
    return blake2b(_encode(body), digest_size=8).digest()
