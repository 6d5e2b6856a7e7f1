"""The application: routers, problems, limits on size, metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
from fastapi import FastAPI

from accounts.api import docs, machines, operators, people, problems, requests, service
from accounts.context import Accounts
from accounts.gateway import Gateway
from schemas.topics import MAX_MESSAGE_BYTES
from telemetry import metrics

VERSION = "1"
SWEEP_INTERVAL_S = 300.0

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

TAGS = [
    {"name": "Logging in", "description": "Registering, and access and refresh tokens"},
    {"name": "Me", "description": "What a user sees and changes"},
    {"name": "Nodes", "description": "Credentials of nodes"},
    {"name": "A node itself", "description": "What a node sees and does, with its own token"},
    {"name": "Money", "description": "What became of a money request"},
    {"name": "Operators", "description": "Needs the role `operator`; everything is in the audit log"},
    {"name": "Service", "description": "Health and keys"},
]


def create_app(accounts: Accounts, gateway: Gateway) -> FastAPI:
    """The application over an open domain and gateway; it closes neither."""
    app = FastAPI(
        title="Lingua Metering accounts",
        version=VERSION,
        description=docs.DESCRIPTION,
        openapi_url="/v1/openapi.json",
        # Their pages load scripts from elsewhere; the document is what counts.
        docs_url=None,
        redoc_url=None,
        openapi_tags=TAGS,
        lifespan=_lifespan,
        # One way to name a resource: a trailing slash is another path, and not found.
        redirect_slashes=False,
    )
    app.state.accounts = accounts
    app.state.gateway = gateway
    for module in (people, machines, requests, operators, service):
        app.include_router(module.router)
    problems.install(app)
    docs.install(app)
    app.add_middleware(_Counted)
    app.add_middleware(_Bounded)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    accounts: Accounts = app.state.accounts

    async def sweep() -> None:
        while True:
            await anyio.sleep(SWEEP_INTERVAL_S)
            try:
                await anyio.to_thread.run_sync(accounts.attempts.sweep, accounts.now_ms())
            except Exception as error:
                # The next one will do; what is not swept takes room and nothing else.
                problems.log.warning("attempts were not swept: %s", type(error).__name__)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sweep)
        yield
        tasks.cancel_scope.cancel()


class _Bounded:
    """Refuses bodies of more than 64 KiB, said or sent."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = bytearray(), not said.isdigit() or int(said) <= MAX_MESSAGE_BYTES
        too_large = not more
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_MESSAGE_BYTES:
                too_large, more = True, False
        if too_large:
            answer = problems.problem(
                413, "content-too-large", "Content Too Large", f"a body has at most {MAX_MESSAGE_BYTES} bytes"
            )
            await answer(scope, receive, send)
            return
        await self._app(scope, _replay(bytes(body), receive), send)


def _replay(body: bytes, receive: Receive) -> Receive:
    pending = True

    async def replayed() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


class _Counted:
    """Counts answers by route and status."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                name = f"{scope['method']} {route.path}" if route is not None else "unknown"
                metrics.ACCOUNTS_HTTP.labels(name, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
