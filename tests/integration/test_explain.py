"""`metering explain` on real servers: lines of a live system agree, tampering does not, odd things are clear."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clickhouse_connect.driver.client import Client

from app.clients import redis_client
from app.errors import CommandError
from app.explain import (
    AskedCell,
    AskedLine,
    AskedName,
    AskedScope,
    AskedUtterance,
    CommandExplained,
    LineExplained,
    ScopeExplained,
    UtteranceExplained,
    exit_code,
    explain,
    recognise,
)
from app.migrate import run_migrations
from app.repair.resettle import run_resettle
from metering.cells import WINDOW_MS, window_start_ms
from metering.explain import Agreement
from metering.money import REVENUE
from schemas import redis_keys
from schemas.events import LifecycleKind
from schemas.records import DeadLetter, OutboxPosition, RequestRecord
from schemas.rows import UsageRow
from schemas.settings import Settings
from sinks.clickhouse import ClickHouseJournal, ClickHouseUsageStore
from sources.archive_explain import FOUND_AT_MOST
from tests.integration.test_reconcile import NEVER_S, archive, now_ms, send, tampered, usage, workload
from tests.support.archive import NOON_MS, ledger_line, lifecycle_row, moved_row, settlement, usage_row
from tests.support.commands import metering, one_line
from tests.support.processes import wait_until
from tests.support.world import World, running_world

# On a system that runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything runs, with a fence that moves often; nothing is repaired by itself."""
    with running_world(
        tmp_path_factory.mktemp("up"),
        epoch_interval_s="1",
        fence_interval_s="0.5",
        resettle_interval_s=NEVER_S,
        reconcile_interval_s=NEVER_S,
    ) as started:
        conflict = [
            usage("twice", now_ms(), session="s-conflict", asr=1_000),
            usage("twice", now_ms(), session="s-conflict", asr=2_000),
        ]
        send(started, workload(1, 1_000))
        send(started, conflict)
        started.top_up("user/u-rich", 5, "--request-id", "req-1")
        client = archive(started)
        wait_until(
            lambda: client.query("SELECT count() FROM lingua.requests").result_rows == [(1,)], "the top-up"
        )
        wait_until(lambda: whole(started), "the ledger has everything", 60)
        yield started


def whole(world: World) -> bool:
    """Whether every scope agrees."""
    scopes = [scope for (scope,) in world.query("SELECT DISTINCT scope FROM {database}.usage_events")]
    return all(ask(world, AskedScope(str(scope))).agreement is Agreement.AGREES for scope in scopes[:5])


def ask(world: World, asked: object):  # type: ignore[no-untyped-def]
    return explain(world.settings, asked)  # type: ignore[arg-type]


def test_lines_of_a_live_system_agree(world: World) -> None:
    """Of users, nodes and the platform: what each posting knew is told by its revision."""
    rows = world.query(
        "SELECT account, seq FROM {database}.ledger FINAL ORDER BY cityHash64(account, seq) LIMIT 25"
    )
    rows += world.query(
        "SELECT account, max(seq) FROM {database}.ledger GROUP BY account ORDER BY 2 DESC LIMIT 3"
    )
    kinds = set()
    for account, seq in rows:
        explained = ask(world, AskedLine(str(account), int(str(seq))))
        assert explained.agreement is Agreement.AGREES, (account, seq, explained.why)
        assert isinstance(explained, LineExplained)
        if explained.change is not None:
            assert explained.change.known_by == "revision"
            assert explained.change.expected_after_us == explained.change.posted_after_us
        kinds.add(str(account).split("/", maxsplit=1)[0])
    assert kinds >= {"user", "node"}


def test_a_tampered_line_does_not_agree(world: World) -> None:
    """Of a live cell: the line, its cell and its scope say so, with exit code 1, and the others do not."""
    [(account, seq, cell, scope)] = world.query(
        "SELECT account, seq, cell_id, scope FROM {database}.ledger FINAL "
        "WHERE reason = 'charge' AND scope LIKE 'room/%' ORDER BY account, seq LIMIT 1"
    )
    where = f"account = '{account}' AND seq = {seq}"
    with tampered(world, "ledger", f"UPDATE change_us = change_us - 7 WHERE {where}"):
        done = metering("explain", f"{account}#{seq}", environment=world.environment)
        shown = done.stdout.decode()
        assert (done.returncode, done.stderr) == (1, b"")
        assert "DOES NOT AGREE: " in shown
        assert f"  {account}: expected " in shown
        as_json = metering("explain", "--cell", str(cell), "--json", environment=world.environment)
        assert as_json.returncode == 1
        found = json.loads(as_json.stdout)
        assert (found["kind"], found["agreement"]) == ("cell", "differs")
        [difference] = found["cell"]["judgements"][0]["differences"]
        assert (difference["account"], difference["found_us"] - difference["expected_us"]) == (account, -7)
        by_scope = ask(world, AskedScope(str(scope)))
        assert isinstance(by_scope, ScopeExplained)
        assert [each.cell_id for each in by_scope.cells if each.agreement is not Agreement.AGREES] == [cell]
    assert ask(world, AskedLine(str(account), int(str(seq)))).agreement is Agreement.AGREES


def test_an_utterance_tells_who_paid(world: World) -> None:
    """Of a room: everyone a part, and the parts make up its cost; by its id, or by source and id."""
    [(utterance, source, event_id, scope, cost_us)] = world.query(
        "SELECT utterance_id, source, id, scope, cost_us FROM {database}.usage WHERE scope LIKE 'room/%' "
        "AND cost_us > 0 ORDER BY utterance_id LIMIT 1"
    )
    by_id = ask(world, recognise(str(utterance)))
    by_event = ask(world, AskedUtterance(source=str(source), id=str(event_id), scope=str(scope)))
    assert isinstance(by_id, UtteranceExplained)
    assert by_id == by_event
    [event] = by_id.events
    assert (by_id.agreement, event.scope, event.utterance.cost_us) == (Agreement.AGREES, scope, cost_us)
    assert sum(part.of_utterance_us.fraction for part in event.paid_by) == cost_us
    assert all(part.paid_us == part.owed_us for part in event.paid_by)
    assert all(ask(world, AskedLine(part.lines.account, part.lines.last_seq)) for part in event.paid_by[:2])


def test_what_was_refused_says_why(world: World) -> None:
    """An identity that was taken: the utterance that counts, and the dead letter of the other."""
    explained = ask(world, AskedName("ut-twice"))
    assert isinstance(explained, UtteranceExplained)
    [letter] = explained.dead_letters
    assert (letter.reason, letter.named) == ("identity_conflict", True)
    assert json.loads(letter.value)["data"]["asr_time_ms"] == 2_000
    [event] = explained.events
    assert [each.counts for each in event.occurrences][:1] == [True]
    assert event.utterance.cost_us == 1_000_000


def test_a_money_command_is_two_lines(world: World) -> None:
    """By its request id and by either line; they sum to zero."""
    explained = ask(world, AskedName("req-1"))
    assert isinstance(explained, CommandExplained)
    command = explained.command
    assert (explained.agreement, command.outcome, command.amount_us) == (
        Agreement.AGREES, "APPLIED", 300_000_000,
    )  # fmt: skip
    assert {line.account: line.change_us for line in command.lines} == {
        "user/u-rich": 300_000_000,
        "platform/top_ups": -300_000_000,
    }
    for line in command.lines:
        found = ask(world, AskedLine(line.account, line.seq))
        assert isinstance(found, LineExplained)
        assert (found.agreement, found.command) == (Agreement.AGREES, command)
    with tampered(world, "requests", "UPDATE amount_us = 1 WHERE request_id = 'req-1'"):
        assert exit_code(ask(world, AskedName("req-1"))) == 1


def test_late_usage_is_not_settled_until_it_is_resettled(world: World) -> None:
    """Then the resettle's line is explained by the utterance that it brought."""
    start = window_start_ms(now_ms()) - 2 * 3_600_000
    send(world, [usage("on-time", start, session="s-late")])
    live = redis_client(world.settings)
    wait_until(lambda: int(live.get(redis_keys.FENCE) or 0) > start + WINDOW_MS, "the window is frozen")
    wait_until(lambda: "nothing" not in reason(world, start), "the first one is stored")
    run_resettle(world.settings)
    wait_until(lambda: ask_cell(world, start).agreement is Agreement.AGREES, "the first one is charged")
    send(world, [usage("too-late", start + 1, session="s-late")])
    wait_until(lambda: len(ask_cell(world, start).cell.utterances) == 2, "the late one is stored")
    waiting = ask_cell(world, start)
    assert (waiting.agreement, exit_code(waiting)) == (Agreement.NOT_SETTLED, 0)
    assert "the next resettle charges them" in waiting.why
    run_resettle(world.settings)
    wait_until(lambda: ask_cell(world, start).agreement is Agreement.AGREES, "the late one is charged")
    [payer] = ask_cell(world, start).cell.payers
    line = ask(world, AskedLine("user/u-1", payer.lines.last_seq))
    assert isinstance(line, LineExplained)
    assert line.line.reason == "resettle"
    assert [each.id for each in line.change.new_utterances] == ["too-late"]
    where = f"account = 'user/u-1' AND seq = {line.line.seq}"
    with tampered(world, "ledger", f"UPDATE change_us = change_us - 7 WHERE {where}"):
        assert exit_code(ask(world, AskedLine("user/u-1", line.line.seq))) == 1


def ask_cell(world: World, start: int):  # type: ignore[no-untyped-def]
    return ask(world, AskedCell("session/s-late", start))


def reason(world: World, start: int) -> str:
    try:
        return str(ask_cell(world, start).why)
    except CommandError:
        return "nothing yet"


def test_another_rate_card_is_refused(world: World, tmp_path: Path) -> None:
    """It would find fault with every line: one line says what to do."""
    card = tmp_path / "card.json"
    card.write_text('[{"effective_from": "1970-01-01T00:00:00Z", "asr": 999}]')
    done = metering(
        "explain", f"{REVENUE}#1", environment=world.environment | {"METERING_RATE_CARD": str(card)}
    )
    assert done.returncode == 1
    assert "was edited" in one_line(done.stderr)


# On rows that were put there --------------------------------------------------------------------------------


@pytest.fixture
def alone(settings: Settings, clickhouse: Client) -> Settings:
    """A migrated ClickHouse, and no Redis."""
    run_migrations(clickhouse, settings.clickhouse_database)
    return settings.model_copy(update={"redis": "redis://127.0.0.1:1/0"})


def journal(settings: Settings, client: Client) -> ClickHouseJournal:
    return ClickHouseJournal(client, settings.clickhouse_database)


def store(settings: Settings, client: Client) -> ClickHouseUsageStore:
    return ClickHouseUsageStore(client, settings.clickhouse_database)


def post(settings: Settings, client: Client, row: UsageRow, entry: int = 1, **fields: object) -> None:
    """The lines of a session's utterance, as the flow would post it."""
    cell = f"{row.usage.scope}@{row.window_start_ms}"
    about = {"cell_id": cell, "scope": row.usage.scope, "revision": row.offset + 1, "entry": entry} | fields
    journal(settings, client).insert_lines(
        [
            ledger_line(f"user/{row.usage.user_id}", 1, -row.cost_us, **about),
            ledger_line(f"node/{row.usage.node_id}", 1, row.credit_us, reason="credit", **about),
            ledger_line(REVENUE, 1, row.cost_us - row.credit_us, reason="revenue", **about),
        ]
    )
    journal(settings, client).insert_position(OutboxPosition(epoch=1, entry=entry, at_ms=NOON_MS))


def test_without_redis_it_explains_all_the_same(alone: Settings, clickhouse: Client) -> None:
    """Ids with every character that ids may have; a line stored twice counts once."""
    row = usage_row("e:1.a_b-c", scope="session/s:1.a_b-c", user_id="u:1.a_b-c", node_id="n:1.a_b-c")
    store(alone, clickhouse).insert_usage([row, moved_row(row, offset=7)])
    post(alone, clickhouse, row)
    post(alone, clickhouse, row)
    explained = explain(alone, recognise("user/u:1.a_b-c#1"))
    assert isinstance(explained, LineExplained)
    assert explained.agreement is Agreement.AGREES
    assert explained.cell.payers[0].lines.lines == 1
    shown = metering(
        "explain",
        "utterance-e:1.a_b-c",
        environment={**settings_environment(alone)},
    )
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert "user/u:1.a_b-c#1" in shown.stdout.decode()


def settings_environment(settings: Settings) -> dict[str, str]:
    """For a command that is to have the same settings."""
    from tests.support.commands import clean_environment

    return clean_environment(
        clickhouse=settings.clickhouse, clickhouse_database=settings.clickhouse_database, redis=settings.redis
    )


def test_an_identity_that_a_lifecycle_event_has_does_not_count(alone: Settings, clickhouse: Client) -> None:
    """Nobody paid for that utterance; one with another user, at a later place, is not what counts."""
    stored = store(alone, clickhouse)
    stored.insert_usage([usage_row("e-1", source="scheduler/a", offset=5)])
    stored.insert_lifecycle([lifecycle_row("e-1", offset=4, kind=LifecycleKind.JOINED)])
    explained = explain(alone, recognise("utterance-e-1"))
    assert isinstance(explained, UtteranceExplained)
    [event] = explained.events
    assert event.cell is None
    assert [(each.what, each.counts) for each in event.occurrences] == [
        ("joined", True),
        ("utterance", False),
    ]
    assert "belongs to another event" in explained.why


def test_an_occurrence_in_another_window_takes_the_identity(alone: Settings, clickhouse: Client) -> None:
    """The cell of the later place has no usage that counts."""
    first = usage_row("e-1", scope="session/s-1", offset=3)
    other = usage_row("e-1", scope="session/s-1", offset=9, time_ms=NOON_MS + WINDOW_MS)
    store(alone, clickhouse).insert_usage([other])
    store(alone, clickhouse).insert_usage([first])
    post(alone, clickhouse, first)
    counting = explain(alone, AskedCell("session/s-1", NOON_MS))
    assert counting.agreement is Agreement.AGREES
    with pytest.raises(CommandError, match="has no usage in that minute"):
        explain(alone, AskedCell("session/s-1", NOON_MS + WINDOW_MS))
    explained = explain(alone, recognise("session/s-1@2026-01-01T12:00:59.999Z"))
    assert explained == counting


def test_what_a_rebuild_voided_is_said(alone: Settings, clickhouse: Client) -> None:
    """The line is named void, and the cell counts without it."""
    row = usage_row("e-1", scope="session/s-1")
    store(alone, clickhouse).insert_usage([row])
    post(alone, clickhouse, row, entry=5)
    clickhouse.command("INSERT INTO epochs (epoch, after_entry, at_ms) VALUES (2, 4, 0)")
    with pytest.raises(CommandError, match="user/u-1#1 is void"):
        explain(alone, AskedLine("user/u-1", 1))
    cell = explain(alone, AskedCell("session/s-1", NOON_MS))
    assert cell.agreement is Agreement.NOT_SETTLED
    assert "nothing is posted yet" in cell.why


def test_a_gap_and_the_end_of_a_chain(alone: Settings, clickhouse: Client) -> None:
    """A line that is missing in the middle is not the same as one that was never there."""
    lines = [ledger_line("user/u-1", seq, 5, 5 * (seq - 1), reason="adjustment") for seq in (1, 3)]
    journal(alone, clickhouse).insert_lines(lines)
    with pytest.raises(CommandError, match="the ledger has a gap"):
        explain(alone, AskedLine("user/u-1", 2))
    with pytest.raises(CommandError, match="its last one is user/u-1#3"):
        explain(alone, AskedLine("user/u-1", 4))
    with pytest.raises(CommandError, match="user/u-2 has no ledger lines"):
        explain(alone, AskedLine("user/u-2", 1))
    assert explain(alone, AskedLine("user/u-1", 3)).why == "line 2 of the account is missing"


def test_a_command_that_moved_nothing_or_was_refused(alone: Settings, clickhouse: Client) -> None:
    """It has a result and no lines, or a dead letter; one line is half a posting."""
    record = RequestRecord(
        request_id="r-1", digest="d", kind="write_off", account="user/u-1", amount_us=0, balance_us=3,
        outcome="APPLIED", actor="o", note="[red]\x1b[31m", epoch=1, entry=1, posted_at_ms=NOON_MS,
    )  # fmt: skip
    journal(alone, clickhouse).insert_requests([record])
    value = b'{"id":"x","data":{"request_id":"r-2"}}'
    letter = DeadLetter(
        topic="lingua.commands", partition=0, offset=3, reason="request_conflict", detail="taken", key=None,
        value=value, appended_at_ms=NOON_MS,
    )  # fmt: skip
    store(alone, clickhouse).insert_dead_letters([letter])
    nothing = explain(alone, AskedName("r-1"))
    assert nothing.agreement is Agreement.AGREES
    shown = metering("explain", "--request", "r-1", environment=settings_environment(alone)).stdout.decode()
    assert "[red]\\x1b[31m" in shown
    refused = explain(alone, AskedName("r-2"))
    assert isinstance(refused, CommandExplained)
    assert (refused.command, refused.dead_letters[0].value) == (None, value.decode())
    half = ledger_line("user/u-1", 1, 5, reason="top_up", request_id="r-3")
    journal(alone, clickhouse).insert_lines([half])
    assert "sum to 5 us" in explain(alone, AskedLine("user/u-1", 1)).why


def test_a_scope_lists_its_cells(alone: Settings, clickhouse: Client) -> None:
    """Cells that the ledger lacks too; and how the scope came to its end."""
    first = usage_row("e-1", scope="session/s-1", offset=3)
    second = usage_row("e-2", scope="session/s-1", offset=9, time_ms=NOON_MS + WINDOW_MS)
    store(alone, clickhouse).insert_usage([first, second])
    post(alone, clickhouse, first)
    journal(alone, clickhouse).insert_settlements([settlement("session/s-1", 4)])
    explained = explain(alone, AskedScope("session/s-1"))
    assert isinstance(explained, ScopeExplained)
    assert [(each.charged_us, each.agreement) for each in explained.cells] == [
        (400_000, Agreement.AGREES),
        (0, Agreement.NOT_SETTLED),
    ]
    assert (explained.cells_in_all, explained.ended) == (1, "ended")
    assert explained.agreement is Agreement.NOT_SETTLED
    with pytest.raises(CommandError, match="session/s-2 has no usage and no ledger lines"):
        explain(alone, AskedScope("session/s-2"))


def test_too_many_utterances_of_one_name(alone: Settings, clickhouse: Client) -> None:
    """Ids of utterances need not be unique: it asks for more."""
    rows = [usage_row("e-1", scope=f"session/s-{number}") for number in range(FOUND_AT_MOST + 1)]
    store(alone, clickhouse).insert_usage(rows)
    with pytest.raises(CommandError, match="say --source and --id"):
        explain(alone, AskedName("utterance-e-1"))
    one = explain(alone, AskedUtterance("utterance-e-1", scope="session/s-7"))
    assert isinstance(one, UtteranceExplained)
    assert len(one.events) == 1


@pytest.mark.parametrize(
    ("index", "query"),
    [
        ("by_cell", "SELECT seq FROM ledger WHERE cell_id = 'room/r@0'"),
        ("by_request", "SELECT seq FROM ledger WHERE request_id = 'r'"),
        ("by_utterance", "SELECT id FROM usage_events WHERE utterance_id = 'u'"),
    ],
)
def test_single_things_are_found_by_an_index(
    index: str, query: str, alone: Settings, clickhouse: Client
) -> None:
    """The server uses it, also for rows that were there before it."""
    store(alone, clickhouse).insert_usage([usage_row()])
    journal(alone, clickhouse).insert_lines([ledger_line("user/u-1", 1, 5)])
    plan = clickhouse.query(f"EXPLAIN indexes = 1 {query}").result_rows
    assert any(f"Name: {index}" in row[0] for row in plan)


def test_an_archive_from_before_positions_were_noted(alone: Settings, clickhouse: Client) -> None:
    """How far the ledger is whole is told by its newest entry then."""
    row = usage_row("e-1", scope="session/s-1")
    store(alone, clickhouse).insert_usage([row])
    post(alone, clickhouse, row)
    clickhouse.command("TRUNCATE TABLE outbox_positions")
    assert explain(alone, AskedLine("user/u-1", 1)).agreement is Agreement.AGREES


def test_the_same_name_in_a_refused_message_hides_no_command(alone: Settings, clickhouse: Client) -> None:
    """A word without a kind means an utterance that is stored, else a command, else a dead letter."""
    letters = [
        DeadLetter(
            topic="lingua.events", partition=0, offset=offset, reason="not_json", detail="d", key=None,
            value=b'"r-1" \xff', appended_at_ms=NOON_MS,
        )
        for offset in (1, 2)
    ]  # fmt: skip
    store(alone, clickhouse).insert_dead_letters(letters)
    refused = explain(alone, AskedName("r-1"))
    assert isinstance(refused, UtteranceExplained)
    assert [(each.named, each.value) for each in refused.dead_letters] == [(False, '"r-1" \\xff')] * 2
    pair = [
        ledger_line("user/u-1", 1, 5, reason="top_up", request_id="r-1"),
        ledger_line("platform/top_ups", 1, -5, reason="top_up", request_id="r-1"),
    ]
    journal(alone, clickhouse).insert_lines(pair)
    command = explain(alone, AskedName("r-1"))
    assert isinstance(command, CommandExplained)
    assert [line.account for line in command.command.lines] == ["platform/top_ups", "user/u-1"]
