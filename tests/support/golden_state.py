"""What a version keeps between two runs, for the next versions to read: `python -m tests.support.golden_state`.

What it prints is committed as tests/data/state_<version>.json, and never written again: a later version that
changes the format of the state adds a file of its own.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Sequence

from metering.live import Emission, LiveScope, Located
from schemas.events import Event, LifecycleKind
from schemas.messages import RawMessage
from schemas.rate_card import load_rate_card
from sources.kafka import SourcePosition
from tests.support.events import START_MS, WINDOW_MS, membership, session_event, usage

PARTITIONS = 2
FENCE_MS = START_MS + WINDOW_MS


def before() -> list[Event]:
    """What the older version has seen: a window that froze, two that are live, and members from below the fence."""
    joined, left = LifecycleKind.JOINED, LifecycleKind.LEFT
    frozen, first, second = START_MS, START_MS + WINDOW_MS, START_MS + 2 * WINDOW_MS
    return [
        membership("m-1", joined, frozen + 5_000, user="u-early"),
        membership("m-2", joined, frozen + 6_000, user="u-gone"),
        usage("e-1", frozen + 10_000),
        membership("m-3", left, frozen + 50_000, user="u-gone"),
        usage("e-2", first, user="u-1", node="n-1", asr=1, nmt=2, tts=3, gpu=6),
        usage("e-3", first + 30_000, user="u-2", node="n-2", asr=3_600_000, nmt=0, tts=7, gpu=1),
        membership("m-4", joined, first + 59_999, user="u-late"),
        membership("m-5", left, second, user="u-early"),
        usage("e-4", second + 59_999, user="u-3", node="n-1"),
        usage("s-1", first + 1_000, room=None, session="s-9", user="u-4"),
        usage("s-2", second + 1_000, room=None, session="s-9", user="u-4"),
        session_event("s-3", LifecycleKind.SESSION_ENDED, second + 2_000, session="s-9"),
    ]


def after() -> list[Event]:
    """What comes then: repeats, a conflict, late ones, and news of every kind."""
    first, second = START_MS + WINDOW_MS, START_MS + 2 * WINDOW_MS
    return [
        usage("e-2", first, user="u-1", node="n-1", asr=1, nmt=2, tts=3, gpu=6),
        usage("e-3", first + 30_000, user="u-2", node="n-2", asr=5, nmt=0, tts=7, gpu=1),
        usage("e-5", START_MS + 20_000),
        membership("m-6", LifecycleKind.JOINED, second + 100, user="u-new"),
        membership("m-7", LifecycleKind.LEFT, first - 1, user="u-early"),
        usage("e-6", first + 40_000, user="u-9", node="n-3", asr=11),
        usage("e-7", second + WINDOW_MS, user="u-1"),
        usage("s-2", second + 1_000, room=None, session="s-9", user="u-4"),
        usage("s-4", second + 3_000, room=None, session="s-9", user="u-4"),
    ]


def in_the_log(events: Sequence[Event], first_offset: int) -> list[Located]:
    """The events on their partitions, by turns."""
    return [
        Located(
            event,
            RawMessage(
                "lingua.events", at % PARTITIONS, first_offset + at // PARTITIONS, None, b"", event.time_ms
            ),
        )
        for at, event in enumerate(events)
    ]


def emitted(emission: Emission | None) -> list[list[object]]:
    """The cells of an emission, and its ending, as JSON has them."""
    if emission is None:
        return []
    cells: list[list[object]] = [
        [cell.cell_id, cell.revision, cell.rate_version, dict(sorted(cell.amounts.items()))]
        for cell in emission.cells
    ]
    ending = emission.ending
    if ending is not None:
        cells.append(
            ["ending", ending.revision, ending.reason.value, ending.first_event_ms, ending.last_event_ms]
        )
    return cells


def go_on(live: LiveScope) -> dict[str, object]:
    """What becomes of the events that come then, and what is emitted before and after them."""
    at_once = emitted(live.emit())
    outcomes = [
        live.apply(located).name
        for located in in_the_log(after(), first_offset=100)
        if located.event.scope == live.scope
    ]
    return {"at_once": at_once, "outcomes": outcomes, "then": emitted(live.emit())}


def seen(scope: str, restore: Callable[[bytes], LiveScope] | None = None) -> LiveScope:
    """The state after `before`; kept and read back in between, if so said."""
    live = LiveScope(scope, load_rate_card(None))
    for number, located in enumerate(in_the_log(before(), first_offset=0)):
        if located.event.scope == scope:
            live.apply(located)
        if number == 6:
            live.raise_fence(FENCE_MS)
            if restore is not None:
                live = restore(live.snapshot())
    return live


def main() -> None:
    """Write the file to standard output."""
    scopes = {}
    for scope in ("room/r-1", "session/s-9"):
        snapshot = seen(scope).snapshot()
        live = LiveScope.restore(snapshot, load_rate_card(None))
        scopes[scope] = {"snapshot": snapshot.hex(), **go_on(live)}
    position = SourcePosition("AAAAAAAAAAAAAAAAAAAAAA", 4, 1_234, True)
    json.dump({"scopes": scopes, "position": pickle.dumps(position, protocol=4).hex()}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
