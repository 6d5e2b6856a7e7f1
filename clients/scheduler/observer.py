"""What a scheduler's client tells about itself: nothing, or metrics for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .breaker import State

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Observer:
    """Hears what happens; does nothing. Methods are called by any thread, must not block and must not raise."""

    def called(self, operation: str, reason: str, degraded: bool, seconds: float) -> None:
        """A call came to its end: `admit`, `release`, `sweep`, or of a grant that Redis is told of, `recover`."""

    def failed(self, operation: str, trouble: str) -> None:
        """An attempt failed: a word of `clients.scheduler.logic.Trouble`."""

    def breaker(self, state: State) -> None:
        """The circuit breaker changed."""

    def admitted_without_redis(self, amount_us: int) -> None:
        """A session was admitted from the last known balance, with a hold of so much."""

    def pending(self, count: int) -> None:
        """So many grants and releases are still to be told to Redis."""


METRICS = {
    "lingua_admission_calls": "calls, by `operation`, `reason` and whether they were `degraded`",
    "lingua_admission_seconds": "how long calls took, by `operation`, all attempts included (histogram)",
    "lingua_admission_failures": "attempts that failed, by `operation` and `trouble`",
    "lingua_admission_breaker": "1 for the `state` of the circuit breaker: `closed`, `half_open`, `open`",
    "lingua_admission_without_redis_us": "holds that were admitted from the last known balance, in us",
    "lingua_admission_pending": "admissions and releases that Redis has yet to be told of",
}
"""Every metric of `PrometheusObserver`, with its meaning."""

_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


class PrometheusObserver(Observer):
    """Counts for Prometheus; one for a registry. Raises ImportError without prometheus-client."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        # Only here: the client itself needs nothing but redis.
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram  # noqa: PLC0415

        where = REGISTRY if registry is None else registry
        counter, gauge = "lingua_admission_without_redis_us", "lingua_admission_pending"
        self._calls = Counter(
            "lingua_admission_calls",
            METRICS["lingua_admission_calls"],
            ["operation", "reason", "degraded"],
            registry=where,
        )
        self._seconds = Histogram(
            "lingua_admission_seconds",
            METRICS["lingua_admission_seconds"],
            ["operation"],
            buckets=_BUCKETS_S,
            registry=where,
        )
        self._failures = Counter(
            "lingua_admission_failures",
            METRICS["lingua_admission_failures"],
            ["operation", "trouble"],
            registry=where,
        )
        self._breaker = Gauge(
            "lingua_admission_breaker", METRICS["lingua_admission_breaker"], ["state"], registry=where
        )
        self._without_redis_us = Counter(counter, METRICS[counter], registry=where)
        self._pending = Gauge(gauge, METRICS[gauge], registry=where)
        self.breaker(State.CLOSED)

    def called(self, operation: str, reason: str, degraded: bool, seconds: float) -> None:
        self._calls.labels(operation, reason, str(degraded).lower()).inc()
        self._seconds.labels(operation).observe(seconds)

    def failed(self, operation: str, trouble: str) -> None:
        self._failures.labels(operation, trouble).inc()

    def breaker(self, state: State) -> None:
        for each in State:
            self._breaker.labels(each.value).set(1 if each is state else 0)

    def admitted_without_redis(self, amount_us: int) -> None:
        self._without_redis_us.inc(amount_us)

    def pending(self, count: int) -> None:
        self._pending.set(count)
