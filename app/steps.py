"""Drives procedures that stop between any two effects: dies where a fault is armed, and lets time pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

from telemetry import faults

Step = TypeVar("Step")
Done = TypeVar("Done")


def drive(
    steps: Generator[Step, None, Done], points: Mapping[Step, str], on_step: Callable[[Step], object]
) -> Done:
    """What the procedure returns. `points` are the fault points that its steps are; `on_step` is called at each."""
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            done: Done = stop.value
            return done
        if step in points:
            faults.reach(points[step])
        on_step(step)
