"""Explanations of one thing: a ledger line, a money command, an utterance; laws: `metering.explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import msgspec

from metering.explain import (
    AccountSum,
    Agreement,
    Cell,
    CellFacts,
    Difference,
    Judgement,
    Known,
    Line,
    Posting,
    Progress,
    Row,
    Utterance,
    Workbench,
    by_time,
    explain_utterance,
    worst,
)
from metering.identity import body_digest
from metering.money import USER_PREFIX
from metering.presence import PRESENCE_MAX_MS
from schemas.events import Event, Lifecycle
from schemas.rate_card import RateCard
from schemas.rows import LifecycleRow, UsageRow

# A line -------------------------------------------------------------------------------------------------


class EventName(msgspec.Struct, frozen=True):
    """An utterance, by its names."""

    utterance_id: str
    source: str
    id: str
    cost_us: int


class Change(msgspec.Struct, frozen=True):
    """How a cell's line comes to its amount: the account's part of the cell at this posting, minus what its
    earlier lines of the cell had posted."""

    earlier: list[Line]
    """The account's lines of the cell before this one."""
    posted_before_us: int
    posted_after_us: int
    expected_after_us: int | None
    """The account's part of the cell by what this posting knew; None when that cannot be told."""
    known_by: str
    """revision, append_time, all (every stored event), or unknown."""
    utterances_known: int | None
    new_utterances: list[EventName]
    """That this posting brought; of the account's first line, all."""
    new_payers: list[str]
    gone_payers: list[str]
    judgement: Judgement


def explain_change(
    line: Line,
    account_lines: Sequence[Line],
    facts: CellFacts,
    progress: Progress,
    card: RateCard,
    presence_max_ms: int = PRESENCE_MAX_MS,
) -> Change:
    """Why this line of a cell moves what it moves. `account_lines` are all of the account's lines in the cell."""
    bench = Workbench(facts, progress, card, presence_max_ms)
    earlier = sorted((each for each in account_lines if each.seq < line.seq), key=lambda each: each.seq)
    before_us = sum(each.change_us for each in earlier)
    after_us = before_us + line.change_us
    index = _posting_of(line, facts.postings)
    later = facts.postings[index + 1 :]
    expected_us: int | None = None
    known: Known = bench.everything
    known_by = "unknown"
    for candidate, by, certain in _candidates(bench, facts.postings[index], last=not later):
        amount_us = bench.vector(candidate).get(line.account, 0)
        if amount_us == after_us or certain:
            expected_us, known, known_by = amount_us, candidate, by
            break
    new: list[UsageRow] = []
    came: list[str] = []
    gone: list[str] = []
    if known_by != "unknown":
        before = _known_before(bench, facts.postings[:index])
        new = [row for row in facts.usage if known(row) and not before(row)]
        payers, payers_before = _users(bench.vector(known)), _users(bench.vector(before))
        came, gone = sorted(payers - payers_before), sorted(payers_before - payers)
    return Change(
        earlier=earlier,
        posted_before_us=before_us,
        posted_after_us=after_us,
        expected_after_us=expected_us,
        known_by=known_by,
        utterances_known=None if known_by == "unknown" else sum(map(known, facts.usage)),
        new_utterances=[
            EventName(
                row.usage.utterance_id, row.usage.source, row.usage.id, explain_utterance(row, card).cost_us
            )
            for row in sorted(new, key=by_time)
        ],
        new_payers=came,
        gone_payers=gone,
        judgement=_judge_change(line, before_us, expected_us, later),
    )


def _posting_of(line: Line, postings: Sequence[Posting]) -> int:
    for index, each in enumerate(postings):
        if (each.entry, each.revision, each.correction) == (line.entry, line.revision, line.is_correction):
            return index
    raise ValueError(f"{line.account}#{line.seq} is in none of the postings of its cell")


def _candidates(bench: Workbench, posting: Posting, *, last: bool) -> list[tuple[Known, str, bool]]:
    """What the posting may have known, the surest first."""
    known, certain = bench.known_at(posting)
    by_revision = not posting.correction and len(bench.facts.partitions) == 1
    found: list[tuple[Known, str, bool]] = [(known, "revision" if by_revision else "append_time", certain)]
    if last:
        found.append((bench.everything, "all", False))
    return found


def _known_before(bench: Workbench, postings: Sequence[Posting]) -> Known:
    if not postings:
        return lambda _row: False
    return bench.known_at(postings[-1])[0]


def _users(vector: Mapping[str, int]) -> set[str]:
    return {account.removeprefix(USER_PREFIX) for account in vector if account.startswith(USER_PREFIX)}


def _judge_change(line: Line, before_us: int, expected_us: int | None, later: Sequence[Posting]) -> Judgement:
    if expected_us is None:
        return Judgement(
            Agreement.AGREES,
            "which events this posting knew cannot be told any more; only the sum over all lines is compared",
        )
    expected_change_us = expected_us - before_us
    if expected_change_us == line.change_us:
        return Judgement(Agreement.AGREES, "the line moves what was missing at its posting")
    difference = Difference(line.account, expected_change_us, line.change_us)
    if any(posting.correction for posting in later):
        # A flow that had lost its state, or an id that came again after its window froze: it knew other events.
        return Judgement(
            Agreement.AGREES,
            f"by the stored events it would have been {expected_change_us} us; a later resettle put it right",
            [difference],
        )
    return Judgement(
        Agreement.DIFFERS,
        f"by the events that this posting knew the line should move {expected_change_us} us",
        [difference],
    )


def judge_chain(line: Line, before: Line | None, after: Line | None) -> Judgement:
    """Whether the line adds up, and joins the lines next to it (those of seq - 1 and seq + 1, if any)."""
    if line.balance_before_us + line.change_us != line.balance_after_us:
        return Judgement(
            Agreement.DIFFERS,
            f"{line.balance_before_us} us and a change of {line.change_us} us do not make "
            f"{line.balance_after_us} us",
        )
    began_us = 0 if line.seq == 1 else before.balance_after_us if before is not None else None
    if began_us is None:
        return Judgement(Agreement.DIFFERS, f"line {line.seq - 1} of the account is missing")
    if began_us != line.balance_before_us:
        return Judgement(
            Agreement.DIFFERS,
            f"it begins at {line.balance_before_us} us, but the line before it ends at {began_us} us",
        )
    if after is not None and after.balance_before_us != line.balance_after_us:
        return Judgement(
            Agreement.DIFFERS,
            f"it ends at {line.balance_after_us} us, but the next line begins at {after.balance_before_us} us",
        )
    return Judgement(Agreement.AGREES, "before + change = after, and it joins the lines next to it")


# A money command ----------------------------------------------------------------------------------------


class Command(msgspec.Struct, frozen=True):
    """A money command and what it moved. `outcome` is empty when the result is not archived."""

    request_id: str
    kind: str
    account: str
    amount_us: int
    balance_us: int
    outcome: str
    actor: str
    note: str
    posted_at_ms: int
    lines: list[Line]
    judgements: list[Judgement]

    @property
    def judgement(self) -> Judgement:
        """Of the result and its lines."""
        return worst(self.judgements)


def judge_command(
    lines: Sequence[Line], account: str, amount_us: int, balance_us: int, *, archived: bool
) -> list[Judgement]:
    """Whether the lines of a command are a posting with its counter-posting, and what the result says."""
    sum_us = sum(line.change_us for line in lines)
    judgements = []
    if sum_us:
        judgements.append(Judgement(Agreement.DIFFERS, f"its lines sum to {sum_us} us, not to zero"))
    elif lines:
        judgements.append(
            Judgement(Agreement.AGREES, "its lines are a posting and its counter-posting: they sum to zero")
        )
    if not archived:
        judgements.append(Judgement(Agreement.AGREES, "its result is not archived"))
        return judgements
    own = [line for line in lines if line.account == account]
    moved = sum(line.change_us for line in own)
    if moved != amount_us:
        judgements.append(
            Judgement(
                Agreement.DIFFERS,
                f"the result says that {amount_us} us were moved, the ledger {moved} us",
                [Difference(account, amount_us, moved)],
            )
        )
    elif own and own[-1].balance_after_us != balance_us:
        judgements.append(
            Judgement(
                Agreement.DIFFERS,
                f"the result says that {balance_us} us were left, the ledger {own[-1].balance_after_us} us",
                [Difference(account, balance_us, own[-1].balance_after_us)],
            )
        )
    elif not lines:
        judgements.append(Judgement(Agreement.AGREES, "it moved nothing, and the ledger has nothing of it"))
    return judgements


# An utterance -------------------------------------------------------------------------------------------


class Occurrence(msgspec.Struct, frozen=True):
    """One message that carried the identity, as far as the store still has it."""

    partition: int
    offset: int
    appended_at_ms: int
    what: str
    """utterance, or the kind of a lifecycle event."""
    counts: bool
    same: bool
    """Whether it says the same as the one that counts."""


class Ratio(msgspec.Struct, frozen=True):
    """An exact fraction, in lowest terms."""

    numerator: int
    denominator: int

    @staticmethod
    def of(fraction: Fraction) -> Ratio:
        """The same, for JSON."""
        return Ratio(fraction.numerator, fraction.denominator)

    @property
    def fraction(self) -> Fraction:
        """To go on counting with."""
        return Fraction(self.numerator, self.denominator)


class Part(msgspec.Struct, frozen=True):
    """What a user pays of one utterance. A room's cost is pooled: the part of the share is exact as a fraction."""

    user_id: str
    owed_us: int
    """Of the whole cell."""
    paid_us: int
    of_utterance_us: Ratio
    lines: AccountSum | None


def explain_parts(utterance: Utterance, cell: Cell) -> tuple[Ratio, list[Part]]:
    """(the utterance's part of the cell's cost, what each payer pays of it); what they pay sums to its cost."""
    if cell.split == "own":
        payers = [payer for payer in cell.payers if payer.user_id == utterance.user_id]
    else:
        payers = cell.payers
    part = Fraction(utterance.cost_us, cell.total_us) if cell.total_us else Fraction(0)
    parts = []
    for payer in payers:
        owed = part * payer.owed_us if cell.split == "equal" else Fraction(utterance.cost_us)
        parts.append(Part(payer.user_id, payer.owed_us, payer.paid_us, Ratio.of(owed), payer.lines))
    return Ratio.of(part), parts


@dataclass(frozen=True, slots=True)
class IdentityFacts:
    """Everything stored under one identity (scope, source, id)."""

    scope: str
    source: str
    id: str
    usage: list[UsageRow] = field(default_factory=list)
    lifecycle: list[LifecycleRow] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """Every occurrence, in the order of the log."""
        rows: list[Row] = [*self.usage, *self.lifecycle]
        return sorted(rows, key=lambda row: (row.partition, row.offset))

    @property
    def counting(self) -> Row:
        """The occurrence with the smallest (partition, offset)."""
        return self.rows[0]


def explain_occurrences(facts: IdentityFacts) -> list[Occurrence]:
    """Every stored occurrence, in the order of the log, and which one counts."""
    counting = facts.counting
    said = body_digest(_event_of(counting))
    found = []
    for row in facts.rows:
        event = _event_of(row)
        what = event.kind.name.lower() if isinstance(event, Lifecycle) else "utterance"
        found.append(
            Occurrence(
                row.partition,
                row.offset,
                row.appended_at_ms,
                what,
                row is counting,
                body_digest(event) == said,
            )
        )
    return found


def _event_of(row: Row) -> Event:
    return row.usage if isinstance(row, UsageRow) else row.lifecycle
