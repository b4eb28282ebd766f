"""Commands for the database itself, and access to the database for the other commands."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click

from core import logs
from core.settings import Settings, load_settings
from repository.engine import event_log, migrations
from repository.engine.database import Database

T = TypeVar("T")


def configured() -> Settings:
    """Load the settings, configure logging with them, and return them."""
    settings = load_settings()
    logs.configure(settings.log_format, settings.log_level)
    return settings


def with_database(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    """Migrate the configured database, run `work` with it, and return the result of `work`."""

    async def go() -> T:
        database = Database(settings.database_url, has_pooler=settings.has_pooler)
        try:
            await migrations.migrate(database)
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(go())


@click.command()
def migrate() -> None:
    """Migrate the database to the newest schema."""

    async def work(database: Database) -> None:
        click.echo(f"The database is at revision {migrations.newest_revision()}.")

    with_database(configured(), work)


@click.command("new-epoch")
def new_epoch() -> None:
    """Give the event log a new identity.

    Run this after restoring a backup, before starting the service. Positions that clients remember from before the
    restore mean nothing in the restored log. With a new epoch, those clients are told to start over instead of
    receiving wrong events.
    """
    click.echo(f"The epoch of the log is now {with_database(configured(), event_log.renew_epoch)}.")
