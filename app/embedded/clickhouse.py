"""ClickHouse's HTTP interface over chDB, the ClickHouse engine in process.

For development and tests only: loopback, no users, no TLS. It exists because one process at a time may open a
chDB directory, while the flows, the CLI and the tests all need it, through the client that they also use
against a real server (clickhouse-connect). What it answers:

* `GET /ping`; queries in the URL (`query`), in the body or in a form, `param_*`, settings, `database`, any
  FORMAT, streamed unless the client asks to wait for the end; inserts with inline data in any format, with
  `Content-Encoding` lz4, zstd, gzip or deflate; `X-ClickHouse-Summary`, `-Query-Id`, `-Format`,
  `-Exception-Code`. GET is read-only.
* Not here: response compression, external tables, sessions (`session_id` is accepted and means nothing).

Every request gets its own connection to the engine (0.2 ms), so settings and the current database never leak
from one to another. The engine runs them in parallel and holds no Python lock meanwhile.

An INSERT is answered when its part is written: SIGKILL loses nothing that was answered. It does not survive a
power failure for certain, because parts are not fsynced.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import lz4.frame  # type: ignore[import-untyped]
from backports import zstd

from app.embedded.process import LOOPBACK, Service, package

MAX_BODY_BYTES = 1 << 30

_NOT_SETTINGS = frozenset(
    {
        "query",
        "database",
        "user",
        "password",
        "session_id",
        "session_timeout",
        "session_check",
        "query_id",
        "quota_key",
        "default_format",
        "wait_end_of_query",
        "buffer_size",
        "compress",
        "decompress",
        "client_protocol_version",
        "role",
        "close_session",
        "stacktrace",
    }
)
"""URL parameters that the HTTP interface itself takes; every other one is a setting of the engine."""

_STREAMED_FORMATS = frozenset({"native", "tabseparated", "tsv", "csv", "rowbinary", "jsoneachrow"})
"""Formats without header and footer: the engine's blocks, each encoded alone, make one valid stream."""

_TOKEN = re.compile(
    rb"""\s+ | --[^\n]* | /\*.*?\*/
    | '(?:[^'\\]|\\.|'')*' | "(?:[^"\\]|\\.|"")*" | `(?:[^`\\]|\\.|``)*`
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*) | .""",
    re.DOTALL | re.VERBOSE,
)
_TRAILING_FORMAT = re.compile(rb"\bFORMAT\s+(\w+)(?:\s+SETTINGS\b[^'\"]*)?[\s;]*$", re.IGNORECASE)
_ANSWERING = frozenset({b"SELECT", b"WITH", b"SHOW", b"DESCRIBE", b"DESC", b"EXISTS", b"EXPLAIN", b"FROM"})
_STREAMABLE = frozenset({b"SELECT", b"WITH", b"FROM"})
_ERROR = re.compile(
    r"Code: (?P<code>\d+)\. .*?(?:\((?P<name>[A-Z][A-Z0-9_]+)\))?(?: \(version [^)]*\))?\s*$", re.DOTALL
)


def service(directory: Path, port: int) -> Service:
    """The server as a child process, with its data in `directory` (made if missing), on a loopback port."""
    directory.mkdir(parents=True, exist_ok=True)
    return Service(
        name="clickhouse",
        argv=(
            sys.executable,
            "-m",
            "app.embedded.clickhouse",
            "--dir",
            str(directory),
            "--port",
            str(port),
        ),
        port=port,
        healthy=lambda: clickhouse_answers(port),
        # The engine takes the host's time zone, and results without an explicit zone would follow it.
        environment={"TZ": "UTC"},
    )


def clickhouse_answers(port: int) -> bool:
    """Whether the server on the loopback port runs a query; blocks for at most 2 s."""
    connection = HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", "/?query=SELECT%201")
        return connection.getresponse().read() == b"1\n"
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


class BadRequest(Exception):
    """The request is not one that this server understands; answered with the given HTTP status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Statement:
    """One SQL statement, cut where the engine needs it cut.

    `inline_format` is set for an INSERT that carries its data: `sql` then ends before FORMAT, and `data` is
    what follows it.
    """

    sql: bytes
    verb: bytes
    output_format: str
    inline_format: str | None = None
    data: bytes = b""

    @property
    def answers(self) -> bool:
        """Whether it produces a result set, be it an empty one."""
        return self.verb in _ANSWERING

    @property
    def streamable(self) -> bool:
        return self.verb in _STREAMABLE and self.output_format.lower() in _STREAMED_FORMATS


def parse_statement(text: bytes, default_format: str = "TabSeparated") -> Statement:
    """Find the statement's verb and its FORMAT. `text` may end in the binary data of an INSERT."""
    words = _words(text)
    verb = next(words, (b"", 0, 0))[0]
    if verb != b"INSERT":
        named = _TRAILING_FORMAT.search(text)
        return Statement(text, verb, named[1].decode() if named else default_format)
    for word, start, _ in words:
        if word in (b"SELECT", b"WITH", b"VALUES", b"INFILE"):
            break  # The rest is SQL, which the engine reads itself.
        if word == b"FORMAT" and (following := next(words, None)):
            _, name_start, name_end = following
            return Statement(
                sql=text[:start],
                verb=verb,
                output_format=default_format,
                inline_format=text[name_start:name_end].decode(),
                data=_after_format(text, name_end),
            )
    return Statement(text, verb, default_format)


def _words(text: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The bare words outside of parentheses, in upper case, with where each starts and ends."""
    depth = 0
    position = 0
    while match := _TOKEN.match(text, position):
        position = match.end()
        if match[0] in (b"(", b")"):
            depth += 1 if match[0] == b"(" else -1
        elif match["word"] and not depth:
            yield match["word"].upper(), match.start(), match.end()


def _after_format(text: bytes, position: int) -> bytes:
    """Data begins after the spaces and one line end that follow the format's name, as ClickHouse has it."""
    while text[position : position + 1] in (b" ", b"\t", b"\f"):
        position += 1
    if text[position : position + 1] == b"\r":
        position += 1
    if text[position : position + 1] == b"\n":
        position += 1
    return text[position:]


def _before_settings(sql: bytes) -> tuple[bytes, bytes]:
    """An INSERT cut before its SETTINGS, which the engine wants behind INFILE."""
    for word, start, _ in _words(sql):
        if word == b"SETTINGS":
            return sql[:start], sql[start:]
    return sql, b""


@contextmanager
def _readable(data: bytes) -> Iterator[str]:
    """A path under which the engine, in this process, can read the data; gone afterwards."""
    descriptor = os.memfd_create("insert")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


class Engine:
    """The chDB directory. Raises RuntimeError when another process has it open."""

    def __init__(self, directory: Path) -> None:
        chdb = package("chdb")
        self._open: Callable[[], Any] = lambda: chdb.connect(str(directory))
        # Held for as long as the process lives: the engine closes the directory with its last connection.
        self._root = self._open()

    def connect(self, parameters: dict[str, str], read_only: bool) -> Any:
        """A connection with the request's database, settings and query parameters. Raises RuntimeError."""
        connection = self._open()
        try:
            if database := parameters.get("database"):
                connection.query("USE `" + database.replace("\\", "\\\\").replace("`", "\\`") + "`", "Null")
            changes = [
                f"{_setting_name(name)} = {_quoted(value)}"
                for name, value in parameters.items()
                if name not in _NOT_SETTINGS
            ]
            if changes:
                connection.query("SET " + ", ".join(changes), "Null")
            if read_only:
                connection.query("SET readonly = 2", "Null")
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        self._root.close()


def _setting_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise BadRequest(HTTPStatus.BAD_REQUEST, f"{name!r} is neither a parameter nor a setting")
    return name


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


class Handler(BaseHTTPRequestHandler):
    """One connection; requests follow each other on it."""

    protocol_version = "HTTP/1.1"
    # Otherwise the kernel may hold back the last piece of an answer for 40 ms.
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: Server

    def do_GET(self) -> None:
        self._serve(read_only=True)

    def do_POST(self) -> None:
        self._serve(read_only=False)

    def log_message(self, format: str, *args: object) -> None:
        """No access log: at 10 requests a second it would be all that the log says."""

    def _serve(self, read_only: bool) -> None:
        self._parameters: dict[str, str] = {}
        try:
            # The body is read first, whatever is wrong: the next request starts where it ends.
            body = self._body()
            url = urlsplit(self.path)
            if url.path in ("/ping", "/replicas_status"):
                return self._answer(b"Ok.\n")
            if url.path not in ("/", ""):
                raise BadRequest(HTTPStatus.NOT_FOUND, f"there is no handle {url.path}")
            self._parameters = dict(parse_qsl(url.query, keep_blank_values=True))
            if self.headers.get_content_type() == "multipart/form-data":
                body = self._take_form(body)
            query = self._parameters.get("query", "").encode()
            text = query + b"\n" + body if query and body else query or body
            if not text.strip():
                return self._answer(b"Ok.\n")
            self._run(
                parse_statement(text, self._parameters.get("default_format", "TabSeparated")), read_only
            )
        except BadRequest as problem:
            self._answer(f"{problem}\n".encode(), problem.status)
        except RuntimeError as problem:
            self._fail(str(problem))
        except ConnectionError:
            self.close_connection = True

    def _run(self, statement: Statement, read_only: bool) -> None:
        connection = self.server.engine.connect(self._parameters, read_only)
        try:
            if statement.inline_format is not None:
                self._insert(connection, statement, statement.inline_format)
            elif statement.streamable and self._parameters.get("wait_end_of_query") != "1":
                self._stream(connection, statement)
            else:
                result = connection.query(statement.sql, statement.output_format)
                summary = {"read_rows": result.rows_read(), "read_bytes": result.bytes_read()}
                self._answer(result.bytes() or b"", headers=self._result_headers(statement, summary))
        finally:
            connection.close()

    def _insert(self, connection: Any, statement: Statement, data_format: str) -> None:
        # Through a file, not through the engine's own streaming insert: that one says nothing of what fails when
        # the part is written, such as a full disk, and the rows would be lost with an answer that they are stored.
        with _readable(statement.data) as path:
            head, settings = _before_settings(statement.sql)
            source = f" FROM INFILE '{path}' ".encode()
            query = head + source + settings + f" FORMAT {data_format}".encode()
            written = connection.query(query.decode(), "Null")
        summary = {"written_rows": written.rows_written(), "written_bytes": written.bytes_written()}
        self._answer(b"", headers=self._result_headers(statement, summary))

    def _stream(self, connection: Any, statement: Statement) -> None:
        chunks = (chunk.bytes() for chunk in connection.send_query(statement.sql, statement.output_format))
        # An error before the first rows still gets its HTTP status.
        first = next(chunks, b"")
        self.send_response(HTTPStatus.OK)
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in self._result_headers(statement, {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self._write_chunk(first)
            for chunk in chunks:
                self._write_chunk(chunk)
        except RuntimeError as problem:
            # Too late for a status: an unfinished body is what tells the client that rows are missing.
            self.log_error_line(str(problem))
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")

    def _write_chunk(self, chunk: bytes) -> None:
        if chunk:
            self.wfile.write(b"%x\r\n" % len(chunk) + chunk + b"\r\n")

    def _result_headers(self, statement: Statement, summary: dict[str, int]) -> dict[str, str]:
        headers = {
            "X-ClickHouse-Query-Id": self._parameters.get("query_id", ""),
            "X-ClickHouse-Timezone": "UTC",
            "X-ClickHouse-Summary": json.dumps({name: str(value) for name, value in summary.items()}),
        }
        if statement.answers:
            headers["X-ClickHouse-Format"] = statement.output_format
        return headers

    def _fail(self, message: str) -> None:
        """Answer an engine's error as ClickHouse does: the code in a header, the text in the body."""
        message = message[max(message.find("Code: "), 0) :].strip()
        match = _ERROR.match(message)
        name = (match and match["name"]) or ""
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        if name.startswith("UNKNOWN_"):
            status = HTTPStatus.NOT_FOUND
        elif name == "READONLY":
            status = HTTPStatus.FORBIDDEN
        headers = {"X-ClickHouse-Query-Id": self._parameters.get("query_id", "")}
        headers["X-ClickHouse-Exception-Code"] = match["code"] if match else "1002"
        self._answer(message.encode() + b"\n", status, headers)

    def _answer(
        self, body: bytes, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            # A header is one line of Latin-1, and a query id is the client's own text.
            self.send_header(name, re.sub(r"[^\x20-\x7e]", "?", value))
        self.end_headers()
        self.wfile.write(body)

    def log_error_line(self, message: str) -> None:
        sys.stderr.write(" ".join(message.split())[:500] + "\n")
        sys.stderr.flush()

    # --- reading the request ------------------------------------------------------------------------------

    def _body(self) -> bytes:
        """The request's body, whole and decompressed. Raises BadRequest."""
        try:
            raw = self._raw_body()
        except (ValueError, BadRequest) as problem:
            # Where the next request would start is unknown now.
            self.close_connection = True
            if isinstance(problem, BadRequest):
                raise
            raise BadRequest(HTTPStatus.BAD_REQUEST, "malformed length or chunk") from None
        encoding = self.headers.get("Content-Encoding", "identity").strip().lower()
        if not raw or encoding in ("identity", ""):
            return raw
        return decompress(raw, encoding)

    def _raw_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        length = int(self.headers.get("Content-Length", "0"))
        if not 0 <= length <= MAX_BODY_BYTES:
            raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY_BYTES} bytes")
        return self._exactly(length)

    def _chunks(self) -> Iterator[bytes]:
        total = 0
        while length := int(self.rfile.readline(64).split(b";")[0], 16):
            total += length
            if length < 0 or total > MAX_BODY_BYTES:
                raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY_BYTES} bytes")
            yield self._exactly(length)
            self.rfile.readline(64)
        while self.rfile.readline(4096).strip():
            pass

    def _exactly(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the client went away in the middle of a request")
        return data

    def _take_form(self, body: bytes) -> bytes:
        """Move the form's text fields to the parameters; clients use it when the URL would grow too long."""
        boundary = self.headers.get_boundary()
        if not boundary:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "a form without a boundary")
        for name, value in form_fields(body, boundary.encode()):
            self._parameters[name] = value
        return b""


def form_fields(body: bytes, boundary: bytes) -> Iterator[tuple[str, str]]:
    """Names and values of a multipart form's text fields. Raises BadRequest for files and binary text."""
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        name = re.search(rb'\bname="([^"]*)"', head)
        if name is None or b"filename=" in head:
            raise BadRequest(HTTPStatus.NOT_IMPLEMENTED, "external tables are not supported here")
        try:
            yield name[1].decode(), value.decode()
        except UnicodeDecodeError:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "a form field that is not UTF-8") from None


def decompress(data: bytes, encoding: str) -> bytes:
    """The body that a Content-Encoding packed. Raises BadRequest when it is unknown or does not fit the data.

    A body may be several compressed frames in a row: clickhouse-connect makes one of every block of rows.
    """
    decoders: dict[str, Callable[[], Any]] = {
        "lz4": lz4.frame.LZ4FrameDecompressor,
        "zstd": zstd.ZstdDecompressor,
        "gzip": lambda: zlib.decompressobj(wbits=31),
        "deflate": zlib.decompressobj,
    }
    if encoding not in decoders:
        raise BadRequest(HTTPStatus.NOT_IMPLEMENTED, f"unknown Content-Encoding {encoding}")
    frames = []
    try:
        while data:
            decoder = decoders[encoding]()
            frames.append(decoder.decompress(data))
            if not decoder.eof:
                raise EOFError("it ends too early")
            data = decoder.unused_data or b""
    except (RuntimeError, OSError, EOFError, zlib.error, zstd.ZstdError) as problem:
        raise BadRequest(HTTPStatus.BAD_REQUEST, f"the body is not {encoding}: {problem}") from None
    return b"".join(frames)


class Server(ThreadingHTTPServer):
    """One thread per connection; open ones do not keep the process from ending."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, engine: Engine, port: int) -> None:
        self.engine = engine
        super().__init__((LOOPBACK, port), Handler)


def main() -> int:
    """Serve until SIGTERM or SIGINT. Exit code 1, and one line, when the directory or the port is taken."""
    parser = argparse.ArgumentParser(prog="python -m app.embedded.clickhouse")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    try:
        engine = Engine(arguments.dir)
        server = Server(engine, arguments.port)
    except (RuntimeError, OSError) as problem:
        sys.stderr.write(f"clickhouse: {' '.join(str(problem).split())}\n")
        return 1
    # After the engine's start: it installs handlers of its own.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    with suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=3600)
    server.server_close()
    engine.close()
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
