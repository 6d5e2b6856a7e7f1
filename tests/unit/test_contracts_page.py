"""docs/contracts.md names everything that other programs rely on, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

import metering.explain
import metering.explain_one
from app.cli import app
from app.explain import (
    CellExplained,
    CommandExplained,
    EventExplained,
    Letter,
    LineExplained,
    ScopeCell,
    ScopeExplained,
    UtteranceExplained,
)
from clients.scheduler import Reason
from clients.scheduler.observer import METRICS
from metering.explain import Agreement
from schemas import redis_keys, topics
from schemas.alerts import ALERT_MODELS
from schemas.cloudevents import EVENT_MODELS
from schemas.commands import COMMAND_MODELS
from schemas.rejections import RejectReason

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "clients" / "scheduler" / "lua" / "holds.lua"
PAGE = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """The text from a heading of the second level to the next."""
    return PAGE.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]


def first_cells(text: str) -> set[str]:
    """What stands as code in the first column of the section's tables."""
    return set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))


def test_topics() -> None:
    """Every topic."""
    assert first_cells(section("Kafka")) == {
        topics.EVENTS,
        topics.COMMANDS,
        topics.DEAD_LETTERS,
        topics.ALERTS,
    }


def test_types_and_reasons() -> None:
    """Every event and command type with its schema, and every reason of a dead letter."""
    text = section("Events and commands")
    types = {*EVENT_MODELS, *COMMAND_MODELS, *ALERT_MODELS}
    assert first_cells(text) == types | {reason.value for reason in RejectReason}
    for name in types:
        assert f"(../schemas/exported/{name}.json)" in text


def test_redis_keys() -> None:
    """Every key."""
    keys = {value for name, value in vars(redis_keys).items() if name.isupper() and isinstance(value, str)}
    prefixes = {value for name, value in vars(redis_keys).items() if name.endswith("_PREFIX")}
    patterns = {
        redis_keys.request_mark("<digits>"),
        redis_keys.balance("<account>"),
        redis_keys.holds("<account>"),
        redis_keys.hold_amounts("<account>"),
        redis_keys.cell("<cell_id>"),
        redis_keys.request("<request_id>"),
    }
    assert first_cells(section("Redis")) == keys - prefixes | patterns


def test_admission() -> None:
    """Every reason and metric of the scheduler's client, its bounds, and each operation of its script."""
    text = section("Admission")
    operations = {"admit", "release", "sweep"}
    assert first_cells(text) == {*Reason, *METRICS, *operations}
    for name, meaning in METRICS.items():
        assert f"| `{name}` | {meaning} |" in text
    assert f"(../{SCRIPT.relative_to(ROOT)})" in text


def test_tables_and_views() -> None:
    """Every table and view that the migrations make, and the record of the migrations."""
    statements = "".join(file.read_text() for file in sorted((ROOT / "schemas" / "clickhouse").glob("*.sql")))
    made = set(
        re.findall(
            r"^CREATE (?:OR REPLACE )?(?:TABLE|VIEW) (?:IF NOT EXISTS )?\{database\}\.(\w+)",
            statements,
            re.MULTILINE,
        )
    )
    assert first_cells(section("ClickHouse")) == made | {"schema_migrations"}


def test_commands() -> None:
    """Every command of the command line."""
    named = {cell.split()[1] for cell in first_cells(section("Command line"))}
    assert named == {
        command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands
    }


def test_explanations() -> None:
    """Every kind, every word of agreement, and every field of every object that an explanation may have."""
    text = section("Explanations")
    kinds = [LineExplained, CellExplained, UtteranceExplained, CommandExplained, ScopeExplained]
    words = {str(kind.__struct_config__.tag) for kind in kinds} | {each.value for each in Agreement}
    assert words <= first_cells(text)
    structs: list[type[msgspec.Struct]] = [*kinds, EventExplained, ScopeCell, Letter]
    structs += [
        thing
        for module in (metering.explain, metering.explain_one)
        for thing in vars(module).values()
        if isinstance(thing, type)
        and issubclass(thing, msgspec.Struct)
        and thing.__module__ == module.__name__
    ]
    assert len(structs) > 20
    for struct in structs:
        for name in struct.__struct_fields__:
            assert f"`{name}`" in text, f"{struct.__name__}.{name}"
