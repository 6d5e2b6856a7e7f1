"""The archive in ClickHouse, as a reconciliation reads it: chains, sums, cells and single messages.

Laws are those of `sources.archive`: ranges of the sorting key, one after the other, so that memory is bounded
here and on the server; only what counts is read.

That every cell and every outbox entry sums to zero is proven in one pass without a table of them: each change is
multiplied by a hash of its cell (of its entry), and the sum over everything, modulo 2^64, is zero when each one's
sum is, and else is not, but for a chance of 2^-64. The same trick proves that an account's lines form a chain.
Only when a sum is not zero is it asked which one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import md5
from typing import Any, NamedTuple

from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import OperationalError
from urllib3.exceptions import HTTPError

from metering.facts import ScopeFacts, UsageSum
from metering.presence import PRESENCE_MAX_MS
from metering.pricing import gpu_credit_us, stages_cost_us
from schemas.events import Event, LifecycleKind, Usage
from schemas.rate_card import RateCard
from sources.archive import FINAL_SETTINGS, READ_SETTINGS, ClickHouseArchive, ScopeRange, quoted

LEDGER_LINES_AT_ONCE = 100_000
CELL_LINES_AT_ONCE = 1_000_000
USAGE_ROWS_AT_ONCE = 100_000
CHUNK_BYTES = 1 << 20

PostedCells = Mapping[str, dict[int, dict[str, int]]]
"""Scope -> window start (ms) -> account -> sum of the ledger's changes (us)."""

CHECK_SETTINGS: Mapping[str, object] = {
    **READ_SETTINGS,
    "max_ast_elements": 10_000_000,
    "max_expanded_ast_elements": 10_000_000,
    # What does not fit goes to disk, on the server.
    "max_bytes_before_external_group_by": 256 << 20,
    "max_bytes_before_external_sort": 256 << 20,
}

WORD = 1 << 64


class AccountLines(NamedTuple):
    """What the ledger says about one account, up to an outbox entry."""

    account: str
    last_seq: int
    balance_us: int
    """That the last line left."""
    changes_us: int
    lines: int
    first_seq: int
    broken: int
    """Lines that do not end where they say: before + change != after."""
    unlinked: int
    """0 when each line begins where the one before ended, and the first at zero."""
    by_entry: int
    by_cell: int

    @property
    def is_whole(self) -> bool:
        """Whether the lines form one chain from zero to the balance."""
        return (
            self.lines == self.last_seq
            and self.first_seq == 1
            and not self.broken
            and not self.unlinked
            and self.balance_us == self.changes_us
        )


class PriceDifference(NamedTuple):
    """Stored prices of a user's usage in a window that are not what the rate card says."""

    scope: str
    window_start_ms: int
    rate_version: str
    """By which it was priced."""
    expected_version: str
    cost_us: int
    expected_cost_us: int
    credit_us: int
    expected_credit_us: int


@dataclass(slots=True)
class StoredScopes:
    """A range of scopes: usage, membership and the ledger's sums; and what is wrong with the stored prices."""

    facts: list[ScopeFacts]
    prices: list[PriceDifference]
    usage_rows: int


class Moment(NamedTuple):
    """An event that shapes a scope's members: when, and where in the log."""

    kind: LifecycleKind
    user_id: str | None
    time_ms: int
    partition: int
    offset: int
    appended_at_ms: int


@dataclass(slots=True)
class CloseUsage:
    """One cell's usage: everything stored, what of it the log held at the cut, and what the last posting knew."""

    stored: list[UsageSum] = field(default_factory=list)
    at_cut: list[UsageSum] = field(default_factory=list)
    at_posting: list[UsageSum] = field(default_factory=list)
    appended_at_ms: int = 0


class StoredEvent(NamedTuple):
    """The occurrence of an identity that counts, in the store."""

    partition: int
    offset: int
    body: int
    window_start_ms: int


class StoredLetter(NamedTuple):
    """A dead letter, with a digest of its bytes."""

    reason: str
    value: int | None


def _whole_lines(stream: Any, tabs: int) -> Iterator[bytes]:
    """The lines of an answer. Raises OperationalError when it is cut off, or ends in an error instead of a line."""
    rest = b""
    try:
        while chunk := stream.read(CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.count(b"\t") != tabs:
                    raise OperationalError(f"an answer broke off: {line[:200].decode(errors='replace')}")
                yield line + b"\n"
    except HTTPError as error:
        raise OperationalError(f"an answer broke off: {error}") from error
    if rest:
        raise OperationalError(f"an answer broke off: {rest[:200].decode(errors='replace')}")


def half_md5(text: bytes) -> int:
    """As ClickHouse's function of that name: the first 8 bytes of MD5, as a number."""
    return int.from_bytes(md5(text, usedforsecurity=False).digest()[:8], "big")


_IDENTITY_SQL = "halfMD5(concat(scope, '\\0', toString(source), '\\0', id))"

_USAGE_BODY_SQL = (
    "halfMD5(arrayStringConcat(['u', toString(time_ms), session_id, room_id, user_id, toString(node_id), "
    "utterance_id, ifNull(toString(audio_ms), ''), toString(asr_time_ms), toString(nmt_time_ms), "
    "toString(tts_time_ms), toString(gpu_active_time_ms), toString(source_lang), toString(target_lang)], '\\0'))"
)

_LIFECYCLE_BODY_SQL = (
    "halfMD5(arrayStringConcat(['l', toString(time_ms), toString(kind), "
    "user_id, session_id, room_id], '\\0'))"
)


def identity_number(event: Event) -> int:
    """What `_IDENTITY_SQL` says of the event's row."""
    return half_md5(f"{event.scope}\0{event.source}\0{event.id}".encode())


def body_number(event: Event) -> int:
    """What the SQL for bodies says of the event's row."""
    if isinstance(event, Usage):
        audio = "" if event.audio_ms is None else event.audio_ms
        text = (
            f"u\0{event.time_ms}\0{event.session_id}\0{event.room_id or ''}\0{event.user_id}\0{event.node_id}"
            f"\0{event.utterance_id}\0{audio}\0{event.asr_time_ms}\0{event.nmt_time_ms}\0{event.tts_time_ms}"
            f"\0{event.gpu_active_time_ms}\0{event.source_lang or ''}\0{event.target_lang or ''}"
        )
    else:
        text = (
            f"l\0{event.time_ms}\0{int(event.kind)}\0{event.user_id or ''}\0{event.session_id or ''}"
            f"\0{event.room_id or ''}"
        )
    return half_md5(text.encode())


class ArchiveChecks(ClickHouseArchive):
    """What only a reconciliation asks. Blocks and raises as its base does; not thread-safe."""

    def __init__(
        self,
        client: Client,
        database: str,
        card: RateCard,
        topic: str,
        log: str,
        presence_max_ms: int = PRESENCE_MAX_MS,
    ) -> None:
        super().__init__(client, database, card, topic, log, presence_max_ms)
        self._card = card

    # The ledger by itself -----------------------------------------------------------------------------

    def ledger_by_account(self, last_entry: int) -> Iterator[list[AccountLines]]:
        """Every account that has lines in entries up to `last_entry`, range by range, in order."""
        for condition in self._account_ranges(LEDGER_LINES_AT_ONCE):
            yield [AccountLines(*row) for row in self._rows(self._account_query(condition, last_entry))]

    def _account_ranges(self, lines: int) -> Iterator[str]:
        """Conditions that together hold every account once, with about so many lines each, or one account."""
        after = ""
        while True:
            found = self._rows(
                f"SELECT account FROM {self._database}.ledger WHERE account > {quoted(after)} ORDER BY account "
                f"LIMIT 1 OFFSET {lines}"
            )
            condition = f"account > {quoted(after)}"
            if not found:
                yield condition
                return
            yield f"{condition} AND account <= {quoted(found[0][0])}"
            after = found[0][0]

    def _account_query(self, condition: str, last_entry: int) -> str:
        return f"""
            SELECT account, max(seq) AS last_seq, argMax(balance_after_us, seq) AS balance_us, sum(change_us),
                count(), min(seq), countIf(balance_after_us != balance_before_us + change_us),
                sum(sipHash64(seq + 1, balance_after_us)) - sum(sipHash64(seq, balance_before_us))
                    - sipHash64(last_seq + 1, balance_us) + sipHash64(toInt64(1), toInt64(0)),
                sum(sipHash64(entry) * reinterpretAsUInt64(change_us)),
                sumIf(sipHash64(cell_id) * reinterpretAsUInt64(change_us), cell_id != '')
            FROM {self._database}.ledger FINAL
            WHERE {condition} AND entry <= {last_entry} AND {self.line_counts}
            GROUP BY account
        """

    def unbalanced(self, by: str, last_entry: int, limit: int) -> tuple[int, list[tuple[str, int]]]:
        """How many cells (`cell_id`) or outbox entries (`entry`) do not sum to zero, and the first of them."""
        rows = self._rows(
            f"""
            SELECT toString({by}), sum(change_us) AS total_us, count() OVER ()
            FROM {self._database}.ledger FINAL
            WHERE entry <= {last_entry} AND {self.line_counts} {"AND cell_id != ''" if by == "cell_id" else ""}
            GROUP BY {by} HAVING total_us != 0 ORDER BY {by} LIMIT {limit}
            """
        )
        return (int(rows[0][2]) if rows else 0), [(name, int(total_us)) for name, total_us, _ in rows]

    def void_lines(self) -> int:
        """Rows that a rebuild left behind."""
        [[count]] = self._rows(f"SELECT count() FROM {self._database}.ledger WHERE NOT ({self.line_counts})")
        return int(count)

    def balances_after(self, lines: Sequence[tuple[str, int]]) -> dict[str, int]:
        """Account -> the balance that its line of this number left, for the lines that there are."""
        if not lines:
            return {}
        listed = ", ".join(f"({quoted(account)}, {seq})" for account, seq in lines)
        rows = self._rows(
            f"SELECT account, balance_after_us FROM {self._database}.ledger FINAL "
            f"WHERE (account, seq) IN ({listed}) AND {self.line_counts}"
        )
        return {account: int(balance_us) for account, balance_us in rows}

    def accounts_with_grants(self, accounts: Sequence[str]) -> set[str]:
        """Those of these accounts that were ever given a grant."""
        if not accounts:
            return set()
        rows = self._rows(
            f"SELECT DISTINCT account FROM {self._database}.grants "
            f"WHERE account IN ({', '.join(map(quoted, accounts))})"
        )
        return {account for (account,) in rows}

    def grants_after(self, lines: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Account -> grant id -> what the account's lines up to this number left of it (us), where it is any."""
        if not lines:
            return {}
        accounts = f"[{', '.join(map(quoted, lines))}]"
        numbers = f"[{', '.join(map(str, lines.values()))}]"
        rows = self._rows(
            f"""
            SELECT account, change.1, sum(change.2) AS left_us
            FROM (SELECT account, grants, epoch, entry FROM {self._database}.ledger FINAL
                WHERE account IN {accounts} AND seq <= transform(account, {accounts}, {numbers}, 0)
                AND {self.line_counts})
            ARRAY JOIN CAST(grants, 'Array(Tuple(String, Int64))') AS change
            GROUP BY account, change.1 HAVING left_us != 0
            """
        )
        found: dict[str, dict[str, int]] = {}
        for account, grant_id, left_us in rows:
            found.setdefault(account, {})[grant_id] = int(left_us)
        return found

    # Cells --------------------------------------------------------------------------------------------

    def scope_ranges_of(self, rows_at_once: int = USAGE_ROWS_AT_ONCE) -> Iterator[ScopeRange]:
        """As `scope_ranges`, in smaller steps."""
        after: str | None = None
        while True:
            floor = "" if after is None else f"WHERE scope > {quoted(after)}"
            found = self._rows(
                f"SELECT scope FROM {self._database}.usage_events {floor} ORDER BY scope "
                f"LIMIT 1 OFFSET {rows_at_once}"
            )
            until = str(found[0][0]) if found else None
            yield ScopeRange(after, until)
            if until is None:
                return
            after = until

    def cell_lines(self) -> Iterator[bytes]:
        """Every ledger line of a cell that counts: `<scope> <window start> <account> <change>` with tabs between,
        and a line end. In the order of accounts, which is that of the table: to have them by scope, the whole of it
        would have to be read for every range."""
        for condition in self._account_ranges(CELL_LINES_AT_ONCE):
            stream = self._client.raw_stream(
                f"""
                SELECT scope, splitByChar('@', cell_id)[2], account, change_us
                FROM {self._database}.ledger FINAL
                WHERE {condition} AND scope != '' AND {self.line_counts}
                """,
                settings=dict(CHECK_SETTINGS),
                fmt="TabSeparated",
            )
            yield from _whole_lines(stream, tabs=3)

    def scopes(self, scopes: ScopeRange, posted: PostedCells) -> StoredScopes:
        """Everything about the cells of a range of scopes, once; what the ledger says of them is given."""
        condition = scopes.condition()
        facts: dict[str, ScopeFacts] = {}

        def of(scope: str) -> ScopeFacts:
            found = facts.get(scope)
            if found is None:
                found = facts[scope] = ScopeFacts(scope, -(2**62), [], [], {})
            return found

        result = StoredScopes([], [], 0)
        for scope, cells in posted.items():
            of(scope).posted.update(cells)
        for scope, rate_version, rows, cost_us, credit_us, *usage in self._rows(
            self._priced_query(condition)
        ):
            found = UsageSum(*usage)
            of(scope).usage.append(found)
            result.usage_rows += rows
            self._check_price(result, scope, found, rate_version, int(cost_us), int(credit_us))
        if any(scope.startswith("room/") for scope in facts):
            for scope, kind, user_id, time_ms in self._rows(self._membership_query(condition, -(2**62))):
                if scope in facts:
                    facts[scope].membership.append((LifecycleKind(kind), user_id or None, time_ms))
        result.facts = list(facts.values())
        return result

    def _check_price(
        self, result: StoredScopes, scope: str, usage: UsageSum, version: str, cost_us: int, credit_us: int
    ) -> None:
        rates = self._card.version_at(usage.rates_from_ms)
        assert rates is not None, "stored usage has a rate"
        expected_cost_us = stages_cost_us(usage.asr_time_ms, usage.nmt_time_ms, usage.tts_time_ms, rates)
        expected_credit_us = gpu_credit_us(usage.gpu_active_time_ms, rates)
        if (cost_us, credit_us, version) != (expected_cost_us, expected_credit_us, rates.name):
            result.prices.append(
                PriceDifference(
                    scope,
                    usage.window_start_ms,
                    version,
                    rates.name,
                    cost_us,
                    expected_cost_us,
                    credit_us,
                    expected_credit_us,
                )
            )

    def _priced_query(self, condition: str) -> str:
        return f"""
            SELECT scope, rate_version, count(), sum(cost_us), sum(credit_us), window_start_ms, user_id, node_id,
                {self._rates_sql} AS rates_from_ms, toInt64(sum(asr_time_ms)), toInt64(sum(nmt_time_ms)),
                toInt64(sum(tts_time_ms)), toInt64(sum(gpu_active_time_ms))
            FROM ({self._counting_usage(condition)})
            GROUP BY scope, window_start_ms, user_id, node_id, rates_from_ms, rate_version
        """

    @property
    def _rates_sql(self) -> str:
        return f"arrayLast(starts_ms -> starts_ms <= time_ms, [{', '.join(map(str, self._rates_from_ms))}])"

    def _counting_usage(self, condition: str, *more_columns: str) -> str:
        """The usage rows that count: one of an identity, unless a lifecycle event came earlier."""
        more = "".join(f", {column}" for column in more_columns)
        return f"""
            SELECT events.*
            FROM (
                SELECT scope, source, id, window_start_ms, time_ms, user_id, toString(node_id) AS node_id,
                    asr_time_ms, nmt_time_ms, tts_time_ms, gpu_active_time_ms, cost_us, credit_us,
                    toString(rate_version) AS rate_version, partition, offset, appended_at_ms, precedence{more}
                FROM {self._database}.usage_events FINAL WHERE {condition} {FINAL_SETTINGS}
            ) AS events
            LEFT JOIN ({self._claims("lifecycle_events", "usage_events", condition)}) AS claims
                ON events.scope = claims.scope AND events.source = claims.source AND events.id = claims.id
            WHERE NOT ifNull(claims.precedence > events.precedence, false)
        """

    def posted_cells(self, scopes: Sequence[str]) -> dict[str, dict[int, tuple[int, dict[str, int]]]]:
        """Scope -> window start -> (revision of the last live posting, account -> sum of changes)."""
        listed = ", ".join(map(quoted, scopes))
        rows = self._rows(
            f"""
            SELECT scope, window_start_ms, account, sum(change_us), max(live_revision)
            FROM (
                SELECT scope, window_start_ms, account, seq, any(change_us) AS change_us,
                    any(if(reason = 'resettle', 0, revision)) AS live_revision
                FROM {self._database}.ledger
                WHERE scope IN ({listed}) AND {self.line_counts}
                GROUP BY scope, window_start_ms, account, seq
            )
            GROUP BY scope, window_start_ms, account
            """
        )
        found: dict[str, dict[int, tuple[int, dict[str, int]]]] = {}
        for scope, window, account, change_us, revision in rows:
            cells = found.setdefault(scope, {})
            known_revision, sums = cells.get(window, (0, {}))
            if change_us:
                sums[account] = int(change_us)
            cells[window] = max(known_revision, int(revision)), sums
        return found

    def partitions_of(self, scopes: Sequence[str]) -> dict[str, set[int]]:
        """Scope -> partitions that any of its events lies on."""
        listed = ", ".join(map(quoted, scopes))
        rows = self._rows(
            f"SELECT DISTINCT scope, partition FROM {self._database}.usage_events WHERE scope IN ({listed}) "
            f"UNION DISTINCT "
            f"SELECT DISTINCT scope, partition FROM {self._database}.lifecycle_events WHERE scope IN ({listed})"
        )
        found: dict[str, set[int]] = {}
        for scope, partition in rows:
            found.setdefault(scope, set()).add(int(partition))
        return found

    def close_usage(
        self,
        cells: Mapping[str, Sequence[int]],
        known_offsets: Mapping[tuple[str, int], int],
        cut: Mapping[int, int],
    ) -> dict[tuple[str, int], CloseUsage]:
        """(scope, window start) -> usage of the given cells; `known_offsets` says before which offset the last
        posting of a cell knew all, `cut` where each partition of the log ended."""
        condition = f"scope IN ({', '.join(map(quoted, cells))})"
        windows = ", ".join(map(str, sorted({window for each in cells.values() for window in each})))
        names = ", ".join(quoted(f"{scope}@{window}") for scope, window in known_offsets) or "''"
        offsets = ", ".join(map(str, known_offsets.values())) or "0"
        partitions = ", ".join(map(str, cut)) or "0"
        ends = ", ".join(map(str, cut.values())) or "0"
        rows = self._rows(
            f"""
            SELECT scope, window_start_ms,
                offset < transform(partition, CAST([{partitions}] AS Array(UInt32)),
                    CAST([{ends}] AS Array(UInt64)), toUInt64(0)) AS at_cut,
                offset < transform(concat(scope, '@', toString(window_start_ms)), [{names}],
                    CAST([{offsets}] AS Array(UInt64)), toUInt64(0)) AS at_posting,
                max(appended_at_ms), user_id, node_id, {self._rates_sql} AS rates_from_ms,
                toInt64(sum(asr_time_ms)), toInt64(sum(nmt_time_ms)), toInt64(sum(tts_time_ms)),
                toInt64(sum(gpu_active_time_ms))
            FROM ({self._counting_usage(condition)})
            WHERE window_start_ms IN ({windows})
            GROUP BY scope, window_start_ms, at_cut, at_posting, user_id, node_id, rates_from_ms
            """
        )
        found: dict[tuple[str, int], CloseUsage] = {}
        for scope, window, at_cut, at_posting, appended_at_ms, *usage in rows:
            cell = found.setdefault((scope, window), CloseUsage())
            usage_sum = UsageSum(window, *usage)
            cell.stored.append(usage_sum)
            if at_cut:
                cell.at_cut.append(usage_sum)
                cell.appended_at_ms = max(cell.appended_at_ms, appended_at_ms)
            if at_posting:
                cell.at_posting.append(usage_sum)
        return found

    def moments(self, scopes: Sequence[str]) -> dict[str, list[Moment]]:
        """Scope -> every membership event that counts."""
        rooms = [scope for scope in scopes if scope.startswith("room/")]
        if not rooms:
            return {}
        condition = f"scope IN ({', '.join(map(quoted, rooms))})"
        rows = self._rows(
            f"""
            SELECT scope, kind, user_id, time_ms, partition, offset, appended_at_ms
            FROM (
                SELECT scope, source, id, kind, user_id, time_ms, partition, offset, appended_at_ms, precedence
                FROM {self._database}.lifecycle_events FINAL WHERE {condition} {FINAL_SETTINGS}
            ) AS events
            LEFT JOIN ({self._claims("usage_events", "lifecycle_events", condition)}) AS claims
                ON events.scope = claims.scope AND events.source = claims.source AND events.id = claims.id
            WHERE kind <= {int(LifecycleKind.CLOSED)}
                AND NOT ifNull(claims.precedence > events.precedence, false)
            """
        )
        found: dict[str, list[Moment]] = {}
        for scope, kind, user_id, *rest in rows:
            found.setdefault(scope, []).append(Moment(LifecycleKind(kind), user_id or None, *rest))
        return found

    def last_appended_frozen(self, scopes: Sequence[str], frozen_before_ms: int) -> dict[str, int]:
        """Scope -> append time of its last event in a frozen window: by this a resettle knows what changed."""
        listed = ", ".join(map(quoted, scopes))
        rows = self._rows(
            f"""
            SELECT scope, max(appended_at_ms) FROM (
                SELECT scope, appended_at_ms FROM {self._database}.usage_events
                WHERE scope IN ({listed}) AND window_start_ms < {frozen_before_ms}
                UNION ALL
                SELECT scope, appended_at_ms FROM {self._database}.lifecycle_events
                WHERE scope IN ({listed}) AND time_ms < {frozen_before_ms}
            ) GROUP BY scope
            """
        )
        return {scope: int(appended_at_ms) for scope, appended_at_ms in rows}

    # Single messages ----------------------------------------------------------------------------------

    def counting_events(self, scopes: ScopeRange) -> dict[int, StoredEvent]:
        """Number of an identity -> the occurrence that counts, of both kinds of events."""
        condition = scopes.condition()
        found: dict[int, StoredEvent] = {}
        for table, body, window in (
            ("usage_events", _USAGE_BODY_SQL, "window_start_ms"),
            ("lifecycle_events", _LIFECYCLE_BODY_SQL, "time_ms - positiveModulo(time_ms, 60000)"),
        ):
            rows = self._rows(
                f"SELECT {_IDENTITY_SQL}, partition, offset, {body}, {window} "
                f"FROM {self._database}.{table} FINAL WHERE {condition} {FINAL_SETTINGS}"
            )
            for identity, *event in rows:
                stored = StoredEvent(*event)
                known = found.get(identity)
                if known is None or stored[:2] < known[:2]:
                    found[identity] = stored
        return found

    def letters(self, offsets: Mapping[int, Sequence[int]]) -> dict[tuple[int, int], StoredLetter]:
        """(partition, offset) -> the dead letter of that message of this log, where there is one."""
        found: dict[tuple[int, int], StoredLetter] = {}
        for partition, wanted in offsets.items():
            if not wanted:
                continue
            rows = self._rows(
                f"""
                SELECT offset, toString(reason), isNull(value), halfMD5(ifNull(value, ''))
                FROM {self._database}.dead_letters FINAL
                WHERE topic = {quoted(self._topic)} AND log = {quoted(self._log)} AND partition = {partition}
                    AND offset IN ({", ".join(map(str, wanted))}) {FINAL_SETTINGS}
                """
            )
            for offset, reason, is_null, value in rows:
                found[partition, int(offset)] = StoredLetter(reason, None if is_null else int(value))
        return found

    def count_letters(self, spans: Mapping[int, tuple[int, int]]) -> int:
        """Dead letters of this log's messages within the spans."""
        within = " OR ".join(
            f"(partition = {partition} AND offset >= {first} AND offset < {next_})"
            for partition, (first, next_) in spans.items()
        )
        [[count]] = self._rows(
            f"SELECT count() FROM {self._database}.dead_letters FINAL WHERE topic = {quoted(self._topic)} "
            f"AND log = {quoted(self._log)} AND ({within or 'false'}) {FINAL_SETTINGS}"
        )
        return int(count)

    def fences_at(self, instants_ms: Sequence[int]) -> list[int]:
        """Where the fence stood at each of these moments, by Redis' clock; 0 before its first move."""
        if not instants_ms:
            return []
        listed = ", ".join(map(str, instants_ms))
        rows = self._rows(
            f"""
            SELECT asked.number, ifNull(fence.frozen_before_ms, 0)
            FROM (
                SELECT 1 AS every_row, number, CAST([{listed}] AS Array(Int64))[number + 1] AS at_ms
                FROM numbers({len(instants_ms)})
            ) AS asked
            ASOF LEFT JOIN (
                SELECT 1 AS every_row, moved_at_ms,
                    max(max(frozen_before_ms)) OVER (ORDER BY moved_at_ms) AS frozen_before_ms
                FROM {self._database}.fence_moves WHERE {self.line_counts} GROUP BY moved_at_ms
            ) AS fence ON asked.every_row = fence.every_row AND asked.at_ms >= fence.moved_at_ms
            ORDER BY asked.number
            """
        )
        return [int(fence) for _, fence in rows]

    def _rows(self, query: str) -> Sequence[Any]:
        return self._client.query(query, settings=dict(CHECK_SETTINGS)).result_rows
