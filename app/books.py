"""What a flow checks before it touches money: that Redis, the log and the rate card are the ones it knows.

A Redis that is empty or was rolled back would hand out ledger numbers again; another log counts revisions from
elsewhere; an edited rate version would price replayed events anew. Each is refused with one line that says
what to run. Nothing here moves money.
"""

from __future__ import annotations

import os
from pathlib import Path

import redis

from app.errors import CommandError
from metering.ports import NOTHING_SEEN, SeenEntry
from schemas import redis_keys
from schemas.rate_card import RateCard, RateVersion
from schemas.rfc3339 import format_rfc3339_ms
from schemas.settings import Settings
from sources.kafka import LogIdentity

EPOCH_FILE = "epoch"

ENTRY_FILE = "entries"
"""In the state directory: the epoch, and the number of the last outbox entry that a flow has seen in it."""

REVISION_BITS = 40
"""A log has room for a million million messages; 8 000 logs fit into what Lua counts exactly (53 bits)."""


class BooksDiffer(CommandError):
    """The servers are not those that the books were kept on. One line."""


def current_epoch(settings: Settings, client: redis.Redis) -> int:
    """The epoch that Redis is at. Raises BooksDiffer when it has none."""
    stored = client.get(redis_keys.EPOCH)
    if stored is not None:
        return int(stored)
    if client.exists(redis_keys.REBUILDING):
        raise BooksDiffer("Redis is being rebuilt: `metering rebuild-balances` has not come to its end")
    raise BooksDiffer(
        "Redis has no epoch: a new one needs `metering migrate`, an emptied one `metering rebuild-balances`"
        f" (METERING_REDIS={settings.redis})"
    )


def expected_epoch(settings: Settings, client: redis.Redis) -> int:
    """The epoch for a flow to run scripts with: what its state directory remembers, else what Redis says (then
    kept). Tools, which have no state, take the current one.

    Raises BooksDiffer when Redis has none, or an older one.
    """
    file = settings.state_dir / EPOCH_FILE
    epoch = current_epoch(settings, client)
    if file.exists():
        remembered = int(file.read_text(encoding="ascii"))
        if epoch < remembered:
            raise BooksDiffer(
                f"Redis has epoch {epoch}, {file} knows {remembered}: an older Redis came back. "
                "Run `metering rebuild-balances`"
            )
        if epoch == remembered:
            return epoch
    write_whole(file, f"{epoch}\n")
    return epoch


def seen_entry(settings: Settings, client: redis.Redis, epoch: int) -> SeenEntry:
    """The last outbox entry that this state directory knows of; number 0 when it knows none of this epoch.

    Raises BooksDiffer when Redis has fewer: it came back without its end.
    """
    file = settings.state_dir / ENTRY_FILE
    if not file.exists():
        return NOTHING_SEEN
    known_epoch, known, *name = file.read_text(encoding="ascii").split()
    number = int(known)
    if int(known_epoch) != epoch:
        return NOTHING_SEEN
    entries = int(client.get(redis_keys.ENTRIES) or 0)
    if entries < number:
        raise BooksDiffer(
            f"Redis has {entries} outbox entries, {file} knows {number}: it came back without its end. "
            "Run `metering rebuild-balances`"
        )
    return SeenEntry(number, *name)


def remember_entry(settings: Settings, epoch: int, seen: SeenEntry) -> None:
    """Keep what a running flow has seen, for the next one."""
    write_whole(settings.state_dir / ENTRY_FILE, f"{epoch} {seen.number} {seen.name}\n")


def remembered_epoch(settings: Settings) -> int:
    """The epoch that this state directory knows; 0 when it knows none."""
    file = settings.state_dir / EPOCH_FILE
    return int(file.read_text(encoding="ascii")) if file.exists() else 0


def check_log(client: redis.Redis, topic: str, found: LogIdentity) -> int:
    """Claim the log for an empty book, or make sure that it is the one that revisions were counted in.

    Returns the log's revision base: revisions of a log adopted later are higher than all of the earlier ones.
    """
    known = _read_hash(client, redis_keys.LOG)
    if not known:
        generation = int(client.get(redis_keys.NEXT_GENERATION) or 0)
        client.hset(redis_keys.LOG, mapping=_log_record(found, generation))  # type: ignore[arg-type]
        return generation << REVISION_BITS
    if (known["topic_id"], known["partition_count"]) != (found.topic_id, str(found.partition_count)):
        raise BooksDiffer(
            f"topic {topic} (id {found.topic_id}, {found.partition_count} partitions) is not the log that the "
            f"balances were settled from (id {known['topic_id']}, {known['partition_count']} partitions). Run "
            "`metering adopt-log` to go on with it"
        )
    return int(known["generation"]) << REVISION_BITS


def adopt_log(client: redis.Redis, found: LogIdentity) -> None:
    """Make `found` the log that revisions are counted in; only once no cell of another one is live.

    Adopting the log that is already known changes nothing.
    """
    known = _read_hash(client, redis_keys.LOG)
    if known.get("topic_id") == found.topic_id and known["partition_count"] == str(found.partition_count):
        return
    generation = int(known["generation"]) + 1 if known else int(client.get(redis_keys.NEXT_GENERATION) or 0)
    pipeline = client.pipeline(transaction=True)
    pipeline.delete(redis_keys.POSITIONS)
    pipeline.hset(redis_keys.LOG, mapping=_log_record(found, generation))  # type: ignore[arg-type]
    pipeline.execute()


def keep_generation(client: redis.Redis, newest: int) -> None:
    """Make sure that revisions from now on are not counted below those of the `newest` generation in the archive,
    in a Redis that may have forgotten which log it knew. A higher one harms nobody once no cell is live."""
    known = _read_hash(client, redis_keys.LOG)
    if known and int(known["generation"]) < newest:
        client.hset(redis_keys.LOG, "generation", str(newest))
    elif not known:
        client.set(redis_keys.NEXT_GENERATION, newest + 1)


def _log_record(log: LogIdentity, generation: int) -> dict[str, str]:
    return {
        "topic_id": log.topic_id,
        "partition_count": str(log.partition_count),
        "generation": str(generation),
    }


def register_rates(client: redis.Redis, card: RateCard) -> None:
    """Remember every version in use, so that none is ever edited, dropped, or slipped in under the fence."""
    fence_ms = int(client.get(redis_keys.FENCE) or 0)
    known = check_rates(client, card)
    mine = {version.effective_from_ms: _rates_text(version) for version in card.versions}
    new = {start: rates for start, rates in mine.items() if start not in known}
    for effective_from_ms in sorted(new):
        if known and effective_from_ms < fence_ms:
            raise BooksDiffer(
                f"rate card: the new version of {format_rfc3339_ms(effective_from_ms)} would change windows that "
                f"are frozen (before {format_rfc3339_ms(fence_ms)}); give it a later effective_from"
            )
    if new:
        client.hset(redis_keys.RATE_VERSIONS, mapping=new)  # type: ignore[arg-type]


def check_rates(client: redis.Redis, card: RateCard) -> dict[int, str]:
    """Make sure that the card has every version in use as it is; returns them. Changes nothing."""
    known = {int(key): rates for key, rates in _read_hash(client, redis_keys.RATE_VERSIONS).items()}
    mine = {version.effective_from_ms: _rates_text(version) for version in card.versions}
    for effective_from_ms, rates in sorted(known.items()):
        name = format_rfc3339_ms(effective_from_ms)
        if effective_from_ms not in mine:
            raise BooksDiffer(
                f"rate card: the version of {name} is missing; a version in use is never dropped"
            )
        if mine[effective_from_ms] != rates:
            raise BooksDiffer(
                f"rate card: the version of {name} was edited ({rates} became {mine[effective_from_ms]}); "
                "a version is never edited, only superseded by one with a later effective_from"
            )
    return known


def _read_hash(client: redis.Redis, key: str) -> dict[str, str]:
    stored: dict[bytes, bytes] = client.hgetall(key)  # type: ignore[assignment]
    return {field.decode(): value.decode() for field, value in stored.items()}


def _rates_text(version: RateVersion) -> str:
    return f"asr {version.asr}, nmt {version.nmt}, tts {version.tts}, node_credit {version.node_credit}"


def write_whole(file: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of one flow may write the same file.
    draft = file.with_name(f"{file.name}.{os.getpid()}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)
