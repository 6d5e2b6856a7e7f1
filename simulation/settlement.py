"""The settlement flow without its engine: workers, the exchange between them, epochs, and a recovery store.

`flows.settlement.decode`, `SettleScope`, `post` and `decode_commands` are the project's own; here is what Bytewax
does with them. An epoch's messages go through every step before its snapshots are committed, all at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from zlib import crc32

from flows.settlement import (
    NO_SCOPE,
    Answers,
    Desk,
    Outgoing,
    SettlementRules,
    SettleScope,
    decode,
    decode_commands,
    post,
)
from metering.cells import WINDOW_MS, window_start_ms
from metering.live import LiveScope, Located
from metering.ports import NOTHING_SEEN, WrongRedis
from schemas.decode import FUTURE_TOLERANCE_MS
from schemas.messages import RawMessage
from simulation.world import Recovery, WiredBook, World


class WrongLog(Exception):
    """The log is not the one that the recovery store knows, or has lost what is to be read next."""


@dataclass
class Worker:
    """One worker of the flow. `inbox` keeps, by sender, what the exchange brings."""

    desk: Desk
    inbox: dict[int, deque[tuple[str, list[Located]]]] = field(default_factory=dict)
    logics: dict[str, SettleScope] = field(default_factory=dict)
    due_ms: dict[str, int] = field(default_factory=dict)
    to_post: list[tuple[str, Outgoing]] = field(default_factory=list)


class Settlement:
    """A running flow. Any method may raise Died or WrongRedis; then there is nothing left of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        chance, redis, recovery = world.chance, world.redis, world.recovery
        if redis.epoch is None or redis.epoch < world.remembered_epoch:
            raise WrongRedis(f"epoch {redis.epoch}, remembered {world.remembered_epoch}")
        known_epoch, seen_entry = world.remembered_entry
        if known_epoch != redis.epoch:
            seen_entry = NOTHING_SEEN
        if redis.entries < seen_entry.number:
            raise WrongRedis(f"{redis.entries} entries, remembered {seen_entry.number}")
        world.remembered_epoch = self.epoch = redis.epoch
        self._check_log()
        self._rules = world.rules()
        count = chance.randint(1, world.most_workers)
        processes = chance.randint(1, count)
        self.books = [WiredBook(world, redis.epoch, seen_entry, f"settlement {n}") for n in range(processes)]
        for book in self.books:
            book.book.raise_fence(0)  # Tells where the fence stands, as `fence` of the real book does.
        desks = [Desk(book, Answers(), lambda: world.now_ms) for book in self.books]
        self._workers = [Worker(desks[n * processes // count]) for n in range(count)]
        self.positions = {
            partition: recovery.positions.get(partition, head)
            for partition, head in enumerate(world.log.heads)
        }
        self._heads_told = set(recovery.heads_told)
        self._command_position = recovery.commands[0]
        world.say(f"settlement starts: {count} workers, {processes} processes, at {self.positions}")
        for scope, saved in recovery.scopes.items():
            worker = self._worker_of(scope)
            worker.logics[scope] = self._logic(saved, self._rules, worker.desk)
            self._plan(worker, scope)

    def _check_log(self) -> None:
        world = self._world
        if {world.recovery.log, world.known_log} != {world.log.name}:
            raise WrongLog(f"{world.recovery.log} and {world.known_log} are known, found {world.log.name}")
        for partition, position in world.recovery.positions.items():
            if position < world.log.heads[partition]:
                raise WrongLog(f"offset {position} of partition {partition} is deleted")

    def _worker_of(self, scope: str) -> Worker:
        return self._workers[crc32(scope.encode()) % len(self._workers)]

    def _logic(self, saved: bytes | None, rules: SettlementRules, desk: Desk) -> SettleScope:
        parts = self._world.parts
        logic = parts.settle_scope(saved, rules, desk)
        if parts.live_scope is not LiveScope:
            logic.__class__ = _with_live_scope(parts.settle_scope, parts.live_scope)
            if saved is not None:
                logic._live = parts.live_scope.restore(
                    saved, rules.card, rules.presence_max_ms, rules.revision_base
                )
        return logic

    # Steps --------------------------------------------------------------------------------------------

    def unread(self, partition: int) -> int:
        """Messages of the partition that were not read."""
        return len(self._world.log.partitions[partition]) - self.positions[partition]

    def read(self, partition: int, count: int) -> None:
        """The worker that reads this partition takes a batch and sends it on."""
        world = self._world
        position = self.positions[partition]
        batch: list[RawMessage] = world.log.partitions[partition][position : position + count]
        if not batch:
            return
        reader = self._workers[partition % len(self._workers)]
        if partition not in self._heads_told:
            if batch[0].offset > 0:
                lost_until_ms = batch[0].appended_at_ms + FUTURE_TOLERANCE_MS
                reader.desk.book.raise_fence(window_start_ms(lost_until_ms) + WINDOW_MS)
            self._heads_told.add(partition)
        self.positions[partition] = batch[-1].offset + 1
        for key, decoded in decode([batch], world.card):
            if key == NO_SCOPE:
                reader.to_post.append((key, decoded))  # type: ignore[arg-type]
            else:
                inbox = self._worker_of(key).inbox
                inbox.setdefault(partition, deque()).append((key, decoded))  # type: ignore[arg-type]

    def read_commands(self, count: int) -> None:
        """Worker 0 reads the commands."""
        batch = self._world.commands[self._command_position : self._command_position + count]
        if batch:
            self._command_position = batch[-1].offset + 1
            self._workers[0].to_post += decode_commands([batch])

    def deliver(self, worker: Worker, most: int) -> None:
        """Some of what one sender sent reaches the scopes' logic, grouped by scope."""
        senders = [sender for sender, sent in worker.inbox.items() if sent]
        if not senders:
            return
        sent = worker.inbox[self._world.chance.choice(senders)]
        groups: dict[str, list[list[Located]]] = {}
        for _ in range(min(most, len(sent))):
            scope, located = sent.popleft()
            groups.setdefault(scope, []).append(located)
        for scope, values in groups.items():
            logic = worker.logics.get(scope)
            if logic is None:
                logic = worker.logics[scope] = self._logic(None, self._rules, worker.desk)
            out, discard = logic.on_batch(values)
            self._after(worker, scope, list(out), discard)

    def wake(self, worker: Worker) -> None:
        """Whoever asked to be woken by now is."""
        now_ms = self._world.now_ms
        for scope in [scope for scope, due_ms in worker.due_ms.items() if due_ms <= now_ms]:
            out, discard = worker.logics[scope].on_notify()
            self._after(worker, scope, list(out), discard)

    def _after(self, worker: Worker, scope: str, out: list[Outgoing], discard: bool) -> None:
        worker.to_post += [(scope, item) for item in out]
        if discard:
            self._world.say(f"{scope} is forgotten")
            self._world.forgotten.add(scope)
            del worker.logics[scope]
            worker.due_ms.pop(scope, None)
        else:
            self._plan(worker, scope)

    def _plan(self, worker: Worker, scope: str) -> None:
        at = worker.logics[scope].notify_at()
        if at is None:
            worker.due_ms.pop(scope, None)
        else:
            worker.due_ms[scope] = round(at.timestamp() * 1000)

    def post(self, worker: Worker, most: int) -> None:
        """The step `post` works off what is queued."""
        items, worker.to_post = worker.to_post[:most], worker.to_post[most:]
        if items:
            for _ in post(items, worker.desk):
                self._world.reach("settlement: dead letter")

    def commit(self) -> None:
        """End the epoch: everything goes through, then every snapshot and position is committed in one step."""
        world = self._world
        for worker in self._workers:
            while any(worker.inbox.values()):
                self.deliver(worker, 1_000)
        recovery = Recovery(
            world.log.name,
            dict(self.positions),
            set(self._heads_told),
            {
                scope: logic.snapshot()
                for worker in self._workers
                for scope, logic in sorted(worker.logics.items())
            },
            [*world.recovery.commands, self._command_position][-world.parts.commands_reread - 1 :],
        )
        if world.parts.commit_before_post:
            world.recovery = recovery
        for worker in self._workers:
            while worker.to_post:
                self.post(worker, 1_000)
        world.reach("settlement: before commit")
        world.recovery = recovery
        world.commits += 1
        world.say(f"committed at {recovery.positions}, commands {recovery.commands}")
        world.reach("settlement: after commit")

    def step(self) -> None:
        """Something of all this, by chance."""
        chance = self._world.chance
        worker = chance.choice(self._workers)
        roll = chance.random()
        if roll < 0.35:
            self.read(chance.randrange(len(self.positions)), chance.choice([1, 2, 5, 20]))
        elif roll < 0.40:
            self.read_commands(chance.randint(1, 3))
        elif roll < 0.65:
            self.deliver(worker, chance.choice([1, 2, 10]))
        elif roll < 0.72:
            self.wake(worker)
        elif roll < 0.89:
            self.post(worker, chance.choice([1, 3, 50]))
        elif roll < 0.90:
            worker.desk.book.compact_requests(chance.choice([0, 60_000]))
            worker.desk.book.expire_grants()
        else:
            self.commit()

    def remember(self) -> None:
        """What the state directory is told at each turn of the keeper of the fence."""
        seen_entry = max(book.seen_entry for book in self.books)
        self._world.remembered_entry = (self.epoch, seen_entry)

    # At rest ------------------------------------------------------------------------------------------

    def drain(self) -> bool:
        """Work off whatever there is, in small pieces or large ones; False when there was nothing to do."""
        world, chance = self._world, self._world.chance
        busy = False
        for book in self.books:
            book.raise_fence(
                0
            )  # The keeper's next turn: a Redis that went back is noticed by it, if by nothing else.
        at_once = chance.choice([1, 4, 50])
        while behind := [partition for partition in self.positions if self.unread(partition)]:
            busy = True
            self.read(chance.choice(behind), at_once)
            if at_once < 50:
                world.now_ms += chance.choice([0, world.emit_interval_ms])
                self._pass_on()
        while self._command_position < len(world.commands):
            busy = True
            self.read_commands(50)
        return self._pass_on() or busy

    def _pass_on(self) -> bool:
        """Everything that was read reaches the balances; False when there was nothing to do."""
        busy = False
        for worker in self._workers:
            while any(worker.inbox.values()):
                self.deliver(worker, 50)
            self.wake(worker)
            while worker.to_post:
                busy = True
                self.post(worker, 50)
        return busy

    def live_scopes(self) -> list[LiveScope]:
        """The state machines, for whoever looks on."""
        logics = [logic for worker in self._workers for logic in worker.logics.values()]
        return [logic._live for logic in logics if logic._live is not None]


_variants: dict[tuple[type[SettleScope], type[LiveScope]], type[SettleScope]] = {}


def _with_live_scope(settle_scope: type[SettleScope], live_scope: type[LiveScope]) -> type[SettleScope]:
    """The logic around another state machine, as a planted bug needs it."""

    class Variant(settle_scope):  # type: ignore[misc, valid-type]
        _live: LiveScope | None

        def _listen(self, scope: str) -> LiveScope:
            if self._live is None:
                rules = self._rules
                self._live = live_scope(scope, rules.card, 0, rules.presence_max_ms, rules.revision_base)
            found: LiveScope = super()._listen(scope)
            return found

    return _variants.setdefault((settle_scope, live_scope), Variant)
