"""The command `marquee search`."""

from __future__ import annotations

import click

from commands.database import configured, with_database
from repository import search as index
from repository.engine.database import Database
from resources.registry import RESOURCES


@click.group()
def search() -> None:
    """Maintain the index for searches."""


@search.command()
def rebuild() -> None:
    """Index all rows anew.

    Run this when searches miss rows, or after an upgrade of Python, whose newer Unicode data may split some texts into
    other words. The service may run meanwhile. On SQLite, its writes wait while the existing index is checked.
    """

    async def work(database: Database) -> None:
        for resource in filter(lambda each: each.searched, RESOURCES):
            count = await index.rebuild(database, resource)
            click.echo(f"Indexed {count:,} {resource.name}.")

    with_database(configured(), work)
