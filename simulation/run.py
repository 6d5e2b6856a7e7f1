"""One seed: what happens in which order, and when everything has to come to rest and be right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from flows.settlement import LOOK_AFTER_WINDOWS
from metering.cells import WINDOW_MS, window_start_ms
from metering.ports import WrongRedis
from metering.resettle import Resettled
from schemas.events import Lifecycle
from schemas.topics import EVENTS
from simulation import checks
from simulation.checks import Cells
from simulation.others import Ledger, Rebuilding, Run, UsageFlow, WritingOff
from simulation.parts import Parts
from simulation.settlement import Settlement, WrongLog
from simulation.workload import HOUR_MS, MINUTE_MS
from simulation.world import Died, Recovery, Violation, World
from sinks.balances_memory import MemoryRedis

LOOK_AFTER_WINDOWS_MS = round(LOOK_AFTER_WINDOWS.total_seconds() * 1000)
MOST_RUNS = 3
MOST_COPIES = 3
MOST_COMMITS_LOST = 2
"""By an append-only file that loses its end. The flow goes further back in the topic of commands: more commits may
follow before anybody notices."""
TURNS_AT_REST = 400
PATIENCE = 20
"""Steps of an old resettle at the end: one that waits for a log which is not read any more waits for ever."""


@dataclass(frozen=True)
class Outcome:
    """What became of a seed. `violation` is None when all was right."""

    seed: int
    violation: str | None
    events: int
    died: Counter[str]
    coverage: Counter[str]


def simulate(seed: int, parts: Parts | None = None, tell: Callable[[str], None] | None = None) -> Outcome:
    """Run one seed to its end."""
    simulation = Simulation(seed, parts or Parts(), tell)
    violation = None
    try:
        simulation.run()
    except Violation as found:
        violation = str(found)
    except Exception as error:
        # Whatever the code raises that the simulated process would die of for ever.
        if tell is not None:
            raise
        violation = f"{type(error).__name__}: {error}"
    world = simulation.world
    return Outcome(seed, violation, len(world.occurrences), world.points, simulation.coverage)


class Simulation:
    """The processes of one world, and an operator who starts what has died."""

    def __init__(self, seed: int, parts: Parts, tell: Callable[[str], None] | None) -> None:
        self.world = World(seed, parts, tell)
        self.coverage: Counter[str] = Counter()
        self._settlement: Settlement | None = None
        self._ledger: Ledger | None = None
        self._usage: UsageFlow | None = None
        self._rebuild: Rebuilding | None = None
        self._runs: list[Run] = []
        self._writing_off: WritingOff | None = None
        self._at_last_rest: Cells = {}
        self._quiet_since = 0
        self._lost_since = False
        self._charged_twice: set[str] = set()
        """Scopes in which that may happen to ids that were used twice."""
        self._looked = False
        """Whether the ledger was started anew to look at a Redis that came back without its end."""
        self._calm = False
        """Nobody says anything new: for what must not change by itself."""

    def run(self) -> None:
        """The whole story."""
        world, chance = self.world, self.world.chance
        events = chance.choice([12, 30, 60, 100])
        rests = chance.choice([0, 1, 2, 4])
        while len(world.occurrences) < events:
            self._turn()
            if world.maybe(rests / events / 4):
                self.rest()
                if world.maybe(0.4):
                    self._calm = True
                    for _ in range(chance.randint(5, 25)):
                        self._turn()
                    self._calm = False
                    self.rest()
        self.rest()
        self.last_resettle()

    def _turn(self) -> None:
        """Something happens."""
        world, chance = self.world, self.world.chance
        world.now_ms += chance.choice([0, 1, 30, 500, 3_000])
        turns: list[tuple[int, Callable[[], None]]] = [
            (35, self._settle),
            (10, self._keep_ledger),
            (10, self._keep_usage),
            (4, self._keep_fence),
            (9, self._repair),
            (2, self._let_time_pass),
            (2, world.land),
            (4, self._misfortune),
            (22, self._say_something),
            (3, world.append_command),
            (2, self._write_off),
        ]
        if self._calm:
            del turns[-3:]
        (do,) = chance.choices([do for _, do in turns], [weight for weight, _ in turns])
        if do == self._keep_ledger and world.maybe(world.troubles.ledger_away):
            return
        if do == self._keep_usage and world.maybe(world.troubles.usage_away):
            return
        self._alive(do)

    def _say_something(self) -> None:
        for _ in range(self.world.chance.choice([1, 1, 3])):
            self.world.append_event()

    def _let_time_pass(self) -> None:
        self.world.now_ms += self.world.chance.choice([MINUTE_MS, 10 * MINUTE_MS, HOUR_MS])

    def _alive(self, do: Callable[[], None]) -> None:
        """What raises Died or WrongRedis is gone; `do` says who."""
        try:
            do()
        except Died:
            pass
        except WrongRedis as error:
            self.world.say(f"refused: {error}")

    def _is_refused(self) -> bool:
        """Whether flows refuse this Redis at their start, or a rebuild has begun: then an operator runs one."""
        world = self.world
        epoch, (known_epoch, known_entry) = world.redis.epoch, world.remembered_entry
        return (
            self._rebuild is not None
            or epoch is None
            or epoch < world.remembered_epoch
            or (epoch == known_epoch and world.redis.entries < known_entry.number)
        )

    # Processes ----------------------------------------------------------------------------------------

    def _settle(self) -> None:
        settlement, self._settlement = self._settlement, None
        if settlement is None:
            settlement = self._start_settlement()
        for _ in range(self.world.chance.choice([1, 4, 12])):
            settlement.step()
        self._settlement = settlement

    def _start_settlement(self) -> Settlement:
        try:
            return Settlement(self.world)
        except WrongLog as error:
            self.world.say(f"refused: {error}")
            self._adopt_log()
            return Settlement(self.world)

    def _keep_ledger(self) -> None:
        ledger, self._ledger = self._ledger, None
        if ledger is None:
            ledger = Ledger(self.world)
        ledger.step(self.world.chance.choice([1, 2, 5, 100]))
        self._ledger = ledger

    def _keep_usage(self) -> None:
        usage, self._usage = self._usage, None
        if usage is None:
            usage = UsageFlow(self.world)
        usage.step(self.world.chance.choice([1, 3, 10, 100]))
        self._usage = usage

    def _keep_fence(self) -> None:
        """The keeper of the fence is a thread of settlement: when it dies all of settlement does."""
        world, chance = self.world, self.world.chance
        settlement, self._settlement = self._settlement, None
        if settlement is None:
            settlement = self._start_settlement()
        fence_ms = world.now_ms - chance.choice([MINUTE_MS, 30 * MINUTE_MS, 2 * HOUR_MS])
        if world.maybe(world.troubles.wild_fence):
            fence_ms = world.now_ms + chance.randrange(-24 * HOUR_MS, HOUR_MS)
        chance.choice(settlement.books).raise_fence(window_start_ms(fence_ms))
        settlement.remember()
        self._settlement = settlement

    def _repair(self) -> None:
        if self._is_refused():
            self._go_on_rebuilding()
        else:
            self._go_on_resettling()

    def _go_on_rebuilding(self) -> bool:
        """The next step of the rebuild; flows do not start meanwhile. True when it is done."""
        rebuild, self._rebuild = self._rebuild, None
        if rebuild is None:
            rebuild = Rebuilding(self.world)
            self._settlement = self._ledger = None
        if rebuild.step() is None:
            self._rebuild = rebuild
            return False
        self._lost_since = True
        return True

    def _go_on_resettling(self) -> None:
        """Some steps of a resettle, new or old, which may be one that is void by now."""
        world, chance, troubles = self.world, self.world.chance, self.world.troubles
        active = [run for run in self._runs if not run.abandoned]
        if len(self._runs) < MOST_RUNS and (not active or world.maybe(troubles.race)):
            since_ms = None
            if chance.random() < 0.15:
                since_ms = window_start_ms(world.now_ms - chance.randrange(24 * HOUR_MS))
            run = Run(world, since_ms, f"resettle {world.redis.token + 1}")
            self._runs.append(run)
        else:
            run = chance.choice(self._runs)
        for _ in range(chance.choice([1, 2, 6])):
            if chance.random() < 0.5:
                if not world.maybe(troubles.usage_away):
                    self._alive(self._keep_usage)
                if not world.maybe(troubles.ledger_away):
                    self._alive(self._keep_ledger)
            if self._step_run(run) is not None:
                return
        if world.maybe(troubles.abandon):
            run.abandoned = True

    def _step_run(self, run: Run) -> Resettled | None:
        self._runs.remove(run)
        done = run.step()
        if done is None:
            self._runs.append(run)
        return done

    def _write_off(self) -> None:
        run, self._writing_off = self._writing_off, None
        if run is None:
            run = WritingOff(self.world)
        for _ in range(self.world.chance.choice([1, 2, 6])):
            if run.step() is not None:
                return
        self._writing_off = run

    # Misfortune ---------------------------------------------------------------------------------------

    def _misfortune(self) -> None:
        world, chance = self.world, self.world.chance
        troubles = world.troubles
        if chance.random() < 0.4 and len(world.copies) < MOST_COPIES:
            world.copies.append((world.copy_redis(), world.commits))
            return
        roll = chance.random()
        for share, what in (
            (troubles.wipe, self._wipe),
            (troubles.roll_back, self._roll_back),
            (troubles.lost_store, self._lose_store),
            (troubles.truncation, self._truncate),
            (troubles.adoption, self._make_topic_anew),
        ):
            if roll < share:
                what()
                return
            roll -= share
        if roll < 0.1:
            world.say("settlement killed")
            self._settlement = None
        elif roll < 0.15:
            world.say("ledger killed")
            self._ledger = None
        elif roll < 0.2:
            world.say("usage store flow killed")
            self._usage = None

    def _wipe(self) -> None:
        world = self.world
        world.say("Redis is wiped")
        world.points["Redis wiped"] += 1
        world.become(MemoryRedis(epoch=None))
        self._lost_since = True

    def _roll_back(self) -> None:
        """Redis comes back as it was; sometimes everybody else is started anew at the same time."""
        world, chance = self.world, self.world.chance
        if not world.copies or world.redis.epoch is None:
            return
        copy, commits = world.copies.pop(chance.randrange(len(world.copies)))
        if copy.epoch != world.redis.epoch:
            return
        lost = world.redis.entries - copy.entries
        # What only processes have seen nobody knows any more once they die before their next call.
        known_to_be_lost = world.archive.last_entry()[0] > copy.entries
        if not known_to_be_lost and world.commits - commits > MOST_COMMITS_LOST:
            # An append-only file loses seconds. An old copy is put back by somebody who knows, and rebuilds.
            return
        if chance.random() < 0.3:
            world.say("power failure: everybody is started anew")
            self._settlement = self._ledger = self._usage = self._rebuild = None
            self._runs.clear()
        world.say(f"Redis is rolled back by {lost} entries to {copy.entries}")
        world.points["Redis rolled back"] += 1
        world.become(copy)
        self._lost_since = True
        if known_to_be_lost:
            world.must_notice = True
        elif lost < 0:
            # It took the place of an older one, before anybody looked at that.
            world.must_notice = False

    def _lose_store(self) -> None:
        world = self.world
        if world.chance.random() < 0.3:
            world.say("the usage store's recovery store is lost")
            world.usage_position = {}
            self._usage = None
            return
        world.say("the settlement's recovery store is lost")
        world.points["recovery store lost"] += 1
        self._settlement = None
        # What is read again below the fence is not remembered, nor that its id is taken: whatever used that again
        # is charged, until it freezes and a resettle looks at it.
        self._charged_twice |= world.producers.conflicting_scopes
        self._forget_heads()
        world.recovery = Recovery(world.log.name)

    def _forget_heads(self) -> None:
        """Membership that is deleted cannot be read again."""
        world = self.world
        for partition, head in enumerate(world.log.heads):
            if head:
                self._lost_since = True
            self._forgetful(partition, head)

    def _forgetful(self, partition: int, head: int) -> None:
        world = self.world
        for of_partition, offset, located in world.occurrences:
            if located.message.log == world.log.name and of_partition == partition and offset < head:
                world.forgetful.add(located.event.scope)

    def _truncate(self) -> None:
        """The broker deletes what the usage store has stored; a message is left in each partition."""
        world, chance = self.world, self.world.chance
        log = world.log
        stored = world.usage_store.stored_offsets(EVENTS, log.name)
        for partition, messages in enumerate(log.partitions):
            most = min(stored.get(partition, 0), world.usage_position.get(partition, 0), len(messages) - 1)
            if most > log.heads[partition] and chance.random() < 0.7:
                log.heads[partition] = chance.randint(log.heads[partition], most)
        world.say(f"the log begins at {log.heads}")
        world.points["log truncated"] += 1
        self._settlement = None

    def _make_topic_anew(self) -> None:
        """Only once the usage store has everything: what nobody stored is lost for everybody."""
        world = self.world
        self._settlement = None
        self._drain_usage()
        world.replace_log()
        world.usage_position = {}
        self._usage = None
        world.say(f"the topic is made anew with {len(world.log.partitions)} partitions")
        world.points["topic made anew"] += 1

    def _drain_usage(self) -> None:
        faults, self.world.faults = self.world.faults, False
        usage = self._usage or UsageFlow(self.world)
        while usage.step(100):
            pass
        usage.commit()
        self._usage = usage
        self.world.faults = faults

    def _adopt_log(self) -> None:
        """What `app.adopt_log` does: freeze what the old log touched, and start without a state."""
        world = self.world
        redis = world.redis
        if redis.epoch is None:
            raise WrongRedis("no epoch")
        windows = [start for start, _ in redis.cells.values()]
        windows += [row.window_start_ms for row in world.usage_store.stored_usage()]
        if windows:
            book = world.parts.book(redis.epoch, world.book_now_ms, redis)
            world.now_ms += 1
            book.raise_fence(max(windows) + WINDOW_MS)
            world.highest_fence_ms = max(world.highest_fence_ms, redis.fence_ms)
        world.say(f"log adopted, windows before {redis.fence_ms} are frozen")
        for _, _, located in world.occurrences:
            old = located.message.log != world.log.name
            if old and isinstance(located.event, Lifecycle):
                world.forgetful.add(located.event.scope)
        self._forget_heads()
        self._lost_since = True
        world.known_log = world.log.name
        world.recovery = Recovery(world.log.name, commands=list(world.recovery.commands))

    # Rest ---------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Let everything come to an end without trouble, and look at the books."""
        world = self.world
        world.say("--- coming to rest")
        world.faults = False
        if world.troubles.death:
            self._stumble()
        self._settle_down()
        self._write_off_at_rest()
        posted = checks.check_ledger(world)
        checks.check_commands(world)
        checks.check_grants(world)
        checks.check_write_offs(world)
        pure = checks.pure_cells(world)
        if not self._lost_since:
            touched = {located.event.scope for _, _, located in world.occurrences[self._quiet_since :]}
            quiet = {cell.rpartition("@")[0] for cell in self._at_last_rest} - touched - self._charged_twice
            checks.check_frozen_since(world, self._at_last_rest, quiet, posted, self.coverage)
        checks.check_live(world, posted, pure, self.coverage)
        if world.chance.random() < 0.3:
            posted = self._resettle_at_rest(None)
            checks.check_exact(world, posted, pure, self.coverage)
            checks.check_live(world, posted, pure, self.coverage)
        fence_ms = world.redis.fence_ms
        self._at_last_rest = {
            cell: vector for cell, vector in posted.items() if checks.window_of(cell) >= fence_ms
        }
        self._quiet_since = len(world.occurrences)
        self._lost_since = False
        self._charged_twice.clear()
        self.coverage["rests"] += 1
        world.faults = True
        world.say("--- at rest, all is right")

    def _stumble(self) -> None:
        """Settlement is killed some more times, with nothing to wait for: it reads again in other orders."""
        for _ in range(self.world.chance.choice([0, 1, 1, 4])):
            if not self._is_refused():
                self._alive(self._settle)
            self._settlement = None

    def _settle_down(self) -> None:
        world = self.world
        self._looked = False
        # A scope that was answered OLDER after its last event hears of it when it wakes up to look at its windows.
        quiet = False
        for _ in range(TURNS_AT_REST):
            busy = False
            try:
                if self._is_refused():
                    busy = True
                    self._go_on_rebuilding()
                usage, self._usage = self._usage or UsageFlow(world), None
                while usage.step(100):
                    busy = True
                usage.commit()
                self._usage = usage
                if self._rebuild is None:
                    busy |= self._settle_down_live()
            except WrongRedis as error:
                world.say(f"refused: {error}")
                self._settlement = self._ledger = None
                busy = True
            if quiet and not busy:
                if world.must_notice:
                    raise Violation("Redis came back without its end, and nobody noticed")
                return
            quiet = not busy
            world.now_ms += LOOK_AFTER_WINDOWS_MS + 1
        raise Violation("it does not come to rest")

    def _settle_down_live(self) -> bool:
        world = self.world
        settlement, self._settlement = self._settlement, None
        if settlement is None:
            settlement = self._start_settlement()
        busy = settlement.drain()
        ledger, self._ledger = self._ledger, None
        if ledger is None or (world.must_notice and not self._looked):
            self._looked = True
            ledger = Ledger(world)
        while ledger.step(100):
            busy = True
        due = [live.scope for live in settlement.live_scopes() if live.emission_due()]
        self._settlement, self._ledger = settlement, ledger
        return busy or bool(due)

    def _write_off_at_rest(self) -> None:
        """A complete run, which closes whatever any run before it left open."""
        self._writing_off = None
        for _ in range(TURNS_AT_REST):
            run = WritingOff(self.world)
            while (done := run.step()) is None:
                self._settle_down()
            if not done.open:
                return
        raise Violation("a write-off does not come to its end")

    def _resettle_at_rest(self, since_ms: int | None) -> Cells:
        """A complete run; returns the cells afterwards."""
        self._complete_run(since_ms)
        self._settle_down()
        return checks.check_ledger(self.world)

    def _complete_run(self, since_ms: int | None) -> Resettled:
        run = Run(self.world, since_ms, "resettle at rest")
        for _ in range(TURNS_AT_REST):
            done = run.step()
            if done is not None:
                return done
            self._settle_down()
        raise Violation("a resettle does not come to its end")

    def last_resettle(self) -> None:
        """Everything is frozen: one more run of the ordinary kind makes every cell exact, and a full one finds
        nothing, whatever old runs still try."""
        world = self.world
        world.faults = False
        world.say("--- the last resettle")
        last_ms = max((located.event.time_ms for _, _, located in world.occurrences), default=world.now_ms)
        assert self._settlement is not None
        self._settlement.books[0].raise_fence(window_start_ms(max(last_ms, world.now_ms)) + WINDOW_MS)
        self._settle_down()
        pure = checks.pure_cells(world)
        checks.check_exact(world, self._resettle_at_rest(None), pure, self.coverage)
        checks.check_balances(world, pure)
        again = self._complete_run(-(2**62))
        if again.cells:
            raise Violation(f"a second resettle changed {again.cells} cells")
        while world.in_flight:
            world.land()
        for run in list(self._runs):
            try:
                for _ in range(PATIENCE):
                    if run in self._runs:
                        self._step_run(run)
            except (WrongRedis, ValueError) as error:
                world.say(f"{run.name}: {error}")
        self._settle_down()
        checks.check_exact(world, checks.check_ledger(world), pure, self.coverage)
        checks.check_balances(world, pure)
        checks.check_commands(world)
