"""The dashboards' layout, and that their PromQL and the alert rules ask for what the flows measure."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from typing import Any

import promql_parser
import pytest
from promql_parser import AggregateExpr, Call, Expr, VectorSelector

from app.supervisor import default_flows
from metering.commands import CommandOutcome
from metering.live import Answer
from schemas.rejections import RejectReason
from schemas.settings import Settings
from telemetry.export import described_metrics
from tests.support.dashboards import (
    CLICKHOUSE_UID,
    NAMES,
    PROMETHEUS_UID,
    alert_rules,
    panel_queries,
    panels,
    read_dashboard,
)

FLOWS = {flow.name for flow in default_flows(Settings())}
SCRAPE_LABELS = frozenset({"job", "instance"})
SERIES: dict[str, frozenset[str]] = {
    "up": SCRAPE_LABELS,
    **{
        series: labels | SCRAPE_LABELS
        for metric in described_metrics()
        for series, labels in metric.samples().items()
    },
}
COUNTING = {
    series
    for metric in described_metrics()
    if metric.kind in ("counter", "histogram")
    for series in metric.samples()
}
VALUES: dict[str, set[str]] = {
    "job": FLOWS | {"accounts"},
    "flow": FLOWS,
    "reason": {reason.value for reason in RejectReason},
    "answer": {answer.name for answer in Answer},
    "outcome": {outcome.name for outcome in CommandOutcome},
    "result": {"complete", "superseded", "failed", "open", "agrees", "drift", "unproven"},
}
PANEL_QUERIES = list(panel_queries(PROMETHEUS_UID))
RULES = alert_rules()
EXPRESSIONS = [(query.name, query.target["expr"]) for query in PANEL_QUERIES]
EXPRESSIONS += [(rule["alert"], rule["expr"]) for rule in RULES]


def parsed(text: str) -> Expr:
    """The expression with Grafana's rate interval filled in; ValueError if it is no PromQL."""
    return promql_parser.parse(text.replace("$__rate_interval", "1m"))


def parts(text: str) -> list[Any]:
    """Every node of an expression."""
    found: list[Any] = []
    promql_parser.walk(parsed(text), found.append)
    return found


def selectors(text: str) -> list[VectorSelector]:
    """What an expression reads."""
    return [node for node in parts(text) if isinstance(node, VectorSelector)]


def test_there_is_something_to_check() -> None:
    """Both kinds of expressions are found, and each reads something."""
    assert len(PANEL_QUERIES) > 15
    assert len(RULES) > 5
    assert all(selectors(text) for _, text in EXPRESSIONS)


@pytest.mark.parametrize(("name", "text"), EXPRESSIONS)
def test_an_expression_reads_what_is_measured(name: str, text: str) -> None:
    """Each series exists, has the labels that are asked for, and these can have the values."""
    for selector in selectors(text):
        assert selector.name in SERIES, f"{name}: no metric {selector.name}"
        for matcher in selector.matchers.matchers:
            assert matcher.name in SERIES[selector.name], f"{name}: {selector.name} has no {matcher.name}"
            assert set(matcher.value.split("|")) <= VALUES[matcher.name]


@pytest.mark.parametrize(("name", "text"), EXPRESSIONS)
def test_an_expression_groups_by_labels_that_are_there(name: str, text: str) -> None:
    """A label that a series has not would silently merge everything into one."""
    for node in parts(text):
        if isinstance(node, AggregateExpr) and node.modifier is not None:
            for selector in selectors(node.expr.prettify()):
                assert set(node.modifier.labels) <= SERIES[selector.name or ""], name


@pytest.mark.parametrize(("name", "text"), EXPRESSIONS)
def test_rates_are_taken_of_counters(name: str, text: str) -> None:
    """`rate` and `increase` of a gauge mean nothing."""
    for node in parts(text):
        if isinstance(node, Call) and node.func.name in ("rate", "increase"):
            for selector in selectors(node.prettify()):
                assert selector.name in COUNTING, name


@pytest.mark.parametrize("query", PANEL_QUERIES, ids=lambda query: query.name)
def test_a_legend_names_labels_that_are_left(query: Any) -> None:
    """Each label in a legend is one that the expression groups by."""
    grouped = {
        label
        for node in parts(query.target["expr"])
        if isinstance(node, AggregateExpr) and node.modifier is not None
        for label in node.modifier.labels
    }
    assert set(re.findall(r"{{(\w+)}}", query.target["legendFormat"])) <= grouped


def test_operators_see_every_metric() -> None:
    """No metric is counted that the operators' dashboard does not show."""
    shown = {selector.name for query in PANEL_QUERIES for selector in selectors(query.target["expr"])}
    for metric in described_metrics():
        assert shown & set(metric.samples()), metric.name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    """Each has a known severity, a summary, and a sentence on what it means."""
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(".")


def test_alerts_have_names_of_their_own() -> None:
    """Two rules of one name could not be told apart."""
    assert max(Counter(rule["alert"] for rule in RULES).values()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_panels_are_told_apart_and_do_not_overlap(name: str) -> None:
    """Ids are unique, and on the grid of 24 columns every place belongs to one panel."""
    everything = read_dashboard(name)["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    places = [panel["gridPos"] for panel in everything]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_panel_says_what_it_shows(name: str) -> None:
    """Each has a description, a unit unless it is a table, and a data source by its fixed uid."""
    for panel in panels(name):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] in (CLICKHOUSE_UID, PROMETHEUS_UID)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]


def test_dashboards_have_uids_of_their_own() -> None:
    """A link to a dashboard stays valid, because its uid is fixed."""
    assert [read_dashboard(name)["uid"] for name in NAMES] == ["lingua-analysts", "lingua-operators"]
