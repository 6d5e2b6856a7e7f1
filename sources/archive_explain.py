"""The archive in ClickHouse, as an explanation reads it: one line, one cell, one identity, one request.

Laws:
- Every question is about one thing, and is asked by the sorting key or by a skip index of its table, so that it
  costs little on a ledger of any length. What one answer may hold is bounded; beyond it TooMuch is raised.
- Only what counts is read, by the rules of `sources.archive`: the lines that no rebuild voided, once each, and the
  earliest occurrence of each identity. FINAL is not needed where all copies of a row are the same.
- Nothing is retried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from metering.explain import AccountSum, Line, Posting
from metering.explain_one import IdentityFacts
from metering.reconcile import without_zeros
from metering.resettle import recompute
from schemas.events import Lifecycle, LifecycleKind, Usage
from schemas.records import RequestRecord
from schemas.rows import LifecycleRow, UsageRow
from sources.archive import FINAL_SETTINGS, quoted
from sources.archive_checks import ArchiveChecks

UTTERANCES_AT_MOST = 100_000
"""Of one cell, which is one minute of one room: bounds the memory of an explanation."""

LINES_AT_MOST = 100_000
"""Of one account in one cell."""

FOUND_AT_MOST = 20
"""Identities under one utterance id, and dead letters that name something."""

OCCURRENCES_AT_MOST = 1_000

_LINE_COLUMNS = (
    "account, seq, posted_at_ms, toString(reason), change_us, balance_before_us, balance_after_us, cell_id, "
    "revision, rate_version, request_id, actor, note, epoch, entry, grants"
)

_USAGE_COLUMNS = (
    "scope, toString(source), id, time_ms, session_id, nullIf(room_id, ''), user_id, toString(node_id), "
    "utterance_id, audio_ms, asr_time_ms, nmt_time_ms, tts_time_ms, gpu_active_time_ms, "
    "nullIf(toString(source_lang), ''), nullIf(toString(target_lang), ''), partition, offset, appended_at_ms, "
    "window_start_ms, cost_us, credit_us, toString(rate_version)"
)
_USAGE_FIELDS = 16
"""How many of the columns are fields of the event."""

_LIFECYCLE_COLUMNS = (
    "scope, toString(source), id, time_ms, kind, nullIf(user_id, ''), nullIf(session_id, ''), "
    "nullIf(room_id, ''), partition, offset, appended_at_ms"
)

_LIFECYCLE_SOURCE = (
    "scope, source, id, time_ms, kind, user_id, session_id, room_id, partition, offset, appended_at_ms, "
    "precedence"
)


class TooMuch(Exception):
    """There is more than one explanation can hold. One line."""


class NamingLetter(NamedTuple):
    """A dead letter whose bytes contain what was looked for."""

    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    value: bytes
    appended_at_ms: int


class CellTotals(NamedTuple):
    """One cell of a scope, by the ledger."""

    window_start_ms: int
    charged_us: int
    credited_us: int
    revenue_us: int
    payers: int
    """Who pays anything."""
    lines: int


class ScopeEnd(NamedTuple):
    """The record of a scope's end."""

    reason: str
    first_event_ms: int
    last_event_ms: int
    revision: int
    posted_at_ms: int


class ExplainArchive(ArchiveChecks):
    """What only an explanation asks. Blocks and raises as its base does; not thread-safe.

    `last_entry_read` bounds what is read of cells: entries up to it are stored whole, so that several questions
    about one cell speak of the same lines, however many are being stored meanwhile.
    """

    last_entry_read = 2**62

    # The ledger ---------------------------------------------------------------------------------------

    def line_and_neighbours(self, account: str, seq: int) -> dict[int, Line]:
        """The account's lines seq - 1, seq and seq + 1, those that there are and that count."""
        rows = self._rows(
            f"SELECT {_LINE_COLUMNS} FROM {self._database}.ledger FINAL WHERE account = {quoted(account)} "
            f"AND seq IN ({seq - 1}, {seq}, {seq + 1}) AND {self.line_counts}"
        )
        return {row[1]: Line(*row) for row in rows}

    def stored_entry(self) -> int:
        """The last outbox entry that the ledger has whole. Rows from before that was noted count all."""
        return self.last_complete_entry() or self.last_entry()[0]

    def last_seq(self, account: str) -> int:
        """The number of the account's last line that counts; 0 when it has none."""
        [[last]] = self._rows(
            f"SELECT max(seq) FROM {self._database}.ledger WHERE account = {quoted(account)} AND {self.line_counts}"
        )
        return int(last)

    def is_void(self, account: str, seq: int) -> bool:
        """Whether a rebuild of Redis left a line of this number behind."""
        [[count]] = self._rows(
            f"SELECT count() FROM {self._database}.ledger WHERE account = {quoted(account)} AND seq = {seq} "
            f"AND NOT ({self.line_counts})"
        )
        return bool(count)

    def cell_sums(self, cell: str) -> list[AccountSum]:
        """What the ledger has of a cell, account by account."""
        rows = self._rows(
            f"SELECT account, sum(moved_us), count(), min(seq), max(seq) FROM ({self._cell_lines(cell)}) "
            "GROUP BY account ORDER BY account"
        )
        return [AccountSum(account, int(change), *map(int, rest)) for account, change, *rest in rows]

    def cell_postings(self, cell: str) -> list[Posting]:
        """The postings of a cell, in the order in which they were made."""
        rows = self._rows(
            f"""
            SELECT in_entry, at_revision, correction, min(at_ms), count(), sum(moved_us)
            FROM ({self._cell_lines(cell)})
            GROUP BY in_entry, at_revision, correction ORDER BY in_entry, at_revision
            """
        )
        return [
            Posting(entry, revision, bool(correction), *rest) for entry, revision, correction, *rest in rows
        ]

    def _cell_lines(self, cell: str) -> str:
        return f"""
            SELECT account, seq, any(change_us) AS moved_us, any(entry) AS in_entry, any(revision) AS at_revision,
                any(reason = 'resettle') AS correction, any(posted_at_ms) AS at_ms
            FROM {self._database}.ledger WHERE cell_id = {quoted(cell)} AND {self._is_read}
            GROUP BY account, seq
        """

    def account_lines(self, account: str, cell: str) -> list[Line]:
        """An account's lines of a cell, in order."""
        rows = self._rows(
            f"SELECT {_LINE_COLUMNS} FROM {self._database}.ledger WHERE account = {quoted(account)} "
            f"AND cell_id = {quoted(cell)} AND {self._is_read} ORDER BY seq LIMIT 1 BY seq "
            f"LIMIT {LINES_AT_MOST + 1}"
        )
        if len(rows) > LINES_AT_MOST:
            raise TooMuch(f"{account} has more than {LINES_AT_MOST} lines in {cell}")
        return [Line(*row) for row in rows]

    @property
    def _is_read(self) -> str:
        return f"entry <= {self.last_entry_read} AND {self.line_counts}"

    def request(self, request_id: str) -> RequestRecord | None:
        """The archived result of a money command."""
        rows = self._rows(
            f"""
            SELECT request_id, digest, toString(kind), account, amount_us, balance_us, toString(outcome), actor,
                note, epoch, entry, posted_at_ms
            FROM {self._database}.requests FINAL WHERE request_id = {quoted(request_id)} AND {self.line_counts}
            """
        )
        names = tuple(RequestRecord.model_fields)
        return RequestRecord(**dict(zip(names, rows[0], strict=True))) if rows else None

    def request_lines(self, request_id: str) -> list[Line]:
        """The lines of a money command."""
        rows = self._rows(
            f"SELECT {_LINE_COLUMNS} FROM {self._database}.ledger WHERE request_id = {quoted(request_id)} "
            f"AND {self.line_counts} ORDER BY account, seq LIMIT 1 BY account, seq LIMIT {FOUND_AT_MOST}"
        )
        return [Line(*row) for row in rows]

    # Events -------------------------------------------------------------------------------------------

    def cell_usage(self, scope: str, window_start_ms: int) -> list[UsageRow]:
        """The utterances of a cell that count."""
        # All occurrences of whatever has one in the window: one with a smaller position may lie elsewhere.
        condition = (
            f"scope = {quoted(scope)} AND (source, id) IN (SELECT source, id FROM {self._database}.usage_events "
            f"WHERE scope = {quoted(scope)} AND window_start_ms = {window_start_ms})"
        )
        counting = self._counting_usage(
            condition, "session_id", "room_id", "utterance_id", "audio_ms", "source_lang", "target_lang"
        )
        rows = self._rows(
            f"SELECT {_USAGE_COLUMNS} FROM ({counting}) WHERE window_start_ms = {window_start_ms} "
            f"LIMIT {UTTERANCES_AT_MOST + 1}"
        )
        if len(rows) > UTTERANCES_AT_MOST:
            raise TooMuch(
                f"{scope}@{window_start_ms} has more than {UTTERANCES_AT_MOST} utterances; "
                "`metering reconcile` compares it"
            )
        return [_usage_row(row) for row in rows]

    def cell_membership(self, scope: str, window_start_ms: int, window_end_ms: int) -> list[LifecycleRow]:
        """The membership events of a room that count and may reach into the window, or say how long it was."""
        condition = f"scope = {quoted(scope)}"
        rows = self._rows(
            f"""
            SELECT {_LIFECYCLE_COLUMNS}
            FROM (
                SELECT {_LIFECYCLE_SOURCE}
                FROM {self._database}.lifecycle_events FINAL WHERE {condition} {FINAL_SETTINGS}
            ) AS events
            LEFT JOIN ({self._claims("usage_events", "lifecycle_events", condition)}) AS claims
                ON events.scope = claims.scope AND events.source = claims.source AND events.id = claims.id
            WHERE kind <= {int(LifecycleKind.CLOSED)}
                AND time_ms >= {window_start_ms - self._presence_max_ms}
                AND time_ms <= {window_end_ms + self._presence_max_ms}
                AND NOT ifNull(claims.precedence > events.precedence, false)
            """
        )
        return [_lifecycle_row(row) for row in rows]

    def identities(
        self, *, utterance_id: str | None, source: str | None, id: str | None, scope: str | None
    ) -> list[tuple[str, str, str]]:
        """(scope, source, id) of the utterances with these names, at most FOUND_AT_MOST + 1."""
        named = {"utterance_id": utterance_id, "source": source, "id": id, "scope": scope}
        condition = " AND ".join(
            f"{name} = {quoted(text)}" for name, text in named.items() if text is not None
        )
        rows = self._rows(
            f"SELECT DISTINCT scope, toString(source), id FROM {self._database}.usage_events WHERE {condition} "
            f"ORDER BY ALL LIMIT {FOUND_AT_MOST + 1}"
        )
        return [tuple(row) for row in rows]

    def identity(self, scope: str, source: str, id: str) -> IdentityFacts:
        """Every occurrence of an identity that the store still has; what repeats goes when parts are merged."""
        condition = (
            f"scope = {quoted(scope)} AND source = {quoted(source)} AND id = {quoted(id)} "
            f"ORDER BY partition, offset LIMIT 1 BY partition, offset LIMIT {OCCURRENCES_AT_MOST}"
        )
        usage = self._rows(f"SELECT {_USAGE_COLUMNS} FROM {self._database}.usage_events WHERE {condition}")
        lifecycle = self._rows(
            f"SELECT {_LIFECYCLE_COLUMNS} FROM {self._database}.lifecycle_events WHERE {condition}"
        )
        return IdentityFacts(
            scope, source, id, [_usage_row(row) for row in usage], [_lifecycle_row(row) for row in lifecycle]
        )

    def letters_naming(self, topic: str, *texts: str) -> list[NamingLetter]:
        """The newest dead letters of a topic whose bytes contain all of the texts, as JSON has them."""
        contains = " AND ".join(
            f"position(ifNull(value, ''), {quoted(chr(34) + text + chr(34))}) > 0" for text in texts
        )
        rows = self._client.query(
            f"""
            SELECT topic, partition, offset, toString(reason), detail, ifNull(value, ''), appended_at_ms
            FROM {self._database}.dead_letters FINAL
            WHERE topic = {quoted(topic)} AND {contains}
            ORDER BY appended_at_ms DESC, partition, offset LIMIT {FOUND_AT_MOST}
            {FINAL_SETTINGS}
            """,
            column_formats={"ifNull(value, '')": "bytes"},
        ).result_rows
        return [NamingLetter(*row) for row in rows]

    # A scope ------------------------------------------------------------------------------------------

    def scope_cells(self, scope: str, limit: int) -> tuple[int, list[CellTotals]]:
        """How many cells the ledger has of a scope, and the totals of the newest, in order."""
        rows = self._rows(
            f"""
            SELECT window_start_ms, -sumIf(sum_us, startsWith(account, 'user/')),
                sumIf(sum_us, startsWith(account, 'node/')), sumIf(sum_us, account = 'platform/revenue'),
                countIf(startsWith(account, 'user/') AND sum_us != 0), sum(lines), count() OVER ()
            FROM (
                SELECT window_start_ms, account, sum(change_us) AS sum_us, count() AS lines
                FROM (
                    SELECT window_start_ms, account, seq, any(change_us) AS change_us
                    FROM {self._database}.ledger WHERE scope = {quoted(scope)} AND {self._is_read}
                    GROUP BY window_start_ms, account, seq
                )
                GROUP BY window_start_ms, account
            )
            GROUP BY window_start_ms ORDER BY window_start_ms DESC LIMIT {limit}
            """
        )
        cells = [CellTotals(*map(int, row[:-1])) for row in reversed(rows)]
        return (int(rows[0][-1]) if rows else 0), cells

    def scope_end(self, scope: str) -> ScopeEnd | None:
        """The record of the scope's end, if it ended."""
        rows = self._rows(
            f"SELECT toString(reason), first_event_ms, last_event_ms, revision, posted_at_ms "
            f"FROM {self._database}.settlements FINAL WHERE scope = {quoted(scope)} AND {self.line_counts}"
        )
        return ScopeEnd(*rows[0]) if rows else None

    def differing_windows(self, scope: str, windows: Sequence[int]) -> list[int]:
        """Which of these windows, in order, the ledger has another amount of than the stored events come to."""
        if not windows:
            return []
        first, wanted = windows[0], frozenset(windows)
        posted = self._rows(
            f"""
            SELECT scope, window_start_ms, account, sum(change_us)
            FROM (
                SELECT scope, window_start_ms, account, seq, any(change_us) AS change_us
                FROM {self._database}.ledger
                WHERE scope = {quoted(scope)} AND window_start_ms >= {first} AND {self._is_read}
                GROUP BY scope, window_start_ms, account, seq
            )
            GROUP BY scope, window_start_ms, account
            """
        )
        found = []
        for facts in self.read(f"scope = {quoted(scope)}", {}, first, 2**62, posted):
            cells = recompute(facts, self._card, self._presence_max_ms)
            for window in sorted((facts.posted.keys() | cells.keys()) & wanted):
                vector = cells[window].vector if window in cells else {}
                if without_zeros(vector) != without_zeros(facts.posted.get(window, {})):
                    found.append(window)
        return found

    def newest_usage_windows(self, scope: str, limit: int) -> list[int]:
        """The newest windows in which the scope has stored usage, in order."""
        rows = self._rows(
            f"SELECT DISTINCT window_start_ms FROM {self._database}.usage_events WHERE scope = {quoted(scope)} "
            f"ORDER BY window_start_ms DESC LIMIT {limit}"
        )
        return sorted(int(window) for (window,) in rows)


def _usage_row(row: Sequence[Any]) -> UsageRow:
    return UsageRow(Usage(*row[:_USAGE_FIELDS]), *row[_USAGE_FIELDS:])


def _lifecycle_row(row: Sequence[Any]) -> LifecycleRow:
    scope, source, id, time_ms, kind, user_id, session_id, room_id, *place = row
    event = Lifecycle(scope, source, id, time_ms, LifecycleKind(kind), user_id, session_id, room_id)
    return LifecycleRow(event, *place)
