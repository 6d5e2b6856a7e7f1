"""The pipeline for real: broker, Redis, ClickHouse, and the flows that carry out and archive money commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis
from fastapi.testclient import TestClient

from accounts.api.app import create_app
from accounts.attempts import DEFAULT_LIMITS, Guarded, Limit
from accounts.context import Accounts, AccountsConfig
from accounts.database import Database
from accounts.gateway import Gateway
from accounts.secrets import Secrets, check_secret
from app.accounts_service import now_ms, open_gateway
from app.clients import redis_client
from tests.accounts.support import CHEAP, SECRET, Client
from tests.support.flow_processes import flow_process, recovering_flow, world_of_servers
from tests.support.world import World

MakeClient = Callable[..., Client]


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Servers with the flows `settlement` and `ledger`; accounts are told apart by their ids."""
    with (
        world_of_servers(tmp_path_factory.mktemp("pipeline")) as servers,
        recovering_flow(servers),
        flow_process(servers, "ledger"),
    ):
        yield servers


@pytest.fixture(scope="package")
def gateway(world: World) -> Iterator[Gateway]:
    """The pipeline as the API sees it."""
    opened = open_gateway(world.settings)
    yield opened
    opened.commands.close()


@pytest.fixture
def live(world: World) -> Iterator[redis.Redis]:
    """Redis itself."""
    with redis_client(world.settings) as opened:
        yield opened


@pytest.fixture
def make_client(database: Database, gateway: Gateway) -> Iterator[MakeClient]:
    """Makes an API on this database, with its own wait for results and, if given, its own pipeline."""
    secrets = Secrets(SECRET)
    check_secret(database, secrets)
    opened: list[TestClient] = []

    def make(wait_s: float = 60.0, pipeline: Gateway | None = None, *, limited: bool = True) -> Client:
        limits = DEFAULT_LIMITS if limited else dict.fromkeys(Guarded, Limit(1_000_000, 60_000))
        config = AccountsConfig(argon2=CHEAP, command_wait_s=wait_s, limits=limits)
        accounts = Accounts(database, secrets, config, now_ms)
        http = TestClient(create_app(accounts, pipeline or gateway))
        http.__enter__()
        opened.append(http)
        return Client(http, accounts)

    yield make
    for http in opened:
        http.__exit__(None, None, None)


@pytest.fixture
def client(make_client: MakeClient) -> Client:
    """An API that waits for results as long as it takes."""
    return make_client()
