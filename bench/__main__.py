"""`make bench`: throughput against a bare consumer, and event-to-balance latency. Prints what it measured."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

from bench import latency, throughput
from bench.services import broker_and_redis, everything


def main() -> None:
    """Run both, smaller or larger by the options."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--broker", choices=["tansu", "apache"], default="tansu")
    parser.add_argument("--events", type=int, default=200_000, help="distinct events of the backlog")
    parser.add_argument("--runs", type=int, default=3, help="turns of the bare consumer and the flow")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of the flow, as a Bytewax cluster"
    )
    parser.add_argument("--rate", type=int, default=1_000, help="events a second for the latency")
    parser.add_argument("--seconds", type=int, default=20, help="how long that load lasts")
    options = parser.parse_args()
    print(f"CPython {platform.python_version()}, {os.cpu_count()} cores, broker {options.broker}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        with broker_and_redis(directory, options.broker) as servers:
            result = throughput.measure(servers, directory, options.events, options.runs, options.processes)
        print(f"backlog: {result.messages:,} messages, {result.cells:,} cells, {options.runs} turns each")
        for name, seconds in (
            ("bare consumer, poll()", result.polling_s),
            ("bare consumer, consume()", result.consuming_s),
            (f"settlement flow, {options.processes} proc.", result.flow_s),
        ):
            runs = ", ".join(f"{result.messages / each:,.0f}" for each in seconds)
            print(f"  {name:26} {result.rate(seconds):>10,.0f} events/s (median of {runs})")
        polling, consuming = result.ratio(result.polling_s), result.ratio(result.consuming_s)
        print(
            f"  ratio flow / bare consumer: {polling:.2f} to poll(), {consuming:.2f} to consume() "
            "(medians of runs next to each other)",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as scratch, everything(Path(scratch), options.broker) as addresses:
        found = latency.measure(addresses["kafka"], addresses["redis"], options.rate, options.seconds)
    print(
        f"event to balance at {found.events_per_s:,.0f} events/s, everything running, {found.probes} probes:"
    )
    print(
        f"  p50 {found.p50_ms:.0f} ms, p90 {found.p90_ms:.0f} ms, p99 {found.p99_ms:.0f} ms, "
        f"max {found.max_ms:.0f} ms"
    )


if __name__ == "__main__":
    main()
