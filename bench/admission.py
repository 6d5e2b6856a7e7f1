"""What one admission costs, next to the bare read of a balance: `python -m bench.admission`.

One Valkey that has every write on disk before it answers (`appendfsync always`), one client process with
asyncio, users drawn at random, each with a few sessions: so some admissions place a hold and some renew one.
A turn is `HGET balance:{user/...} balance_us`, then admissions, on as many connections; each connection asks
one thing after the other. The ratio is of turns next to each other. The server's CPU is all
that it used meanwhile, by its own count, divided by the calls: it tells more than the rates on a machine that does
other work too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import redis.asyncio

from app.embedded import process, valkey
from clients.scheduler import AsyncScheduler, Hold
from schemas import redis_keys

USERS = 10_000
SESSIONS = 3
HOLD = Hold.of_minutes(1, lasts_s=600)
CONNECTIONS = (1, 8, 32)

Ask = Callable[[int, int], Awaitable[None]]


@dataclass(frozen=True)
class Turn:
    """One measurement."""

    per_s: float
    p50_ms: float
    p99_ms: float
    server_us: float
    """CPU of the server for a call."""


async def _turn(server: Any, ask: Ask, calls: int, connections: int, seed: int) -> Turn:
    chance = random.Random(seed)
    asked = [(chance.randrange(USERS), chance.randrange(SESSIONS)) for _ in range(calls)]
    took: list[float] = []

    async def one_after_the_other(mine: list[tuple[int, int]]) -> None:
        for user, session in mine:
            began = time.perf_counter()
            await ask(user, session)
            took.append(time.perf_counter() - began)

    cpu_s = await _cpu_s(server)
    began = time.perf_counter()
    await asyncio.gather(*(one_after_the_other(asked[first::connections]) for first in range(connections)))
    elapsed_s = time.perf_counter() - began
    cpu_s = await _cpu_s(server) - cpu_s
    cuts = quantiles((second * 1_000 for second in took), n=100)
    return Turn(calls / elapsed_s, cuts[49], cuts[98], cpu_s / calls * 1e6)


async def _cpu_s(server: Any) -> float:
    used = await server.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


async def _measure(url: str, calls: int, turns: int) -> None:
    server = redis.asyncio.Redis.from_url(url)
    await server.set(redis_keys.EPOCH, 1)
    pipeline = server.pipeline(transaction=False)
    for user in range(USERS):
        values: dict[Any, Any] = {
            "balance_us": 10**12,
            "held_us": 0,
            "floor_us": redis_keys.DEFAULT_FLOOR_US,
            "seq": 1,
        }
        pipeline.hset(redis_keys.balance(f"user/u-{user}"), mapping=values)
    await pipeline.execute()
    for connections in CONNECTIONS:
        pool = redis.asyncio.ConnectionPool.from_url(url, max_connections=connections)
        bare = redis.asyncio.Redis(connection_pool=pool)
        options = {"max_connections": connections, "deadline_s": 30, "attempt_s": 30}
        async with AsyncScheduler(url, **options) as scheduler:

            async def read(user: int, session: int, bare: Any = bare) -> None:
                await bare.hget(redis_keys.balance(f"user/u-{user}"), "balance_us")

            async def admit(user: int, session: int, scheduler: AsyncScheduler = scheduler) -> None:
                if not await scheduler.admit(f"u-{user}", f"s-{session}", HOLD):
                    raise RuntimeError("refused: the benchmark's users have enough")

            # Connections and the script are there before anything is counted.
            await _turn(server, read, 4 * connections + 100, connections, 0)
            await _turn(server, admit, 4 * connections + 100, connections, 0)
            pairs = []
            for turn in range(turns):
                reads = await _turn(server, read, calls, connections, turn)
                pairs.append((reads, await _turn(server, admit, calls, connections, turn)))
        await bare.aclose()
        await pool.aclose()
        _report(connections, pairs)
    await server.aclose()


def _report(connections: int, pairs: list[tuple[Turn, Turn]]) -> None:
    print(f"{connections} connection{'s' if connections > 1 else ''}")
    for name, turns in (("HGET balance_us", [a for a, _ in pairs]), ("admit", [b for _, b in pairs])):
        print(
            f"  {name:16} {median(turn.per_s for turn in turns):>8,.0f} /s"
            f"   p50 {median(turn.p50_ms for turn in turns):.2f} ms"
            f"   p99 {median(turn.p99_ms for turn in turns):.2f} ms"
            f"   server CPU {median(turn.server_us for turn in turns):.1f} us"
        )
    ratios = sorted(admitted.per_s / reads.per_s for reads, admitted in pairs)
    print(
        f"  ratio admit / HGET: {median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        flush=True,
    )


def main() -> None:
    """Measure and print; smaller or larger by the options."""
    parser = argparse.ArgumentParser(prog="python -m bench.admission", description=__doc__)
    parser.add_argument("--calls", type=int, default=5_000, help="calls of a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each kind")
    options = parser.parse_args()
    print(f"CPython {platform.python_version()}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        port = process.free_port()
        child = process.start(valkey.service(Path(scratch) / "redis", port), Path(scratch) / "redis.log")
        try:
            asyncio.run(_measure(f"redis://{process.LOOPBACK}:{port}/0", options.calls, options.turns))
        finally:
            process.stop(child, deadline_s=0)


if __name__ == "__main__":
    main()
