"""Writing ratings, each write together with the movie's new average.

A transaction locks the movie before the rating, as deleting the movie does, but only against deletion. It writes the
rating before the row of its movie, so votes for one movie wait for one another only briefly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import ColumnElement, and_, func, select

import models
from core.errors import Forbidden, NotFound
from core.identity import Identity
from core.times import utc_now
from repository.community import averages
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.events import Head, head_of
from repository.engine.statement import Statement, statement
from repository.engine.transaction import Transaction
from repository.generic import filter_sql, lists, rows, writes
from repository.generic.lists import Listed, ListRequest
from repository.generic.versions import IfMatch, Row
from repository.generic.writes import Stored
from resources.movies import MOVIES
from resources.ratings import RATINGS, SCORES, average_of

TABLE = models.ratings
_NEW = statement(
    "INSERT INTO ratings (score, user_id, movie_id, version, created_at, updated_at)"
    " SELECT $1::smallint, $2::bigint, id, 1, $3::text::timestamptz, $4::text::timestamptz FROM movies WHERE id = $5"
)
# The lock keeps the movie from being deleted. A vote that updates the movie does not wait for it.
_INSERT = Statement(
    f"{_NEW.sqlite} ON CONFLICT DO NOTHING RETURNING id",
    f"{_NEW.postgresql} FOR KEY SHARE ON CONFLICT DO NOTHING RETURNING id",
)

_FIND = statement(f"SELECT {', '.join(RATINGS.columns)} FROM ratings WHERE movie_id = $1 AND user_id = $2")  # noqa: S608 (names of our own columns)
_OWN = Statement(_FIND.sqlite, f"{_FIND.postgresql} FOR UPDATE")
_LOCKED_MOVIE = select(models.movies.c.id).with_for_update(read=True, key_share=True)
_SET = statement("UPDATE ratings SET score = $1, version = $2, updated_at = $3::text::timestamptz WHERE id = $4")


@dataclass(frozen=True, slots=True)
class Voted:
    """The stored rating. `is_new` tells whether the user had not rated the movie before."""

    stored: Stored
    is_new: bool


async def vote(tx: Transaction, identity: Identity, movie_id: int, score: int, *, requires_watched: bool) -> Voted:
    """Store the user's rating of a movie, or replace its score. Raises NotFound or Forbidden."""
    if requires_watched:
        await _require_movie(tx, movie_id)
        await _require_watched(tx, identity, movie_id)
    while True:
        now = utc_now()
        found = await _fetch(tx, _INSERT, score, identity.user_id, now, now, movie_id)
        if found:
            made = (found[0][0], score, identity.user_id, movie_id, 1, now, now)
            rating = dict(zip(RATINGS.columns, made, strict=True))
            payload = tx.emit(RATINGS.name, "add", rating, actor_id=identity.user_id)
            await averages.follow(tx, (), [rating], identity.user_id)
            return Voted(Stored(rating["id"], 1, payload), is_new=True)
        own = await _own(tx, identity.user_id, movie_id)
        if own is not None:
            return Voted(await _replace(tx, own, score), is_new=False)
        # There is no such movie, unless the user's rating has been deleted between the two statements.
        await _require_movie(tx, movie_id)


async def _replace(tx: Transaction, own: dict[str, Any], score: int) -> Stored:
    """Replace the score of a user's own rating, which is locked, and return the rating."""
    if own["score"] == score:
        return Stored(own["id"], own["version"], orjson.dumps(own))
    after = {**own, "score": score, "version": own["version"] + 1, "updated_at": utc_now()}
    await tx.execute_many(_SET, [tuple(after[name] for name in ("score", "version", "updated_at", "id"))])
    actor_id = own["user_id"]
    payload = tx.emit(RATINGS.name, "update", after, actor_id=actor_id, before=own, changed=["score"])
    await averages.follow(tx, [own], [after], actor_id)
    return Stored(after["id"], after["version"], payload)


async def edit(
    tx: Transaction, identity: Identity, rating_id: int, fields: Row, if_match: IfMatch, *, requires_watched: bool
) -> Stored:
    """Change a rating and return it. Raises NotFound, Forbidden or PreconditionFailed."""
    before = await _lock(tx, rating_id)
    stored = await writes.edit(tx, RATINGS, identity, rating_id, fields, if_match)
    if requires_watched and RATINGS.is_own(identity, before[0]):
        await _require_watched(tx, identity, before[0]["movie_id"])
    await averages.follow(tx, before, [{**before[0], **fields}], identity.user_id)
    return stored


async def remove(tx: Transaction, identity: Identity, rating_id: int, if_match: IfMatch) -> None:
    """Delete a rating. Raises NotFound, Forbidden or PreconditionFailed."""
    before = await _lock(tx, rating_id)
    await writes.remove(tx, RATINGS, identity, rating_id, if_match)
    await averages.follow(tx, before, (), identity.user_id)


async def remove_own(tx: Transaction, identity: Identity, movie_id: int, if_match: IfMatch) -> None:
    """Delete the user's rating of a movie. Raises NotFound or PreconditionFailed."""
    await tx.connection.execute(_LOCKED_MOVIE.where(models.movies.c.id == movie_id))
    own = await _own(tx, identity.user_id, movie_id)
    if own is None:
        raise not_rated(movie_id)
    await remove(tx, identity, own["id"], if_match)


def not_rated(movie_id: int) -> NotFound:
    return NotFound(f"You have not rated movie {movie_id}")


async def _own(tx: Transaction, user_id: int, movie_id: int) -> dict[str, Any] | None:
    """Return the user's rating of a movie, locked until COMMIT, or None."""
    found = rows.from_driver(TABLE, await _fetch(tx, _OWN, movie_id, user_id))
    return found[0] if found else None


async def _fetch(tx: Transaction, query: Statement, *values: Any) -> list[Any]:
    """Return the rows of a statement, run by the driver itself, because votes are frequent."""
    driver = await tx.driver()
    if tx.is_sqlite:
        return list(await driver.execute_fetchall(query.sqlite, values))
    return list(await driver.fetch(query.postgresql, *values))


async def _require_movie(tx: Transaction, movie_id: int) -> None:
    """Raise NotFound unless the movie exists. It cannot be deleted until COMMIT."""
    if (await tx.connection.execute(_LOCKED_MOVIE.where(models.movies.c.id == movie_id))).first() is None:
        raise NotFound(f"There is no movie {movie_id}")


async def _lock(tx: Transaction, rating_id: int) -> list[dict[str, Any]]:
    """Lock a rating after its movie, and return the rating, or nothing."""
    movie_id = select(TABLE.c.movie_id).where(TABLE.c.id == rating_id).scalar_subquery()
    await tx.connection.execute(_LOCKED_MOVIE.where(models.movies.c.id == movie_id))
    return await rows.fetch_locked(tx, TABLE, [rating_id])


async def _require_watched(tx: Transaction, identity: Identity, movie_id: int) -> None:
    """Raise Forbidden unless the user's watchlist has the movie as watched. The entry is locked until COMMIT."""
    entries = models.watchlist.c
    chosen = select(entries.status).where(entries.user_id == identity.user_id, entries.movie_id == movie_id)
    status = (await tx.connection.execute(chosen.with_for_update(read=True))).scalar_one_or_none()
    if status != "watched":
        raise Forbidden(f"Only users who have watched movie {movie_id} may rate it: set its status in your watchlist")


# --- reading


async def find_own(database: Database, user_id: int, movie_id: int) -> dict[str, Any] | None:
    """Return the user's rating of a movie, or None. Raises Unavailable."""
    chosen = select(TABLE).where(TABLE.c.movie_id == movie_id, TABLE.c.user_id == user_id)
    found = await database.select(chosen)
    return rows.entity(found[0]) if found else None


async def page_of_movie(database: Database, movie_id: int, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return a page of the ratings of a movie. Raises NotFound or Unavailable."""
    if await lists.find(database, MOVIES, movie_id) is None:
        raise NotFound(f"There is no movie {movie_id}")
    return await _page(database, TABLE.c.movie_id == movie_id, page)


async def page_of_user(database: Database, user_id: int, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return a page of the ratings that a user gave. Raises Unavailable."""
    return await _page(database, TABLE.c.user_id == user_id, page)


async def _page(database: Database, which: ColumnElement[bool], page: ListRequest) -> Listed[dict[str, Any]]:
    where = and_(which, filter_sql.where(TABLE, page.filter, is_sqlite=database.is_sqlite))
    return await lists.entities_of(database, lists.ordering_of(RATINGS), where, dict, page)


@dataclass(frozen=True, slots=True)
class Summary:
    """The number of ratings of a movie with each score, and the head of the log at which they were counted."""

    histogram: Mapping[int, int]
    head: Head

    @property
    def count(self) -> int:
        return sum(self.histogram.values())

    @property
    def average(self) -> float | None:
        return average_of(sum(score * number for score, number in self.histogram.items()), self.count)


async def summary(database: Database, movie_id: int) -> Summary:
    """Count the ratings of a movie. Raises NotFound or Unavailable."""
    head, movies = models.event_head, models.movies
    query = (
        select(head.c.epoch, head.c.seq, movies.c.id, TABLE.c.score, func.count(TABLE.c.id))
        .select_from(head)
        .outerjoin(movies, movies.c.id == movie_id)
        .outerjoin(TABLE, TABLE.c.movie_id == movies.c.id)
        .group_by(head.c.epoch, head.c.seq, movies.c.id, TABLE.c.score)
    )
    found: Sequence[Any] = await database.select(query, Lane.COSTLY)
    if found and found[0][2] is None:
        raise NotFound(f"There is no movie {movie_id}")
    counts = {row[3]: row[4] for row in found}
    return Summary({score: counts.get(score, 0) for score in SCORES}, head_of(found))
