"""A circuit breaker: when Redis is away, most calls learn it at once instead of waiting for their deadline.

Laws:
- Closed: every attempt may go. After `failures` in a row, counted over all threads, it opens.
- Open: none may, for `open_s` (half to all of it, so that schedulers do not return in step).
- Half-open: one attempt may, the probe. If it succeeds the breaker closes, if it fails it opens again. A probe of
  which nothing is heard for `open_s` (its thread died) gives its place to another.
- What an attempt reports that began before the last change of state changes nothing.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where the breaker stands."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave for one attempt; hand it back with how the attempt went."""

    generation: int


class Breaker:
    """Safe for threads, and for tasks of one event loop; never blocks for longer than a few assignments."""

    def __init__(
        self,
        *,
        failures: int = 5,
        open_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        on_change: Callable[[State], None] = lambda state: None,
    ) -> None:
        if failures < 1 or open_s <= 0:
            raise ValueError(f"failures={failures}, open_s={open_s}: both are above zero")
        self._failures = failures
        self._open_s = open_s
        self._clock = clock
        self._jitter = jitter
        self._on_change = on_change
        self._lock = threading.Lock()
        self._state = State.CLOSED
        self._generation = 0
        self._failed = 0
        self._until = 0.0
        """While open: when a probe may go. While half-open: when the probe is given up."""

    @property
    def state(self) -> State:
        """Where it stands; an open breaker whose time is over still says so until the next attempt."""
        return self._state

    def permit(self) -> Permit | None:
        """Leave for one attempt, or None: do not try."""
        with self._lock:
            if self._state is not State.CLOSED:
                if self._clock() < self._until:
                    return None
                self._change(State.HALF_OPEN)
                self._until = self._clock() + self._open_s
            return Permit(self._generation)

    def succeeded(self, permit: Permit) -> None:
        """Redis answered."""
        with self._lock:
            if permit.generation != self._generation:
                return
            self._failed = 0
            if self._state is State.HALF_OPEN:
                self._change(State.CLOSED)

    def failed(self, permit: Permit) -> None:
        """Redis did not answer, or not as one that can be asked."""
        with self._lock:
            if permit.generation != self._generation:
                return
            self._failed += 1
            if self._state is State.HALF_OPEN or self._failed >= self._failures:
                self._change(State.OPEN)
                self._until = self._clock() + self._open_s * (0.5 + 0.5 * self._jitter())

    def abandoned(self, permit: Permit) -> None:
        """The attempt ended and says nothing about Redis: another may be the probe."""
        with self._lock:
            if permit.generation == self._generation and self._state is State.HALF_OPEN:
                self._until = self._clock()

    def _change(self, state: State) -> None:
        self._generation += 1
        self._failed = 0
        if state is not self._state:
            self._state = state
            self._on_change(state)
