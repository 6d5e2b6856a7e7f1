"""From the bytes of a message to an accepted event or command, or to one typed refusal.

The law is the reference decoder: `schemas.strict_json` says what JSON is, the pydantic models in
`schemas.cloudevents` and `schemas.commands` say what an event is. The fast decoder (msgspec) may only accept,
and only what the reference accepts, with an equal value; whatever it is not sure of goes to the reference.

A message that is wrong in several ways has the reason that comes first in this order: not_json (no value),
too_large, not_json, then `specversion`, `type`, `source`, `id`, `time`, `data`, then the fields of `data` in
the order of their model, and last gpu_exceeds_stages. `in_future` needs the broker's clock: it is checked
after all of these.

Which reason: an absent or null required field is missing_field; another JSON type, or an empty text, is
wrong_type; a text that is too long or has a wrong character is bad_id; a number outside its range is
out_of_range.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from schemas.cloudevents import (
    EVENT_MODELS,
    ID_CHARACTERS,
    MAX_DURATION_MS,
    ROOM_CLOSED_TYPE,
    ROOM_JOINED_TYPE,
    ROOM_LEFT_TYPE,
    SESSION_ENDED_TYPE,
    SESSION_STARTED_TYPE,
    CloudEvent,
    MemberData,
    SessionData,
    UsageEvent,
    WireEvent,
)
from schemas.commands import (
    ADJUSTED_TYPE,
    COMMAND_MODELS,
    GRANTED_TYPE,
    TOPPED_UP_TYPE,
    WRITTEN_OFF_TYPE,
    Command,
    CommandKind,
    Granted,
    GrantTerms,
    ToppedUp,
    WireCommand,
    WrittenOff,
)
from schemas.events import Event, Lifecycle, LifecycleKind, Usage
from schemas.rejections import Rejected, RejectReason
from schemas.rfc3339 import parse_rfc3339_ms
from schemas.strict_json import MAX_INTEGER_DIGITS, SPACE, Json, NotJson, parse
from schemas.topics import MAX_MESSAGE_BYTES

__all__ = [
    "FUTURE_TOLERANCE_MS",
    "check_append_time",
    "decode_command",
    "decode_event",
    "fast_decode_event",
    "parse_rfc3339_ms",
    "reference_decode_event",
]

FUTURE_TOLERANCE_MS = 300_000
"""How far an event's time may be ahead of the broker's append time."""

_DETAIL_VALUE_CHARACTERS = 60

_Model = TypeVar("_Model", bound=CloudEvent)

_LIFECYCLE_KINDS = {
    ROOM_JOINED_TYPE: LifecycleKind.JOINED,
    ROOM_LEFT_TYPE: LifecycleKind.LEFT,
    ROOM_CLOSED_TYPE: LifecycleKind.CLOSED,
    SESSION_STARTED_TYPE: LifecycleKind.SESSION_STARTED,
    SESSION_ENDED_TYPE: LifecycleKind.SESSION_ENDED,
}

_COMMAND_KINDS = {
    TOPPED_UP_TYPE: CommandKind.TOP_UP,
    ADJUSTED_TYPE: CommandKind.ADJUSTMENT,
    WRITTEN_OFF_TYPE: CommandKind.WRITE_OFF,
    GRANTED_TYPE: CommandKind.GRANT,
}


def decode_event(value: bytes | None) -> Event:
    """The event that these bytes are (`value` of a Kafka message, or a line of a file). Raises Rejected."""
    if value is not None:
        event = fast_decode_event(value)
        if event is not None:
            return event
    return reference_decode_event(value)


def reference_decode_event(value: bytes | None) -> Event:
    """The same as `decode_event` by the definition itself, some twenty times slower. Raises Rejected."""
    model = _validate(_parse_object(value), EVENT_MODELS)
    return _usage(model) if isinstance(model, UsageEvent) else _lifecycle(model)


def decode_command(value: bytes | None) -> Command:
    """The money command that these bytes are. Raises Rejected."""
    model = _validate(_parse_object(value), COMMAND_MODELS)
    return Command(
        kind=_COMMAND_KINDS[model.type],
        account=model.data.account,
        amount_us=model.data.amount_us,
        request_id=model.data.request_id,
        reason=model.data.reason,
        actor=model.data.actor,
        node_account=_paying_node(model),
        source=model.source,
        id=model.id,
        time_ms=parse_rfc3339_ms(model.time),
        grant=_grant_terms(model),
    )


def _grant_terms(model: WireCommand) -> GrantTerms | None:
    if not isinstance(model, Granted):
        return None
    data = model.data
    from_ms, expires_ms = parse_rfc3339_ms(data.effective_from), parse_rfc3339_ms(data.expires_at)
    if expires_ms <= from_ms:
        raise Rejected(
            RejectReason.OUT_OF_RANGE, f"data.expires_at: {data.expires_at} is not after effective_from"
        )
    return GrantTerms(data.priority, from_ms, expires_ms)


def _paying_node(model: WireCommand) -> str | None:
    if isinstance(model, WrittenOff):
        return model.data.node_account
    return model.data.paid_by if isinstance(model, ToppedUp) else None


def check_append_time(time_ms: int, appended_at_ms: int) -> None:
    """Refuse (Rejected, in_future) a time more than 5 minutes after the broker's append time, both in ms."""
    if time_ms > appended_at_ms + FUTURE_TOLERANCE_MS:
        ahead_ms = time_ms - appended_at_ms
        raise Rejected(
            RejectReason.IN_FUTURE,
            f"time: is {ahead_ms} ms after the append time, {FUTURE_TOLERANCE_MS} allowed",
        )


# The reference decoder.


def _parse_object(value: bytes | None) -> dict[str, Json]:
    if value is None:
        raise Rejected(RejectReason.NOT_JSON, "the message has no value")
    if len(value) > MAX_MESSAGE_BYTES:
        raise Rejected(RejectReason.TOO_LARGE, f"{len(value)} bytes, {MAX_MESSAGE_BYTES} allowed")
    # What lacks the braces of an object is refused without a look at what is between.
    text = value.strip(SPACE.encode())
    if not text.startswith(b"{"):
        raise Rejected(RejectReason.NOT_JSON, f"begins with {_shown(_text(text[:8]))}, an object with '{{'")
    if not text.endswith(b"}"):
        raise Rejected(RejectReason.NOT_JSON, f"ends with {_shown(_text(text[-8:]))}, an object with '}}'")
    try:
        document = parse(value)
    except NotJson as error:
        raise Rejected(RejectReason.NOT_JSON, str(error)) from None
    assert isinstance(document, dict), "what begins with a brace is an object"
    return document


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _validate(document: dict[str, Json], models: Mapping[str, type[_Model]]) -> _Model:
    """The document as the model of its `type`. The envelope's head is checked first: it names the model."""
    type_name = document.get("type")
    model = models.get(type_name) if isinstance(type_name, str) else None
    try:
        if model is not None:
            return model.model_validate(document)
        CloudEvent.model_validate(document)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        if model is not None or details["loc"] in (("specversion",), ("type",)):
            raise _rejected(details) from None
    raise Rejected(RejectReason.UNKNOWN_TYPE, f"type: {_shown(type_name)} is not one that this topic carries")


_REASONS = {
    "missing": RejectReason.MISSING_FIELD,
    "string_too_long": RejectReason.BAD_ID,
    "string_pattern_mismatch": RejectReason.BAD_ID,
    "greater_than": RejectReason.OUT_OF_RANGE,
    "greater_than_equal": RejectReason.OUT_OF_RANGE,
    "less_than_equal": RejectReason.OUT_OF_RANGE,
    "zero_amount": RejectReason.OUT_OF_RANGE,
    "bad_time": RejectReason.BAD_TIME,
    "gpu_exceeds_stages": RejectReason.GPU_EXCEEDS_STAGES,
}
"""By pydantic's kind of error; what is not here (string_type, int_type, string_too_short) is wrong_type."""


def _rejected(error: ErrorDetails) -> Rejected:
    field = ".".join(str(part) for part in error["loc"])
    value = error["input"]
    if error["type"] == "missing" or value is None:
        return Rejected(RejectReason.MISSING_FIELD, f"{field}: is missing")
    if error["type"] == "literal_error" and isinstance(value, str) and value:
        return Rejected(RejectReason.UNSUPPORTED_VERSION, f'{field}: must be "1.0", not {_shown(value)}')
    reason = _REASONS.get(error["type"], RejectReason.WRONG_TYPE)
    if reason is RejectReason.BAD_TIME:
        return Rejected(reason, f"{field}: {_shown(value)} {error['msg']}")
    if reason is RejectReason.GPU_EXCEEDS_STAGES:
        return Rejected(reason, f"{field}: {error['msg']}")
    expected = "must be an object" if error["type"] == "model_type" else error["msg"]
    expected = re.sub(r"^\w+ should ", "must ", expected)
    return Rejected(reason, f"{field}: {expected}, not {_shown(value)}")


def _shown(value: object) -> str:
    """A bounded look at a value from outside: never a deep one, never a long one."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10 ** (MAX_INTEGER_DIGITS - 1):
        return f"an integer of {MAX_INTEGER_DIGITS} digits or more"
    text = repr(value[: _DETAIL_VALUE_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _DETAIL_VALUE_CHARACTERS else text[:_DETAIL_VALUE_CHARACTERS] + "..."


def _usage(model: UsageEvent) -> Usage:
    data = model.data
    return Usage(
        scope=f"session/{data.session_id}" if data.room_id is None else f"room/{data.room_id}",
        source=model.source,
        id=model.id,
        time_ms=parse_rfc3339_ms(model.time),
        **data.model_dump(),
    )


def _lifecycle(model: WireEvent) -> Lifecycle:
    data = model.data
    session_id = data.session_id if isinstance(data, SessionData) else None
    return Lifecycle(
        scope=f"session/{session_id}" if data.room_id is None else f"room/{data.room_id}",
        source=model.source,
        id=model.id,
        time_ms=parse_rfc3339_ms(model.time),
        kind=_LIFECYCLE_KINDS[model.type],
        user_id=data.user_id if isinstance(data, (SessionData, MemberData)) else None,
        session_id=session_id,
        room_id=data.room_id,
    )


# The fast decoder. msgspec is as strict about JSON as the reference but for two things, so: bytes that are
# not ASCII must be UTF-8 as a whole (msgspec does not look into fields that it skips); and a number with a
# fraction or an exponent, which msgspec would take for an integer, must not pass: durations are declared
# `int | float`, and a sum tells. Escaped surrogates are left to the reference, out of caution.

_Duration = (
    Annotated[int, msgspec.Meta(ge=0, le=MAX_DURATION_MS)]
    | Annotated[float, msgspec.Meta(ge=0, le=MAX_DURATION_MS)]
)
_Name256 = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _UsageData(msgspec.Struct, gc=False):
    session_id: str
    user_id: str
    node_id: str
    utterance_id: str
    asr_time_ms: _Duration
    nmt_time_ms: _Duration
    tts_time_ms: _Duration
    gpu_active_time_ms: _Duration
    room_id: str | None = None
    audio_ms: _Duration | None = None
    source_lang: _Text | None = None
    target_lang: _Text | None = None


class _UsageEnvelope(msgspec.Struct, gc=False):
    specversion: Literal["1.0"]
    type: Literal["lingua.usage.utterance.v1"]
    source: _Name256
    id: _Name256
    time: str
    data: _UsageData


class _LifecycleData(msgspec.Struct, gc=False):
    session_id: str | None = None
    room_id: str | None = None
    user_id: str | None = None


class _LifecycleEnvelope(msgspec.Struct, gc=False):
    specversion: Literal["1.0"]
    type: str
    source: _Name256
    id: _Name256
    time: str
    data: _LifecycleData


_decode_usage: Callable[[bytes], _UsageEnvelope] = msgspec.json.Decoder(_UsageEnvelope).decode
_decode_lifecycle: Callable[[bytes], _LifecycleEnvelope] = msgspec.json.Decoder(_LifecycleEnvelope).decode

_four_ids = re.compile(f"{ID_CHARACTERS}(?:\n{ID_CHARACTERS}){{3}}").fullmatch
_five_ids = re.compile(f"{ID_CHARACTERS}(?:\n{ID_CHARACTERS}){{4}}").fullmatch
_some_ids = re.compile(f"{ID_CHARACTERS}(?:\n{ID_CHARACTERS})*").fullmatch

_UNSURE = (msgspec.MsgspecError, ValueError, RecursionError, KeyError)


def fast_decode_event(value: bytes) -> Event | None:
    """The event, if the fast path is sure of it; None leaves the question to the reference."""
    if len(value) > MAX_MESSAGE_BYTES or (b"\\" in value and b"\\ud" in value.lower()):
        return None
    try:
        if not value.isascii():
            value.decode("utf-8")
        if b'"lingua.usage.utterance.v1"' in value:
            return _fast_usage(_decode_usage(value))
        return _fast_lifecycle(_decode_lifecycle(value))
    except _UNSURE:
        return None


def _fast_usage(envelope: _UsageEnvelope) -> Usage | None:
    data = envelope.data
    room_id = data.room_id
    if room_id is None:
        scope = f"session/{data.session_id}"
        ids_match = _four_ids(f"{data.session_id}\n{data.user_id}\n{data.node_id}\n{data.utterance_id}")
    else:
        scope = f"room/{room_id}"
        ids_match = _five_ids(
            f"{data.session_id}\n{room_id}\n{data.user_id}\n{data.node_id}\n{data.utterance_id}"
        )
    audio_ms = data.audio_ms
    stages_ms = data.asr_time_ms + data.nmt_time_ms + data.tts_time_ms
    gpu_ms = data.gpu_active_time_ms
    if (
        ids_match is None
        or type(stages_ms + gpu_ms) is not int
        or gpu_ms > stages_ms
        or (audio_ms is not None and type(audio_ms) is not int)
    ):
        return None
    return Usage(
        scope,
        envelope.source,
        envelope.id,
        _fast_time_ms(envelope.time),
        data.session_id,
        room_id,
        data.user_id,
        data.node_id,
        data.utterance_id,
        audio_ms,
        data.asr_time_ms,  # type: ignore[arg-type]  # The sum is an int only if each of them is one.
        data.nmt_time_ms,  # type: ignore[arg-type]
        data.tts_time_ms,  # type: ignore[arg-type]
        gpu_ms,  # type: ignore[arg-type]
        data.source_lang,
        data.target_lang,
    )


def _fast_lifecycle(envelope: _LifecycleEnvelope) -> Lifecycle | None:
    kind = _LIFECYCLE_KINDS[envelope.type]
    session_id, room_id, user_id = envelope.data.session_id, envelope.data.room_id, envelope.data.user_id
    if kind is LifecycleKind.SESSION_STARTED or kind is LifecycleKind.SESSION_ENDED:
        if session_id is None or user_id is None:
            return None
        scope = f"session/{session_id}" if room_id is None else f"room/{room_id}"
        ids = f"{session_id}\n{user_id}" if room_id is None else f"{session_id}\n{user_id}\n{room_id}"
    else:
        session_id = None  # In a room event it is an unknown extra field, and so is a closed room's user.
        if kind is LifecycleKind.CLOSED:
            user_id = None
        elif user_id is None:
            return None
        if room_id is None:
            return None
        scope = f"room/{room_id}"
        ids = room_id if user_id is None else f"{room_id}\n{user_id}"
    if _some_ids(ids) is None:
        return None
    time_ms = _fast_time_ms(envelope.time)
    return Lifecycle(scope, envelope.source, envelope.id, time_ms, kind, user_id, session_id, room_id)


_MAX_KNOWN_SECONDS = 65_536
_known_seconds: dict[str, int] = {}
"""`YYYY-MM-DDTHH:MM:SS` -> ms. Neighbouring events share seconds; cleared when full, so it stays bounded."""

_FRACTIONS = {"Z": 0} | {f".{ms:03}Z": ms for ms in range(1000)}


def _fast_time_ms(text: str) -> int:
    """`parse_rfc3339_ms` by two look-ups for the usual form, UTC to the ms. Raises ValueError like it."""
    second_ms = _known_seconds.get(text[:19])
    fraction_ms = _FRACTIONS.get(text[19:])
    if fraction_ms is None:
        return parse_rfc3339_ms(text)
    if second_ms is None:
        second_ms = parse_rfc3339_ms(text[:19] + "Z")
        if len(_known_seconds) >= _MAX_KNOWN_SECONDS:
            _known_seconds.clear()
        _known_seconds[text[:19]] = second_ms
    return second_ms + fraction_ms
