"""The migration that turns the genres, languages and countries of movies into links."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import command

from core.identity import unique_key
from core.times import utc_now
from repository.engine import migrations
from repository.engine.database import Database
from tests.conftest import Places
from tests.support.requests import ok
from tests.support.resources import sql
from tests.support.service import Service

EPOCH = "e" * 16
# Genres, languages and country of a movie, as the version before stored them.
STORED: list[tuple[list[str], list[str], str | None]] = [
    (["Noir", "drama"], ["English", "de"], "AT"),
    (["NOIR", "noir", "Sci-Fi"], ["Klingon", "english", "KLINGON"], "QQ"),
    ([" Sci-fi", "DRAMA"], [], None),
    ([], ["German", "DE"], "AT"),
]
SHOWN = [
    (["Noir", "Drama"], ["English", "German"], "AT"),
    (["Noir", "Sci-Fi"], ["Klingon", "English"], "QQ"),
    (["Sci-Fi", "Drama"], [], None),
    ([], ["German"], "AT"),
]
MORE = 4_100  # movies on further pages of the migration


async def run(database: Database, change: Callable[[Any], None]) -> None:
    async with database.begin() as (connection, _):
        await connection.run_sync(change)


def upgrade(connection: Any) -> None:
    command.upgrade(migrations._config(connection), "head")


def downgrade(connection: Any) -> None:
    command.downgrade(migrations._config(connection), "0012")


def fill(connection: Any) -> None:
    """Create the tables of the version before, and rows as it stored them."""
    command.upgrade(migrations._config(connection), "0012")
    connection.execute(
        sa.text("INSERT INTO event_head (id, epoch, seq, size) VALUES (1, :epoch, 5, 7)"), {"epoch": EPOCH}
    )
    now: Any = datetime.now(UTC) if connection.dialect.name == "postgresql" else utc_now()
    rest = {"version": 1, "created_at": now, "updated_at": now}

    def insert(name: str, *made: dict[str, Any]) -> None:
        table = sa.Table(name, sa.MetaData(), autoload_with=connection, resolve_fks=False)
        connection.execute(table.insert(), [{**values, **rest} for values in made])

    insert("genres", {"name": "Drama", "name_key": unique_key("Drama")})
    insert("actors", {"name": "Alida VALLI"})
    stored = [*STORED, *[(["noir"], ["french"], "FR")] * MORE]
    columns = ("genres", "languages", "country")
    rows = [dict(zip(columns, values, strict=True)) for values in stored]
    insert("movies", *({"title": f"M {n}", "characters_count": 0, **row} for n, row in enumerate(rows)))


async def test_names_and_countries_of_movies_become_links(
    empty_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    places = empty_places()
    database = Database(places.database_url)
    await run(database, fill)
    service = new_service(places).start()
    async with service.admin() as chief:
        await service_shows_the_links(service, chief.http)
        # Positions in the log before the migration are no longer valid, because its rows lacked the new members.
        async with service.watch(f"since={EPOCH}:5") as watcher:
            assert (await watcher.next())["operation"] == "resync"
        movie = await chief.add(actors=["alida valli"], genres=["SCI-FI"])
        assert (movie["actors"], movie["genres"]) == (["Alida VALLI"], ["Sci-Fi"])
        assert (await chief.http.delete(f"/movies/{movie['id']}")).status_code == 204
        last = max(row["id"] for row in await ok(chief.http.get("/languages?sort=-id&limit=1")))
        assert (await chief.http.delete(f"/languages/{last}")).status_code == 204
    service.stop()
    await run(database, downgrade)
    await run(database, upgrade)
    service = new_service(places).start()
    async with service.admin() as chief:
        # The language that the version before could not store is back, under an id that no other row has had.
        assert (await ok(chief.http.get("/languages?name=Klingon"))) == []
        added = await ok(chief.http.post("/languages", json={"code": None, "name": "Klingon"}), 201)
        assert added["id"] == last + 1
        assert (await chief.add())["id"] > movie["id"], "no id is used again"
    service.stop()
    await database.close()


async def service_shows_the_links(service: Service, client: Any) -> None:
    movies = await ok(client.get("/movies?limit=1000"))
    assert [(row["genres"], row["languages"], row["country"]) for row in movies[: len(SHOWN)]] == SHOWN
    assert all((row["version"], row["actors"]) == (1, []) for row in movies)
    genres = {row["name"]: row["movies_count"] for row in await ok(client.get("/genres"))}
    assert genres == {"Drama": 2, "Noir": 2 + MORE, "Sci-Fi": 2}
    languages = {
        row["name"]: (row["code"], row["movies_count"]) for row in await ok(client.get("/languages?limit=1000"))
    }
    assert {name: found for name, found in languages.items() if found[1]} == {
        "English": ("en", 2),
        "German": ("de", 2),
        "Klingon": (None, 1),
        "French": ("fr", MORE),
    }
    countries = {row["code"]: row["movies_count"] for row in await ok(client.get("/countries?limit=1000"))}
    assert {code: number for code, number in countries.items() if number} == {"AT": 2, "QQ": 1, "FR": MORE}
    assert await sql(service, "SELECT COUNT(*), SUM(position) FROM movie_genres") == [(6 + MORE, 3)]
    assert len(await ok(client.get("/languages/de/movies"))) == 2
