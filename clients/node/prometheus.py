"""An emitter's counters and gauges for Prometheus; needs prometheus-client.

prometheus_client.REGISTRY.register(EmitterCollector(emitter))
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .emitter import RefusalReason, UsageEmitter


class EmitterCollector(Collector):
    """Reads `emitter.stats()` at each scrape."""

    def __init__(self, emitter: UsageEmitter) -> None:
        self._emitter = emitter

    def collect(self) -> Iterator[Metric]:
        """Every counter of EmitterStats, and the gauges to alert on."""
        stats = self._emitter.stats()
        for name, meaning, value in (
            ("emitted", "events taken", stats.emitted),
            ("sent", "events acknowledged by the broker", stats.sent),
            ("damaged", "records damaged on the disk", stats.damaged),
            ("disk_errors", "writes to the spool that failed and were repeated", stats.disk_errors),
            ("gpu_errors", "utterances without GPU time because the counter failed", stats.gpu_errors),
            ("producers_made", "connections to the broker begun anew", stats.producers_made),
        ):
            yield CounterMetricFamily(f"lingua_node_{name}", meaning, value=value)
        refused = CounterMetricFamily("lingua_node_refused", "events lost to metering", labels=["reason"])
        for reason in RefusalReason:
            refused.add_metric([reason.value], stats.refused.get(reason, 0))
        yield refused
        for name, meaning, amount in (
            ("queued_events", "events in memory", stats.queued),
            ("spooled_events", "events on the disk, not acknowledged", stats.spooled),
            ("spooled_bytes", "size of the spool on the disk", stats.spooled_bytes),
            ("oldest_age_seconds", "age of the oldest event that is not acknowledged", stats.oldest_age_s),
            ("longest_flush_seconds", "longest write to the spool so far", stats.longest_flush_s),
        ):
            yield GaugeMetricFamily(f"lingua_node_{name}", meaning, value=amount)
        if stats.clock_ahead_ms is not None:
            yield GaugeMetricFamily(
                "lingua_node_clock_ahead_seconds",
                "how far events were ahead of the broker's clock",
                value=stats.clock_ahead_ms / 1000,
            )
