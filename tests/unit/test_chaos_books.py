"""The comparison of `make chaos`: it says what is wrong, and nothing when nothing is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.proof import LedgerBalance
from chaos.bill import Bill, Logged, bill_of
from chaos.books import Stores, compare
from schemas.rate_card import load_rate_card

CELL = "session/s-1@1767225600000"
MINUTE_US = 60_000_000
COST_US, CREDIT_US = 400_000, 175_000


def usage(event_id: str = "e-1", *, asr_ms: int = 120) -> bytes:
    """One utterance of u-5 on n-17: 400 000 us of cost, unless changed, and 175 000 us of credit."""
    return (
        f'{{"specversion":"1.0","id":"{event_id}","source":"node/n-17","type":"lingua.usage.utterance.v1",'
        '"time":"2026-01-01T00:00:00.123Z","data":{"session_id":"s-1","user_id":"u-5","node_id":"n-17",'
        f'"utterance_id":"ut-1","asr_time_ms":{asr_ms},"nmt_time_ms":80,"tts_time_ms":200,'
        '"gpu_active_time_ms":350}}'
    ).encode()


def top_up(request: str, amount_us: int) -> bytes:
    """Minutes for u-5."""
    return (
        f'{{"specversion":"1.0","id":"{request}","source":"cli/test","type":"lingua.account.topped_up.v1",'
        '"time":"2026-01-01T00:00:00Z","data":{"account":"user/u-5","amount_us":'
        f'{amount_us},"request_id":"{request}","reason":"test","actor":"test"}}}}'
    ).encode()


def logged(*values: bytes) -> list[Logged]:
    """Messages one after the other in partition 0."""
    return [Logged(0, offset, value, 1_767_225_700_000) for offset, value in enumerate(values)]


@pytest.fixture
def bill() -> Bill:
    """One utterance, sent twice, one junk message, and one top-up, sent twice and then contradicted."""
    return bill_of(
        logged(usage(), usage(), b"junk"),
        logged(top_up("r-1", MINUTE_US), top_up("r-1", MINUTE_US), top_up("r-1", 7)),
        load_rate_card(None),
        broker_append_time=True,
    )


@pytest.fixture
def stores() -> Stores:
    """What Redis and ClickHouse hold when everything is right."""
    balances = {
        "user/u-5": MINUTE_US - COST_US,
        "node/n-17": CREDIT_US,
        "platform/revenue": COST_US - CREDIT_US,
        "platform/top_ups": -MINUTE_US,
    }
    return Stores(
        live=balances,
        chains={account: LedgerBalance(amount, amount, 1, 1, 0) for account, amount in balances.items()},
        by_cell={
            (CELL, "user/u-5"): -COST_US,
            (CELL, "node/n-17"): CREDIT_US,
            (CELL, "platform/revenue"): COST_US - CREDIT_US,
        },
        by_request={("r-1", "user/u-5"): MINUTE_US, ("r-1", "platform/top_ups"): -MINUTE_US},
        usage_events=1,
        usage_cost_us=COST_US,
        dead_letters=frozenset({(0, 2)}),
    )


def wrong(bill: Bill, stores: Stores) -> dict[str, int]:
    """How many differences of each sort."""
    return {name: len(found) for name, found in compare(bill, stores).sorts() if found}


def test_right_books_have_no_difference(bill: Bill, stores: Stores) -> None:
    """Repeats, junk and conflicting commands move nothing."""
    assert wrong(bill, stores) == {}
    assert compare(bill, stores).clean


def test_a_lost_charge_is_found(bill: Bill, stores: Stores) -> None:
    """A ledger without one line of a cell: lost, the cell does not sum to zero, the chain has a gap."""
    by_cell = {key: amount for key, amount in stores.by_cell.items() if key[1] != "user/u-5"}
    chains = {**stores.chains, "user/u-5": LedgerBalance(MINUTE_US - COST_US, MINUTE_US, 1, 2, 1)}
    found = wrong(bill, replace(stores, by_cell=by_cell, chains=chains))
    assert found == {"lost": 1, "not zero": 1, "broken chains": 1}


def test_a_cell_that_is_missing_whole_is_lost(bill: Bill, stores: Stores) -> None:
    """Nothing in the ledger: three amounts are lost, and nothing is out of balance."""
    assert wrong(bill, replace(stores, by_cell={})) == {"lost": 3}


def test_a_charge_that_was_made_twice_is_found(bill: Bill, stores: Stores) -> None:
    """All amounts of a cell doubled: it still sums to zero, and each account is off."""
    twice = {key: 2 * amount for key, amount in stores.by_cell.items()}
    live = {**stores.live, "user/u-5": MINUTE_US - 2 * COST_US}
    found = wrong(bill, replace(stores, by_cell=twice, live=live))
    assert found == {"charged twice": 3, "wrong balances": 1, "not zero": 1}


def test_a_cell_that_nobody_ordered_is_found(bill: Bill, stores: Stores) -> None:
    """Not a loss but money that moved for nothing."""
    by_cell = {**stores.by_cell, ("session/s-9@0", "user/u-5"): -1, ("session/s-9@0", "node/n-17"): 1}
    assert wrong(bill, replace(stores, by_cell=by_cell)) == {"charged twice": 2}


def test_a_command_that_was_carried_out_twice_is_found(bill: Bill, stores: Stores) -> None:
    """A request id counts once."""
    twice = {key: 2 * amount for key, amount in stores.by_request.items()}
    assert wrong(bill, replace(stores, by_request=twice)) == {"charged twice": 2}


def test_a_balance_that_differs_by_one_is_found(bill: Bill, stores: Stores) -> None:
    """Redis alone is off: the account and the sum over all accounts."""
    live = {**stores.live, "node/n-17": CREDIT_US + 1}
    assert wrong(bill, replace(stores, live=live)) == {"wrong balances": 1, "not zero": 1}


def test_lost_usage_and_a_lost_dead_letter_are_found(bill: Bill, stores: Stores) -> None:
    """Both belong to the usage store."""
    found = wrong(bill, replace(stores, usage_events=0, usage_cost_us=0, dead_letters=frozenset()))
    assert found == {"usage store": 2}


def test_late_usage_is_wrong_only_where_none_may_be_late(bill: Bill, stores: Stores) -> None:
    """In a world whose windows freeze early it is the point of the exercise."""
    late = replace(stores, late_events=1)
    assert wrong(bill, late) == {"late": 1}
    assert compare(bill, late, late_allowed=True).clean


def test_of_two_different_events_with_one_identity_the_first_in_the_log_counts() -> None:
    """And neither is missed among the dead letters, since which of them is one depends on the reading."""
    bill = bill_of(logged(usage(), usage(asr_ms=999)), [], load_rate_card(None), broker_append_time=True)
    assert bill.by_cell[CELL, "user/u-5"] == -COST_US
    assert bill.refused == frozenset()


def test_an_event_of_the_future_is_no_usage_where_the_broker_stamps_messages() -> None:
    """More than five minutes ahead of the append time it is refused."""
    early = [Logged(0, 0, usage(), 0)]
    assert bill_of(early, [], load_rate_card(None), broker_append_time=True).refused == {(0, 0)}
    assert bill_of(early, [], load_rate_card(None), broker_append_time=False).usage_events == 1
