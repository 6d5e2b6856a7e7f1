"""What a network does to messages: repeats them, lets some overtake others, holds some back, breaks some.

Fractions are met exactly (selection sampling), so that a run's report can be checked against what was asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from random import Random
from typing import Any

import msgspec

from app.workload.spec import TransportEffects

MAX_OVERTAKEN = 50
"""A disordered message is overtaken by up to so many others."""
MAX_REPEAT_DELAY = 500
"""A later repeat comes up to so many messages after the first."""
_HELD_TO_THE_END = 1 << 62

Fields = dict[str, Any]


class _Share:
    """Says yes for exactly round(total * fraction) of `total` questions, each equally likely."""

    def __init__(self, total: int, fraction: float, rng: Random) -> None:
        self._left = total
        self._wanted = round(total * fraction)
        self._rng = rng

    def take(self) -> bool:
        taken = self._rng.random() * self._left < self._wanted
        self._left -= 1
        self._wanted -= taken
        return taken


def carry(lines: Iterable[bytes], count: int, effects: TransportEffects, seed: int) -> Iterator[bytes]:
    """The `count` lines as they arrive: each at least once, repeats byte for byte, junk in between.

    At most MAX_REPEAT_DELAY lines wait at a time, besides the late ones.
    """
    rng = Random(f"{seed}/transport")
    duplicated = _Share(count, effects.duplicates, rng)
    # One question for both, so that a message is disordered or late and the fractions stay exact.
    delayed = _Share(count, effects.disorder + effects.late, rng)
    delayed_count = round(count * (effects.disorder + effects.late))
    late = _Share(delayed_count, min(1.0, round(count * effects.late) / max(1, delayed_count)), rng)
    broken = _Share(count, effects.junk, rng)
    waiting: list[tuple[int, int, bytes]] = []
    sequence = 0
    junk_count = 0

    for position, line in enumerate(lines):
        while waiting and waiting[0][0] <= position:
            yield heappop(waiting)[2]
        due = position
        if delayed.take():
            due = _HELD_TO_THE_END if late.take() else position + rng.randint(1, MAX_OVERTAKEN)
        copies = [due]
        if duplicated.take():
            copies.append(due if rng.random() < 0.5 else due + rng.randint(1, MAX_REPEAT_DELAY))
        for copy_due in copies:
            if copy_due == position:
                yield line
            else:
                # The middle number keeps equal ones in order, except at the end, where any order will do.
                sequence += 1
                order = rng.getrandbits(30) if copy_due >= _HELD_TO_THE_END else sequence
                heappush(waiting, (copy_due, order, line))
        if broken.take():
            # A conflict needs an event that has been sent already; a line that waits has not.
            sent = due == position
            yield _break(line, junk_count, sent, rng)
            junk_count += 1
    while waiting:
        yield heappop(waiting)[2]


def _break(line: bytes, number: int, sent: bool, rng: Random) -> bytes:
    """A message that must be refused, made out of a good one; the ways take turns."""
    ways = BREAKAGES if sent else BREAKAGES[:-1]
    return ways[number % len(ways)](line, rng)


def _changed(change: Callable[[Fields], None]) -> Callable[[bytes, Random], bytes]:
    """A way of breaking that edits the fields; the id is new, so that nothing but the edit is wrong."""

    def apply(line: bytes, rng: Random) -> bytes:
        fields: Fields = msgspec.json.decode(line)
        fields["id"] = f"{rng.getrandbits(64):016x}"
        change(fields)
        return msgspec.json.encode(fields)

    return apply


def _conflict(line: bytes, rng: Random) -> bytes:
    """The identity of an event that was sent, with another body."""
    fields: Fields = msgspec.json.decode(line)
    text = str(fields["time"])
    fields["time"] = text[:-2] + ("1Z" if text[-2] == "0" else "0Z")
    return msgspec.json.encode(fields)


def _drop_user(fields: Fields) -> None:
    fields["data"].pop("user_id", None)
    fields["data"].pop("room_id", None)


def _negative_time(fields: Fields) -> None:
    _as_usage(fields)["asr_time_ms"] = -1


def _busy_gpu(fields: Fields) -> None:
    data = _as_usage(fields)
    data["gpu_active_time_ms"] = data["asr_time_ms"] + data["nmt_time_ms"] + data["tts_time_ms"] + 1


def _text_for_number(fields: Fields) -> None:
    _as_usage(fields)["nmt_time_ms"] = "12"


def _as_usage(fields: Fields) -> Fields:
    """Usage data with every number in it, whatever kind of event the line was."""
    fields["type"] = "lingua.usage.utterance.v1"
    data: Fields = fields["data"]
    for name in ("session_id", "user_id", "node_id", "utterance_id"):
        data.setdefault(name, f"{name}-1")
    for name in ("asr_time_ms", "nmt_time_ms", "tts_time_ms", "gpu_active_time_ms"):
        data.setdefault(name, 10)
    return data


BREAKAGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    lambda line, rng: line[: rng.randint(1, len(line) - 1)],
    _changed(lambda fields: fields.update(specversion="0.3")),
    _changed(lambda fields: fields.update(type="lingua.usage.sentence.v9")),
    _changed(_drop_user),
    _changed(_negative_time),
    _changed(_busy_gpu),
    _changed(_text_for_number),
    _changed(lambda fields: fields.update(time="2026-02-30T10:00:00Z")),
    _changed(lambda fields: _as_usage(fields).update(user_id="u 1}")),
    lambda line, rng: b"\xef\xbb\xbf" + line,
    lambda line, rng: b"[" + line + b"]",
    lambda line, rng: line.replace(b'"specversion"', b'"specversio\xff"', 1),
    _conflict,
)
"""Each way once per round; the last one needs a message that has been sent."""
