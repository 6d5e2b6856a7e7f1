"""The page of metrics is current, and every metric that is declared is fed."""

from __future__ import annotations

import re

import pytest
from prometheus_client.metrics import MetricWrapperBase

from telemetry import metrics
from telemetry.export import LABELS, PAGE, ROOT, described_metrics, metrics_page

FEEDING = ("flows", "sources", "sinks", "accounts", "app")


def test_the_page_is_current() -> None:
    """docs/metrics.md is what `python -m telemetry.export` writes."""
    assert (ROOT / PAGE).read_text(encoding="utf-8") == metrics_page()


def test_every_metric_is_described_once() -> None:
    """Each declared metric has a name of its own, a meaning, and only labels that are explained."""
    described = described_metrics()
    assert len({metric.name for metric in described}) == len(described) > 10
    for metric in described:
        assert metric.name.startswith("metering_")
        assert metric.meaning
        assert set(metric.labels) <= set(LABELS)


def test_no_label_is_explained_in_vain() -> None:
    """Every explained label is one that some time series has."""
    used = {
        label for metric in described_metrics() for labels in metric.samples().values() for label in labels
    }
    assert used == set(LABELS)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in vars(metrics).items()
        if isinstance(value, MetricWrapperBase | metrics.LatencyHistogram)
    ],
)
def test_every_metric_is_fed(name: str) -> None:
    """A metric that no code touches would show nothing for ever."""
    code = "".join(
        file.read_text(encoding="utf-8") for folder in FEEDING for file in (ROOT / folder).rglob("*.py")
    )
    assert re.search(rf"\bmetrics\.{name}\b", code)


def test_the_latency_histogram_is_cumulative() -> None:
    """Buckets include their bound, and the last one holds everything."""
    histogram = metrics.LatencyHistogram("seconds", "For this test")
    histogram.observe_since([0, 990, 1_000, 1_001], now_ms=1_000)
    [family] = histogram.collect()
    counts = {
        sample.labels["le"]: sample.value for sample in family.samples if sample.name == "seconds_bucket"
    }
    assert (counts["0.01"], counts["0.75"], counts["1.0"], counts["+Inf"]) == (3, 3, 4, 4)
