"""Sessions and rooms from a seed.

First every scope is planned without its speech: who comes when, who leaves, who drops out. The lifecycle
events are then known and counted, and what is left of the events is shared out as utterances, by how long
somebody is there and how much they talk. The speech of a scope is made only when its time comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

from app.workload.ids import distinct_codes, ulid
from app.workload.nodes import LANGUAGES, Node, Speaker, make_nodes, make_usage
from app.workload.spec import WorkloadError, WorkloadSpec
from schemas.events import Event, Lifecycle, LifecycleKind

SCHEDULER = "scheduler/eu-1"

CUT_OFF_SHARE = 0.15
"""Sessions that never say that they ended."""
NEVER_CLOSED_SHARE = 0.2
"""Rooms whose `room.closed` never comes."""
LISTENER_SHARE = 0.15
"""Members who never speak, and pay their share all the same."""
FAILOVER_SHARE = 0.03
"""Utterances that another node than the session's took over."""
SHORTEST_STAY_MS = 2_000


@dataclass(frozen=True)
class Stint:
    """One session of one speaker, [from_ms, until_ms); `talk` weighs their speech, 0 for a listener."""

    speaker: Speaker
    node: Node
    from_ms: int
    until_ms: int
    talk: float

    @property
    def weight(self) -> int:
        """What the utterances are shared out by; an integer, so that they sum up exactly."""
        return int(self.talk * 1_000) * (self.until_ms - self.from_ms)


@dataclass
class ScopePlan:
    """One scope without its speech."""

    start_ms: int
    seed: str
    lifecycle: list[Lifecycle] = field(default_factory=list)
    stints: list[Stint] = field(default_factory=list)


@dataclass(frozen=True)
class _World:
    """Who and what exists, and the end of time."""

    users: list[str]
    nodes: list[Node]
    horizon_ms: int


def synthetic_events(spec: WorkloadSpec) -> Iterator[Event]:
    """Exactly `spec.events` events in the order of their times; equal times keep a scope's own order.

    Raises WorkloadError, before the first event, when the lifecycle alone is more than `spec.events`.
    """
    plans = _plan_scopes(spec)
    lifecycle_count = sum(len(plan.lifecycle) for plan in plans)
    if lifecycle_count > spec.events:
        raise WorkloadError(
            f"{spec.events} events do not hold {spec.session_count} sessions and {spec.room_count} rooms, "
            f"whose comings and goings alone are {lifecycle_count} events"
        )
    counts = _share_out(spec.events - lifecycle_count, [stint for plan in plans for stint in plan.stints])
    return _in_time_order(plans, counts, make_nodes(spec.node_count, Random(f"{spec.seed}/nodes")))


def _plan_scopes(spec: WorkloadSpec) -> list[ScopePlan]:
    world = _World(
        users=distinct_codes("u-", spec.user_count, 8, Random(f"{spec.seed}/users")),
        nodes=make_nodes(spec.node_count, Random(f"{spec.seed}/nodes")),
        horizon_ms=spec.start_ms + spec.horizon_ms,
    )
    plans = [_plan_session(spec, world, number) for number in range(spec.session_count)]
    plans += [_plan_room(spec, world, number) for number in range(spec.room_count)]
    # Stable, so scopes that begin together keep the order in which they were made.
    plans.sort(key=lambda plan: plan.start_ms)
    return plans


def _draw_span(spec: WorkloadSpec, median_ms: int, rng: Random) -> tuple[int, int]:
    """Start and length of a scope in ms; a long one may still be going on at the end of the workload."""
    length_ms = int(min(median_ms, spec.horizon_ms // 3) * rng.lognormvariate(0.0, 0.6))
    length_ms = max(min(30_000, spec.horizon_ms), min(length_ms, spec.horizon_ms))
    latest_start_ms = max(1, spec.horizon_ms - int(length_ms * 0.8))
    return spec.start_ms + rng.randrange(latest_start_ms), length_ms


def _draw_speaker(scope: str, room_id: str | None, user_id: str, time_ms: int, rng: Random) -> Speaker:
    source_lang, target_lang = rng.sample(LANGUAGES, 2)
    return Speaker(scope, f"s-{ulid(time_ms, rng)}", room_id, user_id, source_lang, target_lang)


def _lifecycle(kind: LifecycleKind, time_ms: int, speaker: Speaker, rng: Random) -> Lifecycle:
    of_session = kind in (LifecycleKind.SESSION_STARTED, LifecycleKind.SESSION_ENDED)
    return Lifecycle(
        scope=speaker.scope,
        source=SCHEDULER,
        id=ulid(time_ms, rng),
        time_ms=time_ms,
        kind=kind,
        user_id=None if kind is LifecycleKind.CLOSED else speaker.user_id,
        session_id=speaker.session_id if of_session else None,
        room_id=speaker.room_id,
    )


def _plan_session(spec: WorkloadSpec, world: _World, number: int) -> ScopePlan:
    seed = f"{spec.seed}/session/{number}"
    rng = Random(seed)
    start_ms, length_ms = _draw_span(spec, 5 * 60_000, rng)
    end_ms = min(start_ms + length_ms, world.horizon_ms)
    session_id = f"s-{ulid(start_ms, rng)}"
    speaker = Speaker(
        f"session/{session_id}", session_id, None, rng.choice(world.users), *rng.sample(LANGUAGES, 2)
    )
    plan = ScopePlan(start_ms, seed)
    plan.lifecycle.append(_lifecycle(LifecycleKind.SESSION_STARTED, start_ms, speaker, rng))
    plan.stints.append(Stint(speaker, rng.choice(world.nodes), start_ms, end_ms, talk=1.0))
    if end_ms < world.horizon_ms and rng.random() >= CUT_OFF_SHARE:
        plan.lifecycle.append(_lifecycle(LifecycleKind.SESSION_ENDED, end_ms, speaker, rng))
    return plan


def _plan_room(spec: WorkloadSpec, world: _World, number: int) -> ScopePlan:
    seed = f"{spec.seed}/room/{number}"
    rng = Random(seed)
    start_ms, length_ms = _draw_span(spec, 10 * 60_000, rng)
    room = _Room(
        f"r-{ulid(start_ms, rng)}", start_ms, start_ms + length_ms, world, rng, ScopePlan(start_ms, seed)
    )
    member_count = min(2 + int(rng.expovariate(1 / 2.5)), 12, len(world.users))
    for position, user_id in enumerate(rng.sample(world.users, member_count)):
        room.add_member(user_id, is_host=position == 0)
    room.close()
    return room.plan


@dataclass
class _Room:
    """A room while it is being planned."""

    room_id: str
    start_ms: int
    end_ms: int
    world: _World
    rng: Random
    plan: ScopePlan

    def add_member(self, user_id: str, is_host: bool) -> None:
        """Somebody comes; may leave early or drop out; may come back."""
        rng = self.rng
        talk = 0.0 if not is_host and rng.random() < LISTENER_SHARE else rng.gammavariate(1.2, 1.0)
        arrival_ms = self.start_ms if is_host else self._draw_arrival()
        stays_until_the_end = is_host or rng.random() < 0.7
        if stays_until_the_end:
            self._attend(user_id, arrival_ms, self.end_ms, talk, leaves=rng.random() < 0.75)
            return
        # Of those who go before the end, half say so; the others just vanish.
        gone_ms = arrival_ms + int((self.end_ms - arrival_ms) * rng.uniform(0.2, 0.8))
        self._attend(user_id, arrival_ms, gone_ms, talk, leaves=rng.random() < 0.5)
        back_ms = gone_ms + rng.randrange(5_000, 120_000)
        if rng.random() < 0.5 and back_ms + SHORTEST_STAY_MS < self.end_ms:
            self._attend(user_id, back_ms, self.end_ms, talk, leaves=rng.random() < 0.75)

    def close(self) -> None:
        """The room closes, unless the workload ends first or the event never comes."""
        if self.end_ms < self.world.horizon_ms and self.rng.random() >= NEVER_CLOSED_SHARE:
            # Nobody in particular closes a room; the speaker only lends the scope.
            speaker = self.plan.stints[0].speaker
            self.plan.lifecycle.append(_lifecycle(LifecycleKind.CLOSED, self.end_ms, speaker, self.rng))

    def _draw_arrival(self) -> int:
        delay_ms = (
            int(self.rng.expovariate(1 / 15_000))
            if self.rng.random() < 0.8
            else self.rng.randrange(max(1, (self.end_ms - self.start_ms) // 2))
        )
        return self.start_ms + min(delay_ms, (self.end_ms - self.start_ms) // 2)

    def _attend(self, user_id: str, from_ms: int, until_ms: int, talk: float, leaves: bool) -> None:
        """One stint: the session starts and the user joins; goodbyes come only when somebody says them."""
        horizon_ms = self.world.horizon_ms
        if from_ms + SHORTEST_STAY_MS >= min(until_ms, horizon_ms):
            until_ms = from_ms + SHORTEST_STAY_MS
        if from_ms >= horizon_ms:
            return
        speaker = _draw_speaker(f"room/{self.room_id}", self.room_id, user_id, from_ms, self.rng)
        add = self.plan.lifecycle.append
        add(_lifecycle(LifecycleKind.SESSION_STARTED, from_ms, speaker, self.rng))
        add(_lifecycle(LifecycleKind.JOINED, from_ms, speaker, self.rng))
        speech_until_ms = min(until_ms, horizon_ms)
        self.plan.stints.append(
            Stint(speaker, self.rng.choice(self.world.nodes), from_ms, speech_until_ms, talk)
        )
        if until_ms >= horizon_ms:
            return
        if leaves:
            add(_lifecycle(LifecycleKind.LEFT, until_ms, speaker, self.rng))
        if leaves or self.rng.random() < 0.5:
            add(_lifecycle(LifecycleKind.SESSION_ENDED, until_ms, speaker, self.rng))


def _share_out(utterances: int, stints: list[Stint]) -> dict[str, int]:
    """Utterances per session id, by weight, summing to `utterances` (largest remainders get what is left)."""
    total = sum(stint.weight for stint in stints)
    if total <= 0:
        raise WorkloadError(f"nobody is there to say the {utterances} utterances")
    shares = [(stint.speaker.session_id, *divmod(utterances * stint.weight, total)) for stint in stints]
    counts = {session_id: count for session_id, count, _ in shares}
    shares.sort(key=lambda share: (-share[2], share[0]))
    for session_id, _, _ in shares[: utterances - sum(counts.values())]:
        counts[session_id] += 1
    return counts


def _speech(stint: Stint, count: int, nodes: list[Node], rng: Random) -> Iterator[Event]:
    """`count` utterances with pauses between them, stretched so that they fill the stint.

    More speech than the stint has time for overlaps, as when several clients share a session.
    """
    durations_ms = [_draw_audio_ms(rng) for _ in range(count)]
    pauses_ms = [rng.expovariate(1 / 2_500) for _ in range(count)]
    stretch = (stint.until_ms - stint.from_ms) / max(1.0, sum(durations_ms) + sum(pauses_ms) + 1_000.0)
    elapsed_ms = 0.0
    for audio_ms, pause_ms in zip(durations_ms, pauses_ms, strict=True):
        elapsed_ms += audio_ms + pause_ms
        node = rng.choice(nodes) if rng.random() < FAILOVER_SHARE else stint.node
        yield make_usage(stint.speaker, node, stint.from_ms + int(elapsed_ms * stretch), audio_ms, rng)


def _draw_audio_ms(rng: Random) -> int:
    """Median 3 s, a long tail, nothing under 0.3 s or over 30 s."""
    return int(min(30_000.0, max(300.0, rng.lognormvariate(8.0, 0.7))))


def _events_of(plan: ScopePlan, counts: dict[str, int], nodes: list[Node]) -> list[Event]:
    rng = Random(f"{plan.seed}/speech")
    events: list[Event] = list(plan.lifecycle)
    for stint in plan.stints:
        events += _speech(stint, counts[stint.speaker.session_id], nodes, rng)
    # Stable: events of one moment stay as they were made, arrivals before departures before the close.
    events.sort(key=lambda event: event.time_ms)
    return events


def _in_time_order(plans: list[ScopePlan], counts: dict[str, int], nodes: list[Node]) -> Iterator[Event]:
    """Merges the scopes. A scope is made when its first event is due, so only live scopes take memory."""
    live: list[tuple[int, int, int]] = []
    events_by_scope: dict[int, list[Event]] = {}

    def drain(until_ms: int | None) -> Iterator[Event]:
        while live and (until_ms is None or live[0][0] < until_ms):
            _, scope_number, position = heappop(live)
            events = events_by_scope[scope_number]
            yield events[position]
            if position + 1 < len(events):
                heappush(live, (events[position + 1].time_ms, scope_number, position + 1))
            else:
                del events_by_scope[scope_number]

    for scope_number, plan in enumerate(plans):
        yield from drain(plan.start_ms)
        events_by_scope[scope_number] = _events_of(plan, counts, nodes)
        heappush(live, (events_by_scope[scope_number][0].time_ms, scope_number, 0))
    yield from drain(None)
