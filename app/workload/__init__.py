"""Realistic workloads: seeded ones from nothing (`synthetic`), or real meetings from speaker turns (`rttm`).

Both make accepted events (`schemas.events`) in the order of their times, `wire` writes them as CloudEvents,
and `transport` then does to the messages what a network does: repeats, disorder, delay, broken ones. The same
seed and start give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from app.workload import rttm
from app.workload.spec import TransportEffects, WorkloadError, WorkloadSpec
from app.workload.synthetic import synthetic_events
from app.workload.transport import carry
from app.workload.wire import encode_event

__all__ = ["TransportEffects", "WorkloadError", "WorkloadSpec", "generate", "generate_from_rttm"]


def generate(spec: WorkloadSpec) -> Iterator[bytes]:
    """The messages of a synthetic workload, without line ends, in the order in which they are sent.

    `spec.events` of them are distinct, valid events, usage and lifecycle together; repeats and broken
    messages come on top. Memory grows with the scopes that are alive at once, not with the number of events.
    Raises WorkloadError when the events do not hold the sessions and rooms that were asked for.
    """
    lines = (encode_event(event) for event in synthetic_events(spec))
    return carry(lines, spec.events, spec.transport, spec.seed)


def generate_from_rttm(
    turns: list[rttm.Turn],
    starts_ms: dict[str, int],
    *,
    seed: int,
    node_count: int,
    transport: TransportEffects,
) -> Iterator[bytes]:
    """The messages of meetings that start at `starts_ms`, without line ends, in the order of sending."""
    events = rttm.rttm_events(turns, starts_ms, seed, node_count)
    lines = (encode_event(event) for event in events)
    return carry(lines, rttm.event_count(turns), transport, seed)
