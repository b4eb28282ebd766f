"""Fill an empty database with a large catalog, past the API and the event log, for other benchmarks to read.

python -m bench.catalog DATABASE_URL [movies]

Each movie has three characters and, on average, one rating. Most ratings are of few movies. Movie 1 has a tree of
10,000 comments. A seed makes all catalogs of one size equal.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta
from itertools import accumulate, chain, islice
from random import Random
from typing import Any

import asyncpg

import models
from core.times import utc_now
from repository import search
from repository.engine import migrations
from repository.engine.database import Database
from repository.generic import writes
from resources.actors import ACTORS
from resources.characters import CHARACTERS
from resources.comments import COMMENTS
from resources.genres import GENRES
from resources.movies import MOVIES
from resources.ratings import average_of
from resources.resource import Resource

USERS = 10_000
ROWS_AT_A_TIME = 20_000
ROWS_OF_A_STATEMENT = 1_000
CHARACTERS_PER_MOVIE = 3
COMMENTS_ON_ONE_MOVIE = 10_000
GENRE_NAMES = tuple(f"Genre {number}" for number in range(20))
STATUSES = ("released", "released", "released", "in_production", "announced")


class Vocabulary:
    """Words of which few are frequent, as in natural texts."""

    def __init__(self, chance: Random, size: int = 30_000) -> None:
        syllables = [first + vowel + last for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in ("", "n", "r")]
        found = {"".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(2 * size)}
        self._words = sorted(found)[:size]
        chance.shuffle(self._words)
        self._weights = list(accumulate(1 / (rank + 10) for rank in range(len(self._words))))
        self._chance = chance

    def text(self, shortest: int, longest: int) -> str:
        count = self._chance.randint(shortest, longest)
        return " ".join(self._chance.choices(self._words, cum_weights=self._weights, k=count)).capitalize()


class Target:
    """A database to fill."""

    def __init__(self, database: Database, connection: Any) -> None:
        self._database = database
        self._connection = connection

    async def insert(self, table: str, columns: Sequence[str], records: Iterable[tuple[Any, ...]]) -> None:
        listed = list(records)
        if self._database.is_sqlite:
            names = ", ".join(f'"{name}"' for name in columns)
            marks = f"({', '.join('?' * len(columns))})"
            for start in range(0, len(listed), ROWS_OF_A_STATEMENT):
                some = listed[start : start + ROWS_OF_A_STATEMENT]
                query = f'INSERT INTO "{table}" ({names}) VALUES {", ".join([marks] * len(some))}'
                self._connection.execute(query, list(chain.from_iterable(some)))
            self._connection.commit()
        else:
            await self._connection.copy_records_to_table(table, records=listed, columns=list(columns))

    async def add(self, resource: Resource, first: int, items: Sequence[dict[str, Any]], user_id: int) -> None:
        prepared = writes.prepare(resource, items, user_id, is_sqlite=self._database.is_sqlite)
        now: Any = utc_now()
        moment = now if self._database.is_sqlite else datetime.fromisoformat(now)
        columns = ("id", *prepared.names, "created_at", "updated_at")
        records = ((first + n, *values, moment, moment) for n, values in enumerate(prepared.values))
        await self.insert(resource.table.name, columns, records)
        await self.index(resource, ((first + n, *values) for n, values in enumerate(prepared.indexed)))

    async def index(self, resource: Resource, words: Iterable[tuple[Any, ...]]) -> None:
        await self.insert(f"{resource.name}_search", models.WORDS[resource.name].columns.keys(), words)

    async def run(self, statement: str) -> None:
        if self._database.is_sqlite:
            self._connection.executescript(statement)
        else:
            await self._connection.execute(statement)


def in_chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, ROWS_AT_A_TIME)):
        yield chunk


async def fill(target: Target, movies: int, *, is_sqlite: bool) -> None:
    chance = Random(movies)
    words = Vocabulary(chance)
    now = utc_now()
    moment: Any = now if is_sqlite else datetime.fromisoformat(now)
    people = (
        (n, f"user {n}", f"user {n}", "no hash", "user", True, False, 1, moment, moment) for n in range(1, USERS + 1)
    )
    columns = ("id", "username", "username_key", "password_hash", "group", "is_active", "awaits_activation")
    await target.insert("users", (*columns, "version", "created_at", "updated_at"), people)
    await target.add(GENRES, 1, [{"name": name} for name in GENRE_NAMES], 1)
    actors = [f"{words.text(1, 1)} {words.text(1, 1)}" for _ in range(max(100, movies // 10))]
    for number, some in enumerate(in_chunks(actors)):
        await target.add(ACTORS, 1 + number * ROWS_AT_A_TIME, [{"name": name} for name in some], 1)

    votes = _votes(chance, movies)
    counts = Counter(movie for movie, _, _ in votes)
    sums: Counter[int] = Counter()
    for movie, _, score in votes:
        sums[movie] += score
    links: Counter[int] = Counter()
    cast: Counter[int] = Counter()
    for chunk in in_chunks(range(1, movies + 1)):
        made, genres, played = [], [], []
        for movie in chunk:
            chosen = chance.sample(range(len(GENRE_NAMES)), chance.randint(1, 3))
            genres += [(genre + 1, movie, place) for place, genre in enumerate(chosen)]
            actor = chance.randrange(len(actors))
            played.append((actor + 1, movie, 0))
            links.update(genre + 1 for genre in chosen)
            cast[actor + 1] += 1
            made.append(
                {
                    "title": words.text(1, 4),
                    "description": words.text(5, 25),
                    "release_date": (date(1930, 1, 1) + timedelta(days=chance.randrange(36_000))).isoformat(),
                    "rating": chance.randint(1, 100),
                    "duration_minutes": chance.randint(60, 240),
                    "status": chance.choice(STATUSES),
                    "budget": chance.randrange(10**8),
                    "revenue": chance.randrange(10**9),
                    "country": chance.choice(("FR", "GB", "US", "DE", "JP")),
                    "languages": ["English"],
                    "genres": [GENRE_NAMES[genre] for genre in chosen],
                    "actors": [actors[actor]],
                }
            )
        await target.add(MOVIES, chunk[0], made, chance.randint(1, USERS))
        await target.insert("movie_genres", ("genre_id", "movie_id", "position"), genres)
        await target.insert("movie_actors", ("actor_id", "movie_id", "position"), played)
        print(f"{chunk[-1]:,} movies", end="\r", flush=True)
    for chunk in in_chunks(range(movies * CHARACTERS_PER_MOVIE)):
        roles = [
            {
                "name": f"{words.text(1, 1)} {words.text(1, 1)}",
                "description": words.text(3, 10),
                "movie_id": n // CHARACTERS_PER_MOVIE + 1,
                "actor_id": chance.randint(1, len(actors)),
            }
            for n in chunk
        ]
        await target.add(CHARACTERS, chunk[0] + 1, roles, chance.randint(1, USERS))
        print(f"{chunk[-1]:,} characters", end="\r", flush=True)
    for chunk in in_chunks(votes):
        records = ((score, user, movie, 1, moment, moment) for movie, user, score in chunk)
        await target.insert("ratings", ("score", "user_id", "movie_id", "version", "created_at", "updated_at"), records)
    averages = [(counts[each], sums[each], average_of(sums[each], counts[each]), each) for each in sorted(counts)]
    await _comment(target, chance, words, moment)
    await _derive(target, averages, links, cast, is_sqlite=is_sqlite)


def _votes(chance: Random, movies: int) -> list[tuple[int, int, int]]:
    """Return the movie, the user and the score of each rating. The movies with low numbers have most of them."""
    found: set[tuple[int, int]] = set()
    while len(found) < movies:
        movie = int(chance.random() ** 3 * movies) + 1
        found.add((movie, chance.randint(1, USERS)))
    return [(movie, user, chance.randint(1, 10)) for movie, user in sorted(found)]


async def _comment(target: Target, chance: Random, words: Vocabulary, moment: Any) -> None:
    """Add a tree of comments to movie 1. A tenth of them are no replies."""
    parents: list[int | None] = []
    depths: list[int] = []
    for number in range(COMMENTS_ON_ONE_MOVIE):
        parent = None if number < 100 or chance.random() < 0.1 else chance.randrange(number)
        depths.append(0 if parent is None else depths[parent] + 1)
        parents.append(None if parent is None else parent + 1)
    texts = [words.text(5, 50) for _ in parents]
    columns = ("id", "text", "user_id", "movie_id", "parent_id", "depth", "deleted", "replies_count", "version")
    records = (
        (number, text, number, 1, parent, depth, False, 0, 1, moment, moment)
        for number, (text, parent, depth) in enumerate(zip(texts, parents, depths, strict=True), 1)
    )
    await target.insert("comments", (*columns, "created_at", "updated_at"), records)
    found = enumerate(search.index_rows(COMMENTS, [{"text": text} for text in texts]), 1)
    await target.index(COMMENTS, ((number, *values) for number, values in found))


async def _derive(
    target: Target, averages: Sequence[tuple[Any, ...]], links: Counter[int], cast: Counter[int], *, is_sqlite: bool
) -> None:
    """Set the derived columns, and let the database learn how many rows there are of what."""
    await target.run("CREATE TABLE derived (count BIGINT, sum BIGINT, average DOUBLE PRECISION, id BIGINT PRIMARY KEY)")
    for chunk in in_chunks(averages):
        await target.insert("derived", ("count", "sum", "average", "id"), chunk)
    await target.run(
        f"UPDATE movies SET characters_count = {CHARACTERS_PER_MOVIE};"
        "UPDATE movies SET ratings_count = derived.count, ratings_sum = derived.sum, average_rating = derived.average"
        " FROM derived WHERE derived.id = movies.id;"
        "DROP TABLE derived;"
        f"UPDATE movies SET comments_count = {COMMENTS_ON_ONE_MOVIE} WHERE id = 1;"
        "UPDATE comments SET replies_count = found.count FROM (SELECT parent_id, count(*) AS count FROM comments"
        " GROUP BY parent_id) AS found WHERE found.parent_id = comments.id;"
        + "".join(f"UPDATE genres SET movies_count = {count} WHERE id = {each};" for each, count in links.items())
    )
    if is_sqlite:
        for name in models.WORDS:
            await target.run(f"INSERT INTO {name}_fts({name}_fts) VALUES ('rebuild')")
        await target.run("ANALYZE; PRAGMA wal_checkpoint(TRUNCATE)")
        return
    for table in ("users", "genres", "actors", "movies", "characters", "ratings", "comments"):
        await target.run(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}")
    await target.run("VACUUM ANALYZE")


async def main(url: str, movies: int) -> None:
    started = time.monotonic()
    database = Database(url)
    await migrations.migrate(database)
    if database.is_sqlite:
        connection: Any = sqlite3.connect(url.removeprefix("sqlite:///"))
        connection.execute("PRAGMA synchronous = OFF")
    else:
        connection = await asyncpg.connect(url)
    await fill(Target(database, connection), movies, is_sqlite=database.is_sqlite)
    await database.close()
    print(f"{movies:,} movies in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000))
