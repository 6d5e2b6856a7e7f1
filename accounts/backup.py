"""Backup and restore of the accounts database, from either database into either.

A backup is a text file: a line about the whole, a line for each row, a last line with the counts and a
checksum. Rows come in the order of their keys, so two backups of the same state have the same rows in the
same order.

Laws:
- A backup is one state: everything is read in one snapshot, while writers go on. The file appears under its
  name only when it is complete and on disk; nobody but its owner may read it.
- A restore goes into an empty database only, and looks at the whole file before it writes anything. All rows are
  written in one transaction: a crash leaves a database without rows, into which the same restore may be repeated.
- The schema is first made as the backup had it, filled, and then migrated to today's.
- What is sealed stays sealed: the file is of no use without METERING_ACCOUNTS_SECRET, and so is a restore
  with another one, which is refused. Keep the secret elsewhere than the backup.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, MetaData, String, Table, delete, func, insert, select, text

from accounts.database import Database
from accounts.errors import DatabaseUnfit
from accounts.migrate import current_revision, head_revision, known_revisions, migrate, migrate_down
from accounts.secrets import Secrets, require_fingerprint

FORMAT = "lingua-metering accounts backup"
VERSION = 1
ALEMBIC_TABLE = "alembic_version"
META_TABLE = "meta"
CHUNK = 500


class BackupError(Exception):
    """A file cannot be written, or is no whole backup; one line, to be shown as it is."""


def back_up(database: Database, file: Path, secrets: Secrets, made_at: str) -> dict[str, int]:
    """Write a backup into a new file; rows by table. Raises BackupError and DatabaseUnfit."""
    if file.exists():
        raise BackupError(f"{file} exists; a backup is written into a new file")
    revision = current_revision(database)
    if revision is None:
        raise DatabaseUnfit("the accounts database is empty: there is nothing to back up")
    aside = file.with_name(file.name + ".new")
    counts: Counter[str] = Counter()
    digest = sha256()
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as out, database.snapshot() as connection:

            def write(document: dict[str, Any]) -> None:
                line = _line(document)
                digest.update(line)
                out.write(line)

            write(
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "revision": revision,
                    "secret_fingerprint": secrets.fingerprint,
                    "made_at": made_at,
                }
            )
            for table in _tables(connection):
                for row in _rows(connection, table):
                    write({"table": table.name, "row": row})
                    counts[table.name] += 1
            out.write(_line({"end": True, "rows": counts, "sha256": digest.hexdigest()}))
            out.flush()
            os.fsync(out.fileno())
        aside.rename(file)
        _sync_directory(file.parent)
    except OSError as error:
        raise BackupError(f"{file}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return dict(counts)


def restore(database: Database, file: Path, secrets: Secrets) -> dict[str, int]:
    """Fill an empty database from a backup; rows by table.

    Raises BackupError for a file that is no whole backup, DatabaseUnfit when the database is not empty or the
    secret is another one; then nothing was written.
    """
    head, expected = _check(file)
    require_fingerprint(str(head["secret_fingerprint"]), secrets)
    revision = str(head["revision"])
    if revision not in known_revisions():
        raise BackupError(f"{file}: was made by a newer program (revision {revision})")
    _require_empty(database)
    # Without a row in it, the schema may be made anew.
    if current_revision(database) is not None:
        migrate_down(database)
    migrate(database, revision)
    with database.engine.execution_options(writer=True).begin() as connection:
        _fill(connection, file)
        tables = _tables(connection)
        found = {table.name: _count(connection, table) for table in tables}
        if {name: count for name, count in found.items() if count} != expected:
            raise BackupError(f"{file}: {found} rows were written, {expected} were expected")
        if not database.is_sqlite:
            for table in tables:
                _go_on_counting(connection, table)
    migrate(database, head_revision())
    return expected


def _check(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The first line and the counts, when the file is whole."""
    digest = sha256()
    head: dict[str, Any] | None = None
    counts: Counter[str] = Counter()
    for line, document in _documents(file):
        if head is None:
            if document.get("format") != FORMAT or document.get("version") != VERSION:
                raise BackupError(f"{file}: is no backup that this program reads")
            head = document
        elif document.get("end"):
            if document["rows"] != dict(counts) or document["sha256"] != digest.hexdigest():
                raise BackupError(f"{file}: does not match its checksum")
            return head, dict(counts)
        else:
            counts[document["table"]] += 1
        digest.update(line)
    raise BackupError(f"{file}: ends too early; it is no whole backup")


def _documents(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    document = json.loads(line)
                except ValueError:
                    raise BackupError(f"{file}: line {number} is not JSON") from None
                if not isinstance(document, dict):
                    raise BackupError(f"{file}: line {number} is no object")
                yield line, document
    except OSError as error:
        raise BackupError(f"{file}: {error.strerror or error}") from error


def _fill(connection: Connection, file: Path) -> None:
    tables = {table.name: table for table in _tables(connection)}
    connection.execute(delete(tables[META_TABLE]))
    waiting: list[dict[str, Any]] = []
    current: Table | None = None
    for _, document in _documents(file):
        if "table" not in document:
            continue
        table = tables.get(document["table"])
        if table is None:
            raise BackupError(f"{file}: knows a table {document['table']!r} that is not there")
        if current is not None and (table is not current or len(waiting) >= CHUNK):
            connection.execute(insert(current), waiting)
            waiting = []
        current = table
        waiting.append(document["row"])
    if current is not None and waiting:
        connection.execute(insert(current), waiting)


def _require_empty(database: Database) -> None:
    with database.engine.connect() as connection:
        filled = [
            table.name
            for table in _tables(connection)
            if table.name != META_TABLE and _count(connection, table)
        ]
    if filled:
        raise DatabaseUnfit(
            f"the accounts database is not empty ({', '.join(filled)}): restore into an empty one"
        )


def _tables(connection: Connection) -> list[Table]:
    """Every table of ours, each after those that it refers to."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != ALEMBIC_TABLE]


def _rows(connection: Connection, table: Table) -> Iterator[dict[str, Any]]:
    result = connection.execution_options(stream_results=True, yield_per=CHUNK).execute(
        select(table).order_by(*(_byte_order(connection, column) for column in table.primary_key))
    )
    for row in result.mappings():
        yield dict(row)


def _byte_order(connection: Connection, column: Column[Any]) -> Any:
    # PostgreSQL sorts text as people of the server's country do; SQLite by bytes.
    if connection.dialect.name == "postgresql" and isinstance(column.type, String):
        return column.collate("C")
    return column


def _count(connection: Connection, table: Table) -> int:
    return connection.execute(select(func.count()).select_from(table)).scalar_one()


def _go_on_counting(connection: Connection, table: Table) -> None:
    """Rows were written with the numbers they had; the next one must be higher."""
    columns = list(table.primary_key)
    if len(columns) != 1 or isinstance(columns[0].type, String):
        return
    [column] = columns
    connection.execute(
        text(
            "SELECT setval(pg_get_serial_sequence(:table, :column), "
            f"(SELECT coalesce(max({column.name}), 0) + 1 FROM {table.name}), false)"
        ),
        {"table": table.name, "column": column.name},
    )


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
