"""The command that fills an empty database with a small catalog of real films, so that there is something to look at.

`seed_data.json` holds facts about the films. The users, their ratings and their comments are invented. Nobody can sign
in as one of the users, because their passwords are random and not kept.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import click
import orjson

from commands.database import configured, with_database
from repository.catalog.seed import add_films
from services.passwords import hasher_for

DATA = Path(__file__).with_name("seed_data.json")


@click.command()
@click.option("--force", is_flag=True, help="add the films even if there are movies already")
def seed(force: bool) -> None:
    """Add a small catalog of real films."""
    settings = configured()
    data = orjson.loads(DATA.read_bytes())
    password_hash = hasher_for(settings).hash(secrets.token_urlsafe())
    made = with_database(
        settings,
        lambda database: database.write(lambda tx: add_films(tx, data, password_hash, even_if_not_empty=force)),
    )
    click.echo(f"Added {made.movies} movies, {made.ratings} ratings and {made.comments} comments.")
