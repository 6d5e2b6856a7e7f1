"""`metering explain`: a ledger line, a cell, an utterance, a money command or a scope, recomputed and explained.

It reads ClickHouse, and asks Redis how far everything is; without Redis it explains all the same, and says less
about what is not settled yet. It changes nothing. The order of reading makes the comparison exact on a live system:

1. From Redis the fence, up to where settlement and the last resettle have come, and then the number of the last
   outbox entry: whatever was settled before is in an entry up to this one.
2. Until the ledger has that entry it waits, for a moment. Then the ledger is read up to the last entry that it has
   whole, so that all of its answers speak of the same lines.
3. Only then how far the usage store is, and the usage: it has what the postings knew, or is known not to.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import msgspec
import redis
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError

from app.books import REVISION_BITS, check_rates
from app.clients import clickhouse_client, redis_client
from app.errors import CommandError
from metering.cells import WINDOW_MS, window_start_ms
from metering.explain import (
    Agreement,
    Cell,
    CellFacts,
    Judgement,
    Line,
    Progress,
    Utterance,
    explain_cell,
    explain_utterance,
    worst,
)
from metering.explain_one import (
    Change,
    Command,
    IdentityFacts,
    Occurrence,
    Part,
    Ratio,
    explain_change,
    explain_occurrences,
    explain_parts,
    judge_chain,
    judge_command,
)
from schemas import redis_keys
from schemas.rate_card import RateCard, load_rate_card
from schemas.rfc3339 import parse_rfc3339_ms
from schemas.rows import UsageRow
from schemas.settings import Settings, one_line
from schemas.topics import COMMANDS, EVENTS
from sources.archive_explain import FOUND_AT_MOST, CellTotals, ExplainArchive, NamingLetter, ScopeEnd, TooMuch

ACCOUNT_PREFIXES = ("user/", "node/", "platform/")
SCOPE_PREFIXES = ("room/", "session/")
SCOPE_CELLS = 1_000
"""How many cells of a scope are listed, the newest."""

CELLS_LOOKED_INTO = 20
"""How many cells of a scope that do not agree are explained, to say why."""

PATIENCE_S = 5.0
"""How long to wait for the ledger to have what Redis has."""

LOOK_EVERY_S = 0.1
LOOK_AGAIN_S = 1.0
"""What does not agree is looked at once more after this time: an insert may have been under way."""

_SEQ = re.compile(r"[0-9]{1,18}")
_WINDOW = re.compile(r"-?[0-9]{1,18}")


# What is asked ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskedLine:
    """A ledger line."""

    account: str
    seq: int


@dataclass(frozen=True, slots=True)
class AskedCell:
    """A cell."""

    scope: str
    window_start_ms: int


@dataclass(frozen=True, slots=True)
class AskedScope:
    """All cells of a room or a session."""

    scope: str


@dataclass(frozen=True, slots=True)
class AskedUtterance:
    """Utterances by their own id, or by the event's source and id; in one scope or in all."""

    utterance_id: str | None = None
    source: str | None = None
    id: str | None = None
    scope: str | None = None

    @property
    def names(self) -> list[str]:
        """The texts that tell it."""
        return [text for text in (self.utterance_id, self.source, self.id) if text is not None]


@dataclass(frozen=True, slots=True)
class AskedRequest:
    """A money command."""

    request_id: str


@dataclass(frozen=True, slots=True)
class AskedName:
    """The id of an utterance or of a money command: whichever there is."""

    name: str
    scope: str | None = None


Asked = AskedLine | AskedCell | AskedScope | AskedUtterance | AskedRequest | AskedName


def recognise(thing: str, seq: str | None = None, scope: str | None = None) -> Asked:
    """What somebody means by a word, or an account and a number. Raises CommandError, exit code 2: what it may be.

    No id has the characters `/` and `#`, and no account or scope is without a `/`, so nothing is taken for another.
    """
    if thing.startswith(ACCOUNT_PREFIXES):
        account, _, number = (thing, "", seq) if seq is not None else thing.rpartition("#")
        if not account or number is None:
            _refuse(
                f"which line of {thing}? {thing}#1 is its first; `metering statement {thing}` numbers them"
            )
        if not _SEQ.fullmatch(number) or int(number) < 1:
            _refuse(f"{number!r} is no number of a ledger line: they are counted from 1")
        return AskedLine(account, int(number))
    if seq is not None:
        _refuse(f"{thing!r} is no account, so {seq!r} is no number of its lines")
    if thing.startswith(SCOPE_PREFIXES):
        name, at, window = thing.rpartition("@")
        return AskedCell(required_scope(name), _window(window)) if at else AskedScope(required_scope(thing))
    if not thing or "/" in thing:
        _refuse(
            f"{thing!r} is nothing that can be explained: it is a ledger line (user/u-5#12), a cell "
            "(room/r-9@1767225600000), a room or session (room/r-9), or the id of an utterance or a money command"
        )
    return AskedName(thing, scope)


def required_scope(text: str) -> str:
    """A scope. Raises CommandError, exit code 2, for anything else."""
    if not text.startswith(SCOPE_PREFIXES) or not text.partition("/")[2]:
        _refuse(f"{text!r} is no scope: it is room/<id> or session/<id>")
    return text


def asked_cell(text: str) -> AskedCell:
    """A cell. Raises CommandError, exit code 2, for anything else."""
    scope, at, window = text.rpartition("@")
    if not at:
        _refuse(f"{text!r} is no cell: it is <scope>@<window start in ms>, as room/r-9@1767225600000")
    return AskedCell(required_scope(scope), _window(window))


def _window(text: str) -> int:
    """The start of the window that is named: by its milliseconds, or by an instant in it."""
    if _WINDOW.fullmatch(text):
        start_ms = window_start_ms(int(text))
        if start_ms != int(text):
            _refuse(f"{text} is no start of a window: the one that holds it starts at {start_ms}")
        return start_ms
    try:
        return window_start_ms(parse_rfc3339_ms(text))
    except ValueError as problem:
        _refuse(f"{text!r} is neither a window start in ms nor an instant: it {problem}")


def _refuse(what: str) -> NoReturn:
    raise CommandError(what, exit_code=2)


# What is answered ---------------------------------------------------------------------------------------


class Letter(msgspec.Struct, frozen=True):
    """A refused message that names what was asked for. `named` is false where its bytes contain the words, but are
    no event that could be read."""

    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    appended_at_ms: int
    named: bool
    value: str
    """The original bytes; what is no UTF-8 is escaped."""


class _Explained(msgspec.Struct, frozen=True, tag_field="kind"):
    agreement: Agreement
    why: str


class LineExplained(_Explained, frozen=True, tag="line"):
    """A ledger line. Either `cell` and `change` are there, or `command`."""

    line: Line
    chain: Judgement
    cell: Cell | None = None
    change: Change | None = None
    command: Command | None = None


class CellExplained(_Explained, frozen=True, tag="cell"):
    """A cell."""

    cell: Cell


class EventExplained(msgspec.Struct, frozen=True):
    """One identity. Without `cell` it does not count as usage, because a lifecycle event has its identity."""

    scope: str
    source: str
    id: str
    occurrences: list[Occurrence]
    utterance: Utterance | None = None
    part_of_cell: Ratio | None = None
    """Its part of the cell's cost."""
    paid_by: list[Part] = []
    cell: Cell | None = None


class UtteranceExplained(_Explained, frozen=True, tag="utterance"):
    """Everything that is stored under the names that were asked for."""

    events: list[EventExplained]
    dead_letters: list[Letter]


class CommandExplained(_Explained, frozen=True, tag="command"):
    """A money command; None when it was not carried out."""

    command: Command | None
    dead_letters: list[Letter]


class ScopeCell(msgspec.Struct, frozen=True):
    """One cell of a scope, by the ledger, and whether it is what recomputing gives."""

    cell_id: str
    window_start_ms: int
    charged_us: int
    credited_us: int
    revenue_us: int
    payers: int
    lines: int
    agreement: Agreement
    why: str


class ScopeExplained(_Explained, frozen=True, tag="scope"):
    """The newest cells of a scope. `cells_in_all` counts those that the ledger has."""

    scope: str
    ended: str
    """ended or timeout; empty while it is open."""
    ended_at_ms: int | None
    first_event_ms: int | None
    last_event_ms: int | None
    cells_in_all: int
    cells: list[ScopeCell]


Explained = LineExplained | CellExplained | UtteranceExplained | CommandExplained | ScopeExplained


def exit_code(explained: Explained) -> int:
    """0 when the ledger agrees, also as far as it is settled; 1 when it does not, or when that is not clear."""
    return 0 if explained.agreement in (Agreement.AGREES, Agreement.NOT_SETTLED) else 1


# How it is found out ------------------------------------------------------------------------------------


def explain(settings: Settings, asked: Asked) -> Explained:
    """Explain one thing. Blocks for some seconds at most. Raises CommandError, one line, exit code 1, when there is
    no such thing or a server is away."""
    try:
        client = clickhouse_client(settings)
        card = load_rate_card(settings.rate_card)
        explained = _Explaining(settings, client, card).explain(asked)
        if explained.agreement in (Agreement.DIFFERS, Agreement.UNCLEAR):
            time.sleep(LOOK_AGAIN_S)
            explained = _Explaining(settings, client, card).explain(asked)
        return explained
    except ClickHouseError as error:
        raise CommandError(f"ClickHouse cannot answer: {one_line(str(error))[:300]}") from error
    except TooMuch as error:
        raise CommandError(str(error)) from error


def to_json(explained: Explained) -> bytes:
    """One JSON object on one line."""
    return msgspec.json.encode(explained) + b"\n"


@dataclass(frozen=True, slots=True)
class _Redis:
    """What Redis says, at the beginning."""

    topic_id: str
    generation: int
    entries: int
    fence_ms: int
    settled_before_ms: int | None
    resettled_frozen_before_ms: int
    resettled_appended_before_ms: int


class _Explaining:
    """One look at one thing."""

    def __init__(self, settings: Settings, client: Client, card: RateCard) -> None:
        self._settings = settings
        self._card = card
        self._presence_max_ms = settings.presence_max_s * 1000
        self._redis = self._ask_redis()
        self._archive = ExplainArchive(
            client,
            settings.clickhouse_database,
            card,
            EVENTS,
            self._redis.topic_id if self._redis else "",
            self._presence_max_ms,
        )
        self._progress: Progress | None = None

    def explain(self, asked: Asked) -> Explained:
        """The answer to one question."""
        if isinstance(asked, AskedLine):
            return self._line(asked)
        if isinstance(asked, AskedCell):
            return self._cell(asked)
        if isinstance(asked, AskedScope):
            return self._scope(asked.scope)
        if isinstance(asked, AskedRequest):
            return self._required_request(asked.request_id)
        if isinstance(asked, AskedUtterance):
            return self._required_utterance(asked)
        return self._name(asked)

    # A line -------------------------------------------------------------------------------------------

    def _line(self, asked: AskedLine) -> LineExplained:
        self._see_progress()
        near = self._archive.line_and_neighbours(asked.account, asked.seq)
        line = near.get(asked.seq)
        if line is None:
            raise CommandError(self._no_line(asked))
        chain = judge_chain(line, near.get(line.seq - 1), near.get(line.seq + 1))
        if not line.cell_id:
            command = self._command(line.request_id) if line.request_id else None
            judged = worst([*(command.judgements if command else []), chain])
            return LineExplained(judged.agreement, judged.why, line, chain, command=command)
        self._require_rates(line.rate_version)
        # Just stored, together with its whole entry or at least before long: see `_see_progress`.
        self._archive.last_entry_read = max(self._archive.last_entry_read, line.entry)
        account_lines = self._archive.account_lines(line.account, line.cell_id)
        asked_cell_ = asked_cell(line.cell_id)
        facts, progress = self._cell_facts(asked_cell_.scope, asked_cell_.window_start_ms)
        cell = explain_cell(facts, progress, self._card, self._presence_max_ms)
        change = explain_change(line, account_lines, facts, progress, self._card, self._presence_max_ms)
        judged = worst([cell.judgement, change.judgement, chain])
        return LineExplained(judged.agreement, judged.why, line, chain, cell=cell, change=change)

    def _no_line(self, asked: AskedLine) -> str:
        if self._archive.is_void(asked.account, asked.seq):
            return (
                f"{asked.account}#{asked.seq} is void: it was not in the ledger yet when Redis was rebuilt from "
                "it, and what it stood for was settled anew"
            )
        last = self._archive.last_seq(asked.account)
        if not last:
            return f"{asked.account} has no ledger lines"
        if asked.seq > last:
            return f"{asked.account} has no line {asked.seq}: its last one is {asked.account}#{last}"
        return f"{asked.account} has no line {asked.seq}, though its last one is {last}: the ledger has a gap"

    def _require_rates(self, names: str) -> None:
        known = {version.name for version in self._card.versions}
        for name in filter(None, names.split(",")):
            if name not in known:
                raise CommandError(
                    f"the rate card has no version of {name}, which priced this line: "
                    "METERING_RATE_CARD must name the file that the flows have"
                )

    # A cell -------------------------------------------------------------------------------------------

    def _cell(self, asked: AskedCell) -> CellExplained:
        self._see_progress()
        facts, progress = self._cell_facts(asked.scope, asked.window_start_ms)
        if not facts.usage and not facts.sums:
            raise CommandError(
                f"{facts.cell_id} does not exist: {asked.scope} has no usage in that minute, and the ledger has no "
                "lines of it"
            )
        cell = explain_cell(facts, progress, self._card, self._presence_max_ms)
        return CellExplained(cell.judgement.agreement, cell.judgement.why, cell)

    def _cell_facts(self, scope: str, start_ms: int) -> tuple[CellFacts, Progress]:
        archive = self._archive
        cell = f"{scope}@{start_ms}"
        sums, postings = archive.cell_sums(cell), archive.cell_postings(cell)
        progress = self._see_progress()
        partitions = archive.partitions_of([scope]).get(scope, set())
        usage = archive.cell_usage(scope, start_ms)
        membership = (
            archive.cell_membership(scope, start_ms, start_ms + WINDOW_MS)
            if scope.startswith("room/")
            else []
        )
        late = archive.last_appended_frozen([scope], progress.frozen_before_ms).get(scope, 0)
        return (
            CellFacts(scope, start_ms, usage, membership, sums, postings, frozenset(partitions), late),
            progress,
        )

    # A scope ------------------------------------------------------------------------------------------

    def _scope(self, scope: str) -> ScopeExplained:
        self._see_progress()
        archive = self._archive
        end = archive.scope_end(scope)
        in_all, totals = archive.scope_cells(scope, SCOPE_CELLS)
        found = {each.window_start_ms: each for each in totals}
        for window in archive.newest_usage_windows(scope, SCOPE_CELLS):
            found.setdefault(window, CellTotals(window, 0, 0, 0, 0, 0))
        if not found and end is None:
            raise CommandError(f"{scope} has no usage and no ledger lines")
        windows = sorted(found)[-SCOPE_CELLS:]
        differing = archive.differing_windows(scope, windows)
        cells = []
        for window in windows:
            judged = Judgement(Agreement.AGREES, "")
            if window in differing:
                judged = Judgement(Agreement.UNCLEAR, "it differs; explain the cell to see why")
                if differing.index(window) < CELLS_LOOKED_INTO:
                    facts, progress = self._cell_facts(scope, window)
                    judged = explain_cell(facts, progress, self._card, self._presence_max_ms).judgement
            totals_of = found[window]
            cells.append(
                ScopeCell(f"{scope}@{window}", *totals_of, agreement=judged.agreement, why=judged.why)
            )
        judged = worst(
            [
                Judgement(
                    Agreement.AGREES, "the ledger has exactly what the stored events come to, in every cell"
                )
            ]
            + [Judgement(cell.agreement, f"{cell.cell_id}: {cell.why}") for cell in cells]
        )
        return _scope_explained(judged, scope, end, in_all, cells)

    # An utterance, a money command --------------------------------------------------------------------

    def _name(self, asked: AskedName) -> Explained:
        by_utterance = AskedUtterance(utterance_id=asked.name, scope=asked.scope)
        utterance = self._utterance(by_utterance)
        # That refused bytes contain the name says less than a command that has it.
        found = utterance is not None and bool(utterance.events)
        explained = utterance if found else self._request(asked.name) or utterance
        if explained is None:
            raise CommandError(
                f"nothing is known of {asked.name!r}: no utterance, no money command and no dead letter has this id"
            )
        return explained

    def _required_utterance(self, asked: AskedUtterance) -> UtteranceExplained:
        explained = self._utterance(asked)
        if explained is None:
            where = f" in {asked.scope}" if asked.scope else ""
            raise CommandError(f"nothing is known of the utterance {' '.join(asked.names)}{where}")
        return explained

    def _utterance(self, asked: AskedUtterance) -> UtteranceExplained | None:
        self._see_progress()
        identities = self._archive.identities(
            utterance_id=asked.utterance_id, source=asked.source, id=asked.id, scope=asked.scope
        )
        if len(identities) > FOUND_AT_MOST:
            raise CommandError(
                f"more than {FOUND_AT_MOST} events are named {' '.join(asked.names)}: say --source and --id"
            )
        letters = self._letters(EVENTS, asked.names)
        if not identities and not letters:
            return None
        events = [self._event(self._archive.identity(*identity)) for identity in identities]
        judged = worst(
            [Judgement(Agreement.AGREES, _refused(letters, "nobody paid for it"))]
            if not events
            else [
                each.cell.judgement
                if each.cell
                else Judgement(
                    Agreement.AGREES, "its identity belongs to another event, so nobody paid for it"
                )
                for each in events
            ]
        )
        return UtteranceExplained(judged.agreement, judged.why, events, letters)

    def _letters(self, topic: str, names: list[str]) -> list[Letter]:
        """Refused messages with these names, and those that cannot be read but contain them."""
        found = []
        for letter in self._archive.letters_naming(topic, *names):
            named = _names(letter.value, names)
            if named is not False:
                found.append(_letter(letter, named=named is True))
        return found

    def _event(self, facts: IdentityFacts) -> EventExplained:
        counting = facts.counting
        occurrences = explain_occurrences(facts)
        if not isinstance(counting, UsageRow):
            return EventExplained(facts.scope, facts.source, facts.id, occurrences)
        utterance = explain_utterance(counting, self._card)
        cell_facts, progress = self._cell_facts(facts.scope, counting.window_start_ms)
        cell = explain_cell(cell_facts, progress, self._card, self._presence_max_ms)
        part, paid_by = explain_parts(utterance, cell)
        return EventExplained(
            facts.scope, facts.source, facts.id, occurrences, utterance, part, paid_by, cell
        )

    def _required_request(self, request_id: str) -> CommandExplained:
        explained = self._request(request_id)
        if explained is None:
            raise CommandError(f"nothing is known of the money command {request_id!r}")
        return explained

    def _request(self, request_id: str) -> CommandExplained | None:
        self._see_progress()
        command = self._command(request_id)
        letters = self._letters(COMMANDS, [request_id])
        if command is None and not letters:
            return None
        judged = (
            command.judgement
            if command is not None
            else Judgement(Agreement.AGREES, _refused(letters, "it moved nothing"))
        )
        return CommandExplained(judged.agreement, judged.why, command, letters)

    def _command(self, request_id: str) -> Command | None:
        result = self._archive.request(request_id)
        lines = self._archive.request_lines(request_id)
        if result is None and not lines:
            return None
        if result is None:
            about = lines[0]
            account = next((line.account for line in lines if not line.account.startswith("platform/")), "")
            return Command(
                request_id, about.reason, account, 0, 0, "", about.actor, about.note, about.posted_at_ms,
                lines, judge_command(lines, account, 0, 0, archived=False),
            )  # fmt: skip
        return Command(
            request_id,
            result.kind,
            result.account,
            result.amount_us,
            result.balance_us,
            result.outcome,
            result.actor,
            result.note,
            result.posted_at_ms,
            lines,
            judge_command(lines, result.account, result.amount_us, result.balance_us, archived=True),
        )

    # How far everything is ----------------------------------------------------------------------------

    def _ask_redis(self) -> _Redis | None:
        client = redis_client(self._settings)
        try:
            fence, log, positions, resettled = (
                client.get(redis_keys.FENCE),
                _texts(client.hgetall(redis_keys.LOG)),
                _texts(client.hgetall(redis_keys.POSITIONS)),
                _texts(client.hgetall(redis_keys.RESETTLE)),
            )
            epoch = client.get(redis_keys.EPOCH)
            # Last: whatever the rest speaks of is in an entry up to this one.
            entries = client.get(redis_keys.ENTRIES)
            if epoch is not None:
                check_rates(client, self._card)
        except (redis.RedisError, OSError):
            return None
        finally:
            client.close()
        if epoch is None:
            # Empty, or being rebuilt: what it says means nothing.
            return None
        settled = [int(at) for name, at in positions.items() if name.startswith(f"{EVENTS}/")]
        # A posting may follow the position that covers it by so much.
        slack_ms = self._settings.emit_interval_ms + 1_000
        every = bool(log) and len(settled) >= int(log["partition_count"])
        return _Redis(
            topic_id=log.get("topic_id", ""),
            generation=int(log.get("generation", 0)),
            entries=int(entries or 0),
            fence_ms=int(fence or 0),
            settled_before_ms=min(settled) - slack_ms if every and settled else None,
            resettled_frozen_before_ms=int(resettled.get("frozen_before_ms") or 0),
            resettled_appended_before_ms=int(resettled.get("appended_before_ms") or 0),
        )

    def _see_progress(self) -> Progress:
        """How far everything is; the ledger is read up to the same entry from the first call on, the usage store at
        each."""
        archive, known = self._archive, self._redis
        if self._progress is None:
            stored = archive.stored_entry()
            deadline = time.monotonic() + PATIENCE_S
            while known is not None and stored < known.entries and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY_S)
                stored = archive.stored_entry()
            archive.last_entry_read = stored
            self._progress = Progress(
                frozen_before_ms=known.fence_ms if known else archive.last_fence_ms(),
                stored_offsets={},
                revision_bits=REVISION_BITS,
                generation=known.generation if known else None,
                missing_entries=max(known.entries - stored, 0) if known else 0,
                settled_before_ms=known.settled_before_ms if known else None,
                resettled_frozen_before_ms=known.resettled_frozen_before_ms if known else None,
                resettled_appended_before_ms=known.resettled_appended_before_ms if known else None,
            )
        return replace(self._progress, stored_offsets=archive.stored_offsets())


def _scope_explained(
    judged: Judgement, scope: str, end: ScopeEnd | None, in_all: int, cells: list[ScopeCell]
) -> ScopeExplained:
    return ScopeExplained(
        judged.agreement,
        judged.why,
        scope,
        end.reason if end else "",
        end.posted_at_ms if end else None,
        end.first_event_ms if end else None,
        end.last_event_ms if end else None,
        in_all,
        cells,
    )


def _refused(letters: list[Letter], so: str) -> str:
    if any(letter.named for letter in letters):
        return f"it was refused, so {so}"
    return "nothing that was accepted has this name; refused bytes contain it"


def _texts(stored: Any) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in stored.items()}


def _letter(found: NamingLetter, *, named: bool) -> Letter:
    return Letter(
        found.topic,
        found.partition,
        found.offset,
        found.reason,
        found.detail,
        found.appended_at_ms,
        named,
        found.value.decode("utf-8", "backslashreplace"),
    )


def _names(value: bytes, names: list[str]) -> bool | None:
    """Whether the message has all these names among its fields and those of its data; None: it cannot be read."""
    try:
        document = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    data = document.get("data")
    fields = [*document.values(), *(data.values() if isinstance(data, dict) else ())]
    return all(name in fields for name in names)
