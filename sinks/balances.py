"""Live balances in Redis: every change goes through one script family (`sinks/lua`).

A script checks the epoch, the fence and the idempotency record (a cell's revision, a command's request id),
changes the balances, and appends one entry with all its ledger lines to the outbox, in one step. So a call
whose answer was lost may be made again: the second time it posts nothing. A crash before the script posts
nothing; after it, the flow starts from an older snapshot and its postings are answered OLDER until it has
caught up, when an equal revision with an equal vector changes nothing.

Every answer tells the number of the last outbox entry, and every call says which one its caller has seen. So a
Redis that restarts without the end of its append-only file is refused at the next call, by the script itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files

import redis
from redis.commands.core import Script

from metering.commands import CommandOutcome, CommandResult, command_digest, counter_account
from metering.facts import Correction
from metering.live import Answer, CellPosting, Emission, Ending
from metering.money import MAX_AMOUNT_US
from metering.ports import NOTHING_SEEN, CorrectionAnswer, ResettleTicket, SeenEntry, WrongRedis
from schemas import redis_keys
from schemas.commands import Command
from sinks.retrying import never_stop, retrying
from telemetry.quiet import ignore_retry

MAX_POSTINGS_PER_CALL = 2_000
"""Bounds how long one call keeps Redis busy: a few milliseconds."""

EVICTIONS_PER_CALL = 1_000
COMPACTIONS_PER_CALL = 1_000
EXPIRIES_PER_CALL = 500


def heals(error: Exception) -> bool:
    """Whether waiting may help: Redis away, loading, busy, read-only for a while, out of memory, outbox full."""
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OutboxFull)):
        return True
    text = str(error)
    return isinstance(error, redis.ResponseError) and text.startswith(
        ("OOM", "BUSY", "LOADING", "READONLY", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN")
    )


class OutboxFull(Exception):
    """The outbox is at its bound, because ClickHouse is away: wait."""


class RedisBalances:
    """The balance book in Redis."""

    def __init__(
        self,
        client: redis.Redis,
        epoch: int,
        outbox_max_entries: int,
        *,
        seen_entry: SeenEntry = NOTHING_SEEN,
        on_retry: Callable[[Exception], None] = ignore_retry,
        stop: Callable[[], bool] = never_stop,
    ) -> None:
        self._client = client
        self._epoch = str(epoch)
        self._outbox_max_entries = str(outbox_max_entries)
        self._settle_cells = load_script(client, "settle_cells")
        self._apply_command = load_script(client, "apply_command")
        self._set_floor = load_script(client, "set_floor")
        self._raise_fence = load_script(client, "raise_fence")
        self._begin_resettle = load_script(client, "begin_resettle")
        self._post_corrections = load_script(client, "post_corrections")
        self._end_resettle = load_script(client, "end_resettle")
        self._compact_requests = load_script(client, "compact_requests")
        self._expire_grants = load_script(client, "expire_grants")
        self._known_fence = 0
        self._seen_entry = seen_entry
        self._on_retry = on_retry
        self._stop = stop

    def post(self, emissions: Sequence[Emission]) -> list[list[Answer]]:
        answers: list[list[Answer]] = [[] for _ in emissions]
        for places, cells, endings in _calls(emissions):
            if cells or endings:
                said = self._post_call(cells, endings)
                for place, answer in zip(places, said, strict=True):
                    answers[place].append(answer)
        return answers

    def _post_call(self, cells: list[CellPosting], endings: list[tuple[str, Ending]]) -> list[Answer]:
        # A cell over the limit is refused here, alone, where amounts are still exact integers.
        fits = [sum(map(abs, cell.amounts.values())) <= MAX_AMOUNT_US for cell in cells]
        fitting = [cell for cell, fit in zip(cells, fits, strict=True) if fit]
        arguments = [self._outbox_max_entries, str(len(fitting)), str(len(endings))]
        for cell in fitting:
            arguments += (
                cell.cell_id,
                str(cell.window_start_ms),
                str(cell.revision),
                f'["{cell.cell_id}",{cell.revision},"{cell.rate_version}"]',
                # Sorted, so that equal vectors are equal strings.
                ";".join([f"{account}={amount_us}" for account, amount_us in sorted(cell.amounts.items())]),
            )
        for scope, ending in endings:
            arguments.append(
                json.dumps(
                    [scope, ending.reason, ending.first_event_ms, ending.last_event_ms, ending.revision]
                )
            )
        reply = self._run(self._settle_cells, arguments)
        self._known_fence = max(self._known_fence, int(reply[0]))
        self._see(reply[1])
        said = iter(reply[2:])
        return [Answer[next(said).decode()] if fit else Answer.OVER_LIMIT for fit in fits]

    def apply_command(self, command: Command) -> CommandResult:
        last_entry, outcome, amount_us, balance_us = self._run(
            self._apply_command,
            [
                self._outbox_max_entries,
                command.request_id,
                command_digest(command),
                command.kind.value,
                command.account,
                counter_account(command),
                str(command.amount_us),
                ",".join(json.dumps(text) for text in (command.request_id, command.actor, command.reason)),
                *map(str, command.grant or ()),
            ],
        )
        self._see(last_entry)
        return CommandResult(CommandOutcome(outcome.decode()), int(amount_us), int(balance_us))

    def expire_grants(self) -> int:
        expired, some = 0, EXPIRIES_PER_CALL
        while some == EXPIRIES_PER_CALL:
            last_entry, said = self._run(
                self._expire_grants, [self._outbox_max_entries, str(EXPIRIES_PER_CALL)]
            )
            self._see(last_entry)
            some = int(said)
            expired += some
        return expired

    def compact_requests(self, retention_ms: int) -> int:
        replaced, some = 0, COMPACTIONS_PER_CALL
        while some == COMPACTIONS_PER_CALL:
            last_entry, said = self._run(
                self._compact_requests, [str(retention_ms), str(COMPACTIONS_PER_CALL)]
            )
            self._see(last_entry)
            some = int(said)
            replaced += some
        return replaced

    def set_floor(self, account: str, floor_us: int) -> None:
        [last_entry] = self._run(self._set_floor, [self._outbox_max_entries, account, str(floor_us)])
        self._see(last_entry)

    def raise_fence(self, frozen_before_ms: int) -> int:
        left = 1
        while left:
            fence, last_entry, still = self._run(
                self._raise_fence, [str(frozen_before_ms), str(EVICTIONS_PER_CALL)]
            )
            self._see(last_entry)
            self._known_fence, left = int(fence), int(still)
        return self._known_fence

    def begin_resettle(self) -> ResettleTicket:
        last_entry, *reply = self._run(self._begin_resettle, [])
        token, fence, at_ms, done_fence, done_appended = map(int, reply)
        self._see(last_entry)
        self._known_fence = max(self._known_fence, fence)
        entries = int(last_entry.partition(b"@")[0])
        return ResettleTicket(token, fence, entries, at_ms, done_fence, done_appended)

    def post_corrections(self, token: int, step: int, corrections: Sequence[Correction]) -> CorrectionAnswer:
        arguments = [self._outbox_max_entries, str(token), str(step), str(len(corrections))]
        for correction in corrections:
            arguments += (
                str(correction.window_start_ms),
                f'["{correction.cell_id}",{token},"{correction.rate_version}"]',
                ";".join([f"{account}={change}" for account, change in correction.changes.items()]),
            )
        last_entry, answer = self._run(self._post_corrections, arguments)
        self._see(last_entry)
        return CorrectionAnswer[answer.decode()]

    def end_resettle(self, token: int, frozen_before_ms: int, appended_before_ms: int) -> None:
        [last_entry] = self._run(
            self._end_resettle, [str(token), str(frozen_before_ms), str(appended_before_ms)]
        )
        self._see(last_entry)

    def stored_entry(self) -> int:
        stored = retrying(
            lambda: self._client.get(redis_keys.LEDGER_STORED),
            heals=heals,
            stop=self._stop,
            on_retry=self._on_retry,
        )
        return int(stored or 0)

    @property
    def seen_entry(self) -> SeenEntry:
        """The last outbox entry that this book has seen; costs no round trip."""
        return self._seen_entry

    def _see(self, last_entry: bytes) -> None:
        number, _, name = last_entry.decode().partition("@")
        self._seen_entry = max(self._seen_entry, SeenEntry(int(number), name))

    def fence(self) -> int:
        """Where the fence stands now (ms)."""
        stored = retrying(
            lambda: self._client.get(redis_keys.FENCE), heals=heals, stop=self._stop, on_retry=self._on_retry
        )
        self._known_fence = max(self._known_fence, int(stored or 0))
        return self._known_fence

    @property
    def known_fence_ms(self) -> int:
        """Where the fence stood at the last answer; costs no round trip."""
        return self._known_fence

    def _run(self, script: Script, arguments: list[str]) -> list[bytes]:
        def call() -> list[bytes]:
            # Built at each attempt: another thread may have seen more meanwhile.
            seen = self._seen_entry
            reply = script(args=[self._epoch, f"{seen.number}@{seen.name}", *arguments])
            if reply == b"FULL":
                raise OutboxFull(f"the outbox holds {self._outbox_max_entries} entries")
            return reply  # type: ignore[no-any-return]

        try:
            return retrying(call, heals=heals, stop=self._stop, on_retry=self._on_retry)
        except redis.ResponseError as error:
            raise wrong_redis(error) from None


def wrong_redis(error: redis.ResponseError) -> Exception:
    """The error to raise for a script's: WrongRedis when it refused the book, else itself."""
    if "EPOCH" not in str(error):
        return error
    return WrongRedis(
        f"Redis is not the one that the books were kept on ({error}): run `metering rebuild-balances`"
    )


def load_script(client: redis.Redis, name: str) -> Script:
    """A script of the family by its file's name."""
    folder = files("sinks") / "lua"
    common = (folder / "common.lua").read_text(encoding="utf-8")
    return client.register_script(common + (folder / f"{name}.lua").read_text(encoding="utf-8"))


def _calls(
    emissions: Sequence[Emission],
) -> Iterator[tuple[list[int], list[CellPosting], list[tuple[str, Ending]]]]:
    """Cut emissions into calls: for each (which emission each cell is of, cells, endings)."""
    places: list[int] = []
    cells: list[CellPosting] = []
    endings: list[tuple[str, Ending]] = []
    postings = 0
    for place, emission in enumerate(emissions):
        for cell in emission.cells:
            if postings >= MAX_POSTINGS_PER_CALL:
                yield places, cells, endings
                places, cells, endings, postings = [], [], [], 0
            places.append(place)
            cells.append(cell)
            postings += len(cell.amounts) + 1
        if emission.ending is not None:
            endings.append((emission.scope, emission.ending))
            postings += 1
    yield places, cells, endings
