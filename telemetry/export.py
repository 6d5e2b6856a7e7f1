"""Writes docs/metrics.md, the table of every metric, from what `telemetry.metrics` declares.

`python -m telemetry.export`; a test fails when the page is not current.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.metrics import MetricWrapperBase

from telemetry import metrics

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs/metrics.md")

LABELS = {
    "flow": "the flow that counted it: `settlement` or `usage_store`",
    "type": "`usage` or `lifecycle`",
    "reason": "why a message was refused, a word of `schemas.rejections.RejectReason`",
    "answer": "what the script said to a cell: `POSTED`, `OLDER`, `FROZEN` or `OVER_LIMIT`",
    "outcome": "what became of a money command: `APPLIED`, `REPLAYED`, `ARCHIVED`, "
    "`CONFLICT`, `OVER_LIMIT` or `INSUFFICIENT`",
    "threshold": "what a balance fell past: `low`, `zero` or `floor`",
    "comparison": "which two stores were compared, as in the report of `metering reconcile`",
    "result": "of a resettle `complete`, `superseded`, `failed`; of a reconciliation its status, or `failed`; of "
    "write-offs `complete`, `open` when some wait for the ledger, `failed`",
    "table": "the table in ClickHouse",
    "route": "of the accounts API: method and path, with names for what varies",
    "status": "of an answer the HTTP status; of a money request `pending`, `applied`, `over_limit`, `insufficient`",
    "limit": "what was tried, and per what it is counted",
    "kind": "`top_up` or `adjustment`",
    "effect": "what was tried, in words",
    "topic": "Kafka topic",
    "partition": "Kafka partition",
    "le": "upper bound of a bucket in seconds, inclusive",
}
"""Every label that a metric has, with what its values are."""


@dataclass(frozen=True)
class MetricDescription:
    """One declared metric as Prometheus sees it."""

    name: str
    """Without the endings that Prometheus' text format adds to a counter's and a histogram's samples."""
    kind: str
    """counter, gauge or histogram."""
    labels: tuple[str, ...]
    meaning: str

    def samples(self) -> dict[str, frozenset[str]]:
        """The time series that it becomes: their names, and the labels of each."""
        labels = frozenset(self.labels)
        if self.kind == "counter":
            return {f"{self.name}_total": labels}
        if self.kind == "histogram":
            return {
                f"{self.name}_bucket": labels | {"le"},
                f"{self.name}_count": labels,
                f"{self.name}_sum": labels,
            }
        return {self.name: labels}


def described_metrics() -> list[MetricDescription]:
    """Every metric that `telemetry.metrics` declares, in the order of their declaration."""
    return [
        description
        for declared in vars(metrics).values()
        if isinstance(declared, MetricWrapperBase | metrics.LatencyHistogram)
        for description in _describe(declared)
    ]


def _describe(declared: MetricWrapperBase | metrics.LatencyHistogram) -> Iterable[MetricDescription]:
    if isinstance(declared, metrics.LatencyHistogram):
        labels: tuple[str, ...] = ()
        families: Iterable[Metric] = declared.collect()
    else:
        # Nothing public tells the labels of a metric that has counted nothing yet.
        labels = tuple(declared._labelnames)
        families = declared.describe()
    for family in families:
        yield MetricDescription(family.name, family.type, labels, family.documentation)


def metrics_page() -> str:
    """docs/metrics.md: every metric, its type, labels and meaning, then what the labels say."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -m telemetry.export` from `telemetry/metrics.py`; do not edit.",
        "",
        "A flow serves its metrics for Prometheus on the port that `METERING_METRICS_PORT` names, at `/metrics`;",
        "the accounts API on its own port.",
        "A counter's samples end in `_total`, a histogram's in `_bucket`, `_count` and `_sum`. Prometheus adds",
        "`job`, which is the flow, and `instance`. Counters begin at zero when a process starts, and after a",
        "crash what was read again since the last snapshot is counted again: they show what a process did, and",
        "the books are proved from the ledger instead.",
        "",
        "| metric | type | labels | meaning |",
        "| --- | --- | --- | --- |",
    ]
    described = described_metrics()
    for metric in described:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.meaning} |")
    bounds = ", ".join(f"{bound:g}" for bound in metrics.LatencyHistogram.BOUNDS_S)
    lines += ["", f"A latency histogram has buckets up to {bounds} seconds.", "", "| label | values |"]
    lines.append("| --- | --- |")
    used = {label for metric in described for labels in metric.samples().values() for label in labels}
    lines += [f"| `{label}` | {LABELS[label]} |" for label in sorted(used)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    (ROOT / PAGE).write_text(metrics_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
