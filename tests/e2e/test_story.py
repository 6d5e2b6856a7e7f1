"""A new user's story: registers, is topped up, talks until the floor, is refused, and is written off by a node."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from confluent_kafka import Consumer, TopicPartition

from app.plan_grants import issue_plans
from clients.scheduler import Hold, Reason, Scheduler
from schemas.rfc3339 import format_rfc3339_ms
from schemas.topics import ALERTS
from sources.kafka import consumer_settings
from telemetry.quiet import KAFKA_LOGGER
from tests.support.commands import metering
from tests.support.processes import wait_until
from tests.support.world import World

PASSWORD = "correct horse battery staple"
MINUTE_US = 60_000_000
FLOOR_US = -300 * MINUTE_US


class Api:
    """The accounts API, as somebody who is logged in."""

    def __init__(self, url: str, token: str = "") -> None:
        self._http = httpx.Client(
            base_url=f"{url}/v1", headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=30
        )

    def get(self, path: str) -> Any:
        return self._answer(self._http.get(path))

    def post(self, path: str, body: dict[str, Any], key: str = "") -> Any:
        return self._answer(self.raw(path, body, key))

    def raw(self, path: str, body: dict[str, Any], key: str = "") -> httpx.Response:
        """The answer as it comes."""
        return self._http.post(path, json=body, headers={"Idempotency-Key": key} if key else {})

    @staticmethod
    def _answer(answer: httpx.Response) -> Any:
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None


class Story:
    """Who is in it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.url = world.accounts_url
        self.user = self._log_in("zoe")
        self.user_id = self.user.get("/me")["user_id"]
        self.account = f"user/{self.user_id}"
        made = metering(
            "accounts", "create-operator", "root", "root@example.com", "--password-stdin",
            environment=self.world.environment, stdin=PASSWORD.encode() + b"\n",
        )  # fmt: skip
        assert made.returncode == 0, made.stderr.decode()
        self.operator = self._log_in("root", register=False)
        owner = self._log_in("owner")
        node = owner.post("/nodes", {"name": "a node of the owner's"})
        self.node_id = node["node_id"]
        credentials = {name: node[name] for name in ("client_id", "client_secret")}
        self.node = Api(self.url, Api(self.url).post("/nodes/token", credentials)["access_token"])
        self._utterances = 0

    def _log_in(self, name: str, *, register: bool = True) -> Api:
        if register:
            person = {"username": name, "email": f"{name}@example.com", "password": PASSWORD}
            Api(self.url).post("/register", person)
        tokens = Api(self.url).post("/login", {"login": name, "password": PASSWORD})
        return Api(self.url, tokens["access_token"])

    def talk(self, path: Path, minutes: int, node_id: str, session: str = "s-story") -> None:
        """Utterances worth so many minutes, half an hour of processing each at most."""
        now_ms = time.time_ns() // 1_000_000
        lines = []
        while minutes:
            some = min(minutes, 30)
            minutes -= some
            self._utterances += 1
            data = {
                "session_id": session, "user_id": self.user_id, "node_id": node_id,
                "utterance_id": f"story-{self._utterances}", "asr_time_ms": some * 60_000,
                "nmt_time_ms": 0, "tts_time_ms": 0, "gpu_active_time_ms": some * 60_000,
            }  # fmt: skip
            event = {
                "specversion": "1.0", "id": f"story-{self._utterances}", "source": f"node/{node_id}",
                "type": "lingua.usage.utterance.v1", "time": format_rfc3339_ms(now_ms), "data": data,
            }  # fmt: skip
            lines.append(json.dumps(event).encode())
        path.write_bytes(b"\n".join(lines) + b"\n")
        self.world.emit(path)

    def balance_us(self) -> int:
        return int(self.user.get("/me/balance")["balance_us"])

    def alerts(self) -> list[str]:
        """The thresholds that the user fell past, as the scheduler hears of them."""
        consumer = Consumer(consumer_settings(self.world.settings.kafka), logger=KAFKA_LOGGER)
        try:
            partitions = consumer.list_topics(ALERTS, timeout=20).topics[ALERTS].partitions
            consumer.assign([TopicPartition(ALERTS, number, 0) for number in partitions])
            found: dict[str, tuple[int, str]] = {}
            quiet = 0
            while quiet < 3:
                messages = [message for message in consumer.consume(100, timeout=0.3) if not message.error()]
                quiet = 0 if messages else quiet + 1
                for message in messages:
                    event = json.loads(message.value() or b"")
                    if event["data"]["account"] == self.account:
                        found[event["id"]] = (event["data"]["seq"], event["data"]["threshold"])
            order = ["low", "zero", "floor"]
            return [name for _, name in sorted(found.values(), key=lambda f: (f[0], order.index(f[1])))]
        finally:
            consumer.close()


@pytest.fixture(scope="module")
def story(world: World) -> Iterator[Story]:
    """A user, an operator and a node, just registered."""
    yield Story(world)


def test_from_register_to_refused_at_the_floor_to_written_off(story: Story, tmp_path: Path) -> None:
    """Each step as its user takes it: over HTTP, Kafka, Redis and the command line."""
    story.node.post("/node/users", {"security_code": story.user.get("/me/security-code")["security_code"]})
    assert [each["node_id"] for each in story.user.get("/me/nodes")["items"]] == [story.node_id]

    top_up = f"/accounts/user/{story.user_id}/top-ups"
    answer = story.operator.post(top_up, {"minutes": "30", "reason": "welcome"}, "story-welcome")
    assert (answer["status"], answer["balance_us"]) == ("applied", 30 * MINUTE_US)
    again = story.operator.post(top_up, {"minutes": "30", "reason": "welcome"}, "story-welcome")
    assert again == answer
    assert story.balance_us() == 30 * MINUTE_US

    with Scheduler(story.world.settings.redis) as scheduler:
        hold = Hold.of_minutes(10, lasts_s=900)
        assert scheduler.admit(story.user_id, "s-story", hold)
        assert scheduler.release(story.user_id, "s-story")
        # A user who never stops, on a node that nobody bound.
        story.talk(tmp_path / "first", 25, "n-other")
        wait_until(lambda: story.balance_us() == 5 * MINUTE_US, "the first charge", 60)
        for number, minutes in enumerate((10, 200, 95, 10)):
            story.talk(tmp_path / f"more-{number}", minutes, "n-other")
        wait_until(lambda: story.balance_us() == -310 * MINUTE_US, "the last charge", 60)
        refused = scheduler.admit(story.user_id, "s-next", hold)
        assert not refused and refused.reason is Reason.AT_FLOOR
        wait_until(lambda: len(story.alerts()) >= 3, "alerts", 60)
        assert story.alerts() == ["low", "zero", "floor"]

        # The bound node has earned 100 minutes, from somebody else's session.
        story.operator.post(
            f"/accounts/node/{story.node_id}/top-ups", {"minutes": "100", "reason": "earned"}, "story-earned"
        )
        done = metering("write-off", "--json", environment=story.world.environment)
        assert done.returncode == 0, done.stderr.decode()
        assert json.loads(done.stdout)["moved_us"] == 100 * MINUTE_US
        assert story.balance_us() == -210 * MINUTE_US
        assert int(story.node.get("/node/balance")["balance_us"]) == 0
        assert scheduler.admit(story.user_id, "s-next", hold)

    audit = story.operator.get("/audit?action=debt.written_off")["items"]
    assert [(each["target"], each["payload"]["moved_us"]) for each in audit] == [
        (story.account, 100 * MINUTE_US)
    ]
    wait_until(lambda: len(story.user.get("/me/statement")["items"]) >= 7, "the whole statement", 60)
    statement = story.user.get("/me/statement")["items"]
    assert statement[0]["reason"] == "write_off"
    assert statement[-1]["reason"] == "top_up" and statement[-1]["request_id"] == "story-welcome"
    assert sum(int(line["change_us"]) for line in statement) == -210 * MINUTE_US
    explained = story.world.run("explain", f"{story.account}#2")
    assert b"story-1" in explained.stdout


def test_a_node_gives_from_its_credit_and_never_more(story: Story) -> None:
    """Five gifts at once from a credit for two: two arrive, three are refused and move nothing."""
    bound = story.node.get("/node/users")["items"]
    if not bound:
        code = story.user.get("/me/security-code")["security_code"]
        story.node.post("/node/users", {"security_code": code})
    before_us = story.balance_us()
    credit_us = int(story.node.get("/node/balance")["balance_us"])
    story.operator.post(
        f"/accounts/node/{story.node_id}/top-ups", {"minutes": "60", "reason": "earned"}, "story-gifts"
    )

    def give(number: int) -> int:
        path = f"/node/users/{story.user_id}/top-ups"
        answer = story.node.raw(path, {"minutes": "25", "reason": "thanks"}, f"gift-{number}")
        return answer.status_code

    with ThreadPoolExecutor(5) as pool:
        codes = sorted(pool.map(give, range(5)))
    assert codes == [200, 200, 409, 409, 409]
    assert story.balance_us() == before_us + 50 * MINUTE_US
    assert int(story.node.get("/node/balance")["balance_us"]) == credit_us + 10 * MINUTE_US


def test_a_subscriber_gets_the_minutes_of_a_period_once(story: Story, tmp_path: Path) -> None:
    """They are spent before the rest of the balance; a ledger line tells how much of a charge they paid."""
    plans = tmp_path / "plans.json"
    plan = {"name": "basic", "included_minutes": "100", "period": "month", "priority": 1}
    plans.write_text(json.dumps({"plans": [plan]}))
    environment = story.world.environment | {"METERING_PLANS": str(plans)}
    unknown = metering("accounts", "subscribe", story.user_id, "gold", environment=environment)
    assert unknown.returncode == 2 and b"there is no plan 'gold'" in unknown.stderr
    done = metering("accounts", "subscribe", story.user_id, "basic", environment=environment)
    assert done.returncode == 0, done.stderr.decode()
    settings = story.world.settings.model_copy(
        update={"plans": plans, "accounts_database": f"sqlite:///{story.world.directory}/accounts.db"}
    )
    before_us = story.balance_us()
    assert issue_plans(settings) == 1
    assert issue_plans(settings) == 0
    wait_until(lambda: story.balance_us() == before_us + 100 * MINUTE_US, "the included minutes", 60)
    story.talk(tmp_path / "talk", 40, "n-other", session="s-included")
    wait_until(lambda: story.balance_us() == before_us + 60 * MINUTE_US, "the charge", 60)
    query = f"SELECT left_us FROM {{database}}.grants_left WHERE account = '{story.account}'"
    wait_until(lambda: story.world.query(query) == [(60 * MINUTE_US,)], "what is left", 60)
    last = max(int(line["ledger_id"].rpartition("/")[2]) for line in story.user.get("/me/statement")["items"])
    assert b"grant plan:basic:" in story.world.run("explain", f"{story.account}#{last}").stdout
