"""Events as producers write them: CloudEvents 1.0 in structured JSON, one object without line breaks."""

from __future__ import annotations

import msgspec

from schemas import cloudevents
from schemas.events import Event, Lifecycle, LifecycleKind, Usage
from schemas.rfc3339 import format_rfc3339_ms

LIFECYCLE_TYPES = {
    LifecycleKind.JOINED: cloudevents.ROOM_JOINED_TYPE,
    LifecycleKind.LEFT: cloudevents.ROOM_LEFT_TYPE,
    LifecycleKind.CLOSED: cloudevents.ROOM_CLOSED_TYPE,
    LifecycleKind.SESSION_STARTED: cloudevents.SESSION_STARTED_TYPE,
    LifecycleKind.SESSION_ENDED: cloudevents.SESSION_ENDED_TYPE,
}

_encode = msgspec.json.Encoder().encode


def encode_event(event: Event) -> bytes:
    """The message of one event; decoding it gives the event back."""
    type_, data = (
        (cloudevents.USAGE_TYPE, _usage_data(event))
        if isinstance(event, Usage)
        else (LIFECYCLE_TYPES[event.kind], _lifecycle_data(event))
    )
    return _encode(
        {
            "specversion": "1.0",
            "id": event.id,
            "source": event.source,
            "type": type_,
            "subject": event.scope,
            "time": format_rfc3339_ms(event.time_ms),
            "data": data,
        }
    )


def _usage_data(event: Usage) -> dict[str, str | int]:
    fields = {
        "session_id": event.session_id,
        "room_id": event.room_id,
        "user_id": event.user_id,
        "node_id": event.node_id,
        "utterance_id": event.utterance_id,
        "audio_ms": event.audio_ms,
        "asr_time_ms": event.asr_time_ms,
        "nmt_time_ms": event.nmt_time_ms,
        "tts_time_ms": event.tts_time_ms,
        "gpu_active_time_ms": event.gpu_active_time_ms,
        "source_lang": event.source_lang,
        "target_lang": event.target_lang,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _lifecycle_data(event: Lifecycle) -> dict[str, str]:
    fields = {"session_id": event.session_id, "room_id": event.room_id, "user_id": event.user_id}
    return {name: value for name, value in fields.items() if value is not None}
