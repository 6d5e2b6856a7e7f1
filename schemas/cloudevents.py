"""Every event of `lingua.events` on the wire: CloudEvents 1.0 in structured JSON mode.

These models are the definition: `schemas.decode` accepts what they accept, and the exported JSON Schema and
AsyncAPI documents are made from them. The order of the fields is the order in which they are checked.
Unknown extra fields are ignored, `null` in an optional field equals absence, and no text is empty.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from schemas.rfc3339 import INSTANT_PATTERN, parse_rfc3339_ms

USAGE_TYPE = "lingua.usage.utterance.v1"
SESSION_STARTED_TYPE = "lingua.session.started.v1"
SESSION_ENDED_TYPE = "lingua.session.ended.v1"
ROOM_JOINED_TYPE = "lingua.room.joined.v1"
ROOM_LEFT_TYPE = "lingua.room.left.v1"
ROOM_CLOSED_TYPE = "lingua.room.closed.v1"

MAX_DURATION_MS = 3_600_000
"""One hour: no single utterance is longer, and none is processed for longer."""

ID_CHARACTERS = "[A-Za-z0-9._:-]{1,128}"
"""What an id is made of: nothing that could break a Redis key, a scope, or a cell id."""


def _existing_instant(text: str) -> str:
    try:
        parse_rfc3339_ms(text)
    except ValueError as error:
        raise PydanticCustomError("bad_time", "{problem}", {"problem": str(error)}) from None
    return text


Id = Annotated[str, Field(min_length=1, max_length=128, pattern=f"^{ID_CHARACTERS}$")]
Name256 = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(min_length=1)]
Instant = Annotated[
    str,
    Field(min_length=1, json_schema_extra={"format": "date-time", "pattern": f"^{INSTANT_PATTERN}$"}),
    AfterValidator(_existing_instant),
]
DurationMs = Annotated[int, Field(strict=True, ge=0, le=MAX_DURATION_MS)]


class Wire(BaseModel):
    """What all wire models share: frozen, and tolerant of fields that a later producer may add."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CloudEvent(Wire):
    """The envelope. `subject` and all other attributes are ignored."""

    specversion: Literal["1.0"]
    type: Text
    source: Name256 = Field(description="who says so; with `id` and the scope it is the event's identity")
    id: Name256 = Field(description="unique per source and scope; a retry sends the same bytes")
    time: Instant = Field(
        description="RFC 3339, YYYY-MM-DDTHH:MM:SS[.digits](Z|+HH:MM|-HH:MM), truncated to the millisecond; "
        "not more than 5 minutes after the broker's append time"
    )


class UsageData(Wire):
    """One utterance's processing. Durations are milliseconds; `gpu_active_time_ms` is at most the sum of the
    three stages."""

    session_id: Id
    room_id: Id | None = Field(default=None, description="the room, if the session runs in one")
    user_id: Id
    node_id: Id = Field(description="the node that earns the credit, whatever `source` says")
    utterance_id: Id
    audio_ms: DurationMs | None = Field(default=None, description="ms of speech")
    asr_time_ms: DurationMs = Field(description="ms of speech recognition")
    nmt_time_ms: DurationMs = Field(description="ms of translation")
    tts_time_ms: DurationMs = Field(description="ms of speech synthesis")
    gpu_active_time_ms: DurationMs = Field(
        description="ms of active GPU, at most asr_time_ms + nmt_time_ms + tts_time_ms"
    )
    source_lang: Text | None = None
    target_lang: Text | None = None

    @model_validator(mode="after")
    def _gpu_within_stages(self) -> Self:
        stages_ms = self.asr_time_ms + self.nmt_time_ms + self.tts_time_ms
        if self.gpu_active_time_ms > stages_ms:
            raise PydanticCustomError(
                "gpu_exceeds_stages",
                "gpu_active_time_ms {gpu_ms} is more than the {stages_ms} of the three stages",
                {"gpu_ms": self.gpu_active_time_ms, "stages_ms": stages_ms},
            )
        return self


class SessionData(Wire):
    """Which session began or ended."""

    session_id: Id
    user_id: Id
    room_id: Id | None = Field(default=None, description="the room, if the session runs in one")


class MemberData(Wire):
    """Who joined or left which room."""

    room_id: Id
    user_id: Id


class RoomData(Wire):
    """Which room was closed."""

    room_id: Id


class UsageEvent(CloudEvent):
    """A compute node processed one utterance."""

    type: Literal["lingua.usage.utterance.v1"]
    data: UsageData


class SessionStarted(CloudEvent):
    """A session began."""

    type: Literal["lingua.session.started.v1"]
    data: SessionData


class SessionEnded(CloudEvent):
    """A session ended."""

    type: Literal["lingua.session.ended.v1"]
    data: SessionData


class RoomJoined(CloudEvent):
    """A user came into a room, or is still there (which renews the presence)."""

    type: Literal["lingua.room.joined.v1"]
    data: MemberData


class RoomLeft(CloudEvent):
    """A user left a room."""

    type: Literal["lingua.room.left.v1"]
    data: MemberData


class RoomClosed(CloudEvent):
    """A room was closed; everybody's presence in it ends."""

    type: Literal["lingua.room.closed.v1"]
    data: RoomData


WireEvent = UsageEvent | SessionStarted | SessionEnded | RoomJoined | RoomLeft | RoomClosed

EVENT_MODELS: dict[str, type[WireEvent]] = {
    USAGE_TYPE: UsageEvent,
    SESSION_STARTED_TYPE: SessionStarted,
    SESSION_ENDED_TYPE: SessionEnded,
    ROOM_JOINED_TYPE: RoomJoined,
    ROOM_LEFT_TYPE: RoomLeft,
    ROOM_CLOSED_TYPE: RoomClosed,
}
"""The model of each `type` that `lingua.events` carries."""
