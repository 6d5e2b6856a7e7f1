"""The command line, `metering`.

Whatever is expected to go wrong (a setting, a file, a server that is not there) ends in one line on standard
error, `metering: ...`, and exit code 1 or 2; a traceback is a bug. Each command imports what it needs, so
that `metering settle` does not wait for Kafka's client.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from app import accounts_cli
from app.errors import CommandError

app = typer.Typer(
    name="metering",
    help="Exact metering and billing for a real-time speech-translation network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(accounts_cli.accounts_app)
# What an operator looks for first when something is lost.
app.command()(accounts_cli.backup)
app.command()(accounts_cli.restore)

AccountArgument = Annotated[str, typer.Argument(help="user/<id>, node/<id> or platform/<name>")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output, amounts in us")]


def main() -> None:
    """Entry point of the `metering` script."""
    # It logs what it raises too; the one line is enough.
    logging.getLogger("clickhouse_connect").addHandler(logging.NullHandler())
    try:
        app()
    except Exception as problem:
        _fail_clearly(problem)


def _fail_clearly(problem: Exception) -> NoReturn:
    from schemas.settings import SettingsError

    if not isinstance(problem, (CommandError, SettingsError)):
        raise problem
    _say(str(problem))
    raise SystemExit(getattr(problem, "exit_code", 2)) from None


def _say(line: str) -> None:
    typer.echo(f"metering: {line}", err=True)


@app.command()
def generate(
    *,
    events: Annotated[int, typer.Option(min=1, help="distinct valid events, usage and lifecycle")] = 20_000,
    seed: Annotated[int, typer.Option(help="the same seed and start give the same bytes")] = 1,
    minutes: Annotated[int, typer.Option(min=1, help="span of the event times")] = 15,
    sessions: Annotated[int | None, typer.Option(min=0, help="sessions of one speaker")] = None,
    rooms: Annotated[int | None, typer.Option(min=0, help="rooms of several members")] = None,
    users: Annotated[int | None, typer.Option(min=1)] = None,
    nodes: Annotated[int | None, typer.Option(min=1)] = None,
    duplicates: Annotated[float, typer.Option(min=0, max=1, help="share that is sent twice")] = 0.0,
    disorder: Annotated[float, typer.Option(min=0, max=1, help="share that up to 50 others overtake")] = 0.0,
    late: Annotated[float, typer.Option(min=0, max=1, help="share that is held back to the end")] = 0.0,
    junk: Annotated[float, typer.Option(min=0, max=1, help="broken messages, as a share of --events")] = 0.0,
    start: Annotated[
        str | None, typer.Option(help="RFC 3339 instant of the first event; by default it all ends now")
    ] = None,
    rttm: Annotated[str | None, typer.Option(help="a file of speaker turns, instead of a seed")] = None,
    stagger: Annotated[
        float, typer.Option(min=0, help="seconds between the starts of two meetings (--rttm)")
    ] = 0.0,
    out: Annotated[str, typer.Option(help="file to write, or - for standard output")] = "-",
) -> None:
    """Make a realistic workload: CloudEvents, one per line, in the order in which they are sent.

    Sessions and rooms with joins, departures, drop-outs and returns, on nodes of different speed. Duplicates
    and junk come on top of --events. With --rttm the meetings in a file become rooms; --events, --minutes,
    --sessions, --rooms and --users do not apply then.
    """
    from app import workload
    from app.lines import create_lines, open_lines, write_messages
    from app.workload.rttm import decode_turns, meeting_lengths_ms, meeting_starts_ms

    transport = workload.TransportEffects(duplicates=duplicates, disorder=disorder, late=late, junk=junk)
    start_ms = None if start is None else _instant_ms(start, "--start")
    if rttm is not None:
        with open_lines(rttm) as file:
            turns = decode_turns(file.read(), rttm)
        starts_ms = meeting_starts_ms(meeting_lengths_ms(turns), start_ms, round(stagger * 1000), _now_ms())
        lines = workload.generate_from_rttm(
            turns, starts_ms, seed=seed, node_count=nodes or 5, transport=transport
        )
    else:
        spec = workload.WorkloadSpec(
            seed=seed,
            start_ms=_now_ms() // 1000 * 1000 - minutes * 60_000 if start_ms is None else start_ms,
            events=events,
            minutes=minutes,
            sessions=sessions,
            rooms=rooms,
            users=users,
            nodes=nodes,
            transport=transport,
        )
        lines = workload.generate(spec)
    with create_lines(out) as output:
        write_messages(output, lines)


def _instant_ms(text: str, option: str) -> int:
    from schemas.rfc3339 import parse_rfc3339_ms

    try:
        return parse_rfc3339_ms(text)
    except ValueError as problem:
        raise CommandError(f"{option} {text!r} {problem}", exit_code=2) from None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@app.command()
def settle(
    file: Annotated[str, typer.Argument(help="CloudEvents, one per line; - is standard input")],
) -> None:
    """Settle a file of events, purely: no servers, no lateness.

    Prints one JSON line for every payer, node and platform/revenue of every cell, sorted by account and cell.
    Refused lines go to standard error as {"line","reason"}.
    """
    import msgspec

    from app.lines import open_lines
    from metering.settle import settle_lines
    from schemas.rate_card import load_rate_card
    from schemas.settings import load_settings

    settings = load_settings()
    card = load_rate_card(settings.rate_card)
    with open_lines(file) as lines:
        settled, rejects = settle_lines(lines, card, settings.presence_max_s * 1000)
    encoder = msgspec.json.Encoder()
    sys.stdout.buffer.write(encoder.encode_lines(settled))
    sys.stdout.buffer.flush()
    refusals = [{"line": reject.line, "reason": reject.reason} for reject in rejects]
    sys.stderr.buffer.write(encoder.encode_lines(refusals))
    sys.stderr.buffer.flush()


@app.command()
def emit(
    file: Annotated[str, typer.Argument(help="events, one per line; - is standard input")],
    *,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="events per second; by default as fast as it goes")
    ] = None,
    topic: Annotated[str | None, typer.Option(help="by default lingua.events")] = None,
    key_from_scope: Annotated[
        bool, typer.Option("--key-from-scope/--no-key", help="key of the messages: their scope, or none")
    ] = True,
) -> None:
    """Send events to Kafka, keyed by scope, and check that each is delivered.

    What is no valid event is sent too: refusing it is the flow's business.
    """
    from app.emit import Emitter, emit_lines
    from app.lines import messages, open_lines
    from app.progress import EmitProgress
    from schemas import topics
    from schemas.settings import load_settings

    settings = load_settings()
    with (
        open_lines(file) as lines,
        EmitProgress(lines) as progress,
        Emitter(settings.kafka, topic or topics.EVENTS, progress.delivered) as emitter,
    ):
        emit_lines(messages(lines), emitter, keyed=key_from_scope, rate_per_s=rate)
    summary = emitter.summary
    if summary.failed:
        raise CommandError(f"{summary.failed} of {summary.sent} events were not delivered: {summary.why()}")
    _say(
        f"{summary.delivered} events delivered in {summary.seconds:.1f} s, {summary.rate_per_s:,.0f} a second"
    )


@app.command()
def up(
    *,
    directory: Annotated[Path, typer.Option("--dir", help="where everything is kept")],
    broker: Annotated[str, typer.Option(help="tansu, or apache (needs Java)")] = "tansu",
) -> None:
    """Start a broker, Redis, ClickHouse and all flows; when ready, print where they are as one JSON line.

    SIGTERM or Ctrl-C stops all of it.
    """
    from app.supervisor import run_up

    raise SystemExit(run_up(directory, broker=broker))


@app.command()
def migrate() -> None:
    """Make what ClickHouse, Kafka, Redis and the accounts database lack. Repeating it is harmless."""
    from app.clients import clickhouse_client, redis_client
    from app.migrate import create_topics, initialise_redis, run_migrations
    from schemas.settings import load_settings

    settings = load_settings()
    clickhouse = clickhouse_client(settings)
    applied = run_migrations(clickhouse, settings.clickhouse_database)
    created = create_topics(settings.kafka, settings.partitions, settings.broker_append_time)
    # Last: an epoch means that everything else is there.
    epoch = initialise_redis(redis_client(settings), clickhouse, settings.clickhouse_database)
    _say(f"ClickHouse: {_listed(applied, 'migration')} applied")
    _say(f"Kafka: {_listed(created, 'topic')} created")
    _say(f"Redis: epoch {epoch}")
    accounts_cli.migrate(down_to=None)


def _listed(names: list[str], noun: str) -> str:
    return f"no {noun}" if not names else f"{len(names)} {noun}{'s'[: len(names) > 1]} ({', '.join(names)})"


@app.command(name="adopt-log")
def adopt_log() -> None:
    """Go on with another log, after the topic was made anew or grew partitions. The flows must be stopped."""
    from app.adopt_log import adopt_new_log
    from schemas.rfc3339 import format_rfc3339_ms
    from schemas.settings import load_settings

    adopted = adopt_new_log(load_settings())
    for store in adopted.moved:
        _say(f"recovery store put aside: {store}")
    _say(
        f"windows before {format_rfc3339_ms(adopted.frozen_before_ms)} are frozen; "
        "the flows will read the topic from its head"
    )


@app.command()
def resettle(
    *,
    since: Annotated[
        str | None,
        typer.Option(
            help="RFC 3339: compare every frozen window from there on; by default what may have changed"
        ),
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="seconds to wait for the ledger and the usage store to catch up")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Correct frozen minutes: charge late usage, and whatever else the live charges could not know.

    Repeating it changes nothing; killed at any point, the next run does what is left. The process `audit` runs
    it on a timer.
    """
    from app.repair.resettle import run_resettle
    from schemas.rfc3339 import format_rfc3339_ms
    from schemas.settings import load_settings

    since_ms = None if since is None else _instant_ms(since, "--since")
    done = run_resettle(load_settings(), since_ms=since_ms, patience_s=patience)
    if as_json:
        _print_json([done])
    if done.superseded:
        raise CommandError(f"resettle {done.token} was overtaken by a newer one")
    _say(
        f"resettle {done.token}: {done.cells} cells of {done.scopes} scopes corrected, {done.changes} changes, "
        f"{done.moved_us} us moved; complete before {format_rfc3339_ms(done.frozen_before_ms)}"
    )
    if done.refused:
        raise CommandError(f"{done.refused} cells would move more than is possible and were left alone")


@app.command(name="rebuild-balances")
def rebuild_balances(
    *,
    patience: Annotated[
        float, typer.Option(min=0, help="seconds to wait for the usage store to catch up with Kafka")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Restore an empty or older Redis from the ledger, under a new epoch; then run `metering resettle`.

    The flows may be running: they refuse to work until it is over. Killed at any point, run it again.
    """
    from app.repair.rebuild import run_rebuild
    from schemas.rfc3339 import format_rfc3339_ms
    from schemas.settings import load_settings

    done = run_rebuild(load_settings(), patience_s=patience)
    if as_json:
        _print_json([done])
    _say(
        f"epoch {done.epoch} goes on after outbox entry {done.after_entry}: {done.accounts} accounts and "
        f"{done.requests} requests restored, {done.forgotten} accounts forgotten, {done.commands} commands read "
        f"again; windows before {format_rfc3339_ms(done.frozen_before_ms)} wait for `metering resettle`"
    )


@app.command(name="write-off")
def write_off(
    *,
    patience: Annotated[
        float, typer.Option(min=0, help="seconds to wait for the ledger to have every transfer")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Now, not only at the next half hour: pay users' debts from the credit of the nodes bound to them.

    Killed at any point, run it again, or leave it to the flow: no transfer is carried out twice.
    """
    from app.write_offs import run_write_off
    from schemas.settings import load_settings

    done = run_write_off(load_settings(), _now_ms(), patience_s=patience)
    if as_json:
        _print_json([done])
    _say(f"{done.closed} transfers closed, {done.moved_us} us moved, {done.open} still open")


@app.command(name="reconcile")
def reconcile_books(
    *,
    skip_log: Annotated[
        bool, typer.Option("--skip-log", help="do not read the whole log of events again")
    ] = False,
    patience: Annotated[
        float, typer.Option(min=0, help="seconds to wait for flows to catch up with a cut")
    ] = 30.0,
) -> None:
    """Compare Kafka, usage store, ledger, Redis and the recomputed bill, on a live system.

    Prints a JSON report: what was compared, how much differs, and the first accounts, cells or messages that do.
    Exit code 1 on drift, and when something could not be proven because a flow is behind.
    """
    from app.repair.reconcile import reconcile
    from schemas.settings import load_settings

    report = reconcile(load_settings(), say=_say, read_log=not skip_log, patience_s=patience)
    sys.stdout.buffer.write(report.to_json())
    sys.stdout.buffer.flush()
    raise SystemExit(report.exit_code)


@app.command()
def floor(
    account: AccountArgument,
    *,
    minutes: Annotated[str, typer.Option(help="balance minutes at or below which nothing is admitted: -300")],
) -> None:
    """Give an account a floor of its own."""
    from app.floors import set_floor
    from app.money_commands import amount_us_of
    from schemas.settings import load_settings

    set_floor(load_settings(), _required_account(account), amount_us_of(minutes))


@app.command()
def balance(account: AccountArgument, *, as_json: JsonOption = False) -> None:
    """Show an account's live balance, from Redis."""
    from app import views
    from app.clients import redis_client
    from schemas.settings import load_settings

    found = views.read_balance(redis_client(load_settings()), _required_account(account))
    if as_json:
        _print_json([found])
    else:
        from app.tables import balance_table

        _print_table(balance_table([found]))


@app.command()
def statement(
    account: AccountArgument,
    *,
    limit: Annotated[int, typer.Option(min=1, help="show so many of the newest lines")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Show an account's ledger lines with the balance before and after, from ClickHouse."""
    from app import views
    from app.clients import clickhouse_client
    from schemas.settings import load_settings

    _required_account(account)
    settings = load_settings()
    lines = views.read_statement(clickhouse_client(settings), settings.clickhouse_database, account, limit)
    if as_json:
        _print_json(lines)
    elif lines:
        from app.tables import statement_table

        _print_table(statement_table(lines))
    if not lines:
        _say(f"{account} has no ledger lines")


@app.command()
def bill(
    scope: Annotated[str, typer.Argument(help="room/<id> or session/<id>")], *, as_json: JsonOption = False
) -> None:
    """Show what a room or a session cost, and each payer's share, from ClickHouse."""
    from app import views
    from app.clients import clickhouse_client
    from schemas.settings import load_settings

    if scope.partition("/")[0] not in ("room", "session"):
        raise CommandError(f"{scope!r} is no scope: it is room/<id> or session/<id>", exit_code=2)
    settings = load_settings()
    shares = views.read_bill(clickhouse_client(settings), settings.clickhouse_database, scope)
    if as_json:
        _print_json(shares)
    elif shares:
        from app.tables import bill_table

        _print_table(bill_table(shares))
    if not shares:
        _say(f"{scope} has no charges")


@app.command()
def explain(
    thing: Annotated[
        str | None,
        typer.Argument(
            help="user/u-5#12 (a ledger line), room/r-9@1767225600000 (a cell; an instant in it will do), "
            "room/r-9, or the id of an utterance or a money command",
            show_default=False,
        ),
    ] = None,
    seq: Annotated[
        str | None, typer.Argument(help="number of the line, after an account", show_default=False)
    ] = None,
    *,
    cell: Annotated[str | None, typer.Option(help="a cell, as the ledger names it")] = None,
    utterance: Annotated[str | None, typer.Option(help="an utterance by its id")] = None,
    source: Annotated[str | None, typer.Option(help="source of an event, with --id")] = None,
    event_id: Annotated[str | None, typer.Option("--id", help="id of an event, with --source")] = None,
    request: Annotated[str | None, typer.Option(help="a money command by its request id")] = None,
    scope: Annotated[str | None, typer.Option(help="look for the utterance only there: room/r-9")] = None,
    every_row: Annotated[bool, typer.Option("--all", help="show every row of long tables")] = False,
    as_json: JsonOption = False,
) -> None:
    """Explain a charge: ledger line, cell, utterances, rates, payers, remainder; or who paid for an utterance.

    It computes everything again as it explains, and says whether the ledger agrees. Exit code 1 when it does not;
    "not settled yet" is no disagreement.
    """
    from app import explain as explaining
    from schemas.settings import load_settings

    named = [text for text in (thing, cell, utterance, request, source or event_id) if text is not None]
    if len(named) != 1 or (source is None) is not (event_id is None):
        raise CommandError(
            "explain one thing: user/u-5#12, room/r-9@1767225600000, room/r-9, an id, or --source with --id",
            exit_code=2,
        )
    for text in (thing, seq, cell, utterance, source, event_id, request, scope):
        _require_text(text)
    asked: explaining.Asked
    if scope is not None:
        explaining.required_scope(scope)
    if thing is not None:
        asked = explaining.recognise(thing, seq, scope)
    elif cell is not None:
        asked = explaining.asked_cell(cell)
    elif request is not None:
        asked = explaining.AskedRequest(request)
    else:
        asked = explaining.AskedUtterance(utterance, source, event_id, scope)
    explained = explaining.explain(load_settings(), asked)
    if as_json:
        sys.stdout.buffer.write(explaining.to_json(explained))
        sys.stdout.buffer.flush()
    else:
        from app.explain_text import show

        show(explained, _console(), every_row=every_row)
    raise SystemExit(explaining.exit_code(explained))


def _require_text(text: str | None) -> None:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise CommandError(f"{text!r} is no name: it is not UTF-8", exit_code=2) from None


@app.command(name="topup")
def top_up(
    account: AccountArgument,
    minutes: Annotated[str, typer.Argument(help="balance minutes, to the microsecond: 30, 0.5")],
    *,
    request_id: Annotated[
        str | None, typer.Option(help="one request is carried out once; by default a new one")
    ] = None,
    reason: Annotated[str, typer.Option(help="why")] = "top-up",
    actor: Annotated[str, typer.Option(help="who gives it")] = "operator",
) -> None:
    """Give an account minutes: sends a money command, and prints its request id.

    After a failure, send it again with the same --request-id: it cannot count twice.
    """
    from app.money_commands import amount_us_of, top_up_message

    message, request = top_up_message(
        _required_account(account),
        amount_us_of(minutes),
        request_id=request_id,
        reason=reason,
        actor=actor,
        now_ms=_now_ms(),
    )
    _send_command(message, account, f"the top-up {request}")
    typer.echo(request)


@app.command()
def grant(
    account: AccountArgument,
    minutes: Annotated[str, typer.Argument(help="balance minutes, to the microsecond: 30, 0.5")],
    *,
    expires: Annotated[str, typer.Option(help="RFC 3339 instant at which what is left is taken back")],
    effective_from: Annotated[
        str | None, typer.Option("--from", help="RFC 3339 instant of the first window; by default now")
    ] = None,
    priority: Annotated[int, typer.Option(min=0, max=1_000, help="the smallest is spent first")] = 100,
    request_id: Annotated[
        str | None, typer.Option(help="one request is carried out once; by default a new one")
    ] = None,
    reason: Annotated[str, typer.Option(help="why: points, a voucher")] = "points",
    actor: Annotated[str, typer.Option(help="who gives it")] = "operator",
) -> None:
    """Give a user minutes for a while, spent before the rest of the balance; prints the grant's id.

    After a failure, send it again with the same --request-id and --from: it cannot count twice.
    """
    from app.money_commands import amount_us_of, grant_message
    from schemas.rfc3339 import format_rfc3339_ms

    message, request = grant_message(
        _required_account(account),
        amount_us_of(minutes),
        priority=priority,
        effective_from=effective_from or format_rfc3339_ms(_now_ms() // 60_000 * 60_000),
        expires_at=expires,
        request_id=request_id,
        reason=reason,
        actor=actor,
        now_ms=_now_ms(),
    )
    _send_command(message, account, f"the grant {request}")
    typer.echo(request)


def _send_command(message: bytes, account: str, what: str) -> None:
    from app.emit import Emitter
    from schemas import topics
    from schemas.settings import load_settings

    with Emitter(load_settings().kafka, topics.COMMANDS) as emitter:
        emitter.send(message, account.encode())
    if emitter.summary.failed:
        raise CommandError(f"{what} was not delivered: {emitter.summary.why()}")


@app.command()
def demo(
    *,
    svg: Annotated[Path | None, typer.Option(help="also write what was shown as a picture")] = None,
) -> None:
    """Show all of it, from nothing: balances falling live, a bill, a ledger, and the proof that all agree."""
    from app.demo import run_demo

    raise SystemExit(run_demo(svg))


def _required_account(text: str) -> str:
    prefix, _, rest = text.partition("/")
    if prefix not in ("user", "node", "platform") or not rest:
        raise CommandError(
            f"{text!r} is no account: it is user/<id>, node/<id> or platform/<name>", exit_code=2
        )
    return text


def _print_json(records: list[Any]) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.Encoder().encode_lines(records))
    sys.stdout.buffer.flush()


def _print_table(table: Any) -> None:
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    # A pipe has no width of its own; nothing may be cut off there.
    return console if console.is_terminal else Console(width=200)
