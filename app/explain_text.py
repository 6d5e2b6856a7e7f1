"""How explanations look on a screen: minutes for people, microseconds for proof.

Everything that came from outside (ids of sources, notes, refused bytes) is shown as text: it holds no markup, and
its control characters are escaped, so that it can do nothing to a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.explain import (
    CellExplained,
    CommandExplained,
    EventExplained,
    Explained,
    Letter,
    LineExplained,
    ScopeExplained,
    UtteranceExplained,
)
from app.tables import minutes_text
from metering.explain import AccountSum, Agreement, Cell, Judgement, Line, Payer, Utterance
from metering.explain_one import Change, Command
from metering.money import USER_PREFIX
from schemas.rfc3339 import FIRST_MS, LAST_MS, format_rfc3339_ms

ROWS = 20
"""How many rows of a long table are shown, unless all are asked for."""

LETTER_CHARACTERS = 200

WORDS = {
    Agreement.AGREES: "AGREES",
    Agreement.NOT_SETTLED: "NOT SETTLED YET",
    Agreement.UNCLEAR: "NOT CLEAR",
    Agreement.DIFFERS: "DOES NOT AGREE",
}
STYLES = {
    Agreement.AGREES: "bold green",
    Agreement.NOT_SETTLED: "bold yellow",
    Agreement.UNCLEAR: "bold yellow",
    Agreement.DIFFERS: "bold red",
}
KNOWN_BY = {
    "revision": "by its revision",
    "append_time": "by the times of arrival",
    "all": "which is all that is stored",
}

_Row = TypeVar("_Row")


def show(explained: Explained, console: Console, *, every_row: bool = False) -> None:
    """Print an explanation; long tables in part, unless `every_row`."""
    _Shown(console, every_row).show(explained)


def printable(text: str) -> str:
    """The text with its control characters escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def amount(amount_us: int, sign: bool = False) -> str:
    """Minutes, and microseconds."""
    return f"{minutes_text(amount_us, sign)} min ({amount_us:{'+' if sign else ''},} us)"


def instant(at_ms: int) -> str:
    """To the millisecond, UTC; the edges of what can be written stand for what is beyond."""
    return format_rfc3339_ms(min(max(at_ms, FIRST_MS), LAST_MS)).replace("T", " ").removesuffix("Z")


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def line_names(sums: AccountSum | None) -> str:
    """The ledger lines of an account in a cell, as they can be asked for."""
    if sums is None:
        return "none"
    first = f"{sums.account}#{sums.first_seq}"
    if sums.lines == 1:
        return first
    return f"{first} .. #{sums.last_seq} ({sums.lines} lines)"


class _Shown:
    def __init__(self, console: Console, every_row: bool) -> None:
        self._console = console
        self._every_row = every_row

    def show(self, explained: Explained) -> None:
        if isinstance(explained, LineExplained):
            self._line(explained)
        elif isinstance(explained, CellExplained):
            self._cell(explained.cell, None)
        elif isinstance(explained, UtteranceExplained):
            for event in explained.events:
                self._event(event)
            self._letters(explained.dead_letters)
        elif isinstance(explained, CommandExplained):
            if explained.command is not None:
                self._command(explained.command)
            self._letters(explained.dead_letters)
        else:
            self._scope(explained)
        self._verdict(explained)

    def _say(self, text: str = "", style: str = "") -> None:
        self._console.print(Text(printable(text), style=style), soft_wrap=True)

    def _head(self, text: str) -> None:
        self._say(text, "bold")

    def _table(self, table: Table) -> None:
        self._console.print(table)

    def _some(self, rows: Sequence[_Row], keep: Iterable[_Row] = ()) -> tuple[list[_Row], int]:
        """(the rows to show, how many are left out); those to `keep` are shown in any case."""
        if self._every_row or len(rows) <= ROWS:
            return list(rows), 0
        shown = list(rows[:ROWS])
        shown += [row for row in keep if row not in shown]
        return shown, len(rows) - len(shown)

    def _left_out(self, count: int, what: str) -> None:
        if count:
            self._say(f"  and {count} more {what}: --all shows them")

    # A line -------------------------------------------------------------------------------------------

    def _line(self, explained: LineExplained) -> None:
        line = explained.line
        self._head(f"{line.account}#{line.seq}   {line.reason}   {instant(line.posted_at_ms)} UTC")
        self._say(f"  before  {amount(line.balance_before_us)}")
        self._say(f"  change  {amount(line.change_us, sign=True)}")
        self._say(f"  after   {amount(line.balance_after_us)}")
        place = f"epoch {line.epoch}, outbox entry {line.entry}"
        if line.cell_id:
            counted = "resettle" if line.is_correction else "revision"
            place = f"cell {line.cell_id}, {counted} {line.revision}, {place}"
        self._say(f"  {place}")
        for grant_id, change_us in line.grants.items():
            self._say(f"  grant {grant_id}: {amount(change_us, sign=True)}")
        if line.grants and line.cell_id:
            rest_us = line.change_us - sum(line.grants.values())
            self._say(f"  rest of the balance: {amount(rest_us, sign=True)}")
        if explained.cell is not None:
            self._say()
            self._cell(explained.cell, line)
        if explained.change is not None:
            self._say()
            self._change(line, explained.change)
        if explained.command is not None:
            self._say()
            self._command(explained.command)

    def _change(self, line: Line, change: Change) -> None:
        self._head("This line")
        if change.expected_after_us is None:
            self._say("  what this posting knew cannot be told any more")
        else:
            self._say(
                f"  {line.account}'s part of the cell at this posting: {change.expected_after_us:,} us "
                f"(of {count(change.utterances_known or 0, 'utterance')}, known {KNOWN_BY[change.known_by]})"
            )
        before = f"  its earlier lines of the cell had posted: {change.posted_before_us:,} us"
        if change.earlier:
            numbers, left_out = self._some(change.earlier)
            before += f" ({', '.join(f'#{each.seq}' for each in numbers)}{', ...' if left_out else ''})"
        self._say(before)
        self._say(f"  so it moves {line.change_us:+,} us")
        if change.new_utterances:
            new, left_out = self._some(change.new_utterances)
            names = ", ".join(f"{each.utterance_id} ({each.cost_us:,} us)" for each in new)
            self._say(f"  new since the posting before: {names}{f' and {left_out} more' if left_out else ''}")
        if change.earlier and change.new_payers:
            self._say(f"  came into the split: {self._names(change.new_payers)}")
        if change.gone_payers:
            self._say(f"  left the split: {self._names(change.gone_payers)}")

    def _names(self, users: Sequence[str]) -> str:
        some, left_out = self._some(users)
        return ", ".join(USER_PREFIX + user for user in some) + (f" and {left_out} more" if left_out else "")

    # A cell -------------------------------------------------------------------------------------------

    def _cell(self, cell: Cell, line: Line | None) -> None:
        state = "frozen" if cell.frozen else "live"
        start, end = instant(cell.window_start_ms), instant(cell.window_end_ms)
        self._head(f"Cell {cell.cell_id}   {start[:16]} to {end[11:16]} UTC, {state}")
        if cell.rate_version:
            self._say(f"  rates of {cell.rate_version}")
        self._utterances(cell.utterances)
        self._split(cell)
        self._payers(cell, line)
        self._nodes(cell)
        self._say(
            f"Platform: cost - credit = {cell.revenue_us:,} us; the ledger has {cell.revenue_posted_us:,} us"
        )
        for sums in cell.others:
            self._say(
                f"No part any more: {sums.account}, whose {count(sums.lines, 'line')} sum to {sums.change_us:,} us "
                f"({line_names(sums)})"
            )

    def _utterances(self, utterances: Sequence[Utterance]) -> None:
        table = _table(f"Utterances ({len(utterances)}), ms x us per ms")
        for heading in ("utterance", "time (UTC)", "user", "node"):
            table.add_column(heading, overflow="fold")
        for heading in ("asr", "nmt", "tts", "cost, us", "gpu", "credit, us"):
            table.add_column(heading, justify="right")
        shown, left_out = self._some(utterances)
        for each in shown:
            table.add_row(
                _text(each.utterance_id),
                instant(each.time_ms)[11:],
                _text(each.user_id),
                _text(each.node_id),
                *(f"{stage.time_ms} x {stage.rate_us_per_ms}" for stage in each.stages),
                f"{each.cost_us:,}",
                f"{each.gpu_active_time_ms} x {each.node_credit_us_per_ms}",
                f"{each.credit_us:,}",
            )
        self._table(table)
        self._left_out(left_out, "utterances")

    def _split(self, cell: Cell) -> None:
        total = f"Total {amount(cell.total_us)}"
        if cell.split == "own":
            self._say(f"{total}, each user pays for their own")
            return
        self._say(
            f"{total} / {cell.payer_count} payers = {cell.share_us:,} us each, remainder {cell.remainder_us:,} us: "
            "one each to the smallest sha256(cell|user)"
        )

    def _payers(self, cell: Cell, line: Line | None) -> None:
        table = _table()
        table.add_column("payer", overflow="fold")
        table.add_column("why", overflow="fold")
        room = cell.split == "equal"
        if room:
            table.add_column("sha256")
        for heading in ("owes, min", "owes, us", "ledger, us"):
            table.add_column(heading, justify="right")
        table.add_column("lines", overflow="fold")
        asked = [payer for payer in cell.payers if line is not None and line.account == _account(payer)]
        shown, left_out = self._some(cell.payers, asked)
        for payer in shown:
            table.add_row(
                _text(_account(payer)),
                _why(payer, cell),
                *([f"{payer.remainder_hash[:8]}.."] if room else []),
                minutes_text(payer.owed_us),
                f"{payer.share_us:,}{f' + {payer.remainder_us}' if payer.remainder_us else ''}",
                f"{payer.paid_us:,}",
                _text(line_names(payer.lines)),
                style="bold" if payer in asked else "",
            )
        self._table(table)
        self._left_out(left_out, "payers")

    def _nodes(self, cell: Cell) -> None:
        for node in cell.nodes:
            self._say(
                f"node/{node.node_id}: {count(node.utterances, 'utterance')}, {node.gpu_active_time_ms} ms GPU, "
                f"earns {amount(node.earned_us)}; the ledger has {node.credited_us:,} us ({line_names(node.lines)})"
            )

    # An utterance -------------------------------------------------------------------------------------

    def _event(self, event: EventExplained) -> None:
        name = event.utterance.utterance_id if event.utterance else "no utterance"
        self._head(f"{name}   event {event.id} of {event.source}, in {event.scope}")
        for each in event.occurrences:
            said = "counts" if each.counts else "a repeat" if each.same else "says something else, refused"
            self._say(
                f"  partition {each.partition}, offset {each.offset}, appended {instant(each.appended_at_ms)} "
                f"UTC: {each.what}, {said}"
            )
        if event.utterance is None or event.cell is None or event.part_of_cell is None:
            self._say("  another event came first under this identity: the utterance does not count")
            return
        utterance, cell = event.utterance, event.cell
        self._say()
        self._utterances([utterance])
        part = event.part_of_cell
        self._say(f"It is {part.numerator}/{part.denominator} of the cost of cell {cell.cell_id}")
        table = _table("Who pays for it")
        table.add_column("payer", overflow="fold")
        for heading in ("of this utterance, us", "min", "of the cell, us", "ledger, us"):
            table.add_column(heading, justify="right")
        table.add_column("lines", overflow="fold")
        shown, left_out = self._some(event.paid_by)
        for paid in shown:
            exact = paid.of_utterance_us
            whole, rest = divmod(exact.numerator, exact.denominator)
            table.add_row(
                _text(USER_PREFIX + paid.user_id),
                f"{whole:,}" + (f" {rest}/{exact.denominator}" if rest else ""),
                minutes_text(whole),
                f"{paid.owed_us:,}",
                f"{paid.paid_us:,}",
                _text(line_names(paid.lines)),
            )
        self._table(table)
        self._left_out(left_out, "payers")
        earner = next((node for node in cell.nodes if node.node_id == utterance.node_id), None)
        if earner is not None:
            self._say(
                f"node/{utterance.node_id} earns {amount(utterance.credit_us)} of it "
                f"({line_names(earner.lines)}); the platform keeps {utterance.cost_us - utterance.credit_us:,} us"
            )
        self._say()

    def _letters(self, letters: Sequence[Letter]) -> None:
        for letter in letters:
            named = "" if letter.named else " (its bytes contain the name)"
            self._say(
                f"Refused because {letter.reason}: {letter.detail}{named}; {letter.topic} partition "
                f"{letter.partition}, offset {letter.offset}, appended {instant(letter.appended_at_ms)} UTC"
            )
            value = letter.value
            self._say(
                f"  {value}" if len(value) <= LETTER_CHARACTERS else f"  {value[:LETTER_CHARACTERS]}..."
            )

    # A money command, a scope -------------------------------------------------------------------------

    def _command(self, command: Command) -> None:
        self._head(f"Request {command.request_id}   {command.kind} of {command.account}")
        if command.outcome:
            self._say(
                f"  outcome {command.outcome}, moved {amount(command.amount_us)}, left {amount(command.balance_us)}"
            )
        self._say(f"  by {command.actor}: {command.note}")
        table = _table()
        table.add_column("line", overflow="fold")
        for heading in ("change, min", "change, us", "before, us", "after, us"):
            table.add_column(heading, justify="right")
        for line in command.lines:
            table.add_row(
                _text(f"{line.account}#{line.seq}"),
                minutes_text(line.change_us, sign=True),
                f"{line.change_us:+,}",
                f"{line.balance_before_us:,}",
                f"{line.balance_after_us:,}",
            )
        if command.lines:
            self._table(table)

    def _scope(self, explained: ScopeExplained) -> None:
        end = "open"
        if explained.ended_at_ms is not None:
            how = "ended" if explained.ended == "ended" else "over, by its silence"
            end = f"{how}, recorded {instant(explained.ended_at_ms)} UTC"
        self._head(f"{explained.scope}   {count(explained.cells_in_all, 'cell')} in the ledger, {end}")
        table = _table()
        table.add_column("cell", overflow="fold")
        table.add_column("window (UTC)")
        for heading in ("charged, min", "charged, us", "nodes, us", "platform, us", "payers", "lines"):
            table.add_column(heading, justify="right")
        table.add_column("")
        differing = [cell for cell in explained.cells if cell.agreement is not Agreement.AGREES]
        shown, left_out = self._some(list(reversed(explained.cells)), differing)
        for cell in shown:
            table.add_row(
                _text(cell.cell_id),
                instant(cell.window_start_ms)[:16],
                minutes_text(cell.charged_us),
                f"{cell.charged_us:,}",
                f"{cell.credited_us:,}",
                f"{cell.revenue_us:,}",
                f"{cell.payers:,}",
                f"{cell.lines:,}",
                Text(WORDS[cell.agreement].lower(), style=STYLES[cell.agreement]),
            )
        self._table(table)
        self._left_out(left_out, "cells")

    # The end ------------------------------------------------------------------------------------------

    def _verdict(self, explained: Explained) -> None:
        self._say()
        found = Text(WORDS[explained.agreement], style=STYLES[explained.agreement])
        self._console.print(found + Text(f": {printable(explained.why)}"), soft_wrap=True)
        for judgement in _judgements(explained):
            if judgement.agreement is not explained.agreement and judgement.agreement is not Agreement.AGREES:
                self._say(f"  {WORDS[judgement.agreement].lower()}: {judgement.why}")
            shown, left_out = self._some(judgement.differences)
            for each in shown:
                self._say(
                    f"  {each.account}: expected {each.expected_us:,} us, the ledger has {each.found_us:,} us"
                )
            self._left_out(left_out, "accounts")


def _judgements(explained: Explained) -> list[Judgement]:
    if isinstance(explained, LineExplained):
        found = [explained.chain]
        found += explained.cell.judgements if explained.cell else []
        found += [explained.change.judgement] if explained.change else []
        return found + (explained.command.judgements if explained.command else [])
    if isinstance(explained, CellExplained):
        return explained.cell.judgements
    if isinstance(explained, UtteranceExplained):
        return [judgement for event in explained.events if event.cell for judgement in event.cell.judgements]
    if isinstance(explained, CommandExplained):
        return explained.command.judgements if explained.command else []
    return []


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _account(payer: Payer) -> str:
    return USER_PREFIX + payer.user_id


def _why(payer: Payer, cell: Cell) -> Text:
    spoke = count(payer.utterances, "utterance") if payer.utterances else ""
    if payer.joined_ms is None or payer.until_ms is None:
        return Text(spoke)
    joined = instant(payer.joined_ms)
    same_day = joined[:10] == instant(cell.window_start_ms)[:10]
    until = instant(payer.until_ms)
    until = until[11:19] if until[:10] == instant(cell.window_start_ms)[:10] else until[:19]
    ended = {"left": "left", "closed": "room closed", "presence_max": "never left, counted until"}
    present = f"joined {joined[11:19] if same_day else joined[:19]}, {ended[payer.ended_by or '']} {until}"
    return Text(", ".join(filter(None, (present, spoke))))


def _text(text: str) -> Text:
    return Text(printable(text))
