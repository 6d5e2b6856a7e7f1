"""The archive in ClickHouse, as repairs read it: usage and membership that count, and the ledger's sums.

Laws:
- Memory is bounded, here and on the server, by ranges of scopes (or accounts) that are read one after the other,
  whatever the tables hold. Within a range the server adds usage up by cell, user, node and version of the rates;
  prices are put on here, by the one price rule.
- An identity belongs to its earliest occurrence among usage and lifecycle events together, as in the view
  `usage`. A ledger line counts unless a rebuild voided it, as in the view `ledger_lines`.
- Nothing here is retried: whoever repairs says that it could not, and does it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from clickhouse_connect.driver.client import Client

from metering.facts import ScopeFacts, UsageSum
from metering.grants import EXPIRED, Grant
from metering.presence import PRESENCE_MAX_MS
from metering.rebuild import AccountState
from metering.write_off import Transfer, TransferResult
from schemas.events import LifecycleKind
from schemas.rate_card import RateCard
from schemas.records import RequestRecord

USAGE_ROWS_AT_ONCE = 200_000
"""How much usage a range of scopes holds: bounds what one step reads into memory."""

SCOPES_AT_ONCE = 1_000
ACCOUNTS_AT_ONCE = 20_000

EVER_MS = -(2**62)
"""Before every window."""

READ_SETTINGS: Mapping[str, object] = {
    # A range of scopes is a range of the sorting key: adding up in its order needs no table of all groups.
    "optimize_aggregation_in_order": 1,
    # Names of scopes and accounts are part of the text.
    "max_query_size": 16 << 20,
    "max_bytes_before_external_group_by": 512 << 20,
    "max_bytes_before_external_sort": 512 << 20,
}

PATIENT_SETTINGS = {**READ_SETTINGS, "http_send_timeout": 3_600}
"""For an answer that comes as it is asked for: the server waits while a part is worked on."""

FINAL_SETTINGS = (
    "SETTINGS defer_partition_pruning_after_final = 1, do_not_merge_across_partitions_select_final = 0"
)
"""FINAL stays whole across months: an identity may have occurrences in two of them."""


@dataclass(frozen=True, slots=True)
class ScopeRange:
    """Scopes after `after` up to `until`, both in the order of bytes; None is without a bound."""

    after: str | None
    until: str | None

    def condition(self) -> str:
        """As SQL on the column `scope`."""
        parts = [f"scope > {quoted(self.after)}"] if self.after is not None else ["scope != ''"]
        if self.until is not None:
            parts.append(f"scope <= {quoted(self.until)}")
        return " AND ".join(parts)


@dataclass(slots=True)
class _Scope:
    from_window_ms: int
    usage: list[UsageSum] = field(default_factory=list)
    membership: list[tuple[LifecycleKind, str | None, int]] = field(default_factory=list)
    posted: dict[int, dict[str, int]] = field(default_factory=dict)


class ClickHouseArchive:
    """`metering.ports.Archive` and `metering.rebuild.LedgerArchive` on ClickHouse.

    `topic` and `log` (the topic's id) say whose positions count. Blocks for as long as the client's time-outs and
    raises its errors. Not thread-safe.
    """

    def __init__(
        self,
        client: Client,
        database: str,
        card: RateCard,
        topic: str,
        log: str,
        presence_max_ms: int = PRESENCE_MAX_MS,
    ) -> None:
        self._client = client
        self._database = f"`{database}`"
        self._rates_from_ms = [version.effective_from_ms for version in card.versions]
        self._topic = topic
        self._log = log
        self._presence_max_ms = presence_max_ms

    # What a resettle reads ----------------------------------------------------------------------------

    def stored_offsets(self) -> Mapping[int, int]:
        rows = self._rows(
            f"SELECT partition, max(next_offset) FROM {self._database}.usage_positions "
            f"WHERE topic = {quoted(self._topic)} AND log = {quoted(self._log)} GROUP BY partition"
        )
        return {int(partition): int(offset) for partition, offset in rows}

    def facts_since(self, since_ms: int, frozen_before_ms: int) -> Iterator[list[ScopeFacts]]:
        # The ledger is sorted by account: asking it for each range of scopes would read all of it each
        # time. Its sums come once, in the order of scopes, and are dealt out to the ranges.
        with self._ledger_sums(_within(since_ms, frozen_before_ms)) as sums:
            for scopes in self.scope_ranges():
                posted = list(_take_until(sums, scopes.until))
                yield self.read(scopes.condition(), {}, since_ms, frozen_before_ms, posted)

    @contextmanager
    def _ledger_sums(self, within: str) -> Iterator[_Peekable]:
        """(scope, window start, account, sum of changes), in the order of scopes, as it is asked for."""
        query = f"""
            SELECT scope, window_start_ms, account, sum(change_us)
            FROM {self._database}.ledger FINAL
            WHERE scope != '' AND {within} AND {self.line_counts}
            GROUP BY scope, window_start_ms, account
            ORDER BY scope
        """
        with self._client.query_row_block_stream(query, settings=PATIENT_SETTINGS) as blocks:
            yield _Peekable(row for block in blocks for row in block)

    def facts_changed(
        self, appended_since_ms: int, frozen_from_ms: int, frozen_before_ms: int
    ) -> Iterator[list[ScopeFacts]]:
        if appended_since_ms <= 0:
            yield from self.facts_since(EVER_MS, frozen_before_ms)
            return
        query = self._changed_scopes(appended_since_ms, frozen_from_ms, frozen_before_ms)
        changed = [(scope, int(from_ms)) for scope, from_ms in self._rows(query)]
        if not changed:
            return
        within = f"{_within(EVER_MS, frozen_before_ms)} AND scope IN (SELECT scope FROM ({query}))"
        with self._ledger_sums(within) as sums:
            for first in range(0, len(changed), SCOPES_AT_ONCE):
                part = dict(changed[first : first + SCOPES_AT_ONCE])
                since_ms = min(part.values())
                condition = f"scope IN ({', '.join(map(quoted, part))})"
                # What came since the list was made is for the next run.
                posted = [row for row in _take_until(sums, max(part)) if row[1] >= part.get(row[0], since_ms)]
                yield self.read(condition, part, since_ms, frozen_before_ms, posted)

    def _changed_scopes(self, appended_since_ms: int, frozen_from_ms: int, frozen_before_ms: int) -> str:
        """Query for (scope, first window to compare), in the order of scopes.

        An event may take one of another window back, also from a live window one of a frozen one: all frozen cells
        of its scope are compared. What froze only lately is compared from there on.
        """
        database = self._database
        just_frozen = f"window_start_ms >= {frozen_from_ms} AND window_start_ms < {frozen_before_ms}"
        return f"""
            SELECT scope, min(from_ms) FROM (
                SELECT scope, if(appended_at_ms >= {appended_since_ms}, {EVER_MS}, {frozen_from_ms}) AS from_ms
                FROM {database}.usage_events WHERE appended_at_ms >= {appended_since_ms} OR ({just_frozen})
                UNION ALL
                SELECT scope, {EVER_MS} FROM {database}.lifecycle_events WHERE appended_at_ms >= {appended_since_ms}
                UNION ALL
                SELECT scope, {frozen_from_ms} FROM {database}.ledger WHERE scope != '' AND {just_frozen}
            ) GROUP BY scope ORDER BY scope
        """

    def scope_ranges(self) -> Iterator[ScopeRange]:
        """Ranges that together hold every scope, with a bounded amount of usage each."""
        after: str | None = None
        while True:
            floor = "" if after is None else f"WHERE scope > {quoted(after)}"
            found = self._rows(
                f"SELECT scope FROM {self._database}.usage_events {floor} ORDER BY scope "
                f"LIMIT 1 OFFSET {USAGE_ROWS_AT_ONCE}"
            )
            until = str(found[0][0]) if found else None
            yield ScopeRange(after, until)
            if until is None:
                return
            after = until

    def read(
        self,
        condition: str,
        from_windows_ms: Mapping[str, int],
        since_ms: int,
        before_ms: int,
        posted: Iterable[Any] | None = None,
    ) -> list[ScopeFacts]:
        """The facts of the scopes that fulfil `condition`, for windows in [since, before). `from_windows_ms` says
        from which window on each scope is to be compared; `since_ms` where it says nothing. `posted` are the
        ledger's sums of these scopes and windows; without them they are asked for."""
        scopes: dict[str, _Scope] = {}

        def scope_of(name: str) -> _Scope:
            found = scopes.get(name)
            if found is None:
                found = scopes[name] = _Scope(from_windows_ms.get(name, since_ms))
            return found

        within = _within(since_ms, before_ms)
        for scope, *usage in self._rows(self._usage_query(condition, within)):
            scope_of(scope).usage.append(UsageSum(*usage))
        if posted is None:
            posted = self._rows(self._ledger_query(condition, within))
        for scope, window_start_ms, account, change_us in posted:
            scope_of(scope).posted.setdefault(window_start_ms, {})[account] = change_us
        if any(scope.startswith("room/") for scope in scopes):
            for scope, kind, user_id, time_ms in self._rows(
                self._membership_query(condition, max(since_ms - self._presence_max_ms, EVER_MS))
            ):
                if scope in scopes:
                    scopes[scope].membership.append((LifecycleKind(kind), user_id or None, time_ms))
        return [
            ScopeFacts(name, scope.from_window_ms, scope.usage, scope.membership, scope.posted)
            for name, scope in scopes.items()
        ]

    def _usage_query(self, condition: str, within: str) -> str:
        database = self._database
        rates = ", ".join(map(str, self._rates_from_ms))
        return f"""
            SELECT scope, window_start_ms, user_id, node_id,
                arrayLast(starts_ms -> starts_ms <= time_ms, [{rates}]) AS rates_from_ms,
                toInt64(sum(asr_time_ms)), toInt64(sum(nmt_time_ms)), toInt64(sum(tts_time_ms)),
                toInt64(sum(gpu_active_time_ms))
            FROM (
                SELECT scope, source, id, window_start_ms, time_ms, user_id, toString(node_id) AS node_id,
                    asr_time_ms, nmt_time_ms, tts_time_ms, gpu_active_time_ms, precedence
                FROM {database}.usage_events FINAL WHERE {condition} {FINAL_SETTINGS}
            ) AS events
            LEFT JOIN ({self._claims("lifecycle_events", "usage_events", condition)}) AS claims
                ON events.scope = claims.scope AND events.source = claims.source AND events.id = claims.id
            WHERE {within} AND NOT ifNull(claims.precedence > events.precedence, false)
            GROUP BY scope, window_start_ms, user_id, node_id, rates_from_ms
        """

    def _membership_query(self, condition: str, since_ms: int) -> str:
        return f"""
            SELECT scope, kind, user_id, time_ms
            FROM (
                SELECT scope, source, id, kind, user_id, time_ms, precedence
                FROM {self._database}.lifecycle_events FINAL WHERE {condition} {FINAL_SETTINGS}
            ) AS events
            LEFT JOIN ({self._claims("usage_events", "lifecycle_events", condition)}) AS claims
                ON events.scope = claims.scope AND events.source = claims.source AND events.id = claims.id
            WHERE kind <= {int(LifecycleKind.CLOSED)} AND time_ms >= {since_ms}
                AND NOT ifNull(claims.precedence > events.precedence, false)
        """

    def _claims(self, claimant: str, other: str, condition: str) -> str:
        """Who else may own an identity. Only sources that report both kinds can clash, which keeps this small."""
        database = self._database
        return f"""
            SELECT scope, source, id, toNullable(max(precedence)) AS precedence
            FROM {database}.{claimant}
            WHERE {condition}
                AND source IN (SELECT DISTINCT source FROM {database}.{other} WHERE {condition})
            GROUP BY scope, source, id
        """

    def _ledger_query(self, condition: str, within: str) -> str:
        # Of the lines that count all copies of one are the same, so that any will do; FINAL, which would read
        # the whole table in its order, is not needed.
        return f"""
            SELECT scope, window_start_ms, account, sum(change_us)
            FROM (
                SELECT scope, window_start_ms, account, seq, any(change_us) AS change_us
                FROM {self._database}.ledger
                WHERE {condition} AND {within} AND {self.line_counts}
                GROUP BY scope, window_start_ms, account, seq
            )
            GROUP BY scope, window_start_ms, account
        """

    @property
    def line_counts(self) -> str:
        """SQL: whether a row of an epoch and an outbox entry was not voided by a rebuild."""
        return (
            "NOT arrayExists(rebuilt -> rebuilt.1 > epoch AND rebuilt.2 < entry, "
            f"(SELECT groupArray((epoch, after_entry)) FROM {self._database}.epochs))"
        )

    # What a rebuild reads -----------------------------------------------------------------------------

    def newest_epoch(self) -> int:
        database = self._database
        [[newest]] = self._rows(
            f"SELECT greatest((SELECT max(epoch) FROM {database}.ledger), "
            f"(SELECT max(epoch) FROM {database}.epochs))"
        )
        return int(newest)

    def last_entry(self) -> tuple[int, int]:
        """(number, time in ms) of the last outbox entry that any table of the journal has a row of; zeros for
        none."""
        tables = (
            ("ledger", "posted_at_ms"),
            ("settlements", "posted_at_ms"),
            ("fence_moves", "moved_at_ms"),
            ("requests", "posted_at_ms"),
            ("floors", "set_at_ms"),
        )
        last = ", ".join(
            f"(SELECT max((entry, {time})) FROM {self._database}.{table} WHERE {self.line_counts})"
            for table, time in tables
        )
        [[(number, at_ms)]] = self._rows(f"SELECT arrayMax([{last}])")
        return int(number), int(at_ms)

    def last_complete_entry(self) -> int:
        database = self._database
        # What an earlier rebuild went on from was complete; a void position may have replaced the one that said so.
        [[number]] = self._rows(
            f"SELECT greatest((SELECT max(entry) FROM {database}.outbox_positions WHERE {self.line_counts}), "
            f"(SELECT max(after_entry) FROM {database}.epochs))"
        )
        return int(number)

    def record_epoch(self, epoch: int, after_entry: int) -> None:
        self._client.command(
            f"INSERT INTO {self._database}.epochs (epoch, after_entry, at_ms) "
            f"SELECT {epoch}, {after_entry}, toUnixTimestamp64Milli(now64(3))",
            settings={"async_insert": 0},
        )

    def accounts(self) -> Iterator[list[AccountState]]:
        # One pass over the ledger, whose order is that of accounts.
        query = f"""
            SELECT account, sum(change_us), max(seq)
            FROM {self._database}.ledger FINAL WHERE {self.line_counts}
            GROUP BY account ORDER BY account
        """
        with self._client.query_row_block_stream(query, settings=PATIENT_SETTINGS) as blocks:
            for block in blocks:
                for first in range(0, len(block), ACCOUNTS_AT_ONCE):
                    rows = block[first : first + ACCOUNTS_AT_ONCE]
                    accounts = [account for account, _, _ in rows]
                    floors, grants = self._floors(accounts), self._grants(accounts)
                    yield [
                        AccountState(
                            account, int(balance_us), int(seq), floors.get(account), grants.get(account, ())
                        )
                        for account, balance_us, seq in rows
                    ]
        yield from self._accounts_without_lines()

    def _accounts_without_lines(self) -> Iterator[list[AccountState]]:
        """An account may have been given a floor before anything was posted to it."""
        rows = self._rows(
            f"SELECT DISTINCT account FROM {self._database}.floors "
            f"WHERE account NOT IN (SELECT account FROM {self._database}.ledger)"
        )
        floors = self._floors([account for (account,) in rows])
        if floors:
            yield [AccountState(account, 0, 0, floor_us) for account, floor_us in floors.items()]

    def _grants(self, accounts: Sequence[str]) -> dict[str, tuple[Grant, ...]]:
        """Those of these accounts that did not expire."""
        database = self._database
        listed = ", ".join(map(quoted, accounts))
        given = self._rows(
            f"SELECT account, grant_id, priority, from_ms, expires_ms, amount_us FROM {database}.grants FINAL "
            f"WHERE account IN ({listed}) AND {self.line_counts}"
        )
        if not given:
            return {}
        listed = ", ".join(map(quoted, sorted({account for account, *_ in given})))
        moved = self._rows(
            f"""
            SELECT account, change.1, sum(change.2), countIf(startsWith(request_id, {quoted(EXPIRED)}))
            FROM (SELECT account, grants, request_id, epoch, entry FROM {database}.ledger FINAL
                WHERE account IN ({listed}) AND {self.line_counts})
            ARRAY JOIN CAST(grants, 'Array(Tuple(String, Int64))') AS change
            GROUP BY account, change.1
            """
        )
        left = {(account, grant_id): int(us) for account, grant_id, us, expired in moved if not expired}
        found: dict[str, tuple[Grant, ...]] = {}
        for account, grant_id, priority, from_ms, expires_ms, amount_us in given:
            if (account, grant_id) in left:
                left_us = left[account, grant_id]
                grant = Grant(grant_id, int(priority), int(from_ms), int(expires_ms), int(amount_us), left_us)
                found[account] = (*found.get(account, ()), grant)
        return found

    def _floors(self, accounts: Sequence[str]) -> dict[str, int]:
        if not accounts:
            return {}
        rows = self._rows(
            f"SELECT account, argMax(floor_us, (epoch, entry)) FROM {self._database}.floors "
            f"WHERE account IN ({', '.join(map(quoted, accounts))}) AND {self.line_counts} GROUP BY account"
        )
        return {account: int(floor_us) for account, floor_us in rows}

    def requests(self) -> Iterator[list[RequestRecord]]:
        after: str | None = None
        while True:
            floor = "1" if after is None else f"request_id > {quoted(after)}"
            rows = self._rows(
                f"""
                SELECT request_id, digest, toString(kind), account, amount_us, balance_us, toString(outcome), actor,
                    note, epoch, entry, posted_at_ms
                FROM {self._database}.requests FINAL
                WHERE {floor} AND {self.line_counts}
                ORDER BY request_id LIMIT {ACCOUNTS_AT_ONCE}
                """
            )
            if not rows:
                return
            names = tuple(RequestRecord.model_fields)
            yield [RequestRecord(**dict(zip(names, row, strict=True))) for row in rows]
            after = rows[-1][0]

    def results(self, transfers: Sequence[Transfer]) -> dict[str, TransferResult]:
        """First results of transfers, by request id, that no rebuild can void any more."""
        database = self._database
        found: dict[str, TransferResult] = {}
        for first in range(0, len(transfers), SCOPES_AT_ONCE):
            some = transfers[first : first + SCOPES_AT_ONCE]
            listed = ", ".join(quoted(transfer.request_id) for transfer in some)
            rows = self._rows(
                f"SELECT request_id, toString(outcome), amount_us, balance_us FROM {database}.requests FINAL "
                f"WHERE request_id IN ({listed}) AND entry <= {self.last_complete_entry()} AND {self.line_counts}"
            )
            found |= {request_id: TransferResult(*result) for request_id, *result in rows}
        return found

    def last_window_ms(self) -> int | None:
        database = self._database
        rows = self._rows(
            f"""
            SELECT max(window_start_ms) FROM (
                SELECT window_start_ms FROM {database}.usage_events
                UNION ALL SELECT window_start_ms FROM {database}.ledger WHERE cell_id != ''
            ) HAVING count() > 0
            """
        )
        return int(rows[0][0]) if rows else None

    def last_fence_ms(self) -> int:
        # Void moves too: whoever made them may remember.
        [[fence_ms]] = self._rows(f"SELECT max(frozen_before_ms) FROM {self._database}.fence_moves")
        return int(fence_ms)

    def newest_generation(self, revision_bits: int) -> int:
        """Of the logs that revisions were counted in; see `app.books`."""
        database = self._database
        [[revision]] = self._rows(
            f"SELECT greatest((SELECT max(revision) FROM {database}.ledger WHERE reason != 'resettle'), "
            f"(SELECT max(revision) FROM {database}.settlements))"
        )
        return int(revision) >> revision_bits

    def _rows(self, query: str) -> Sequence[Any]:
        return self._client.query(query, settings=dict(READ_SETTINGS)).result_rows


def quoted(text: str | None) -> str:
    """A string as SQL. Ids have no character that needs it, but request ids and foreign accounts may."""
    assert text is not None
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _within(since_ms: int, before_ms: int) -> str:
    return f"window_start_ms >= {since_ms} AND window_start_ms < {before_ms}"


class _Peekable:
    """Rows that can be looked at before they are taken."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows
        self._next: Any = next(rows, None)

    def peek(self) -> Any:
        return self._next

    def take(self) -> Any:
        taken, self._next = self._next, next(self._rows, None)
        return taken


def _take_until(rows: _Peekable, until: str | None) -> Iterator[Any]:
    """Rows up to this scope, in the order of bytes; all for None."""
    last = None if until is None else until.encode()
    while (row := rows.peek()) is not None and (last is None or row[0].encode() <= last):
        yield rows.take()
