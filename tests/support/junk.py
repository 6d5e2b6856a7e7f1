"""Messages that cost the most to refuse, as far as is known; whoever finds a dearer one adds it."""

from __future__ import annotations

import json
from typing import Any

from schemas.cloudevents import USAGE_TYPE

USAGE: dict[str, Any] = {
    "specversion": "1.0",
    "id": "01JD",
    "source": "node/n-17",
    "type": USAGE_TYPE,
    "time": "2026-01-01T00:00:00.123Z",
    "data": {
        "session_id": "s-123",
        "room_id": "r-9",
        "user_id": "u-5",
        "node_id": "n-17",
        "utterance_id": "ut-1",
        "audio_ms": 4200,
        "asr_time_ms": 120,
        "nmt_time_ms": 80,
        "tts_time_ms": 200,
        "gpu_active_time_ms": 350,
        "source_lang": "zh",
        "target_lang": "en",
    },
}
"""A good event; the junk is made from it."""

GOOD = json.dumps(USAGE).encode()
_WRONG_AT_LAST = GOOD[:-1].replace(b'"gpu_active_time_ms": 350', b'"gpu_active_time_ms": 401') + b',"x":'


def worst_junk(size: int) -> dict[str, bytes]:
    """Each kind by its name, of nearly so many bytes; two kinds are as small as a good event."""
    wrong = _WRONG_AT_LAST

    def padded(head: bytes, unit: bytes, tail: bytes) -> bytes:
        return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail

    def deep(opening: bytes, closing: bytes) -> bytes:
        depth = (size - len(wrong) - 2) // len(opening + closing)
        return wrong + opening * depth + b"1" + closing * depth + b"}"

    return {
        "open lists": b"[" * size,
        "open objects": padded(b"", b'{"a":', b"}"),
        "a list of numbers": padded(b"[", b"1,", b"1]"),
        "numbers, then broken": padded(b'{"a":[', b"1,", b"]}"),
        "floats, then broken": padded(b'{"a":[', b"1e9,", b"]}"),
        "escapes, then broken": padded(b'{"a":"', b"\\n", b'"!}'),
        "a lone surrogate at last": padded(b'{"a":"', b"\\ud83d\\ude00", b'\\ud800"}'),
        "keys": padded(b"{", b'"a":1,', b'"a":1}'),
        "a huge integer": padded(b'{"a":', b"9", b"}"),
        "no UTF-8 at last": padded(b'{"a":"', b"a", b'\xff"}'),
        "wrong, and wide": padded(wrong + b"[", b"[],", b"[]]}"),
        "wrong, and escaped": padded(wrong + b'"', b"\\u0041", b'"}'),
        "wrong, and deep lists": deep(b"[", b"]"),
        "wrong, and deep objects": deep(b'{"":', b"}"),
        "wrong, and deep both ways": deep(b'[{"":', b"}]"),
        "wrong, deep and wide": deep(b"[1,", b"]"),
        "wrong, and small": wrong + b"1}",
        "another type, and small": GOOD.replace(b"utterance.v1", b"utterance.v2"),
    }
