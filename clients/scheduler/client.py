"""The admission clients: `Scheduler` for threads, `AsyncScheduler` for asyncio. They share all but the I/O.

Neither connects before its first call. The deadline of a call covers waiting for a connection, connecting, every
attempt and every pause; only a slow name server can make a blocking call longer, so give an address, or a name that
resolves at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from types import TracebackType
from typing import Any, Self, TypeVar

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from .admission import Admission, Hold, Release, Swept
from .breaker import Breaker
from .degraded import Policy
from .logic import Evaluate, Logic, Reply, Saturated, Steps, ignore
from .observer import Observer

DEADLINE_S = 0.25
ATTEMPT_S = 0.1
MAX_CONNECTIONS = 32

SCRIPT = (files(__package__) / "lua" / "holds.lua").read_text(encoding="utf-8")
# Redis' own name for a script; nothing secret hangs on it.
SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()

_QUIET = {"protocol": 2, "driver_info": None, "health_check_interval": 0, "decode_responses": True}
"""A new connection costs no round trip but AUTH and SELECT."""

Result = TypeVar("Result")


class _Client:
    """What both have in common."""

    def __init__(
        self,
        *,
        deadline_s: float = DEADLINE_S,
        attempt_s: float = ATTEMPT_S,
        max_connections: int = MAX_CONNECTIONS,
        policy: Policy | None = None,
        breaker: Breaker | None = None,
        observer: Observer | None = None,
        on_recovered: Callable[[Admission], None] = ignore,
    ) -> None:
        if max_connections < 1:
            raise ValueError(f"max_connections={max_connections}: it is above zero")
        self._logic = Logic(
            deadline_s=deadline_s,
            attempt_s=attempt_s,
            policy=policy,
            breaker=breaker,
            observer=observer,
            on_recovered=on_recovered,
        )

    @property
    def breaker(self) -> Breaker:
        """The circuit breaker of this client."""
        return self._logic.breaker

    @property
    def pending(self) -> int:
        """Admissions and releases that Redis has yet to be told of."""
        return self._logic.memory.pending


class Scheduler(_Client):
    """Admission over blocking sockets; share one between threads.

    `deadline_s` bounds each call, `attempt_s` each attempt in it. `policy` says what happens while Redis is away:
    `Deny()` (the default) or `AdmitFromLastKnown(...)`. `on_recovered` hears what Redis says afterwards to each
    session that was admitted without it: stop the refused ones. No call raises because Redis is away; ValueError is
    for wrong arguments, redis.RedisError for a server that is none of those this client was made for.
    """

    def __init__(self, url: str, *, max_connections: int = MAX_CONNECTIONS, **options: Any) -> None:
        super().__init__(max_connections=max_connections, **options)
        self._connections = _Connections(url, max_connections)

    def admit(self, user: str, session: str, hold: Hold, *, deadline_s: float | None = None) -> Admission:
        """Place the session's hold unless balance - held <= floor. Admit it again to renew: the new hold replaces
        the old one, and a refusal removes it."""
        return self._run(self._logic.admit(user, session, hold, deadline_s))

    def release(self, user: str, session: str, *, deadline_s: float | None = None) -> Release:
        """Remove the session's hold, when it ended. What Redis cannot be told now is told later."""
        return self._run(self._logic.release(user, session, deadline_s))

    def recover(self, most: int = 100, *, deadline_s: float | None = None) -> list[Admission]:
        """Tell Redis what was admitted and released without it. Every answered call does a little of that; a
        program with few calls does it on a timer. Returns what Redis said of sessions that still run."""
        return self._run(self._logic.recover(most, deadline_s))

    def sweep(self, accounts: int = 100, *, deadline_s: float | None = None) -> Swept | None:
        """Collect expired holds of up to so many accounts (at most 1000); None when Redis is away. Admissions do it
        by the way; it matters only to who reads `held_us` of accounts that nobody asks about."""
        return self._run(self._logic.sweep(accounts, deadline_s))

    def close(self) -> None:
        """Close the idle connections; one in use is closed when its call ends."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, steps: Steps[Result]) -> Result:
        try:
            wanted = next(steps)
            while True:
                try:
                    reply: Reply = []
                    if isinstance(wanted, Evaluate):
                        reply = self._connections.evaluate(wanted.arguments, wanted.timeout_s)
                    else:
                        time.sleep(wanted.seconds)
                except BaseException as error:
                    wanted = steps.throw(error)
                else:
                    wanted = steps.send(reply)
        except StopIteration as stop:
            result: Result = stop.value
            return result


class _Connections:
    """Connections whose every wait is bounded by the attempt's own time."""

    def __init__(self, url: str, most: int) -> None:
        pool = redis.ConnectionPool.from_url(url, **_QUIET, retry=Retry(NoBackoff(), 0))
        self._make = pool.connection_class
        self._options = pool.connection_kwargs
        self._most = most
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._free = threading.BoundedSemaphore(self._most)
        self._idle: list[Any] = []

    def evaluate(self, arguments: tuple[str, ...], timeout_s: float) -> Reply:
        """Run the script; raises redis' errors, or Saturated."""
        if self._pid != os.getpid():
            # After a fork the sockets are the parent's.
            self._reset()
        give_up_at = time.monotonic() + timeout_s
        free = self._free
        if not free.acquire(timeout=timeout_s):
            raise Saturated(f"all {self._most} connections were taken for {timeout_s:.3f} s")
        try:
            connection = self._idle.pop() if self._idle else self._make(**self._options)
            reply: Reply | None = None
            try:
                reply = _evaluate(connection, arguments, give_up_at)
                return reply
            finally:
                if reply is None or self._closed:
                    # Its answer may be still to come, or it is one to a server that fails over.
                    connection.disconnect()
                else:
                    self._idle.append(connection)
        finally:
            free.release()

    def close(self) -> None:
        """Close the idle ones, and from now on each after its call."""
        self._closed = True
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().disconnect()


def _evaluate(connection: Any, arguments: tuple[str, ...], give_up_at: float) -> Reply:
    def left_s() -> float:
        left = give_up_at - time.monotonic()
        if left <= 0:
            raise exceptions.TimeoutError("the attempt's time is over")
        return left

    connection.socket_connect_timeout = connection.socket_timeout = left_s()
    connection.connect()
    if _is_stale(connection):
        connection.disconnect()
        connection.socket_connect_timeout = connection.socket_timeout = left_s()
        connection.connect()
    try:
        connection.send_command("EVALSHA", SHA, "0", *arguments)
        reply: Reply = connection.read_response(timeout=left_s())
    except exceptions.NoScriptError:
        connection.send_command("EVAL", SCRIPT, "0", *arguments)
        reply = connection.read_response(timeout=left_s())
    return reply


def _is_stale(connection: Any) -> bool:
    """Whether the server closed the connection while it was idle."""
    try:
        return bool(connection.can_read())
    except exceptions.ConnectionError:
        return True


class AsyncScheduler(_Client):
    """The same with asyncio; for the tasks of one event loop. See `Scheduler` for options and errors."""

    def __init__(self, url: str, *, max_connections: int = MAX_CONNECTIONS, **options: Any) -> None:
        super().__init__(max_connections=max_connections, **options)
        self._connections = _AsyncConnections(url, max_connections)

    async def admit(
        self, user: str, session: str, hold: Hold, *, deadline_s: float | None = None
    ) -> Admission:
        """See `Scheduler.admit`."""
        return await self._run(self._logic.admit(user, session, hold, deadline_s))

    async def release(self, user: str, session: str, *, deadline_s: float | None = None) -> Release:
        """See `Scheduler.release`."""
        return await self._run(self._logic.release(user, session, deadline_s))

    async def recover(self, most: int = 100, *, deadline_s: float | None = None) -> list[Admission]:
        """See `Scheduler.recover`."""
        return await self._run(self._logic.recover(most, deadline_s))

    async def sweep(self, accounts: int = 100, *, deadline_s: float | None = None) -> Swept | None:
        """See `Scheduler.sweep`."""
        return await self._run(self._logic.sweep(accounts, deadline_s))

    async def close(self) -> None:
        """See `Scheduler.close`."""
        await self._connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[Result]) -> Result:
        try:
            wanted = next(steps)
            while True:
                try:
                    reply: Reply = []
                    if isinstance(wanted, Evaluate):
                        reply = await self._connections.evaluate(wanted.arguments, wanted.timeout_s)
                    else:
                        await asyncio.sleep(wanted.seconds)
                except BaseException as error:
                    wanted = steps.throw(error)
                else:
                    wanted = steps.send(reply)
        except StopIteration as stop:
            result: Result = stop.value
            return result


class _AsyncConnections:
    """Connections of one event loop."""

    def __init__(self, url: str, most: int) -> None:
        pool = redis.asyncio.ConnectionPool.from_url(url, **_QUIET, retry=AsyncRetry(NoBackoff(), 0))
        self._make = pool.connection_class
        self._options = pool.connection_kwargs
        self._most = most
        self._free = asyncio.BoundedSemaphore(most)
        self._idle: list[Any] = []
        self._closed = False

    async def evaluate(self, arguments: tuple[str, ...], timeout_s: float) -> Reply:
        """Run the script; raises redis' errors, or Saturated."""
        waiting = True
        try:
            async with asyncio.timeout(timeout_s), self._free:
                waiting = False
                connection = self._idle.pop() if self._idle else self._make(**self._options)
                reply: Reply | None = None
                try:
                    reply = await _evaluate_async(connection, arguments)
                    return reply
                finally:
                    if reply is None or self._closed:
                        # Its answer may be still to come. Without waiting: this may be a cancellation.
                        await connection.disconnect(nowait=True)
                    else:
                        self._idle.append(connection)
        except TimeoutError:
            if waiting:
                raise Saturated(f"all {self._most} connections were taken for {timeout_s:.3f} s") from None
            raise exceptions.TimeoutError("the attempt's time is over") from None

    async def close(self) -> None:
        """Close the idle ones, and from now on each after its call."""
        self._closed = True
        while self._idle:
            await self._idle.pop().disconnect()


async def _evaluate_async(connection: Any, arguments: tuple[str, ...]) -> Reply:
    await connection.connect()
    if await _is_stale_async(connection):
        await connection.disconnect(nowait=True)
        await connection.connect()
    try:
        await connection.send_command("EVALSHA", SHA, "0", *arguments)
        reply: Reply = await connection.read_response()
    except exceptions.NoScriptError:
        await connection.send_command("EVAL", SCRIPT, "0", *arguments)
        reply = await connection.read_response()
    return reply


async def _is_stale_async(connection: Any) -> bool:
    try:
        return bool(await connection.can_read())
    except exceptions.ConnectionError:
        return True
