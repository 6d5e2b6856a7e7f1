"""Nodes: credentials, binding by security code, order of priority."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from accounts import nodes, users
from accounts.context import Accounts
from accounts.errors import Reason, Refused
from accounts.logins import Person
from accounts.nodes import NodeItself
from accounts.security_codes import ALPHABET
from tests.accounts.support import PASSWORD, ROOT, Client, Clock, Machine, Member, at_once, problem_of

HERE = "192.0.2.1"


def enter(client: Client, node: Machine, code: str):  # type: ignore[no-untyped-def]
    return client.http.post("/v1/node/users", json={"security_code": code}, headers=node.auth)


def order(client: Client, member: Member) -> list[str]:
    items = client.http.get("/v1/me/nodes", headers=member.auth).json()["items"]
    assert [item["position"] for item in items] == list(range(1, len(items) + 1))
    return [item["node_id"] for item in items]


def test_a_node_has_credentials_of_its_own(client: Client) -> None:
    """The secret opens, another does not, and an unknown node gets the same answer."""
    owner = client.register()
    node = client.node(owner)
    shown = client.http.get("/v1/node", headers=node.auth).json()
    assert (shown["node_id"], shown["owner_id"]) == (node.node_id, owner.user_id)
    listed = client.http.get("/v1/nodes", headers=owner.auth).json()["items"]
    assert [item["node_id"] for item in listed] == [node.node_id]
    wrong, unknown = (
        client.http.post("/v1/nodes/token", json={"client_id": client_id, "client_secret": "lmn_wrong"})
        for client_id in (node.node_id, "n-0")
    )
    assert problem_of(wrong) == "bad-credentials"
    assert wrong.content == unknown.content


def test_a_replaced_secret_ends_the_old_one_and_its_tokens(client: Client) -> None:
    """At once; the new one opens; only the owner or an operator replaces it."""
    owner = client.register()
    node = client.node(owner)
    path = f"/v1/nodes/{node.node_id}/secret"
    assert problem_of(client.http.post(path, headers=client.register().auth)) == "not-found"
    replaced = client.http.post(path, headers=owner.auth).json()["client_secret"]
    assert problem_of(client.http.get("/v1/node", headers=node.auth)) == "bad-token"
    credentials = {"client_id": node.node_id, "client_secret": node.secret}
    assert problem_of(client.http.post("/v1/nodes/token", json=credentials)) == "bad-credentials"
    client.node_token(node.node_id, replaced)
    assert client.http.post(path, headers=client.operator().auth).status_code == 200


def test_only_an_operator_chooses_an_id(client: Client) -> None:
    """Else somebody could take the account that another node's events earn for."""
    body = {"name": "x", "node_id": "n-17"}
    assert problem_of(client.http.post("/v1/nodes", json=body, headers=client.register().auth)) == "forbidden"
    operator = client.operator()
    assert client.node(operator, "n-17").node_id == "n-17"
    assert problem_of(client.http.post("/v1/nodes", json=body, headers=operator.auth)) == "node-id-taken"


def test_tokens_of_users_and_nodes_are_not_mistaken_for_each_other(client: Client) -> None:
    """Each opens its own doors only."""
    member = client.register()
    node = client.node(member)
    assert problem_of(client.http.get("/v1/me", headers=node.auth)) == "forbidden"
    assert problem_of(client.http.get("/v1/node", headers=member.auth)) == "forbidden"
    assert problem_of(client.http.get("/v1/audit", headers=node.auth)) == "forbidden"


def test_binding_by_code(client: Client) -> None:
    """In any case, with spaces and dashes; once; both see it, and it is in the audit log."""
    member = client.register()
    node = client.node(client.register())
    code = client.code(member)
    assert len(code) == 8 and set(code) <= set(ALPHABET)
    bound = enter(client, node, f" {code[:4].lower()}-{code[4:]} ")
    assert bound.status_code == 201
    assert (bound.json()["user_id"], bound.json()["username"]) == (member.user_id, member.username)
    assert problem_of(enter(client, node, code)) == "already-bound"
    assert order(client, member) == [node.node_id]
    [entry] = client.audit(client.operator(), action="node.bound")
    assert (entry["actor_type"], entry["actor_id"]) == ("node", node.node_id)
    assert entry["payload"] == {"user_id": member.user_id}


def test_a_replaced_code_binds_nobody_and_bindings_stay(client: Client) -> None:
    """The old code is nobody's from then on."""
    member = client.register()
    node, other = client.node(client.register()), client.node(client.register())
    old = client.code(member)
    client.bind(node, member)
    new = client.http.post("/v1/me/security-code", headers=member.auth).json()["security_code"]
    assert new != old and client.code(member) == new
    assert problem_of(enter(client, other, old)) == "wrong-code"
    assert order(client, member) == [node.node_id]
    assert enter(client, other, new).status_code == 201


def test_the_database_does_not_tell_the_code(client: Client, accounts: Accounts) -> None:
    """Neither the code nor a plain hash of it is anywhere in the user's row."""
    from hashlib import sha256

    from accounts.models import User

    member = client.register()
    code = client.code(member)
    with accounts.database.read() as session:
        user = session.get_one(User, member.user_id)
        row = " ".join(str(getattr(user, column.name)) for column in User.__table__.columns)
    assert code not in row
    assert sha256(code.encode()).hexdigest() not in row


def test_guesses_are_limited_per_node(client: Client, clock: Clock) -> None:
    """Ten, whatever they are; then not even the right code; an hour later it works."""
    member = client.register()
    node = client.node(client.register())
    guesses = [member.username, "0000-0000", *("".join(letters) for letters in itertools.permutations("ABC"))]
    for guess in (guesses * 2)[:10]:
        assert problem_of(enter(client, node, f"{guess}")) == "wrong-code"
    stopped = enter(client, node, client.code(member))
    assert problem_of(stopped) == "too-many-attempts"
    clock.go_on(3_600)
    fresh = client.node_token(node.node_id, node.secret)
    assert enter(client, fresh, client.code(client.log_in(member.username))).status_code == 201


def test_guesses_are_limited_per_owner_and_address(client: Client) -> None:
    """More nodes of the same owner, or of others at the same address, do not give more guesses."""
    owner = client.register()
    answers = Counter(problem_of(enter(client, client.node(owner), "AAAA-AAAA")) for _ in range(31))
    assert answers == {"wrong-code": 30, "too-many-attempts": 1}
    other = client.node(client.register())
    assert problem_of(enter(client, other, "AAAA-AAAA")) == "too-many-attempts"


def test_right_codes_do_not_count(client: Client) -> None:
    """A node is bound to more users than it may guess wrong."""
    node = client.node(client.register())
    for _ in range(12):
        client.bind(node, client.register())


def test_the_user_reorders_and_unbinds(client: Client) -> None:
    """Positions are 1, 2, 3 whatever happens; an order must name each bound node once."""
    member = client.register()
    machines = [client.node(client.register()) for _ in range(3)]
    for machine in machines:
        client.bind(machine, member)
    first, second, third = (machine.node_id for machine in machines)
    assert order(client, member) == [first, second, third]

    def put(*node_ids: str):  # type: ignore[no-untyped-def]
        return client.http.put("/v1/me/nodes", json={"node_ids": node_ids}, headers=member.auth)

    assert put(third, first, second).status_code == 200
    assert order(client, member) == [third, first, second]
    for wrong in ((), (first,), (first, second, second), (first, second, third, "n-0")):
        assert problem_of(put(*wrong)) == "wrong-order"
    assert client.http.delete(f"/v1/me/nodes/{first}", headers=member.auth).status_code == 204
    assert order(client, member) == [third, second]
    gone = client.http.delete(f"/v1/node/users/{member.user_id}", headers=machines[2].auth)
    assert gone.status_code == 204
    assert order(client, member) == [second]
    assert problem_of(client.http.delete(f"/v1/me/nodes/{first}", headers=member.auth)) == "not-found"
    actions = [entry["action"] for entry in client.audit(client.operator())]
    assert (actions.count("node.unbound"), actions.count("nodes.reordered")) == (2, 1)


def test_bindings_at_once_get_positions_of_their_own(accounts: Accounts) -> None:
    """Eight nodes, one user, at once, while the user reorders what there is: positions are 1 to 8."""
    user_id, _ = users.create_operator(accounts, "ada", "ada@example.com", PASSWORD, actor=ROOT)
    person = Person(user_id, "operator", "")
    machines = [nodes.register(accounts, person, "x", f"n-{number}")[0] for number in range(8)]
    code = users.security_code(accounts, user_id)

    def bind(number: int) -> None:
        nodes.bind(accounts, NodeItself(machines[number].node_id, user_id), code, HERE)
        there = [node.node_id for node in nodes.bound_to_user(accounts, user_id)]
        try:
            nodes.reorder(accounts, person, there[::-1])
        except Refused as refused:
            assert refused.reason is Reason.WRONG_ORDER

    at_once(8, bind)
    bound = nodes.bound_to_user(accounts, user_id)
    assert [node.position for node in bound] == list(range(1, 9))
    assert {node.node_id for node in bound} == {machine.node_id for machine in machines}


def test_a_node_binds_several_users(client: Client, accounts: Accounts) -> None:
    """It has them in the order of binding; balances need Redis, which is away here."""
    node = client.node(client.register())
    members = [client.register() for _ in range(3)]
    for member in members:
        client.bind(node, member)
    bound = nodes.bound_to_node(accounts, node.node_id)
    assert {user.user_id for user in bound} == {member.user_id for member in members}
    away = client.http.get("/v1/node/users", headers=node.auth)
    assert problem_of(away) == "balances-away"
    assert away.headers["retry-after"]


@pytest.mark.parametrize("limit", [3])
def test_a_user_owns_so_many_nodes(client: Client, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more."""
    monkeypatch.setattr(nodes, "MAX_NODES_OF_OWNER", limit)
    owner = client.register()
    for _ in range(limit):
        client.node(owner)
    refused = client.http.post("/v1/nodes", json={"name": "x"}, headers=owner.auth)
    assert problem_of(refused) == "too-many"
