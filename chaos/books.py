"""The comparison: what the stores hold against the bill. Pure, but for the function that reads the stores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import redis
from clickhouse_connect.driver.client import Client

from app.proof import LedgerBalance, ledger_balances, live_balances
from app.views import query_rows
from chaos.bill import Bill
from schemas.topics import EVENTS

SHOWN = 5
"""So many of each sort of difference are spelt out."""


@dataclass
class Stores:
    """What was found in Redis and ClickHouse. Amounts in us; zeros are left out."""

    live: Mapping[str, int] = field(default_factory=dict)
    """account -> balance in Redis."""
    chains: Mapping[str, LedgerBalance] = field(default_factory=dict)
    by_cell: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(cell id, account) -> sum of the ledger's changes."""
    by_request: Mapping[tuple[str, str], int] = field(default_factory=dict)
    write_offs: Mapping[str, int] = field(default_factory=dict)
    """What each write-off moved, by request id, as its result says."""
    usage_events: int = 0
    usage_cost_us: int = 0
    dead_letters: frozenset[tuple[int, int]] = frozenset()
    """(partition, offset) of the events that were refused."""
    late_events: int = 0
    """Usage that was appended when its window was frozen already."""


@dataclass
class Verdict:
    """What is wrong, by sort; nothing when the books are right."""

    lost: list[str] = field(default_factory=list)
    """A cell or command of which an account got less than it should, or nothing."""
    doubled: list[str] = field(default_factory=list)
    """More than it should, or the wrong way round, or what nobody ordered."""
    broken_chains: list[str] = field(default_factory=list)
    """Accounts whose ledger lines do not follow each other from before to after."""
    unbalanced: list[str] = field(default_factory=list)
    """Cells and commands that do not sum to zero."""
    balances: list[str] = field(default_factory=list)
    """Accounts whose balance, in Redis or at the end of the ledger, is not that of the bill."""
    usage: list[str] = field(default_factory=list)
    """Usage or dead letters that the archive lacks or has too many."""
    late: list[str] = field(default_factory=list)
    """Usage that became late where none may."""

    @property
    def clean(self) -> bool:
        """Whether nothing at all is wrong."""
        return not any(differences for _, differences in self.sorts())

    def sorts(self) -> Iterator[tuple[str, list[str]]]:
        """(name, differences) of every sort."""
        yield "lost", self.lost
        yield "charged twice", self.doubled
        yield "broken chains", self.broken_chains
        yield "not zero", self.unbalanced
        yield "wrong balances", self.balances
        yield "usage store", self.usage
        yield "late", self.late

    def lines(self) -> Iterator[str]:
        """The first differences of each sort."""
        for name, differences in self.sorts():
            if differences:
                yield f"{name}: {len(differences)}"
                yield from (f"  {difference}" for difference in sorted(differences)[:SHOWN])


def compare(bill: Bill, stores: Stores, *, late_allowed: bool = False) -> Verdict:
    """Every account, cell and command of either side."""
    verdict = Verdict()
    bill = bill.with_write_offs(stores.write_offs)
    _compare_amounts("cell", bill.by_cell, stores.by_cell, verdict)
    _compare_amounts("request", bill.by_request, stores.by_request, verdict)
    expected = bill.balances()
    for account in sorted(expected.keys() | stores.live.keys() | stores.chains.keys()):
        chain = stores.chains.get(account, LedgerBalance(0, 0, 0, 0, 0))
        amounts = (expected.get(account, 0), stores.live.get(account, 0), chain.balance_us)
        if len(set(amounts)) > 1:
            verdict.balances.append(
                f"{account}: settle says {amounts[0]} us, Redis {amounts[1]} us, the ledger {amounts[2]} us"
            )
        if not chain.is_whole:
            verdict.broken_chains.append(
                f"{account}: {chain.lines} lines up to number {chain.last_seq}, {chain.breaks} do not begin where "
                f"the one before ended; they change {chain.changes_us} us, the last leaves {chain.balance_us} us"
            )
    if sum(stores.live.values()):
        verdict.unbalanced.append(f"the live balances sum to {sum(stores.live.values())} us")
    if (bill.usage_events, bill.cost_us) != (stores.usage_events, stores.usage_cost_us):
        verdict.usage.append(
            f"{bill.usage_events} events of {bill.cost_us} us count, stored are {stores.usage_events} of "
            f"{stores.usage_cost_us} us"
        )
    for place in bill.refused - stores.dead_letters:
        verdict.usage.append(f"no dead letter for partition {place[0]}, offset {place[1]}")
    if stores.late_events and not late_allowed:
        verdict.late.append(f"{stores.late_events} events came when their windows were frozen")
    return verdict


def _compare_amounts(
    what: str,
    expected: Mapping[tuple[str, str], int],
    found: Mapping[tuple[str, str], int],
    verdict: Verdict,
) -> None:
    sums: defaultdict[str, int] = defaultdict(int)
    for (name, _), amount_us in found.items():
        sums[name] += amount_us
    verdict.unbalanced += [f"{what} {name} sums to {total} us" for name, total in sums.items() if total]
    for key in expected.keys() | found.keys():
        should, does = expected.get(key, 0), found.get(key, 0)
        if should == does:
            continue
        less = does == 0 or ((does > 0) == (should > 0) and abs(does) < abs(should))
        sort = verdict.lost if less else verdict.doubled
        sort.append(f"{what} {key[0]}, {key[1]}: settle says {should} us, the ledger {does} us")


def read_stores(live: redis.Redis, archive: Client, database: str) -> Stores:
    """Everything that Redis and ClickHouse hold. Raises RedisError or CommandError."""
    ledger = ledger_source(archive, database)
    by_cell, by_request = (
        {
            (name, account): int(amount_us)
            for name, account, amount_us in query_rows(
                archive,
                f"SELECT {column}, account, sum(change_us) AS amount_us FROM {ledger} WHERE {column} != '' "
                f"GROUP BY {column}, account HAVING amount_us != 0",
                {},
            )
        }
        for column in ("cell_id", "request_id")
    )
    [(events, cost_us, late)] = query_rows(
        archive, f"SELECT count(), sum(cost_us), countIf(late) FROM `{database}`.usage", {}
    )
    letters = query_rows(
        archive,
        f"SELECT partition, offset FROM `{database}`.dead_letters FINAL WHERE topic = '{EVENTS}'",
        {},
    )
    return Stores(
        live=live_balances(live),
        chains=ledger_balances(archive, database),
        by_cell=by_cell,
        by_request=by_request,
        write_offs={
            request_id: int(amount_us)
            for request_id, amount_us in query_rows(
                archive,
                f"SELECT request_id, amount_us FROM `{database}`.requests FINAL WHERE kind = 'write_off'",
                {},
            )
        },
        usage_events=int(events),
        usage_cost_us=int(cost_us),
        dead_letters=frozenset((int(partition), int(offset)) for partition, offset in letters),
        late_events=int(late),
    )


def ledger_source(archive: Client, database: str) -> str:
    """The ledger without what a rebuild left behind, where this database has a view for that."""
    views = query_rows(archive, f"SELECT name FROM system.tables WHERE database = '{database}'", {})
    return (
        f"`{database}`.ledger_lines"
        if ("ledger_lines",) in map(tuple, views)
        else f"`{database}`.ledger FINAL"
    )
