"""The embedded Redis-compatible server."""

from __future__ import annotations

from pathlib import Path

import redis

from app.embedded import process, valkey
from tests.support.services import running_service


def test_a_kill_loses_no_answered_write(tmp_path: Path) -> None:
    """After SIGKILL every write that was answered is there, and the stream's numbers go on."""
    service = valkey.service(tmp_path / "data", process.free_port())
    child = process.start(service, tmp_path / "log")
    try:
        client = redis.Redis(port=service.port)
        for number in range(200):
            client.hincrby("balance:{user/u-1}", "balance_us", -number)
            client.xadd("ledger", {"number": number})
        child.kill()
        child.wait()
    finally:
        process.stop(child, deadline_s=0)
    with running_service(service, tmp_path / "log"):
        client = redis.Redis(port=service.port)
        assert client.hget("balance:{user/u-1}", "balance_us") == str(-sum(range(200))).encode()
        assert client.xlen("ledger") == 200


def test_it_never_evicts_and_syncs_every_write(tmp_path: Path) -> None:
    """The settings that money depends on are in force, and it listens on loopback only."""
    service = valkey.service(tmp_path / "data", process.free_port())
    with running_service(service, tmp_path / "log"):
        client = redis.Redis(port=service.port, decode_responses=True)
        wanted = {
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "save": "",
            "bind": "127.0.0.1",
        }
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
