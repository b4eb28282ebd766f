"""Storing generated movies, with the rows that belong to them.

The counts and the average of a movie are known before the movie is stored, so it is inserted with them. All of its
characters, ratings and comments are stored in the same transaction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from random import Random
from typing import Any

from repository.accounts import invented_users
from repository.engine.transaction import Transaction
from repository.generic import links, relations, rows, writes
from repository.generic.versions import Row
from repository.generic.writes import Prepared
from resources.actors import ACTORS
from resources.characters import CHARACTERS
from resources.comments import COMMENTS
from resources.movies import MOVIES
from resources.ratings import RATINGS, average_of
from resources.resource import Resource

# The casts of one chunk are chosen from at most this many actors, whose counts change in the transaction.
TROUPE_SIZE = 50
(_OF_ACTOR,) = (parent for parent in CHARACTERS.parents if parent.resource is ACTORS)


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment by an invented user. `replies_to` is the position of another comment on the movie, or None."""

    author: int
    text: str
    replies_to: int | None


@dataclass(frozen=True, slots=True)
class Movie:
    """A movie with the rows that belong to it. Ratings are pairs of an invented user and a score."""

    row: Row
    characters: Sequence[Row]
    ratings: Sequence[tuple[int, int]]
    comments: Sequence[Comment]

    @property
    def size(self) -> int:
        """The number of rows."""
        return 1 + len(self.characters) + len(self.ratings) + len(self.comments)


@dataclass(frozen=True, slots=True)
class Source:
    """The job that generates rows, and its user. `codes` tells the codes of languages, which may be renamed."""

    job_id: str
    user_id: int | None
    codes: Mapping[str, str]


async def store(tx: Transaction, prepared: Prepared, source: Source) -> None:
    """Insert movies that `writes.prepare` made, with their links and events.

    Linked rows are found by their names or, if they were renamed, by their codes. Unknown ones are added if staff may
    add them by naming them, and otherwise left out.
    """
    resolved = await _resolve(tx, prepared.rows, source)
    if resolved.items != prepared.rows:  # the names are shown in another spelling, or left out
        make = partial(writes.prepare, MOVIES, resolved.items, source.user_id, is_sqlite=tx.is_sqlite)
        prepared = await rows.off_the_loop(len(prepared), make)
    await _store_movies(tx, prepared, resolved, source)


async def store_with_parts(tx: Transaction, movies: Sequence[Movie], source: Source, random: Random) -> None:
    """Insert movies with the rows that belong to them, and emit the events.

    `random` chooses the actors who play the characters, among those that there are. Movies show the actors of their
    characters.
    """
    casts = await _choose_casts(tx, movies, random)
    named = [{**movie.row, "actors": cast} for movie, cast in zip(movies, casts, strict=True)]
    resolved = await _resolve(tx, named, source)
    prepared = await rows.off_the_loop(len(movies), _prepare, resolved.items, movies, source, tx.is_sqlite)
    movie_ids = await _store_movies(tx, prepared, resolved, source)
    played_by = [resolved.linked(place, "actors") for place in range(len(movies))]
    characters = [
        {**character, "movie_id": movie_id, "actor_id": actor_id, "user_id": source.user_id, "version": 1}
        for movie, movie_id, cast in zip(movies, movie_ids, played_by, strict=True)
        for character, actor_id in zip_longest(movie.characters, cast)
    ]
    await _store_parts(tx, CHARACTERS, characters, source)
    played = Counter(row["actor_id"] for row in characters if row["actor_id"] is not None)
    await relations.add_to_parents(tx, _OF_ACTOR, played, source.user_id)
    if any(movie.ratings or movie.comments for movie in movies):
        users = await invented_users.ids(tx)
        ratings = [
            {"score": score, "user_id": users[user], "movie_id": movie_id, "version": 1}
            for movie, movie_id in zip(movies, movie_ids, strict=True)
            for user, score in movie.ratings
        ]
        await _store_parts(tx, RATINGS, ratings, source)
        ids = await rows.reserve_ids(tx, COMMENTS.table, sum(len(movie.comments) for movie in movies))
        comments = [
            row
            for movie, movie_id, start in zip(movies, movie_ids, _starts(movies), strict=True)
            for row in _comments(movie, movie_id, ids[start : start + len(movie.comments)], users)
        ]
        await _store_parts(tx, COMMENTS, comments, source, ids)


async def _choose_casts(tx: Transaction, movies: Sequence[Movie], random: Random) -> list[list[int]]:
    """Return the ids of actors for the characters of each movie, who are different people. They are not locked yet."""
    if not any(movie.characters for movie in movies):
        return [[] for _ in movies]
    troupe = await rows.pick(tx, ACTORS.table, random, TROUPE_SIZE)
    return [random.sample(troupe, min(len(movie.characters), len(troupe))) for movie in movies]


async def _resolve(tx: Transaction, named: Sequence[Row], source: Source) -> links.Resolved:
    async def add(resource: Resource, items: Sequence[Row]) -> None:
        await writes.store(tx, resource, items, source.user_id, source.job_id)

    return await links.resolve(tx, MOVIES, named, add=add, codes=source.codes)


async def _store_movies(tx: Transaction, prepared: Prepared, resolved: links.Resolved, source: Source) -> Sequence[int]:
    """Insert movies with their links and events, and return their ids."""
    stored = await writes.store_prepared(tx, prepared, source.user_id, source.job_id)
    ids = [id_ for id_, _ in stored]
    await links.store(tx, resolved, dict(enumerate(ids)), source.user_id)
    return ids


def _prepare(items: Sequence[Row], movies: Sequence[Movie], source: Source, is_sqlite: bool) -> Prepared:
    """Prepare movies with the counts of the rows that belong to them. Pure."""
    sums = [sum(score for _, score in movie.ratings) for movie in movies]
    made = []
    for item, movie, total in zip(items, movies, sums, strict=True):
        counts = {
            "characters_count": len(movie.characters),
            "comments_count": len(movie.comments),
            "average_rating": average_of(total, len(movie.ratings)),
            "ratings_count": len(movie.ratings),
        }
        made.append({**MOVIES.defaults, **item, "user_id": source.user_id, **MOVIES.initial, **counts, "version": 1})
    prepared = writes.prepare_whole(MOVIES, made, is_sqlite=is_sqlite)
    values = [(*row, total) for row, total in zip(prepared.values, sums, strict=True)]
    return replace(prepared, names=(*prepared.names, "ratings_sum"), values=values)


async def _store_parts(
    tx: Transaction,
    resource: Resource,
    made: Sequence[dict[str, Any]],
    source: Source,
    ids: Sequence[int] | None = None,
) -> None:
    """Insert rows that their movies count already, and emit their event."""
    if not made:
        return
    make = partial(writes.prepare_whole, resource, made, is_sqlite=tx.is_sqlite)
    stored = await writes.insert(tx, await rows.off_the_loop(len(made), make), ids)
    encoded = [payload for _, payload in stored]
    tx.emit_bulk(resource.name, "add_bulk", encoded, actor_id=source.user_id, job_id=source.job_id)


def _starts(movies: Sequence[Movie]) -> Sequence[int]:
    """Return how many comments there are before those of each movie."""
    starts, total = [], 0
    for movie in movies:
        starts.append(total)
        total += len(movie.comments)
    return starts


def _comments(movie: Movie, movie_id: int, ids: Sequence[int], users: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows of the comments on a movie. A comment replies to one before it. Pure."""
    made: list[dict[str, Any]] = []
    for comment in movie.comments:
        above = made[comment.replies_to] if comment.replies_to is not None else None
        if above is not None:
            above["replies_count"] += 1
        made.append(
            {
                "text": comment.text,
                "user_id": users[comment.author],
                "movie_id": movie_id,
                "parent_id": ids[comment.replies_to] if comment.replies_to is not None else None,
                "depth": above["depth"] + 1 if above is not None else 0,
                "deleted": False,
                "edited_at": None,
                "replies_count": 0,
                "version": 1,
            }
        )
    return made
