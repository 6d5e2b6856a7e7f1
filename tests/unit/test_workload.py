"""The workload generator: exact counts, valid events, and the same bytes for the same seed."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest

from app.workload import TransportEffects, WorkloadError, WorkloadSpec, generate, generate_from_rttm
from app.workload.ids import ulid
from app.workload.nodes import make_nodes, stage_times
from app.workload.rttm import (
    decode_turns,
    event_count,
    meeting_lengths_ms,
    meeting_starts_ms,
    read_turns,
    rttm_events,
)
from app.workload.synthetic import synthetic_events
from app.workload.transport import BREAKAGES, carry
from app.workload.wire import encode_event
from metering.settle import settle_lines
from schemas.decode import decode_event
from schemas.events import Event, Lifecycle, LifecycleKind, Usage
from schemas.rate_card import load_rate_card
from schemas.rejections import RejectReason

START_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z


def _spec(events: int = 2_000, seed: int = 7, **others: object) -> WorkloadSpec:
    return WorkloadSpec(seed=seed, start_ms=START_MS, events=events, **others)  # type: ignore[arg-type]


def _identities(events: list[Event]) -> set[tuple[str, str, str]]:
    return {(event.scope, event.source, event.id) for event in events}


@pytest.mark.parametrize("events", [2, 3, 99, 100, 101, 1_000, 7_777])
def test_the_number_of_events_is_met_exactly(events: int) -> None:
    """`events` counts distinct valid events, usage and lifecycle together, whatever it is."""
    for seed in range(3):
        made = list(synthetic_events(_spec(events, seed)))
        assert len(made) == events
        assert len(_identities(made)) == events


def test_events_come_in_the_order_of_their_times_and_inside_the_span() -> None:
    """Times never go back, start at the start, and stop before the end."""
    times = [event.time_ms for event in synthetic_events(_spec(minutes=3))]
    assert times == sorted(times)
    assert times[0] >= START_MS
    assert times[-1] < START_MS + 3 * 60_000


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    """A workload is a function of its specification."""
    effects = TransportEffects(duplicates=0.1, disorder=0.1, late=0.02, junk=0.02)
    first = list(generate(_spec(transport=effects)))
    assert first == list(generate(_spec(transport=effects)))
    assert first != list(generate(_spec(seed=8, transport=effects)))


def test_bytes_do_not_depend_on_the_machine_or_the_version_of_python() -> None:
    """Seed 7 is these bytes everywhere, so that published figures can be repeated."""
    digest = hashlib.sha256(b"\n".join(generate(_spec(transport=TransportEffects(0.1, 0.1, 0.02, 0.02)))))
    assert digest.hexdigest() == "958840d0ed32435e7a02cca87e37c5b16d16a3857eae77dc3b786262dfbdd329"


def test_every_message_decodes_to_the_event_that_it_was_made_from() -> None:
    """The wire form loses nothing and is accepted by the decoder."""
    for event in synthetic_events(_spec()):
        assert decode_event(encode_event(event)) == event


def test_all_lines_are_accepted_by_settle() -> None:
    """Without junk nothing is refused, and the bill sums to zero."""
    settled, rejects = settle_lines(generate(_spec()), load_rate_card(None))
    assert rejects == []
    assert settled
    assert sum(line.amount_us for line in settled) == 0


def test_transport_effects_do_not_change_the_bill() -> None:
    """Repeats, disorder and delay settle to the same lines, and junk is all that is refused."""
    card = load_rate_card(None)
    clean, _ = settle_lines(generate(_spec()), card)
    effects = TransportEffects(duplicates=0.2, disorder=0.3, late=0.05, junk=0.05)
    dirty, rejects = settle_lines(generate(_spec(transport=effects)), card)
    assert dirty == clean
    assert len(rejects) == 100


def test_rooms_show_every_kind_of_coming_and_going() -> None:
    """There are joins, leaves, returns, members who vanish, open and closed rooms, and sessions cut off."""
    events = list(synthetic_events(_spec(events=20_000)))
    lifecycle = [event for event in events if isinstance(event, Lifecycle)]
    kinds = Counter(event.kind for event in lifecycle)
    assert all(kinds[kind] > 0 for kind in LifecycleKind)
    assert kinds[LifecycleKind.LEFT] < kinds[LifecycleKind.JOINED]
    assert kinds[LifecycleKind.SESSION_ENDED] < kinds[LifecycleKind.SESSION_STARTED]
    joins = Counter(
        (event.room_id, event.user_id) for event in lifecycle if event.kind is LifecycleKind.JOINED
    )
    assert max(joins.values()) > 1
    rooms = {event.room_id for event in lifecycle if event.room_id}
    assert 0 < kinds[LifecycleKind.CLOSED] < len(rooms)
    speakers = {(event.room_id, event.user_id) for event in events if isinstance(event, Usage)}
    assert set(joins) - speakers, "nobody only listens"


def test_asked_for_numbers_of_scopes_users_and_nodes_are_met() -> None:
    """--sessions, --rooms, --users and --nodes mean what they say."""
    events = list(synthetic_events(_spec(events=3_000, sessions=11, rooms=4, users=9, nodes=2)))
    scopes = {event.scope for event in events}
    assert sum(scope.startswith("session/") for scope in scopes) == 11
    assert sum(scope.startswith("room/") for scope in scopes) == 4
    assert len({event.user_id for event in events if event.user_id}) <= 9
    assert len({event.node_id for event in events if isinstance(event, Usage)}) == 2


def test_too_few_events_for_the_scopes_is_one_clear_error() -> None:
    """More comings and goings than events is refused before the first message."""
    with pytest.raises(WorkloadError, match="10 events do not hold 50 sessions and 0 rooms"):
        generate(_spec(events=10, sessions=50, rooms=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"minutes": 0}, "minutes must be at least 1"),
        ({"rooms": -1}, "rooms cannot be negative"),
        ({"sessions": 0, "rooms": 0}, "at least one session or one room"),
        ({"minutes": 10**10}, "between 1970 and the end of 9999"),
    ],
)
def test_impossible_specifications_are_refused(wrong: dict[str, int], message: str) -> None:
    """A specification that cannot be met raises WorkloadError with what is wrong."""
    with pytest.raises(WorkloadError, match=message):
        _spec(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"duplicates": 1.1}, {"junk": -0.1}, {"disorder": 0.6, "late": 0.6}])
def test_impossible_fractions_are_refused(wrong: dict[str, float]) -> None:
    """A fraction outside 0..1 raises WorkloadError."""
    with pytest.raises(WorkloadError):
        TransportEffects(**wrong)


def _numbered(count: int) -> list[bytes]:
    return [b"%06d" % number for number in range(count)]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.5, 1.0])
def test_duplicates_are_exact_and_the_same_bytes(fraction: float) -> None:
    """Exactly that share arrives twice, none three times, none is lost."""
    arrived = Counter(carry(_numbered(1_000), 1_000, TransportEffects(duplicates=fraction), seed=1))
    assert set(arrived) == set(_numbered(1_000))
    assert Counter(arrived.values()).get(2, 0) == round(1_000 * fraction)
    assert max(arrived.values()) <= 2


def test_disorder_is_bounded_and_late_messages_come_last() -> None:
    """A disordered message moves by at most 50; late ones come after all others."""
    lines = _numbered(1_000)
    disordered = list(carry(lines, 1_000, TransportEffects(disorder=0.2), seed=1))
    assert sorted(disordered) == lines
    assert disordered != lines
    assert max(arrival - int(line) for arrival, line in enumerate(disordered)) <= 50
    with_late = list(carry(lines, 1_000, TransportEffects(late=0.1), seed=1))
    assert with_late[:900] == sorted(with_late[:900])
    assert sorted(with_late) == lines


def test_every_way_of_breaking_is_refused_and_all_reasons_occur() -> None:
    """Junk is refused line by line, for many different reasons, and never as valid usage."""
    spec = _spec(events=500, transport=TransportEffects(junk=0.2))
    _, rejects = settle_lines(generate(spec), load_rate_card(None))
    assert len(rejects) == 100
    assert {reject.reason for reject in rejects} == {
        RejectReason.NOT_JSON,
        RejectReason.UNSUPPORTED_VERSION,
        RejectReason.UNKNOWN_TYPE,
        RejectReason.MISSING_FIELD,
        RejectReason.OUT_OF_RANGE,
        RejectReason.GPU_EXCEEDS_STAGES,
        RejectReason.WRONG_TYPE,
        RejectReason.BAD_TIME,
        RejectReason.BAD_ID,
        RejectReason.IDENTITY_CONFLICT,
    }
    assert len(BREAKAGES) == 13


def test_no_message_holds_a_line_break() -> None:
    """One line is one message, broken ones included."""
    spec = _spec(events=500, transport=TransportEffects(junk=1.0))
    assert not any(b"\n" in line or not line.strip() for line in generate(spec))


def test_processing_times_are_plausible() -> None:
    """Stages take a share of the audio's duration, the GPU is never busy for longer than they take."""
    rng = random.Random(3)
    nodes = make_nodes(20, rng)
    for audio_ms in (0, 1, 300, 3_000, 30_000, 3_600_000):
        for node in nodes:
            times = stage_times(node, audio_ms, rng)
            assert 0 <= times.gpu_ms <= times.asr_ms + times.nmt_ms + times.tts_ms
            assert max(times.asr_ms, times.nmt_ms, times.tts_ms) <= 3_600_000
    assert len({node.asr_factor for node in nodes}) == 20


def test_ulids_sort_by_time() -> None:
    """An id begins with its time, as a ULID does: 26 characters, the first ten of them the milliseconds."""
    rng = random.Random(1)
    assert ulid(0, rng)[:10] == "0000000000"
    assert ulid(1, rng)[:10] == "0000000001"
    assert ulid(32, rng)[:10] == "0000000010"
    assert len(ulid(START_MS, rng)) == 26


RTTM = b"""\
;; two meetings
SPKR-INFO m1 1 <NA> <NA> <NA> unknown anna <NA> <NA>
SPEAKER m1 1 0.50 2.00 <NA> <NA> anna <NA> <NA>
SPEAKER m1 1 2.00 1.25 <NA> <NA> ben <NA> <NA>

SPEAKER m2 1 10.0 0.333 <NA> <NA> anna <NA> <NA>
"""


def _meeting_events(start_ms: int | None = START_MS, stagger_ms: int = 0) -> list[Event]:
    turns = decode_turns(RTTM, "x.rttm")
    starts_ms = meeting_starts_ms(meeting_lengths_ms(turns), start_ms, stagger_ms, START_MS)
    return list(rttm_events(turns, starts_ms, seed=1, node_count=2))


def test_a_meeting_is_a_room_a_speaker_a_user_a_turn_an_utterance() -> None:
    """Everybody joins at the start, a turn's event comes at its end, all leave a second after the last."""
    events = [event for event in _meeting_events() if event.scope == "room/m1"]
    told = [
        (event.time_ms - START_MS, "usage" if isinstance(event, Usage) else event.kind.name, event.user_id)
        for event in events
    ]
    assert told == [
        (0, "JOINED", "anna"),
        (0, "JOINED", "ben"),
        (2_500, "usage", "anna"),
        (3_250, "usage", "ben"),
        (4_250, "LEFT", "anna"),
        (4_250, "LEFT", "ben"),
        (4_250, "CLOSED", None),
    ]
    assert [event.audio_ms for event in events if isinstance(event, Usage)] == [2_000, 1_250]


def test_meetings_can_start_together_or_one_after_another_or_end_now() -> None:
    """With a start they begin there, staggered if asked; without one the last of them ends now."""
    lengths_ms = {"m1": 4_250, "m2": 11_333}
    assert meeting_starts_ms(lengths_ms, START_MS, 0, 0) == {"m1": START_MS, "m2": START_MS}
    assert meeting_starts_ms(lengths_ms, START_MS, 60_000, 0) == {"m1": START_MS, "m2": START_MS + 60_000}
    assert meeting_starts_ms(lengths_ms, None, 0, START_MS) == {
        "m1": START_MS - 4_250,
        "m2": START_MS - 11_333,
    }
    assert meeting_starts_ms(lengths_ms, None, 60_000, START_MS) == {
        "m1": START_MS - 71_333,
        "m2": START_MS - 11_333,
    }


def test_rttm_counts_and_settles() -> None:
    """The announced number of events is made, all are accepted, and both members of m1 share its cost."""
    turns = decode_turns(RTTM, "x.rttm")
    starts_ms = meeting_starts_ms(meeting_lengths_ms(turns), START_MS, 0, 0)
    lines = list(
        generate_from_rttm(turns, starts_ms, seed=1, node_count=2, transport=TransportEffects(duplicates=1.0))
    )
    assert event_count(turns) == 11
    assert len(set(lines)) == 11
    assert len(lines) == 22
    settled, rejects = settle_lines(lines, load_rate_card(None))
    assert rejects == []
    shares = {
        line.account: line.amount_us
        for line in settled
        if line.cell_id.startswith("room/m1@") and line.account.startswith("user/")
    }
    assert set(shares) == {"user/anna", "user/ben"}
    assert abs(shares["user/anna"] - shares["user/ben"]) <= 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SPEEKER m1 1 0 1 <NA> <NA> anna <NA> <NA>", "x.rttm, line 2: 'SPEEKER' is no RTTM type"),
        ("SPEAKER m1 1 0 1", "x.rttm, line 2: a SPEAKER line has at least 8 fields, this one has 5"),
        ("SPEAKER m1 1 zero 1 <NA> <NA> anna", "x.rttm, line 2: the start 'zero' is no number of seconds"),
        ("SPEAKER m1 1 0 nan <NA> <NA> anna", "x.rttm, line 2: the duration 'nan' is no plausible"),
        ("SPEAKER m1 1 -1 1 <NA> <NA> anna", "x.rttm, line 2: the start '-1' is no plausible"),
        (
            "SPEAKER m1 1 0 3600.001 <NA> <NA> anna",
            "x.rttm, line 2: a turn of 3600.001 s is longer than an hour",
        ),
        ("SPEAKER m1 1 0 1 <NA> <NA> a/b", "x.rttm, line 2: the speaker 'a/b' is no valid id"),
    ],
)
def test_a_bad_rttm_line_is_named(line: str, message: str) -> None:
    """The error says which file, which line, and what is wrong there."""
    with pytest.raises(WorkloadError) as caught:
        read_turns(["SPEAKER m1 1 0 1 <NA> <NA> anna", line], "x.rttm")
    assert str(caught.value).startswith(message)


def test_an_rttm_file_without_turns_is_refused() -> None:
    """Comments alone are no workload."""
    with pytest.raises(WorkloadError, match="has no speaker turns"):
        read_turns([";; nothing"], "x.rttm")


def test_an_rttm_file_that_is_no_text_is_refused() -> None:
    """Bytes that are not UTF-8 are named, not traced."""
    with pytest.raises(WorkloadError, match="not UTF-8"):
        decode_turns(b"SPEAKER \xff", "x.rttm")
