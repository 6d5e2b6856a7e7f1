"""Write-off plans: who pays how much for whom, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metering.write_off import Transfer, command_of, plan
from schemas.commands import MAX_AMOUNT_US, Command, CommandKind
from schemas.decode import decode_command

PERIOD_MS = 1_767_225_600_000


def told(transfers: list[Transfer]) -> list[tuple[str, str, int]]:
    return [(transfer.user_id, transfer.node_id, transfer.amount_us) for transfer in transfers]


def test_the_deepest_debt_comes_first_and_the_first_node_pays_first() -> None:
    """A node that two users are bound to gives to the deeper debt what it has; the rest is for the other."""
    transfers = plan(
        PERIOD_MS,
        {"u-1": -50, "u-2": -80, "u-3": -999},
        {"u-1": ["n-2", "n-1"], "u-2": ["n-1", "n-2"]},
        {"n-1": 70, "n-2": 30},
    )
    assert told(transfers) == [("u-2", "n-1", 70), ("u-2", "n-2", 10), ("u-1", "n-2", 20)]


def test_a_node_without_credit_pays_nothing() -> None:
    """Zero or below; and one that nobody knows."""
    bound = {"u-1": ["n-0", "n-minus", "n-unknown"]}
    assert plan(PERIOD_MS, {"u-1": -5}, bound, {"n-0": 0, "n-minus": -7}) == []


users = st.sampled_from(["u-1", "u-2", "u-3", "u-4"])
nodes = st.sampled_from(["n-1", "n-2", "n-3"])


@given(
    balances=st.dictionaries(users, st.integers(-(10**17), -1)),
    bound=st.dictionaries(users, st.lists(nodes, unique=True)),
    credits=st.dictionaries(nodes, st.integers(-(10**9), 10**17)),
)
def test_nobody_gets_more_than_the_debt_and_no_node_gives_more_than_its_credit(
    balances: dict[str, int], bound: dict[str, list[str]], credits: dict[str, int]
) -> None:
    """And what could have been paid is paid, as far as one command carries."""
    transfers = plan(PERIOD_MS, balances, bound, credits)
    got = dict.fromkeys(balances, 0)
    left = dict(credits)
    for transfer in transfers:
        assert 0 < transfer.amount_us <= MAX_AMOUNT_US
        assert transfer.node_id in bound[transfer.user_id]
        got[transfer.user_id] += transfer.amount_us
        left[transfer.node_id] -= transfer.amount_us
    assert len({transfer.request_id for transfer in transfers}) == len(transfers)
    for user, balance in balances.items():
        assert got[user] <= -balance
        for node in bound.get(user, []):
            paid = sum(t.amount_us for t in transfers if (t.user_id, t.node_id) == (user, node))
            assert got[user] == -balance or left.get(node, 0) <= 0 or paid == MAX_AMOUNT_US
    assert all(left[node] >= 0 for node, had in credits.items() if had >= 0)


def test_a_transfer_is_one_command_whenever_it_is_made() -> None:
    """With the longest ids too: settlement takes it, and its request id is of the period, the user and the node."""
    transfer = Transfer(PERIOD_MS, "u" * 128, "n" * 128, MAX_AMOUNT_US)
    value = command_of(transfer).model_dump_json().encode()
    assert value == command_of(transfer).model_dump_json().encode()
    command = decode_command(value)
    assert isinstance(command, Command)
    assert (command.kind, command.account, command.node_account, command.amount_us, command.time_ms) == (
        CommandKind.WRITE_OFF, f"user/{'u' * 128}", f"node/{'n' * 128}", MAX_AMOUNT_US, PERIOD_MS,
    )  # fmt: skip
    assert command.request_id == transfer.request_id
    others = (transfer._replace(period_ms=0), transfer._replace(user_id="u"), transfer._replace(node_id="n"))
    assert len({transfer.request_id, *(other.request_id for other in others)}) == 4
