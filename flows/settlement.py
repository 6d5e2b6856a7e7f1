"""The settlement flow: events and money commands become balance changes in Redis, and nothing else does.

    events ---> decode ---> settle (state per scope) --+
                   |                                   +--> post (Redis) ---> dead letters (Kafka)
    commands -> decode commands -----------------------+

Order of effects, and what a crash between two of them causes:

1. *Posted, not snapshotted.* The flow comes back with an older state and reads the same messages again, in
   other batches. Its first postings have lower revisions and are answered OLDER, which leaves those cells
   dirty; when it has caught up, an equal revision with an equal vector changes nothing. Commands are answered
   with their first result. Nothing is charged twice.
2. *Snapshotted, not posted.* Cannot be: Bytewax commits an epoch after every step, `post` included, has
   worked off its items. What was held back to coalesce is dirty in the snapshot; after a restart every live
   cell is dirty and goes out.
3. *Dead letter produced, not snapshotted.* It is produced again; its identity (topic, log, partition, offset) is
   the same, and the archive replaces.
4. *Posted, answer lost.* `post` calls again, with the same revision and vector: nothing changes.
5. *Answered OLDER or OVER_LIMIT, answer lost in a crash.* All live cells are dirty after the restart.

Answers travel back from `post` to the scopes through `Answers`, in memory: both steps of a scope run on the
same worker, since nothing in between re-keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import bytewax.operators as op
import msgspec
from bytewax.dataflow import Dataflow
from bytewax.inputs import Source
from bytewax.operators import KeyedStream, StatefulBatchLogic
from bytewax.outputs import Sink

from flows.intake import accept_batch, dead_letter
from metering.commands import CommandOutcome
from metering.identity import partition_and_offset
from metering.live import Answer, Displaced, Emission, LiveScope, Located, Outcome
from metering.ports import BalanceBook
from schemas.commands import Command
from schemas.decode import check_append_time, decode_command
from schemas.events import Usage
from schemas.messages import RawMessage
from schemas.rate_card import RateCard
from schemas.records import DeadLetter
from schemas.rejections import Rejected, RejectReason
from telemetry import faults, metrics

FLOW = "settlement"
NO_SCOPE = ""
"""Key of what has no scope: dead letters and commands."""

LOOK_AFTER_WINDOWS = timedelta(seconds=60)
"""How often a silent scope looks whether the fence has passed its windows."""


Refused = DeadLetter | Displaced


class AcceptedCommand(msgspec.Struct, frozen=True, gc=False):
    """A valid money command and the message that it came in."""

    command: Command
    message: RawMessage


Outgoing = Emission | AcceptedCommand | Refused
Decoded = list[Located] | DeadLetter


@dataclass(frozen=True)
class SettlementRules:
    """What the flow needs to know; times in ms."""

    card: RateCard
    presence_max_ms: int
    idle_timeout_ms: int
    emit_interval_ms: int
    revision_base: int = 0
    """Of the log that is read: see `metering.live`."""


class Answers:
    """What `post` was told and the scopes have yet to hear; only what is not POSTED is kept."""

    def __init__(self) -> None:
        self._by_scope: dict[str, list[tuple[int, int, Answer]]] = {}

    def tell(self, scope: str, window_start: int, revision: int, answer: Answer) -> None:
        """Leave an answer for the scope."""
        self._by_scope.setdefault(scope, []).append((window_start, revision, answer))

    def hear(self, scope: str) -> list[tuple[int, int, Answer]]:
        """Take the scope's answers."""
        return self._by_scope.pop(scope, [])


@dataclass(frozen=True)
class Desk:
    """What the steps of one process share: the book, the answers, the clock (ms since the epoch)."""

    book: BalanceBook
    answers: Answers
    now_ms: Callable[[], int]


class SettleScope(StatefulBatchLogic[list[Located], Outgoing, bytes]):
    """Wires one scope's state machine to Bytewax: time, answers, snapshots."""

    def __init__(self, saved: bytes | None, rules: SettlementRules, desk: Desk) -> None:
        # Bytewax tells a new logic no key: the first event says which scope it is.
        self._live: LiveScope | None = None
        if saved is not None:
            self._live = LiveScope.restore(saved, rules.card, rules.presence_max_ms, rules.revision_base)
        self._rules = rules
        self._desk = desk
        self._last_emission_ms = 0
        # Silence is counted from a restart on: during an outage nobody could be heard.
        self._last_event_ms = desk.now_ms()
        metrics.LIVE_SCOPES.inc()

    def on_batch(self, values: list[list[Located]]) -> tuple[Iterable[Outgoing], bool]:
        """Apply events, then emit if the last emission is long enough ago."""
        live = self._listen(values[0][0].event.scope)
        out: list[Outgoing] = []
        duplicates = late = 0
        for group in values:
            for located in group:
                outcome = live.apply(located)
                if outcome is Outcome.APPLIED:
                    continue
                if outcome is Outcome.DUPLICATE:
                    duplicates += 1
                elif outcome is Outcome.LATE:
                    late += 1
                elif outcome is Outcome.CONFLICT:
                    detail = f"id {located.event.id!r} of {located.event.source!r} is taken"
                    out.append(dead_letter(located.message, RejectReason.IDENTITY_CONFLICT, detail))
                else:
                    out.append(Displaced(*partition_and_offset(live.displaced)))
        if duplicates:
            metrics.DUPLICATES.labels(FLOW).inc(duplicates)
        if late:
            metrics.LATE.labels(FLOW).inc(late)
        now = self._desk.now_ms()
        self._last_event_ms = now
        return self._emit(live, now, out)

    def on_notify(self) -> tuple[Iterable[Outgoing], bool]:
        """Something is due: a held-back emission, silence, or windows that the fence has passed."""
        live = self._live
        assert live is not None, "woken before the first event"
        return self._emit(self._listen(live.scope), self._desk.now_ms(), [])

    def on_eof(self) -> tuple[Iterable[Outgoing], bool]:
        """A bounded input (a test's) is over: there is nothing more to wait for."""
        self._last_emission_ms = 0
        return self.on_notify()

    def _listen(self, scope: str) -> LiveScope:
        if self._live is None:
            rules = self._rules
            self._live = LiveScope(scope, rules.card, 0, rules.presence_max_ms, rules.revision_base)
        live = self._live
        live.raise_fence(self._desk.book.known_fence_ms)
        for window_start, revision, answer in self._desk.answers.hear(live.scope):
            live.answer(window_start, revision, answer)
        return live

    def _emit(self, live: LiveScope, now: int, out: list[Outgoing]) -> tuple[Iterable[Outgoing], bool]:
        silent = live.open and now - self._last_event_ms >= self._rules.idle_timeout_ms
        waited = now - self._last_emission_ms >= self._rules.emit_interval_ms
        if silent or (waited and live.emission_due()):
            emission = live.emit(silent=silent)
            if emission is not None:
                out.append(emission)
                self._last_emission_ms = now
        discard = live.forgettable
        if discard:
            metrics.LIVE_SCOPES.dec()
        return out, discard

    def notify_at(self) -> datetime | None:
        """The next time to wake, by the clock and never in the past, whatever the events' times say."""
        live = self._live
        if live is None:
            return None
        now = self._desk.now_ms()
        wake = now + int(LOOK_AFTER_WINDOWS.total_seconds() * 1000)
        if live.open:
            wake = min(wake, self._last_event_ms + self._rules.idle_timeout_ms)
        if live.emission_due():
            wake = min(wake, self._last_emission_ms + self._rules.emit_interval_ms)
        return datetime.fromtimestamp(max(wake, now + 1) / 1000, UTC)

    def snapshot(self) -> bytes:
        """Bytes, because Bytewax keeps what it gets for a while and the state goes on changing."""
        assert self._live is not None, "snapshot before the first event"
        return self._live.snapshot()


def decode(batches: list[list[RawMessage]], card: RateCard) -> Iterable[tuple[str, Decoded]]:
    """Accepted events grouped by scope, in the order of the log; refused messages as dead letters."""
    for batch in batches:
        accepted, refused = accept_batch(batch, card)
        usage = 0
        groups: dict[str, list[Located]] = {}
        for located in accepted:
            event = located.event
            usage += type(event) is Usage
            group = groups.get(event.scope)
            if group is None:
                groups[event.scope] = [located]
            else:
                group.append(located)
        metrics.EVENTS.labels(FLOW, "usage").inc(usage)
        metrics.EVENTS.labels(FLOW, "lifecycle").inc(len(accepted) - usage)
        yield from groups.items()
        for message, rejected in refused:
            yield NO_SCOPE, dead_letter(message, rejected.reason, rejected.detail)


def decode_commands(batches: list[list[RawMessage]]) -> Iterable[tuple[str, Outgoing]]:
    """Valid commands, and the rest as dead letters."""
    for batch in batches:
        for message in batch:
            try:
                command = decode_command(message.value)
                check_append_time(command.time_ms, message.appended_at_ms)
            except Rejected as rejected:
                yield NO_SCOPE, dead_letter(message, rejected.reason, rejected.detail)
            else:
                yield NO_SCOPE, AcceptedCommand(command, message)


def post(items: list[tuple[str, Outgoing]], desk: Desk) -> Iterable[Refused]:
    """Move the money, in one script call for many cells; hand on what is refused."""
    emissions: list[Emission] = []
    for _, item in items:
        if isinstance(item, Emission):
            emissions.append(item)
        elif isinstance(item, AcceptedCommand):
            yield from _carry_out(item, desk)
        else:
            yield item
    if emissions:
        _post_emissions(emissions, desk)


def _post_emissions(emissions: list[Emission], desk: Desk) -> None:
    answers = desk.book.post(emissions)
    faults.reach(faults.AFTER_REDIS_SCRIPT)
    now = desk.now_ms()
    for emission, said in zip(emissions, answers, strict=True):
        for cell, answer in zip(emission.cells, said, strict=True):
            metrics.POSTINGS.labels(answer.name).inc()
            if answer is not Answer.POSTED:
                desk.answers.tell(emission.scope, cell.window_start_ms, cell.revision, answer)
        metrics.EVENT_TO_BALANCE.observe_since(emission.appended_at_ms, now)


def _carry_out(accepted: AcceptedCommand, desk: Desk) -> Iterable[DeadLetter]:
    command = accepted.command
    result = desk.book.apply_command(command)
    metrics.COMMANDS.labels(result.outcome.name).inc()
    if result.outcome is CommandOutcome.CONFLICT:
        detail = f"request_id {command.request_id} was carried out before with another body"
        yield dead_letter(accepted.message, RejectReason.REQUEST_CONFLICT, detail)
    elif result.outcome is CommandOutcome.OVER_LIMIT:
        detail = f"amount_us: {command.amount_us} would take {command.account} out of its range"
        yield dead_letter(accepted.message, RejectReason.OUT_OF_RANGE, detail)
    # INSUFFICIENT is an answer, not a fault of the message: whoever asked finds it under the request id.


def build_flow(
    events: Source[list[RawMessage]],
    commands: Source[list[RawMessage]],
    refused: Sink[Refused],
    book: BalanceBook,
    rules: SettlementRules,
    now_ms: Callable[[], int],
) -> Dataflow:
    """The flow. `refused` takes what is to become a dead letter; `book` is called by the step `post`."""
    desk = Desk(book, Answers(), now_ms)
    flow = Dataflow(FLOW)
    decoded = op.flat_map_batch(
        "decode", op.input("events", flow, events), lambda batches: decode(batches, rules.card)
    )
    sorted_out = op.branch("accepted", decoded, lambda item: item[0] != NO_SCOPE)
    # What `branch` parts, its types do not tell apart.
    accepted: KeyedStream[list[Located]] = sorted_out.trues  # type: ignore[assignment]
    refused_early: KeyedStream[Outgoing] = sorted_out.falses  # type: ignore[assignment]
    settled = op.stateful_batch("settle", accepted, lambda saved: SettleScope(saved, rules, desk))
    taken = op.flat_map_batch("decode_commands", op.input("commands", flow, commands), decode_commands)
    to_post = op.merge("to_post", settled, taken, refused_early)
    op.output("dead_letters", op.flat_map_batch("post", to_post, lambda items: post(items, desk)), refused)
    return flow
