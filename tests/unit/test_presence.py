"""Presence against a clock that ticks every millisecond, and folding against not folding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metering.presence import Presence
from schemas.events import LifecycleKind

JOINED, LEFT, CLOSED = LifecycleKind.JOINED, LifecycleKind.LEFT, LifecycleKind.CLOSED
MAX_MS = 7
HORIZON_MS = 40

Step = tuple[LifecycleKind, str, int]

steps = st.lists(
    st.tuples(st.sampled_from([JOINED, LEFT, CLOSED]), st.sampled_from("ab"), st.integers(0, 24)),
    max_size=14,
)


def ticking(events: list[Step]) -> dict[str, set[int]]:
    """For each user the milliseconds [t, t + 1) during which they were present, by walking the clock."""
    present: dict[str, set[int]] = {"a": set(), "b": set()}
    until: dict[str, int] = {}
    for tick in range(HORIZON_MS):
        # At equal times: joined, left, closed.
        for kind, user, _ in sorted(
            (event for event in events if event[2] == tick), key=lambda event: event[0]
        ):
            if kind is JOINED:
                until[user] = tick + MAX_MS
            elif kind is LEFT:
                until.pop(user, None)
            else:
                until.clear()
        for user, end in until.items():
            if tick < end:
                present[user].add(tick)
    return present


def room_of(events: list[Step], frozen_before_ms: int | None = None) -> Presence:
    room = Presence(MAX_MS, frozen_before_ms)
    for kind, user, time_ms in events:
        room.add(kind, None if kind is CLOSED else user, time_ms)
    return room


@given(steps, st.randoms())
def test_members_are_those_whom_the_clock_saw(events: list[Step], random: object) -> None:
    """In any order of arrival the members of every window are those present in one of its milliseconds."""
    random.shuffle(events)  # type: ignore[attr-defined]
    room, seen = room_of(events), ticking(events)
    for start in range(HORIZON_MS - 5):
        expected = {user for user, ticks in seen.items() if ticks & set(range(start, start + 5))}
        assert room.members(start, start + 5) == expected


@given(steps, steps, st.lists(st.integers(0, 30), max_size=3))
def test_folding_below_the_fence_changes_nothing_above_it(
    before: list[Step], after: list[Step], fences: list[int]
) -> None:
    """A room that folds, also with events that come late, has the members above the fence that one without has."""
    folding, plain = room_of(before), room_of(before + after)
    fence = 0
    for frozen_before_ms in fences:
        folding.raise_fence(frozen_before_ms)
        fence = max(fence, frozen_before_ms)
    for kind, user, time_ms in after:
        folding.add(kind, None if kind is CLOSED else user, time_ms)
    for start in range(fence, HORIZON_MS):
        assert folding.members(start, start + 4) == plain.members(start, start + 4)


@given(steps, st.integers(0, 30))
def test_a_restored_room_is_the_same_room(events: list[Step], fence: int) -> None:
    """What is folded, and the events above the fence, are the whole state."""
    room = room_of(events)
    room.raise_fence(fence)
    restored = Presence(MAX_MS, fence)
    restored.restore_folded(*room.folded())
    restored.replace([(kind, user, time_ms) for kind, user, time_ms in events if time_ms >= fence])
    for start in range(fence, HORIZON_MS):
        assert restored.members(start, start + 4) == room.members(start, start + 4)


def test_a_room_is_forgotten_once_nothing_of_it_can_reach_a_window() -> None:
    """An end is remembered as long as a join before it could come late and reach above the fence."""
    room = room_of([(JOINED, "a", 0), (LEFT, "a", 5)])
    room.raise_fence(5 + MAX_MS - 1)
    assert not room.empty
    room.raise_fence(5 + MAX_MS)
    assert room.empty


def test_edges_of_an_interval() -> None:
    """[joined, left): present in the window that ends just past the join, not in the one that starts at the end."""
    room = room_of([(JOINED, "a", 10), (LEFT, "a", 15)])
    assert room.members(5, 10) == set()
    assert room.members(6, 11) == {"a"}
    assert room.members(14, 19) == {"a"}
    assert room.members(15, 20) == set()


def test_presence_ends_at_its_maximum_and_is_renewed_by_a_join() -> None:
    """presence_max counts from the last join."""
    room = room_of([(JOINED, "a", 0)])
    assert room.members(MAX_MS - 1, MAX_MS) == {"a"}
    assert room.members(MAX_MS, MAX_MS + 1) == set()
    room.add(JOINED, "a", MAX_MS - 1)
    assert room.members(MAX_MS, MAX_MS + 1) == {"a"}


def test_a_zero_interval_is_none() -> None:
    """Joined and left at one instant, or joined when the room closes, is no presence; a left alone is ignored."""
    assert room_of([(JOINED, "a", 3), (LEFT, "a", 3)]).members(0, 9) == set()
    assert room_of([(JOINED, "a", 3), (CLOSED, "", 3)]).members(0, 9) == set()
    assert room_of([(LEFT, "a", 3)]).members(0, 9) == set()
