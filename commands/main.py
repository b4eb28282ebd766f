"""The command line: serving, migrating and administering."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click
from pydantic import TypeAdapter, ValidationError

import main
from core import logs
from core.errors import InvalidInput, MarqueeError, Problem, words_of
from core.password_rules import check_password
from core.settings import Settings, load_settings
from repository.accounts import users
from repository.engine import event_log, migrations
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from resources.accounts import credentials
from services.passwords import hasher_for

T = TypeVar("T")


def _settings() -> Settings:
    settings = load_settings()
    logs.configure(settings.log_format, settings.log_level)
    return settings


def _with_database(work: Callable[[Database], Awaitable[T]]) -> T:
    async def go() -> T:
        database = Database(_settings().database_url)
        try:
            await migrations.migrate(database)
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(go())


@click.group()
def cli() -> None:
    """Marquee: a real-time, websocket-first catalog service."""


@cli.command()
def serve() -> None:
    """Serve, as `python main.py` does."""
    sys.exit(main.run())


@cli.command()
def migrate() -> None:
    """Bring the database to the newest schema."""

    async def work(database: Database) -> None:
        click.echo(f"The database is at revision {migrations.newest_revision()}.")

    _with_database(work)


@cli.command("create-admin")
@click.option("--username", help="3 to 50 characters")
@click.option("--email")
@click.option("--password", prompt=True, hide_input=True, confirmation_prompt=True, help="8 to 128 characters")
def create_admin(username: str | None, email: str | None, password: str) -> None:
    """Create an account in the group admin."""
    given = {"username": username, "email": email, "password": password}
    body = TypeAdapter(credentials.RegisterBody).validate_python({k: v for k, v in given.items() if v is not None})
    fields = body.model_dump(exclude_unset=True, exclude={"password"})
    settings = _settings()
    needs_mix = settings.needs_password_mix
    if problems := check_password(password, username=username, email=email, needs_mix=needs_mix):
        raise InvalidInput(problems)
    password_hash = hasher_for(settings).hash(password)

    async def work(database: Database) -> None:
        async def store(tx: Transaction) -> dict[str, object]:
            return await users.create_admin(tx, fields, password_hash)

        user = await database.write(store)
        click.echo(f"Created admin {user['username'] or user['email']} with id {user['id']}.")

    _with_database(work)


@cli.command("new-epoch")
def new_epoch() -> None:
    """Give the event log a new identity: run this after restoring a backup, before serving.

    Positions that watchers remember from the log before the restore mean nothing in the restored one; with a new
    epoch they are told to start over instead of being given wrong events.
    """

    async def work(database: Database) -> None:
        click.echo(f"The log's epoch is {await event_log.renew_epoch(database)} now.")

    _with_database(work)


def run() -> None:
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ValidationError as error:
        for each in error.errors(include_url=False, include_input=False):
            where = ".".join(str(part) for part in each["loc"])
            message = words_of(each)
            click.echo(f"Error: {where + ': ' if where else ''}{message}", err=True)
        sys.exit(2)
    except Problem as error:
        detail = error.detail if isinstance(error.detail, str) else "; ".join(each["msg"] for each in error.detail)
        click.echo(f"Error: {detail}", err=True)
        sys.exit(2 if isinstance(error, InvalidInput) else 1)
    except MarqueeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
