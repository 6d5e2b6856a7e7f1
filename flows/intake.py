"""From raw messages to accepted events: the one place where a flow refuses a message."""

from __future__ import annotations

from metering.live import Located
from schemas.dead_letter_headers import letter_from
from schemas.decode import check_append_time, decode_event
from schemas.events import Event, Usage
from schemas.messages import RawMessage
from schemas.rate_card import RateCard
from schemas.records import DeadLetter
from schemas.rejections import Rejected, RejectReason


def accept(message: RawMessage, card: RateCard) -> Event:
    """The event of a message. Raises Rejected for whatever is not valid, and for usage without a rate."""
    event = decode_event(message.value)
    check_append_time(event.time_ms, message.appended_at_ms)
    if isinstance(event, Usage) and card.version_at(event.time_ms) is None:
        raise Rejected(RejectReason.NO_RATE, "usage before the first version of the rate card")
    return event


def accept_batch(
    batch: list[RawMessage], card: RateCard
) -> tuple[list[Located], list[tuple[RawMessage, Rejected]]]:
    """The accepted events of a batch, where they stand, and what was refused; both in the batch's order."""
    accepted: list[Located] = []
    refused: list[tuple[RawMessage, Rejected]] = []
    for message in batch:
        try:
            event = accept(message, card)
        except Rejected as rejected:
            refused.append((message, rejected))
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
