"""The other processes: the ledger flow, the usage store flow, resettles, rebuilds."""

from __future__ import annotations

from collections.abc import Generator
from typing import NoReturn

from flows.usage_store import rows
from metering.outbox import Continuity, OutboxEntry
from metering.ports import NOTHING_SEEN, SeenEntry, WrongRedis
from metering.rebuild import Rebuilt, rebuild
from metering.resettle import Resettled
from metering.resettle import Step as ResettleStep
from metering.write_off import Run as WriteOffRun
from metering.write_off import write_off
from schemas.messages import OutboxMessage
from simulation.workload import MINUTE_MS
from simulation.world import (
    LogEnds,
    WiredBook,
    WiredEmptyBook,
    WiredJournal,
    WiredOutbox,
    WiredStore,
    WiredWriteOffBook,
    World,
)
from sources.timer import period_start_ms


class Ledger:
    """The ledger flow: the outbox from its head, as `sources.outbox` reads it, into the flow's own writer."""

    def __init__(self, world: World) -> None:
        self._world = world
        redis = world.redis
        if redis.epoch is None or redis.epoch < world.remembered_epoch:
            raise WrongRedis(f"epoch {redis.epoch}, remembered {world.remembered_epoch}")
        number, at_ms = world.archive.last_entry()
        self._book = WiredBook(world, redis.epoch, NOTHING_SEEN, "ledger")
        if world.parts.ledger_notes_what_it_finds:
            self._book.note_stored(number)
        self._book.check_reached(number)
        self._continuity = Continuity(number, at_ms)
        self._writer = world.parts.journal_sink(WiredJournal(world), WiredOutbox(self._book)).build("", 0, 1)
        # The twin keeps entries as they were parsed when they were written.
        self._writer._read = self._entry  # type: ignore[method-assign]
        self._read: dict[bytes, OutboxEntry] = {}
        self._last_at_ms = 0
        world.say(f"ledger starts, {number} is stored")

    def step(self, most: int) -> bool:
        """One batch; False when there is none."""
        world = self._world
        # An entry's id in the stream is its time: no two calls happen in one millisecond here.
        batch = [entry for entry in world.redis.outbox if entry.at_ms > self._last_at_ms]
        batch = batch[: min(most, world.parts.ledger_batch)]
        if not batch:
            return False
        if ahead := self._looks_ahead(batch[-1].number):
            outbox = ((entry.number, entry.at_ms) for entry in world.redis.outbox)
            problem = self._continuity.check_ahead(
                next((found for found in outbox if found[0] >= ahead), None)
            )
            if problem is not None:
                self._condemn(problem)
        for entry in batch:
            problem = self._continuity.check(entry.number, entry.at_ms)
            if problem is not None:
                self._condemn(problem)
        self._last_at_ms = batch[-1].at_ms
        self._read = {b"%d" % entry.number: entry for entry in batch}
        self._writer.write_batch([[OutboxMessage(entry_id, {}) for entry_id in self._read]])
        return True

    def _looks_ahead(self, number: int) -> int:
        return self._continuity.looks_ahead(number) if self._world.parts.ledger_looks_ahead else 0

    def _entry(self, message: OutboxMessage) -> OutboxEntry:
        return self._read[message.entry_id]

    def _condemn(self, why: str) -> NoReturn:
        if self._world.redis.epoch == self._book.book.expected_epoch:
            self._world.redis.epoch = None
        raise WrongRedis(why)


class UsageFlow:
    """The usage store flow; its recovery store knows its place in each partition."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._positions = {
            partition: world.usage_position.get(partition, head)
            for partition, head in enumerate(world.log.heads)
        }
        self._writer = world.parts.store_sink(WiredStore(world)).build("", 0, 1)

    def step(self, most: int) -> bool:
        """A batch of some partition; False when there is none."""
        world = self._world
        behind = [
            partition
            for partition, position in self._positions.items()
            if position < len(world.log.partitions[partition])
        ]
        if not behind:
            return False
        partition = world.chance.choice(behind)
        position = self._positions[partition]
        batch = world.log.partitions[partition][position : position + most]
        self._writer.write_batch(list(rows([batch], world.card)))
        self._positions[partition] = batch[-1].offset + 1
        if world.chance.random() < 0.5:
            self.commit()
        return True

    def commit(self) -> None:
        """End the epoch."""
        self._world.reach("usage: before commit")
        self._world.usage_position = dict(self._positions)


class Run:
    """A resettle under way, as a process of its own."""

    def __init__(self, world: World, since_ms: int | None, name: str) -> None:
        self._world = world
        redis = world.redis
        if redis.epoch is None:
            raise WrongRedis("no epoch")
        known_epoch, seen_entry = world.remembered_entry
        self.book = WiredBook(
            world, redis.epoch, seen_entry if known_epoch == redis.epoch else NOTHING_SEEN, name
        )
        self.abandoned = False
        self.name = name
        self._steps: Generator[ResettleStep, None, Resettled] = world.parts.resettle(
            self.book,
            world.archive,
            LogEnds(world),
            world.card,
            presence_max_ms=world.presence_max_ms,
            since_ms=since_ms,
        )

    def step(self) -> Resettled | None:
        """On to the next boundary; the result at the end."""
        try:
            step = next(self._steps)
        except StopIteration as stop:
            found: Resettled = stop.value
            self._world.say(f"{self.name}: {found}")
            return found
        self._world.say(f"{self.name}: {step}")
        self._world.reach(f"resettle: {step}")
        return None


class Rebuilding:
    """A rebuild under way."""

    def __init__(self, world: World) -> None:
        self._world = world
        chance = world.chance
        self._steps: Generator[object, None, Rebuilt] = rebuild(
            WiredEmptyBook(world),
            world.archive,
            LogEnds(world),
            lambda epoch, seen_entry: WiredBook(world, epoch, SeenEntry(seen_entry), "rebuild"),
            world.valid_commands,
            remembered_epoch=world.remembered_epoch,
            now_ms=lambda: world.now_ms,
            tired_of_waiting=lambda: chance.random() < 0.1,
        )

    def step(self) -> Rebuilt | None:
        """On to the next boundary; the result at the end."""
        try:
            step = next(self._steps)
        except StopIteration as stop:
            found: Rebuilt = stop.value
            self._world.say(f"rebuild: {found}")
            return found
        self._world.say(f"rebuild: {step}")
        self._world.reach(f"rebuild: {step}")
        return None


class WritingOff:
    """A run of write-offs, as a process of its own."""

    def __init__(self, world: World) -> None:
        self._world = world
        chance = world.chance
        redis, epoch = world.redis, world.redis.epoch

        def balances(prefix: str) -> dict[str, int]:
            if redis.epoch is None or redis.epoch != epoch:
                raise WrongRedis("no epoch, or another")
            return {
                name.removeprefix(prefix): account.balance_us
                for name, account in redis.accounts.items()
                if name.startswith(prefix)
            }

        self._steps: Generator[object, None, WriteOffRun] = write_off(
            period_start_ms(world.now_ms, 30 * MINUTE_MS),
            WiredWriteOffBook(world),
            lambda: {user: us for user, us in balances("user/").items() if us < 0},
            lambda _: balances("node/"),
            lambda transfers: world.call("write-off: send", lambda: world.send_transfers(transfers)),
            world.archive.results,
            tired_of_waiting=lambda: chance.random() < 0.05,
        )

    def step(self) -> WriteOffRun | None:
        """On to the next boundary; the result at the end."""
        try:
            step = next(self._steps)
        except StopIteration as stop:
            found: WriteOffRun = stop.value
            self._world.say(f"write-off: {found}")
            return found
        self._world.say(f"write-off: {step}")
        self._world.reach(f"write-off: {step}")
        return None
