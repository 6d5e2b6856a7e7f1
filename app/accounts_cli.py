"""`metering accounts ...`: the accounts API and what its operators do to its database."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.errors import CommandError

accounts_app = typer.Typer(
    name="accounts",
    help="Users, nodes and their API: serve it, and look after its database.",
    no_args_is_help=True,
)

UserId = Annotated[str, typer.Argument(help="the user's id, without user/")]
PlanName = Annotated[str, typer.Argument(help="name of the plan")]
BackupFile = Annotated[Path, typer.Argument(help="the backup, a text file")]


@accounts_app.command()
def migrate(
    *,
    down_to: Annotated[
        str | None, typer.Option(help="go back to this revision (or `base`); what later ones kept is lost")
    ] = None,
) -> None:
    """Make what the accounts database lacks. Repeating it is harmless."""
    from accounts.migrate import known_revisions, migrate_down
    from accounts.migrate import migrate as migrate_up
    from app.accounts_service import clear_failures, open_database
    from schemas.settings import load_settings

    if down_to not in (None, "base", *known_revisions()):
        raise CommandError(f"--down-to {down_to}: there is no such revision", exit_code=2)
    database = open_database(load_settings())
    with clear_failures():
        before, after = migrate_up(database) if down_to is None else migrate_down(database, down_to)
    _say(f"accounts database: revision {after or 'none'}" + (" already" if before == after else ""))


@accounts_app.command()
def serve(
    *,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="TCP port")] = 8080,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    migrate_first: Annotated[
        bool, typer.Option("--migrate", help="make what the database lacks first")
    ] = False,
    trusted_proxies: Annotated[
        str, typer.Option(help="addresses whose X-Forwarded-For is believed, by commas")
    ] = "",
) -> None:
    """Serve the API until SIGTERM. Put a proxy with TLS in front of it."""
    from app import accounts_service

    if migrate_first:
        migrate(down_to=None)
    accounts_service.serve(host, port, workers, trusted_proxies)


@accounts_app.command(name="create-operator")
def create_operator(
    username: Annotated[str, typer.Argument(help="3 to 32 letters, digits, dots, dashes")],
    email: Annotated[str, typer.Argument(help="e-mail address")],
    *,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="read the password from standard input")
    ] = False,
) -> None:
    """Make an operator, or the user of that name and address into one. Prints the user id."""
    from pydantic import ValidationError

    from accounts import users
    from accounts.api.problems import field_errors
    from accounts.api.wire import Register
    from accounts.audit import Actor, ActorType
    from app.accounts_service import clear_failures, open_accounts
    from schemas.settings import load_settings

    accounts = open_accounts(load_settings())
    if password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    try:
        given = Register(username=username, email=email, password=password)
    except ValidationError as error:
        [first, *_] = field_errors(error.errors(include_input=False))
        raise CommandError(f"{first['where']}: {first['message']}", exit_code=2) from None
    with clear_failures():
        user_id, new = users.create_operator(
            accounts,
            given.username,
            given.email,
            given.password,
            actor=Actor(ActorType.SYSTEM, "cli/metering"),
        )
    _say(f"{username} is an operator" + ("" if new else "; the password stays what it was"))
    typer.echo(user_id)


@accounts_app.command(name="rotate-key")
def rotate_key(
    *,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="what older keys signed is worth nothing any more")
    ] = False,
) -> None:
    """Sign access tokens with a new key; older keys verify until what they signed has expired. Prints the key
    id.
    """
    from accounts.audit import Actor, ActorType
    from app.accounts_service import clear_failures, now_ms, open_accounts
    from schemas.settings import load_settings

    accounts = open_accounts(load_settings())
    with clear_failures():
        typer.echo(accounts.tokens.rotate(Actor(ActorType.SYSTEM, "cli/metering"), now_ms(), at_once=at_once))


@accounts_app.command()
def subscribe(user_id: UserId, plan: PlanName) -> None:
    """Give a user a plan of the file METERING_PLANS, from the period that lies now on."""
    from accounts.audit import Actor, ActorType
    from accounts.plans import Subscriptions
    from app.accounts_service import clear_failures, now_ms, open_database
    from schemas.plans import load_plans
    from schemas.settings import load_settings

    settings = load_settings()
    known = load_plans(settings.plans)
    if plan not in known:
        raise CommandError(
            f"there is no plan {plan!r}: METERING_PLANS has {', '.join(known) or 'none'}", exit_code=2
        )
    with clear_failures():
        subscriptions = Subscriptions(open_database(settings), now_ms)
        if not subscriptions.subscribe(user_id, plan, Actor(ActorType.SYSTEM, "cli/metering")):
            raise CommandError(f"there is no user {user_id!r}")
    _say(f"user/{user_id} has plan {plan}")


@accounts_app.command()
def unsubscribe(user_id: UserId, plan: PlanName) -> None:
    """Take a plan from a user. Minutes that were given stay until they expire."""
    from accounts.audit import Actor, ActorType
    from accounts.plans import Subscriptions
    from app.accounts_service import clear_failures, now_ms, open_database
    from schemas.settings import load_settings

    with clear_failures():
        subscriptions = Subscriptions(open_database(load_settings()), now_ms)
        if not subscriptions.unsubscribe(user_id, plan, Actor(ActorType.SYSTEM, "cli/metering")):
            raise CommandError(f"user/{user_id} does not have plan {plan}")
    _say(f"user/{user_id} has plan {plan} no more")


@accounts_app.command()
def backup(file: BackupFile) -> None:
    """Write everything in the accounts database into a new file, while it is in use.

    The file is of use only with METERING_ACCOUNTS_SECRET; keep that elsewhere.
    """
    from accounts.backup import back_up
    from app.accounts_service import clear_failures, now_ms, open_database, open_secrets
    from schemas.rfc3339 import format_rfc3339_ms
    from schemas.settings import load_settings

    settings = load_settings()
    with clear_failures():
        counts = back_up(open_database(settings), file, open_secrets(settings), format_rfc3339_ms(now_ms()))
    _say(f"{file}: {_rows(counts)}")


@accounts_app.command()
def restore(file: BackupFile) -> None:
    """Fill an empty accounts database from a backup, SQLite or PostgreSQL whichever it came from."""
    from accounts import backup as backups
    from app.accounts_service import clear_failures, open_database, open_secrets
    from schemas.settings import load_settings

    settings = load_settings()
    with clear_failures():
        counts = backups.restore(open_database(settings), file, open_secrets(settings, make=False))
    _say(f"{file}: {_rows(counts)} restored")


def _rows(counts: dict[str, int]) -> str:
    return f"{sum(counts.values())} rows ({', '.join(f'{name} {count}' for name, count in counts.items())})"


def _say(line: str) -> None:
    typer.echo(f"metering: {line}", err=True)
