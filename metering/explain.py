"""Explanations: from a ledger line to its cell, its utterances, rates, payers and remainder; and back again.

Laws:
- An explanation recomputes what it explains, by the functions that settle: prices, presence, split. It has no
  rule of its own about money, and says whether the ledger agrees.
- A cell is judged as a reconciliation judges it. Newer usage that no posting knew yet is *not settled yet*, which
  is no disagreement. What cannot be decided is *unclear*, which is no agreement.
- A line moves the difference between the cell at its posting and what was posted before. What a posting knew is
  told by its revision when all events of the scope lie on one partition, and guessed by append times otherwise; a
  guess is believed only when it gives exactly what the ledger has.
- Amounts are whole microseconds. A part of a shared cost is a fraction, and stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from metering.cells import WINDOW_MS, cell_id, is_room, remainder_key
from metering.facts import ScopeFacts, UsageSum
from metering.money import NODE_PREFIX, REVENUE, USER_PREFIX, node_account, user_account
from metering.presence import PRESENCE_MAX_MS, Presence
from metering.pricing import cost_us, credit_us, stages_cost_us
from metering.reconcile import (
    CellLook,
    Verdict,
    agrees_frozen,
    judge_live,
    moved_us,
    over_limit,
    without_zeros,
)
from metering.resettle import recompute
from schemas.events import LifecycleKind, Usage
from schemas.rate_card import RateCard, RateVersion
from schemas.rows import LifecycleRow, UsageRow

CLOCKS_APART_MS = 300_000
"""How far the clocks of broker and book may be apart when what a posting knew is guessed from append times."""

EARLIER_STATES = 300
"""How many earlier states of a frozen cell are tried to tell "not settled yet" from a fault."""

STAGES = ("asr", "nmt", "tts")


class Agreement(StrEnum):
    """What recomputing says of the ledger."""

    AGREES = "agrees"
    NOT_SETTLED = "not_settled"
    """What is posted is right, but newer events are not in it yet."""
    UNCLEAR = "unclear"
    """It differs, and it cannot be told at this moment whether it should."""
    DIFFERS = "differs"


_SEVERITY = (Agreement.AGREES, Agreement.NOT_SETTLED, Agreement.UNCLEAR, Agreement.DIFFERS)


class Difference(msgspec.Struct, frozen=True):
    """What the ledger has for an account in the cell, and what it should have (us)."""

    account: str
    expected_us: int
    found_us: int


class Judgement(msgspec.Struct, frozen=True):
    """One thing that was checked; `why` is a sentence for people."""

    agreement: Agreement
    why: str
    differences: list[Difference] = []


def worst(judgements: Iterable[Judgement]) -> Judgement:
    """The judgement that counts for the whole: the first of the most severe ones."""
    return max(judgements, key=lambda each: _SEVERITY.index(each.agreement))


Row = UsageRow | LifecycleRow

# What is given ------------------------------------------------------------------------------------------


class Line(msgspec.Struct, frozen=True):
    """One ledger line that counts, as `ledger` has it."""

    account: str
    seq: int
    posted_at_ms: int
    reason: str
    change_us: int
    balance_before_us: int
    balance_after_us: int
    cell_id: str
    revision: int
    rate_version: str
    request_id: str
    actor: str
    note: str
    epoch: int
    entry: int
    grants: dict[str, int] = {}
    """By how much (us) it changed what is left of each grant."""

    @property
    def is_correction(self) -> bool:
        """Whether a resettle posted it: then `revision` is the number of that resettle."""
        return self.reason == "resettle"


class AccountSum(msgspec.Struct, frozen=True):
    """What one account's lines of a cell add up to."""

    account: str
    change_us: int
    lines: int
    first_seq: int
    last_seq: int


class Posting(msgspec.Struct, frozen=True):
    """One posting of the cell: its lines of one outbox entry at one revision."""

    entry: int
    revision: int
    correction: bool
    posted_at_ms: int
    lines: int
    sum_us: int
    """Of its lines: zero, or something is wrong."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far everything is at the moment of reading; None is not known."""

    frozen_before_ms: int
    stored_offsets: Mapping[int, int]
    """Partition -> next offset, of the log that the usage store reads now."""
    revision_bits: int
    """A revision is the log's generation above so many bits of offsets."""
    generation: int | None = None
    """Of the log that live revisions are counted in now."""
    missing_entries: int = 0
    """Outbox entries that the ledger lacked just before it was read."""
    settled_before_ms: int | None = None
    """Whatever was appended before it is settled and posted."""
    resettled_frozen_before_ms: int | None = None
    resettled_appended_before_ms: int | None = None
    """Up to where the last complete resettle has compared."""


@dataclass(frozen=True, slots=True)
class CellFacts:
    """Everything about one cell. Events are those that count: one occurrence of each identity."""

    scope: str
    window_start_ms: int
    usage: list[UsageRow]
    membership: list[LifecycleRow]
    """Of a room: at least every one that reaches into the window."""
    sums: list[AccountSum]
    postings: list[Posting]
    """In the order in which they were posted."""
    partitions: frozenset[int]
    """On which any event of the scope lies."""
    last_appended_frozen_ms: int = 0
    """Append time of the scope's last event in a frozen window."""

    @property
    def cell_id(self) -> str:
        return cell_id(self.scope, self.window_start_ms)

    @property
    def rows(self) -> list[Row]:
        """Every event."""
        return [*self.usage, *self.membership]

    @property
    def posted(self) -> dict[str, int]:
        """Account -> what the ledger has, without zeros."""
        return without_zeros({each.account: each.change_us for each in self.sums})


# The cell -----------------------------------------------------------------------------------------------


class Stage(msgspec.Struct, frozen=True):
    """One stage of one utterance."""

    stage: str
    time_ms: int
    rate_us_per_ms: int
    cost_us: int


class Utterance(msgspec.Struct, frozen=True):
    """One usage event that counts, priced again."""

    utterance_id: str
    source: str
    id: str
    time_ms: int
    user_id: str
    session_id: str
    node_id: str
    partition: int
    offset: int
    appended_at_ms: int
    rate_version: str
    stages: list[Stage]
    cost_us: int
    gpu_active_time_ms: int
    node_credit_us_per_ms: int
    credit_us: int


class Payer(msgspec.Struct, frozen=True):
    """Who owes a part of the cell, and why. `owed_us` is what it should pay, `paid_us` what the ledger has."""

    user_id: str
    utterances: int
    joined_ms: int | None
    until_ms: int | None
    ended_by: str | None
    """left, closed or presence_max; None for who was not present (who pays for usage alone)."""
    share_us: int
    remainder_us: int
    remainder_hash: str
    """By which the remainder is given out, smallest first; empty in a session."""
    owed_us: int
    paid_us: int
    lines: AccountSum | None


class Earner(msgspec.Struct, frozen=True):
    """A node of the cell: what it should get and what the ledger has."""

    node_id: str
    utterances: int
    gpu_active_time_ms: int
    earned_us: int
    credited_us: int
    lines: AccountSum | None


class Cell(msgspec.Struct, frozen=True):
    """A cell recomputed. `others` are accounts that have lines in it and owe nothing any more."""

    cell_id: str
    scope: str
    window_start_ms: int
    window_end_ms: int
    frozen: bool
    rate_version: str
    utterances: list[Utterance]
    total_us: int
    split: str
    """equal (a room) or own (a session: everybody pays for their own)."""
    payer_count: int
    share_us: int
    """Of an equal split: total // payers."""
    remainder_us: int
    """Of an equal split: total % payers, given out one microsecond each."""
    payers: list[Payer]
    nodes: list[Earner]
    revenue_us: int
    revenue_posted_us: int
    others: list[AccountSum]
    postings: list[Posting]
    judgements: list[Judgement]
    """The first is of the whole cell."""

    @property
    def judgement(self) -> Judgement:
        """Of everything about the cell."""
        return worst(self.judgements)


def explain_cell(
    facts: CellFacts, progress: Progress, card: RateCard, presence_max_ms: int = PRESENCE_MAX_MS
) -> Cell:
    """The cell recomputed, and whether the ledger agrees."""
    bench = Workbench(facts, progress, card, presence_max_ms)
    utterances = [explain_utterance(row, card) for row in sorted(facts.usage, key=by_time)]
    total_us = sum(each.cost_us for each in utterances)
    payers = _payers(bench, utterances)
    room = is_room(facts.scope)
    share_us, remainder_us = divmod(total_us, len(payers)) if room and payers else (0, 0)
    sums = {each.account: each for each in facts.sums}
    mentioned = {user_account(each.user_id) for each in payers} | {REVENUE}
    mentioned |= {node_account(each.node_id) for each in utterances}
    return Cell(
        cell_id=facts.cell_id,
        scope=facts.scope,
        window_start_ms=facts.window_start_ms,
        window_end_ms=facts.window_start_ms + WINDOW_MS,
        frozen=bench.frozen,
        rate_version=bench.rate_version,
        utterances=utterances,
        total_us=total_us,
        split="equal" if room else "own",
        payer_count=len(payers),
        share_us=share_us,
        remainder_us=remainder_us,
        payers=payers,
        nodes=_earners(bench, utterances),
        revenue_us=bench.stored.get(REVENUE, 0),
        revenue_posted_us=sums[REVENUE].change_us if REVENUE in sums else 0,
        others=[sums[account] for account in sorted(sums.keys() - mentioned)],
        postings=facts.postings,
        judgements=[judge_cell(bench), *_judge_postings(facts), *_judge_prices(facts, card)],
    )


def explain_utterance(row: UsageRow, card: RateCard) -> Utterance:
    """One utterance, priced at the rates in force at its time."""
    usage = row.usage
    rates = _rates(usage, card)
    times = (usage.asr_time_ms, usage.nmt_time_ms, usage.tts_time_ms)
    alone = [(times[0], 0, 0), (0, times[1], 0), (0, 0, times[2])]
    return Utterance(
        utterance_id=usage.utterance_id,
        source=usage.source,
        id=usage.id,
        time_ms=usage.time_ms,
        user_id=usage.user_id,
        session_id=usage.session_id,
        node_id=usage.node_id,
        partition=row.partition,
        offset=row.offset,
        appended_at_ms=row.appended_at_ms,
        rate_version=rates.name,
        stages=[
            Stage(stage, time_ms, rate, stages_cost_us(*only, rates))
            for stage, time_ms, rate, only in zip(
                STAGES, times, (rates.asr, rates.nmt, rates.tts), alone, strict=True
            )
        ],
        cost_us=cost_us(usage, rates),
        gpu_active_time_ms=usage.gpu_active_time_ms,
        node_credit_us_per_ms=rates.node_credit,
        credit_us=credit_us(usage, rates),
    )


def _rates(usage: Usage, card: RateCard) -> RateVersion:
    rates = card.version_at(usage.time_ms)
    if rates is None:
        raise ValueError(f"{usage.scope}: stored usage {usage.source} {usage.id} has no rate")
    return rates


def by_time(row: UsageRow) -> tuple[int, int, int]:
    """The order in which utterances are listed."""
    return row.usage.time_ms, row.partition, row.offset


def _payers(bench: Workbench, utterances: Sequence[Utterance]) -> list[Payer]:
    facts = bench.facts
    cell, room = facts.cell_id, is_room(facts.scope)
    owed = {
        account.removeprefix(USER_PREFIX): -amount_us
        for account, amount_us in bench.vector(bench.everything).items()
        if account.startswith(USER_PREFIX)
    }
    presence = bench.presence(facts.membership)
    share_us = sum(owed.values()) // len(owed) if owed else 0
    sums = {each.account: each for each in facts.sums}
    spoken = _count(each.user_id for each in utterances)
    payers = []
    for user_id, owed_us in owed.items():
        stay = None
        if room:
            stay = presence.stay(user_id, facts.window_start_ms, facts.window_start_ms + WINDOW_MS)
        lines = sums.get(user_account(user_id))
        payers.append(
            Payer(
                user_id=user_id,
                utterances=spoken.get(user_id, 0),
                joined_ms=stay.joined_ms if stay else None,
                until_ms=stay.until_ms if stay else None,
                ended_by=_ended_by(stay.ended_by) if stay else None,
                share_us=share_us if room else owed_us,
                remainder_us=owed_us - share_us if room else 0,
                remainder_hash=remainder_key(cell, user_id).hex() if room else "",
                owed_us=owed_us,
                paid_us=-lines.change_us if lines else 0,
                lines=lines,
            )
        )
    # In a room the order in which the remainder is given out; in a session the names.
    return sorted(payers, key=lambda payer: (payer.remainder_hash, payer.user_id))


def _ended_by(kind: LifecycleKind | None) -> str:
    return "presence_max" if kind is None else kind.name.lower()


def _earners(bench: Workbench, utterances: Sequence[Utterance]) -> list[Earner]:
    sums = {each.account: each for each in bench.facts.sums}
    served = _count(each.node_id for each in utterances)
    worked: dict[str, int] = {}
    for each in utterances:
        worked[each.node_id] = worked.get(each.node_id, 0) + each.gpu_active_time_ms
    vector = bench.vector(bench.everything)
    earners = []
    for account in sorted(account for account in vector if account.startswith(NODE_PREFIX)):
        node_id, lines = account.removeprefix(NODE_PREFIX), sums.get(account)
        credited_us = lines.change_us if lines else 0
        earners.append(Earner(node_id, served[node_id], worked[node_id], vector[account], credited_us, lines))
    return earners


def _count(names: Iterable[str]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    return counted


# What a posting knew ------------------------------------------------------------------------------------

Known = Callable[[Row], bool]


class Workbench:
    """A cell's facts, and the vectors that any part of its events comes to."""

    def __init__(self, facts: CellFacts, progress: Progress, card: RateCard, presence_max_ms: int) -> None:
        self.facts = facts
        self.progress = progress
        self._card = card
        self._presence_max_ms = presence_max_ms
        # A correction says so too: the fence may have been read just before it went by.
        self.frozen = facts.window_start_ms < progress.frozen_before_ms or any(
            posting.correction for posting in facts.postings
        )
        cell = self._recompute(facts.usage, facts.membership)
        self._whole, self.rate_version = cell
        self.stored = without_zeros(self._whole)

    def everything(self, _row: Row) -> bool:
        """Every stored event."""
        return True

    def vector(self, known: Known) -> dict[str, int]:
        """The cell's vector from the events that are known, zeros included; empty without usage."""
        if known == self.everything:
            return self._whole
        return self._recompute(
            [row for row in self.facts.usage if known(row)],
            [row for row in self.facts.membership if known(row)],
        )[0]

    def _recompute(
        self, usage: Sequence[UsageRow], membership: Sequence[LifecycleRow]
    ) -> tuple[dict[str, int], str]:
        start = self.facts.window_start_ms
        facts = ScopeFacts(
            self.facts.scope,
            start,
            [_usage_sum(start, row.usage, self._card) for row in usage],
            [(row.lifecycle.kind, row.lifecycle.user_id, row.lifecycle.time_ms) for row in membership],
            {},
        )
        cell = recompute(facts, self._card, self._presence_max_ms).get(start)
        return (cell.vector, cell.rate_version) if cell is not None else ({}, "")

    def presence(self, membership: Sequence[LifecycleRow]) -> Presence:
        """Who was in the room, by these events."""
        presence = Presence(self._presence_max_ms)
        for row in membership:
            presence.add(row.lifecycle.kind, row.lifecycle.user_id, row.lifecycle.time_ms)
        return presence

    def known_at(self, posting: Posting) -> tuple[Known, bool]:
        """Which events the posting knew, and whether that is certain or a guess.

        Certain is a live posting of a scope on one partition, of the first log, that the usage store has whole.
        Positions of a log that was adopted later do not compare with older ones.
        """
        bits = self.progress.revision_bits
        offset = posting.revision & ((1 << bits) - 1)
        generation = posting.revision >> bits
        latest_ms = posting.posted_at_ms + CLOCKS_APART_MS
        if not posting.correction and len(self.facts.partitions) == 1:
            [partition] = self.facts.partitions
            certain = (
                generation == self.progress.generation == 0
                and self.progress.stored_offsets.get(partition, 0) >= offset
            )
            if certain:
                return (lambda row: row.offset < offset), True
            return (lambda row: row.offset < offset and row.appended_at_ms <= latest_ms), False
        return (lambda row: row.appended_at_ms <= posting.posted_at_ms), False

    @property
    def last_live_posting(self) -> Posting | None:
        """By its revision."""
        live = [each for each in self.facts.postings if not each.correction]
        return max(live, key=lambda each: each.revision, default=None)

    def newer_than(self, known: Known) -> list[Row]:
        """The events that this leaves out."""
        return [row for row in self.facts.rows if not known(row)]

    def earlier_state(self) -> int | None:
        """How many of the newest events have to be left out to come to what is posted; None when none will do."""
        posted = self.facts.posted
        rows = sorted(self.facts.rows, key=_arrival)
        for left_out in range(1, min(len(rows), EARLIER_STATES) + 1):
            last = _arrival(rows[-left_out])
            if without_zeros(self.vector(_arrived_before(last))) == posted:
                return left_out
        return None


def _arrived_before(arrival: tuple[int, int, int]) -> Known:
    return lambda row: _arrival(row) < arrival


def _usage_sum(start: int, usage: Usage, card: RateCard) -> UsageSum:
    return UsageSum(
        start,
        usage.user_id,
        usage.node_id,
        _rates(usage, card).effective_from_ms,
        usage.asr_time_ms,
        usage.nmt_time_ms,
        usage.tts_time_ms,
        usage.gpu_active_time_ms,
    )


def _arrival(row: Row) -> tuple[int, int, int]:
    return row.appended_at_ms, row.partition, row.offset


# Whether it agrees --------------------------------------------------------------------------------------


def judge_cell(bench: Workbench) -> Judgement:
    """Whether the ledger has what it should have of the cell."""
    look = _look(bench)
    if agrees_frozen(look):
        if not look.stored and not bench.facts.usage:
            return Judgement(Agreement.AGREES, "there is no usage that counts, and the ledger has nothing")
        return Judgement(Agreement.AGREES, "the ledger has exactly what the stored events come to")
    differences = [
        Difference(account, look.stored.get(account, 0), look.posted.get(account, 0))
        for account in moved_us(look.stored, look.posted)
    ]
    if over_limit(look.stored):
        return Judgement(
            Agreement.DIFFERS, "the cell moves more than any cell may, so it is never posted", differences
        )
    agreement, why = _judge_frozen(bench, look) if bench.frozen else _judge_live(bench, look)
    return Judgement(agreement, why, differences)


def _look(bench: Workbench) -> CellLook:
    facts = bench.facts
    last = bench.last_live_posting
    at_posting: dict[str, int] | None = None
    if last is None:
        at_posting = {}
    else:
        known, certain = bench.known_at(last)
        vector = without_zeros(bench.vector(known))
        # What fits by a guess is no guess any more.
        if certain or vector == facts.posted:
            at_posting = vector
    appended = [row.appended_at_ms for row in facts.rows]
    return CellLook(
        scope=facts.scope,
        window_start_ms=facts.window_start_ms,
        posted=facts.posted,
        stored=bench.stored,
        at_cut=bench.stored,
        at_posting=at_posting,
        posting_covers_cut=False,
        appended_at_ms=max(appended, default=0),
    )


def _judge_live(bench: Workbench, look: CellLook) -> tuple[Agreement, str]:
    verdict = judge_live(look)
    if verdict is Verdict.DIFFERS:
        return Agreement.DIFFERS, "what is posted is not what the events come to that the last posting knew"
    if bench.progress.missing_entries:
        return Agreement.NOT_SETTLED, _behind(bench.progress)
    settled_ms = bench.progress.settled_before_ms
    if settled_ms is not None and settled_ms > look.appended_at_ms:
        return Agreement.DIFFERS, "settlement has read all of its events, and the ledger does not have them"
    if verdict is Verdict.BEHIND:
        last = bench.last_live_posting
        if last is None:
            return Agreement.NOT_SETTLED, f"nothing is posted yet of its {len(bench.facts.usage)} utterances"
        newer = len(bench.newer_than(bench.known_at(last)[0]))
        return Agreement.NOT_SETTLED, f"{newer} newer events are not in the last posting yet"
    return (
        Agreement.UNCLEAR,
        "newer events may be missing; it cannot be told which ones the last posting knew: ask again in a moment",
    )


def _judge_frozen(bench: Workbench, look: CellLook) -> tuple[Agreement, str]:
    progress = bench.progress
    frozen_ms, appended_ms = progress.resettled_frozen_before_ms, progress.resettled_appended_before_ms
    compared = (
        frozen_ms is not None
        and appended_ms is not None
        and look.window_start_ms < frozen_ms
        and bench.facts.last_appended_frozen_ms < appended_ms
    )
    if compared and not progress.missing_entries:
        return (
            Agreement.DIFFERS,
            "the window is frozen and the last resettle did not correct it: "
            "`metering resettle --since` a time before it does",
        )
    if look.posted == look.at_posting:
        last = bench.last_live_posting
        left_out = len(bench.facts.usage) if last is None else len(bench.newer_than(bench.known_at(last)[0]))
    else:
        found = bench.earlier_state()
        if found is None:
            return (
                Agreement.DIFFERS,
                "the window is frozen and what is posted fits no earlier state of its events; "
                "the next resettle corrects it",
            )
        left_out = found
    if progress.missing_entries:
        return Agreement.NOT_SETTLED, _behind(progress)
    return Agreement.NOT_SETTLED, f"{left_out} events came late: the next resettle charges them"


def _behind(progress: Progress) -> str:
    return f"the ledger is {progress.missing_entries} outbox entries behind"


def _judge_postings(facts: CellFacts) -> list[Judgement]:
    return [
        Judgement(
            Agreement.DIFFERS,
            f"the lines of outbox entry {each.entry} of this cell sum to {each.sum_us} us, not to zero",
        )
        for each in facts.postings
        if each.sum_us
    ]


def _judge_prices(facts: CellFacts, card: RateCard) -> list[Judgement]:
    """Prices are kept with the usage, for analysts; the bill does not use them."""
    found = []
    for row in facts.usage:
        rates = _rates(row.usage, card)
        expected = (cost_us(row.usage, rates), credit_us(row.usage, rates))
        # Priced by another version: it was announced when this usage was stored already.
        if row.rate_version == rates.name and (row.cost_us, row.credit_us) != expected:
            found.append(
                Judgement(
                    Agreement.DIFFERS,
                    f"utterance {row.usage.utterance_id} ({row.usage.source} {row.usage.id}): the usage store has "
                    f"the price {row.cost_us} us and the credit {row.credit_us} us, the rate card says "
                    f"{expected[0]} us and {expected[1]} us",
                )
            )
    return found
