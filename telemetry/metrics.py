"""Every metric of every process, declared once, with what it counts. Names end in their unit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

EVENTS = Counter("metering_events", "Events accepted, repeats included", ["flow", "type"])
DUPLICATES = Counter("metering_duplicates", "Repeats of an event that counts, dropped", ["flow"])
LATE = Counter("metering_late_events", "Events that arrived for a frozen window", ["flow"])
DEAD_LETTERS = Counter("metering_dead_letters", "Messages refused, by reason", ["flow", "reason"])
POSTINGS = Counter("metering_postings", "Cells posted to the balances, by the script's answer", ["answer"])
ALERTS = Counter("metering_alerts", "Balances that fell past a threshold, sent to Kafka", ["threshold"])
WRITE_OFF_RUNS = Counter("metering_write_off_runs", "Runs of write-offs, by how they ended", ["result"])
WRITTEN_OFF_US = Counter("metering_written_off_us", "Service microseconds of debt that nodes paid")
COMMANDS = Counter("metering_commands", "Money commands carried out, by outcome", ["outcome"])
LEDGER_LINES = Counter("metering_ledger_lines", "Ledger lines stored in ClickHouse")
STORED_ROWS = Counter("metering_stored_rows", "Rows stored in ClickHouse, by table", ["table"])
UNREADABLE = Counter("metering_outbox_unreadable", "Outbox entries set aside because nobody can read them")
OUTBOX_MISSING = Counter(
    "metering_outbox_missing",
    "Outbox entries that were removed before they were stored: the ledger has a gap, run `metering reconcile`",
)
RETRIES = Counter("metering_retries", "Attempts that failed and were made again, by effect", ["effect"])
LAG_EVENTS = Gauge(
    "metering_consumer_lag_events",
    "Messages in the partition that the flow has not read",
    ["topic", "partition"],
)
LAG_SECONDS = Gauge(
    "metering_consumer_lag_seconds",
    "Age of the last message read while there are more",
    ["topic", "partition"],
)
FENCE = Gauge("metering_fence_seconds", "Where the fence stands, as Unix time")
OUTBOX_ENTRIES = Gauge("metering_outbox_entries", "Entries in the outbox, drained ones in retention included")
RESETTLED_CELLS = Counter("metering_resettled_cells", "Frozen cells that a resettle corrected")
RESETTLE_RUNS = Counter("metering_resettle_runs", "Resettles on the timer, by result", ["result"])
RESETTLE_AGE = Gauge(
    "metering_resettle_completed_seconds", "When the last complete resettle ended, as Unix time"
)
RECONCILE_RUNS = Counter("metering_reconcile_runs", "Reconciliations on the timer, by result", ["result"])
DRIFT_US = Gauge("metering_drift_us", "Microseconds by which the books differ, by comparison", ["comparison"])
DRIFT_ITEMS = Gauge(
    "metering_drift_items", "Accounts, cells, messages that differ, by comparison", ["comparison"]
)
LIVE_SCOPES = Gauge("metering_live_scopes", "Scopes whose state is kept")
ACCOUNTS_HTTP = Counter("metering_accounts_http", "Answers of the accounts API", ["route", "status"])
ACCOUNTS_LIMITED = Counter(
    "metering_accounts_limited", "Attempts refused because there were too many", ["limit"]
)
ACCOUNTS_REQUESTS = Counter(
    "metering_accounts_requests",
    "Top-ups and adjustments that were sent, by what was answered",
    ["kind", "status"],
)


def start_known_series(flow: str, reasons: Iterable[str]) -> None:
    """Start the series of dead letters at zero: a rate over a series that begins with its first count is none."""
    for reason in reasons:
        DEAD_LETTERS.labels(flow, reason)


class LatencyHistogram(Collector):
    """Seconds from the broker's append of a usage event to its posting on the balances.

    prometheus_client's own histogram takes one value a call; at tens of thousands of events a second that is
    the hot path. This one takes a list. Not locked: one list is counted under one hold of the interpreter
    lock at most a few values off, which a scrape in between may see.
    """

    BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self._counts = [0] * (len(self.BOUNDS_S) + 1)
        self._sum_s = 0.0

    def observe_since(self, times_ms: Iterable[int], now_ms: int) -> None:
        """Count `now_ms - time` for each of `times_ms`."""
        for time_ms in times_ms:
            seconds = max(now_ms - time_ms, 0) / 1000
            self._counts[bisect_left(self.BOUNDS_S, seconds)] += 1
            self._sum_s += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The buckets, cumulative, as Prometheus wants them."""
        total = 0
        buckets = []
        for bound, count in zip((*map(str, self.BOUNDS_S), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum_s)


EVENT_TO_BALANCE = LatencyHistogram(
    "metering_event_to_balance_seconds", "From the broker's append of a usage event to the balance"
)
REGISTRY.register(EVENT_TO_BALANCE)
