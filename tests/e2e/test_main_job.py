"""The main job through the command line: generate, emit, and the books agree with `metering settle`."""

from __future__ import annotations

import json
from pathlib import Path

from metering.settle import settle_lines
from schemas.rate_card import load_rate_card
from tests.support.commands import metering, one_line
from tests.support.world import World


def _generate(path: Path, *options: str) -> Path:
    done = metering("generate", *options, "--out", str(path))
    assert done.returncode == 0, done.stderr.decode()
    return path


def test_twenty_thousand_events_settle_to_the_microsecond(world: World, tmp_path: Path) -> None:
    """With repeats, disorder and broken messages, Redis, the ledger and the pure settlement agree."""
    events = _generate(
        tmp_path / "events.jsonl",
        *("--seed", "7", "--events", "20000", "--duplicates", "0.05", "--disorder", "0.1", "--junk", "0.002"),
    )
    done = world.emit(events)
    assert one_line(done.stderr).startswith("metering: 21040 events delivered in ")
    assert world.disagreements() == []


def test_messages_without_a_key_settle_all_the_same(world: World, tmp_path: Path) -> None:
    """Keys are for locality: spread over all partitions the same events give the same bill."""
    events = _generate(tmp_path / "events.jsonl", "--seed", "8", "--events", "3000", "--duplicates", "0.1")
    world.emit(events, "--no-key")
    assert world.disagreements() == []


def test_a_top_up_counts_once_per_request_and_shows_in_balance_and_statement(world: World) -> None:
    """The same request id sent twice moves the balance once; the statement has its line."""
    world.top_up("user/u-topup", 30, "--request-id", "r-1", "--reason", "gift")
    world.run("topup", "user/u-topup", "30", "--request-id", "r-1", "--reason", "gift")
    world.top_up("user/u-topup", 12, "--request-id", "r-2")
    assert world.disagreements() == []
    [balance] = _json_lines(world.run("balance", "user/u-topup", "--json").stdout)
    assert (balance["balance_us"], balance["held_us"], balance["floor_us"], balance["seq"]) == (
        42 * 60_000_000,
        0,
        -300 * 60_000_000,
        2,
    )
    lines = _json_lines(world.run("statement", "user/u-topup", "--json").stdout)
    assert [(line["balance_before_us"], line["change_us"], line["balance_after_us"]) for line in lines] == [
        (0, 1_800_000_000, 1_800_000_000),
        (1_800_000_000, 720_000_000, 2_520_000_000),
    ]
    assert [(line["reason"], line["request_id"], line["note"]) for line in lines] == [
        ("top_up", "r-1", "gift"),
        ("top_up", "r-2", "top-up"),
    ]
    shown = world.run("statement", "user/u-topup", "--limit", "1").stdout.decode()
    assert "+12.0000" in shown
    assert "+30.0000" not in shown
    assert "\x1b" not in shown
    assert "42.0000" in world.run("balance", "user/u-topup").stdout.decode()


def test_a_bill_is_what_settle_says(world: World, tmp_path: Path) -> None:
    """Each payer's share of a room, from the ledger, is the sum of their cells in the pure settlement."""
    events = _generate(tmp_path / "events.jsonl", "--seed", "9", "--events", "600", "--sessions", "2")
    world.emit(events)
    assert world.disagreements() == []
    settled, _ = settle_lines(events.read_bytes().split(b"\n"), load_rate_card(None))
    scopes = sorted({line.cell_id.rpartition("@")[0] for line in settled})
    assert {scope.partition("/")[0] for scope in scopes} == {"room", "session"}
    for scope in (scopes[0], scopes[-1]):
        expected: dict[str, int] = {}
        for line in settled:
            if line.account.startswith("user/") and line.cell_id.startswith(f"{scope}@"):
                user = line.account.removeprefix("user/")
                expected[user] = expected.get(user, 0) - line.amount_us
        bill = _json_lines(world.run("bill", scope, "--json").stdout)
        assert {share["user_id"]: share["share_us"] for share in bill} == {
            user: share for user, share in expected.items() if share
        }
        assert {share["total_us"] for share in bill} <= {sum(expected.values())}


def test_what_was_never_charged_is_said_in_one_line(world: World) -> None:
    """An account or scope that nobody has heard of is no traceback and no empty table."""
    assert one_line(world.run("statement", "user/nobody").stderr) == (
        "metering: user/nobody has no ledger lines"
    )
    assert one_line(world.run("bill", "room/nowhere").stderr) == "metering: room/nowhere has no charges"
    done = metering("balance", "user/nobody", environment=world.environment)
    assert (done.returncode, one_line(done.stderr)) == (
        1,
        "metering: user/nobody has no balance: nothing was ever posted to it",
    )


def test_migrate_repeated_changes_nothing(world: World) -> None:
    """On servers that are up to date it says so."""
    assert world.run("migrate").stderr.decode().splitlines() == [
        "metering: ClickHouse: no migration applied",
        "metering: Kafka: no topic created",
        "metering: Redis: epoch 1",
        "metering: accounts database: revision 0003 already",
    ]


def test_an_unknown_topic_is_refused_before_anything_is_sent(world: World, tmp_path: Path) -> None:
    """`emit --topic` does not make topics."""
    events = _generate(tmp_path / "events.jsonl", "--events", "5")
    done = metering("emit", str(events), "--topic", "lingua.evnets", environment=world.environment)
    assert done.returncode == 1
    assert "has no topic lingua.evnets" in one_line(done.stderr)


def test_the_demo_proves_the_books(tmp_path: Path) -> None:
    """`metering demo` ends with the proof, without control codes in a pipe, and draws its picture."""
    picture = tmp_path / "demo.svg"
    done = metering("demo", "--svg", str(picture))
    shown = done.stdout.decode()
    assert done.returncode == 0, shown + done.stderr.decode()
    assert "PROOF: Redis = ledger = metering settle, to the microsecond" in shown
    assert "\x1b" not in shown
    assert picture.read_text().startswith("<svg")
    assert "@font-face" not in picture.read_text()


def _json_lines(output: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]
