"""The numbered migration files: their form, and the rules by which they are applied. No server is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.migrate import (
    MIGRATIONS,
    Applied,
    Migration,
    MigrationError,
    load_migrations,
    pending_migrations,
)

COMMENT_OR_TEXT = re.compile(r"--[^\n]*|'(?:[^'\\]|\\.)*'")


def migration(version: int, sha256: str = "aa") -> Migration:
    """A migration that does nothing in particular."""
    return Migration(version, f"step_{version}", sha256, "SELECT 1")


def applied(version: int, sha256: str = "aa", name: str | None = None) -> Applied:
    """The record of one that was applied."""
    return Applied(version, name or f"step_{version}", sha256)


def test_files_are_numbered_from_one_without_gaps() -> None:
    """The shipped files load, in order."""
    migrations = load_migrations()
    assert [one.version for one in migrations] == list(range(1, len(migrations) + 1))
    assert len(migrations) == len(list(MIGRATIONS.iterdir())), "something else lies among the migrations"


@pytest.mark.parametrize("one", load_migrations(), ids=lambda one: one.name)
def test_each_file_is_one_statement_that_may_run_again(one: Migration) -> None:
    """One statement, idempotent, that names the database everywhere and grows nothing behind a table."""
    code = COMMENT_OR_TEXT.sub("", one.statement)
    assert ";" not in code
    assert re.match(
        r"\s*(CREATE (TABLE IF NOT EXISTS|VIEW IF NOT EXISTS|OR REPLACE VIEW) \{database\}\."
        r"|ALTER TABLE \{database\}\.[a-z_]+\s+"
        r"(ADD (COLUMN|INDEX) IF NOT EXISTS|MATERIALIZE INDEX IF EXISTS) )",
        code,
    )
    assert "MATERIALIZED VIEW" not in code.upper()
    assert not re.search(r"\b(?:FROM|JOIN)\s+(?!\{database\}\.|\()\w", code)
    assert "Float" not in code and "float" not in code


@pytest.mark.parametrize("one", load_migrations(), ids=lambda one: one.name)
def test_each_table_replaces_by_identity(one: Migration) -> None:
    """Tables are ReplacingMergeTree with an explicit partition key, and say what they are."""
    if "CREATE TABLE" not in one.statement:
        return
    assert re.search(r"^ENGINE = ReplacingMergeTree\b", one.statement, re.MULTILINE)
    assert re.search(r"^PARTITION BY ", one.statement, re.MULTILINE)
    assert re.search(r"^ORDER BY ", one.statement, re.MULTILINE)
    assert re.search(r"^COMMENT '", one.statement, re.MULTILINE)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0001_a.sql", "0003_b.sql"], "migration 0003_b.sql: expected number 0002"),
        (["0001_a.sql", "0001_b.sql"], "migration 0001_b.sql: expected number 0002"),
        (["0002_a.sql"], "migration 0002_a.sql: expected number 0001"),
        (["1_a.sql"], "migration 1_a.sql: the name must be"),
        (["0001_A.sql"], "migration 0001_A.sql: the name must be"),
        ([], "no migrations in"),
    ],
)
def test_wrong_numbering_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    """Gaps, twins and other names are one clear line."""
    for name in names:
        (tmp_path / name).write_text("SELECT 1")
    with pytest.raises(MigrationError, match=re.escape(message)):
        load_migrations(tmp_path)


def test_what_is_not_applied_is_pending() -> None:
    """Nothing, some or all may have been applied before."""
    migrations = [migration(1), migration(2), migration(3)]
    assert pending_migrations(migrations, []) == migrations
    assert pending_migrations(migrations, [applied(2), applied(1)]) == migrations[2:]
    assert pending_migrations(migrations, [applied(1), applied(2), applied(3)]) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([applied(1), applied(2, "bb")], "migration 0002_step_2 was changed after it was applied"),
        ([applied(1), applied(2, name="other")], "migration 0002_other was changed after it was applied"),
        ([applied(1), applied(1, "bb")], "migration 0001_step_1 was changed after it was applied"),
        ([applied(1), applied(2), applied(3)], "migration 0003_step_3 was applied by a newer program"),
        ([applied(2)], "migration 0001 is not recorded as applied, but later ones are"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(record: list[Applied], message: str) -> None:
    """A changed file, a newer database and a hole in the record are one clear line each."""
    with pytest.raises(MigrationError, match=re.escape(message)) as caught:
        pending_migrations([migration(1), migration(2)], record)
    assert "\n" not in str(caught.value)
