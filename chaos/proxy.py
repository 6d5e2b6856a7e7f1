"""An HTTP proxy in front of ClickHouse that can be slow, refuse, or take a request and never answer it.

A cut answer is the worst of them: the rows are stored, and the client does not know.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

from app.embedded.process import LOOPBACK

PASS, SLOW, ERRORS, CUT = "pass", "slow", "errors", "cut"
SLOW_S = 1.5
TROUBLED_SHARE = 0.7
"""Of the requests meanwhile; the others get through, so that work is done by halves."""
UPSTREAM_TIMEOUT_S = 150.0
_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "content-length", "keep-alive", "host"})
_ANSWERS = (
    (500, "241", b"Code: 241. DB::Exception: (total) memory limit exceeded. (MEMORY_LIMIT_EXCEEDED)\n"),
    (
        500,
        "243",
        b"Code: 243. DB::Exception: Cannot reserve 1.00 MiB, not enough space. (NOT_ENOUGH_SPACE)\n",
    ),
    (503, "", b"upstream connect error\n"),
)


class ClickHouseProxy:
    """Listens on a loopback port of its own; `mode` is how it behaves from now on. Threads of its own."""

    def __init__(self, upstream_port: int, seed: str) -> None:
        self.mode = PASS
        self.troubled = 0
        """Requests that were not simply passed on."""
        self._rng = Random(seed)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                proxy._handle(self, upstream_port)

            do_GET = do_POST

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing: whoever calls knows what it got."""

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, request: BaseHTTPRequestHandler, upstream_port: int) -> None:
        mode = self.mode if self._rng.random() < TROUBLED_SHARE else PASS
        self.troubled += mode != PASS
        body = _body(request)
        if mode == ERRORS:
            status, code, text = self._rng.choice(_ANSWERS)
            _answer(request, status, {"X-ClickHouse-Exception-Code": code} if code else {}, text)
            return
        if mode == SLOW:
            time.sleep(SLOW_S)
        try:
            upstream = HTTPConnection(LOOPBACK, upstream_port, timeout=UPSTREAM_TIMEOUT_S)
            headers = {
                name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP
            }
            upstream.request(request.command, request.path, body=body, headers=headers)
            answer = upstream.getresponse()
            text = answer.read()
            upstream.close()
        except (OSError, HTTPException):
            # ClickHouse itself is away: the client sees a connection that breaks.
            _cut(request)
            return
        if mode == CUT:
            _cut(request)
            return
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
        _answer(request, answer.status, kept, text)


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in request.headers.get("Transfer-Encoding", "").lower():
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    parts = []
    while size := int(request.rfile.readline().split(b";")[0] or b"0", 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    while request.rfile.readline().strip():
        pass
    return b"".join(parts)


def _answer(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], text: bytes) -> None:
    with suppress(OSError):
        request.send_response_only(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)


def _cut(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    with suppress(OSError):
        request.connection.shutdown(socket.SHUT_RDWR)
