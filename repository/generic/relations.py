"""What a change of one entity means for others, in the same transaction and with its own events.

A movie counts its characters (`characters_count`, derived: it does not raise `version`). A character outlives its
movie: deleting the movie clears `movie_id`, so that nobody loses what somebody else wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from sqlalchemy import bindparam, select, update

import models
from core.errors import Conflict, FieldProblem
from core.times import utc_now
from repository.engine.transaction import MAX_EVENT_ITEMS, Transaction
from repository.generic import rows
from repository.generic.lists import entity
from resources.characters import CHARACTERS
from resources.movies import MOVIES
from resources.resource import Resource


async def require(tx: Transaction, resource: Resource, items: Sequence[Mapping[str, Any]], *, bulk: bool) -> None:
    """Every movie that a character names must exist; it is locked so that it stays. Raises Conflict naming the rows."""
    missing = await missing_links(tx, resource, items)
    if missing:
        raise Conflict([problem(index, items[index]["movie_id"], bulk=bulk) for index in missing])


def problem(index: int, movie_id: int, *, bulk: bool) -> FieldProblem:
    loc: tuple[str | int, ...] = ("body", index, "movie_id") if bulk else ("body", "movie_id")
    return FieldProblem(loc, f"There is no movie {movie_id}", "unknown_movie")


async def missing_links(tx: Transaction, resource: Resource, items: Sequence[Mapping[str, Any]]) -> list[int]:
    """The positions of the items that name a movie which does not exist; the movies that do are locked."""
    if resource is not CHARACTERS:
        return []
    named = sorted({item["movie_id"] for item in items if item.get("movie_id") is not None})
    if not named:
        return []
    table = models.movies
    known = await tx.connection.execute(
        select(table.c.id).where(rows.one_of(tx.is_sqlite, table.c.id, named)).order_by(table.c.id).with_for_update()
    )
    found = set(known.scalars())
    return [
        index for index, item in enumerate(items) if item.get("movie_id") is not None and item["movie_id"] not in found
    ]


async def added(tx: Transaction, resource: Resource, items: Iterable[Mapping[str, Any]], actor_id: int | None) -> None:
    if resource is CHARACTERS:
        await _recount(tx, Counter(item["movie_id"] for item in items if item["movie_id"]), actor_id)


async def edited(
    tx: Transaction,
    resource: Resource,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    actor_id: int | None,
) -> None:
    if resource is CHARACTERS:
        moved: Counter[int] = Counter()
        for old, new in zip(before, after, strict=True):
            if old["movie_id"] != new["movie_id"]:
                if old["movie_id"]:
                    moved[old["movie_id"]] -= 1
                if new["movie_id"]:
                    moved[new["movie_id"]] += 1
        await _recount(tx, moved, actor_id)


async def removing(
    tx: Transaction, resource: Resource, gone: Sequence[Mapping[str, Any]], actor_id: int | None
) -> None:
    """Before the rows go: characters of a movie that goes lose their `movie_id`, an edit like any other."""
    if resource is not MOVIES:
        return
    with_characters = [row["id"] for row in gone if row["characters_count"]]
    if not with_characters:
        return
    table = models.characters
    chosen = rows.one_of(tx.is_sqlite, table.c.movie_id, with_characters)
    last = 0
    # In slices: a movie may have more characters than one event holds.
    while True:
        found = await tx.connection.execute(
            select(table).where(chosen, table.c.id > last).order_by(table.c.id).limit(MAX_EVENT_ITEMS).with_for_update()
        )
        before = [entity(row) for row in found]
        if not before:
            return
        last = before[-1]["id"]
        now = utc_now()
        after = [{**row, "movie_id": None, "version": row["version"] + 1, "updated_at": now} for row in before]
        await tx.connection.execute(
            update(table)
            .where(rows.one_of(tx.is_sqlite, table.c.id, [row["id"] for row in before]))
            .values(movie_id=None, version=table.c.version + 1, updated_at=now)
        )
        emit_updates(tx, CHARACTERS, before, after, ["movie_id"], actor_id)


async def removed(tx: Transaction, resource: Resource, gone: Sequence[Mapping[str, Any]], actor_id: int | None) -> None:
    if resource is CHARACTERS:
        counts = Counter(item["movie_id"] for item in gone if item["movie_id"])
        await _recount(tx, Counter({movie_id: -count for movie_id, count in counts.items()}), actor_id)


async def _recount(tx: Transaction, changes: Counter[int], actor_id: int | None) -> None:
    """Add to the movies' `characters_count` and tell their watchers."""
    ids = sorted(movie_id for movie_id, change in changes.items() if change)
    if not ids:
        return
    table = models.movies
    found = await tx.connection.execute(
        select(table).where(rows.one_of(tx.is_sqlite, table.c.id, ids)).order_by(table.c.id).with_for_update()
    )
    before = [entity(row) for row in found]
    if not before:
        return
    await tx.connection.execute(
        update(table)
        .where(table.c.id == bindparam("_id"))
        .values(characters_count=table.c.characters_count + bindparam("_change")),
        [{"_id": row["id"], "_change": changes[row["id"]]} for row in before],
    )
    after = [{**row, "characters_count": row["characters_count"] + changes[row["id"]]} for row in before]
    emit_updates(tx, MOVIES, before, after, ["characters_count"], actor_id)


def emit_updates(
    tx: Transaction,
    resource: Resource,
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    changed: list[str],
    actor_id: int | None,
) -> None:
    """One `update` for one row, `update_bulk` for several."""
    if len(after) == 1:
        tx.emit(resource.name, "update", after[0], actor_id=actor_id, before=before[0], changed=changed)
        return
    tx.emit_bulk(
        resource.name,
        "update_bulk",
        [orjson.dumps(row) for row in after],
        actor_id=actor_id,
        before=[orjson.dumps(row) for row in before],
        changed=changed,
    )
