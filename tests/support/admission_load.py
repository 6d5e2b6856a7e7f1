"""A process that asks for admission from many tasks at once: `python -m tests.support.admission_load ...`.

Arguments: URL, name, number of sessions, connections, "keep" or "churn". It says `ready` and waits for a
line. Then it asks for every session at the same time; with "churn" each task also renews, releases and asks
for short holds. At the end it prints {"reason": how often} of the first question of each session.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter

from clients.scheduler import AsyncScheduler, Hold

HOLD = Hold(10, 3_600_000)
USER = "u-1"


async def _session(scheduler: AsyncScheduler, name: str, churn: bool, chance: random.Random) -> str:
    first = await scheduler.admit(USER, name, HOLD)
    if churn:
        for _ in range(4):
            what = chance.randrange(3)
            if what == 0:
                await scheduler.admit(USER, name, Hold(chance.randrange(20), 3_600_000))
            elif what == 1:
                await scheduler.admit(USER, name, Hold(chance.randrange(20), chance.randrange(1, 30)))
            else:
                await scheduler.release(USER, name)
    return first.reason


async def _main(url: str, name: str, sessions: int, connections: int, churn: bool) -> None:
    chance = random.Random(name)
    async with AsyncScheduler(url, max_connections=connections, deadline_s=60, attempt_s=60) as scheduler:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        asked = [_session(scheduler, f"{name}-{number}", churn, chance) for number in range(sessions)]
        print(json.dumps(Counter(await asyncio.gather(*asked))), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "churn"))
