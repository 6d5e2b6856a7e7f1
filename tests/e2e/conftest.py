"""One `metering up` for the end-to-end tests that only add to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.world import World, running_world


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything that `metering up` runs; tests may follow in any order."""
    with running_world(tmp_path_factory.mktemp("up")) as started:
        yield started
