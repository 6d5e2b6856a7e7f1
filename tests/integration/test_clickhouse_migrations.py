"""Migrations on a real engine: again, side by side, killed after every step, and in the wrong state."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clickhouse_connect.driver.client import Client

from app.migrate import MIGRATIONS, MigrationError, load_migrations, run_migrations
from tests.support import archive
from tests.support.services import Services

NAMES = [f"{one.version:04d}_{one.name}" for one in load_migrations()]


@pytest.fixture
def url(services: Services) -> str:
    """Where ClickHouse is."""
    return services.clickhouse


def objects_of(client: Client, database: str) -> dict[str, str]:
    """Every table and view with its full definition."""
    rows = client.query(
        f"SELECT name, replaceAll(create_table_query, '{database}.', '') FROM system.tables "
        f"WHERE database = '{database}' ORDER BY name"
    ).result_rows
    return {row[0]: row[1] for row in rows}


def copy_of_the_migrations(directory: Path, count: int | None = None) -> Path:
    """The shipped files, or the first `count`, in a directory of their own."""
    directory.mkdir()
    for file in sorted(MIGRATIONS.glob("*.sql"))[:count]:
        shutil.copy(file, directory)
    return directory


class KilledClient:
    """A client whose process dies after some commands: later ones never reach the server."""

    def __init__(self, client: Client, commands: int) -> None:
        self._client = client
        self._commands = commands

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def command(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command, or die."""
        if not self._commands:
            raise KeyboardInterrupt
        self._commands -= 1
        return self._client.command(*args, **kwargs)


def test_everything_is_applied_once(url: str) -> None:
    """The first run applies all files and records them, the second none."""
    client = archive.connect(url, "once")
    assert run_migrations(client, "once") == NAMES
    assert run_migrations(client, "once") == []
    recorded = client.query(
        "SELECT version, name, sha256 FROM schema_migrations ORDER BY version"
    ).result_rows
    assert recorded == [(one.version, one.name, one.sha256) for one in load_migrations()]


def test_new_files_are_applied_on_top(url: str, tmp_path: Path) -> None:
    """A database of an older release gets only what it lacks."""
    older = copy_of_the_migrations(tmp_path / "older", count=6)
    client = archive.connect(url, "older")
    assert run_migrations(client, "older", older) == NAMES[:6]
    assert run_migrations(client, "older") == NAMES[6:]


def test_killed_after_any_command_the_next_run_heals_it(url: str) -> None:
    """Dying after each single command in turn leaves a database that another run completes."""
    whole = archive.connect(url, "whole")
    run_migrations(whole, "whole")
    client = archive.connect(url, "killed")
    # The database and the record of migrations take a command each, then each file one for its effect and one
    # for its record: dying after 3 leaves the effect without the record, dying after 4 leaves one file done.
    for commands in [0, 1, 2, *[3, 4] * (len(NAMES) - 1), 3]:
        with pytest.raises(KeyboardInterrupt):
            run_migrations(KilledClient(client, commands), "killed")  # type: ignore[arg-type]
    assert run_migrations(client, "killed") == NAMES[-1:]
    assert objects_of(client, "killed") == objects_of(whole, "whole")


def test_side_by_side_runs_do_not_break_each_other(url: str) -> None:
    """Four programs that migrate at once all succeed, and the outcome is that of one."""
    clients = [archive.connect(url, "side_by_side") for _ in range(4)]
    with ThreadPoolExecutor(len(clients)) as pool:
        outcomes = list(pool.map(lambda client: run_migrations(client, "side_by_side"), clients))
    assert set().union(*outcomes) == set(NAMES)
    assert run_migrations(clients[0], "side_by_side") == []
    alone = archive.connect(url, "alone")
    run_migrations(alone, "alone")
    assert objects_of(clients[0], "side_by_side") == objects_of(alone, "alone")


def test_a_changed_file_is_refused(url: str, tmp_path: Path) -> None:
    """A file that differs by one byte from what was applied stops everything, with one line."""
    client = archive.connect(url, "changed")
    run_migrations(client, "changed")
    files = copy_of_the_migrations(tmp_path / "changed")
    with (files / "0003_ledger.sql").open("a") as file:
        file.write("\n")
    with pytest.raises(MigrationError, match="migration 0003_ledger was changed after it was applied"):
        run_migrations(client, "changed", files)


def test_a_newer_database_is_refused(url: str, tmp_path: Path) -> None:
    """An older program does not touch what a newer one has migrated."""
    client = archive.connect(url, "newer")
    run_migrations(client, "newer")
    older = copy_of_the_migrations(tmp_path / "older", count=len(NAMES) - 1)
    with pytest.raises(MigrationError, match=f"migration {NAMES[-1]} was applied by a newer program"):
        run_migrations(client, "newer", older)


def test_a_failing_statement_is_one_line_and_not_recorded(url: str, tmp_path: Path) -> None:
    """What fails is named, what came before it stays, and a corrected file goes on from there."""
    files = copy_of_the_migrations(tmp_path / "failing", count=1)
    (files / "0002_broken.sql").write_text("CREATE TABLE IF NOT EXISTS {database}.broken (x Nonsense)")
    client = archive.connect(url, "failing")
    with pytest.raises(MigrationError, match=r"migration 0002_broken failed: .*Nonsense") as caught:
        run_migrations(client, "failing", files)
    assert "\n" not in str(caught.value)
    (files / "0002_broken.sql").write_text(
        "CREATE TABLE IF NOT EXISTS {database}.broken (x Int64) ENGINE = ReplacingMergeTree ORDER BY x"
    )
    assert run_migrations(client, "failing", files) == ["0002_broken"]
