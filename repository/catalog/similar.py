"""Movies that are similar to a movie, because they share its genres, its cast and the users who like it.

Rules:
- A movie gets GENRE_POINTS for each genre and CAST_POINTS for each actor that both movies have, and FAN_POINTS for each
  user who likes both, with a score of at least LIKED in both ratings. The cast of a movie is its actors and the actors
  of its characters; each actor counts once. Movies with equal points are in the order of their ids.
- One statement reads the movies, their number and the log's head. Its work is bounded however large the catalog is,
  because every step reads a bounded number of entries of an index: candidates are only the newest movies of each genre,
  actor and fan. The candidates with the most points in this step are compared with the movie.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from core.errors import NotFound
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.events import head_of
from repository.generic import rows
from repository.generic.lists import Listed, ListRequest
from resources.movies import MOVIES

GENRE_POINTS = 2
CAST_POINTS = 3
FAN_POINTS = 1
LIKED = 7  # the lowest score, of 1 to 10, of a user who likes a movie

MAX_SIMILAR_MOVIES = 100
# What is read of the movie itself: its links (at most MAX_LINKED_ROWS each), the actors of its first characters, and
# the users who like it among those of its newest ratings.
MAX_COMPARED_CHARACTERS = 50
MAX_COMPARED_RATERS = 50
# What is read for each genre, actor and fan of the movie: the newest movies, characters and ratings.
MOVIES_PER_LINK = 200
CHARACTERS_PER_ACTOR = 50
RATINGS_PER_FAN = 50
MAX_CANDIDATES = 500


def _newest(source: str, table: str, key: str, order: str, limit: int, *, is_sqlite: bool) -> str:
    """Return a join with the newest rows of `table` for each row of `source`, which are found in an index."""
    newest = (
        f'"{table}" AS "first" WHERE "first"."{key}" = "{source}"."id" ORDER BY "first"."{order}" DESC LIMIT {limit}'
    )
    if is_sqlite:  # SQLite has no LATERAL, and PostgreSQL would test every row against the subquery of this IN
        chosen = f'"row"."{order}" IN (SELECT "first"."{order}" FROM {newest})'  # noqa: S608 (names of our own tables)
        return f'"{source}" CROSS JOIN "{table}" AS "row" ON "row"."{key}" = "{source}"."id" AND {chosen}'
    return f'"{source}" CROSS JOIN LATERAL (SELECT * FROM {newest}) AS "row"'  # noqa: S608 (as above)


def _linked(table: str, key: str) -> str:
    """Return a query for the links of the candidates to rows that the movie links to, too."""
    own = f"own_{table.removeprefix('movie_')}"
    return (
        f'SELECT "candidates"."id", "row"."{key}" FROM "candidates"'  # noqa: S608 (names of our own tables)
        f' CROSS JOIN "{table}" AS "row" WHERE "row"."movie_id" = "candidates"."id"'
        f' AND "row"."{key}" IN (SELECT "id" FROM "{own}")'
    )


def _text(*, is_sqlite: bool) -> str:
    """Return the statement, with the parameters `movie_id`, `limit` and `offset`.

    Each of its columns begins with those of `head_of`; the total and the number of movies with the id follow.
    """
    shown = ", ".join(f'"movies"."{name}"' for name in MOVIES.columns)
    by_genre = _newest("own_genres", "movie_genres", "genre_id", "movie_id", MOVIES_PER_LINK, is_sqlite=is_sqlite)
    by_actor = _newest("own_actors", "movie_actors", "actor_id", "movie_id", MOVIES_PER_LINK, is_sqlite=is_sqlite)
    by_role = _newest("own_actors", "characters", "actor_id", "id", CHARACTERS_PER_ACTOR, is_sqlite=is_sqlite)
    by_fan = _newest("fans", "ratings", "user_id", "id", RATINGS_PER_FAN, is_sqlite=is_sqlite)
    return f"""
        WITH "own_genres" AS (SELECT "genre_id" AS "id" FROM "movie_genres" WHERE "movie_id" = :movie_id),
        "own_actors" AS (
            SELECT "actor_id" AS "id" FROM "movie_actors" WHERE "movie_id" = :movie_id
            UNION SELECT "actor_id" FROM (
                SELECT "actor_id" FROM "characters" WHERE "movie_id" = :movie_id
                ORDER BY "id" LIMIT {MAX_COMPARED_CHARACTERS}
            ) AS "roles" WHERE "actor_id" IS NOT NULL
        ),
        "fans" AS (
            SELECT "user_id" AS "id" FROM (
                SELECT "user_id", "score" FROM "ratings" WHERE "movie_id" = :movie_id
                ORDER BY "id" DESC LIMIT {MAX_COMPARED_RATERS}
            ) AS "newest" WHERE "score" >= {LIKED}
        ),
        "roles" AS (
            SELECT DISTINCT "row"."movie_id" AS "id", "row"."actor_id" FROM {by_role}
            WHERE "row"."movie_id" IS NOT NULL
        ),
        "likes" AS (SELECT "row"."movie_id" AS "id" FROM {by_fan} WHERE "row"."score" >= {LIKED}),
        "found" AS (
            SELECT "row"."movie_id" AS "id", {GENRE_POINTS} AS "points" FROM {by_genre}
            UNION ALL SELECT "row"."movie_id", {CAST_POINTS} FROM {by_actor}
            UNION ALL SELECT "id", {CAST_POINTS} FROM "roles"
            UNION ALL SELECT "id", {FAN_POINTS} FROM "likes"
        ),
        "candidates" AS (
            SELECT "id" FROM "found" WHERE "id" <> :movie_id
            GROUP BY "id" ORDER BY sum("points") DESC, "id" LIMIT {MAX_CANDIDATES}
        ),
        "shared" AS (
            SELECT "id", {GENRE_POINTS} AS "points" FROM ({_linked("movie_genres", "genre_id")}) AS "genres"
            UNION ALL SELECT "id", {CAST_POINTS} FROM (
                {_linked("movie_actors", "actor_id")} UNION SELECT "id", "actor_id" FROM "roles"
            ) AS "actors"
            UNION ALL SELECT "id", {FAN_POINTS} FROM "likes"
        ),
        "ranked" AS (
            SELECT "id", sum("points") AS "points" FROM "shared" WHERE "id" IN (SELECT "id" FROM "candidates")
            GROUP BY "id" ORDER BY "points" DESC, "id" LIMIT {MAX_SIMILAR_MOVIES}
        ),
        "page" AS (SELECT * FROM "ranked" ORDER BY "points" DESC, "id" LIMIT :limit OFFSET :offset)
        SELECT "head"."epoch", "head"."seq", (SELECT count(*) FROM "ranked"),
            (SELECT count(*) FROM "movies" WHERE "id" = :movie_id), {shown}
        FROM "event_head" AS "head"
        LEFT JOIN ("page" JOIN "movies" ON "movies"."id" = "page"."id") ON true
        ORDER BY "page"."points" DESC, "page"."id"
    """  # noqa: S608 (names of our own tables)


_STATEMENTS = {is_sqlite: sa.text(_text(is_sqlite=is_sqlite)) for is_sqlite in (True, False)}


async def page_of(database: Database, movie_id: int, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return a page of the movies that are similar to a movie, the most similar first.

    Raises NotFound if there is no such movie, and Unavailable.
    """
    values = {"movie_id": movie_id, "limit": page.limit, "offset": page.offset}
    typed = (sa.bindparam(name, value, type_=sa.BigInteger) for name, value in values.items())
    found = await database.select(_STATEMENTS[database.is_sqlite].bindparams(*typed), Lane.COSTLY)
    head = head_of(found)
    total, known, first = found[0][2:5]
    if not known:
        raise NotFound(f"There is no movie {movie_id}")
    shown = [] if first is None else rows.from_driver(MOVIES.table, [row[4:] for row in found])
    return Listed(shown, total, head)
