"""The dashboards, alert rules and provisioning files of the repository, as tests look at them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "dashboards"
NAMES = ("analysts", "operators")
CLICKHOUSE_UID = "lingua-clickhouse"
PROMETHEUS_UID = "lingua-prometheus"


@dataclass(frozen=True)
class PanelQuery:
    """One query of one panel."""

    dashboard: str
    panel: dict[str, Any]
    target: dict[str, Any]

    @property
    def name(self) -> str:
        """Names it in a test's report."""
        return f"{self.dashboard}: {self.panel['title']} {self.target['refId']}"


def read_yaml(path: Path) -> Any:
    """A YAML file of the repository."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_dashboard(name: str) -> dict[str, Any]:
    """A dashboard as it is provisioned."""
    found: dict[str, Any] = json.loads(
        (DASHBOARDS / "grafana/dashboards" / f"{name}.json").read_text("utf-8")
    )
    return found


def panels(name: str) -> list[dict[str, Any]]:
    """The panels of a dashboard that show something: all but the rows' headings."""
    return [panel for panel in read_dashboard(name)["panels"] if panel["type"] != "row"]


def panel_queries(data_source_uid: str) -> Iterator[PanelQuery]:
    """Every query that goes to this data source, of all dashboards."""
    for name in NAMES:
        for panel in panels(name):
            for target in panel["targets"]:
                if target["datasource"]["uid"] == data_source_uid:
                    yield PanelQuery(name, panel, target)


def alert_rules() -> list[dict[str, Any]]:
    """Every rule that Prometheus evaluates."""
    groups = read_yaml(DASHBOARDS / "prometheus/alerts.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


@dataclass(frozen=True)
class TimeRange:
    """What the time picker says; instants in ms since the Unix epoch."""

    start_ms: int
    end_ms: int
    interval_s: int


def expand_macros(sql: str, time_range: TimeRange) -> str:
    """The query as the ClickHouse data source sends it: its macros replaced by what they stand for.

    Follows the data source's documentation. A macro that is not known here stays, and ClickHouse refuses it.
    """
    start_s, end_s = time_range.start_ms // 1000, time_range.end_ms // 1000
    start, end = f"toDateTime({start_s})", f"toDateTime({end_s})"
    start_day, end_day = f"toDate({start})", f"toDate({end})"
    interval = f"INTERVAL {time_range.interval_s} second"
    replacements = {
        r"\$__timeFilter\((\w+)\)": rf"\1 >= {start} AND \1 <= {end}",
        r"\$__dateFilter\((\w+)\)": rf"\1 >= {start_day} AND \1 <= {end_day}",
        r"\$__timeInterval\((\w+)\)": rf"toStartOfInterval(toDateTime(\1), {interval})",
        r"\$__fromTime_ms\b": f"fromUnixTimestamp64Milli({time_range.start_ms})",
        r"\$__toTime_ms\b": f"fromUnixTimestamp64Milli({time_range.end_ms})",
        r"\$__interval_s\b": str(time_range.interval_s),
    }
    for macro, meaning in replacements.items():
        sql = re.sub(macro, meaning, sql)
    return sql
