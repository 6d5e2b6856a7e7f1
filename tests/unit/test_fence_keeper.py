"""How long the fence stands after the broker was away."""

from __future__ import annotations

import pytest

from app.fence_keeper import LONGEST_HOLD_S, SHORTEST_HOLD_S, Hold


def test_it_moves_while_the_broker_answers() -> None:
    """Nothing is held back without an outage."""
    hold = Hold()
    hold.answered(1_000.0)
    assert not hold.holds(1_000.0)


def test_it_stands_while_the_broker_is_away() -> None:
    """From the first failure on, however long it takes."""
    hold = Hold()
    hold.failed(1_000.0)
    hold.failed(9_000.0)
    assert hold.holds(9_001.0)


@pytest.mark.parametrize(
    ("away_s", "held_s"), [(1.0, SHORTEST_HOLD_S), (50.0, 50.0), (5_000.0, LONGEST_HOLD_S)]
)
def test_it_stands_as_long_again_within_bounds(away_s: float, held_s: float) -> None:
    """Producers deliver what they held back; just before the end it stands, at the end it moves."""
    hold = Hold()
    hold.failed(1_000.0)
    hold.failed(1_000.0 + away_s / 2)
    back = 1_000.0 + away_s
    hold.answered(back)
    hold.answered(back + 1.0)
    assert hold.holds(back + held_s - 0.001)
    assert not hold.holds(back + held_s)
