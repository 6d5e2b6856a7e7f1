"""The live state machine arrives at the pure function's bill, whatever order, cut, crash or repeat."""

from __future__ import annotations

import random
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from metering.live import Answer, Emission, LiveScope, Located, Outcome
from metering.settle import Settling
from schemas.events import Event, LifecycleKind
from schemas.rate_card import RateCard, RateVersion
from schemas.records import SettlementReason
from schemas.rejections import Rejected
from sinks.balances_memory import MemoryBalances
from tests.support.events import START_MS, WINDOW_MS, at, membership, session_event, usage

CARD = RateCard(
    [
        RateVersion(0),
        RateVersion(START_MS + WINDOW_MS + 30_000, asr=1001, nmt=7, tts=3, node_credit=499),
    ]
)

JOINED, LEFT, CLOSED = LifecycleKind.JOINED, LifecycleKind.LEFT, LifecycleKind.CLOSED

times = st.integers(START_MS, START_MS + 3 * WINDOW_MS)
users = st.sampled_from(["u-1", "u-2", "u-3"])


@st.composite
def events(draw: st.DrawFn) -> list[Event]:
    """Distinct events of one room."""
    drawn: list[Event] = []
    for number in range(draw(st.integers(1, 14))):
        if draw(st.booleans()):
            stages = [draw(st.integers(0, 1000)) for _ in range(3)]
            gpu = draw(st.integers(0, sum(stages)))
            node = draw(st.sampled_from(["n-1", "n-2"]))
            drawn.append(
                usage(
                    f"e-{number}",
                    draw(times),
                    user=draw(users),
                    node=node,
                    asr=stages[0],
                    nmt=stages[1],
                    tts=stages[2],
                    gpu=gpu,
                )
            )
        else:
            kind = draw(st.sampled_from([JOINED, JOINED, LEFT, CLOSED]))
            drawn.append(membership(f"e-{number}", kind, draw(times), user=draw(users)))
    return drawn


def pure_balances(log: list[Event]) -> dict[str, int]:
    """The balances by the pure function of the log."""
    settling = Settling(CARD)
    for event in log:
        try:
            settling.add(event)
        except Rejected:
            continue
    totals: dict[str, int] = defaultdict(int)
    for line in settling.lines():
        totals[line.account] += line.amount_us
    return {account: amount for account, amount in totals.items() if amount}


def nonzero(book: MemoryBalances) -> dict[str, int]:
    return {account: amount for account, amount in book.balances().items() if amount}


def post(live: LiveScope, book: MemoryBalances) -> None:
    """Emit, post, and hear the answers."""
    emission = live.emit()
    if emission is None:
        return
    for cell, answer in zip(emission.cells, book.post([emission])[0], strict=True):
        live.answer(cell.window_start_ms, cell.revision, answer)


@given(events(), st.randoms(use_true_random=False))
def test_any_cut_and_any_repeat_gives_the_pure_bill(log: list[Event], chance: random.Random) -> None:
    """Posting after any events, and seeing any of them again, ends at the bill of the set."""
    repeated = log + chance.choices(log, k=4)
    chance.shuffle(repeated)
    live, book = LiveScope("room/r-1", CARD), MemoryBalances()
    for offset, event in enumerate(repeated):
        live.apply(at(event, offset))
        if chance.random() < 0.4:
            post(live, book)
    post(live, book)
    assert nonzero(book) == pure_balances(log)
    assert sum(book.balances().values()) == 0


@given(events(), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_crashes_and_several_partitions_change_nothing(
    log: list[Event], partitions: int, chance: random.Random
) -> None:
    """A flow that falls back to its last snapshot and reads again, in another interleaving, ends at the same."""
    logs: list[list[Located]] = [[] for _ in range(partitions)]
    for event in log + chance.choices(log, k=3):
        partition = chance.randrange(partitions)
        logs[partition].append(at(event, len(logs[partition]), partition))
    book = MemoryBalances()
    saved, kept = LiveScope("room/r-1", CARD).snapshot(), [0] * partitions
    crashes = chance.randrange(4)
    while True:
        live, read = LiveScope.restore(saved, CARD), list(kept)
        crash_in = chance.randrange(1, 12) if crashes else None
        while any(read[p] < len(logs[p]) for p in range(partitions)):
            partition = chance.choice([p for p in range(partitions) if read[p] < len(logs[p])])
            live.apply(logs[partition][read[partition]])
            read[partition] += 1
            if chance.random() < 0.5:
                post(live, book)
            if chance.random() < 0.3:
                saved, kept = live.snapshot(), list(read)
            if crash_in is not None:
                crash_in -= 1
                if crash_in == 0:
                    break
        if crash_in == 0:
            crashes -= 1
            continue
        post(live, book)
        assert nonzero(book) == pure_balances(log)
        return


@given(events(), st.lists(st.booleans(), min_size=14, max_size=14), st.randoms(use_true_random=False))
def test_of_conflicting_occurrences_the_smallest_position_counts(
    log: list[Event], twisted: list[bool], chance: random.Random
) -> None:
    """An id used twice for different things: partition 0 wins, in whatever order the two partitions are read."""
    others = [
        usage(event.id, event.time_ms + 17, user="u-3", source=event.source)
        for event, twist in zip(log, twisted, strict=False)
        if twist
    ]
    first = [at(event, offset) for offset, event in enumerate(log)]
    second = [at(event, offset, partition=1) for offset, event in enumerate(others)]
    live, book = LiveScope("room/r-1", CARD), MemoryBalances()
    refused = 0
    while first or second:
        queue = chance.choice([queue for queue in (first, second) if queue])
        outcome = live.apply(queue.pop(0))
        refused += outcome in (Outcome.CONFLICT, Outcome.DISPLACED)
        if chance.random() < 0.4:
            post(live, book)
    post(live, book)
    assert nonzero(book) == pure_balances(log)
    assert refused == len(others)


def test_a_displaced_occurrence_is_named() -> None:
    """The place of the occurrence that is taken back is known, so that its bytes can become a dead letter."""
    live = LiveScope("room/r-1", CARD)
    assert live.apply(at(usage("e-1", asr=1), 7, partition=3)) is Outcome.APPLIED
    assert live.apply(at(usage("e-1", asr=2), 9, partition=1)) is Outcome.DISPLACED
    assert (live.displaced >> 48, live.displaced & (1 << 48) - 1) == (3, 7)
    assert live.apply(at(usage("e-1", asr=1), 8, partition=3)) is Outcome.CONFLICT
    assert live.apply(at(usage("e-1", asr=2), 10, partition=1)) is Outcome.DUPLICATE


def test_a_cell_whose_usage_was_taken_back_is_posted_as_zeros_even_after_a_crash() -> None:
    """Otherwise what was charged for the displaced occurrence would stay."""
    live, book = LiveScope("room/r-1", CARD), MemoryBalances()
    live.apply(at(usage("e-1", START_MS), 0, partition=1))
    post(live, book)
    live.apply(at(usage("e-1", START_MS + WINDOW_MS, user="u-2"), 0, partition=0))
    restored = LiveScope.restore(live.snapshot(), CARD)
    post(restored, book)
    assert book.balances()["user/u-1"] == 0
    assert book.balances()["user/u-2"] < 0


def test_windows_below_the_fence_are_late_and_their_ids_forgotten() -> None:
    """Just before the fence is late, exactly at it is live; a frozen window posts nothing more."""
    live, book = LiveScope("room/r-1", CARD), MemoryBalances()
    live.apply(at(usage("e-1", START_MS), 0))
    live.raise_fence(START_MS + WINDOW_MS)
    assert live.emit() is None
    assert live.apply(at(usage("e-2", START_MS + WINDOW_MS - 1), 1)) is Outcome.LATE
    assert live.apply(at(usage("e-1", START_MS + WINDOW_MS), 2)) is Outcome.APPLIED
    post(live, book)
    assert book.live_cells() == {f"room/r-1@{START_MS + WINDOW_MS}"}


def test_a_late_join_still_shapes_the_windows_above_the_fence() -> None:
    """Membership below the fence is folded, not dropped."""
    live, book = LiveScope("room/r-1", CARD, frozen_before_ms=START_MS + WINDOW_MS), MemoryBalances()
    live.apply(at(usage("e-1", START_MS + WINDOW_MS), 0))
    post(live, book)
    assert live.apply(at(membership("e-2", JOINED, START_MS, user="u-9"), 1)) is Outcome.LATE
    post(live, book)
    assert book.balances()["user/u-9"] < 0


def test_a_posting_answered_older_goes_out_again_with_the_next_revision() -> None:
    """Not before: the same revision would be answered the same."""
    live = LiveScope("room/r-1", CARD)
    live.apply(at(usage("e-1"), 0))
    emission = live.emit()
    assert emission is not None
    live.answer(START_MS, emission.cells[0].revision, Answer.OLDER)
    assert not live.emission_due()
    assert live.emit() is None
    live.apply(at(usage("e-1"), 1))
    again = live.emit()
    assert again is not None
    assert again.cells[0].revision == 2


def ending_of(live: LiveScope, *, silent: bool = False) -> tuple[SettlementReason, int, int] | None:
    emission: Emission | None = live.emit(silent=silent)
    if emission is None or emission.ending is None:
        return None
    return emission.ending.reason, emission.ending.first_event_ms, emission.ending.last_event_ms


def test_a_session_ends_by_its_event_or_by_silence_and_reopens() -> None:
    """`ended` at or after the last event ends it at once; silence ends what has no end; usage reopens it."""
    live = LiveScope("session/s-1", CARD)
    live.apply(at(usage("e-1", START_MS, room=None), 0))
    assert ending_of(live) is None
    live.apply(at(session_event("e-2", LifecycleKind.SESSION_ENDED, START_MS + 5), 1))
    assert ending_of(live) == (SettlementReason.ENDED, START_MS, START_MS + 5)
    assert not live.open
    live.apply(at(usage("e-3", START_MS + 4, room=None), 2))
    assert ending_of(live) == (SettlementReason.ENDED, START_MS, START_MS + 5)
    live.apply(at(usage("e-4", START_MS + 6, room=None), 3))
    assert ending_of(live) is None
    assert ending_of(live, silent=True) == (SettlementReason.TIMEOUT, START_MS, START_MS + 6)


def test_a_room_ends_when_it_is_closed_not_when_a_session_in_it_ends() -> None:
    """A session's end inside a room says nothing about the room."""
    live = LiveScope("room/r-1", CARD)
    live.apply(at(usage("e-1"), 0))
    live.apply(at(membership("e-2", LEFT), 1))
    assert ending_of(live) is None
    live.apply(at(membership("e-3", CLOSED, START_MS + 1), 2))
    assert ending_of(live) == (SettlementReason.ENDED, START_MS, START_MS + 1)


def test_a_scope_is_forgettable_once_nothing_of_it_matters() -> None:
    """Ended, its windows behind the fence, and no presence that could reach above it."""
    live = LiveScope("room/r-1", CARD, presence_max_ms=WINDOW_MS)
    live.apply(at(membership("e-1", JOINED), 0))
    live.apply(at(usage("e-2"), 1))
    assert not live.forgettable
    live.emit(silent=True)
    live.raise_fence(START_MS + WINDOW_MS)
    assert live.forgettable


def test_a_window_that_did_not_change_is_not_packed_again() -> None:
    """A snapshot copies the very bytes of the last one, so that old windows cost nothing."""
    live = LiveScope("room/r-1", CARD)
    live.apply(at(usage("e-1", START_MS), 0))
    live.apply(at(usage("e-2", START_MS + WINDOW_MS), 1))
    live.snapshot()
    windows = live._windows
    old, new = windows[START_MS].saved, windows[START_MS + WINDOW_MS].saved
    live.apply(at(usage("e-3", START_MS + WINDOW_MS), 2))
    live.snapshot()
    assert windows[START_MS].saved is old
    assert windows[START_MS + WINDOW_MS].saved != new


def test_a_new_rate_version_prices_live_windows_after_a_restart() -> None:
    """Entries keep milliseconds, not money: a restored state is priced at the card that is in force now."""
    live = LiveScope("session/s-1", RateCard([RateVersion(0)]))
    live.apply(at(usage("e-1", START_MS, room=None, asr=10, nmt=0, tts=0, gpu=0), 0))
    card = RateCard([RateVersion(0), RateVersion(START_MS, asr=3)])
    emission = LiveScope.restore(live.snapshot(), card).emit()
    assert emission is not None
    assert emission.cells[0].amounts["user/u-1"] == -30
    assert emission.cells[0].rate_version == "2026-01-01T00:00:00.000Z"
