"""A first catalog of films: movies with their casts, and users who rate and discuss them.

The first user lists the films. A thread is a comment, followed by its replies. One transaction stores everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import select

from core.errors import Conflict
from core.identity import Group, Identity, unique_key
from core.times import utc_now
from repository.accounts import users
from repository.community import averages, comments
from repository.engine.transaction import Transaction
from repository.generic import rows, writes
from resources.actors import ACTORS
from resources.characters import CHARACTERS
from resources.genres import GENRES
from resources.movies import MOVIES, MovieBody
from resources.ratings import RATINGS
from resources.resource import Resource

HAS_MOVIES = "Expected a database without movies; use --force to add the films nevertheless"


@dataclass(frozen=True, slots=True)
class Seeded:
    """How many rows were added."""

    movies: int
    ratings: int
    comments: int


async def add_films(tx: Transaction, data: Mapping[str, Any], password_hash: str, *, even_if_not_empty: bool) -> Seeded:
    """Store films with their casts, ratings and comments, and emit the events.

    `data` has the form of `commands/seed_data.json`.
    Raises Conflict if there are movies, unless `even_if_not_empty`.
    """
    if not even_if_not_empty and (await tx.connection.execute(select(MOVIES.table.c.id).limit(1))).first():
        raise Conflict(HAS_MOVIES)
    films = data["movies"]
    people = {name: await _add_user(tx, name, password_hash) for name in data["users"]}
    lister = people[data["users"][0]]
    await _add_missing(tx, GENRES, (genre for film in films for genre in film["genres"]))
    await _add_missing(tx, ACTORS, (actor for film in films for actor, _ in film["cast"]))
    ids = await _add_movies(tx, lister, films)
    await _add_characters(tx, lister, films, ids)
    ratings = await _add_ratings(tx, people, films, ids)
    number = 0
    for film, movie_id in zip(films, ids, strict=True):
        first = None
        for name, text in film["thread"]:
            if first is None:
                first = await comments.add(tx, people[name], movie_id, text)
            else:
                await comments.reply(tx, people[name], first.id, text)
            number += 1
    return Seeded(len(ids), ratings, number)


async def _add_user(tx: Transaction, name: str, password_hash: str) -> Identity:
    """Store an account with this user name or, if it is taken, with a number after it."""
    username, number = name, 1
    while await _is_taken(tx, username):
        number += 1
        username = f"{name}{number}"
    user = await users.create(tx, {"username": username, "name": name.title()}, password_hash)
    return Identity(user["id"], Group.USER, 0.0, "", username)


async def _is_taken(tx: Transaction, username: str) -> bool:
    query = select(users.TABLE.c.id).where(users.TABLE.c.username_key == unique_key(username))
    return (await tx.connection.execute(query)).first() is not None


async def _add_missing(tx: Transaction, resource: Resource, names: Iterable[str]) -> None:
    """Store a row for each name that no row has yet, on behalf of the operator, who has no account."""
    known = await _ids(tx, resource, names := list(dict.fromkeys(names)))
    items = [
        resource.body.model_validate({"name": name}).model_dump() for name in names if unique_key(name) not in known
    ]
    await writes.store(tx, resource, items, None)


async def _ids(tx: Transaction, resource: Resource, names: Sequence[str]) -> dict[str, int]:
    """Return the lowest id of the rows with each name, by the key of the name."""
    table = resource.table
    query = select(table.c.name_key, table.c.id).where(table.c.name_key.in_([unique_key(name) for name in names]))
    found = (await tx.connection.execute(query.order_by(table.c.id.desc()))).all()
    return {row.name_key: row.id for row in found}


async def _add_movies(tx: Transaction, lister: Identity, films: Sequence[dict[str, Any]]) -> list[int]:
    actors = await _ids(tx, ACTORS, [actor for film in films for actor, _ in film["cast"]])
    items = []
    for film in films:
        facts = {name: value for name, value in film.items() if name in MovieBody.model_fields}
        cast = list(dict.fromkeys(actors[unique_key(actor)] for actor, _ in film["cast"]))
        items.append(MovieBody.model_validate({**facts, "status": "released", "actors": cast}).model_dump())
    added = await writes.add_bulk(tx, MOVIES, lister, items, skip_conflicts=False)
    return [orjson.loads(payload)["id"] for payload in added.encoded]


async def _add_characters(
    tx: Transaction, lister: Identity, films: Sequence[dict[str, Any]], ids: Sequence[int]
) -> None:
    actors = await _ids(tx, ACTORS, [actor for film in films for actor, _ in film["cast"]])
    items = [
        CHARACTERS.body.model_validate(
            {"name": name, "movie_id": movie_id, "actor_id": actors[unique_key(actor)]}
        ).model_dump()
        for film, movie_id in zip(films, ids, strict=True)
        for actor, name in film["cast"]
    ]
    await writes.add_bulk(tx, CHARACTERS, lister, items, skip_conflicts=False)


async def _add_ratings(
    tx: Transaction, people: dict[str, Identity], films: Sequence[dict[str, Any]], ids: Sequence[int]
) -> int:
    """Store the ratings of each user, then the averages of all movies, and return the number of ratings."""
    names = ("score", "user_id", "movie_id", "version")
    added: list[dict[str, Any]] = []
    for name, person in people.items():
        votes = [
            (film["ratings"][name], person.user_id, movie_id, 1)
            for film, movie_id in zip(films, ids, strict=True)
            if name in film["ratings"]
        ]
        now = utc_now()
        new_ids = await rows.reserve_ids(tx, RATINGS.table, len(votes))
        await rows.insert(tx, RATINGS.table, names, new_ids, votes, now)
        made = [
            dict(zip(RATINGS.columns, (id_, *vote, now, now), strict=True))
            for id_, vote in zip(new_ids, votes, strict=True)
        ]
        tx.emit_bulk(RATINGS.name, "add_bulk", [orjson.dumps(rating) for rating in made], actor_id=person.user_id)
        added += made
    await averages.follow(tx, (), added, None)
    return len(added)
