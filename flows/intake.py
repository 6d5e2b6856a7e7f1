"""From raw messages to accepted events: the one place where a flow refuses a message."""

from __future__ import annotations

from metering.live import Located
from schemas.dead_letter_headers import letter_from
from schemas.decode import check_append_time, decode_event
from schemas.events import Usage
from schemas.messages import RawMessage
from schemas.rate_card import RateCard
from schemas.records import DeadLetter
from schemas.rejections import Rejected, RejectReason


def accept_batch(
    batch: list[RawMessage], card: RateCard
) -> tuple[list[Located], list[tuple[RawMessage, Rejected]]]:
    """The accepted events of a batch, where they stand, and what was refused; both in the batch's order.

    Refused is whatever is not valid, lies too far ahead of its append time, or is usage before the first rates.
    """
    accepted: list[Located] = []
    refused: list[tuple[RawMessage, Rejected]] = []
    first_rates_ms = card.versions[0].effective_from_ms
    for message in batch:
        try:
            event = decode_event(message.value)
            # Nearly every event is older than its message, and younger than the rate card.
            if event.time_ms > message.appended_at_ms:
                check_append_time(event.time_ms, message.appended_at_ms)
            if event.time_ms < first_rates_ms and isinstance(event, Usage):
                raise Rejected(RejectReason.NO_RATE, "usage before the first version of the rate card")
        except Rejected as rejected:
            # Not the one that was raised: its traceback holds this frame and so the whole batch, in a cycle that
            # lives until the collector happens to come by.
            refused.append((message, Rejected(rejected.reason, rejected.detail)))
        else:
            accepted.append(Located(event, message))
    return accepted, refused


def dead_letter(message: RawMessage, reason: RejectReason, detail: str) -> DeadLetter:
    """The message, as it was, with why it was refused."""
    return DeadLetter(
        topic=message.topic,
        log=message.log,
        partition=message.partition,
        offset=message.offset,
        reason=reason,
        detail=detail,
        key=message.key,
        value=message.value,
        appended_at_ms=message.appended_at_ms,
    )


def letter_of(message: RawMessage) -> DeadLetter:
    """The dead letter that a message on their topic is; one that is none becomes a dead letter itself."""
    try:
        return letter_from(message.headers, message.key, message.value)
    except ValueError as error:
        return dead_letter(message, RejectReason.BAD_HEADERS, str(error)[:200])
