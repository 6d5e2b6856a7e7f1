"""The plan of `make chaos`: a function of the seed, with enough of everything."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from chaos.plan import (
    AWAY_FENCE_LAG_S,
    AWAY_S,
    FLOW_POINTS,
    KINDS,
    LOSES_THE_LOG,
    POINTS,
    PROCESSES,
    REBUILD_POINTS,
    RESETTLE_POINTS,
    STOPS,
    WORLDS,
    Wishes,
    WorldPlan,
    worlds,
)
from telemetry import faults

ROUNDS_OF_AN_HOUR = 44
"""What a plan of a bit more than an hour on two cores comes to: a round takes 100 s."""


def kills(planned: list[WorldPlan]) -> Counter[str]:
    """What the plan kills, by process and by point; a flow that shall die at a point is killed before it too."""
    found: Counter[str] = Counter()
    for world in planned:
        for each in world.rounds:
            for fault in each.faults:
                if fault.kind in PROCESSES or fault.kind in POINTS:
                    found[fault.kind] += 1
                if fault.kind in FLOW_POINTS:
                    found[FLOW_POINTS[fault.kind]] += 2
    return found


def rounds(seed: int, count: int) -> list[WorldPlan]:
    """Whole worlds, until they have so many rounds."""
    planned: list[WorldPlan] = []
    for world in worlds(Wishes(seed)):
        planned.append(world)
        if sum(len(each.rounds) for each in planned) >= count:
            return planned
    raise AssertionError("worlds come without end")


def test_a_seed_gives_the_same_plan_again() -> None:
    """Two plans of one seed are equal, those of two seeds are not."""
    assert list(islice(worlds(Wishes(7)), 10)) == list(islice(worlds(Wishes(7)), 10))
    assert list(islice(worlds(Wishes(7)), 10)) != list(islice(worlds(Wishes(8)), 10))


def test_a_plan_of_about_an_hour_kills_five_hundred_times_and_everything_thirty_times() -> None:
    """At least 500 kills, and at least 30 of every process and at every point."""
    planned = kills(rounds(1, ROUNDS_OF_AN_HOUR))
    assert sum(planned.values()) >= 500
    assert {kind: planned[kind] for kind in (*PROCESSES, *POINTS) if planned[kind] < 30} == {}


def test_every_kind_of_fault_comes_up_in_one_turn_of_the_worlds() -> None:
    """Every kind that can be asked for with --only is in the plan."""
    planned = {
        fault.kind
        for world in islice(worlds(Wishes(1)), len(WORLDS))
        for each in world.rounds
        for fault in each.faults
    }
    assert planned == set(KINDS)


def test_every_fault_point_of_the_code_has_a_kind() -> None:
    """A point that is added to `telemetry.faults` must be killed at too."""
    assert set(POINTS) == set(faults.POINTS)


def test_repairs_are_killed_only_where_the_round_ends_with_a_resettle() -> None:
    """A repair in another world would heal, and so hide, what live settlement did wrong."""
    for world in islice(worlds(Wishes(3)), 40):
        kinds = {fault.kind for each in world.rounds for fault in each.faults}
        assert world.kind == "freezing" or not kinds & {*RESETTLE_POINTS, *REBUILD_POINTS}


def test_the_broker_is_away_for_longer_than_the_fence_stands_behind() -> None:
    """Otherwise the outage proves nothing about late events."""
    assert AWAY_S > AWAY_FENCE_LAG_S
    [away] = [world for world in islice(worlds(Wishes(1)), len(WORLDS)) if world.kind == "outage"]
    assert away.rounds[0].settings["fence_lag_s"] == str(AWAY_FENCE_LAG_S)
    assert away.rounds[0].faults[0].hold_s == AWAY_S


def test_stops_are_longer_than_the_time_out_of_redis_and_some_than_every_time_out() -> None:
    """12 s at least; over 120 s now and then."""
    held = [
        fault.hold_s
        for world in islice(worlds(Wishes(1)), 80)
        for each in world.rounds
        for fault in each.faults
        if fault.kind in STOPS
    ]
    assert min(held) >= 12.0
    assert max(held) > 120.0


def test_a_broker_that_forgets_is_never_killed() -> None:
    """What nobody has read yet would be gone with it."""
    for world in islice(worlds(Wishes(1, broker_keeps_log=False)), 16):
        assert not {fault.kind for each in world.rounds for fault in each.faults} & LOSES_THE_LOG


def test_only_the_wished_for_kind_is_planned() -> None:
    """--only leaves rounds without any of it out, and numbers the rest from 1."""
    planned = list(islice(worlds(Wishes(1, only=("redis",))), 4))
    assert {fault.kind for world in planned for each in world.rounds for fault in each.faults} == {"redis"}
    numbers = [each.number for world in planned for each in world.rounds]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_wish_that_nothing_meets_is_refused() -> None:
    """A scene without any of the wished-for kinds would plan for ever."""
    with pytest.raises(ValueError, match="no scene"):
        next(worlds(Wishes(1, only=("supervisor",), scenes=("kills",))))
