"""The embedded ClickHouse server, through the client that the sinks use."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote, urlsplit

import clickhouse_connect
import lz4.frame
import pyarrow
import pytest
from backports import zstd
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError

from app.embedded import clickhouse as server
from app.embedded import process
from app.embedded.clickhouse import BadRequest, decompress, form_fields, parse_statement
from schemas.settings import Settings
from tests.support.services import Services, running_service

COLUMNS = ["id", "name", "cost_us", "at"]
TABLE = """CREATE TABLE items (id UInt64, name String, cost_us Nullable(Int64), at DateTime64(3, 'UTC'))
    ENGINE = MergeTree ORDER BY id"""
NASTY = "a'b\\c\td\n{x:String} é \u2028 `\"--"


@pytest.fixture
def items(clickhouse: Client) -> Client:
    """A client whose database has one empty table, `items`."""
    clickhouse.command(TABLE)
    return clickhouse


def connect(settings: Settings, **options: object) -> Client:
    """Another client, in the test's database."""
    port = urlsplit(settings.clickhouse).port
    return clickhouse_connect.get_client(
        host="127.0.0.1", port=port, database=settings.clickhouse_database, **options
    )


def count(client: Client) -> int:
    """How many rows the table has."""
    return int(client.query("SELECT count() FROM items").first_row[0])


@pytest.mark.parametrize("compress", [False, "lz4", "zstd", "gzip"])
def test_every_row_of_an_insert_arrives(items: Client, settings: Settings, compress: bool | str) -> None:
    """A large insert, which the client sends in several compressed frames, is stored to the last row."""
    client = connect(settings, compress=compress)
    at = datetime(2026, 1, 1, 0, 0, 0, 123_000, tzinfo=UTC)
    summary = client.insert("items", [[n, NASTY, None, at] for n in range(80_000)], column_names=COLUMNS)
    assert summary.written_rows == 80_000
    assert items.query("SELECT count(), uniqExact(id), any(name), any(at) FROM items").first_row == (
        80_000,
        80_000,
        NASTY,
        at.replace(tzinfo=None),  # The client leaves UTC unsaid.
    )


def test_arrow_goes_in_and_comes_out(items: Client) -> None:
    """Arrow tables are a way in and a way out."""
    table = pyarrow.table({"id": pyarrow.array(range(70_000), pyarrow.uint64()), "name": [NASTY] * 70_000})
    assert items.insert_arrow("items", table).written_rows == 70_000
    back = items.query_arrow("SELECT id, name FROM items ORDER BY id", use_strings=True)
    assert back.to_pydict() == table.to_pydict()


def test_raw_lines_go_in(items: Client) -> None:
    """JSONEachRow bytes are inserted as they are, with settings in the URL, compressed or not."""
    explicit = {"async_insert": 0, "insert_deduplicate": 0, "max_partitions_per_insert_block": 0}
    line = b'{"id": 1, "name": "caf\\u00e9 \\u0000", "cost_us": null, "at": "2026-01-01 00:00:00.123"}\n'
    items.raw_insert("items", COLUMNS, line, fmt="JSONEachRow", settings=explicit)
    packed = lz4.frame.compress(b'{"id": 2}\n') + lz4.frame.compress(b'{"id": 3}\n')
    summary = items.raw_insert("items", ["id"], packed, fmt="JSONEachRow", compression="lz4")
    assert summary.written_rows == 2
    rows = items.query("SELECT id, name, cost_us FROM items ORDER BY id").result_rows
    assert rows == [(1, "café \x00", None), (2, "", None), (3, "", None)]


def test_query_parameters_keep_every_character(clickhouse: Client) -> None:
    """Parameters of the server arrive unchanged, in the URL and, when they are long, in a form."""
    query = "SELECT {text:String}, {many:Array(Int64)}, {at:DateTime64(3, 'UTC')}, {no:Nullable(String)}"
    for text in (NASTY, NASTY * 5_000):
        values = {"text": text, "many": [1, -2], "at": datetime(2026, 1, 1, tzinfo=UTC), "no": None}
        assert clickhouse.query(query, parameters=values).first_row == (
            text,
            [1, -2],
            datetime(2026, 1, 1),
            None,
        )


def test_results_stream(clickhouse: Client) -> None:
    """A large result arrives block by block, and raw in any format."""
    with clickhouse.query_row_block_stream("SELECT number FROM numbers(300000)") as blocks:
        sizes = [len(block) for block in blocks]
    assert sum(sizes) == 300_000
    assert len(sizes) > 1
    assert clickhouse.raw_stream("SELECT number FROM numbers(3)", fmt="CSV").read() == b"0\n1\n2\n"


def test_an_error_in_the_middle_of_a_stream_is_an_error(clickhouse: Client) -> None:
    """A result that breaks off never looks complete."""
    query = "SELECT throwIf(number = 250000) FROM numbers(300000)"
    with pytest.raises(ClickHouseError), clickhouse.query_row_block_stream(query) as blocks:
        for _ in blocks:
            pass


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("SELECT * FROM missing", 60),
        ("SELEC 1", 62),
        ("SELECT throwIf(1)", 395),
        ("SELECT 1 SETTINGS no_such_setting = 1", 115),
        ("INSERT INTO items (id) VALUES ('x')", 6),
    ],
)
def test_errors_carry_their_code(items: Client, statement: str, code: int) -> None:
    """What the engine refuses reaches the client with ClickHouse's number and words."""
    with pytest.raises(DatabaseError, match="DB::Exception") as caught:
        items.command(statement)
    assert caught.value.code == code


def test_a_refused_insert_leaves_nothing(items: Client) -> None:
    """An insert with a bad row stores none of its rows."""
    with pytest.raises(DatabaseError) as caught:
        items.raw_insert("items", ["id"], b'{"id": 1}\n{"id": "x"}\n', fmt="JSONEachRow")
    assert caught.value.code == 27
    assert count(items) == 0


def test_results_without_rows_keep_their_shape(items: Client) -> None:
    """No rows is a result, and a statement without a result is none."""
    assert items.query("SELECT id FROM items").result_rows == []
    assert items.query("SELECT id, name FROM items LIMIT 0").column_names == ("id", "name")
    assert items.command("SELECT name FROM items") == ""
    assert items.command("EXISTS TABLE items") == 1
    assert items.raw_query("SELECT 1 AS one", fmt="JSONEachRow") == b'{"one":1}\n'


def test_settings_and_sessions_do_not_leak(clickhouse: Client, settings: Settings) -> None:
    """A setting holds for its own request, and a session id does no harm."""
    value = "SELECT getSetting('max_block_size')"
    assert clickhouse.query(value, settings={"max_block_size": 1234}).first_row == (1234,)
    assert clickhouse.query(value).first_row != (1234,)
    assert connect(settings, session_id="one").query("SELECT timezone()").first_row == ("UTC",)


def test_clients_work_in_parallel(items: Client, settings: Settings) -> None:
    """Many connections insert and read at once, and each gets its own answers."""

    def work(worker: int) -> list[int]:
        client = connect(settings)
        answers = []
        for step in range(10):
            client.insert("items", [[worker * 100 + step, "", 0, 0]], column_names=COLUMNS)
            answers.append(
                client.query("SELECT {n:Int64}", parameters={"n": worker * 100 + step}).first_row[0]
            )
        return answers

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[w * 100 + s for s in range(10)] for w in range(8)]
    assert count(items) == 80


def test_get_is_read_only(items: Client, services: Services, settings: Settings) -> None:
    """A GET may not write, as on a real server."""
    connection = HTTPConnection(urlsplit(services.clickhouse).netloc)
    statement = f"INSERT INTO {settings.clickhouse_database}.items (id) VALUES (1)"
    connection.request("GET", f"/?query={quote(statement)}")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("X-ClickHouse-Exception-Code")) == (403, "164")
    answer.read()
    # The connection goes on after an error.
    connection.request("GET", "/ping")
    assert connection.getresponse().read() == b"Ok.\n"
    assert count(items) == 0


def test_a_kill_loses_no_answered_insert(tmp_path: Path) -> None:
    """After SIGKILL in the middle of inserts, the same directory has every row that was answered."""
    port = process.free_port()
    service = server.service(tmp_path / "data", port)
    child = process.start(service, tmp_path / "log")
    try:
        client = clickhouse_connect.get_client(host="127.0.0.1", port=port)
        client.command("CREATE DATABASE kept")
        client.command("CREATE TABLE kept.rows (n UInt64) ENGINE = MergeTree ORDER BY n")
        for n in range(30):
            client.insert("rows", [[n]], column_names=["n"], database="kept")
        child.kill()
        child.wait()
        with pytest.raises(ClickHouseError):
            client.insert("rows", [[30]], column_names=["n"], database="kept", column_type_names=["UInt64"])
    finally:
        process.stop(child, deadline_s=0)
    with running_service(service, tmp_path / "log"):
        client = clickhouse_connect.get_client(host="127.0.0.1", port=port)
        assert client.query("SELECT count(), sum(n) FROM kept.rows").first_row == (30, sum(range(30)))


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    """A second server on the same directory ends with one line, and does not disturb the first."""
    first = server.service(tmp_path / "data", process.free_port())
    with running_service(first, tmp_path / "log"):
        second = server.service(tmp_path / "data", process.free_port(frozenset({first.port})))
        with pytest.raises(process.ServiceError, match="clickhouse ended at its start"):
            process.start(second, tmp_path / "second.log")
        assert first.healthy()


@pytest.mark.parametrize(
    ("text", "verb", "inline_format", "data"),
    [
        (b"SELECT 1", b"SELECT", None, b""),
        (b"-- why\n/* INSERT */ select 'FORMAT Native'", b"SELECT", None, b""),
        (b"INSERT INTO t FORMAT Native\n\x00\xff'", b"INSERT", "Native", b"\x00\xff'"),
        (b"insert into t (`FORMAT`, values) format JSONEachRow {}", b"INSERT", "JSONEachRow", b"{}"),
        (b"INSERT INTO t SETTINGS a = 1 FORMAT CSV \r\n\n1", b"INSERT", "CSV", b"\n1"),
        (b"INSERT INTO t VALUES (1, 'FORMAT CSV')", b"INSERT", None, b""),
        (b"INSERT INTO t SELECT 1 FORMAT Null", b"INSERT", None, b""),
        (b"INSERT INTO t FORMAT", b"INSERT", None, b""),
    ],
)
def test_inline_data_is_cut_where_it_begins(
    text: bytes, verb: bytes, inline_format: str | None, data: bytes
) -> None:
    """An INSERT's data starts after its FORMAT clause, wherever that word occurs otherwise."""
    statement = parse_statement(text)
    assert (statement.verb, statement.inline_format, statement.data) == (verb, inline_format, data)


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("lz4", lz4.frame.compress),
        ("zstd", zstd.compress),
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
    ],
)
def test_decompression_takes_all_or_refuses(encoding: str, compress: Callable[[bytes], bytes]) -> None:
    """Several frames in a row are one body; a cut or spoilt one is refused, never taken in part."""
    packed = compress(b"a" * 100_000) + compress(b"b")
    assert decompress(packed, encoding) == b"a" * 100_000 + b"b"
    for broken in (packed[:-1], packed + b"junk", b"junk"):
        with pytest.raises(BadRequest):
            decompress(broken, encoding)


def test_form_fields_keep_their_line_ends() -> None:
    """A form's text is taken as it is, and a file in it is refused."""
    body = b'--x\r\nContent-Disposition: form-data; name="query"\r\n\r\nSELECT 1\r\n\n--y\r\n--x--\r\n'
    assert list(form_fields(body, b"x")) == [("query", "SELECT 1\r\n\n--y")]
    with pytest.raises(BadRequest):
        list(form_fields(body.replace(b'"query"', b'"t"; filename="t"'), b"x"))
