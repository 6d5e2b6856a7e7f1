"""Bugs planted on purpose, one rule weakened each: what the simulation has to find, as a test of the simulation.

Each is the project's own code with one part replaced by a subclass or a wrapper.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import msgspec

from flows.ledger import JournalSink
from flows.usage_store import Row, StoreSink
from metering.commands import CommandResult
from metering.facts import Correction
from metering.live import Answer, CellPosting, LiveScope, Located, Outcome
from metering.ports import NOTHING_SEEN, CorrectionAnswer, ResettleTicket, SeenEntry
from metering.resettle import Resettled, Step, resettle
from schemas.commands import Command
from schemas.messages import OutboxMessage
from schemas.rate_card import RateCard
from schemas.rows import StoredUpTo
from simulation.parts import Parts
from simulation.world import Died
from sinks.balances_memory import MemoryBalances
from sinks.memory import MemoryArchive

# The scripts --------------------------------------------------------------------------------------------


class _AddsInsteadOfPostingTheDifference(MemoryBalances):
    def _post_cell(self, cell: CellPosting, lines: list[list[object]], cells: list[list[object]]) -> Answer:
        start, known = self.redis.cells.get(cell.cell_id, (0, None))
        if known is not None and cell.revision > known.revision:
            self.redis.cells[cell.cell_id] = (start, type(known)(known.revision, {}))
        return super()._post_cell(cell, lines, cells)


class _LeavesThePayerWhoLeftTheSplit(MemoryBalances):
    def _post_cell(self, cell: CellPosting, lines: list[list[object]], cells: list[list[object]]) -> Answer:
        _, known = self.redis.cells.get(cell.cell_id, (0, None))
        if known is not None:
            cell = msgspec.structs.replace(cell, amounts={**known.amounts, **cell.amounts})
        return super()._post_cell(cell, lines, cells)


class _KnowsNoEpoch(MemoryBalances):
    """Whoever finds none takes Redis for a new one."""

    def _check(self, seen_entry: SeenEntry | None = None) -> None:
        if self.redis.epoch is None and self.redis.rebuilding is None:
            self.redis.epoch = self.expected_epoch


class _SeesNoLostEntries(MemoryBalances):
    def _check(self, seen_entry: SeenEntry | None = None) -> None:
        super()._check(NOTHING_SEEN)


class _IgnoresTheFence(MemoryBalances):
    def _post_cell(self, cell: CellPosting, lines: list[list[object]], cells: list[list[object]]) -> Answer:
        fence_ms, self.redis.fence_ms = self.redis.fence_ms, 0
        try:
            return super()._post_cell(cell, lines, cells)
        finally:
            self.redis.fence_ms = fence_ms


class _AcceptsOlderRevisions(MemoryBalances):
    def _post_cell(self, cell: CellPosting, lines: list[list[object]], cells: list[list[object]]) -> Answer:
        start, known = self.redis.cells.get(cell.cell_id, (0, None))
        if known is not None:
            self.redis.cells[cell.cell_id] = (start, type(known)(-1, known.amounts))
        return super()._post_cell(cell, lines, cells)


class _AcceptsStaleTokens(MemoryBalances):
    def post_corrections(self, token: int, step: int, corrections: Sequence[Correction]) -> CorrectionAnswer:
        if token != self.redis.token:
            return super().post_corrections(self.redis.token, self.redis.step + 1, corrections)
        return super().post_corrections(token, step, corrections)


class _KnowsNoSteps(MemoryBalances):
    def post_corrections(self, token: int, step: int, corrections: Sequence[Correction]) -> CorrectionAnswer:
        return super().post_corrections(token, self.redis.step + 1, corrections)


class _ForgetsRequests(MemoryBalances):
    def apply_command(self, command: Command) -> CommandResult:
        self.redis.requests.pop(command.request_id, None)
        return super().apply_command(command)


# The state machine --------------------------------------------------------------------------------------


class _CountsAsRevision(LiveScope):
    """The number of events applied, which a snapshot keeps, in place of where the last ones stood."""

    def apply(self, located: Located) -> Outcome:
        outcome = super().apply(located)
        self._positions[-1] = self._positions.get(-1, 0) + (outcome is Outcome.APPLIED)
        return outcome

    @property
    def revision(self) -> int:
        return self._revision_base + self._positions.get(-1, 0)


class _EvictsMembershipWithItsCells(LiveScope):
    def raise_fence(self, frozen_before_ms: int) -> None:
        super().raise_fence(frozen_before_ms)
        self._presence.restore_folded({}, {}, None)


class _RestartsClean(LiveScope):
    @classmethod
    def restore(
        cls, saved: bytes, card: RateCard, presence_max_ms: int = 0, revision_base: int = 0
    ) -> LiveScope:
        live = super().restore(saved, card, presence_max_ms, revision_base)
        for window in live._windows.values():
            window.dirty = False
        return live


class _TakesOlderForPosted(LiveScope):
    def answer(self, window_start: int, revision: int, answer: Answer) -> None:
        if answer is not Answer.OLDER:
            super().answer(window_start, revision, answer)


class _FirstReadCounts(LiveScope):
    def _repeat(self, known: bytes, identity: bytes, body: bytes, located: Located) -> Outcome:
        return Outcome.DUPLICATE if known[: len(body)] == body else Outcome.CONFLICT


class _EmitsOnlyNewUsage(LiveScope):
    """A membership event changes no cell that was posted before it."""

    def _note_membership(self, event: Any) -> None:
        dirty = {start: window.dirty for start, window in self._windows.items()}
        super()._note_membership(event)
        for start, window in self._windows.items():
            window.dirty = dirty[start]


# The ledger and the usage store -------------------------------------------------------------------------


class _TrimsBeforeItInserts(JournalSink):
    def build(self, step_id: str, worker_index: int, worker_count: int) -> Any:
        writer: Any = super().build(step_id, worker_index, worker_count)
        write_batch = writer.write_batch

        def trim_first(items: list[list[OutboxMessage]]) -> None:
            for batch in items:
                self._outbox.note_stored(batch[-1], int(batch[-1].entry_id))
            write_batch(items)

        writer.write_batch = trim_first
        return writer


class _NotesItsPositionFirst(StoreSink):
    def build(self, step_id: str, worker_index: int, worker_count: int) -> Any:
        writer: Any = super().build(step_id, worker_index, worker_count)
        write_batch, store = writer.write_batch, self._store
        world = store._world  # type: ignore[attr-defined]

        def note_first(items: list[list[Row]]) -> None:
            store.insert_positions([row for rows in items for row in rows if isinstance(row, StoredUpTo)])
            # A whole resettle has to fall between the two: seldom, unless this is where it mostly dies.
            if world.faults and world.maybe(0.3):
                raise Died("usage: after its position")
            write_batch(items)

        writer.write_batch = note_first
        return writer


# Resettle -----------------------------------------------------------------------------------------------


class _LedgerIsNeverBehind:
    """A book that says that everything is stored."""

    def __init__(self, book: Any) -> None:
        self._book = book

    def stored_entry(self) -> int:
        return 2**62

    def __getattr__(self, name: str) -> Any:
        return getattr(self._book, name)


def _resettle_without_waiting_for_the_ledger(
    book: Any, *arguments: Any, **options: Any
) -> Generator[Step, None, Resettled]:
    return resettle(_LedgerIsNeverBehind(book), *arguments, **options)


class _TakesItsTokenLast(_LedgerIsNeverBehind):
    """A book that takes the token only when the first correction is posted: after everything was read."""

    _token: int | None = None

    def stored_entry(self) -> int:
        stored: int = self._book.stored_entry()
        return stored

    def begin_resettle(self) -> ResettleTicket:
        inner = self._book.book
        redis = inner.redis
        inner._check()
        return ResettleTicket(
            redis.token,
            redis.fence_ms,
            redis.entries,
            inner._now_ms(),
            redis.done_frozen_before_ms,
            redis.done_appended_before_ms,
        )

    def post_corrections(self, token: int, step: int, corrections: Sequence[Correction]) -> CorrectionAnswer:
        if self._token is None:
            self._token = self._book.begin_resettle().token
        found: CorrectionAnswer = self._book.post_corrections(self._token, step, corrections)
        return found


def _resettle_that_reads_before_its_token(
    book: Any, *arguments: Any, **options: Any
) -> Generator[Step, None, Resettled]:
    return resettle(_TakesItsTokenLast(book), *arguments, **options)


class _UsageStoreIsNeverBehind(MemoryArchive):
    def stored_offsets(self) -> Mapping[int, int]:
        return dict.fromkeys(range(100), 2**62)


class _ReadsOnlyTheChangedWindows(MemoryArchive):
    """A late event that takes one of another window back leaves that window as it was."""

    def changed_scopes(
        self, appended_since_ms: int, frozen_from_ms: int, frozen_before_ms: int
    ) -> dict[str, int]:
        changed = super().changed_scopes(appended_since_ms, frozen_from_ms, frozen_before_ms)
        for row in self._store.stored_usage():
            scope = row.usage.scope
            if row.appended_at_ms >= appended_since_ms and scope in changed:
                changed[scope] = max(changed[scope], row.window_start_ms)
        return changed


BUGS: dict[str, Parts] = {
    "add-instead-of-post-difference": Parts(book=_AddsInsteadOfPostingTheDifference),
    "payer-left-out-when-leaving-split": Parts(book=_LeavesThePayerWhoLeftTheSplit),
    "no-epoch-check": Parts(book=_KnowsNoEpoch),
    "lost-entries-unseen": Parts(book=_SeesNoLostEntries),
    "fence-ignored-by-script": Parts(book=_IgnoresTheFence),
    "older-revision-accepted": Parts(book=_AcceptsOlderRevisions),
    "stale-token-accepted": Parts(book=_AcceptsStaleTokens),
    "step-not-remembered": Parts(book=_KnowsNoSteps),
    "request-not-remembered": Parts(book=_ForgetsRequests),
    "count-as-revision": Parts(live_scope=_CountsAsRevision),
    "membership-evicted-with-its-cells": Parts(live_scope=_EvictsMembershipWithItsCells),
    "restart-not-dirty": Parts(live_scope=_RestartsClean),
    "older-answer-clean": Parts(live_scope=_TakesOlderForPosted),
    "first-read-instead-of-smallest-position": Parts(live_scope=_FirstReadCounts),
    "late-join-leaves-cells-clean": Parts(live_scope=_EmitsOnlyNewUsage),
    "commit-before-post": Parts(commit_before_post=True, commands_reread=0),
    "torn-batch-counts-as-stored": Parts(ledger_notes_what_it_finds=True),
    "stored-again-without-looking-ahead": Parts(ledger_looks_ahead=False, ledger_batch=1),
    "trim-before-insert": Parts(journal_sink=_TrimsBeforeItInserts),
    "position-before-rows": Parts(store_sink=_NotesItsPositionFirst),
    "resettle-without-waiting-for-drain": Parts(resettle=_resettle_without_waiting_for_the_ledger),
    "resettle-without-waiting-for-usage-store": Parts(archive=_UsageStoreIsNeverBehind),
    "resettle-reads-before-its-token": Parts(resettle=_resettle_that_reads_before_its_token),
    "resettle-of-changed-windows-only": Parts(archive=_ReadsOnlyTheChangedWindows),
}
