"""What the settlement service does beside settling: it moves the fence, and knows its Redis, log and rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from app.books import BooksDiffer, adopt_log, check_log, expected_epoch, register_rates
from app.fence_keeper import FenceKeeper
from metering.live import CellPosting, Emission
from schemas import redis_keys
from schemas.rate_card import RateCard, RateVersion
from schemas.settings import Settings
from sinks.balances import RedisBalances
from sources.kafka import Committed, LogIdentity, Progress
from tests.integration.test_kafka_source import read, reading, send, source
from tests.support.processes import wait_until

MakeTopic = Callable[[int], str]
WINDOW_MS = 60_000
LAG_MS = 120_000


@contextmanager
def keeping(
    settings: Settings,
    client: redis.Redis,
    topic: str,
    progress: Progress,
    said: list[str],
    *,
    settled: bool = True,
) -> Iterator[RedisBalances]:
    """A keeper of the fence at work."""
    client.set(redis_keys.EPOCH, 1)
    book = RedisBalances(client, 1, 1_000)
    if settled:
        book.post([Emission("session/s", [CellPosting("session/s@0", 0, 1, {"user/u": -1}, "")], None, [])])
    keeper = FenceKeeper(
        settings.kafka, topic, client, book, progress, lag_ms=LAG_MS, interval_s=0.05, say=said.append
    )
    keeper.start()
    try:
        yield book
    finally:
        keeper.stop()


def fence(client: redis.Redis) -> int:
    return int(client.get(redis_keys.FENCE) or 0)


def test_the_fence_follows_the_slowest_partition_by_whole_windows(
    settings: Settings, make_topic: MakeTopic, redis_client: redis.Redis
) -> None:
    """It waits until every partition has a position, and stands `lag` behind the smallest, at a window's start."""
    topic = make_topic(2)
    progress = Progress()
    source(settings, topic, progress=progress)
    with keeping(settings, redis_client, topic, progress, []):
        progress.commit(0, Committed(0, 0, at_end_ms=600_000_000))
        time.sleep(0.3)
        assert fence(redis_client) == 0
        progress.commit(1, Committed(0, 0, at_end_ms=600_000_000 + WINDOW_MS - 1))
        wait_until(lambda: fence(redis_client) == 600_000_000 - LAG_MS, "the fence moves")
        progress.commit(0, Committed(0, 0, at_end_ms=700_000_000))
        wait_until(lambda: fence(redis_client) == 600_000_000 - LAG_MS, "the other partition holds it")
        progress.commit(1, Committed(0, 0, at_end_ms=600_000_000 + 2 * WINDOW_MS))
        wait_until(lambda: fence(redis_client) == 600_000_000 + 2 * WINDOW_MS - LAG_MS, "it moves on")


def test_the_fence_stays_where_nothing_was_ever_settled(
    settings: Settings, make_topic: MakeTopic, redis_client: redis.Redis
) -> None:
    """The first events of a new system are not late, however long it waited for them."""
    topic = make_topic(1)
    progress = Progress()
    source(settings, topic, progress=progress)
    with keeping(settings, redis_client, topic, progress, [], settled=False) as book:
        progress.commit(0, Committed(0, 0, at_end_ms=600_000_000))
        time.sleep(0.3)
        assert fence(redis_client) == 0
        book.post([Emission("session/s", [CellPosting("session/s@0", 0, 1, {"user/u": -1}, "")], None, [])])
        wait_until(lambda: fence(redis_client) == 600_000_000 - LAG_MS, "the fence moves")


def test_a_flow_that_does_not_know_of_the_newest_messages_holds_the_fence(
    settings: Settings, make_topic: MakeTopic, redis_client: redis.Redis
) -> None:
    """It believed to stand at the end, but the broker has more: what it last said about the end does not count."""
    topic = make_topic(1)
    progress = Progress()
    source(settings, topic, progress=progress)
    # Two batches, so that also a broker which answers with the start of its last batch knows of more than none.
    send(settings, topic, [b"0"])
    send(settings, topic, [b"1"])
    with keeping(settings, redis_client, topic, progress, []):
        progress.commit(0, Committed(0, 0, at_end_ms=600_000_000))
        time.sleep(0.5)
        assert fence(redis_client) == 0
        progress.commit(0, Committed(2, 0, at_end_ms=600_000_000))
        wait_until(lambda: fence(redis_client) > 0, "the fence moves")


def test_steady_traffic_moves_the_fence_by_the_last_message_read(
    settings: Settings, make_topic: MakeTopic, redis_client: redis.Redis
) -> None:
    """The broker always has a little more than the flow last knew; the fence must not wait for a silent moment."""
    topic = make_topic(1)
    progress = Progress()
    source(settings, topic, progress=progress)
    send(settings, topic, [b"0"])
    send(settings, topic, [b"1"])
    with keeping(settings, redis_client, topic, progress, []):
        progress.commit(0, Committed(0, 600_000_000, at_end_ms=600_000_500))
        wait_until(lambda: fence(redis_client) == 600_000_000 - LAG_MS, "the fence moves")


def test_a_partition_commits_what_two_later_snapshots_have_confirmed(
    settings: Settings, make_topic: MakeTopic
) -> None:
    """A position counts as committed when the second snapshot after it is taken, not before."""
    topic = make_topic(1)
    progress = Progress()
    send(settings, topic, [b"0", b"1"])
    with reading(source(settings, topic, progress=progress), topic) as part:
        read(part, 2)
        part.snapshot()
        part.snapshot()
        assert progress.read() == {}
        part.snapshot()
        assert progress.read()[0].next_offset == 2


def test_the_keeper_stops_the_flow_when_the_log_is_another_one(
    settings: Settings, make_topic: MakeTopic, redis_client: redis.Redis
) -> None:
    """An open consumer would not notice; the keeper compares topic id and partition count, and says so."""
    topic = make_topic(1)
    progress = Progress()
    whole = source(settings, topic, progress=progress)
    said: list[str] = []
    progress.log = LogIdentity("another", 1)
    with reading(whole, topic) as part, keeping(settings, redis_client, topic, progress, said):
        wait_until(lambda: progress.failure is not None, "it is noticed")
        with pytest.raises(type(progress.failure), match="adopt-log"):
            part.next_batch()
    assert len(said) == 1


def test_forgetting_frozen_cells_takes_as_many_calls_as_it_needs(redis_client: redis.Redis) -> None:
    """Redis keeps nothing of the cells before the fence, however many they were."""
    redis_client.set(redis_keys.EPOCH, 1)
    book = RedisBalances(redis_client, 1, 10_000)
    cells = [
        CellPosting(f"session/s-{number}@0", 0, 1, {f"user/u-{number}": -1}, "") for number in range(2_500)
    ]
    book.post([Emission("session/s", cells, None, [])])
    assert redis_client.zcard(redis_keys.LIVE_CELLS) == 2_500
    assert book.raise_fence(WINDOW_MS) == WINDOW_MS
    assert redis_client.zcard(redis_keys.LIVE_CELLS) == 0
    assert not list(redis_client.scan_iter(f"{redis_keys.CELL_PREFIX}*"))


def test_a_redis_without_an_epoch_is_refused(settings: Settings, redis_client: redis.Redis) -> None:
    """An empty one cannot pass for the real one."""
    with pytest.raises(BooksDiffer, match="has no epoch"):
        expected_epoch(settings, redis_client)


def test_an_older_epoch_than_remembered_is_refused(settings: Settings, redis_client: redis.Redis) -> None:
    """The state directory remembers the newest epoch that it has worked with."""
    redis_client.set(redis_keys.EPOCH, 3)
    assert expected_epoch(settings, redis_client) == 3
    redis_client.set(redis_keys.EPOCH, 4)
    assert expected_epoch(settings, redis_client) == 4
    redis_client.set(redis_keys.EPOCH, 3)
    with pytest.raises(BooksDiffer, match=r"epoch 3.*knows 4"):
        expected_epoch(settings, redis_client)


def test_the_books_belong_to_one_log(redis_client: redis.Redis) -> None:
    """The first one is claimed; another is refused until it is adopted, and then its revisions are all higher."""
    first, second = LogIdentity("a", 4), LogIdentity("b", 4)
    assert check_log(redis_client, "lingua.events", first) == 0
    assert check_log(redis_client, "lingua.events", first) == 0
    for other in (second, LogIdentity("a", 5)):
        with pytest.raises(BooksDiffer, match="is not the log"):
            check_log(redis_client, "lingua.events", other)
    for _ in range(2):
        adopt_log(redis_client, second)
        assert check_log(redis_client, "lingua.events", second) == 1 << 40


def test_rate_versions_are_never_edited_dropped_or_slipped_under_the_fence(
    redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Each is one clear line; a new version at or above the fence is welcome."""
    first = RateVersion(0)
    redis_client.set(redis_keys.FENCE, 500)
    register_rates(redis_client, RateCard([first]))
    register_rates(redis_client, RateCard([first]))
    with pytest.raises(BooksDiffer, match="was edited"):
        register_rates(redis_client, RateCard([RateVersion(0, asr=1001)]))
    with pytest.raises(BooksDiffer, match="would change windows that are frozen"):
        register_rates(redis_client, RateCard([first, RateVersion(499)]))
    register_rates(redis_client, RateCard([first, RateVersion(500)]))
    with pytest.raises(BooksDiffer, match="is missing"):
        register_rates(redis_client, RateCard([first]))
