"""Explanations are the bill again: their sums are those of `settle`, and whatever does not fit is said."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metering.cells import WINDOW_MS, cell_id, window_start_ms
from metering.explain import AccountSum, Agreement, CellFacts, Line, Posting, Progress, explain_cell, worst
from metering.explain_one import (
    IdentityFacts,
    explain_change,
    explain_occurrences,
    explain_parts,
    judge_chain,
    judge_command,
)
from metering.live import LiveScope
from metering.pricing import cost_us, credit_us
from metering.settle import Settling
from schemas.events import Event, Lifecycle, LifecycleKind, Usage
from schemas.rows import LifecycleRow, UsageRow
from sinks.balances_memory import MemoryBalances
from tests.support.events import START_MS, at, membership, usage
from tests.unit.test_live import CARD, JOINED, LEFT, events

BITS = 40

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LATER_MS = 1_000_000
"""After every event: when postings are made, in these tests."""

NEVER = {"resettled_frozen_before_ms": 0, "resettled_appended_before_ms": 0}


def progress(stored: int = 1_000, **known: object) -> Progress:
    values: dict[str, object] = {"frozen_before_ms": 0, "generation": 0, **NEVER, **known}
    return Progress(stored_offsets={0: stored}, revision_bits=BITS, **values)  # type: ignore[arg-type]


def usage_row(event: Usage, offset: int, partition: int = 0, appended_at_ms: int | None = None) -> UsageRow:
    rates = CARD.version_at(event.time_ms)
    assert rates is not None
    appended = START_MS + offset if appended_at_ms is None else appended_at_ms
    start = window_start_ms(event.time_ms)
    prices = cost_us(event, rates), credit_us(event, rates)
    return UsageRow(event, partition, offset, appended, start, *prices, rates.name)


def lifecycle_row(event: Lifecycle, offset: int, partition: int = 0) -> LifecycleRow:
    return LifecycleRow(event, partition, offset, START_MS + offset)


class Flow:
    """A scope that is settled event by event, and what the archive would have of it."""

    def __init__(self, scope: str = "room/r-1", partition: int = 0) -> None:
        self.live, self.clock_ms = LiveScope(scope, CARD), START_MS
        self.book = MemoryBalances(now_ms=lambda: self.clock_ms)
        self.scope, self.partition = scope, partition
        self.usage: list[UsageRow] = []
        self.membership: list[LifecycleRow] = []
        self._known: set[tuple[str, str]] = set()
        self._offset = 0

    def add(self, event: Event, *, settled: bool = True) -> None:
        """The next message of the log; with `settled` the flow sees it."""
        if settled:
            self.live.apply(at(event, self._offset, self.partition))
        if (event.source, event.id) not in self._known:
            self._known.add((event.source, event.id))
            if isinstance(event, Usage):
                self.usage.append(usage_row(event, self._offset, self.partition))
            else:
                self.membership.append(lifecycle_row(event, self._offset, self.partition))
        self._offset += 1
        self.clock_ms = START_MS + self._offset

    def post(self) -> None:
        """Emit and post what is dirty."""
        if (emission := self.live.emit()) is not None:
            self.book.post([emission])

    @property
    def lines(self) -> list[Line]:
        """The whole ledger."""
        fields = Line.__struct_fields__
        return [
            Line(**{name: getattr(line, name) for name in fields} | {"reason": line.reason.value})
            for entry in self.book.outbox
            for line in entry.lines
        ]

    def cell(self, start: int, lines: list[Line] | None = None) -> CellFacts:
        """The facts of one cell, by the ledger or by other lines."""
        own = [line for line in self.lines if line.cell_id == cell_id(self.scope, start)]
        return facts_of(
            self.scope,
            start,
            [row for row in self.usage if row.window_start_ms == start],
            self.membership,
            own if lines is None else lines,
            frozenset({self.partition}),
        )


def facts_of(
    scope: str,
    start: int,
    rows: list[UsageRow],
    members: list[LifecycleRow],
    lines: list[Line],
    partitions: frozenset[int] = frozenset({0}),
) -> CellFacts:
    sums = []
    for account in sorted({line.account for line in lines}):
        own = [line for line in lines if line.account == account]
        seqs = [line.seq for line in own]
        sums.append(AccountSum(account, sum(line.change_us for line in own), len(own), min(seqs), max(seqs)))
    postings = []
    for entry, revision, correction in sorted(
        {(line.entry, line.revision, line.is_correction) for line in lines}
    ):
        own = [line for line in lines if (line.entry, line.revision) == (entry, revision)]
        moved = sum(line.change_us for line in own)
        postings.append(Posting(entry, revision, correction, own[0].posted_at_ms, len(own), moved))
    return CellFacts(scope, start, rows, members, sums, postings, partitions, START_MS)


def settled(log: list[Event]) -> dict[int, dict[str, int]]:
    """Window start -> vector, by the pure function."""
    settling = Settling(CARD)
    for event in log:
        settling.add(event)
    return {start: vector for _, start, vector, _ in settling.vectors()}


def run(log: list[Event], chance: random.Random, repeats: int = 3) -> Flow:
    """All of it, with some messages twice and postings in between, and posted at the end."""
    flow = Flow()
    for event in log:
        flow.add(event)
        if chance.random() < 0.3:
            flow.add(event)
        if chance.random() < 0.5:
            flow.post()
    flow.post()
    return flow


@few
@given(events(), st.randoms(use_true_random=False))
def test_a_cell_is_explained_by_what_settle_says(log: list[Event], chance: random.Random) -> None:
    """Every payer's, node's and the platform's amount is that of the pure bill, and the ledger agrees."""
    flow = run(log, chance)
    for start, vector in settled(log).items():
        cell = explain_cell(flow.cell(start), progress(), CARD)
        assert cell.judgement.agreement is Agreement.AGREES
        explained = {f"user/{payer.user_id}": -payer.owed_us for payer in cell.payers}
        explained |= {f"node/{node.node_id}": node.earned_us for node in cell.nodes}
        explained["platform/revenue"] = cell.revenue_us
        assert explained == vector
        assert [payer.paid_us for payer in cell.payers] == [payer.owed_us for payer in cell.payers]
        assert sum(each.cost_us for each in cell.utterances) == cell.total_us
        assert sum(stage.cost_us for each in cell.utterances for stage in each.stages) == cell.total_us
        assert sum(node.earned_us for node in cell.nodes) == sum(each.credit_us for each in cell.utterances)
        assert cell.share_us * cell.payer_count + cell.remainder_us == cell.total_us
        extra = [payer.remainder_us for payer in cell.payers]
        assert extra == [1] * cell.remainder_us + [0] * (cell.payer_count - cell.remainder_us)
        assert all(payer.joined_ms is not None or payer.utterances for payer in cell.payers)


@few
@given(events(), st.randoms(use_true_random=False))
def test_every_line_moves_what_was_missing_at_its_posting(log: list[Event], chance: random.Random) -> None:
    """By its revision it is told what each posting knew, and no utterance is new twice to an account."""
    flow = run(log, chance)
    for start in settled(log):
        facts = flow.cell(start)
        brought: dict[str, list[str]] = {}
        for line in [line for line in flow.lines if line.cell_id == facts.cell_id]:
            own = [
                each for each in flow.lines if (each.account, each.cell_id) == (line.account, line.cell_id)
            ]
            change = explain_change(line, own, facts, progress(), CARD)
            assert change.judgement.agreement is Agreement.AGREES
            assert change.known_by == "revision"
            assert change.expected_after_us == change.posted_after_us
            brought.setdefault(line.account, []).extend(each.id for each in change.new_utterances)
        for account, ids in brought.items():
            assert len(ids) == len(set(ids)), account


@few
@given(events(), st.randoms(use_true_random=False), st.integers(1, 9))
def test_a_line_that_was_tampered_with_does_not_agree(
    log: list[Event], chance: random.Random, extra: int
) -> None:
    """Whichever line it is, by however little; the difference is named."""
    flow = run(log, chance)
    lines = flow.lines
    if not lines:
        return
    victim = chance.choice(lines)
    forged = msgspec.structs.replace(victim, change_us=victim.change_us + extra)
    start = int(victim.cell_id.rpartition("@")[2])
    own = [forged if line is victim else line for line in lines if line.cell_id == victim.cell_id]
    cell = explain_cell(flow.cell(start, own), progress(), CARD)
    assert cell.judgement.agreement is Agreement.DIFFERS
    [difference] = cell.judgements[0].differences
    assert (difference.account, difference.found_us - difference.expected_us) == (victim.account, extra)


def test_two_forged_lines_that_cancel_out_do_not_agree() -> None:
    """The cell's sum is right, but neither line moves what was missing at its posting."""
    flow = Flow("session/s-1")
    flow.add(usage("e-1", room=None))
    flow.post()
    flow.add(usage("e-2", room=None))
    flow.post()
    own = [line for line in flow.lines if line.account == "user/u-1"]
    forged = [
        msgspec.structs.replace(own[0], change_us=own[0].change_us - 5),
        msgspec.structs.replace(own[1], change_us=own[1].change_us + 5),
    ]
    rest = [line for line in flow.lines if line.account != "user/u-1"]
    facts = flow.cell(START_MS, [*forged, *rest])
    cell = explain_cell(facts, progress(), CARD)
    assert cell.judgements[0].agreement is Agreement.AGREES
    assert [each.agreement for each in cell.judgements[1:]] == [Agreement.DIFFERS] * 2, "postings sum to zero"
    change = explain_change(forged[0], forged, facts, progress(), CARD)
    assert change.judgement.agreement is Agreement.DIFFERS
    assert (change.judgement.differences[0].expected_us, change.judgement.differences[0].found_us) == (
        own[0].change_us,
        own[0].change_us - 5,
    )


@few
@given(events(), events(), st.randoms(use_true_random=False))
def test_newer_events_are_not_settled_yet(
    log: list[Event], newer: list[Event], chance: random.Random
) -> None:
    """What no posting knew is no disagreement, unless settlement says that it is done with it."""
    flow = run(log, chance)
    for event in newer:
        flow.add(msgspec.structs.replace(event, id=f"newer-{event.id}"), settled=False)
    for start in {row.window_start_ms for row in flow.usage}:
        facts = flow.cell(start)
        found = explain_cell(facts, progress(), CARD).judgement
        assert found.agreement in (Agreement.AGREES, Agreement.NOT_SETTLED)
        done = explain_cell(facts, progress(settled_before_ms=START_MS + LATER_MS), CARD).judgement
        assert done.agreement is (
            Agreement.AGREES if found.agreement is Agreement.AGREES else Agreement.DIFFERS
        )


def test_a_cell_that_was_never_posted_is_not_settled_yet() -> None:
    """Its differences are shown all the same."""
    facts = facts_of("session/s-1", START_MS, [usage_row(usage("e-1", room=None), 0)], [], [])
    cell = explain_cell(facts, progress(), CARD)
    assert cell.judgement.agreement is Agreement.NOT_SETTLED
    assert "nothing is posted yet of its 1 utterances" in cell.judgement.why
    assert {each.account for each in cell.judgement.differences} == {
        "user/u-1",
        "node/n-1",
        "platform/revenue",
    }


def two_partitions() -> CellFacts:
    """A posting of one of two utterances that lie on two partitions."""
    flow = Flow("session/s-1")
    flow.add(usage("e-1", room=None))
    flow.post()
    late = usage_row(usage("e-2", room=None), 0, partition=1, appended_at_ms=START_MS + 500)
    facts = flow.cell(START_MS)
    return replace(facts, usage=[*facts.usage, late], partitions=frozenset({0, 1}))


def test_on_several_partitions_a_guess_is_believed_when_it_fits() -> None:
    """Times of arrival tell what the posting knew; when they do not, it is said that it cannot be told."""
    facts = two_partitions()
    [line] = [line for line in lines_of_sums(facts) if line.account == "user/u-1"]
    assert explain_cell(facts, progress(), CARD).judgement.agreement is Agreement.NOT_SETTLED
    change = explain_change(line, [line], facts, progress(), CARD)
    assert (change.known_by, change.expected_after_us) == ("append_time", line.change_us)
    forged = msgspec.structs.replace(line, change_us=line.change_us - 1)
    sums = [
        msgspec.structs.replace(each, change_us=forged.change_us) if each.account == line.account else each
        for each in facts.sums
    ]
    wrong = replace(facts, sums=sums)
    assert explain_cell(wrong, progress(), CARD).judgement.agreement is Agreement.UNCLEAR
    unknown = explain_change(forged, [forged], wrong, progress(), CARD)
    assert (unknown.known_by, unknown.expected_after_us) == ("unknown", None)
    assert unknown.new_utterances == []


def lines_of_sums(facts: CellFacts) -> list[Line]:
    """One line an account, as the sums of a cell with one posting say."""
    [posting] = facts.postings
    return [
        Line(each.account, each.first_seq, posting.posted_at_ms, "charge", each.change_us, 0, each.change_us,
             facts.cell_id, posting.revision, "", "", "", "", 1, posting.entry)
        for each in facts.sums
    ]  # fmt: skip


FROZEN = {"frozen_before_ms": START_MS + WINDOW_MS}


def test_late_usage_waits_for_a_resettle_and_then_it_must_be_there() -> None:
    """Not settled yet until a resettle has compared the window; then it does not agree."""
    flow = Flow("session/s-1")
    flow.add(usage("e-1", room=None))
    flow.post()
    flow.add(usage("late", room=None), settled=False)
    facts = flow.cell(START_MS)
    waiting = explain_cell(facts, progress(**FROZEN), CARD).judgement
    assert (waiting.agreement, waiting.why) == (
        Agreement.NOT_SETTLED,
        "1 events came late: the next resettle charges them",
    )
    compared = {"resettled_frozen_before_ms": START_MS + WINDOW_MS, "resettled_appended_before_ms": 2**60}
    assert explain_cell(facts, progress(**FROZEN | compared), CARD).judgement.agreement is Agreement.DIFFERS
    behind = progress(**FROZEN | compared, missing_entries=2)
    assert "2 outbox entries behind" in explain_cell(facts, behind, CARD).judgement.why


def test_a_frozen_cell_that_fits_no_earlier_state_does_not_agree() -> None:
    """Also while the next resettle would correct it."""
    flow = Flow("session/s-1")
    flow.add(usage("e-1", room=None))
    flow.post()
    flow.add(usage("late", room=None), settled=False)
    lines = [msgspec.structs.replace(line, change_us=line.change_us * 3) for line in flow.lines]
    found = explain_cell(flow.cell(START_MS, lines), progress(**FROZEN), CARD).judgement
    assert found.agreement is Agreement.DIFFERS
    assert "the next resettle corrects it" in found.why


def corrected() -> tuple[Flow, list[Line]]:
    """A cell with a live posting and a resettle that charged a late utterance."""
    flow = Flow("session/s-1")
    flow.add(usage("e-1", room=None, gpu=0))
    flow.post()
    flow.add(usage("late", room=None, gpu=0), settled=False)
    live = flow.lines
    more = [
        msgspec.structs.replace(
            line, seq=line.seq + 1, reason="resettle", revision=3, entry=line.entry + 1,
            posted_at_ms=START_MS + 100,
        )
        for line in live
    ]  # fmt: skip
    return flow, [*live, *more]


def test_a_resettle_is_explained_by_what_it_brought() -> None:
    """Its line moves the late utterance; what a later resettle put right is held against no earlier line."""
    flow, lines = corrected()
    facts = flow.cell(START_MS, lines)
    assert explain_cell(facts, progress(**FROZEN), CARD).judgement.agreement is Agreement.AGREES
    own = [line for line in lines if line.account == "user/u-1"]
    first, second = (explain_change(line, own, facts, progress(**FROZEN), CARD) for line in own)
    assert (first.known_by, [each.id for each in first.new_utterances]) == ("revision", ["e-1"])
    assert [each.id for each in second.new_utterances] == ["late"]
    assert (second.posted_before_us, second.posted_after_us) == (-220_000, -440_000)
    # As if the flow had lost e-1, and the resettle had brought both.
    forgotten = [
        msgspec.structs.replace(own[0], change_us=-1),
        msgspec.structs.replace(own[1], change_us=-439_999),
    ]
    rest = [line for line in lines if line.account != "user/u-1"]
    facts = flow.cell(START_MS, [*forgotten, *rest])
    change = explain_change(forgotten[0], forgotten, facts, progress(**FROZEN), CARD)
    assert change.judgement.agreement is Agreement.AGREES
    assert "a later resettle put it right" in change.judgement.why


def test_what_came_after_a_resettle_waits_for_the_next_one() -> None:
    """What a resettle knew is not recorded: that the ledger is an earlier state of the cell tells it."""
    flow, lines = corrected()
    flow.add(usage("later", room=None, gpu=0), settled=False)
    found = explain_cell(flow.cell(START_MS, lines), progress(**FROZEN), CARD).judgement
    assert (found.agreement, found.why) == (
        Agreement.NOT_SETTLED,
        "1 events came late: the next resettle charges them",
    )


def test_who_left_the_split_has_lines_and_no_part() -> None:
    """A `left` that came after the first posting takes a member back to zero."""
    flow = Flow()
    flow.add(membership("j-1", JOINED, user="u-1"))
    flow.add(membership("j-2", JOINED, user="u-2"))
    flow.add(usage("e-1", user="u-1"))
    flow.post()
    flow.add(membership("l-2", LEFT, user="u-2"))
    flow.post()
    facts = flow.cell(START_MS)
    cell = explain_cell(facts, progress(), CARD)
    assert [payer.user_id for payer in cell.payers] == ["u-1"]
    assert [(each.account, each.change_us, each.lines) for each in cell.others] == [("user/u-2", 0, 2)]
    own = [line for line in flow.lines if line.account == "user/u-2"]
    change = explain_change(own[1], own, facts, progress(), CARD)
    assert (change.gone_payers, change.new_payers, change.new_utterances) == (["u-2"], [], [])
    assert change.judgement.agreement is Agreement.AGREES


def test_a_payer_says_why() -> None:
    """Present until left, until the room closed, until presence_max; or for usage alone."""
    log: list[Event] = [
        membership("j-1", JOINED, START_MS, user="left"),
        membership("l-1", LEFT, START_MS + 5, user="left"),
        membership("j-2", JOINED, START_MS + 6, user="closed"),
        membership("c", LifecycleKind.CLOSED, START_MS + 7),
        membership("j-3", JOINED, START_MS + 8, user="stays"),
        usage("e-1", START_MS + 9, user="speaks"),
    ]
    flow = Flow()
    for event in log:
        flow.add(event)
    flow.post()
    payers = {payer.user_id: payer for payer in explain_cell(flow.cell(START_MS), progress(), CARD).payers}
    assert {name: (payer.until_ms, payer.ended_by) for name, payer in payers.items()} == {
        "left": (START_MS + 5, "left"),
        "closed": (START_MS + 7, "closed"),
        "stays": (START_MS + 8 + 12 * 3_600_000, "presence_max"),
        "speaks": (None, None),
    }


@few
@given(events(), st.randoms(use_true_random=False))
def test_what_is_paid_of_an_utterance_sums_to_its_cost(log: list[Event], chance: random.Random) -> None:
    """As exact fractions; and over all utterances of a cell each payer pays their share of it."""
    flow = run(log, chance)
    for start in settled(log):
        cell = explain_cell(flow.cell(start), progress(), CARD)
        paid: dict[str, Fraction] = {}
        for utterance in cell.utterances:
            part, parts = explain_parts(utterance, cell)
            assert part.fraction * cell.total_us == utterance.cost_us
            assert sum(each.of_utterance_us.fraction for each in parts) == utterance.cost_us
            for each in parts:
                paid[each.user_id] = paid.get(each.user_id, Fraction(0)) + each.of_utterance_us.fraction
        assert paid == {payer.user_id: payer.owed_us for payer in cell.payers}


def test_in_a_session_everybody_pays_for_their_own() -> None:
    """The utterance's user alone, all of its cost."""
    flow = Flow("session/s-1")
    flow.add(usage("e-1", room=None, user="u-1", asr=1, nmt=0, tts=0, gpu=0))
    flow.add(usage("e-2", room=None, user="u-2", asr=2, nmt=0, tts=0, gpu=0))
    flow.post()
    cell = explain_cell(flow.cell(START_MS), progress(), CARD)
    part, [paid] = explain_parts(cell.utterances[1], cell)
    assert (part.numerator, part.denominator) == (2, 3)
    assert (paid.user_id, paid.of_utterance_us.fraction, paid.owed_us, paid.paid_us) == (
        "u-2", 2_000, 2_000, 2_000,
    )  # fmt: skip


def test_the_occurrence_with_the_smallest_position_counts() -> None:
    """Of both kinds of events; a repeat is told from one that says something else."""
    first = usage_row(usage("e-1"), 5, partition=1)
    repeat = usage_row(usage("e-1"), 9, partition=1)
    other = usage_row(usage("e-1", asr=7), 2, partition=3)
    facts = IdentityFacts("room/r-1", "node/n-1", "e-1", [other, repeat, first], [])
    assert facts.counting is first
    assert [(each.offset, each.counts, each.same) for each in explain_occurrences(facts)] == [
        (5, True, True), (9, False, True), (2, False, False),
    ]  # fmt: skip
    claimed = lifecycle_row(membership("e-1", JOINED), 4)
    taken = replace(facts, lifecycle=[claimed])
    assert taken.counting is claimed
    assert [each.what for each in explain_occurrences(taken)] == [
        "joined",
        "utterance",
        "utterance",
        "utterance",
    ]


def line(seq: int, before_us: int, change_us: int, after_us: int, account: str = "user/u-1") -> Line:
    return Line(account, seq, 0, "top_up", change_us, before_us, after_us, "", 0, "", "r", "a", "n", 1, 1)


@pytest.mark.parametrize(
    ("asked", "before", "after", "words"),
    [
        (line(1, 0, 5, 5), None, None, ""),
        (line(2, 5, 5, 10), line(1, 0, 5, 5), line(3, 10, -1, 9), ""),
        (line(1, 0, 5, 6), None, None, "do not make 6 us"),
        (line(1, 1, 5, 6), None, None, "but the line before it ends at 0 us"),
        (line(2, 5, 5, 10), None, None, "line 1 of the account is missing"),
        (line(2, 4, 5, 9), line(1, 0, 5, 5), None, "but the line before it ends at 5 us"),
        (line(2, 5, 5, 10), line(1, 0, 5, 5), line(3, 9, 0, 9), "but the next line begins at 9 us"),
    ],
)
def test_a_line_joins_its_neighbours(
    asked: Line, before: Line | None, after: Line | None, words: str
) -> None:
    """It adds up, begins where the one before ended, and ends where the next one begins."""
    found = judge_chain(asked, before, after)
    assert found.agreement is (Agreement.DIFFERS if words else Agreement.AGREES)
    assert words in found.why


@pytest.mark.parametrize(
    ("lines", "amount_us", "balance_us", "agrees"),
    [
        ([line(1, 0, 5, 5), line(1, 0, -5, -5, "platform/top_ups")], 5, 5, True),
        ([], 0, 7, True),
        ([line(1, 0, 5, 5), line(1, 0, -4, -4, "platform/top_ups")], 5, 5, False),
        ([line(1, 0, 5, 5), line(1, 0, -5, -5, "platform/top_ups")], 6, 5, False),
        ([line(1, 0, 5, 5), line(1, 0, -5, -5, "platform/top_ups")], 5, 4, False),
        ([], 5, 5, False),
    ],
)
def test_a_command_has_its_posting_and_counter_posting(
    lines: list[Line], amount_us: int, balance_us: int, agrees: bool
) -> None:
    """They sum to zero, and move and leave what the archived result says."""
    found = worst(judge_command(lines, "user/u-1", amount_us, balance_us, archived=True))
    assert (found.agreement is Agreement.AGREES) is agrees


def test_a_stored_price_that_is_not_the_cards_is_named() -> None:
    """By the version that priced it; priced by an older version it is no fault."""
    flow = Flow("session/s-1")
    flow.add(usage("e-1", room=None))
    flow.post()
    facts = flow.cell(START_MS)
    wrong = replace(facts, usage=[msgspec.structs.replace(facts.usage[0], cost_us=1)])
    assert explain_cell(wrong, progress(), CARD).judgement.agreement is Agreement.DIFFERS
    older = replace(facts, usage=[msgspec.structs.replace(facts.usage[0], cost_us=1, rate_version="older")])
    assert explain_cell(older, progress(), CARD).judgement.agreement is Agreement.AGREES
