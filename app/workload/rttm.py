"""Real meetings as workload: speaker turns in an RTTM file.

A meeting (the file field) is a room, a speaker a user, a turn an utterance. Everybody joins when the meeting
starts and leaves when it ends, a second after its last turn; then the room closes. RTTM has no processing
times: they are factors of a turn's duration, seeded per node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from heapq import merge
from random import Random

from app.workload.ids import ulid
from app.workload.nodes import Node, Speaker, make_nodes, make_usage
from app.workload.spec import WorkloadError, check_span
from app.workload.synthetic import SCHEDULER
from schemas.cloudevents import ID_CHARACTERS, MAX_DURATION_MS
from schemas.events import Event, Lifecycle, LifecycleKind

GOODBYE_MS = 1_000
"""The meeting ends so long after its last turn."""
OTHER_TYPES = frozenset(
    {
        *("SEGMENT", "NOSCORE", "NO_RT_METADATA", "LEXEME", "NON-LEX", "NON-SPEECH", "FILLER", "EDIT"),
        *("IP", "SU", "CB", "A/P", "SPKR-INFO"),
    }
)
"""What else an RTTM file may hold: nothing that anybody pays for."""
_ID = re.compile(ID_CHARACTERS)
_MIN_FIELDS = 8


@dataclass(frozen=True)
class Turn:
    """Somebody speaks, from so many ms after the meeting's start."""

    meeting: str
    speaker: str
    start_ms: int
    duration_ms: int

    @property
    def end_ms(self) -> int:
        """When the utterance is over and is sent off to be translated."""
        return self.start_ms + self.duration_ms


def read_turns(lines: Iterable[str], name: str) -> list[Turn]:
    """The speaker turns of an RTTM file; comments (`;;`) and lines of other types are passed over.

    Raises WorkloadError with `name` and the number of the first bad line, and when there is no turn at all.
    """
    turns = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields or fields[0].startswith(";;") or fields[0] in OTHER_TYPES:
            continue
        try:
            turns.append(_read_turn(fields))
        except ValueError as problem:
            raise WorkloadError(f"{name}, line {number}: {problem}") from None
    if not turns:
        raise WorkloadError(f"{name} has no speaker turns")
    return turns


def decode_turns(content: bytes, name: str) -> list[Turn]:
    """`read_turns` of a file's content; also raises WorkloadError when it is not UTF-8 text."""
    try:
        return read_turns(content.decode("utf-8").split("\n"), name)
    except UnicodeDecodeError:
        raise WorkloadError(f"{name} is not UTF-8 text") from None


def _read_turn(fields: list[str]) -> Turn:
    if fields[0] != "SPEAKER":
        raise ValueError(f"{fields[0]!r} is no RTTM type")
    if len(fields) < _MIN_FIELDS:
        raise ValueError(f"a SPEAKER line has at least {_MIN_FIELDS} fields, this one has {len(fields)}")
    for what, text in (("meeting", fields[1]), ("speaker", fields[7])):
        if not _ID.fullmatch(text):
            raise ValueError(f"the {what} {text!r} is no valid id (letters, digits and ._:-, at most 128)")
    start_ms = _milliseconds("start", fields[3])
    duration_ms = _milliseconds("duration", fields[4])
    if duration_ms > MAX_DURATION_MS:
        raise ValueError(f"a turn of {fields[4]} s is longer than an hour")
    return Turn(fields[1], fields[7], start_ms, duration_ms)


def _milliseconds(what: str, seconds: str) -> int:
    try:
        value = Decimal(seconds)
    except InvalidOperation:
        raise ValueError(f"the {what} {seconds!r} is no number of seconds") from None
    if not value.is_finite() or not 0 <= value <= 10_000_000:
        raise ValueError(f"the {what} {seconds!r} is no plausible number of seconds")
    return round(value * 1000)


def meeting_lengths_ms(turns: list[Turn]) -> dict[str, int]:
    """Length of each meeting, in the order in which they appear in the file."""
    lengths: dict[str, int] = {}
    for turn in turns:
        lengths[turn.meeting] = max(lengths.get(turn.meeting, 0), turn.end_ms + GOODBYE_MS)
    return lengths


def meeting_starts_ms(
    lengths_ms: dict[str, int], start_ms: int | None, stagger_ms: int, now_ms: int
) -> dict[str, int]:
    """When each meeting starts.

    With a start, the first meeting starts then and each other one `stagger_ms` after the one before it.
    Without one the same plan is laid so that its last event is now; with no stagger either, all meetings
    end now.
    """
    offsets = {meeting: position * stagger_ms for position, meeting in enumerate(lengths_ms)}
    if start_ms is None and stagger_ms == 0:
        return {meeting: now_ms - length_ms for meeting, length_ms in lengths_ms.items()}
    span_ms = max(offset + lengths_ms[meeting] for meeting, offset in offsets.items())
    if start_ms is None:
        start_ms = now_ms - span_ms
    check_span(start_ms, start_ms + span_ms)
    return {meeting: start_ms + offset for meeting, offset in offsets.items()}


def rttm_events(turns: list[Turn], starts_ms: dict[str, int], seed: int, node_count: int) -> Iterator[Event]:
    """All events of the meetings in the order of their times."""
    nodes = make_nodes(node_count, Random(f"{seed}/nodes"))
    turns_by_meeting: dict[str, list[Turn]] = {}
    for turn in turns:
        turns_by_meeting.setdefault(turn.meeting, []).append(turn)
    meetings = [
        _meeting_events(meeting, meeting_turns, starts_ms[meeting], nodes, Random(f"{seed}/{meeting}"))
        for meeting, meeting_turns in turns_by_meeting.items()
    ]
    return merge(*meetings, key=lambda event: event.time_ms)


def event_count(turns: list[Turn]) -> int:
    """How many events the turns make: one each, a joining and a leaving per member, a close per meeting."""
    members = {(turn.meeting, turn.speaker) for turn in turns}
    meetings = {turn.meeting for turn in turns}
    return len(turns) + 2 * len(members) + len(meetings)


def _meeting_events(
    meeting: str, turns: list[Turn], start_ms: int, nodes: list[Node], rng: Random
) -> list[Event]:
    end_ms = start_ms + max(turn.end_ms for turn in turns) + GOODBYE_MS
    members = sorted({turn.speaker for turn in turns})
    speakers = {user_id: _speaker(meeting, user_id, start_ms, rng) for user_id in members}
    node_of = {user_id: rng.choice(nodes) for user_id in members}
    events: list[Event] = [
        _lifecycle(LifecycleKind.JOINED, meeting, user_id, start_ms, rng) for user_id in members
    ]
    events += [
        make_usage(
            speakers[turn.speaker], node_of[turn.speaker], start_ms + turn.end_ms, turn.duration_ms, rng
        )
        for turn in sorted(turns, key=lambda turn: (turn.end_ms, turn.speaker))
    ]
    events += [_lifecycle(LifecycleKind.LEFT, meeting, user_id, end_ms, rng) for user_id in members]
    events.append(_lifecycle(LifecycleKind.CLOSED, meeting, None, end_ms, rng))
    return events


def _speaker(meeting: str, user_id: str, start_ms: int, rng: Random) -> Speaker:
    return Speaker(f"room/{meeting}", f"s-{ulid(start_ms, rng)}", meeting, user_id, "en", "de")


def _lifecycle(
    kind: LifecycleKind, meeting: str, user_id: str | None, time_ms: int, rng: Random
) -> Lifecycle:
    return Lifecycle(
        scope=f"room/{meeting}",
        source=SCHEDULER,
        id=ulid(time_ms, rng),
        time_ms=time_ms,
        kind=kind,
        user_id=user_id,
        session_id=None,
        room_id=meeting,
    )
