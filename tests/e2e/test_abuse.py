"""Whoever floods the topic, with junk or with one hot room, spoils it for nobody else.

Times are printed, as ratios within the same run; what is asserted is who was charged what.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import quantiles

import pytest
import redis
from confluent_kafka import Producer

from app.clients import redis_client
from app.workload import WorkloadSpec, generate
from app.workload.wire import encode_event
from metering.cells import WINDOW_MS, window_start_ms
from metering.settle import settle_lines
from schemas import redis_keys
from schemas.decode import decode_event, fast_decode_event
from schemas.events import LifecycleKind
from schemas.rate_card import load_rate_card
from schemas.topics import EVENTS
from tests.support.events import membership, usage
from tests.support.flow_processes import flow_process, recovering_flow, world_of_servers
from tests.support.junk import worst_junk
from tests.support.processes import wait_until
from tests.support.world import World

CARD = load_rate_card(None)
JUNK_SHARE = 0.9


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Servers of the test's own and the three flows, without the repairs on their timers."""
    with world_of_servers(tmp_path) as made, ExitStack() as flows:
        flows.enter_context(flow_process(made, "ledger"))
        flows.enter_context(recovering_flow(made, "usage_store"))
        flows.enter_context(recovering_flow(made, "settlement"))
        yield made


def producer_to(world: World) -> Producer:
    return Producer(
        {
            "bootstrap.servers": world.addresses["kafka"],
            "partitioner": "murmur2_random",
            "linger.ms": 5,
            "enable.idempotence": True,
            "queue.buffering.max.kbytes": 1 << 20,
        }
    )


def user_charges(lines: Sequence[bytes]) -> dict[str, int]:
    """What every user must have, by the pure function."""
    charges: dict[str, int] = {}
    for line in settle_lines(lines, CARD)[0]:
        if line.account.startswith("user/"):
            charges[line.account] = charges.get(line.account, 0) + line.amount_us
    return charges


def charged(client: redis.Redis, charges: dict[str, int]) -> bool:
    """Whether every one of these accounts stands where it must."""
    pipeline = client.pipeline(transaction=False)
    for account in charges:
        pipeline.hget(redis_keys.balance(account), "balance_us")
    return [int(found or 0) for found in pipeline.execute()] == list(charges.values())


# A flood of junk -------------------------------------------------------------------------------------------


def good_events(prefix: str, start_ms: int) -> list[bytes]:
    """The same workload each time, of other users, rooms and sessions."""
    lines = []
    for line in generate(WorkloadSpec(seed=51, events=400, start_ms=start_ms, minutes=5)):
        event = json.loads(line)
        for field in ("session_id", "room_id", "user_id"):
            if field in event["data"]:
                event["data"][field] = prefix + event["data"][field]
        lines.append(json.dumps(event).encode())
    return lines


def seconds_to_charge(world: World, messages: Sequence[bytes], charges: dict[str, int]) -> float:
    """Sent at once, until the last of these users has been charged for the last event."""
    client, producer = redis_client(world.settings), producer_to(world)
    start = time.perf_counter()
    for message in messages:
        # Whoever sends junk chooses keys that spread it: every partition and every worker gets its share.
        event = fast_decode_event(message)
        key = None if event is None else event.scope.encode()
        producer.produce(EVENTS, key=key, value=message)
    assert producer.flush(60) == 0
    wait_until(lambda: charged(client, charges), "all good events are charged", 120)
    return time.perf_counter() - start


def test_a_flood_of_junk_delays_the_good_and_loses_nothing(world: World) -> None:
    """Nine of ten messages are junk of the dearest kinds, many as large as a message may be: all good events are
    settled, and every piece of junk lies in the dead letters with its bytes."""
    chance = random.Random(52)
    start_ms = window_start_ms(time.time_ns() // 1_000_000) - 8 * WINDOW_MS
    without, among = good_events("calm-", start_ms), good_events("flood-", start_ms)
    count = round(len(among) * JUNK_SHARE / (1 - JUNK_SHARE))
    kinds = [*worst_junk(8_192).values()] * 8 + [*worst_junk(65_536).values()]
    junk = [chance.choice(kinds) for _ in range(count)]
    mixed = [*junk]
    for at, line in zip(sorted(chance.sample(range(len(junk) + len(among)), len(among))), among, strict=True):
        mixed.insert(at, line)
    calm_s = seconds_to_charge(world, without, user_charges(without))
    flood_s = seconds_to_charge(world, mixed, user_charges(among))
    octets = sum(map(len, junk))
    print(
        f"\n{len(among)} good events among {count} pieces of junk ({octets / 2**20:.0f} MiB, "
        f"{octets / sum(map(len, among)):.0f} times their bytes) took {flood_s / calm_s:.1f} times as long as "
        f"alone ({octets / 2**20 / flood_s:.1f} MiB/s)"
    )
    world.messages += without + mixed
    assert world.disagreements(90) == []
    wait_until(lambda: dead_letters(world) == (count, octets), "the dead letters are complete", 120)


def dead_letters(world: World) -> tuple[int, int]:
    """How many there are, and how many bytes they hold."""
    sql = "SELECT count(), sum(length(value)) FROM {database}.dead_letters FINAL"
    [(count, octets)] = world.query(sql)
    return int(str(count)), int(str(octets or 0))


# One hot room ----------------------------------------------------------------------------------------------

MEMBERS = 500
HOT_EVENTS_PER_S = 500
SESSIONS = 100
SECONDS = 20
PROBES_PER_S = 10


def hot_room(start_ms: int) -> list[bytes]:
    """A room whose members all talk: first everybody joins, then the events of all seconds, in a minute or two."""
    joins = [
        membership(f"hot-join-{number}", LifecycleKind.JOINED, start_ms, room="hot", user=f"hot-{number}")
        for number in range(MEMBERS)
    ]
    talk = [
        usage(
            f"hot-{number}",
            start_ms + number * 1000 // HOT_EVENTS_PER_S,
            room="hot",
            session=f"hot-{number % MEMBERS}",
            user=f"hot-{number % MEMBERS}",
            node=f"hot-node-{number % 7}",
            asr=100 + number % 13,
        )
        for number in range(HOT_EVENTS_PER_S * SECONDS)
    ]
    return [encode_event(event) for event in joins] + [encode_event(event) for event in talk]


def latencies_ms(world: World, name: str, start_ms: int, hot: list[bytes]) -> list[float]:
    """From handing an event to the producer to its charge in Redis, for users who speak but once, at a steady pace
    among a hundred sessions; the events of the hot room go out meanwhile, evenly."""
    client, producer = redis_client(world.settings), producer_to(world)
    sent: dict[str, float] = {}
    waits: list[float] = []
    begin = time.perf_counter()
    done = hot_sent = sessions_sent = 0
    while done < PROBES_PER_S * SECONDS or sent:
        elapsed = time.perf_counter() - begin
        assert elapsed < SECONDS + 120, f"{len(sent)} users were never charged"
        while hot_sent < len(hot) * min(elapsed / SECONDS, 1):
            producer.produce(EVENTS, key=b"room/hot", value=hot[hot_sent])
            hot_sent += 1
        while sessions_sent < SESSIONS * min(elapsed, SECONDS):
            user = f"{name}-{sessions_sent % SESSIONS}"
            event = usage(f"e-{sessions_sent}", start_ms + sessions_sent, room=None, session=user, user=user)
            produce(world, producer, event.scope, encode_event(event))
            sessions_sent += 1
        if done < PROBES_PER_S * min(elapsed, SECONDS):
            user = f"{name}-probe-{done}"
            event = usage("once", start_ms + done, room=None, session=user, user=user)
            sent[user] = time.perf_counter()
            produce(world, producer, event.scope, encode_event(event))
            done += 1
        producer.poll(0)
        waits += arrived(client, sent)
        time.sleep(0.002)
    assert producer.flush(60) == 0
    world.messages += hot
    return waits


def produce(world: World, producer: Producer, scope: str, message: bytes) -> None:
    """Send and remember it."""
    producer.produce(EVENTS, key=scope.encode(), value=message)
    world.messages.append(message)


def arrived(client: redis.Redis, sent: dict[str, float]) -> list[float]:
    """How long those users have waited, in ms, who are charged now; they are taken out of `sent`."""
    pipeline = client.pipeline(transaction=False)
    users = list(sent)
    for user in users:
        pipeline.exists(redis_keys.balance(f"user/{user}"))
    found = pipeline.execute() if users else []
    now = time.perf_counter()
    return [(now - sent.pop(user)) * 1000 for user, there in zip(users, found, strict=True) if there]


def test_a_hot_room_does_not_stop_the_others(world: World) -> None:
    """500 events a second by 500 members, 500 postings at each emission: everybody else is charged as before, if a
    little later, and in the end everybody as the pure function says."""
    start_ms = window_start_ms(time.time_ns() // 1_000_000) - 4 * WINDOW_MS + 50_000
    latencies_ms(world, "warm-up", start_ms, [])
    alone = latencies_ms(world, "alone", start_ms, [])
    beside = latencies_ms(world, "beside", start_ms, hot_room(start_ms))
    for share, name in ((49, "p50"), (98, "p99")):
        before, now = (quantiles(waits, n=100)[share] for waits in (alone, beside))
        print(
            f"\n{name}: {now / before:.2f} times as long beside the hot room ({before:.0f} ms -> {now:.0f} ms)"
        )
    assert world.disagreements(120) == []
    hot = {event.user_id for event in map(decode_event, world.messages) if event.scope == "room/hot"}
    assert len(hot) == MEMBERS
