"""Why an event is refused: one fixed set of reasons, and the one error that carries them."""

from __future__ import annotations

from enum import StrEnum


class RejectReason(StrEnum):
    """The `reason` of a dead letter. Dashboards, alerts and tests rely on these words."""

    NOT_JSON = "not_json"
    """Not one JSON object: broken syntax, bad UTF-8, a BOM, NaN, a lone surrogate, no value at all."""
    TOO_LARGE = "too_large"
    """More than 64 KiB."""
    UNSUPPORTED_VERSION = "unsupported_version"
    """`specversion` is not "1.0"."""
    UNKNOWN_TYPE = "unknown_type"
    """`type` is not one that this topic carries."""
    MISSING_FIELD = "missing_field"
    """A required field is absent or null."""
    WRONG_TYPE = "wrong_type"
    """A field has another JSON type than its schema says, or is an empty string."""
    BAD_ID = "bad_id"
    """An id has a character or a length that could break a key, or a text such as `source` is too long."""
    OUT_OF_RANGE = "out_of_range"
    """A number is outside its range."""
    GPU_EXCEEDS_STAGES = "gpu_exceeds_stages"
    """`gpu_active_time_ms` is more than the stages' times together: inaccurate timing on the node."""
    BAD_TIME = "bad_time"
    """`time` is not an RFC 3339 instant that exists."""
    IN_FUTURE = "in_future"
    """`time` is more than 5 minutes after the broker's append time."""
    NO_RATE = "no_rate"
    """Usage before the first version of the rate card."""
    IDENTITY_CONFLICT = "identity_conflict"
    """The identity (scope, source, id) was taken by an event with another type, time or data."""
    REQUEST_CONFLICT = "request_conflict"
    """A money command's `request_id` was used before with another body."""
    BAD_HEADERS = "bad_headers"
    """A message on the dead letters' topic that is not one."""


class Rejected(Exception):
    """Raised in one place, `schemas.decode`, for a message that cannot be accepted; never a crash."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
