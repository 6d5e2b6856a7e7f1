"""What the node's emitter makes is what the decoder accepts; times, rounding and ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ulid import ULID

from clients.node import RefusalReason, UsageEmitter
from clients.node.events import EventIds, whole_ms
from clients.node.utterance import Utterance
from schemas.cloudevents import MAX_DURATION_MS
from schemas.decode import decode_event, reference_decode_event
from schemas.events import Lifecycle, LifecycleKind, Usage
from tests.support.node_client import spooled_values

NOBODY = "127.0.0.1:9"
"""The discard port: no broker listens there."""

AN_HOUR_NS = 3_600_000_000_000
START_NS = 1_767_225_600_123_456_789
"""2026-01-01T00:00:00.123Z and a little."""


@dataclass
class Clock:
    """A clock that moves when told."""

    now_ns: int = 0

    def __call__(self) -> int:
        return self.now_ns

    def forward_ms(self, duration_ms: float) -> None:
        self.now_ns += round(duration_ms * 1_000_000)


@dataclass
class Bench:
    """An emitter without a broker, on clocks of its own; `emitted` is what its spool has at the end."""

    directory: Path
    wall: Clock = field(default_factory=lambda: Clock(START_NS))
    timer: Clock = field(default_factory=Clock)

    def emitter(self) -> UsageEmitter:
        return UsageEmitter(
            NOBODY, "n-17", self.directory, clock_ns=self.wall, timer_ns=self.timer, exit_timeout_s=0.0
        )

    def emitted(self) -> list[Usage | Lifecycle]:
        return [decode_event(value) for value in spooled_values(self.directory)]

    def one_usage(self) -> Usage:
        (event,) = self.emitted()
        assert isinstance(event, Usage)
        return event


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A spool directory of its own."""
    yield Bench(tmp_path / "spool")


def utterance(emitter: UsageEmitter, **fields: object) -> Utterance:
    """One of session s-1."""
    return emitter.utterance(session_id="s-1", user_id="u-5", **fields)  # type: ignore[arg-type]


def test_an_utterance_says_who_where_and_how_long(bench: Bench) -> None:
    """All fields arrive; the time is the wall clock when the block was left, truncated to the ms."""
    with (
        bench.emitter() as emitter,
        emitter.utterance(
            session_id="s-1",
            user_id="u-5",
            room_id="r-9",
            utterance_id="ut-1",
            audio_ms=4200,
            source_lang="zh",
        ) as spoken,
    ):
        with spoken.asr():
            bench.timer.forward_ms(120)
        with spoken.nmt():
            bench.timer.forward_ms(80)
        bench.timer.forward_ms(1000)
        with spoken.tts():
            bench.timer.forward_ms(200)
        spoken.gpu_active_ms = 350
        spoken.target_lang = "en"
        bench.wall.forward_ms(1400)
    event = bench.one_usage()
    assert len(event.id) == 26
    assert event == Usage(
        scope="room/r-9",
        source="node/n-17",
        id=event.id,
        time_ms=START_NS // 1_000_000 + 1400,
        session_id="s-1",
        room_id="r-9",
        user_id="u-5",
        node_id="n-17",
        utterance_id="ut-1",
        audio_ms=4200,
        asr_time_ms=120,
        nmt_time_ms=80,
        tts_time_ms=200,
        gpu_active_time_ms=350,
        source_lang="zh",
        target_lang="en",
    )


def test_lifecycle_events(bench: Bench) -> None:
    """Each kind decodes to what was said, in the order in which it was said, keyed by its scope."""
    with bench.emitter() as emitter:
        emitter.session_started(session_id="s-1", user_id="u-5")
        emitter.session_ended(session_id="s-1", user_id="u-5", room_id="r-9")
        emitter.room_joined(room_id="r-9", user_id="u-5")
        emitter.room_left(room_id="r-9", user_id="u-5")
        emitter.room_closed(room_id="r-9")
    found = bench.emitted()
    assert all(isinstance(event, Lifecycle) for event in found)
    assert [
        (event.kind, event.scope, event.session_id, event.user_id, event.room_id)
        for event in found
        if isinstance(event, Lifecycle)
    ] == [
        (LifecycleKind.SESSION_STARTED, "session/s-1", "s-1", "u-5", None),
        (LifecycleKind.SESSION_ENDED, "room/r-9", "s-1", "u-5", "r-9"),
        (LifecycleKind.JOINED, "room/r-9", None, "u-5", "r-9"),
        (LifecycleKind.LEFT, "room/r-9", None, "u-5", "r-9"),
        (LifecycleKind.CLOSED, "room/r-9", None, None, "r-9"),
    ]


@pytest.mark.parametrize(
    ("duration_ns", "ms"),
    [
        (0, 0),
        (499_999, 0),
        (500_000, 1),
        (1_499_999, 1),
        (1_500_000, 2),
        (AN_HOUR_NS - 500_001, 3_599_999),
        (AN_HOUR_NS, 3_600_000),
        (AN_HOUR_NS + 500_000, 3_600_000),
        (10**30, 3_600_000),
    ],
)
def test_milliseconds_are_rounded_half_up_and_end_at_an_hour(duration_ns: int, ms: int) -> None:
    """Just inside, exactly at, just past."""
    assert whole_ms(duration_ns) == ms


def test_a_stage_entered_twice_adds_up_before_it_is_rounded(bench: Bench) -> None:
    """0.4 and 0.4 ms are 1 ms, not 0."""
    with bench.emitter() as emitter, utterance(emitter) as spoken:
        for _ in range(2):
            with spoken.asr():
                bench.timer.forward_ms(0.4)
    assert bench.one_usage().asr_time_ms == 1


def test_a_stage_entered_twice_at_once_counts_once_and_others_may_overlap(bench: Bench) -> None:
    """From the first entry to the last exit; translation within recognition counts for both."""
    with bench.emitter() as emitter, utterance(emitter) as spoken, spoken.asr():
        bench.timer.forward_ms(10)
        with spoken.asr(), spoken.nmt():
            bench.timer.forward_ms(5)
        bench.timer.forward_ms(10)
    assert (bench.one_usage().asr_time_ms, bench.one_usage().nmt_time_ms) == (25, 5)


def test_stages_may_be_entered_by_several_threads(bench: Bench) -> None:
    """Eight threads in and out of one stage: it is over when the last one is, and nothing is left over."""
    with bench.emitter() as emitter, utterance(emitter) as spoken:

        def work() -> None:
            for _ in range(200):
                with spoken.asr():
                    pass

        with spoken.asr():
            bench.timer.forward_ms(7)
            threads = [Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        bench.timer.forward_ms(100)
    assert bench.one_usage().asr_time_ms == 7


def test_an_unfinished_stage_ends_with_the_utterance(bench: Bench) -> None:
    """What it does later is not counted, and leaving it later is no error; entering one is."""
    with bench.emitter() as emitter:
        stage = ExitStack()
        with utterance(emitter) as spoken:
            stage.enter_context(spoken.tts())
            bench.timer.forward_ms(30)
        bench.timer.forward_ms(1000)
        stage.close()
        with pytest.raises(RuntimeError, match="the utterance has ended"), spoken.asr():
            pass
        with pytest.raises(RuntimeError, match="an utterance is entered once"):
            spoken.__enter__()
    assert bench.one_usage().tts_time_ms == 30


def test_a_stage_outside_of_the_block_is_an_error(bench: Bench) -> None:
    """It would not be measured."""
    with bench.emitter() as emitter:
        stage = utterance(emitter).asr()
        with pytest.raises(RuntimeError, match="enter the utterance first"):
            stage.__enter__()


def test_what_was_measured_before_an_exception_is_emitted(bench: Bench) -> None:
    """The work was done; the exception goes on."""
    with bench.emitter() as emitter, pytest.raises(KeyError, match="model"), utterance(emitter) as spoken:
        with spoken.asr():
            bench.timer.forward_ms(40)
        with spoken.nmt():
            bench.timer.forward_ms(3)
            raise KeyError("model")
    event = bench.one_usage()
    assert (event.asr_time_ms, event.nmt_time_ms, event.tts_time_ms) == (40, 3, 0)


def test_no_work_is_no_event(bench: Bench) -> None:
    """No stage, or discarded: an event would make its user a payer of the room's minute."""
    with bench.emitter() as emitter:
        with utterance(emitter, room_id="r-1") as spoken:
            spoken.gpu_active_ms = 5
        with utterance(emitter) as spoken, spoken.asr():
            spoken.discard()
        assert emitter.stats().emitted == 0
    assert bench.emitted() == []


@pytest.mark.parametrize(
    ("gpu_ms", "reported_ms"), [(0, 0), (12.4, 12), (12.5, 13), (20.0, 20), (21, 20), (1e300, 20)]
)
def test_gpu_time_is_rounded_and_ends_at_the_stages(bench: Bench, gpu_ms: float, reported_ms: int) -> None:
    """The contract allows no more GPU time than the stages took."""
    with bench.emitter() as emitter, utterance(emitter) as spoken:
        with spoken.asr():
            bench.timer.forward_ms(20)
        spoken.gpu_active_ms = gpu_ms
    assert bench.one_usage().gpu_active_time_ms == reported_ms


def test_gpu_time_from_a_counter(bench: Bench) -> None:
    """The difference between beginning and end; what is set by hand wins."""
    readings = iter([1000.0, 1007.6, 2000.0])
    with bench.emitter() as emitter:
        for by_hand in (None, 3):
            with utterance(emitter, gpu=lambda: next(readings)) as spoken:
                with spoken.asr():
                    bench.timer.forward_ms(20)
                if by_hand is not None:
                    spoken.gpu_active_ms = by_hand
    assert [event.gpu_active_time_ms for event in bench.emitted() if isinstance(event, Usage)] == [8, 3]


@pytest.mark.parametrize("readings", [[5.0, 4.0], [], [5.0], ["5"], [float("nan")]])
def test_a_broken_gpu_counter_costs_the_gpu_time_only(bench: Bench, readings: list[float]) -> None:
    """It raises, goes back, or says nonsense: the usage is emitted without GPU time, and it is counted."""
    counter = iter(readings)
    with bench.emitter() as emitter:
        with utterance(emitter, gpu=lambda: next(counter)) as spoken, spoken.asr():
            bench.timer.forward_ms(20)
        assert emitter.stats().gpu_errors == 1
    assert (bench.one_usage().asr_time_ms, bench.one_usage().gpu_active_time_ms) == (20, 0)


def test_wrong_fields_are_refused_by_name_where_they_come_in(bench: Bench) -> None:
    """Before any work is done for them."""
    with bench.emitter() as emitter:
        with pytest.raises(ValueError, match=r"session_id: 's/1' is not 1 to 128 of"):
            emitter.utterance(session_id="s/1", user_id="u-5")
        with pytest.raises(ValueError, match="user_id: '' is not"):
            emitter.utterance(session_id="s-1", user_id="")
        with pytest.raises(TypeError, match="room_id: must be a text, not int"):
            utterance(emitter, room_id=9)
        with pytest.raises(ValueError, match="source_lang: must have 1 to 256 characters, not 0"):
            utterance(emitter, source_lang="")
        with pytest.raises(ValueError, match=r"source_lang: .* is no Unicode text"):
            utterance(emitter, source_lang="\ud800")
        with pytest.raises(ValueError, match="audio_ms: must be zero or more"):
            utterance(emitter, audio_ms=-1)
        with utterance(emitter) as spoken:
            with pytest.raises(ValueError, match="gpu_active_ms: must be zero or more, and finite, not nan"):
                spoken.gpu_active_ms = float("nan")
            with pytest.raises(TypeError, match="gpu_active_ms: must be a number of milliseconds, not bool"):
                spoken.gpu_active_ms = True
            with pytest.raises(ValueError, match="nmt: must be zero or more"):
                spoken.add_ms(asr=5, nmt=-1)
        assert emitter.stats().emitted == 0
    with pytest.raises(ValueError, match="node_id: 'n 17' is not"):
        UsageEmitter(NOBODY, "n 17", bench.directory)


_names = st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True)
_texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256)
_durations_ns = st.integers(0, 2 * AN_HOUR_NS) | st.integers(0, 3_000_000)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.tuples(_names, _names, _names, st.none() | _names, st.none() | _names),
    languages=st.tuples(_texts, _texts),
    stages=st.lists(st.tuples(st.sampled_from(["asr", "nmt", "tts"]), _durations_ns), min_size=1, max_size=6),
    added_ms=st.floats(0, 1e9),
    gpu_ms=st.none() | st.floats(0, 1e12) | st.integers(0, 10**15),
    audio_ms=st.none() | st.integers(0, 10**9),
    wall_ns=st.integers(0, 250_000_000_000_000_000_000),
)
def test_whatever_is_emitted_is_accepted(
    tmp_path_factory: pytest.TempPathFactory,
    ids: tuple[str, str, str, str | None, str | None],
    languages: tuple[str | None, str | None],
    stages: list[tuple[str, int]],
    added_ms: float,
    gpu_ms: float | None,
    audio_ms: int | None,
    wall_ns: int,
) -> None:
    """Any ids, languages and durations that get past the arguments' checks: both decoders accept the bytes."""
    node_id, session_id, user_id, room_id, utterance_id = ids
    directory = tmp_path_factory.mktemp("spool")
    timer = Clock()
    with (
        UsageEmitter(
            NOBODY, node_id, directory, clock_ns=lambda: wall_ns, timer_ns=timer, exit_timeout_s=0.0
        ) as emitter,
        emitter.utterance(
            session_id=session_id,
            user_id=user_id,
            room_id=room_id,
            utterance_id=utterance_id,
            audio_ms=audio_ms,
            source_lang=languages[0],
            target_lang=languages[1],
        ) as spoken,
    ):
        for name, duration_ns in stages:
            with getattr(spoken, name)():
                timer.now_ns += duration_ns
        spoken.add_ms(nmt=added_ms)
        if gpu_ms is not None:
            spoken.gpu_active_ms = gpu_ms
    (value,) = spooled_values(directory)
    event = decode_event(value)
    assert event == reference_decode_event(value)
    assert isinstance(event, Usage)
    assert event.time_ms == wall_ns // 1_000_000
    assert (event.node_id, event.session_id, event.user_id, event.room_id) == ids[:4]
    assert (event.source_lang, event.target_lang) == languages
    whole = {name: sum(ns for stage, ns in stages if stage == name) for name in ("asr", "tts")}
    assert event.asr_time_ms == min((whole["asr"] + 500_000) // 1_000_000, MAX_DURATION_MS)
    assert event.tts_time_ms == min((whole["tts"] + 500_000) // 1_000_000, MAX_DURATION_MS)


def test_ids_grow_also_within_a_millisecond_and_when_the_clock_goes_back() -> None:
    """Sorted as texts, and none twice; the time in them is that of the clock when it goes forward."""
    ids = EventIds()
    made = [ids.next(now_ms) for now_ms in [5, 5, 5, 9, 3, 3, 9, 10, 10]]
    assert made == sorted(set(made))
    assert [made[0][:10], made[3][:10], made[7][:10]] == ["0000000005", "0000000009", "000000000A"]
    assert [ULID.from_str(each).milliseconds for each in made] == [5, 5, 5, 9, 9, 9, 9, 10, 10]
    many = [ids.next(10) for _ in range(10_000)]
    assert many == sorted(set(many))


def test_an_event_has_the_time_of_the_clock_also_when_that_goes_back(bench: Bench) -> None:
    """A clock that was an hour ahead for a moment leaves no events of the future behind."""
    with bench.emitter() as emitter:
        for step_ms in (0, 3_600_000, -3_600_000, 1):
            bench.wall.forward_ms(step_ms)
            emitter.room_joined(room_id="r-1", user_id="u-1")
    events = bench.emitted()
    start_ms = START_NS // 1_000_000
    assert [event.time_ms - start_ms for event in events] == [0, 3_600_000, 0, 1]
    ids = [event.id for event in events]
    assert ids == sorted(set(ids))


def test_after_close_nothing_is_taken_and_an_utterance_that_ends_late_is_refused_aloud(bench: Bench) -> None:
    """Its caller is not disturbed; the callback gets the event."""
    refused = []
    emitter = UsageEmitter(NOBODY, "n-17", bench.directory, on_refused=refused.append)
    with utterance(emitter) as spoken, spoken.asr():
        assert emitter.close(0.0)
    assert [refusal.reason for refusal in refused] == [RefusalReason.CLOSED]
    assert isinstance(decode_event(refused[0].value), Usage)
    assert emitter.stats().refused == {RefusalReason.CLOSED: 1}
    with pytest.raises(RuntimeError, match="the emitter is closed"):
        utterance(emitter)
    with pytest.raises(RuntimeError, match="the emitter is closed"):
        emitter.room_closed(room_id="r-1")
