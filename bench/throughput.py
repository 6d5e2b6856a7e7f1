"""How fast the settlement flow works off a backlog, against a bare consumer on the same topic.

Both read the same messages from the same broker, in turns. The consumer is timed from its assignment to the
last message; the flow from the moment it has its sources to the moment when every balance in Redis is what the
pure settlement says: reading, validating, settling, snapshots, and Redis with an fsync at every call.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import redis
from bytewax.recovery import init_db_dir
from confluent_kafka import Producer

from app.embedded import process
from app.migrate import create_topics
from app.workload import TransportEffects, WorkloadSpec, generate
from bench.services import Servers
from metering.settle import settle_lines
from schemas import redis_keys
from schemas.decode import decode_event
from schemas.rate_card import load_rate_card
from schemas.topics import EVENTS

PARTITIONS = 4


@dataclass(frozen=True)
class Throughput:
    """Seconds of each run, in the order in which they took turns."""

    messages: int
    cells: int
    polling_s: list[float]
    consuming_s: list[float]
    flow_s: list[float]

    def rate(self, seconds: list[float]) -> float:
        """Messages a second, by the median run."""
        return self.messages / median(seconds)

    def ratio(self, bare_s: list[float]) -> float:
        """The flow's throughput over a bare consumer's: the median over pairs that ran next to each other."""
        return median(bare / flow for bare, flow in zip(bare_s, self.flow_s, strict=True))


def measure(servers: Servers, directory: Path, events: int, runs: int, processes: int = 1) -> Throughput:
    """Fill the topic once, then let both read it `runs` times."""
    start_ms = int(time.time() * 1000) - 20 * 60_000
    effects = TransportEffects(duplicates=0.05, disorder=0.1)
    lines = list(
        generate(WorkloadSpec(seed=1, events=events, start_ms=start_ms, minutes=15, transport=effects))
    )
    settled, _ = settle_lines(lines, load_rate_card(None))
    balances: defaultdict[str, int] = defaultdict(int)
    for line in settled:
        balances[line.account] += line.amount_us
    create_topics(servers.kafka, PARTITIONS, servers.broker_append_time)
    _produce(servers.kafka, lines)
    polling_s, consuming_s, flow_s = [], [], []
    for run in range(runs):
        polling_s.append(_bare_consumer("poll", servers.kafka, len(lines)))
        consuming_s.append(_bare_consumer("consume", servers.kafka, len(lines)))
        flow_s.append(_flow(servers, directory / f"run-{run}", dict(balances), processes))
    return Throughput(len(lines), len({line.cell_id for line in settled}), polling_s, consuming_s, flow_s)


def _produce(bootstrap: str, lines: list[bytes]) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 20})
    for line in lines:
        key = decode_event(line).scope.encode()
        while True:
            try:
                producer.produce(EVENTS, key=key, value=line)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def _bare_consumer(how: str, bootstrap: str, messages: int) -> float:
    arguments = [how, bootstrap, EVENTS, str(PARTITIONS), str(messages)]
    command = [sys.executable, "-m", "bench.bare_consumer", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=300)
    return float(done.stdout)


def _flow(servers: Servers, directory: Path, balances: dict[str, int], processes: int) -> float:
    client = redis.Redis.from_url(servers.redis)
    client.flushall()
    client.set(redis_keys.EPOCH, 1)
    shutil.rmtree(directory, ignore_errors=True)
    recovery = directory / "recovery"
    recovery.mkdir(parents=True)
    init_db_dir(recovery, 1)  # type: ignore[no-untyped-call]
    environment = os.environ | servers.environment | {"METERING_STATE_DIR": str(directory)}
    command = [sys.executable, "-m", "bytewax.run", "app.dataflows:settlement()"]
    command += ["-r", str(recovery), "-s", "10", "-b", "0"]
    addresses = ";".join(f"127.0.0.1:{process.free_port()}" for _ in range(processes))
    flows = []
    with (directory / "flow.log").open("wb") as log:
        try:
            for number in range(processes):
                place = ["-i", str(number), "-a", addresses] if processes > 1 else []
                ready = {"METERING_READY_FILE": str(directory / f"ready-{number}")}
                flows.append(
                    subprocess.Popen(command + place, env=environment | ready, stdout=log, stderr=log)
                )
            while len(list(directory.glob("ready-*"))) < processes:
                _must_run(flows, directory)
                time.sleep(0.005)
            started = time.perf_counter()
            while not _settled(client, balances):
                _must_run(flows, directory)
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            for flow in flows:
                flow.kill()
                flow.wait()


def _must_run(flows: list[subprocess.Popen[bytes]], directory: Path) -> None:
    if any(flow.poll() is not None for flow in flows):
        raise RuntimeError(f"the flow ended: {(directory / 'flow.log').read_text()[-2000:]}")


def _settled(client: redis.Redis, balances: dict[str, int]) -> bool:
    for account, amount_us in balances.items():
        stored = client.hget(redis_keys.balance(account), "balance_us")
        if int(stored or 0) != amount_us:
            return False
    return True
