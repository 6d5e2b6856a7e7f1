"""Resettle: makes frozen cells what the pure function of all stored events says.

Laws:
- Live postings to frozen windows are refused, so only a resettle moves money there. A newer token voids every
  older one, so only one resettle does.
- Nothing is read before the ledger has everything that was posted when the token was taken (else what was
  already corrected would be corrected twice), and before the usage store has every message that the log held
  then (else usage that was charged live would be taken back, until the next run).
- What is posted is the difference between the recomputed cell and the ledger's sum for it. So a run that is
  killed anywhere leaves nothing to clean up: the next one waits for the ledger and posts what is still missing.
- A call whose answer was lost is known by (token, step) and not carried out twice.

The procedure is a generator that stops at every boundary between two effects, so that whoever drives it
decides how to wait, and a test can let it die there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from metering.cells import WINDOW_MS, cell_id, cell_vector, is_room
from metering.facts import Correction, ScopeFacts
from metering.money import MAX_AMOUNT_US, REVENUE
from metering.ports import Archive, BalanceBook, CorrectionAnswer, Log, ResettleTicket
from metering.presence import PRESENCE_MAX_MS, Presence
from metering.pricing import gpu_credit_us, stages_cost_us
from schemas.rate_card import RateCard

CORRECTIONS_PER_CALL = 2_000
"""Changes of balances in one call: a few milliseconds of the book."""

CLOCKS_APART_MS = 600_000
"""How far the clocks of broker and book may be apart. What was appended in the last minutes before a token is
considered again by the next run, so that nothing falls between two clocks."""


class Step(StrEnum):
    """Where the procedure stands when it lets its driver go on."""

    TOKEN_TAKEN = "token taken"
    WAITING = "waiting"
    """The ledger or the usage store is behind: call again in a moment."""
    READ = "read"
    """Corrections are computed; nothing of this part is posted."""
    POSTED = "posted"
    """A part of the corrections is posted."""


@dataclass(frozen=True, slots=True)
class Resettled:
    """What a run did. `superseded` says that a newer one took over before it was complete."""

    token: int
    frozen_before_ms: int
    scopes: int
    cells: int
    changes: int
    moved_us: int
    """The sum of the magnitudes of all changes of users' and nodes' balances."""
    refused: int
    """Cells that would move more than MAX_AMOUNT_US, and were left alone."""
    superseded: bool


@dataclass(frozen=True, slots=True)
class Recomputed:
    """One cell as the stored events say: its whole vector, platform/revenue included."""

    vector: dict[str, int]
    rate_version: str


def recompute(
    facts: ScopeFacts, card: RateCard, presence_max_ms: int = PRESENCE_MAX_MS
) -> dict[int, Recomputed]:
    """Window start -> cell, for every window of the facts that has usage."""
    costs: dict[int, dict[str, int]] = {}
    credits: dict[int, dict[str, int]] = {}
    versions: dict[int, set[str]] = {}
    for usage in facts.usage:
        start, user, node, rates_from_ms, asr, nmt, tts, gpu = usage
        rates = card.version_at(rates_from_ms)
        if rates is None:
            raise ValueError(f"{facts.scope}: stored usage in window {start} has no rate")
        cost = costs.setdefault(start, {})
        cost[user] = cost.get(user, 0) + stages_cost_us(asr, nmt, tts, rates)
        credit = credits.setdefault(start, {})
        credit[node] = credit.get(node, 0) + gpu_credit_us(gpu, rates)
        versions.setdefault(start, set()).add(rates.name)
    presence = Presence(presence_max_ms)
    for kind, user_id, time_ms in facts.membership:
        presence.add(kind, user_id, time_ms)
    cells = {}
    room = is_room(facts.scope)
    for start, cost in costs.items():
        members = presence.members(start, start + WINDOW_MS) if room else frozenset()
        vector = cell_vector(facts.scope, start, cost, credits[start], members)
        cells[start] = Recomputed(vector, ",".join(sorted(versions[start])))
    return cells


def corrections(
    facts: ScopeFacts, card: RateCard, frozen_before_ms: int, presence_max_ms: int = PRESENCE_MAX_MS
) -> list[Correction]:
    """What the frozen cells from `facts.from_window_ms` on still have to move, in the order of their windows."""
    cells = recompute(facts, card, presence_max_ms)
    found = []
    for start in sorted(cells.keys() | facts.posted.keys()):
        if not facts.from_window_ms <= start < frozen_before_ms:
            continue
        cell = cells.get(start)
        vector = cell.vector if cell is not None else {}
        posted = facts.posted.get(start, {})
        changes = {
            account: change
            for account in sorted(vector.keys() | posted.keys())
            if account != REVENUE and (change := vector.get(account, 0) - posted.get(account, 0))
        }
        if changes:
            rate_version = cell.rate_version if cell is not None else ""
            found.append(Correction(cell_id(facts.scope, start), start, rate_version, changes))
    return found


def resettle(
    book: BalanceBook,
    archive: Archive,
    log: Log,
    card: RateCard,
    *,
    presence_max_ms: int = PRESENCE_MAX_MS,
    since_ms: int | None = None,
) -> Generator[Step, None, Resettled]:
    """Correct frozen cells; with `since_ms` every one from there on, else those that may have changed since the
    last complete run. Raises what the ports raise; then, as after a kill, the next run does what is left."""
    ticket = book.begin_resettle()
    yield Step.TOKEN_TAKEN
    ends = log.ends()
    while book.stored_entry() < ticket.entries or not _covers(archive.stored_offsets(), ends):
        yield Step.WAITING
    scopes = cells = changes = moved_us = refused = step = 0
    superseded = False
    for facts in _facts(archive, ticket, since_ms):
        scopes += len(facts)
        found = [
            correction
            for scope in facts
            for correction in corrections(scope, card, ticket.frozen_before_ms, presence_max_ms)
        ]
        refused += sum(not _fits(correction) for correction in found)
        found = [correction for correction in found if _fits(correction)]
        yield Step.READ
        for part in _parts(found):
            step += 1
            if book.post_corrections(ticket.token, step, part) is CorrectionAnswer.STALE:
                superseded = True
                break
            cells += len(part)
            changes += sum(len(correction.changes) for correction in part)
            moved_us += sum(abs(change) for correction in part for change in correction.changes.values())
            yield Step.POSTED
        if superseded:
            break
    # A run over some windows only says nothing about the others; before the first rates there is no usage.
    if not superseded and (since_ms is None or since_ms <= card.versions[0].effective_from_ms):
        book.end_resettle(ticket.token, ticket.frozen_before_ms, ticket.at_ms - CLOCKS_APART_MS)
    return Resettled(
        ticket.token, ticket.frozen_before_ms, scopes, cells, changes, moved_us, refused, superseded
    )


def _facts(archive: Archive, ticket: ResettleTicket, since_ms: int | None) -> Iterator[list[ScopeFacts]]:
    if since_ms is not None:
        return archive.facts_since(since_ms, ticket.frozen_before_ms)
    return archive.facts_changed(
        ticket.done_appended_before_ms, ticket.done_frozen_before_ms, ticket.frozen_before_ms
    )


def _fits(correction: Correction) -> bool:
    return sum(map(abs, correction.changes.values())) <= MAX_AMOUNT_US


def _covers(stored: Mapping[int, int], ends: Mapping[int, int]) -> bool:
    return all(stored.get(partition, 0) >= end for partition, end in ends.items())


def _parts(found: list[Correction]) -> Iterator[list[Correction]]:
    """Cut into calls; a cell is never cut."""
    part: list[Correction] = []
    size = 0
    for correction in found:
        if part and size + len(correction.changes) > CORRECTIONS_PER_CALL:
            yield part
            part, size = [], 0
        part.append(correction)
        size += len(correction.changes) + 1
    if part:
        yield part
