"""What the node's usage emitter costs its caller: `python -m bench.node_emitter`.

Two loops take turns, utterance by utterance, in the same run: the *bare* one has the same four `with` blocks and
reads the clock as often, and does nothing else; the other one emits. Both are paced, as a node's work is. Then
how long an event stays in memory before it is on the disk, which is what a kill can lose; what `durable` waits;
and how many events a second get through at most, to the disk and to the broker.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from types import TracebackType

from app.embedded import broker, process
from app.embedded.process import LOOPBACK
from app.migrate import create_topics
from clients.node import UsageEmitter

TOPIC = "bench"
MEMORY = Path("/dev/shm")
UTTERANCE_MS = 400
"""What an utterance takes a node altogether, for comparison."""


class Bare:
    """The least that times a block: two readings of the clock."""

    __slots__ = ("spent_ns", "started_ns")

    def __init__(self) -> None:
        self.spent_ns = 0
        self.started_ns = 0

    def __enter__(self) -> Bare:
        self.started_ns = time.monotonic_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.spent_ns += time.monotonic_ns() - self.started_ns


def bare() -> None:
    """An utterance with three stages that nobody hears of."""
    with Bare():
        with Bare():
            pass
        with Bare():
            pass
        with Bare():
            pass


def emitting(emitter: UsageEmitter) -> Callable[[], None]:
    """The same, emitted."""

    def once() -> None:
        with emitter.utterance(
            session_id="s-1", user_id="u-5", room_id="r-9", audio_ms=4200, source_lang="zh", target_lang="en"
        ) as spoken:
            with spoken.asr():
                pass
            with spoken.nmt():
                pass
            with spoken.tts():
                pass
            spoken.gpu_active_ms = 350

    return once


def taken_us(work: Callable[[], None]) -> float:
    """Of the calling thread, waiting included."""
    started_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - started_ns) / 1000


def percentiles(samples: list[float]) -> tuple[float, float]:
    """p50 and p99."""
    cuts = quantiles(samples, n=100)
    return cuts[49], cuts[98]


def overhead(emitter: UsageEmitter, count: int, rate_per_s: float) -> None:
    """Both loops in turn, at a rate."""
    once = emitting(emitter)
    bare_us: list[float] = []
    emitted_us: list[float] = []
    started_s = time.monotonic()
    for number in range(count):
        bare_us.append(taken_us(bare))
        emitted_us.append(taken_us(once))
        ahead_s = started_s + (number + 1) / rate_per_s - time.monotonic()
        if ahead_s > 0:
            time.sleep(ahead_s)
    (bare50, bare99), (emitted50, emitted99) = percentiles(bare_us), percentiles(emitted_us)
    print(f"  caller's time an utterance, {count:,} at {rate_per_s:g}/s:")
    print(f"    bare with blocks  p50 {bare50:6.1f} us, p99 {bare99:6.1f} us")
    print(
        f"    emitted           p50 {emitted50:6.1f} us, p99 {emitted99:6.1f} us; "
        f"{emitted50 / bare50:.1f} and {emitted99 / bare99:.1f} times as long"
    )
    share = emitted50 / 1000 / UTTERANCE_MS
    print(
        f"    of an utterance of {UTTERANCE_MS} ms: {share:.4%} (p50), {emitted99 / 10 / UTTERANCE_MS:.4f}% (p99)"
    )


def windows(emitter: UsageEmitter, count: int) -> None:
    """How long events stay in memory, and how long `durable` waits."""
    once = emitting(emitter)
    memory_ms: list[float] = []
    for _ in range(count):
        once()
        started_s = time.perf_counter()
        while emitter.stats().queued:
            time.sleep(0.0002)
        memory_ms.append((time.perf_counter() - started_s) * 1000)
    p50, p99 = percentiles(memory_ms)
    print(
        f"  in memory before it is on the disk: p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {max(memory_ms):.1f} ms"
    )
    durable_ms = [
        taken_us(lambda: emitter.room_joined(room_id="r-9", user_id="u-5", durable=True)) / 1000
        for _ in range(count)
    ]
    p50, p99 = percentiles(durable_ms)
    print(f"  durable=True waits: p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {max(durable_ms):.1f} ms")


def throughput(emitter: UsageEmitter, count: int) -> None:
    """As fast as one thread can, until the broker has all of it."""
    once = emitting(emitter)
    started_s = time.monotonic()
    for _ in range(count):
        once()
    emitted_s = time.monotonic() - started_s
    assert emitter.flush(300.0)
    acknowledged_s = time.monotonic() - started_s
    assert not emitter.stats().refused
    print(
        f"  at most, one thread, {count:,} events: {count / emitted_s:,.0f} emitted/s, "
        f"{count / acknowledged_s:,.0f}/s until the broker has them"
    )


@contextmanager
def an_emitter(kafka: str, where: Path | None) -> Iterator[UsageEmitter]:
    """With a spool of its own below `where`."""
    with (
        tempfile.TemporaryDirectory(dir=where, prefix="bench-spool-") as directory,
        UsageEmitter(
            kafka, "n-17", Path(directory), topic=TOPIC, spool_bytes=2**30, queue_bytes=2**28
        ) as emitter,
    ):
        yield emitter


def main() -> None:
    """On the disk, and in memory where that is to be had."""
    parser = argparse.ArgumentParser(prog="python -m bench.node_emitter", description=__doc__)
    parser.add_argument("--spool", type=Path, help="make the spools here (default: the temporary directory)")
    parser.add_argument("--utterances", type=int, default=4_000)
    parser.add_argument("--rate", type=float, default=500.0, help="utterances a second")
    parser.add_argument("--burst", type=int, default=50_000, help="events for the throughput")
    options = parser.parse_args()
    print(f"CPython {platform.python_version()}, {os.cpu_count()} cores", flush=True)
    port = process.free_port()
    kafka = f"{LOOPBACK}:{port}"
    places = [("disk", options.spool)] + ([("tmpfs", MEMORY)] if MEMORY.is_dir() else [])
    with tempfile.TemporaryDirectory() as scratch:
        child = process.start(broker.service(port), Path(scratch) / "broker.log")
        try:
            create_topics(kafka, 4, False, topics={TOPIC: {}})
            for name, where in places:
                print(f"spool on {name}:", flush=True)
                with an_emitter(kafka, where) as emitter:
                    overhead(emitter, options.utterances, options.rate)
                    windows(emitter, 300)
                    throughput(emitter, options.burst)
        finally:
            process.stop(child, deadline_s=0)


if __name__ == "__main__":
    main()
