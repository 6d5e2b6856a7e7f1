"""What a flow lets in: valid, not too far ahead of its append time, and within the rate card."""

from __future__ import annotations

import gc

from flows.intake import accept_batch
from schemas.messages import RawMessage
from schemas.rate_card import RateCard, RateVersion
from schemas.rejections import RejectReason
from tests.support.events import START_MS
from tests.support.junk import GOOD, worst_junk

APPENDED_MS = START_MS + 10_000


def message(offset: int, time: str, kind: str = "lingua.usage.utterance.v1") -> RawMessage:
    usage = (
        '"node_id":"n-1","utterance_id":"ut-1","asr_time_ms":1,"nmt_time_ms":0,"tts_time_ms":0,'
        '"gpu_active_time_ms":0,'
    )
    value = (
        f'{{"specversion":"1.0","id":"{offset}","source":"node/n-1","type":"{kind}","time":"{time}",'
        f'"data":{{{usage}"session_id":"s-1","user_id":"u-1"}}}}'
    )
    return RawMessage("lingua.events", 0, offset, None, value.encode(), APPENDED_MS)


def verdicts(card: RateCard, *messages: RawMessage) -> list[RejectReason | None]:
    """The reason of each message's refusal, None where it was accepted."""
    accepted, refused = accept_batch(list(messages), card)
    reasons: dict[int, RejectReason | None] = {located.message.offset: None for located in accepted}
    reasons |= {raw.offset: rejected.reason for raw, rejected in refused}
    return [reasons[offset] for offset in sorted(reasons)]


def test_five_minutes_ahead_of_the_append_time_is_the_limit() -> None:
    """Just inside, exactly at, just past."""
    found = verdicts(
        RateCard([RateVersion(0)]),
        message(0, "2026-01-01T00:05:09.999Z"),
        message(1, "2026-01-01T00:05:10.000Z"),
        message(2, "2026-01-01T00:05:10.001Z"),
    )
    assert found == [None, None, RejectReason.IN_FUTURE]


def test_usage_before_the_first_rates_has_none_and_lifecycle_needs_none() -> None:
    """The first version is inclusive."""
    found = verdicts(
        RateCard([RateVersion(START_MS)]),
        message(0, "2025-12-31T23:59:59.999Z"),
        message(1, "2026-01-01T00:00:00Z"),
        message(2, "2025-12-31T23:59:59.999Z", "lingua.session.started.v1"),
    )
    assert found == [RejectReason.NO_RATE, None, None]


def test_what_is_refused_does_not_stop_what_follows() -> None:
    """Broken bytes between two events."""
    broken = RawMessage("lingua.events", 0, 1, None, b"\xff", APPENDED_MS)
    found = verdicts(
        RateCard([RateVersion(0)]),
        message(0, "2026-01-01T00:00:00Z"),
        broken,
        message(2, "2026-01-01T00:00:01Z"),
    )
    assert found == [None, RejectReason.NOT_JSON, None]


def test_what_was_refused_does_not_keep_its_batch_alive() -> None:
    """No reference cycle: one broken message in each batch must not leave all batches to the collector."""
    values = (GOOD, *worst_junk(2_048).values())
    batch = [
        RawMessage("lingua.events", 0, offset, None, value, APPENDED_MS)
        for offset, value in enumerate(values)
    ]
    card = RateCard([RateVersion(0)])
    gc.collect()
    gc.disable()
    try:
        accepted, refused = accept_batch(batch, card)
        assert (len(accepted), len(refused)) == (1, len(values) - 1)
        del accepted, refused
        assert gc.collect() == 0
    finally:
        gc.enable()
