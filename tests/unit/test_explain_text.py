"""How an explanation looks, what long tables leave out, and that what is shown cannot act on a terminal."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from app.errors import CommandError
from app.explain import (
    Asked,
    AskedCell,
    AskedLine,
    AskedName,
    AskedScope,
    CellExplained,
    CommandExplained,
    Explained,
    Letter,
    LineExplained,
    exit_code,
    recognise,
    to_json,
)
from app.explain_text import ROWS, show
from metering.explain import Agreement, Judgement, explain_cell
from metering.explain_one import explain_change
from tests.support.events import START_MS, membership, usage
from tests.unit.test_explain import CARD, Flow, progress
from tests.unit.test_live import JOINED

GOLDEN = """\
user/u-1#2   charge   2026-01-01 00:00:00.005 UTC
  before  -0.0000 min (-333 us)
  change  -0.0000 min (-333 us)
  after   -0.0000 min (-666 us)
  cell room/r-1@1767225600000, revision 5, epoch 1, outbox entry 2

Cell room/r-1@1767225600000   2026-01-01 00:00 to 00:01 UTC, live
  rates of 1970-01-01T00:00:00.000Z
Utterances (2), ms x us per ms

  utterance   time (UTC)     user   node        asr        nmt        tts   cost, us       gpu   credit, us
 ───────────────────────────────────────────────────────────────────────────────────────────────────────────
  ut-e-0      00:00:10.000   u-0    n-1    1 x 1000   0 x 1000   0 x 1000      1,000   1 x 500          500
  ut-e-1      00:00:10.000   u-0    n-1    1 x 1000   0 x 1000   0 x 1000      1,000   1 x 500          500

Total 0.0000 min (2,000 us) / 3 payers = 666 us each, remainder 2 us: one each to the smallest sha256(cell|user)

  payer      why                                                                 sha256       owes, min   owes, us   ledger, us   lines
 ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
  user/u-2   joined 00:00:00, never left, counted until 12:00:00                 a7768324..      0.0000    666 + 1          667   user/u-2#1 .. #2 (2 lines)
  user/u-0   joined 00:00:00, never left, counted until 12:00:00, 2 utterances   b63d1014..      0.0000    666 + 1          667   user/u-0#1 .. #2 (2 lines)
  user/u-1   joined 00:00:00, never left, counted until 12:00:00                 d39e9d3e..      0.0000        666          666   user/u-1#1 .. #2 (2 lines)

node/n-1: 2 utterances, 2 ms GPU, earns 0.0000 min (1,000 us); the ledger has 1,000 us (node/n-1#1 .. #2 (2 lines))
Platform: cost - credit = 1,000 us; the ledger has 1,000 us

This line
  user/u-1's part of the cell at this posting: -666 us (of 2 utterances, known by its revision)
  its earlier lines of the cell had posted: -333 us (#1)
  so it moves -333 us
  new since the posting before: ut-e-1 (1,000 us)

AGREES: the ledger has exactly what the stored events come to
"""  # noqa: E501


def shown(explained: Explained, *, every_row: bool = False) -> list[str]:
    output = io.StringIO()
    show(explained, Console(file=output, width=200), every_row=every_row)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def room(members: int, utterances: int = 1) -> Flow:
    """A room in which one member speaks, posted after each utterance."""
    flow = Flow()
    for number in range(members):
        flow.add(membership(f"j-{number}", JOINED, START_MS + number, user=f"u-{number}"))
    for number in range(utterances):
        flow.add(usage(f"e-{number}", START_MS + 10_000, user="u-0", asr=1, nmt=0, tts=0, gpu=1))
        flow.post()
    return flow


def explained_line(flow: Flow, account: str, seq: int) -> LineExplained:
    facts = flow.cell(START_MS)
    own = [line for line in flow.lines if line.account == account]
    cell = explain_cell(facts, progress(), CARD)
    change = explain_change(own[seq - 1], own, facts, progress(), CARD)
    chain = Judgement(Agreement.AGREES, "")
    return LineExplained(Agreement.AGREES, cell.judgement.why, own[seq - 1], chain, cell=cell, change=change)


def test_a_line_is_told_from_its_balance_to_its_utterances() -> None:
    """In minutes and in microseconds; every ledger line that is named can be asked for."""
    lines = shown(explained_line(room(members=3, utterances=2), "user/u-1", 2))
    assert lines == GOLDEN.splitlines()


@pytest.mark.parametrize(("every_row", "expected"), [(False, ROWS), (True, ROWS + 5)])
def test_long_tables_are_cut_but_the_asked_account_is_there(every_row: bool, expected: int) -> None:
    """Whoever asks for a line sees its payer, wherever the hash puts them."""
    flow = room(members=ROWS + 5)
    cell = explain_cell(flow.cell(START_MS), progress(), CARD)
    last = f"user/{cell.payers[-1].user_id}"
    lines = shown(explained_line(flow, last, 1), every_row=every_row)
    payers = [line for line in lines if line.startswith("  user/u-") and "joined" in line]
    assert len(payers) == expected + (not every_row)
    assert any(line.startswith(f"  {last} ") for line in payers)
    assert any("and 4 more payers: --all shows them" in line for line in lines) is not every_row


def test_what_does_not_agree_is_said_with_both_amounts() -> None:
    """Expected and found, account by account, and the exit code."""
    flow = room(members=2)
    forged = [msgspec.structs.replace(line, change_us=line.change_us + 1) for line in flow.lines]
    cell = explain_cell(flow.cell(START_MS, forged), progress(), CARD)
    explained = CellExplained(cell.judgement.agreement, cell.judgement.why, cell)
    lines = shown(explained)
    assert any(line.startswith("DOES NOT AGREE: ") for line in lines)
    assert "  user/u-1: expected -500 us, the ledger has -499 us" in lines
    assert exit_code(explained) == 1


def test_refused_bytes_cannot_act_on_a_terminal() -> None:
    """Control characters are escaped, and markup is text."""
    letter = Letter("lingua.events", 0, 1, "not_json", "[bold]\x1b]0;x\x07", START_MS, False, "\x1b[2J[red]x")
    explained = CommandExplained(Agreement.AGREES, "it was refused", None, [letter])
    text = "\n".join(shown(explained))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]\\x1b]0;x\\x07" in text
    assert "\\x1b[2J[red]x" in text
    assert msgspec.json.decode(to_json(explained))["dead_letters"][0]["value"] == "\x1b[2J[red]x"


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("user/u-5#12",), AskedLine("user/u-5", 12)),
        (("user/u-5", "12"), AskedLine("user/u-5", 12)),
        (("platform/revenue#1",), AskedLine("platform/revenue", 1)),
        (("node/a#b#7",), AskedLine("node/a#b", 7)),
        (("room/r-9@1767225600000",), AskedCell("room/r-9", START_MS)),
        (("session/s@-60000",), AskedCell("session/s", -60_000)),
        (("room/r-9@2026-01-01T00:00:59.999Z",), AskedCell("room/r-9", START_MS)),
        (("room/r@x@0",), AskedCell("room/r@x", 0)),
        (("room/r-9",), AskedScope("room/r-9")),
        (("01JD:x.y_z-1",), AskedName("01JD:x.y_z-1")),
    ],
)
def test_a_word_says_what_it_means(words: tuple[str, ...], asked: Asked) -> None:
    """As ledger, statement and bill name things."""
    assert recognise(*words) == asked


@pytest.mark.parametrize(
    "words",
    [
        ("",), ("user/u-5",), ("user/u-5#",), ("user/u-5#-1",), ("user/u-5#1.5",), ("room/",), ("room/r@",),
        ("room/r@1",), ("room/@0",), ("other/x",), ("ut-1", "2"), ("user/u-5#1", "x"),
        ("room/r@2026-02-30T00:00:00Z",),
    ],
)  # fmt: skip
def test_a_word_that_means_nothing_is_refused(words: tuple[str, ...]) -> None:
    """One line, exit code 2."""
    with pytest.raises(CommandError) as refused:
        recognise(*words)
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)
