"""`metering reconcile`: do Kafka, the usage store, the ledger and the live balances say the same?

It reads, and changes nothing. On a live system it takes a consistent cut in this way:

1. One transaction in Redis gives the number of the last outbox entry and the fence; then the log's offsets are
   noted; then it waits until the ledger has that entry and the usage store those messages.
2. *The ledger by itself* is read up to that entry. An entry is what one script call changed, all or nothing, and
   lines are numbered, so whatever is posted meanwhile is left out exactly.
3. *Redis against the ledger*: a balance is read together with the number of its last ledger line; once the
   ledger has all that Redis had then, the line of that number must end at that balance, whatever came after.
   What is left of the account's grants is compared with the lines up to that one in the same way.
4. *Cells*: a frozen one must be what the stored events say. A live one says, by the revision of its last
   posting, up to which message of the log that posting knew its scope; so what is posted is compared with what
   exactly these messages say, also of a room that never pauses; and newer messages that the log held at the cut
   must get into the cell within the patience. Where it cannot be told what a posting knew (a scope that lies on
   several partitions) the cell is looked at again until it agrees with everything that is stored.
5. *The log* is read up to the noted offsets and spooled to disk by ranges of scopes, so that each range is
   compared with the store once: see `app.repair.reconcile_log`.

Differences are drift. A frozen cell that the next resettle will correct is drift too, because the balances are not
what the events say; it is counted apart as `pending_resettle`. What could not be decided, because a flow is behind
for longer than the patience, is `unproven`: no drift, but no proof either, so the exit code is 1 as for drift.

Memory is bounded by ranges of accounts and of scopes, here and in ClickHouse, and by LOOK_AGAIN_SCOPES. The
ledger is sorted by account and is wanted by scope: its lines are spooled to a temporary file by ranges of scopes
(some 80 bytes a line), as the messages of the log are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import redis
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from app.books import REVISION_BITS
from app.clients import clickhouse_client, redis_client
from app.errors import CommandError
from app.repair.log_ends import TopicEnds
from app.repair.reconcile_log import check_log_against_store
from app.repair.resettle import failure
from app.repair.spool import ScopeSpool
from metering.facts import ScopeFacts, UsageSum
from metering.grants import Grants
from metering.reconcile import (
    FIRST_DIFFERENCES,
    CellLook,
    Comparison,
    Report,
    Verdict,
    agrees_frozen,
    judge_live,
    moved_us,
    over_limit,
    without_zeros,
)
from metering.resettle import recompute
from schemas import redis_keys
from schemas.rate_card import RateCard, load_rate_card
from schemas.settings import Settings
from schemas.topics import EVENTS
from sources.archive_checks import (
    WORD,
    AccountLines,
    ArchiveChecks,
    CloseUsage,
    Moment,
    PostedCells,
    StoredScopes,
)
from sources.kafka import WrongLog, describe_log
from telemetry.quiet import KAFKA_LOGGER

ACCOUNTS_AT_ONCE = 20_000
SCOPES_AT_ONCE = 500
LOOK_AGAIN_SCOPES = 200_000
"""How many scopes that differ at first sight are looked at again; bounds memory when everything differs."""
LOOK_EVERY_S = 0.2
LOOK_EVERY_MAX_S = 2.0
SURE_AFTER_LOOKS = 2
"""A cell that does not fit its own last posting is drift when it says so twice over: between two looks an insert
that was under way is complete."""
REVISION_MASK = (1 << REVISION_BITS) - 1

Say = Callable[[str], None]


class CannotReconcile(CommandError):
    """The books cannot be compared now. One line."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What is compared: everything up to here, and as far as possible nothing beyond."""

    at_ms: int
    epoch: int
    last_entry: int
    frozen_before_ms: int
    spans: Mapping[int, tuple[int, int]]
    """Partition -> (first offset, next offset) of the log of events."""
    generation: int
    """Of the log that live revisions are counted in."""
    positions_ms: Mapping[int, int]
    """Partition -> time before which everything appended has been settled, as far as settlement told so far."""
    done_frozen_before_ms: int
    """The fence of the last complete resettle."""
    done_appended_before_ms: int

    @property
    def ends(self) -> dict[int, int]:
        """Partition -> next offset, where there is any message."""
        return {partition: next_ for partition, (first, next_) in self.spans.items() if next_ > first}

    def as_dict(self) -> dict[str, Any]:
        return {
            "at_ms": self.at_ms,
            "epoch": self.epoch,
            "last_entry": self.last_entry,
            "frozen_before_ms": self.frozen_before_ms,
            "offsets": {
                str(partition): {
                    "first": first,
                    "next": next_,
                    "settled_ms": self.positions_ms.get(partition),
                }
                for partition, (first, next_) in sorted(self.spans.items())
            },
            "last_resettle": {
                "frozen_before_ms": self.done_frozen_before_ms,
                "appended_before_ms": self.done_appended_before_ms,
            },
        }


def reconcile(settings: Settings, *, say: Say, read_log: bool = True, patience_s: float = 30.0) -> Report:
    """Compare the stores; see above. `patience_s` bounds each wait for a flow that is behind; `read_log` is whether
    to read the whole log of events too. Raises CommandError, one line, when a server is away, Redis has no epoch,
    or a rebuild or another log came between."""
    try:
        return _Reconciliation(settings, say, patience_s).run(read_log)
    except (redis.RedisError, ClickHouseError, KafkaException, WrongLog, OSError) as error:
        _fail(settings, error)


def _fail(settings: Settings, error: Exception) -> NoReturn:
    raise CannotReconcile(str(failure(settings, error))) from error


@dataclass(slots=True)
class _Doubt:
    """A scope whose cells differed at the last look: window -> (what was seen, how often in a row)."""

    windows: dict[int, tuple[object, int]] = field(default_factory=dict)


class _Reconciliation:
    def __init__(self, settings: Settings, say: Say, patience_s: float) -> None:
        self._settings = settings
        self._say = say
        self._patience_s = patience_s
        self._redis = redis_client(settings)
        self._card: RateCard = load_rate_card(settings.rate_card)
        self._presence_max_ms = settings.presence_max_s * 1000
        self._ledger_is_behind = False

    def run(self, read_log: bool) -> Report:
        client = clickhouse_client(self._settings)
        log = describe_log(
            AdminClient({"bootstrap.servers": self._settings.kafka}, logger=KAFKA_LOGGER), EVENTS
        )
        archive = self._archive(client, log.topic_id)
        cut = self._take_cut(log.topic_id)
        report = Report(cut=cut.as_dict())
        started_s = time.monotonic()
        flows = self._wait_for_the_flows(archive, cut)
        report.comparisons.append(flows)
        chains = Comparison(
            "ledger", "the ledger by itself: chains, cells and outbox entries that sum to zero"
        )
        presence = Comparison("ledger_redis", "accounts of the ledger, in Redis")
        self._check_ledger(archive, cut, chains, presence)
        balances = Comparison("redis_ledger", "live balances against the ledger line that left them")
        self._check_balances(archive, balances)
        cells = Comparison("cells", "cells recomputed from stored usage against the ledger's sums")
        prices = Comparison("prices", "prices kept with stored usage against the rate card")
        self._check_cells(archive, cut, cells, prices)
        report.comparisons += [chains, presence, balances, cells, prices]
        if read_log:
            messages = Comparison("log_store", "messages of the log against usage store and dead letters")
            check_log_against_store(
                self._settings,
                archive,
                self._card,
                cut.spans,
                self._positions_ms,
                cut.generation == 0,
                self._patience_s,
                messages,
            )
            report.comparisons.append(messages)
        self._require_same_books(cut, log.topic_id)
        report.cut["took_ms"] = round((time.monotonic() - started_s) * 1000)
        return report

    def _archive(self, client: Client, log: str) -> ArchiveChecks:
        return ArchiveChecks(
            client,
            self._settings.clickhouse_database,
            self._card,
            EVENTS,
            log,
            self._presence_max_ms,
        )

    # The cut ------------------------------------------------------------------------------------------

    def _take_cut(self, topic_id: str) -> Cut:
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.mget(redis_keys.EPOCH, redis_keys.REBUILDING, redis_keys.ENTRIES, redis_keys.FENCE)
        pipeline.hgetall(redis_keys.LOG)
        pipeline.hgetall(redis_keys.POSITIONS)
        pipeline.hmget(redis_keys.RESETTLE, "frozen_before_ms", "appended_before_ms")
        (epoch, rebuilding, entries, fence), log, positions, done = pipeline.execute()
        if rebuilding is not None:
            raise CannotReconcile(
                "Redis is being rebuilt: reconcile when `metering rebuild-balances` is done"
            )
        if epoch is None:
            raise CannotReconcile(
                "Redis has no epoch: it is empty, or lost its end. Run `metering rebuild-balances`"
            )
        if log and log[b"topic_id"].decode() != topic_id:
            raise CannotReconcile(
                f"topic {EVENTS} (id {topic_id}) is not the log that the balances were settled from "
                f"(id {log[b'topic_id'].decode()}). Run `metering adopt-log` to go on with it"
            )
        # After the fence: whatever was settled below it lay before these ends.
        spans = TopicEnds(self._settings.kafka, EVENTS).spans()
        return Cut(
            at_ms=time.time_ns() // 1_000_000,
            epoch=int(epoch),
            last_entry=int(entries or 0),
            frozen_before_ms=int(fence or 0),
            spans=spans,
            generation=int(log[b"generation"]) if log else 0,
            positions_ms=_of_events(positions),
            done_frozen_before_ms=int(done[0] or 0),
            done_appended_before_ms=int(done[1] or 0),
        )

    def _require_same_books(self, cut: Cut, topic_id: str) -> None:
        epoch, log = self._redis.get(redis_keys.EPOCH), self._redis.hget(redis_keys.LOG, "topic_id")
        adopted = log.decode() if isinstance(log, bytes) else log
        if int(epoch or 0) != cut.epoch:
            raise CannotReconcile("Redis was rebuilt, or lost its epoch, while it was compared: start again")
        if adopted is not None and adopted != topic_id:
            raise CannotReconcile("another log was adopted while the books were compared: start again")

    def _wait_for_the_flows(self, archive: ArchiveChecks, cut: Cut) -> Comparison:
        """Until ledger and usage store have what there was at the cut."""
        flows = Comparison("flows", "how far the flows are behind the cut")
        deadline = time.monotonic() + self._patience_s
        pause_s = LOOK_EVERY_S
        while True:
            missing_entries = max(cut.last_entry - self._stored_entry(), 0)
            stored = archive.stored_offsets()
            missing = {
                partition: end - stored.get(partition, 0)
                for partition, end in cut.ends.items()
                if stored.get(partition, 0) < end
            }
            if (not missing_entries and not missing) or time.monotonic() > deadline:
                break
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, LOOK_EVERY_MAX_S)
        flows.checked = cut.last_entry + sum(cut.ends.values())
        if missing_entries:
            self._ledger_is_behind = True
            flows.leave_open("the ledger is behind, by so many outbox entries", missing_entries)
        if missing:
            flows.leave_open("the usage store is behind, by so many messages", sum(missing.values()))
        flows.figures["messages in the log"] = sum(next_ - first for first, next_ in cut.spans.values())
        flows.figures["outbox entries"] = cut.last_entry
        if cut.positions_ms:
            flows.figures["settlement: ms since its oldest committed position"] = cut.at_ms - min(
                cut.positions_ms.values()
            )
        return flows

    def _stored_entry(self) -> int:
        return int(self._redis.get(redis_keys.LEDGER_STORED) or 0)

    # The ledger by itself, and that Redis has its accounts --------------------------------------------

    def _check_ledger(
        self, archive: ArchiveChecks, cut: Cut, chains: Comparison, presence: Comparison
    ) -> None:
        by_entry = by_cell = total_us = lines = 0
        # Of an entry that is not stored yet some lines may be.
        last_entry = min(cut.last_entry, self._stored_entry())
        for accounts in archive.ledger_by_account(last_entry):
            for each in accounts:
                chains.checked += 1
                lines += each.lines
                total_us += each.changes_us
                by_entry = (by_entry + each.by_entry) % WORD
                by_cell = (by_cell + each.by_cell) % WORD
                if not each.is_whole:
                    self._report_chain(chains, each)
            for first in range(0, len(accounts), ACCOUNTS_AT_ONCE):
                self._check_presence(accounts[first : first + ACCOUNTS_AT_ONCE], presence)
        chains.figures["lines"] = lines
        chains.figures["sum of all balances at the cut (us)"] = total_us
        if void := archive.void_lines():
            chains.figures["void lines, left behind by a rebuild"] = void
        if total_us:
            chains.differs("balances do not sum to zero", "all accounts", total_us, 0, total_us)
        for weighted, by, kind in (
            (by_cell, "cell_id", "cell does not sum to zero"),
            (by_entry, "entry", "outbox entry does not sum to zero"),
        ):
            if not weighted:
                continue
            count, first_ones = archive.unbalanced(by, last_entry, FIRST_DIFFERENCES)
            for name, sum_us in first_ones:
                chains.differs(kind, name, sum_us, 0, sum_us)
            more = count - len(first_ones)
            if more > 0:
                chains.differing += more
                chains.kinds[kind] += more

    @staticmethod
    def _report_chain(chains: Comparison, found: AccountLines) -> None:
        kind = "line missing" if found.lines != found.last_seq else "chain broken"
        chains.account_differs(
            kind,
            found.account,
            {"lines": found.lines, "changes_us": found.changes_us, "lines that do not add up": found.broken},
            {"lines": found.last_seq, "changes_us": found.balance_us, "lines that do not add up": 0},
            found.balance_us - found.changes_us,
        )

    def _check_presence(self, accounts: Sequence[AccountLines], presence: Comparison) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for each in accounts:
            pipeline.hget(redis_keys.balance(each.account), "seq")
        for each, seq in zip(accounts, pipeline.execute(), strict=True):
            presence.checked += 1
            if seq is None:
                presence.account_differs(
                    "missing in Redis", each.account, None, each.balance_us, each.balance_us
                )
            elif int(seq) < each.last_seq:
                presence.account_differs(
                    "Redis is behind the ledger", each.account, f"line {int(seq)}", f"line {each.last_seq}", 0
                )

    # Redis against the ledger -------------------------------------------------------------------------

    def _check_balances(self, archive: ArchiveChecks, balances: Comparison) -> None:
        for accounts in self._accounts_in_redis():
            self._check_some_balances(archive, accounts, balances)

    def _accounts_in_redis(self) -> Iterator[list[str]]:
        prefix = len(redis_keys.BALANCE_PREFIX) + 1
        some: set[str] = set()
        for key in self._redis.scan_iter(match=f"{redis_keys.BALANCE_PREFIX}*", count=5_000):
            some.add(key.decode("utf-8", "backslashreplace")[prefix:-1])
            if len(some) >= ACCOUNTS_AT_ONCE:
                yield sorted(some)
                some = set()
        if some:
            yield sorted(some)

    def _check_some_balances(
        self, archive: ArchiveChecks, accounts: Sequence[str], balances: Comparison
    ) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for account in accounts:
            pipeline.hmget(redis_keys.balance(account), "seq", "balance_us", "grants")
        found = {
            account: (int(seq or 0), int(balance_us or 0), grants.decode() if grants else "")
            for account, (seq, balance_us, grants) in zip(accounts, pipeline.execute(), strict=True)
        }
        # After the balances: whatever line left one of them is in an entry up to this one.
        entries = int(self._redis.get(redis_keys.ENTRIES) or 0)
        stored = self._await_entry(entries)
        left = archive.balances_after([(account, seq) for account, (seq, *_) in found.items() if seq])
        in_agreement = []
        for account, (seq, balance_us, _) in found.items():
            balances.checked += 1
            if not seq:
                left[account] = 0
            expected_us = left.get(account)
            if expected_us == balance_us:
                in_agreement.append(account)
            elif expected_us is not None:
                balances.account_differs(
                    "balance differs", account, balance_us, expected_us, balance_us - expected_us
                )
            elif stored < entries:
                balances.leave_open("the ledger is behind and lacks the line of the balance")
            else:
                balances.account_differs("no such line in the ledger", account, balance_us, None, balance_us)
        # Lines are stored in their order: whoever's last one is there has all of them.
        given = archive.accounts_with_grants(in_agreement)
        told = {
            account: (found[account][0], found[account][2])
            for account in in_agreement
            if account in given or found[account][2]
        }
        self._check_grants(archive, told, balances)

    @staticmethod
    def _check_grants(
        archive: ArchiveChecks, told: Mapping[str, tuple[int, str]], balances: Comparison
    ) -> None:
        """Of accounts with the number of their last line, and their grants as Redis has them."""
        expected = archive.grants_after({account: seq for account, (seq, _) in told.items()})
        for account, (_, text) in told.items():
            balances.count("accounts with grants")
            here = without_zeros({grant.grant_id: grant.left_us for grant in Grants.parse(text).grants})
            there = expected.get(account, {})
            if here != there:
                drift_us = sum(map(abs, moved_us(there, here).values()))
                balances.account_differs("grants differ", account, here, there, drift_us)

    def _await_entry(self, entry: int) -> int:
        """Wait until the ledger has this entry; says how far it is. Waits in vain only once."""
        deadline = time.monotonic() + (0 if self._ledger_is_behind else self._patience_s)
        while (stored := self._stored_entry()) < entry:
            if time.monotonic() > deadline:
                self._ledger_is_behind = True
                break
            time.sleep(LOOK_EVERY_S)
        return stored

    # Cells --------------------------------------------------------------------------------------------

    def _check_cells(self, archive: ArchiveChecks, cut: Cut, cells: Comparison, prices: Comparison) -> None:
        doubts: dict[str, _Doubt] = {}
        ranges = list(archive.scope_ranges_of())
        with ScopeSpool(ranges) as spool:
            for line in archive.cell_lines():
                spool.add(line[: line.index(b"\t")], line)
            for number, scopes in enumerate(ranges):
                read = archive.scopes(scopes, _posted(spool.pieces(number)))
                self._check_scopes(read, cut, doubts, cells, prices)
        cells.figures["looked at again"] = sum(len(doubt.windows) for doubt in doubts.values())
        self._look_until_clear(archive, cut, doubts, cells)

    def _check_scopes(
        self,
        read: StoredScopes,
        cut: Cut,
        doubts: dict[str, _Doubt],
        cells: Comparison,
        prices: Comparison,
    ) -> None:
        self._check_prices(read, prices)
        for facts in read.facts:
            doubt = self._first_sight(facts, cut, cells)
            if doubt is None:
                continue
            if len(doubts) < LOOK_AGAIN_SCOPES:
                doubts[facts.scope] = doubt
            else:
                cells.leave_open("too many cells differ to look at each again", len(doubt.windows))

    @staticmethod
    def _check_prices(read: StoredScopes, prices: Comparison) -> None:
        prices.checked += read.usage_rows
        for each in read.prices:
            if each.rate_version != each.expected_version:
                # Legitimate: the rates were announced when this usage, above the fence, was stored already.
                prices.count("usage stored before its version of the rates was announced")
                continue
            prices.differs(
                "price differs",
                f"{each.scope}@{each.window_start_ms}",
                {"cost_us": each.cost_us, "credit_us": each.credit_us},
                {"cost_us": each.expected_cost_us, "credit_us": each.expected_credit_us},
                abs(each.cost_us - each.expected_cost_us) + abs(each.credit_us - each.expected_credit_us),
            )

    def _first_sight(self, facts: ScopeFacts, cut: Cut, cells: Comparison) -> _Doubt | None:
        recomputed = recompute(facts, self._card, self._presence_max_ms)
        doubt = _Doubt()
        for window in facts.posted.keys() | recomputed.keys():
            cells.checked += 1
            cells.count("frozen" if window < cut.frozen_before_ms else "live")
            posted = without_zeros(facts.posted.get(window, {}))
            cell = recomputed.get(window)
            if posted != (without_zeros(cell.vector) if cell is not None else {}):
                doubt.windows[window] = (None, 0)
        return doubt if doubt.windows else None

    def _look_until_clear(
        self, archive: ArchiveChecks, cut: Cut, doubts: dict[str, _Doubt], cells: Comparison
    ) -> None:
        deadline = time.monotonic() + self._patience_s
        pause_s = LOOK_EVERY_S
        while doubts:
            last = time.monotonic() > deadline
            for names in _parts(list(doubts), SCOPES_AT_ONCE):
                looks = self._look(archive, cut, {name: list(doubts[name].windows) for name in names})
                self._judge(archive, cut, looks, doubts, cells, last=last)
            if last or not doubts:
                return
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, LOOK_EVERY_MAX_S)

    def _look(self, archive: ArchiveChecks, cut: Cut, windows: Mapping[str, Sequence[int]]) -> list[CellLook]:
        """These cells, once more and in detail. The order of reading matters: what was posted first, then how far
        the usage store is, then the usage, so that the store has what the posting knew or is known not to."""
        names = list(windows)
        posted = archive.posted_cells(names)
        stored_offsets = archive.stored_offsets()
        partitions = archive.partitions_of(names)
        known: dict[tuple[str, int], int] = {}
        for name in names:
            for window in windows[name]:
                revision, _ = posted.get(name, {}).get(window, (0, {}))
                offset = _known_offset(revision, cut.generation, partitions.get(name, set()), stored_offsets)
                if offset is not None:
                    known[name, window] = offset
        usage = archive.close_usage(windows, known, cut.ends)
        moments = archive.moments(names)
        looks = []
        for name in names:
            for window in windows[name]:
                _, sums = posted.get(name, {}).get(window, (0, {}))
                found = usage.get((name, window), CloseUsage())
                looks.append(
                    self._cell_look(
                        name, window, sums, found, moments.get(name, []), known.get((name, window)), cut,
                        partitions.get(name, set()),
                    )
                )  # fmt: skip
        return looks

    def _cell_look(
        self,
        scope: str,
        window: int,
        posted: Mapping[str, int],
        usage: CloseUsage,
        moments: Sequence[Moment],
        known_offset: int | None,
        cut: Cut,
        partitions: set[int],
    ) -> CellLook:
        def vector(sums: list[UsageSum], some: Sequence[Moment]) -> dict[str, int]:
            membership = [(each.kind, each.user_id, each.time_ms) for each in some]
            cells = recompute(
                ScopeFacts(scope, window, sums, membership, {}), self._card, self._presence_max_ms
            )
            return without_zeros(cells[window].vector) if window in cells else {}

        before_cut = [each for each in moments if each.offset < cut.ends.get(each.partition, 0)]
        return CellLook(
            scope=scope,
            window_start_ms=window,
            posted=without_zeros(posted),
            stored=vector(usage.stored, moments),
            at_cut=vector(usage.at_cut, before_cut),
            at_posting=None
            if known_offset is None
            else vector(usage.at_posting, [each for each in moments if each.offset < known_offset]),
            posting_covers_cut=known_offset is not None
            and all(known_offset >= cut.ends.get(partition, 0) for partition in partitions),
            appended_at_ms=max([usage.appended_at_ms, *(each.appended_at_ms for each in before_cut)]),
        )

    def _judge(
        self,
        archive: ArchiveChecks,
        cut: Cut,
        looks: Sequence[CellLook],
        doubts: dict[str, _Doubt],
        cells: Comparison,
        *,
        last: bool,
    ) -> None:
        frozen = []
        for look in looks:
            if look.window_start_ms < cut.frozen_before_ms:
                if self._frozen_is_clear(look, doubts, last=last) and not agrees_frozen(look):
                    frozen.append(look)
            else:
                self._judge_live(look, cut, doubts, cells, last=last)
        if frozen:
            scopes = sorted({look.scope for look in frozen})
            appended = archive.last_appended_frozen(scopes, cut.frozen_before_ms)
            for look in frozen:
                cells.cell_differs(_frozen_kind(look, cut, appended.get(look.scope, 0)), look)

    def _frozen_is_clear(self, look: CellLook, doubts: dict[str, _Doubt], *, last: bool) -> bool:
        """A resettle may be at work: only what is the same at two looks is believed to differ."""
        face = (look.posted, look.stored)
        if agrees_frozen(look) or last or self._seen(look, face, doubts) >= SURE_AFTER_LOOKS:
            _drop(doubts, look)
            return True
        return False

    def _judge_live(
        self, look: CellLook, cut: Cut, doubts: dict[str, _Doubt], cells: Comparison, *, last: bool
    ) -> None:
        verdict = judge_live(look)
        if verdict is Verdict.AGREES:
            _drop(doubts, look)
            return
        # That a cell does not fit its own posting is said once more of the next posting, if it is true.
        face = verdict if verdict is Verdict.DIFFERS else (look.posted, look.stored)
        same_again = self._seen(look, face, doubts) >= SURE_AFTER_LOOKS
        if not last and not (same_again and verdict is Verdict.DIFFERS):
            return
        _drop(doubts, look)
        if over_limit(look.stored):
            cells.cell_differs("over the limit of a cell, never posted", look)
        elif verdict is Verdict.DIFFERS and same_again:
            cells.cell_differs("live cell differs", look)
        elif verdict is Verdict.DIFFERS:
            cells.leave_open("the cell did not fit its last posting at the only look")
        elif not self._settled(look, cut):
            cells.leave_open("settlement is behind: the cell lacks newer events")
        elif verdict is Verdict.BEHIND:
            cells.cell_differs("settled, but not posted", look)
        elif same_again:
            cells.cell_differs("live cell differs", look)
        else:
            cells.leave_open("the cell keeps changing, and it cannot be told what its last posting knew")

    def _settled(self, look: CellLook, cut: Cut) -> bool:
        """Whether settlement says that it has read, and committed, what shapes this cell."""
        positions = self._positions_ms().values()
        slack_ms = self._settings.emit_interval_ms + 1_000
        return len(positions) >= len(cut.spans) and min(positions) > look.appended_at_ms + slack_ms

    def _positions_ms(self) -> dict[int, int]:
        positions: dict[bytes, bytes] = self._redis.hgetall(redis_keys.POSITIONS)  # type: ignore[assignment]
        return _of_events(positions)

    @staticmethod
    def _seen(look: CellLook, face: object, doubts: dict[str, _Doubt]) -> int:
        """How often in a row the cell looked just like this."""
        before, times = doubts[look.scope].windows[look.window_start_ms]
        times = times + 1 if before == face else 1
        doubts[look.scope].windows[look.window_start_ms] = (face, times)
        return times


def _posted(pieces: Iterable[bytes]) -> PostedCells:
    """The sums of spooled ledger lines."""
    found: dict[str, dict[int, dict[str, int]]] = {}
    for line in (line for piece in pieces for line in piece.decode().splitlines()):
        scope, window, account, change = line.split("\t")
        sums = found.setdefault(scope, {}).setdefault(int(window), {})
        sums[account] = sums.get(account, 0) + int(change)
    return found


def _of_events(positions: Mapping[bytes, bytes]) -> dict[int, int]:
    """Partition -> committed position (ms), of the topic of events."""
    prefix = f"{EVENTS}/"
    return {
        int(name.decode().removeprefix(prefix)): int(at_ms)
        for name, at_ms in positions.items()
        if name.decode().startswith(prefix)
    }


def _known_offset(
    revision: int, generation: int, partitions: set[int], stored_offsets: Mapping[int, int]
) -> int | None:
    """Before which offset of its partition the last posting knew every event of the scope; None when that cannot be
    told. A cell without any posting knew nothing."""
    if not revision:
        return 0
    if len(partitions) != 1 or revision >> REVISION_BITS != generation:
        return None
    offset = revision & REVISION_MASK
    [partition] = partitions
    return offset if stored_offsets.get(partition, 0) >= offset else None


def _frozen_kind(look: CellLook, cut: Cut, appended_at_ms: int) -> str:
    """Whether the next resettle will look at the cell: by its own rule of what may have changed."""
    if over_limit(look.stored):
        return "over the limit of a cell, never posted"
    if look.window_start_ms >= cut.done_frozen_before_ms or appended_at_ms >= cut.done_appended_before_ms:
        return "pending_resettle"
    return "frozen cell differs"


def _drop(doubts: dict[str, _Doubt], look: CellLook) -> None:
    windows = doubts[look.scope].windows
    windows.pop(look.window_start_ms, None)
    if not windows:
        del doubts[look.scope]


def _parts(names: list[str], size: int) -> Iterator[list[str]]:
    for first in range(0, len(names), size):
        yield names[first : first + size]
