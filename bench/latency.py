"""From sending an event to its charge on the balance, with everything running at a steady load.

Among the load are probes: events of users whom nobody else is. A probe's time runs from the call that hands it
to the producer to the first read of Redis that shows its charge, so the producer's own buffering, the broker,
the flow, the fsync and up to one reading interval are all in it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from statistics import quantiles

import redis
from confluent_kafka import Producer

from app.workload import WorkloadSpec, generate
from schemas import redis_keys
from schemas.decode import decode_event
from schemas.topics import EVENTS

PROBES_PER_S = 20
READ_EVERY_S = 0.002
GIVE_UP_S = 30.0


@dataclass(frozen=True)
class Latency:
    """Milliseconds from send to balance."""

    events: int
    events_per_s: float
    probes: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


def _probe(number: int, time_text: str) -> tuple[str, bytes]:
    user = f"probe-{number}"
    value = (
        f'{{"specversion":"1.0","id":"probe-{number}","source":"node/bench","type":"lingua.usage.utterance.v1",'
        f'"time":"{time_text}","data":{{"session_id":"{user}","user_id":"{user}","node_id":"bench",'
        f'"utterance_id":"{user}","asr_time_ms":10,"nmt_time_ms":10,"tts_time_ms":10,"gpu_active_time_ms":20}}}}'
    )
    return f"user/{user}", value.encode()


def measure(kafka: str, redis_url: str, rate: int, seconds: int) -> Latency:
    """Send `rate` events a second for `seconds`, probes included, and watch the probes' balances."""
    start_ms = int(time.time() * 1000) - 10 * 60_000
    load = list(generate(WorkloadSpec(seed=2, events=rate * seconds, start_ms=start_ms, minutes=10)))
    keys = [decode_event(line).scope.encode() for line in load]
    sent: dict[str, float] = {}
    seen: dict[str, float] = {}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(redis_url, sent, seen, done), daemon=True)
    watcher.start()
    settings = {"bootstrap.servers": kafka, "partitioner": "murmur2_random", "linger.ms": 5, "acks": "all"}
    producer = Producer({**settings, "enable.idempotence": True})
    every = rate // PROBES_PER_S
    started = time.perf_counter()
    for number, (key, line) in enumerate(zip(keys, load, strict=True)):
        ahead_s = started + number / rate - time.perf_counter()
        if ahead_s > 0.001:
            producer.poll(0)
            time.sleep(ahead_s)
        if number % every == 0:
            account, value = _probe(number, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            sent[account] = time.perf_counter()
            producer.produce(EVENTS, key=f"session/probe-{number}".encode(), value=value)
        else:
            producer.produce(EVENTS, key=key, value=line)
    elapsed_s = time.perf_counter() - started
    producer.flush()
    give_up_at = time.perf_counter() + GIVE_UP_S
    while len(seen) < len(sent) and time.perf_counter() < give_up_at:
        time.sleep(0.05)
    done.set()
    watcher.join()
    if len(seen) < len(sent):
        raise RuntimeError(f"{len(sent) - len(seen)} of {len(sent)} probes were never charged")
    # The first second is the producer's and the caches' start.
    steady = [seen[account] - at for account, at in sent.items() if at > started + 1]
    cuts = quantiles((second * 1000 for second in steady), n=100)
    return Latency(
        len(load), len(load) / elapsed_s, len(steady), cuts[49], cuts[89], cuts[98], max(steady) * 1000
    )


def _watch(redis_url: str, sent: dict[str, float], seen: dict[str, float], done: threading.Event) -> None:
    client = redis.Redis.from_url(redis_url)
    while not done.is_set():
        waiting = [account for account in list(sent) if account not in seen]
        if waiting:
            pipeline = client.pipeline(transaction=False)
            for account in waiting:
                pipeline.hget(redis_keys.balance(account), "balance_us")
            found = pipeline.execute()
            now = time.perf_counter()
            seen.update({account: now for account, value in zip(waiting, found, strict=True) if value})
        time.sleep(READ_EVERY_S)
