"""Money requests through the real pipeline: once each, whatever is repeated, away or slow."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import redis
from confluent_kafka import Consumer, TopicPartition
from httpx import Response

from accounts.gateway import Archive, Balances, Commands, Gateway
from accounts.money import Asked
from app.clients import ServerAway
from metering.commands import command_digest
from schemas import redis_keys, topics
from schemas.commands import CommandKind
from schemas.decode import decode_command
from sinks.kafka import producer_settings
from tests.accounts.support import Client, Machine, Member, at_once, problem_of
from tests.support.processes import wait_until
from tests.support.world import World

MakeClient = Callable[..., Client]


def key() -> str:
    return str(uuid.uuid4())


def top_up(
    client: Client, operator: Member, account: str, minutes: str, request: str, **body: Any
) -> Response:
    return client.http.post(
        f"/v1/accounts/{account}/top-ups",
        json={"minutes": minutes, **body},
        headers=operator.auth | {"Idempotency-Key": request},
    )


def balance(client: Client, member: Member) -> str:
    done = client.http.get("/v1/me/balance", headers=member.auth)
    assert done.status_code == 200, done.text
    return str(done.json()["balance"])


def statement(client: Client, who: Member | Machine, count: int, path: str = "/v1/me/statement") -> list[Any]:
    """The lines, as soon as there are so many; read in pages of two."""
    lines: list[Any] = []

    def read() -> bool:
        lines.clear()
        cursor = None
        while True:
            params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
            done = client.http.get(path, params=params, headers=who.auth)
            assert done.status_code == 200, done.text
            lines.extend(done.json()["items"])
            cursor = done.json()["next_cursor"]
            if cursor is None:
                return len(lines) >= count

    wait_until(read, f"{count} lines in the ledger", 60)
    return lines


def test_a_top_up(client: Client) -> None:
    """Answered with its result; live at once; in the statement with its id; audited; repeated without effect."""
    member, operator = client.register(), client.operator()
    request = key()
    done = top_up(client, operator, f"user/{member.user_id}", "29.5", request, reason="paid")
    assert done.status_code == 200, done.text
    answer = done.json()
    assert (answer["status"], answer["amount"], answer["balance"]) == ("applied", "29.5", "29.5")
    assert (answer["amount_us"], answer["request_id"]) == (1_770_000_000, request)
    again = top_up(client, operator, f"user/{member.user_id}", "29.50", request, reason="paid")
    assert (again.status_code, again.json()) == (200, answer)
    assert balance(client, member) == "29.5"
    asked = client.http.get(f"/v1/requests/{request}", headers=operator.auth)
    assert (asked.status_code, asked.json()) == (200, answer)
    [line] = statement(client, member, 1)
    assert line["ledger_id"] == f"user/{member.user_id}/1"
    assert (line["user_id"], line["session_id"], line["reason"]) == (member.user_id, None, "top_up")
    assert (line["change_minutes"], line["balance_before"], line["balance_after"]) == ("29.5", "0", "29.5")
    assert (line["request_id"], line["cell_id"], line["note"]) == (request, None, "paid")
    [entry] = client.audit(operator, action="top_up.requested")
    assert (entry["actor_type"], entry["actor_id"], entry["request_id"]) == (
        "operator",
        operator.user_id,
        request,
    )
    assert entry["target"] == f"user/{member.user_id}"
    assert entry["payload"] == {"amount_us": 1_770_000_000, "node_account": None, "reason": "paid"}


def test_the_same_id_with_another_body_is_a_conflict(client: Client) -> None:
    """Another amount, reason, account or operator; nothing of it moves."""
    member, other, operator = client.register(), client.register(), client.operator()
    request, account = key(), f"user/{member.user_id}"
    assert top_up(client, operator, account, "1", request).status_code == 200
    for refused in (
        top_up(client, operator, account, "2", request),
        top_up(client, operator, account, "1", request, reason="other words"),
        top_up(client, operator, f"user/{other.user_id}", "1", request),
        top_up(client, client.operator(), account, "1", request),
    ):
        assert problem_of(refused) == "request-conflict"
    assert (balance(client, member), balance(client, other)) == ("1", "0")
    assert len(client.audit(operator, action="top_up.requested")) == 1


def test_an_id_that_was_used_elsewhere_is_a_conflict(client: Client, world: World) -> None:
    """The command line used it; the flow refuses the second body, and the caller is told."""
    member, operator = client.register(), client.operator()
    request, account = key(), f"user/{member.user_id}"
    world.run("topup", account, "5", "--request-id", request)
    assert problem_of(top_up(client, operator, account, "1", request)) == "request-conflict"
    assert balance(client, member) == "5"
    asked = client.http.get(f"/v1/requests/{request}", headers=operator.auth).json()
    assert asked["status"] == "conflict"


def test_many_at_once_with_one_id_move_once(client: Client) -> None:
    """Each is answered with the one result."""
    member, operator = client.register(), client.operator()
    request = key()
    answers = at_once(8, lambda _: top_up(client, operator, f"user/{member.user_id}", "3", request))
    assert {(done.status_code, done.text) for done in answers} == {(200, answers[0].text)}
    assert balance(client, member) == "3"
    assert len(client.audit(operator, action="top_up.requested")) == 1


def test_adjustments_go_both_ways(client: Client) -> None:
    """Below zero too, to the last place; zero is none."""
    member, operator = client.register(), client.operator()

    def adjust(minutes: str) -> Response:
        return client.http.post(
            f"/v1/accounts/user/{member.user_id}/adjustments",
            json={"minutes": minutes, "reason": "correction"},
            headers=operator.auth | {"Idempotency-Key": key()},
        )

    assert adjust("-2.5").json()["balance"] == "-2.5"
    assert adjust("0.0000001").json()["balance"] == "-2.4999999"
    assert problem_of(adjust("-0.0")) == "invalid-request"
    assert problem_of(adjust("1e3")) == "invalid-request"
    assert [line["reason"] for line in statement(client, member, 2)] == ["adjustment", "adjustment"]


def test_a_statement_is_paged_newest_first(client: Client) -> None:
    """Each line once, whatever comes in between."""
    member, operator = client.register(), client.operator()
    for minutes in range(1, 6):
        assert top_up(client, operator, f"user/{member.user_id}", str(minutes), key()).status_code == 200
    lines = statement(client, member, 5)
    assert [line["change_minutes"] for line in lines] == ["5", "4", "3", "2", "1"]
    assert all(
        later["balance_before"] == earlier["balance_after"] for later, earlier in itertools.pairwise(lines)
    )


def test_whom_nobody_knows_gets_nothing(client: Client) -> None:
    """No command is sent for an account that is not there."""
    operator = client.operator()
    for account in ("user/nobody", "node/n-0"):
        request = key()
        assert problem_of(top_up(client, operator, account, "1", request)) == "not-found"
        asked = client.http.get(f"/v1/requests/{request}", headers=operator.auth)
        assert problem_of(asked) == "not-found"


def test_a_result_that_takes_longer_is_asked_for(make_client: MakeClient) -> None:
    """202 with a URL, which tells the result when it is there; it is nobody else's business."""
    client = make_client(0.0)
    member, operator = client.register(), client.operator()
    request = key()
    done = top_up(client, operator, f"user/{member.user_id}", "1", request)
    # With no time to wait the result is seldom there.
    if done.status_code == 202:
        assert done.json()["status"] == "pending"
        assert done.headers["location"] == f"/v1/requests/{request}"
    path = f"/v1/requests/{request}"
    wait_until(
        lambda: client.http.get(path, headers=operator.auth).json()["status"] == "applied", "the result", 60
    )
    assert problem_of(client.http.get(path, headers=member.auth)) == "not-found"


def test_old_results_are_in_the_archive(client: Client, gateway: Gateway, live: redis.Redis) -> None:
    """Redis has forgotten it; the status and a repeat are answered from ClickHouse, and nothing is sent."""
    member, operator = client.register(), client.operator()
    request, account = key(), f"user/{member.user_id}"
    first = top_up(client, operator, account, "7", request)
    # Its row is not stored in one step with the ledger's lines.
    wait_until(lambda: gateway.archive.result(request) is not None, "the result is archived", 60)
    live.delete(redis_keys.request(request))
    assert client.http.get(f"/v1/requests/{request}", headers=operator.auth).json() == first.json()
    assert top_up(client, operator, account, "7", request).json() == first.json()
    assert problem_of(top_up(client, operator, account, "8", request)) == "request-conflict"
    assert live.exists(redis_keys.request(request)) == 0
    assert balance(client, member) == "7"


def test_usage_per_session_and_room(client: Client, world: World) -> None:
    """The user's share and the total, the latest first, paged; other people's usage is not in it."""
    from app.clients import clickhouse_client
    from sinks.clickhouse import ClickHouseJournal
    from tests.support.archive import NOON_MS, ledger_line

    member, other = client.register(), client.register()
    lines = []
    for seq, (name, minute, share) in enumerate(
        [
            ("session/s-1", 0, 60_000_000),
            ("session/s-2", 2, 30_000_000),
            ("session/s-2", 3, 1),
            ("room/r-1", 1, 90),
        ],
        1,
    ):
        kind, _, scope_id = f"{name}-{member.user_id}".partition("/")
        scope = f"{kind}/{scope_id}"
        for user, change_us in ((member, -share), (other, -5)):
            lines.append(
                ledger_line(
                    f"user/{user.user_id}",
                    seq,
                    change_us,
                    scope=scope,
                    cell_id=f"{scope}@{NOON_MS + minute * 60_000}",
                    **{f"{kind}_id": scope_id},
                )
            )
    ClickHouseJournal(clickhouse_client(world.settings), world.settings.clickhouse_database).insert_lines(
        lines
    )

    def usage(by: str, **params: Any) -> Any:
        done = client.http.get("/v1/me/usage", params={"by": by, **params}, headers=member.auth)
        assert done.status_code == 200, done.text
        return done.json()

    first = usage("session", limit=1)
    rest = usage("session", limit=1, cursor=first["next_cursor"])
    assert [item["id"][:3] for item in first["items"] + rest["items"]] == ["s-2", "s-1"]
    item = first["items"][0]
    assert (item["charged_us"], item["total_us"], item["active_minutes"]) == (30_000_001, 30_000_011, 2)
    assert (item["charged_minutes"], item["settled"]) == ("0.500000017", False)
    assert usage("session", limit=1, cursor=rest["next_cursor"]) == {"items": [], "next_cursor": None}
    [room] = usage("room")["items"]
    assert (room["charged_us"], room["total_us"]) == (90, 95)


def test_balances_of_a_redis_without_an_epoch_are_not_believed(
    make_client: MakeClient, gateway: Gateway, live: redis.Redis
) -> None:
    """It is being rebuilt: 503 rather than a balance of nothing; a top-up is taken and answered later."""
    client = make_client(0.2)
    member, operator = client.register(), client.operator()
    account, request = f"user/{member.user_id}", key()
    assert top_up(client, operator, account, "4", request).status_code in (200, 202)
    wait_until(lambda: balance(client, member) == "4", "the first top-up", 60)
    live.hset(redis_keys.balance(account), mapping={"held_us": 60_000_000, "floor_us": -1})
    shown = client.http.get("/v1/me/balance", headers=member.auth).json()
    assert (shown["balance"], shown["held"], shown["floor"], shown["floor_us"]) == (
        "4",
        "1",
        "-0.000000017",
        -1,
    )
    # Another database of the same server: nobody has set an epoch there, and no flow is disturbed.
    at = live.get_connection_kwargs()
    empty = redis.Redis(at["host"], at["port"], db=9)
    assert empty.get(redis_keys.EPOCH) is None
    other = make_client(0.2, replace(gateway, balances=Balances(empty)))
    away = other.http.get("/v1/me/balance", headers=member.auth)
    assert (away.status_code, problem_of(away)) == (503, "balances-away")
    assert "restored" in away.json()["detail"]
    assert other.http.get("/readyz").json()["balances"] == "away"
    empty.close()
    assert balance(client, member) == "4"


def test_a_broker_that_is_away_is_said_and_the_repeat_counts_once(
    make_client: MakeClient, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is noted and not sent; the same request with a broker that is there carries it out."""
    monkeypatch.setattr("accounts.gateway.DELIVERY_TIMEOUT_S", 0.5)
    cut_off = make_client(1.0, replace(gateway, commands=Commands({"bootstrap.servers": "127.0.0.1:1"})))
    whole = make_client()
    member, operator = cut_off.register(), cut_off.operator()
    request, account = key(), f"user/{member.user_id}"
    refused = top_up(cut_off, operator, account, "6", request)
    assert (refused.status_code, problem_of(refused)) == (503, "commands-away")
    assert "same Idempotency-Key" in refused.json()["detail"]
    asked = cut_off.http.get(f"/v1/requests/{request}", headers=operator.auth).json()
    assert asked["status"] == "pending"
    assert top_up(whole, operator, account, "6", request).json()["balance"] == "6"
    assert len(whole.audit(operator, action="top_up.requested")) == 1


def test_redis_and_clickhouse_away_do_not_stop_a_top_up(make_client: MakeClient, gateway: Gateway) -> None:
    """It is sent, and the answer is 202: the result can be asked for later."""

    def away() -> Any:
        raise ServerAway("no ClickHouse here")

    blind = Gateway(Balances(redis.Redis(port=1)), Archive(away, "lingua"), gateway.commands)
    client, seeing = make_client(0.1, blind), make_client()
    member, operator = client.register(), client.operator()
    request, account = key(), f"user/{member.user_id}"
    for _ in range(2):
        assert top_up(client, operator, account, "8", request).status_code == 202
    assert client.http.get(f"/v1/requests/{request}", headers=operator.auth).status_code == 503
    assert top_up(seeing, operator, account, "8", request).json()["balance"] == "8"


@pytest.fixture
def quiet(world: World, gateway: Gateway, make_client: MakeClient) -> tuple[Client, str]:
    """An API whose commands nobody carries out, and the topic that they go to."""
    from confluent_kafka.admin import AdminClient, NewTopic

    topic = f"test.{uuid.uuid4().hex[:12]}"
    admin = AdminClient({"bootstrap.servers": world.settings.kafka})
    for made in admin.create_topics([NewTopic(topic, 1, 1)]).values():
        made.result()
    commands = Commands(producer_settings(world.settings.kafka), topic)
    return make_client(0.1, replace(gateway, commands=commands)), topic


def messages(world: World, topic: str, count: int) -> list[tuple[bytes, bytes]]:
    """The key and value of the first messages of a topic of one partition."""
    consumer = Consumer(
        {"bootstrap.servers": world.settings.kafka, "group.id": "tests", "enable.auto.commit": False}
    )
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[tuple[bytes, bytes]] = []

    def read() -> bool:
        message = consumer.poll(1.0)
        if message is not None and message.error() is None:
            found.append((message.key(), message.value()))  # type: ignore[arg-type]
        return len(found) >= count

    wait_until(read, f"{count} messages", 60)
    consumer.close()
    return found


@pytest.mark.parametrize(
    ("outcome", "status", "kind"),
    [
        ("APPLIED", 200, ""),
        ("INSUFFICIENT", 409, "insufficient-credit"),
        ("OVER_LIMIT", 422, "over-limit"),
    ],
)
def test_a_node_tops_up_a_bound_user_from_its_credit(
    quiet: tuple[Client, str], world: World, live: redis.Redis, outcome: str, status: int, kind: str
) -> None:
    """The command names the node that pays, under an id of the node's own; its outcome is told, again and again."""
    client, topic = quiet
    member = client.register()
    node = client.node(client.register())
    request = "weekly"

    def give(minutes: str = "2") -> Response:
        return client.http.post(
            f"/v1/node/users/{member.user_id}/top-ups",
            json={"minutes": minutes, "reason": "thanks"},
            headers=node.auth | {"Idempotency-Key": request},
        )

    assert problem_of(give()) == "not-found"
    client.bind(node, member)
    assert give().status_code == 202
    [(message_key, value)] = messages(world, topic, 1)
    data = msgspec.json.decode(value)["data"]
    full_id = f"node:{node.node_id}:weekly"
    assert message_key == f"user/{member.user_id}".encode()
    assert data == {
        "account": f"user/{member.user_id}",
        "amount_us": 120_000_000,
        "request_id": full_id,
        "reason": "thanks",
        "actor": f"node/{node.node_id}",
        "paid_by": f"node/{node.node_id}",
    }
    assert decode_command(value).node_account == f"node/{node.node_id}"
    asked = Asked(
        CommandKind.TOP_UP,
        data["account"],
        120_000_000,
        full_id,
        "thanks",
        data["actor"],
        data["paid_by"],
    )
    moved = 120_000_000 if outcome == "APPLIED" else 0
    live.hset(
        redis_keys.request(full_id),
        mapping={
            "digest": asked.digest,
            "outcome": outcome,
            "amount_us": moved,
            "balance_us": moved,
            "at_ms": 1,
        },
    )
    for _ in range(2):
        done = give()
        assert done.status_code == status, done.text
        if kind:
            assert (problem_of(done), done.json()["request_id"]) == (kind, full_id)
        else:
            assert (done.json()["amount"], done.json()["request_id"]) == ("2", full_id)
    shown = client.http.get(f"/v1/requests/{full_id}", headers=node.auth).json()
    assert shown["status"] == outcome.lower()
    assert problem_of(give("3")) == "request-conflict"


def test_a_node_cannot_use_up_the_ids_of_others(quiet: tuple[Client, str], world: World) -> None:
    """Its key is not the id of an operator's request with the same one."""
    client, topic = quiet
    member, operator = client.register(), client.operator()
    node = client.node(client.register())
    client.bind(node, member)
    headers = node.auth | {"Idempotency-Key": "taken"}
    path = f"/v1/node/users/{member.user_id}/top-ups"
    assert client.http.post(path, json={"minutes": "1"}, headers=headers).status_code == 202
    assert top_up(client, operator, f"user/{member.user_id}", "1", "taken").status_code == 202
    ids = {msgspec.json.decode(value)["data"]["request_id"] for _, value in messages(world, topic, 2)}
    assert ids == {f"node:{node.node_id}:taken", "taken"}


def test_the_digest_is_the_flows(world: World) -> None:
    """What is compared with the result is what the flow computes of the message."""
    asked = Asked(CommandKind.ADJUSTMENT, "user/u", -5, "r", "why 李", "operator/o")
    assert command_digest(decode_command(asked.message(0))) == asked.digest
    assert topics.COMMANDS == "lingua.commands"


def test_a_node_sees_its_users_and_its_credit(client: Client) -> None:
    """Live balances of the bound users; the credit and its statement."""
    member, operator = client.register(), client.operator()
    node = client.node(client.register())
    client.bind(node, member)
    assert top_up(client, operator, f"user/{member.user_id}", "1.5", key()).status_code == 200
    assert top_up(client, operator, f"node/{node.node_id}", "10", key()).status_code == 200
    [shown] = client.http.get("/v1/node/users", headers=node.auth).json()["items"]
    assert (shown["user_id"], shown["balance"]["balance"]) == (member.user_id, "1.5")
    assert client.http.get("/v1/node/balance", headers=node.auth).json()["balance"] == "10"
    [line] = statement(client, node, 1, "/v1/node/statement")
    assert (line["node_id"], line["user_id"], line["change_minutes"]) == (node.node_id, None, "10")
