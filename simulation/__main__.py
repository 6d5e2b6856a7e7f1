"""`python -m simulation`: many seeds, or one with a trace."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from simulation.bugs import BUGS
from simulation.parts import Parts
from simulation.run import Outcome, simulate

SEEDS_A_TASK = 50


def main() -> int:
    """Exit 1 when a seed went wrong; with --bug, when none did."""
    options = _options()
    parts = BUGS[options.bug] if options.bug else Parts()
    if options.verbose is not None:
        outcome = simulate(options.verbose, parts, print)
        print(outcome.violation or "all is right")
        return 1 if outcome.violation else 0
    began = time.monotonic()
    died: Counter[str] = Counter()
    coverage: Counter[str] = Counter()
    wrong: list[Outcome] = []
    seeds = events = 0
    for outcome in _outcomes(options):
        seeds += 1
        if seeds % 1_000 == 0:
            print(f"{seeds} seeds, {len(wrong)} went wrong", file=sys.stderr, flush=True)
        events += outcome.events
        died += outcome.died
        coverage += outcome.coverage
        if outcome.violation is not None:
            wrong.append(outcome)
            print(f"seed {outcome.seed}: {outcome.violation}", flush=True)
            if options.bug or len(wrong) >= options.stop_after:
                break
        if options.seconds is not None and time.monotonic() - began > options.seconds:
            break
    took_s = time.monotonic() - began
    for table in (coverage, died):
        for name, count in sorted(table.items()):
            print(f"{count:>10} {name}")
    print(
        f"{seeds} seeds from {options.start_seed}, {events} events, {sum(died.values())} deaths and losses, "
        f"{took_s:.1f} s, {60 * seeds / took_s:.0f} seeds a minute, {len(wrong)} went wrong"
    )
    if options.bug:
        return 0 if wrong else 1
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many")
    parser.add_argument("--start-seed", type=int, default=0, help="the first one")
    parser.add_argument("--seconds", type=float, help="stop after so long, whatever --seeds says")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bug", choices=sorted(BUGS), help="run with a planted bug, until a seed finds it")
    parser.add_argument("--verbose", type=int, metavar="SEED", help="replay one seed with a trace")
    parser.add_argument("--stop-after", type=int, default=10, help="how many wrong seeds are enough")
    return parser.parse_args()


def _outcomes(options: argparse.Namespace) -> Iterator[Outcome]:
    last = options.start_seed + options.seeds
    if options.processes == 1 or options.bug:
        parts = BUGS[options.bug] if options.bug else None
        for seed in range(options.start_seed, last):
            yield simulate(seed, parts)
        return
    tasks = [
        range(first, min(first + SEEDS_A_TASK, last))
        for first in range(options.start_seed, last, SEEDS_A_TASK)
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        try:
            for outcomes in pool.map(_simulate_all, tasks):
                yield from outcomes
        finally:
            pool.shutdown(cancel_futures=True)


def _simulate_all(seeds: range) -> list[Outcome]:
    return [simulate(seed) for seed in seeds]


if __name__ == "__main__":
    sys.exit(main())
