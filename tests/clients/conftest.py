"""A Valkey for the tests of this folder: started once, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from schemas import redis_keys
from tests.support import admission


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where it listens."""
    with admission.running_valkey(tmp_path_factory.mktemp("valkey") / "data") as url:
        yield url


@pytest.fixture
def server(valkey_url: str) -> Iterator[redis.Redis]:
    """A client on the empty server, which has epoch 1."""
    with admission.client(valkey_url) as client:
        client.flushall()
        client.script_flush()
        client.set(redis_keys.EPOCH, 1)
        yield client
