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
    """Rebuild the search index from all rows.

    Run this when searches miss rows, or after an upgrade of Python: its newer Unicode data may split some texts into
    different words. The service may run meanwhile. On SQLite, its writes wait while the existing index is checked.
    """

    async def work(database: Database) -> None:
        for resource in filter(lambda each: each.searched, RESOURCES):
            count = await index.rebuild(database, resource)
            click.echo(f"Indexed {count:,} {resource.name}.")

    with_database(configured(), work)
