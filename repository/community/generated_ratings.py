"""Ratings of existing movies by invented users.

A transaction locks the movies before it reads who has rated them. Invented users rate only here and together with new
movies, so no other transaction can store the same rating.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from sqlalchemy import ColumnElement, func, select

from core.identity import Identity
from repository.accounts import audit, invented_users
from repository.accounts.invented_users import INVENTED_USERS
from repository.community import averages
from repository.engine.transaction import Transaction
from repository.generic import rows, writes
from repository.generic.versions import Row
from resources.movies import MOVIES
from resources.ratings import RATINGS

# Chosen at random for each movie, and limited by the number of users who can still rate it.
RATINGS_OF_MOVIE = (1, 2, 3, 3, 4, 5, 6, 8, 12)
# Whole movies are in the events of their averages, so that many of them, with long texts, are too much for one
# transaction. If so few movies are too few for the ratings, each gets a multiple of its ratings.
MOVIES_AT_ONCE = 250

TABLE = RATINGS.table
_MOVIES = MOVIES.table.c
# A movie with fewer ratings has not been rated by all invented users.
_CAN_BE_RATED = _MOVIES.ratings_count < INVENTED_USERS
Score = Callable[[Random, Row], int]


async def add(tx: Transaction, identity: Identity, count: int, random: Random, score: Score, job_id: str) -> int:
    """Store `count` ratings of movies that `random` chooses, with their events, and return how many were stored.

    Fewer are stored if there are not enough movies with fewer ratings than there are invented users. `score` returns
    the score that a user gives to a movie. The identity is of the user who generates the ratings.
    """
    users = await invented_users.ids(tx)
    total = 0
    while total < count:
        made = await _made(tx, users, count - total, random, score)
        if not made:
            break
        make = partial(writes.prepare_whole, RATINGS, made, is_sqlite=tx.is_sqlite)
        stored = await writes.insert(tx, await rows.off_the_loop(len(made), make))
        encoded = [payload for _, payload in stored]
        tx.emit_bulk(RATINGS.name, "add_bulk", encoded, actor_id=identity.user_id, job_id=job_id)
        await averages.follow(tx, (), made, identity.user_id)
        await audit.record_for_rows(tx, "create", RATINGS.name, identity, [{"id": id_} for id_, _ in stored])
        total += len(made)
    return total


async def _made(
    tx: Transaction, users: Sequence[int], count: int, random: Random, score: Score
) -> list[dict[str, Any]]:
    """Return up to `count` ratings to store; none if no movie is left to rate. Their movies are locked until COMMIT."""
    wanted = await _choose(tx, count, random)
    movies = await rows.fetch_locked(tx, MOVIES.table, list(wanted))
    taken = await _taken(tx, users, list(wanted))
    made: list[dict[str, Any]] = []
    for movie in movies:
        free = [user for user in users if (movie["id"], user) not in taken]
        chosen = random.sample(free, min(wanted[movie["id"]], len(free)))
        made += [
            {"score": score(random, movie), "user_id": user, "movie_id": movie["id"], "version": 1} for user in chosen
        ]
    return made


async def _choose(tx: Transaction, count: int, random: Random) -> Mapping[int, int]:
    """Return how many ratings which movies get, `count` in all if possible. The movies are not locked yet."""
    found = await _candidates(tx, min(count, MOVIES_AT_ONCE), random)
    factor = 1 + count // (len(found) * RATINGS_OF_MOVIE[-1]) if found else 0
    wanted: dict[int, int] = {}
    left = count
    for movie_id, ratings_count in found:
        number = min(random.choice(RATINGS_OF_MOVIE) * factor, INVENTED_USERS - ratings_count, left)
        wanted[movie_id] = number
        left -= number
        if not left:
            break
    return wanted


async def _candidates(tx: Transaction, count: int, random: Random) -> Sequence[tuple[int, int]]:
    """Return the ids and numbers of ratings of up to `count` movies that can be rated, from a random movie on."""
    lowest, highest = (await tx.connection.execute(select(func.min(_MOVIES.id), func.max(_MOVIES.id)))).one()
    if lowest is None:
        return []
    start = random.randint(lowest, highest)
    found = await _page(tx, _MOVIES.id >= start, count)
    return found if len(found) == count else [*found, *await _page(tx, _MOVIES.id < start, count - len(found))]


async def _page(tx: Transaction, which: ColumnElement[bool], count: int) -> list[tuple[int, int]]:
    query = select(_MOVIES.id, _MOVIES.ratings_count).where(which, _CAN_BE_RATED).order_by(_MOVIES.id).limit(count)
    return [(row.id, row.ratings_count) for row in await tx.connection.execute(query)]


async def _taken(tx: Transaction, users: Sequence[int], movie_ids: Sequence[int]) -> set[tuple[int, int]]:
    """Return who of the invented users has rated which of the movies."""
    if not movie_ids:
        return set()
    query = select(TABLE.c.movie_id, TABLE.c.user_id).where(
        rows.one_of(tx.is_sqlite, TABLE.c.movie_id, movie_ids), rows.one_of(tx.is_sqlite, TABLE.c.user_id, users)
    )
    return {(row.movie_id, row.user_id) for row in await tx.connection.execute(query)}
